"""Safe files: a kill, an exception or an error of the system at any moment leaves the old file or the new one; writers of one path wait for
each other; leftovers of dead writers go and those of living ones stay; links, modes and foreign files are left as they are."""
import errno, hashlib, multiprocessing as mp, os, random, resource, signal, sys, threading, time, traceback
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np
import pytest

from dl2lib import safefile as sf
from dl2lib.safefile import digest, locked, new_file, new_folder, sweep

OLD, NEW = b'old!'*50_000, b'new!'*50_000


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def there(): return sorted(os.listdir())
def touch(name): Path(name).touch()

def write(path='w.bin', data=NEW, **kwargs):
    with new_file(path, **kwargs) as f:
        for i in range(0, len(data), 20_000): f.write(data[i:i+20_000])

class Child:
    "Runs f() in a forked process."
    def __init__(self, f):
        def work():
            signal.signal(signal.SIGINT, signal.default_int_handler) # a background shell lets its children ignore it
            try: f()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        self.p = mp.get_context('fork').Process(target=work)
        self.p.start()
    def kill(self): self.p.kill(); return self.end()
    def end(self):
        wait_for(lambda: self.p.exitcode is not None) # `join` would wait for children of a killed process too
        return self.p.exitcode

def wait_for(cond, seconds=60):
    end = time.monotonic()+seconds
    while not cond():
        assert time.monotonic() < end, 'nothing happened'
        time.sleep(.002)

@contextmanager
def holding(path='w.bin', f=lambda: None):
    "Another process has the lock of `path`, having done f()."
    def work():
        with locked(path):
            f()
            touch('held')
            time.sleep(60)
    child = Child(work)
    wait_for(lambda: os.path.exists('held'))
    os.unlink('held')
    yield child
    child.kill()


# Whole, whatever happens

def test_a_file_is_written_and_replaced():
    for data in OLD, NEW, b'':
        write(data=data)
        assert Path('w.bin').read_bytes() == data and there() == ['w.bin']

def test_until_the_block_ends_the_old_file_is_there():
    write(data=OLD)
    with new_file('w.bin') as f:
        f.write(NEW)
        f.flush()
        assert Path('w.bin').read_bytes() == OLD
        assert Path(f.name).read_bytes() == NEW, 'what is written can be read back from f.name'
    assert Path('w.bin').read_bytes() == NEW

@pytest.mark.parametrize('exc', [KeyboardInterrupt, ZeroDivisionError, SystemExit, GeneratorExit])
def test_an_exception_in_the_block_leaves_the_old_and_nothing_else(exc):
    write(data=OLD)
    with pytest.raises(exc):
        with new_file('w.bin') as f:
            f.write(NEW)
            raise exc
    with pytest.raises(exc):
        with new_folder('folder') as tmp:
            touch(tmp/'a')
            raise exc
    assert Path('w.bin').read_bytes() == OLD and there() == ['w.bin']
    write(wait=False) # the lock is free

def at_line(n, act, files=None):
    "Do act() at the n-th line of Python from here on, those of libraries too unless `files` are named. -> a list that holds how many are left"
    left = [n]
    def step(frame, event, arg):
        if files and frame.f_code.co_filename not in files: return
        if event == 'line':
            left[0] -= 1
            if left[0] == 0: act()
        return step
    sys.settrace(step)
    return left

def die(): os.kill(os.getpid(), signal.SIGKILL)

def lines_of(f, files=None):
    "How many lines of Python f() executes in a forked process."
    def count():
        left = at_line(10**9, die, files)
        f()
        sys.settrace(None)
        Path('count').write_text(str(10**9-left[0]))
    assert Child(count).end() == 0
    n = int(Path('count').read_text())
    os.unlink('count')
    return n

