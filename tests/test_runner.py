"The training loop: events in order, cancelling, failing, bad input, and weights equal to a hand-written loop's."
import multiprocessing, os, signal, time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dl2lib.callbacks import (AvgStatsCallback, BatchTransformXCallback, Callback, CancelBatchException, CancelEpochException,
                              CancelStepException, CancelTrainException, CudaCallback, ParamScheduler, Recorder, TrainEvalCallback, accuracy, events)
from dl2lib.runner import Runner, TrainBundle, TrainLoop, get_batch, get_runner
from dl2lib.schedules import combine_scheds, cos_1cycle_anneal, sched_lin

# one letter an event, so that the events of a fit can be written out
LETTER = dict(begin_fit='F', begin_epoch='E', begin_batch='b', after_pred='p', after_loss='l', after_backward='g', after_step='s',
              after_batch='n', begin_validate='V', after_epoch='e', after_fit='f',
              after_cancel_batch='x', after_cancel_epoch='y', after_cancel_train='z')
PLAIN = 'F E bplgsn bplgsn V bpln e f' # an epoch of two training batches and one validation batch


class Log(Callback):
    "Writes down every event."
    def __init__(self, order=-5): self.log, self._order = '', order

for _e, _l in LETTER.items(): setattr(Log, _e, lambda self, l=_l: setattr(self, 'log', self.log+l))


@pytest.fixture
def interruptible():
    "What runs in the background ignores SIGINT from the start."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Raiser(Callback):
    "Raises `exc` the first time that `event` comes, in training or in validation."
    def __init__(self, event, exc, in_train=None):
        self.exc, self.armed, self.where = exc, True, in_train
        setattr(self, event, self.strike)

    def strike(self):
        if self.armed and self.where in (None, self.run.in_train):
            self.armed = False
            raise self.exc


class Net(nn.Module):
    "Two layers, the second of which is in evaluation mode from the start."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))
        self.b.eval()
    def forward(self, x): return self.b(self.a(x))


def batches(n, bs=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(bs, 3, generator=g), torch.randint(0, 2, (bs,), generator=g)) for _ in range(n)]

def bundle(n_train=2, n_valid=1, valid=True):
    torch.manual_seed(1)
    model = Net()
    data = SimpleNamespace(train_dl=batches(n_train), valid_dl=batches(n_valid, seed=9) if valid else None)
    return TrainBundle(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), F.cross_entropy, data)

def packed(s): return s.replace(' ', '')

def check_clean(learn, run):
    "What must hold after any fit, however it ended."
    assert all(p.grad is None for p in learn.model.parameters())
    assert learn.model.training and learn.model.a.training and not learn.model.b.training and not learn.model.b[1].training
    assert not run.in_train and run.xb is None and run.yb is None and run.pred is None
    assert run.loss is None or run.loss.grad_fn is None


# --- events in order -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('epochs, valid, expected', [
    (1, True,  PLAIN),
    (1, False, 'F E bplgsn bplgsn e f'),
    (2, True,  'F E bplgsn bplgsn V bpln e E bplgsn bplgsn V bpln e f'),
    (2, False, 'F E bplgsn bplgsn e E bplgsn bplgsn e f'),
    (0, True,  'F f')])
def test_events_of_a_fit(epochs, valid, expected):
    log, learn = Log(), bundle(valid=valid)
    run = Runner(cbs=log)
    run.fit(epochs, learn)
    assert log.log == packed(expected)
    check_clean(learn, run)

def test_fit_twice_gives_the_events_twice_and_counts_anew():
    log, learn = Log(), bundle()
    run = Runner(cbs=log)
    for _ in range(2):
        run.fit(1, learn)
        assert (run.n_iter, run.n_epochs) == (2, 1.)
    assert log.log == packed(PLAIN*2)

def test_an_empty_validation_set_is_validated_without_batches():
    log = Log()
    Runner(cbs=log).fit(1, bundle(n_valid=0))
    assert log.log == packed('F E bplgsn bplgsn V e f')

