"""A reader's own optimizer takes about ten lines, and is what its paper says: Adan, a schedule-free SGD, a rule like Sophia's, each over lists and
tensor by tensor; and SOAP for matrices, which needs more and runs tensor by tensor."""
import inspect

import numpy as np
import pytest
import torch
from torch import nn

from dl2lib.optimizers import AverageGrad, Stat, StatefulOptimizer, StepCount, weight_decay


# Adan, arXiv 2208.06677

class Adan(Stat):
    _defaults, keeps, foreach = dict(b1=.02, b2=.08, b3=.01), ('prev', 'm', 'v', 'n', 'begun'), True
    def init_state(self, p): return {k: torch.zeros_like(p) for k in ('prev', 'm', 'v', 'n')} | dict(begun=0.)
    def update(self, p, state, b1, b2, b3, **kwargs):
        diff = (p.grad - state['prev'])*state['begun'] # nothing at first
        state['m'].lerp_(p.grad, b1); state['v'].lerp_(diff, b2); state['n'].lerp_((p.grad + (1-b2)*diff)**2, b3)
        state['prev'].copy_(p.grad)
        return {**state, 'begun': 1.}

def adan_step(p, lr, b2, m, v, n, wd, **kwargs): p.data.addcdiv_(m + (1-b2)*v, n.sqrt().add_(1e-8), value=-lr).div_(1 + lr*wd)

adan_step._defaults, adan_step.foreach = dict(wd=0.), True

def np_adan(p, grad, lr, steps, b1=.02, b2=.08, b3=.01, wd=.1):
    m, v, n, prev = 0, 0, 0, None
    for _ in range(steps):
        g = grad(p)
        d = g - (g if prev is None else prev)
        m, v, n, prev = (1-b1)*m + b1*g, (1-b2)*v + b2*d, (1-b3)*n + b3*(g + (1-b2)*d)**2, g
        p = (p - lr*(m + (1-b2)*v)/(np.sqrt(n) + 1e-8))/(1 + lr*wd)
    return p


# Schedule-free SGD, arXiv 2405.15682: the parameter is where the gradient is taken; the average is what one uses

class FreeAverage(Stat):
    _defaults, keeps, foreach = dict(beta=.9), ('z', 'x'), True
    def init_state(self, p): return {'z': p.detach().clone(), 'x': p.detach().clone()}
    def update(self, p, state, lr, **kwargs):
        state['z'].sub_(p.grad, alpha=lr)
        state['x'].lerp_(state['z'], 1/state['step'])
        return state

def free_step(p, z, x, beta, **kwargs): p.data.copy_(z.lerp(x, beta))

free_step.foreach = True

def np_free(y, grad, lr, steps, beta=.9):
    z = x = y
    for t in range(1, steps+1):
        z = z - lr*grad(y)
        x = (1-1/t)*x + z/t
        y = (1-beta)*z + beta*x
    return y


# Like Sophia, arXiv 2305.14342: the average over an estimate of curvature that is renewed now and then, at most 1

class Curvature(Stat):
    _defaults, keeps, foreach = dict(curv_mom=.9, every=3), ('curv',), True
    def init_state(self, p): return {'curv': torch.zeros_like(p)}
    def update(self, p, state, curv_mom, every, **kwargs):
        if state['step'] % every == 1: state['curv'].lerp_(p.grad**2, 1-curv_mom)
        return state

def sophia_step(p, lr, grad_avg, curv, rho, **kwargs): p.data.sub_((grad_avg/(rho*curv + 1e-12)).clamp_(-1, 1), alpha=lr)

sophia_step._defaults, sophia_step.foreach = dict(rho=4.), True

def np_sophia(p, grad, lr, steps, wd=.1, b1=.9, b2=.9, every=3, rho=4.):
    m, h = 0, 0
    for t in range(1, steps+1):
        g = grad(p)
        m = b1*m + (1-b1)*g
        if t % every == 1: h = b2*h + (1-b2)*g**2
        p = p - lr*wd*p
        p = p - lr*np.clip(m/(rho*h + 1e-12), -1, 1)
    return p


# SOAP, arXiv 2409.11321: Adam in the eigenbasis of Shampoo's two matrices

