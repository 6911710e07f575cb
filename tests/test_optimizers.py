"The one optimizer: parts, groups, state, engines, interop with torch, bad input."
import copy
import functools
import io
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dl2lib.callbacks import LR_Find, ParamScheduler
from dl2lib.optimizers import (AverageGrad, AverageSqrGrad, Optimizer, Stat, StatefulOptimizer, StepCount, adam_opt, adam_step, debias, get_defaults, l2_reg,
                               lamb_opt, lin_comb, maybe_update, momentum_step, sgd_mom_opt, sgd_opt, sgd_step, weight_decay)
from repo_tools import ROOT, read_nb, source

adam_stats = [AverageGrad(dampening=True), AverageSqrGrad(), StepCount()]
ready = dict(sgd=sgd_opt, momentum=sgd_mom_opt, adam=adam_opt(wd=.1), lamb=lamb_opt(wd=.1))


def params(seed=0, shapes=((3,), (4, 5), (2, 3, 3, 3)), dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in shapes]

def with_grads(ps, seed=1):
    gen = torch.Generator().manual_seed(seed)
    for p in ps: p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
    return ps

def train(opt, ps, steps, start=0):
    for i in range(start, start+steps):
        with_grads(ps, seed=i)
        opt.step()
        opt.zero_grad()
    return ps

def equal(a, b): return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# Small parts
def test_debias_is_the_sum_of_the_weights():
    for mom, damp, n in ((.9, .1, 1), (.9, 1., 5), (.99, .01, 100)):
        avg = 0.
        for _ in range(n): avg = mom*avg + damp*1.
        assert debias(mom, damp, n) == pytest.approx(avg, rel=1e-12)

def test_lin_comb(): assert lin_comb(2., 4., .25) == 3.5

def test_maybe_update_does_not_overwrite():
    hypers = dict(wd=.5)
    maybe_update([weight_decay, adam_step], hypers, get_defaults)
    assert hypers == dict(wd=.5, eps=1e-5)

def test_sgd_and_decay_by_hand():
    p, = with_grads(params(shapes=[(3,)]))
    before, g = p.detach().clone(), p.grad.clone()
    sgd_opt([p], lr=.1, wd=.5).step()
    assert_close(p.detach(), before*(1-.1*.5) - .1*g)

def test_l2_equals_decay_under_plain_sgd_and_not_under_adam():
    def run(steppers, stats):
        ps = params()
        return train(StatefulOptimizer(ps, steppers, stats, lr=.01, wd=.3), ps, 5)
    for a, b in zip(run([l2_reg, sgd_step], []), run([weight_decay, sgd_step], [])): assert_close(a, b)
    for a, b in zip(run([l2_reg, adam_step], adam_stats), run([weight_decay, adam_step], adam_stats)): assert (a-b).abs().max() > .02

def test_order_of_decay_and_step_is_an_argument():
    def run(*steppers):
        ps = params()
        return train(StatefulOptimizer(ps, list(steppers), adam_stats, lr=.1, wd=.3), ps, 2)
    a, b = run(weight_decay, adam_step), run(adam_step, weight_decay)
    assert not equal(a, b)
    ref = params()
    train(torch.optim.AdamW(ref, lr=.1, weight_decay=.3, betas=(.9, .99), eps=1e-5), ref, 2)
    for x, y in zip(a, ref): assert_close(x, y)

def test_the_gradient_is_left_as_it_was():
    for engine in ('tensor', 'list', None):
        ps = with_grads(params())
        before = [p.grad.clone() for p in ps]
        grads = [p.grad for p in ps]
        StatefulOptimizer(ps, [l2_reg, adam_step], adam_stats, engine=engine, lr=.1, wd=.1).step()
        assert equal(before, [p.grad for p in ps]) and all(p.grad is g for p, g in zip(ps, grads))

# LAMB
@pytest.mark.parametrize('engine', ['tensor', 'list'])
def test_lamb_moves_from_zero_and_stays_finite(engine):
    ps = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(3))]
    ps[0].grad, ps[1].grad, ps[2].grad = torch.ones(4), torch.zeros(2, 2), torch.zeros(3)
    opt = lamb_opt(wd=.1)(ps, lr=.01, engine=engine)
    for _ in range(3): opt.step()
    assert (ps[0] < 0).all() and all(p.isfinite().all() for p in ps) and torch.equal(ps[1], torch.zeros(2, 2))

def test_lamb_ratio_has_a_ceiling():
    def moved(**kw):
        p = nn.Parameter(torch.full((4,), 1000.))
        p.grad = torch.ones(4)
        lamb_opt(**kw)([p], lr=.01).step()
        return 1000 - p[0].item()
    assert moved() == pytest.approx(.1, rel=1e-2) and moved(max_ratio=None) == pytest.approx(10, rel=1e-2)

@pytest.mark.parametrize('engine', ['tensor', 'list'])
@pytest.mark.parametrize('wd', [0., 1e-30, 1e-10, 1e-8, .1, 10.])
def test_lamb_is_its_formula_whatever_the_decay(wd, engine): # the text leaves out a factor, which must not overflow where the decay is small
    ps = params(shapes=((3,), (4, 5)))
    opt, want, ms, vs = lamb_opt(wd=wd)(ps, lr=.1, engine=engine), [p.detach().double() for p in ps], [0., 0.], [0., 0.]
    for t in range(1, 6):
        with_grads(ps, t)
        opt.step()
        for i, p in enumerate(ps):
            g = p.grad.double()
            ms[i], vs[i] = .9*ms[i] + .1*g, .99*vs[i] + .01*g**2
            u = ms[i]/(1-.9**t)/((vs[i]/(1-.99**t)).sqrt() + 1e-6) + wd*want[i]
            want[i] = want[i] - .1*min((want[i].norm()/u.norm()).item(), 10.)*u
    for p, w in zip(ps, want): assert_close(p.detach().double(), w, rtol=1e-4, atol=1e-5)