def test_gradients_are_kept_in_training_alone():
    seen = []
    class Look(Callback):
        def after_loss(self): seen.append((self.in_train, torch.is_grad_enabled(), self.loss.requires_grad))
    Runner(cbs=Look()).fit(2, bundle())
    assert seen == [(True, True, True), (True, True, True), (False, False, False)]*2
    assert torch.is_grad_enabled()

def test_every_event_is_in_the_table(): assert list(LETTER) == events

def test_what_callbacks_return_is_ignored():
    class Yes(Callback): pass
    for e in events: setattr(Yes, e, lambda self: True)
    log = Log()
    Runner(cbs=[Yes(), log]).fit(1, bundle())
    assert log.log == packed(PLAIN)

def test_callbacks_are_called_in_order_of_order_then_of_giving():
    seen = []
    class Note(Callback):
        def __init__(self, n, order): self.n, self._order = n, order
        def begin_batch(self): seen.append(self.n)
    Runner(cbs=[Note('c', 5), Note('a', -1), Note('d', 5), Note('b', 0)]).fit(1, bundle(n_train=1, valid=False))
    assert seen == ['a', 'b', 'c', 'd']

def test_events_are_resolved_once_per_fit():
    class Late(Callback):
        asked = 0
        def answers(self, event): self.asked += event == 'begin_batch'; return super().answers(event)
    late = Late()
    Runner(cbs=late).fit(3, bundle())
    assert late.asked == 1


# --- cancelling ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('event, expected', [('g', 'F E bplg n bplgsn V bpln e f'), ('l', 'F E bpl n bplgsn V bpln e f'), ('b', 'F E b n bplgsn V bpln e f'),
                                             ('s', 'F E bplgs n bplgsn V bpln e f')])
def test_a_step_that_is_cancelled_ends_its_batch(event, expected):
    log, learn = Log(), bundle()
    run = Runner(cbs=[log, Raiser({v: k for k, v in LETTER.items()}[event], CancelStepException())])
    run.fit(1, learn)
    assert log.log == packed(expected)
    check_clean(learn, run)

def test_a_cancelled_step_keeps_its_gradients_for_the_next_batch():
    def linear():
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        return TrainBundle(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, SimpleNamespace(train_dl=batches(2), valid_dl=None))
    learn, ref = linear(), linear()
    Runner(cbs=Raiser('after_backward', CancelStepException())).fit(1, learn)
    for x, y in ref.data.train_dl: F.cross_entropy(ref.model(x), y).backward()
    ref.opt.step()
    torch.testing.assert_close(learn.model.weight, ref.model.weight)

def test_loss_weight_multiplies_the_gradients_of_one_batch():
    grads = []
    class Heavy(Callback):
        def after_loss(self):
            if self.in_train and self.iter == 0: self.run.loss_weight = torch.tensor(3.)
        def after_backward(self): grads.append((self.loss_weight, self.model.a.weight.grad.clone()))
    for cbs in [], [Heavy()]:
        learn = bundle(valid=False)
        learn.opt = torch.optim.SGD(learn.model.parameters(), lr=0.)
        class Keep(Callback):
            def after_backward(self): grads.append((None, self.model.a.weight.grad.clone()))
        torch.manual_seed(5)
        Runner(cbs=cbs or [Keep()]).fit(1, learn)
    (_, a0), (_, a1), (w0, b0), (w1, b1) = grads
    assert w0 == 3 and w1 is None
    torch.testing.assert_close(b0, 3*a0); torch.testing.assert_close(b1, a1)

def test_another_step_may_stand_in_the_optimizers_place():
    steps = []
    class Other(Callback):
        def begin_fit(self): self.run.opt_step = lambda: steps.append(self.iter)
        def after_fit(self): del self.run.opt_step
    learn = bundle(n_train=3)
    before = learn.model.a.weight.detach().clone()
    run = Runner(cbs=Other())
    run.fit(1, learn)
    assert steps == [0, 1, 2] and torch.equal(learn.model.a.weight, before)
    Runner().fit(1, learn)
    assert not torch.equal(learn.model.a.weight, before)


