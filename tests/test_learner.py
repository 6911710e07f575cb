"The Learner: all that holds of the Runner, callbacks for one fit, the optimizer it makes, validating, predicting, and bad input."
import copy, importlib.util, math, pickle, random, signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import test_runner as runner_tests
from dl2lib import learner as learner_mod
from dl2lib.callbacks import (AvgStatsCallback, BatchTransformXCallback, Callback, CancelBatchException, CancelEpochException,
                              CancelTrainException, ChannelsLastCallback, CudaCallback, ParamScheduler, Recorder,
                              TrainEvalCallback, accuracy, events)
from dl2lib.convnet import conv_layer
from dl2lib.datablock import (CategoryProcessor, DataBunch, ImageFileError, ImageList, ItemList, MultiCategoryProcessor, ResizeFixed,
                              SplitData, label_by_func, make_rgb, parent_labeler, to_byte_tensor, to_float_tensor)
from dl2lib.learner import Learner, get_learner, param_getter
from dl2lib.optimizers import sgd_mom_opt, sgd_opt
from dl2lib.runner import Runner, TrainBundle, get_batch
from dl2lib.schedules import combine_scheds, cos_1cycle_anneal, sched_lin
from test_runner import Log, Net, Raiser, batches, conv_net, image_data, packed, to_float

PIL_Image = pytest.importorskip('PIL.Image')
SGD = partial(torch.optim.SGD, momentum=0.9)


# --- what holds of the Runner holds of the Learner -----------------------------------------------------------------------------------
# test_runner's tests are collected here once more, with a Learner in the Runner's place: events in order, each cancel and each failure
# from each event, a fit within a fit, workers, weights equal to a hand-written loop's.

class AsRunner(Learner):
    "A Learner behind the Runner's signature."
    def __init__(self, cbs=None, cb_funcs=None): super().__init__(nn.Identity(), SimpleNamespace(train_dl=[], valid_dl=None), F.cross_entropy, cbs=cbs, cb_funcs=cb_funcs)
    def fit(self, epochs, learn):
        self.model, self.opt, self.loss_func, self.data = learn.model, learn.opt, learn.loss_func, learn.data
        super().fit(epochs)

def again(runner_class):
    "The tests of test_runner, in a module of their own where `Runner` is another class."
    spec = importlib.util.spec_from_file_location('runner_tests_again', runner_tests.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.Runner = runner_class
    module.get_runner = lambda *args, cbs=None, **kw: (runner_tests.get_runner(*args, **kw)[0], runner_class(cb_funcs=cbs))
    return module

OF_THE_BUNDLE = {'test_a_runner_without_a_bundle_says_so', 'test_a_loop_of_ones_own_is_a_subclass_with_four_attributes',
                 'test_a_callback_named_as_an_attribute_of_the_loop', 'test_get_runner_defaults_to_plain_sgd_and_cross_entropy'}
TAKEN = {k.replace('test_', 'test_learner_', 1): f for k, f in vars(again(AsRunner)).items() if k.startswith('test_') and k not in OF_THE_BUNDLE}
globals().update(TAKEN)
interruptible = runner_tests.interruptible

def test_the_tests_of_the_runner_are_here_and_use_the_learner():
    assert len(TAKEN) == sum(k.startswith('test_') for k in vars(runner_tests)) - len(OF_THE_BUNDLE) > 30
    assert 'test_learner_cancelling_from_each_event' in TAKEN and 'test_learner_an_exception_in_each_event' in TAKEN
    assert all(f.__globals__['Runner'] is AsRunner for f in TAKEN.values())


# --- helpers -------------------------------------------------------------------------------------------------------------------------

def quiet(learn):
    learn.rows = []
    learn.logger = learn.rows.append
    return learn

def make(cbs=None, model=None, n_train=2, n_valid=1, loss_func=F.cross_entropy, **kw):
    torch.manual_seed(1)
    data = kw.pop('data', None) or SimpleNamespace(train_dl=batches(n_train), valid_dl=batches(n_valid, seed=9) if n_valid else None)
    return quiet(Learner(model or Net(), data, loss_func, cbs=cbs, **{'lr': 0.1, 'opt_func': SGD, **kw}))

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

def everything(learn):
    "Weights, buffers, optimizer, modes, random states, order of the data, memory formats."
    np = pytest.importorskip('numpy')
    dl = learn.data.train_dl
    return copy.deepcopy([dict(learn.model.state_dict()), learn.opt.state_dict(), [m.training for m in learn.model.modules()], torch.get_rng_state(),
                          random.getstate(), str(np.random.get_state()), dl.state_dict() if hasattr(dl, 'state_dict') else None,
                          [t.stride() for t in learn.model.state_dict().values()]])

def names(learn): return sorted(k for k, v in vars(learn).items() if isinstance(v, Callback))


# --- the same training as the Runner's -----------------------------------------------------------------------------------------------

def test_losses_and_weights_equal_the_runners_to_the_bit():
    sched = combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.02, 0.1, 0.01))
    cbfs = [partial(AvgStatsCallback, accuracy), Recorder, partial(ParamScheduler, 'lr', sched), partial(CudaCallback, 'cpu'),
            partial(BatchTransformXCallback, to_float), ChannelsLastCallback]
    torch.manual_seed(7)
    model = conv_net()
    run, bundle = quiet(Runner(cb_funcs=cbfs)), TrainBundle(model, SGD(model.parameters(), lr=0.02), F.cross_entropy, image_data())
    run.fit(3, bundle)
    torch.manual_seed(7)
    learn = quiet(Learner(conv_net(), image_data(), F.cross_entropy, opt_func=SGD, lr=0.02, cb_funcs=cbfs))
    learn.fit(3)
    assert learn.recorder.losses == run.recorder.losses and len(learn.recorder.losses) == 30
    assert [r[:-1] for r in learn.rows] == [r[:-1] for r in run.rows]
    assert same(dict(learn.model.state_dict()), dict(model.state_dict())) and same(learn.opt.state_dict(), bundle.opt.state_dict())

