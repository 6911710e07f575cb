"""Checkpoints: the file is whole at every moment and refuses all that is not; a fit goes on to the bit from wherever it was killed, with
every optimizer and callback; what is another training is refused; an interrupt leaves the Learner usable, no hooks, no workers."""
import copy, errno, gc, hashlib, io, multiprocessing as mp, os, pickle, random, resource, signal, struct, sys, threading, time, traceback, warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dl2lib import checkpoints as mod, safefile
from dl2lib.callbacks import (AvgStatsCallback, BatchTransformXCallback, Callback, CancelBatchException, CancelEpochException, CancelTrainException, ChannelsLastCallback,
                              CudaCallback, ParamScheduler, Recorder, accuracy)
from dl2lib.checkpoints import CheckpointCallback, StateFileError, load_checkpoint, read_state, save_checkpoint, unfinished, write_state
from dl2lib.state import set_seed
from dl2lib.datablock import CategoryProcessor, DataBunch, Dataset, ItemList, SplitData, get_dls, label_by_func
from dl2lib.hooks import ActivationStats
from dl2lib.learner import Learner
from dl2lib.optimizers import adam_opt, sgd_mom_opt, sgd_opt
from dl2lib.practice import CSVLog, EarlyStopping, GradientAccumulation, GradientClip, KeepBest, MixedPrecision, TrackBest
from dl2lib.progress import ProgressCallback
from dl2lib.schedules import sched_cos
from dl2lib.zoo import OPTIMIZERS


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler) # a background shell lets its children ignore it
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, 'somebody has left a handler behind'
    signal.signal(signal.SIGINT, before)


# What is trained: all that makes it hard, small enough for thousands of steps a second

class Noisy:
    "Samples with other noise each time, from each generator."
    def __init__(self, n=90, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 6, generator=g)
        self.y = (self.x.sum(1) > 0).long()
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i] + 0.1*torch.randn(6) + 0.1*random.random() + np.float32(0.1*np.random.rand()), self.y[i]


def net(hidden=8, p=0.2):
    set_seed(0)
    return nn.Sequential(nn.Linear(6, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(p), nn.Linear(hidden, 2))

def seeded(n=90, bs=10, seed=3, valid=True, **kwargs):
    return DataBunch(*get_dls(Noisy(n), Noisy(30, 1) if valid else None, bs, seed=seed, **kwargs))

def learner(*cbs, model=None, data=None, opt_func=sgd_mom_opt, loss_func=F.cross_entropy, lr=0.1):
    learn = Learner(model or net(), data or seeded(), loss_func, opt_func=opt_func, lr=lr, cbs=[Recorder(), *cbs])
    learn.logger = lambda *args: None
    return learn

def everything(): # callbacks that remember something; 9 batches, in steps of 4
    return [AvgStatsCallback(accuracy), ParamScheduler('lr', sched_cos(0.2, 0.01)), ParamScheduler('mom', sched_cos(0.8, 0.9)), GradientAccumulation(4), GradientClip(0.5),
            KeepBest(), TrackBest('train_loss'), EarlyStopping(patience=9), CSVLog('log.csv')]

def result(learn):
    "All that a fit leaves, times aside."
    log = [l.rsplit(',', 1)[0] for l in Path('log.csv').read_text().splitlines()] if Path('log.csv').exists() else None
    rows = [r[:-1] for cb in learn.cbs if isinstance(cb, AvgStatsCallback) for r in cb.rows]
    rec, named = learn.recorder, {k: v for k, v in vars(learn).items() if isinstance(v, Callback)}
    seen = {k: [vars(cb)[a] for a in ('best', 'best_epoch', 'improved') if a in vars(cb)] for k, cb in named.items()}
    norms = [cb.norms for cb in learn.cbs if isinstance(cb, GradientClip)]
    modes = [m.training for m in learn.model.modules()]
    return copy.deepcopy(dict(weights=learn.model.state_dict(), opt=learn.opt.state_dict(), losses=rec.losses, lrs=rec.group_lrs, moms=rec.group_moms, rows=rows, log=log,
                              seen=seen, norms=norms, modes=modes, n=(learn.n_iter, learn.n_epochs), rng=torch.get_rng_state(), python=random.getstate(),
                              numpy=list(np.random.get_state()[1]), loader=learn.data.train_dl.state_dict() if hasattr(learn.data.train_dl, 'state_dict') else None))

def same(a, b, place=''):
    assert type(a) is type(b), f'{place}: {type(a)} and {type(b)}'
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and a.device == b.device, place
        a, b = a.contiguous().flatten(), b.contiguous().flatten()
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f'{place}: {a} and {b}'
    elif isinstance(a, dict):
        assert list(a) == list(b), f'{place}: {list(a)} and {list(b)}'
        for k in a: same(a[k], b[k], f'{place}[{k!r}]')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f'{place}: {len(a)} and {len(b)}'
        for i, (x, y) in enumerate(zip(a, b)): same(x, y, f'{place}[{i}]')
    elif isinstance(a, float): assert struct.pack('d', a) == struct.pack('d', b), f'{place}: {a!r} and {b!r}'
    else: assert a == b, f'{place}: {a!r} and {b!r}'


class PowerCut(Exception): pass

INF = float('inf') # the order of `CheckpointCallback`: after it, if given after it

class Stop(Callback):
    "Raises at the n-th time that an event comes."
    def __init__(self, event, n, exc=PowerCut, order=200):
        self.left, self.exc, self._order = n, exc, order
        setattr(self, event, self.strike)
    def strike(self):
        self.left -= 1
        if self.left == 0: raise self.exc

def stop(learn, epochs, event, n, *cbs, order=200):
    with pytest.raises(PowerCut): learn.fit(epochs, [*cbs, Stop(event, n, order=order)])


# In another process, which may be killed

def in_child(f, *args):
    "Run f(*args) in a forked process; -> its exit code, negative for a signal. What it prints is shown when a test fails."
    def run():
        torch.set_num_threads(1) # a forked process has lost the other threads
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try: f(*args)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    p = mp.get_context('fork').Process(target=run)
    p.start()
    assert ended(p, 120), 'it hangs'
    return p.exitcode

def ended(p, seconds): # `p.join` would wait for the workers of a killed process too, who notice after five seconds
    deadline = time.time() + seconds
    while p.exitcode is None and time.time() < deadline: time.sleep(0.002)
    return p.exitcode is not None


class Kill(Callback):
    "Kills its process at the n-th time that an event comes."
    def __init__(self, event, n, order): self.left, self._order = n, order; setattr(self, event, self.strike)
    def strike(self):
        self.left -= 1
        if self.left == 0: os.kill(os.getpid(), signal.SIGKILL)

def kill_in_write(n, name='fsync'): # at the n-th call that a writer makes
    real, left = getattr(os, name), [n]
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, call)

def train(*cbs, resume=None, workers=2, prepare=None, every=2):
    learn = learner(*everything(), data=seeded(num_workers=workers))
    if prepare is not None: prepare()
    learn.fit(4, [CheckpointCallback('fit.ckpt', every_batches=every), *cbs], resume=resume)
    torch.save(result(learn), 'result.pt')

@pytest.fixture(scope='module')
def never_killed(tmp_path_factory):
    "The result of a fit without checkpoints, in a process of its own."
    folder = tmp_path_factory.mktemp('never_killed')
    def whole():
        os.chdir(folder)
        learn = learner(*everything(), data=seeded(num_workers=2))
        learn.fit(4)
        torch.save(result(learn), 'result.pt')
    assert in_child(whole) == 0
    return torch.load(folder/'result.pt', weights_only=False)


# The file

