"Looking at results (sheets, top losses, the confusion matrix) and files for inference: round trips to the bit, own parts, attacks, bad input."
import copy, os, pickle, random, re, warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dl2lib import inference
from dl2lib.callbacks import (AvgStatsCallback, BatchTransformXCallback, Callback, ChannelsLastCallback, CudaCallback, ParamScheduler, Recorder,
                              accuracy)
from dl2lib.checkpoints import StateFileError, read_state, write_state
from dl2lib.convnet import ConvLayer, GeneralRelu, Lambda, conv_layer, flatten, view_tfm
from dl2lib.datablock import (ByteToFloat, CategoryProcessor, DataBunch, ImageFileError, ImageList, MultiCategoryProcessor, Normalizer, ResizeFixed,
                              SplitData, Transform, label_by_func, make_rgb, norm_imagenette, parent_labeler, to_byte_tensor,
                              to_float_tensor)
from dl2lib.datacache import cached
from dl2lib.images import jpeg_decoder, open_bytes
from dl2lib.loader import SeededDataLoader
from dl2lib.inference import ConfusionMatrix, TopLosses, confusion_matrix, load_learner
from dl2lib.learner import Learner, get_learner
from dl2lib.practice import BatchTransformYCallback, MixedPrecision
from dl2lib.schedules import sched_cos
from repo_tools import python

import matplotlib.pyplot as plt
import PIL.Image

CLASSES = {'blue': (30, 40, 220), 'green': (40, 200, 60), 'red': (210, 30, 40)}


# --- helpers -------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    "Three classes of noisy colours, of 15, 12 and 9 images, two formats; a third of them for validation."
    root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for n, (name, colour) in zip((15, 12, 9), CLASSES.items()):
        for i in range(n):
            d = root/('val' if i % 3 == 0 else 'train')/name
            d.mkdir(parents=True, exist_ok=True)
            a = np.clip(np.array(colour) + rng.normal(0, 60, (18, 24, 3)), 0, 255).astype(np.uint8)
            PIL.Image.fromarray(a).save(d/f'{name}_{i:02d}.{"png" if i % 2 else "jpg"}')
    return root

TFMS = [make_rgb, ResizeFixed(16), to_byte_tensor]

def labels_of(fn): return ['warm' if fn.parent.name == 'red' else 'cold', fn.parent.name] if fn.parent.name != 'green' else ['green']

def make_data(folder, tfms=TFMS, multi=False, proc=None, decoder=None, bs=8, **kw):
    il = ImageList.from_files(folder, tfms=tfms, **({'decoder': decoder} if decoder else {}))
    sd = SplitData.split_by_func(il, lambda fn: fn.parent.parent.name == 'val')
    proc = proc or (MultiCategoryProcessor() if multi else CategoryProcessor())
    return label_by_func(sd, labels_of if multi else parent_labeler, proc_y=proc).to_databunch(bs, seed=3, **{'c_in': 3, **kw})

def normalize(): return BatchTransformXCallback([ByteToFloat(), norm_imagenette])

def make_learner(data, model=None, loss_func=F.cross_entropy, cbs=None, fit=1):
    torch.manual_seed(1)
    if model is None:
        model = nn.Sequential(conv_layer(3, 8, leak=0.1, sub=0.4, maxv=6.), nn.Dropout(0.3), conv_layer(8, 8), nn.AdaptiveAvgPool2d(1), Lambda(flatten), nn.Linear(8, data.c_out))
    learn = Learner(model, data, loss_func, lr=0.05, cbs=[normalize()] if cbs is None else cbs)
    learn.logger = lambda *args: None
    if fit: learn.fit(fit)
    return learn

@pytest.fixture(scope='module')
def data(folder): return make_data(folder)

@pytest.fixture(scope='module')
def learn(data): return make_learner(data)

@pytest.fixture(scope='module')
def multi(folder): return make_learner(make_data(folder, multi=True), loss_func=nn.BCEWithLogitsLoss())

@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close('all')

def equal(a, b): # predictions, to the bit
    return a.label == b.label and a.idx == b.idx and torch.equal(a.probs, b.probs)

def assert_twins(a, b, items): assert all(equal(a.predict(o), b.predict(o)) for o in items)

def files_of(learn): return list(learn.data.valid_ds.x.items)

def round_trip(learn, tmp_path, **kw):
    file = learn.export(tmp_path/'model.pth')
    loaded = load_learner(file, device='cpu', **kw)
    assert_twins(learn, loaded, files_of(learn))
    return loaded

def state_of(learn): # all that looking at results must leave alone
    dl = learn.data.train_dl
    return copy.deepcopy(dict(weights=learn.model.state_dict(), modes=[m.training for m in learn.model.modules()], rng=torch.get_rng_state(),
                              numpy=np.random.get_state()[1].tolist(), python=random.getstate(), dl=dl.state_dict(), opt=learn.opt.state_dict(),
                              cbs=[id(cb) for cb in learn.cbs], losses=list(learn.recorder.losses) if hasattr(learn, 'recorder') else None))

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


# --- looking at results --------------------------------------------------------------------------------------------------------------

def actual(learn): return torch.tensor([sorted(CLASSES).index(fn.parent.name) for fn in files_of(learn)])

def test_top_losses_agree_with_those_counted_by_hand(learn):
    ds = learn.data.valid_ds
    model, rows = copy.deepcopy(learn.model).eval(), []
    with torch.no_grad():
        for i in range(len(ds)):
            x, y = ds[i]
            x = (x.float()/255 - torch.tensor([0.47, 0.48, 0.45])[:, None, None])/torch.tensor([0.29, 0.28, 0.30])[:, None, None]
            p = model(x[None])[0].softmax(0)
            rows.append((-p[y].log().item(), i, p))
    rows.sort(key=lambda r: (-r[0], r[1]))
    top = learn.top_losses(5)
    assert isinstance(top, TopLosses) and top.idxs == [r[1] for r in rows[:5]]
    torch.testing.assert_close(top.losses, torch.tensor([r[0] for r in rows[:5]]), rtol=1e-4, atol=1e-5)
    for row, (loss, i, p), fn in zip(top, rows, top.paths):
        y = ds.y[i]
        assert fn == ds.x.items[i] and row[-1] == f'val/{fn.parent.name}/{fn.name}'
        assert row[1:3] == [sorted(CLASSES)[p.argmax()], fn.parent.name]
        assert [float(o) for o in (row[0], *row[3:5])] == pytest.approx([loss, p.max().item(), p[y].item()], abs=2e-3)

