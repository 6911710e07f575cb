"""The cache of decoded items: the same bits as without it, what changes its key, what is covered, and faults: processes that die or race,
full disks, damaged files. What a worker process has to import stands at the top level of this file."""
import errno, functools, io, multiprocessing, os, pickle, random, shutil, signal, struct, subprocess, sys, textwrap, time, warnings
from collections import namedtuple
from functools import partial
from pathlib import Path

import filelock
import numpy as np
import PIL.Image
import pytest
import torch
from test_datablock import Jitter, assert_same_batches, passes, rng_states, same, traced

import dl2lib.datacache as dc
from dl2lib import safefile
from dl2lib.datablock import (CategoryProcessor, ImageFileError, ImageList, ItemList, LabeledData, Paths, ResizeFixed, SplitData, Transform,
                              get_dls, grandparent_splitter, label_by_func, make_rgb, open_image, parent_labeler, random_splitter,
                              to_byte_tensor, to_float_tensor)
from dl2lib.datacache import CachedList, CacheError, CacheFile, cached
from dl2lib.images import jpeg_decoder
from dl2lib.safefile import locked

pytestmark = pytest.mark.filterwarnings('ignore:.*TorchVision are deprecated', 'ignore:This DataLoader will create 4')
decoders = pytest.mark.parametrize('decoder', [open_image, jpeg_decoder], ids=['pil', 'jpeg'])
here = Path(__file__).parent


def noise(size, seed):
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(small).resize(size, PIL.Image.Resampling.BICUBIC)

@pytest.fixture
def folder(tmp_path):
    "Twenty-four small JPEGs of several sizes in four classes, with the layout of Imagenette."
    path, k = tmp_path/'images', 0
    for side, n in ('train', 4), ('val', 2):
        for c in range(4):
            (path/side/f'c{c}').mkdir(parents=True)
            for i in range(n): noise((20+c, 16+i), k := k+1).save(path/side/f'c{c}'/f'{i}.jpg', quality=90)
    return path

@pytest.fixture
def store(tmp_path): return tmp_path/'cache'

def images(folder, *tfms, size=8, decoder=open_image): return ImageList.from_files(folder, tfms=[make_rgb, ResizeFixed(size), to_byte_tensor, *tfms], decoder=decoder)
def split(il): return SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val'))
def label(sd): return label_by_func(sd, parent_labeler, proc_y=CategoryProcessor())
def files(store): return sorted(p.name for p in store.iterdir()) if store.exists() else []
def caches(store): return [n for n in files(store) if n.endswith('.cache')]

class Counts:
    "A decoder that counts its calls in a file's length, whichever process makes them."
    cache_key = 'counts'
    def __init__(self, log): self.log = log
    def __call__(self, fn):
        with open(self.log, 'ab', buffering=0) as f: f.write(b'.')
        return open_image(fn)
    @property
    def n(self): return os.path.getsize(self.log) if os.path.exists(self.log) else 0


# The same as without it

def loader(sd, **kw): return get_dls(sd.train, sd.valid, 5, seed=3, **kw)[0]

@decoders
def test_batches_are_those_without_it_for_all_workers(folder, store, decoder):
    plain = label(split(images(folder, Jitter(), decoder=decoder)))
    quick = cached(plain, store)
    assert isinstance(quick.train.x, CachedList) and [type(f) for f in quick.train.x.tfms] == [Jitter]
    ref = passes(loader(plain))
    assert not torch.equal(ref[0][0][0], ref[1][0][0])
    for kw in dict(num_workers=0), dict(num_workers=1), dict(num_workers=2, persistent_workers=True), dict(num_workers=4):
        assert_same_batches(passes(loader(quick, **kw)), ref)

def test_batches_are_the_same_under_spawn(folder, store):
    plain = label(split(images(folder, Jitter())))
    assert_same_batches(passes(loader(cached(plain, store), num_workers=2, multiprocessing_context='spawn', persistent_workers=True)), passes(loader(plain)))

def first_row(x): return x.double()[0]
first_row._order = 40

def as_array(x): return np.asarray(x)

@pytest.mark.parametrize('tfms', [
    (), (make_rgb,), (make_rgb, ResizeFixed(8)), (make_rgb, ResizeFixed((9, 4)), to_byte_tensor), (make_rgb, ResizeFixed(8), to_byte_tensor, to_float_tensor),
    (make_rgb, ResizeFixed(8), to_byte_tensor, to_float_tensor, first_row),
    (make_rgb, as_array), (make_rgb, as_array, partial(np.ndarray.astype, dtype='>f4'))], ids=len)
@decoders
def test_items_are_those_without_it(folder, store, tfms, decoder):
    il = ImageList.from_files(folder, tfms=list(tfms), decoder=decoder)
    c = cached(il, store)
    assert list(c.items) == list(il.items) and c.tfms == [] and c.path == il.path
    for a, b in zip(il, c, strict=True):
        assert isinstance(a, PIL.Image.Image) == isinstance(b, PIL.Image.Image)
        if isinstance(a, torch.Tensor): same(a, b)
        elif isinstance(a, np.ndarray): assert a.dtype == b.dtype and np.array_equal(a, b)
        else: assert a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()

@pytest.mark.parametrize('make', [
    *(lambda d=d: torch.arange(24).reshape(2, 3, 4).to(d) for d in (torch.uint8, torch.bool, torch.bfloat16, torch.float64, torch.complex64, torch.int16)),
    lambda: torch.tensor(3.), lambda: torch.zeros(0, 3), lambda: torch.zeros(1, 1, 1, 1, 1, 2), lambda: torch.rand(4, 6).T, lambda: torch.rand(2, 3)[:, ::2],
    lambda: torch.tensor([1+2j]).conj(), lambda: np.arange(6).reshape(2, 3)[:, ::-1], lambda: np.array(['a', 'bcd']), lambda: np.array('2020', 'M8[Y]'),
    *(lambda m=m: PIL.Image.frombytes(m, (5, 3), bytes(range(256))[:len(PIL.Image.new(m, (5, 3)).tobytes())]) for m in sorted(dc._modes))])
