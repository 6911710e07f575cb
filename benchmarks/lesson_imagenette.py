"""The lesson on Imagenette: its CNN by its own settings, a loop by hand and ResNets by the same recipe, and what LSUV, momentum and flips bring.

    python benchmarks/lesson_imagenette.py FOLDER --run NAME [--seed 42] [--epochs 5]

FOLDER has train/ and val/. The images are decoded once, into a cache (650 MB) that later calls find again. Each call is one training, of what `dl2lib-train` is
given (all but the runs `hand` and `resnet18`, which no option names); it adds a line to results/lesson_imagenette.jsonl and writes results/lesson_imagenette.md
anew. Five epochs of a CNN take some eight minutes on two idle CPU cores, of a ResNet twenty. `--batches 20` is a trial: it ends after 20 batches, and leaves
the results alone."""
import os, statistics, time
from datetime import date

import torch
from torch.nn import functional as F

from common import results, table
from imagenette import command, fit
from dl2lib.callbacks import ParamScheduler
from dl2lib.core import default_device, to_device
from dl2lib.state import set_seed
from dl2lib.datablock import norm_imagenette
from dl2lib.lsuv import lsuv_init
from dl2lib.runner import get_batch
from dl2lib.train import Settings, make_learner, make_schedule

SIZE, BS, MOMENTUM = 128, 64, dict(opt='momentum', lr=.3, wd=.001)
LINES = results/'lesson_imagenette.jsonl'
RUNS = dict(lesson=("the lesson's CNN", {}), hand=('the same, by a loop written by hand', {}), resnet18=("torchvision's ResNet-18", {}),
            resnet=('our ResNet', dict(arch='resnet')), lsuv=('CNN, LSUV', dict(lsuv=True)), momentum=('CNN, momentum 0.9, L2 0.001', MOMENTUM),
            flip=('CNN, flips', dict(augment='flip')), together=('CNN, LSUV, momentum, flips', dict(lsuv=True, augment='flip', **MOMENTUM)),
            heavy=('CNN, LSUV, LAMB (peak rate 0.009), all augmentation', dict(lsuv=True, augment='all', opt='lamb', lr=.009)))


def learner(args, data):
    s = Settings(epochs=args.epochs, size=SIZE, bs=BS, seed=args.seed, **RUNS[args.run][1])
    set_seed(args.seed)
    learn = make_learner(data, s)
    if args.run == 'resnet18':
        from torchvision.models import resnet18
        learn.model = to_device(resnet18(num_classes=data.c_out), default_device()) # with torchvision's own first weights
    if s.lsuv: lsuv_init(learn.model, get_batch(data.train_dl, learn)[0])
    learn.add_cbs(ParamScheduler('lr', make_schedule(s.schedule, s.lr)))
    return learn


def by_hand(learn, epochs)->dict: # what `fit` gives, of a plain loop around the learner's model and data
    model, data, device, start = learn.model.to(memory_format=torch.channels_last), learn.data, default_device(), time.time()
    opt, sched = torch.optim.SGD(model.parameters(), lr=.1), make_schedule('one_cycle', .3)
    mean, std = (torch.tensor(o, device=device)[:, None, None] for o in (norm_imagenette.mean, norm_imagenette.std))
    cols = {c: [] for c in ('train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy')}
    for epoch in range(epochs):
        for side, dl in ('train', data.train_dl), ('valid', data.valid_dl):
            model.train(side == 'train')
            losses, right, n = 0., 0, 0
            for i, (xb, yb) in enumerate(dl):
                xb, yb = xb.to(device), yb.to(device)
                xb = ((xb.float()/255 - mean)/std).contiguous(memory_format=torch.channels_last)
                with torch.set_grad_enabled(side == 'train'):
                    pred = model(xb)
                    loss = F.cross_entropy(pred, yb)
                if side == 'train':
                    opt.param_groups[0]['lr'] = sched((epoch + i/len(dl))/epochs)
                    opt.zero_grad()
                    loss.backward()
                    opt.step()
                losses, right, n = losses + loss.item()*len(yb), right + (pred.argmax(1) == yb).sum().item(), n + len(yb)
            cols[f'{side}_loss'].append(losses/n)
            cols[f'{side}_accuracy'].append(right/n)
        print(epoch, *(f'{v[-1]:.4f}' for v in cols.values()), f'{time.time()-start:.0f} s', flush=True)
    return cols | dict(seconds=round(time.time()-start), load=round(os.getloadavg()[0], 1), date=str(date.today()))


def fit_or_by_hand(learn, epochs, run): return (by_hand if run == 'hand' else fit)(learn, epochs)


def write(lines):
    "The table of all runs."
    lines, order = sorted(lines, key=lambda r: (r['epochs'], list(RUNS).index(r['run']), r['seed'])), dict.fromkeys(RUNS)
    rows = [[RUNS[r['run']][0], f"{r['parameters']:,}", r['seed'], r['epochs'], *(f'{r[c][-1]:.3f}' for c in ('train_loss', 'train_accuracy', 'valid_loss')),
             ' '.join(f'{v:.3f}' for v in r['valid_accuracy'][:-1]), f"{r['valid_accuracy'][-1]:.3f}", f"{r['seconds']/60:.1f} ({r['load']})"] for r in lines]
    final = {k: [r['valid_accuracy'][-1] for r in lines if r['run'] == k] for k in order}
    means = [f'{RUNS[k][0]}: {statistics.mean(v):.3f} ± {statistics.stdev(v):.3f} over {len(v)} seeds' for k, v in final.items() if len(v) > 1]
    text = TEXT + table(HEADER, rows) + ''.join(f'\n\nMean and standard deviation of the validation accuracy: {"; ".join(means)}.' for _ in means[:1])
    (results/'lesson_imagenette.md').write_text(text + '\n\n' + '\n\n'.join(dict.fromkeys(r['machine'] for r in lines)) + '\n')


HEADER = ['run', 'parameters', 'seed', 'epochs', 'train loss', 'train accuracy', 'valid loss', 'accuracy after the epochs before', 'validation accuracy', 'minutes (load)']
TEXT = """# The lesson on Imagenette (second edition: 9,469 training, 3,925 validation images)

The lesson's settings, which all runs share but for what their names say: nfs=[64,64,128,256] (CNN), 128 px (squashed to a square), batches of 64, plain SGD,
`combine_scheds([0.3,0.7], cos_1cycle_anneal(0.1,0.3,0.05))`, no augmentation. One seed: differences of a point or two mean nothing. LAMB's schedule has the same
shape. "All augmentation" is `dl2lib-train --augment all`: flips, turns, tilts, light, crops. Train numbers are of augmented images. Times are of a machine
that other work shared (in brackets: its load at the end, of two cores); the run of our ResNet was halted for a quarter of an hour. `python benchmarks/lesson_imagenette.py FOLDER --run NAME`

"""


if __name__ == '__main__': command(RUNS, learner, LINES, write, SIZE, BS, fit_or_by_hand)
