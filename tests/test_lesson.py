"""Proves that the lesson's names are the API: one test a chapter, whose script is written as the lesson's notebooks are, with nothing
before it but `from dl2lib.all import *` and the imports that those notebooks have. The scripts are our own; what they are held to is
the way of calling things: (learn, run) pairs, lists of classes and partials, hooks over a list of modules, steppers and stats."""
import linecache, math
from types import SimpleNamespace

import pytest
import torch

IMPORTS = '''
import math, os, random, time
from functools import partial
from pathlib import Path
import matplotlib.pyplot as plt, PIL, torch
from torch import nn
from torch.nn import functional as F
from dl2lib.all import *
'''


@pytest.fixture(autouse=True, scope='module')
def one_thread(): # small images: more threads only wait for each other
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def data_folder(tmp_path_factory): return tmp_path_factory.mktemp('data')

@pytest.fixture
def lesson(monkeypatch, data_folder, tmp_path, request):
    "Runs a script in a namespace of its own, in an empty folder; gives the names that it leaves."
    import matplotlib.pyplot as plt
    monkeypatch.setenv('DL2LIB_DATA', str(data_folder)) # where the scripts' `shapes` puts its files, once for all of them
    monkeypatch.chdir(tmp_path)
    def run(script, **given):
        torch.manual_seed(42)
        names, source, fname = {'__name__': 'lesson', **given}, IMPORTS + script, f'<{request.node.name}>'
        linecache.cache[fname] = len(source), None, source.splitlines(keepends=True), fname # a traceback then shows the script's line
        exec(compile(source, fname, 'exec'), names)
        return SimpleNamespace(**{k: v for k, v in names.items() if not k.startswith('__')})
    yield run
    plt.close('all')


# The data of 08 and after, as each of those notebooks begins
IMAGES = '''
path = shapes(n_train=160, n_valid=60)
bs = 32
tfms = [make_rgb, ResizeFixed(48), to_byte_tensor, to_float_tensor]
il = ImageList.from_files(path, tfms=tfms)
sd = SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val'))
ll = label_by_func(sd, parent_labeler, proc_y=CategoryProcessor())
data = ll.to_databunch(bs, c_in=3, c_out=10, num_workers=0)
nfs = [32]*4
cbfs = [partial(AvgStatsCallback, accuracy), CudaCallback, partial(BatchTransformXCallback, norm_imagenette)]
'''

def finite(losses): return all(map(math.isfinite, losses))
def table(text): return [line.split() for line in text.splitlines() if line[:1].isdigit()] # the rows of the epochs


# 07a

LSUV = '''
centres = torch.randn(10, 784)
def digits(n):
    y = torch.arange(n) % 10
    return centres[y] + torch.randn(n, 784), y

x_train, y_train = digits(600)
x_valid, y_valid = digits(200)
x_train, x_valid = normalize_to(x_train, x_valid)
train_ds, valid_ds = Dataset(x_train, y_train), Dataset(x_valid, y_valid)
bs = 100
c = y_train.max().item()+1
data = DataBunch(*get_dls(train_ds, valid_ds, bs), 1, c)

flat_view = view_tfm(1, 28, 28)
cbfs = [Recorder, partial(AvgStatsCallback, accuracy), CudaCallback, partial(BatchTransformXCallback, flat_view)]
nfs = [16, 32]

class ConvLayer(nn.Module):                      # the reader's own, in place of the library's
    def __init__(self, ni, nf, ks=3, stride=2, sub=0., **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(ni, nf, ks, padding=ks//2, stride=stride, bias=True)
        self.relu = GeneralRelu(sub=sub, **kwargs)
    def forward(self, x): return self.relu(self.conv(x))
    @property
    def weight(self): return self.conv.weight
    @property
    def bias(self): return -self.relu.sub
    @bias.setter
    def bias(self, v): self.relu.sub = -v

learn, run = get_learn_run(nfs, data, 0.1, ConvLayer, cbs=cbfs)
run.fit(1, learn)
plain = run.recorder.losses

learn, run = get_learn_run(nfs, data, 0.1, ConvLayer, cbs=cbfs)
xb, yb = get_batch(data.train_dl, run)
mods = find_modules(learn.model, lambda o: isinstance(o, ConvLayer))
mdl = learn.model.to(xb.device)
before, after = [], []
with Hooks(mods, append_stat) as hooks:
    mdl(xb)
    for hook in hooks: before.append((hook.mean, hook.std))

for m in mods: after.append(lsuv_module(mdl, m, xb))   # in the lesson `mdl` is a global: here it comes first
with Hooks(mods, append_stat) as hooks:
    mdl(xb)
    seen = [(hook.mean, hook.std) for hook in hooks]

run.fit(2, learn)
run.recorder.plot_loss()
'''