def test_what_is_packed_is_unpacked(make):
    o = make()
    kind, shape, data = dc._pack(o)
    buf = np.frombuffer(data, np.uint8)
    new = dc._unpacker(kind)(buf, shape)
    if isinstance(o, torch.Tensor): same(new, o.resolve_conj()); assert new.is_contiguous()
    elif isinstance(o, np.ndarray): assert new.dtype == o.dtype and new.shape == o.shape and (new == o).all() and new.flags.writeable
    else: assert (new.mode, new.size, new.tobytes()) == (o.mode, o.size, o.tobytes())

def test_before_or_after_splitting_and_labelling_it_is_one_file(folder, store):
    il = images(folder, decoder=Counts(store.parent/'log'))
    whole = cached(il, store)
    n = il.decoder.n
    results = [label(split(whole)), label(cached(split(il), store)), cached(label(split(il)), store)]
    assert len(caches(store)) == 1 and files(store) == caches(store)
    assert il.decoder.n <= n + 4*8                          # each call tries a few
    ref = label(split(images(folder)))
    for sd in results:
        assert type(sd) is SplitData and type(sd.train) is LabeledData and isinstance(sd.valid.x, CachedList)
        for side in 'train', 'valid':
            a, b = getattr(sd, side), getattr(ref, side)
            assert a.x.items == b.x.items and a.y.items == b.y.items and isinstance(a.x.items, Paths)
            for i in range(len(a)): same(a[i][0], b[i][0])
    assert results[2].train.proc_y.vocab == ['c0', 'c1', 'c2', 'c3']
    random_split = SplitData.split_by_func(whole, random_splitter)
    for i, fn in enumerate(random_split.valid.items): same(random_split.valid[i], ref.train.x.new([fn])[0])

def test_what_was_given_stays_as_it_was(folder, store):
    il = images(folder, Jitter())
    ll = label(split(il))
    before, tfms = rng_states(), list(il.tfms)
    quick = cached(ll, store)
    assert rng_states() == before and ll.train.x.tfms == tfms and type(ll.train.x) is ImageList and ll.train.x is not quick.train.x
    plain = quick.train.x.uncached
    assert type(plain) is ImageList and plain.items == ll.train.x.items and plain.tfms == tfms and plain.decoder is open_image

def test_sides_with_transforms_of_their_own_have_a_file_each(folder, store):
    sd = split(images(folder))
    sd.valid.tfms = [make_rgb, ResizeFixed(4), to_byte_tensor]
    c = cached(sd, store)
    assert len(caches(store)) == 2 and c.train[0].shape == (3, 8, 8) and c.valid[0].shape == (3, 4, 4)
    sd.valid.tfms = [*sd.train.tfms, Jitter()]              # random ones do not matter for it
    assert cached(sd, store).train.file.path == cached(sd, store).valid.file.path

def test_items_are_copies(folder, store):
    for tfms in [], [to_byte_tensor], [np.asarray]:
        c = cached(ImageList.from_files(folder, tfms=tfms), store)
        x, ref = c[0], c[0]
        if isinstance(x, PIL.Image.Image): x.paste((1, 2, 3), (0, 0, *x.size)); assert x.tobytes() != c[0].tobytes() == ref.tobytes()
        else: x += 1; assert (np.asarray(c[0]) == np.asarray(ref)).all() and (np.asarray(x) != np.asarray(ref)).all()
        with pytest.raises(ValueError, match='read-only'): c.file.data[100] = 1

def test_repr_says_what_is_covered(folder, store):
    c = cached(images(folder, Jitter()), store)
    text = repr(c)
    assert 'CachedList (24 items)' in text and 'Cached: open_image, make_rgb, ResizeFixed((8, 8)), to_byte_tensor\nLeft: Jitter()\nFile: ' in text
    assert 'Cached: jpeg_decoder\nLeft: nothing' in repr(cached(ImageList.from_files(folder, decoder=jpeg_decoder), store))

def test_a_cached_list_is_cached_again_by_looking_at_the_files(folder, store):
    c = cached(images(folder, Jitter()), store)
    again = cached(c, store)
    assert again.file.path == c.file.path and again.file.digest == c.file.digest and type(again.uncached) is ImageList
    os.utime(c.items[0], ns=(1, 1))
    assert cached(c, store).file.digest != c.file.digest

def test_subsets_and_what_is_not_in_the_file(folder, store):
    il = images(folder)
    c = cached(split(il).train, store)
    same(torch.stack(c.new(c.items[3:5])[:]), torch.stack(il.new(c.items[3:5])[:]))
    same(c.new([str(c.items[2])])[0], c[2])                 # strings, and other ways to write a path
    same(c.new([os.path.join(folder, 'train', '.', 'c0//0.jpg')])[0], c[0])
    with pytest.raises(CacheError, match=r'val/c0/0.jpg is not in the cache .*\.cache: call cached'): c.new([folder/'val'/'c0'/'0.jpg'])[0]
    with pytest.raises(TypeError, match='becomes no ItemList: take its `uncached`'): c.new([], ItemList)

def test_the_same_file_twice_in_a_list(folder, store):
    il = images(folder)
    c = cached(il.new([*il.items, il.items[0]]), store)
    assert len(c) == 25 and len(c.file) == 24
    same(c[24], c[0])

def test_explain_and_check_take_it(folder, store):
    sd = cached(label(split(images(folder))), store)
    assert 'get' in repr(sd.explain(0)) and not sd.check().unreadable

@pytest.mark.parametrize('what, error, text', [
    (ItemList([1, 2]), CacheError, '1 is no path'), (ItemList([]), CacheError, 'has no items'), ([1], TypeError, 'takes an item list, .* not list')])
