"""Proves the layers against numpy and against gradients in float64; the lesson's CNN by shapes and parameters counted by hand; the
statistics of its first weights; and that `model_summary` changes nothing, to the bit, whatever the model, and whatever it raises."""
import copy, io, math, pickle, random, re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from dl2lib.callbacks import AvgStatsCallback, BatchTransformXCallback, Callback, CudaCallback, Recorder, accuracy
from dl2lib.convnet import (ConvLayer, GeneralRelu, Lambda, conv_layer, flatten, get_cnn_layers, get_cnn_model, get_learn_run, init_cnn,
                            model_summary, prev_pow_2, view_tfm)
from dl2lib.hooks import find_modules, is_lin_layer
from dl2lib.runner import Runner, TrainBundle, TrainLoop, get_runner

NFS = [64, 64, 128, 256]
LESSON = SimpleNamespace(c_in=3, c_out=10)

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

def bits(a, b): return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


# GeneralRelu

KNOBS = [dict(leak=l, sub=s, maxv=m) for l in (None, 0., .1, 1.) for s in (None, 0., .4, -1.) for m in (None, 0., 1.5)]

def relu_oracle(x, leak=None, sub=None, maxv=None): # -> values and slopes, in numpy
    below = 0. if leak is None else leak
    y, slope = np.where(x > 0, x, below*x), np.where(x > 0, 1., below)
    if sub is not None: y = y - sub
    return (y, slope) if maxv is None else (np.minimum(y, maxv), np.where(y > maxv, 0., slope))

@pytest.mark.parametrize('knobs', KNOBS, ids=str)
def test_general_relu_against_numpy_with_its_gradient(knobs):
    x = torch.linspace(-3, 3, 98, dtype=torch.float64, requires_grad=True)      # an even count: it leaves out 0, a corner
    before = x.detach().clone()
    act = GeneralRelu(**knobs).double()
    if knobs['sub'] is not None: act.sub.fill_(knobs['sub'])                     # .double() keeps the rounding of float32
    y, slope = relu_oracle(before.numpy(), **knobs)
    out = act(x)
    out.sum().backward()
    np.testing.assert_allclose(out.detach().numpy(), y, rtol=0, atol=1e-15)
    np.testing.assert_allclose(x.grad.numpy(), slope, rtol=0, atol=0)
    assert bits(x.detach(), before)                                             # nothing is changed in place
    assert torch.autograd.gradcheck(act, (torch.tensor([-2., -.7, .3, 1.1, 2.6], dtype=torch.float64, requires_grad=True),))

def test_general_relu_trains_after_a_change_of_its_shift():
    "What LSUV does: turn the shift between forward passes, then train."
    act = GeneralRelu(sub=.1)
    for shift in (.2, .3):
        act.sub = torch.tensor(shift)
        x = torch.tensor([-1., 2.], requires_grad=True)
        act(x*1).sum().backward()
        assert x.grad.tolist() == [0., 1.]

def test_general_relu_shift_is_a_buffer():
    act = GeneralRelu(leak=.1, sub=.4)
    assert [k for k, _ in act.named_buffers()] == ['sub'] and not list(act.parameters())
    assert act.sub.shape == () and act.sub.item() == pytest.approx(.4)
    other = GeneralRelu(leak=.1, sub=0.); other.load_state_dict(act.state_dict())
    assert bits(other.sub, act.sub)
    assert act.half().sub.dtype == torch.float16 and act.to('meta').sub.is_meta
    assert repr(act) == 'GeneralRelu(leak=0.1, sub=tensor(..., device=\'meta\', size=(), dtype=torch.float16), maxv=None)'
    assert GeneralRelu().state_dict() == {} and GeneralRelu().sub is None

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_general_relu_keeps_the_type_of_its_input(dtype):
    x = torch.randn(5).to(dtype)
    assert GeneralRelu(.1, .4, 1.)(x).dtype == dtype == GeneralRelu(.1, .4, 1.).to(dtype)(x).dtype


# Layers

def param_count(m): return sum(p.numel() for p in m.parameters())

