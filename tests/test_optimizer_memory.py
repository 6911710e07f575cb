"""Nothing outside a tensor: whatever a program does to its weights between two events of a training, an optimizer steps as it does tensor by
tensor, or says which parameter is of which shape. What might crash runs in a child process: `python tests/test_optimizer_memory.py all 6`."""
import copy, pickle, random, re, sys
from functools import partial

import pytest
import torch
from torch import nn

from dl2lib import foreach
from dl2lib.optimizers import AverageGrad, StatefulOptimizer, StepCount, adam_opt, momentum_step, sgd_mom_opt
from dl2lib.zoo import OPTIMIZERS
from repo_tools import sh

DEVICES = ['cpu'] # a second one in a child on a GPU
SHAPES = [(6,), (4, 4), (5, 2), (4, 3, 3, 3), ()]

def declared_step(p, lr, grad_avg, **kwargs): # a user's stepper, declared
    p.data.sub_(grad_avg/(grad_avg.norm() + 1), alpha=lr)
    return p

declared_step.foreach = True
own = partial(StatefulOptimizer, steppers=[declared_step], stats=[AverageGrad(), StepCount()])
CHAINS = {n: OPTIMIZERS[n].make() for n in 'sgd momentum nesterov adam adamw lamb lars rmsprop adagrad nadam'.split()} | dict(own=own, lesson=sgd_mom_opt)


# What a program may do to a weight

