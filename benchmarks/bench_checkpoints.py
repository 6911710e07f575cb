"""What it costs to be resumable: a fit with `CheckpointCallback`, the writing left out, against the same fit without it. And, beside it, what one
writing costs.

    python benchmarks/bench_checkpoints.py [ROUNDS]

writes results/bench_checkpoints.md. 15 rounds take about four minutes on two CPU cores."""
import os, random, statistics, sys, tempfile, time
from pathlib import Path

import torch
from torch.nn import functional as F

from common import interleaved, ratios, save, spread, table
from dl2lib.callbacks import AvgStatsCallback, BatchTransformXCallback, Callback, ParamScheduler, Recorder, accuracy
from dl2lib.checkpoints import CheckpointCallback
from dl2lib.convnet import conv_layer, get_cnn_model, init_cnn
from dl2lib.state import set_seed
from dl2lib.datablock import ByteToFloat, DataBunch, Dataset, get_dls, norm_imagenette
from dl2lib.learner import Learner
from dl2lib.optimizers import sgd_mom_opt
from dl2lib.schedules import combine_scheds, cos_1cycle_anneal

ITEMS, BS, SIZE, EPOCHS = 1280, 32, 64, 1
PLAIN, KEEPS = 'without', 'resumable'
sched = combine_scheds([.3, .7], cos_1cycle_anneal(.01, .1, .001))
g = torch.Generator().manual_seed(0)
ds = Dataset(torch.randint(0, 256, (ITEMS, 3, SIZE, SIZE), generator=g, dtype=torch.uint8), torch.randint(0, 10, (ITEMS,), generator=g))


class Clock(Callback): # from the first batch to the end of the last, in training
    _order = -1e9
    def begin_batch(self):
        if self.in_train and self.n_iter == 0: self.began = time.perf_counter()

class EndClock(Callback):
    _order = float('inf') # after the checkpoint: it comes later among equals
    def after_batch(self):
        if self.in_train: self.ended = time.perf_counter()


class NoWriting(CheckpointCallback): # all but the writing
    def write(self, epoch, batch): self.last, self.saved = time.monotonic(), self.saved+1


def fit(cbs, seed=0):
    "Seconds of the training batches; the Learner."
    set_seed(seed)
    data = DataBunch(*get_dls(ds, None, BS, seed=1), 3, 10)
    model = get_cnn_model(data, [32, 64, 128, 128], conv_layer)
    init_cnn(model)
    clock, end = Clock(), EndClock()
    learn = Learner(model, data, F.cross_entropy, opt_func=sgd_mom_opt, lr=.05, cbs=[AvgStatsCallback(accuracy), Recorder(), ParamScheduler('lr', sched),
                                                                                  BatchTransformXCallback([ByteToFloat(), norm_imagenette]), clock])
    learn.logger = lambda row: None
    learn.fit(EPOCHS, [*cbs, end])
    return end.ended-clock.began, learn


def interval(values, share=.9, n=10_000): # of the median, by resampling
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(n))
    return medians[int(n*(1-share)/2)], medians[int(n*(1+share)/2)]


def main(rounds=15):
    rounds, folder = int(rounds), tempfile.mkdtemp()
    path = os.path.join(folder, 'fit.ckpt')
    def resumable(): return NoWriting(path, every_batches=10, every_minutes=1, overwrite=True)
    a, b = fit([])[1], fit([CheckpointCallback(path, every_batches=10)])[1]
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters())) and a.recorder.losses == b.recorder.losses, 'another training'
    times = interleaved({PLAIN: lambda r: fit([])[0], KEEPS: lambda r: fit([resumable()])[0]}, rounds)
    rs = ratios(times, KEEPS, PLAIN)
    lo, hi = interval(rs)
    written = []
    for _ in range(9):
        keeper = CheckpointCallback(path, overwrite=True)
        keeper.set_runner(b)
        keeper.begin_fit(); keeper.release()
        start = time.perf_counter()
        keeper.write(0, 1)
        written.append(time.perf_counter()-start)
    n, mb = -(-ITEMS//BS)*EPOCHS, Path(path).stat().st_size/1e6
    save('bench_checkpoints', f'# What it costs to be resumable\n\nThe lesson\'s kind of CNN on {SIZE} px images of bytes in memory, {n} batches of {BS}, momentum, statistics, recorder, schedule. One arm has a '
         '`CheckpointCallback` for every 10 batches and every minute, whose writing is left out; the other has none. Weights and losses in the end are the same to the bit, which is checked. Arms take turns. '
         '`python benchmarks/bench_checkpoints.py`\n\n' + table(['ratio within a round', f'median (range), n = {rounds}', '90% interval of the median', 'target'],
         [['resumable to without, writing aside', spread(rs, '.3f'), f'{lo:.3f} to {hi:.3f}', 'at most 1.02']]) +
         f'\n\nA training batch takes {spread([1e3*s/n for s in times[PLAIN]], ".1f")} ms. Writing one checkpoint of {mb:.1f} MB, synced to the disk and read back: {spread([1e3*s for s in written], ".0f")} ms.')


if __name__ == '__main__': main(*sys.argv[1:])
