"state: what a caller must find as it was left, also after an error; random state that is read, compared, saved and put back."
import io, os, random, re, signal, subprocess, sys, threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dl2lib import state
from dl2lib.state import (draws_nothing, interrupt_later, preserve_mode, preserve_rng, rng_state, same_rng_state, seed_cpu,
                          set_rng_state, set_seed)

cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')]


def fresh(code): # what `code` prints in a process of its own
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=120, cwd=Path(state.__file__).parents[1]).stdout.strip()

def draws(): return random.random(), np.random.rand(), torch.rand(()).item()


@pytest.fixture
def dropout(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)))


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
    assert fresh('import torch; from dl2lib.state import *\nwith preserve_rng(): torch.rand(2)\nprint(torch.cuda.is_initialized())') == 'False'

def test_a_seed_that_waits_for_cuda_is_put_back(monkeypatch): # torch keeps the seed for a CUDA that was not yet started
    calls = []
    set_seed(42)
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: False)
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', calls.append)
    with preserve_rng(): torch.rand(2)
    assert calls == [], 'no seed was set'
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
    monkeypatch.setattr(state.time, 'monotonic', lambda: clock[0])
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


# random state, read and put back

def test_the_state_is_read_and_put_back_any_number_of_times():
    set_seed(3)
    draws(); np.random.randn() # NumPy keeps the second of a pair of normal numbers: part of its state
    s = rng_state()
    first = [draws(), np.random.randn()]
    for _ in range(2):
        assert not same_rng_state(s, rng_state())
        set_rng_state(s)
        assert same_rng_state(s, rng_state()) and [draws(), np.random.randn()] == first

def test_a_state_is_plain_data_for_a_checkpoint():
    s, f = rng_state(), io.BytesIO()
    a = draws()
    torch.save(s, f); f.seek(0)
    back = torch.load(f, weights_only=True)
    assert same_rng_state(back, s)
    set_rng_state(back)
    assert draws() == a

def test_the_state_of_an_older_checkpoint_is_put_back(): # its NumPy part was a list of numbers
    s = rng_state()
    kind, keys, *rest = np.random.get_state()
    a = draws()
    set_rng_state({**s, 'numpy': (kind, keys.tolist(), *rest)})
    assert draws() == a

@pytest.mark.parametrize('use', [random.random, np.random.rand, lambda: torch.rand(1), np.random.randn])
def test_each_generator_that_is_used_is_noticed(use):
    seed_cpu(5); np.random.randn() # the next normal number is kept already
    s = rng_state(devices=False)
    assert same_rng_state(s, rng_state(devices=False))
    use()
    assert not same_rng_state(s, rng_state(devices=False))

def test_a_state_does_not_move_with_the_generators():
    s = rng_state()
    kept = s['torch'].clone(), s['numpy'][1].clone()
    for _ in range(1000): draws()
    assert torch.equal(s['torch'], kept[0]) and torch.equal(s['numpy'][1], kept[1])

def test_every_cuda_device_is_read_and_those_that_are_gone_are_left_out(monkeypatch):
    states, put = [torch.tensor([1]), torch.tensor([2])], {}
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_rng_state_all', lambda: states)
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda o, i: put.update({i: o}))
    s = rng_state()
    assert s['cuda'] == states and rng_state(devices=False)['cuda'] == []
    set_rng_state(s)
    assert list(put) == [0] and put[0] is states[0]
    states[0] = torch.tensor([9])
    assert not same_rng_state(s, {**rng_state(), 'cuda': [torch.tensor([1]), torch.tensor([3])]})

def test_a_declared_transform_needs_no_seed_and_its_subclass_does():
    class Plain:
        random = False
        def __call__(self, x): return x
    class Sub(Plain): pass
    f = lambda x: x
    f.random = False
    assert [draws_nothing(o) for o in (Plain(), Sub(), f, len)] == [True, False, True, False]


# CUDA

class TestCuda:
    pytestmark = cuda

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
        def code(body): return ('import torch; from dl2lib.state import *; set_seed(42)\n'
                                f'with preserve_rng(): {body}\nprint(torch.rand(4, device="cuda").tolist(), torch.rand(4).tolist())')
        assert fresh(code(inside)) == fresh(code('pass'))
