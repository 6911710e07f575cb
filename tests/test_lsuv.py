"LSUV: every layer within 1e-3, the same as numpy, and what must not happen."
import copy, random

import numpy as np
import pytest
import torch
from torch import nn

from dl2lib.convnet import ConvLayer, GeneralRelu
from dl2lib.hooks import find_modules, is_lin_layer
from dl2lib.lsuv import LSUVReport, lsuv_init, lsuv_module

TOL = 1e-3


@pytest.fixture(autouse=True, scope='module')
def one_thread(): # thousands of small convolutions: more threads only wait for each other
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


class Noisy(nn.Module):
    "A layer with its activation and its own dropout inside, and a bias that is a plain number."
    def __init__(self, ni, nf, p=0.):
        super().__init__()
        self.lin, self.bias, self.drop = nn.Linear(ni, nf, bias=False), 0., nn.Dropout(p)
    weight = property(lambda self: self.lin.weight)
    def forward(self, x): return self.drop(torch.tanh(self.lin(x))) + self.bias


class Block(nn.Module):
    "A small transformer block."
    def __init__(self, d=32, p=0.):
        super().__init__()
        self.n1, self.n2, self.d = nn.LayerNorm(d), nn.LayerNorm(d), d
        self.qkv, self.proj, self.up, self.down = nn.Linear(d, 3*d), nn.Linear(d, d), nn.Linear(d, 4*d), nn.Linear(4*d, d)
        self.drop = nn.Dropout(p)
    def forward(self, x):
        q, k, v = self.qkv(self.n1(x)).split(self.d, -1)
        x = x + self.drop(self.proj((q @ k.transpose(1, 2)/self.d**.5).softmax(-1) @ v))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.n2(x)))))


def cnn(n, kind='plain', nf=16, p=0.):
    ls, ni = [], 3
    for i in range(n):
        stride = 2 if i in (2, 5) else 1
        if kind == 'ConvLayer': ls.append(ConvLayer(ni, nf, 3, stride=stride))
        else:
            ls.append(nn.Conv2d(ni, nf, 3, padding=1, stride=stride, bias=kind != 'no bias'))
            if kind == 'BatchNorm': ls.append(nn.BatchNorm2d(nf))
            ls.append(nn.ReLU(inplace=True))
        if p: ls.append(nn.Dropout(p))
        ni = nf
    return nn.Sequential(*ls, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(nf, 10))


def make(name, p=0.):
    torch.manual_seed(0)
    if name == 'resnet34':
        import torchvision
        return torchvision.models.resnet34(weights=None), torch.randn(4, 3, 64, 64)
    if name == 'block': return nn.Sequential(Block(p=p), Block(p=p)), torch.randn(4, 9, 32)
    if name == 'torch block':
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=p, batch_first=True), 2), torch.randn(4, 9, 32)
    n, kind = name.split(' ', 1)
    return cnn(int(n), kind, p=p), torch.randn(8, 3, 16, 16)


def outputs(model, mods, x):
    "The outputs of `mods` in training mode, by hooks of this file; buffers and mode are put back."
    state, mode, res = copy.deepcopy(model.state_dict()), model.training, {}
    hs = [m.register_forward_hook(lambda m, i, o: res.__setitem__(m, o.double().flatten().clone())) for m in mods]
    with torch.no_grad(): model.train()(x)
    for h in hs: h.remove()
    model.load_state_dict(state); model.train(mode)
    return res


def measured(model, mods, x): return {m: (o.mean().item(), o.std().item()) for m, o in outputs(model, mods, x).items()}


