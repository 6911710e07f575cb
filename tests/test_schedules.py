"schedules: against torch's schedulers and NumPy, properties, and bad input."
import itertools, math, pickle, re, subprocess, sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dl2lib import schedules
from dl2lib.schedules import annealer, combine_scheds, cos_1cycle_anneal, create_phases, sched_cos, sched_exp, sched_lin, sched_no

CURVES = [sched_lin, sched_cos, sched_exp]
ENDS = [(0.1, 0.3), (0.3, 0.05), (1e-6, 10.), (-1., -3.), (2., 2.), (1, 3)]
POS = [i/200 for i in range(201)]

def torch_lrs(scheduler, lr, steps, **kw):
    "The rates of a scheduler of torch, before each of `steps` steps."
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    sched, res = scheduler(opt, **kw), []
    for _ in range(steps): res.append(opt.param_groups[0]['lr']); opt.step(); sched.step()
    return res

def close(a, b, rtol=1e-9): np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12)


# the curves

@pytest.mark.parametrize('start, end', ENDS)
def test_curves_against_numpy(start, end):
    t = np.array(POS)
    close([sched_lin(start, end, p) for p in POS], np.linspace(start, end, 201))
    close([sched_exp(start, end, p) for p in POS], np.geomspace(start, end, 201))
    close([sched_cos(start, end, p) for p in POS], start + (end-start)*np.sin(np.pi*t/2)**2) # another form of (1-cos)/2
    assert [sched_no(start, end, p) for p in POS] == [start]*201

@pytest.mark.parametrize('start, end', [(0.3, 0.05), (0.1, 0.), (1., 2.)])
def test_curves_against_torch(start, end):
    n = 40
    ours = lambda sched: [sched(start, end, i/n) for i in range(n+1)]
    close(ours(sched_cos), torch_lrs(torch.optim.lr_scheduler.CosineAnnealingLR, start, n+1, T_max=n, eta_min=end))
    close(ours(sched_lin), torch_lrs(torch.optim.lr_scheduler.LambdaLR, start, n+1, lr_lambda=lambda i: (start+(end-start)*i/n)/start))
    if end > 0: close(ours(sched_exp), torch_lrs(torch.optim.lr_scheduler.ExponentialLR, start, n+1, gamma=(end/start)**(1/n)))

def test_linear_against_torch_linear_lr():
    close([sched_lin(0.2, 0.8, i/30) for i in range(31)], torch_lrs(torch.optim.lr_scheduler.LinearLR, 0.8, 31, start_factor=0.25, total_iters=30))

@pytest.mark.parametrize('sched', CURVES)
@pytest.mark.parametrize('start, end', ENDS)
def test_curves_reach_their_ends_and_never_turn(sched, start, end):
    f = sched(start, end)
    values = [f(p) for p in POS]
    close([values[0], values[-1]], [start, end])
    steps = np.diff(values)*np.sign(end-start)
    assert (steps >= -1e-12).all() and min(start, end)-1e-9 <= min(values) and max(values) <= max(start, end)+1e-9
    close(values, [sched(end, start)(1-p) for p in POS]) # there and back is the same way

def test_the_shape_of_the_curves():
    close(sched_cos(0., 1., .5), .5); assert sched_cos(0., 1., .1) < .1 and sched_cos(0., 1., .9) > .9
    close(sched_exp(1e-4, 1., .5), 1e-2)
    ratios = np.array([sched_exp(1e-4, 1., p) for p in POS]); close(ratios[1:]/ratios[:-1], [10**(4/200)]*200)

@pytest.mark.parametrize('start, end', [(0., 1.), (1., 0.), (0, 0), (-1., 1.), (1., -1.), (math.nan, 1.), (1., math.nan)])
def test_exp_refuses_at_once_and_later(start, end):
    says = re.escape(f'sched_exp(start={start}, end={end}): equal factors lead from no number to one of another sign, nor to 0')
    with pytest.raises(ValueError, match=says): sched_exp(start, end)
    with pytest.raises(ValueError, match=says): sched_exp(start, end, 0.5)

def test_exp_takes_what_is_very_small_or_large():
    close(sched_exp(1e-200, 1e-100, .5)*1e150, 1.); close(sched_exp(1e200, 1e100, .5)/1e150, 1.)
    close(sched_exp(1e-200, 1e-200, .5)*1e200, 1.)

@pytest.mark.parametrize('sched', [sched_lin, sched_cos])
def test_ends_that_are_no_numbers_are_refused_at_once(sched):
    with pytest.raises(TypeError): sched('high', 0.1)
    with pytest.raises(TypeError): sched(0.1, None)