def test_killed_at_any_line_there_is_the_old_or_the_new():
    write(data=OLD)
    n = lines_of(write)
    rng, outcomes = random.Random(0), []
    for k in sorted([*rng.sample(range(1, n), 40), n-20]):
        write(data=OLD)
        def killed():
            at_line(k, die)
            write()
        assert Child(killed).end() in (-signal.SIGKILL, 0)
        outcomes.append({OLD: 'old', NEW: 'new'}[Path('w.bin').read_bytes()])
    assert outcomes[0] == 'old' and outcomes[-1] == 'new'
    write()
    assert there() == ['w.bin'] # the leftovers are swept

def test_killed_at_random_moments():
    write(data=OLD)
    def again():
        while True: write(); write(data=OLD)
    rng = random.Random(1)
    for _ in range(25):
        child = Child(again)
        time.sleep(rng.random()*.05)
        assert child.kill() == -signal.SIGKILL
        assert Path('w.bin').read_bytes() in (OLD, NEW)
    write()
    assert there() == ['w.bin']

def test_interrupted_at_any_line_of_ours_the_lock_is_free_and_the_file_whole():
    write(data=b'after 0')
    files = sf.__file__, __file__
    def press(): raise KeyboardInterrupt
    def interrupted(k):
        at_line(k, press, files)
        try: write()
        except KeyboardInterrupt: pass
        finally: sys.settrace(None)
        assert Path('w.bin').read_bytes() in (b'after %d' % (k-1), NEW)
        other = threading.Thread(target=write, kwargs=dict(data=b'after %d' % k, wait=False)) # fails if the lock is still held
        other.start()
        other.join()
        assert Path('w.bin').read_bytes() == b'after %d' % k
    n = lines_of(write, files)
    assert n > 50
    def all_of_them():
        for k in range(1, n): interrupted(k)
    assert Child(all_of_them).end() == 0
    write()
    assert there() == ['w.bin']

def test_ctrl_c_in_another_process():
    write(data=OLD)
    def slow():
        try:
            with new_file('w.bin') as f:
                touch('begun')
                time.sleep(60)
        except KeyboardInterrupt: return
    child = Child(slow)
    wait_for(lambda: os.path.exists('begun'))
    os.kill(child.p.pid, signal.SIGINT)
    assert child.end() == 0
    assert Path('w.bin').read_bytes() == OLD and there() == ['begun', 'w.bin']

def test_the_disk_has_the_data_before_the_rename_and_the_name_after_it(monkeypatch):
    calls = []
    for name in 'fsync', 'replace', 'rename':
        real = getattr(os, name)
        def call(*args, name=name, real=real):
            what = os.fstat(args[0]) if name == 'fsync' else None
            calls.append(name if what is None else 'fsync of a folder' if os.path.isdir(f'/proc/self/fd/{args[0]}') else 'fsync')
            return real(*args)
        monkeypatch.setattr(os, name, call)
    write()
    assert calls == ['fsync', 'replace', 'fsync of a folder']
    calls.clear()
    with new_folder('folder') as tmp:
        (tmp/'sub').mkdir()
        touch(tmp/'sub'/'a')
    assert sorted(calls[:-2]) == ['fsync', 'fsync of a folder'] and calls[-2:] == ['rename', 'fsync of a folder']

def test_a_folder_that_cannot_be_synced_is_no_error(monkeypatch):
    real = os.fsync
    def fsync(fd):
        if os.path.isdir(f'/proc/self/fd/{fd}'): raise OSError(errno.EINVAL, 'not here')
        return real(fd)
    monkeypatch.setattr(os, 'fsync', fsync)
    write()
    assert Path('w.bin').read_bytes() == NEW


# Errors of the system

@pytest.mark.parametrize('code, says', [('ENOSPC', 'the disk is full: make room'), ('EDQUOT', 'quota'), ('EACCES', 'may not write'), ('EROFS', 'read-only'),
                                        ('EIO', 'input/output error'), ('EFBIG', 'ulimit')])
@pytest.mark.parametrize('call', ['open', 'fsync', 'replace'])
def test_an_error_at_any_step_names_the_file_and_the_remedy(monkeypatch, call, code, says):
    write(data=OLD)
    number = getattr(errno, code)
    def fail(*args, **kwargs): raise OSError(number, os.strerror(number))
    with monkeypatch.context() as m:
        m.setattr(*((sf, 'open') if call == 'open' else (os, call)), fail, raising=False)
        with pytest.raises(OSError, match=f"cannot be written; .*{says}.*What was there before is still there: 'w.bin'") as e: write()
    assert e.value.errno == number and e.value.filename == 'w.bin'
    assert Path('w.bin').read_bytes() == OLD and there() == ['w.bin']