def test_what_is_no_list_of_files(what, error, text, store):
    with pytest.raises(error, match=text): cached(what, store)
    assert not files(store)

def test_a_data_bunch_is_refused_with_the_remedy(folder, store):
    with pytest.raises(TypeError, match='not DataBunch: call it before to_databunch'): cached(label(split(images(folder))).to_databunch(4), store)


# Which transforms are covered

class Draws(Transform):
    "Draws from one generator, and with probability `p` does something with it."
    _order = 25
    def __init__(self, which, p=.5): self.which, self.p = which, p
    def __call__(self, x):
        u = dict(python=random.random, numpy=np.random.rand, torch=lambda: float(torch.rand(())))[self.which]()
        return x.flip(-1) if u < self.p else x

@pytest.mark.parametrize('p', [.5, .01, 0.])
@pytest.mark.parametrize('which', ['python', 'numpy', 'torch'])
def test_a_transform_that_draws_is_found(folder, store, which, p):
    late = partial(torch.add, other=1)
    late.__dict__['_order'] = 40
    c = cached(images(folder, Draws(which, p), late), store)
    assert c.tfms[0].which == which and c.tfms[1] is late   # what comes after it is not covered either
    assert [len(c.names), len(c.tfms)] == [4, 2]

def test_a_transform_may_say_so_itself(folder, store):
    def known(x): return x
    known._order, known.random = 25, True
    assert cached(images(folder, known), store).tfms == [known]
    assert cached(images(folder, p := partial(known)), store).tfms == [p] or p in cached(images(folder, p), store).tfms
    liar = Draws('numpy', 0)
    liar.random = False
    with pytest.raises(CacheError, match=r'Draws\(.*random=False\) says random = False, but it draws'): cached(images(folder, liar), store)

class Own(Transform):
    "Draws from a generator of its own."
    _order = 25
    def __init__(self, rng): self.rng = rng
    def __call__(self, x): return x

@pytest.mark.parametrize('rng', [random.Random(0), np.random.default_rng(0), np.random.RandomState(0), torch.Generator()])
def test_a_transform_with_a_generator_of_its_own_is_random(folder, store, rng):
    assert len(cached(images(folder, Own(rng)), store).tfms) == 1
    def closure(x, g=rng): return x
    closure._order = 25
    assert cached(images(folder, closure), store).tfms == [closure]

def test_a_transform_that_gives_another_result_the_second_time_is_random(folder, store):
    class Moody(Transform):
        _order, n = 25, 0
        def __call__(self, x): self.n += 1; return x + self.n
    assert len(cached(images(folder, Moody()), store).tfms) == 1

def test_a_random_transform_that_comes_first_leaves_the_decoding(folder, store):
    def jitter(im): return im.rotate(random.randrange(90))
    c = cached(ImageList.from_files(folder, tfms=[jitter, make_rgb, ResizeFixed(8), to_byte_tensor]), store)
    assert c.names == ['open_image'] and len(c.tfms) == 4 and isinstance(c.get(c.items[0]), PIL.Image.Image)

def rare(x): # draws for a few images only
    return x.flip(-1) if int(x[0, 0, 0]) % 4 == 1 and random.random() < .5 else x
rare._order = 25

@pytest.mark.parametrize('threads', [1, 3])
def test_a_transform_that_seldom_draws_is_caught_in_the_making(tmp_path, store, threads):
    for i in range(60): PIL.Image.new('RGB', (4, 4), (1 if i == 37 else 2, 0, 0)).save(tmp_path/f'{i:02d}.png')
    il = ImageList([tmp_path/f'{i:02d}.png' for i in range(60)], tmp_path, [to_byte_tensor, rare])
    before = rng_states()
    with pytest.raises(CacheError, match='^rare draws random numbers, .*for .*37.png. A transform with the attribute random = True'): cached(il, store, threads)
    assert not files(store) and rng_states() == before
    rare.random = True
    try: assert cached(il, store).tfms == [rare]
    finally: del rare.random

def test_a_decoder_that_seldom_draws_is_caught_in_the_making(folder, store):
    def odd(fn): return [open_image(fn), random.random() if fn.name == '1.jpg' and fn.parent.name == 'c1' else 0][0]
    with pytest.raises(CacheError, match='^odd draws random numbers, .* for .*c1/1.jpg'): cached(images(folder, decoder=odd), store)
    assert not files(store)

def test_a_decoder_that_draws_is_refused(folder, store):
    def noisy(fn): random.random(); return open_image(fn)
    with pytest.raises(CacheError, match='noisy draws random numbers: what it gives cannot be cached'): cached(images(folder, decoder=noisy), store)
    with pytest.raises(CacheError, match='rng is a random generator'): cached(images(folder, decoder=Own(random.Random(0))), store)

@pytest.mark.parametrize('tfm, text', [
    (lambda im: im.convert('P'), "odd gives a PIL image of mode P, which cannot be cached: put make_rgb before"),
    (lambda im: {'a': 1}, 'odd gives a dict, which cannot be cached: end with to_byte_tensor'),
    (lambda im: torch.zeros(2, requires_grad=True), 'gives a Tensor'), (lambda im: torch.zeros(2).to_sparse(), 'gives a Tensor'),
    (lambda im: torch.nn.Parameter(torch.zeros(2)), 'gives a Parameter'), (lambda im: np.array([None]), 'gives a ndarray'),
    (lambda im: torch.zeros(2, device='meta'), 'gives a Tensor')])
def test_what_cannot_be_stored_names_item_and_transform(folder, store, tfm, text):
    tfm.__name__ = tfm.__qualname__ = 'odd'
    with pytest.raises(CacheError, match=rf'0\.jpg: .*{text}'): cached(ImageList.from_files(folder, tfms=[make_rgb, tfm]), store)
    assert not files(store)

