"""Does LSUV help? Plain CNNs without BatchNorm on Shapes, and the lesson's CNN without BatchNorm on Imagenette.

    python benchmarks/lsuv_helps.py shapes            # 3 seeds, 3 depths, 4 inits, 3 learning rates
    python benchmarks/lsuv_helps.py imagenette FOLDER [EPOCHS]

writes results/lsuv_helps_shapes.md or results/lsuv_helps_imagenette.md."""
import statistics, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import save, table
from dl2lib.convnet import ConvLayer, get_cnn_model, init_cnn
from dl2lib.datablock import CategoryProcessor, ImageList, LabeledData, ResizeFixed, make_rgb, parent_labeler, to_byte_tensor
from dl2lib.datasets import shapes
from dl2lib.lsuv import lsuv_init


def load(folder, size):
    "All images of a folder, squashed to `size` pixels: bytes (N,3,size,size) and classes."
    il = ImageList.from_files(folder, tfms=[make_rgb, ResizeFixed(size), to_byte_tensor])
    ds = LabeledData.label_by_func(il, parent_labeler, proc_y=CategoryProcessor())
    x = torch.empty(len(ds), 3, size, size, dtype=torch.uint8) # filled image by image: no second copy of a whole set
    for i, im in enumerate(ds.x): x[i] = im
    return x, torch.tensor(ds.y.items)


