"""SGD, momentum, Adam and LAMB with the lesson's CNN: its settings and searched rates; L2 against decoupled decay under BatchNorm.

    python benchmarks/optim_shapes.py [--seeds 1 2 42] [--epochs 3] [--parts optimizers decay] [--size 128] [--imagenette FOLDER]

writes results/optim_shapes.md, or, with --imagenette, results/optim_imagenette.md; the file is written anew after every arm. All of it takes
about 140 epochs of 1,500 images: an hour and a half on two CPU cores."""
import argparse, statistics, time
from functools import partial

import torch
from torch.nn import functional as F

from common import machine, results, table
from dl2lib.callbacks import AvgStatsCallback, BatchTransformXCallback, Callback, ChannelsLastCallback, CudaCallback, accuracy
from dl2lib.convnet import conv_layer
from dl2lib.core import set_seed
from dl2lib.datablock import ByteToFloat, norm_imagenette
from dl2lib.datasets import shapes
from dl2lib.learner import get_learner
from dl2lib.optimizers import (AverageGrad, AverageSqrGrad, StatefulOptimizer, StepCount, adam_opt, adam_step, l2_reg, lamb_opt, momentum_step,
                               sgd_mom_opt, sgd_opt, weight_decay)
from dl2lib.train import make_data

# name: optimizer, the lesson's rate (constant, as in the lesson's chapter)
OPTS = {'SGD': (sgd_opt, .4), 'momentum': (sgd_mom_opt, .3), 'Adam': (adam_opt(), 1e-3), 'LAMB': (lamb_opt(), 3e-3)}
GRID = 1/10, 1/3, 1, 3 # times the lesson's rate; one epoch with the first seed each

mom, adam = dict(stats=[AverageGrad()]), dict(stats=[AverageGrad(dampening=True), AverageSqrGrad(), StepCount()])
opt = partial(partial, StatefulOptimizer)
# L2 goes through momentum, which multiplies it by ten: decoupled decay is given ten times the factor
DECAYS = {'momentum, none': (opt(steppers=momentum_step, **mom), .03), 'momentum, L2 0.005': (opt(steppers=[l2_reg, momentum_step], wd=.005, **mom), .03),
          'momentum, decay 0.05': (opt(steppers=[weight_decay, momentum_step], wd=.05, **mom), .03),
          'Adam, none': (opt(steppers=adam_step, **adam), 1e-3), 'Adam, L2 0.005': (opt(steppers=[l2_reg, adam_step], wd=.005, **adam), 1e-3),
          'Adam, decay 0.3': (opt(steppers=[weight_decay, adam_step], wd=.3, **adam), 1e-3)}


class Turns(Callback):
    "How long the convolutions' weights are, and by what angle a step turns them: means over the layers. BatchNorm follows each of them."
    in_lr_find = False
    def begin_fit(self):
        self.ws = [p for p in self.model.parameters() if p.ndim == 4]
        self.norms, self.angles = [], []

    def after_backward(self): self.before = [w.detach().clone() for w in self.ws]

    def after_step(self):
        cos = [F.cosine_similarity(a.double().flatten(), w.detach().double().flatten(), dim=0) for a, w in zip(self.before, self.ws)]
        self.angles.append(torch.rad2deg(torch.acos(torch.stack(cos).clamp(max=1))).mean())
        self.norms.append(torch.stack([w.detach().norm() for w in self.ws]).mean())


def fit(opt_func, lr, seed, args, epochs, turns=False):
    "Validation accuracy after each epoch; the Turns, if they are asked for; seconds."
    set_seed(seed)
    data, _ = make_data(args.folder, size=args.size, bs=args.bs, seed=seed)
    cbs = [partial(AvgStatsCallback, accuracy), CudaCallback, ChannelsLastCallback, partial(BatchTransformXCallback, [ByteToFloat(), norm_imagenette])]
    learn, rows, start = get_learner([64, 64, 128, 256], data, lr, conv_layer, cb_funcs=cbs + [Turns]*turns, opt_func=opt_func), [], time.time()
    learn.logger = rows.append
    learn.fit(epochs)
    return [float(r[4]) for r in rows[1:]], learn.turns if turns else None, time.time()-start


