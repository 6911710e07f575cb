"Every optimizer of the zoo against its reference, in every engine; translation to torch and back; ratios; groups without decay."
import copy
import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn

from dl2lib import zoo
from dl2lib.foreach import kernel_of
from dl2lib.optimizers import StatefulOptimizer, adam_opt, adam_step, l2_reg, lamb_opt, sgd_mom_opt, sgd_opt, sgd_step, weight_decay
from dl2lib.zoo import OPTIMIZERS, RatioRecorder, decay_groups, from_torch, layer_ratios, lookahead, optimizers_table, to_torch

steps = 50
shapes = [(3,), (4, 5), (2, 3, 3, 3), (), (6,), (5, 4), (7, 2)]


def test_each_part_is_small():
    "The chapter says: at most ten lines, without docstrings."
    parts = {f if inspect.isfunction(f) else type(f) for e in OPTIMIZERS.values() for f in e.opt.all_parts}
    own = [f for f in [*parts, zoo.orthogonalized, zoo.lars_ratio] if f.__module__ == zoo.__name__]
    assert len(own) > 12
    for f in own:
        code = [l for l in inspect.getsource(f).splitlines() if l.strip() and not l.strip().startswith(('#', '"', 'r"'))]
        assert len(code) <= 10, f'{f.__name__} has {len(code)} lines'


# The papers in NumPy, number by number. Each takes the parameter, its gradients (None: none in that step), and hyperparameters.
def np_dampened(p, grads, lr, wd):
    m = np.zeros_like(p)
    for g in (g for g in grads if g is not None):
        m = .9*m + .1*(g + wd*p)
        p = p - lr*m
    return p

def np_lamb(p, grads, lr, wd, b1=.9, b2=.999, eps=1e-6, top=10.):
    m = v = np.zeros_like(p)
    for t, g in enumerate((g for g in grads if g is not None), 1):
        m, v = b1*m + (1-b1)*g, b2*v + (1-b2)*g**2
        u = m/(1-b1**t)/(np.sqrt(v/(1-b2**t)) + eps) + wd*p
        a, b = np.sqrt((p**2).sum()), np.sqrt((u**2).sum())
        p = p - lr*(min(a/b, top) if a > 0 and b > 0 else 1.)*u
    return p

def np_lars(p, grads, lr, wd, mom=.9, trust=.001, eps=1e-8):
    m = np.zeros_like(p)
    for g in (g for g in grads if g is not None):
        a, b = np.sqrt((p**2).sum()), np.sqrt((g**2).sum())
        m = mom*m + (trust*a/(b + wd*a + eps) if a > 0 and b > 0 else 1.)*(g + wd*p)
        p = p - lr*m
    return p

def np_lion(p, grads, lr, wd, b1=.9, b2=.99):
    m = np.zeros_like(p)
    for g in (g for g in grads if g is not None):
        p = p - lr*(np.sign(b1*m + (1-b1)*g) + wd*p)
        m = b2*m + (1-b2)*g
    return p

def np_lookahead(p, grads, lr, wd, b1=.9, b2=.999, eps=1e-8, k=6, alpha=.5):
    m = v = np.zeros_like(p)
    slow = p
    for t, g in enumerate((g for g in grads if g is not None), 1):
        g = g + wd*p
        m, v = b1*m + (1-b1)*g, b2*v + (1-b2)*g**2
        p = p - lr*m/(1-b1**t)/(np.sqrt(v/(1-b2**t)) + eps)
        if t % k == 0: p = slow = slow + alpha*(p - slow)
    return p