BATCH = dict( # CancelBatchException raised in training at ...; a trailing ! says that it comes out of the fit
    F='F f !', E='F E f !',
    b='F E b xn bplgsn V bpln e f', p='F E bp xn bplgsn V bpln e f', l='F E bpl xn bplgsn V bpln e f',
    g='F E bplg xn bplgsn V bpln e f', s='F E bplgs xn bplgsn V bpln e f', n='F E bplgsn f !',
    V='F E bplgsn bplgsn V f !', e='F E bplgsn bplgsn V bpln e f !', f='F E bplgsn bplgsn V bpln e f !',
    x='F E b x f !', y='F E b n y f !', z='F E b n z f !')
EPOCH = dict(
    F='F f !', E='F E y V bpln e f',
    b='F E b n y V bpln e f', p='F E bp n y V bpln e f', l='F E bpl n y V bpln e f',
    g='F E bplg n y V bpln e f', s='F E bplgs n y V bpln e f', n='F E bplgsn y V bpln e f',
    V='F E bplgsn bplgsn V y e f', e='F E bplgsn bplgsn V bpln e f !', f='F E bplgsn bplgsn V bpln e f !',
    x='F E b x n y V bpln e f', y='F E b n y f !', z='F E b n z f !')
TRAIN = dict(
    F='F z f', E='F E z f',
    b='F E b n z f', p='F E bp n z f', l='F E bpl n z f', g='F E bplg n z f', s='F E bplgs n z f', n='F E bplgsn z f',
    V='F E bplgsn bplgsn V z f', e='F E bplgsn bplgsn V bpln e z f', f='F E bplgsn bplgsn V bpln e f !',
    x='F E b x n z f', y='F E b n y z f', z='F E b n z f !')
IN_VALID = {
    CancelBatchException: dict(b='V b xn e f', p='V bp xn e f', l='V bpl xn e f', n='V bpln f !'),
    CancelEpochException: dict(b='V b n y e f', p='V bp n y e f', l='V bpl n y e f', n='V bpln y e f'),
    CancelTrainException: dict(b='V b n z f', p='V bp n z f', l='V bpl n z f', n='V bpln z f')}
EVENT = {l: e for e, l in LETTER.items()}
FIRST = dict(x=CancelBatchException, y=CancelEpochException, z=CancelTrainException) # what leads to these events

def run_with(letter, exc, in_train=None):
    "A fit in which `exc` is raised at an event; returns the events before and behind the raiser, the exception, and all else."
    lead = [Raiser('begin_batch', FIRST[letter]())] if letter in FIRST else []
    log, behind, learn = Log(), Log(order=5), bundle()
    run = Runner(cbs=[log, behind, *lead, Raiser(EVENT[letter], exc, in_train)])
    try: run.fit(1, learn)
    except BaseException as e: return log.log, behind.log, e, learn, run
    return log.log, behind.log, None, learn, run

def check_cancel(letter, exc, expected, in_train=None):
    log, _, error, learn, run = run_with(letter, exc(), in_train)
    assert log == packed(expected.rstrip(' !'))
    if expected.endswith('!'):
        assert type(error) is exc
        assert any(f'raised by Raiser in {EVENT[letter]}' in n for n in error.__notes__)
        assert 'nothing left for it to cancel' in ' '.join(error.__notes__)
    else: assert error is None
    check_clean(learn, run)

@pytest.mark.parametrize('letter', LETTER.values())
@pytest.mark.parametrize('exc, table', [(CancelBatchException, BATCH), (CancelEpochException, EPOCH), (CancelTrainException, TRAIN)])
def test_cancelling_from_each_event(exc, table, letter): check_cancel(letter, exc, table[letter])

@pytest.mark.parametrize('exc, letter', [(e, l) for e, t in IN_VALID.items() for l in t])
def test_cancelling_in_validation(exc, letter):
    check_cancel(letter, exc, 'F E bplgsn bplgsn ' + IN_VALID[exc][letter], in_train=False)

def test_the_model_and_the_loss_may_cancel_too():
    learn, log = bundle(), Log()
    calls = []
    def loss(pred, yb):
        calls.append(1)
        if len(calls) == 1: raise CancelBatchException
        return F.cross_entropy(pred, yb)
    learn.loss_func = loss
    Runner(cbs=log).fit(1, learn)
    assert log.log == packed('F E bp xn bplgsn V bpln e f')

