"What each callback does: attributes through the loop, statistics, recording, schedules, LR_Find, devices, and nothing that waits."
import copy, math, pickle, random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from dl2lib.callbacks import (AvgStats, AvgStatsCallback, BatchTransformXCallback, Callback, CancelBatchException, CancelEpochException,
                              CancelTrainException, ChannelsLastCallback, CudaCallback, LR_Find, ParamScheduler, Recorder,
                              TrainEvalCallback, accuracy, check_event, events, format_time, print_row)
from dl2lib.runner import Runner, TrainBundle
from dl2lib.schedules import combine_scheds, cos_1cycle_anneal, sched_cos, sched_exp, sched_lin

np = pytest.importorskip('numpy')


def batches(n, bs=4, c=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(bs, c, generator=g), torch.randint(0, 2, (bs,), generator=g)) for _ in range(n)]

def bundle(n_train=3, n_valid=1, model=None, lr=0.1, opt_func=partial(torch.optim.SGD, momentum=0.9), **data):
    torch.manual_seed(1)
    model = model() if isinstance(model, type) else model or nn.Linear(3, 2)
    data = dict(train_dl=batches(n_train), valid_dl=batches(n_valid, seed=9) if n_valid else None) | data
    return TrainBundle(model, opt_func(model.parameters(), lr=lr), F.cross_entropy, SimpleNamespace(**data))

def fit(cbs=None, epochs=1, learn=None, **kw):
    learn = learn or bundle(**kw)
    run = Runner(cbs=cbs)
    run.rows = []
    run.logger = run.rows.append
    run.fit(epochs, learn)
    return run

class Raises(Callback):
    "Raises `exc` in batch `at`, at `event`."
    def __init__(self, exc, at=0, event='begin_batch'): self.exc, self.at = exc, at; setattr(self, event, self.strike)
    def strike(self):
        if self.run.in_train and self.run.n_iter == self.at: raise self.exc


# --- events and attributes -------------------------------------------------------------------------------------------------------

def test_check_event():
    for e in events: assert check_event(e) == e
    with pytest.raises(ValueError, match="'after_bacth' is not an event: do you mean 'after_batch'"): check_event('after_bacth')
    with pytest.raises(ValueError, match="'before_fit' is not an event: do you mean 'begin_fit'"): check_event('before_fit')
    with pytest.raises(ValueError, match="'nonsense' is not an event: they are begin_fit"): check_event('nonsense')

def test_an_unbound_callback_names_what_it_lacks_and_does_not_recurse():
    for cb in (Callback(), Recorder(), ParamScheduler('lr', sched_lin(1, 0))):
        with pytest.raises(AttributeError, match=f"{type(cb).__name__} has no 'xb' of its own, and no loop yet"): cb.xb
        assert not hasattr(cb, 'model') and getattr(cb, 'epoch', 7) == 7

def test_a_callback_that_never_called_init_does_not_recurse_either():
    with pytest.raises(AttributeError, match="'nothing'"): Recorder.__new__(Recorder).nothing

def test_an_attribute_that_neither_has_is_named():
    run = fit(Recorder())
    with pytest.raises(AttributeError, match="neither Recorder nor its Runner has 'lossses'"): run.recorder.lossses
    class Slip(Callback):
        def after_loss(self): self.lss
    with pytest.raises(AttributeError, match="neither Slip nor its Runner has 'lss'") as e: fit(Slip())
    assert e.value.__notes__ == ['raised by Slip in after_loss']

def test_attributes_come_from_the_loop_and_an_own_one_goes_first():
    run = fit(Recorder())
    assert run.recorder.model is run.model and run.recorder.n_iter == 3
    run.recorder.n_iter = 'mine'
    assert run.recorder.n_iter == 'mine' and run.n_iter == 3

def test_a_property_that_fails_tells_its_own_error():
    class Has(Callback):
        @property
        def broken(self): return self.xb.no_such_thing
    run = fit(Has())
    run.xb = torch.zeros(1)
    with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'no_such_thing'"): run.has.broken

@pytest.mark.parametrize('cls, name', [(Recorder, 'recorder'), (TrainEvalCallback, 'train_eval'), (LR_Find, 'lr_finder'), (Callback, 'callback'),
                                       (BatchTransformXCallback, 'batch_transform_x'), (AvgStatsCallback, 'avg_stats')])
def test_names(cls, name): assert cls.__new__(cls).name == name