def grow(p, r): p.data = torch.cat([p.data, torch.full_like(p.data[:1], .5)]*2) if p.ndim else torch.full((3,), .5, dtype=p.dtype, device=p.device)
def shrink(p, r): p.data = p.data[:max(1, len(p)//2)].clone() if p.ndim else p.data
def narrow(p, r): p.data = p.data[:max(1, len(p)//2)] if p.ndim else p.data                       # a view of its own memory
def gaps(p, r): p.data = torch.stack([p.data, p.data], -1)[..., 0]                                # the same values with gaps between
def thin(p, r): p.data = p.data[..., ::2] if p.ndim else p.data
def flatten(p, r): p.data = p.data.reshape(-1)
def transpose(p, r): p.data = p.data.transpose(0, 1) if p.ndim > 1 else p.data                    # a square keeps its shape
def turn(p, r):
    with torch.no_grad(): p.t_() if p.ndim == 2 else None                                         # in place
def reorder(p, r): p.data = p.data.transpose(0, -1).contiguous().transpose(0, -1) if p.ndim > 1 else p.data
def channels_last(p, r): p.data = p.data.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p.data
def contiguous(p, r): p.data = p.data.contiguous()
def retype(p, r): p.data = p.data.to(r.choice([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
def move(p, r): p.data = p.data.to(r.choice(DEVICES))
def freeze(p, r): p.requires_grad_(r.random() < .5)
def no_grad(p, r): p.grad = None
def other_grad(p, r): p.grad = torch.full_like(p, .1)
def lying_grad(p, r): p.grad = torch.full(p.shape[::-1], .1, dtype=p.dtype, device=p.device).permute(tuple(range(p.ndim))[::-1]) # another order in memory
def own_grad(p, r):
    if p.grad is not None: p.grad.data = p.grad.data.reshape(-1)
def grown_grad(p, r):
    if p.grad is not None: p.grad.data = torch.cat([p.grad.data.reshape(-1)]*2)

MOVES = [grow, shrink, narrow, gaps, thin, flatten, transpose, turn, reorder, channels_last, contiguous, retype, move, freeze, no_grad, other_grad, lying_grad, own_grad,
         grown_grad]


class Play:
    "One training with moves between its events, the same for the same seed; `seen` says what has come of each event."
    def __init__(self, make, engine, seed):
        self.r, gen = random.Random(seed), torch.Generator().manual_seed(seed)
        self.ps = [nn.Parameter(torch.randn(s, generator=gen).to(DEVICES[-1])) for s in SHAPES]
        self.opt = make([self.ps[:3], self.ps[3:]], lr=.01, engine=engine)
        self.loss, self.saved, self.seen = None, self.opt.state_dict(), []

    def forward(self): self.loss = sum((p.float() - .3).pow(2).sum().cpu() for p in self.ps if p.requires_grad)

    def backward(self):
        if not torch.is_tensor(self.loss): return
        try: self.loss.backward()
        except RuntimeError: self.zero()  # the weights were changed after forward: torch says so
        self.loss = None

    def zero(self): self.opt.zero_grad()
    def step(self): self.opt.step()
    def save(self): self.saved = copy.deepcopy(self.opt.state_dict())
    def load(self): self.opt.load_state_dict(copy.deepcopy(self.saved))
    def reload(self): self.opt.load_state_dict(self.opt.state_dict())

    def duplicate(self):
        self.ps, self.opt = copy.deepcopy((self.ps, self.opt)) if self.r.random() < .5 else pickle.loads(pickle.dumps((self.ps, self.opt)))
        self.loss = None

    def hyper(self):
        for pg in self.opt.hypers:
            for k, values in dict(lr=(.01, .02), wd=(0., .1), mom=(0., .5, .9)).items():
                if k in pg: pg[k] = self.r.choice(values)

    def share(self): # one memory for two parameters
        a, b = self.ps[1], self.ps[2]
        if a.numel() >= b.numel(): b.data = a.data.reshape(-1)[:b.numel()].reshape_as(b)

    def states(self): return [self.opt.state[p] for p in self.ps if self.opt.state.get(p)]

    def restride(self): # a state by hand: the same numbers in another order in memory
        for s in self.states()[:2]: s.update({k: v.mT.contiguous().mT for k, v in s.items() if torch.is_tensor(v) and v.ndim > 1})

    def recount(self): # numbers of a state by hand: it is no longer as the others are
        for s in self.states()[:1]: s.update({k: v+1 for k, v in s.items() if k == 'step'})

    def forget(self): # one state begins anew
        for p in self.ps[1:2]: self.opt.state.pop(p, None)

    def repair(self): # after an error: as its message says
        for p in self.ps:
            p.grad = None
            self.opt.state.pop(p, None)
        self.loss = None

    def act(self, f):
        before = [p.detach().clone() for p in self.ps]
        try:
            f()
            self.seen.append(('done', [p.detach().clone() for p in self.ps]))
        except ValueError as e:
            self.seen.append(('refused', str(e)))
            assert all(torch.equal(p, b) for p, b in zip(self.ps, before)), 'a step that was refused has moved something'
            self.repair()

    def run(self, n):
        for _ in range(n):
            for event in self.zero, self.forward, self.backward, self.step:
                while self.r.random() < .25: self.r.choice(MOVES)(self.r.choice(self.ps), self.r)
                if self.r.random() < .15: self.act(self.r.choice([self.save, self.load, self.reload, self.duplicate, self.hyper, self.share, self.restride, self.recount, self.forget]))
                self.act(event)
        return self.seen


def same(a, b):
    if (a.shape, a.dtype) != (b.shape, b.dtype): return False
    tol = 3e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return torch.allclose(a.double(), b.double(), rtol=tol, atol=tol, equal_nan=True)

def compare(name, seed, n=12):
    "Two plays of one seed: each event has the same end. -> how many went through, how many were refused."
    done = refused = 0
    want = Play(CHAINS[name], 'tensor', seed).run(n)
    for engine in None, 'list':
        got = Play(CHAINS[name], engine, seed).run(n)
        assert len(got) == len(want)
        for i, ((what, x), (other, y)) in enumerate(zip(got, want)):
            assert what == other, (name, seed, engine, i, what, x, other, y)
            if what == 'done': assert all(map(same, x, y)), (name, seed, engine, i, x, y)
            else: assert x == y and re.search(r'parameter \d of group \d.* \(.*\)', x), x
            done, refused = done + (what == 'done'), refused + (what == 'refused')
    return done, refused


def grown(make): # an embedding's table after a step: the heap was corrupted
    p = nn.Parameter(torch.randn(50, 20))
    opt = make([p], lr=.1)
    for change in (lambda: torch.randn(4000, 50), lambda: torch.randn(20, 20), lambda: torch.randn(20, 50)):
        p.data, p.grad = torch.randn(50, 20), torch.ones(50, 20)
        opt.state.clear()
        opt.step()
        p.grad, p.data = None, change()
        p.grad = torch.ones_like(p)
        try: opt.step()
        except ValueError as e: assert re.search(r'parameter 0 of group 0 is float32 \(\d+, \d+\) on cpu, its state was made for float32 \(50, 20\)', str(e)), e
        else: raise AssertionError('no error')

def changed_after_backward(make): # it read past the gradient
    for shape in (4000, 50), (20, 20), (2, 25, 20):
        p = nn.Parameter(torch.randn(50, 20))
        opt = make([p], lr=.1)
        p.sum().backward()
        p.data = torch.randn(shape)
        try: opt.step()
        except ValueError as e: assert re.search(r'parameter 0 of group 0 is float32 \(.*\) on cpu, its gradient float32 \(50, 20\)', str(e)), e
        else: raise AssertionError('no error')

def state_by_hand(make): # of another shape: torch's own error, and nothing is read past it
    for shape in (1,), (2, 2), (2000,):
        p = nn.Parameter(torch.randn(50, 20))
        p.grad = torch.ones(50, 20)
        opt = make([p], lr=.1)
        opt.step()
        opt.state[p]['grad_avg'] = torch.zeros(shape)
        try: opt.step()
        except RuntimeError: pass

def overlapping(make): # torch refuses to write to one number through several
    p = nn.Parameter(torch.randn(1, 20))
    p.data, p.grad = p.data.expand(5000, 20), None
    p.grad = torch.ones(5000, 20)
    try: make([p], lr=.1).step()
    except RuntimeError: pass
    else: raise AssertionError('no error')

KERNELS = [adam_opt(wd=.1), partial(sgd_mom_opt, wd=0.)]


def main(play, seeds):
    if play == 'cases':
        for f in grown, changed_after_backward, state_by_hand, overlapping:
            for make in KERNELS: f(make)
        return print('lives')
    if play == 'cuda': DEVICES.append('cuda')
    if play == 'blind': foreach._fits = lambda p, state: True
    if play == 'stale': foreach.Plan.holds = lambda self, ps, states: True
    for name in CHAINS:
        done, refused = map(sum, zip(*(compare(name, seed) for seed in range(int(seeds)))))
        print(name, done, refused)

def child(*args, **kw): return sh([sys.executable, __file__, *args], cwd=foreach.__file__.rpartition('/')[0], timeout=120, MALLOC_CHECK_='3', **kw)

@pytest.mark.parametrize('play', ['all', pytest.param('cuda', marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')])])
def test_any_engine_steps_as_tensor_by_tensor_or_says_why_not(play):
    rows = [l.split() for l in child(play, '15').stdout.splitlines()]
    assert [r[0] for r in rows] == list(CHAINS)
    for name, done, refused in rows: assert int(done) > 500 and int(refused) > 20, f'{name}: too few of one kind to say anything'

def test_what_was_once_corrupted(): assert child('cases', '0').stdout == 'lives\n'

@pytest.mark.parametrize('play', ['blind', 'stale'])
def test_without_a_check_this_is_seen(play):
    res = child(play, '6', ok=False)
    assert res.returncode != 0 and 'adamw' not in res.stdout

@pytest.mark.parametrize('make', KERNELS, ids=['adamw', 'momentum'])
@pytest.mark.parametrize('there', [True, False])
def test_channels_last_between_steps(make, there):
    "Weights were moved by the averages of others."
    def run(engine):
        gen = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        for p in model.parameters(): p.data = .1*torch.randn(p.shape, generator=gen)
        formats = [torch.channels_last, torch.contiguous_format]
        model.to(memory_format=formats[not there])
        opt = make(model.parameters(), lr=.01, engine=engine)
        for i in range(6):
            if i == 3: model.to(memory_format=formats[there])
            opt.zero_grad()
            model(torch.randn(2, 3, 8, 8, generator=gen)).pow(2).mean().backward()
            opt.step()
        return model, opt
    (a, opt), (b, _) = run(None), run('tensor')
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    w = a[0].weight
    assert opt.state[w]['grad_avg'].stride() == w.stride() # brought into the new order, so that the kernel goes on


if __name__ == '__main__': main(*sys.argv[1:])