def test_all_losses_together_average_to_what_validate_says(learn, data):
    for ds, dl in (None, None), (data.train_ds, data.train_dl):
        top = learn.top_losses(10**6, ds=ds)
        assert len(top) == len(ds or data.valid_ds) and sorted(top.idxs) == list(range(len(top)))
        assert top.losses.mean().item() == pytest.approx(learn.validate(dl)['loss'], rel=1e-4)
        assert (top.losses.diff() <= 0).all()

def no_reduction(pred, targ): return F.cross_entropy(pred, targ)
def swallows(pred, targ, reduction=None): return F.cross_entropy(pred, targ) # takes the argument, averages all the same
class KeepsIt(nn.Module): # its attribute is read when it is made, not when it is called
    def __init__(self, reduction='mean'):
        super().__init__()
        self.reduction, self.ce = reduction, nn.CrossEntropyLoss(reduction=reduction)
    def forward(self, pred, targ): return self.ce(pred, targ)
class NoAttribute(nn.Module):
    def forward(self, pred, targ): return F.cross_entropy(pred, targ)

@pytest.mark.parametrize('loss_func', [F.cross_entropy, nn.CrossEntropyLoss(), partial(F.cross_entropy, reduction='sum'), no_reduction, swallows, KeepsIt(),
                                       NoAttribute(), lambda pred, targ: F.cross_entropy(pred, targ)])
def test_the_losses_of_items_whatever_the_loss_function(learn, data, loss_func):
    kept = dict(vars(loss_func)) if isinstance(loss_func, nn.Module) else None
    other = Learner(learn.model, data, loss_func, cbs=[normalize()])
    top = other.top_losses(7)
    assert top.idxs == learn.top_losses(7).idxs
    torch.testing.assert_close(top.losses, learn.top_losses(7).losses, rtol=1e-5, atol=1e-6)
    assert kept is None or vars(loss_func) == kept

def test_a_loss_that_looks_at_transformed_targets(learn, data):
    def smooth(yb): return F.one_hot(yb, 3).float()*0.7 + 0.1
    other = Learner(learn.model, data, F.cross_entropy, cbs=[normalize(), BatchTransformYCallback(smooth)])
    top = other.top_losses(100)
    assert top.losses.mean().item() == pytest.approx(other.validate()['loss'], rel=1e-4)
    assert set(top.actual) == set(CLASSES) # labels, not what became of them

def test_labels_may_be_several(multi):
    top = multi.top_losses(4)
    scores, targs = multi.get_preds()
    losses = F.binary_cross_entropy_with_logits(scores, targs, reduction='none').mean(1)
    torch.testing.assert_close(top.losses, losses.topk(4).values)
    assert top.header[3:5] == ['furthest off', 'p of it']
    for row, i in zip(top, top.idxs):
        assert row[2].split(', ') == sorted(labels_of(files_of(multi)[i]))
        assert row[1] == (', '.join(multi.predict(files_of(multi)[i]).label) or 'nothing')
        off = (scores[i].sigmoid()-targs[i]).abs().argmax()
        assert row[3:5] == [multi.vocab[off], f'{scores[i].sigmoid()[off]:.3f}']
    multi.show_results(4); top.show()
    with pytest.raises(TypeError, match='confusion_matrix needs one label an item.*top_losses'): confusion_matrix(multi)

def test_the_confusion_matrix(learn, data):
    cm = confusion_matrix(learn)
    scores, _ = learn.get_preds()
    for i, a in enumerate(cm.vocab):
        for j, b in enumerate(cm.vocab): assert cm.counts[i, j] == ((actual(learn) == i) & (scores.argmax(1) == j)).sum()
    assert cm.counts.sum(1).tolist() == [5, 4, 3] and cm.vocab == sorted(CLASSES) and cm.counts.dtype == torch.int64
    assert cm.accuracy == pytest.approx(accuracy(scores, actual(learn)).item())
    assert confusion_matrix(learn, data.train_ds).counts.sum(1).tolist() == [10, 8, 6]
    assert repr(cm).splitlines()[0].split() == ['actual', '/', 'predicted', *sorted(CLASSES)]

def test_most_confused():
    cm = ConfusionMatrix(torch.tensor([[5, 1, 4], [0, 7, 0], [2, 2, 0]]), ['a', 'b', 'c'])
    assert list(cm.most_confused()) == [['a', 'c', '4', '0.400'], ['c', 'a', '2', '0.500'], ['c', 'b', '2', '0.500'], ['a', 'b', '1', '0.100']]
    assert [r[:2] for r in cm.most_confused(2)] == [['a', 'c'], ['c', 'a'], ['c', 'b']]
    assert len(cm.most_confused(5)) == 0 and len(cm.most_confused(0)) == 4
    assert cm.accuracy == pytest.approx(12/21)
    with pytest.raises(ValueError, match=r'\(2, 3\) for 2 classes'): ConfusionMatrix(torch.zeros(2, 3), ['a', 'b'])

def titles(fig): return [(ax.get_title(), ax.title.get_color()) for ax in fig.axes if ax.images]

def test_the_sheet_marks_what_is_wrong(learn):
    learn.show_results(100)
    fig, ds = plt.gcf(), learn.data.valid_ds
    said = [learn.predict(fn).label for fn in files_of(learn)]
    right = [fn.parent.name for fn in files_of(learn)]
    assert titles(fig) == [(s, 'black') if s == r else (f'{s}\nis {r}', 'red') for s, r in zip(said, right)]
    assert 0 < sum(s != r for s, r in zip(said, right)) < len(said), 'the test needs both kinds'
    for ax, x, s, r in zip(fig.axes, ds.x, said, right):
        assert ax.axison == (s != r) # a frame
        assert (ax.images[0].get_array() == x.permute(1, 2, 0).numpy()).all()