def test_what_cannot_be_stored_later_in_the_list_is_named(tmp_path, store):
    for i in range(30): PIL.Image.new('P' if i == 16 else 'RGB', (4, 4)).save(tmp_path/f'{i:02d}.png')
    with pytest.raises(CacheError, match=r'16.png: open_image gives a PIL image of mode P'): cached(ImageList([tmp_path/f'{i:02d}.png' for i in range(30)]), store)
    assert not files(store)


# The key

def digest(il, store, threads=None):
    c = cached(il, store, threads)
    return c.file.path.name, c.file.digest

def test_a_changed_file_is_noticed_and_replaces_the_cache(folder, store):
    il = images(folder)
    one = cached(il, store)
    fn = il.items[7]
    old = fn.read_bytes()
    im = PIL.Image.new('RGB', (20, 16), (9, 9, 9))
    fn.write_bytes(b''); im.save(fn)                        # another size
    two = cached(il, store)
    assert two.file.path == one.file.path and two.file.digest != one.file.digest and len(caches(store)) == 1
    same(two[7], il[7])
    st = fn.stat()
    fn.write_bytes(bytes(reversed(fn.read_bytes())))        # the same size, other bytes
    os.utime(fn, ns=(st.st_atime_ns, st.st_mtime_ns+1000))
    with pytest.raises(ImageFileError, match=fn.name): cached(il, store)
    fn.write_bytes(old)
    same(cached(il, store)[7], il[7])
    assert files(store) == caches(store) and len(caches(store)) == 1

def test_who_reads_the_old_file_goes_on_or_says_so(folder, store):
    il = images(folder)
    old, unread = cached(il, store), None
    unread, ref = pickle.loads(pickle.dumps(old)), il[0]
    old[0]
    PIL.Image.new('RGB', (20, 16)).save(il.items[0])
    cached(il, store)
    same(old[0], ref)                                       # mapped before it was replaced
    with pytest.raises(CacheError, match=r'\.cache was made anew from other files: call cached'): unread[0]

def test_another_list_has_a_file_of_its_own_and_the_order_does_not_matter(folder, store):
    il = images(folder)
    name, key = digest(il, store)
    whole = (store/name).read_bytes()
    assert digest(il.new(il.items[::-1]), store) == (name, key) and digest(il.new([*il.items]), store, 1) == (name, key)
    assert digest(il.new(il.items[:-1]), store)[0] != name
    (store/name).unlink()
    assert digest(il.new(il.items[::-1]), store, 3) == (name, key) and (store/name).read_bytes() == whole

def test_relative_paths_are_of_their_folder(folder, store, tmp_path, monkeypatch):
    other = tmp_path/'other'
    shutil.copytree(folder, other/'images')
    monkeypatch.chdir(tmp_path)
    a = digest(images('images'), store)
    monkeypatch.chdir(other)
    assert digest(images('images'), store) != a

def test_sizes_decoders_and_transforms_are_of_the_key(folder, store):
    variants = [images(folder), images(folder, size=4), images(folder, size=(8, 4)), images(folder, decoder=jpeg_decoder), images(folder, to_float_tensor),
                ImageList.from_files(folder, tfms=[ResizeFixed(8), to_byte_tensor]), ImageList.from_files(folder, tfms=[make_rgb, make_rgb, ResizeFixed(8), to_byte_tensor])]
    names = [digest(il, store)[0] for il in variants]
    assert len(set(names)) == len(names) == len(caches(store))
    assert names == [digest(il, store)[0] for il in variants]

def f_of(text, **scope):
    "The function f of a source text."
    exec(textwrap.dedent(text), scope := dict(__name__='made') | scope)
    return scope['f']

def key(o): return dc._key(o, 'it')

base = 'def f(x, n=1): return x+n'
@pytest.mark.parametrize('a, b', [
    (f_of(base), f_of('def f(x, n=2): return x+n')), (f_of(base), f_of('def f(x, *, n=1): return x+n')), (f_of(base), f_of(base.replace('f(', 'g(') + '\nf = g')),
    (f_of('def f(x, *, n=1): return x+n'), f_of('def f(x, *, n=2): return x+n')), (f_of('class f: pass'), f_of('class g: pass\nf = g')),
    (f_of('def g(n):\n  def f(x): return x+n\n  return f\nf = g(1)'), f_of('def g(n):\n  def f(x): return x+n\n  return f\nf = g(2)')),
    (f_of('class f:\n  def __init__(s, n): s.n = n\nf = f(1)'), f_of('class f:\n  def __init__(s, n): s.n = n\nf = f(2)')),
    (f_of(base + '\nf.cache_key = 1'), f_of(base + '\nf.cache_key = 2')), (f_of(base + '\nf.cache_key = 1'), f_of(base)),
    (partial(round, ndigits=1), partial(round, ndigits=2)), (partial(pow, 2), partial(pow, 3)), (partial(max, 1), partial(min, 1)), (str.upper, str.lower),
    ('a'.join, 'b'.join), (np.add, np.subtract), (torch.add, torch.sub), (1, 1.), (1, True), ('1', 1), (b'a', 'a'), (0., -0.), ([1], (1,)), ([1, 2], [2, 1]),
    ([[1], 2], [[1, 2]]), ({1: 2}, {2: 1}), ({'a', 'b'}, {'a'}), (None, False), (torch.zeros(2), torch.zeros(2, 1)), (torch.zeros(2), np.zeros(2)),
    (torch.zeros(2), torch.zeros(2).half()), (torch.tensor([1.]), torch.tensor([2.])), (np.zeros(2), np.zeros(2, 'f4')), (Path('a'), Path('b')),
    (__import__('re').compile('a'*300), __import__('re').compile('a'*300+'b')), (__import__('re').compile('a'), __import__('re').compile('a', 2)),
    (torch.uint8, torch.int8), (PIL.Image.Resampling.BILINEAR, PIL.Image.Resampling.BICUBIC), (namedtuple('p', 'x')(1), namedtuple('p', 'x')(2)),
    (torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1))])