@pytest.mark.parametrize('ks', [1, 3, 5, 7])
@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize('layer', [conv_layer, ConvLayer, partial(conv_layer, bn=False)], ids=['bn', 'ConvLayer', 'no bn'])
def test_layer_shapes(ks, stride, layer):
    l = layer(3, 5, ks, stride=stride)
    for h, w in ((1, 1), (2, 7), (8, 9), (31, 32), (33, 6)):
        assert l(torch.randn(2, 3, h, w)).shape == (2, 5, math.ceil(h/stride), math.ceil(w/stride))

def test_conv_layer_is_convolution_activation_normalization():
    l, x = conv_layer(3, 8, leak=.1, sub=.2, maxv=3.), torch.randn(4, 3, 9, 9)
    assert [type(o) for o in l] == [nn.Conv2d, GeneralRelu, nn.BatchNorm2d]
    h = F.conv2d(x, l[0].weight, None, stride=2, padding=1)
    h = F.leaky_relu(h, .1).sub(.2).clamp(max=3.)
    torch.testing.assert_close(l(x), F.batch_norm(h, None, None, l[2].weight, l[2].bias, training=True))
    assert l[0].bias is None and param_count(l) == 3*8*9 + 2*8
    plain = conv_layer(3, 8, bn=False)
    assert len(plain) == 2 and plain[0].bias.shape == (8,) and param_count(plain) == 3*8*9 + 8

def test_conv_layer_names_a_wrong_option_and_a_wrong_input():
    with pytest.raises(TypeError, match='leek'): conv_layer(3, 8, leek=.1)
    with pytest.raises(RuntimeError, match='to have 3 channels, but got 1'): conv_layer(3, 8)(torch.randn(2, 1, 8, 8))

def test_conv_layer_class_against_torch():
    l, x = ConvLayer(3, 8, leak=.1, sub=.25, maxv=1.), torch.randn(2, 3, 8, 8)
    h = F.leaky_relu(F.conv2d(x, l.conv.weight, l.conv.bias, stride=2, padding=1), .1)
    torch.testing.assert_close(l(x), (h-.25).clamp(max=1.))
    assert l.weight is l.conv.weight and [k for k, _ in l.named_parameters()] == ['conv.weight', 'conv.bias']


# ConvLayer.bias

@pytest.mark.parametrize('v', [.5, -2, np.float32(.5), np.array(.5), torch.tensor(.5), torch.tensor([.5]),
                               torch.tensor(.5, dtype=torch.float64), torch.tensor(.5, requires_grad=True)], ids=repr)
def test_bias_set_moves_the_result_by_as_much(v):
    l, x = ConvLayer(3, 4), torch.randn(2, 3, 8, 8)
    before = l(x)
    l.bias = v
    torch.testing.assert_close(l(x), before + .5*(1 if v != -2 else -4))
    assert l.bias.shape == () and l.bias.dtype == torch.float32 and l.bias == v and not l.relu.sub.requires_grad
    copy.deepcopy(l); pickle.dumps(l)

@pytest.mark.parametrize('by', [.25, torch.tensor(.25), np.float64(.25)], ids=repr)
def test_bias_in_place(by):
    l, x = ConvLayer(3, 4, sub=.5), torch.randn(2, 3, 8, 8)
    before = l(x)
    l.bias -= by
    assert l.bias.item() == -.75 and l.relu.sub.item() == .75
    torch.testing.assert_close(l(x), before-.25)
    l.bias += by; l.bias *= 2; l.bias /= 4
    assert l.bias.item() == -.25 and float(by) == .25
    assert 'sub' in dict(l.relu.named_buffers()) and 'bias' not in l.__dict__   # it is still the buffer

def test_the_lessons_loop_ends_where_it_wants():
    l, x = ConvLayer(3, 8, leak=.1), torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        for _ in range(20):
            l.bias -= l(x).mean().item()
            l.weight.data /= l(x).std()
        l.bias -= l(x).mean()
    assert abs(l(x).mean()) < 1e-3 and abs(l(x).std()-1) < 1e-3
    l(x).square().sum().backward()                                              # autograd takes what was done
    assert torch.isfinite(l.weight.grad).all()

def test_bias_is_read_as_a_copy():
    l, v = ConvLayer(3, 4), torch.tensor(.5)
    l.bias = v
    v.zero_(); l.bias.zero_()
    assert l.bias.item() == .5