def spread(vs, fmt='.3f'): return f'{statistics.mean(vs):{fmt}} ({min(vs):{fmt}} to {max(vs):{fmt}})'


def searched(name, args): # -> the best rate of the grid, and what each gave
    f, lr = OPTS[name]
    found = {k*lr: fit(f, k*lr, args.seeds[0], args, 1)[0][-1] for k in GRID}
    return max(found, key=found.get), ', '.join(f'{k:.2g}: {v:.3f}' for k, v in found.items())


def optimizers(args):
    for name, (f, lr) in OPTS.items():
        best, grid = (lr, '') if args.imagenette else searched(name, args)
        for what, rate in {"the lesson's": lr, **({'searched': best} if best != lr else {})}.items():
            runs = [fit(f, rate, seed, args, args.epochs) for seed in args.seeds]
            label = what + (', also the best of the grid' if grid and best == lr else '')
            yield [name, f'{rate:.2g}', label, spread([r[0][0] for r in runs]), spread([r[0][-1] for r in runs]), f'{sum(r[2] for r in runs):.0f}', grid if rate == best else '']


def decay(args):
    for name, (f, lr) in DECAYS.items():
        runs = [fit(f, lr, seed, args, args.epochs, turns=True) for seed in args.seeds]
        ts = [r[1] for r in runs]
        def last(v): return torch.stack(v[-len(v)//args.epochs:]).mean().item() # mean of the last epoch
        yield [name, f'{lr:.2g}', spread([r[0][0] for r in runs]), spread([r[0][-1] for r in runs]), spread([t.norms[0].item() for t in ts], '.2f'),
               spread([t.norms[-1].item() for t in ts], '.2f'), spread([last(t.angles) for t in ts], '.2f')]


PARTS = dict(optimizers=(optimizers, 'Four optimizers', ['optimizer', 'rate', 'which', 'validation accuracy after one epoch', 'at the end', 'seconds', 'search: one epoch, first seed']),
             decay=(decay, 'L2 and decoupled decay under BatchNorm', ['optimizer', 'rate', 'validation accuracy after one epoch', 'at the end', 'length of a weight after one step',
                    'at the end', 'turn in a step, degrees, mean of the last epoch']))


def main(argv=None):
    p = argparse.ArgumentParser()
    p.add_argument('--seeds', type=int, nargs='+'); p.add_argument('--epochs', type=int); p.add_argument('--parts', nargs='+', choices=PARTS)
    p.add_argument('--size', type=int, default=128); p.add_argument('--imagenette'); p.add_argument('--name')
    args = p.parse_args(argv)
    real = bool(args.imagenette)
    args.folder, args.bs = (args.imagenette, 64) if real else (shapes(), 32)
    args.seeds, args.epochs = args.seeds or ([42] if real else [1, 2, 42]), args.epochs or (1 if real else 3)
    args.parts = args.parts or (['optimizers'] if real else list(PARTS))
    name, done = args.name or ('optim_imagenette' if real else 'optim_shapes'), {}
    head = (f"# Optimizers on {'Imagenette' if real else 'Shapes'}\n\nThe lesson's CNN, {args.size} px, batches of {args.bs}, {args.epochs} epochs, constant rates; mean (range) over the "
            f"seeds {', '.join(map(str, args.seeds))}. `python benchmarks/optim_shapes.py`")
    for part in args.parts:
        f, title, header = PARTS[part]
        for row in f(args):
            print(row, flush=True)
            done.setdefault(part, []).append(row)
            text = '\n\n'.join([head, *(f'## {PARTS[k][1]}\n\n{table(PARTS[k][2], rows)}' for k, rows in done.items()), machine()])
            (results/f'{name}.md').write_text(text + '\n')


if __name__ == '__main__': main()