def test_fit_twice_goes_on_where_fit_once_would():
    one, two = make(), make()
    torch.manual_seed(2); one.fit(2)
    torch.manual_seed(2); two.fit(1); two.fit(1)
    assert same(dict(one.model.state_dict()), dict(two.model.state_dict())) and same(one.opt.state_dict(), two.opt.state_dict())

def test_it_learns_and_has_the_lessons_attributes():
    torch.manual_seed(0)
    x = torch.randn(256, 3); y = (x.sum(1) > 0).long()
    dl = DataLoader(TensorDataset(x, y), 32, shuffle=True)
    learn = quiet(Learner(nn.Linear(3, 2), SimpleNamespace(train_dl=dl, valid_dl=dl), F.cross_entropy, lr=0.5, cb_funcs=[partial(AvgStatsCallback, accuracy)]))
    for k in 'model opt loss_func data lr cbs logger in_train epoch epochs iter iters n_iter n_epochs xb yb pred loss dl'.split(): assert hasattr(learn, k), k
    learn.fit(3)
    assert learn.avg_stats.valid_stats.avg_stats[1] > 0.95 and (learn.n_iter, learn.n_epochs, learn.epochs) == (24, 3., 3)

def test_callbacks_of_the_runners_time_find_their_bundle():
    seen = []
    class Old(Callback):
        def after_step(self): seen.append((self.learn is self.run, self.learn.model is self.model, self.learn.opt is self.opt))
    make(Old()).fit(1)
    assert seen == [(True, True, True)]*2

def test_an_optimizer_may_be_exchanged_within_a_fit():
    learn = make()
    class Skip(Callback):
        def begin_fit(self): self.real = self.opt
        def after_backward(self): self.learn.opt = SimpleNamespace(step=lambda: None, zero_grad=self.real.zero_grad)
        def after_batch(self): self.learn.opt = self.real
    before, opt = copy.deepcopy(dict(learn.model.state_dict())), learn.opt
    learn.fit(1, Skip())
    assert same(before, dict(learn.model.state_dict())) and learn.opt is opt

def test_without_a_validation_set():
    log = Log()
    learn = make([log, AvgStatsCallback(accuracy)], n_valid=0)
    learn.fit(1)
    assert log.log == packed('F E bplgsn bplgsn e f') and learn.rows[1][3:5] == ['nan', 'nan']


# --- the optimizer -------------------------------------------------------------------------------------------------------------------

def test_the_optimizer_is_made_when_it_is_first_asked_for():
    made = []
    def opt_func(params, lr): made.append(1); return torch.optim.SGD(params, lr=lr)
    learn = make(opt_func=opt_func)
    assert not made
    learn.validate(); learn.get_preds()
    assert not made # nothing was trained
    opt = learn.opt
    learn.fit(1); learn.fit(1)
    assert len(made) == 1 and learn.opt is opt

def test_the_head_may_be_changed_before_the_first_fit():
    learn = make()
    learn.model.a = nn.Linear(3, 4)
    before = learn.model.a.weight.detach().clone()
    learn.fit(1)
    assert not torch.equal(before, learn.model.a.weight)

def test_reset_opt_forgets_and_takes_the_rate_of_the_moment():
    learn = make()
    learn.fit(1)
    old = learn.opt
    assert old.state
    learn.lr = 0.01
    learn.fit(0, reset_opt=True)
    assert learn.opt is not old and not learn.opt.state and learn.opt.param_groups[0]['lr'] == 0.01
    learn.fit(0)
    assert not learn.opt.state

@pytest.mark.parametrize('epochs', [-1, 1.5])
def test_a_refused_fit_leaves_optimizer_and_callbacks_alone(epochs):
    learn = make()
    learn.fit(1)
    opt = learn.opt
    with pytest.raises(ValueError, match='epochs='): learn.fit(epochs, Recorder(), reset_opt=True)
    assert learn.opt is opt and opt.state and names(learn) == ['train_eval']

def test_a_new_rate_reaches_every_group_of_an_optimizer_that_is_there():
    two = lambda m: [m.a.parameters(), m.b.parameters()]
    learn = make(splitter=two)
    learn.fit(1)
    learn.lr = 0.7
    assert [pg['lr'] for pg in learn.opt.param_groups] == [0.7, 0.7] and learn.opt.state
    learn.lr = [0.1, 0.2]
    assert [pg['lr'] for pg in learn.opt.param_groups] == [0.1, 0.2]
    with pytest.raises(ValueError, match='3 learning rates for 2 parameter groups'): learn.lr = [1., 2., 3.]
    assert learn.lr == [0.1, 0.2]

@pytest.mark.parametrize('opt_func', [SGD, torch.optim.Adam, sgd_opt], ids=['SGD', 'Adam', 'sgd_opt'])
@pytest.mark.parametrize('splitter, n', [(param_getter, 1), (lambda m: list(m.parameters()), 1), (lambda m: [m.a.parameters(), list(m.b.parameters())], 2),
                                         (lambda m: [dict(params=m.a.parameters()), dict(params=m.b.parameters())], 2)], ids=['param_getter', 'list', 'lists', 'dicts'])
def test_splitters(splitter, n, opt_func):
    learn = make(splitter=splitter, opt_func=opt_func, lr=0.3)
    before = copy.deepcopy(dict(learn.model.state_dict()))
    learn.fit(1)
    assert [pg['lr'] for pg in learn.opt.param_groups] == [0.3]*n
    assert {id(p) for pg in learn.opt.param_groups for p in pg['params']} == {id(p) for p in learn.model.parameters()}
    assert not any(torch.equal(a, before[k]) for k, a in learn.model.state_dict().items())