# Engines
def two_lines(p, lr, **kwargs): # a user's own stepper
    p.data.add_(p.grad.data.sign(), alpha=-lr)
    return p

def told(p, lr, **kwargs): return two_lines(p, lr) # the same, declared

told.foreach = True

def looks_inside(p, lr, **kwargs): # it decides by a value, which only a single tensor has
    if p.grad.norm() > 1: p.data.sub_(lr*p.grad)
    return p

def by_shape(p, lr, **kwargs):
    if p.ndim > 1: p.data.sub_(p.grad, alpha=lr)
    return p

def centres(p, lr, **kwargs): # needs whole tensors
    p.data.sub_(p.grad.div(p.grad.norm()), alpha=lr)
    return p

@pytest.mark.parametrize('f', [two_lines, told, looks_inside, by_shape, centres])
def test_own_steppers_give_the_same_whatever_the_engine(f):
    a, b = params(), params()
    train(Optimizer(a, f, lr=.1), a, 4); train(Optimizer(b, f, engine='tensor', lr=.1), b, 4)
    for x, y in zip(a, b): assert_close(x, y)

class Sees(TorchDispatchMode):
    "Names of the operations that run."
    def __init__(self): super().__init__(); self.names = set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

def seen(opt, ps):
    with_grads(ps)
    opt.step() # makes the states
    with Sees() as sees: opt.step()
    return sees.names

def test_only_what_is_declared_runs_over_lists():
    ps = params()
    assert '_foreach_sign' in seen(Optimizer(ps, told, lr=.1), ps)
    for f in two_lines, centres:
        names = seen(Optimizer(ps, f, lr=.1), ps)
        assert not any('foreach' in n for n in names) and names & {'sign', 'linalg_vector_norm'}
        assert not any('foreach' in n for n in seen(Optimizer(ps, [told, f], lr=.1), ps)) # every part has to say so
    assert '_foreach_sign' in seen(Optimizer(ps, two_lines, lr=.1, engine='list'), ps) # at the user's risk

def test_a_wrong_declaration_is_refused_by_name():
    def wrong(p, lr, **kwargs): return looks_inside(p, lr)
    wrong.foreach = True
    with pytest.raises(TypeError, match='no truth value.*must not say `foreach = True`'): Optimizer(with_grads(params()), wrong, lr=.1).step()
    with pytest.raises(TypeError, match='no truth value'): Optimizer(with_grads(params()), looks_inside, engine='list', lr=.1).step()

def test_a_declaration_is_about_the_code_that_it_stands_at():
    class Below(AverageGrad):
        def update(self, p, state, **kwargs): return super().update(p, state, **kwargs) if p.grad.norm() > 0 else state
    class Renamed(AverageGrad): pass
    class Again(Below): foreach, keeps = True, ('grad_avg', 'mom_damp')
    @functools.wraps(sgd_step)
    def wrapped(p, **kwargs): return sgd_step(p, **kwargs)
    ps = params()
    assert [StatefulOptimizer(ps, momentum_step, s(), lr=.1).foreach for s in (AverageGrad, Below, Renamed, Again)] == [True, False, True, True]
    assert not Optimizer(ps, wrapped, lr=.1).foreach

def test_a_rule_that_starts_late_sees_whole_tensors():
    "One that was tried on seven steps was then run on pieces of a tensor: its norm was 1.732."
    def unit(p, step, **kwargs):
        if step % 10 == 0: p.data.mul_(1/p.data.norm())
        return p
    p = nn.Parameter(torch.randn(1500, 1000, generator=torch.Generator().manual_seed(0)))
    p.grad = torch.ones_like(p)
    opt = StatefulOptimizer([p], [sgd_step, unit], StepCount(), lr=.1)
    for _ in range(10): opt.step()
    assert p.norm().item() == pytest.approx(1, rel=1e-4)