@pytest.mark.parametrize('n', [1, 5, 12])
def test_as_many_images_as_asked_evenly_spread(learn, n):
    learn.show_results(n)
    want = [learn.data.valid_ds.x[i*12//n] for i in range(n)]
    got = [ax.images[0].get_array() for ax in plt.gcf().axes if ax.images]
    assert len(got) == n and all((g == w.permute(1, 2, 0).numpy()).all() for g, w in zip(got, want))

def test_pictures_go_into_files_and_leave_pyplot_alone(learn, tmp_path):
    before = plt.get_fignums()
    made = [learn.show_results(5, fname=tmp_path/'a.png'), learn.top_losses(3).show(fname=str(tmp_path/'b.png')), confusion_matrix(learn).plot(fname=tmp_path/'c.png')]
    assert made == [tmp_path/f'{c}.png' for c in 'abc'] and plt.get_fignums() == before
    for fn in made:
        im = np.asarray(PIL.Image.open(fn).convert('RGB')).astype(int)
        assert min(im.shape[:2]) > 100 and im.std() > 5
    red = (np.asarray(PIL.Image.open(made[1]).convert('RGB')).astype(int) * [1, -1, -1]).sum(2) > 200
    assert red.any() == any(a != p for a, p in zip(learn.top_losses(3).actual, learn.top_losses(3).predicted))

def test_top_losses_are_drawn_with_their_loss(learn):
    top = learn.top_losses(4)
    top.show(cols=2)
    want = [f'{l:.2f}: {p}' + (f'\nis {a}' if p != a else '') for l, p, a in zip(top.losses.tolist(), top.predicted, top.actual)]
    assert [t for t, _ in titles(plt.gcf())] == want

@pytest.mark.parametrize('normalize', [False, True])
def test_the_matrix_drawn_shows_each_number(learn, normalize):
    cm = confusion_matrix(learn)
    cm.plot(normalize=normalize)
    ax = plt.gcf().axes[0]
    vals = cm.counts/cm.counts.sum(1, keepdim=True) if normalize else cm.counts
    assert {(int(t.get_position()[1]), int(t.get_position()[0])): float(t.get_text()) for t in ax.texts} == \
           {(i, j): pytest.approx(vals[i, j].item(), abs=0.006) for i in range(3) for j in range(3) if vals[i, j]}
    assert [t.get_text() for t in ax.get_yticklabels()] == cm.vocab and ax.get_xlabel() == 'predicted'

def test_looking_changes_nothing(data, tmp_path):
    learn = make_learner(data, cbs=[normalize(), Recorder(), AvgStatsCallback(accuracy), ParamScheduler('lr', sched_cos(0.1, 0.01)), ChannelsLastCallback()])
    learn.model.train(); learn.model[0].eval()
    before = state_of(learn)
    learn.show_results(5); learn.top_losses(3).show(); confusion_matrix(learn).plot(); learn.predict_files(files_of(learn)[:3])
    learn.top_losses(3, ds=data.train_ds); confusion_matrix(learn, data.train_ds); learn.show_results(3, ds=data.train_ds)
    learn.export(tmp_path/'m.pth')
    load_learner(tmp_path/'m.pth', device='cpu').predict(files_of(learn)[0])
    assert same(state_of(learn), before)

def test_random_item_transforms_are_drawn_as_by_the_loader(folder):
    def jitter(x): return (x.float()*random.uniform(0.1, 1)).byte()
    jitter._order = 30
    learn = make_learner(make_data(folder, tfms=[*TFMS, jitter]), fit=0)
    a, b = learn.top_losses(12), learn.top_losses(12)
    assert torch.equal(a.losses, b.losses) and a.idxs == b.idxs
    assert a.losses.mean().item() == pytest.approx(learn.validate()['loss'], rel=1e-4)

def test_workers_and_a_foreign_loader_give_the_same(learn, folder):
    want = learn.top_losses(12)
    for data in make_data(folder, num_workers=2), make_data(folder, bs=3):
        got = Learner(learn.model, data, F.cross_entropy, cbs=[normalize()]).top_losses(12)
        assert got.idxs == want.idxs
        torch.testing.assert_close(got.losses, want.losses)
    ds = learn.data.valid_ds
    shuffled = DataBunch(learn.data.train_dl, DataLoader(ds, 5, shuffle=True), 3, 3) # its order is not the files': another loader is made
    got = Learner(learn.model, shuffled, F.cross_entropy, cbs=[normalize()]).top_losses(12)
    assert got.idxs == want.idxs and got.paths == want.paths

def test_a_cached_list_is_looked_at_too(learn, folder, tmp_path):
    sd = SplitData.split_by_func(ImageList.from_files(folder, tfms=TFMS), lambda fn: fn.parent.parent.name == 'val')
    data = cached(label_by_func(sd, parent_labeler, proc_y=CategoryProcessor()), tmp_path).to_databunch(8, c_in=3, seed=3)
    other = Learner(learn.model, data, F.cross_entropy, cbs=[normalize()])
    assert other.top_losses(5).paths == learn.top_losses(5).paths
    assert confusion_matrix(other).counts.tolist() == confusion_matrix(learn).counts.tolist()
    other.show_results(4)
    assert_twins(learn, load_learner(other.export(tmp_path/'m.pth'), device='cpu'), files_of(learn)[:3])

def test_looking_at_what_cannot_be_looked_at(learn, data):
    tensors = SimpleNamespace(train_dl=[(torch.zeros(2, 3), torch.tensor([0, 1]))], valid_dl=[(torch.zeros(2, 3), torch.tensor([0, 1]))], valid_ds=[1])
    other = Learner(nn.Linear(3, 2), tensors, F.cross_entropy)
    for f, name in (Learner.top_losses, 'top_losses'), (Learner.show_results, 'show_results'), (confusion_matrix, 'confusion_matrix'):
        with pytest.raises(TypeError, match=f'{name} needs labelled data from a data block, with a vocabulary, not list'): f(other)
    no_valid = Learner(learn.model, DataBunch(data.train_dl, None, 3, 3), F.cross_entropy, cbs=[normalize()])
    with pytest.raises(ValueError, match='there is no validation set: give labelled data, such as ds=data.train_ds'): no_valid.top_losses(3)
    assert len(no_valid.top_losses(3, ds=data.train_ds)) == 3
    with pytest.raises(ValueError, match='has no items'): learn.top_losses(3, ds=data.valid_ds.subset([]))
    for bad in 0, -1, 2.5, True, 'all':
        with pytest.raises(ValueError, match=re.escape(f'k={bad!r}')): learn.top_losses(bad)
        with pytest.raises(ValueError, match=re.escape(f'n={bad!r}')): learn.show_results(bad)

@pytest.mark.parametrize('model, said', [(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), r'\(12, 3\).*\(12, 2\)'), (nn.Conv2d(3, 3, 3), r'\(12, 3\).*\(12, 3, 14, 14\)')])
def test_scores_of_a_wrong_shape(data, model, said):
    with pytest.raises(ValueError, match=f'top_losses needs scores {said}'): Learner(model, data, F.cross_entropy, cbs=[normalize()]).top_losses(3)

def test_more_scores_than_labels_have_names(folder):
    learn = make_learner(make_data(folder, c_out=5), fit=0)
    learn.model[-1].bias.data[4] = 100.
    cm = confusion_matrix(learn)
    assert cm.vocab[3:] == ['class 3', 'class 4'] and cm.counts[:3, 4].tolist() == [5, 4, 3]
    assert set(learn.top_losses(3).predicted) == {'class 4'}

def test_a_batch_that_was_left_out_is_missed(learn, data):
    class Skip(Callback):
        _order = 50
        def begin_batch(self):
            if self.iter == 0: from dl2lib.callbacks import CancelBatchException; raise CancelBatchException()
    small = make_data_like(data)
    other = Learner(learn.model, small, F.cross_entropy, cbs=[normalize(), Skip()])
    with pytest.raises(ValueError, match=r'needs scores \(12, 3\)'): other.top_losses(3)

def make_data_like(data): # validation in batches of 4
    return DataBunch(data.train_dl, SeededDataLoader(data.valid_ds, 4, 0), 3, 3)

def test_a_file_that_went_missing_is_named(folder, tmp_path):
    import shutil
    shutil.copytree(folder, tmp_path/'copy')
    learn = make_learner(make_data(tmp_path/'copy'), fit=0)
    fn = files_of(learn)[5]
    fn.unlink()
    for f in learn.top_losses, lambda: confusion_matrix(learn), lambda: learn.show_results(12):
        with pytest.raises(ImageFileError, match=fn.name): f()


# --- many files ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kw', [dict(bs=1), dict(bs=5), dict(bs=64, num_workers=2)])
def test_predict_files_is_predict_in_batches(learn, kw):
    files = files_of(learn)[::-1]
    for a, fn in zip(learn.predict_files(files, **kw), files, strict=True):
        b = learn.predict(fn)
        assert (a.label, a.idx) == (b.label, b.idx)
        torch.testing.assert_close(a.probs, b.probs, rtol=1e-5, atol=1e-6)

def test_predict_files_with_several_labels(multi):
    files = files_of(multi)
    assert [p.label for p in multi.predict_files(files)] == [multi.predict(fn).label for fn in files]

def test_predict_files_of_what_are_no_files(learn, data, tmp_path):
    assert learn.predict_files([]) == []
    one = learn.predict_files(str(files_of(learn)[0]))
    assert [p.label for p in one] == [learn.predict(files_of(learn)[0]).label]
    with pytest.raises(TypeError, match='there is a JpegImageFile|there is a Tensor'): learn.predict_files([files_of(learn)[0], data.valid_ds.x[0]])
    (tmp_path/'text.jpg').write_text('no image')
    with pytest.raises(ImageFileError, match='text.jpg'): learn.predict_files([files_of(learn)[0], tmp_path/'text.jpg'])
    tensors = SimpleNamespace(train_dl=[], valid_dl=None)
    with pytest.raises(TypeError, match='predict_files needs data from a data block'): Learner(nn.Linear(1, 1), tensors, F.mse_loss).predict_files(['a.jpg'])
    with pytest.raises(TypeError, match='vocab needs data'): Learner(nn.Linear(1, 1), tensors, F.mse_loss).vocab

def test_vocab(learn, multi): assert (learn.vocab, multi.vocab) == (sorted(CLASSES), ['blue', 'cold', 'green', 'red', 'warm'])


# --- there and back ------------------------------------------------------------------------------------------------------------------

def test_the_lessons_network(data, tmp_path):
    torch.manual_seed(0)
    learn = get_learner([8, 16], data, 0.1, conv_layer, cb_funcs=[normalize, CudaCallback, partial(AvgStatsCallback, accuracy), Recorder])
    learn.logger = lambda *args: None
    learn.fit(2)
    loaded = round_trip(learn, tmp_path)
    assert loaded.vocab == learn.vocab and repr(loaded.model) == repr(learn.model)
    for fn in files_of(learn)[:3]:
        im = PIL.Image.open(fn)
        for item in str(fn), im, to_byte_tensor(im), im.convert('L'): assert equal(loaded.predict(item), learn.predict(item))
    for a, b in zip(loaded.predict_files(files_of(learn), bs=5), learn.predict_files(files_of(learn), bs=5)): assert equal(a, b)
    xb, yb = next(iter(data.valid_dl))
    assert torch.equal(loaded.get_preds([(xb, yb)])[0], learn.get_preds([(xb, yb)])[0])

class Block(nn.Module): # as a user would write it
    def __init__(self, n):
        super().__init__()
        self.conv, self.bn, self.scale = nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.Parameter(torch.ones(()))
    def forward(self, x): return x + self.scale*F.relu(self.bn(self.conv(x)))

def head(n=8): return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 3)]