def test_each_group_has_the_rate_that_it_is_given():
    two = lambda m: [m.a.parameters(), m.b.parameters()]
    learn = make(splitter=two, lr=[0., 0.5], opt_func=torch.optim.SGD)
    a, b = learn.model.a.weight.detach().clone(), learn.model.b[0].weight.detach().clone()
    learn.fit(1)
    assert torch.equal(a, learn.model.a.weight) and not torch.equal(b, learn.model.b[0].weight)
    assert [pg['lr'] for pg in learn.opt.param_groups] == [0., 0.5]
    rec = Recorder()
    learn.fit(1, [rec, ParamScheduler('lr', [sched_lin(1., 0.), sched_lin(10., 0.)])])
    assert rec.group_lrs == [[1., 0.5], [10., 5.]]

def test_a_group_keeps_a_rate_of_its_own_from_the_splitter():
    learn = make(splitter=lambda m: [dict(params=m.a.parameters(), lr=0.5), dict(params=m.b.parameters())], lr=0.2)
    assert [pg['lr'] for pg in learn.opt.param_groups] == [0.5, 0.2]

def test_frozen_parameters_may_be_left_out_and_are_not_trained():
    learn = make(splitter=lambda m: m.b.parameters())
    with pytest.raises(ValueError, match=r'2 parameters that are to be trained are unknown to the optimizer: a.weight, a.bias. .*requires_grad_\(False\)'): learn.fit(1)
    learn.model.a.requires_grad_(False)
    before = learn.model.a.weight.clone()
    learn.fit(1)
    assert torch.equal(before, learn.model.a.weight)

def test_a_model_that_was_changed_after_a_fit_is_noticed():
    learn, log = make(), Log()
    learn.fit(1)
    learn.model.a = nn.Linear(3, 4)
    with pytest.raises(ValueError, match='a.weight, a.bias.*reset_opt=True'): learn.fit(1, log)
    assert log.log == ''
    before = learn.model.a.weight.detach().clone()
    learn.fit(1, reset_opt=True)
    assert not torch.equal(before, learn.model.a.weight)

def test_no_parameters_and_wrong_numbers_of_rates():
    with pytest.raises(ValueError, match='splitter nothing gives no parameters of Net'):
        def nothing(m): return []
        make(splitter=nothing).fit(1)
    with pytest.raises(ValueError, match=r'lr=\[0.1, 0.2\]: 2 learning rates for 1 parameter groups'): make(lr=[0.1, 0.2]).opt


# --- callbacks for one fit -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('event', events)
@pytest.mark.parametrize('exc', [ValueError('x'), KeyboardInterrupt(), CancelBatchException(), CancelEpochException(), CancelTrainException(), SystemExit(1)],
                         ids=lambda e: type(e).__name__)
def test_callbacks_of_a_fit_are_gone_whatever_happened(event, exc):
    lead = dict(after_cancel_batch=CancelBatchException, after_cancel_epoch=CancelEpochException, after_cancel_train=CancelTrainException)
    rec, learn = Recorder(), make()
    before = list(learn.cbs)
    cbs = [Raiser(event, type(exc)(*exc.args)), rec, *([Raiser('begin_batch', lead[event]())] if event in lead else [])]
    try: learn.fit(1, cbs=cbs)
    except BaseException as e: assert e is cbs[0].exc
    assert not cbs[0].armed and learn.cbs == before and names(learn) == ['train_eval']
    again = Recorder()
    learn.fit(1, again)
    assert len(again.losses) == 2 and names(learn) == ['train_eval']

def test_they_are_there_during_the_fit_under_their_name():
    learn, seen = make(Recorder()), []
    class Look(Callback):
        def after_loss(self): seen.append((self.run.recorder_2 is rec, self.run.look is self))
    rec = Recorder()
    learn.fit(1, [rec, Look()])
    assert seen == [(True, True)]*3 and names(learn) == ['recorder', 'train_eval'] and learn.recorder is not rec
    assert len(rec.losses) == 2 and rec.run is learn # what it has recorded can be looked at

def test_one_that_cannot_come_in_lets_none_in():
    learn = make(Recorder())
    rec = learn.recorder
    for cbs, says in (([AvgStatsCallback(), Recorder], 'cb_funcs'), ([AvgStatsCallback(), rec], 'same Recorder is given twice'),
                      ([ParamScheduler('lr', sched_lin(1, 0)), TrainEvalCallback()], 'TrainEvalCallback already')):
        with pytest.raises((TypeError, ValueError), match=says): learn.fit(1, cbs)
        assert names(learn) == ['recorder', 'train_eval'] and rec in learn.cbs

def test_a_list_and_a_generator_of_callbacks_stay_usable():
    learn, cbs = make(), [Recorder()]
    learn.fit(1, cbs)
    assert len(cbs) == 1
    learn.fit(1, (cb for cb in cbs))
    assert names(learn) == ['train_eval']

def test_one_that_leaves_by_itself_is_no_error():
    class Leaves(Callback):
        def after_epoch(self): self.run.remove_cbs(self)
    learn = make()
    learn.fit(1, Leaves())
    assert names(learn) == ['train_eval']

def test_one_that_is_added_within_a_fit_stays_and_works_from_the_next_on():
    learn, rec = make(), Recorder()
    class Adds(Callback):
        def begin_epoch(self): self.run.add_cbs(rec)
    learn.fit(1, Adds())
    assert rec.losses == [] and names(learn) == ['recorder', 'train_eval']
    learn.fit(1)
    assert len(rec.losses) == 2

def test_with_cbs_for_several_fits():
    learn, rec = make(), Recorder()
    with learn.with_cbs(rec) as l:
        assert l is learn
        learn.fit(1); learn.fit(1)
        assert len(learn.recorder.losses) == 2
    assert names(learn) == ['train_eval']

