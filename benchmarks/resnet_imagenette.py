"""Our ResNet, torchvision's ResNet-18 and the lesson's CNN on Imagenette, by one recipe: one training a call.

    python benchmarks/resnet_imagenette.py FOLDER --run ours|resnet18|lesson [--seed 42] [--epochs 5]

FOLDER has train/ and val/. The images are decoded once, into a cache (650 MB) that later calls find again. A run appends a line to
results/resnet_imagenette.jsonl and writes results/resnet_imagenette.md anew from all lines. Five epochs of a ResNet take some twenty minutes
on two idle CPU cores, of the CNN six. `--batches 20` is a trial: it ends after 20 batches, and leaves the results alone."""
import statistics
from functools import partial

import torch
from torch.nn import functional as F

from common import results, table
from imagenette import command
from dl2lib.callbacks import AvgStatsCallback, BatchTransformXCallback, ChannelsLastCallback, CudaCallback, ParamScheduler, accuracy
from dl2lib.convnet import conv_layer, get_cnn_model, init_cnn
from dl2lib.core import noop
from dl2lib.state import set_seed
from dl2lib.datablock import ByteToFloat, norm_imagenette
from dl2lib.learner import Learner
from dl2lib.optimizers import adam_opt
from dl2lib.resnet import get_resnet_model
from dl2lib.schedules import combine_scheds, cos_1cycle_anneal

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


def write(lines):
    "The table of all runs."
    lines = sorted(lines, key=lambda r: (r['epochs'], list(RUNS).index(r['run']), r['seed']))
    rows = [[RUNS[r['run']], f"{r['parameters']:,}", r['seed'], r['epochs'], f"{r['train_loss'][-1]:.3f}", f"{r['valid_loss'][-1]:.3f}",
             ' '.join(f'{v:.3f}' for v in r['valid_accuracy'][:-1]), f"{r['valid_accuracy'][-1]:.3f}", f"{r['seconds']/60:.1f} ({r['load']})"] for r in lines]
    head = ('# Networks on Imagenette (second edition: 9,469 training, 3,925 validation images)\n\n' + RECIPE +
            ' `python benchmarks/resnet_imagenette.py FOLDER --run NAME`. With so few seeds a point is within what chance does. Times are of machines '
            'shared with other work (in brackets: the load at the end), on which these runs were halted now and then.')
    header = ['network', 'parameters', 'seed', 'epochs', 'train loss', 'valid loss', 'accuracy after the epochs before', 'validation accuracy', 'minutes (load)']
    seeds = {}
    for r in lines: seeds.setdefault((RUNS[r['run']], r['epochs']), []).append(r['valid_accuracy'][-1])
    means = [[k, epochs, f'{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})', len(v)] for (k, epochs), v in seeds.items()]
    machines = '\n\n'.join(dict.fromkeys(r['machine'] for r in lines))
    (results/'resnet_imagenette.md').write_text(f'{head}\n\n{table(header, rows)}\n\n'
                                                 f'{table(["network", "epochs", "validation accuracy: mean (range)", "seeds"], means)}\n\n{machines}\n')


if __name__ == '__main__': command(RUNS, learner, LINES, write, SIZE, BS)
