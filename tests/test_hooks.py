"""Proves that hooks see what torch computes, against numpy; that they let go after every kind of error; that `find_modules`
finds what an independent walk finds, in models of any shape; and that ActivationStats counts right, changes nothing, waits for
no device (shown on a simulated CUDA device too), and draws what it counted."""
import copy, gc, math, pickle, random, signal, weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from matplotlib.colors import LogNorm
from test_callbacks import Watch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dl2lib import hooks
from dl2lib.callbacks import Callback, CancelBatchException, CancelEpochException, CancelTrainException, Recorder
from dl2lib.convnet import ConvLayer, GeneralRelu
from dl2lib.hooks import ActivationStats, Hook, Hooks, append_stat, append_stats, children, find_modules, is_act_layer, is_lin_layer
from dl2lib.runner import get_runner


def n_hooks(model): return sum(len(m._forward_hooks) for m in model.modules())

def small_net(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2))

class Boom(Exception): pass

class Raises(nn.Module):
    def forward(self, x): raise Boom('in forward')


# find_modules

def random_tree(rng, depth, shared):
    "A module of random shape; now and then a part of it is a module of `shared`."
    if depth == 0 or rng.random() < .25: return rng.choice(LEAVES)()
    parts = [rng.choice(shared) if shared and rng.random() < .2 else random_tree(rng, depth-1, shared) for _ in range(rng.randint(0, 4))]
    shared += parts
    return rng.choice([nn.Sequential, lambda *ms: nn.ModuleList(ms)])(*parts)

LEAVES = [lambda: nn.Linear(1, 1), nn.ReLU, lambda: nn.Conv1d(1, 1, 1), lambda: nn.Dropout(.1)]

def walk(m, cond):
    "The same search without recursion: a stack of modules, the next one on top. A parent names each of its parts once."
    found, stack = [], [m]
    while stack:
        o = stack.pop()
        if cond(o): found.append(o)
        else: stack += reversed(list({id(c): c for c in o._modules.values() if c is not None}.values()))
    return found

CONDITIONS = dict(linear=is_lin_layer, relu=lambda o: isinstance(o, nn.ReLU), sequential=lambda o: isinstance(o, nn.Sequential),
                  all=lambda o: True, none=lambda o: False, big=lambda o: len(list(o.children())) >= 3)

@pytest.mark.parametrize('cond', CONDITIONS.values(), ids=CONDITIONS)
def test_find_modules_finds_what_an_independent_walk_finds(cond):
    rng, n = random.Random(0), 0
    for _ in range(100):
        tree = random_tree(rng, 5, [])
        found, expected = find_modules(tree, cond), walk(tree, cond)
        assert len(found) == len(expected) and all(a is b for a, b in zip(found, expected))
        n += len(found)
    assert n == 0 if cond is CONDITIONS['none'] else n > 50   # the trees have what is looked for

def test_find_modules_lists_a_shared_module_as_often_as_it_is_reached():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared), nn.Sequential(shared))
    found = find_modules(model, is_lin_layer)
    assert len(found) == 3 and all(m is shared for m in found)

def test_find_modules_looks_for_nothing_below_what_it_found():
    inner = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)))
    model = nn.Sequential(inner, nn.Linear(1, 1))
    asked = []
    found = find_modules(model, lambda o: asked.append(o) or o is inner)
    assert found == [inner]
    assert asked == [model, inner, model[1]]

def test_find_modules_of_a_deep_tree():
    model = nn.Linear(1, 1)
    for _ in range(200): model = nn.Sequential(nn.ReLU(), model)
    assert len(find_modules(model, lambda o: isinstance(o, nn.ReLU))) == 200
    assert len(find_modules(model, is_lin_layer)) == 1

def test_children_are_the_direct_parts():
    net = small_net()
    assert children(net) == [net[0], net[1], net[2], net[3]]
    assert children(nn.ReLU()) == []


@pytest.mark.parametrize('m,expected', [
    (nn.Linear(1, 1), True), (nn.Conv1d(1, 1, 1), True), (nn.Conv2d(1, 1, 1), True), (nn.Conv3d(1, 1, 1), True),
    (nn.ConvTranspose2d(1, 1, 1), True), (type('MyConv', (nn.Conv2d,), {})(1, 1, 1), True),
    (nn.ReLU(), False), (nn.BatchNorm2d(1), False), (nn.Embedding(2, 2), False), (nn.Sequential(nn.Linear(1, 1)), False)])
def test_is_lin_layer(m, expected): assert is_lin_layer(m) is expected


# Hook

def test_a_hook_gets_itself_the_module_its_inputs_and_its_output():
    net, x, calls = small_net(), torch.randn(3, 4), []
    with Hook(net[1], lambda *args: calls.append(args)) as hook: out = net(x)
    (h, m, inp, o), = calls
    assert h is hook and m is net[1] and isinstance(inp, tuple) and len(inp) == 1
    torch.testing.assert_close(inp[0], net[0](x), rtol=0, atol=0)
    torch.testing.assert_close(o, net[0](x).relu(), rtol=0, atol=0)
    torch.testing.assert_close(net(x), out, rtol=0, atol=0)

def test_what_a_hook_returns_replaces_the_output():
    net, x = small_net(), torch.randn(3, 4)
    with Hook(net[3], lambda hook, m, inp, out: out*2): doubled = net(x)
    torch.testing.assert_close(doubled, net(x)*2, rtol=0, atol=0)

def test_hooks_on_one_module_are_called_in_the_order_they_were_made():
    relu = nn.ReLU()
    with Hook(relu, append_stat) as before, Hook(relu, lambda hook, m, inp, out: out*2), Hook(relu, append_stat) as after:
        relu(torch.ones(2, 2))
    assert (before.mean, after.mean) == (1., 2.)

def test_a_hook_is_removed_by_hand_and_twice_does_no_harm():
    net, calls = small_net(), []
    hook, other = Hook(net[0], lambda *a: calls.append('ours')), Hook(net[0], lambda *a: calls.append('other'))
    hook.remove(); hook.remove()
    net(torch.randn(1, 4))
    assert calls == ['other'] and n_hooks(net) == 1
    other.remove()

@pytest.mark.parametrize('bad', [3, 'layer', None, nn.Linear, torch.zeros(2)], ids=repr)
def test_a_hook_on_no_module_is_refused_by_name(bad):
    with pytest.raises(TypeError, match=f'not on {type(bad).__name__}'): Hook(bad, append_stat)

@pytest.mark.parametrize('m', [nn.ModuleList([nn.ReLU()]), nn.ModuleDict(dict(a=nn.ReLU()))], ids=['list', 'dict'])
def test_a_hook_that_would_never_be_called_is_refused(m):
    with pytest.raises(TypeError, match=f'{type(m).__name__} is never called.*hook its members'): Hook(m, append_stat)
    assert n_hooks(m) == 0