@pytest.mark.parametrize('what', ['instance', 'class', 'name'])
def test_removing(what):
    learn = make([Recorder(), AvgStatsCallback(), Recorder()])
    first = learn.recorder
    learn.remove_cbs({'instance': first, 'class': Recorder, 'name': 'recorder'}[what])
    assert names(learn) == ['avg_stats', *(['recorder_2'] if what != 'class' else []), 'train_eval']
    assert first not in learn.cbs and not hasattr(learn, 'recorder')
    learn.add_cbs(Recorder())
    learn.fit(1)
    assert len(learn.recorder.losses) == 2 and len(first.losses) == 0

@pytest.mark.parametrize('what, named', [('recorder', "'recorder'"), (Recorder, 'Recorder'), ('model', "'model'"), ('lr', "'lr'"), (7, '7')])
def test_removing_one_that_is_not_there(what, named):
    learn = make(AvgStatsCallback())
    with pytest.raises(ValueError, match=f'{named} is not among the callbacks; they are avg_stats, train_eval'): learn.remove_cbs(['avg_stats', what])
    assert names(learn) == ['avg_stats', 'train_eval'] # all or none
    with pytest.raises(ValueError, match='Recorder object.* is not among'): learn.remove_cbs(Recorder())

def test_mode_and_counting_can_be_replaced_but_not_missed():
    class Mine(TrainEvalCallback): pass
    learn = make()
    learn.remove_cbs(TrainEvalCallback)
    with pytest.raises(ValueError, match='TrainEvalCallback'): learn.fit(1)
    learn.add_cbs(Mine())
    learn.fit(1)
    assert learn.n_iter == 2

@pytest.mark.parametrize('name', ['Model', 'Fit', 'Opt', 'Lr', 'LossFunc', 'Data', 'Validate', 'GetPreds', 'Predict', 'Splitter', 'Learn', 'InTrain', 'OptFunc', 'Cbs',
                                  'Logger', 'Summary', 'WithCbs', 'Xb', 'NIter'])
def test_a_callback_named_as_an_attribute_is_refused(name):
    cb = type(name, (Callback,), {})()
    with pytest.raises(ValueError, match=f'{name} cannot be called .* an attribute of Learner'): make(cb)
    learn = make()
    with pytest.raises(ValueError, match=f'{name} cannot be called'): learn.fit(1, cb)
    learn.fit(1)

def test_classes_and_instances():
    with pytest.raises(TypeError, match='Recorder.*is no callback instance.*cb_funcs'): make([Recorder])
    with pytest.raises(TypeError, match='instance of Recorder.*give the class'): make(cb_funcs=[Recorder()])
    learn = make(Recorder(), cb_funcs=[partial(AvgStatsCallback, accuracy)])
    assert names(learn) == ['avg_stats', 'recorder', 'train_eval']

def test_attributes_that_nobody_has_are_named():
    learn = make(Recorder())
    with pytest.raises(AttributeError, match="'Learner' object has no attribute 'lss'"): learn.lss
    with pytest.raises(AttributeError, match="neither Recorder nor its Learner has 'lss'"): learn.recorder.lss
    class Slip(Callback):
        def begin_batch(self): self.lss
    with pytest.raises(AttributeError, match="neither Slip nor its Learner has 'lss'") as e: learn.fit(1, Slip())
    assert e.value.__notes__ == ['raised by Slip in begin_batch']
    with pytest.raises(AttributeError, match="neither Slip nor its _Validation has 'lss'"):
        with learn.with_cbs(Slip()): learn.validate()

def test_an_optimizer_that_cannot_be_made_tells_its_own_error():
    class Asks(Callback):
        def begin_fit(self): self.opt
    def broken(params, lr): raise AttributeError('nothing like this')
    with pytest.raises(AttributeError, match='nothing like this'): make(opt_func=broken).fit(1)
    learn = make(Asks(), opt_func=broken)
    with pytest.raises(AttributeError, match='nothing like this'): learn.asks.opt


# --- bad input -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('change, exc, says', [
    (dict(model=SimpleNamespace()), TypeError, r'model: SimpleNamespace is no nn.Module; the order is Learner\(model, data, loss_func\)'),
    (dict(data=[1]), TypeError, 'data: list has no train_dl, valid_dl: give a DataBunch'),
    (dict(data=SimpleNamespace(train_dl=[])), TypeError, 'data: SimpleNamespace has no valid_dl: .*may be None'),
    (dict(loss_func=nn.CrossEntropyLoss), TypeError, r'loss_func: CrossEntropyLoss is a class: give an instance, CrossEntropyLoss\(\)'),
    (dict(loss_func='mse'), TypeError, 'loss_func: str is no function'),
    (dict(opt_func=None), TypeError, 'opt_func: NoneType is no function: give what makes an optimizer'),
    (dict(opt_func=torch.optim.SGD([torch.zeros(1)])), TypeError, 'opt_func: SGD is no function')])
def test_parts_that_are_none(change, exc, says):
    parts = dict(model=Net(), data=SimpleNamespace(train_dl=batches(1), valid_dl=None), loss_func=F.cross_entropy) | change
    with pytest.raises(exc, match=says): Learner(**parts)

def test_an_empty_training_set():
    with pytest.raises(ValueError, match='train_dl has no batch'): make(n_train=0).fit(1)

@pytest.mark.parametrize('yb, says', [(torch.zeros(4, 1).long(), 'yb 4x1 int64'), (torch.zeros(3).long(), 'yb 3 int64'), (torch.zeros(4), 'yb 4 float32')])
def test_a_target_of_the_wrong_shape_is_told_with_its_batch(yb, says):
    good = batches(1)[0]
    learn = make(data=SimpleNamespace(train_dl=[good, (good[0], yb)], valid_dl=None))
    with pytest.raises(Exception) as e: learn.fit(1)
    assert e.value.__notes__ == [f'in training, epoch 0, batch 1: xb 4x3 float32, {says}, pred 4x2 float32']
    learn = make(data=SimpleNamespace(train_dl=[good], valid_dl=[(good[0], yb)]))
    for f in (partial(learn.fit, 1), learn.validate):
        with pytest.raises(Exception) as e: f()
        assert e.value.__notes__ == [f'in validation, epoch 0, batch 0: xb 4x3 float32, {says}, pred 4x2 float32']