T = torch.optim
# name: reference (a class of torch with options, or a function above), learning rates of two groups, decays of two groups (None: has none), options of ours
refs = dict(
    sgd=((T.SGD, {}), (.1, .03), (.01, 0.), dict(sqr_mom=None)),
    momentum=((T.SGD, dict(momentum=.9)), (.1, .03), (.01, 0.), {}),
    dampened=(np_dampened, (.1, .03), (.01, 0.), {}),
    nesterov=((T.SGD, dict(momentum=.9, nesterov=True)), (.1, .03), (.01, 0.), {}),
    rmsprop=((T.RMSprop, {}), (.01, .003), (.01, 0.), {}),
    rmsprop_centred=((T.RMSprop, dict(centered=True, eps=1e-3)), (.01, .003), (.01, 0.), dict(eps=1e-3)),
    adagrad=((T.Adagrad, {}), (.1, .03), (.01, 0.), {}),
    adadelta=((T.Adadelta, {}), (1., .3), (.01, 0.), {}),
    rprop=((T.Rprop, {}), (.01, .003), None, {}),
    adam=((T.Adam, {}), (.01, .003), (.01, 0.), {}),
    adamw=((T.AdamW, {}), (.01, .003), (.1, 0.), {}),
    amsgrad=((T.Adam, dict(amsgrad=True)), (.01, .003), (.01, 0.), {}),
    adamax=((T.Adamax, {}), (.01, .003), (.01, 0.), {}),
    nadam=((T.NAdam, {}), (.01, .003), (.01, 0.), {}),
    radam=((T.RAdam, {}), (.01, .003), (.01, 0.), {}),
    lamb=(np_lamb, (.01, .003), (.1, 0.), {}),
    lars=(np_lars, (1., .3), (.01, 0.), {}),
    lion=(np_lion, (.01, .003), (.1, 0.), {}),
    muon=((T.Muon, {}), (.02, .01), (.1, 0.), {}),
    lookahead=(np_lookahead, (.01, .003), (.01, 0.), {}))


def problem(name, dtype=torch.float64, seed=0):
    "Parameters, and for each of the steps their gradients."
    gen = torch.Generator().manual_seed(seed)
    ps = [torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes if name != 'muon' or len(s) == 2]
    if name != 'muon': ps[4].zero_() # as a bias begins
    grads = [[torch.randn(p.shape, generator=gen, dtype=torch.float64) for p in ps] for _ in range(steps)]
    for t, gs in enumerate(grads):
        if t % 3 == 1: gs[0] = None                     # it has no gradient now and then
        if t % 7 in (3, 4): gs[-1] = torch.zeros_like(gs[-1]) # a zero gradient
        if t == 0: gs[1] = None                         # its first step comes later
        if name != 'muon' and t < 5: gs[5] = None
    return [p.to(dtype) for p in ps], [[None if g is None else g.to(dtype) for g in gs] for gs in grads]

def params_of(ps): return [nn.Parameter(p.clone()) for p in ps]

def groups_of(ps, lrs, wds, wd_name):
    half = len(ps)//2
    return [dict(params=part, lr=lr, **({wd_name: wd} if wds else {})) for part, lr, wd in zip((ps[:half], ps[half:]), lrs, wds or (0, 0))]

def ours(name, ps, engine=None, **hypers):
    _, lrs, wds, more = refs[name]
    more = {k: v for k, v in more.items() if v is not None}
    return OPTIMIZERS[name].make(**{**more, **hypers})(groups_of(ps, lrs, wds, 'wd'), engine=engine)

def run(opt, ps, grads):
    for gs in grads:
        for p, g in zip(ps, gs): p.grad = None if g is None else g.clone()
        opt.step()
    return [p.detach().clone() for p in ps]

def reference(name, ps, grads):
    ref, lrs, wds, _ = refs[name]
    if isinstance(ref, tuple):
        qs = params_of(ps)
        return run(ref[0](groups_of(qs, lrs, wds, 'weight_decay'), lr=lrs[0], **ref[1]), qs, grads)
    half, res = len(ps)//2, []
    for j, p in enumerate(ps):
        gs = [None if g[j] is None else g[j].double().numpy() for g in grads]
        res.append(torch.from_numpy(np.asarray(ref(p.double().numpy(), gs, lrs[j >= half], wds[j >= half]))))
    return res

with_kernel = {'sgd', 'momentum', 'nesterov', 'adam', 'adamw'}

def engines_of(name):
    opt = ours(name, params_of(problem(name)[0]))
    return ['tensor'] + ['list']*opt.foreach + ['fused']*(name in with_kernel) + [None]

cases = [(n, e) for n in refs for e in engines_of(n)]


def test_every_entry_has_a_reference(): assert refs.keys() == OPTIMIZERS.keys()

@pytest.mark.parametrize('name,engine', cases)
def test_float64_within_1e_9(name, engine):
    ps, grads = problem(name)
    qs = params_of(ps)
    got, want = run(ours(name, qs, engine), qs, grads), reference(name, ps, grads)
    for a, b, p in zip(got, want, ps):
        assert not torch.equal(a, p), 'it has not moved'
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('name,engine', cases)
def test_float32_within_2e_4(name, engine):
    ps, grads = problem(name, torch.float32)
    qs = params_of(ps)
    got, want = run(ours(name, qs, engine), qs, grads), reference(name, ps, grads)
    for a, b in zip(got, want): torch.testing.assert_close(a.double(), b.double(), rtol=2e-4, atol=2e-5)