def test_a_hook_function_that_cannot_be_called_is_refused_at_once():
    net = small_net()
    with pytest.raises(TypeError, match='callable'): Hooks(net, None)
    assert n_hooks(net) == 0


# Letting go

def in_forward(net): net(torch.randn(2, 3))                      # of the wrong width
def in_body(net): raise Boom('in the body')
def in_base(net): raise KeyboardInterrupt
FAULTS = [(in_forward, RuntimeError), (in_body, Boom), (in_base, KeyboardInterrupt)]

@pytest.mark.parametrize('fault,error', FAULTS, ids=lambda o: o.__name__)
def test_hooks_are_gone_after_an_error(fault, error):
    net = small_net()
    with pytest.raises(error), Hooks(find_modules(net, is_lin_layer), append_stat) as hooks:
        assert (len(hooks), n_hooks(net)) == (3, 3)
        fault(net)
    assert n_hooks(net) == 0
    with pytest.raises(error), Hook(net[1], append_stat): fault(net)
    assert n_hooks(net) == 0

def test_hooks_are_gone_after_a_layer_raised_or_a_hook_function_did():
    net = nn.Sequential(nn.Linear(4, 4), Raises())
    with pytest.raises(Boom, match='in forward'), Hooks(net, append_stat) as hooks: net(torch.randn(2, 4))
    assert hooks[0].std > 0 and n_hooks(net) == 0               # the layer before it was seen
    def f(*args): raise Boom('in a hook')
    net = small_net()
    with pytest.raises(Boom, match='in a hook'), Hooks(net, f): net(torch.randn(2, 4))
    assert n_hooks(net) == 0

@pytest.mark.parametrize('bad', [3, None, 'x', nn.ModuleList()], ids=repr)
@pytest.mark.parametrize('at', [0, 1, 3])
def test_no_hook_is_left_when_one_of_the_modules_is_none(bad, at):
    net = small_net()
    ms = children(net); ms.insert(at, bad)
    with pytest.raises(TypeError, match='hook'): Hooks(ms, append_stat)
    assert n_hooks(net) == 0

def test_no_hook_is_left_when_the_modules_come_from_something_that_raises():
    net = small_net()
    def modules():
        yield net[0]
        raise Boom('half way')
    with pytest.raises(Boom): Hooks(modules(), append_stat)
    assert n_hooks(net) == 0

def test_other_hooks_stay():
    net, calls = small_net(), []
    handle = net[0].register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(RuntimeError), Hooks(net, append_stat): net(torch.randn(2, 3))
    net(torch.randn(2, 4))
    assert calls == [1] and n_hooks(net) == 1
    handle.remove()

def test_a_removed_hook_keeps_no_activation_alive():
    net, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), []
    def f(hook, m, inp, out): append_stats(hook, m, inp, out); seen.append(weakref.ref(out))
    with Hooks(net, f) as hooks: net(torch.randn(2, 4))
    gc.collect()
    assert len(seen) == 2 and not any(r() is not None for r in seen)
    assert all(len(h.stats[0]) == 1 for h in hooks)


# Hooks as a list

def module_dict(*ms): return nn.ModuleDict({str(i): m for i, m in enumerate(ms)})

@pytest.mark.parametrize('container', [nn.Sequential, lambda *ms: nn.ModuleList(ms), module_dict], ids=['Sequential', 'ModuleList', 'ModuleDict'])
def test_a_container_stands_for_its_members(container):
    ms = [nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)]
    model = container(*ms)
    with Hooks(model, append_stat) as hooks:
        assert len(hooks) == 3 and [len(m._forward_hooks) for m in ms] == [1, 1, 1] and not model._forward_hooks
    assert n_hooks(model) == 0

def test_another_module_stands_for_itself_and_generators_and_none_are_taken():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(2, 2)
        def forward(self, x): return self.l(x)
    net = Net()
    with Hooks(net, append_stat) as hooks: assert len(hooks) == 1 and len(net._forward_hooks) == 1
    with Hooks((m for m in [net.l]), append_stat) as hooks: assert len(net.l._forward_hooks) == 1
    with Hooks(None, append_stat) as hooks: assert len(hooks) == 0
    assert n_hooks(net) == 0

def test_hooks_are_indexed_in_order_and_what_is_deleted_is_removed():
    net, order = small_net(), []
    with Hooks(net, lambda hook, m, inp, out: order.append(hook)) as hooks:
        net(torch.randn(1, 4))
        assert order == list(hooks) and hooks[1] is order[1] and hooks[[0, 2]] == [order[0], order[2]] and len(hooks) == 4
        del hooks[0]
        assert not net[0]._forward_hooks and hooks[0] is order[1]
        del hooks[1:]
        assert n_hooks(net) == 1 and len(hooks) == 1 and net[1]._forward_hooks
        with pytest.raises(IndexError): del hooks[7]
        with pytest.raises(TypeError): del hooks[[0]]              # not a way to delete: nothing is removed half
        assert n_hooks(net) == 1
    assert n_hooks(net) == 0


# Statistics

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize('shape', [(7,), (5, 3), (4, 3, 6, 5)], ids=str)
def test_append_stat_against_numpy(dtype, shape):
    tol = 1e-12 if dtype == torch.float64 else 1e-5
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)*3 + 1).to(dtype)
    identity, a = nn.Identity(), x.double().numpy()
    with Hook(identity, append_stat) as hook: assert identity(x) is x
    assert type(hook.mean) is float and type(hook.std) is float
    np.testing.assert_allclose([hook.mean, hook.std], [a.mean(), a.std(ddof=1)], rtol=tol, atol=tol)

def test_append_stat_of_half_precision_neither_overflows_nor_rounds():
    identity, x = nn.Identity(), torch.full((1000, 1000), 60_000.).half()
    x[::2] = 60_032.
    with Hook(identity, append_stat) as hook: identity(x)
    np.testing.assert_allclose([hook.mean, hook.std], [60_016, 16], rtol=1e-4)

def test_append_stat_in_double_precision_keeps_its_range():
    identity = nn.Identity()
    with Hook(identity, append_stat) as hook: identity(torch.tensor([1e200, 3e200], dtype=torch.float64)*1e-100)
    np.testing.assert_allclose(hook.mean, 2e100)

def test_append_stat_leaves_gradients_and_outputs_as_they_are():
    net, x = small_net(), torch.randn(5, 4)
    def grads():
        net.zero_grad(); net(x).square().sum().backward()
        return [p.grad.clone() for p in net.parameters()]
    plain = grads()
    with Hooks(find_modules(net, lambda o: not children(o)), append_stat): hooked = grads()
    assert all(torch.equal(a, b) for a, b in zip(plain, hooked))

