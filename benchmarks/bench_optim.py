"""A step of each optimizer against its references: torch's fused, foreach and default forms, timm, fastai, and the limit.

    python benchmarks/bench_optim.py [ROUNDS] [SIZES] [FAMILIES]

SIZES are of cnn, resnet50, big (joined by commas); FAMILIES of momentum, adamw, lamb, own, zoo. Writes results/bench_optim.md.
9 rounds of everything take about five minutes on two CPU cores. timm and fastai take part where they are installed."""
import math, sys, time
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from common import interleaved, ratios, save, spread, table
from dl2lib.convnet import conv_layer, get_cnn_model
from dl2lib.optimizers import AverageGrad, AverageSqrGrad, StatefulOptimizer, StepCount, debias, weight_decay
from dl2lib.zoo import OPTIMIZERS

T, DEVICE, ROUNDS = torch.optim, 'cuda' if torch.cuda.is_available() else 'cpu', 9
SIZES = dict(cnn="the lesson's CNN", resnet50='ResNet-50', big='40 tensors of 1M')
STEPS = dict(cnn=30, resnet50=1, big=1) if DEVICE == 'cpu' else dict(cnn=100, resnet50=20, big=20) # in a turn


def shapes(size):
    if size == 'big': return [(1000, 1000)]*40
    if size == 'cnn': model = get_cnn_model(SimpleNamespace(c_in=3, c_out=10), [64, 64, 128, 256], conv_layer)
    else:
        from torchvision.models import resnet50
        with torch.device('meta'): model = resnet50()
    return [tuple(p.shape) for p in model.parameters()]


def params(size):
    gen, ps = torch.Generator().manual_seed(0), []
    for s in shapes(size):
        p = nn.Parameter(torch.randn(s, generator=gen).to(DEVICE))
        p.grad = (torch.randn(s, generator=gen)*.01).to(DEVICE)
        ps.append(p)
    return ps


def sync():
    if DEVICE == 'cuda': torch.cuda.synchronize()


def arm(make, size): # -> a function that times STEPS steps: seconds
    opt = make(params(size))
    def turn(_):
        sync()
        start = time.perf_counter()
        for _ in range(STEPS[size]): opt.step()
        sync()
        return (time.perf_counter()-start)/STEPS[size]
    return turn


# A user's own chain: torch's AdamW written as parts, of which our library has no kernel
def own_adam_step(p, lr, mom, mom_damp, step, sqr_mom, sqr_damp, grad_avg, sqr_avg, eps, **kwargs):
    d1, d2 = debias(mom, mom_damp, step), debias(sqr_mom, sqr_damp, step)
    p.data.addcdiv_(grad_avg, sqr_avg.sqrt().div_(math.sqrt(d2)).add_(eps), value=-lr/d1)
    return p

def own_chain(ps, engine=None):
    return StatefulOptimizer(ps, [weight_decay, own_adam_step], [AverageGrad(dampening=True), AverageSqrGrad(), StepCount()], engine=engine,
                             lr=1e-3, wd=.01, sqr_mom=.999, eps=1e-8)

def zoo(name, engine=None, **hypers): return lambda ps: OPTIMIZERS[name].make(lr=1e-3, **hypers)(ps, engine=engine)


def peers(name): # optional ones: label -> function of parameters to an optimizer
    res = {}
    try:
        from timm import optim
        cls, more = dict(lamb=(optim.Lamb, dict(weight_decay=.01, max_grad_norm=None)), lars=(optim.Lars, dict(momentum=.9, always_adapt=True)), lion=(optim.Lion, {})).get(name, (None, None))
        if name == 'lamb': res['timm foreach'] = partial(cls, lr=1e-3, foreach=True, **more)
        if cls: res['timm'] = partial(cls, lr=1e-3, **more)
    except ImportError: pass
    try:
        from fastai import optimizer as fa
        f = dict(momentum=partial(fa.SGD, lr=1e-3, mom=.9), adamw=partial(fa.Adam, lr=1e-3, wd=.01), lamb=partial(fa.Lamb, lr=1e-3, wd=.01)).get(name)
        if f: res['fastai'] = f
    except ImportError: pass
    return res