def test_what_makes_another_key(a, b):
    assert key(a) != key(b)

@pytest.mark.parametrize('make', [
    lambda: f_of(base), lambda: f_of('\n\n\n' + base), lambda: f_of('def f(x): return x+N', N={1, 'a', (2, 3)}), lambda: f_of('def f(x): return f(x-1) if x else 0'),
    lambda: f_of('def g(x): return f(x)\ndef f(x): return g(x)'), lambda: f_of('class f:\n  def g(self): return f, super()'), lambda: ResizeFixed(3), lambda: Jitter(),
    lambda: f_of('def f(x): return x.data', data=object()), lambda: partial(make_rgb), lambda: {'b': 1, 'a': [2, {3}]}, lambda: torch.ones(3)[::2], lambda: math_like().g,
    lambda: f_of('def g():\n  def f(x): return y\n  return f\n  y = 1\nf = g()'), lambda: noise((3, 2), 1), lambda: torch.nn.Linear(1, 1, bias=False).requires_grad_(False).half().zero_grad])
def test_what_makes_the_same_key(make):
    if make().__class__ is type(math_like().g) and hasattr(make(), '__self__') and isinstance(make().__self__, torch.nn.Module): torch.manual_seed(0)
    torch.manual_seed(0); a = key(make()); torch.manual_seed(0)
    assert a == key(make())

class math_like:
    def g(self, x): return x

@pytest.mark.parametrize('a, b', [
    (f_of(base), f_of('def f(x, n=1): return x-n')), (f_of('def f(x): return x+N', N=1), f_of('def f(x): return x+N', N=2)),
    (f_of('class f:\n  def __call__(s, x): return x'), f_of('class f:\n  def __call__(s, x): return x+1')), (functools.lru_cache(f_of(base)), functools.lru_cache(f_of(base)))])
def test_code_and_globals_are_not_of_the_key(a, b): assert key(a) == key(b)

def counts(x):
    counter[0] += 1
    return x
counter = [0]
counts._order = 25

def test_a_transform_that_counts_in_a_global_finds_its_file_again(folder, store):
    names = {digest(images(folder, counts), store) for _ in range(3)}
    assert len(names) == 1 == len(caches(store)) and counter[0] >= 24

def test_a_lambda_stays_outside_with_a_warning(folder, store):
    with pytest.warns(UserWarning, match='lambda.*not cached.*write a function with a name'):
        c = cached(ImageList.from_files(folder, tfms=[make_rgb, ResizeFixed(8), lambda im: im.rotate(90), to_byte_tensor]), store)
    assert len(c.tfms) == 2 and c.names == ['open_image', 'make_rgb', 'ResizeFixed((8, 8))']
    same(c[3], ImageList.from_files(folder, tfms=[make_rgb, ResizeFixed(8), rotated, to_byte_tensor])[3])
    with pytest.raises(CacheError, match='is a lambda, which has no name'): cached(images(folder, decoder=lambda fn: open_image(fn)), store)

def rotated(im): return im.rotate(90)

def test_a_replaced_file_of_the_same_size_and_time_is_noticed(folder, store):
    il = images(folder)
    a, fn = digest(il, store), il.items[3]
    st, other = fn.stat(), il.items[4]
    data = fn.read_bytes()
    fn.rename(folder/'old')
    fn.write_bytes(data[::-1]); os.utime(fn, ns=(st.st_atime_ns, st.st_mtime_ns))
    with pytest.raises(ImageFileError, match=fn.name): digest(il, store)
    assert other.is_file() and a

def upright(im): # looks at what a picture holds beside its pixels
    import PIL.ImageOps
    return PIL.ImageOps.exif_transpose(im)

def flattened(im): return im.convert('RGBA').convert('LA')

def test_what_a_later_step_looks_at_is_not_lost(tmp_path, store):
    exif = PIL.Image.Exif(); exif[274] = 6
    for i in range(9): noise((20, 16), i).save(tmp_path/f'{i}.jpg', **(dict(exif=exif) if i == 7 else {}))
    def jitter(im): return im.rotate(random.choice([0]))
    il = ImageList([tmp_path/f'{i}.jpg' for i in range(9)], tfms=[jitter, upright, make_rgb, ResizeFixed(8), to_byte_tensor])
    for i, x in enumerate(cached(il, store)): same(x, il[i])   # turned by `open_image`, and says so no longer
    il.decoder = partial(open_image, exif=False)
    with pytest.raises(CacheError, match=r'7\.jpg: .*gives a PIL image of mode RGB with an EXIF orientation, which cannot be cached'): cached(il, store)
    for i in range(9): noise((20, 16), i).save(tmp_path/f'{i}.png', transparency=(1, 2, 3))
    il = ImageList([tmp_path/f'{i}.png' for i in range(9)], tfms=[jitter, flattened, ResizeFixed(8), to_byte_tensor])
    with pytest.raises(CacheError, match='with transparency, which cannot be cached'): cached(il, store)
    il.tfms = [make_rgb, ResizeFixed(8), to_byte_tensor]
    for i in range(9): same(cached(il, store).get(il.items[i]), to_byte_tensor(ResizeFixed(8)(open_image(il.items[i]))))

def test_the_key_looks_at_values_not_at_what_is_left_out_of_pickles():
    class Keeps(Transform):
        def __init__(self): self.kept = {}
        def __getstate__(self): return {}
    a = Keeps()
    before = key(a)
    a.kept[1] = object()
    assert key(a) == before

@pytest.mark.parametrize('value', [(o for o in []), open(__file__), memoryview(b'a'), sys._getframe(), __import__('threading').Lock()])
def test_what_cannot_be_keyed_is_named_with_the_remedy(folder, store, value):
    t = Own(value)
    with pytest.raises(CacheError, match=rf'^Own\.rng is a {type(value).__qualname__}, of which .* give the object that holds it an attribute cache_key'): cached(images(folder, t), store)
    t.cache_key = 'first'
    a = digest(images(folder, t), store)
    t.cache_key = 'second'
    assert digest(images(folder, t), store)[0] != a[0]
    def f(x): return x if value else x
    f._order = 25
    with pytest.raises(CacheError, match=rf'f\.value is a {type(value).__qualname__}'): cached(images(folder, f), store)
    assert not [n for n in files(store) if not n.endswith('.cache')]