def test_all_but_muon_run_as_lists():
    opts = {n: ours(n, params_of(problem(n)[0])) for n in refs}
    assert [n for n, o in opts.items() if not o.foreach] == ['muon']
    assert {n for n, o in opts.items() if kernel_of(o.parts, dict(mom=.9, wd=.1))} == with_kernel

# What every entry must do
@pytest.mark.parametrize('name', refs)
@pytest.mark.parametrize('how', ['state_dict', 'deepcopy'])
def test_state_survives_in_the_middle(name, how):
    ps, grads = problem(name, torch.float32)
    a = params_of(ps)
    opt = ours(name, a)
    run(opt, a, grads[:20])
    if how == 'deepcopy': b, other = copy.deepcopy((a, opt))
    else:
        b = params_of([p.detach() for p in a])
        other = ours(name, b)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(opt, a, grads[20:]); run(other, b, grads[20:])
    for x, y in zip(a, b): assert torch.equal(x, y)

@pytest.mark.parametrize('engine', ['tensor', None])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', refs)
def test_half_precision_stays_finite_and_near(name, dtype, engine):
    ps, grads = problem(name, dtype)
    a, b = params_of(ps), params_of([p.float() for p in ps])
    opt = ours(name, a, engine)
    run(opt, a, grads)
    run(ours(name, b), b, [[None if g is None else g.float() for g in gs] for gs in grads])
    assert all(p.isfinite().all() and p.dtype == dtype for p in a)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    if name != 'rprop': # whose steps grow where a rounded gradient keeps its sign
        for x, y in zip(a, b): assert (x.float()-y).abs().max() < (.25 if dtype == torch.bfloat16 else .05)*(1 + y.abs().max())

@pytest.mark.parametrize('name', refs)
def test_a_zero_gradient_from_the_start_stays_finite(name):
    ps = params_of([torch.zeros(3, 2), torch.ones(3, 2)])
    opt = OPTIMIZERS[name].make(lr=.01)(ps)
    run(opt, ps, [[torch.zeros(3, 2)]*2]*3)
    assert all(p.isfinite().all() for p in ps) and torch.equal(ps[0], torch.zeros(3, 2))

@pytest.mark.parametrize('name', refs)
def test_a_step_asks_nothing_of_the_device(name):
    from test_optimizers import Reads
    ps, grads = problem(name, torch.float32)
    a = params_of(ps)
    opt = ours(name, a)
    for p in a: p.grad = torch.ones_like(p)
    with Reads() as r:
        for _ in range(8): opt.step()
    assert [f for f in r.found if not (name == 'muon' and '_to_copy' in f)] == [] # Muon rounds to bfloat16, on the device

def test_table_and_formulas():
    t = optimizers_table()
    assert len(t) == len(OPTIMIZERS) and t[0][0] == 'sgd'
    for e in OPTIMIZERS.values():
        assert e.reference and e.formula.count(r'\\') == len(e.opt.all_parts)-1 and all(hasattr(o, 'formula') for o in e.opt.all_parts), e.name

@pytest.mark.parametrize('shape', [(601, 700), (700, 601)])
def test_muon_is_torchs_muon_for_large_matrices(shape):
    gen = torch.Generator().manual_seed(0)
    p, grads = torch.randn(shape, generator=gen), [torch.randn(shape, generator=gen) for _ in range(3)]
    qs, rs = params_of([p]), params_of([p])
    a, b = OPTIMIZERS['muon'].make(lr=.1)(qs), T.Muon(rs, lr=.1)
    for g in grads:
        qs[0].grad, rs[0].grad = g.clone(), g.clone()
        a.step(); b.step()
    moved, want = qs[0] - p, rs[0] - p
    assert (moved - want).norm() < .02*want.norm() # bfloat16 rounds sums in another order

def test_muon_is_for_matrices():
    ps = params_of([torch.ones(3)])
    ps[0].grad = torch.ones(3)
    opt = OPTIMIZERS['muon'].make(lr=.1)(ps)
    with pytest.raises(ValueError, match=r'muon_step is for matrices, and a parameter has shape \(3,\)'): opt.step()