MODELS = {
    'GeneralRelu': lambda: nn.Sequential(nn.Conv2d(3, 8, 3), GeneralRelu(0.1, 0.4, 6.), *head()),
    'GeneralRelu alone': lambda: nn.Sequential(nn.Conv2d(3, 8, 3), GeneralRelu(), *head()),
    'ConvLayer': lambda: nn.Sequential(ConvLayer(3, 8, leak=0.1, maxv=6.), ConvLayer(8, 8, 5, 1, sub=None), *head()),
    'BatchNorm': lambda: nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, 1e-3, None), nn.ReLU(True), *head()),
    'GroupNorm': lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding='same', padding_mode='reflect', groups=1, dilation=2), nn.GroupNorm(2, 8), nn.SiLU(), *head()),
    'pools': lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, ceil_mode=True), nn.LPPool2d(2, 2), nn.PReLU(8, 0.1), *head()),
    'dropout': lambda: nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Dropout(0.3, True), *head()),
    'lists': lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2)), nn.Identity()), *head()),
    'named children': lambda: nn.Sequential(__import__('collections').OrderedDict(body=nn.Conv2d(3, 8, 3), pool=nn.AdaptiveMaxPool2d(1), flat=nn.Flatten(), head=nn.Linear(8, 3))),
    'functions': lambda: nn.Sequential(Lambda(partial(F.avg_pool2d, kernel_size=2)), Lambda(torch.relu), Lambda(F.gelu), nn.Conv2d(3, 8, 3), Lambda(F.relu), nn.AdaptiveAvgPool2d(1), Lambda(flatten), nn.Linear(8, 3)),
    'view_tfm': lambda: nn.Sequential(Lambda(flatten), Lambda(view_tfm(3, 16, 16)), nn.Conv2d(3, 8, 3), *head()),
    'one layer': lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(768, bias=False), nn.Linear(768, 3, bias=False)),
    'up and down': lambda: nn.Sequential(nn.Upsample(scale_factor=2., mode='bilinear'), nn.ConvTranspose2d(3, 8, 3, 2, output_padding=1), nn.ELU(0.5), nn.ZeroPad2d(1), *head()),
    'shared layer': lambda: nn.Sequential(nn.Conv2d(3, 8, 3), *[nn.Conv2d(8, 8, 1)]*2, *head()),
    'half': lambda: nn.Sequential(nn.Flatten(), Lambda(F.normalize), nn.Linear(768, 3).double()) ,
}

