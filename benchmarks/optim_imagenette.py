"""The lesson's CNN on Imagenette with momentum, Adam or LAMB: one optimizer and one rate a call, on a one-cycle schedule.

    python benchmarks/optim_imagenette.py FOLDER --opt momentum|adam|lamb [--lr PEAK] [--epochs 5] [--seed 42]

FOLDER has train/ and val/. The images are decoded once, into a cache (650 MB) that later calls find again. A run appends a line to
results/optim_imagenette.jsonl and writes results/optim_imagenette.md anew from all lines. Five epochs take about seven minutes on two idle
CPU cores. `--batches 20` is a trial: it ends after 20 batches, and leaves the results alone. Plain SGD by the same recipe is lesson_imagenette.py's first run."""
import argparse, json
from functools import partial

from common import machine, results, table
from imagenette import Stop, fit
from dl2lib.callbacks import AvgStatsCallback, BatchTransformXCallback, ChannelsLastCallback, CudaCallback, ParamScheduler, accuracy
from dl2lib.convnet import conv_layer
from dl2lib.state import set_seed
from dl2lib.datablock import ByteToFloat, norm_imagenette
from dl2lib.learner import get_learner
from dl2lib.optimizers import adam_opt, lamb_opt, sgd_mom_opt
from dl2lib.schedules import combine_scheds, cos_1cycle_anneal
from dl2lib.train import make_data

# name: the lesson's optimizer, the lesson's rate: here the peak of its schedule, which begins at a third of it and ends at a sixth
OPTS = dict(momentum=(sgd_mom_opt, .3), adam=(adam_opt(), 1e-3), lamb=(lamb_opt(), 3e-3))
LINES, NAMES = results/'optim_imagenette.jsonl', dict(momentum='momentum 0.9, decay 0.01', adam='Adam', lamb='LAMB')


def learner(args, data):
    set_seed(args.seed)
    sched = combine_scheds([.3, .7], cos_1cycle_anneal(args.lr/3, args.lr, args.lr/6)) # 0.1, 0.3, 0.05 for a rate of 0.3
    cbfs = [partial(AvgStatsCallback, accuracy), CudaCallback, ChannelsLastCallback,
            partial(BatchTransformXCallback, [ByteToFloat(), norm_imagenette]), partial(ParamScheduler, 'lr', sched)]
    return get_learner([64, 64, 128, 256], data, args.lr, conv_layer, cb_funcs=cbfs, opt_func=OPTS[args.opt][0])


def write(lines):
    "The table of all runs, in the order of the optimizers, the best rate of each last."
    lines = sorted(lines, key=lambda r: (list(OPTS).index(r['opt']), r['epochs'], r['valid_accuracy'][-1]))
    rows = [[NAMES[r['opt']], f"{r['lr']:g}" + (" (the lesson's)" if r['lr'] == OPTS[r['opt']][1] else ''), r['seed'],
             ' '.join(f'{v:.3f}' for v in r['valid_accuracy']), f"{r['train_loss'][-1]:.3f}", f"{r['valid_loss'][-1]:.3f}", f"{r['seconds']} ({r['load']})"] for r in lines]
    head = ('# Three optimizers on Imagenette (second edition: 9,469 training, 3,925 validation images)\n\n'
            "The lesson's CNN, nfs=[64,64,128,256], 128 px, batches of 64, no augmentation. The rate is the peak of the lesson's one-cycle schedule: from a third of it, "
            'over it at 30% of training, to a sixth. Other hyperparameters are those of the lesson: `sgd_mom_opt`, `adam_opt()`, `lamb_opt()`. Plain SGD by the same recipe: the first row of lesson_imagenette.md. One seed: differences of a '
            'point or two mean nothing. Times are of a machine shared with other work, that of Adam much more than the rest (in brackets: its load at the end, of two cores). `python benchmarks/optim_imagenette.py FOLDER --opt NAME --lr PEAK`')
    header = ['optimizer', 'peak rate', 'seed', 'validation accuracy after each epoch', 'train loss', 'valid loss', 'seconds (load)']
    (results/'optim_imagenette.md').write_text(f'{head}\n\n{table(header, rows)}\n\n{machine()}\n')


def main(argv=None):
    p = argparse.ArgumentParser()
    p.add_argument('folder'); p.add_argument('--opt', required=True, choices=OPTS); p.add_argument('--lr', type=float); p.add_argument('--epochs', type=int, default=5)
    p.add_argument('--seed', type=int, default=42); p.add_argument('--size', type=int, default=128); p.add_argument('--bs', type=int, default=64)
    p.add_argument('--batches', type=int, help='a trial of so many batches')
    args = p.parse_args(argv)
    args.lr = args.lr or OPTS[args.opt][1]
    learn = learner(args, make_data(args.folder, args.size, args.bs, args.seed, cache=True)[0])
    print(f'{args.opt}, peak rate {args.lr:g}, seed {args.seed}, {len(learn.data.train_dl)} batches an epoch', flush=True)
    if args.batches: return learn.fit(args.epochs, cbs=[Stop(args.batches)])
    row = dict(opt=args.opt, lr=args.lr, seed=args.seed, epochs=args.epochs, size=args.size, bs=args.bs, **fit(learn, args.epochs))
    with open(LINES, 'a') as f: f.write(json.dumps(row) + '\n')
    write([json.loads(l) for l in LINES.read_text().splitlines()])


if __name__ == '__main__': main()
