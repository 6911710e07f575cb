"""One epoch's training batches through the Runner against a loop by hand, and NHWC against NCHW.

    python benchmarks/bench_loop.py [ROUNDS]

writes results/bench_loop.md. 15 rounds take about five minutes on two CPU cores."""
import random, statistics, sys, time
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn, optim
from torch.nn import functional as F

from common import interleaved, ratios, save, spread, table
from dl2lib.callbacks import AvgStatsCallback, BatchTransformXCallback, ChannelsLastCallback, ParamScheduler, Recorder, accuracy
from dl2lib.convnet import conv_layer, get_cnn_model, init_cnn
from dl2lib.datablock import ByteToFloat, norm_imagenette
from dl2lib.runner import Runner, TrainBundle
from dl2lib.schedules import combine_scheds, cos_1cycle_anneal

EPOCH, BS, SIZE, NFS, LR = 148, 64, 128, [64, 64, 128, 256], .1 # Imagenette's batches
TURNS, FEW, ROUNDS, TINY = 4, 3, 9, 300                          # turns in a round; batches and rounds of what is measured beside; batches of the tiny model
HAND, RUNNER, NCHW, CBS = 'by hand', 'Runner', 'by hand, NCHW', "Runner with `make train`'s callbacks"


def by_hand(model, batches):
    opt = optim.SGD(model.parameters(), LR)
    model.train()
    for xb, yb in batches:
        loss = F.cross_entropy(model(xb), yb)
        loss.backward()
        opt.step()
        opt.zero_grad()


def by_runner(model, batches, cbs=()):
    run = Runner(cb_funcs=list(cbs))
    run.logger = lambda row: None
    run.fit(1, TrainBundle(model, optim.SGD(model.parameters(), LR), F.cross_entropy, SimpleNamespace(train_dl=batches, valid_dl=None)))


def train_cbs(): # as `make train` has them; on a CPU it has nothing to move
    sched = combine_scheds([.3, .7], cos_1cycle_anneal(.1, .3, .05))
    return [partial(AvgStatsCallback, accuracy), Recorder, ChannelsLastCallback, partial(BatchTransformXCallback, [ByteToFloat(), norm_imagenette]),
            partial(ParamScheduler, 'lr', sched)]


def cnn(seed, nhwc=True):
    torch.manual_seed(seed)
    model = get_cnn_model(SimpleNamespace(c_in=3, c_out=10), NFS, conv_layer)
    init_cnn(model)
    return model.to(memory_format=torch.channels_last) if nhwc else model


def tiny(seed):
    torch.manual_seed(seed)
    return nn.Linear(4, 2)


def images(seed, n, nhwc=True, floats=True): # batches of random pictures, in memory
    g = torch.Generator().manual_seed(seed)
    res = []
    for _ in range(n):
        x, y = torch.randint(0, 256, (BS, 3, SIZE, SIZE), dtype=torch.uint8, generator=g), torch.randint(0, 10, (BS,), generator=g)
        if floats: x = norm_imagenette(ByteToFloat()(x))
        res.append((x.contiguous(memory_format=torch.channels_last) if nhwc else x, y))
    return res


def points(seed, n):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(BS, 4, generator=g), torch.randint(0, 2, (BS,), generator=g)) for _ in range(n)]


def arm(loop, model, batches): # functions of a seed: the round's number gives all arms the same weights and the same batches
    def f(r):
        m, bs = model(1000+r), batches(1000+r)
        start = time.perf_counter()
        loop(m, bs)
        return time.perf_counter()-start
    return f


def same_weights(loops, model, batches): # or an error
    states = []
    for loop in loops:
        m = model(1)
        loop(m, batches(1))
        states.append(m.state_dict())
    assert all(torch.equal(a, b) for s in states[1:] for a, b in zip(states[0].values(), s.values()))


def interval(values, level=.9, draws=10_000, seed=0)->tuple:
    "Of the median, by bootstrap."
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(draws*(1-level)/2)], medians[int(draws*(1+level)/2)-1]


def with_interval(values)->str: return '{:.4f} ({:.4f} to {:.4f})'.format(statistics.median(values), *interval(values))


def main(rounds=15):
    rounds = int(rounds)
    n, few = -(-EPOCH//(rounds*TURNS)), partial(images, n=FEW) # batches of a turn
    same_weights([by_hand, by_runner], cnn, few)
    same_weights([by_hand, by_runner], tiny, partial(points, n=TINY))
    loop = interleaved({k: arm(f, cnn, partial(images, n=n)) for k, f in ((HAND, by_hand), (RUNNER, by_runner))}, rounds, turns=TURNS)
    beside = interleaved({HAND: arm(by_hand, cnn, few), NCHW: arm(by_hand, partial(cnn, nhwc=False), partial(few, nhwc=False)),
                          CBS: arm(partial(by_runner, cbs=train_cbs()), cnn, partial(few, floats=False))}, ROUNDS)
    small = interleaved({k: arm(f, tiny, partial(points, n=TINY)) for k, f in ((HAND, by_hand), (RUNNER, by_runner))}, 3*rounds)
    over = [1e6*(b-a)/TINY for a, b in zip(small[HAND], small[RUNNER])]
    rows = [['Runner to by hand: the epoch, median with its 90% interval', rounds, with_interval(ratios(loop, RUNNER, HAND)), 'reaches 1.05 or below'],
            ['NCHW to NHWC, both by hand: `channels_last` is so many times as fast', ROUNDS, spread(ratios(beside, NCHW, HAND)), 'at least 1.3'],
            [f'{CBS} to by hand without any of their work', ROUNDS, spread(ratios(beside, CBS, HAND)), '']]
    save('bench_loop', f'# The training loop\n\nThe lesson\'s CNN, {SIZE}x{SIZE}, batches of {BS}, SGD: forward pass, loss, backward pass, step. Batches are made beforehand, so that '
         f'decoding does not blur it; arms take turns, and within a round all get the same weights and batches. {TURNS} turns of {n} batches a round, {TURNS*n*rounds} batches in all (Imagenette\'s epoch has '
         f'{EPOCH}), in NHWC; {FEW} a round in the last two rows. Loop and Runner end with the same weights to the bit, which the benchmark checks. '
         f'By hand a batch takes {spread([s/n/TURNS for s in loop[HAND]], ".0f", 1000)} ms. `python benchmarks/bench_loop.py`\n\n'
         + table(['ratio within a round', 'n', 'median (range, or interval)', 'target'], rows)
         + f'\n\nWith a model that costs next to nothing (a linear layer of ten numbers), the Runner adds {spread(over, ".0f")} microseconds to the '
         f'{spread([1e6*s/TINY for s in small[HAND]], ".0f")} that a batch takes by hand: median (range), n = {3*rounds} rounds of {TINY} batches.')


if __name__ == '__main__': main(*sys.argv[1:])