def test_a_model_that_fails_is_told_with_its_batch():
    learn = make(data=SimpleNamespace(train_dl=[(torch.zeros(4, 5), torch.zeros(4).long())], valid_dl=None))
    with pytest.raises(RuntimeError) as e: learn.fit(1)
    assert e.value.__notes__ == ['in training, epoch 0, batch 0: xb 4x5 float32, yb 4 int64']

def test_a_nan_loss_is_shown_and_ends_nothing():
    learn = make([AvgStatsCallback(), Recorder()], loss_func=lambda pred, yb: F.cross_entropy(pred, yb)*math.nan)
    learn.fit(1)
    assert learn.rows[1][1:3] == ['nan', 'nan'] and all(map(math.isnan, learn.recorder.losses))


# --- after an interrupt --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('event', ['begin_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step', 'after_batch'])
@pytest.mark.parametrize('in_train', [True, False])
def test_an_interrupt_holds_no_batch_on_the_device(event, in_train):
    "As long as the traceback is there, as a notebook keeps it, what the batch has made lives no longer: inputs that a callback has made, predictions, gradients."
    import weakref
    if event in ('after_backward', 'after_step') and not in_train: return
    refs, raiser = [], Raiser(event, KeyboardInterrupt(), in_train)
    raiser._order = 60
    class Look(Callback):
        _order = 50
        def note(self, *os): refs.extend(weakref.ref(o) for o in os) if self.in_train == in_train else None
        def begin_batch(self): self.note(self.xb)
        def after_pred(self): self.note(self.pred)
        def after_loss(self): self.note(self.loss)
    learn = make([BatchTransformXCallback(lambda x: x+1), AvgStatsCallback(accuracy), Recorder(), Look()])
    with pytest.raises(KeyboardInterrupt) as kept: learn.fit(1, raiser)
    n = ['begin_batch', 'after_pred', 'after_loss'].index(event)+1 if event in ('begin_batch', 'after_pred', 'after_loss') else 3
    assert len(refs) == n and kept.value.__traceback__ is not None
    assert [i for i, r in enumerate(refs) if r() is not None] == []
    assert learn.loss is None or learn.loss.grad_fn is None
    assert all(p.grad is None for p in learn.model.parameters())
    learn.fit(1)


# --- copies --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy', 'pickle'])
@pytest.mark.parametrize('fits', [0, 1])
@pytest.mark.parametrize('opt_func', [SGD, sgd_opt, sgd_mom_opt], ids=['SGD', 'sgd_opt', 'sgd_mom_opt'])
def test_a_copy_trains_as_the_original_and_apart_from_it(duplicate, fits, opt_func):
    learn = Learner(Net(), SimpleNamespace(train_dl=batches(3), valid_dl=batches(1)), F.cross_entropy, opt_func=opt_func,
                    cbs=[Recorder(), AvgStatsCallback(accuracy), BatchTransformXCallback(torch.neg)])
    learn.fit(fits)
    before = copy.deepcopy(dict(learn.model.state_dict()))
    other = duplicate(learn)
    assert names(other) == names(learn) and all(cb.run is other for cb in other.cbs) and all(cb.run is learn for cb in learn.cbs)
    assert other.recorder is next(cb for cb in other.cbs if isinstance(cb, Recorder)) is not learn.recorder
    torch.manual_seed(3); other.fit(2)
    assert same(before, dict(learn.model.state_dict()))
    torch.manual_seed(3); learn.fit(2)
    assert same(dict(other.model.state_dict()), dict(learn.model.state_dict())) and same(other.opt.state_dict(), learn.opt.state_dict())
    assert other.recorder.losses == learn.recorder.losses

def test_a_copy_made_within_a_fit_is_not_in_the_middle_of_one():
    class Copies(Callback):
        def after_loss(self): self.made = copy.deepcopy(self.run)
    learn = make()
    learn.fit(1, (cb := Copies()))
    assert cb.made.pred is None and not cb.made.in_train
    cb.made.remove_cbs('copies')
    cb.made.fit(1)
    assert cb.made.n_iter == 2

def test_a_shallow_copy_leaves_the_callbacks_to_the_original():
    learn = make(Recorder())
    other = copy.copy(learn)
    other.add_cbs(AvgStatsCallback())
    assert learn.recorder.run is learn and names(learn) == ['recorder', 'train_eval'] and len(learn.cbs) == 2


# --- validate and get_preds ----------------------------------------------------------------------------------------------------------

class Drops(nn.Module):
    "BatchNorm, dropout, and draws from all generators in whatever mode."
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        self.layers[2].eval()
    def forward(self, x):
        random.random(); torch.rand(1)
        return self.layers(x)

def image_bunch(n=30, bs=4, **kw):
    from dl2lib.datablock import get_dls, Dataset as Pairs
    g = torch.Generator().manual_seed(3)
    x, y = torch.randint(0, 256, (n, 3, 6, 6), generator=g, dtype=torch.uint8), torch.randint(0, 5, (n,), generator=g)
    return DataBunch(*get_dls(Pairs(x, y), Pairs(x[:11], y[:11]), bs, seed=1, **kw), 3, 5), x, y

def on_images(**kw):
    data, x, y = image_bunch(**kw)
    torch.manual_seed(0)
    learn = quiet(Learner(Drops(), data, F.cross_entropy, cbs=[AvgStatsCallback(accuracy), Recorder(), BatchTransformXCallback(to_float), CudaCallback('cpu'), ChannelsLastCallback()]))
    return learn, x, y

def by_hand(learn, x):
    with torch.no_grad(): return copy.deepcopy(learn.model).eval()(x.float()/255)

