"""On Shapes: SGD, momentum, Adam and LAMB with the lesson's rates and with searched ones; L2 against decoupled decay under BatchNorm.

    python benchmarks/optim_shapes.py [optimizers] [decay] [factors]

Every run appends a line to results/optim_shapes.jsonl; runs that stand there are not made again, so an interrupted call goes on where it was. The tables in
results/optim_shapes.md are written anew after each run. All of it takes about a quarter of an hour on one idle CPU core."""
import gc, json, statistics, sys, time
from functools import lru_cache, partial

import torch
from torch import nn
from torch.nn import functional as F

from common import machine, results, table
from dl2lib.callbacks import AvgStatsCallback, BatchTransformXCallback, Callback, ChannelsLastCallback, CudaCallback, accuracy
from dl2lib.convnet import conv_layer, get_cnn_model, init_cnn
from dl2lib.state import set_seed
from dl2lib.datablock import (ByteToFloat, CategoryProcessor, ImageList, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb,
                              norm_imagenette, parent_labeler, to_byte_tensor)
from dl2lib.datacache import cached
from dl2lib.datasets import shapes, shapes_tensors
from dl2lib.learner import Learner
from dl2lib.optimizers import (AverageGrad, AverageSqrGrad, Optimizer, StatefulOptimizer, StepCount, adam_opt, adam_step, l2_reg, lamb_opt, momentum_step,
                               sgd_mom_opt, sgd_opt, sgd_step, weight_decay)

SIZE, BS, SEEDS, SEARCH_SEED = 48, 32, (1, 2, 42), 0
EPOCHS = dict(search=4, optimizers=4, decay=5, factors=4)
LINES = results/'optim_shapes.jsonl'

# name: optimizer, the lesson's rate (constant, as in the lesson's chapter)
OPTS = {'SGD': (sgd_opt, .4), 'momentum': (sgd_mom_opt, .3), 'Adam': (adam_opt(), .001), 'LAMB': (lamb_opt(), .003)}
FACTORS = .1, .3, 1, 3 # of the lesson's rate; where the best is the first or the last, the search goes on beyond it

sgd, mom = partial(Optimizer), partial(StatefulOptimizer, stats=[AverageGrad()])
adam = partial(StatefulOptimizer, stats=[AverageGrad(dampening=True), AverageSqrGrad(), StepCount()])
# name: optimizer, steppers, rate, decay of the convolutions' weights. L2 goes through momentum, which multiplies it by ten: decoupled decay gets ten times the factor
DECAYS = {'SGD, none': (sgd, [sgd_step], .4, 0.), 'SGD, L2 0.02': (sgd, [l2_reg, sgd_step], .4, .02), # which is the same as decay, for SGD
          'SGD, none, lengths as with L2': (sgd, [sgd_step], .4, 0.),
          'momentum, none': (mom, [momentum_step], .03, 0.), 'momentum, L2 0.02': (mom, [l2_reg, momentum_step], .03, .02),
          'momentum, decay 0.2': (mom, [weight_decay, momentum_step], .03, .2),
          'Adam, none': (adam, [adam_step], .003, 0.), 'Adam, L2 0.02': (adam, [l2_reg, adam_step], .003, .02), 'Adam, decay 2': (adam, [weight_decay, adam_step], .003, 2.)}


# name: optimizer, stepper, rate, kind of decay to factors, for the small CNN of the chapter. Is there a decay that does what an L2 does?
FACTORS_OF = {'momentum': (mom, momentum_step, .1, {l2_reg: (.003, .01), weight_decay: (.03, .1)}),
              'Adam': (adam, adam_step, .01, {l2_reg: (.001, .003, .01, .03), weight_decay: (.1, .3, 1., 2.)})}


