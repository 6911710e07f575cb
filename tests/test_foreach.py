"A list of tensors does what its tensors do one by one, and refuses the rest."
import operator

import pytest
import torch
from torch.testing import assert_close

from dl2lib.foreach import NotForListsError, PerTensor, TensorList


def some(seed=0, positive=False):
    gen = torch.Generator().manual_seed(seed)
    ts = [torch.randn(s, generator=gen, dtype=torch.float64) for s in ((3,), (2, 4), (), (2, 1, 3))]
    return [t.abs() + .1 for t in ts] if positive else ts

def same(f, *lists):
    "`f` over lists gives what it gives tensor by tensor; -> how many were compared."
    one = [f(*ts) for ts in zip(*([t.clone() for t in l] for l in lists))]
    many = f(*(TensorList(t.clone() for t in l) for l in lists))
    got = many.ts if isinstance(many, TensorList) else list(many.v)
    assert len(got) == len(one)
    for a, b in zip(got, one): assert_close(a, torch.as_tensor(b))
    return len(got)


calls = dict(
    add=lambda a, b: a.add(b, alpha=.3), add_number=lambda a, b: a.add_(2.), add_in_place=lambda a, b: a.add_(b, alpha=-.3), sub=lambda a, b: a.sub_(b, alpha=.5),
    mul=lambda a, b: a.mul_(b), mul_number=lambda a, b: a.mul(.9), div=lambda a, b: a.div_(b), addcmul=lambda a, b: a.addcmul_(b, b, value=.1),
    addcdiv=lambda a, b: a.addcdiv_(a, b, value=-.1), addcdiv_new=lambda a, b: a.addcdiv(a, b, value=-.1), lerp=lambda a, b: a.lerp_(b, .3), sign=lambda a, b: a.sign(),
    sqrt=lambda a, b: b.sqrt_(), pow=lambda a, b: b**2, square=lambda a, b: a.square(), neg=lambda a, b: a.neg_(), abs=lambda a, b: a.abs(), exp=lambda a, b: a.exp(),
    clamp=lambda a, b: a.clamp(-.5, .5), clamp_in_place=lambda a, b: a.clamp_(min=.1), clamp_max=lambda a, b: a.clamp_max(.2), reciprocal=lambda a, b: b.reciprocal(),
    copy=lambda a, b: a.copy_(b), zero=lambda a, b: a.zero_(), maximum=lambda a, b: torch.maximum(a, b), torch_sqrt=lambda a, b: torch.sqrt(b),
    torch_mul=lambda a, b: torch.mul(a, b), data=lambda a, b: a.data.add_(b.data), detach=lambda a, b: a.detach().mul(2), clone=lambda a, b: a.clone().mul_(2),
    arithmetic=lambda a, b: .9*a + (1-.9)*b - a/b, reflected=lambda a, b: 1 - a + 2/b, negative=lambda a, b: -a + abs(b), powers=lambda a, b: b**.5,
    norm=lambda a, b: a.norm(), norm_1=lambda a, b: a.norm(1), norm_ratio=lambda a, b: a*(a.norm()/b.norm()), norm_in_place=lambda a, b: a.mul_(b.norm()), norm_clamped=lambda a, b: a.norm().clamp(max=1.),
    norm_where=lambda a, b: torch.where((a.norm() > 1) & (b.norm() > 0), a.norm()/b.norm(), 1.), norm_left=lambda a, b: b.norm()*a, norm_over=lambda a, b: a.div(b.norm()),
    norm_reflected=lambda a, b: 1/a.norm() + 2 - b.norm()**2, norm_sqrt=lambda a, b: torch.sqrt(a.norm()), norm_in_reverse=lambda a, b: 1 - a.norm(), norm_minus_list=lambda a, b: a.norm() - b)

@pytest.mark.parametrize('name', calls)
def test_as_tensor_by_tensor(name): assert same(calls[name], some(), some(1, positive=True)) == 4

def test_in_place_changes_the_tensors_themselves():
    ts = some()
    before = [t.clone() for t in ts]
    x = TensorList(ts)
    y = x.mul_(2)
    assert y is x
    x += 1
    for t, b in zip(ts, before): assert_close(t, 2*b + 1)

def test_not_in_place_leaves_them():
    ts = some()
    before = [t.clone() for t in ts]
    TensorList(ts).mul(2); TensorList(ts) + 1; TensorList(ts).clamp(0, 1)
    for t, b in zip(ts, before): assert torch.equal(t, b)


refused = {
    'truth value': lambda x: bool(x), 'length': lambda x: len(x), r'comparison \(==\)': lambda x: x == x, r'comparison \(!=\)': lambda x: x != 1,
    r'comparison \(>\)': lambda x: x > 0, r'items \(indexing\)': lambda x: x[0], r'items \(iteration\)': lambda x: list(x), 'item': lambda x: x.item(),
    'shape': lambda x: x.shape, 'view': lambda x: x.view(-1), 'mean': lambda x: x.mean(), 'max': lambda x: x.max(), r'value \(float\)': lambda x: float(x),
    'plain tensor': lambda x: x.add(torch.ones(3)), r'torch.where\(\)': lambda x: torch.where(torch.tensor(True), x, x), 'cumsum': lambda x: torch.cumsum(x, 0),
    'norm': lambda x: x.norm('fro'), r'truth value \(bool, if\)': lambda x: 1 if x.norm() > 1 else 0, r'method item\(\)': lambda x: x.norm().item(),
    'numbers that go together': lambda x: x.norm()*torch.ones(4), r'method sum\(\)': lambda x: x.norm().sum(), 'numbers': lambda x: torch.cumsum(x.norm(), 0)}

@pytest.mark.parametrize('what', refused)
def test_refuses_by_name(what):
    with pytest.raises(NotForListsError, match=what): refused[what](TensorList(some()))

def test_lists_of_unequal_length():
    with pytest.raises(ValueError, match='4 tensors and 3'): TensorList(some()).add(TensorList(some()[:3]))

def test_repr():
    assert repr(TensorList(some())) == 'TensorList(4 tensors, 18 elements)'
    assert repr(TensorList(some()).norm(1)).startswith('PerTensor([')