def check_all(model, x, report, mods=None, tol=TOL):
    mods = mods or find_modules(model, is_lin_layer)
    assert len(report) == len(mods) and not report.refused, report
    rng = torch.get_rng_state()
    seen = measured(model, mods, x)
    torch.set_rng_state(rng)
    names = {m: k for k, m in model.named_modules()}
    rows = {r.name: r for r in report}
    for m in mods:
        r = rows[names[m]]
        if m not in seen: # attention uses its out_proj without calling it
            assert names[m].endswith('out_proj') and abs(r.mean) < tol and abs(r.std-1) < tol
            continue
        mean, std = seen[m]
        assert abs(std-1) < tol, (r, std)
        assert r.std == pytest.approx(std, abs=1e-5) and r.mean == pytest.approx(mean, abs=1e-5)
        if m.bias is None: assert r.state == 'no bias'
        else: assert r.state == 'converged' and abs(mean) < tol, (r, mean)


NAMES = [f'{n} {kind}' for n in (10, 50) for kind in ('plain', 'ConvLayer', 'BatchNorm', 'no bias')] + ['resnet34', 'block', 'torch block']


@pytest.mark.parametrize('p', [0., .2])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('name', NAMES)
def test_every_layer(name, dtype, p):
    if p and name == 'resnet34': pytest.skip('has no dropout')
    model, x = make(name, p)
    model, x = model.to(dtype), x.to(dtype)
    check_all(model, x, lsuv_init(model, x))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', [n for n in NAMES if n != 'resnet34'])
def test_half_precision(name, dtype):
    model, x = make(name)
    model, x = model.to(dtype), x.to(dtype)
    check_all(model, x, lsuv_init(model, x))
    assert all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('n', [10, 50])
def test_conv_layer_as_a_whole(n, dtype):
    model, x = make(f'{n} ConvLayer', p=.1)
    model, x = model.to(dtype), x.to(dtype)
    mods = find_modules(model, lambda o: isinstance(o, ConvLayer))
    for given in (ConvLayer, mods, lambda o: isinstance(o, ConvLayer)):
        check_all(model, x, lsuv_init(model, x, given), mods)
    assert all(m.relu.sub.item() != 0 and m.relu.sub.dtype == dtype for m in mods)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', NAMES)
def test_every_layer_cuda(name, dtype):
    model, x = make(name, .1)
    model, x = model.to('cuda', dtype), x.to('cuda', dtype)
    rng = torch.cuda.get_rng_state()
    report = lsuv_init(model, x.cpu()) # the batch is moved to the model
    assert torch.equal(rng, torch.cuda.get_rng_state())
    torch.cuda.set_rng_state(rng)
    check_all(model, x, report)
    if 'ConvLayer' in name:
        report = lsuv_init(model, x, ConvLayer)
        torch.cuda.set_rng_state(rng)
        check_all(model, x, report, find_modules(model, lambda o: isinstance(o, ConvLayer)))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_cuda_autocast():
    model, x = make('10 plain')
    model, x = model.cuda(), x.cuda()
    with torch.autocast('cuda'): check_all(model, x, lsuv_init(model, x))


def test_autocast():
    model, x = make('10 plain')
    with torch.autocast('cpu', dtype=torch.bfloat16): check_all(model, x, lsuv_init(model, x))


def test_against_numpy():
    rng = np.random.default_rng(0)
    x, w1, w2 = rng.normal(size=(20, 6))*3 + 1, rng.normal(size=(9, 6)), rng.normal(size=(4, 9))
    b1, b2 = rng.normal(size=9), rng.normal(size=4)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).double()
    for p, v in zip(model.parameters(), (w1, b1, w2, b2)): p.data = torch.tensor(v)
    report = lsuv_init(model, torch.tensor(x))
    y1 = x @ w1.T + b1
    before = y1.mean(), y1.std(ddof=1)
    w1, b1 = w1/before[1], (b1 - before[0])/before[1]
    h = np.maximum(x @ w1.T + b1, 0)
    y2 = h @ w2.T + b2
    w2, b2 = w2/y2.std(ddof=1), (b2 - y2.mean())/y2.std(ddof=1)
    for p, v in zip(model.parameters(), (w1, b1, w2, b2)): np.testing.assert_allclose(p.detach().numpy(), v, rtol=1e-10, atol=1e-12)
    assert (report[0].mean_before, report[0].std_before) == pytest.approx(before)
    assert report.forwards == 3 and [r.passes for r in report] == [1, 1]