CALLBACKS = [Callback, TrainEvalCallback, partial(AvgStatsCallback, [accuracy]), Recorder, partial(ParamScheduler, 'lr', sched_lin(0.1, 0.01)),
             partial(LR_Find, max_iter=2), partial(CudaCallback, 'cpu'), partial(BatchTransformXCallback, torch.neg), ChannelsLastCallback]

@pytest.mark.parametrize('make', CALLBACKS, ids=lambda f: getattr(f, 'func', f).__name__)
@pytest.mark.parametrize('duplicate', [lambda cb: pickle.loads(pickle.dumps(cb)), copy.deepcopy, copy.copy], ids=['pickle', 'deepcopy', 'copy'])
def test_callbacks_pickle_and_copy_without_their_loop(make, duplicate):
    fresh = duplicate(make())
    cb = make()
    first = fit([cb, fresh] if make is not TrainEvalCallback else cb, n_valid=0)
    used = duplicate(cb)
    assert 'run' not in used.__dict__ and used.run is None and cb.run is first and type(used) is type(cb)
    again = fit([used], n_valid=0)
    assert used.run is again and again.n_iter == first.n_iter
    for p, q in zip(again.model.parameters(), fit(make(), n_valid=0).model.parameters()): assert torch.equal(p, q)

def test_cancel_exceptions_pickle():
    for e in (CancelBatchException('why'), CancelEpochException(), CancelTrainException()):
        back = pickle.loads(pickle.dumps(e))
        assert type(back) is type(e) and back.args == e.args


# --- mode and counting -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('exc', [None, CancelTrainException(), ValueError('x'), KeyboardInterrupt()], ids=repr)
def test_train_eval_restores_mixed_modes(exc):
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()), nn.Linear(4, 2))
    model[1].eval(); model[1][1].train()
    before, seen = [m.training for m in model.modules()], []
    class Look(Callback):
        def after_pred(self): seen.append((self.in_train, {m.training for m in self.model.modules()}))
    cbs = [Look(), *([Raises(exc, at=1)] if exc else [])]
    try: fit(cbs, model=model, epochs=2)
    except BaseException as e: assert e is exc
    assert [m.training for m in model.modules()] == before and len(set(before)) == 2
    assert seen and all(modes == {in_train} for in_train, modes in seen)
    assert {t for t, _ in seen} == ({True, False} if exc is None else {True})

def test_counting():
    seen = []
    class Look(Callback):
        def begin_batch(self): seen.append((self.in_train, self.n_iter, self.n_epochs, self.epoch, self.epochs, self.iter, self.iters))
    run = fit(Look(), epochs=2, n_train=4, n_valid=2)
    train = [(True, 4*e+i, e+i/4, e, 2, i, 4) for e in range(2) for i in range(4)]
    assert [s for s in seen if s[0]] == train and [s[4:] for s in seen if not s[0]] == [(2, 0, 2), (2, 1, 2)]*2
    assert (run.n_iter, run.n_epochs) == (8, 2.)


# --- statistics ------------------------------------------------------------------------------------------------------------------

def test_accuracy():
    out = torch.tensor([[2., 1.], [0., 3.], [1., 0.]])
    torch.testing.assert_close(accuracy(out, torch.tensor([0, 1, 1])), torch.tensor(2/3))
    with pytest.raises(ValueError, match=r'not \(3, 2\) and \(2,\)'): accuracy(out, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r'not \(3, 2\) and \(3, 1\)'): accuracy(out, torch.tensor([[0], [1], [1]]))
    with pytest.raises(ValueError, match=r'not \(3,\) and \(3,\)'): accuracy(out[:, 0], torch.tensor([0, 1, 1]))

SIZES = [7, 7, 7, 2, 1]

def uneven(seed=4):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, generator=g), torch.randint(0, 2, (n,), generator=g)) for n in SIZES]

def largest(pred, yb): return pred.max(dim=1).values.mean().item() # a metric that gives a Python number

def test_averages_over_uneven_batches_are_the_mean_over_all_items():
    model, cb = nn.Linear(3, 2), AvgStatsCallback([accuracy, largest])
    fit(cb, model=model, train_dl=uneven(), valid_dl=uneven(5), opt_func=partial(torch.optim.SGD), lr=0.)
    for stats, data in ((cb.train_stats, uneven()), (cb.valid_stats, uneven(5))):
        x, y = torch.cat([x for x, _ in data]).double(), torch.cat([y for _, y in data])
        pred = x @ model.weight.double().T + model.bias.double()
        oracle = [F.cross_entropy(pred, y), (pred.argmax(dim=1) == y).double().mean(), pred.max(dim=1).values.mean()]
        torch.testing.assert_close(torch.tensor(stats.avg_stats, dtype=torch.float64), torch.stack(oracle).detach(), rtol=1e-6, atol=1e-7)
        assert stats.count == sum(SIZES)
        per_batch = [F.cross_entropy(b @ model.weight.T + model.bias, t).item() for b, t in data]
        assert abs(sum(per_batch)/len(per_batch) - oracle[0].item()) > 1e-3 # an average of the averages would have been seen