def test_a_cancelled_batch_takes_no_step_and_leaves_no_gradient_to_the_next():
    learn, other = bundle(), bundle()
    for o in (learn, other): o.model.b[1].p = 0. # no draws
    Runner(cbs=Raiser('after_backward', CancelBatchException())).fit(1, learn)
    other.data.train_dl = other.data.train_dl[1:] # as if the cancelled batch had not been there
    Runner().fit(1, other)
    for p, q in zip(learn.model.parameters(), other.model.parameters()): assert torch.equal(p, q)

def test_cancelling_in_begin_fit_tells_those_alone_whose_turn_had_come():
    log, _, _, learn, run = run_with('F', CancelTrainException())
    behind = run.log_2
    assert log == 'Fzf' and behind._order == 5 and behind.log == ''


# --- failing ---------------------------------------------------------------------------------------------------------------------

UNTIL = dict(F='F', E='F E', b='F E b', p='F E bp', l='F E bpl', g='F E bplg', s='F E bplgs', n='F E bplgsn', V='F E bplgsn bplgsn V',
             e='F E bplgsn bplgsn V bpln e', f='F E bplgsn bplgsn V bpln e', x='F E b x', y='F E b n y', z='F E b n z')

@pytest.mark.parametrize('letter', LETTER.values())
@pytest.mark.parametrize('exc', [ValueError('spilt coffee'), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__)
def test_an_exception_in_each_event(exc, letter):
    exc = type(exc)(*exc.args) # notes stay on an exception: a fresh one each time
    log, behind, error, learn, run = run_with(letter, exc)
    assert error is exc and any(f'raised by Raiser in {EVENT[letter]}' in n for n in error.__notes__)
    assert log == packed(UNTIL[letter]) + 'f' # before the raiser: its event, then after_fit and nothing else
    seen = packed(UNTIL[letter]) if letter == 'f' else packed(UNTIL[letter])[:-1] # behind it: not the event itself, but after_fit
    if letter in FIRST: seen = seen.replace('b', '') # cancelled there by another, before it
    assert behind == ('' if letter == 'F' else seen + 'f')
    check_clean(learn, run)
    run.log.log = ''
    run.fit(1, learn) # and it can go on
    assert run.log.log == packed(PLAIN)

@pytest.mark.parametrize('event', events)
def test_the_note_names_callback_and_event(event):
    class Clumsy(Callback): pass
    def fall(self): raise ZeroDivisionError('fell')
    setattr(Clumsy, event, fall)
    lead = {l: e for l, e in FIRST.items() if EVENT[l] == event}
    cbs = [Clumsy(), *(Raiser('begin_batch', e()) for e in lead.values())]
    with pytest.raises(ZeroDivisionError, match='fell') as e: Runner(cbs=cbs).fit(1, bundle())
    assert e.value.__notes__ == [f'raised by Clumsy in {event}']

@pytest.mark.parametrize('where', ['model', 'loss', 'loader', 'opt'])
def test_a_failure_outside_of_callbacks_ends_the_fit_cleanly(where):
    learn, log = bundle(), Log()
    def fail(*args, **kwargs): raise OSError('gone')
    if where == 'model': learn.model.a.forward = fail
    if where == 'loss': learn.loss_func = fail
    if where == 'opt': learn.opt.step = fail
    if where == 'loader':
        class Torn(list):
            def __iter__(self): yield self[0]; fail()
        learn.data.train_dl = Torn(learn.data.train_dl)
    run = Runner(cbs=log)
    with pytest.raises(OSError, match='gone'): run.fit(1, learn)
    assert log.log == packed(dict(model='F E b', loss='F E bp', opt='F E bplg', loader='F E bplgsn')[where]) + 'f'
    check_clean(learn, run)

def test_after_fit_reaches_all_though_others_raise_in_it_and_the_first_error_tells_of_the_rest():
    class One(Callback):
        def after_fit(self): raise ValueError('first')
    class Two(Callback):
        _order = 1
        def after_fit(self): raise TypeError('second')
    log, learn = Log(order=9), bundle()
    run = Runner(cbs=[One(), Two(), log])
    with pytest.raises(ValueError, match='first') as e: run.fit(1, learn)
    assert log.log == packed(PLAIN)
    notes = '\n'.join(e.value.__notes__)
    assert 'raised by One in after_fit' in notes and "TypeError('second')" in notes and 'raised by Two in after_fit' in notes
    check_clean(learn, run)

def test_the_first_exception_comes_out_with_a_note_of_what_after_fit_raised():
    class Both(Callback):
        def after_loss(self): raise KeyboardInterrupt
        def after_fit(self): raise ValueError('cannot close')
    log = Log(order=9)
    with pytest.raises(KeyboardInterrupt) as e: Runner(cbs=[Both(), log]).fit(1, bundle())
    assert log.log == packed('F E bp f')
    assert e.value.__notes__ == ['raised by Both in after_loss', "then ValueError('cannot close'), raised by Both in after_fit"]

def press(): signal.raise_signal(signal.SIGINT)

def test_an_interrupt_on_the_way_into_validation_leaves_gradients_on(monkeypatch, interruptible):
    "It comes when `no_grad` has switched them off, and its block has not begun: nobody would switch them on again."
    class Interrupted(torch.no_grad):
        def __enter__(self): super().__enter__(); press()
    learn, run = bundle(), Runner()
    monkeypatch.setattr(torch, 'no_grad', Interrupted)
    with pytest.raises(KeyboardInterrupt): run.fit(1, learn)
    monkeypatch.undo()
    assert torch.is_grad_enabled()
    run.fit(1, learn)

def test_a_second_interrupt_does_not_break_off_the_end_of_a_fit(interruptible):
    class Impatient(Callback):
        def after_loss(self): press()
        def after_fit(self): press(); self.first = True; press(); self.second = True
    cb, log, learn = Impatient(), Log(order=9), bundle()
    run = Runner(cbs=[cb, log])
    with pytest.raises(KeyboardInterrupt) as e: run.fit(1, learn)
    assert log.log == packed('F E bp f') and cb.first and cb.second
    assert e.value.__notes__ == ['raised by Impatient in after_loss', 'then KeyboardInterrupt(), raised while the fit was cleaned up']
    check_clean(learn, run)

def test_an_interrupt_at_the_end_of_a_fit_comes_out_when_all_is_done(interruptible):
    class Late(Callback):
        def after_fit(self): press()
    log, learn = Log(order=9), bundle()
    run = Runner(cbs=[Late(), log])
    with pytest.raises(KeyboardInterrupt): run.fit(1, learn)
    assert log.log == packed(PLAIN)
    check_clean(learn, run)

def test_a_fit_within_a_fit_is_refused():
    learn = bundle()
    class Nested(Callback):
        def after_batch(self): self.run.fit(1, learn)
    with pytest.raises(RuntimeError, match='middle of a fit'): Runner(cbs=Nested()).fit(1, learn)


# --- workers ---------------------------------------------------------------------------------------------------------------------

class Samples(Dataset):
    "Sixty-four samples; at index `at`, in the worker, something happens."
    def __init__(self, at=None, what=None): self.at, self.what = at, what
    def __len__(self): return 64
    def __getitem__(self, i):
        if i == self.at: self.what()
        return torch.full((3,), float(i)), i % 2

def fail_in_worker(): raise OSError('sample 17 is torn')
def interrupt_parent(): os.kill(os.getppid(), signal.SIGINT); time.sleep(0.2)

@pytest.mark.parametrize('how, exc', [('callback', ValueError), ('worker', OSError), ('interrupt', KeyboardInterrupt)])
def test_no_worker_outlives_a_fit_that_is_broken_off(how, exc, interruptible):
    ds = dict(callback=Samples(), worker=Samples(17, fail_in_worker), interrupt=Samples(17, interrupt_parent))[how]
    learn = bundle(valid=False)
    learn.data.train_dl = DataLoader(ds, batch_size=4, num_workers=2)
    before = set(multiprocessing.active_children())
    with pytest.raises(exc) as kept: # holds the traceback, as a notebook does
        Runner(cbs=Raiser('after_step', ValueError()) if how == 'callback' else None).fit(1, learn)
    end = time.time()+5
    while (left := set(multiprocessing.active_children())-before) and time.time() < end: time.sleep(0.05)
    assert not left and kept.value is not None

def test_a_second_interrupt_leaves_no_worker_of_a_foreign_loader_behind(interruptible, monkeypatch):
    "It comes while torch ends the workers."
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    mark, learn = iterator._mark_worker_as_unavailable, bundle(valid=False)
    monkeypatch.setattr(iterator, '_mark_worker_as_unavailable', lambda *args, **kwargs: (press(), mark(*args, **kwargs)))
    monkeypatch.setattr(multiprocessing.process.BaseProcess, 'terminate', lambda p: press()) # torch's last means
    learn.data.train_dl = DataLoader(Samples(), batch_size=4, num_workers=2)
    with pytest.raises(KeyboardInterrupt): Runner(cbs=Raiser('after_step', KeyboardInterrupt())).fit(1, learn)
    assert not multiprocessing.active_children()

def test_persistent_workers_survive_a_cancelled_epoch():
    learn = bundle(valid=False)
    learn.data.train_dl = DataLoader(Samples(), batch_size=8, num_workers=1, persistent_workers=True)
    log = Log()
    run = Runner(cbs=[log, Raiser('after_step', CancelEpochException())])
    run.fit(2, learn)
    assert log.log == packed('F E bplgs n y e E' + ' bplgsn'*8 + ' e f')
    learn.data.train_dl._iterator._shutdown_workers() # now, not when Python tidies up


# --- bad input -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, says', [('nonsense', 'they are begin_fit begin_epoch'), ('before_batch', "do you mean 'begin_batch'"),
                                        ('after_bacth', "do you mean 'after_batch'"), ('on_epoch', "do you mean 'after_epoch'"), (7, 'not an event')])
