"core: properties, bad input, and what a caller must find as it was left, also after an error."
import collections, itertools, os, pickle, random, re, signal, subprocess, sys, threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dl2lib import core
from dl2lib.core import (ListContainer, camel2snake, compose, default_device, interrupt_later, listify, noop, preserve_mode, preserve_rng, set_seed,
                         setify, to_device, uniqueify)

has_cuda = torch.cuda.is_available()
cuda = [pytest.mark.cuda, pytest.mark.skipif(not has_cuda, reason='needs CUDA')]


def fresh(code): # what `code` prints in a process of its own
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=120, cwd=Path(core.__file__).parents[1]).stdout.strip()

def draws(): return random.random(), np.random.rand(), torch.rand(()).item()


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

def test_compose_sorts_and_keeps_equals_in_place():
    for orders in itertools.product([None, 0, 1, -1], repeat=4):
        got = [o[0] for o in compose([], [Step(i, o) for i, o in enumerate(orders)])]
        assert got == sorted(range(4), key=lambda i: (orders[i] or 0, i)) # an order of none counts as 0

def test_compose_hands_on_all_arguments():
    assert compose([], [Step('a'), Step('b')], 1, two=2) == [('a', 1, ('two', 2)), ('b', 1, ('two', 2))]

def test_compose_takes_one_none_another_key_and_any_iterable():
    x = object()
    assert compose(x, None) is x and compose(x, []) is x and compose(-3, abs) == 3 and compose(-3, (f for f in (abs, str))) == '3'
    a, b = Step('a'), Step('b', order=-1)
    a.rank, b.rank = 0, 1
    assert [o[0] for o in compose([], [a, b], order_key='rank')] == ['a', 'b'] and [o[0] for o in compose([], [a, b])] == ['b', 'a']

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


# randomness

@pytest.mark.parametrize('seed', [0, 42, 2**32-1, np.int64(7), torch.tensor(7)])
def test_set_seed(seed):
    set_seed(seed); a = draws()
    set_seed(seed); assert draws() == a != draws()
    assert torch.initial_seed() == int(seed)
    set_seed(int(seed)+1 if seed < 100 else 1); assert draws() != a

@pytest.mark.parametrize('seed', [-1, 2**32, 0.5, '1', None, [1]])
def test_bad_seed(seed):
    set_seed(42); expected = draws()
    set_seed(42)
    with pytest.raises(ValueError, match=re.escape(f'seed={seed!r} must be a whole number from 0 to 2**32-1')): set_seed(seed)
    assert draws() == expected, 'a refused seed changed a generator'

def test_deterministic():
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    try:
        set_seed(42); assert torch.are_deterministic_algorithms_enabled() == before[0]
        set_seed(42, deterministic=True); assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    finally: torch.use_deterministic_algorithms(before[0]); torch.backends.cudnn.benchmark = before[1]

@pytest.mark.parametrize('on_device', [True, False])
@pytest.mark.parametrize('inside', [draws, lambda: set_seed(0), lambda: [draws() for _ in range(1000)], lambda: (set_seed(3), draws()), lambda: 1/0,
                                    lambda: (torch.randn(3), np.random.randn(3), random.gauss(0, 1))], # half a pair of normals is state too
                         ids=['draw', 'seed', 'many', 'both', 'raise', 'normal'])
def test_preserve_rng(inside, on_device):
    set_seed(42); draws(); torch.randn(3); random.gauss(0, 1); np.random.randn(1)
    def after(): return draws(), random.gauss(0, 1), np.random.randn(2).tolist(), torch.randn(20).tolist(), torch.initial_seed()
    with preserve_rng(on_device): expected = after()
    try:
        with preserve_rng(on_device): inside()
    except ZeroDivisionError: pass
    assert after() == expected

def test_preserve_rng_nests_and_decorates():
    set_seed(42); expected = draws()
    set_seed(42)
    @preserve_rng()
    def look():
        with preserve_rng(): inner = draws()
        assert draws() == inner
        return inner
    assert look() == expected == draws()

def test_preserve_rng_does_not_swallow_errors():
    with pytest.raises(KeyError, match='mine'):
        with preserve_rng(): raise KeyError('mine')

def test_preserve_rng_starts_no_device():
    assert fresh('import torch; from dl2lib.core import *\nwith preserve_rng(): torch.rand(2)\nprint(torch.cuda.is_initialized())') == 'False'

def test_a_seed_that_waits_for_cuda_is_put_back(monkeypatch): # torch keeps the seed for a CUDA that was not yet started
    calls = []
    set_seed(42)
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: False)
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', calls.append)
    with preserve_rng(): torch.rand(2)
    assert calls == [], 'nobody seeded'
    with preserve_rng(): set_seed(7)
    assert calls == [7, 42]
    with preserve_rng(cuda=False): set_seed(7)
    assert calls == [7, 42, 7]

def test_preserve_rng_puts_back_mps(monkeypatch): # by its interface only: there is no such device in CI
    state = [torch.tensor([1])]
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.mps, 'get_rng_state', lambda: state[-1])
    monkeypatch.setattr(torch.mps, 'set_rng_state', state.append)
    with preserve_rng(): state.append(torch.tensor([2]))
    assert state[-1].tolist() == [1] and len(state) == 3


