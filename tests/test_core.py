"core: properties, bad input, and what a caller must find as it was left, also after an error."
import collections, itertools, os, pickle, random, re, subprocess, sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dl2lib import core
from dl2lib.core import (ListContainer, camel2snake, compose, default_device, describe, listify, noop, setify, to_device,
                         uniqueify)

has_cuda = torch.cuda.is_available()
cuda = [pytest.mark.cuda, pytest.mark.skipif(not has_cuda, reason='needs CUDA')]


def fresh(code): # what `code` prints in a process of its own
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=120, cwd=Path(core.__file__).parents[1]).stdout.strip()

@pytest.fixture
def dropout(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)))


# import

def test_import_is_light_and_does_nothing():
    before = "import torch, random, numpy as np; a = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads();"
    after = "b = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads();"
    heavy = "[m for m in ('torchvision', 'matplotlib', 'IPython', 'nbdev', 'fastcore', 'fastprogress', 'PIL') if m in sys.modules]"
    assert fresh(f'import sys; {before} import dl2lib.core; {after} print(a == b, torch.cuda.is_initialized(), {heavy})') == 'True False []'


# equality

@pytest.mark.parametrize('a, b', [
    (1, 1.), ('a', 'a'), (None, None), ([], ()), ([1, 'a', None], (1, 'a', None)),
    (torch.tensor([1., 2.]), [1., 2.]), ([1., 2.], torch.tensor([1., 2.])), (torch.tensor(0.1), 0.1), (0.1, torch.tensor(0.1)),
    (np.array([0.1, 0.2]), [0.1, 0.2]), (torch.tensor([0.1], dtype=torch.float64), [0.1]), (torch.tensor([0.1], dtype=torch.bfloat16), [0.1]),
    (torch.tensor([1, 2]), torch.tensor([1., 2.])), (torch.zeros(0, 3), torch.zeros(0, 3)), (np.array(['x', 'y']), ['x', 'y']),
    (torch.ones(2, requires_grad=True), np.ones(2)), ({'a': [torch.ones(2)]}, {'a': (np.ones(2),)}), ([[torch.ones(1)]], [[torch.ones(1)]])])
def test_equal(a, b): core.test_eq(a, b)


@pytest.mark.parametrize('a, b', [
    (1, 2), ('a', 'b'), ([1], [1, 2]), ([1, 2], [1]), (torch.ones(3, 2), torch.ones(2)), (torch.ones(1), 1.), (torch.ones(2), None), (torch.ones(2), 'a'),
    (float('nan'), float('nan')), (torch.tensor([float('nan')]), torch.tensor([float('nan')])), ({'a': 1}, {'b': 1}), ({'a': 1}, {'a': 1, 'b': 2}),
    (torch.tensor([1]), [1.5]), (torch.tensor([1.5]), [1]), ([torch.ones(2), 1], [torch.ones(2), 2]), (np.array(['x', 'y']), ['x', 'z']),
    (torch.tensor([0.1], dtype=torch.float64), torch.tensor([0.1])), (0.1+0.2, 0.3), (None, 0), ([], None)])
def test_unequal(a, b):
    with pytest.raises(AssertionError, match='not equal'): core.test_eq(a, b)
    with pytest.raises(AssertionError, match='not equal'): core.test_eq(b, a)