def test_many_batches_lose_no_accuracy():
    stats, n = AvgStats(None), 20_000
    for i in range(n): stats.accumulate(SimpleNamespace(xb=torch.empty(64, 0), loss=torch.tensor(2+math.sin(i)), pred=None, yb=None))
    assert abs(stats.avg_stats[0] - sum(2+math.sin(i) for i in range(n))/n) < 2e-5

def test_statistics_of_nothing_are_nan_and_half_precision_is_summed_in_single():
    assert all(map(math.isnan, AvgStats(accuracy).avg_stats)) and AvgStats(accuracy).all_stats == [0., 0.]
    stats = AvgStats(None)
    for _ in range(400): stats.accumulate(SimpleNamespace(xb=torch.empty(64, 0), loss=torch.tensor(1.5, dtype=torch.bfloat16), pred=None, yb=None))
    assert stats.total.dtype == torch.float32 and stats.avg_stats == [1.5]

def test_a_metric_that_gives_no_number_is_named():
    def per_row(pred, yb): return (pred.argmax(dim=1) == yb).float()
    with pytest.raises(ValueError, match=r'per_row must be one number a batch, not of shape \(4,\)') as e: fit(AvgStatsCallback([accuracy, per_row]))
    assert 'raised by AvgStatsCallback in after_loss' in e.value.__notes__
    learn = bundle()
    learn.loss_func = partial(F.cross_entropy, reduction='none')
    with pytest.raises(ValueError, match=r'the loss must be one number a batch, not of shape \(4,\)'): fit(AvgStatsCallback(), learn=learn)

def test_a_row_an_epoch_with_named_columns():
    run = fit(AvgStatsCallback([accuracy, partial(largest)]), epochs=2)
    assert run.rows[0] == ['epoch', 'train_loss', 'train_accuracy', 'train_largest', 'valid_loss', 'valid_accuracy', 'valid_largest', 'time']
    assert len(run.rows) == 3 and [r[0] for r in run.rows[1:]] == ['0', '1'] and all(len(r) == 8 for r in run.rows)
    assert [float(v) for v in run.rows[2][1:-1]] == [round(v, 6) for s in (run.avg_stats.train_stats, run.avg_stats.valid_stats) for v in s.avg_stats]

def test_without_validation_the_columns_stay_and_say_nan():
    run = fit(AvgStatsCallback(accuracy), n_valid=0)
    assert run.rows[1][3:5] == ['nan', 'nan'] and float(run.rows[1][1]) > 0

def test_the_statistics_of_an_epoch_start_anew():
    cb = AvgStatsCallback()
    fit(cb, epochs=3)
    assert cb.train_stats.count == 12 and cb.valid_stats.count == 4

@pytest.mark.parametrize('t, shown', [(0, '0:00'), (0.4, '0:00'), (59.6, '1:00'), (61, '1:01'), (3599.4, '59:59'), (3600, '1:00:00'), (90061, '25:01:01')])
def test_format_time(t, shown): assert format_time(t) == shown

def test_print_row(capsys):
    print_row(['epoch', 'a_column_with_a_long_name', 3])
    assert capsys.readouterr().out == 'epoch           a_column_with_a_long_name  3\n'


# --- recording -------------------------------------------------------------------------------------------------------------------

def test_recorder_has_an_entry_a_training_batch():
    rec = Recorder()
    run = fit([rec, ParamScheduler('lr', sched_lin(1., 0.))], epochs=2)
    assert len(rec.losses) == len(rec.lrs) == 6 == run.n_iter
    torch.testing.assert_close(torch.tensor(rec.lrs), torch.tensor([1-i/6 for i in range(6)]))
    run.fit(1, bundle())
    assert len(rec.losses) == len(rec.lrs) == 3 # a fit starts new lists

@pytest.mark.parametrize('event, known', [('begin_batch', False), ('after_pred', False), ('after_loss', True), ('after_backward', True), ('after_step', True)])
@pytest.mark.parametrize('exc, n', [(CancelBatchException, 6), (CancelEpochException, 5), (CancelTrainException, 2)])
def test_recorder_has_an_entry_also_for_a_cancelled_batch(event, known, exc, n):
    rec, plain = Recorder(), Recorder()
    fit([rec, Raises(exc(), at=1, event=event)], epochs=2)
    fit(plain)
    assert len(rec.losses) == len(rec.lrs) == n
    assert rec.losses[0] == plain.losses[0]
    assert rec.losses[1] == plain.losses[1] if known else math.isnan(rec.losses[1])
    assert not any(map(math.isnan, rec.losses[2:]))