def test_bias_of_many_numbers_is_refused_and_changes_nothing():
    l = ConvLayer(3, 4, sub=.5)
    for bad in (torch.zeros(4), [1., 2.], torch.zeros(0)):
        with pytest.raises(ValueError, match='one number for all channels'): l.bias = bad
    assert l.bias.item() == -.5

def test_a_conv_layer_without_shift_has_no_bias_until_it_is_given_one():
    l = ConvLayer(3, 4, sub=None)
    assert l.bias is None and 'relu.sub' not in l.state_dict()
    l.bias = .5
    assert l.bias.item() == .5 and 'relu.sub' in l.state_dict()

def test_state_dict_carries_the_shift():
    a, b, x = ConvLayer(3, 4), ConvLayer(3, 4), torch.randn(2, 3, 8, 8)
    a.bias = .7
    assert sorted(a.state_dict()) == ['conv.bias', 'conv.weight', 'relu.sub']
    f = io.BytesIO(); torch.save(a.state_dict(), f); f.seek(0)
    b.load_state_dict(torch.load(f, weights_only=True))
    assert bits(a(x), b(x)) and float(b.bias) == pytest.approx(.7)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_shift_follows_the_model(dtype):
    l = ConvLayer(3, 4, sub=.5).to(dtype)
    assert l.relu.sub.dtype == l.bias.dtype == dtype
    l.bias -= .25
    assert l.relu.sub.dtype == dtype and l.bias.item() == -.75
    assert l(torch.randn(2, 3, 8, 8).to(dtype)).dtype == dtype
    assert ConvLayer(3, 4).to('meta').bias.is_meta


# prev_pow_2, Lambda, flatten, view_tfm

def test_prev_pow_2_against_a_plain_loop():
    for x in range(1, 1001):
        p = 1
        while p*2 <= x: p *= 2
        assert prev_pow_2(x) == p == prev_pow_2(x+.5) and type(prev_pow_2(x)) is int

def test_prev_pow_2_is_exact_beside_large_powers():
    for k in (10, 29, 47, 49, 53, 64, 100): assert [prev_pow_2(2**k+d) for d in (-1, 0, 1)] == [2**(k-1), 2**k, 2**k]
    assert prev_pow_2(np.int64(27)) == prev_pow_2(torch.tensor(27)) == 16

@pytest.mark.parametrize('bad', [0, -4, .99, math.nan, math.inf, -math.inf])
def test_prev_pow_2_refuses_what_has_none(bad):
    with pytest.raises(ValueError, match=re.escape(f'prev_pow_2({bad})')): prev_pow_2(bad)

def test_lambda_and_flatten():
    x = torch.randn(3, 4, 5, 6)
    assert bits(Lambda(flatten)(x), x.reshape(3, 120)) and bits(flatten(x[:1, :, :1, :1]), x[:1, :, 0, 0])
    assert bits(pickle.loads(pickle.dumps(Lambda(flatten)))(x), flatten(x))
    assert repr(Lambda(flatten)) == 'Lambda(flatten)' and 'partial' in repr(Lambda(partial(torch.mean, dim=1)))

def test_view_tfm():
    x, tfm = torch.arange(5*784.).view(5, 784), pickle.loads(pickle.dumps(view_tfm(1, 28, 28)))
    assert bits(tfm(x), x.view(5, 1, 28, 28)) and bits(view_tfm(28, 28)(x.T.contiguous().T), x.view(5, 28, 28))
    assert view_tfm(1, 28, -1)(x).shape == (5, 1, 28, 28)
    with pytest.raises(RuntimeError, match=r'\[5, 1, 14, 14\].*invalid'): view_tfm(1, 14, 14)(x)


# The model