@pytest.mark.parametrize('engine', [None, 'tensor'])
def test_a_rule_that_depends_on_a_scheduled_rate(engine):
    def late(p, lr, **kwargs):
        if lr < .05: p.data.mul_(1/p.data.norm())
        return p
    p = nn.Parameter(torch.ones(1500, 1000, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    opt = Optimizer([p], [sgd_step, late], lr=.1, engine=engine)
    for lr in (.1, .06, .04):
        opt.hypers[0]['lr'] = lr
        opt.step()
    assert p.norm().item() == pytest.approx(1, rel=1e-4)

def test_nothing_of_the_user_is_called_before_the_first_step():
    calls = []
    class Own(Stat):
        def init_state(self, p):
            calls.append(('init', p))
            return {'seen': torch.zeros(p.shape, dtype=torch.float32)} # a tensor with a dtype that was written down
        def update(self, p, state, **kwargs):
            calls.append(('update', p))
            state['seen'].add_(p.grad)
            return state
    def counting(p, lr, seen, **kwargs):
        calls.append(('step', p))
        p.data.add_(seen, alpha=-lr)
        return p
    ps = with_grads(params())
    for engine in (None, 'tensor', 'list'):
        opt = StatefulOptimizer(ps, counting, Own(), lr=.1, engine=engine)
        opt.load_state_dict(copy.deepcopy(opt).state_dict())
        repr(opt), opt._repr_markdown_()
        opt.add_param_group(dict(params=params(seed=5)[0]))
    assert calls == []
    StatefulOptimizer(ps, counting, Own(), lr=.1).step()
    assert [k for k, _ in calls] == ['init']*3 + ['update', 'step']*3 and all(o is p for (_, o), p in zip(calls, ps))

@pytest.mark.parametrize('name, f', [('adam', '_fused_adamw_'), ('momentum', '_fused_sgd_'), ('sgd', '_fused_sgd_'), ('lamb', '_foreach_addcmul_')])
def test_a_kernel_runs_where_there_is_one(name, f):
    opt = ready[name](ps := params(), lr=.1, **({'wd': 0.} if name == 'momentum' else {}))
    assert f in seen(opt, ps)
    assert not any('fused' in n for n in seen(ready[name](ps, lr=.1, engine='list'), ps))

def test_only_our_own_parts_have_a_kernel():
    @functools.wraps(adam_step)
    def wrapped(p, **kwargs): return adam_step(p, **kwargs)
    class Other(AverageGrad): pass
    def namesake(p, lr, **kwargs): return two_lines(p, lr)
    namesake.__name__ = 'sgd_step'
    changed = AverageGrad(dampening=True)
    changed.update = lambda p, state, **kwargs: {**state, "mom_damp": .1}
    ps = params()
    for steppers, stats in ((wrapped, adam_stats), (adam_step, [Other(True), *adam_stats[1:]]), (partial(adam_step, eps=1e-3), adam_stats), (namesake, []),
                            (adam_step, [changed, *adam_stats[1:]]), ([adam_step, two_lines], adam_stats), (momentum_step, AverageGrad(True))):
        opt = StatefulOptimizer(ps, steppers, stats, lr=.1)
        assert not any('fused' in n for n in seen(opt, ps)), (steppers, stats)

@pytest.mark.parametrize('steppers, stats', [(sgd_step, []), (momentum_step, [AverageGrad()]), ([l2_reg, momentum_step], [AverageGrad()]),
                                             (adam_step, [AverageGrad(dampening=True), AverageSqrGrad(), StepCount()])])
def test_chains_with_and_without_a_decay_have_a_kernel(steppers, stats):
    for wd in ({}, dict(wd=.1)) if isinstance(steppers, list) else ({},):
        want, got = params(), params()
        for ps, engine in (want, 'tensor'), (got, 'fused'):
            opt = StatefulOptimizer(ps, steppers, copy.deepcopy(stats), engine=engine, lr=.1, **wd)
            for t in range(4):
                for i, p in enumerate(ps): p.grad = torch.full_like(p, .3*(i+1) - .2*t)
                opt.step()
        for a, b in zip(got, want): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize('name', ready)
def test_engines_hand_over_in_the_middle(name):
    a, b = params(), params()
    opt_a, opt_b = ready[name](a, lr=.1, engine='tensor'), ready[name](b, lr=.1)
    train(opt_a, a, 6)
    for i, engine in enumerate((None, 'list', 'tensor', None, 'tensor', 'list')):
        opt_b.engine = engine
        train(opt_b, b, 1, start=i)
    for x, y in zip(a, b): assert_close(x, y)
    sa, sb = opt_a.state_dict()['state'], opt_b.state_dict()['state']
    assert [sorted(s) for s in sa.values()] == [sorted(s) for s in sb.values()]
    for i in sa:
        for k, v in sa[i].items(): assert_close(torch.as_tensor(v), torch.as_tensor(sb[i][k]))

def test_unknown_engine():
    with pytest.raises(ValueError, match="engine='quick'.*'tensor', 'list', 'fused'"): sgd_opt(params(), lr=.1, engine='quick')
    with pytest.raises(ValueError, match="engine='fused'"): Optimizer(params(), looks_inside, engine='fused', lr=.1)
    with pytest.raises(ValueError, match="engine='fused'"): lamb_opt()(params(), lr=.1, engine='fused')


class Reads(TorchDispatchMode):
    "Counts what waits for a device, or copies off it."
    def __init__(self): super().__init__(); self.found = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(k in str(func) for k in ('_local_scalar_dense', '_to_copy', 'item', 'is_nonzero', 'nonzero')): self.found.append(str(func))
        return func(*args, **(kwargs or {}))

def test_reads_counts():
    with Reads() as r: torch.ones(1).item()
    assert r.found

@pytest.mark.parametrize('engine', ['tensor', 'list', None])
@pytest.mark.parametrize('name', ready)
def test_a_step_asks_nothing_of_the_device(name, engine):
    ps = with_grads(params())
    opt = ready[name](ps, lr=.1, engine=engine)
    with Reads() as r:
        for _ in range(3): opt.step()
    assert r.found == []

# Autograd
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize('engine', ['tensor', 'list', None])
@pytest.mark.parametrize('name', ready)
def test_a_step_between_forward_and_backward_is_an_error(name, engine, dtype):
    "As with torch's optimizers: the gradient would be of weights that are gone."
    for make in (lambda ps: ready[name](ps, lr=.1, engine=engine), lambda ps: torch.optim.SGD(ps, lr=.1)):
        p = nn.Parameter(torch.ones(2, dtype=dtype))
        opt, loss = make([p]), (p*p).abs().sum()
        p.grad = torch.ones_like(p)
        opt.step()
        with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()

def test_what_has_no_gradient_is_not_marked():
    a, b = params()[:2]
    loss = (b*b).sum()
    a.grad = torch.ones_like(a)
    sgd_opt([a, b], lr=.1).step()
    loss.backward()
    assert (b.grad == 2*b).all()

def test_a_step_that_is_refused_changes_and_marks_nothing():
    ps = with_grads(params())
    opt = adam_opt()([ps[:1], ps[1:]], lr=.1)
    before, loss = [p.detach().clone() for p in ps], sum((p*p).sum() for p in ps)
    for broken, mended in ((lambda: opt.hypers[1].update(mom=2.), lambda: opt.hypers[1].update(mom=.9)),
                           (lambda: setattr(ps[2].grad, 'data', torch.zeros(3)), lambda: setattr(ps[2].grad, 'data', torch.zeros_like(ps[2])))):
        broken()
        with pytest.raises(ValueError, match='mom=2.0 must be|parameter 1 of group 1'): opt.step()
        assert equal(before, ps) and not any(opt.state.values())
        mended()
    opt.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, 2*p) for p in ps)

