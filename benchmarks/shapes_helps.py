"""Is Shapes honestly hard? `make train` over seeds, and whether what helps on photographs helps there.

    python benchmarks/shapes_helps.py [SEED ...]

writes results/shapes_helps.md. Three seeds take about twenty-five minutes on two CPU cores."""
import statistics, sys
from functools import partial
from random import random

import torch
from PIL.Image import Transpose

from common import save, table
from dl2lib.convnet import conv_layer, get_cnn_model
from dl2lib.state import set_seed
from dl2lib.datablock import Transform
from dl2lib.datasets import shapes
from dl2lib.schedules import combine_scheds, cos_1cycle_anneal
from dl2lib.train import make_data, make_learner


class Flip(Transform):
    "Mirrors every second image, left and right."
    def __call__(self, im): return im.transpose(Transpose.FLIP_LEFT_RIGHT) if random() < .5 else im


def momentum(scale, learn): # the recipe's rates assume none: `scale` times them
    learn.opt = torch.optim.SGD(learn.model.parameters(), lr=.1*scale, momentum=.9)
    learn.param_scheduler.scheds = combine_scheds([.3, .7], cos_1cycle_anneal(.1*scale, .3*scale, .05*scale))

def torch_init(learn): # undo `init_cnn`
    learn.model.load_state_dict(get_cnn_model(learn.data, [64, 64, 128, 256], conv_layer).state_dict())

def flips(learn):
    items = learn.data.train_ds.x
    items.tfms = [Flip(), *items.tfms]

def nothing(learn): pass


ARMS = [('`make train`', 3, nothing), ('plain SGD', 5, nothing), ("torch's init instead of Kaiming's", 5, torch_init),
        *((f'momentum 0.9, rates times {k}', 5, partial(momentum, k)) for k in (.03, .1, .3)),
        ('plain SGD', 10, nothing), ('plain SGD, random flips', 10, flips)]


def fit(epochs, change, seed):
    "Training accuracy at the end, and validation accuracy after each epoch."
    set_seed(seed)
    data, _ = make_data(shapes(), seed=seed)
    learn = make_learner(data)
    change(learn)
    rows = []
    learn.logger = rows.append
    learn.fit(epochs)
    return [float(r[2]) for r in rows[1:]][-1], [float(r[4]) for r in rows[1:]]


def main(*seeds):
    seeds, rows = [int(s) for s in seeds] or [1, 2, 42], []
    def spread(v): return f'{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})'
    for name, epochs, change in ARMS:
        runs = [fit(epochs, change, seed) for seed in seeds]
        rows.append([name, epochs, spread([v[0] for _, v in runs]), spread([v[-1] for _, v in runs]), spread([t for t, _ in runs])])
        print(rows[-1], flush=True)
    save('shapes_helps', '# Is Shapes honestly hard, and does what helps on photographs help there?\n\n'
         f"1,500 training and 500 validation images, 128 px, batches of 32, the lesson's CNN and recipe; mean (range) over the seeds {', '.join(map(str, seeds))}. "
         '`python benchmarks/shapes_helps.py`\n\n'
         + table(['what', 'epochs', 'validation accuracy after one', 'at the end', 'training accuracy at the end'], rows))


if __name__ == '__main__': main(*sys.argv[1:])