@pytest.mark.parametrize('name', MODELS)
def test_models_by_names_and_arguments(data, tmp_path, name):
    if name == 'half': learn = make_learner(data, MODELS[name](), cbs=[BatchTransformXCallback([ByteToFloat(), to_double])], fit=0)
    else: learn = make_learner(data, MODELS[name](), fit=1)
    if name == 'half':
        with pytest.warns(UserWarning, match='to_double'): file = learn.export(tmp_path/'m.pth')
        loaded = load_learner(file, tfms=[to_double], device='cpu')
        assert_twins(learn, loaded, files_of(learn)[:2])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter('error') # the file needs nothing else
            loaded = round_trip(learn, tmp_path)
    assert repr(loaded.model) == repr(learn.model) or name == 'functions' or 'view' in name
    assert {k: (v.dtype, v.shape) for k, v in loaded.model.state_dict().items()} == {k: (v.dtype, v.shape) for k, v in learn.model.state_dict().items()}
    assert not any(t.is_meta for t in [*loaded.model.parameters(), *loaded.model.buffers()])

def test_residual_networks(data, tmp_path):
    from dl2lib.resnet import get_resnet_model
    for kw in {}, dict(leak=0.1, sub=0.2), dict(layer=partial(conv_layer, maxv=6.)):
        learn = make_learner(data, get_resnet_model(data, (8, 16), 1, **kw))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert repr(round_trip(learn, tmp_path).model) == repr(learn.model)

def to_double(x): return x.double()

def test_a_resnet_as_torchvision_builds_it_is_passed_by_hand(folder, tmp_path):
    from torchvision.models import resnet18
    torch.manual_seed(0)
    learn = make_learner(make_data(folder, tfms=[make_rgb, ResizeFixed(32), to_byte_tensor]), resnet18(num_classes=3), fit=0)
    with pytest.warns(UserWarning, match=r'load_learner will need model=\.\.\., as model is a ResNet of module torchvision\.models\.resnet'):
        file = learn.export(tmp_path/'r.pth')
    assert_twins(learn, load_learner(file, model=resnet18(num_classes=3), device='cpu'), files_of(learn)[:3])
    with pytest.raises(StateFileError, match=r'r\.pth.*no description of the model \(model is a ResNet of module torchvision'): load_learner(file)

def test_a_model_of_ones_own_within_others(data, tmp_path):
    def build(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), Block(8)), *head())
    learn = make_learner(data, build())
    with pytest.warns(UserWarning, match=r'as model\.1\.1 is a Block of module test_inference'): file = learn.export(tmp_path/'m.pth')
    mine = build()
    loaded = load_learner(file, model=mine, device='cpu')
    assert loaded.model is mine
    assert_twins(learn, loaded, files_of(learn))
    with pytest.raises(StateFileError, match='do not fit the model given, a Sequential.*Missing|do not fit the model given, a Sequential.*Unexpected'):
        load_learner(file, model=nn.Sequential(nn.Conv2d(3, 8, 3), *head()))
    for bad in Block, 'Block':
        with pytest.raises(TypeError, match='model: give an instance of nn.Module'): load_learner(file, model=bad)

@pytest.mark.parametrize('change, said', [
    (lambda m: setattr(m[0], 'relu', nn.Mish()), r'model\.0\.relu is a Mish'),
    (lambda m: setattr(m[0].conv, 'bias', None), r'model\.0\.conv is a Conv2d that was changed'),
    (lambda m: m[0].add_module('more', nn.ReLU()), r'model\.0\.more'),
    (lambda m: m.__setitem__(1, Lambda(lambda x: x)), r'model\.1\.func is a .*<lambda> of module test_inference'),
    (lambda m: m.__setitem__(1, nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))), r'model\.1 is a ParametrizedConv2d'),
    (lambda m: m[0].conv.register_buffer('extra', torch.zeros(2)), r'Unexpected key|model\.0\.conv')])
def test_a_model_that_was_changed_after_it_was_made(data, tmp_path, change, said):
    model = nn.Sequential(ConvLayer(3, 8), nn.ReLU(), *head())
    change(model)
    learn = make_learner(data, model, fit=0)
    with pytest.warns(UserWarning, match=said): file = learn.export(tmp_path/'m.pth')
    with pytest.raises(StateFileError, match='give an instance'): load_learner(file)
    assert_twins(learn, load_learner(file, model=copy.deepcopy(model), device='cpu'), files_of(learn)[:2])

def test_what_a_hook_does_is_noticed_and_no_file_is_written(data, tmp_path):
    learn = make_learner(data)
    learn.model[0].register_forward_hook(lambda m, inp, out: out*2)
    with pytest.raises(RuntimeError, match='no file was written.*such as a hook'): learn.export(tmp_path/'m.pth')
    assert list(tmp_path.iterdir()) == []

def test_weights_that_are_views_bring_only_themselves(data, tmp_path):
    base = torch.randn(10**6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    model[1].bias.data = base[:3]
    file = make_learner(data, model, fit=0).export(tmp_path/'m.pth')
    assert file.stat().st_size < 100_000


# --- transforms, labels, callbacks ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('tfms, batch', [
    ([make_rgb, ResizeFixed(64), to_byte_tensor], [ByteToFloat(), Normalizer((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))]),
    ([make_rgb, ResizeFixed((20, 12)), to_byte_tensor, to_float_tensor], norm_imagenette),
    ([ResizeFixed(16), make_rgb, to_byte_tensor], ByteToFloat())])
def test_transforms_with_arguments(folder, tmp_path, tfms, batch):
    learn = make_learner(make_data(folder, tfms=tfms), cbs=[BatchTransformXCallback(batch)])
    file = learn.export(tmp_path/'m.pth')
    loaded = load_learner(file, device='cpu')
    assert_twins(learn, loaded, files_of(learn))
    assert list(map(repr, loaded.data.valid_ds.x.tfms)) == list(map(repr, tfms))

@pytest.mark.parametrize('decoder', [open_bytes, jpeg_decoder])
def test_another_decoder(folder, tmp_path, decoder):
    learn = make_learner(make_data(folder, decoder=decoder))
    assert round_trip(learn, tmp_path).data.valid_ds.x.decoder is decoder

