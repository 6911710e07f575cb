"Progress bars: what is displayed in a pipe, in a terminal (a pty) and in a notebook (a kernel), and what is left behind."
import copy, fcntl, os, pickle, pty, re, struct, subprocess, sys, termios
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

fp = pytest.importorskip('fastprogress.fastprogress')
from dl2lib.callbacks import (AvgStatsCallback, Callback, CancelBatchException, CancelEpochException, CancelTrainException, Recorder,
                              accuracy, events)
from dl2lib.learner import Learner
from dl2lib.progress import ProgressCallback, _front_end
from repo_tools import ROOT, environment, python
from test_callbacks import Asking, Waiting
from test_runner import Raiser, batches

# A script and a notebook begin with this: ten batches of training, four of validation.
SETUP = '''
import os, signal, sys, time
from types import SimpleNamespace
import torch
from torch import nn
from torch.nn import functional as F
from dl2lib.callbacks import AvgStatsCallback, Callback, CancelEpochException, CancelTrainException, accuracy
from dl2lib.learner import Learner
from dl2lib.progress import ProgressCallback
signal.signal(signal.SIGINT, signal.default_int_handler) # what runs in the background may ignore it

def batches(n, seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 3, generator=g), torch.randint(0, 2, (4,), generator=g)) for _ in range(n)]

def make(*cbs):
    torch.manual_seed(1)
    return Learner(nn.Linear(3, 2), SimpleNamespace(train_dl=batches(10, 0), valid_dl=batches(4, 9)), F.cross_entropy, lr=0.1, cbs=[ProgressCallback(), *cbs])

class At(Callback): # does something in the given training batch
    def __init__(self, n, what): self.n, self.what = n, what
    def after_backward(self):
        if self.n_iter == self.n: self.what()
def interrupt(): os.kill(os.getpid(), signal.SIGINT); time.sleep(1)
def cancel(exc): raise exc
'''
HEAD = ['epoch', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy', 'time']

@pytest.fixture(scope='module')
def rows():
    "What a learner without bars says, times aside."
    space = {}
    exec(SETUP, space)
    learn, seen = space['make'](AvgStatsCallback(accuracy)), []
    learn.remove_cbs(ProgressCallback)
    learn.logger = seen.append
    learn.fit(3)
    return [r[:-1] for r in seen[1:]]

def cells(line): return line.split()[:-1] # without the time


# What is tried in each place: a name is printed, then a fit or two.
SCENES = '''
class Says(Callback):
    _order = 5
    def begin_fit(self): self.logger('off we go')
    def after_epoch(self):
        self.logger(f'epoch {self.epoch} is over')
        self.logger(['a', 'row', 'that', 'is', 'longer', 'than', 'the', 'first'])
        if self.epoch == 1: raise CancelTrainException()

print('== table')
make(AvgStatsCallback(accuracy)).fit(3)
print('== no statistics')
make().fit(2)
print('== interrupted')
learn = make(AvgStatsCallback(accuracy), At(13, interrupt))
before = learn.logger
try: learn.fit(3)
except KeyboardInterrupt: print('interrupted')
assert learn.logger is before
learn.remove_cbs(At)
learn.fit(1)
print('== messages')
make(AvgStatsCallback(accuracy), At(3, lambda: cancel(CancelEpochException())), Says()).fit(3)
print('== end')
print('fastprogress' in sys.modules)
'''

def scenes(lines):
    "The lines of each scene, by its name."
    res = {}
    for l in lines:
        if l.startswith('== '): now = res.setdefault(l[3:], [])
        elif res: now.append(l)
    return res


# --- a pipe --------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def pipe(): return python(SETUP+SCENES, ROOT)

def test_in_a_pipe_there_are_plain_lines_and_no_bar(pipe, rows):
    shown = scenes(pipe.splitlines())
    assert shown['table'][0].split() == HEAD and [cells(l) for l in shown['table'][1:]] == rows
    assert shown['no statistics'] == [] and shown['end'] == ['False'] # not even imported
    assert [l.split()[0] for l in shown['interrupted']] == ['epoch', '0', 'interrupted', 'epoch', '0']
    assert [l.split()[0] for l in shown['messages']] == ['epoch', 'off', '0', 'epoch', 'a', '1', 'epoch', 'a']
    assert pipe.isascii() and '\r' not in pipe

def test_a_terminal_that_cannot_do_more_gets_plain_lines(rows):
    shown = in_terminal("make(AvgStatsCallback(accuracy)).fit(3)", TERM='dumb')
    assert '█' not in shown.raw and [cells(l) for l in shown.lines[1:]] == rows


# --- a terminal ----------------------------------------------------------------------------------------------------------------------

class Screen:
    "What a terminal shows: lines as wide as it is, a cursor, carriage returns, and the wait before a full line breaks."
    def __init__(self, text, cols):
        self.raw, self.frames, lines, y, x = text, [], [''], 0, 0
        for c in text:
            if c == '\r': self.frames.append(lines[y].rstrip()); x = 0
            elif c == '\n': lines.append(''); y, x = y+1, x
            else:
                assert c.isprintable(), repr(c)
                if x == cols: lines.append(''); y, x = y+1, 0
                lines[y] = lines[y].ljust(x)[:x] + c + lines[y][x+1:]
                x += 1
        self.lines = [l.rstrip() for l in lines]
        while self.lines and not self.lines[-1]: self.lines.pop()

def in_terminal(code, cols=100, **env):
    "Run a script with a pty of this width as its terminal; what is on the screen at the end, and what was."
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack('HHHH', 40, cols, 0, 0))
    env = {k: v for k, v in environment(ROOT).items() if k not in ('COLUMNS', 'LINES', 'PYCHARM_HOSTED')} | dict(TERM='xterm', PYTHONIOENCODING='utf-8') | env
    proc = subprocess.Popen([sys.executable, '-c', SETUP+code], stdin=other, stdout=other, stderr=other, env=env, cwd=ROOT, close_fds=True)
    os.close(other)
    out = b''
    while True:
        try: chunk = os.read(main, 65536)
        except OSError: break # the other end is closed
        if not chunk: break
        out += chunk
    os.close(main)
    screen = Screen(out.decode('utf-8'), cols)
    assert proc.wait(60) == 0, out.decode()
    return screen

