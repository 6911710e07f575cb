"""Callbacks that practice asks for: against hand-written loops, properties, faults; and that searching and tracing leave nothing behind."""
import csv, math, random, time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from dl2lib.callbacks import (AvgStatsCallback, BatchTransformXCallback, Callback, CancelBatchException, CancelEpochException, CancelTrainException,
                              CudaCallback, LR_Find, ParamScheduler, Recorder, accuracy)
from dl2lib.datablock import Dataset, get_dls
from dl2lib.learner import Learner
from dl2lib.optimizers import sgd_mom_opt, sgd_opt
from dl2lib.practice import (BatchTransformYCallback, CompileCallback, CSVLog, EarlyStopping, GradientAccumulation, GradientClip, KeepBest,
                             MixedPrecision, NonFiniteError, TerminateOnNaN, TrackBest, lr_find, suggest_lr, trace)
from dl2lib.runner import get_batch
from dl2lib.schedules import sched_lin

same = torch.testing.assert_close


def sgd(ps, lr): return torch.optim.SGD(ps, lr)
def momentum(ps, lr): return torch.optim.SGD(ps, lr, momentum=0.9)

def xy(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)

def net(*extra):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), *extra, nn.Linear(16, 3))

def plain_data(n=50, bs=8, valid=True):
    return SimpleNamespace(train_dl=DataLoader(TensorDataset(*xy(n)), bs), valid_dl=DataLoader(TensorDataset(*xy(20, 9)), 10) if valid else None)

def learner(*cbs, model=None, data=None, lr=0.1, opt_func=sgd, loss_func=F.cross_entropy):
    learn = Learner(model or net(), data or plain_data(), loss_func, opt_func=opt_func, lr=lr, cbs=list(cbs))
    learn.logger = lambda *args: None
    return learn

def weights(learn): return nn.utils.parameters_to_vector(learn.model.parameters()).detach().clone()


class Raise(Callback):
    "Raises once, at an event, in an order."
    def __init__(self, event, exc, order=0):
        self.exc, self._order, self.armed = exc, order, True
        setattr(self, event, self.strike)
    def strike(self):
        if self.armed: self.armed = False; raise self.exc


class CountReads(TorchDispatchMode):
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

def reads(*cbs):
    "Numbers that an epoch of training asks back from the device."
    class Watch(Callback):
        _order = -20
        def begin_epoch(self): counter.__enter__()
        def after_epoch(self): counter.__exit__(None, None, None)
    counter = CountReads()
    learner(*cbs, Watch(), data=SimpleNamespace(train_dl=list(plain_data().train_dl), valid_dl=None)).fit(1) # torch's loader itself reads a number
    return counter.n


# Targets

def test_targets_are_transformed_in_training_and_validation():
    seen = []
    class Look(Callback):
        _order = 5
        def begin_batch(self): seen.append(self.yb.dtype)
    learner(BatchTransformYCallback([lambda y: F.one_hot(y, 3), torch.Tensor.float]), Look()).fit(1)
    assert set(seen) == {torch.float32} and len(seen) == 9


# Clipping

def test_clipping_against_numpy():
    grads = []
    class Look(Callback):
        def __init__(self, order): self._order = order
        def after_backward(self): grads.append(np.concatenate([p.grad.numpy().ravel() for p in self.model.parameters()]))
    clip = GradientClip(0.5)
    learner(Look(0), clip, Look(50)).fit(2)
    for before, after, norm in zip(grads[::2], grads[1::2], clip.norms, strict=True):
        n = np.linalg.norm(before)
        assert math.isclose(n, norm, rel_tol=1e-5)
        np.testing.assert_allclose(after, before*min(1, 0.5/n), rtol=1e-4, atol=1e-7)
    assert any(n > 0.5 for n in clip.norms) and any(n < 0.5 for n in clip.norms)

@pytest.mark.parametrize('v', [0, -1, math.nan, math.inf])
def test_a_norm_that_is_none(v):
    with pytest.raises(ValueError, match='max_norm='): GradientClip(v)


# Accumulation