def test_an_unknown_event_is_refused(name, says):
    with pytest.raises(ValueError, match=f'{name!r} is not an event.*{says}|{name!r} is {says}'): Runner()(name)

@pytest.mark.parametrize('name, nearest', [('after_bacth', 'after_batch'), ('before_batch', 'begin_batch'), ('on_fit', 'after_fit')])
def test_a_method_misspelt_as_no_event_is_refused(name, nearest):
    cb = type('Slip', (Callback,), {name: lambda self: None})()
    with pytest.raises(ValueError, match=f'Slip.{name} would never be called.*{nearest}'): Runner(cbs=cb)

@pytest.mark.parametrize('epochs', [-1, 1.5, 2.0, '3', None, True])
def test_epochs_must_be_a_whole_number(epochs):
    log = Log()
    with pytest.raises(ValueError, match=f'epochs={epochs!r}'): Runner(cbs=log).fit(epochs, bundle())
    assert log.log == ''

def test_a_numpy_integer_is_a_whole_number():
    np = pytest.importorskip('numpy')
    run = Runner()
    run.fit(np.int64(1), bundle())
    assert run.n_iter == 2

def test_an_empty_training_set_is_refused():
    with pytest.raises(ValueError, match='train_dl has no batch'): Runner().fit(1, bundle(n_train=0))

