"""Proves that hooks see what torch computes, against numpy; that they let go after every kind of error; and that `find_modules`
finds what an independent walk finds, in models of any shape."""
import gc, random, weakref

import numpy as np
import pytest
import torch
from torch import nn
from dl2lib.hooks import Hook, Hooks, append_stat, append_stats, children, find_modules, is_lin_layer


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