def test_a_step_that_fails_is_marked_too():
    def fails(p, lr, **kwargs): p.data.add_(1); raise ArithmeticError
    p = nn.Parameter(torch.ones(2))
    loss, p.grad = (p*p).sum(), torch.ones(2)
    with pytest.raises(ArithmeticError): Optimizer([p], fails, lr=.1).step()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()

# Half precision, complex numbers
@pytest.mark.parametrize('engine', ['tensor', 'list', None])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ready)
def test_half_precision_with_float32_state(name, dtype, engine):
    ps = params(dtype=dtype)
    ref = [nn.Parameter(p.detach().float()) for p in ps]
    opt, opt_ref = ready[name](ps, lr=.01, engine=engine), ready[name](ref, lr=.01)
    for i in range(50):
        with_grads(ps, seed=i)
        if i == 3: ps[0].grad.mul_(1e4 if dtype == torch.float16 else 1e20).clamp_(-6e4, 6e4) # its square does not fit float16
        if i == 5: ps[1].grad.mul_(1e-4)
        for p, q in zip(ps, ref): q.grad = p.grad.float()
        opt.step(); opt_ref.step()
    assert all(p.isfinite().all() and p.dtype == dtype for p in ps)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    for p, q in zip(ps[1:], ref[1:]): assert (p.float()-q).abs().max() < (.1 if dtype == torch.bfloat16 else .02)*(1 + q.abs().max())

def test_complex_as_in_torch():
    def make(): return [nn.Parameter(torch.complex(*torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()))]
    a, b = make(), make()
    opt_a, opt_b = adam_opt(wd=.1, sqr_mom=.999)(a, lr=.1), torch.optim.AdamW(b, lr=.1, weight_decay=.1, eps=1e-5)
    for i in range(4):
        g = torch.complex(*torch.randn(2, 4, generator=torch.Generator().manual_seed(i)).double())
        a[0].grad, b[0].grad = g.clone(), g.clone()
        opt_a.step(); opt_b.step()
    assert_close(a[0], b[0], rtol=1e-9, atol=1e-9)

# Groups
def test_groups_in_every_form():
    ps = params()
    named = [(f'p{i}', p) for i, p in enumerate(ps)]
    forms = [(ps, [3]), ((p for p in ps), [3]), ([ps[:1], ps[1:]], [1, 2]), (([p] for p in ps), [1, 1, 1]), ((iter([p]) for p in ps), [1, 1, 1]), (named, [3]),
             ([dict(params=ps[:2], lr=.5), dict(params=ps[2])], [2, 1]), (dict(params=ps), [3]), ([tuple(ps[:2]), ps[2:]], [2, 1]),
             (nn.ParameterList(ps).named_parameters(), [3])]
    for form, sizes in forms:
        opt = sgd_opt(form, lr=.1)
        assert [len(pg['params']) for pg in opt.param_groups] == sizes
        assert [pg['lr'] for pg in opt.hypers] == ([.5, .1] if isinstance(form, list) and isinstance(form[0], dict) else [.1]*len(sizes))
    assert sgd_opt(named, lr=.1).param_groups[0]['param_names'] == ['p0', 'p1', 'p2']

def test_hypers_are_the_groups_of_the_moment():
    opt = sgd_opt(params(), lr=.1)
    assert opt.hypers is opt.param_groups
    opt.load_state_dict(opt.state_dict())
    assert opt.hypers is opt.param_groups

def test_the_dict_given_stays_as_it_was():
    group = dict(params=params()[:1])
    opt = sgd_opt([group], lr=.1)
    opt.add_param_group(dict(params=params()[1:]))
    assert list(group) == ['params'] and len(opt.param_groups) == 2

def test_each_group_has_its_hypers():
    ps = params()
    want = params()
    opt = adam_opt()([dict(params=ps[:1], lr=.1, mom=.5), dict(params=ps[1:], lr=.01, wd=.3)])
    ref = torch.optim.AdamW([dict(params=want[:1], lr=.1, betas=(.5, .99), weight_decay=0.), dict(params=want[1:], lr=.01, weight_decay=.3)], betas=(.9, .99), eps=1e-5)
    train(opt, ps, 4); train(ref, want, 4)
    for a, b in zip(ps, want): assert_close(a, b)

def test_add_param_group_in_the_middle():
    ps, want = params(), params()
    opt, ref = adam_opt()(ps[:2], lr=.1), torch.optim.AdamW(want[:2], lr=.1, betas=(.9, .99), eps=1e-5, weight_decay=0.)
    train(opt, ps[:2], 2); train(ref, want[:2], 2)
    opt.add_param_group(dict(params=[ps[2]], lr=.01)); ref.add_param_group(dict(params=[want[2]], lr=.01))
    train(opt, ps, 2); train(ref, want, 2)
    for a, b in zip(ps, want): assert_close(a, b)

def test_frozen_parameters_may_come_along():
    ps = params()
    ps[0].requires_grad_(False)
    before = ps[0].clone()
    opt = adam_opt()(ps, lr=.1)
    train(opt, ps[1:], 2)
    assert torch.equal(ps[0], before) and ps[0] not in opt.state

# State
@pytest.mark.parametrize('name', ready)
@pytest.mark.parametrize('how', ['state_dict', 'file', 'deepcopy', 'pickle'])
def test_state_survives_in_the_middle(name, how):
    a = params()
    opt = ready[name](a, lr=.1)
    train(opt, a, 3)
    b = params()
    for p, q in zip(b, a): p.data.copy_(q.data)
    if how in ('deepcopy', 'pickle'):
        b, other = copy.deepcopy((a, opt)) if how == 'deepcopy' else pickle.loads(pickle.dumps((a, opt)))
    else:
        other, sd, buf = ready[name](b, lr=.5), opt.state_dict(), io.BytesIO()
        if how == 'file':
            torch.save(sd, buf); buf.seek(0)
            sd = torch.load(buf, weights_only=True)
        other.load_state_dict(sd)
    assert other.param_groups[0]['params'][0] is b[0] and other.param_groups[0]['lr'] == .1 and not equal(a, params())
    assert [type(s) for s in other.all_parts] == [type(s) for s in opt.all_parts] and repr(other) == repr(opt)
    train(opt, a, 3, start=3); train(other, b, 3, start=3)
    assert equal(a, b)