def test_append_stat_names_a_layer_without_a_tensor():
    lstm = nn.LSTM(2, 3)
    with pytest.raises(TypeError, match='append_stat: LSTM gives a tuple: hook a module'), Hook(lstm, append_stat): lstm(torch.randn(4, 1, 2))
    assert n_hooks(lstm) == 0

def test_append_stats_has_a_number_a_pass():
    identity, xs = nn.Identity(), [torch.randn(10)*i for i in range(1, 6)]
    with Hook(identity, append_stats) as hook:
        for x in xs: identity(x)
    means, stds = hook.stats
    np.testing.assert_allclose(means, [x.double().mean() for x in xs], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stds, [x.double().std() for x in xs], rtol=1e-5)
    with Hook(identity, append_stats) as other: identity(xs[0])
    assert len(other.stats[0]) == 1 and len(means) == 5           # each hook has lists of its own


# is_act_layer

@pytest.mark.parametrize('m,expected', [
    *[(m, True) for m in (nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Hardswish(), nn.GLU(), GeneralRelu(sub=.4))],
    *[(type(n, (nn.Module,), {})(), True) for n in ('QuickGELU', 'MyRelu6', 'NewGELUActivation', 'SwiGLU', 'Swish')],
    *[(m, False) for m in (nn.Linear(1, 1), nn.Softmax(1), nn.LogSoftmax(1), nn.MultiheadAttention(2, 1), nn.BatchNorm1d(1), nn.Dropout(), ConvLayer(1, 1))],
    *[(type(n, (nn.Module,), {})(), False) for n in ('ReluBlock', 'FeatureExtract', 'Evaluation')],
    (type('ConvRelu', (nn.Sequential,), {})(nn.Conv1d(1, 1, 1), nn.ReLU()), False)], ids=lambda o: type(o).__name__)
def test_is_act_layer(m, expected): assert is_act_layer(m) is expected


# ActivationStats: what it counts

def batches(n=4, bs=6, c=4, dtype=torch.float32, seed=0, size=2.):
    g = torch.Generator().manual_seed(seed)
    return [((torch.randn(bs, c, generator=g)*size).to(dtype), torch.randint(0, 2, (bs,), generator=g)) for _ in range(n)]

def net_of(*layers, seed=0): torch.manual_seed(seed); return nn.Sequential(*(l() for l in layers))

def relu_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2))

def fit(model, dl, *cbs, epochs=1, valid=None, lr=0.1, loss_func=nn.functional.cross_entropy):
    learn, run = get_runner(model, SimpleNamespace(train_dl=dl, valid_dl=valid), lr=lr, loss_func=loss_func)
    run.add_cbs(cbs)
    run.logger = lambda row: None
    run.fit(epochs, learn)
    return run

class Keep(Callback):
    "Keeps a copy of what some modules give in each training batch, by torch's own hooks: the oracle's raw material."
    def __init__(self, *ms): self.ms, self.kept = ms, [[] for _ in ms]
    def begin_fit(self): self.handles = [m.register_forward_hook(self.keeper(l)) for m, l in zip(self.ms, self.kept)]
    def keeper(self, l):
        def keep(m, inp, out):
            if self.in_train: l.append(out.detach().clone())
        return keep
    def after_fit(self):
        for h in self.handles: h.remove()