def test_parameters_of_the_lessons_cnn_counted_by_hand():
    channels = [(3, 16), (16, 32), (32, 64), (64, 64), (64, 64), (64, 128), (128, 256)]
    weights = 432 + 4608 + 18432 + 36864 + 36864 + 73728 + 294912                # 9 ni nf
    assert weights == sum(9*ni*nf for ni, nf in channels) == 465_840
    scales, linear = 2*(16+32+64+64+64+128+256), 256*10 + 10                     # BatchNorm: a factor and a shift a channel
    assert param_count(get_cnn_model(LESSON, NFS, conv_layer)) == weights + scales + linear == 469_658
    biases = 16+32+64+64+64+128+256
    for layer in (ConvLayer, partial(conv_layer, bn=False)):
        assert param_count(get_cnn_model(LESSON, NFS, layer)) == weights + biases + linear == 469_034
    convs = [(m.in_channels, m.out_channels, m.stride) for m in find_modules(get_cnn_model(LESSON, NFS, conv_layer), is_lin_layer)[:-1]]
    assert convs == [(ni, nf, (1, 1) if ni == 3 else (2, 2)) for ni, nf in channels]

@pytest.mark.parametrize('layer', [conv_layer, ConvLayer])
@pytest.mark.parametrize('size', [(128, 128), (1, 1), (33, 17), (7, 100), (2, 3)], ids=str)
def test_shapes_for_odd_sizes(layer, size):
    model, x = get_cnn_model(LESSON, NFS, layer), torch.randn(2, 3, *size)
    model.eval()
    for m in model[:7]:
        s, x = 1 if m is model[0] else 2, m(x)
        size = tuple(math.ceil(v/s) for v in size)
        assert x.shape[2:] == size
    assert model[7:](x).shape == (2, 10)
    assert model(torch.randn(1, 3, *size)).shape == (1, 10)                      # a batch of one

@pytest.mark.parametrize('c_in,first', [(1, 8), (2, 16), (3, 16), (4, 32), (10, 64)])
def test_the_first_layer_has_at_most_as_many_outputs_as_inputs(c_in, first):
    layers = get_cnn_layers(SimpleNamespace(c_in=c_in, c_out=2), [8], conv_layer)
    assert [l[0].out_channels for l in layers[:4]] == [first, 2*first, 4*first, 8] and first <= 9*c_in < 2*first
    assert isinstance(layers, list)

def test_nfs_may_be_empty_a_number_or_a_tuple_and_stays_as_it_is():
    nfs = [8, 8]
    get_cnn_layers(LESSON, nfs, conv_layer)
    assert nfs == [8, 8]
    for nfs, n in (([], 6), (8, 7), ((8, 9), 8)): assert len(get_cnn_layers(LESSON, nfs, conv_layer)) == n

def test_options_reach_every_layer():
    model = get_cnn_model(LESSON, NFS, conv_layer, leak=.1, sub=.4, maxv=6.)
    acts = find_modules(model, lambda o: isinstance(o, GeneralRelu))
    assert len(acts) == 7 and all((a.leak, round(a.sub.item(), 6), a.maxv) == (.1, .4, 6.) for a in acts)

@pytest.mark.parametrize('missing', ['c_in', 'c_out'])
def test_missing_channels_or_classes_are_named(missing):
    without = SimpleNamespace(c_in=3, c_out=10); delattr(without, missing)
    for data in (without, SimpleNamespace(**{**vars(LESSON), missing: None})):
        for f in (get_cnn_layers, get_cnn_model, lambda d, n, l: get_learn_run(n, d, .1, l)):
            with pytest.raises(ValueError, match=f'data.{missing} is not known: give it to'): f(data, NFS, conv_layer)

@pytest.mark.parametrize('layer', [conv_layer, ConvLayer])
def test_the_whole_model_is_copied_pickled_and_saved(layer):
    model, x = get_cnn_model(LESSON, [8], layer, sub=.3, leak=.1), torch.randn(4, 3, 16, 16)
    model(x); model.eval()
    fresh = get_cnn_model(LESSON, [8], layer, sub=0., leak=.1).eval()
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert bits(other(x), model(x)) and not other.training
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


# init_cnn

def kaiming_std(fan_in, a): return math.sqrt(2/(1+a*a))/math.sqrt(fan_in)

