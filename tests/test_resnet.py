"""Proves the residual network: parameters against a formula and against torch's own blocks written out by hand; that at first each block
is its path, to the bit; that gradients are right in float64 and reach everything; that it works with what chapters before it made
(summary, hooks, LSUV, channels_last, pickles); and that it learns a few images of Shapes."""
import copy, math, pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dl2lib.callbacks import AvgStatsCallback, BatchTransformXCallback, ChannelsLastCallback, CudaCallback, ParamScheduler, accuracy
from dl2lib.convnet import ConvLayer, GeneralRelu, conv_layer, model_summary, prev_pow_2
from dl2lib.hooks import ActivationStats, Hooks, append_stat, find_modules, is_lin_layer
from dl2lib.lsuv import lsuv_init
from dl2lib.resnet import ResBlock, get_resnet_layers, get_resnet_model, identity_path
from dl2lib.runner import get_runner
from dl2lib.schedules import combine_scheds, cos_1cycle_anneal

IMAGENETTE = SimpleNamespace(c_in=3, c_out=10)
SMALL = dict(nfs=(64, 96), n_blocks=1)

@pytest.fixture(autouse=True)
def seeded():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(n)

def blocks(model): return find_modules(model, lambda m: isinstance(m, ResBlock))
def gammas(model): return [b.convs[1][-1].weight for b in blocks(model)]

def awake(model): # as after some training: no block is nothing any more
    for g in gammas(model): nn.init.normal_(g, 1., .1)
    return model


# The path

@pytest.mark.parametrize('size', [1, 2, 3, 7, 8])
@pytest.mark.parametrize('stride', [1, 2, 3])
def test_path_and_layer_have_one_shape(size, stride):
    x = torch.randn(2, 5, size, size+1)
    for nf in 5, 6: assert identity_path(5, nf, stride)(x).shape == conv_layer(5, nf, 3, stride)(x).shape

def test_path_where_nothing_changes_is_nothing():
    x = torch.randn(2, 5, 7, 7)
    assert identity_path(5, 5)(x) is x and not list(identity_path(5, 5).parameters())

@pytest.mark.parametrize('size', [6, 7])
def test_path_leaves_no_pixel_out_and_keeps_what_is_constant(size):
    x = torch.ones(1, 2, size, size, requires_grad=True)
    path = identity_path(2, 2, 2)
    out = path(x)
    assert torch.equal(out, torch.ones_like(out))
    out.sum().backward()
    assert (x.grad > 0).all()
    for h in range(size//2):
        y = torch.randn(1, 2, size, size)
        torch.testing.assert_close(path(y)[:, :, h, h], y[:, :, 2*h:2*h+2, 2*h:2*h+2].mean((2, 3)))

def test_path_that_changes_channels_is_one_matrix_for_all_pixels():
    path, x = identity_path(4, 6), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(path(x), torch.einsum('oi,nihw->nohw', path[0].weight[:, :, 0, 0], x))


# The block

@pytest.mark.parametrize('ni,nf,stride', [(8, 8, 1), (8, 8, 2), (8, 12, 1), (3, 12, 2), (8, 4, 3)])
@pytest.mark.parametrize('train', [True, False])
def test_at_first_a_block_is_its_path(ni, nf, stride, train):
    block, x = ResBlock(ni, nf, stride).train(train), torch.randn(4, ni, 9, 10)
    assert torch.equal(block(x), block.path(x))
    nn.init.ones_(block.convs[1][-1].weight)
    assert not torch.equal(block(x), block.path(x))

def test_block_against_the_same_in_torchs_functions():
    block = awake(nn.Sequential(ResBlock(4, 6, 2)))[0].double()
    x = torch.randn(5, 4, 9, 9, dtype=torch.float64)
    h, p = x, dict(block.named_parameters())
    for i, stride in (0, 2), (1, 1):
        h = F.relu(F.conv2d(h, p[f'convs.{i}.0.weight'], stride=stride, padding=1))
        h = F.batch_norm(h, None, None, p[f'convs.{i}.2.weight'], p[f'convs.{i}.2.bias'], training=True)
    want = h + F.conv2d(F.avg_pool2d(x, 2, ceil_mode=True), p['path.1.weight'])
    torch.testing.assert_close(block(x), want, rtol=1e-12, atol=1e-12)
    assert set(p) == {f'convs.{i}.{k}' for i in (0, 1) for k in ('0.weight', '2.weight', '2.bias')} | {'path.1.weight'}

@pytest.mark.parametrize('ni,nf,stride', [(2, 2, 1), (2, 3, 2)])
def test_block_gradients_in_float64(ni, nf, stride):
    block = awake(nn.Sequential(ResBlock(ni, nf, stride, options=dict(leak=.1))))[0].double() # with a leak there is a slope nearly everywhere
    x = torch.randn(3, ni, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), eps=1e-7, atol=1e-4)

