"""LSUV on a ResNet-34 against the paper's algorithm: seconds, forward passes, and what is reached.

    python benchmarks/bench_lsuv.py [ROUNDS]

writes results/bench_lsuv.md. Nine rounds take about ten minutes on a CPU."""
import statistics, sys, time

import torch
from torch import nn

from common import save, table
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
    times, passes, off = {k: [] for k in arms()}, {}, {k: [] for k in arms()}
    for r in range(int(rounds)):
        for k, f in arms().items():
            torch.manual_seed(r)
            model, x = torchvision.models.resnet34(weights=None).train(), torch.randn(SHAPE)
            with torch.no_grad(): model(x[:8]) # memory and threads are there
            t = time.perf_counter()
            with torch.no_grad(): passes[k] = f(model, x)
            times[k].append(time.perf_counter()-t)
            off[k].append(worst(model, x))
        print(r, {k: round(v[-1], 2) for k, v in times.items()}, flush=True)
    base = times['paper: orthonormal, |Var-1| < 0.1']
    rows = []
    for k, v in times.items():
        ratios = [a/b for a, b in zip(v, base)]
        rows.append([k.replace('|', '\\|'), f'{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})', f'{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})',
                     passes[k], f'{max(off[k]):.1e}'])
    save('bench_lsuv', '# LSUV on a ResNet-34 against the paper\'s algorithm\n\n'
         f'torchvision\'s ResNet-34 with random weights in training mode, a batch of {"x".join(map(str, SHAPE))} in float32; its {len(find_modules(model, is_lin_layer))} '
         f'convolutions and linear layers. Median (range) of n = {rounds} interleaved rounds, a new network in each; ratios are taken within a round. '
         '`python benchmarks/bench_lsuv.py`\n\n'
         + table(['', 'seconds', 'ratio to the paper\'s', 'forward passes', 'largest \\|std-1\\| at the end'], rows)
         + '\n\nThe paper\'s algorithm is written in the benchmark: whole forward passes, one for each look at one layer. `lsuv_init` measures '
         'before, sets all layers in one pass, and checks.')


if __name__ == '__main__': main(*sys.argv[1:])