BAR = re.compile(r'epoch (\d+)/(\d+) (train|valid) \|(█*)(-*)\| [\d.]+% \[(\d+)/(\d+) [\d:]+<[\d:?]+(?:\.\.\. loss ([\d.]+))?\]')
def bars(frames): return [m.groups() for f in frames if (m := BAR.fullmatch(f))]

@pytest.fixture(scope='module', params=[60, 80, 100])
def terminal(request):
    screen = in_terminal(SCENES, request.param)
    return request.param, scenes(screen.lines), scenes(screen.frames)

def test_in_a_terminal_the_table_stays_and_the_bars_go(terminal, rows):
    cols, shown, frames = terminal
    if cols > len('  '.join(HEAD))+8: # else the table itself is wider than the terminal
        assert shown['table'][0].split() == HEAD and [cells(l) for l in shown['table'][1:]] == rows
        columns = [m.start() for m in re.finditer(r'\S+', shown['table'][0])]
        assert all([m.start() for m in re.finditer(r'\S+', l)] == columns for l in shown['table'][1:]) # it is straight
    seen = bars(frames['table'])
    assert [(b[0], b[1], b[2]) for b in seen if b[5] == '0'] == [(str(e), '3', part) for e in (1, 2, 3) for part in ('train', 'valid')]
    for e, part, n in [(e, *p) for e in '123' for p in (('train', '10'), ('valid', '4'))]:
        run = [b for b in seen if b[0] == e and b[2] == part]
        assert run[0][5] == '0' and run[-1][5] == run[-1][6] == n and not run[-1][4] and not run[0][3] and run[0][7] is None
        assert [len(b[3]) for b in run] == sorted(len(b[3]) for b in run)
        if cols < 80: assert {b[7] for b in run} == {None} # a line that is too long would break
        else: assert run[-1][7] == f'{float(rows[int(e)-1][1 if part == "train" else 3]):.4f}' # the loss of the whole run: as in the table