def fp32_loss(pred, y): return nn.functional.cross_entropy(pred.float(), y)

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_statistic_against_numpy(dtype):
    model, stats = relu_net().to(dtype), ActivationStats(is_lin_layer, bins=16, hist_range=(-1, 3), near=.25)
    keep = Keep(*find_modules(model, is_lin_layer))
    fit(model, batches(dtype=dtype, size=3.), stats, keep, epochs=2, loss_func=fp32_loss)
    assert stats.layers == ['0', '2.0', '3'] and stats.batches == list(range(8)) and n_hooks(model) == 0
    outside = 0
    for i, kept in enumerate(keep.kept):
        for j, o in enumerate(kept):
            a = o.double().numpy()
            tol = dict(rtol=1e-5, atol=1e-6) if dtype != torch.float64 else dict(rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose([stats.means[i, j], stats.stds[i, j]], [a.mean(), a.std(ddof=1)], **tol)
            assert stats.near_zero[i, j] == (abs(a) < .25).sum()/a.size
            counts = [(a < -1).sum(), *np.histogram(a[(a >= -1) & (a < 3)], 16, (-1, 3))[0], (a >= 3).sum()]
            assert abs(stats.hists[i, j].numpy() - counts).sum() <= 2 and stats.hists[i, j].sum() == a.size  # 2: one number that rounding puts over an edge
            outside += counts[0] + counts[-1]
        for epoch, first in ((0, 0), (1, 4), (-1, 4), (-2, 0)):
            a = np.concatenate([o.double().numpy() for o in kept[first:first+4]])
            assert stats.dead_units(epoch)[stats.layers[i]] == [u for u in range(a.shape[1]) if len(set(a[:, u])) == 1]
    assert outside > 20 and not stats.nans.any() and not stats.infs.any() and not stats.nonfinite()

@pytest.mark.parametrize('lo,hi,bins', [(-10., 10., 80), (0., 10., 40), (-1., 1., 10), (0., .3, 3), (-7., 13., 1), (0., 1e-3, 500), (-1e6, 1e6, 10_000)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_each_number_is_counted_once(lo, hi, bins, dtype):
    g = torch.Generator().manual_seed(0)
    middles = lo + (torch.randint(-3, bins+3, (5000,), generator=g).double() + .5)*(hi-lo)/bins
    d = torch.cat([middles, torch.tensor([math.nan]*3 + [math.inf]*4 + [-math.inf]*5 + [3e38, -3e38, lo], dtype=torch.float64)]).to(dtype)
    counts, a = hooks._bin_counts(d, bins, lo, hi), d.double().numpy()
    want = np.bincount(np.clip(np.floor((middles.numpy()-lo)/(hi-lo)*bins), -1, bins).astype(int)+1, minlength=bins+3)
    want[[0, 1, bins+1, -1]] += [6, 1, 5, 3]                       # `lo` itself, a ReLU's zero, lies in the first bin
    assert counts.dtype == torch.int64 and counts.tolist() == want.tolist() and counts.sum() == len(a)

def test_counts_are_exact_beyond_what_float32_counts():
    d = torch.zeros(1).expand(2**24 + 3)
    assert hooks._bin_counts(d, 2, -1., 1.).tolist() == [0, 0, 2**24 + 3, 0, 0]

def test_a_histogram_and_the_nans_count_every_activation():
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 5, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(45, 2))
    stats = fit(model, batches(size=30.), ActivationStats(lambda m: not children(m), hist_range=(0, 1))).activation_stats
    assert stats.layers == ['0', '1', '2', '3', '4']
    assert (stats.hists.sum(-1) + stats.nans == 6*torch.tensor([4, 45, 45, 45, 2])[:, None]).all()
    assert (stats.hists[:3, :, 0] > 0).any() and (stats.hists[:3, :, -1] > 0).all()
    np.testing.assert_allclose(stats.edges, np.linspace(0, 1, 81))

def test_nan_and_infinity_are_counted_and_named_and_the_fit_goes_on():
    dl = batches(bs=5)
    dl[1][0][0, 0], dl[2][0][:2, 1], dl[3][0][4, 2] = math.nan, math.inf, -math.inf
    model = net_of(nn.Identity, lambda: nn.Linear(4, 2))
    stats = fit(model, dl, ActivationStats([model[0]]), lr=0.).activation_stats
    assert stats.nans.tolist() == [[0, 1, 0, 0]] and stats.infs.tolist() == [[0, 0, 2, 1]]
    assert stats.hists[0, 2, -1] >= 2 and stats.hists[0, 3, 0] >= 1 and stats.hists.sum(-1).tolist() == [[20, 19, 20, 20]]
    assert stats.nonfinite() == {'0': (1, 1, 3)} and '1 NaN, 3 inf from batch 1 on' in repr(stats.summary())
    assert stats.means.isnan().tolist() == [[False, True, False, False]] and stats.means[0, 2:].tolist() == [math.inf, -math.inf]
    assert stats.dead_units() == {'0': []}                          # NaN is no single number

def test_integers_single_numbers_and_empty_outputs():
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c, self.l = (*(nn.Identity() for _ in range(3)), nn.Linear(4, 2))
        def forward(self, x): self.a((x > 0).long()); self.b(x[0, 0]); self.c(x[:0]); return self.l(x)
    stats = fit(Odd(), batches(2), ActivationStats(lambda m: isinstance(m, nn.Identity))).activation_stats
    assert stats.layers == ['a', 'b'] and stats.stds[1].isnan().all() and not stats.means.isnan().any()
    assert stats.hists[0].sum().item() == 2*24 and stats.hists[1].sum().item() == 2
    assert stats.dead_units() == {'a': [], 'b': []}                 # two batches: two numbers


# Dead units

def planted(*layers, unit=3):
    model = net_of(*layers)
    with torch.no_grad(): find_modules(model, is_lin_layer)[0].bias[unit] = -1e3
    return model

@pytest.mark.parametrize('act,dead', [(nn.ReLU, True), (nn.ReLU6, True), (lambda: GeneralRelu(sub=.4), True), (nn.GELU, True), (nn.Sigmoid, True),
                                      (lambda: GeneralRelu(leak=.1), False), (nn.Identity, False)], ids='relu relu6 shifted gelu sigmoid leaky none'.split())
def test_the_planted_dead_unit_is_found_and_no_other(act, dead):
    model = planted(lambda: nn.Linear(4, 8), act, lambda: nn.Linear(8, 2))
    stats = fit(model, batches(8, bs=64), ActivationStats([model[0], model[1], model[2]]), epochs=2, lr=1e-3).activation_stats
    for epoch in (0, 1): assert stats.dead_units(epoch) == {'0': [], '1': [3]*dead, '2': []}
    assert [r[4] for r in stats.summary()] == ['0 of 8', f'{int(dead)} of 8', '0 of 2']

def test_a_dead_channel_of_images():
    model = planted(lambda: nn.Unflatten(1, (1, 2, 2)), lambda: nn.Conv2d(1, 6, 2, padding=1), nn.ReLU, nn.Flatten, lambda: nn.Linear(54, 2))
    stats = fit(model, batches(8), ActivationStats(), lr=1e-3).activation_stats
    assert stats.dead_units() == {'2': [3]}

def test_a_unit_that_wakes_up_once_in_an_epoch_is_alive():
    dl = [(-torch.ones(4, 1), torch.zeros(4).long()) for _ in range(6)]
    dl[4] = (torch.tensor([[-1.], [2.], [-1.], [-1.]]), dl[4][1])
    model = nn.Sequential(nn.ReLU(), nn.Linear(1, 2))
    assert fit(model, dl, ActivationStats(), lr=0.).activation_stats.dead_units() == {'0': []}
    assert fit(model, dl, ActivationStats(every=3), lr=0.).activation_stats.dead_units() == {'0': [0]}  # batches 0 and 3

def test_where_too_few_inputs_were_seen_nothing_is_called_dead():
    stats = fit(relu_net(), batches(1, bs=1), ActivationStats()).activation_stats
    assert stats.dead_units() == {'1': None, '2.1': None} and [r[4] for r in stats.summary()] == ['?', '?']
    assert [t.get_text() for t in stats.plot_dead_units().texts] == ['too few inputs to tell']*2

class Seq(nn.Module):
    "Gives (N, T, 6) to a ReLU, or with a convolution (N, 6, T)."
    def __init__(self, conv): super().__init__(); self.conv, self.l, self.relu, self.out = conv, nn.Conv1d(3, 6, 1) if conv else nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)
    def forward(self, x):
        x = self.relu(self.l(x.mT if self.conv else x))
        return self.out(x.mean(2 if self.conv else 1))

@pytest.mark.parametrize('conv', [False, True])
def test_units_of_sequences_are_features_also_where_lengths_differ(conv):
    g = torch.Generator().manual_seed(0)
    dl = [(torch.randn(4, t, 3, generator=g), torch.randint(0, 2, (4,), generator=g)) for t in (5, 7, 6)]
    torch.manual_seed(0)
    model = Seq(conv)
    with torch.no_grad(): model.l.bias[2] = -1e3
    assert fit(model, dl, ActivationStats()).activation_stats.dead_units() == {'relu': [2]}
    assert fit(model, dl, ActivationStats(unit_dim=1 if conv else 2)).activation_stats.dead_units() == {'relu': [2]}
    with pytest.raises(ValueError, match='relu had 5 units, and now 7 along dimension .*: give unit_dim'): fit(model, dl, ActivationStats(unit_dim=2 if conv else 1))
    with pytest.raises(ValueError, match=r'unit_dim=3, but the output of relu is of shape \(4, '): fit(model, dl, ActivationStats(unit_dim=3))
    assert n_hooks(model) == 0


# Which layers, which batches

def test_by_default_activation_functions_and_without_any_linear_layers():
    assert fit(relu_net(), batches(), ActivationStats()).activation_stats.layers == ['1', '2.1']
    class Functional(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        def forward(self, x): return self.b(self.a(x).relu())
    assert fit(Functional(), batches(), ActivationStats()).activation_stats.layers == ['a', 'b']

@pytest.mark.parametrize('modules,layers', [(is_lin_layer, ['0', '2.0', '3']), (lambda m: isinstance(m, nn.ReLU), ['1', '2.1']), (nn.ReLU, ['1', '2.1']), ([3, 0, 3], ['0', '3']), ('self', list('0123')),
                                            ('one', ['2.1']), ('root', ['Sequential'])], ids=str)
def test_modules_are_given_as_condition_list_or_container_and_come_in_the_order_of_the_forward_pass(modules, layers):
    model = relu_net()
    ms = dict(self=model, one=model[2][1], root=[model]).get(modules) if isinstance(modules, str) else [model[i] for i in modules] if isinstance(modules, list) else modules
    assert fit(model, batches(), ActivationStats(ms)).activation_stats.layers == layers

@pytest.mark.parametrize('modules,error', [([nn.ReLU()], r'ReLU\(\) is no part of the model'), ([], 'no layer of Sequential to look at'), ((lambda m: False), 'no layer of Sequential'),
                                           (['1'], "'1' is no part of the model"), (5, '5 is no part of the model')], ids=str)
def test_bad_modules_are_refused_when_the_fit_begins(modules, error):
    model = relu_net()
    with pytest.raises(ValueError, match=f'ActivationStats: {error}'): fit(model, batches(), ActivationStats(modules))
    assert n_hooks(model) == 0

@pytest.mark.parametrize('bad', [dict(bins=0), dict(bins=2.5), dict(bins=True), dict(bins=20_000), dict(every=0), dict(every=.5), dict(near=0), dict(near=-1.), dict(near='a'), dict(near=math.nan),
                                 dict(hist_range=(1, 1)), dict(hist_range=(2, -2)), dict(hist_range=(0, math.inf)), dict(hist_range=(math.nan, 1)), dict(hist_range=(0, 1, 2)), dict(hist_range=5), dict(hist_range=('a', 'b'))], ids=str)
def test_bad_arguments_are_refused_by_name(bad):
    (k, v), = bad.items()
    with pytest.raises(ValueError, match=f'ActivationStats: {k}='): ActivationStats(**bad)

def test_a_module_that_is_called_twice_has_a_record_for_each_call():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a, self.relu, self.b = nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)
        def forward(self, x): return self.b(self.relu(self.a(self.relu(x))))   # of four units, then of three
    model, dl = Twice(), batches()
    stats = fit(model, dl, ActivationStats(), lr=0.).activation_stats
    assert stats.layers == ['relu', 'relu (2)'] and stats.hists.sum(-1).tolist() == [[24]*4, [18]*4]
    for j, (x, _) in enumerate(dl):
        np.testing.assert_allclose(stats.means[:, j], [x.relu().mean(), model.a(x.relu()).relu().mean().item()], rtol=1e-5)

def test_layers_that_are_reached_now_and_then_or_never():
    class Sometimes(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c, self.l, self.n = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.Linear(4, 2), 0
        def forward(self, x):
            self.n += 1
            return self.l(self.a(x) if self.n % 2 else self.b(x))
    stats = fit(Sometimes(), batches(5), ActivationStats()).activation_stats
    assert stats.layers == ['a', 'b'] and stats.means.isnan().tolist() == [[False, True]*2 + [False], [True, False]*2 + [True]]
    assert stats.hists.sum(-1).tolist() == [[24, 0, 24, 0, 24], [0, 24, 0, 24, 0]] and 'never reached: c' in repr(stats.summary())
    for plot in PLOTS: getattr(stats, plot)()
    stats = fit(Sometimes(), batches(1), ActivationStats(), epochs=2).activation_stats
    assert stats.dead_units(0) == {'a': [], 'b': None} and stats.dead_units(1) == {'a': None, 'b': []}

@pytest.mark.parametrize('every,in_train,seen,n', [(1, True, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 6), (3, True, [0, 3, 6, 9], 6), (100, True, [0], 6), (1, False, [0, 1, 2, 3], 9), (2, False, [0, 2], 9)])
def test_every_kth_batch_of_training_or_validation(every, in_train, seen, n):
    stats = fit(relu_net(), batches(5), ActivationStats(every=every, in_train=in_train), epochs=2, valid=batches(2, bs=9)).activation_stats
    assert stats.batches == seen and (stats.hists.sum(-1) == n*8).all() and stats.means.shape == (2, len(seen))

def test_one_for_training_and_one_for_validation():
    run = fit(relu_net(), batches(5), ActivationStats(), ActivationStats(in_train=False), valid=batches(2))
    assert len(run.activation_stats.batches) == 5 and len(run.activation_stats_2.batches) == 2

def test_passes_that_are_no_batch_and_batches_that_are_cancelled():
    class Other(Callback):
        def begin_epoch(self): self.model(self.data.train_dl[0][0])
        def after_loss(self): self.model(self.xb)                   # after `after_pred`
        def after_batch(self): self.model(self.xb)
        def begin_batch(self):
            self.model(self.xb)
            if self.iter == 2: raise CancelBatchException
    stats = fit(relu_net(), batches(5), Other(), ActivationStats()).activation_stats
    assert stats.batches == [0, 1, 3, 4] and stats.layers == ['1', '2.1']

def test_what_is_computed_anew_in_the_backward_pass_is_not_looked_at():
    class Checkpointed(nn.Module):
        def __init__(self): super().__init__(); self.net = relu_net()
        def forward(self, x): return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)
    model = Checkpointed()
    model.net[0].weight.requires_grad_()
    stats = fit(model, batches(3), ActivationStats()).activation_stats
    assert stats.layers == ['net.1', 'net.2.1'] and stats.means.shape == (2, 3)

def test_with_the_cnn_of_the_next_chapter():
    from dl2lib.convnet import get_learn_run
    g = torch.Generator().manual_seed(0)
    dl = [(torch.randn(4, 3, 16, 16, generator=g), torch.randint(0, 2, (4,), generator=g)) for _ in range(3)]
    learn, run = get_learn_run([16], SimpleNamespace(train_dl=dl, valid_dl=None, c_in=3, c_out=2), 0.01, ConvLayer, cbs=[ActivationStats, Recorder])
    run.fit(1, learn)
    assert run.activation_stats.layers == ['0.relu', '1.relu', '2.relu', '3.relu'][:len(run.activation_stats.layers)] and len(run.activation_stats.layers) == 4
    assert [r[4].split(' of ')[1] for r in run.activation_stats.summary()] == ['16', '32', '64', '16']


# Whatever happens

EVENTS = 'begin_epoch begin_batch after_pred after_loss after_backward after_step after_batch begin_validate after_epoch after_fit'.split()

@pytest.mark.parametrize('error', [Boom, KeyboardInterrupt, SystemExit, CancelBatchException, CancelEpochException, CancelTrainException], ids=lambda e: e.__name__)
@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('order', [-1, 99], ids=['before', 'after'])
def test_hooks_are_gone_whatever_was_raised_and_where(error, event, order):
    class Strike(Callback):
        _order = order
        def strike(self):
            if self.n_iter >= 2 or self.epoch is None: raise error()
    setattr(Strike, event, Strike.strike)
    model, stats = relu_net(), ActivationStats()
    try: fit(model, batches(), Strike(), stats, valid=batches(1))
    except error: pass
    assert n_hooks(model) == 0 and len(stats.batches) >= 2 and torch.isfinite(stats.means[:, :2]).all()
    fit(model, batches(3), stats)
    assert n_hooks(model) == 0 and stats.batches == [0, 1, 2]

def test_hooks_are_gone_when_the_model_or_the_loss_raises_and_what_was_seen_can_be_read():
    class Fails(nn.Module):
        n = 0
        def forward(self, x):
            self.n += 1
            if self.n == 3: raise Boom('in forward')
            return x
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Fails(), nn.ReLU(), nn.Linear(4, 2))
    stats = ActivationStats()
    with pytest.raises(Boom): fit(model, batches(), stats)
    assert n_hooks(model) == 0 and stats.means.isnan().tolist() == [[False]*3, [False, False, True]]
    def loss(pred, y): raise Boom('in the loss')
    with pytest.raises(Boom): fit(relu_net(), batches(), stats, loss_func=loss)
    assert stats.batches == [0]