class Bases(Stat):
    _defaults, keeps = dict(shampoo=.95), ('left', 'right')
    def init_state(self, p): return {'left': p.new_zeros(len(p), len(p)), 'right': p.new_zeros(p.shape[1], p.shape[1])}
    def update(self, p, state, shampoo, **kwargs):
        state['left'].lerp_(p.grad @ p.grad.T, 1-shampoo); state['right'].lerp_(p.grad.T @ p.grad, 1-shampoo)
        return state

class RotatedSquares(Stat):
    _defaults, keeps = dict(sqr_mom=.95), ('q_left', 'q_right', 'sqr')
    def init_state(self, p): return {'q_left': p.new_zeros(len(p), len(p)), 'q_right': p.new_zeros(p.shape[1], p.shape[1]), 'sqr': torch.zeros_like(p)}
    def update(self, p, state, sqr_mom, **kwargs):
        for side in 'left', 'right': state['q_'+side].copy_(torch.linalg.eigh(state[side])[1])
        g = state['q_left'].T @ p.grad @ state['q_right']
        state['sqr'].mul_(sqr_mom).addcmul_(g, g, value=1-sqr_mom)
        return state

def soap_step(p, lr, grad_avg, mom, sqr_mom, step, q_left, q_right, sqr, **kwargs):
    m, v = q_left.T @ grad_avg @ q_right/(1-mom**step), sqr/(1-sqr_mom**step)
    p.data.sub_(q_left @ (m/(v.sqrt() + 1e-8)) @ q_right.T, alpha=lr)

def np_soap(p, grad, lr, steps, b1=.9, b2=.95, shampoo=.95):
    left, right, m, v = 0, 0, 0, 0
    for t in range(1, steps+1):
        g = grad(p)
        left, right = shampoo*left + (1-shampoo)*g@g.T, shampoo*right + (1-shampoo)*g.T@g
        ql, qr = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
        m, v = b1*m + (1-b1)*g, b2*v + (1-b2)*(ql.T@g@qr)**2
        p = p - lr*ql@(ql.T@m@qr/(1-b1**t)/(np.sqrt(v/(1-b2**t)) + 1e-8))@qr.T
    return p


AVG = AverageGrad(dampening=True)
OWN = dict(adan=([adan_step], [Adan()], dict(wd=.1), np_adan, (Adan, adan_step)), free=([free_step], [StepCount(), FreeAverage()], {}, np_free, (FreeAverage, free_step)),
           sophia=([weight_decay, sophia_step], [AVG, StepCount(), Curvature()], dict(wd=.1), np_sophia, (Curvature, sophia_step)),
           soap=([soap_step], [AVG, StepCount(), Bases(), RotatedSquares()], {}, np_soap, ()))
CURVES = [np.random.default_rng(i).uniform(.2, 2, s) for i, s in enumerate([(4, 3), (3, 3), (2, 3)])] # at most one direction without a gradient

@pytest.mark.parametrize('engine', [None, 'tensor'])
@pytest.mark.parametrize('name', OWN)
def test_own_optimizer_is_what_its_paper_says(name, engine):
    steppers, stats, hypers, reference, _ = OWN[name]
    starts = [np.random.default_rng(9-i).normal(size=c.shape) for i, c in enumerate(CURVES)]
    ps = [nn.Parameter(torch.tensor(p)) for p in starts]
    opt = StatefulOptimizer(ps, steppers, stats, lr=.02, engine=engine, **hypers)
    assert opt.foreach == (name != 'soap')
    for _ in range(30):
        for p, c in zip(ps, CURVES): p.grad = torch.tensor(c)*p.detach()**3 + p.detach() # where it stands now
        opt.step()
    for p, start, c in zip(ps, starts, CURVES):
        want = reference(start, lambda x: c*x**3 + x, .02, 30)
        assert np.abs(want - start).max() > .1
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=1e-6 if name == 'soap' else 1e-8, atol=1e-9)

@pytest.mark.parametrize('name', [n for n in OWN if n != 'soap'])
def test_it_takes_about_ten_lines(name):
    lines = [l for part in OWN[name][4] for l in inspect.getsource(part).splitlines() if l.strip()]
    assert len(lines) <= 11, len(lines)