@pytest.mark.parametrize('fits', [0, 1])
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('which', ['validate', 'get_preds', 'validate on training', 'get_preds on training', 'summary', 'interrupted'])
def test_looking_leaves_all_as_it_was(which, workers, fits, capsys):
    learn, x, y = on_images(num_workers=workers)
    learn.fit(fits)
    learn.opt
    stats, rec, rows = copy.deepcopy(learn.avg_stats.train_stats.avg_stats), list(learn.recorder.losses), list(learn.rows)
    before, state = everything(learn), {k: v for k, v in vars(learn).items() if k != '_opt'}
    if which == 'validate': learn.validate()
    if which == 'get_preds': learn.get_preds()
    if which == 'validate on training': learn.validate(learn.data.train_dl)
    if which == 'get_preds on training': learn.get_preds(learn.data.train_dl)
    if which == 'summary': learn.summary()
    if which == 'interrupted':
        learn.model.layers[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt): learn.validate()
    assert same(before, everything(learn))
    assert state == {k: v for k, v in vars(learn).items() if k != '_opt'} and all(cb.run is learn for cb in learn.cbs)
    assert repr(stats) == repr(learn.avg_stats.train_stats.avg_stats) and rec == learn.recorder.losses and rows == learn.rows

def test_fit_after_looking_is_as_if_nobody_had_looked():
    res = []
    for look in (False, True):
        learn, *_ = on_images()
        for _ in range(2):
            learn.fit(1)
            if look: learn.validate(); learn.get_preds(learn.data.train_dl); learn.validate(learn.data.train_dl)
        res.append((learn.recorder.losses, dict(learn.model.state_dict())))
    assert same(*res)

def test_validate_gives_loss_and_metrics_over_uneven_batches():
    learn, x, y = on_images()
    learn.fit(1)
    out = by_hand(learn, x[:11])
    res = learn.validate()
    assert list(res) == ['loss', 'accuracy'] and len(learn.data.valid_dl) == 2
    torch.testing.assert_close(torch.tensor(list(res.values())), torch.stack([F.cross_entropy(out, y[:11]), accuracy(out, y[:11])]))
    assert res['loss'] == learn.avg_stats.valid_stats.avg_stats[0] # what the last epoch said
    learn.remove_cbs(AvgStatsCallback)
    assert list(learn.validate()) == ['loss']

def test_validate_with_the_metrics_of_several_statistics():
    def zero(pred, yb): return 0.
    learn = make([AvgStatsCallback(accuracy), AvgStatsCallback([zero])])
    assert list(learn.validate()) == ['loss', 'accuracy', 'zero']

@pytest.mark.parametrize('workers', [0, 2])
def test_predictions_of_a_whole_loader_in_order(workers):
    learn, x, y = on_images(num_workers=workers)
    learn.fit(1)
    preds, targs = learn.get_preds()
    assert preds.device.type == targs.device.type == 'cpu' and not preds.requires_grad
    torch.testing.assert_close(preds, by_hand(learn, x[:11]))
    assert torch.equal(targs, y[:11])
    preds, targs = learn.get_preds(DataLoader(TensorDataset(x, y), 7, num_workers=workers))
    torch.testing.assert_close(preds, by_hand(learn, x))
    assert torch.equal(targs, y)

def test_predictions_need_no_target_that_the_loss_understands():
    learn, x, _ = on_images()
    preds, targs = learn.get_preds([(x[:3], torch.zeros(3, 9)), (x[3:5], torch.zeros(2, 9))])
    assert preds.shape == (5, 5) and targs.shape == (5, 9)

def test_predictions_and_targets_of_several_parts():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(3, 2)
        def forward(self, x): return self.lin(x), dict(twice=x*2)
    dl = [(torch.full((n, 3), float(n)), (torch.arange(n), [f'item {i}' for i in range(n)])) for n in (3, 2)]
    learn = Learner(Two(), SimpleNamespace(train_dl=dl, valid_dl=dl), lambda pred, yb: pred[0].sum())
    (scores, extra), (nums, texts) = learn.get_preds()
    assert scores.shape == (5, 2) and extra['twice'].tolist() == [[6.]*3]*3 + [[4.]*3]*2
    assert nums.tolist() == [0, 1, 2, 0, 1] and texts == ['item 0', 'item 1', 'item 2', 'item 0', 'item 1']

def test_what_is_kept_of_a_batch_is_its_outputs_alone():
    from dl2lib.learner import _kept
    assert _kept(torch.zeros(4, 10_000)[:, :2]).untyped_storage().nbytes() == 4*2*4 # a view does not keep what it is a view of
    t = torch.zeros(3)
    assert _kept(t).data_ptr() == t.data_ptr() # nothing is copied that need not be
    assert not _kept(torch.zeros(3).share_memory_()).is_shared() # a worker's batch would hold a file descriptor

def test_memory_while_predicting_is_bounded_by_the_outputs():
    "Of a batch of 4 MB that the model sees, 32 bytes are kept."
    import weakref
    inputs, alive = [], []
    class Loader:
        def __len__(self): return 6
        def __iter__(self):
            for _ in range(6):
                x = torch.zeros(4, 250_000)
                inputs.append(weakref.ref(x))
                yield x, torch.zeros(4).long()
                del x
                alive.append(sum(r() is not None for r in inputs))
    class Wide(nn.Module):
        def forward(self, x): return x[:, :2]
    learn = Learner(Wide(), SimpleNamespace(train_dl=[], valid_dl=Loader()), F.cross_entropy)
    preds, _ = learn.get_preds()
    assert preds.shape == (24, 2) and max(alive) <= 2 and len(alive) == 6

def test_looking_within_a_fit():
    seen = []
    class Looks(Callback):
        _order = 50
        def after_epoch(self): self.look()
        def after_backward(self): self.look()
        def look(self):
            state = {k: v for k, v in vars(self.run).items()}
            before = everything(self.run)
            seen.append((self.run.validate()['loss'], self.run.get_preds()[0].shape))
            assert same(before, everything(self.run)) and state == vars(self.run) and self.run.avg_stats.run is self.run
    res = []
    for extra in ([], [Looks()]):
        learn, *_ = on_images()
        learn.fit(2, extra)
        res.append((learn.recorder.losses, learn.rows[-1][:-1], dict(learn.model.state_dict())))
    assert same(*res) and len(seen) == 2*8+2 and seen[-1] == (learn.avg_stats.valid_stats.avg_stats[0], (11, 5))