def test_position_zero_is_a_position():
    for sched in CURVES+[sched_no]: assert sched(.25, .5, 0) == sched(.25, .5, 0.) == .25

def test_annealer_makes_a_schedule_of_any_formula():
    calls = []
    @annealer
    def square(start, end, pos):
        "A parabola."
        calls.append(pos)
        return start + (end-start)*pos**2
    f = square(1., 3.)
    assert calls == [0.] and f(.5) == square(1., 3., .5) == square(1., 3., pos=.5) == square(start=1., end=3.)(.5) == 1.5
    assert square.__name__ == 'square' and square.__doc__ == 'A parabola.'


# one after the other

def test_the_lesson():
    f = combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.1, 0.3, 0.05))
    close([f(0), f(0.15), f(0.3), f(0.65), f(1)], [0.1, 0.2, 0.3, 0.175, 0.05])
    close([f(p) for p in POS], [0.1+0.2*math.sin(math.pi/2*p/0.3)**2 if p < 0.3 else 0.3-0.25*math.sin(math.pi/2*(p-0.3)/0.7)**2 for p in POS])

@pytest.mark.parametrize('pct', [0.1, 0.25, 0.3, 0.5, 0.9])
def test_one_cycle_against_torch(pct):
    n, high, div, final = 60, 0.8, 10., 100.
    lrs = torch_lrs(torch.optim.lr_scheduler.OneCycleLR, 0.1, n, max_lr=high, total_steps=n, pct_start=pct, anneal_strategy='cos',
                    div_factor=div, final_div_factor=final, cycle_momentum=False)
    share = (pct*n-1)/(n-1) # torch counts the peak from step 1, and its last step is n-1
    f = combine_scheds(create_phases(share), cos_1cycle_anneal(high/div, high, high/div/final))
    close([f(i/(n-1)) for i in range(n)], lrs)

@pytest.mark.parametrize('pct', [0.3, 0.5])
def test_three_phases_against_torch(pct):
    n, high, div, final = 50, 0.8, 10., 100.
    lrs = torch_lrs(torch.optim.lr_scheduler.OneCycleLR, 0.1, n, max_lr=high, total_steps=n, pct_start=pct, anneal_strategy='linear', three_phase=True,
                    div_factor=div, final_div_factor=final, cycle_momentum=False)
    up, down = (pct*n-1)/(n-1), (2*pct*n-2)/(n-1)
    low, end = high/div, high/div/final
    shares = create_phases([up, down-up])
    f = combine_scheds(shares, [sched_lin(low, high), sched_lin(high, low), sched_lin(low, end)])
    close([f(i/(n-1)) for i in range(n)], lrs)

def random_shares(n_phases, rng):
    p = rng.random(n_phases)
    return (p/p.sum()).tolist()

@pytest.mark.parametrize('n', [1, 2, 3, 6, 7, 9, 10, 11, 13, 49, 100])
@pytest.mark.parametrize('equal', [True, False])
def test_combined_is_continuous_and_meets_its_points(n, equal):
    rng = np.random.default_rng(n)
    pcts, knots = [1/n]*n if equal else random_shares(n, rng), rng.random(n+1)+0.1
    for sched in CURVES:
        f = combine_scheds(pcts, [sched(float(a), float(b)) for a, b in zip(knots, knots[1:])])
        edges = [0., *itertools.accumulate(pcts)]
        for e, v in zip(edges, knots):
            for near in (e, e-1e-9, e+1e-9): np.testing.assert_allclose(f(near), v, atol=1e-4*n)
        close([f(edges[0]), f(edges[-1]), f(1.)], [knots[0], knots[-1], knots[-1]])

@pytest.mark.parametrize('n', range(1, 60))
def test_equal_shares_never_fail(n):
    f = combine_scheds([1/n]*n, [sched_lin(float(i), i+1.) for i in range(n)])
    close([f(i/1000) for i in range(1001)], [n*i/1000 for i in range(1001)]) # together they are one straight line
    for summed in itertools.accumulate([1/n]*n): close(f(summed), n*min(summed, 1.))

@pytest.mark.parametrize('pcts', [[0.1]*10, [0.2, 0.7, 0.1], [0.3, 0.6, 0.1], [0.01, 0.3, 0.69], [1/9]*9, [0.333333, 0.333333, 0.333334], [0.5, 0.5+9e-7], [0.5, 0.5-9e-7],
    (0.3, 0.7), np.array([0.3, 0.7]), np.float32([0.3, 0.7]), torch.tensor([0.3, 0.7]), torch.tensor([0.1]*10), (o for o in (0.3, 0.7)), [1.+2e-16, -2e-16], [-1e-7, 1.]])