def test_a_file_that_may_not_be_so_large():
    write(data=OLD)
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        with pytest.raises(OSError, match=r'ulimit -f.*w\.bin') as e: write()
        assert e.value.errno == errno.EFBIG
    assert Child(limited).end() == 0
    assert Path('w.bin').read_bytes() == OLD and there() == ['w.bin']

@pytest.mark.parametrize('path, error, says', [
    ('file/w.bin', NotADirectoryError, 'its folder is a file'), ('file/below/w.bin', NotADirectoryError, 'its folder is a file'),
    ('nowhere/w.bin', FileNotFoundError, 'no such folder: make it first'), ('folder', IsADirectoryError, 'give the path of a file'),
    ('/', IsADirectoryError, 'give the path of a file'), ('.', IsADirectoryError, 'give the path of a file'), ('fifo', FileExistsError, 'something else is there'), ('n'*250, OSError, 'too long')])
def test_a_place_that_cannot_be_written_is_named(path, error, says):
    touch('file')
    os.mkdir('folder')
    os.mkfifo('fifo')
    before = there()
    with pytest.raises(error, match=says) as e: write(path)
    assert e.value.filename == path and there() == before

@pytest.mark.parametrize('path, error, says', [('file/d', NotADirectoryError, 'its folder is a file'), ('nowhere/d', FileNotFoundError, 'make it first'),
                                               ('file', FileExistsError, 'remove it, or give another path'), ('folder', FileExistsError, 'something else'),
                                               ('dangling', FileNotFoundError, 'make it first')])
def test_a_folder_that_cannot_be_made_is_named(path, error, says):
    touch('file')
    os.mkdir('folder')
    os.symlink('nowhere/x', 'dangling')
    before = there()
    with pytest.raises(error, match=says) as e:
        with new_folder(path): pass
    assert e.value.filename == path and there() == before

@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_read_only_folder_is_named():
    os.mkdir('folder', mode=0o500)
    with pytest.raises(PermissionError, match='may not write there.*w.bin'): write('folder/w.bin')

def test_a_lock_that_may_not_be_made_is_explained(monkeypatch):
    real = os.open
    def shut(p, *args, **kwargs):
        if str(p).endswith('.lock'): raise PermissionError(errno.EACCES, 'Permission denied', str(p))
        return real(p, *args, **kwargs)
    monkeypatch.setattr(os, 'open', shut)
    with pytest.raises(PermissionError, match="you may not write there: give another folder.*'w.bin'"): write()

@pytest.mark.parametrize('e', [FileNotFoundError(errno.ENOENT, 'gone', 'image.jpg'), PermissionError(errno.EACCES, 'shut', '/elsewhere/w.bin'),
                               ConnectionResetError(errno.ECONNRESET, 'reset'), TimeoutError('no answer'),
                               BlockingIOError(errno.EAGAIN, 'a socket')])
def test_an_error_of_the_users_own_stays_as_it_is(e):
    for opened in new_file, new_folder:
        with pytest.raises(OSError) as got:
            with opened('w.bin'): raise e
        assert got.value is e and there() == []


# Links, modes, and other files

@pytest.mark.parametrize('absolute', [True, False])
@pytest.mark.parametrize('before', [True, False])
def test_a_link_stays_a_link(before, absolute, tmp_path):
    os.mkdir('elsewhere')
    if before: write('elsewhere/b.bin', OLD)
    os.symlink(tmp_path/'elsewhere/b.bin' if absolute else 'elsewhere/b.bin', 'a.bin')
    os.symlink('a.bin', 'link to a link')
    write('link to a link')
    assert os.path.islink('a.bin') and os.path.islink('link to a link') and Path('elsewhere/b.bin').read_bytes() == NEW
    assert os.listdir('elsewhere') == ['b.bin'] and there() == ['a.bin', 'elsewhere', 'link to a link']