def test_recorder_keeps_the_rates_of_each_group():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    learn = bundle(model=model)
    learn.opt = torch.optim.SGD([dict(params=model[0].parameters(), lr=0.01), dict(params=model[1].parameters(), lr=0.1)])
    rec = Recorder()
    fit(rec, learn=learn)
    assert rec.group_lrs == [[0.01]*3, [0.1]*3] and rec.lrs == [0.1]*3

def test_recorder_before_a_fit_is_empty():
    assert Recorder().losses == [] and Recorder().lrs == []

def test_pictures():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    rec = Recorder()
    fit([rec, ParamScheduler('lr', sched_exp(1e-3, 1e-1))], epochs=2)
    for draw, x, y in ((rec.plot_loss, range(4), rec.losses[:4]), (rec.plot, rec.lrs[:4], rec.losses[:4])):
        plt.figure()
        ax = draw(skip_last=2)
        assert list(ax.lines[0].get_xdata()) == list(x) and list(ax.lines[0].get_ydata()) == y
        assert ax.get_xscale() == ('log' if draw == rec.plot else 'linear')
    plt.figure()
    assert list(rec.plot_lr().lines[0].get_ydata()) == rec.lrs
    plt.close('all')


# --- schedules -------------------------------------------------------------------------------------------------------------------

def test_a_schedule_is_followed_and_undone():
    seen, sched = [], combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.1, 0.3, 0.05))
    class Look(Callback):
        _order = 5
        def begin_batch(self): seen.append((self.in_train, self.opt.param_groups[0]['lr']))
    run = fit([Look(), ParamScheduler('lr', sched)], epochs=2, n_train=5)
    train = [lr for in_train, lr in seen if in_train]
    assert train == [sched((e + i/5)/2) for e in range(2) for i in range(5)]
    assert run.opt.param_groups[0]['lr'] == 0.1

def test_a_schedule_for_each_group_and_for_another_hyperparameter():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    learn, seen = bundle(model=model), []
    learn.opt = torch.optim.SGD([dict(params=m.parameters()) for m in model], lr=1., momentum=0.5)
    class Look(Callback):
        _order = 5
        def begin_batch(self): seen.append([(pg['lr'], pg['momentum']) for pg in self.opt.param_groups])
    fit([Look(), ParamScheduler('lr', [sched_lin(0., 1.), sched_lin(0., 2.)]), ParamScheduler('momentum', sched_lin(0.9, 0.6))], learn=learn)
    torch.testing.assert_close(torch.tensor(seen[1]), torch.tensor([[1/3, 0.8], [2/3, 0.8]]))
    assert [(pg['lr'], pg['momentum']) for pg in learn.opt.param_groups] == [(1., 0.5)]*2

class Thaws(Callback):
    "Adds a group of parameters in the third batch."
    _order = 5
    def begin_fit(self): self.extra = nn.Parameter(torch.zeros(2))
    def begin_batch(self):
        if self.run.in_train and self.run.n_iter == 2: self.opt.add_param_group(dict(params=[self.extra], lr=0.5))

def test_a_group_added_within_a_fit_is_scheduled_and_recorded():
    rec, learn = Recorder(), bundle(lr=0.7)
    fit([rec, Thaws(), ParamScheduler('lr', sched_lin(1., 0.))], epochs=2, learn=learn)
    want = [1 - i/6 for i in range(6)]
    torch.testing.assert_close(torch.tensor(rec.group_lrs[0]), torch.tensor(want))
    torch.testing.assert_close(torch.tensor(rec.group_lrs[1]), torch.tensor([math.nan, math.nan, 0.5, *want[3:]]), equal_nan=True) # scheduled from the next batch on
    assert [len(l) for l in rec.group_moms] == [6, 6] and rec.lrs is rec.group_lrs[1]
    assert rec.state_dict()['lrs'].shape == (2, 6)
    assert [pg['lr'] for pg in learn.opt.param_groups] == [0.7, 0.5] # all as they were