def test_07a_lsuv(lesson, capsys):
    o = lesson(LSUV)
    assert o.xb.shape == (100, 1, 28, 28) and o.yb.shape == (100,) and len(o.mods) == 5               # three, and one for each of nfs
    assert len(o.plain) == 6 and finite(o.plain)
    assert max(abs(std-1) for _, std in o.before) > .1                                           # there was something to do
    for pairs in o.after, o.seen: assert all(abs(mean) < 2e-3 and abs(std-1) < 2e-3 for mean, std in pairs), pairs
    assert len(o.run.recorder.losses) == 12 and o.run.recorder.losses[-1] < o.run.recorder.losses[0]
    assert not any(m._forward_hooks for m in o.learn.model.modules())
    rows = table(capsys.readouterr().out)
    assert [r[0] for r in rows] == ['0', '0', '1'] and float(rows[-1][-2]) > .5                  # the last is validation accuracy
    assert o.plt.gca().lines[0].get_ydata().tolist() == pytest.approx(o.run.recorder.losses)


# 08

FILES = '''
path = shapes(n_train=160, n_valid=60)
tops = path.ls()
folder = (path/'val').ls()[0]
fn = folder.ls()[0]
img = PIL.Image.open(fn)
plt.imshow(img)

some = get_files(folder, image_extensions)
every = get_files(path, image_extensions, recurse=True)
below_val = get_files(path, image_extensions, recurse=True, include=['val'])

il = ImageList.from_files(path, tfms=make_rgb)
first, two = il[0], il[:2]
picked, several = il[[0, 5]], il.items[:3]
text = repr(il)

splitter = partial(grandparent_splitter, valid_name='val')
train, valid = split_by_func(il.items, splitter)
sd = SplitData.split_by_func(il, splitter)
names = [parent_labeler(o) for o in sd.train.items]

class MakeRGB(Transform):                        # the reader's own transforms: a class, and a function with an order
    def __call__(self, item): return item.convert('RGB')
def halve(item): return item/2
halve._order = 40

tfms = [halve, to_float_tensor, MakeRGB(), ResizeFixed(48), to_byte_tensor]
il = ImageList.from_files(path, tfms=tfms)
sd = SplitData.split_by_func(il, splitter)
ll = label_by_func(sd, parent_labeler, proc_y=CategoryProcessor())
x, y = ll.train[0]
obj, label = ll.train.x_obj(0), ll.train.y_obj(0)
vocab = ll.train.proc_y.vocab
same = ll.valid.proc_y is ll.train.proc_y
show_image(x, figsize=(3, 3))
'''

def test_08_data_block_from_files_to_items(lesson):
    o = lesson(FILES)
    assert {p.name for p in o.tops} == {'train', 'val'} and isinstance(o.fn, o.Path) and o.img.size[0] > 0
    assert len(o.every) == 220 and len(o.below_val) == 60 and set(map(str, o.some)) == set(map(str, o.folder.ls()))
    assert o.first.mode == 'RGB' and len(o.two) == len(o.picked) == 2 and o.two[0].tobytes() == o.first.tobytes()
    assert o.text.startswith('ImageList (220 items)') and o.text.endswith(f'Path: {o.path}') and len(o.several) == 3
    assert (len(o.train), len(o.valid)) == (len(o.sd.train), len(o.sd.valid)) == (160, 60)
    assert o.vocab == sorted(set(o.names)) and len(o.vocab) == 10 and o.same
    assert o.x.shape == (3, 48, 48) and o.x.dtype == torch.float32 and .2 < o.x.max() <= .5      # halved, and last
    assert torch.equal(o.obj, o.x) and o.label == o.vocab[o.y] == o.ll.train.x.items[0].parent.name