def test_two_names_of_a_file_have_one_lock():
    write()
    os.symlink('w.bin', 'link.bin')
    os.symlink('.', 'here')
    for name in 'link.bin', 'here/w.bin', os.path.abspath('w.bin'):
        with holding(name):
            with pytest.raises(BlockingIOError): write(wait=False)

def test_a_private_file_stays_private():
    write(data=OLD)
    os.chmod('w.bin', 0o600)
    write()
    assert os.stat('w.bin').st_mode & 0o777 == 0o600

def test_a_new_file_has_the_mode_that_open_gives():
    before = os.umask(0o027)
    try:
        write()
        open('plain', 'w').close()
    finally: os.umask(before)
    assert os.stat('w.bin').st_mode == os.stat('plain').st_mode

STRANGERS = ['.w.bin.tmp', '.w.bin.0123.tmp', '.w.bin.0123abcg.tmp', 'w.bin.0123abcd.tmp', '.xw.bin.0123abcd.tmp', '.w.bin.x.0123abcd.tmp', '.w.bin.0123abcd.tmp.x']

def test_what_only_looks_like_a_leftover_stays():
    for name in STRANGERS: touch(name)
    touch('.w.bin.0123abcd.tmp')
    write()
    assert there() == sorted([*STRANGERS, 'w.bin'])

@pytest.mark.parametrize('name', ['[ab].bin', '*', 'a b\n.bin', 'ä', '.hidden', b'\xff'.decode('utf-8', 'surrogateescape')])
def test_odd_names(name):
    touch(f'.{name}.0123abcd.tmp')
    touch('.a.bin.0123abcd.tmp') # of another
    write(name)
    assert Path(name).read_bytes() == NEW and there() == sorted([name, '.a.bin.0123abcd.tmp'])


# Folders

def filled(path, n=3, **kwargs):
    with new_folder(path, **kwargs) as tmp:
        for i in range(n): (tmp/str(i)).write_text(str(i))

def test_a_folder_is_there_whole_or_not():
    with new_folder('folder') as tmp:
        touch(tmp/'a')
        os.symlink('a', tmp/'link')
        os.symlink('gone', tmp/'dangling')
        assert not os.path.exists('folder')
    assert sorted(os.listdir('folder')) == ['a', 'dangling', 'link'] and there() == ['folder']

def test_a_killed_maker_of_a_folder():
    for _ in range(3):
        def killed():
            with new_folder('folder') as tmp:
                (tmp/'sub').mkdir()
                touch(tmp/'sub'/'a')
                die()
        assert Child(killed).end() == -signal.SIGKILL and len(there()) == 2 # its folder and its lock; those before are swept
    filled('folder')
    assert len(os.listdir('folder')) == 3 and there() == ['folder']

def test_makers_at_once_make_it_once():
    def make():
        with locked('folder'):
            if not os.path.exists('folder'):
                filled('folder')
                with open('made', 'a') as f: f.write('once')
    children = [Child(make) for _ in range(4)]
    assert [c.end() for c in children] == [0]*4
    assert Path('made').read_text() == 'once' and there() == ['folder', 'made']

def test_a_quicker_one_without_locks_is_kept(monkeypatch):
    without_locks(monkeypatch)
    with new_folder('folder') as tmp:
        touch(tmp/'ours')
        filled('folder')
    assert sorted(os.listdir('folder')) == ['0', '1', '2'] and there() == ['folder']


# Locks

def test_writers_at_once_do_not_spoil_each_other():
    def writer(c):
        for _ in range(20): write(data=c*100_000)
    children = [Child(lambda c=c: writer(c)) for c in (b'a', b'b', b'c')]
    while any(c.p.is_alive() for c in children):
        if os.path.exists('w.bin'):
            data = Path('w.bin').read_bytes()
            assert len(data) == 100_000 and len(set(data)) == 1
    assert [c.end() for c in children] == [0]*3 and there() == ['w.bin']