def test_a_loaded_state_is_a_copy_and_keeps_its_type():
    ps = params(dtype=torch.bfloat16)
    opt = adam_opt()(ps, lr=.1)
    train(opt, ps, 2)
    sd = opt.state_dict()
    other = adam_opt()(ps, lr=.1)
    other.load_state_dict(sd)
    mine, its = other.state[ps[0]]['grad_avg'], sd['state'][0]['grad_avg']
    assert mine.dtype == torch.float32 and torch.equal(mine, its) and mine is not its and isinstance(other.state[ps[0]]['step'], int)

def test_loading_before_the_first_step():
    ps = params()
    opt = adam_opt()(ps, lr=.1)
    opt.load_state_dict(adam_opt()(params(), lr=.2).state_dict())
    assert opt.param_groups[0]['lr'] == .2
    train(opt, ps, 1)

def test_state_of_another():
    ps = params()
    opts = {k: f(ps, lr=.1) for k, f in ready.items()}
    for o in opts.values(): train(o, ps, 1)
    with pytest.raises(ValueError, match='another optimizer: its parts are .*momentum_step.*, here .*adam_step'): opts['adam'].load_state_dict(opts['momentum'].state_dict())
    with pytest.raises(ValueError, match='another optimizer: its parts are'): opts['lamb'].load_state_dict(opts['adam'].state_dict())
    ref = torch.optim.AdamW(ps, lr=.1)
    train(ref, ps, 1)
    with pytest.raises(ValueError, match='group 0 has no wd, mom, sqr_mom|from_torch'): opts['adam'].load_state_dict(ref.state_dict())
    sd = opts['adam'].state_dict()
    del sd['state'][1]['sqr_avg']
    with pytest.raises(ValueError, match='parameter 1 of group 0 differs in sqr_avg'): opts['adam'].load_state_dict(sd)
    with pytest.raises(ValueError, match="no 'param_groups'"): opts['adam'].load_state_dict({})

def test_state_of_other_shapes():
    a, b = params(), params(shapes=((3,), (5, 4), (2, 3, 3, 3)))
    opt = adam_opt()(a, lr=.1)
    train(opt, a, 1)
    other = adam_opt()(b, lr=.1)
    with pytest.raises(ValueError, match=r'state of parameter 1 of group 0 was made for float32 \(4, 5\), the parameter is float32 \(5, 4\)'): other.load_state_dict(opt.state_dict())
    assert not other.state
    with pytest.raises(ValueError, match="has 3 parameters, the optimizer's 2"): adam_opt()(b[:2], lr=.1).load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match='has 1 parameter groups, the optimizer 2'): adam_opt()([b[:2], b[2:]], lr=.1).load_state_dict(opt.state_dict())

# With torch
def test_it_is_a_torch_optimizer(): assert isinstance(sgd_opt(params(), lr=.1), torch.optim.Optimizer)

def test_closure():
    p = nn.Parameter(torch.tensor([3.]))
    opt = sgd_opt([p], lr=.1)
    def closure():
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss
    assert opt.step(closure).item() == 9. and p.item() == pytest.approx(3 - .1*6)

def test_zero_grad():
    ps = with_grads(params())
    opt = sgd_opt(ps, lr=.1)
    opt.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in ps)
    opt.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in ps)

@pytest.mark.parametrize('sched', [lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=.1, total_steps=8, cycle_momentum=False),
                                   lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: .5**i), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
                                   lambda o: torch.optim.lr_scheduler.StepLR(o, 2)])
def test_torch_schedulers(sched):
    a, b = params(), params()
    opt, ref = sgd_opt(a, lr=.1), torch.optim.SGD(b, lr=.1)
    sa, sb = sched(opt), sched(ref)
    for i in range(6):
        train(opt, a, 1, start=i); train(ref, b, 1, start=i)
        sa.step(); sb.step()
        assert opt.param_groups[0]['lr'] == ref.param_groups[0]['lr']
    for x, y in zip(a, b): assert_close(x, y)
    other = sgd_opt(a, lr=.3)
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]['lr'] == opt.param_groups[0]['lr'] and other.param_groups[0]['initial_lr'] == opt.param_groups[0]['initial_lr']

def test_grad_scaler():
    a, b = params(), params()
    opt, ref, scaler, scaler_ref = adam_opt()(a, lr=.1), torch.optim.AdamW(b, lr=.1, betas=(.9, .99), eps=1e-5, weight_decay=0.), *(torch.amp.GradScaler('cpu', init_scale=16.) for _ in '12')
    for i in range(5):
        for ps, o, s in ((a, opt, scaler), (b, ref, scaler_ref)):
            o.zero_grad()
            loss = sum((p*(torch.inf if i == 2 else 1)).pow(2).sum() for p in ps)
            s.scale(loss).backward(); s.step(o); s.update()
    assert scaler.get_scale() == 8. and opt.state[a[0]]['step'] == 4
    for x, y in zip(a, b): assert_close(x, y)