MODELLING = IMAGES + '''
cbfs = [partial(AvgStatsCallback, accuracy), CudaCallback]
train_dl, valid_dl = get_dls(ll.train, ll.valid, bs, num_workers=2)
x, y = next(iter(train_dl))
names = [ll.train.proc_y.vocab[i] for i in y]
data = ll.to_databunch(bs, c_in=3, c_out=10, num_workers=2)
item, target = data.train_ds[0]

m, s = x.mean((0, 2, 3)), x.std((0, 2, 3))
norm = partial(normalize_chan, mean=m, std=s)
normed = norm(x)
cbfs.append(partial(BatchTransformXCallback, norm_imagenette))

nfs = [64, 64, 128, 256]
layers = get_cnn_layers(data, nfs, conv_layer)
sched = combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.1, 0.3, 0.05))
learn, run = get_learn_run(nfs, data, 0.2, conv_layer, cbs=cbfs+[partial(ParamScheduler, 'lr', sched), Recorder])
model_summary(run, learn, data)
model_summary(run, learn, data, find_all=True)
begin = time.time()
run.fit(3, learn)
took = time.time()-begin
run.recorder.plot_lr()
'''

def test_08_data_block_to_a_model(lesson, capsys):
    o = lesson(MODELLING)
    assert o.x.shape == (32, 3, 48, 48) and len(o.names) == 32 and set(o.names) <= set(o.data.train_ds.proc_y.vocab)
    assert len(o.data.valid_ds) == 60 and o.item.shape == (3, 48, 48) and 0 <= o.target < 10
    torch.testing.assert_close(o.normed.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    assert [l[0].out_channels for l in o.layers[:7]] == [16, 32, 64, 64, 64, 128, 256] and o.layers[-1].out_features == 10
    out = capsys.readouterr().out
    assert out.count('Sequential') == out.count('Conv2d') == 7 and '60x128x2x2' in out and out.count('Linear') == 2
    lrs = o.run.recorder.lrs
    assert len(lrs) == 15 and lrs[0] == pytest.approx(.1) and max(lrs) > .28 and lrs[-1] < .08 and o.took > 0
    assert o.plt.gca().lines[0].get_ydata().tolist() == lrs and len(table(out)) >= 3
    assert o.run.recorder.losses[-1] < o.run.recorder.losses[0]


# 09

STEPPERS = IMAGES + '''
def sgd_step(p, lr, **kwargs):                   # the reader's own, from the notebook's first page
    p.data.add_(p.grad.data, alpha=-lr)
    return p
opt_func = partial(Optimizer, steppers=[sgd_step])

sched = combine_scheds([0.3, 0.7], [sched_cos(0.1, 0.2), sched_cos(0.2, 0.05)])
cbfs = cbfs + [Recorder, partial(ParamScheduler, 'lr', sched)]
learn, run = get_learn_run(nfs, data, 0.4, conv_layer, cbs=cbfs, opt_func=opt_func)
run.fit(1, learn)
lrs = run.recorder.lrs
run.recorder.plot_loss()

def my_decay(p, lr, wd, **kwargs):
    p.data.mul_(1 - lr*wd)
    return p
my_decay._defaults = dict(wd=0.)
opt_func = partial(Optimizer, steppers=[my_decay, sgd_step])
model = learn.model
opt = opt_func(model.parameters(), lr=0.1)
wd0, lr0 = opt.hypers[0]['wd'], opt.hypers[0]['lr']
opt = opt_func(model.parameters(), lr=0.1, wd=1e-4)
wd1 = opt.hypers[0]['wd']
groups = opt_func([list(model[0].parameters()), list(model[1].parameters())], lr=0.1)
groups.hypers[1]['lr'] = 1.
library = sgd_opt(model.parameters(), lr=0.1)

class MyAverage(Stat):
    _defaults = dict(mom=0.9)
    def init_state(self, p): return {'grad_avg': torch.zeros_like(p.grad.data)}
    def update(self, p, state, mom, **kwargs):
        state['grad_avg'].mul_(mom).add_(p.grad.data)
        return state
def my_momentum(p, lr, grad_avg, **kwargs):
    p.data.add_(grad_avg, alpha=-lr)
    return p
mine = partial(StatefulOptimizer, steppers=[my_momentum, my_decay], stats=MyAverage(), wd=0.01)

ends = []
for f in mine, sgd_mom_opt:
    torch.manual_seed(1)
    data = ll.to_databunch(bs, c_in=3, c_out=10)
    learn, run = get_learn_run(nfs, data, 0.03, conv_layer, cbs=cbfs[:-1], opt_func=f)
    run.fit(1, learn)
    ends.append(run.recorder.losses)
mom = learn.opt.hypers[0]['mom']
'''

def test_09_optimizers_from_the_readers_own_parts(lesson):
    o = lesson(STEPPERS)
    assert len(o.lrs) == 5 and o.lrs[0] == pytest.approx(.1) and o.lrs[-1] < max(o.lrs)
    assert (o.wd0, o.lr0, o.wd1) == (0., .1, 1e-4) and o.library.hypers[0]['wd'] == 0.
    assert [h['lr'] for h in o.groups.hypers] == [.1, 1.] and o.mom == .9
    mine, library = o.ends
    assert finite(mine) and mine == pytest.approx(library, rel=1e-4) # the same arithmetic, on another engine perhaps


MOMENTUM_AND_ADAM = IMAGES + '''
torch.manual_seed(0)
x = torch.linspace(-4, 4, 200)
y = torch.randn(200) + 0.3
betas = [0.5, 0.7, 0.9, 0.99]

def plot_mom(f):
    _, axs = plt.subplots(2, 2, figsize=(12, 8))
    last = []
    for beta, ax in zip(betas, axs.flatten()):
        ax.plot(y, linestyle='None', marker='.')
        avg, res = None, []
        for i, yi in enumerate(y):
            avg, p = f(avg, beta, yi, i)
            res.append(p)
        ax.plot(res, color='red')
        ax.set_title(f'beta={beta}')
        last.append(float(p))
    return last

def mom1(avg, beta, yi, i):
    if avg is None: avg = yi
    res = beta*avg + yi
    return res, res
def mom2(avg, beta, yi, i):
    if avg is None: avg = yi
    avg = lin_comb(avg, yi, beta)
    return avg, avg
def mom3(avg, beta, yi, i):
    if avg is None: avg = 0
    avg = lin_comb(avg, yi, beta)
    return avg, avg/(1-beta**(i+1))
summed, averaged, debiased = map(plot_mom, (mom1, mom2, mom3))
share = debias(mom=0.9, damp=0.1, step=1)

ends = {}
for name, lr, f in (('adam', .001, adam_opt()), ('adam with decay', .001, adam_opt(wd=.01)), ('lamb', .003, lamb_opt())):
    learn, run = get_learn_run(nfs, data, lr, conv_layer, cbs=cbfs+[Recorder], opt_func=f)
    run.fit(2, learn)
    ends[name] = run.recorder.losses, learn.opt.hypers[0]

def my_lamb(p, lr, mom, mom_damp, step, sqr_mom, sqr_damp, grad_avg, sqr_avg, eps, wd, **kwargs): # as the lesson has it, but for zeros
    debias1, debias2 = debias(mom, mom_damp, step), debias(sqr_mom, sqr_damp, step)
    r1 = p.data.pow(2).mean().sqrt()
    upd = (grad_avg/debias1) / ((sqr_avg/debias2).sqrt()+eps) + wd*p.data
    r2 = upd.pow(2).mean().sqrt()
    p.data.add_(upd, alpha=-lr*(min(r1/r2, 10) if r1 > 0 and r2 > 0 else 1.))
    return p
my_lamb._defaults = dict(eps=1e-6, wd=0.)
mine = partial(StatefulOptimizer, steppers=my_lamb, stats=[AverageGrad(dampening=True), AverageSqrGrad(), StepCount()])
w = [nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4)) for _ in range(2)]
opts = mine(w[:1], lr=.01), lamb_opt(eps=1e-6)(w[1:], lr=.01)
for i in range(5):
    for p, opt in zip(w, opts):
        p.grad = torch.sin(p.data*(i+1))
        opt.step(); opt.zero_grad()
'''

def test_09_optimizers_momentum_adam_and_lamb(lesson):
    o = lesson(MOMENTUM_AND_ADAM)
    mean = o.y.mean().item()
    assert abs(o.summed[-1]) > 10*abs(mean)    # a sum, where an average is wanted
    assert o.averaged[0] == pytest.approx(o.debiased[0], abs=1e-6) and abs(o.debiased[-1]-mean) < .3
    assert o.share == pytest.approx(.1) and len(o.plt.get_fignums()) == 3
    for name, (losses, hyper) in o.ends.items():
        assert len(losses) == 10 and finite(losses) and losses[-1] < losses[0], name
        assert {'lr', 'mom', 'sqr_mom', 'eps', 'wd'} <= set(hyper)
    assert o.ends['adam with decay'][1]['wd'] == .01
    torch.testing.assert_close(*(p.data for p in o.w), atol=1e-6, rtol=1e-5)


# 09b and 09c

LEARNER = IMAGES + '''
learn = get_learner(nfs, data, 0.1, conv_layer, cb_funcs=cbfs)
learn.fit(1)

cbfs += [Recorder]
learn = get_learner(nfs, data, 0.4, conv_layer, cb_funcs=cbfs)
phases = combine_scheds([0.3, 0.7], cos_1cycle_anneal(0.1, 0.3, 0.1))
sched = ParamScheduler('lr', phases)
learn.fit(1, sched)
lrs = list(learn.recorder.lrs)
learn.recorder.plot_lr()
learn.recorder.plot_loss()
kept = [type(cb).__name__ for cb in learn.cbs]

first = learn.opt
learn.fit(1)
again = learn.opt
learn.fit(1, reset_opt=True)

halves = lambda m: [list(m[:4].parameters()), list(m[4:].parameters())]
split = Learner(get_cnn_model(data, nfs, conv_layer), data, F.cross_entropy, opt_func=adam_opt(), lr=[1e-3, 3e-3], splitter=halves,
                cbs=[AvgStatsCallback(accuracy), CudaCallback(), BatchTransformXCallback(norm_imagenette)])
split.fit(1)
model_summary(split)
flat = list(param_getter(split.model))
'''

def test_09b_learner(lesson, capsys):
    o = lesson(LEARNER)
    assert len(o.lrs) == 5 and o.lrs[0] == pytest.approx(.1) and max(o.lrs) > .25
    assert 'ParamScheduler' not in o.kept and {'Recorder', 'AvgStatsCallback', 'CudaCallback'} <= set(o.kept)
    assert o.first is o.again and o.learn.opt is not o.first and o.learn.opt.hypers[0]['lr'] == .4
    assert [h['lr'] for h in o.split.opt.hypers] == [1e-3, 3e-3]
    assert sum(len(g['params']) for g in o.split.opt.param_groups) == len(o.flat)
    out = capsys.readouterr().out
    assert [r[0] for r in table(out)][:5] == ['0']*5 and '60x32x1x1' in out # a row for each fit; the last images


PROGRESS = IMAGES + '''
class Rows(Callback):                            # what the loop's logger is during the fit
    _order = 5
    def begin_epoch(self): seen.append(self.run.logger)
seen = []
cbfs = [partial(AvgStatsCallback, accuracy), CudaCallback, ProgressCallback, partial(BatchTransformXCallback, norm_imagenette), Rows]
learn = get_learner(nfs, data, 0.1, conv_layer, cb_funcs=cbfs)
before = learn.logger
learn.fit(2)
'''

@pytest.mark.parametrize('where', ['terminal', 'plain'])
def test_09c_add_progress_bar(lesson, capsys, monkeypatch, where):
    monkeypatch.setattr('dl2lib.progress._front_end', lambda: where) # what a notebook shows, tests/test_progress.py and `make browser` look at
    o = lesson(PROGRESS)
    out = capsys.readouterr().out
    assert 'epoch' in out and 'valid_accuracy' in out and len(o.seen) == 2 and o.learn.logger is o.before
    assert (o.seen[0] is not o.before) == (where == 'terminal')
    rows = [l.split() for part in out.splitlines() for l in part.split('\r') if l[:2] in ('0 ', '1 ')]
    assert [r[0] for r in rows] == ['0', '1'] and all(len(r) == 6 for r in rows)


# 10

AUGMENT = '''
path = shapes(n_train=160, n_valid=60)
tfms = [make_rgb, ResizeFixed(64), to_byte_tensor, to_float_tensor]
def get_il(tfms): return ImageList.from_files(path, tfms=tfms)
il = get_il(tfms)
show_image(il[0])
fn = il.items[0]
img = PIL.Image.open(fn)

rows = {}                                        # one image, several times: what a list of transforms makes of it
def several(*tfms, n=6):
    il_tfm = get_il([make_rgb, *tfms, to_byte_tensor, to_float_tensor])
    return [il_tfm[0] for _ in range(n)]
random.seed(42)
rows['flip'] = several(PilRandomFlip(0.5), ResizeFixed(64))
rows['dihedral'] = several(PilRandomDihedral(p=0.75), ResizeFixed(64))
rows['center'] = several(CenterCrop(64))
rows['general'] = several(GeneralCrop(64, crop_size=(90, 90)))
rows['crop'] = several(RandomResizedCrop(64, scale=(0.35, 1)))
rows['tilt'] = several(PilTiltRandomCrop(64, 90, magnitude=0.2))
show_batch(rows['tilt'], c=3)

class RandomCrop(GeneralCrop):                   # the reader's own: which box, and nothing else
    def get_corners(self, w, h, wc, hc):
        left, top = random.randint(0, w-wc), random.randint(0, h-hc)
        return left, top, left+wc, top+hc
class Darken(PilTransform):
    def __init__(self, p=0.5): self.p = p
    def __call__(self, x): return x.point(lambda v: v*0.5) if random.random() < self.p else x
rows['own'] = several(RandomCrop(64, crop_size=(50, 40), resample=PIL.Image.BILINEAR), Darken(1.))

w, h = img.size
quad = ((0, 0), (0, h), (w, h), (w, 0))
inner = ((w/8, h/8), (0, h), (w, h), (w*7/8, h/8))
coeffs = find_coeffs(inner, ((0, 0), (0, 64), (64, 64), (64, 0)))
same, warped = warp(make_rgb(img), img.size, quad), warp(make_rgb(img), (64, 64), inner)
sizes = process_sz(64), process_sz((64, 32)), list(default_crop_size(90, 60))
floats = np_to_float(make_rgb(img))
draws = [uniform(2., 3.) for _ in range(20)]

x = torch.stack([o for o in il[:8]])             # batches
turned = rotate_batch(x, 64, 30.)
quarter = affine_batch(x, rotation_matrix(tensor([90.]*8)), 64)
flat = warp_batch(x, 64, tensor([[0., 0.], [0., 64.], [64., 64.], [64., 0.]]).expand(8, 4, 2))

train_tfms = [make_rgb, RandomResizedCrop(48, scale=(0.35, 1)), PilRandomFlip(), np_to_float]
valid_tfms = [make_rgb, CenterCrop(48), np_to_float]
sd = SplitData.split_by_func(get_il(train_tfms), partial(grandparent_splitter, valid_name='val'))
ll = label_by_func(sd, parent_labeler, proc_y=CategoryProcessor())
ll.valid.x.tfms = valid_tfms
data = ll.to_databunch(32, c_in=3, c_out=10, num_workers=2)
cbfs = [partial(AvgStatsCallback, accuracy), CudaCallback, partial(BatchTransformXCallback, norm_imagenette), Recorder]
learn = get_learner([32]*4, data, 0.05, conv_layer, cb_funcs=cbfs)
learn.fit(2)
valid_again = torch.equal(data.valid_ds[0][0], data.valid_ds[0][0])
train_again = torch.equal(data.train_ds[0][0], data.train_ds[0][0])
'''

@pytest.mark.filterwarnings('error:non-integer arguments to randrange') # an error from Python 3.12 on
def test_10_augmentation(lesson):
    o = lesson(AUGMENT)
    assert all(len(r) == 6 and all(t.shape == (3, 64, 64) and 0 <= t.min() and t.max() <= 1 for t in r) for r in o.rows.values())
    def kinds(name): return len({t.numpy().tobytes() for t in o.rows[name]})
    assert kinds('center') == kinds('general') == 1 and kinds('flip') == 2 and 2 <= kinds('dihedral') <= 6
    assert kinds('crop') == kinds('tilt') == kinds('own') == 6 and o.rows['own'][0].max() <= .51
    assert len(o.coeffs) == 8 and o.warped.size == (64, 64) and o.floats.shape == (3, o.h, o.w) and o.floats.max() <= 1
    assert list(o.same.getdata())[:50] == list(o.make_rgb(o.img).getdata())[:50]                 # the whole image, as it was
    assert o.sizes == ((64, 64), (64, 32), [60, 60]) and all(2 <= d <= 3 for d in o.draws) and len(set(o.draws)) > 10
    assert o.turned.shape == o.x.shape and not torch.equal(o.turned, o.x)
    torch.testing.assert_close(o.quarter, torch.rot90(o.x, 1, (2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(o.flat, o.x, atol=1e-4, rtol=0)
    assert o.valid_again and not o.train_again and len(o.learn.recorder.losses) == 10 and finite(o.learn.recorder.losses)


# What the front door must not need

def test_a_star_import_is_all_that_a_script_has_from_us(lesson):
    o = lesson('')
    assert o.Learner.__module__ == 'dl2lib.learner' and callable(o.tensor) and o.tensor([1., 2.]).sum() == 3