def test_an_empty_loader_gives_get_batch_nothing():
    with pytest.raises(ValueError, match='no batch'): get_batch([], Runner())

def test_a_class_for_an_instance_and_an_instance_for_a_class():
    with pytest.raises(TypeError, match='Recorder.*is no callback instance.*cb_funcs'): Runner(cbs=[Recorder])
    with pytest.raises(TypeError, match='instance of Recorder.*give the class'): Runner(cb_funcs=[Recorder()])
    with pytest.raises(TypeError, match='instance of Recorder'): get_runner(nn.Linear(3, 2), None, cbs=Recorder())
    with pytest.raises(TypeError, match="'recorder' is no callback"): Runner(cbs=['recorder'])

def test_the_same_instance_twice():
    cb = Recorder()
    with pytest.raises(ValueError, match='same Recorder is given twice'): Runner(cbs=[cb, cb])
    with pytest.raises(ValueError, match='same Recorder is given twice'): Runner(cbs=cb).add_cbs(cb)

@pytest.mark.parametrize('name', ['Model', 'Fit', 'Loss', 'InTrain', 'Logger', 'Cbs', 'NIter', 'OneBatchCallback', 'Learn'])
def test_a_callback_named_as_an_attribute_of_the_loop(name):
    with pytest.raises(ValueError, match=f'{name} cannot be called .* an attribute of Runner'): Runner(cbs=type(name, (Callback,), {})())