def test_in_a_terminal_without_statistics(terminal):
    cols, shown, frames = terminal
    assert shown['no statistics'] == [] and len(bars(frames['no statistics'])) > 8 and max(map(len, frames['no statistics'])) <= cols
    torch.manual_seed(1)
    model, (xb, yb) = nn.Linear(3, 2), batches(1)[0]
    if cols >= 80: assert next(b[7] for b in bars(frames['no statistics']) if b[5] == '1') == f'{F.cross_entropy(model(xb), yb).item():.4f}'

def test_in_a_terminal_an_interrupt_leaves_a_closed_bar_and_a_usable_learner(terminal, rows):
    cols, shown, frames = terminal
    if cols < 80: assert 'stopped after 1 of 3 epochs, in training, at batch 4 of 10' in shown['interrupted']; return
    first, again = shown['interrupted'][:4], shown['interrupted'][4:]
    assert first[0].split() == HEAD and cells(first[1]) == rows[0]
    assert first[2:] == ['stopped after 1 of 3 epochs, in training, at batch 4 of 10', 'interrupted']
    assert again[0].split() == HEAD and again[1].split()[0] == '0' and len(again) == 2

def test_in_a_terminal_cancelled_epochs_and_messages(terminal, rows):
    cols, shown, frames = terminal
    if cols < 80: return
    lines = shown['messages']
    assert [l.split()[0] for l in lines] == ['epoch', 'off', '0', 'epoch', 'a', '1', 'epoch', 'a', 'stopped']
    assert lines[1] == 'off we go' and lines[3] == 'epoch 0 is over' and lines[4] == lines[7] == 'a  row  that  is  longer  than  the  first'
    assert lines[8] == 'stopped after 2 of 3 epochs' and shown['end'] == ['True']


# --- a notebook ----------------------------------------------------------------------------------------------------------------------

def in_kernel(*sources):
    "Run cells in a kernel: the outputs that are left, and what was displayed on the way (HTML), each by cell."
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    nb, seen = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in [SETUP, *sources]]), []
    class Watching(nbclient.NotebookClient):
        def process_message(self, msg, cell, cell_index):
            if msg['msg_type'] in ('display_data', 'update_display_data'): seen.append((cell_index, msg['content']['data']))
            return super().process_message(msg, cell, cell_index)
    Watching(nb, timeout=120, kernel_name='python3', resources={'metadata': {'path': str(ROOT)}}).execute(env=environment(ROOT))
    left = [[dict(o.data) if 'data' in o else o.text for o in c.outputs if not (o.output_type == 'stream' and o.name == 'stderr')] for c in nb.cells[1:]]
    return left, [[d for i, d in seen if i == n+1] for n in range(len(sources))]

def table(html): return [re.findall(r'<t[dh]>(.*?)</t[dh]>', r) for r in re.findall(r'<tr>(.*?)</tr>', html)]
def html(outs): return [o['text/html'] for o in outs if isinstance(o, dict) and 'text/html' in o and '<style>' not in o['text/html']]
def png(o): return isinstance(o, dict) and 'image/png' in o