def in_python(code, *args, seed):
    "What a fresh Python prints, in which this file's names are known."
    env = os.environ | dict(PYTHONHASHSEED=seed, PYTHONPATH=os.pathsep.join([str(here.parent), str(here)]))
    code = 'import sys\nfrom test_datacache import *\n' + textwrap.dedent(code)
    res = subprocess.run([sys.executable, '-c', code, *map(str, args)], env=env, capture_output=True, text=True, timeout=100)
    assert res.returncode == 0, res.stderr
    return res.stdout.strip()

class Forked:
    "`f` in a process of its own."
    ctx = multiprocessing.get_context('fork')
    def __init__(self, f):
        self.here, there = self.ctx.Pipe(False)
        self.p = self.ctx.Process(target=lambda: there.send(f()))
        self.p.start(); there.close()
    def result(self, seconds=60):
        assert self.here.poll(seconds), 'it does not end'
        res = self.here.recv()                              # EOFError: it has failed, and says why on stderr
        self.p.join(seconds)
        return res
    def once(self, cond, seconds=60): # waits for it
        end = time.time() + seconds
        while not cond(): assert time.time() < end and self.p.is_alive(); time.sleep(.005)

def words(x, known={'a', 'b', 'c', 'dd'}, table={'x': {'y', 'z'}}): return x if 'a' in known | {'e', 'f'} else x # noqa: B006
words._order = 25

def test_the_key_is_the_same_in_other_processes(folder, store):
    code = '''
        il = images(sys.argv[1], words)
        print(cached(il, sys.argv[2]).file.digest.hex(), len(caches(Path(sys.argv[2]))))'''
    known = f'{digest(images(folder, words), store)[1].hex()} 1'
    for seed in '0', '77': assert in_python(code, folder, store, seed=seed) == known

def test_versions_are_of_the_key(folder, store, monkeypatch):
    a = digest(images(folder), store)
    monkeypatch.setattr(dc, 'version', lambda name: '99')
    assert digest(images(folder), store) != a

def test_a_lists_own_get_and_attributes_are_of_the_key(folder, store):
    class Grey(ImageList):
        level = 3
        def get(self, fn): return super().get(fn).convert('L')
    class Other(ImageList):
        level = 3
        def get(self, fn): return super().get(fn).convert('L').rotate(180)
    names = {digest(cls.from_files(folder), store)[0] for cls in (ImageList, Grey, Other)}
    il = Grey.from_files(folder)
    il.extra = 5
    c = cached(il, store)
    assert len(names | {c.file.path.name}) == 4 and c[0].mode == 'L' and isinstance(c.uncached, Grey)

def test_a_file_that_changes_while_the_cache_is_made_is_named(folder, store):
    class Touches:
        cache_key, n = 1, 0
        def __call__(self, fn):
            self.n += 1
            if self.n == 15: os.utime(fn.parent/'0.jpg', ns=(5, 5))
            return open_image(fn)
    with pytest.raises(CacheError, match='0.jpg changed while the cache was made'): cached(images(folder, decoder=Touches()), store, threads=1)
    assert not files(store)
    cached(images(folder), store)


# Faults

class Fails:
    "A decoder that goes wrong after `n` calls."
    cache_key = 'fails'
    def __init__(self, n, how): self.n, self.how = n, how
    def __call__(self, fn):
        self.n -= 1
        if self.n < 0: self.how(fn)
        return open_image(fn)

def stop(fn): raise KeyboardInterrupt
def odd(fn): raise ZeroDivisionError('odd')
def die(fn): os.kill(os.getpid(), signal.SIGKILL)
def wait(fn): time.sleep(.3)

@pytest.mark.parametrize('n', [0, 8, 15, 23])
@pytest.mark.parametrize('how, error, text', [(stop, KeyboardInterrupt, None), (odd, ImageFileError, r'\.jpg cannot be read as an image: ZeroDivisionError: odd')])
def test_an_interrupted_making_leaves_nothing(folder, store, n, how, error, text):
    with pytest.raises(error, match=text): cached(images(folder, decoder=Fails(n, how)), store)
    assert not files(store)
    c = cached(images(folder, decoder=Fails(1000, how)), store)
    same(c[0], images(folder)[0])

def test_an_interrupt_from_outside_leaves_nothing(folder, store):
    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler) # a job in a shell's background is born deaf to it
        try: cached(images(folder, decoder=Fails(0, wait)), store, threads=2)
        except KeyboardInterrupt: return 'stopped'
    f = Forked(work)
    f.once(lambda: any(n.endswith('.tmp') for n in files(store)))
    os.kill(f.p.pid, signal.SIGINT)
    assert f.result() == 'stopped' and not files(store)