def test_a_block_begins_to_learn_with_its_last_gamma():
    block, x = ResBlock(8, 8), torch.randn(4, 8, 6, 6)
    opt, had = torch.optim.SGD(block.parameters(), lr=.1), []
    for _ in range(2):
        block(x).pow(3).mean().backward()
        had.append([p.grad.abs().sum().item() > 0 for p in (block.convs[0][0].weight, block.convs[1][0].weight, block.convs[1][-1].weight)])
        opt.step(); opt.zero_grad()
    assert had == [[False, False, True], [True, True, True]]

def bn_first(ni, nf, ks=3, stride=2, **kwargs):
    conv, act, bn = conv_layer(ni, nf, ks, stride, **kwargs)
    return nn.Sequential(conv, bn, act)

def without_weights(ni, nf, ks=3, stride=2): return nn.Sequential(nn.Conv2d(ni, nf, ks, stride, ks//2), nn.BatchNorm2d(nf, affine=False))

@pytest.mark.parametrize('layer,options,why', [(bn_first, None, 'bn_first ends with GeneralRelu'), (conv_layer, dict(bn=False), 'conv_layer ends with GeneralRelu'),
                                               (ConvLayer, None, 'ConvLayer ends with GeneralRelu'), (without_weights, None, 'ends with BatchNorm2d')])
def test_a_layer_that_could_never_wake_up_is_refused(layer, options, why):
    with pytest.raises(ValueError, match=why): ResBlock(4, 4, layer=layer, options=options)

def test_a_block_keeps_its_arguments_and_is_made_anew_from_them():
    block = ResBlock(4, 6, 2, conv_layer, dict(leak=.1, sub=.4))
    again = ResBlock(**{k: getattr(block, k) for k in ('ni', 'nf', 'stride', 'layer', 'options')})
    again.load_state_dict(block.state_dict())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block.eval()(x), again.eval()(x)) and '4, 6, stride=2' in repr(block)


# The network

def n_params(c_in, c_out, nfs, depths):
    def layer(ni, nf): return 9*ni*nf + 2*nf
    l1 = prev_pow_2(9*c_in)
    n, last = layer(c_in, l1) + layer(l1, 2*l1) + layer(2*l1, 4*l1), 4*l1
    for nf, depth in zip(nfs, depths):
        n += layer(last, nf) + (2*depth-1)*layer(nf, nf) + (last*nf if last != nf else 0)
        last = nf
    return n + 2*last + last*c_out + c_out

@pytest.mark.parametrize('c_in,c_out,nfs,depths', [(3, 10, (64, 128, 256, 512), [2]*4), (3, 10, (64,), [3]), (1, 7, (16, 24, 40), [1, 2, 3]), (4, 2, (32, 32), [1, 1])])
def test_parameters_and_shapes(c_in, c_out, nfs, depths):
    data = SimpleNamespace(c_in=c_in, c_out=c_out)
    model = get_resnet_model(data, nfs, depths)
    assert sum(p.numel() for p in model.parameters()) == n_params(c_in, c_out, nfs, depths)
    assert len(blocks(model)) == sum(depths) and len(model) == 3 + sum(depths) + 5
    for size in (1, 2, 17, 40): assert model.eval()(torch.randn(2, c_in, size, size+1)).shape == (2, c_out)

def test_as_many_parameters_as_torchvisions_resnet18_and_as_many_multiplications():
    from torchvision.models import resnet18
    def costs(m):
        n, hooks = [0], []
        for l in find_modules(m, is_lin_layer):
            hooks.append(l.register_forward_hook(lambda l, i, o: n.__setitem__(0, n[0] + l.weight.numel()*o[0].numel()//l.weight.shape[0])))
        with torch.no_grad(): m.eval()(torch.zeros(1, 3, 128, 128))
        for h in hooks: h.remove()
        return sum(p.numel() for p in m.parameters()), n[0]
    (n, mults), (n18, mults18) = costs(get_resnet_model(IMAGENETTE)), costs(resnet18(num_classes=10))
    assert n == pytest.approx(n18, rel=.01) and mults == pytest.approx(mults18, rel=.01)

def test_where_the_picture_shrinks():
    sizes, model = [], get_resnet_model(IMAGENETTE).eval()
    with torch.no_grad(), Hooks(model, lambda h, m, i, o: sizes.append(tuple(o.shape[1:]))): model(torch.zeros(1, 3, 128, 128))
    assert sizes[:3] == [(16, 64, 64), (32, 64, 64), (64, 32, 32)] and sizes[-1] == (10,)
    assert sizes[3:11] == [(nf, s, s) for nf, s in ((64, 32), (128, 16), (256, 8), (512, 4)) for _ in range(2)]

def test_first_weights():
    model = get_resnet_model(IMAGENETTE)
    assert all((g == 0).all() for g in gammas(model)) and len(gammas(model)) == 8
    for l in find_modules(model, is_lin_layer):
        fan_in = l.weight[0].numel()
        if l.weight.numel() > 5000: assert l.weight.std().item() == pytest.approx((2/1.01/fan_in)**.5, rel=.05)
        if l.bias is not None: assert (l.bias == 0).all()
    others = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d) and not any(m.weight is g for g in gammas(model))]
    assert len(others) == 3+8+1 and all((w == 1).all() for w in others)

def test_at_first_all_classes_are_about_equally_likely():
    model, x = get_resnet_model(IMAGENETTE), torch.randn(16, 3, 64, 64)
    assert F.cross_entropy(model(x), torch.arange(16) % 10).item() == pytest.approx(math.log(10), abs=.5)

def test_the_same_seed_gives_the_same_weights():
    def make(seed):
        torch.manual_seed(seed)
        return list(get_resnet_model(IMAGENETTE, **SMALL).state_dict().values())
    assert all(map(torch.equal, make(3), make(3))) and not all(map(torch.equal, make(3), make(4)))

def test_the_whole_network_is_at_first_its_stem_and_paths():
    model, x = get_resnet_model(IMAGENETTE, (64, 96), 2), torch.randn(4, 3, 32, 32)
    bare = nn.Sequential(*(m.path if isinstance(m, ResBlock) else m for m in copy.deepcopy(model)))
    assert torch.equal(model(x), bare(x))

def test_gradients_reach_everything_once_the_blocks_are_awake():
    model, x = awake(get_resnet_model(IMAGENETTE, **SMALL)).double(), torch.randn(8, 3, 32, 32, dtype=torch.float64)
    out = model(x)
    assert out.dtype == torch.float64 and out.isfinite().all()
    F.cross_entropy(out, torch.arange(8)).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0 or not p.grad.isfinite().all()]
    assert not still

def test_options_reach_every_layer():
    model = get_resnet_model(IMAGENETTE, **SMALL, leak=.1, sub=.4)
    acts = find_modules(model, lambda m: isinstance(m, GeneralRelu))
    assert len(acts) == 3+2*2+1 and all(a.leak == .1 and a.sub == pytest.approx(.4) for a in acts[:-1])

def test_layers_are_the_models():
    layers, model = get_resnet_layers(IMAGENETTE, **SMALL), get_resnet_model(IMAGENETTE, **SMALL)
    assert list(map(repr, layers)) == list(map(repr, model))

@pytest.mark.parametrize('bad,why', [(dict(n_blocks=[1, 2]), r'n_blocks=\[1, 2\] for nfs'), (dict(n_blocks=0), 'one block or more'),
                                     (dict(n_blocks=[2, 2, 0, 2]), 'one block or more'), (dict(nfs=()), r'nfs=\[\]')])
def test_what_does_not_fit_is_named(bad, why):
    with pytest.raises(ValueError, match=why): get_resnet_model(IMAGENETTE, **bad)

@pytest.mark.parametrize('missing', ['c_in', 'c_out'])
def test_missing_channels_or_classes_are_named(missing):
    data = SimpleNamespace(c_in=3, c_out=10)
    setattr(data, missing, None)
    with pytest.raises(ValueError, match=f'data.{missing} is not known'): get_resnet_model(data)


# With what is there already

def test_it_is_copied_pickled_and_saved():
    model, x = awake(get_resnet_model(IMAGENETTE, **SMALL)), torch.randn(2, 3, 32, 32)
    model(x)
    model.eval()
    fresh = get_resnet_model(IMAGENETTE, **SMALL).eval()
    fresh.load_state_dict(model.state_dict())
    for other in copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh: assert torch.equal(other(x), model(x))

def test_channels_last_gives_the_same():
    model, x = awake(get_resnet_model(IMAGENETTE, **SMALL)).eval(), torch.randn(2, 3, 33, 32)
    want = model(x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    got = last[:-3](x.contiguous(memory_format=torch.channels_last)) # before the pooling
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-4)

def test_bfloat16():
    model, x = awake(get_resnet_model(IMAGENETTE, **SMALL)).eval(), torch.randn(2, 3, 32, 32)
    want, got = model(x), copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16 and (got.float()-want).abs().max() < .1*want.abs().max()

def some_data(n=64, size=32, c_out=10):
    g = torch.Generator().manual_seed(1)
    y = torch.arange(n) % c_out
    x = torch.randn(c_out, 3, size, size, generator=g)[y] + .5*torch.randn(n, 3, size, size, generator=g)
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    return SimpleNamespace(train_dl=dl, valid_dl=dl, c_in=3, c_out=c_out)

def test_model_summary(capsys):
    data = some_data()
    learn, run = get_runner(get_resnet_model(data, **SMALL), data)
    model_summary(run, learn, data)
    rows = [l.split() for l in capsys.readouterr().out.splitlines()]
    assert [r[1] for r in rows[1:-1]] == ['Sequential']*3 + ['ResBlock']*2 + ['BatchNorm2d', 'GeneralRelu', 'AdaptiveAvgPool2d', 'Lambda', 'Linear']
    assert rows[4][2] == '16x64x8x8' and rows[5][2] == '16x96x4x4' and rows[-1][-1] == f'{n_params(3, 10, (64, 96), [1, 1]):,}'
    model_summary(run, learn, data, find_all=True)
    assert capsys.readouterr().out.count('Conv2d') == 3+2+3

def test_lsuv_sets_every_layer_and_leaves_the_zeros():
    data = some_data()
    model = get_resnet_model(data, (64, 96), 2)
    xb = next(iter(data.train_dl))[0]
    report = lsuv_init(model, xb)
    assert len(report) == 3+8+1+1 and all(r.state != 'refused' and abs(r.std-1) < 1e-3 for r in report)
    assert all((g == 0).all() for g in gammas(model))
    stds = []
    with torch.no_grad(), Hooks(find_modules(model.train(), is_lin_layer), append_stat) as hooks:
        model(xb)
        stds = [h.std for h in hooks]
    assert all(abs(s-1) < 2e-3 for s in stds)

def test_activation_stats_see_every_activation():
    data = some_data()
    stats = ActivationStats()
    learn, run = get_runner(get_resnet_model(data, **SMALL), data, lr=.05)
    run.add_cbs(stats)
    run.fit(1, learn)
    assert len(stats.layers) == 3+4+1 and stats.means.shape == (8, 4) and stats.means.isfinite().all() and not stats.nonfinite()
    assert not any(m._forward_hooks for m in learn.model.modules())

def test_it_learns_a_few_shapes(tmp_path_factory):
    import numpy as np, PIL.Image
    from dl2lib.datasets import shapes
    path = shapes(tmp_path_factory.mktemp('shapes'), n_train=600, n_valid=200)
    def side(split):
        files = sorted((path/split).glob('*/*.jpg'))
        classes = sorted({f.parent.name for f in files})
        x = torch.stack([torch.from_numpy(np.array(PIL.Image.open(f).resize((40, 40)))) for f in files]).permute(0, 3, 1, 2).float()/255
        return torch.utils.data.TensorDataset((x-.5)/.25, torch.tensor([classes.index(f.parent.name) for f in files]))
    dls = [torch.utils.data.DataLoader(side(s), batch_size=25, shuffle=s == 'train') for s in ('train', 'val')]
    data = SimpleNamespace(train_dl=dls[0], valid_dl=dls[1], c_in=3, c_out=10)
    sched = combine_scheds([.3, .7], cos_1cycle_anneal(4e-4, 4e-3, 4e-6))
    learn, run = get_runner(get_resnet_model(data, **SMALL), data, opt_func=torch.optim.Adam,
                            cbs=[partial(AvgStatsCallback, accuracy), ChannelsLastCallback, partial(ParamScheduler, 'lr', sched)])
    run.fit(6, learn)
    train, valid = (s.avg_stats for s in (run.avg_stats.train_stats, run.avg_stats.valid_stats))
    assert valid[1] > .2 and train[1] > .4, (train, valid) # guessing gives .1, with a deviation of .02
    assert all((g != 0).any() for g in gammas(learn.model))

def test_a_learner_with_it_is_exported_and_loaded(tmp_path):
    import PIL.Image
    from dl2lib.datablock import (ByteToFloat, CategoryProcessor, ImageList, ResizeFixed, SplitData, label_by_func, norm_imagenette,
                                  random_splitter, to_byte_tensor)
    from dl2lib.inference import load_learner
    from dl2lib.learner import Learner
    for i in range(20): PIL.Image.new('RGB', (40, 40), (i*12, 100, 200)).save(tmp_path/f'{i}.png')
    def label(fn): return int(fn.stem) % 2
    sd = SplitData.split_by_func(ImageList.from_files(tmp_path, tfms=[ResizeFixed(32), to_byte_tensor]), random_splitter)
    data = label_by_func(sd, label, proc_y=CategoryProcessor()).to_databunch(8, c_in=3)
    learn = Learner(get_resnet_model(data, **SMALL, leak=.1), data, F.cross_entropy, cbs=[BatchTransformXCallback([ByteToFloat(), norm_imagenette])])
    learn.fit(1)
    learn.export(tmp_path/'out.pt')
    a, b = (l.predict(tmp_path/'3.png') for l in (learn, load_learner(tmp_path/'out.pt')))
    assert a.label == b.label and torch.equal(a.probs, b.probs)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_it_trains_on_cuda_and_agrees_with_the_cpu():
    data = some_data()
    model = awake(get_resnet_model(data, **SMALL))
    x = next(iter(data.train_dl))[0]
    want = copy.deepcopy(model).eval()(x)
    torch.testing.assert_close(copy.deepcopy(model).eval().cuda()(x.cuda()).cpu(), want, rtol=1e-2, atol=1e-2)
    learn, run = get_runner(model, data, lr=.05, cbs=[partial(AvgStatsCallback, accuracy), partial(CudaCallback, 'cuda'), ChannelsLastCallback])
    run.fit(3, learn)
    assert run.avg_stats.train_stats.avg_stats[1] > .3 and all(p.is_cuda for p in model.parameters())
