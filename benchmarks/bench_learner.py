"""What a training loop costs beside the training: the Learner, fastai's Learner and Lightning's Trainer(barebones=True) against a loop by hand
that does the same: mode, statistics, recorder, scheduler. The model costs next to nothing, so that the loop shows.

    pip install fastai lightning
    python benchmarks/bench_learner.py [ROUNDS]

writes results/bench_learner.md. 15 rounds take about two minutes. A peer that is not installed is left out, and the table says so."""
import contextlib, logging, os, sys, time, warnings
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn, optim
from torch.nn import functional as F

from common import interleaved, ratios, save, spread, table
from dl2lib.callbacks import AvgStatsCallback, Callback, ParamScheduler, Recorder, accuracy
from dl2lib.learner import Learner
from dl2lib.progress import ProgressCallback
from dl2lib.schedules import combine_scheds, cos_1cycle_anneal

os.environ['TQDM_DISABLE'] = '1'
TRAIN, VALID, BS, EPOCHS = 1000, 100, 64, 2 # batches; items; the first epoch warms up, the second is timed
HAND, LEARNER, BAR, FASTAI, LIGHTNING = 'by hand', 'Learner', 'Learner with a progress bar', 'fastai', 'Lightning'
sched = combine_scheds([.3, .7], cos_1cycle_anneal(.01, .1, .001))


def model(seed):
    torch.manual_seed(seed)
    return nn.Linear(4, 2)

def points(seed):
    g = torch.Generator().manual_seed(seed)
    def batches(n): return [(torch.randn(BS, 4, generator=g), torch.randint(0, 2, (BS,), generator=g)) for _ in range(n)]
    return Batches(batches(TRAIN)), Batches(batches(VALID))


class Batches: # Lightning takes a list for several loaders
    def __init__(self, batches): self.batches = batches
    def __len__(self): return len(self.batches)
    def __iter__(self): return iter(self.batches)


# Each arm: (model, training batches, validation batches) -> seconds of the last epoch, losses, rates, averages of loss and accuracy in training and in validation

def by_hand(m, train, valid):
    opt, losses, lrs, clock = optim.SGD(m.parameters(), .01), [], [], Clock()
    for epoch in range(EPOCHS):
        clock.start()
        m.train()
        sums, n = torch.zeros(2), 0
        for i, (xb, yb) in enumerate(train):
            lr = sched((epoch + i/len(train))/EPOCHS)
            for pg in opt.param_groups: pg['lr'] = lr
            pred = m(xb)
            loss = F.cross_entropy(pred, yb)
            with torch.no_grad(): sums = sums + torch.stack([loss, accuracy(pred, yb)])*len(xb)
            n += len(xb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            lrs.append(lr)
            losses.append(loss.detach())
        in_train = (sums/n).tolist()
        m.eval()
        with torch.no_grad():
            sums, n = torch.zeros(2), 0
            for xb, yb in valid:
                pred = m(xb)
                sums = sums + torch.stack([F.cross_entropy(pred, yb), accuracy(pred, yb)])*len(xb)
                n += len(xb)
        in_valid = (sums/n).tolist()
        clock.stop()
    return clock.seconds, torch.stack(losses).tolist(), lrs, in_train + in_valid


class Clock:
    def start(self): self.begun = time.perf_counter()
    def stop(self): self.seconds = time.perf_counter() - self.begun

class Starts(Callback):
    _order = -100
    def __init__(self, clock): self.clock = clock
    def begin_epoch(self): self.clock.start()

class Stops(Callback):
    _order = 100
    def __init__(self, clock): self.clock = clock
    def after_epoch(self): self.clock.stop()


def by_learner(m, train, valid, bar=False):
    clock = Clock() # the mode is switched by TrainEvalCallback, which comes by itself
    cbs = [AvgStatsCallback(accuracy), Recorder(), ParamScheduler('lr', sched), Starts(clock), Stops(clock), *([ProgressCallback(where='terminal')] if bar else [])]
    learn = Learner(m, SimpleNamespace(train_dl=train, valid_dl=valid), F.cross_entropy, opt_func=optim.SGD, lr=.01, cbs=cbs)
    learn.logger = lambda row: None
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null): learn.fit(EPOCHS)
    stats = learn.avg_stats
    return clock.seconds, learn.recorder.losses, learn.recorder.lrs, stats.train_stats.avg_stats + stats.valid_stats.avg_stats


def fastai_arm(): # with its optimizer left out: torch's SGD works in all arms
    from fastai.callback.core import Callback as FastaiCallback
    from fastai.callback.schedule import ParamScheduler as FastaiScheduler
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner as FastaiLearner
    from fastai.optimizer import OptimWrapper

    class Keep(FastaiCallback): # its own recorder keeps a smoothed loss
        order = 100
        def __init__(self, clock): self.clock, self.losses = clock, []
        def before_epoch(self): self.clock.start()
        def after_batch(self):
            if self.training: self.losses.append(self.loss.detach())
        def after_epoch(self): self.clock.stop()

    def run(m, train, valid):
        clock = Clock()
        keep = Keep(clock)
        learn = FastaiLearner(DataLoaders(train, valid, device=torch.device('cpu')), m, F.cross_entropy, opt_func=partial(OptimWrapper, opt=optim.SGD), lr=.01,
                              metrics=accuracy, cbs=[FastaiScheduler({'lr': sched}), keep])
        learn.recorder.train_metrics = True
        with learn.no_bar(), learn.no_logging(): learn.fit(EPOCHS)
        train_loss, train_acc, valid_loss, valid_acc = learn.recorder.values[-1]
        return clock.seconds, torch.stack(keep.losses).tolist(), list(learn.recorder.lrs), [None, train_acc, valid_loss, valid_acc] # the training loss is smoothed there
    return run


