"""LSUV on a ResNet-34 against the paper's algorithm: seconds, forward passes, and what is reached.

    python benchmarks/bench_lsuv.py [ROUNDS]

writes results/bench_lsuv.md. Nine rounds take about ten minutes on a CPU."""
import sys, time
from functools import partial

import torch
from torch import nn

from common import interleaved, ratios, save, spread, table
from dl2lib.hooks import Hooks, append_stat, find_modules, is_lin_layer
from dl2lib.lsuv import lsuv_init

TOL_PAPER, TOL, SHAPE, MAX_TRIES = .1, 1e-3, (64, 3, 64, 64), 10


def paper_lsuv(model, x):
    """Algorithm 1 of arXiv 1511.06422: orthonormal weights, then layer by layer, a whole forward pass for each look at the variance, until
    |Var - 1| < 0.1, at most ten times. Convolutions and linear layers. Returns the number of passes."""
    layers, passes = find_modules(model, is_lin_layer), 0
    for l in layers: nn.init.orthogonal_(l.weight)
    for l in layers:
        for _ in range(MAX_TRIES):
            out = []
            with torch.no_grad(), l.register_forward_hook(lambda m, i, o: out.append(o)): model(x)
            passes += 1
            var = out[0].var().item()
            if abs(var-1) < TOL_PAPER: break
            with torch.no_grad(): l.weight /= var**.5
    return passes


def worst(model, x):
    "The largest |std - 1| of any layer, by a pass of its own."
    with torch.no_grad(), Hooks(find_modules(model, is_lin_layer), append_stat) as hooks: model(x)
    return max(abs(h.std-1) for h in hooks)


def arms():
    return {'forward pass': lambda m, x: (m(x), 1)[1],
            'paper: orthonormal, |Var-1| < 0.1': paper_lsuv,
            'lsuv_init(tol=1e-3)': lambda m, x: lsuv_init(m, x, tol=TOL).forwards,
            'lsuv_init(tol=1e-3, orthonormal=True)': lambda m, x: lsuv_init(m, x, tol=TOL, orthonormal=True).forwards}


def main(rounds=9):
    import torchvision
    rounds, passes, off = int(rounds), {}, {k: [] for k in arms()}
    def timed(k, f, r): # seconds of an arm on a new network, the same for all arms of a round
        torch.manual_seed(r)
        model, x = torchvision.models.resnet34(weights=None).train(), torch.randn(SHAPE)
        with torch.no_grad(): model(x[:8]) # memory and threads are there
        start = time.perf_counter()
        with torch.no_grad(): passes[k] = f(model, x)
        seconds = time.perf_counter()-start
        off[k].append(worst(model, x))
        return seconds
    times = interleaved({k: partial(timed, k, f) for k, f in arms().items()}, rounds, warmup=0)
    n_layers = len(find_modules(torchvision.models.resnet34(weights=None), is_lin_layer))
    paper = 'paper: orthonormal, |Var-1| < 0.1'
    rows = [[k.replace('|', '\\|'), spread(v), spread(ratios(times, k, paper), '.3f'), passes[k], f'{max(off[k]):.1e}'] for k, v in times.items()]
    save('bench_lsuv', '# LSUV on a ResNet-34 against the paper\'s algorithm\n\n'
         f'torchvision\'s ResNet-34 with random weights in training mode, a batch of {"x".join(map(str, SHAPE))} in float32; its {n_layers} '
         f'convolutions and linear layers. Median (range) of n = {rounds} interleaved rounds, a new network in each; ratios are taken within a round. '
         '`python benchmarks/bench_lsuv.py`\n\n'
         + table(['', 'seconds', 'ratio to the paper\'s', 'forward passes', 'largest \\|std-1\\| at the end'], rows)
         + '\n\nThe paper\'s algorithm is written in the benchmark: whole forward passes, one for each look at one layer. `lsuv_init` measures '
         'before, sets all layers in one pass, and checks.')


if __name__ == '__main__': main(*sys.argv[1:])