def test_a_group_without_a_schedule_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    learn = bundle(model=model)
    learn.opt = torch.optim.SGD([dict(params=m.parameters()) for m in model], lr=1.)
    with pytest.raises(ValueError, match=r"ParamScheduler\('lr'\): 2 parameter groups when the fit began, and now 3"):
        fit([Thaws(), ParamScheduler('lr', [sched_lin(0., 1.), sched_lin(0., 2.)])], epochs=2, learn=learn)
    assert [pg['lr'] for pg in learn.opt.param_groups] == [1., 1., .5]

def test_an_unknown_hyperparameter_is_named_with_those_there_are():
    for pname in ('mom', 'params'):
        with pytest.raises(ValueError, match=rf"ParamScheduler\('{pname}'\): .* it has lr, momentum") as e: fit(ParamScheduler(pname, sched_lin(1, 0)))
        assert 'raised by ParamScheduler in begin_fit' in e.value.__notes__

def test_a_wrong_number_of_schedules():
    with pytest.raises(ValueError, match=r"ParamScheduler\('lr'\): 3 schedules for 1 parameter groups"): fit(ParamScheduler('lr', [sched_lin(1, 0)]*3))

@pytest.mark.parametrize('exc', [ValueError('x'), KeyboardInterrupt(), CancelTrainException()], ids=repr)
def test_the_hyperparameter_is_restored_after_an_exception(exc):
    learn = bundle(lr=0.7)
    try: fit([ParamScheduler('lr', sched_lin(5., 1.)), Raises(exc, at=1)], learn=learn)
    except BaseException as e: assert e is exc
    assert learn.opt.param_groups[0]['lr'] == 0.7

def test_a_schedule_that_fails_is_named():
    def broken(pos): raise ZeroDivisionError('in the schedule')
    learn = bundle(lr=0.7)
    with pytest.raises(ZeroDivisionError, match='in the schedule') as e: fit(ParamScheduler('lr', broken), learn=learn)
    assert 'raised by ParamScheduler in begin_batch' in e.value.__notes__ and learn.opt.param_groups[0]['lr'] == 0.7


# --- LR_Find ---------------------------------------------------------------------------------------------------------------------

class Net(nn.Module):
    "BatchNorm, dropout, and two buffers: one that no state dict holds, one that is replaced rather than changed."
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 2))
        self.register_buffer('seen', torch.zeros(()), persistent=False)
        self.register_buffer('mean', torch.zeros(3))
    def forward(self, x):
        if self.training:
            self.seen += 1
            self.mean = self.mean*0.9 + 0.1*x.detach().mean(0)
        return self.layers(x)

def loader(own_generator=False, workers=0):
    g = torch.Generator().manual_seed(0)
    ds = TensorDataset(torch.randn(60, 3, generator=g), torch.randint(0, 2, (60,), generator=g))
    return DataLoader(ds, batch_size=8, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(5) if own_generator else None)

def everything(learn):
    model, opt = learn.model, learn.opt
    return [copy.deepcopy(o) for o in (dict(model.named_parameters()), dict(model.named_buffers()), opt.state_dict(), [m.training for m in model.modules()],
                                       torch.get_rng_state(), random.getstate(), str(np.random.get_state()))]

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

def draw(): random.random(); np.random.rand(); torch.rand(1)
class Draws(Callback):
    def begin_batch(self): draw()

@pytest.mark.parametrize('first', [0, 1], ids=['untrained', 'after a fit'])
@pytest.mark.parametrize('exc', [None, ValueError('x'), KeyboardInterrupt()], ids=repr)
def test_lr_find_leaves_all_as_it_was(first, exc):
    learn = bundle(model=Net, train_dl=loader())
    fit(epochs=first, learn=learn)
    learn.model.layers[3].eval()
    before, rec = everything(learn), Recorder()
    cbs = [LR_Find(max_iter=20, max_lr=1.), rec, Draws(), *([Raises(exc, at=5, event='after_backward')] if exc else [])]
    try: fit(cbs, epochs=10, learn=learn)
    except BaseException as e: assert e is exc
    assert len(rec.losses) >= 5 and len(set(rec.lrs)) == len(rec.lrs) # it did train
    for a, b in zip(before, everything(learn)): assert same(a, b)
    assert all(p.grad is None for p in learn.model.parameters())

@pytest.mark.parametrize('own_generator', [False, True])
@pytest.mark.parametrize('workers', [0, 2])
def test_lr_find_and_then_fit_equals_fit(own_generator, workers):
    res = []
    for find in (False, True):
        learn, rec = bundle(model=Net, train_dl=loader(own_generator, workers), n_valid=2), Recorder()
        if find: fit(LR_Find(max_iter=12, max_lr=1.), epochs=3, learn=learn)
        fit(rec, epochs=2, learn=learn)
        res.append((rec.losses, everything(learn)))
    assert same(*res)

