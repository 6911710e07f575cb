"""Our ResNet, torchvision's ResNet-18 and the lesson's CNN on Imagenette, by one recipe: one training a call.

    python benchmarks/resnet_imagenette.py FOLDER --run ours|resnet18|lesson [--seed 42] [--epochs 5]

FOLDER has train/ and val/. The images are decoded once, into a cache (650 MB) that later calls find again. A run appends a line to
results/resnet_imagenette.jsonl and writes results/resnet_imagenette.md anew from all lines. Five epochs of a ResNet take some twenty minutes
on two idle CPU cores, of the CNN six. `--batches 20` is a trial: it ends after 20 batches, and leaves the results alone."""
import argparse, json, os, time
from datetime import date
from functools import partial

import torch
from torch.nn import functional as F

from common import machine, results, table
from dl2lib.callbacks import (AvgStatsCallback, BatchTransformXCallback, Callback, CancelTrainException, ChannelsLastCallback, CudaCallback,
                              ParamScheduler, accuracy)
from dl2lib.convnet import conv_layer, get_cnn_model, init_cnn
from dl2lib.core import default_device, noop, set_seed
from dl2lib.datablock import (ByteToFloat, CategoryProcessor, ImageList, ResizeFixed, SplitData, label_by_func, make_rgb, norm_imagenette,
                              parent_labeler, to_byte_tensor)
from dl2lib.datacache import cached
from dl2lib.learner import Learner
from dl2lib.optimizers import adam_opt
from dl2lib.resnet import get_resnet_model
from dl2lib.schedules import combine_scheds, cos_1cycle_anneal
from dl2lib.train import find_splits

SIZE, BS, LR, WD, SMOOTHING = 128, 64, 4e-3, .05, .1
LINES = results/'resnet_imagenette.jsonl'
RUNS = dict(lesson="the lesson's CNN", resnet18="torchvision's ResNet-18", ours='`get_resnet_model`')
RECIPE = (f'{SIZE} px (squashed to a square), batches of {BS}, every second training image flipped left to right, label smoothing {SMOOTHING}, '
          f'`adam_opt(wd={WD})` with sqr_mom 0.99 and eps 1e-6, one cycle: from {LR/20:g} over {LR:g} at 30% to {LR/1000:g}. The same for each network.')


class FlipHalf:
    "Batch transform: each image is mirrored left to right with probability 1/2, in training."
    valid = staticmethod(noop)
    def __call__(self, x):
        flip = (torch.rand(len(x)) < .5).to(x.device, non_blocking=True)
        return torch.where(flip[:, None, None, None], x.flip(3), x)


class Stop(Callback):
    "Ends training after so many batches, and says how long they took."
    def __init__(self, batches): self.batches, self.losses = batches, []
    def begin_fit(self): self.start = time.time()
    def after_batch(self):
        self.losses.append(self.loss.item())
        if len(self.losses) < self.batches: return
        print(f'{self.batches} batches: {time.time()-self.start:.1f} s, losses', *(f'{v:.2f}' for v in self.losses))
        raise CancelTrainException


def load(args):
    "Batches as `make train` makes them, read from a cache."
    include, splitter, _ = find_splits(args.folder)
    il = ImageList.from_files(args.folder, tfms=[make_rgb, ResizeFixed(SIZE), to_byte_tensor], include=include)
    ll = cached(label_by_func(SplitData.split_by_func(il, splitter), parent_labeler, proc_y=CategoryProcessor()), args.cache)
    return ll.to_databunch(BS, c_in=3, seed=args.seed, num_workers=0 if default_device().type == 'cpu' else 8)


def make(run, data):
    if run == 'ours': return get_resnet_model(data)
    if run == 'lesson':
        model = get_cnn_model(data, [64, 64, 128, 256], conv_layer)
        init_cnn(model)
        return model
    from torchvision.models import resnet18
    return resnet18(num_classes=data.c_out) # with torchvision's own first weights


def learner(args, data):
    set_seed(args.seed)
    sched = combine_scheds([.3, .7], cos_1cycle_anneal(LR/20, LR, LR/1000))
    cbfs = [partial(AvgStatsCallback, accuracy), CudaCallback, ChannelsLastCallback, partial(ParamScheduler, 'lr', sched),
            partial(BatchTransformXCallback, [FlipHalf(), ByteToFloat(), norm_imagenette])]
    return Learner(make(args.run, data), data, partial(F.cross_entropy, label_smoothing=SMOOTHING), lr=LR, cb_funcs=cbfs,
                   opt_func=adam_opt(wd=WD, sqr_mom=.99, eps=1e-6))


def fit(args, learn):
    "-> what goes into the file."
    rows, start = [], time.time()
    def log(row):
        rows.append(row)
        print(*row, flush=True)
    learn.logger = log
    learn.fit(args.epochs)
    cols = ['train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy']
    return dict(run=args.run, seed=args.seed, epochs=args.epochs, parameters=sum(p.numel() for p in learn.model.parameters()),
                **{c: [float(r[i]) for r in rows[1:]] for i, c in enumerate(cols, 1)}, seconds=round(time.time()-start),
                load=round(os.getloadavg()[0], 1), date=str(date.today()), machine=machine())


def write(lines):
    "The table of all runs."
    lines = sorted(lines, key=lambda r: (r['epochs'], list(RUNS).index(r['run']), r['seed']))
    rows = [[RUNS[r['run']], f"{r['parameters']:,}", r['seed'], r['epochs'], f"{r['train_loss'][-1]:.3f}", f"{r['valid_loss'][-1]:.3f}",
             ' '.join(f'{v:.3f}' for v in r['valid_accuracy'][:-1]), f"{r['valid_accuracy'][-1]:.3f}", f"{r['seconds']/60:.1f} ({r['load']})"] for r in lines]
    head = ('# Three networks on Imagenette (second edition: 9,469 training, 3,925 validation images)\n\n' + RECIPE +
            ' `python benchmarks/resnet_imagenette.py FOLDER --run NAME`. Times are of a machine shared with other work (in brackets: its load at the end).')
    header = ['network', 'parameters', 'seed', 'epochs', 'train loss', 'valid loss', 'accuracy after the epochs before', 'validation accuracy', 'minutes (load)']
    machines = '\n\n'.join(dict.fromkeys(r['machine'] for r in lines))
    (results/'resnet_imagenette.md').write_text(f'{head}\n\n{table(header, rows)}\n\n{machines}\n')


def main(argv=None):
    p = argparse.ArgumentParser()
    p.add_argument('folder'); p.add_argument('--run', required=True, choices=RUNS); p.add_argument('--epochs', type=int, default=5)
    p.add_argument('--seed', type=int, default=42); p.add_argument('--cache', help='folder for decoded images')
    p.add_argument('--batches', type=int, help='a trial of so many batches')
    args = p.parse_args(argv)
    learn = learner(args, load(args))
    print(f'{args.run}, seed {args.seed}, {len(learn.data.train_dl)} batches an epoch', flush=True)
    if args.batches: return learn.fit(args.epochs, cbs=[Stop(args.batches)])
    row = fit(args, learn)
    with open(LINES, 'a') as f: f.write(json.dumps(row) + '\n')
    write([json.loads(l) for l in LINES.read_text().splitlines()])


if __name__ == '__main__': main()