# timm, where it is installed
@pytest.mark.parametrize('name', ['lamb', 'lars', 'lion'])
def test_against_timm(name):
    optim = pytest.importorskip('timm.optim')
    ps, grads = problem(name)
    a, b = params_of(ps), params_of(ps)
    make, more = dict(lamb=(optim.Lamb, dict(max_grad_norm=None, weight_decay=.1)), lars=(optim.Lars, dict(momentum=.9, weight_decay=.01, always_adapt=True)), lion=(optim.Lion, dict(weight_decay=.1)))[name]
    if name == 'lamb': grads = [[g if g is not None else torch.zeros_like(p) for g, p in zip(gs, ps)] for gs in grads] # timm counts steps by group
    got = run(OPTIMIZERS[name].make(lr=.01, wd=more['weight_decay'], **(dict(max_ratio=None) if name == 'lamb' else {}))(a), a, grads)
    for x, y in zip(got, run(make(b, lr=.01, **more), b, grads)): torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-7)

# Lookahead
@pytest.mark.parametrize('name', [n for n in refs if n != 'lookahead'])
def test_lookahead_around_any(name):
    ps, grads = problem(name)
    a, b = params_of(ps), params_of(ps)
    more = {k: v for k, v in refs[name][3].items() if v is not None}
    opt = lookahead(OPTIMIZERS[name].make(lr=.01, **more), slow_every=3, slow_share=.25)(a)
    ref, slow = OPTIMIZERS[name].make(lr=.01, **more)(b), [p.detach().clone() for p in b]
    full = [[g if g is not None else torch.ones_like(p) for g, p in zip(gs, ps)] for gs in grads[:10]]
    for t, gs in enumerate(full, 1):
        run(opt, a, [gs]); run(ref, b, [gs])
        if t % 3 == 0:
            for p, s in zip(b, slow): s.lerp_(p.data, .25); p.data.copy_(s)
    for x, y in zip(a, b): torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)

def test_lookahead_needs_parts():
    with pytest.raises(TypeError, match='lookahead.*partial of StatefulOptimizer'): lookahead(torch.optim.SGD)

# To torch and back
class_of = dict(sgd=T.SGD, momentum=T.SGD, nesterov=T.SGD, adam=T.Adam, adamw=T.AdamW)

@pytest.mark.parametrize('name', class_of)
def test_to_torch_goes_on(name):
    ps, grads = problem(name)
    a = params_of(ps)
    opt = ours(name, a)
    run(opt, a, grads[:20])
    theirs = to_torch(opt)
    assert type(theirs) is class_of[name] and [len(pg['params']) for pg in theirs.param_groups] == [3, 4]
    saved = [p.detach().clone() for p in a]
    want = run(theirs, a, grads[20:])
    for p, s in zip(a, saved): p.data.copy_(s)
    for x, y in zip(run(opt, a, grads[20:]), want): torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('name', class_of)
def test_from_torch_goes_on(name):
    ps, grads = problem(name)
    a = params_of(ps)
    cls, more = refs[name][0]
    ref = cls(groups_of(a, refs[name][1], refs[name][2], 'weight_decay'), lr=.1, **more)
    run(ref, a, grads[:20])
    opt, saved = from_torch(ref), [p.detach().clone() for p in a]
    want = run(ref, a, grads[20:])
    for p, s in zip(a, saved): p.data.copy_(s)
    for x, y in zip(run(opt, a, grads[20:]), want): torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('make', [sgd_opt, lambda ps, lr: sgd_mom_opt(ps, lr=lr, wd=0.), adam_opt(wd=.1), adam_opt(eps=1e-3)])
def test_there_and_back(make):
    ps, grads = problem('adam')
    a = params_of(ps)
    opt = make(a, lr=.01)
    run(opt, a, grads[:5])
    back = from_torch(to_torch(opt))
    for p in a:
        assert back.state[p].keys() == opt.state[p].keys()
        for k, v in opt.state[p].items(): torch.testing.assert_close(torch.as_tensor(back.state[p][k]), torch.as_tensor(v))
    for x, y in zip(opt.param_groups, back.param_groups): assert {k: x[k] for k in x if k != 'params'} == {k: y[k] for k in x if k != 'params'}