def test_two_callbacks_of_one_name_are_both_kept():
    run = Runner(cbs=[Recorder(), Recorder()], cb_funcs=Recorder)
    run.fit(1, bundle())
    for rec in (run.recorder, run.recorder_2, run.recorder_3): assert len(rec.losses) == 2
    assert len({id(o) for o in (run.recorder, run.recorder_2, run.recorder_3)}) == 3

def test_train_eval_is_there_once_also_where_it_is_given():
    for run in (Runner(), Runner(cbs=TrainEvalCallback()), Runner(cb_funcs=TrainEvalCallback)):
        run.fit(2, bundle())
        assert run.n_iter == 4 and sum(isinstance(cb, TrainEvalCallback) for cb in run.cbs) == 1

def test_a_runner_without_a_bundle_says_so():
    with pytest.raises(AttributeError, match='no model before its first fit'): Runner().model
    with pytest.raises(AttributeError, match='no opt before its first fit'): Runner(cbs=Recorder()).recorder.opt
    with pytest.raises(TypeError, match='Linear has no model, opt, loss_func, data.*get_runner'): Runner().fit(1, nn.Linear(3, 2))

def test_a_callback_in_two_loops_answers_to_the_one_that_fits():
    rec = Recorder()
    one, two = Runner(cbs=rec), Runner(cbs=rec)
    one.fit(1, bundle(n_train=3))
    assert rec.run is one and len(rec.losses) == 3
    two.fit(1, bundle(n_train=2))
    assert rec.run is two and len(rec.losses) == 2


# --- what it trains --------------------------------------------------------------------------------------------------------------

def conv_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3),
                         nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

def image_data():
    g = torch.Generator().manual_seed(3)
    xs, ys = torch.randint(0, 256, (90, 3, 12, 12), generator=g, dtype=torch.uint8), torch.randint(0, 4, (90,), generator=g)
    train, valid = TensorDataset(xs[:78], ys[:78]), TensorDataset(xs[78:], ys[78:])
    return SimpleNamespace(train_dl=DataLoader(train, batch_size=8, shuffle=True), valid_dl=DataLoader(valid, batch_size=8))

def to_float(x): return x.float().div(255)