@pytest.fixture(scope='module')
def notebook():
    return in_kernel("learn = make(AvgStatsCallback(accuracy))\nlearn.fit(3)",
                     "try: learn.fit(3, At(13, interrupt))\nexcept KeyboardInterrupt: print('interrupted')",
                     "learn.fit(1)",
                     "learn.remove_cbs(AvgStatsCallback)\nlearn.fit(1)\nprint('ready')",
                     "learn = make(AvgStatsCallback(accuracy))\nlearn.remove_cbs(ProgressCallback)\nlearn.fit(2, ProgressCallback(plot=True))\nimport matplotlib.pyplot as plt\nprint(plt.get_fignums())",
                     "class Says(Callback):\n    _order = 5\n    def after_epoch(self): self.logger(f'epoch {self.epoch} is over')\nmake(AvgStatsCallback(accuracy), Says()).fit(2)")

def test_in_a_notebook_the_table_stays_and_the_bars_go(notebook, rows):
    left, seen = notebook[0][0], html(notebook[1][0])
    assert len(html(left)) == 1 and len(left) == 2 # the style, and one display
    shown = table(html(left)[0])
    assert shown[0] == HEAD and [r[:-1] for r in shown[1:]] == rows and '<progress' not in html(left)[0]
    assert any(h.count('<progress') == 2 for h in seen) and max(len(table(h)) for h in seen) == 4
    labels = [m for h in seen for m in re.findall(r'\[(\d+)/10 [\d:]+&lt;[\d:?]+(?:\.\.\. loss ([\d.]+))?\]', h)]
    assert [n for n, _ in labels if n in '05'] and ('10', f'{float(rows[0][1]):.4f}') in labels and ('10', f'{float(rows[2][1]):.4f}') in labels

def test_in_a_notebook_the_bar_of_epochs_advances(notebook):
    values = [re.search(r'value="(\d+)"[^>]*max="3"|max="3"[^>]*value="(\d+)"', h) for h in html(notebook[1][0])]
    values = [int(m[1] or m[2]) for m in values if m]
    assert sorted(set(values)) == [0, 1, 2] and values == sorted(values)

def test_in_a_notebook_an_interrupt_leaves_the_table_and_says_where_it_stopped(notebook):
    left = notebook[0][1]
    shown = html(left)
    assert len(shown) == 1 and '<progress' not in shown[0] and [r[0] for r in table(shown[0])] == ['epoch', '0']
    assert '<p>stopped after 1 of 3 epochs, in training, at batch 4 of 10</p>' in shown[0] and 'interrupted\n' in left
    again = html(notebook[0][2])
    assert len(again) == 1 and [r[0] for r in table(again[0])] == ['epoch', '0'] and 'stopped' not in again[0]

def test_in_a_notebook_without_statistics(notebook):
    left, seen = notebook[0][3], html(notebook[1][3])
    assert html(left) == ['<div></div>'] and left[-1] == 'ready\n' and any('loss' in h for h in seen)

def test_in_a_notebook_the_losses_are_drawn_on_request(notebook):
    left, seen = notebook[0][4], notebook[1][4]
    assert sum(map(png, left)) == 1 and sum(map(png, seen)) >= 2 # drawn anew in its place
    assert not any(map(png, notebook[0][0])) and left[-1] == '[]\n' # no figure of pyplot is left open

def test_in_a_notebook_messages_are_rows(notebook):
    shown = table(html(notebook[0][5])[0])
    assert [r[0] for r in shown] == ['epoch', '0', 'epoch 0 is over', '1', 'epoch 1 is over'] and all(len(r) == 6 for r in shown)


# --- what is left behind, in process ---------------------------------------------------------------------------------------------------

def make(*cbs, n_train=3, n_valid=2, where='terminal', plot=False):
    torch.manual_seed(1)
    data = SimpleNamespace(train_dl=batches(n_train), valid_dl=None if n_valid is None else batches(n_valid, seed=9))
    return Learner(nn.Linear(3, 2), data, F.cross_entropy, lr=0.1, cbs=[ProgressCallback(where=where, plot=plot), *cbs])

FIRST = dict(after_cancel_batch=CancelBatchException, after_cancel_epoch=CancelEpochException, after_cancel_train=CancelTrainException)