def test_lr_find_puts_back_the_pass_of_a_loader_that_counts_them():
    class Counting(list):
        n_pass = 3
        def __iter__(self): self.n_pass += 1; return super().__iter__()
        def state_dict(self): return dict(n_pass=self.n_pass)
        def load_state_dict(self, state): self.n_pass = state['n_pass']
    dl = Counting(batches(4))
    fit(LR_Find(max_iter=10, max_lr=1e-3), epochs=3, train_dl=dl)
    assert dl.n_pass == 3

def test_lr_find_goes_through_its_rates_by_equal_factors_and_skips_validation():
    rec, seen = Recorder(), []
    class Look(Callback):
        def after_pred(self): seen.append(self.in_train)
    fit([LR_Find(max_iter=10, min_lr=1e-5, max_lr=1e-2), rec, Look()], epochs=20, n_train=4)
    assert seen == [True]*10 and len(rec.lrs) == 10
    torch.testing.assert_close(torch.tensor(rec.lrs, dtype=torch.float64), torch.logspace(-5, -2, 10, dtype=torch.float64))

@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('at', [0, 3])
def test_lr_find_ends_where_the_loss_is_no_number(at, bad):
    learn, rec, calls = bundle(n_train=10), Recorder(), []
    def loss(pred, yb):
        calls.append(1)
        return F.cross_entropy(pred, yb) * (bad if len(calls) == at+1 else 1.)
    learn.loss_func = loss
    before = everything(learn)
    fit([LR_Find(max_lr=1e-3), rec], learn=learn)
    assert len(calls) == at+1 == len(rec.losses)
    for a, b in zip(before, everything(learn)): assert same(a, b)

@pytest.mark.parametrize('losses, n', [([1., 2., 3.9, 4.1], 4), ([1., 0.1, 0.5], 3), ([-1., -2., 3.9, 4.1], 4)])
def test_lr_find_ends_where_the_loss_explodes(losses, n):
    learn, rec = bundle(n_train=10), Recorder()
    it = iter(losses + [9e9]*10)
    learn.loss_func = lambda pred, yb: pred.sum()*0 + next(it)
    fit([LR_Find(max_lr=1e-3), rec], learn=learn)
    assert len(rec.losses) == n

def test_lr_find_refuses_rates_that_no_factor_links():
    with pytest.raises(ValueError, match='sched_exp'): LR_Find(min_lr=0., max_lr=1.)


# --- devices, transforms, layout -------------------------------------------------------------------------------------------------

def test_cuda_callback_takes_the_device_it_is_given_and_names_one_that_is_not_there():
    cb = CudaCallback('cpu')
    run = fit(cb)
    assert cb.device == torch.device('cpu') and next(run.model.parameters()).device == torch.device('cpu')
    with pytest.raises(ValueError, match='warp9'): CudaCallback('warp9')
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='cuda'): CudaCallback('cuda')
    assert CudaCallback().device.type in ('cuda', 'mps', 'cpu')

def test_transforms_of_a_batch():
    seen = []
    class Look(Callback):
        _order = 9
        def begin_batch(self): seen.append(self.xb)
    double = lambda x: x*2
    def first(x): return x+1
    first._order, double._order = -1, 0
    fit([BatchTransformXCallback([double, first]), Look()], n_train=1)
    torch.testing.assert_close(seen, [(x+1)*2 for x, _ in [*batches(1), *batches(1, seed=9)]])

def test_a_transform_that_fails_is_named():
    with pytest.raises(RuntimeError) as e: fit(BatchTransformXCallback(lambda x: x @ x))
    assert e.value.__notes__ == ['raised by BatchTransformXCallback in begin_batch']

class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.lin = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.register_buffer('scale', torch.ones(1, 3, 5, 5))
    def forward(self, x): return self.lin(self.conv(x).mean((2, 3)))

@pytest.mark.parametrize('exc', [None, ValueError('x')], ids=repr)
def test_channels_last_for_the_time_of_the_fit(exc):
    g = torch.Generator().manual_seed(0)
    dl = [(torch.randn(4, 3, 8, 8, generator=g), torch.randint(0, 2, (4,), generator=g)) for _ in range(2)]
    seen = []
    class Look(Callback):
        def after_pred(self): seen.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (self.xb, self.model.conv.weight, self.model.scale))
    model, plain = Conv(), Conv()
    plain.load_state_dict(model.state_dict())
    before = {n: t.stride() for n, t in model.state_dict().items()}
    try: fit([ChannelsLastCallback(), Look(), *([Raises(exc, at=1)] if exc else [])], model=model, train_dl=dl, valid_dl=None)
    except ValueError as e: assert e is exc
    assert seen and all(seen)
    assert {n: t.stride() for n, t in model.state_dict().items()} == before
    if exc is None:
        fit(model=plain, train_dl=dl, valid_dl=None)
        for p, q in zip(model.parameters(), plain.parameters()): torch.testing.assert_close(p, q)