def test_weights_after_50_batches_equal_a_hand_written_loop_to_the_bit():
    sched = combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.02, 0.1, 0.01))
    torch.manual_seed(7)
    model, data = conv_net(), image_data()
    learn, run = get_runner(model, data, lr=0.02, opt_func=partial(torch.optim.SGD, momentum=0.9),
                            cbs=[partial(AvgStatsCallback, accuracy), Recorder, partial(ParamScheduler, 'lr', sched),
                                 partial(CudaCallback, 'cpu'), partial(BatchTransformXCallback, to_float)])
    run.logger = lambda row: None
    run.fit(5, learn)

    torch.manual_seed(7)
    hand, data = conv_net(), image_data()
    opt = torch.optim.SGD(hand.parameters(), lr=0.02, momentum=0.9)
    losses, n = [], 0
    for epoch in range(5):
        hand.train()
        for i, (xb, yb) in enumerate(data.train_dl):
            opt.param_groups[0]['lr'] = sched((epoch + i/len(data.train_dl))/5)
            loss = F.cross_entropy(hand(xb.float().div(255)), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
            n += 1
        hand.eval()
        with torch.no_grad():
            for xb, yb in data.valid_dl: hand(xb.float().div(255))

    assert n == 50 == run.n_iter
    assert run.recorder.losses == losses
    for (name, a), b in zip(model.state_dict().items(), hand.state_dict().values()): assert torch.equal(a, b), name
    for a, b in zip(learn.opt.state.values(), opt.state.values()): assert torch.equal(a['momentum_buffer'], b['momentum_buffer'])
    assert losses[-1] < losses[0]

def test_get_runner_defaults_to_plain_sgd_and_cross_entropy():
    model = Net()
    learn, run = get_runner(model, bundle().data, cbs=Recorder)
    assert type(learn.opt) is torch.optim.SGD and learn.opt.param_groups[0]['lr'] == 0.6 and learn.opt.param_groups[0]['momentum'] == 0
    assert learn.loss_func is F.cross_entropy and learn.model is model and isinstance(run.recorder, Recorder)

def test_get_batch_gives_the_batch_as_the_model_gets_it_and_keeps_nothing():
    data = bundle().data
    run = Runner(cbs=[BatchTransformXCallback([to_float, lambda x: x+1]), CudaCallback('cpu')])
    xb, yb = get_batch(data.train_dl, run)
    assert torch.equal(xb, data.train_dl[0][0]/255+1) and torch.equal(yb, data.train_dl[0][1])
    assert run.xb is None and run.yb is None

def test_a_loop_of_ones_own_is_a_subclass_with_four_attributes():
    class Mine(TrainLoop):
        def __init__(self, learn, cbs=None):
            self.model, self.opt, self.loss_func, self.data = learn.model, learn.opt, learn.loss_func, learn.data
            super().__init__(cbs)
    learn, other, log = bundle(), bundle(), Log()
    torch.manual_seed(0); Mine(learn, log).run_epochs(1)
    torch.manual_seed(0); Runner().fit(1, other)
    assert log.log == packed(PLAIN)
    for p, q in zip(learn.model.parameters(), other.model.parameters()): assert torch.equal(p, q)


# --- CUDA ------------------------------------------------------------------------------------------------------------------------

class NoWaiting(Callback):
    "Between the beginning of an epoch and the end of its training batches, to wait for the device is an error."
    _order = 100
    def begin_epoch(self): torch.cuda.set_sync_debug_mode('error')
    def after_batch(self):
        if self.run.in_train and self.run.iter == self.run.iters-1: torch.cuda.set_sync_debug_mode('default')
    def after_fit(self): torch.cuda.set_sync_debug_mode('default')

def cuda_fit(extra=None, epochs=2):
    torch.manual_seed(7)
    model, data = conv_net(), image_data()
    data.train_dl = [(xb.pin_memory(), yb.pin_memory()) for xb, yb in data.train_dl]
    cbs = [partial(AvgStatsCallback, accuracy), Recorder, partial(ParamScheduler, 'lr', sched_lin(0.1, 0.01)),
           CudaCallback, partial(BatchTransformXCallback, to_float)]
    learn, run = get_runner(model, data, lr=0.1, opt_func=partial(torch.optim.SGD, momentum=0.9), cbs=cbs)
    run.logger = lambda row: None
    run.fit(1, learn) # the first fit sets up what CUDA sets up once
    run.add_cbs([NoWaiting(), *([extra()] if extra else [])])
    run.fit(epochs, learn)
    return learn, run

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_a_fit_on_cuda_waits_for_nothing_in_a_training_batch():
    learn, run = cuda_fit()
    assert {t.device.type for t in learn.model.state_dict().values()} == {'cuda'}
    assert {s['momentum_buffer'].device.type for s in learn.opt.state.values()} == {'cuda'}
    assert len(run.recorder.losses) == 20 and all(0 < l < 10 for l in run.recorder.losses)
    assert learn.model[0].weight.isfinite().all()

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_that_check_does_find_a_callback_that_waits():
    class Waits(Callback):
        def after_loss(self): self.loss.item()
    with pytest.raises(RuntimeError, match='synchroniz') as e: cuda_fit(Waits)
    assert 'raised by Waits in after_loss' in e.value.__notes__