@pytest.mark.parametrize('uniform', [False, True])
@pytest.mark.parametrize('a', [.1, 0., 1.])
@pytest.mark.parametrize('layer,fan_in', [
    (lambda: nn.Conv2d(64, 128, 3), 576), (lambda: nn.Conv2d(64, 512, 1), 64), (lambda: nn.Linear(300, 400), 300),
    (lambda: nn.Conv1d(64, 256, 5), 320), (lambda: nn.Conv2d(64, 256, 3, groups=4), 144), (lambda: nn.Conv2d(64, 256, 3, bias=False), 576)],
    ids=['3x3', '1x1', 'linear', '1d', 'groups', 'no bias'])
def test_init_cnn_statistics(uniform, a, layer, fan_in):
    l = layer()
    init_cnn(nn.Sequential(nn.Sequential(l)), uniform, a)
    w, std = l.weight.detach().double(), kaiming_std(fan_in, a)
    assert w.std().item() == pytest.approx(std, rel=.03) and abs(w.mean().item()) < 5*std/math.sqrt(w.numel())
    assert l.bias is None or not l.bias.any()
    biggest, bound = w.abs().max().item(), std*math.sqrt(3)
    assert bound*.99 < biggest <= bound*(1+1e-6) if uniform else biggest > 3*std    # bounded, or with the tails of a normal distribution

def test_init_cnn_sets_every_layer_of_the_cnn_and_nothing_else():
    model = get_cnn_model(LESSON, NFS, conv_layer, bn=False, sub=.3)
    model.append(nn.BatchNorm1d(10)); nn.init.constant_(model[-1].weight, 5.)
    lins = find_modules(model, is_lin_layer)
    assert all(l.bias.abs().sum() > 0 for l in lins)
    assert init_cnn(model) is None
    assert len(lins) == 8 and not any(l.bias.any() for l in lins)
    for l in lins: assert l.weight.std().item() == pytest.approx(kaiming_std(l.weight[0].numel(), .1), rel=.1)
    assert (model[-1].weight == 5).all() and all(l.weight.requires_grad and l.weight.grad_fn is None for l in lins)
    assert model[0][1].sub.item() == pytest.approx(.3)

def test_init_cnn_is_reproducible():
    model, weights = get_cnn_model(LESSON, [8], conv_layer), []
    for seed in (1, 1, 2): torch.manual_seed(seed); init_cnn(model); weights.append(model[0][0].weight.clone())
    assert bits(weights[0], weights[1]) and not bits(weights[0], weights[2])


# get_learn_run

def some_data(n=48, bs=16, size=8, c_out=4, valid=True, shuffle=True):
    g = torch.Generator().manual_seed(0)
    ds = TensorDataset(torch.randn(n, 3, size, size, generator=g), torch.arange(n) % c_out)
    valid_dl = DataLoader(ds, bs) if valid else None
    return SimpleNamespace(train_dl=DataLoader(ds, bs, shuffle=shuffle), valid_dl=valid_dl, c_in=3, c_out=c_out)

def test_get_learn_run_as_the_lesson_calls_it():
    data, cbfs = some_data(), [partial(AvgStatsCallback, accuracy), Recorder]
    learn, run = get_learn_run([8, 8], data, .2, conv_layer, cbs=cbfs)
    assert type(learn) is TrainBundle and type(run) is Runner and learn.data is data and isinstance(learn.opt, optim.SGD)
    assert learn.opt.param_groups[0]['lr'] == .2 and learn.loss_func is F.cross_entropy
    w = learn.model[1][0].weight
    assert w.std().item() == pytest.approx(kaiming_std(16*9, .1), rel=.1)        # initialized
    before = w.clone()
    run.fit(2, learn)
    assert not torch.equal(w, before) and len(run.recorder.losses) == 6

def test_get_learn_run_passes_its_options_on():
    made = []
    def opt_func(params, lr): made.append(optim.Adam(params, lr=lr)); return made[0]
    learn, run = get_learn_run([8], some_data(), .01, ConvLayer, opt_func=opt_func, leak=.1, sub=.2)
    assert learn.opt is made[0] and learn.opt.param_groups[0]['lr'] == .01 and learn.model[0].relu.leak == .1
    with pytest.raises(TypeError, match='leek'): get_learn_run([8], some_data(), .01, conv_layer, leek=.1)