def test_the_chapters_that_come_later(folder, tmp_path):
    from dl2lib.augmentation import CenterCrop, PilRandomFlip
    from dl2lib.batch_warp import AugmentBatch, AugmentCallback, RandomCrop, RandomFlip, RandomRotate
    data = make_data(folder, tfms=[make_rgb, CenterCrop(16, 1.2), to_byte_tensor])
    for cb in BatchTransformXCallback(AugmentBatch([RandomFlip(), RandomRotate(5), RandomCrop()], 12, norm_imagenette)), AugmentCallback([RandomFlip(0.3)], 14, norm=norm_imagenette):
        file = make_learner(data, cbs=[cb]).export(tmp_path/'m.pth')
        batch = read_state(file, 'inference')['callbacks'][0]['args']['tfm'][0]
        assert 'ops' not in batch['args'] # the counterpart for validation went into the file
        learn = make_learner(data, cbs=[cb])
        learn.export(file)
        assert_twins(learn, load_learner(file, device='cpu'), files_of(learn)[:4])
    random_one = make_learner(make_data(folder, tfms=[make_rgb, PilRandomFlip(0.5), ResizeFixed(16), to_byte_tensor]))
    loaded = load_learner(random_one.export(tmp_path/'m.pth'), device='cpu')
    assert loaded.data.valid_ds.x.tfms[1].p == 0.5

class Sharpen(Transform):
    def __init__(self, amount): self.amount = amount
    def __call__(self, im): return im.point(lambda v: min(255, v*self.amount))
    def __repr__(self): return f'Sharpen({self.amount})'

def darker(x, by=2.): return x/by

def test_transforms_of_ones_own_are_handed_to_the_loader(folder, tmp_path):
    learn = make_learner(make_data(folder, tfms=[make_rgb, Sharpen(2), ResizeFixed(16), to_byte_tensor]), cbs=[BatchTransformXCallback([ByteToFloat(), partial(darker, by=3.)])])
    with pytest.warns(UserWarning, match=re.escape('load_learner will need tfms=[Sharpen(2), darker(by=3.0)]')): file = learn.export(tmp_path/'m.pth')
    for good in [Sharpen(2), partial(darker, by=3.)], [partial(darker, by=3.), Sharpen(2)], {'Sharpen': lambda im: Sharpen(2)(im), 'darker': lambda x: x/3.}:
        assert_twins(learn, load_learner(file, tfms=good, device='cpu'), files_of(learn)[:3])
    with pytest.raises(StateFileError, match=r'm\.pth.*needs transforms.*Sharpen\(2\) \(of module test_inference\), darker\(by=3\.0\)'): load_learner(file)
    with pytest.raises(StateFileError, match=r'not among tfms: darker\(by=3\.0\)'): load_learner(file, tfms=Sharpen(2))
    with pytest.raises(StateFileError, match='has no use for to_double'): load_learner(file, tfms=[Sharpen(2), partial(darker, by=3.), to_double])
    with pytest.raises(TypeError, match='Sharpen is a class: give an instance'): load_learner(file, tfms=[Sharpen, darker])
    with pytest.raises(TypeError, match='str is no transform'): load_learner(file, tfms='Sharpen')
    wrong = [Sharpen(1), partial(darker, by=3.)] # the right name, another argument
    with pytest.raises(StateFileError, match='test image scores otherwise.*check=False'): load_learner(file, tfms=wrong)
    assert load_learner(file, tfms=wrong, check=False).predict(files_of(learn)[0]).label in CLASSES
    fails = [lambda im: 1/0, partial(darker, by=3.)]
    with pytest.raises(StateFileError, match='test image cannot be predicted: ZeroDivisionError'): load_learner(file, tfms=dict(zip(('Sharpen', 'darker'), fails)))

def test_two_of_one_name_come_in_their_order(folder, tmp_path):
    learn = make_learner(make_data(folder, tfms=[make_rgb, Sharpen(3), to_byte_tensor, ResizeFixed(16)]), cbs=[BatchTransformXCallback([ByteToFloat(), partial(darker, by=3.), partial(darker, by=-2.)])])
    with pytest.warns(UserWarning): file = learn.export(tmp_path/'m.pth')
    own = [Sharpen(3), partial(darker, by=3.), partial(darker, by=-2.)]
    assert_twins(learn, load_learner(file, tfms=own, device='cpu'), files_of(learn)[:3])
    with pytest.raises(StateFileError, match='needs transforms.*darker'): load_learner(file, tfms=own[:2])

class Halves(Transform): # stands for another one in validation
    def __init__(self, valid): self.valid = valid
    def __call__(self, x): return x.float()/510

def test_the_counterpart_for_validation_is_what_counts(data, tmp_path):
    learn = make_learner(data, cbs=[BatchTransformXCallback([Halves(ByteToFloat()), norm_imagenette])])
    with warnings.catch_warnings():
        warnings.simplefilter('error') # the transform is the user's, its counterpart the library's
        assert [type(f) for f in round_trip(learn, tmp_path).batch_transform_x.tfm] == [ByteToFloat, Normalizer]

def test_a_decoder_of_ones_own(folder, tmp_path):
    def gray(fn): return PIL.Image.open(fn).convert('L')
    learn = make_learner(make_data(folder, decoder=gray))
    with pytest.warns(UserWarning, match=r'tfms=\[gray\]'): file = learn.export(tmp_path/'m.pth')
    assert read_state(file, 'inference')['test']['image'].shape == (1, 16, 16)
    assert_twins(learn, load_learner(file, tfms=gray, device='cpu'), files_of(learn)[:3])
    arrays = make_learner(make_data(folder, tfms=[to_tensor], decoder=as_array)) # neither image nor bytes: no test image
    with pytest.warns(UserWarning, match=r'tfms=\[as_array, to_tensor\]'): file = arrays.export(tmp_path/'a.pth')
    assert read_state(file, 'inference')['test'] is None
    assert_twins(arrays, load_learner(file, tfms=[to_tensor, as_array], device='cpu'), files_of(learn)[:3])

def as_array(fn): return np.asarray(PIL.Image.open(fn).convert('RGB').resize((16, 16)))
def to_tensor(a): return torch.tensor(a).permute(2, 0, 1)

@pytest.mark.parametrize('proc', [CategoryProcessor(['red', 'green', 'blue']), CategoryProcessor(other='rest', min_count=8), CategoryProcessor(['blue'], other='rest')])
def test_vocabularies(folder, tmp_path, proc):
    learn = make_learner(make_data(folder, proc=proc))
    loaded = round_trip(learn, tmp_path)
    assert loaded.vocab == learn.vocab == proc.vocab
    back = loaded.data.valid_ds.proc_y
    assert (type(back), back.other, back.min_count) == (CategoryProcessor, proc.other, proc.min_count)

@pytest.mark.parametrize('f, vocab', [(lambda fn: len(fn.parent.name), [3, 4, 5]), (lambda fn: (fn.parent.name, 1), None), (lambda fn: fn.parent.name == 'red', [False, True])])
def test_labels_need_not_be_texts(folder, tmp_path, f, vocab):
    sd = SplitData.split_by_func(ImageList.from_files(folder, tfms=TFMS), lambda fn: fn.parent.parent.name == 'val')
    learn = make_learner(label_by_func(sd, f, proc_y=CategoryProcessor()).to_databunch(8, c_in=3, seed=1))
    loaded = round_trip(learn, tmp_path)
    assert loaded.vocab == (vocab or [(n, 1) for n in sorted(CLASSES)]) and list(map(type, loaded.vocab)) == list(map(type, learn.vocab))