@pytest.mark.parametrize('name', ['10 plain', '20 ConvLayer', '10 BatchNorm', '20 no bias'])
def test_the_model_trains(name):
    model, x = make(name)
    lsuv_init(model, x, ConvLayer if 'ConvLayer' in name else None)
    y, opt, losses = torch.arange(8) % 4, torch.optim.SGD(model.parameters(), 2e-3, momentum=.9), []
    for _ in range(100):
        loss = nn.functional.cross_entropy(model(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]/2


def test_order_is_the_forward_pass():
    class Back(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.never = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        def forward(self, x): return self.last(input=torch.relu(self.first(x))) # by keyword, too
    model, x = Back(), torch.randn(16, 8)*5
    before = model.never.weight.clone()
    report = lsuv_init(model, x)
    assert [r.name for r in report] == ['first', 'last', 'never']
    assert report[2].state == 'refused' and 'not reached' in report[2].why and torch.equal(before, model.never.weight)
    check_all(model, x, LSUVReport(report[:2]), [model.first, model.last])


def test_twice_changes_nothing():
    model, x = make('10 plain')
    lsuv_init(model, x)
    before = copy.deepcopy(model.state_dict())
    report = lsuv_init(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not report.refused


# --- statistics over several batches

@pytest.mark.parametrize('name', ['10 plain', '20 ConvLayer', '10 BatchNorm', '10 no bias', 'block'])
@pytest.mark.parametrize('grow', [0, 1])
def test_batches(name, grow):
    torch.manual_seed(1)
    model, x = make(name, p=.1)
    xs = [torch.randn_like(x)*(1 + grow*i) for i in range(5)]
    cls = ConvLayer if 'ConvLayer' in name else None
    mods = find_modules(model, (lambda o: isinstance(o, cls)) if cls else is_lin_layer)
    rng = torch.get_rng_state()
    report = lsuv_init(model, xs, cls)
    assert report.n_batches == 5 and not report.refused, report
    seen = []
    for o in xs: torch.set_rng_state(rng); seen.append(outputs(model, mods, o))
    for m, r in zip(mods, report):
        y = torch.cat([s[m] for s in seen])
        mean, std = y.mean().item(), y.std().item()
        assert abs(std-1) < TOL and r.mean == pytest.approx(mean, abs=1e-5)
        if r.state == 'converged': assert abs(mean) < TOL


def test_what_x_may_be():
    x, y = torch.randn(32, 6)*3, torch.zeros(32)
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    class Data: train_dl, valid_dl = dl, None
    def run(x, **kw):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        return lsuv_init(model, x, **kw), model[0].weight.detach()
    ref, w = run(list(x.split(8)))
    for o in (dl, Data(), tuple(x.split(8)), (b for b in x.split(8)), [(b, None) for b in x.split(8)]):
        report, w2 = run(o)
        assert report.n_batches == 4 and torch.allclose(w, w2)
    assert run(x)[0].n_batches == 1 and torch.allclose(run(x)[1], w, atol=1e-3)
    assert run(dl, n_batches=2)[0].n_batches == 2
    def endless():
        while True: yield x
    assert run(endless())[0].n_batches == 5
    with pytest.raises(ValueError, match='x holds no batch'): run([])
    with pytest.raises(ValueError, match='batch 0 of x is empty'): run(x[:0])


def test_a_look_is_no_training_pass():
    class DL:
        n_pass = 3
        def __iter__(self): self.n_pass += 1; yield torch.randn(4, 6), None
    dl = DL()
    lsuv_init(nn.Sequential(nn.Linear(6, 5)), dl)
    assert dl.n_pass == 3


# --- everything else stays as it was

@pytest.mark.parametrize('kind', ['BatchNorm', 'ConvLayer'])
def test_nothing_else_changes(kind):
    model, x = make(f'10 {kind}', p=.3)
    model(x).sum().backward()
    model.eval(); model[1].train(); next(model.parameters()).requires_grad_(False)
    lin = {id(m) for m in find_modules(model, is_lin_layer)}
    params = dict(model.named_parameters())
    def state():
        return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), [m.training for m in model.modules()],
                [b.tolist() for k, b in model.named_buffers() if not k.endswith('sub')],
                [None if p.grad is None else p.grad.tolist() for p in params.values()], [p.requires_grad for p in params.values()],
                [p.tolist() for m in model.modules() if id(m) not in lin for p in m.parameters(recurse=False)],
                [len(getattr(m, k)) for m in model.modules() for k in ('_forward_hooks', '_forward_pre_hooks', '_forward_hooks_with_kwargs')])
    before = state()
    lsuv_init(model, x, ConvLayer if kind == 'ConvLayer' else None)
    assert state() == before
    assert all(p is params[k] for k, p in model.named_parameters()) # in place: an optimizer that holds them still does
    assert all(not b.requires_grad and not b.is_inference() for b in model.buffers())


def test_within_inference_mode():
    model, x = make('10 ConvLayer')
    with torch.inference_mode(): assert not lsuv_init(model, x, ConvLayer).refused
    model(x).sum().backward()


def test_layers_own_randomness():
    model, x = nn.Sequential(nn.Linear(8, 16), Noisy(16, 16, p=.3), Noisy(16, 16, p=.3), nn.Linear(16, 4)), torch.randn(64, 8)
    mods = list(model)
    report = lsuv_init(model, x, mods)
    check_all(model, x, report, mods)
    assert isinstance(model[1].bias, float) and model[1].bias != 0


def test_std_alone():
    model, x = make('10 plain')
    report = lsuv_init(model, x, mean=False)
    assert all(r.state == 'converged' and abs(r.std-1) < TOL for r in report) and max(abs(r.mean) for r in report) > .05


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_orthonormal_start(dtype):
    model = nn.Sequential(nn.Conv2d(3, 32, 3, bias=False), nn.ReLU(), nn.ConvTranspose2d(32, 4, 3), nn.Flatten(), nn.Linear(4*64, 300)).to(dtype)
    x = torch.randn(8, 3, 8, 8).to(dtype)
    torch.manual_seed(3)
    report = lsuv_init(model, x, orthonormal=True)
    check_all(model, x, report, [model[0], model[2], model[4]])
    tol = 1e-5 if dtype == torch.float32 else 2e-2
    for w in (model[0].weight.flatten(1).T, model[2].weight.transpose(0, 1).flatten(1), model[4].weight.T): # the shorter side
        g = (w @ w.T).float()
        torch.testing.assert_close(g/g.diagonal().mean(), torch.eye(len(g)), atol=tol, rtol=0)
    drawn = model[0].weight.clone()
    torch.manual_seed(3); lsuv_init(model, x, orthonormal=True)
    assert torch.equal(drawn, model[0].weight)


# --- lsuv_module

def test_lsuv_module():
    model, x = make('10 ConvLayer')
    before = copy.deepcopy(model.state_dict())
    mean, std = lsuv_module(model, model[3], x)
    assert abs(mean) < TOL and abs(std-1) < TOL and (mean, std) == pytest.approx(measured(model, [model[3]], x)[model[3]], abs=1e-5)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {'3.conv.weight', '3.relu.sub'}


def test_lsuv_module_names_what_it_refuses():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    nn.init.zeros_(model[2].weight); nn.init.zeros_(model[2].bias)
    with pytest.raises(ValueError, match=r'2 \(Linear\) is as it was: its output is zero everywhere'): lsuv_module(model, model[2], torch.randn(8, 4))
    with pytest.raises(ValueError, match='is no part of the model'): lsuv_module(model, nn.Linear(4, 4), torch.randn(8, 4))


# --- must not happen

def refused(model, x, name, why, modules=None):
    "`lsuv_init` refuses layer `name` for the reason `why`, leaves it as it was, and sets the others."
    before = copy.deepcopy(model.state_dict())
    report = lsuv_init(model, x, modules)
    row, = [r for r in report if r.name == name]
    assert row.state == 'refused' and why in row.why and ': ' in row.why, report
    prefix = '' if name == '(the model)' else name + '.'
    for k, v in model.state_dict().items():
        if k.startswith(prefix): torch.testing.assert_close(v, before[k], rtol=0, atol=0, equal_nan=True)
        if torch.isfinite(before[k]).all(): assert torch.isfinite(v).all(), k
    for r in report:
        if r.state != 'refused': assert abs(r.std-1) < TOL, r
    return report


def three(): torch.manual_seed(0); return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_dead_layer():
    model = three()
    for p in model[2].parameters(): nn.init.zeros_(p)
    report = refused(model, torch.randn(16, 6), '2', 'zero everywhere (dead)')
    assert [r.state for r in report] == ['converged', 'refused', 'converged'] # the bias of the last one still differs from unit to unit
    nn.init.zeros_(model[4].bias)
    assert [r.state for r in lsuv_init(model, torch.randn(16, 6))] == ['converged', 'refused', 'refused']

def test_dead_conv_layer():
    model, x = make('10 ConvLayer')
    nn.init.zeros_(model[4].conv.weight); nn.init.constant_(model[4].conv.bias, -1.)
    refused(model, x, '4', 'zero everywhere', ConvLayer)

def test_dead_relu_before():
    model = three()
    nn.init.constant_(model[0].weight, 0.); nn.init.constant_(model[0].bias, -1.)
    refused(model, torch.randn(16, 6), '0', 'one number everywhere')

def test_constant_input():
    model = nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 1))
    refused(model, torch.ones(16, 6), '0', 'one number everywhere')
    model = three()
    check_all(model, torch.ones(16, 6), lsuv_init(model, torch.ones(16, 6))) # units differ, though items do not