def test_callbacks_that_prepare_batches_take_part_and_no_others():
    log = []
    class Prepares(Callback):
        def begin_fit(self): log.append('F')
        def begin_batch(self): log.append('b'); assert not self.in_train and not self.model.training and not torch.is_grad_enabled()
        def after_pred(self): log.append('p')
        def after_loss(self): log.append('l')
        def after_batch(self): log.append('n')
        def after_cancel_batch(self): log.append('x')
        def after_fit(self): log.append('f')
    class Counts(Callback):
        def begin_fit(self): log.append('wrong')
        def after_batch(self): log.append('wrong')
    learn = make([Prepares(), Counts()], n_valid=2)
    learn.validate()
    assert ''.join(log) == 'F' + 'bpln'*2 + 'f'
    log.clear()
    learn.get_preds()
    assert ''.join(log) == 'F' + 'bpxn'*2 + 'f'

def test_no_validation_set_and_no_batch():
    learn = make(n_valid=0)
    for f in (learn.validate, learn.get_preds):
        with pytest.raises(ValueError, match='data.valid_dl is None: .*give a loader'): f()
        with pytest.raises(ValueError, match='the loader has no batch'): f([])
        f(learn.data.train_dl)

def test_an_interrupt_while_callbacks_go_removes_all_of_them(interruptible, monkeypatch):
    drop = learner_mod._drop_cb
    def pressed(*args): signal.raise_signal(signal.SIGINT); drop(*args)
    monkeypatch.setattr(learner_mod, '_drop_cb', pressed)
    learn = make()
    before = list(learn.cbs)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, [Recorder(), Recorder()])
    assert learn.cbs == before and not hasattr(learn, 'recorder')

def test_an_interrupt_while_predicting_leaves_no_worker(interruptible):
    import multiprocessing, time
    learn = make(data=SimpleNamespace(train_dl=batches(1), valid_dl=DataLoader(runner_tests.Samples(17, runner_tests.interrupt_parent), batch_size=4, num_workers=2)))
    before = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt): learn.get_preds()
    end = time.time()+5
    while (left := set(multiprocessing.active_children())-before) and time.time() < end: time.sleep(0.05)
    assert not left and learn.model.training
    learn.data.valid_dl = None # it would interrupt again
    learn.fit(1)

def test_get_batch_and_summary(capsys):
    learn, x, _ = on_images()
    xb, _ = get_batch(learn.data.valid_dl, learn)
    torch.testing.assert_close(xb.contiguous(), x[:8].float()/255)
    learn.summary()
    out = capsys.readouterr().out
    assert 'Conv2d' not in out and 'Sequential' in out and '1x5' not in out and '8x5' in out
    learn.summary(find_all=True)
    assert 'Conv2d' in capsys.readouterr().out


# --- predict -------------------------------------------------------------------------------------------------------------------------

COLOURS = dict(blue=(20, 40, 220), green=(30, 200, 40), red=(220, 30, 30))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('colours')
    g = random.Random(0)
    for split, n in (('train', 8), ('valid', 3)):
        for name, rgb in COLOURS.items():
            (path/split/name).mkdir(parents=True)
            for i in range(n):
                PIL_Image.new('RGB', (12+g.randrange(6), 12), tuple(min(255, c+g.randrange(25)) for c in rgb)).save(path/split/name/f'{i}.png')
    return path

class Mean(nn.Module):
    "Scores from the mean colour: linear."
    def __init__(self, c_out): super().__init__(); self.lin = nn.Linear(3, c_out)
    def forward(self, x): return self.lin(x.mean((2, 3)))

def colours(folder, tfms=(make_rgb, ResizeFixed(8), to_byte_tensor), proc_y=None, f=parent_labeler):
    il = ImageList.from_files(folder, tfms=list(tfms))
    sd = SplitData.split_by_func(il, lambda fn: fn.parent.parent.name == 'valid')
    return label_by_func(sd, f, proc_y=proc_y or CategoryProcessor()).to_databunch(4, c_in=3, seed=0)

def trained(data, loss_func=F.cross_entropy, **kw):
    torch.manual_seed(0)
    learn = quiet(Learner(Mean(data.c_out), data, loss_func, lr=0.5, opt_func=SGD, cbs=BatchTransformXCallback(to_float), **kw))
    learn.fit(30)
    return learn

@pytest.fixture(scope='module')
def by_colour(folder): return trained(colours(folder))

def test_predict_a_file_an_image_and_a_tensor(folder, by_colour):
    learn = by_colour
    preds, targs = learn.get_preds()
    assert (preds.argmax(1) == targs).all() # it has learnt it
    for i, fn in enumerate(learn.data.valid_ds.x.items):
        before = everything(learn)
        label, idx, probs = learn.predict(fn)
        assert label == fn.parent.name and learn.data.valid_ds.proc_y.vocab[idx] == label and type(idx) is int
        torch.testing.assert_close(probs, preds[i].softmax(0))
        assert same(before, everything(learn))
        im = PIL_Image.open(fn)
        for o in (str(fn), im, im.convert('RGBA'), torch.from_numpy(pytest.importorskip('numpy').array(im)).permute(2, 0, 1)):
            res = learn.predict(o)
            assert res.label == label and res.idx == idx
            torch.testing.assert_close(res.probs, probs, atol=2e-3, rtol=0)