def normalizer(x):
    s = x[::max(1, len(x)//1000)].float()
    mean, std = s.mean((0, 2, 3), keepdim=True), s.std((0, 2, 3), keepdim=True)
    return lambda b: (b.float()-mean)/std


def evaluate(model, x, y, norm):
    "Loss and accuracy."
    with torch.no_grad(): out = torch.cat([model(norm(b)) for b in x.split(100)])
    return F.cross_entropy(out, y).item(), (out.argmax(1) == y).float().mean().item()


def epoch(model, opt, x, y, norm, bs, sched=None):
    "One run through the data in a random order; the mean training loss. A loss that is no number ends it."
    losses = []
    for idx in torch.randperm(len(x)).split(bs):
        loss = F.cross_entropy(model(norm(x[idx])), y[idx])
        losses.append(loss.item())
        if not np.isfinite(losses[-1]): return float('nan')
        opt.zero_grad(); loss.backward(); opt.step()
        if sched: sched.step()
    return statistics.mean(losses)


def plain_cnn(depth, nf=32):
    "`depth` layers with weights: 3x3 convolutions, each with a ReLU, halving the side at three of them, then pooling and a linear layer."
    ls, ni, convs = [], 3, depth-1
    halve = {round(i*(convs-1)/3) for i in range(3)}
    for i in range(convs):
        ls += [nn.Conv2d(ni, nf, 3, padding=1, stride=2 if i in halve else 1), nn.ReLU()]
        ni = nf
    return nn.Sequential(*ls, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(nf, 10))


INITS = {'torch\'s default': lambda m, xb, **kw: None,
         'Kaiming (`init_cnn`)': lambda m, xb, **kw: init_cnn(m),
         'Kaiming, then LSUV': lambda m, xb, **kw: (init_cnn(m), lsuv_init(m, xb, **kw)),
         'LSUV, orthonormal start': lambda m, xb, **kw: (init_cnn(m), lsuv_init(m, xb, orthonormal=True, **kw))}


def run_shapes(depths=(5, 10, 20), lrs=(.002, .006, .02), seeds=(1, 2, 3), epochs=4, bs=16, size=32):
    path, t0, first, last = shapes(), time.time(), [], []
    (x, y), (vx, vy) = load(path/'train', size), load(path/'val', size)
    norm = normalizer(x)
    def cell(res): # pairs of loss and accuracy, a seed each
        loss, acc = zip(*res)
        return f'{statistics.mean(loss):.2f} ± {statistics.stdev(loss):.2f}; {100*statistics.mean(acc):.0f} ± {100*statistics.stdev(acc):.0f}%'
    for depth in depths:
        for name, init in INITS.items():
            cells = []
            for lr in lrs:
                res = []
                for seed in seeds:
                    torch.manual_seed(seed)
                    model = plain_cnn(depth)
                    init(model, norm(x[torch.randperm(len(x))[:128]]))
                    torch.manual_seed(seed) # the same batches for every init
                    opt = torch.optim.SGD(model.parameters(), lr, momentum=.9)
                    res.append([(epoch(model, opt, x, y, norm, bs), evaluate(model, vx, vy, norm)[1]) for _ in range(epochs)])
                cells.append((cell([r[0] for r in res]), cell([r[-1] for r in res])))
            first.append([depth, name, *(c[0] for c in cells)]); last.append([depth, name, *(c[1] for c in cells)])
            print(f'{time.time()-t0:.0f}s', first[-1], last[-1], flush=True)
    header = ['layers', 'init', *(f'lr {lr}' for lr in lrs)]
    save('lsuv_helps_shapes', '# Does LSUV help? Plain CNNs without BatchNorm on Shapes\n\n'
         f'{len(x):,} training and {len(vx)} validation images of {size}x{size}, ten classes (guessing: loss 2.30, 10%). 3x3 convolutions of 32 channels with ReLU, '
         f'a linear layer at the end; SGD, momentum 0.9, batches of {bs}. LSUV on a batch of 128, over all convolutions and linear layers. '
         f'Mean training loss of the epoch; validation accuracy after it; mean ± standard deviation over n = {len(seeds)} seeds, at each learning rate. '
         'nan: a seed diverged. `python benchmarks/lsuv_helps.py shapes`\n\nThe first epoch:\n\n'
         + table(header, first) + f'\n\nEpoch {epochs}:\n\n' + table(header, last)
         + f'\n\n{(time.time()-t0)/60:.0f} minutes, on a machine shared with other work.')


def run_imagenette(folder, epochs=2, size=128, bs=64, lr=.05, seed=42):
    epochs, folder, t0, rows = int(epochs), Path(folder), time.time(), []
    (x, y), (vx, vy) = load(folder/'train', size), load(folder/'val', size)
    norm, loaded = normalizer(x), time.time()-t0
    data = SimpleNamespace(c_in=3, c_out=10)
    inits = {'Kaiming (`init_cnn`)': INITS['Kaiming (`init_cnn`)'],
             'Kaiming, then LSUV on each `ConvLayer`, as in the lesson': lambda m, xb: (init_cnn(m), lsuv_init(m, xb, ConvLayer))}
    for name, init in inits.items():
        torch.manual_seed(seed)
        model = get_cnn_model(data, [64, 64, 128, 256], ConvLayer, leak=0., sub=0.)
        t = time.time()
        init(model, norm(x[torch.randperm(len(x))[:bs]]))
        t_init = time.time()-t
        torch.manual_seed(seed)
        opt = torch.optim.SGD(model.parameters(), lr)
        for e in range(epochs):
            t = time.time()
            loss = epoch(model, opt, x, y, norm, bs)
            vloss, vacc = evaluate(model, vx, vy, norm)
            rows.append([name, f'{t_init:.1f}', e+1, f'{loss:.3f}', f'{vloss:.3f}', f'{100*vacc:.1f}%', f'{time.time()-t:.0f}'])
            print(rows[-1], flush=True)
    save('lsuv_helps_imagenette', '# Does LSUV help? The lesson\'s CNN without BatchNorm on Imagenette\n\n'
         f'Second edition: {len(x):,} training and {len(vx):,} validation images, squashed to {size}x{size}, no augmentation. `ConvLayer`, nfs=[64,64,128,256], plain SGD, '
         f'lr {lr}, batches of {bs}, one seed ({seed}), the same batches for both. `python benchmarks/lsuv_helps.py imagenette FOLDER {epochs}`\n\n'
         + table(['init', 'seconds for it', 'epoch', 'train loss', 'valid loss', 'valid accuracy', 'seconds'], rows)
         + f'\n\nReading the images took {loaded:.0f} s; {(time.time()-t0)/60:.0f} minutes in all, on a machine shared with other work. One seed: differences of a point or two mean nothing.')


if __name__ == '__main__':
    torch.set_flush_denormal(True) # tiny numbers of dying networks slow a CPU down
    dict(shapes=run_shapes, imagenette=run_imagenette)[sys.argv[1]](*sys.argv[2:])