@decoders
def test_a_broken_image_is_named_and_leaves_nothing(folder, store, decoder):
    fn = folder/'train'/'c1'/'2.jpg'
    whole = fn.read_bytes()
    for broken in b'', b'no image', whole[:len(whole)//2], whole[:40], whole[:3], whole[:2]:
        fn.write_bytes(broken)
        with pytest.raises(ImageFileError, match=r'train/c1/2\.jpg cannot be read'): cached(images(folder, decoder=decoder), store)
        assert not files(store)
    fn.unlink()
    with pytest.raises(OSError, match=r'train/c1/2\.jpg'): cached(images(folder, decoder=decoder).new([*images(folder).items, fn]), store)

def test_a_killed_process_leaves_nothing_that_the_next_does_not_remove(folder, store):
    f = Forked(lambda: cached(images(folder, decoder=Fails(14, die)), store, threads=1))
    f.p.join(60)
    assert f.p.exitcode == -signal.SIGKILL
    assert len([n for n in files(store) if n.endswith('.tmp')]) == 1 and not caches(store)
    same(cached(images(folder), store)[3], images(folder)[3]) # another cache: it clears all the same
    assert files(store) == caches(store) and len(caches(store)) == 1

def test_the_temporary_file_of_a_live_process_stays(folder, store):
    f = Forked(lambda: len(cached(images(folder, decoder=Fails(0, wait)), store, threads=1)))
    f.once(lambda: any(n.endswith('.tmp') for n in files(store)))
    cached(images(folder), store)
    assert f.p.is_alive() and any(n.endswith('.tmp') for n in files(store))
    assert f.result() == 24 and len(caches(store)) == 2 and files(store) == caches(store)

def test_processes_at_once_make_it_once(folder, store, tmp_path):
    count, all_here = Counts(tmp_path/'log'), Forked.ctx.Barrier(3)
    def slow(fn): time.sleep(.01); return count(fn)
    slow.cache_key = 1
    def work():
        all_here.wait(60)
        c = cached(images(folder, decoder=slow), store)
        return c.file.digest, [x.tolist() for x in c]
    fs = [Forked(work) for _ in range(3)]
    ref = [x.tolist() for x in images(folder)]
    a, b, c = [f.result() for f in fs]
    assert a == b == c and a[1] == ref
    assert files(store) == caches(store) and len(caches(store)) == 1
    assert count.n == 3*8 + 24                              # each tries eight, one makes all

def test_processes_that_are_killed_at_any_time_leave_a_right_cache(folder, store):
    il, rng = images(folder), random.Random(1)
    ref = [x.tolist() for x in il]
    for _ in range(20):
        if rng.random() < .7: shutil.rmtree(store, ignore_errors=True)
        fs = [Forked(lambda: [x.tolist() for x in cached(il, store, threads=2)]) for _ in range(3)]
        time.sleep(rng.random()*.1)
        fs[0].p.kill()
        assert fs[1].result() == fs[2].result() == ref
        fs[0].p.join(60)
    cached(il, store).file.path.unlink()
    assert [x.tolist() for x in cached(il, store)] == ref and files(store) == caches(store)

def test_where_files_cannot_be_locked_it_works_all_the_same(folder, store, monkeypatch):
    def flock(*args): raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr('fcntl.flock', flock)
    store.mkdir()
    (store/'.of-another.cache.01234567.tmp').touch()        # whether its owner lives cannot be known: it stays
    same(cached(images(folder), store)[5], images(folder)[5])
    assert files(store) == ['.of-another.cache.01234567.tmp', *caches(store)] and len(caches(store)) == 1

def test_a_lock_that_another_process_holds_is_waited_for_with_a_word(folder, store, monkeypatch, capsys):
    il, real = images(folder), filelock.FileLock.acquire
    file = cached(il, store).file.path
    file.unlink()
    def hold():
        with locked(file):
            (store/'held').touch()
            time.sleep(1)
    def acquire(self, timeout=None): return real(self, .1 if timeout == 5 else timeout)
    other = Forked(hold)
    other.once(lambda: (store/'held').exists())
    (store/'held').unlink()
    monkeypatch.setattr(filelock.FileLock, 'acquire', acquire)
    cached(il, store)
    said = capsys.readouterr().err
    assert said == f'{file}: another process or thread is writing it; waiting\n' and files(store) == caches(store) == [file.name]

@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_so(folder, store, monkeypatch, code):
    real, n = dc._Writer.write, []
    def write(self, data):
        if len(n) == 1: raise OSError(code, os.strerror(code))
        n.append(1); real(self, data)
    monkeypatch.setattr(dc._Writer, 'write', write)
    with pytest.raises(OSError, match=r'cache is full, or no file may be as large: the cache of 24 items takes about 0 MB, [\d,]+ MB are free. Make room, or give another folder') as e:
        cached(images(folder), store)
    assert e.value.errno == code and not files(store)
    monkeypatch.undo()
    cached(images(folder), store)

def test_a_disk_that_will_be_full_is_known_before(folder, store, monkeypatch):
    il = images(folder, decoder=Counts(store.parent/'log'))
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: namedtuple('usage', 'total used free')(10**9, 10**9-2000, 2000))
    with pytest.raises(OSError, match='is full') as e: cached(il, store)
    assert e.value.errno == errno.ENOSPC and il.decoder.n <= 8 and not files(store)

def test_a_limit_on_file_sizes_is_a_full_disk(folder, store):
    def work():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try: cached(images(folder), store)
        except OSError as e: return e.errno, str(e)
    code, text = Forked(work).result()
    assert code == errno.EFBIG and 'is full, or no file may be as large' in text and not files(store)

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_device_that_is_really_full(folder, store, monkeypatch):
    monkeypatch.setattr(safefile, 'open', lambda tmp, mode: open('/dev/full', 'wb', buffering=0), raising=False)
    with pytest.raises(OSError, match='is full'): cached(images(folder), store)
    assert not files(store)

def test_a_folder_that_cannot_be_written_to(folder, tmp_path, monkeypatch):
    (tmp_path/'file').touch()
    with pytest.raises(OSError, match='cannot be written to. Give another folder'): cached(images(folder), tmp_path/'file'/'cache')
    real = os.open
    def closed(p, *a, **kw):
        if str(p).endswith('.lock'): raise PermissionError(13, 'Permission denied', str(p))
        return real(p, *a, **kw)
    monkeypatch.setattr(os, 'open', closed)
    with pytest.raises(PermissionError, match='shut cannot be written to'): cached(images(folder), tmp_path/'shut')
    monkeypatch.undo()
    ref = cached(images(folder), tmp_path/'shut')
    monkeypatch.setattr(os, 'open', closed)
    assert cached(images(folder), tmp_path/'shut').file.digest == ref.file.digest # what is there is read