@pytest.mark.parametrize('out,what', [(lambda x: (x, x), 'a tuple'), (lambda x: dict(x=x), 'a dict'), (lambda x: None, 'a NoneType'), (lambda x: x.to(torch.complex64), 'complex numbers')],
                         ids=['tuple', 'dict', 'None', 'complex'])
def test_a_layer_that_gives_no_tensor_of_numbers_is_named(out, what):
    class Gives(nn.Module):
        def forward(self, x): return out(x)
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.odd, self.l = Gives(), nn.Linear(4, 2)
        def forward(self, x): self.odd(x); return self.l(x)
    model = Net()
    with pytest.raises(TypeError, match=fr'ActivationStats: odd \(Gives\) gives {what}: leave it out of `modules`'): fit(model, batches(), ActivationStats([model.odd]))
    assert n_hooks(model) == 0

def test_an_interrupt_in_the_middle_of_a_layers_statistics_leaves_what_can_be_read(monkeypatch):
    plain, n = hooks._bin_counts, []
    def interrupted(*args):
        n.append(1)
        if len(n) == 6: raise KeyboardInterrupt
        return plain(*args)
    monkeypatch.setattr(hooks, '_bin_counts', interrupted)
    model, stats = relu_net(), ActivationStats()
    with pytest.raises(KeyboardInterrupt): fit(model, batches(), stats)
    assert n_hooks(model) == 0 and stats.means.isnan().tolist() == [[False]*3, [False, False, True]] and stats.summary() and stats.dead_units()