def lightning_arm():
    import lightning
    for name in ('lightning', 'lightning.pytorch', 'lightning.pytorch.utilities.rank_zero', 'lightning.fabric.utilities.rank_zero'): logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings('ignore', module='lightning')

    class Module(lightning.LightningModule):
        def __init__(self, m, clock): super().__init__(); self.m, self.clock, self.losses, self.lrs = m, clock, [], []
        def configure_optimizers(self): return optim.SGD(self.m.parameters(), .01)
        def on_train_epoch_start(self): self.clock.start(); self.sums, self.n = torch.zeros(2), 0
        def on_validation_epoch_start(self): self.valid_sums, self.valid_n = torch.zeros(2), 0
        def on_train_epoch_end(self): # comes after validation
            self.averages = (self.sums/self.n).tolist() + (self.valid_sums/self.valid_n).tolist()
            self.clock.stop()

        def on_train_batch_start(self, batch, i):
            lr = sched((self.current_epoch + i/TRAIN)/EPOCHS)
            for pg in self.optimizers(use_pl_optimizer=False).param_groups: pg['lr'] = lr
            self.lrs.append(lr)

        def training_step(self, batch, i):
            xb, yb = batch
            pred = self.m(xb)
            loss = F.cross_entropy(pred, yb)
            with torch.no_grad(): self.sums = self.sums + torch.stack([loss, accuracy(pred, yb)])*len(xb)
            self.n += len(xb)
            self.losses.append(loss.detach())
            return loss

        def validation_step(self, batch, i):
            xb, yb = batch
            pred = self.m(xb)
            self.valid_sums = self.valid_sums + torch.stack([F.cross_entropy(pred, yb), accuracy(pred, yb)])*len(xb)
            self.valid_n += len(xb)

    def run(m, train, valid):
        clock = Clock()
        mod = Module(m, clock)
        lightning.Trainer(barebones=True, max_epochs=EPOCHS, accelerator='cpu', devices=1).fit(mod, train, valid)
        return clock.seconds, torch.stack(mod.losses).tolist(), mod.lrs, mod.averages
    return run


def same_work(arms)->None: # the same losses, rates, averages and weights in the end, or an error
    first = None
    for name, run in arms.items():
        m = model(1)
        _, losses, lrs, averages = run(m, *points(1))
        weights = torch.cat([p.detach().flatten() for p in m.parameters()])
        got = [torch.tensor(o, dtype=torch.float64) for o in (losses, lrs, [a for a in averages if a is not None])] + [weights]
        if first is None: first = *got[:2], averages, weights; continue
        want = [*first[:2], torch.tensor([b for a, b in zip(averages, first[2]) if a is not None], dtype=torch.float64), first[3]]
        bits = name != FASTAI # whose position in the schedule is a sum of steps, and rounded otherwise
        for what, x, y in zip(('losses', 'rates', 'averages', 'weights'), got, want):
            assert torch.equal(x, y) if bits and what != 'averages' else torch.allclose(x, y, rtol=1e-4, atol=1e-6), f'{name} does something else: its {what}'


def main(rounds=15):
    rounds, arms, missing = int(rounds), {HAND: by_hand, LEARNER: by_learner, BAR: partial(by_learner, bar=True)}, []
    for name, make in (FASTAI, fastai_arm), (LIGHTNING, lightning_arm):
        try: arms[name] = make()
        except ImportError as e: missing.append(f'{name} ({e})')
    same_work(arms)
    times = interleaved({k: lambda r, run=run: run(model(1000+r), *points(1000+r))[0] for k, run in arms.items()}, rounds)
    def over(k): return [1e6*(a-b)/TRAIN for a, b in zip(times[k], times[HAND])] # microseconds a training batch
    rows = [[f'{k} to by hand', spread(ratios(times, k, HAND)), {LEARNER: 'at most 1.2', BAR: 'at most 1.3'}.get(k, '')] for k in arms if k != HAND]
    for k, target in (LIGHTNING, .15), (FASTAI, .1):
        if k in arms: rows.append([f"the Learner's overhead to {k}'s", spread([a/b for a, b in zip(over(LEARNER), over(k))], '.3f'), f'at most {target}'])
    extra = '; '.join(f'{k} {spread(over(k), ".0f")}' for k in arms if k != HAND)
    save('bench_learner', f'# What the loop costs\n\nA linear layer of ten numbers, {TRAIN} training and {VALID} validation batches of {BS}, made beforehand; torch\'s SGD in every arm. Each does the same: '
         'training and evaluation mode, loss and accuracy averaged over each epoch, learning rate and loss of each batch kept, a schedule for the rate. That losses, rates, averages and the weights in the end are the '
         f'same is checked before (to the bit; fastai\'s within rounding). The second of {EPOCHS} epochs is timed, so that starting up is not counted. Arms take turns. The bar is a terminal\'s, and what it writes is thrown away. '
         f'`python benchmarks/bench_learner.py`\n\n' + table(['ratio within a round', f'median (range), n = {rounds}', 'target'], rows)
         + f'\n\nBy hand a training batch takes {spread([1e6*s/TRAIN for s in times[HAND]], ".0f")} microseconds, its share of validation included. The others add, in microseconds: {extra}.'
         + (f'\n\nNot installed: {"; ".join(missing)}.' if missing else ''), ('fastai', 'lightning', 'fastprogress'))


if __name__ == '__main__': main(*sys.argv[1:])