def torchs(cls, **kwargs): return {k: partial(cls, lr=1e-3, **kwargs, **how) for k, how in (('torch fused', dict(fused=True)), ('torch foreach', dict(foreach=True)), ('torch default', {}))}

def ours(name, **hypers): return {'ours': zoo(name, **hypers), 'ours, as a list': zoo(name, 'list', **hypers), 'ours, tensor by tensor': zoo(name, 'tensor', **hypers)}

# name: arms, the first of which is what the others are divided by; target; bytes an element that must be moved in one pass
FAMILIES = dict(
    momentum=lambda: ({**torchs(T.SGD, momentum=.9), **ours('momentum'), **peers('momentum')}, 'ours <= 0.85 / 1.0 / 1.05', 20),
    adamw=lambda: ({**torchs(T.AdamW), **ours('adamw'), **peers('adamw')}, 'ours <= 0.85 / 1.0 / 1.05', 28),
    own=lambda: ({'torch foreach': partial(T.AdamW, lr=1e-3, foreach=True), 'ours': own_chain, 'ours, tensor by tensor': partial(own_chain, engine='tensor')}, 'ours <= 1.0', 28),
    lamb=lambda: ({**peers('lamb'), 'ours': zoo('lamb', wd=.01), 'ours, tensor by tensor': zoo('lamb', 'tensor', wd=.01)}, 'ours <= 1.0', 40))
REST = dict(nesterov=partial(T.SGD, momentum=.9, nesterov=True), rmsprop=T.RMSprop, rmsprop_centred=partial(T.RMSprop, centered=True), adagrad=T.Adagrad, adadelta=T.Adadelta, rprop=T.Rprop,
            adam=T.Adam, amsgrad=partial(T.Adam, amsgrad=True), adamax=T.Adamax, nadam=T.NAdam, radam=T.RAdam)


def limit(size, n_bytes, rounds=5)->float: # seconds that moving `n_bytes` an element takes, at the bandwidth of torch's copy
    n = sum(math.prod(s) for s in shapes(size))
    a, b = torch.randn(n, device=DEVICE), torch.empty(n, device=DEVICE)
    def once(_): b.copy_(a); sync()
    return min(interleaved(dict(copy=once), rounds)['copy'])*n_bytes/8


def family_rows(name, sizes, rounds):
    arms, target, n_bytes = FAMILIES[name]()
    base, cols = next(iter(arms)), {k: [] for k in arms}
    lim = []
    for size in sizes:
        times = interleaved({k: arm(f, size) for k, f in arms.items()}, rounds)
        for k in arms: cols[k].append(spread(ratios(times, k, base)) if k != base else f'1 = {spread(times[k], ".3g", 1e3)} ms')
        lim.append(f'{limit(size, n_bytes)/min(times[base]):.2f}')
    return [[name, k, *v, target if k == 'ours' else ''] for k, v in cols.items()] + [[name, f'limit ({n_bytes} bytes an element)', *lim, '']]


def zoo_rows(sizes, rounds):
    refs = {**REST, **{k: peers(k)['timm'] for k in ('lars', 'lion') if 'timm' in peers(k)}}
    rows = []
    for name, ref in refs.items():
        cells = []
        for size in sizes:
            times = interleaved({'ref': arm(ref if name in peers(name) or name in ('lars', 'lion') else partial(ref, lr=1e-3), size), 'ours': arm(zoo(name), size)}, rounds)
            cells.append(spread(ratios(times, 'ours', 'ref')))
        rows.append([name, 'ours / default of ' + ('timm' if name in ('lars', 'lion') else 'torch'), *cells, '<= 1.0'])
    return rows


if __name__ == '__main__':
    args = sys.argv[1:] + [None]*3
    rounds, sizes = int(args[0] or ROUNDS), (args[1] or ','.join(SIZES)).split(',')
    families = (args[2] or ','.join([*FAMILIES, 'zoo'])).split(',')
    rows = []
    for f in families: rows += zoo_rows(sizes, rounds) if f == 'zoo' else family_rows(f, sizes, rounds)
    text = f'Time of a step, as a ratio to the first arm of each family in the same round: median (range) of {rounds} interleaved rounds, on {DEVICE}.\n\n'
    save('bench_optim', text + table(['family', 'arm', *(SIZES[s] for s in sizes), 'target'], rows), packages=('timm', 'fastai'))