def test_get_learn_run_learns():
    data = some_data(n=32, shuffle=False)
    learn, run = get_learn_run([16], data, .1, conv_layer, cbs=partial(AvgStatsCallback, accuracy))
    run.logger = lambda row: None
    run.fit(12, learn)
    assert run.avg_stats.train_stats.avg_stats[1] > .9                           # 32 noise pictures, by heart


# model_summary

class Net(nn.Module):
    "Modules in a list, one that is used twice, one that is never called, a parameter of its own, dropout, and several outputs in between."
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([conv_layer(3, 8), conv_layer(8, 8)])
        self.shared, self.unused, self.rnn = nn.Linear(8, 8), nn.Linear(5, 5), nn.LSTM(8, 8, batch_first=True)
        self.scale, self.drop = nn.Parameter(torch.ones(3)), nn.Dropout(.5)

    def forward(self, x):
        for b in self.blocks: x = b(x)
        x = self.shared(x.mean((2, 3))).relu()
        return self.shared(self.drop(self.rnn(x[:, None])[0][:, 0]))

class Raises(nn.Module):
    def forward(self, x):
        torch.rand(3); np.random.rand(); random.random()
        raise ZeroDivisionError('in the model')

class NoisyBatches(Callback):
    "Draws from every generator while it prepares a batch."
    def begin_batch(self): self.run.xb = self.xb + torch.randn(1)*np.random.rand()*random.random()*0

class SmallLearner(TrainLoop):
    "What a Learner is to `model_summary`: one object that has model, data and loop."
    def __init__(self, model, data, **kwargs): self.model, self.data = model, data; super().__init__(**kwargs)

def cnn(): return nn.Sequential(*get_cnn_layers(SimpleNamespace(c_in=3, c_out=4), [8], conv_layer), nn.Dropout(.5))

def mixed_modes(model):
    for i, m in enumerate(model.modules()): m.training = i % 2 == 0
    return model

def state(model):
    "All that a look at the model must leave alone."
    py, (name, keys, *rest) = random.getstate(), np.random.get_state()
    return ({k: v.clone() for k, v in model.state_dict().items()}, [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [m.training for m in model.modules()], torch.get_rng_state(), py, (name, keys.tolist(), rest),
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()], [p.requires_grad for p in model.parameters()])

def same(a, b):
    if isinstance(a, torch.Tensor): return bits(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

MODES = dict(train=lambda m: m.train(), eval=lambda m: m.eval(), mixed=mixed_modes)
def as_runner(model, data, cbs, **kw):
    learn, run = get_runner(model, data, cbs=cbs)
    model_summary(run, learn, data, **kw)
def as_learner(model, data, cbs, **kw): model_summary(SmallLearner(model, data, cb_funcs=cbs), **kw)
FORMS = dict(runner=as_runner, learner=as_learner)
forms = pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)

def table(text):
    "The printed table, as rows of texts: columns are two blanks apart."
    return [re.split(r'\s{2,}', line.strip()) for line in text.splitlines()]

@forms
@pytest.mark.parametrize('find_all', [False, True])
@pytest.mark.parametrize('mode', MODES.values(), ids=MODES)
@pytest.mark.parametrize('make', [cnn, Net], ids=['cnn', 'Net'])
def test_summary_changes_nothing_to_the_bit(make, mode, find_all, form, capsys):
    model, data = make(), some_data()
    model(torch.randn(4, 3, 8, 8)).sum().backward()                             # gradients, and statistics that are not the first ones
    mode(model)
    before = state(model)
    form(model, data, [NoisyBatches], find_all=find_all)
    assert same(state(model), before)
    assert len(table(capsys.readouterr().out)) > 5
    next(iter(data.train_dl)); assert not same(state(model), before)             # the comparison sees one drawn number

@forms
def test_training_goes_on_as_if_nobody_had_looked(form):
    def weights(look):
        torch.manual_seed(3)
        data, model = some_data(), cnn()
        learn, run = get_runner(model, data, lr=.1)
        run.fit(1, learn)
        if look: form(model, data, None)
        run.fit(1, learn)
        return model.state_dict()
    assert same(weights(False), weights(True))