@pytest.mark.parametrize('what', ['set', 'remove'])
def test_an_interrupt_leaves_no_hook_of_several(monkeypatch, what):
    real = hooks.Hook if what == 'set' else hooks.Hook.remove
    def pressed(*args): signal.raise_signal(signal.SIGINT); return real(*args)
    before, model = signal.signal(signal.SIGINT, signal.default_int_handler), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.ReLU())
    try:
        monkeypatch.setattr(*((hooks, 'Hook') if what == 'set' else (hooks.Hook, 'remove')), pressed)
        with pytest.raises(KeyboardInterrupt), Hooks(model, lambda *args: None): pass
        assert not any(m._forward_hooks for m in model)
    finally: signal.signal(signal.SIGINT, before)

def test_other_hooks_stay_and_the_model_is_let_go():
    model, stats, calls = relu_net(), ActivationStats(), []
    handle = model[1].register_forward_hook(lambda *args: calls.append(1))
    fit(model, batches(), stats)
    assert n_hooks(model) == 1 and len(calls) == 4
    handle.remove()
    ref = weakref.ref(model)
    stats.run.learn = None
    del model, handle
    gc.collect()
    assert ref() is None and stats.means.shape == (2, 4)             # the numbers stay

def test_a_second_fit_begins_anew_also_with_another_model():
    stats, model = ActivationStats(), relu_net()
    fit(model, batches(), stats)
    first = stats.means
    fit(nn.Sequential(nn.Linear(4, 2), nn.Tanh()), batches(2), stats)
    assert stats.layers == ['1'] and stats.means.shape == (1, 2)
    fit(relu_net(), batches(), stats)
    assert torch.equal(stats.means, first)

def test_read_before_any_batch_it_says_what_is_missing():
    for f in (lambda s: s.means, lambda s: s.hists, lambda s: s.dead_units(), lambda s: s.summary(), lambda s: s.plot_hists()):
        with pytest.raises(ValueError, match='ActivationStats has seen no batch: give it to a Runner'): f(ActivationStats())
    stats = fit(relu_net(), batches(), ActivationStats(), epochs=2).activation_stats
    for e in (2, -3):
        with pytest.raises(IndexError, match=f'epoch {e}: ActivationStats has seen 2'): stats.dead_units(e)

def test_copies_and_pickles_after_a_fit():
    stats = fit(relu_net(), batches(), ActivationStats()).activation_stats
    for o in (copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert o.run is None and torch.equal(o.means, stats.means) and torch.equal(o.hists, stats.hists) and o.dead_units() == stats.dead_units()

def test_a_copy_that_takes_part_in_another_loop_leaves_the_original_as_it_is():
    class Validates(Callback):
        "Runs a loop of its own in the middle of the fit, with copies of the callbacks, as a Learner's `validate` does."
        _order = 99
        def after_epoch(self):
            mine = self.run.activation_stats
            fit(self.model, batches(3), copy.copy(mine), lr=0.)
            assert n_hooks(self.model) == 2 and len(mine.batches) == 4*(self.epoch+1)
    stats = fit(relu_net(), batches(4), ActivationStats(), Validates(), epochs=2).activation_stats
    assert torch.equal(stats.means, fit(relu_net(), batches(4), ActivationStats(), epochs=2).activation_stats.means)

def test_it_can_be_read_in_the_middle_of_a_fit_and_goes_on():
    class Look(Callback):
        _order, seen = 99, []
        def after_batch(self): s = self.run.activation_stats; self.seen.append((s.means.shape[1], s.dead_units()))
    look = Look()
    stats = fit(relu_net(), batches(4), ActivationStats(), look, epochs=2).activation_stats
    assert [n for n, _ in look.seen] == list(range(1, 9)) and look.seen[-1][1] == stats.dead_units()
    plain = fit(relu_net(), batches(4), ActivationStats(), epochs=2).activation_stats
    assert torch.equal(stats.means, plain.means) and stats.dead_units(0) == plain.dead_units(0)


# It changes nothing, and waits for nothing

def noisy_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(.3), nn.Flatten(), nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 2))