# --- promise 8: no hidden waiting ------------------------------------------------------------------------------------------------

class Waiting(TorchDispatchMode):
    "Counts what asks a device for values: reads of one number, copies to the host."
    def __init__(self): super().__init__(); self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name == '_to_copy': source, target = args[0].device.type, str(kwargs.get('device') or args[0].device)
        elif name == 'copy_': source, target = args[1].device.type, args[0].device.type
        else: source = target = None
        if name == '_local_scalar_dense' or target == 'cpu' != source: self.seen.append(name)
        return func(*args, **kwargs)

class Asking(TorchFunctionMode):
    "Counts the same where it is written: on a CPU some of it never reaches a dispatcher."
    ASKS = 'item tolist cpu numpy nonzero __bool__ __float__ __int__ __index__ __array__'.split()
    def __init__(self): super().__init__(); self.seen = []
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__name__', '') in self.ASKS: self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))

class Watch(Callback):
    "Keeps both counters on from begin_epoch to the end of the last training batch."
    _order = 100
    def __init__(self): self.modes, self.batches = [Waiting(), Asking()], 0
    def begin_epoch(self):
        for m in self.modes: m.__enter__()
    def after_batch(self):
        if not self.run.in_train: return
        self.batches += 1
        if self.run.iter == self.run.iters-1:
            for m in self.modes[::-1]: m.__exit__(None, None, None)
    @property
    def seen(self): return [name for m in self.modes for name in m.seen]