@forms
@pytest.mark.parametrize('find_all', [False, True])
def test_a_model_that_raises_leaves_nothing_behind(form, find_all, capsys):
    model = mixed_modes(nn.Sequential(conv_layer(3, 8), nn.Dropout(.5), Raises()))
    before = state(model)
    with pytest.raises(ZeroDivisionError, match='in the model'): form(model, some_data(), [NoisyBatches], find_all=find_all)
    assert same(state(model), before) and capsys.readouterr().out == ''

@forms
def test_a_callback_that_raises_leaves_nothing_behind(form):
    class Bad(Callback):
        def begin_batch(self): torch.rand(1); raise ZeroDivisionError('in a callback')
    model = mixed_modes(cnn())
    before = state(model)
    with pytest.raises(ZeroDivisionError, match='in a callback'): form(model, some_data(), [Bad])
    assert same(state(model), before)

@forms
def test_summary_of_the_cnn(form, capsys):
    form(get_cnn_model(LESSON, NFS, conv_layer), SimpleNamespace(train_dl=None, valid_dl=[(torch.randn(2, 3, 128, 128), None)]), None)
    assert table(capsys.readouterr().out) == [
        ['layer', 'output', 'parameters'],
        ['0 Sequential', '2x16x128x128', '464'], ['1 Sequential', '2x32x64x64', '4,672'], ['2 Sequential', '2x64x32x32', '18,560'],
        ['3 Sequential', '2x64x16x16', '36,992'], ['4 Sequential', '2x64x8x8', '36,992'], ['5 Sequential', '2x128x4x4', '73,984'],
        ['6 Sequential', '2x256x2x2', '295,424'], ['7 AdaptiveAvgPool2d', '2x256x1x1', '0'], ['8 Lambda', '2x256', '0'],
        ['9 Linear', '2x10', '2,570'], ['all', '469,658']]

@pytest.mark.parametrize('find_all', [dict(find_all=True), True], ids=['by name', 'second of a Learner'])
def test_find_all(find_all, capsys):
    learn = SmallLearner(get_cnn_model(LESSON, [8], conv_layer), some_data())
    model_summary(learn, find_all) if find_all is True else model_summary(learn, **find_all)
    assert table(capsys.readouterr().out)[1:] == [
        ['0.0 Conv2d', '16x16x8x8', '432'], ['1.0 Conv2d', '16x32x4x4', '4,608'], ['2.0 Conv2d', '16x64x2x2', '18,432'],
        ['3.0 Conv2d', '16x8x1x1', '4,608'], ['6 Linear', '16x10', '90'], ['all', '28,410']]

def test_summary_shows_what_is_shared_listed_unreached_or_no_tensor(capsys):
    model = Net()
    model_summary(SmallLearner(model, some_data()))
    rows = table(capsys.readouterr().out)[1:]
    assert rows == [['blocks.0 Sequential', '16x8x4x4', '232'], ['blocks.1 Sequential', '16x8x2x2', '592'], ['shared Linear', '16x8', '72'],
                    ['rnn LSTM', '16x1x8, 1x16x8, 1x16x8', '576'], ['drop Dropout', '16x8', '0'], ['shared Linear', '16x8', 'again'],
                    ['unused Linear', 'not called', '30'], ['all', f'{param_count(model):,}']]
    numbers = [int(r[-1].replace(',', '')) for r in rows if r[-1] != 'again']
    assert sum(numbers[:-1]) + 3 == numbers[-1]                                  # the 3 are the model's own

@pytest.mark.parametrize('container', [nn.Sequential, lambda *ms: nn.Sequential(nn.Identity(), *ms)], ids=['first', 'second'])
def test_a_layer_under_two_parents_gets_a_row_a_call(container, capsys):
    l = nn.Linear(8, 8, bias=False)
    model_summary(SmallLearner(nn.Sequential(container(l), container(l)), some_data()), True)
    name = '0.0 Linear' if container is nn.Sequential else '0.1 Linear'
    assert table(capsys.readouterr().out)[1:] == [[name, '16x3x8x8', '64'], [name, '16x3x8x8', 'again'], ['all', '64']]
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.ModuleList([l]), nn.ModuleList([l])
        def forward(self, x): return self.b[0](self.a[0](x))
    model_summary(SmallLearner(Two(), some_data()))
    assert table(capsys.readouterr().out)[1:] == [['a.0 Linear', '16x3x8x8', '64'], ['a.0 Linear', '16x3x8x8', 'again'], ['all', '64']]