@lru_cache(None)
def labels(): # decoded once
    il = ImageList.from_files(shapes(), tfms=[make_rgb, ResizeFixed(SIZE), to_byte_tensor])
    return cached(label_by_func(SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val')), parent_labeler, proc_y=CategoryProcessor()))


def convs(model): return [p for p in model.parameters() if p.ndim == 4]


class Turns(Callback):
    "How long the convolutions' weights are after each step, and by what angle it has turned them: (steps, layers). BatchNorm follows each of them."
    def begin_fit(self): self.ws, self.norms, self.angles = convs(self.model), [], []
    def after_backward(self): self.before = [w.detach().clone() for w in self.ws]

    def after_step(self):
        cos = [F.cosine_similarity(a.double().flatten(), w.detach().double().flatten(), dim=0) for a, w in zip(self.before, self.ws)]
        self.angles.append(torch.rad2deg(torch.acos(torch.stack(cos).clamp(max=1))))
        self.norms.append(torch.stack([w.detach().norm() for w in self.ws]))


class Lengths(Callback):
    "Makes the convolutions' weights as long, after each step, as those of another run were; their directions stay."
    _order = -1
    def __init__(self, norms): self.norms = norms
    def begin_fit(self): self.i, self.ws = 0, convs(self.model)
    def after_step(self):
        for w, n in zip(self.ws, self.norms[self.i]): w.data.mul_(n/w.data.norm())
        self.i += 1


def fit(opt_func, lr, seed, epochs, wd=None, cbs=()):
    "Validation accuracy and training loss of each epoch, seconds. `wd`: of the convolutions; the other parameters have none."
    set_seed(seed)
    data = labels().to_databunch(BS, c_in=3, seed=seed)
    model = get_cnn_model(data, [64, 64, 128, 256], conv_layer)
    init_cnn(model)
    def split(m):
        ids = {id(w) for w in convs(m)}
        return [dict(params=convs(m), wd=wd), dict(params=[p for p in m.parameters() if id(p) not in ids], wd=0.)]
    cb_funcs = [partial(AvgStatsCallback, accuracy), CudaCallback, ChannelsLastCallback, partial(BatchTransformXCallback, [ByteToFloat(), norm_imagenette])]
    learn = Learner(model, data, F.cross_entropy, opt_func, lr, cbs=list(cbs), cb_funcs=cb_funcs, **(dict(splitter=split) if wd else {}))
    rows, start = [], time.time()
    learn.logger = rows.append
    learn.fit(epochs)
    gc.collect() # loaders and callbacks that point at each other
    return dict(accuracy=[float(r[4]) for r in rows[1:]], loss=[float(r[1]) for r in rows[1:]], seconds=round(time.time()-start, 1))


def done(): return [json.loads(l) for l in LINES.read_text().splitlines()] if LINES.exists() else []

def once(part, name, lr, seed, run):
    "The line of a run; `run()` makes it, unless it is there."
    key = dict(part=part, name=name, lr=lr, seed=seed, epochs=EPOCHS[part])
    for r in done():
        if all(r[k] == v for k, v in key.items()): return r
    row = {**key, **run()}
    with open(LINES, 'a') as f: f.write(json.dumps(row) + '\n')
    print({k: row[k] for k in ('part', 'name', 'lr', 'seed', 'accuracy', 'seconds')}, flush=True)
    write()
    return row


def search(name):
    "-> the best rate, by the mean validation accuracy of the last two epochs with a seed of its own."
    f, lr = OPTS[name]
    factors, found = list(FACTORS), {}
    while True:
        for k in factors:
            rate = float(f'{k*lr:.2g}')
            found[k] = statistics.mean(once('search', name, rate, SEARCH_SEED, lambda: fit(f, rate, SEARCH_SEED, EPOCHS['search']))['accuracy'][-2:])
        best = max(found, key=found.get)
        if best == min(found) > .003: factors = [.03 if best == .1 else .01 if best == .03 else .003]
        elif best == max(found) < 100: factors = [10 if best == 3 else 30 if best == 10 else 100]
        else: return float(f'{best*lr:.2g}')


def optimizers():
    for name, (f, lr) in OPTS.items():
        for rate in dict.fromkeys([lr, search(name)]):
            for seed in SEEDS: once('optimizers', name, rate, seed, lambda: fit(f, rate, seed, EPOCHS['optimizers']))


def effective(opt, lr, norm): # rate for a weight of length 1 that does the same
    if opt is adam: return lr/norm
    return lr*(10 if opt is mom else 1)/norm**2 # momentum 0.9 adds up ten gradients


def measured(name, seed, kept):
    opt, steppers, lr, wd = DECAYS[name]
    turns, cbs = Turns(), []
    if 'lengths' in name:
        if seed not in kept: measured('SGD, L2 0.02', seed, kept)
        cbs = [Lengths(kept[seed])]
    res = fit(partial(opt, steppers=steppers), lr, seed, EPOCHS['decay'], wd, [turns, *cbs])
    norms, angles = torch.stack(turns.norms), torch.stack(turns.angles)
    if name == 'SGD, L2 0.02': kept[seed] = norms
    rates, n = effective(opt, lr, norms), len(norms)//EPOCHS['decay']
    def geo(t): return t.log().mean(-1).exp() # geometric mean over the layers
    curves = {k: [float(f'{v:.4g}') for v in geo(t)[::6]] for k, t in dict(norm=norms, rate=rates, angle=angles.clamp(min=1e-9)).items()}
    return {**res, **{f'{k}_{when}': float(f'{geo(t[s]).mean():.4g}') for k, t in dict(norm=norms, rate=rates, angle=angles.clamp(min=1e-9)).items()
                      for when, s in dict(first=slice(0, n), last=slice(-n, None)).items()}, 'every_6th_step': curves}


def decay():
    kept = {}
    for name in DECAYS:
        for seed in SEEDS: once('decay', name, DECAYS[name][2], seed, lambda: measured(name, seed, kept))


@lru_cache(None)
def small_shapes(): # as in the chapter
    x, y, xv, yv = shapes_tensors(32)
    m, s = (f(x.float(), (0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    x, xv = (((o - m)/s).contiguous(memory_format=torch.channels_last) for o in (x, xv))
    return x, y, xv, yv

def small_norms(opt, steppers, lr, wd, seed):
    "Norms of the four convolutions' weights and validation accuracy after a training of the chapter's small CNN."
    (x, y, xv, yv), nfs, start = small_shapes(), (3, 16, 32, 64, 128), time.time()
    set_seed(seed)
    model = nn.Sequential(*[conv_layer(a, b) for a, b in zip(nfs, nfs[1:])], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(nfs[-1], 10))
    init_cnn(model)
    model.to(memory_format=torch.channels_last)
    ws = convs(model)
    ids = {id(w) for w in ws}
    o = opt([dict(params=ws, **(dict(wd=wd) if wd else {})), dict(params=[p for p in model.parameters() if id(p) not in ids])], steppers=steppers, lr=lr)
    for _ in range(EPOCHS['factors']):
        for i in torch.randperm(len(x)).split(50):
            loss = F.cross_entropy(model(x[i]), y[i])
            o.zero_grad(); loss.backward(); o.step()
    with torch.no_grad(): acc = (model.eval()(xv).argmax(1) == yv).float().mean().item()
    return dict(norms=[round(w.norm().item(), 3) for w in ws], accuracy=[round(acc, 3)], seconds=round(time.time()-start, 1))

def factor_arms(): # (name, optimizer, steppers, rate, wd)
    for name, (opt, step, lr, kinds) in FACTORS_OF.items():
        yield f'{name}, none', opt, [step], lr, 0.
        for kind, wds in kinds.items():
            for wd in wds: yield f'{name}, {"L2" if kind is l2_reg else "decay"} {wd:g}', opt, [kind, step], lr, wd

def factors():
    for name, *arm in factor_arms():
        for seed in SEEDS: once('factors', name, arm[2], seed, lambda: small_norms(*arm, seed))


def spread(vs, digits=2):
    def f(v): return f'{v:.{digits}f}'
    return f'{f(statistics.mean(vs))} ({f(min(vs))} to {f(max(vs))})'


def optimizer_rows(lines):
    found = {n: {r['lr']: statistics.mean(r['accuracy'][-2:]) for r in lines if r['part'] == 'search' and r['name'] == n} for n in OPTS}
    for name, (_, lesson) in OPTS.items():
        for lr in dict.fromkeys(r['lr'] for r in lines if r['part'] == 'optimizers' and r['name'] == name):
            runs = [r for r in lines if (r['part'], r['name'], r['lr']) == ('optimizers', name, lr)]
            best = lr == max(found[name], key=found[name].get, default=None)
            which = ' and '.join(["the lesson's"]*(lr == lesson) + ['searched']*best)
            yield [name, f'{lr:g}', which, *(spread([r['accuracy'][i] for r in runs]) for i in (0, -1)), spread([r['loss'][-1] for r in runs])]


def decay_rows(lines):
    for name in DECAYS:
        runs = [r for r in lines if r['part'] == 'decay' and r['name'] == name]
        if not runs: continue
        def mean(k): return f'{statistics.mean(r[k] for r in runs):.2g}'
        yield [name, f"{runs[0]['lr']:g}", spread([r['accuracy'][-1] for r in runs]), spread([r['loss'][-1] for r in runs]),
               *(f"{mean(k + '_first')} to {mean(k + '_last')}" for k in ('norm', 'rate')), spread([r['angle_last'] for r in runs])]


def factor_rows(lines):
    for name, _, _, lr, _ in factor_arms():
        runs = [r for r in lines if r['part'] == 'factors' and r['name'] == name]
        if runs: yield [name, f'{lr:g}', *(spread([r['norms'][i] for r in runs]) for i in (0, -1)), spread([r['accuracy'][-1] for r in runs])]


def write():
    lines = done()
    found = [[n, ', '.join(f"{r['lr']:g}: {statistics.mean(r['accuracy'][-2:]):.3f}" for r in sorted(lines, key=lambda r: r['lr']) if r['part'] == 'search' and r['name'] == n)] for n in OPTS]
    text = [f"# Optimizers on Shapes\n\nThe lesson's CNN, nfs=[64,64,128,256], on 1,500 training and 500 validation images of {SIZE} px, batches of {BS}, constant rates. "
            f"Mean (range) over the seeds {', '.join(map(str, SEEDS))}. `python benchmarks/optim_shapes.py`",
            f"## Four optimizers\n\n{EPOCHS['optimizers']} epochs. The other hyperparameters are the lesson's: momentum 0.9 without dampening and with decay 0.01; Adam and LAMB with 0.9, 0.99.",
            table(['optimizer', 'rate', 'which', 'valid accuracy, first epoch', 'last', 'train loss'], optimizer_rows(lines)),
            f'The search: mean validation accuracy of the last two epochs, with another seed ({SEARCH_SEED}), by rate.', table(['optimizer', 'rate: accuracy'], found),
            f"## L2 and decoupled decay under BatchNorm\n\n{EPOCHS['decay']} epochs; decay for the convolutions alone, each of which BatchNorm follows. Length of a weight tensor, "
            'effective rate (SGD: rate/length²; momentum: ten times that; Adam: rate/length), and the angle by which a step turns it: geometric means over the seven layers and the steps of an epoch; the turn is of the last. '
            '"Lengths as with L2": no decay at all, but after each step every weight tensor is made as long as it was in the run with L2.',
            table(['arm', 'rate', 'valid accuracy', 'train loss', 'length, first to last epoch', 'effective rate, first to last', 'turn in a step, degrees'], decay_rows(lines)),
            f"## Is there a decay that does what an L2 does?\n\nThe small CNN of the chapter (four convolutions, 32 px, batches of 50), {EPOCHS['factors']} epochs. Norms of the weights at the end. "
            'With momentum, decay with ten times the factor is L2 within a few percent. With Adam, at the same norm of the first convolution L2 leaves a far smaller norm of the last: no factor makes them the same.',
            table(['arm', 'rate', 'norm of the first convolution', 'of the last', 'valid accuracy'], factor_rows(lines)),
            f"{sum(r['seconds'] for r in lines)/60:.0f} minutes of training in all, with one thread a run, beside other work.",
            f'The last table: {machine()}. The others: Intel(R) Xeon(R) Processor, 2 cores, the same versions; 2026-11-24']
    (results/'optim_shapes.md').write_text('\n\n'.join(text) + '\n')


if __name__ == '__main__':
    for part in sys.argv[1:] or ['optimizers', 'decay', 'factors']: dict(optimizers=optimizers, decay=decay, factors=factors)[part]()
    write()