STATES = dict(empty={}, numbers=dict(a=1, b=-2**80, c=1.5, d=float('inf'), e=True, f=None, g=1+2j), text=dict(a='ä\n', b=b'\x00\xff', c=''),
              nested=dict(a=[1, (2, [3, ()]), {}], b={1: {2.5: {None: {('x', 1): 'deep'}}}}), generators=mod.rng_state(),
              tensors={str(d): torch.tensor([0, 1, 2]).to(d) for d in (torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64, torch.complex64)},
              shapes=dict(a=torch.tensor(3.), b=torch.zeros(0, 3), c=torch.arange(24.).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last), d=torch.arange(6).view(2, 3).t()),
              nan=dict(a=torch.tensor([float('nan'), -0.])))

@pytest.mark.parametrize('name', STATES)
def test_a_state_comes_back_as_it_was(name):
    assert write_state(STATES[name], 'a.state', 'test') == Path('a.state')
    back = read_state('a.state', 'test')
    same(back, STATES[name])
    if name == 'shapes': assert {k: v.stride() for k, v in back.items()} == {k: v.stride() for k, v in STATES[name].items()}

def test_what_a_state_takes_is_made_plain():
    from collections import OrderedDict
    p = nn.Parameter(torch.ones(2))
    write_state(OrderedDict(a=p, b=np.float64(0.1), c=np.int64(3), d=np.bool_(True)), 'a.state', 'test')
    back = read_state('a.state', 'test')
    same(back, dict(a=torch.ones(2), b=0.1, c=3, d=True))
    assert type(back) is dict and not back['a'].requires_grad

class Sub(torch.Tensor): pass

@pytest.mark.parametrize('bad, says', [(Path('x'), 'PosixPath'), ({1}, 'set'), (np.zeros(2), 'torch.as_tensor'), (np.float32(1), 'float32'), (lambda: 0, 'function'), (torch.float32, 'dtype'),
                                       (torch.zeros(2).to_sparse(), 'sparse'), (torch.zeros(2, device='meta'), 'meta'), (torch.zeros(2).as_subclass(Sub), 'Sub'),
                                       (SimpleNamespace(), 'SimpleNamespace'), (nn.Linear(1, 1), 'Linear'), (torch.Generator(), 'Generator')])
def test_what_is_not_plain_is_refused_by_its_place(bad, says):
    write_state({'old': 1}, 'a.state', 'test')
    with pytest.raises(TypeError, match=rf"(?s)state\['a'\]\[1\]\['b'\] is a .*") as e: write_state({'a': [0, {'b': bad}]}, 'a.state', 'test')
    assert says in str(e.value)
    with pytest.raises(TypeError, match='as keys'): write_state({'a': {Path('x'): 1}}, 'a.state', 'test')
    assert read_state('a.state', 'test') == {'old': 1} and os.listdir() == ['a.state']

def test_the_one_before_is_kept_and_nothing_else():
    for i in range(4):
        write_state({'i': i}, 'a.state', 'test')
        assert read_state('a.state', 'test') == {'i': i}
        if i: assert read_state('a.state.prev', 'test') == {'i': i-1}
        assert set(os.listdir()) == ({'a.state', 'a.state.prev'} if i else {'a.state'})

def two_files():
    write_state({'t': torch.arange(3.), 'i': 1}, 'a.state', 'test')
    write_state({'t': torch.arange(3.), 'i': 2}, 'a.state', 'test')
    return Path('a.state'), Path('a.state').read_bytes()

def refused(path, says='', kind='test'):
    with pytest.raises(StateFileError, match=f'a.state.*{says}') as e: read_state(path, kind)
    assert read_state('a.state.prev', 'test')['i'] == 1 and 'a.state.prev' in str(e.value)