def test_zero_variance():
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 1))
    nn.init.constant_(model[0].weight, .3)
    refused(model, torch.full((4, 1, 5, 5), 2.), '0', 'one number everywhere')

def test_never_converges():
    class Sign(nn.Linear):
        def forward(self, x): return 3*super().forward(x).sign()
    model = nn.Sequential(nn.Linear(6, 8), Sign(8, 8, bias=False), nn.Linear(8, 4))
    report = refused(model, torch.randn(16, 6), '1', 'they do not follow weight and bias')
    assert report[2].state == 'converged' and report[1].passes == 20

def test_a_model_that_is_never_the_same():
    gen = torch.Generator()
    class Other(nn.Module): # draws from a generator of its own, which nobody can rewind
        def forward(self, x): return x*torch.rand(1, generator=gen)
    model = nn.Sequential(nn.Linear(6, 8), Other(), nn.Linear(8, 4))
    report = refused(model, torch.randn(16, 6), '2', 'at the end: leave it out')
    assert report.forwards < 150

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_bad_batch(bad):
    model, x = three(), torch.randn(16, 6)
    x[3, 2] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='batch 0 of x holds NaN or infinity, so that neither 0 nor'): lsuv_init(model, x)
    with pytest.raises(ValueError, match='batch 1 of x'): lsuv_init(model, [torch.randn(4, 6), x])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_bad_weights(bad):
    model = three()
    model[2].weight.data[1, 1] = bad
    report = refused(model, torch.randn(16, 6), '2', 'its weight holds NaN or infinity: initialize it first')
    assert report[0].state == 'converged' and 'its input holds NaN' in report[2].why