def test_a_profiler_sees_the_step():
    ps = with_grads(params())
    opt = sgd_mom_opt(ps, lr=.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof: opt.step()
    assert any(e.key == 'Optimizer.step#StatefulOptimizer.step' for e in prof.key_averages())

def test_hooks_of_all_optimizers():
    seen, p = [], torch.nn.Parameter(torch.ones(3))
    opt = sgd_mom_opt([p], lr=.1, wd=0.)
    p.grad = torch.ones(3)
    opt.step()
    handle = register_optimizer_step_post_hook(lambda *args: seen.append(args[0]))
    try: opt.step()
    finally: handle.remove()
    opt.step()
    assert seen == [opt]

def test_step_hooks():
    seen = []
    ps = with_grads(params())
    opt = sgd_opt(ps, lr=.1)
    opt.register_step_pre_hook(lambda *a: seen.append('before')); opt.register_step_post_hook(lambda *a: seen.append('after'))
    opt.step()
    assert seen == ['before', 'after']

def test_param_changed_in_place_or_replaced():
    ps = params()
    opt = adam_opt()(ps, lr=.1)
    train(opt, ps, 1)
    ps[0].data = torch.zeros(3)
    new = nn.Parameter(torch.ones(4, 5))
    opt.param_groups[0]['params'][1] = new
    train(opt, [ps[0], new, ps[2]], 1)
    assert ps[0].abs().sum() > 0 and not torch.equal(new, torch.ones(4, 5))

def test_a_state_put_in_by_hand_is_used():
    a, b = params(), params()
    opts = [adam_opt()(ps, lr=.1) for ps in (a, b)]
    for o, ps in zip(opts, (a, b)): train(o, ps, 2)
    for o, ps in zip(opts, (a, b)): o.state[ps[0]] = {**o.state[ps[0]], 'step': 0, 'grad_avg': torch.ones(3)}
    opts[1].engine = 'tensor'
    for o, ps in zip(opts, (a, b)): train(o, ps, 1, start=2)
    for x, y in zip(a, b): assert_close(x, y)

def test_the_loops_scheduler_and_finder():
    from types import SimpleNamespace
    from dl2lib.runner import Runner, TrainBundle
    gen = torch.Generator().manual_seed(0)
    xs = [(torch.randn(8, 3, generator=gen), torch.randint(2, (8,), generator=gen)) for _ in range(10)]
    for make in (*ready.values(),):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        before = [p.detach().clone() for p in model.parameters()]
        opt = make(model.parameters(), lr=.1)
        learn = TrainBundle(model, opt, nn.functional.cross_entropy, SimpleNamespace(train_dl=xs, valid_dl=None))
        Runner(cbs=[LR_Find(max_iter=8)]).fit(1, learn)
        assert equal(before, list(model.parameters())) and not any(opt.state.values()) and opt.param_groups[0]['lr'] == .1
        seen = []
        class Watch(ParamScheduler):
            _order = 2
            def begin_batch(self): super().begin_batch(); seen.append(self.opt.hypers[0]['lr'])
        Runner(cbs=[Watch('lr', lambda pos: .1*(1-pos))]).fit(1, learn)
        assert seen == pytest.approx([.1*(1-i/10) for i in range(10)]) and opt.param_groups[0]['lr'] == .1 and not equal(before, list(model.parameters()))
        with pytest.raises(ValueError, match="no such hyperparameter; it has .*lr"): Runner(cbs=[ParamScheduler('momentum', lambda pos: 0.)]).fit(1, learn)
        with pytest.raises(ValueError, match='2 schedules for 1 parameter groups'): Runner(cbs=[ParamScheduler('lr', [lambda pos: 0.]*2)]).fit(1, learn)

# It explains itself
def test_repr_and_formula():
    opt = adam_opt(wd=.1)(params(), lr=.1)
    text = repr(opt)
    for s in ('AverageGrad(dampening=True) -> AverageSqrGrad(dampening=True) -> StepCount -> weight_decay -> adam_step', '3 tensors, 77 elements', 'lr=0.1', 'wd=0.1'): assert s in text
    md = opt._repr_markdown_()
    assert md.count('$$') == 2 and all(o.formula in md for o in opt.all_parts)
    def my_own(p, lr, **kwargs): return p
    assert r'\text{my\_own}' in Optimizer(params(), my_own, lr=.1)._repr_markdown_() # a bare underscore is an error in \text

# Conveniences
@pytest.mark.parametrize('make', [adam_opt, lamb_opt])
def test_parameters_may_be_given_at_once(make):
    ps = params()
    for form in (ps, (p for p in ps), [ps[:1], ps[1:]], dict(params=ps), [('w', ps[0])], iter([dict(params=ps, lr=.2)])):
        opt = make(form, lr=.1, wd=.2)
        assert isinstance(opt, StatefulOptimizer) and opt.hypers[0]['wd'] == .2 and sum(len(pg['params']) for pg in opt.hypers) in (1, 3)
    assert repr(make(ps, lr=.1)) == repr(make()(ps, lr=.1))
    for xtra in (None, sgd_step, [sgd_step], (sgd_step,), []): # further steppers, as in the lesson
        opt = make(xtra, wd=.2)(ps, lr=.1)
        assert (sgd_step in opt.steppers) == bool(xtra) and opt.hypers[0]['wd'] == .2
    with pytest.raises(TypeError, match='parameter 0 of group 0 is a Linear: a tensor is needed'): make(nn.Linear(2, 2), lr=.1)
    with pytest.raises(ValueError, match='no parameters'): make(dict(params=[]), lr=.1)

def test_a_learner_takes_adam_opt_both_ways():
    from types import SimpleNamespace
    from dl2lib.learner import Learner
    data = SimpleNamespace(train_dl=[], valid_dl=None)
    for opt_func in (adam_opt, adam_opt()):
        learn = Learner(nn.Linear(2, 2), data, nn.functional.cross_entropy, opt_func=opt_func, lr=.003)
        assert learn.opt.hypers[0]['lr'] == .003 and len(learn.opt.hypers[0]['params']) == 2

class Looks(Stat):
    def init_state(self, p): return {'looked': 0.}
    def update(self, p, state, grad_avg, **kwargs): return {**state, 'looked': 1.}

def test_a_stat_that_asks_for_the_state_is_told_where_it_is():
    with pytest.raises(TypeError, match=r"Looks asks for 'grad_avg' in update: take it from the state, state\['grad_avg'\]"): StatefulOptimizer(params(), momentum_step, [AverageGrad(), Looks()], lr=.1)
    class Quiet(AverageGrad): keeps = None # it does not say what it keeps: noticed in the first step
    opt = StatefulOptimizer(with_grads(ps := params()), momentum_step, [Quiet(), Looks()], lr=.1)
    with pytest.raises(TypeError, match="update.*missing 1 required positional argument: 'grad_avg'") as e: opt.step()
    assert e.value.__notes__ == ['In the state are grad_avg, looked, mom_damp; hyperparameters are lr, mom. '
                                 'A stepper gets both by name; a stat takes the first from the state, as state[name].']

class Silent(Stat):
    def init_state(self, p): return {'kept': torch.zeros_like(p)}
    def update(self, p, state, **kwargs): return state

def test_names_are_checked_in_the_first_step_where_a_stat_does_not_say_what_it_keeps():
    def uses(p, lr, kept, misspelt, **kwargs): return p
    opt = StatefulOptimizer(with_grads(params()), uses, Silent(), lr=.1)
    with pytest.raises(TypeError, match="uses.*missing 1 required positional argument: 'misspelt'") as e: opt.step()
    assert e.value.__notes__[0].startswith('In the state are kept; hyperparameters are lr.')
    def takes(p, lr, kept, **kwargs): return p
    opt = StatefulOptimizer(with_grads(params()), takes, Silent(), lr=.1, kept=3)
    with pytest.raises(TypeError, match="takes.*got multiple values for keyword argument 'kept'") as e: opt.step()
    assert e.value.__notes__[0].startswith('In the state are kept; hyperparameters are lr, kept.')
    def fails(p, lr, kept, **kwargs): return p + 'a' # a TypeError of another kind stays as it is
    with pytest.raises(TypeError, match='unsupported operand|must be Tensor'): StatefulOptimizer(with_grads(params()), fails, Silent(), lr=.1).step()
    class Clashes(Silent): pass # two that do not say it, and keep the same name
    with pytest.raises(ValueError, match="Clashes keeps 'kept' in the state, and so does a stat before it"):
        StatefulOptimizer(with_grads(params()), takes, [Silent(), Clashes()], lr=.1).step()

def test_torch_words_for_decay():
    ps = params()
    opt = adam_opt()([dict(params=ps[:1], weight_decay=0.), dict(params=ps[1:], weight_decay=.1)], lr=.1) # timm's groups
    assert [pg['wd'] for pg in opt.hypers] == [0., .1] and not any('weight_decay' in pg for pg in opt.hypers)
    assert sgd_opt(ps, lr=.1, weight_decay=.3).hypers[0]['wd'] == .3
    with pytest.raises(ValueError, match=r'weight_decay=0.1 and wd=0.2 are the same thing: give wd'): adam_opt(wd=.2)(ps, lr=.1, weight_decay=.1)
    with pytest.raises(TypeError, match="'weight_decay': it is called wd here; they use lr"): Optimizer(ps, sgd_step, lr=.1, weight_decay=.1)
    def own(p, lr, weight_decay, **kwargs): return p # a user's own word stays
    assert Optimizer(ps, own, lr=.1, weight_decay=.1).hypers[0]['weight_decay'] == .1
    opt.hypers[0]['weight_decay'] = .5
    with pytest.raises(TypeError, match="'weight_decay': it is called wd here"): (with_grads(ps), opt.step())

def test_a_group_after_loading():
    opt = adam_opt()(params(), lr=.1)
    opt.load_state_dict(opt.state_dict())
    opt.add_param_group(dict(params=params(seed=7), lr=.2))
    assert [pg['lr'] for pg in opt.hypers] == [.1, .2]

# Bad input
def test_no_parameters():
    used = iter(params()); list(used)
    for bad in ([], iter([]), used, [[]], [dict(params=[])]):
        with pytest.raises(ValueError, match='no parameters'): sgd_opt(bad, lr=.1)
    with pytest.raises(TypeError, match='one tensor: give a list'): sgd_opt(params()[0], lr=.1)
    with pytest.raises(ValueError, match="group 0 has no 'params'"): sgd_opt([dict(lr=.1)], lr=.1)
    with pytest.raises(TypeError, match="parameter 1 of group 0 is a str"): sgd_opt([dict(params=[params()[0], 'a'])], lr=.1)
    with pytest.raises(TypeError, match="parameter 0 of group 0 is a float: a tensor is needed"): sgd_opt([1.], lr=.1)
    with pytest.raises(TypeError, match="parameter 1 of group 0 is a NoneType"): sgd_opt([params()[0], None], lr=.1)

def test_a_parameter_twice():
    ps = params()
    with pytest.raises(ValueError, match=r'parameter 2 of group 0, shape \(3,\), is given twice: it is parameter 0 of group 0'): sgd_opt([ps[0], ps[1], ps[0]], lr=.1)
    with pytest.raises(ValueError, match=r'parameter 0 of group 1.*it is parameter 1 of group 0'): sgd_opt([ps[:2], ps[1:]], lr=.1)
    opt = sgd_opt(ps[:1], lr=.1)
    with pytest.raises(ValueError, match='parameter 0 of group 1.*twice'): opt.add_param_group(dict(params=ps[:1]))
    assert len(opt.param_groups) == 1

def test_a_hyperparameter_that_no_part_uses():
    with pytest.raises(TypeError, match="'momm': do you mean 'mom'"): sgd_mom_opt(params(), lr=.1, momm=.9)
    with pytest.raises(TypeError, match="'weight_dekay': they use lr, wd"): sgd_opt(params(), lr=.1, weight_dekay=.9)
    with pytest.raises(TypeError, match="'momentum': it is called mom here"): sgd_mom_opt(params(), lr=.1, momentum=.9)
    with pytest.raises(TypeError, match="'betas': it is called mom and sqr_mom here"): adam_opt()(params(), lr=.1, betas=(.9, .99))
    with pytest.raises(TypeError, match="'sqr_mon': do you mean 'sqr_mom'"): adam_opt()([dict(params=params(), sqr_mon=.9)], lr=.1)
    opt = sgd_mom_opt(with_grads(ps := params()), lr=.1)
    opt.hypers[0]['moom'] = .5
    with pytest.raises(TypeError, match="'moom': do you mean 'mom'"): opt.step()

def test_a_hyperparameter_that_nobody_gives():
    with pytest.raises(TypeError, match=r"sgd_step needs the hyperparameter 'lr': pass lr=.*group 0"): Optimizer(params(), sgd_step)
    ps = params()
    with pytest.raises(TypeError, match=r"'lr': pass lr=.*group 1"): Optimizer([dict(params=ps[:1], lr=.1), dict(params=ps[1:])], sgd_step)
    with pytest.raises(TypeError, match="adam_step needs the hyperparameter 'mom'"): StatefulOptimizer(ps, adam_step, [], lr=.1)
    with pytest.raises(TypeError, match="adam_step needs the hyperparameter 'step'"): StatefulOptimizer(ps, adam_step, adam_stats[:2], lr=.1)
    Optimizer([dict(params=ps[:1], lr=.1), dict(params=ps[1:], lr=.2)], sgd_step) # each group has its own

@pytest.mark.parametrize('name,v', [('lr', -.1), ('lr', math.nan), ('lr', math.inf), ('mom', 1.), ('mom', -.1), ('mom', math.nan), ('sqr_mom', 1.), ('wd', -.1), ('eps', -1e-8), ('wd', math.nan), ('eps', math.inf)])
def test_values_without_sense(name, v):
    with pytest.raises(ValueError, match=f'{name}={v!r} must'): adam_opt()(params(), **{'lr': .1, name: v})
    opt = adam_opt()(with_grads(params()), lr=.1)
    opt.hypers[0][name] = v
    with pytest.raises(ValueError, match=f'{name}={v!r} must'): opt.step()
    assert not any(opt.state.values())
    opt = adam_opt()(params()[:1], lr=.1)
    with pytest.raises(ValueError, match=f'{name}={v!r} must'): opt.add_param_group(dict(params=params(seed=3), **{name: v}))
    assert len(opt.param_groups) == 1

def test_a_value_that_is_no_number():
    with pytest.raises(TypeError, match="lr='a' is a str"): sgd_opt(params(), lr='a')
    with pytest.raises(TypeError, match='lr=.*Tensor'): sgd_opt(params(), lr=torch.tensor(.1))

def test_sparse_gradients():
    emb = nn.Embedding(5, 2, sparse=True)
    emb(torch.tensor([1])).sum().backward()
    for engine in ('tensor', None):
        opt = adam_opt()(emb.parameters(), lr=.1, engine=engine)
        with pytest.raises(ValueError, match=r'parameter 0 of group 0, shape \(5, 2\), has a sparse gradient.*sparse=False'): opt.step()

def test_a_tensor_that_was_computed():
    p = params()[0]
    with pytest.raises(ValueError, match=r'parameter 1 of group 0, shape \(3,\), is no leaf'): sgd_opt([p, p*2], lr=.1)

def test_parts_that_do_not_fit():
    def new(p, lr, **kwargs): return p.data - lr*p.grad
    opt = Optimizer(with_grads(params()), new, lr=.1)
    with pytest.raises(TypeError, match='new returns something new: a stepper changes p in place'): opt.step()
    with pytest.raises(TypeError, match='steppers'): Optimizer(params(), 'sgd', lr=.1)
    with pytest.raises(TypeError, match='steppers'): Optimizer(params(), [], lr=.1)
    with pytest.raises(TypeError, match='AverageGrad.*instance'): StatefulOptimizer(params(), momentum_step, AverageGrad, lr=.1)
    with pytest.raises(ValueError, match="'step'.*state"): adam_opt()(params(), lr=.1, step=3)
    class Empty(Stat): pass
    with pytest.raises(NotImplementedError, match='Empty.init_state'): StatefulOptimizer(with_grads(params()), sgd_step, Empty(), lr=.1).step()

def test_two_stats_of_one_name():
    with pytest.raises(ValueError, match="grad_avg"): StatefulOptimizer(params(), momentum_step, [AverageGrad(), AverageGrad(dampening=True)], lr=.1)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('engine', ['tensor', 'list', None])
@pytest.mark.parametrize('name', ready)
def test_cuda_agrees_and_never_waits(name, engine):
    a, b = params(), [nn.Parameter(p.detach().cuda()) for p in params()]
    opt_a, opt_b = ready[name](a, lr=.1, engine='tensor'), ready[name](b, lr=.1, engine=engine)
    for i in range(6):
        with_grads(a, seed=i)
        for p, q in zip(a, b): q.grad = p.grad.cuda()
        opt_a.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')
        try: opt_b.step()
        finally: torch.cuda.set_sync_debug_mode('default')
    for x, y in zip(a, b): assert_close(x, y.cpu(), rtol=2e-4, atol=2e-5)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_cuda_state_follows_the_model():
    ps = params()
    opt = adam_opt()(ps, lr=.1)
    train(opt, ps, 2)
    for p in ps: p.data = p.data.cuda()
    opt.load_state_dict(opt.state_dict())
    assert all(v.is_cuda for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    for p in ps: p.grad = torch.ones_like(p)
    opt.step()

# What the chapter quotes
def test_tables_in_the_chapter_are_those_measured():
    measured = (ROOT/'benchmarks/results/optim_shapes.md').read_text(encoding='utf-8').split('## L2 and')[1].split('\n## ')[0].splitlines()
    rows = [l for l in measured if l.startswith(('| SGD', '| momentum', '| Adam'))]
    text = '\n'.join(source(c) for c in read_nb(ROOT/'nbs/09_optimizers.ipynb')['cells'] if c['cell_type'] == 'markdown').splitlines()
    assert len(rows) == 9 and not [r for r in rows if r not in text], 'copy the tables of benchmarks/results/optim_shapes.md into the chapter'