def watched(*extra):
    g = torch.Generator().manual_seed(0)
    dl = [(torch.randint(0, 256, (8, 3, 6, 6), generator=g, dtype=torch.uint8), torch.randint(0, 2, (8,), generator=g)) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    watch = Watch()
    fit([AvgStatsCallback(accuracy), Recorder(), ParamScheduler('lr', sched_cos(0.1, 0.01)), CudaCallback('cpu'),
         BatchTransformXCallback(lambda x: x.float().div(255).sub(0.5)), ChannelsLastCallback(), watch, *extra],
        epochs=2, model=model, train_dl=dl, valid_dl=dl[:1])
    assert watch.batches == 8
    return watch.seen

def test_a_training_batch_asks_nothing_back_from_the_device(): assert watched() == []

@pytest.mark.parametrize('ask', [lambda t: t.item(), lambda t: float(t.detach()), bool, lambda t: t.tolist(), lambda t: t.detach().cpu(), lambda t: t.detach().numpy(),
                                 lambda t: print(f'{t:.1f}') if t > 1e9 else None], ids='item float bool tolist cpu numpy if'.split())
def test_that_check_does_find_a_callback_that_asks(ask):
    class Asks(Callback):
        def after_loss(self):
            if self.run.in_train: ask(self.run.loss)
    assert len(watched(Asks())) >= 8

def test_that_check_does_find_a_copy_to_the_host():
    mode = Waiting()
    with mode:
        torch.empty(2).copy_(torch.empty(2)) # from the host to the host: no waiting
        torch.empty(2).to(torch.float64)
        assert mode.seen == []
        torch.tensor(1.).item()
    assert mode.seen == ['_local_scalar_dense']


# --- CUDA ------------------------------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')

@pytest.mark.cuda
@needs_cuda
def test_on_cuda_model_batches_statistics_and_losses_are_on_the_device():
    seen, learn = set(), bundle()
    class Look(Callback):
        _order = 9
        def begin_batch(self): seen.update(t.device.type for t in (self.xb, self.yb))
        def after_batch(self): seen.update([self.loss.device.type, self.run.avg_stats.train_stats.total.device.type])
    fit(learn=learn) # on the CPU first, so that the optimizer remembers something there
    run = fit([CudaCallback(), AvgStatsCallback([accuracy, largest]), Recorder(), Look()], learn=learn)
    assert seen == {'cuda'} and run.model.weight.device.type == 'cuda'
    assert {s['momentum_buffer'].device.type for s in learn.opt.state.values()} == {'cuda'}
    assert len(run.recorder.losses) == 3 and all(math.isfinite(l) for l in run.recorder.losses)

@pytest.mark.cuda
@needs_cuda
def test_on_cuda_lr_find_leaves_all_as_it_was():
    learn = bundle(model=Net().cuda(), train_dl=loader())
    fit(CudaCallback(), learn=learn)
    before, rng = everything(learn), torch.cuda.get_rng_state()
    fit([CudaCallback(), LR_Find(max_iter=10, max_lr=1.)], epochs=3, learn=learn)
    for a, b in zip(before, everything(learn)): assert same(a, b)
    assert torch.equal(torch.cuda.get_rng_state(), rng)


# --- draws of batch transforms: a function of (seed, pass, batch) -------------------------------------------------------------------------

class AddDraws:
    "Adds numbers from all three generators of the CPU; outside of training, nothing."
    def __call__(self, x): return x + torch.rand(()) + random.random() + float(np.random.rand())
    def valid(self, x): return x


class Disturb(Callback):
    "AddDraws from every generator in the middle of the batch."
    _order = 1
    def begin_batch(self): torch.rand(7), random.random(), np.random.rand()


class Inputs(Callback):
    _order = 3
    def __init__(self): self.train, self.valid = [], []
    def begin_batch(self): (self.train if self.run.in_train else self.valid).append(self.run.xb.clone())


def drawn(*cbs, epochs=2, workers=0, state=None):
    "The inputs that a Runner's model gets, training and validation, of two loaders of zeros."
    from dl2lib.datablock import Dataset, get_dls
    zeros = Dataset(torch.zeros(12, 2), torch.zeros(12, dtype=torch.long))
    train_dl, valid_dl = get_dls(zeros, zeros, bs=4, seed=5, num_workers=workers)
    if state: train_dl.load_state_dict(state)
    model, seen = nn.Linear(2, 2), Inputs()
    run = Runner(cbs=[*cbs, seen])
    run.fit(epochs, TrainBundle(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, SimpleNamespace(train_dl=train_dl, valid_dl=valid_dl)))
    return torch.stack(seen.train), torch.cat(seen.valid)


def test_a_batch_transform_draws_by_seed_pass_and_batch_alone():
    torch.manual_seed(0)
    train, valid = drawn(BatchTransformXCallback(AddDraws()))
    assert len(train[:, 0, 0].unique()) == 6 and not valid.any()     # each batch of each pass its own; the counterpart in validation
    for cbs, kw in (([], {}), ([Disturb()], {}), ([], dict(workers=2))):
        torch.manual_seed(1); random.seed(1); np.random.seed(1)
        assert torch.equal(drawn(BatchTransformXCallback(AddDraws()), *cbs, **kw)[0], train)
    later, _ = drawn(BatchTransformXCallback(AddDraws()), epochs=1, state=dict(seed=5, n_pass=1, batch=1))
    assert torch.equal(later, train[4:])                             # batch k is batch k, whatever was computed before it


def test_two_callbacks_of_a_kind_draw_numbers_of_their_own():
    one, two = drawn(BatchTransformXCallback(AddDraws()))[0], drawn(BatchTransformXCallback(AddDraws()), BatchTransformXCallback(AddDraws()))[0]
    assert not ((two - 2*one).abs() < 1e-6).any()


@pytest.mark.parametrize('fails', [False, True])
def test_after_a_batch_transform_the_generators_stand_where_they_stood(fails):
    class Fails(AddDraws):
        def __call__(self, x):
            super().__call__(x)
            if fails: raise ValueError('on purpose')
            return x
    class Before(Disturb):
        def begin_batch(self): super().begin_batch(); self.states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    class After(Callback):
        _order = 9
        def begin_batch(self): assert before.states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        def after_fit(self): self.begin_batch() if fails else None
    before = Before()
    if fails:
        with pytest.raises(ValueError, match='on purpose'): drawn(BatchTransformXCallback(Fails()), before, After(), epochs=1)
    else: drawn(BatchTransformXCallback(Fails()), before, After(), epochs=1)


def test_what_draws_nothing_is_not_seeded(monkeypatch):
    monkeypatch.setattr('dl2lib.callbacks.seed_cpu', lambda seed: pytest.fail('seeded'))
    class Still:
        random = False
        def __call__(self, x): return x
    drawn(BatchTransformXCallback([Still(), Still()]))
    with pytest.raises(pytest.fail.Exception): drawn(BatchTransformXCallback([Still(), torch.neg]))


def test_a_loader_without_seeds_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    cb = BatchTransformXCallback(lambda x: torch.rand(()))
    cb.set_runner(SimpleNamespace(dl=[], in_train=True, xb=None, cbs=[cb]))
    cb.begin_batch()
    assert cb.run.xb == expected