def test_overflow():
    model = three()
    model[2].weight.data.fill_(3e38)
    refused(model, torch.randn(16, 6), '2', 'goes beyond torch.float32: initialize it with smaller weights')

@pytest.mark.parametrize('size', [1e-25, 1e25])
def test_tiny_and_huge_weights(size):
    model, x = three(), torch.randn(16, 6)
    for m in (model[0], model[4]): m.weight.data.mul_(size); m.bias.data.zero_()
    check_all(model, x, lsuv_init(model, x))

def test_used_twice():
    lin = nn.Linear(6, 6)
    refused(nn.Sequential(lin, nn.ReLU(), lin, nn.Linear(6, 3)), torch.randn(16, 6), '0', 'used 2 times in a forward pass, and')

@pytest.mark.parametrize('how', ['same parameter', 'same numbers'])
def test_tied_weights(how):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.mid, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
            self.out.weight = self.emb.weight if how == 'same parameter' else nn.Parameter(self.emb.weight.data)
        def forward(self, x): return self.out(self.mid(self.emb(x)))
    model = Tied()
    report = refused(model, torch.randint(11, (4, 7)), 'out', 'its weight is shared by emb and out')
    assert report[0].name == 'mid' and report[0].state == 'converged'

def test_layer_and_its_inside():
    model, x = make('10 ConvLayer')
    report = lsuv_init(model, x, [model[2], model[2].conv, model[3]])
    assert [r.state for r in report] == ['refused', 'refused', 'converged'] and '2 and 2.conv have the same weight' in report[0].why