@pytest.mark.parametrize('kw', [dict(), dict(modules=lambda m: not children(m)), dict(every=3), dict(in_train=False)], ids=str)
def test_training_is_the_same_to_the_bit(kw):
    def result(*cbs):
        model = noisy_net()
        torch.manual_seed(5)
        run = fit(model, batches(6), Recorder(), *cbs, epochs=2, valid=batches(1))
        return run.recorder.losses, model.state_dict(), torch.get_rng_state()
    (l, state, rng), (l2, state2, rng2) = result(), result(ActivationStats(**kw))
    assert l == l2 and torch.equal(rng, rng2) and len(l) == 12
    assert all(torch.equal(state[k], state2[k]) for k in state)

def test_outputs_are_seen_before_the_next_layer_changes_them_in_place():
    model = net_of(lambda: nn.Linear(4, 8), lambda: nn.ReLU(inplace=True), lambda: nn.Linear(8, 2))
    stats = fit(model, batches(), ActivationStats([model[0], model[1]])).activation_stats
    assert (stats.hists[0, :, :41].sum(-1) > 0).all() and not stats.hists[1, :, :41].any()   # below zero

def test_it_asks_nothing_of_the_device_during_an_epochs_batches():
    watch, stats = Watch(), ActivationStats(lambda m: not children(m))
    fit(noisy_net(), batches(6), stats, watch, epochs=2, valid=batches(1))
    assert watch.batches == 12 and len(stats.layers) == 9 and watch.seen == []

def test_that_check_finds_hooks_that_ask():
    class Draft(Callback):
        def begin_fit(self): self.hooks = Hooks(self.model, append_stats)
        def after_fit(self): self.hooks.remove()
    watch = Watch()
    fit(noisy_net(), batches(6), Draft(), watch)
    assert watch.seen.count('_local_scalar_dense') == 2*9*6

@pytest.fixture
def simulated_cuda():
    "Tensors without contents that say they are on CUDA: each operation has its device, shape and dtype, and one that needs a value fails."
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(): yield torch.device('cuda')

def on(device, net, n=3):
    with device: model = net()
    return model, [(x.to(device), y.to(device)) for x, y in batches(n)]

def test_on_a_simulated_cuda_device_nothing_needs_a_value_and_nothing_comes_to_the_host_before_the_epochs_end(simulated_cuda):
    model, dl = on(simulated_cuda, noisy_net)
    ops = set()
    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))
    class ForwardOnly(Callback):  # autograd's engine wants a real device
        def after_loss(self): raise CancelBatchException
    watch, stats = Watch(), ActivationStats(lambda m: not children(m))
    with Ops(): fit(model, dl, stats, watch, ForwardOnly(), epochs=2)
    assert watch.batches == 6 and watch.seen == [] and {'histc', 'count_nonzero'} <= ops and 'bincount' not in ops
    record = stats.records['3']
    assert record.floats.device.type == record.counts.device.type == record.dead[1].device.type == 'cpu' and len(record.floats) == 6

def test_on_a_simulated_cuda_device_the_draft_and_bincount_do_need_a_value(simulated_cuda):
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    model, dl = on(simulated_cuda, relu_net)
    with pytest.raises(DataDependentOutputException), Hooks(model, append_stats): model(dl[0][0])
    with pytest.raises(DynamicOutputShapeException): torch.bincount(dl[0][1], minlength=9)

def test_what_is_kept_is_bounded_and_lies_on_the_host_after_an_epoch():
    class Look(Callback):
        _order, waiting = 99, []
        def after_batch(self): self.waiting.append(max(len(r.waiting) for r in self.run.activation_stats.records.values()))
        def after_epoch(self): self.waiting.append(max(len(r.waiting) + len(r.windows) for r in self.run.activation_stats.records.values()))
    look = Look()
    stats = fit(relu_net(), batches(3), ActivationStats(), look, epochs=2).activation_stats
    assert look.waiting == [1, 2, 3, 0]*2
    for r in stats.records.values(): assert (r.floats.nbytes + r.counts.nbytes)/6 == 8*(80 + 5) + 2*8

def test_under_autocast_statistics_are_of_the_halves_in_float32():
    model, keep = relu_net(), []
    model[1].register_forward_hook(lambda m, i, o: keep.append(o.detach().clone()))
    with torch.autocast('cpu', torch.bfloat16): stats = fit(model, batches(2), ActivationStats(), loss_func=fp32_loss).activation_stats
    assert keep[0].dtype == torch.bfloat16
    np.testing.assert_allclose(stats.means[0], [o.double().mean() for o in keep], rtol=1e-5)
    np.testing.assert_allclose(stats.stds[0], [o.double().std() for o in keep], rtol=1e-5)


# Pictures

PLOTS = ['plot_means_stds', 'plot_hists', 'plot_near_zero', 'plot_dead_units']

@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt
    plt.close('all')

def images(axs): return [m for ax in axs.flat for m in ax.collections]

def deep(n): return nn.Sequential(*[m for _ in range(n) for m in (nn.Linear(4, 4), nn.ReLU())], nn.Linear(4, 2))

def test_the_lines_are_the_statistics():
    stats = fit(relu_net(), batches(5), ActivationStats(every=2)).activation_stats
    axs = stats.plot_means_stds()
    for ax, values in (*zip(axs, (stats.means, stats.stds)), (stats.plot_near_zero(), 100*stats.near_zero)):
        assert len(ax.lines) == 2 and ax.get_xlabel() == 'batch' and ax.get_ylabel()
        for line, v in zip(ax.lines, values):
            assert list(line.get_xdata()) == [0, 2, 4]
            np.testing.assert_allclose(line.get_ydata(), v)
    assert [t.get_text() for t in axs[1].get_legend().get_texts()] == ['1', '2.1']
    assert stats.plot_means_stds('symlog')[0].get_yscale() == 'symlog'

@pytest.mark.parametrize('n', [1, 2, 12, 13, 40])
def test_a_legend_names_twelve_layers_at_most_and_fits_the_picture(n):
    torch.manual_seed(0)
    stats = fit(deep(n), batches(2), ActivationStats()).activation_stats
    ax = stats.plot_near_zero()
    assert len(ax.lines) == n and min(n, 7) <= len(ax.get_legend().get_texts()) <= 12
    for o in (ax, stats.plot_means_stds()[1], stats.plot_hists()[0, 0], stats.plot_dead_units()): o.figure.canvas.draw()
    box, frame = ax.get_legend().get_window_extent(), ax.figure.bbox
    assert 0 <= box.y0 < box.y1 <= frame.y1 and 0 < box.x0 < box.x1 <= frame.x1
    assert len(stats.plot_dead_units().patches) == n