def test_what_cannot_be_translated():
    ps = params_of(problem('adam')[0])
    with pytest.raises(ValueError, match='to_torch: torch has no optimizer of the parts .*lamb_step'): to_torch(lamb_opt()(ps, lr=.1))
    with pytest.raises(ValueError, match='to_torch: .*momentum_step, weight_decay'): to_torch(sgd_mom_opt(ps, lr=.1, wd=.1))
    with pytest.raises(ValueError, match='from_torch: RMSprop cannot be translated'): from_torch(T.RMSprop(ps))
    with pytest.raises(ValueError, match='group 0 has amsgrad=True'): from_torch(T.Adam(ps, amsgrad=True))
    with pytest.raises(ValueError, match='group 0 has maximize=True'): from_torch(T.SGD(ps, lr=.1, maximize=True))
    with pytest.raises(ValueError, match='group 0 has dampening=0.1'): from_torch(T.SGD(ps, lr=.1, momentum=.9, dampening=.1))

# Groups without decay
def test_decay_groups():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.LayerNorm([2, 2]))
    model[2].weight.requires_grad_(False)
    wd, free = decay_groups(model, wd=.1)
    assert wd['wd'] == .1 and free['wd'] == 0. and wd['params'][0] is model[0].weight and len(wd['params']) == 1
    assert {id(p) for p in free['params']} == {id(p) for p in (model[0].bias, *model[1].parameters(), model[2].bias, *model[3].parameters())}
    opt = adam_opt()(decay_groups(model, wd=.1), lr=.1)
    assert [pg['wd'] for pg in opt.hypers] == [.1, 0.]

# Ratios
def test_layer_ratios_of_lamb():
    ps = params_of([torch.full((4,), 2.), torch.zeros(3)])
    opt = lamb_opt()(ps, lr=1e-9)
    run(opt, ps, [[torch.ones(4), torch.ones(3)]])
    got = [(p, r.item()) for p, r in layer_ratios(opt)]
    assert [p for p, _ in got] == [ps[0], ps[1]] or all(a is b for (a, _), b in zip(got, ps))
    assert got[0][1] == pytest.approx(2., rel=1e-4) # |p| = 4, |update| = 2, as each of its four numbers is 1
    assert got[1][1] < 1e-6 # it has moved by 1e-9: a length that is no longer zero

@pytest.mark.parametrize('make', [adam_opt(), adam_opt, T.AdamW, T.SGD])
def test_groups_without_decay_work_with_any_optimizer(make):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    opt = make(decay_groups(model, wd=.3), lr=.1)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    opt.step()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before)]
    assert moved == [True, False, False, False]

def test_layer_ratios_of_lars():
    ps = params_of([torch.full((4,), 2.)])
    ps[0].grad = torch.full((4,), .5)
    opt = OPTIMIZERS['lars'].make(lr=1e-9, wd=.25)(ps)
    opt.step()
    (_, r), = layer_ratios(opt)
    assert r.item() == pytest.approx(.001*2/(.5+.25*2), rel=1e-4) and torch.equal(ps[0].grad, torch.full((4,), .5))

def test_layer_ratios_of_others():
    with pytest.raises(ValueError, match='layer_ratios: no part of .*adam_step.* has a ratio'): layer_ratios(adam_opt()(params_of([torch.ones(2)]), lr=.1))

def test_ratio_recorder():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from types import SimpleNamespace
    from dl2lib.runner import Runner, TrainBundle
    gen = torch.Generator().manual_seed(0)
    dl = [(torch.randn(8, 3, generator=gen), torch.randint(2, (8,), generator=gen)) for _ in range(6)]
    model, rec = nn.Linear(3, 2), RatioRecorder()
    opt = lamb_opt()(model.parameters(), lr=.01)
    Runner(cbs=[rec]).fit(2, TrainBundle(model, opt, nn.functional.cross_entropy, SimpleNamespace(train_dl=dl, valid_dl=dl)))
    assert list(rec.ratios) == ['weight', 'bias'] and [len(v) for v in rec.ratios.values()] == [12, 12]
    assert [l.get_label() for l in rec.plot().get_lines()] == ['weight', 'bias'] and [l.get_label() for l in rec.plot(min_dim=2).get_lines()] == ['weight']
    plt.close('all')

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('name', refs)
def test_cuda_agrees_with_the_reference(name):
    ps, grads = problem(name, torch.float32)
    qs = [nn.Parameter(p.clone().cuda()) for p in ps]
    got = run(ours(name, qs), qs, [[None if g is None else g.cuda() for g in gs] for gs in grads])
    tol = 2e-2 if name == 'muon' else 2e-4 # Muon's bfloat16 products are rounded otherwise
    for a, b in zip(got, reference(name, ps, grads)): torch.testing.assert_close(a.cpu().double(), b.double(), rtol=tol, atol=tol/10)