def test_a_flipped_bit_is_found_wherever_it_is():
    path, content = two_files()
    bits = random.Random(1).sample(range(8*len(content)), 200) + list(range(8*60)) # some places, and each bit of the head
    for bit in bits:
        broken = bytearray(content)
        broken[bit//8] ^= 1 << bit%8
        path.write_bytes(broken)
        refused(path)
    path.write_bytes(content)
    assert read_state(path, 'test')['i'] == 2

def test_a_file_that_ends_early_or_late_is_found():
    path, content = two_files()
    for n in [*(len(content)*i//10 for i in range(10)), *range(1, 64), len(content)-1]:
        path.write_bytes(content[:n])
        refused(path, 'empty' if n == 0 else 'cut short')
    path.write_bytes(content + b'x')
    refused(path, '1 bytes more')

class RunsCode:
    def __reduce__(self): return os.mkdir, ('it_ran',)

def packed(payload, head=b'{"kind": "test", "format": 1, "dl2lib": "0"}'): # a file whose digest fits
    rest = [struct.pack('<I', len(head)), head, payload]
    length = struct.pack('<Q', sum(map(len, rest)))
    return b''.join([b'\x89dl2lib state\r\n\n', length, hashlib.sha256(b''.join([length, *rest])).digest(), *rest])

def saved(o):
    f = io.BytesIO()
    torch.save(o, f)
    return f.getvalue()

@pytest.mark.parametrize('content', [pickle.dumps(RunsCode()), saved({'a': RunsCode()}), packed(saved({'a': RunsCode()})), packed(pickle.dumps(RunsCode(), 2))])
def test_code_in_a_file_is_not_run(content):
    path, _ = two_files()
    path.write_bytes(content)
    refused(path, 'nothing was run' if content.startswith(mod._MAGIC) else 'no file that dl2lib has written')
    assert not Path('it_ran').exists()
    torch.load(io.BytesIO(saved({'a': RunsCode()})), weights_only=False)
    assert Path('it_ran').exists() # so it could have been run

@pytest.mark.parametrize('content', [b'epoch,loss\n0,1.0\n', saved({'a': 1}), pickle.dumps({}), b'\x00'*500, os.urandom(500)], ids='csv torch pickle zeros random'.split())
def test_a_foreign_file_is_neither_read_nor_replaced(content):
    path, _ = two_files()
    path.write_bytes(content)
    refused(path, 'no file that dl2lib has written')
    with pytest.raises(FileExistsError, match=r"none of dl2lib.*a\.state"): write_state({}, path, 'test')
    assert path.read_bytes() == content

def test_another_kind_and_another_format_are_refused():
    path, _ = two_files()
    with pytest.raises(StateFileError, match=r"a\.state is of the kind 'test', not weights or checkpoint"): read_state(path, ('weights', 'checkpoint'))
    path.write_bytes(packed(saved({}), b'{"kind": "test", "format": 2, "dl2lib": "9.9"}'))
    with pytest.raises(StateFileError, match='its format is 2, of dl2lib 9.9'): read_state(path, 'test')
    with pytest.raises(FileNotFoundError, match='nowhere'): read_state('nowhere', 'test')

# ... while it is written

def intact(says):
    "A write that fails, by name, and leaves all as it was; the next one succeeds."
    before = {o: Path(o).read_bytes() for o in ('a.state', 'a.state.prev')}
    with pytest.raises(OSError, match=says) as e: write_state({'i': 3}, 'a.state', 'test')
    assert 'a.state' in str(e.value)
    assert {o: Path(o).read_bytes() for o in os.listdir()} == before
    return e.value

def test_a_full_disk_says_so(monkeypatch):
    two_files()
    with monkeypatch.context() as m:
        m.setattr(safefile, 'open', lambda tmp, mode: tmp.touch() or open('/dev/full', 'wb'), raising=False)
        assert intact('the disk is full: make room').errno == errno.ENOSPC
    write_state({'i': 3}, 'a.state', 'test')
    assert read_state('a.state', 'test') == {'i': 3}

def test_a_file_that_may_not_be_so_large_says_so():
    two_files()
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        intact(r'ulimit')
    assert in_child(limited) == 0

@pytest.mark.parametrize('code, says', [('ENOSPC', 'the disk is full'), ('EDQUOT', 'quota'), ('EACCES', 'may not write'), ('EROFS', 'read-only'), ('EIO', 'input/output error')])
@pytest.mark.parametrize('call', ['open', 'fsync', 'replace'])
def test_an_error_at_any_step_leaves_the_old_files(monkeypatch, call, code, says):
    two_files()
    def fail(*args, **kwargs): raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    if call == 'open': monkeypatch.setattr(safefile, 'open', fail, raising=False)
    else: monkeypatch.setattr(os, call, fail)
    assert intact(says).errno == getattr(errno, code)


@pytest.mark.parametrize('path, says', [('file/x.state', 'folder is a file'), ('nowhere/x.state', 'make it first'), ('folder', 'this is a folder'), ('.', 'this is a folder')])
def test_a_place_that_cannot_be_written_is_named(path, says):
    Path('file').write_text('')
    Path('folder').mkdir()
    with pytest.raises(OSError, match=says) as e: write_state({}, path, 'test')
    assert repr(path) in str(e.value)

@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_read_only_folder_is_named():
    Path('folder').mkdir(mode=0o500)
    with pytest.raises(PermissionError, match='may not write there.*x.state'): write_state({}, 'folder/x.state', 'test')

def test_a_disk_that_keeps_something_else_is_noticed(monkeypatch):
    two_files()
    real = os.fsync
    def rot(fd):
        real(fd)
        for tmp in Path().glob('.a.state.*.tmp'):
            b = bytearray(tmp.read_bytes())
            b[-10] ^= 1
            tmp.write_bytes(b)
    monkeypatch.setattr(os, 'fsync', rot)
    intact('read back, the file is damaged')

def test_the_format_is_that_of_files_written_before():
    Path('a.state').write_bytes(packed(saved({'i': 7})))
    assert read_state('a.state', 'test') == {'i': 7}
    write_state({'i': 8}, 'a.state', 'test')
    content = Path('a.state').read_bytes()
    n = struct.unpack('<I', content[56:60])[0]
    assert content == packed(content[60+n:], content[60:60+n]) and read_state('a.state.prev', 'test') == {'i': 7}

def test_two_writers_of_one_path_do_not_spoil_each_other():
    def write(k):
        for i in range(40): write_state({'i': 100*k+i, 't': torch.full((20_000,), k)}, 'a.state', 'test')
    write(1)
    writers = [mp.get_context('fork').Process(target=write, args=(k,)) for k in (1, 2, 3)]
    for p in writers: p.start()
    while any(p.is_alive() for p in writers):
        state = read_state('a.state', 'test')
        assert (state['t'] == state['i']//100).all()
    assert [p.exitcode for p in writers] == [0]*3 and set(os.listdir()) == {'a.state', 'a.state.prev'}

def test_an_interrupt_while_writing_leaves_nothing(monkeypatch):
    two_files()
    def press(fd): raise KeyboardInterrupt
    monkeypatch.setattr(os, 'fsync', press)
    with pytest.raises(KeyboardInterrupt): write_state({'i': 3}, 'a.state', 'test')
    assert read_state('a.state', 'test')['i'] == 2 and set(os.listdir()) == {'a.state', 'a.state.prev'}

CALLS = [('fsync', 1), ('link', 1), ('replace', 1), ('fsync', 2), ('replace', 2), ('fsync', 3)] # the last one syncs the folder
@pytest.mark.parametrize('name, n', CALLS)
@pytest.mark.parametrize('links', [True, False])
def test_a_writer_that_is_killed_leaves_a_whole_file(name, n, links):
    if not links and (name, n) == ('link', 1): pytest.skip('there is no link to be made')
    two_files()
    def write():
        def no_link(*args): raise OSError(errno.EPERM, 'no links here')
        if not links: os.link = no_link
        kill_in_write(n, name)
        write_state({'i': 3}, 'a.state', 'test')
    assert in_child(write) == -signal.SIGKILL
    there = [read_state(p, 'test')['i'] for p in ('a.state', 'a.state.prev') if os.path.exists(p)]
    assert there[0] == (3 if (name, n) == ('fsync', 3) else 2)
    assert os.path.exists('a.state') or not links # without links there is a moment in which only `.prev` is there
    write_state({'i': 4}, 'a.state', 'test')
    assert read_state('a.state', 'test') == {'i': 4} and set(os.listdir()) == {'a.state', 'a.state.prev'}

def test_where_there_are_no_links_the_one_before_is_kept_too(monkeypatch):
    def fail(*args): raise OSError(errno.EPERM, 'no links here')
    monkeypatch.setattr(os, 'link', fail)
    two_files()
    assert read_state('a.state.prev', 'test')['i'] == 1 and set(os.listdir()) == {'a.state', 'a.state.prev'}

def test_a_link_stays_a_link():
    Path('elsewhere').mkdir()
    Path('a.state').symlink_to('elsewhere/b.state')
    two_files()
    assert Path('a.state').is_symlink() and sorted(os.listdir('elsewhere')) == ['b.state', 'b.state.prev'] and sorted(os.listdir()) == ['a.state', 'elsewhere']
    assert read_state('elsewhere/b.state', 'test')['i'] == 2


# Going on, in one process

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The result of a fit that was never stopped, with all callbacks."
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp('whole'))
    learn = learner(*everything())
    learn.fit(3)
    res = result(learn)
    os.chdir(before)
    return res

@pytest.mark.parametrize('event, n', [('after_batch', n) for n in (1, 2, 5, 9, 10, 11, 13, 14, 23, 24, 30)] +
                         [(e, n) for e in ('begin_epoch', 'begin_validate', 'after_epoch') for n in (1, 2, 3)] + [('begin_fit', 1), ('after_loss', 1), ('after_loss', 17), ('after_step', 3)])
def test_a_fit_goes_on_to_the_bit_wherever_it_stopped(whole, event, n): # 9 batches of training and 2 of validation an epoch
    stop(learner(*everything()), 3, event, n, CheckpointCallback('fit.ckpt', every_batches=1), order=INF if event == 'begin_fit' else 200)
    learn = learner(*everything())
    random.random(); np.random.rand(); torch.rand(3) # whatever has been drawn in the new process
    learn.fit(3, CheckpointCallback('fit.ckpt', every_batches=1), resume='fit.ckpt')
    same(result(learn), whole)

def test_a_fit_that_is_stopped_again_and_again_goes_on(whole):
    for i in range(100):
        learn = learner(*everything())
        stopper = Stop('after_batch', 4)
        try: learn.fit(3, [CheckpointCallback('fit.ckpt', every_batches=2), stopper], resume='fit.ckpt' if i else None)
        except PowerCut: continue
        break
    assert 8 < i < 99
    same(result(learn), whole)

def test_it_goes_on_in_the_same_process_too(whole):
    learn = learner(*everything())
    stop(learn, 3, 'after_loss', 16, CheckpointCallback('fit.ckpt', every_batches=4))
    learn.fit(3, CheckpointCallback('fit.ckpt'), resume='fit.ckpt')
    same(result(learn), whole)

def test_checkpoints_change_nothing(whole):
    learn = learner(*everything())
    learn.fit(3, CheckpointCallback('fit.ckpt', every_batches=1))
    same(result(learn), whole)

@pytest.mark.parametrize('name', OPTIMIZERS)
def test_with_every_optimizer(name):
    set_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Dropout(0.2), nn.Linear(8, 2, bias=False)) if name == 'muon' else net() # muon takes matrices
    def make(): return learner(ParamScheduler('lr', sched_cos(0.1, 0.01)), model=copy.deepcopy(model), opt_func=OPTIMIZERS[name].make())
    whole = make()
    set_seed(1)
    whole.fit(2)
    set_seed(1)
    stop(make(), 2, 'after_batch', 14, CheckpointCallback('fit.ckpt', every_batches=3))
    learn = make()
    learn.fit(2, resume='fit.ckpt')
    same(result(learn), result(whole))

@pytest.mark.parametrize('opt_func', [partial(torch.optim.SGD, momentum=0.9, nesterov=True), torch.optim.AdamW, partial(torch.optim.Adam, amsgrad=True), torch.optim.NAdam, torch.optim.Rprop])
def test_with_torchs_optimizers(opt_func):
    whole = learner(opt_func=opt_func)
    whole.fit(2)
    stop(learner(opt_func=opt_func), 2, 'after_batch', 14, CheckpointCallback('fit.ckpt', every_batches=3))
    learn = learner(opt_func=opt_func)
    learn.fit(2, resume='fit.ckpt')
    same(result(learn), result(whole))


class Odd(nn.Module):
    "Weights that are tied, frozen or of 64 bits, a buffer that no state_dict has, a layer that stays in evaluation mode."
    def __init__(self):
        super().__init__()
        set_seed(0)
        self.conv, self.bn, self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2).double()
        self.b.weight = self.a.weight
        self.a.bias.requires_grad_(False)
        self.register_buffer('calls', torch.zeros(()), persistent=False)
        self.noise = nn.Dropout(0.1).eval()
    def forward(self, x):
        if self.training: self.calls += 1
        x = F.relu(self.bn(self.conv(x)))
        return self.c(self.noise(self.b(self.a(x.flatten(1)))).double())*(1+0.01*self.calls)

class Freezes(Callback): # in batch 3, the way of a gradual thaw
    def after_batch(self):
        if self.n_iter == 3: self.model.bn.eval(); self.model.a.bias.requires_grad_(True); self.model.conv.weight.requires_grad_(False)

def test_all_of_a_model_counts():
    def make():
        data = DataBunch(*get_dls(*(Dataset(Noisy(n, s).x.view(n, 1, 6, 1).expand(n, 1, 6, 6).contiguous()[:, :, :4, :4], Noisy(n, s).y) for n, s in ((90, 0), (30, 1))), 10, seed=3))
        return learner(Freezes(), ChannelsLastCallback(), model=Odd(), data=data)
    whole = make()
    whole.fit(2)
    for n in 2, 5, 9, 12:
        Path('fit.ckpt').unlink(missing_ok=True)
        stop(make(), 2, 'after_batch', n, CheckpointCallback('fit.ckpt', every_batches=1, overwrite=True), order=1e9)
        learn = make()
        learn.fit(2, resume='fit.ckpt')
        same(result(learn), result(whole))
        same(learn.model.calls, whole.model.calls)
        assert [p.requires_grad for p in learn.model.parameters()] == [p.requires_grad for p in whole.model.parameters()]
        assert learn.model.a.weight is learn.model.b.weight

class Weighted(nn.Module): # a loss that learns something of its own
    def __init__(self): super().__init__(); self.register_buffer('mean', torch.zeros(()))
    def forward(self, pred, y):
        loss = F.cross_entropy(pred, y)
        if self.training: self.mean.lerp_(loss.detach(), 0.1)
        return loss + self.mean

def goes_on(make):
    "Two fits of learners that `make` gives, one of them stopped in batch 14 and gone on with: they end the same. Both learners."
    whole = make()
    whole.fit(2)
    stop(make(), 2, 'after_batch', 14, CheckpointCallback('fit.ckpt', every_batches=3))
    learn = make()
    learn.fit(2, resume='fit.ckpt')
    same(result(learn), result(whole))
    return learn, whole

def test_a_loss_with_a_state_and_half_precision():
    def make(): return learner(MixedPrecision(torch.float16), loss_func=Weighted(), lr=0.01)
    learn, whole = goes_on(make)
    same(learn.loss_func.mean, whole.loss_func.mean)
    with pytest.raises(ValueError, match='its type was torch.float16, and is torch.bfloat16'):
        stop(make(), 2, 'after_batch', 14, CheckpointCallback('half.ckpt', every_batches=3))
        learner(MixedPrecision(), loss_func=Weighted(), lr=0.01).fit(2, resume='half.ckpt')

def test_what_batch_transforms_draw():
    noise = lambda x: x + 0.3*torch.randn_like(x)*random.random()
    def make(): return learner(BatchTransformXCallback(noise), BatchTransformXCallback(noise))
    goes_on(make)

def test_with_another_number_of_workers(whole):
    stop(learner(*everything(), data=seeded(num_workers=2)), 3, 'after_batch', 14, CheckpointCallback('fit.ckpt', every_batches=3))
    learn = learner(*everything(), data=seeded(num_workers=1, persistent_workers=True))
    learn.fit(3, CheckpointCallback('fit.ckpt'), resume='fit.ckpt')
    same(result(learn), whole)

def test_passes_are_counted_on():
    whole = learner()
    whole.fit(1) # an earlier fit, of the same data
    whole.fit(2)
    learn = learner()
    learn.fit(1)
    stop(learn, 2, 'after_batch', 14, CheckpointCallback('fit.ckpt', every_batches=3))
    other = learner()
    other.fit(2, resume='fit.ckpt')
    same(result(other), result(whole))
    assert other.data.train_dl.n_pass == 3

def foreign(own=True):
    g = torch.Generator().manual_seed(1) if own else None
    return SimpleNamespace(train_dl=DataLoader(TensorDataset(Noisy().x, Noisy().y), 10, shuffle=True, generator=g), valid_dl=DataLoader(TensorDataset(Noisy(30).x, Noisy(30).y), 10))

@pytest.mark.parametrize('own', [True, False])
def test_between_epochs_a_foreign_loader_goes_on_to_the_bit(own):
    whole = learner(data=foreign(own))
    whole.fit(3)
    stop(learner(data=foreign(own)), 3, 'after_batch', 14, CheckpointCallback('fit.ckpt'))
    learn = learner(data=foreign(own))
    learn.fit(3, resume='fit.ckpt')
    same(result(learn), result(whole))

def test_within_an_epoch_of_a_foreign_loader_batches_are_skipped_and_that_is_said():
    stop(learner(data=foreign()), 2, 'after_batch', 16, CheckpointCallback('fit.ckpt', every_batches=4))
    learn = learner(data=foreign())
    with pytest.warns(UserWarning, match='its first 3 batches are skipped'): learn.fit(2, resume='fit.ckpt')
    assert len(learn.recorder.losses) == 18

def test_without_validation():
    whole = learner(data=seeded(valid=False))
    whole.fit(2)
    for n in 4, 9, 12:
        stop(learner(data=seeded(valid=False)), 2, 'after_batch', n, CheckpointCallback('fit.ckpt', every_batches=1, overwrite=True))
        learn = learner(data=seeded(valid=False))
        learn.fit(2, resume='fit.ckpt')
        same(result(learn), result(whole))

class LeaveEarly(Callback):
    "Cancels an epoch, and a batch of another, by its own count."
    def after_loss(self):
        if not self.in_train: return
        if self.epoch == 0 and self.iter == 6: raise CancelEpochException
        if self.epoch == 1 and self.iter == 2: raise CancelBatchException

@pytest.mark.parametrize('n', [1, 2, 6, 7, 8, 9, 10, 11, 12, 13, 19, 20, 24])
def test_with_cancelled_batches_and_epochs(n):
    whole = learner(LeaveEarly(), AvgStatsCallback(accuracy))
    whole.fit(3)
    stop(learner(LeaveEarly(), AvgStatsCallback(accuracy)), 3, 'begin_batch', n, CheckpointCallback('fit.ckpt', every_batches=1))
    learn = learner(LeaveEarly(), AvgStatsCallback(accuracy))
    learn.fit(3, resume='fit.ckpt')
    same(result(learn), result(whole))


# What is refused

def stopped_fit():
    stop(learner(AvgStatsCallback(accuracy)), 3, 'after_batch', 14, CheckpointCallback('fit.ckpt', every_batches=3))

def labelled(names='abcdefghij', label=lambda o: 'xy'[ord(o) % 2], tfms=None):
    def number(o): return torch.full((6,), float(ord(o)))
    side = lambda o: o in 'ae'
    data = label_by_func(SplitData.split_by_func(ItemList(list(names), tfms=[number, *(tfms or [])]), side), label, proc_y=CategoryProcessor())
    return DataBunch(*get_dls(data.train, data.valid, 2, seed=1))

@pytest.mark.parametrize('other, says', [
    (lambda: learner(AvgStatsCallback(accuracy), model=net(9)), 'of another model, and nothing was loaded: 0.weight is float32 8x6 there, float32 9x6 here'),
    (lambda: learner(AvgStatsCallback(accuracy), model=net().double()), 'float32 8x6 there, float64 8x6 here'),
    (lambda: learner(AvgStatsCallback(accuracy), model=net(p=0.3)), r'Dropout\(p=0.2, inplace=False\) there, .*p=0.3'),
    (lambda: learner(AvgStatsCallback(accuracy), data=seeded(bs=9)), 'bs of training: 10 there, 9 here'),
    (lambda: learner(AvgStatsCallback(accuracy), data=seeded(seed=4)), 'seed of training: 3 there, 4 here'),
    (lambda: learner(AvgStatsCallback(accuracy), data=seeded(n=91)), 'items of training: 90 there, 91 here'),
    (lambda: learner(AvgStatsCallback(accuracy), data=seeded(valid=False)), 'loader of validation: SeededDataLoader there, None here'),
    (lambda: learner(AvgStatsCallback(accuracy), lr=0.2), 'lr: 0.1 there, 0.2 here'),
    (lambda: learner(AvgStatsCallback(accuracy), opt_func=partial(sgd_mom_opt, mom=0.8)), 'mom: 0.9 there, 0.8 here'),
    (lambda: learner(AvgStatsCallback(accuracy), opt_func=adam_opt()), 'optimizer: .*momentum_step.* there, .*adam_step.* here'),
    (lambda: learner(AvgStatsCallback(accuracy), opt_func=torch.optim.SGD), 'optimizer: StatefulOptimizer.* there, SGD here'),
    (lambda: learner(AvgStatsCallback(accuracy), loss_func=F.nll_loss), 'loss: cross_entropy there, nll_loss here'),
    (lambda: learner(), r'callback avg_stats \(AvgStatsCallback\) is missing here'),
    (lambda: learner(AvgStatsCallback(accuracy), TrackBest()), r'callback track_best \(TrackBest\) was not there'),
    (lambda: learner(AvgStatsCallback()), 'its columns were epoch, train_loss, train_accuracy'),
])
def test_another_training_is_refused_and_named(other, says):
    stopped_fit()
    learn = other()
    before, opt, rng = copy.deepcopy(learn.model.state_dict()), copy.deepcopy(learn.opt.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match=says): learn.fit(3, resume='fit.ckpt')
    assert learn._answers is None and learn.start is None
    if 'columns' in says: return # which the callback itself says, later
    same(learn.model.state_dict(), before); same(learn.opt.state_dict(), opt); same(torch.get_rng_state(), rng)

@pytest.mark.parametrize('other, says', [(lambda: labelled('abcdefghik'), 'names of training'), (lambda: labelled(label=lambda o: 'xy'[ord(o) % 3 > 0]), 'labels of training'),
                                         (lambda: labelled(label=lambda o: 'xz'[ord(o) % 2]), r'vocabulary of training: y there, z here'),
                                         (lambda: labelled(tfms=[partial(torch.mul, other=2)]), r'transforms of training: .*other=2')])
def test_other_items_are_refused_and_named(other, says):
    stop(learner(data=labelled()), 2, 'after_batch', 2, CheckpointCallback('fit.ckpt', every_batches=1))
    learner(data=labelled()).fit(2, resume='fit.ckpt')
    with pytest.raises(ValueError, match=says): learner(data=other()).fit(2, resume='fit.ckpt')

def test_another_length_and_another_version_are_refused(monkeypatch):
    stopped_fit()
    learn = learner(AvgStatsCallback(accuracy))
    with pytest.raises(ValueError, match='epochs: 3 there, 4 here'): learn.fit(4, resume='fit.ckpt')
    with monkeypatch.context() as m:
        m.setattr(mod, '__version__', '99')
        with pytest.raises(ValueError, match='dl2lib: .* there, 99 here'): learn.fit(3, resume='fit.ckpt')
    monkeypatch.setattr(torch, '__version__', '99')
    with pytest.warns(UserWarning, match='this is 99: the same to the bit is not promised'): learn.fit(3, resume='fit.ckpt')

def test_a_file_that_is_missing_or_no_checkpoint_is_named():
    learn = learner()
    with pytest.raises(FileNotFoundError, match="no checkpoint: leave resume out to begin: 'nowhere.ckpt'"): learn.fit(1, resume='nowhere.ckpt')
    learn.save('weights.state')
    with pytest.raises(StateFileError, match="weights.state is of the kind 'weights', not checkpoint"): learn.fit(1, resume='weights.state')
    assert learn.recorder.losses == []

def damage(path):
    b = bytearray(Path(path).read_bytes())
    b[len(b)//2] ^= 1
    Path(path).write_bytes(b)

@pytest.mark.parametrize('how', [damage, lambda p: Path(p).write_bytes(b''), os.remove])
def test_the_one_before_is_taken_and_that_is_said(whole, how):
    stop(learner(*everything()), 3, 'after_batch', 14, CheckpointCallback('fit.ckpt', every_batches=3))
    how('fit.ckpt')
    learn = learner(*everything())
    assert unfinished('fit.ckpt')
    with pytest.warns(UserWarning, match=r'fit\.ckpt.*fit\.ckpt\.prev.*taken'): learn.fit(3, CheckpointCallback('fit.ckpt'), resume='fit.ckpt')
    same(result(learn), whole)

def test_two_damaged_files_are_both_named():
    stopped_fit()
    damage('fit.ckpt'); damage('fit.ckpt.prev')
    with pytest.raises(StateFileError, match=r'fit\.ckpt: the file is damaged') as e: learner(AvgStatsCallback(accuracy)).fit(3, resume='fit.ckpt')
    assert 'fit.ckpt.prev: the file is damaged' in str(e.value.__notes__)

def test_a_new_fit_does_not_overwrite_one_that_waits():
    stopped_fit()
    learn = learner(AvgStatsCallback(accuracy))
    with pytest.raises(FileExistsError, match='a fit waits there to go on.*fit.ckpt'): learn.fit(3, CheckpointCallback('fit.ckpt'))
    assert unfinished('fit.ckpt')
    learn.fit(1, CheckpointCallback('fit.ckpt', overwrite=True))
    learn.fit(1, CheckpointCallback('fit.ckpt')) # a finished one may go
    with pytest.raises(ValueError, match='every_batches=0'): CheckpointCallback('x', every_batches=0)
    with pytest.raises(ValueError, match='every_minutes=-1'): CheckpointCallback('x', every_minutes=-1)


# A fit that is finished

def test_of_a_finished_fit_nothing_is_left_to_do(whole, capsys):
    learner(*everything()).fit(3, CheckpointCallback('fit.ckpt'))
    assert not unfinished('fit.ckpt') and not unfinished('nowhere.ckpt')
    log = Path('log.csv').read_bytes()
    learn = learner(*everything())
    learn.fit(3, CheckpointCallback('fit.ckpt'), resume='fit.ckpt')
    assert 'fit.ckpt: all 3 epochs are done, nothing is left to do' in capsys.readouterr().out and Path('log.csv').read_bytes() == log
    got = result(learn)
    for k in 'weights', 'opt', 'losses', 'lrs', 'rows', 'seen', 'norms': same(got[k], whole[k], k)
    with pytest.raises(ValueError, match='epochs: 3 there, 5 here'): learn.fit(5, resume='fit.ckpt')

@pytest.mark.parametrize('cb', [lambda: EarlyStopping('train_loss', patience=1, min_delta=100.), lambda: Stop('begin_epoch', 2, CancelTrainException)])
def test_a_fit_that_somebody_ended_is_finished(cb):
    first, learn = learner(AvgStatsCallback(accuracy), cb()), learner(AvgStatsCallback(accuracy), cb())
    first.fit(9, CheckpointCallback('fit.ckpt'))
    assert first.epoch < 3 and not unfinished('fit.ckpt')
    learn.fit(9, resume='fit.ckpt')
    same(learn.model.state_dict(), first.model.state_dict())

def test_a_fit_of_no_epochs_is_finished_and_one_that_never_began_is_not():
    learner().fit(0, CheckpointCallback('none.ckpt'))
    assert not unfinished('none.ckpt')
    stop(learner(), 1, 'begin_fit', 1, CheckpointCallback('fit.ckpt'), order=1e9)
    assert not Path('fit.ckpt').exists()

def test_to_look_at_a_checkpoint_takes_nothing_along_but_what_was_trained(whole):
    stop(learner(*everything()), 3, 'after_batch', 14, CheckpointCallback('fit.ckpt', every_batches=1), order=INF)
    log, learn, rng = Path('log.csv').read_bytes(), learner(*everything()), torch.get_rng_state()
    assert load_checkpoint('fit.ckpt', learn) == dict(epochs=3, epoch=1, batch=3)
    assert learn.recorder.losses == whole['losses'][:12] and learn.data.train_dl.state_dict()['batch'] == 0
    same(torch.get_rng_state(), rng)
    assert Path('log.csv').read_bytes() == log and learn.validate()['loss'] > 0

def test_a_checkpoint_by_hand():
    class Saves(Callback):
        _order = 100
        def after_epoch(self): save_checkpoint(self.run, f'{self.epoch}.ckpt', self.epoch+1)
    whole, learn = learner(Saves()), learner(Saves())
    whole.fit(3)
    learn.fit(3, resume='0.ckpt')
    same(result(learn), result(whole))


# When it cannot be written

class FullDisk(Callback):
    "From batch to batch."
    def __init__(self, monkeypatch, first, last): self.mp, self.first, self.last = monkeypatch, first, last
    def begin_batch(self):
        def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
        if self.in_train and self.n_iter == self.first: self.real = os.fsync; self.mp.setattr(os, 'fsync', full)
        if self.in_train and self.n_iter == self.last: self.mp.setattr(os, 'fsync', self.real)

def test_a_full_disk_does_not_stop_training(whole, monkeypatch):
    learn, keeper = learner(*everything()), CheckpointCallback('fit.ckpt', every_batches=3)
    with pytest.warns(UserWarning, match='no checkpoint.*the disk is full.*fit.ckpt.*Training goes on') as said: learn.fit(3, [keeper, FullDisk(monkeypatch, 8, 16)])
    assert len(said) == 4 and keeper.error is None and not unfinished('fit.ckpt') # after 9, between the epochs, after 12 and 15
    same(result(learn), whole)

def test_a_disk_that_stays_full_leaves_the_last_good_one(whole, monkeypatch):
    with monkeypatch.context() as m, pytest.warns(UserWarning, match='the disk is full'):
        keeper = CheckpointCallback('fit.ckpt', every_batches=3)
        learner(*everything()).fit(3, [keeper, FullDisk(m, 8, 999)])
    assert keeper.error.errno == errno.ENOSPC and read_state('fit.ckpt', 'checkpoint')['batch'] == 6
    learn = learner(*everything())
    learn.fit(3, resume='fit.ckpt')
    same(result(learn), whole)

def test_a_place_that_cannot_be_written_at_all_is_an_error_before_the_first_batch():
    learn = learner()
    with pytest.raises(FileNotFoundError, match='there is no such folder.*nowhere/fit.ckpt'): learn.fit(1, CheckpointCallback('nowhere/fit.ckpt'))
    class Opens(Callback):
        stateful = ('file',)
        def begin_fit(self): self.file = Path('x')
    with pytest.raises(TypeError, match=r"state\['callbacks'\]\['opens'\]\['state'\]\['file'\] is a PosixPath"): learn.fit(1, [Opens(), CheckpointCallback('fit.ckpt')])
    assert learn.recorder.losses == [] and not Path('fit.ckpt').exists()

def test_every_so_many_minutes(monkeypatch):
    now = [0.]
    class Clock(Callback):
        def after_batch(self): now[0] += 10.
    monkeypatch.setattr(mod.time, 'monotonic', lambda: now[0])
    written, keeper = [], CheckpointCallback('fit.ckpt', every_minutes=0.5)
    keeper.write = lambda epoch, batch: (written.append((epoch, batch)), setattr(keeper, 'last', now[0]))
    learner(data=seeded(valid=False)).fit(1, [Clock(), keeper])
    assert written == [(0, 0), (0, 3), (0, 6), (0, 9), (None, 0)]


# Callbacks

def csv_fit(*cbs, resume=None, epochs=3): learner(AvgStatsCallback(accuracy), CSVLog('log.csv'), *cbs).fit(epochs, [] if resume else CheckpointCallback('fit.ckpt', every_batches=4), resume=resume)
def csv_rows(): return [l.rsplit(',', 1)[0] for l in Path('log.csv').read_text().splitlines()]

@pytest.fixture
def csv_stopped():
    csv_fit()
    rows = csv_rows()
    Path('log.csv').unlink()
    learner(AvgStatsCallback(accuracy), CSVLog('log.csv')).fit(1) # of an earlier fit
    before = csv_rows()
    with pytest.raises(PowerCut): csv_fit(Stop('after_batch', 14))
    return before + rows[1:]

@pytest.mark.parametrize('change', ['nothing', 'a line that the checkpoint does not know', 'half a line', 'a lost line'])
def test_a_log_goes_on_without_lines_lost_or_doubled(csv_stopped, change):
    log = Path('log.csv').read_text(newline='') if sys.version_info >= (3, 13) else Path('log.csv').read_bytes().decode()
    if change.startswith('a line'): log += '1,9,9,9,9,9.9\r\n2,9,9,9,9,9.9\r\n'
    if change.startswith('half'): log += '1,0.1,0.'
    if change.startswith('a lost'): log = ''.join(log.splitlines(keepends=True)[:2]) # of the fit's own
    Path('log.csv').write_bytes(log.encode())
    csv_fit(resume='fit.ckpt')
    assert csv_rows() == csv_stopped

@pytest.mark.parametrize('change, says', [(lambda s: s + '0,9,9,9,9,9.9\r\n', 'other lines than this fit wrote'), (lambda s: s.replace('\r\n0,', '\r\n7,'), 'other lines than this fit wrote'),
                                          (lambda s: s.splitlines(keepends=True)[0], 'shorter than it was')])
def test_a_log_with_lines_of_somebody_else_is_left_alone(csv_stopped, change, says):
    changed = change(Path('log.csv').read_bytes().decode()).encode()
    Path('log.csv').write_bytes(changed)
    with pytest.raises(ValueError, match=f'log.csv.*{says}'): csv_fit(resume='fit.ckpt')
    assert Path('log.csv').read_bytes() == changed

def test_a_log_that_is_gone_is_written_anew():
    csv_fit()
    rows = csv_rows()
    Path('log.csv').unlink()
    with pytest.raises(PowerCut): csv_fit(Stop('after_batch', 14))
    Path('log.csv').unlink()
    csv_fit(resume='fit.ckpt')
    assert csv_rows() == rows

def test_the_table_shows_the_rows_of_before(capsys):
    stopped_fit()
    learn = learner(AvgStatsCallback(accuracy), ProgressCallback(where='terminal'))
    learn.logger = print
    learn.fit(3, resume='fit.ckpt')
    out = capsys.readouterr().out
    assert [l.split()[0] for l in out.replace('\r', '\n').splitlines() if l[:1].isdigit()] == ['0', '1', '2'] and '1 of 3 epochs are done' in out

def test_a_callback_of_ones_own():
    class Smooth(Callback):
        def begin_fit(self): self.value, self.n = 0., 0
        def after_loss(self): self.value, self.n = 0.9*self.value + 0.1*self.loss.item(), self.n+1
        def state_dict(self): return dict(both=[self.value, self.n])
        def load_state_dict(self, state): self.value, self.n = state['both']
    class Forgets(Callback):
        def begin_fit(self): self.seen = 0
        def after_batch(self): self.seen += 1
    cbs = [(Smooth(), Forgets()) for _ in range(3)]
    learner(*cbs[0]).fit(2)
    stop(learner(*cbs[1]), 2, 'after_batch', 16, CheckpointCallback('fit.ckpt', every_batches=4))
    learner(*cbs[2]).fit(2, resume='fit.ckpt')
    assert (cbs[2][0].value, cbs[2][0].n) == (cbs[0][0].value, cbs[0][0].n) == (cbs[0][0].value, 22) and cbs[2][1].seen < cbs[0][1].seen

def test_searching_and_tracing_write_nothing():
    learn = learner(AvgStatsCallback(accuracy), CheckpointCallback('fit.ckpt'), CSVLog('log.csv'))
    learn.lr_find(plot=False, max_iter=30)
    learn.trace()
    assert os.listdir() == []


# Interrupts

class Press(Callback):
    "Presses Ctrl-C at the n-th time that an event comes."
    def __init__(self, event, n, order=0): self.left, self._order = n, order; setattr(self, event, self.strike)
    def strike(self):
        self.left -= 1
        if self.left == 0: signal.raise_signal(signal.SIGINT)

@pytest.mark.parametrize('event, n', [(e, n) for e in 'begin_batch after_pred after_loss after_backward after_batch'.split() for n in (2, 10, 15)] +
                         [('begin_epoch', 2), ('begin_validate', 1), ('after_epoch', 1), ('begin_epoch', 1), ('after_step', 3)])
def test_an_interrupt_keeps_the_last_complete_batch(whole, event, n):
    learn = learner(*everything())
    with pytest.raises(KeyboardInterrupt): learn.fit(3, [CheckpointCallback('fit.ckpt'), Press(event, n)])
    assert not any(isinstance(cb, CheckpointCallback) for cb in learn.cbs)
    state = read_state('fit.ckpt', 'checkpoint')
    trained = 9*state['epoch'] + state['batch']
    if event not in ('begin_epoch', 'begin_validate', 'after_epoch') and n == 2: assert trained == 2, 'it is written after the batch under way'
    other = learner(*everything())
    other.fit(3, CheckpointCallback('fit.ckpt'), resume='fit.ckpt')
    same(result(other), whole)

def test_an_interrupt_that_python_swallows_is_not_lost():
    class Swallows(Callback): # as what runs while a process is forked
        def begin_epoch(self):
            try: signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt: pass
    with pytest.raises(KeyboardInterrupt) as e: learner(Swallows()).fit(1, CheckpointCallback('fit.ckpt'))
    assert read_state('fit.ckpt', 'checkpoint')['batch'] == 1 and e.value.__notes__ == ['raised by CheckpointCallback in after_batch']

def test_a_second_interrupt_does_not_wait():
    class Twice(Callback):
        def after_loss(self):
            if self.n_iter == 4: signal.raise_signal(signal.SIGINT); self.reached = True; signal.raise_signal(signal.SIGINT); self.passed = True
    twice = Twice()
    learn = learner()
    with pytest.raises(KeyboardInterrupt): learn.fit(1, [CheckpointCallback('fit.ckpt'), twice])
    assert vars(twice).keys() >= {'reached'} and 'passed' not in vars(twice) and read_state('fit.ckpt', 'checkpoint')['batch'] == 0

def test_an_interrupt_while_a_checkpoint_is_written_waits_for_it(monkeypatch, whole):
    real, presses = os.fsync, [4] # three for the first checkpoint
    def press(fd):
        presses[0] -= 1
        if presses[0] == 0: signal.raise_signal(signal.SIGINT)
        real(fd)
    monkeypatch.setattr(os, 'fsync', press)
    with pytest.raises(KeyboardInterrupt): learner(*everything()).fit(3, CheckpointCallback('fit.ckpt', every_batches=4))
    assert read_state('fit.ckpt', 'checkpoint')['batch'] == 4

def test_the_handler_of_others_is_kept_and_called():
    said = []
    before = signal.signal(signal.SIGINT, lambda *args: said.append('pressed'))
    try:
        learner().fit(1, [CheckpointCallback('fit.ckpt'), Press('after_loss', 3)]) # it only takes note
        assert said == ['pressed'] and signal.getsignal(signal.SIGINT)(0, None) is None
    finally: signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    learner().fit(1, CheckpointCallback('fit.ckpt', overwrite=True))
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is signal.SIG_IGN

def test_a_fit_in_another_thread():
    errors = []
    def run():
        try: learner().fit(1, CheckpointCallback('fit.ckpt'))
        except BaseException as e: errors.append(e)
    t = threading.Thread(target=run)
    t.start(); t.join()
    assert not errors and not unfinished('fit.ckpt')

def test_killed_after_its_last_checkpoint_it_draws_what_would_have_come_next():
    set_seed(3)
    learner(data=seeded()).fit(2, CheckpointCallback('fit.ckpt'))
    draws = torch.rand(3), random.random(), np.random.rand()
    set_seed(4)
    learner(data=seeded()).fit(2, resume='fit.ckpt')
    same([torch.rand(3), random.random(), np.random.rand()], list(draws))

def test_two_of_them_leave_the_handler_of_before():
    for order in 1, -1:
        learn, cbs = learner(), [CheckpointCallback(f'{i}.ckpt', overwrite=True) for i in range(2)][::order]
        learn.fit(1, cbs)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt): learn.fit(1, [*cbs, Press('after_loss', 3)])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert sorted(read_state(f'{i}.ckpt', 'checkpoint')['batch'] for i in range(2)) == [3, 4], 'the one hands the interrupt on to the other, which waits for a batch of its own'

def test_a_second_interrupt_at_the_end_leaves_nothing_behind():
    class Impatient(Callback):
        _order = 10
        def after_fit(self): signal.raise_signal(signal.SIGINT)
    for press in (Press('after_loss', 3), Callback()):
        learn, stats = learner(), ActivationStats()
        with pytest.raises(KeyboardInterrupt): learn.fit(1, [CheckpointCallback('fit.ckpt', overwrite=True), stats, Impatient(), press])
        assert learn.cbs == [learn.recorder, learn.train_eval] and learn._answers is None
        assert not any(m._forward_hooks for m in learn.model.modules()) and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert unfinished('fit.ckpt') == (type(press) is Press)

def test_an_interrupt_at_any_moment_leaves_the_learner_usable():
    learn, rng = learner(AvgStatsCallback(accuracy), data=seeded(n=300, num_workers=2)), random.Random(5)
    learn.fit(1, [CheckpointCallback('fit.ckpt'), ActivationStats()]) # all is imported: half an import is torch's to put right
    for i in range(20):
        stopped = threading.Event()
        def press(delay): # and again: Python swallows what comes while it forks a worker
            while not stopped.wait(delay): os.kill(os.getpid(), signal.SIGINT); delay = 1
        presses, cbs = threading.Thread(target=press, args=(rng.uniform(0, 0.4),)), [ActivationStats()] + [CheckpointCallback('fit.ckpt', every_batches=5, overwrite=True)]*(i % 2)
        try:
            presses.start()
            learn.fit(1000, cbs)
        except KeyboardInterrupt: pass
        finally: stopped.set(); presses.join()
        assert not learn.in_train and learn._answers is None and learn.cbs == [learn.recorder, learn.avg_stats, learn.train_eval]
        assert not any(m._forward_hooks or m._backward_hooks for m in learn.model.modules()) and all(m.training for m in learn.model.modules())
        assert all(p.grad is None for p in learn.model.parameters()) and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        gc.collect()
        deadline = time.time() + 20
        while mp.active_children() and time.time() < deadline: time.sleep(0.01)
        assert not mp.active_children(), 'workers are left behind'
    learn.fit(1)
    assert len(learn.recorder.losses) == 30

def test_an_interrupt_of_the_whole_group_finds_the_last_batch(never_killed):
    "As a terminal sends it: to the workers, too."
    def run():
        os.setpgrp()
        class PressGroup(Callback): # while the loop waits for workers
            def after_batch(self):
                if self.n_iter == 13 and self.in_train: threading.Timer(0.01, os.killpg, (0, signal.SIGINT)).start()
        class Slow(Noisy):
            def __getitem__(self, i): time.sleep(0.005); return super().__getitem__(i)
        learn = learner(*everything(), data=DataBunch(*get_dls(Slow(), Noisy(30, 1), 10, seed=3, num_workers=2)))
        try: learn.fit(4, [CheckpointCallback('fit.ckpt'), PressGroup()])
        except KeyboardInterrupt: return
        raise AssertionError('nobody was interrupted')
    assert in_child(run) == 0
    state = read_state('fit.ckpt', 'checkpoint')
    assert (state['epoch'], state['batch']) >= (1, 4), 'the last complete batch is kept'
    assert in_child(partial(train, resume='fit.ckpt')) == 0
    same(torch.load('result.pt', weights_only=False), never_killed)


# Kills

@pytest.mark.parametrize('event, n, order', [('begin_fit', 1, INF), ('begin_batch', 1, -100), ('after_pred', 3, 0), ('after_step', 8, 0), ('after_batch', 28, 0), ('begin_validate', 2, 0), ('after_epoch', 2, 52),
                                             ('after_epoch', 1, INF), ('begin_epoch', 3, 0), ('after_fit', 1, 0)])
def test_killed_at_an_event_it_goes_on_to_the_bit(never_killed, event, n, order):
    assert in_child(train, Kill(event, n, order)) == -signal.SIGKILL
    assert in_child(partial(train, resume='fit.ckpt' if os.path.exists('fit.ckpt') or os.path.exists('fit.ckpt.prev') else None)) == 0
    same(torch.load('result.pt', weights_only=False), never_killed)

@pytest.mark.parametrize('name, n', [('fsync', 1), ('fsync', 5), ('link', 4), ('replace', 8), ('replace', 9)])
def test_killed_while_a_checkpoint_is_written_it_goes_on_to_the_bit(never_killed, name, n):
    assert in_child(partial(train, prepare=lambda: kill_in_write(n, name))) == -signal.SIGKILL
    assert in_child(partial(train, resume='fit.ckpt' if os.path.exists('fit.ckpt') else None)) == 0
    same(torch.load('result.pt', weights_only=False), never_killed)
    assert set(os.listdir()) == {'fit.ckpt', 'fit.ckpt.prev', 'log.csv', 'result.pt'}

def test_killed_at_random_moments_it_goes_on_to_the_bit(never_killed):
    rng, kills = random.Random(2), 0
    for _ in range(60):
        resume = 'fit.ckpt' if os.path.exists('fit.ckpt') else None
        p = mp.get_context('fork').Process(target=lambda: (torch.set_num_threads(1), train(resume=resume, every=1)))
        p.start()
        if not ended(p, rng.uniform(0.1, 0.6)): os.kill(p.pid, signal.SIGKILL); kills += 1
        assert ended(p, 120)
        if p.exitcode == 0: break
        assert p.exitcode == -signal.SIGKILL
    assert p.exitcode == 0 and kills, kills
    same(torch.load('result.pt', weights_only=False), never_killed)


# Weights

def test_weights_are_saved_and_loaded():
    learn, other = learner(), learner()
    learn.fit(1)
    learn.save('all.state'); learn.save('weights.state', with_opt=False)
    other.load('all.state')
    same(other.model.state_dict(), learn.model.state_dict()); same(other.opt.state_dict()['state'], learn.opt.state_dict()['state'])
    third = learner(opt_func=adam_opt())
    third.load('weights.state')
    same(third.model.state_dict(), learn.model.state_dict())
    assert not third.opt.state
    with pytest.raises(ValueError, match='weights.state has no state of an optimizer'): other.load('weights.state', with_opt=True)
    before = copy.deepcopy(third.model.state_dict())
    learn.fit(1); learn.save('later.state')
    with pytest.raises(ValueError, match='another optimizer'): third.load('later.state')
    same(third.model.state_dict(), before)
    third.load('later.state', with_opt=False)
    with pytest.raises(ValueError, match='later.state is of another model, and nothing was loaded'): learner(model=net(9)).load('later.state')

@pytest.mark.parametrize('opt_func', [sgd_mom_opt, adam_opt(), partial(torch.optim.SGD, momentum=.9)])
def test_the_rate_asked_for_survives_loading(opt_func, capsys):
    "A file that was trained with another rate, or saved within a schedule, gives weights and averages."
    class Saves(Callback):
        _order = 50
        def after_batch(self):
            if self.run.in_train and self.run.n_iter == 3: self.run.save('mid.state')
    first = learner(Saves(), ParamScheduler('lr', sched_cos(0.2, 0.01)), opt_func=opt_func)
    first.fit(1)
    first.save('end.state')
    torch.optim.lr_scheduler.StepLR(first.opt, 1) # leaves its own word in the groups
    first.save('torch.state')
    for name in 'mid.state', 'end.state', 'torch.state':
        learn = learner(opt_func=opt_func, lr=.001)
        capsys.readouterr()
        learn.load(name)
        there = read_state(name, 'weights')['opt']['param_groups'][0]['lr']
        assert capsys.readouterr().out == f"{name}: weights and the optimizer's state are loaded; lr=0.001 ({there} in the file) stays\n"
        assert learn.opt.param_groups[0]['lr'] == learn.lr == .001 and learn.opt.param_groups[0].keys() == learner(opt_func=opt_func).opt.param_groups[0].keys()
        assert learn.opt.state and not torch.equal(learn.model[0].weight, net()[0].weight)
        learn.fit(1)
        assert learn.recorder.lrs == [.001]*9

def test_what_is_loaded_is_said(capsys):
    learn = learner()
    learn.save('new.state'); learn.save('weights.state', with_opt=False)
    learn.fit(1); learn.save('all.state')
    for name, with_opt in ('new.state', None), ('weights.state', None), ('all.state', None), ('all.state', False): learn.load(name, with_opt=with_opt)
    assert [l.partition(': ')[2] for l in capsys.readouterr().out.splitlines()[-4:]] == ['weights are loaded', 'weights are loaded',
                                                                                     "weights and the optimizer's state are loaded", 'weights are loaded']

def test_a_checkpoint_of_the_middle_hands_no_passing_rate_to_the_next_fit():
    make = lambda: learner(ParamScheduler('lr', sched_cos(0.2, 0.01)), ParamScheduler('mom', sched_cos(.8, .9)), lr=.05)
    stop(make(), 2, 'after_batch', 14, CheckpointCallback('fit.ckpt', every_batches=1), order=INF)
    learn = make()
    load_checkpoint('fit.ckpt', learn)
    assert learn.opt.hypers[0]['lr'] != .05
    learn.fit(1)
    assert (learn.opt.hypers[0]['lr'], learn.opt.hypers[0]['mom']) == (.05, .9)

def test_weights_of_a_checkpoint():
    learner().fit(1, CheckpointCallback('fit.ckpt'))
    first, second = learner(), learner()
    first.load('fit.ckpt', with_opt=False)
    load_checkpoint('fit.ckpt', second)
    same(first.model.state_dict(), second.model.state_dict())
    assert not first.opt.state and second.opt.state


# On a GPU

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_on_cuda_it_goes_on_and_another_device_can_read_it():
    def make(device='cuda'): return learner(*everything(), CudaCallback(device))
    whole = make()
    whole.fit(3)
    stop(make(), 3, 'after_batch', 14, CheckpointCallback('fit.ckpt', every_batches=3))
    Path('log.csv').rename('whole.csv')
    learn = make()
    Path('whole.csv').rename('log.csv')
    learn.fit(3, resume='fit.ckpt')
    for a, b in zip(learn.model.parameters(), whole.model.parameters()): torch.testing.assert_close(a, b)
    assert learn.opt.state[next(learn.model.parameters())]['grad_avg'].is_cuda
    learn.save('gpu.state')
    other = learner()
    other.load('gpu.state')
    assert not next(other.model.parameters()).is_cuda