def test_threads_wait_for_each_other_too():
    inside = []
    def work():
        with locked('w.bin'):
            inside.append(1)
            assert len(inside) == 1
            time.sleep(.01)
            inside.pop()
    threads = [threading.Thread(target=work) for _ in range(5)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not inside and there() == []

def test_a_thread_may_take_its_lock_again():
    with locked('w.bin', wait=False), locked('w.bin', wait=False):
        write(wait=False)
        with locked('w.bin'): pass
        assert os.path.exists('.w.bin.lock')
        with locked('other'): pass
    assert there() == ['w.bin']

def test_nested_the_temporary_file_of_the_outer_one_stays():
    with new_file('w.bin') as f:
        f.write(OLD)
        write()
        assert Path('w.bin').read_bytes() == NEW
    assert Path('w.bin').read_bytes() == OLD

def test_who_does_not_want_to_wait_is_told():
    write(data=OLD)
    with holding():
        for f in (lambda: write(wait=False), lambda: filled('w.bin', wait=False)):
            start = time.monotonic()
            with pytest.raises(BlockingIOError, match="another process or thread is writing it: wait .*, or give another path.*'w.bin'"): f()
            assert time.monotonic()-start < 2
        assert Path('w.bin').read_bytes() == OLD
    write(wait=False)
    assert there() == ['w.bin']

def test_who_waits_says_so_and_goes_on(capsys, monkeypatch):
    real, asked = filelock.FileLock.acquire, []
    def acquire(self, timeout=None, **kwargs):
        asked.append(timeout)
        return real(self, timeout=.2 if timeout == 5 else timeout, **kwargs)
    monkeypatch.setattr(filelock.FileLock, 'acquire', acquire)
    with holding() as other:
        threading.Timer(1, other.p.kill).start()
        write()
    assert asked[:2] == [5, None]
    assert capsys.readouterr().err == 'w.bin: another process or thread is writing it; waiting\n' and Path('w.bin').read_bytes() == NEW

def test_an_interrupt_ends_the_waiting():
    with holding():
        threading.Timer(.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt): write()
        finally: signal.signal(signal.SIGINT, before)
        assert there() == ['.w.bin.lock']
    write(wait=False)

def test_a_dead_process_holds_no_lock():
    with holding() as other:
        other.kill()
        assert there() == ['.w.bin.lock']
        write(wait=False)
    assert there() == ['w.bin']

def test_a_forked_child_keeps_no_lock():
    def parent(): # is killed; its child lives on
        with locked('w.bin'):
            pid = os.fork()
            if pid == 0:
                Path('child').write_text(str(os.getpid()))
                os.replace('child', 'child is there')
                time.sleep(60)
                os._exit(0)
            wait_for(lambda: os.path.exists('child is there')) # it has closed its copy by then
            die()
    assert Child(parent).end() == -signal.SIGKILL
    try:
        os.kill(int(Path('child is there').read_text()), 0) # it lives
        write(wait=False)
    finally: os.kill(int(Path('child is there').read_text()), signal.SIGKILL)

def test_a_forked_child_does_not_think_that_it_holds_the_lock():
    def child():
        with pytest.raises(BlockingIOError): write(wait=False)
    with locked('w.bin'): assert Child(child).end() == 0
    assert there() == []

def test_a_lock_whose_file_was_removed_is_taken_anew():
    """Waiters that have opened the lock file which its holder then removes do not take that for the lock."""
    def count():
        for _ in range(50):
            with locked('n'):
                n = int(Path('n').read_text())
                Path('n').write_text(str(n+1))
    Path('n').write_text('0')
    children = [Child(count) for _ in range(4)]
    assert [c.end() for c in children] == [0]*4
    assert Path('n').read_text() == '200' and there() == ['n']

def test_a_lock_file_that_its_last_holder_removed_is_no_lock(monkeypatch):
    import fcntl
    real, locks = fcntl.flock, []
    def flock(fd, how):
        real(fd, how)
        if how & fcntl.LOCK_EX: locks.append(fd)
        if len(locks) == 1: Path('.w.bin.lock').unlink(missing_ok=True) # between our opening it and our locking it
    monkeypatch.setattr(fcntl, 'flock', flock)
    def other():
        with pytest.raises(BlockingIOError): write(wait=False)
    with locked('w.bin'):
        assert len(locks) == 2 and there() == ['.w.bin.lock']
        assert Child(other).end() == 0
    assert there() == []

def test_the_lock_can_be_taken_by_another_user():
    with locked('w.bin'): assert os.stat('.w.bin.lock').st_mode & 0o777 == 0o666


# Leftovers

def test_leftovers_of_the_dead_go_and_those_of_the_living_stay():
    with holding('a.cache', lambda: touch('.a.cache.0123abcd.tmp')):
        touch('.b.cache.0123abcd.tmp')
        os.makedirs('.c.cache.0123abcd.tmp/sub')
        touch('.d.other.0123abcd.tmp')
        sweep(Path(), '*.cache')
        assert there() == ['.a.cache.0123abcd.tmp', '.a.cache.lock', '.d.other.0123abcd.tmp']
    sweep(Path(), '*.cache')
    assert there() == ['.d.other.0123abcd.tmp']

def test_our_own_temporary_file_is_not_swept():
    with new_file('a.cache') as f:
        f.write(b'whole')
        sweep(Path(), '*.cache')
        write('a.cache', b'other')
        threading.Thread(target=sweep, args=(Path(), '*.cache')).run()
        t = threading.Thread(target=sweep, args=(Path(), '*.cache'))
        t.start()
        t.join()
    assert Path('a.cache').read_bytes() == b'whole'


# Where there are no locks

def without_locks(monkeypatch, code=errno.ENOLCK):
    import fcntl
    def flock(*args): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(fcntl, 'flock', flock)

@pytest.mark.parametrize('code', ['ENOLCK', 'ENOTSUP', 'ENOSYS'])
def test_without_locks_files_are_whole_and_leftovers_stay(monkeypatch, code):
    without_locks(monkeypatch, getattr(errno, code))
    touch('.w.bin.0123abcd.tmp')
    with locked('w.bin') as held: assert held is False
    write(data=OLD)
    with pytest.raises(KeyboardInterrupt):
        with new_file('w.bin') as f:
            f.write(NEW)
            raise KeyboardInterrupt
    assert Path('w.bin').read_bytes() == OLD and there() == ['.w.bin.0123abcd.tmp', 'w.bin']
    sweep(Path(), '*')
    assert there() == ['.w.bin.0123abcd.tmp', 'w.bin']

def test_without_locks_writers_at_once_write_whole_files(monkeypatch):
    without_locks(monkeypatch)
    with new_file('w.bin') as f:
        f.write(OLD)
        assert Child(write).end() == 0
        assert Path('w.bin').read_bytes() == NEW
    assert Path('w.bin').read_bytes() == OLD and there() == ['w.bin']

def test_other_errors_of_a_lock_are_errors(monkeypatch):
    without_locks(monkeypatch, errno.EBADF)
    with pytest.raises(OSError, match='w.bin') as e: write()
    assert e.value.errno == errno.EBADF


# The digest

def test_a_digest_is_sha256_of_the_pieces_in_a_row():
    a = np.arange(5, dtype=np.float32)
    assert digest() == hashlib.sha256().digest()
    assert digest(b'a', 'ä', bytearray(b'b'), memoryview(b'c'), a) == hashlib.sha256(b'a' + 'ä'.encode() + b'bc' + a.tobytes()).digest()
    assert digest('\udcff') == hashlib.sha256(b'\xff').digest() # a file name that is no UTF-8
    with pytest.raises(TypeError): digest(1)

def test_every_bit_counts():
    data = bytearray(b'some bytes')
    seen = {digest(data)}
    for bit in range(8*len(data)):
        data[bit//8] ^= 1 << bit%8
        seen.add(digest(data))
        data[bit//8] ^= 1 << bit%8
    assert len(seen) == 8*len(data)+1