def test_summary_of_one_layer_of_long_names_and_of_a_number(capsys):
    model_summary(SmallLearner(nn.Linear(8, 2), some_data()))
    assert table(capsys.readouterr().out)[1] == ['Linear', '16x3x8x2', '18']
    class AModuleWithAVeryLongNameIndeed(nn.Module):
        def forward(self, x): return x.mean()
    model_summary(SmallLearner(nn.Sequential(AModuleWithAVeryLongNameIndeed()), some_data()))
    out = capsys.readouterr().out
    assert table(out)[1] == ['0 AModuleWithAVeryLongNameIndeed', 'one number', '0'] and len({len(l) for l in out.splitlines()}) == 1

def test_summary_sees_the_batch_as_the_callbacks_make_it(capsys):
    data = some_data()
    data.valid_dl = DataLoader(TensorDataset(torch.randn(6, 192), torch.zeros(6).long()), 6)
    learn, run = get_runner(conv_layer(3, 8), data, cbs=[partial(BatchTransformXCallback, view_tfm(3, 8, 8)), partial(CudaCallback, 'cpu')])
    model_summary(run, learn, data)
    assert table(capsys.readouterr().out)[1] == ['0 Conv2d', '6x8x4x4', '216']
    assert run.xb is None and run.yb is None

def test_without_a_validation_set_the_training_set_serves(capsys):
    learn, run = get_runner(cnn(), some_data(valid=False))
    model_summary(run, learn, learn.data)
    assert table(capsys.readouterr().out)[1][1] == '16x16x8x8'

def test_summary_after_a_fit_needs_the_runner_alone(capsys):
    learn, run = get_runner(cnn(), some_data(), lr=.01)
    with pytest.raises(TypeError, match=r'takes \(run, learn, data\).*Runner has no model'): model_summary(run)
    run.fit(1, learn)
    model_summary(run)
    model_summary(run, learn)
    out = capsys.readouterr().out
    assert out[:len(out)//2] == out[len(out)//2:]

def test_summary_of_a_model_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match='or a Learner alone, and Sequential has no model'): model_summary(cnn())


# CUDA

@pytest.mark.cuda
def test_summary_on_cuda_changes_nothing(capsys):
    model = mixed_modes(cnn()).cuda()
    before, on_cuda = state(model), torch.cuda.get_rng_state()
    model_summary(SmallLearner(model, some_data()))                              # the batch comes from the CPU
    model_summary(SmallLearner(model, some_data(), cb_funcs=[CudaCallback]), True)
    assert same(state(model), before) and torch.equal(torch.cuda.get_rng_state(), on_cuda)
    assert table(capsys.readouterr().out)[1] == ['0 Sequential', '16x16x8x8', '464']
    model_summary(SmallLearner(model.cpu(), some_data(), cb_funcs=[CudaCallback]))  # the batch is on the device, the model not yet

@pytest.mark.cuda
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_layers_on_cuda(dtype):
    l = ConvLayer(3, 8, leak=.1, sub=.5).cuda().to(dtype)
    assert l.relu.sub.device.type == 'cuda' and l.relu.sub.dtype == dtype
    l.bias -= .25
    l.bias -= torch.tensor(.25, device='cuda')
    l.bias -= torch.tensor(.25)                                                  # a number from the CPU
    assert l.bias.device.type == 'cuda' and l.bias.item() == -1.25
    x = torch.randn(4, 3, 16, 16, device='cuda').to(dtype)
    exact = copy.deepcopy(l).cpu().double()(x.cpu().double())
    torch.testing.assert_close(l(x).cpu().double(), exact, rtol=2e-2, atol=2e-2)
    l(x).float().sum().backward()

@pytest.mark.cuda
def test_cnn_trains_on_cuda():
    learn, run = get_learn_run([16], some_data(n=32), .1, conv_layer, cbs=[CudaCallback, partial(AvgStatsCallback, accuracy)])
    run.logger = lambda row: None
    run.fit(12, learn)
    assert all(p.device.type == 'cuda' for p in learn.model.parameters()) and run.avg_stats.train_stats.avg_stats[1] > .9