@pytest.mark.parametrize('n, k', [(48, 2), (50, 3), (50, 4), (50, 100), (5, 3)])
def test_accumulated_batches_are_one_large_batch(n, k):
    many = learner(GradientAccumulation(k), data=plain_data(n, 8), opt_func=momentum)
    one = learner(data=plain_data(n, 8*k), opt_func=momentum)
    many.fit(3); one.fit(3)
    same(weights(many), weights(one), rtol=1e-5, atol=1e-6)

def test_a_batch_that_is_cancelled_takes_the_accumulated_gradients_with_it():
    class Third(Callback):
        def after_loss(self):
            if self.in_train and self.iter == 2: raise CancelBatchException
    acc = learner(GradientAccumulation(4), Third(), data=plain_data(56, 8, valid=False))
    acc.fit(1)
    x, y = xy(56)
    ref = learner(data=SimpleNamespace(train_dl=[(x[24:], y[24:])], valid_dl=None)) # batches 3 to 6
    ref.fit(1)
    same(weights(acc), weights(ref), rtol=1e-5, atol=1e-6)

def test_nothing_is_left_over_from_an_epoch_that_was_cancelled():
    acc = learner(GradientAccumulation(4), Raise('after_backward', CancelEpochException(), order=-1), data=plain_data(32, 8, valid=False))
    acc.fit(2)
    ref = learner(data=plain_data(32, 32, valid=False))
    ref.fit(1)
    same(weights(acc), weights(ref), rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize('v', [0, -1, 1.5, True, '2'])
def test_batches_to_accumulate_that_are_none(v):
    with pytest.raises(ValueError, match='n_batches='): GradientAccumulation(v)

def test_no_number_is_asked_back():
    assert reads(GradientClip(1.)) == reads(GradientAccumulation(3)) == reads(MixedPrecision(), GradientClip(1.), GradientAccumulation(2), Recorder()) == 0
    assert reads(TerminateOnNaN()) == 7 # which is said: the counter counts


# Half precision

class Dtypes(Callback):
    def __init__(self): self.seen = []
    def after_pred(self): self.seen.append((self.pred.dtype, self.in_train))
    def after_loss(self): self.seen.append((self.loss.dtype, self.in_train))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_products_are_in_half_precision_and_the_loss_is_not(dtype):
    look = Dtypes()
    half, full = learner(look, MixedPrecision(dtype), Recorder()), learner(Recorder())
    half.fit(3); full.fit(3)
    assert set(look.seen) == {(dtype, True), (torch.float32, True), (dtype, False), (torch.float32, False)}
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    same(torch.tensor(half.recorder.losses), torch.tensor(full.recorder.losses), rtol=0.02, atol=0.02)
    assert not torch.is_autocast_enabled('cpu') and 'opt_step' not in vars(half)

@pytest.mark.parametrize('event', 'begin_fit begin_epoch begin_batch after_pred after_loss after_backward after_step after_batch after_epoch'.split())
@pytest.mark.parametrize('exc', [ZeroDivisionError, KeyboardInterrupt, CancelBatchException, CancelEpochException, CancelTrainException])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_left_whatever_happens(event, exc, dtype):
    for order in -5, 100:
        learn = learner(MixedPrecision(dtype), Raise(event, exc(), order))
        try: learn.fit(1)
        except exc: pass
        assert not torch.is_autocast_enabled('cpu') and 'opt_step' not in vars(learn)
        learn.fit(1)

def test_looking_at_a_batch_leaves_autocast_off():
    learn = learner(MixedPrecision())
    get_batch(learn.data.train_dl, learn)
    assert not torch.is_autocast_enabled('cpu')

def test_scaled_gradients_are_those_without_scaling_with_accumulation_and_clipping():
    half = learner(MixedPrecision(torch.float16), GradientAccumulation(3), GradientClip(0.2), opt_func=momentum)
    full = learner(GradientAccumulation(3), GradientClip(0.2), opt_func=momentum)
    half.fit(3); full.fit(3)
    same(weights(half), weights(full), rtol=0.02, atol=0.01)
    same(torch.tensor(half.gradient_clip.norms), torch.tensor(full.gradient_clip.norms), rtol=0.05, atol=0.01)

def test_a_gradient_that_overflows_leaves_out_the_step_and_lowers_the_scale():
    scales, seen = [], []
    class Overflow(Callback):
        _order = 35 # between scaling and the backward pass
        def begin_batch(self): self.before = weights(self.run)
        def after_loss(self):
            if self.in_train and self.iter == 0: self.run.loss_weight = self.run.loss_weight*math.inf
        def after_step(self): scales.append(self.mixed_precision.scaler.get_scale()); seen.append(torch.equal(self.before, weights(self.run)))
    learn = learner(MixedPrecision(torch.float16), Overflow())
    learn.fit(1)
    assert seen == [True] + [False]*6 and scales[0] == 32768 and torch.isfinite(weights(learn)).all()

def test_validating_within_a_batch_leaves_its_precision():
    seen = []
    class Ask(Callback):
        _order = 50
        def begin_batch(self):
            if self.in_train and self.iter == 3: self.run.validate()
            if self.in_train: seen.append(torch.is_autocast_enabled('cpu'))
    learner(MixedPrecision(), Ask()).fit(1)
    assert seen == [True]*7 and not torch.is_autocast_enabled('cpu')

def test_a_precision_that_is_none():
    with pytest.raises(ValueError, match='float64'): MixedPrecision(torch.float64)


# The best epoch

class Script(Callback):
    "Makes the averages of an epoch what a list says: for validation loss and accuracy."
    _order = 1
    def __init__(self, losses): self.losses = losses
    def after_epoch(self):
        stats, v = self.avg_stats.valid_stats, self.losses[self.epoch]
        stats.total, stats.count = torch.tensor([v, 1-v]), 1

def scripted(losses, *cbs): return learner(AvgStatsCallback(accuracy), Script(losses), *cbs)

@pytest.mark.parametrize('losses, kw, stopped, best', [
    ([.5, .4, .45, .44, .43], dict(patience=2), 3, 1), ([.5, .4, .3, .2, .1], dict(patience=1), 4, 4), ([.5, .5, .5], dict(patience=1), 1, 0),
    ([.5, .4, .45, .35, .5], dict(patience=2), 4, 3), ([.5, .45, .40, .35, .3], dict(patience=1, min_delta=.08), 1, 0),
    ([.5, .45, .40, .35, .3], dict(patience=2, min_delta=.08), 4, 4), ([math.nan, math.nan, .5], dict(patience=2), 1, None),
    ([.5, math.nan, .4, math.nan], dict(patience=2), 3, 2), ([.2, .3, .4], dict(patience=1, monitor='valid_accuracy'), 1, 0),
    ([.2, .3, .4], dict(patience=1, monitor='valid_accuracy', lower=True), 2, 2), ([.1, .2, .3], dict(patience=1, lower=False), 2, 2)])
def test_stopping_early(losses, kw, stopped, best):
    stop = EarlyStopping(**kw)
    learn = scripted(losses, stop)
    learn.fit(len(losses))
    assert learn.epoch == stopped and stop.best_epoch == best

@pytest.mark.parametrize('losses, best', [([.5, .3, .4], 1), ([.3, .4, .5], 0), ([.5, .4, .3], 2), ([math.nan]*3, None)])
def test_the_best_weights_come_back(losses, best):
    seen = []
    class Look(Callback):
        _order = 90
        def after_epoch(self): seen.append(weights(self.run))
    learn = scripted(losses, KeepBest(), Look())
    learn.fit(3)
    same(weights(learn), seen[-1 if best is None else best], rtol=0, atol=0)

def test_the_best_weights_come_back_after_an_interrupt_and_beside_stopping():
    seen = []
    class Look(Callback):
        _order = 58
        def after_epoch(self): seen.append(weights(self.run))
    learn = scripted([.5, .3, .4, .2], KeepBest(), EarlyStopping(patience=1), Look())
    learn.fit(4)
    assert learn.epoch == 2
    same(weights(learn), seen[1], rtol=0, atol=0)
    class Stop(Callback):
        def begin_batch(self):
            if self.epoch == 2: raise KeyboardInterrupt
    learn, seen[:] = scripted([.3, .4, .5], KeepBest(), Look(), Stop()), []
    with pytest.raises(KeyboardInterrupt): learn.fit(3)
    same(weights(learn), seen[0], rtol=0, atol=0)

def test_what_cannot_be_monitored_is_named_before_training():
    for cb in EarlyStopping('valid_f1'), KeepBest('f1'):
        learn = learner(AvgStatsCallback(accuracy), cb)
        before = weights(learn)
        with pytest.raises(ValueError, match='no such column, but train_loss, train_accuracy, valid_loss, valid_accuracy'): learn.fit(1)
        same(weights(learn), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="valid_loss.*but train_loss"): learner(AvgStatsCallback(), KeepBest(), data=plain_data(valid=False)).fit(1)
    with pytest.raises(ValueError, match='KeepBest needs an AvgStatsCallback'): learner(KeepBest()).fit(1)
    with pytest.raises(ValueError, match='patience=0'): EarlyStopping(patience=0)
    with pytest.raises(ValueError, match='min_delta=-1'): TrackBest(min_delta=-1)


# A log on disk

def test_the_log_has_a_line_an_epoch_in_full_precision(tmp_path):
    rows = []
    class Keep(Callback):
        def after_epoch(self): rows.append([*self.avg_stats.train_stats.avg_stats, *self.avg_stats.valid_stats.avg_stats])
    learn = learner(AvgStatsCallback(accuracy), Keep(), CSVLog(tmp_path/'log.csv'))
    learn.fit(2); learn.fit(1)
    with open(tmp_path/'log.csv', newline='') as f: lines = list(csv.reader(f))
    assert lines[0] == ['epoch', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy', 'seconds']
    assert [[float(o) for o in l[1:-1]] for l in lines[1:]] == rows and [l[0] for l in lines[1:]] == ['0', '1', '0']

def test_the_log_keeps_what_was_written_before_an_error_and_refuses_other_columns(tmp_path):
    learn = learner(AvgStatsCallback(), CSVLog(tmp_path/'a.csv'), Raise('begin_validate', ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    assert (tmp_path/'a.csv').read_text().splitlines() == ['epoch,train_loss,valid_loss,seconds']
    with pytest.raises(ValueError, match='a.csv has the columns epoch, train_loss'): learner(AvgStatsCallback(accuracy), CSVLog(tmp_path/'a.csv')).fit(1)
    with pytest.raises(FileNotFoundError, match='nowhere'): learner(AvgStatsCallback(), CSVLog(tmp_path/'nowhere'/'a.csv')).fit(1)
    (tmp_path/'empty.csv').touch()
    learner(AvgStatsCallback(), CSVLog(tmp_path/'empty.csv')).fit(1)
    assert len((tmp_path/'empty.csv').read_text().splitlines()) == 2


# Not a number

class Log(nn.Module):
    def forward(self, x): return torch.log(x+1e-3)

def broken(model, data, **kw):
    learn = learner(TerminateOnNaN(), model=model, data=data, **kw)
    with pytest.raises(NonFiniteError) as e: learn.fit(2)
    return learn, e.value

def test_the_first_layer_and_the_samples_are_named_and_the_weights_stay_finite():
    x, y = xy(40)
    x[13, 2] = 1e30
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    class Square(nn.Module):
        def forward(self, x): return x*x
    model.insert(1, Square())
    random.seed(0); state = random.getstate()
    learn, e = broken(model, SimpleNamespace(train_dl=DataLoader(TensorDataset(x, y), 8), valid_dl=None))
    assert e.layer == '1 (Square)' and list(e.samples) == [5] and 'epoch 0, batch 1' in str(e) and 'samples of the batch: 5' in str(e)
    assert torch.isfinite(weights(learn)).all() and random.getstate() == state

def test_samples_of_our_loaders_are_named_as_items():
    x, y = xy(40)
    x[13] = math.nan
    data = SimpleNamespace(**dict(zip(('train_dl', 'valid_dl'), get_dls(Dataset(x, y), None, 8, seed=5))))
    _, e = broken(net(), data)
    assert 'the inputs are not finite' in str(e) and '(item 13)' in str(e) and len(e.samples) == 1

def test_weights_the_loss_and_half_precision_that_break():
    model = net()
    with torch.no_grad(): model[2].weight[0, 0] = math.inf
    assert 'the weights 2.weight are not finite' in str(broken(model, plain_data())[1])
    def bad_loss(pred, yb): return F.cross_entropy(pred, yb)*math.nan
    _, e = broken(net(), plain_data(), loss_func=bad_loss)
    assert 'it is the loss function' in str(e) and e.layer is None
    with pytest.raises(NonFiniteError, match='the first layer with such an output is 2 .Linear.'): learner(TerminateOnNaN(), lr=1e20).fit(5)
    x, y = xy(16)
    learn = learner(TerminateOnNaN(), MixedPrecision(torch.float16), data=SimpleNamespace(train_dl=[(x*1e4, y), (x*1e5, y)], valid_dl=None), lr=1e-9)
    with pytest.raises(NonFiniteError, match='batch 1.*0 .Linear.'): learn.fit(1) # beyond float16, not beyond float32

def test_a_validation_loss_that_is_not_finite_ends_nothing():
    x, y = xy(8)
    learner(TerminateOnNaN(), data=SimpleNamespace(train_dl=[(x, y)], valid_dl=[(x*math.nan, y)])).fit(1)

def test_batchnorm_is_as_before_the_broken_batch():
    x, y = xy(16)
    learn = learner(TerminateOnNaN(), model=net(nn.BatchNorm1d(16)), data=SimpleNamespace(train_dl=[(x, y), (x*1e30*1e30, y)], valid_dl=None))
    with pytest.raises(NonFiniteError, match='inputs'): learn.fit(1)


# torch.compile

def test_a_model_is_compiled_for_a_fit_only():
    calls = []
    def backend(gm, inputs): calls.append(1); return gm.forward
    learn, ref = learner(CompileCallback(backend=backend), Recorder()), learner(Recorder())
    learn.fit(2); ref.fit(2)
    assert calls and learn.recorder.losses == ref.recorder.losses and learn.model._compiled_call_impl is None
    n = len(calls)
    learn.model(torch.randn(3, 6))
    assert len(calls) == n
    with pytest.raises(ZeroDivisionError): learner(CompileCallback(backend=backend), Raise('after_loss', ZeroDivisionError()), model=learn.model).fit(1)
    assert learn.model._compiled_call_impl is None


# A rate to begin with

def test_suggested_rate_of_known_curves():
    lrs = np.logspace(-6, 1, 200)
    for middle in 1e-4, 1e-3, 1e-2:
        losses = 3/(1+(lrs/middle)**1.5) + np.where(lrs > 1, lrs**3, 0)
        assert 0.5 < suggest_lr(lrs, losses)/middle < 2
    with pytest.raises(ValueError, match='never falls'): suggest_lr(lrs, lrs)
    with pytest.raises(ValueError, match='too few'): suggest_lr(lrs[:3], lrs[:3])
    assert suggest_lr(lrs, [*(3/(1+(lrs/1e-3)**1.5))[:-5], *[math.nan]*5]) < 0.01

def everything(learn):
    return [*learn.model.state_dict().values()], learn.opt.state_dict(), learn.model.training, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

class Noise:
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i] + 0.1*torch.randn(6) + random.random(), self.y[i]

def noisy(workers):
    return SimpleNamespace(**dict(zip(('train_dl', 'valid_dl'), get_dls(Noise(*xy(50)), Noise(*xy(20, 9)), 8, seed=5, num_workers=workers))))

def drop_net(): return net(nn.BatchNorm1d(16), nn.Dropout(0.3))

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('look', [lambda learn: learn.lr_find(max_iter=20, plot=False), lambda learn: learn.trace()], ids=['lr_find', 'trace'])
def test_fit_after_it_is_fit_without_it_to_the_bit(workers, look):
    res = []
    for on in False, True:
        torch.manual_seed(3); random.seed(3); np.random.seed(3)
        learn = learner(AvgStatsCallback(accuracy), Recorder(), ParamScheduler('lr', sched_lin(0.1, 0.01)), GradientClip(1.), model=drop_net(),
                        data=noisy(workers), opt_func=momentum)
        torch.manual_seed(4)
        learn.fit(1)
        if on:
            before, losses = repr(everything(learn)), list(learn.recorder.losses)
            cbs, names, logger, n_iter = list(learn.cbs), sorted(vars(learn)), learn.logger, learn.n_iter
            look(learn)
            assert repr(everything(learn)) == before and learn.recorder.losses == losses
            assert learn.cbs == cbs and sorted(vars(learn)) == names and learn.logger is logger and learn.n_iter == n_iter
            assert all(cb.run is learn for cb in learn.cbs)
        learn.fit(2)
        res.append((learn.recorder.losses, everything(learn)))
    assert repr(res[0]) == repr(res[1])

def test_lr_find_in_the_middle_of_a_resumed_pass_leaves_the_position():
    learn = learner(data=noisy(0))
    learn.data.train_dl.load_state_dict(dict(seed=5, n_pass=2, batch=3))
    learn.lr_find(max_iter=20, plot=False)
    assert learn.data.train_dl.state_dict() == dict(seed=5, n_pass=2, batch=3)

def test_lr_find_works_with_what_prepares_batches_and_draws():
    import matplotlib.pyplot as plt
    seen = []
    def twice(x): seen.append(1); return 2*x
    learn = learner(BatchTransformXCallback(twice), EarlyStopping(), AvgStatsCallback())
    assert 1e-6 < learn.lr_find(max_iter=30) < 10 and len(seen) >= 10 and plt.gca().get_xscale() == 'log'
    plt.close('all')

@pytest.mark.parametrize('look', [lambda learn: lr_find(learn, 10, plot=False), trace])
def test_a_search_that_fails_leaves_the_learner_as_it_was(look):
    learn = learner(Recorder(), AvgStatsCallback())
    class Stop(Callback):
        def after_backward(self): raise ZeroDivisionError
    learn.add_cbs(Stop())
    before, cbs, logger = repr(everything(learn)), list(learn.cbs), learn.logger
    with pytest.raises(ZeroDivisionError): look(learn)
    assert repr(everything(learn)) == before and learn.cbs == cbs and learn.logger is logger and learn.recorder is cbs[1 if cbs[0] is not learn.recorder else 0]
    assert 'tell' not in vars(learn) and all(p.grad is None for p in learn.model.parameters())


# Tracing

@pytest.mark.parametrize('opt_func', [sgd, sgd_opt, sgd_mom_opt], ids=['torch', 'sgd', 'momentum'])
def test_trace_says_who_changed_what(opt_func):
    class Twice(Callback):
        _order = 7
        def begin_batch(self): self.run.xb = 2*self.run.xb
    learn = learner(Twice(), GradientClip(1e-3), ParamScheduler('lr', sched_lin(0.1, 0.01)), lr=0.05, opt_func=opt_func)
    rows = learn.trace().items
    what = {(e, who): c for e, who, c in rows}
    assert what['begin_batch', 'Twice'] == 'xb' and what['begin_batch', 'ParamScheduler'] == 'opt[0].lr: 0.05 → 0.1'
    assert 'float32 8x6' in what['begin_batch', 'the loop'] and what['after_pred', 'the loop'] == 'pred: None → float32 8x3'
    assert what['after_backward', 'the loop'] == 'gradients: None → there' and what['after_backward', 'GradientClip'] == 'gradients'
    assert what['after_step', 'the loop'] == 'weights' and what['begin_epoch', 'TrainEvalCallback'] == 'in_train: False → True'
    assert [e for e, who, _ in rows if who == 'the loop'] == ('begin_fit begin_epoch begin_batch after_pred after_loss after_backward after_step after_batch '
                                                             'after_cancel_train after_fit').split()

def test_a_learner_takes_the_lessons_lr_find_as_a_callback():
    learn = learner(LR_Find(max_iter=10), Recorder())
    learn.fit(2)
    assert len(learn.recorder.lrs) <= 10 and learn.lr_finder


# CUDA

@pytest.mark.cuda
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_on_cuda(dtype):
    half, full = learner(CudaCallback('cuda'), MixedPrecision(dtype), GradientClip(1.), Recorder()), learner(CudaCallback('cuda'), GradientClip(1.), Recorder())
    half.fit(3); full.fit(3)
    same(torch.tensor(half.recorder.losses), torch.tensor(full.recorder.losses), rtol=0.03, atol=0.03)

@pytest.mark.cuda
def test_accumulation_and_clipping_do_not_wait_for_the_device():
    learn = learner(CudaCallback('cuda'), GradientAccumulation(2), GradientClip(1.), MixedPrecision())
    learn.fit(1)
    class Strict(Callback):
        def after_loss(self): torch.cuda.set_sync_debug_mode('error')
        def after_step(self): torch.cuda.set_sync_debug_mode('default')
        def after_fit(self): torch.cuda.set_sync_debug_mode('default')
    learn.add_cbs(Strict())
    learn.fit(1)