def test_reached_by_some_batches():
    class Sometimes(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        def forward(self, x): return self.b(self.a(x)) if len(x) > 4 else self.a(x)
    refused(Sometimes(), [torch.randn(8, 6), torch.randn(3, 6)], 'b', 'reached by 1 of 2 batches')

def test_model_that_raises():
    class Boom(nn.Module):
        armed = True
        def forward(self, x):
            if self.armed or (self.after and x.std() > .99 and x.std() < 1.01): raise KeyError('boom')
            return x
        after = False
    model, x = nn.Sequential(nn.Linear(6, 8), Boom(), nn.Linear(8, 3)), torch.randn(16, 6)
    before = copy.deepcopy(model.state_dict())
    for armed, after in ((True, False), (False, True)): # in the first pass, or once the first layer is set
        model[1].armed, model[1].after = armed, after
        with pytest.raises(KeyError) as e: lsuv_init(model, x)
        assert 'raised in layer 1 (Boom), on batch 0 of shape (16, 6)' in e.value.__notes__[0] and 'Give a batch' in e.value.__notes__[0]
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_failed_run_restores_conv_layers():
    class Boom(nn.Module):
        n = 0
        def forward(self, x):
            self.n += 1
            if self.n == 3: raise KeyboardInterrupt
            return x
    model, x = nn.Sequential(ConvLayer(3, 8), ConvLayer(8, 8, sub=.25), Boom()), torch.randn(4, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt): lsuv_init(model, x, ConvLayer)
    assert model[2].n == 3 and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

def test_batch_of_one():
    model = three()
    x = torch.randn(1, 6)
    check_all(model, x, lsuv_init(model, x)) # several units: there is a deviation
    refused(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1)), x, '1', 'a single number: give a larger batch')
    bn = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    with pytest.raises(ValueError) as e: lsuv_init(bn, x)
    assert 'raised in layer 1 (BatchNorm1d)' in e.value.__notes__[0] and 'more than one item' in e.value.__notes__[0]

def test_no_matching_layer():
    with pytest.raises(ValueError, match='no layer of Sequential to set: the condition finds none'): lsuv_init(nn.Sequential(nn.ReLU()), torch.randn(2, 2))
    with pytest.raises(ValueError, match='no layer of Sequential'): lsuv_init(three(), torch.randn(2, 6), ConvLayer)
    with pytest.raises(ValueError, match='`modules` is empty'): lsuv_init(three(), torch.randn(2, 6), [])

def test_integer_input():
    class Text(nn.Module):
        def __init__(self): super().__init__(); self.emb, self.lin, self.block = nn.Embedding(20, 32), nn.Linear(32, 32), Block()
        def forward(self, x): return self.block(self.lin(self.emb(x)))
    torch.manual_seed(0)
    model, x = Text(), torch.randint(20, (4, 9))
    check_all(model, x, lsuv_init(model, x))
    report = lsuv_init(model, x, [model.emb])
    assert report[0].state == 'no bias' and abs(report[0].std-1) < TOL