def test_rounding_is_allowed(pcts):
    pcts = list(pcts)
    f = combine_scheds(pcts, [sched_lin(0., 1.)]*len(pcts))
    close([f(0.), f(1.), f(1+2e-16), f(1+1e-9), f(-1e-9)], [0., 1., 1., 1., 0.])
    assert all(-1e-12 <= f(p) <= 1+1e-12 for p in POS)

def test_shares_may_be_any_iterable():
    for pcts in (np.array([0.3, 0.7]), torch.tensor([0.3, 0.7]), iter([0.3, 0.7])):
        close(combine_scheds(pcts, cos_1cycle_anneal(0.1, 0.3, 0.05))(0.65), 0.175, rtol=1e-7)
    close(combine_scheds(1., sched_lin(0., 2.))(.5), 1.) # one share, one schedule

@pytest.mark.parametrize('pcts, says', [
    ([0.3, 0.6], 'pcts=[0.3, 0.6] sum to 0.9, not to 1'), ([0.5, 0.500002], 'pcts=[0.5, 0.500002] sum to 1.000002, not to 1'), ([0.5, 0.499998], 'sum to 0.999998'),
    ([30, 70], 'pcts=[30.0, 70.0]: every share must lie between 0 and 1'), ([-0.3, 1.3], 'pcts=[-0.3, 1.3]: every share'), ([-2e-6, 1.], 'every share'),
    ([math.nan, 1.], 'pcts=[nan, 1.0]: every share'), ([0.5, math.nan], 'every share'), ([math.inf, 0.], 'every share'), ([0., 0.], 'sum to 0, not to 1'),
    ([0.3, 0.3, 0.4], '3 shares for 2 schedules: pcts=[0.3, 0.3, 0.4]'), ([1.], '1 shares for 2 schedules'), ([], '0 shares for 2 schedules'), (0.3, '1 shares for 2')])
def test_bad_shares(pcts, says):
    with pytest.raises(ValueError, match=re.escape(says)): combine_scheds(pcts, cos_1cycle_anneal(0.1, 0.3, 0.05))

def test_no_shares_at_all():
    with pytest.raises(ValueError, match=re.escape('pcts=[] sum to 0, not to 1')): combine_scheds([], [])
    with pytest.raises(ValueError, match='0 shares for 1 schedules'): combine_scheds([], sched_lin(0., 1.))

def test_schedules_must_be_functions():
    with pytest.raises(TypeError, match=re.escape('scheds=[0.1, 0.3]: each must be a function of the position')): combine_scheds([0.3, 0.7], [0.1, 0.3])
    with pytest.raises(ValueError, match='2 shares for 1 schedules'): combine_scheds([0.3, 0.7], cos_1cycle_anneal) # not called

@pytest.mark.parametrize('pos', [-0.1, 1.1, -2e-6, 1+2e-6, 2, math.nan, math.inf, -math.inf])
def test_positions_far_beyond(pos):
    f = combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.1, 0.3, 0.05))
    with pytest.raises(ValueError, match=re.escape(f'position {pos} is outside of the schedule: it runs from 0 to 1')): f(pos)

@pytest.mark.parametrize('pos, value', [(0, 0.1), (1, 0.05), (0., 0.1), (1., 0.05), (-0., 0.1), (1+2**-52, 0.05), (-5e-324, 0.1), (1+9e-7, 0.05), (-9e-7, 0.1), (np.float32(1), 0.05)])
def test_positions_at_the_ends(pos, value): close(combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.1, 0.3, 0.05))(pos), value)

@pytest.mark.parametrize('steps', [3, 7, 10, 11, 13, 49, 1000])
def test_a_loop_that_adds_up_its_position(steps): # the Runner's n_epochs is such a sum
    f, pos = combine_scheds([0.3, 0.7], [sched_lin(0., 0.3), sched_lin(0.3, 1.)]), 0.
    for i in range(steps+1):
        np.testing.assert_allclose(f(pos), i/steps, atol=1e-9)
        pos += 1/steps

def test_inner_schedules_get_positions_from_0_to_1():
    seen = []
    f = combine_scheds([0.1]*10, [lambda p: seen.append(p) or p]*10)
    for i in range(10001): f(i/10000)
    assert min(seen) == 0 and max(seen) == 1 and all(0 <= p <= 1 for p in seen)