@pytest.mark.parametrize('event', events)
@pytest.mark.parametrize('exc', [ValueError, KeyboardInterrupt, CancelBatchException, CancelEpochException, CancelTrainException])
@pytest.mark.parametrize('order', [-50, 50])
def test_the_logger_is_put_back_whatever_happened(event, exc, order, capsys):
    raiser, rows = Raiser(event, exc()), []
    raiser._order = order
    learn = make(AvgStatsCallback(accuracy), *([Raiser('begin_batch', FIRST[event]())] if event in FIRST else []))
    learn.logger = logger = rows.append
    try: learn.fit(2, raiser)
    except (ValueError, KeyboardInterrupt, CancelBatchException, CancelEpochException, CancelTrainException) as e: assert e is raiser.exc
    assert learn.logger is logger and learn.progress.bars is None and not raiser.armed
    out = capsys.readouterr().out
    assert not any('|' in l for l in Screen(out, 100).lines) # whatever is there now, it is no bar
    learn.fit(1)
    shown = Screen(capsys.readouterr().out, 100).lines
    assert [l.split()[0] for l in shown] == ['epoch', '0'] and rows == [] and learn.logger is logger

def test_plain_leaves_the_logger_alone():
    learn, rows = make(AvgStatsCallback(accuracy), where='plain'), []
    learn.logger = rows.append
    learn.fit(2)
    assert len(rows) == 3

@pytest.mark.parametrize('n_valid', [None, 0])
def test_without_validation(n_valid, capsys, recwarn):
    make(AvgStatsCallback(accuracy), n_valid=n_valid).fit(2)
    out = capsys.readouterr().out
    assert [l.split()[0] for l in Screen(out, 100).lines] == ['epoch', '0', '1'] and ' valid |' not in out and not recwarn.list

def test_no_epochs_and_no_bar(capsys, recwarn):
    make(AvgStatsCallback()).fit(0)
    assert capsys.readouterr().out.split() == ['epoch', 'train_loss', 'valid_loss', 'time'] and not recwarn.list

@pytest.mark.parametrize('epochs', [12, 300])
def test_every_epoch_is_counted_however_quick_it_is(epochs, capsys):
    make(n_train=1, n_valid=None).fit(epochs)
    seen = re.findall(rf'epoch (\d+)/{epochs} train \|-', capsys.readouterr().out)
    assert list(map(int, seen)) == list(range(1, epochs+1))

def test_validating_and_predicting_draw_nothing(capsys):
    learn = make(AvgStatsCallback(accuracy))
    learn.validate(); learn.get_preds()
    assert capsys.readouterr().out == ''

def test_it_changes_nothing_in_what_is_trained():
    res = []
    for where in ('plain', 'terminal'):
        learn = make(AvgStatsCallback(accuracy), Recorder(), where=where)
        learn.fit(3)
        res.append((learn.recorder.losses, learn.model.weight.tolist()))
    assert res[0] == res[1]

def test_it_can_be_removed_and_given_to_one_fit(capsys):
    learn = make(AvgStatsCallback())
    learn.remove_cbs(ProgressCallback)
    learn.fit(1)
    assert '|' not in capsys.readouterr().out
    learn.fit(1, ProgressCallback(where='terminal'))
    assert '|' in capsys.readouterr().out
    learn.fit(1)
    assert '|' not in capsys.readouterr().out

def test_where():
    assert _front_end() == 'plain' # pytest captures
    with pytest.raises(ValueError, match="where='browser': give 'notebook', 'terminal' or 'plain'"): ProgressCallback(where='browser')