def test_eval_mode():
    model, x = make('10 BatchNorm', p=.3)
    model.eval()
    check_all(model, x, lsuv_init(model, x)) # measured as in training
    assert not any(m.training for m in model.modules())

def test_other_refusals():
    x = torch.randn(8, 6)
    class NoTensor(nn.Linear):
        def forward(self, x): return [x]
    class Long(nn.Linear):
        def forward(self, x): return super().forward(x).long()
    refused(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), x, '1', 'it has no weight', nn.ReLU)
    refused(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 6)), x, '0', 'computed from other parameters')
    refused(nn.Sequential(nn.Linear(6, 6), NoTensor(6, 6)), x, '1', 'its output is list')
    refused(nn.Sequential(nn.Linear(6, 6), Long(6, 6)), x, '1', 'not a tensor of floating point numbers')
    with pytest.raises(ValueError, match='0 has no shape yet'): lsuv_init(nn.Sequential(nn.LazyLinear(4)), x)
    for kw in (dict(tol=0), dict(max_iter=0), dict(n_batches=0)):
        with pytest.raises(ValueError, match=next(iter(kw)) + '=0'): lsuv_init(three(), x, **kw)

def test_biases_of_every_kind():
    class Scalar(nn.Module):
        def __init__(self, bias): super().__init__(); self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), bias
        def forward(self, x): return torch.relu(x @ self.weight) + (0 if self.bias is None or self.bias is False else self.bias)
    x = torch.randn(32, 6)
    for bias in (0, 1.5, nn.Parameter(torch.zeros(6)), nn.Parameter(torch.tensor(.5)), torch.tensor(.5)):
        model = nn.Sequential(Scalar(bias))
        r, = lsuv_init(model, x, [model[0]])
        assert r.state == 'converged' and abs(r.mean) < TOL and abs(r.std-1) < TOL, (bias, r)
    for bias in (None, False):
        model = nn.Sequential(Scalar(bias))
        r, = lsuv_init(model, x, [model[0]])
        assert r.state == 'no bias' and r.mean > .1 and abs(r.std-1) < TOL
    model = nn.Sequential(ConvLayer(3, 4, sub=None))
    assert lsuv_init(model, torch.randn(2, 3, 8, 8), ConvLayer)[0].state == 'no bias'


# --- the report

def test_report():
    model = three()
    for p in (model[2].weight, model[2].bias, model[4].bias): nn.init.zeros_(p)
    report = lsuv_init(model, torch.randn(16, 6))
    text, page = repr(report), report._repr_html_()
    for s in ('std before', 'converged', 'refused: its output is zero everywhere', f'1 of 3 layers set on 1 batch, in {report.forwards} forward passes; 2 refused'):
        assert s in text and s in page
    assert page.count('<tr>') == 4 and len(report) == 3 and isinstance(report, LSUVReport)
    import matplotlib
    matplotlib.use('agg')
    fig = report.plot()
    assert len(fig.axes) == 2
    lines = {l.get_label(): l.get_ydata() for l in fig.axes[1].lines}
    assert list(lines['before']) == [r.std_before for r in report] and list(lines['after']) == [r.std for r in report]
    assert len(lines['refused']) == 2


def test_cost_does_not_grow_with_the_square():
    class Count(nn.Module):
        n = 0
        def forward(self, x): Count.n += 1; return x
    for layers in (5, 40):
        Count.n = 0
        model = nn.Sequential(Count(), *(o for _ in range(layers) for o in (nn.Linear(6, 6), nn.ReLU())))
        report = lsuv_init(model, torch.randn(8, 6))
        assert Count.n == report.forwards == 3 and all(r.passes == 1 for r in report)


def test_very_deep(): # BatchNorm on small batches: a rounding error in the first layer is a difference in the last
    torch.manual_seed(0)
    model = nn.Sequential(*(o for _ in range(400) for o in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())))
    x = torch.randn(16, 8)
    report = lsuv_init(model, x)
    check_all(model, x, report)
    assert report.forwards <= 7