# modes

def modes(m): return [o.training for o in m.modules()]

@pytest.mark.parametrize('inside', [nn.Module.eval, nn.Module.train, lambda m: m[2].eval(), lambda m: 1/0, lambda m: (m.eval(), 1/0)])
def test_preserve_mode(dropout, inside):
    for frozen in (), (1,), (1, 2), (0, 1, 2):
        dropout.train()
        for i in frozen: dropout[i].eval()
        before = modes(dropout)
        try:
            with preserve_mode(dropout) as m: assert m is dropout; inside(m)
        except ZeroDivisionError: pass
        assert modes(dropout) == before

def test_preserve_mode_does_not_swallow_errors(dropout):
    with pytest.raises(KeyError, match='mine'):
        with preserve_mode(dropout): raise KeyError('mine')


# Interrupts

def press(): signal.raise_signal(signal.SIGINT)

@pytest.fixture
def usual(): # the handler; what runs in the background ignores interrupts from the start
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)

def test_an_interrupt_waits_and_comes(usual):
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupt_later():
            for i in range(3): press(); done.append(i)
    assert done == [0, 1, 2]
    with interrupt_later(): pass
    with pytest.raises(KeyboardInterrupt): press()

def test_an_interrupt_that_waits_comes_after_an_error_and_keeps_it(usual):
    with pytest.raises(KeyboardInterrupt) as e:
        with interrupt_later(): press(); raise OSError('full')
    assert str(e.value.__context__) == 'full'
    with pytest.raises(OSError, match='full'):
        with interrupt_later(): raise OSError('full')

def test_an_interrupt_of_nested_blocks_waits_for_the_outermost(usual):
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupt_later():
            with interrupt_later(): press(); done.append('inner')
            done.append('outer')
    assert done == ['inner', 'outer']

def test_every_interrupt_that_waits_is_handed_on():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *args: seen.append(args))
    try:
        with interrupt_later(): press(); press(); assert not seen
        assert seen == [(signal.SIGINT, None)]*2
    finally: signal.signal(signal.SIGINT, before)

def test_an_interrupt_does_not_wait_for_ever(usual, monkeypatch):
    clock, done = [0.], []
    monkeypatch.setattr(core.time, 'monotonic', lambda: clock[0])
    with pytest.raises(KeyboardInterrupt):
        with interrupt_later(limit=10):
            for clock[0] in (100, 105, 109.9, 110, 111): press(); done.append(clock[0])
    assert done == [100, 105, 109.9]
    with pytest.raises(KeyboardInterrupt):
        with interrupt_later(limit=0): press(); done.append('one may wait'); press(); done.append('two may not')
    assert done[3:] == ['one may wait']

@pytest.mark.parametrize('handler', [signal.SIG_IGN, signal.SIG_DFL])
def test_where_no_python_handles_interrupts_nothing_changes(usual, handler):
    signal.signal(signal.SIGINT, handler)
    with interrupt_later():
        assert signal.getsignal(signal.SIGINT) is handler
        if handler is signal.SIG_IGN: press()
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is handler

def test_in_another_thread_nothing_changes(usual):
    seen = []
    def work():
        with interrupt_later(): seen.append(signal.getsignal(signal.SIGINT))
    t = threading.Thread(target=work)
    t.start(); t.join()
    assert seen == [signal.default_int_handler]

def test_a_handler_that_is_changed_within_stays_and_gets_what_waits(usual):
    seen = []
    def mine(*args): seen.append(args)
    with interrupt_later(): press(); signal.signal(signal.SIGINT, mine); assert not seen
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is mine and len(seen) == 1

def test_a_handler_that_somebody_has_kept_passes_interrupts_on(usual):
    with interrupt_later() as later: pass
    signal.signal(signal.SIGINT, later)
    with pytest.raises(KeyboardInterrupt): press()
    signal.signal(signal.SIGINT, signal.default_int_handler)

def test_a_process_forked_within_ignores_interrupts(usual):
    with interrupt_later(limit=0):
        pid = os.fork()
        if not pid:
            try: press(); press(); os._exit(7)
            finally: os._exit(8)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


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

    def test_set_seed_and_preserve_rng(self):
        def draw(): return torch.rand(4, device='cuda').tolist()
        set_seed(42); a = draw()
        set_seed(42); assert draw() == a
        with preserve_rng(): b = draw()
        with preserve_rng(): set_seed(0); draw()
        assert draw() == b != a
        with preserve_rng(cuda=False): c = draw()
        assert draw() != c, 'cuda=False leaves the device alone'

    @pytest.mark.parametrize('inside', ['torch.rand(3, device="cuda")', 'set_seed(7)', 'set_seed(7); torch.rand(3, device="cuda")', 'torch.rand(3, device="cuda"); set_seed(7)'])
    def test_cuda_first_used_within(self, inside):
        "What CUDA draws after the block does not depend on whether it was started inside."
        def code(body): return ('import torch; from dl2lib.core import *; set_seed(42)\n'
                                f'with preserve_rng(): {body}\nprint(torch.rand(4, device="cuda").tolist(), torch.rand(4).tolist())')
        assert fresh(code(inside)) == fresh(code('pass'))