def test_several_labels(multi, tmp_path): assert isinstance(round_trip(multi, tmp_path).data.valid_ds.proc_y, MultiCategoryProcessor)

@pytest.mark.parametrize('cbs', [[ChannelsLastCallback()], [MixedPrecision()], [ParamScheduler('lr', sched_cos(0.1, 0.01)), Recorder(), BatchTransformYCallback(lambda yb: yb)]])
def test_callbacks_of_the_library(data, tmp_path, cbs):
    loaded = round_trip(make_learner(data, cbs=[normalize(), *cbs]), tmp_path)
    assert {type(cb) for cb in loaded.cbs} >= {type(cb) for cb in cbs if isinstance(cb, (ChannelsLastCallback, MixedPrecision))}
    assert not any(isinstance(cb, (ParamScheduler, Recorder, BatchTransformYCallback)) for cb in loaded.cbs)

def test_a_callback_of_ones_own_that_prepares_batches_is_refused(data, tmp_path):
    class Dim(Callback):
        def begin_batch(self): self.run.xb = self.run.xb/2
    class Quiet(Callback):
        def after_loss(self): pass
    learn = make_learner(data, cbs=[normalize(), Quiet(), Dim()], fit=0)
    with pytest.raises(ValueError, match='Dim, a callback of your own.*BatchTransformXCallback.*remove_cbs'): learn.export(tmp_path/'m.pth')
    learn.remove_cbs(Dim)
    learn.export(tmp_path/'m.pth')
    class Named(BatchTransformXCallback): # what it does is the library's
        def __init__(self): super().__init__([ByteToFloat(), norm_imagenette])
    round_trip(make_learner(data, cbs=[Named()]), tmp_path)


# --- in other places -----------------------------------------------------------------------------------------------------------------

def test_a_fresh_process_predicts_the_same(learn, tmp_path):
    file = learn.export(tmp_path/'m.pth')
    code = f'''
import torch; torch.set_num_threads({torch.get_num_threads()})
from dl2lib.inference import load_learner
learn = load_learner({str(file)!r}, device='cpu')
torch.save([[p.label, p.idx, p.probs] for p in map(learn.predict, {list(map(str, files_of(learn)))!r})], {str(tmp_path/"res.pth")!r})
'''
    python(code, tmp_path)
    for (label, idx, probs), fn in zip(torch.load(tmp_path/'res.pth'), files_of(learn), strict=True):
        b = learn.predict(fn)
        assert (label, idx) == (b.label, b.idx) and torch.equal(probs, b.probs)

def test_the_device(learn, tmp_path):
    file = learn.export(tmp_path/'m.pth')
    for device in 'cpu', torch.device('cpu'), None: assert next(load_learner(file, device=device).model.parameters()).device.type == inference.default_device(device).type
    with pytest.raises(ValueError, match="device='abacus' is no device"): load_learner(file, device='abacus')
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda' was asked for"): load_learner(file, device='cuda')

@pytest.mark.cuda
def test_cuda_and_cpu_read_each_others_files(folder, tmp_path):
    on_gpu = make_learner(make_data(folder), cbs=[normalize(), CudaCallback()])
    file = on_gpu.export(tmp_path/'m.pth')
    assert all(v.device.type == 'cpu' for v in read_state(file, 'inference')['weights'].values())
    on_cpu, back = load_learner(file, device='cpu'), load_learner(file)
    assert next(back.model.parameters()).is_cuda and not next(on_cpu.model.parameters()).is_cuda
    for fn in files_of(on_gpu):
        for other in on_cpu, back: torch.testing.assert_close(other.predict(fn).probs, on_gpu.predict(fn).probs, rtol=1e-2, atol=1e-3)
    weighted = make_learner(make_data(folder), loss_func=nn.CrossEntropyLoss(weight=torch.tensor([1., 2., 3.])), cbs=[normalize(), CudaCallback()])
    assert len(weighted.top_losses(3)) == 3 and confusion_matrix(weighted).counts.sum() == 12 # the loss's weights are on the GPU

def test_a_loaded_learner_has_no_data_and_can_get_some(learn, data, tmp_path):
    loaded = load_learner(learn.export(tmp_path/'m.pth'), device='cpu')
    loaded.logger = lambda *args: None
    with pytest.raises(ValueError, match='nothing to train on'): loaded.fit(1)
    with pytest.raises(ValueError, match='nothing to predict'): loaded.get_preds()
    with pytest.raises(ValueError, match='has no items'): loaded.top_losses(3)
    with pytest.raises(ValueError, match='copy its file'): loaded.export(tmp_path/'n.pth')
    loaded.data = data
    with pytest.raises(RuntimeError, match='no loss function.*learn.loss_func'): loaded.fit(1)
    loaded.loss_func = F.cross_entropy
    assert loaded.top_losses(3).idxs == learn.top_losses(3).idxs
    loaded.fit(1)
    round_trip(loaded, tmp_path)

def test_the_file_has_no_data_in_it(learn, tmp_path):
    b = learn.export(tmp_path/'m.pth').read_bytes()
    assert not any(fn.stem.encode() in b for fn in [*files_of(learn), *learn.data.train_ds.x.items])
    assert str(learn.data.train_ds.x.path).encode() not in b

def test_exporting_again_keeps_the_one_before(learn, tmp_path):
    file = learn.export(tmp_path/'m.pth')
    old = file.read_bytes()
    learn.export(file)
    assert (tmp_path/'m.pth.prev').read_bytes() == old and file.read_bytes() == old # the same Learner, the same bytes


# --- files that are not what they seem -----------------------------------------------------------------------------------------------

class Evil:
    def __reduce__(self): return os.system, ('touch was_run',)