def test_a_share_of_zero():
    lines = [sched_lin(float(10*i), 10*i+1.) for i in range(3)]
    middle = combine_scheds([0.5, 0., 0.5], lines)
    assert all(not 10 <= middle(p) <= 11 for p in POS)
    first, last = combine_scheds([0., 0.5, 0.5], lines), combine_scheds([0.5, 0.5, 0.], lines)
    close(combine_scheds([0.5, 0.5+9e-7, 0.], lines)(1.), 21.) # also where rounding puts the last edge but one beyond 1
    assert first(0.) == 10 and last(1-1e-5) < 11 and last(1.) == 21 # at its very end a schedule is where its last phase ends

def test_schedules_nest():
    inner = combine_scheds([0.5, 0.5], [sched_lin(0., 1.), sched_lin(1., 0.)])
    outer = combine_scheds([0.5, 0.5], [inner, inner])
    close([outer(p) for p in (0., 0.25, 0.5, 0.75, 1.)], [0, 1, 0, 1, 0])

def test_the_caller_may_change_the_lists_afterwards():
    pcts = [0.3, 0.7]
    f = combine_scheds(pcts, cos_1cycle_anneal(0.1, 0.3, 0.05))
    pcts[0] = 0.9
    close(f(0.3), 0.3)


# create_phases

@pytest.mark.parametrize('phases, expected', [(0.3, [0.3, 0.7]), ([0.3], [0.3, 0.7]), ([0.1, 0.5], [0.1, 0.5, 0.4]), ([], [1.]), (0, [0., 1.]), (1., [1., 0.]),
    ([0.3, 0.7], [0.3, 0.7, 0.]), (torch.tensor([0.25, 0.5]), [0.25, 0.5, 0.25]), ((0.2, 0.3), [0.2, 0.3, 0.5])])
def test_create_phases(phases, expected):
    res = create_phases(phases)
    close(res, expected)
    combine_scheds(res, [sched_no(1., 1.)]*len(res))

@pytest.mark.parametrize('n', range(1, 60))
def test_create_phases_leaves_nothing_negative(n): # 1/9 nine times sums to more than 1
    res = create_phases([1/n]*n)
    assert len(res) == n+1 and 0 <= res[-1] < 1e-12
    combine_scheds(res, [sched_no(1., 1.)]*(n+1))

@pytest.mark.parametrize('phases', [1.1, [0.6, 0.6], [math.nan], math.inf, [0.5, 0.500002]])
def test_create_phases_refuses_more_than_all(phases):
    with pytest.raises(ValueError, match='no share is left for the last phase'): create_phases(phases)

def test_create_phases_copies():
    mine = [0.3]
    create_phases(mine)
    assert mine == [0.3]


# pickling

ALL = [sched_lin(0.3, 0.1), sched_cos(0.3, 0.1), sched_no(0.3, 0.1), sched_exp(0.3, 0.1), *cos_1cycle_anneal(0.1, 0.3, 0.05), sched_lin, sched_cos, sched_no, sched_exp,
       combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.1, 0.3, 0.05)), combine_scheds([0.5, 0.5], [combine_scheds([0.5, 0.5], [sched_no(1., 1.), sched_exp(1., 2.)]), sched_lin(2., 0.)]),
       combine_scheds, create_phases, cos_1cycle_anneal, annealer]

@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL+1))
@pytest.mark.parametrize('i', range(len(ALL)))
def test_pickles(i, protocol):
    f, back = ALL[i], pickle.loads(pickle.dumps(ALL[i], protocol))
    if isinstance(f, partial): assert [back(p) for p in POS] == [f(p) for p in POS]
    else: assert back is f

def test_a_fresh_process_reads_them(tmp_path):
    f = combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.1, 0.3, 0.05))
    (tmp_path/'sched.pkl').write_bytes(pickle.dumps(f))
    code = f'import pickle, sys; f = pickle.load(open({str(tmp_path/"sched.pkl")!r}, "rb")); print([f(i/10) for i in range(11)], "matplotlib" in sys.modules, "torchvision" in sys.modules)'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=120, cwd=Path(schedules.__file__).parents[1]).stdout
    assert out.strip() == f'{[f(i/10) for i in range(11)]} False False'


# a schedule drives an optimizer wherever its parameters are

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_drives_an_optimizer_on_cuda_as_on_the_cpu():
    f = combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.1, 0.3, 0.05))
    def descend(device):
        w = torch.ones(4, device=device, requires_grad=True)
        opt = torch.optim.SGD([w], lr=1.)
        for i in range(20):
            opt.param_groups[0]['lr'] = f(i/19)
            opt.zero_grad(); (w**2).sum().backward(); opt.step()
        return w.detach().cpu()
    torch.testing.assert_close(descend('cuda'), descend('cpu'))