@pytest.mark.parametrize('tol', [1e-12, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize('size', [0., 1e-4, 1., 1e5])
def test_near_draws_its_line_where_it_says(tol, size):
    limit = tol + tol*size
    for make in (float, lambda o: [o], lambda o: np.array([o]), lambda o: torch.tensor([o], dtype=torch.float64)):
        core.test_near(make(size+limit*.9), make(size), tol=tol)
        core.test_near(make(size-limit*.9), make(size), tol=tol)
        with pytest.raises(AssertionError, match=f'not within {tol}'): core.test_near(make(size+limit*1.1), make(size), tol=tol)
        with pytest.raises(AssertionError, match=f'not within {tol}'): core.test_near(make(size-limit*1.1), make(size), tol=tol)


@pytest.mark.parametrize('a, b', [(torch.ones(3), torch.ones(3, 1)), (torch.ones(1), 1.), (float('nan'), float('nan')), (float('inf'), 1e30), ([1., 2.], [1.]),
                                  (torch.tensor([1., float('nan')]), torch.tensor([1., 2.])), (1+1j, 1-1j)])
def test_near_refuses(a, b):
    with pytest.raises(AssertionError, match='not within'): core.test_near(a, b)


def test_near_mixes_types_and_leaves_gradients_alone():
    w = torch.ones(2, requires_grad=True)
    core.test_near(w, np.ones(2, dtype=np.float32)); core.test_near(torch.ones(2, dtype=torch.bfloat16), [1, 1]); core.test_near(float('inf'), float('inf'))
    core.test_near(torch.tensor([1, 2]), torch.tensor([1., 2.], dtype=torch.float64))
    assert w.requires_grad and w.grad is None


# one or many

@pytest.mark.parametrize('one', ['lr', b'lr', {'a': 1}, 3, 0, False, '', torch.zeros(2, 3), torch.tensor(1.), np.zeros(3), nn.Sequential(nn.ReLU()), print])
def test_listify_one(one):
    res = listify(one)
    assert type(res) is list and len(res) == 1 and res[0] is one

@pytest.mark.parametrize('many, expected', [((), []), ((3, 1, 2), [3, 1, 2]), ({1}, [1]), (range(3), [0, 1, 2]), (ListContainer([1, 2]), [1, 2]), ({'a': 1}.keys(), ['a'])])
def test_listify_many(many, expected):
    assert listify(many) == expected and type(listify(many)) is list
    assert listify(o for o in many) == expected and listify(iter(many)) == expected

def test_listify_of_nothing_and_of_a_list():
    assert listify() == listify(None) == []
    mine = [1]
    assert listify(mine) is mine

def test_setify():
    assert setify() == set() and setify('ab') == {'ab'} and setify(['a', 'b', 'a']) == {'a', 'b'}
    mine = {1}
    assert setify(mine) is mine

def test_uniqueify():
    rng = random.Random(42)
    for _ in range(20):
        x = [rng.randrange(10) for _ in range(30)]
        kept = uniqueify(x)
        assert kept == [o for i, o in enumerate(x) if o not in x[:i]] and uniqueify(x, sort=True) == sorted(set(x)) and uniqueify(kept) == kept
    assert uniqueify([]) == [] and uniqueify('abca') == ['a', 'b', 'c']
    with pytest.raises(TypeError, match='unhashable'): uniqueify([[1]])

def test_uniqueify_is_the_same_in_every_process():
    code = "from dl2lib.core import uniqueify; print(uniqueify('tench radio church truck radio'.split()))"
    assert fresh(code) == fresh(code) == "['tench', 'radio', 'church', 'truck']"


# composition

class Step:
    def __init__(self, tag, order=None):
        self.tag = tag
        if order is not None: self._order = order
    def __call__(self, x, *args, **kwargs): return [*x, (self.tag, *args, *kwargs.items())]

def test_compose_sorts_what_has_an_order_and_leaves_the_rest_where_it_stands():
    for orders in itertools.product([None, 0, 1, -1], repeat=4):
        got = [o[0] for o in compose([], [Step(i, o) for i, o in enumerate(orders)])]
        assert [i for i, o in enumerate(orders) if o is None] == [i for i, j in enumerate(got) if orders[j] is None]
        assert all(got[i] == i for i, o in enumerate(orders) if o is None)
        assert [j for j in got if orders[j] is not None] == sorted((i for i, o in enumerate(orders) if o is not None), key=lambda i: (orders[i], i))

def test_compose_hands_on_all_arguments():
    assert compose([], [Step('a'), Step('b')], 1, two=2) == [('a', 1, ('two', 2)), ('b', 1, ('two', 2))]

def test_compose_takes_one_none_another_key_and_any_iterable():
    x = object()
    assert compose(x, None) is x and compose(x, []) is x and compose(-3, abs) == 3 and compose(-3, (f for f in (abs, str))) == '3'
    a, b = Step('a'), Step('b', order=-1)
    a.rank, b.rank = 0, 1
    assert [o[0] for o in compose([], [a, b], order_key='rank')] == ['a', 'b'] and [o[0] for o in compose([], [b, a], order_key='rank')] == ['a', 'b']

def test_compose_takes_a_module_as_one_function():
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    assert compose(-torch.ones(1, 2, 2), model).tolist() == [[0, 0, 0, 0]]

def test_compose_leaves_the_list_as_it_was():
    fs = [Step('a', 2), Step('b', 1)]
    before = list(fs)
    compose([], fs)
    assert fs == before

def test_compose_lets_errors_through():
    with pytest.raises(ZeroDivisionError): compose(1, [lambda x: x/0])
    with pytest.raises(TypeError, match='not callable'): compose(1, [3])


# ListContainer

def test_list_container_agrees_with_a_list_and_with_numpy():
    rng = np.random.default_rng(42)
    for n in (1, 2, 7, 30):
        plain = [f'{i:02}' for i in range(n)]
        l, arr = ListContainer(plain), np.array(plain)
        assert len(l) == n and list(l) == plain
        for i in range(-n, n): assert l[i] == plain[i]
        for s in (slice(None), slice(1, 5), slice(None, None, -2), slice(-3, None), slice(50, 60)): assert l[s] == plain[s]
        mask, some = rng.random(n) > 0.5, rng.integers(-n, n, size=5)
        for make in (np.asarray, torch.as_tensor, list, lambda o: o.tolist(), tuple):
            assert l[make(some)] == arr[some].tolist()
            assert l[make(mask)] == arr[mask].tolist()
        assert l[torch.tensor(n-1)] == l[np.int64(n-1)] == plain[-1]

@pytest.mark.parametrize('idx, says', [(5, 'index 5 is out of range: ListContainer has 5 items'), (-6, 'index -6 is out of range'),
    ([0, 9], 'index 9 is out of range'), (torch.tensor([-6]), 'index -6'), ([True, False], 'the mask has 2 entries, ListContainer 5 items'),
    ([True]*6, 'the mask has 6 entries'), (torch.tensor([True]), 'the mask has 1 entries'), (np.array([False]*4), 'the mask has 4 entries')])
def test_list_container_names_a_bad_index(idx, says):
    with pytest.raises(IndexError, match=re.escape(says)): ListContainer(range(5))[idx]

@pytest.mark.parametrize('idx', ['a', 1.5, None, [1.5]])
def test_list_container_refuses_what_is_no_index(idx):
    with pytest.raises(TypeError): ListContainer(range(5))[idx]

def test_a_subclass_is_named_in_the_error():
    class Files(ListContainer): pass
    with pytest.raises(IndexError, match='Files has 0 items'): Files([])[0]
    assert repr(Files([])) == 'Files (0 items)\n[]'

def test_list_container_keeps_or_makes_its_items():
    mine, one = [1, 2], ListContainer('abc')
    assert ListContainer(mine).items is mine
    assert one.items == ['abc'] and ListContainer((1, 2)).items == [1, 2] and ListContainer(range(2)).items == [0, 1] and ListContainer(None).items == []
    class Lazy(collections.abc.Sequence): # another sequence, such as names kept in one long string, is not unpacked
        def __len__(self): return 10**9
        def __getitem__(self, i): return [f'item{o}' for o in range(*i.indices(10**9))] if isinstance(i, slice) else f'item{i}'
    l = ListContainer(Lazy())
    assert isinstance(l.items, Lazy) and l[-10**9] == 'item-1000000000' and len(repr(l)) < 200

def test_list_container_changes():
    l = ListContainer([1, 2, 3])
    l[0] = 10; del l[1]
    assert list(l) == [10, 3]
    with pytest.raises(IndexError): l[5] = 1
    with pytest.raises(IndexError): del l[5]

def test_list_container_prints_shortly():
    assert repr(ListContainer(range(3))) == 'ListContainer (3 items)\n[0, 1, 2]'
    assert repr(ListContainer(range(10))) == 'ListContainer (10 items)\n[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]'
    assert repr(ListContainer(range(10**5))) == 'ListContainer (100000 items)\n[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...]'

def test_list_container_pickles():
    l = pickle.loads(pickle.dumps(ListContainer([1, 2])))
    assert type(l) is ListContainer and list(l) == [1, 2]


# names

@pytest.mark.parametrize('camel, snake', [('TrainEval', 'train_eval'), ('CSVLog', 'csv_log'), ('LR_Find', 'lr_find'), ('Recorder', 'recorder'), ('', ''),
    ('ABC', 'abc'), ('AvgStats', 'avg_stats'), ('BatchTransformX', 'batch_transform_x'), ('runLR', 'run_lr'), ('X', 'x'), ('_Private', '_private'), ('HTTPServerError', 'http_server_error')])
def test_camel2snake(camel, snake):
    assert camel2snake(camel) == snake
    assert camel2snake(snake) == snake, 'it leaves its own result alone'

def test_noop():
    x = object()
    assert noop(x, 1, a=2) is x and noop() is None and pickle.loads(pickle.dumps(noop)) is noop


# words

class Resize:
    def __init__(self, size): self.size, self._private = size, 1
    def __call__(self, x): return x

def local():
    def inner(): pass
    return inner

THINGS = '[Resize(64), partial(np.flip, axis=1), partial(partial(sorted, key=len), reverse=True), len, np.sin, Resize, Resize.__init__, nn.ReLU(), '\
         'torch.float16, torch.device("cpu"), Path("a/b"), {"x", "y", "z"}, {"lr": .1, 2: None}, "text", b"bytes", torch.Generator(), object(), lambda x: x, local()]'

def test_describe_gives_the_same_words_in_every_process():
    code = f'from test_core import *; print(describe({THINGS}))'
    said = {subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=120, cwd=Path(__file__).parent,
                           env={**os.environ, 'PYTHONHASHSEED': seed, 'PYTHONPATH': str(Path(core.__file__).parents[1])}).stdout.strip() for seed in '123'}
    assert len(said) == 1 and '0x' not in said.pop()

@pytest.mark.parametrize('o, words', [
    (Resize(64), 'Resize(size=64)'), (Resize, 'Resize'), (Resize.__init__, 'Resize.__init__'), (local(), 'inner'), (lambda x: x, '<lambda>'), (len, 'len'),
    (partial(np.flip, axis=1), 'flip(axis=1)'), (partial(sorted, [2, 1], key=len), 'sorted([2, 1], key=len)'), (partial(Resize(3), 1), 'Resize(size=3)(1)'),
    ([1, 'a', None, (True, 2.5)], "[1, 'a', None, [True, 2.5]]"), ({'a': Resize(1)}, "{'a': Resize(size=1)}"), ({3, 1}, '{1, 3}'), (object(), 'object()'),
    (torch.zeros(2, 3), 'Tensor (2, 3)'), (np.zeros(4), 'ndarray (4,)'), (nn.Linear(2, 3), repr(nn.Linear(2, 3))), (Resize(Resize([1])), 'Resize(size=Resize(size=[1]))')])
def test_describe(o, words): assert describe(o) == words

def test_describe_tells_what_differs():
    words = [describe(o) for o in (Resize(1), Resize(2), Resize('1'), partial(len), partial(sorted, key=len), partial(sorted, key=abs), [Resize(1)], (Resize(1), 2))]
    assert len(set(words)) == len(words)

class Fails:
    def __repr__(self): raise RuntimeError('my own words fail')

class Asks:
    def __getattr__(self, k): raise RuntimeError('no such thing')

def test_describe_never_fails(): # it stands in messages of errors, which it must not replace
    assert describe(Fails()) == 'Fails' and describe([Fails()]) == '[Fails]' and describe(Asks()) == 'Asks()'

def test_describe_tells_methods_and_settings_apart():
    assert describe(Resize(3).__call__) == 'Resize(size=3).__call__' != describe(Resize(4).__call__)
    assert describe(Resize({'p': .1})) == "Resize(size={'p': 0.1})" and describe(dict.fromkeys) == 'dict.fromkeys'
    assert len(describe({i: i for i in range(10_000)})) < 2000 > len(describe(set(range(10_000))))

def test_describe_comes_to_an_end():
    ring = [1]
    ring.append(ring)
    me = Resize(3)
    me.size = [me]
    assert describe(ring) == '[1, [1, [1, [1, list]]]]' and describe(me) == 'Resize(size=[Resize(size=[Resize])])'
    assert len(describe(list(range(10_000)))) < 500


# devices

def test_default_device():
    best = default_device()
    assert default_device(best) == best and default_device('cpu') == torch.device('cpu') and default_device(torch.device('cpu')).type == 'cpu'
    assert best.type == ('cuda' if has_cuda else 'mps' if torch.backends.mps.is_available() else 'cpu')

@pytest.mark.parametrize('bad', ['gpu', '', 'cuda:x', 'cpu cpu', 3.5, ['cpu']])
def test_no_device(bad):
    with pytest.raises(ValueError, match=re.escape(f'device={bad!r} is no device: give cpu, cuda, cuda:N or mps')): default_device(bad)

@pytest.mark.parametrize('device', ['cuda', 'cuda:0', 'cuda:1', 0], ids=['any', 'first', 'second', 'number'])
def test_cuda_asked_for_where_there_is_none(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    d = torch.device(device) if isinstance(device, str) else torch.device('cuda', device)
    for f in (lambda: default_device(d), lambda: to_device([torch.ones(2)], d)):
        with pytest.raises(ValueError, match=f"device='{d}' was asked for, but torch sees no cuda devices here: leave `device` out"): f()

def test_an_index_beyond_the_last_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert default_device('cuda:1') == torch.device('cuda:1') and default_device().type == 'cuda'
    with pytest.raises(ValueError, match="device='cuda:2' was asked for, but torch sees 2 cuda devices here"): default_device('cuda:2')

def test_order_of_preference(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert default_device().type == 'mps' and default_device('mps').type == 'mps'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    assert default_device().type == 'cuda'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert default_device().type == 'cpu'
    with pytest.raises(ValueError, match="device='mps' was asked for, but torch sees no mps devices here"): default_device('mps')


Pair = collections.namedtuple('Pair', 'x y')

def test_to_device_keeps_every_kind_of_container():
    t = torch.arange(3)
    counts = collections.defaultdict(int, a=t)
    batch = [t, (t, 'name'), {'k': [t, None, 3]}, Pair(t, {'deep': (t,)}), counts, collections.OrderedDict(b=t), t.shape]
    moved = to_device(batch, 'meta')
    assert [type(o) for o in moved] == [type(o) for o in batch]
    assert type(moved[3].y) is dict and type(moved[4]) is collections.defaultdict and moved[4]['missing'] == 0 and 'missing' not in counts
    found = [moved[0], moved[1][0], moved[2]['k'][0], moved[3].x, moved[3].y['deep'][0], moved[4]['a'], moved[5]['b']]
    assert all(o.device.type == 'meta' and o.shape == t.shape and o.dtype == t.dtype for o in found)
    assert moved[1][1] == 'name' and moved[2]['k'][1:] == [None, 3] and moved[6] == t.shape
    assert t.device.type == counts['a'].device.type == 'cpu', 'the original was changed'

def test_to_device_moves_a_module_in_place(dropout):
    assert to_device(dropout, 'meta') is dropout and all(p.device.type == 'meta' for p in dropout.parameters())

def test_to_device_copies_nothing_that_is_there(): # one less allocation in every batch
    t = torch.ones(2)
    assert to_device(t, 'cpu') is t and to_device([t], 'cpu')[0] is t and to_device({}, 'cpu') == {} and to_device([], 'cpu') == []

def test_to_device_keeps_gradients():
    w = torch.ones(2, requires_grad=True)
    to_device([w*2], 'cpu')[0].sum().backward()
    assert w.grad.tolist() == [2, 2]


# CUDA

class TestCuda:
    pytestmark = cuda

    def test_to_device(self):
        batch = to_device([torch.ones(2).pin_memory(), {'y': torch.arange(3), 's': 'text'}], 'cuda')
        assert batch[0].is_cuda and batch[1]['y'].is_cuda and batch[1]['s'] == 'text'
        assert batch[0].sum().item() == 2 and to_device(batch[1], 'cpu')['y'].tolist() == [0, 1, 2]
        assert to_device(torch.ones(2)).is_cuda and to_device(batch[0], 'cuda') is batch[0]
        with pytest.raises(ValueError, match="device='cuda:99' was asked for, but torch sees"): to_device(batch, 'cuda:99')

    def test_equality_across_devices(self):
        core.test_eq(torch.ones(2, device='cuda'), torch.ones(2)); core.test_near([1., 1.], torch.ones(2, device='cuda'))
        with pytest.raises(AssertionError): core.test_eq(torch.ones(2, device='cuda'), torch.zeros(2))