def test_what_a_transform_may_not_read_is_not_blamed_on_the_folder(folder, store):
    class Masked:
        cache_key, n = 1, 0
        def __call__(self, x):
            self.n += 1
            if self.n > 20: raise PermissionError(13, 'Permission denied', '/elsewhere/mask.png')
            return x
    with pytest.raises(PermissionError, match=r"^\[Errno 13\] Permission denied: '/elsewhere/mask.png'"): cached(images(folder, Masked()), store)
    assert not files(store)

def flip(b, i): b = bytearray(b); b[i] ^= 16; return bytes(b)

@pytest.mark.parametrize('damage', [
    lambda b: b'', lambda b: b[:30], lambda b: b[:-1], lambda b: b[:len(b)//2], lambda b: b + b'x', lambda b: b'foreign ' * 100, lambda b: bytes(len(b)),
    *(lambda b, i=i: flip(b, i) for i in (0, 9, 20, 30, 38, 46, 54, 58)), lambda b: flip(b, -1), lambda b: flip(b, -20), lambda b: flip(b, -300)])
def test_a_damaged_file_is_noticed(folder, store, damage):
    il = images(folder)
    c = cached(il, store)
    c.file.path.write_bytes(damage(c.file.path.read_bytes()))
    with pytest.raises(CacheError, match=r'\.cache (is damaged|was made anew)'): pickle.loads(pickle.dumps(c))[0]
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        new = cached(il, store)
    assert all('is damaged' in str(w.message) and 'made anew' in str(w.message) and w.filename == __file__ for w in ws)
    for i in range(len(il)): same(new[i], il[i])
    assert files(store) == caches(store)

def test_an_older_format_is_noticed(folder, store):
    c = cached(images(folder), store)
    b = bytearray(c.file.path.read_bytes())
    struct.pack_into('<I', b, 8, 2)
    struct.pack_into('<I', b, dc._head.size, dc.zlib.crc32(bytes(b[:dc._head.size])))
    c.file.path.write_bytes(b)
    with pytest.warns(UserWarning, match=r'damaged \(of version 2\): it is made anew'): cached(images(folder), store)

def test_a_file_that_is_gone(folder, store):
    c = pickle.loads(pickle.dumps(cached(images(folder), store)))
    c.file.path.unlink()
    with pytest.raises(CacheError, match=r'\.cache is gone: call cached'): c[0]

def test_two_paths_of_one_hash_are_refused(folder, store, monkeypatch):
    monkeypatch.setattr(dc, '_hash64', lambda s: 7 if s.endswith('c0/1.jpg') or s.endswith('c2/3.jpg') else int.from_bytes(s.encode()[-16:], 'big') % 2**64)
    with pytest.raises(CacheError, match='two paths of one hash: .*jpg, .*jpg: rename one'): cached(images(folder), store)
    assert not files(store)

def test_names_that_are_unicode_bytes_or_odd(tmp_path, store):
    path = tmp_path/'odd [*] folder'
    path.mkdir()
    for n in 'äöü.png', 'a b\n.png', os.fsdecode(b'\xff\xfe.png'): noise((5, 5), len(n)).save(path/n)
    il = ImageList.from_files(path, tfms=to_byte_tensor)
    c = cached(il, store)
    for a, b in zip(il, c, strict=True): same(a, b)
    repr(c).encode()
    assert caches(store)[0].startswith('odd_____folder-')

def test_the_default_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('DL2LIB_DATA', str(tmp_path/'data'))
    assert cached(images(folder)).file.path.parent == tmp_path/'data'/'cache'


# Scale

def constant(fn): return torch.zeros(3, dtype=torch.uint8)

def test_a_cached_list_takes_at_most_16_bytes_an_item_beyond_the_strings(tmp_path, store):
    n = 3000
    for i in range(n): (tmp_path/f'{i}.jpg').touch()
    il = ImageList.from_files(tmp_path, decoder=constant)
    c = cached(il, store)
    def block():
        res = cached(il, store)
        sd = SplitData.split_by_func(res, random_splitter)
        return res, sd, sd.train[0]
    block()
    assert traced(block)/n <= 16
    c[0]
    bare = len(pickle.dumps(c.new([])))
    assert bare < 2000 and len(pickle.dumps(c.new(Paths(['a'])))) < bare+100

def test_images_of_other_sizes_are_written_in_bounded_pieces(tmp_path, store):
    "Forty images of 3 MB each, decoded: never more than some 64 MB of them at once."
    for i in range(40): PIL.Image.new('RGB', (1000, 1000), (i, 0, 0)).save(tmp_path/f'{i:02d}.png')
    il, live, most = ImageList.from_files(tmp_path), [], []
    real = dc._Writer.add
    def add(self, packed): most.append(sum(len(d) for _, _, d in packed)); real(self, packed)
    dc._Writer.add = add
    try: c = cached(il, store)
    finally: dc._Writer.add = real
    assert max(most) <= 2**26 and sum(most) == 40*3_000_000 and len(c.file) == 40 and not live
    assert c[17].getpixel((5, 5)) == (17, 0, 0)


def test_torchvision_is_imported_by_the_decoder_alone():
    p = subprocess.run([sys.executable, '-c', 'import sys, dl2lib.datacache; print("torchvision" in sys.modules)'], capture_output=True, text=True, cwd=here.parent)
    assert p.stdout.strip() == 'False', p.stderr

def test_the_reader_survives_a_fork_and_pickles_as_a_name(folder, store):
    c = cached(images(folder), store)
    ref = c[3]
    with multiprocessing.get_context('fork').Pool(2) as pool: same(pool.map(c.__getitem__, [3])[0], ref)
    f = pickle.loads(pickle.dumps(c.file))
    assert isinstance(f, CacheFile) and f.data is None and len(f) == 24 and len(pickle.dumps(c.file)) < 400
    same(f.read(c.items[3]), ref)