def test_a_pickle_that_would_run_code_is_refused_and_not_run(learn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, write in ('torch.pth', torch.save), ('plain.pth', lambda o, f: open(f, 'wb').write(pickle.dumps(o))):
        write({'weights': {}, 'evil': Evil()}, tmp_path/name)
        with pytest.raises(StateFileError, match=name): load_learner(name)
    import dl2lib.checkpoints as checkpoints
    monkeypatch.setattr(checkpoints, '_plain', lambda o, place='': o) # a writer that means harm: the digest is right
    write_state({'evil': Evil()}, tmp_path/'sealed.pth', 'inference')
    with pytest.raises(StateFileError, match='sealed.pth.*code, of which nothing was run'): load_learner(tmp_path/'sealed.pth')
    assert not (tmp_path/'was_run').exists()
    torch.load(tmp_path/'torch.pth', weights_only=False)
    assert (tmp_path/'was_run').exists(), 'the test itself: the pickle does run something'

@pytest.fixture
def state(learn, tmp_path): return read_state(learn.export(tmp_path/'good.pth'), 'inference')

NAMES = ['os.system', 'builtins.eval', 'torch.load', 'torch.save', 'torch.from_file', 'torch.hub.load', 'torch.nn', 'torch.nn.Module.apply', 'torch.nn.functional.torch',
         'torch.nn.functional.warnings', 'torch.nn.functional._verify_batch_size', 'dl2lib.checkpoints.write_state', 'dl2lib.checkpoints.os', 'dl2lib.datasets.imagenette',
         'dl2lib.train.main', 'dl2lib.practice.CSVLog', 'dl2lib.learner.Learner', 'dl2lib.datablock.get_files', 'dl2lib.datablock.nowhere', 'dl2lib.nowhere.f', 'dl2lib.batch_warp.show_augmented', 'dl2lib.augmentation._share',
         'dl2lib', '', 'subprocess.Popen', '../evil.f', 'dl2lib.datablock.ImageList', 'test_inference.Sharpen', 3, None]

@pytest.mark.parametrize('name', NAMES, ids=str)
def test_a_file_may_name_little(state, tmp_path, name, monkeypatch):
    def no_call(*args, **kw): raise AssertionError('it was called')
    monkeypatch.setattr(os, 'system', no_call)
    for bad in {'name': name}, {'class': name, 'args': {}}, {'class': name, 'children': {}}, {'partial': {'name': name}, 'args': (), 'kwargs': {}}:
        for key, d in ('tfms', [bad]), ('decoder', bad), ('labels', bad), ('callbacks', [bad]), ('model', bad), ('model', {'class': 'dl2lib.convnet.Lambda', 'args': {'func': bad}}):
            write_state(state | {key: d}, tmp_path/'bad.pth', 'inference')
            with pytest.raises(StateFileError, match='bad.pth.*names'): load_learner(tmp_path/'bad.pth', device='cpu')

def test_each_name_that_is_said_is_found_again():
    import dl2lib.augmentation, dl2lib.batch_warp, dl2lib.convnet, dl2lib.datablock, dl2lib.datacache
    said = 0
    for mod in nn, F, dl2lib.convnet, dl2lib.datablock, dl2lib.datacache, dl2lib.augmentation, dl2lib.batch_warp:
        for o in vars(mod).values():
            try: name = inference._name_of(o)
            except TypeError: continue
            if name: said += 1; assert inference._named_so(name) is o
    assert said > 150

def test_a_file_of_another_kind_or_version(state, tmp_path):
    file = tmp_path/'f.pth'
    write_state({'epoch': 3}, file, 'checkpoint')
    with pytest.raises(StateFileError, match=r"f\.pth.*'checkpoint'"): load_learner(file)
    write_state(state | {'format': 2, 'dl2lib': '9.1'}, file, 'inference')
    with pytest.raises(StateFileError, match=r'f\.pth, written by dl2lib 9\.1.*format is 2, and this version reads 1'): load_learner(file)
    write_state(state | {'dl2lib': '9.1', 'torch': '9.9'}, file, 'inference') # another version that says nothing new
    assert load_learner(file, device='cpu').vocab == sorted(CLASSES)
    layer = {'class': 'torch.nn.Linear', 'args': {'in_features': 8, 'out_features': 3, 'wings': 2}}
    write_state(state | {'model': layer}, file, 'inference')
    with pytest.raises(StateFileError, match='torch.nn.Linear cannot be made with.*wings'): load_learner(file)
    with pytest.raises(FileNotFoundError, match='nowhere.pth'): load_learner(tmp_path/'nowhere.pth')

@pytest.mark.parametrize('key', ['format', 'model', 'weights', 'tfms', 'decoder', 'labels', 'callbacks', 'test'])
def test_a_file_that_lacks_something(state, tmp_path, key):
    write_state({k: v for k, v in state.items() if k != key}, tmp_path/'f.pth', 'inference')
    with pytest.raises(StateFileError, match=rf"f\.pth.*lacks '{key}'"): load_learner(tmp_path/'f.pth', device='cpu')

@pytest.mark.parametrize('key, value', [('tfms', 3), ('model', {'class': 'torch.nn.Linear'}), ('model', 'x'), ('labels', None), ('weights', {}), ('weights', [1]), ('callbacks', {}),
                                        ('test', {'image': 3}), ('tfms', [{'dtype': 'evil'}]), ('decoder', None)])
def test_a_file_with_nonsense_in_it(state, tmp_path, key, value):
    write_state(state | {key: value}, tmp_path/'f.pth', 'inference')
    with pytest.raises(StateFileError, match=r'f\.pth'): load_learner(tmp_path/'f.pth', device='cpu')

def test_weights_that_were_tampered_with_fail_the_files_own_test(state, tmp_path):
    state['weights'] = {k: v+1 if k.endswith('weight') else v for k, v in state['weights'].items()}
    write_state(state, tmp_path/'f.pth', 'inference')
    with pytest.raises(StateFileError, match='f.pth.*test image scores otherwise'): load_learner(tmp_path/'f.pth', device='cpu')
    load_learner(tmp_path/'f.pth', device='cpu', check=False)

def test_data_that_cannot_be_exported(data, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    with pytest.raises(TypeError, match='export needs data from a data block'): Learner(model, SimpleNamespace(train_dl=[], valid_dl=[1]), F.cross_entropy).export(tmp_path/'m')
    class Own(ImageList):
        def get(self, fn): return super().get(fn)
    il = Own.from_files(data.train_ds.x.path, tfms=TFMS)
    sd = label_by_func(SplitData.split_by_func(il, lambda fn: fn.parent.parent.name == 'val'), parent_labeler, proc_y=CategoryProcessor())
    with pytest.raises(TypeError, match='export takes data of an ImageList, not Own'): make_learner(sd.to_databunch(8, seed=1, c_in=3), fit=0).export(tmp_path/'m')
    class Proc(CategoryProcessor): pass
    with pytest.raises(TypeError, match='the processor Proc'): make_learner(make_data(data.train_ds.x.path, proc=Proc()), fit=0).export(tmp_path/'m')
    with pytest.raises(OSError, match='nowhere'): make_learner(data, fit=0).export(tmp_path/'nowhere'/'m.pth')
    assert list(tmp_path.iterdir()) == []