@pytest.mark.parametrize('n', [3, 300, 301, 950])
def test_the_image_of_a_histogram_shows_every_activation_and_every_batch(n):
    model = nn.Sequential(nn.Tanh(), nn.Linear(4, 2))
    stats = fit(model, batches(n), ActivationStats([model[0], model[1]], hist_range=(-.5, .5))).activation_stats
    axs = stats.plot_hists()
    assert [ax.get_title() for ax in axs.flat] == ['0', '1']
    assert isinstance(images(axs)[0].norm, LogNorm) and images(axs)[0].norm is images(axs)[1].norm
    for m in images(axs):
        a = np.ma.filled(np.ma.masked_invalid(m.get_array()), 0)
        assert a.shape[1] <= 300 and len(images(axs)) == 2
        np.testing.assert_allclose(a.sum(0), 100, rtol=1e-5)                   # per cent: nothing is left out
        assert a[0].max() > 0 and a[-1].max() > 0                    # what lies below and above
    x0, x1 = axs[0, 0].get_xlim()
    assert (x0, x1) == (0, n)
    assert {'below', 'above'} <= {t.get_text() for t in axs[0, 0].get_yticklabels()}

def test_one_number_beyond_the_range_shows_among_many_batches_and_then_the_whole_range_does():
    dl = [(torch.full((6, 4), 3.1), y) for _, y in batches(950)]
    dl[501] = dl[501][0].clone(), dl[501][1]
    dl[501][0][2, 1], dl[501][0][5, 3] = 50., -50.
    model = net_of(nn.Identity, lambda: nn.Linear(4, 2))
    ax = fit(model, dl, ActivationStats([model[0]])).activation_stats.plot_hists()[0, 0]
    m, = ax.collections
    a, x = np.ma.filled(np.ma.masked_invalid(m.get_array()), 0), m.get_coordinates()[0, :, 0]
    for row in (0, -1):
        col, = a[row].nonzero()[0]
        assert x[col] <= 501 < x[col+1]
        np.testing.assert_allclose(a[row, col], 100/(24*(x[col+1]-x[col])), rtol=1e-5)
    lo, hi = ax.get_ylim()
    assert lo < -10 and hi > 10 and {'below', '-5', '0', '5', 'above'} <= {t.get_text() for t in ax.get_yticklabels()}

def test_what_no_layer_uses_is_cut_off_and_what_is_not_finite_is_announced():
    def texts(ax): return [t.get_text() for t in ax.get_yticklabels()]
    dl = batches(3)
    stats = fit(relu_net(), dl, ActivationStats()).activation_stats
    ax = stats.plot_hists()[0, 0]
    assert not {'below', 'above', 'NaN'} & set(texts(ax)) and ax.get_ylim()[0] == 0 and ax.get_ylim()[1] < 10 and ax.figure._suptitle is None
    dl[1][0][0, 0] = math.nan
    stats = fit(relu_net(), dl, ActivationStats()).activation_stats
    assert texts(stats.plot_hists()[0, 0])[-1] == 'NaN'
    for plot in PLOTS:
        ax = getattr(stats, plot)()
        title = (ax if plot[5:] in ('near_zero', 'dead_units') else ax.flat[0]).figure._suptitle
        assert title.get_text() == 'NaN or infinity from batch 1 on, in layer 1 and 1 more' and title.get_color() == 'red'

def test_bars_are_the_shares_of_dead_units():
    model = planted(lambda: nn.Linear(4, 8), nn.ReLU, lambda: nn.Linear(8, 2))
    ax = fit(model, batches(8, bs=64), ActivationStats([model[1], model[2]]), lr=1e-3).activation_stats.plot_dead_units()
    assert [p.get_width() for p in ax.patches] == [100/8, 0] and [t.get_text() for t in ax.texts] == ['1 of 8', '0 of 2']
    assert [t.get_text() for t in ax.get_yticklabels()] == ['1', '2'] and ax.get_xlabel() == 'dead units, %'


# CUDA

@pytest.mark.cuda
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_hooks_on_cuda(dtype):
    net = small_net().cuda().to(dtype)
    x = torch.randn(64, 4, device='cuda').to(dtype)
    with torch.no_grad(), Hooks(find_modules(net, is_lin_layer), append_stats) as hooks: out = net(x); net(x)
    assert len(hooks) == 3 and n_hooks(net) == 0
    a = out.double().cpu().numpy()
    np.testing.assert_allclose([hooks[2].mean, hooks[2].std], [a.mean(), a.std(ddof=1)], rtol=1e-4, atol=1e-5)
    assert [len(h.stats[0]) for h in hooks] == [2, 2, 2] and type(hooks[0].stats[0][0]) is float

@pytest.mark.cuda
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_activation_stats_on_cuda_are_those_of_numpy_and_no_batch_waits(dtype):
    class Strict(Callback):
        "From begin_epoch to the end of the last training batch, whatever waits for the device raises."
        _order = 100
        def begin_epoch(self): torch.cuda.set_sync_debug_mode('error')
        def after_batch(self):
            if self.run.in_train and self.run.iter == self.run.iters-1: torch.cuda.set_sync_debug_mode('default')
        def after_fit(self): torch.cuda.set_sync_debug_mode('default')
    model = noisy_net().cuda().to(dtype)
    dl = [(x.cuda(), y.cuda()) for x, y in batches(4, bs=64, dtype=dtype)]
    stats, keep = ActivationStats(lambda m: not children(m), hist_range=(-1, 1)), Keep(model[3], model[7])
    fit(model, dl, stats, keep, Strict(), epochs=2, loss_func=fp32_loss)
    for name, kept in zip(('3', '7'), keep.kept):
        i = stats.layers.index(name)
        for j, o in enumerate(kept):
            a = o.double().cpu().numpy()
            np.testing.assert_allclose([stats.means[i, j], stats.stds[i, j]], [a.mean(), a.std(ddof=1)], rtol=1e-4, atol=1e-5)
            counts = [(a < -1).sum(), *np.histogram(a[(a >= -1) & (a < 1)], 80, (-1, 1))[0], (a >= 1).sum()]
            assert abs(stats.hists[i, j].numpy() - counts).sum() <= 4 and stats.hists[i, j].sum() == a.size
    assert n_hooks(model) == 0 and not stats.nonfinite()

@pytest.mark.cuda
def test_counts_on_cuda_are_those_of_the_cpu_also_in_deterministic_mode_and_beyond_float32():
    d = torch.cat([torch.randint(-30, 30, (10_000,)).float()/4 + .125, torch.tensor([math.nan, math.inf, -math.inf, 0.])])
    torch.use_deterministic_algorithms(True)
    try: assert torch.equal(hooks._bin_counts(d.cuda(), 40, -5., 5.).cpu(), hooks._bin_counts(d, 40, -5., 5.))
    finally: torch.use_deterministic_algorithms(False)
    assert hooks._bin_counts(torch.zeros(1, device='cuda').expand(2**24 + 3), 2, -1., 1.).tolist() == [0, 0, 2**24 + 3, 0, 0]