def test_predict_opens_as_the_data_does_and_takes_one_transformed_image(folder):
    learn = trained(colours(folder, tfms=[make_rgb, ResizeFixed(8), to_byte_tensor, to_float_tensor]))
    learn.remove_cbs(BatchTransformXCallback)
    fn = learn.data.valid_ds.x.items[-1]
    opened = []
    learn.data.valid_ds.x.decoder = lambda fn: (opened.append(fn), PIL_Image.open(fn))[1]
    assert learn.predict(fn).label == 'red' and opened == [fn]

def test_predict_without_a_validation_set_uses_the_training_lists_transforms(folder, by_colour):
    learn = copy.copy(by_colour)
    learn.data = DataBunch(by_colour.data.train_dl, None, 3, 3)
    assert learn.predict(folder/'valid'/'green'/'0.png').label == 'green'

def test_predict_opens_a_file_that_a_cache_does_not_know(folder, by_colour):
    class Cached(ItemList): # as dl2lib.datacache's: it has its own items alone
        def get(self, o): raise AssertionError('not in the cache')
    learn = copy.copy(by_colour)
    ds = copy.copy(learn.data.valid_ds)
    ds.x = Cached(ds.x.items)
    ds.x.uncached = learn.data.valid_ds.x
    learn.data = SimpleNamespace(train_dl=[], valid_dl=[], valid_ds=ds)
    assert learn.predict(folder/'train'/'blue'/'0.png').label == 'blue'

def test_predict_with_several_labels(folder):
    def words(fn): return [fn.parent.name, *(['warm'] if fn.parent.name == 'red' else ['cold'] if fn.parent.name == 'blue' else [])]
    learn = trained(colours(folder, proc_y=MultiCategoryProcessor(), f=words), loss_func=F.binary_cross_entropy_with_logits)
    learn.fit(60)
    label, idx, probs = learn.predict(folder/'valid'/'red'/'0.png')
    assert label == ['red', 'warm'] and [learn.data.valid_ds.proc_y.vocab[i] for i in idx] == label
    torch.testing.assert_close(probs, learn.get_preds()[0][-3].sigmoid())

def test_predict_refuses_what_it_cannot_read(folder, by_colour, tmp_path):
    learn, text = by_colour, tmp_path/'notes.jpg'
    text.write_text('no picture')
    with pytest.raises(ImageFileError, match='notes.jpg cannot be read as an image'): learn.predict(text)
    with pytest.raises(ImageFileError, match='absent.png'): learn.predict(tmp_path/'absent.png')
    with pytest.raises(ImageFileError, match=f'{tmp_path.name} cannot be read as an image'): learn.predict(tmp_path)
    for o in (None, 3, [text], b'bytes'):
        with pytest.raises(TypeError, match=f'a path, a PIL image or a tensor .*not {type(o).__name__}'): learn.predict(o)
    with pytest.raises(ValueError, match='4x3x8x8|4, 3, 8, 8'): learn.predict(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    assert learn.predict(folder/'valid'/'red'/'0.png').label == 'red'

def test_predict_needs_a_vocabulary():
    with pytest.raises(TypeError, match=r'data from a data block.*get_preds\(dl\)'): make().predict(torch.zeros(3))
    with pytest.raises(TypeError, match='data from a data block'): on_images()[0].predict(torch.zeros(3, 6, 6))

def test_a_class_beyond_the_vocabulary_is_named(folder):
    data = colours(folder)
    learn = Learner(Mean(5), data, F.cross_entropy, cbs=BatchTransformXCallback(to_float))
    with torch.no_grad(): learn.model.lin.bias[4] = 100.
    with pytest.raises(IndexError, match='class 4 is none of the 3'): learn.predict(folder/'valid'/'red'/'0.png')


# --- get_learner ---------------------------------------------------------------------------------------------------------------------

def test_get_learner():
    data, *_ = image_bunch()
    torch.manual_seed(5)
    learn = quiet(get_learner([8, 8], data, 0.3, conv_layer, cb_funcs=[partial(AvgStatsCallback, accuracy), partial(BatchTransformXCallback, to_float)], leak=0.1))
    assert learn.loss_func is F.cross_entropy and learn.lr == 0.3 and learn.opt.param_groups[0]['lr'] == 0.3 and learn.model[0][1].leak == 0.1
    from dl2lib.convnet import get_learn_run
    torch.manual_seed(5)
    bundle, _ = get_learn_run([8, 8], data, 0.3, conv_layer, leak=0.1)
    assert same(dict(bundle.model.state_dict()), dict(learn.model.state_dict())) # built and initialized alike
    learn.fit(1)
    learn = get_learner([8], data, 0.3, conv_layer, loss_func=nn.CrossEntropyLoss(), opt_func=SGD)
    assert learn.opt.param_groups[0]['momentum'] == 0.9


# --- CUDA ----------------------------------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')

@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize('first', ['opt', 'fit', 'validate'])
def test_on_cuda_the_optimizer_knows_the_weights_that_were_moved(first):
    learn, x, y = on_images()
    learn.remove_cbs(CudaCallback)
    learn.add_cbs(CudaCallback())
    if first == 'opt': learn.opt
    if first == 'validate': learn.validate()
    before = {k: v.detach().cpu().clone() for k, v in learn.model.named_parameters()}
    learn.fit(1)
    for n, p in learn.model.named_parameters(): assert p.device.type == 'cuda' and not torch.equal(p.cpu(), before[n]), n
    preds, targs = learn.get_preds()
    assert preds.device.type == targs.device.type == 'cpu' and preds.shape == (11, 5)

@pytest.mark.cuda
@needs_cuda
def test_on_cuda_a_fit_waits_for_nothing_in_a_training_batch():
    learn, *_ = on_images()
    learn.remove_cbs([CudaCallback, AvgStatsCallback])
    learn.add_cbs([CudaCallback(), AvgStatsCallback(accuracy), ParamScheduler('lr', sched_lin(0.1, 0.01))])
    learn.fit(1) # what CUDA sets up once
    learn.fit(2, runner_tests.NoWaiting())
    assert len(learn.recorder.losses) == 16