def test_without_fastprogress_it_says_what_to_install(monkeypatch, capsys):
    for name in ('fastprogress', 'fastprogress.fastprogress'): monkeypatch.setitem(sys.modules, name, None)
    learn = make(AvgStatsCallback())
    logger = learn.logger
    with pytest.raises(ImportError, match='pip install "fastprogress>=1.1.6,<2".*AvgStatsCallback prints plain lines') as e: learn.fit(1)
    assert 'raised by ProgressCallback in begin_fit' in e.value.__notes__ and learn.logger is logger
    learn.progress.where = 'plain' # plain lines need nothing
    learn.fit(1)
    assert capsys.readouterr().out.count('\n') == 2

@pytest.mark.parametrize('duplicate', [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy', 'copy', 'pickle'])
def test_copies_have_no_bar(duplicate, capsys):
    made = []
    class Copies(Callback):
        def after_loss(self): made.append(duplicate(self.progress))
    learn = make(Copies(), plot=True)
    learn.fit(1)
    assert len(made) == 5 and all(cb.bars is None and cb.where == 'terminal' and cb.plot for cb in made)
    learn.remove_cbs([ProgressCallback, Copies])
    learn.fit(1, made[0])

def test_a_learner_copied_within_a_fit(capsys):
    class Copies(Callback):
        def after_loss(self): self.made = copy.deepcopy(self.run)
    learn = make(AvgStatsCallback())
    learn.fit(1, cb := Copies())
    cb.made.remove_cbs('copies')
    cb.made.fit(1)


# --- promise 8: it asks the device only when it draws ------------------------------------------------------------------------------------

class Counting(Callback):
    "Counts, in training batches, what asks for values, and how often the bar is drawn."
    _order = 100
    def begin_epoch(self):
        self.modes, self.drawn = [Waiting(), Asking()], 0
        for m in self.modes: m.__enter__()
        bars = self.progress.bars
        if bars is not None:
            draw = bars.pb.update_bar
            def counted(val): self.drawn += 1; draw(val)
            bars.pb.update_bar = counted
    def after_batch(self):
        if self.in_train and self.iter == self.iters-1:
            for m in self.modes[::-1]: m.__exit__(None, None, None)
            self.seen = [n for m in self.modes for n in m.seen]

@pytest.mark.parametrize('stats', [True, False])
def test_the_device_is_asked_as_often_as_the_bar_is_drawn(stats, monkeypatch, capsys):
    now = [0.]
    def clock(): now[0] += 1e-3; return now[0] # a millisecond whenever it is asked
    monkeypatch.setattr(fp.time, 'time', clock)
    learn = make(*([AvgStatsCallback(accuracy)] if stats else []), n_train=400, n_valid=None)
    counting = Counting()
    learn.fit(1, counting)
    assert 6 <= counting.drawn < 40 and len(counting.seen) in (counting.drawn, 2*counting.drawn) # a read of one number is seen by one counter or by both

def test_plain_lines_ask_for_nothing(capsys):
    counting = Counting()
    make(AvgStatsCallback(accuracy), where='plain', n_train=50).fit(1, counting)
    assert counting.seen == []

def test_losses_to_be_drawn_are_read_all_at_once(monkeypatch):
    "With `plot`, no loss is read before the picture is drawn anew."
    from dl2lib.progress import _LossPlot
    display = pytest.importorskip('IPython.display')
    shown = []
    monkeypatch.setattr(display, 'display', lambda im, display_id: shown.append(im) or SimpleNamespace(update=shown.append))
    plot, mode = _LossPlot(), Asking()
    with mode:
        for i in range(100): plot.waiting.append(torch.tensor(float(i)))
        plot.draw(every=1.)
        for i in range(100): plot.waiting.append(torch.tensor(float(i)))
        plot.draw(every=1000.)
    assert mode.seen == ['tolist'] and len(shown) == 1 and plot.train == [float(i) for i in range(100)] and shown[0].data[:4] == b'\x89PNG'
    plot.valid.append((200, 3.))
    plot.draw()
    assert len(shown) == 2 and len(plot.train) == 200 and plot.waiting == [] and shown[1].data != shown[0].data
