"""Proves that Shapes is what it says (the same bytes everywhere, whole or not there, hard to guess without seeing shapes) and that
Imagenette is found, fetched or refused with a message that helps. No test needs a network or the full 2,000 images."""
import errno, hashlib, inspect, io, os, pickle, shutil, signal, subprocess, sys, time, urllib.request
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import PIL
import pytest
from PIL import Image

from dl2lib import datasets as D
from dl2lib.datasets import data_dir, imagenette, imagenette_names, shape_image, shape_names, shapes, shapes_tensors

N = dict(n_train=400, n_valid=200)
SMALL = dict(n_train=20, n_valid=10)


@pytest.fixture(scope='module')
def path(tmp_path_factory): return shapes(tmp_path_factory.mktemp('data'), **N)

def files(path, split='*'): return sorted(path.glob(f'{split}/*/*'))

def digests(path): return {fn.relative_to(path).as_posix(): hashlib.sha256(fn.read_bytes()).hexdigest() for fn in files(path)}

def python(code, *args, wait=True, **kwargs):
    "Run `code` in a fresh process."
    env = dict(os.environ, PYTHONPATH=str(Path(D.__file__).parents[1]))
    p = subprocess.Popen([sys.executable, '-c', code, *map(str, args)], env=env, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)
    if not wait: return p
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0, err
    return out.strip()

MAKE = 'import sys; from dl2lib.datasets import shapes; print(shapes(sys.argv[1], *map(int, sys.argv[2:])))'


# Layout and content

def test_layout(path):
    assert path.name == f'shapes-{D._version}-400-200-42'
    assert sorted(os.listdir(path)) == ['train', 'val']
    for split, n in ('train', 40), ('val', 20):
        assert sorted(os.listdir(path/split)) == sorted(shape_names)
        for name in shape_names:
            assert sorted(os.listdir(path/split/name)) == [f'{name}_{i:04d}.jpg' for i in range(n)]
    assert len(shape_names) == len(set(shape_names)) == 10

def test_images_are_rgb_jpegs_of_different_sizes_and_aspect_ratios(path):
    sizes = []
    for fn in files(path):
        with Image.open(fn) as img:
            img.load()
            assert (img.format, img.mode) == ('JPEG', 'RGB'), fn
            sizes.append(img.size)
    w, h = np.array(sizes).T
    short = np.minimum(w, h)
    assert short.min() >= 100 and short.max() <= 200 and short.min() < 110 and short.max() > 190
    assert len(set(sizes)) > 500
    assert (w > h).mean() > .3 and (w < h).mean() > .2 and 1.5 < (np.maximum(w, h)/short).max() <= 1.6

def test_no_image_is_in_both_splits_or_twice(path):
    assert len(set(digests(path).values())) == 600

def test_classes_are_spread_evenly(tmp_path):
    got = shapes(tmp_path, n_train=23, n_valid=10)
    assert [len(os.listdir(got/'train'/name)) for name in shape_names] == [3]*3 + [2]*7 # a remainder goes to the first classes
    assert [len(os.listdir(got/'val'/name)) for name in shape_names] == [1]*10

def test_small_sets_are_parts_of_large_ones(path, tmp_path):
    large = digests(path)
    for fn, digest in digests(shapes(tmp_path, n_train=27, n_valid=13)).items(): assert large[fn] == digest, fn


# The same bytes

def test_another_process_in_another_folder_makes_the_same_bytes(path, tmp_path):
    other = python(MAKE, tmp_path, 400, 200)
    assert digests(Path(other)) == digests(path)

def test_global_random_states_neither_matter_nor_change(tmp_path):
    import random
    random.seed(1); np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    a = shape_image('star', 'x').tobytes()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.seed(2); np.random.seed(2)
    assert shape_image('star', 'x').tobytes() == a

def test_seeds_differ(path, tmp_path):
    other, same = digests(shapes(tmp_path, **SMALL, seed=7)), digests(shapes(tmp_path, **SMALL))
    assert not set(other.values()) & set(digests(path).values())
    assert set(same.values()) <= set(digests(path).values())

def test_integers_of_numpy_name_the_same_set(tmp_path):
    assert shapes(tmp_path, np.int64(20), np.int64(10), np.int64(42)) == shapes(tmp_path, **SMALL)

@pytest.mark.skipif(PIL.__version__ != '13.0.0', reason='pinned for Pillow 13.0.0')
def test_generator_is_pinned():
    h = hashlib.sha256()
    for name in shape_names:
        for hard in None, 0, 1: h.update(shape_image(name, 'pin', hard=hard).tobytes())
    pinned = 1, '2423f6ea8954bdb050f2b42cbaf46d8034567d3dd180506a3edc844b1f83022d'
    assert (D._version, h.hexdigest()) == pinned, 'the images have changed: raise _version, then pin the new digest here'


# The generator's parts

def test_a_texture_fills_its_image():
    for f in D._textures:
        field = f(D._stream(f.__name__), (90, 60))
        assert (field.shape, field.dtype) == ((60, 90), np.float32) and -.2 < field.min() <= field.max() < 1.3, f.__name__

def test_area_and_outlines():
    assert D._area(np.array([(0,0), (2,0), (2,3), (0,3)])) == 6
    for name in shape_names: assert abs(D._area(D._outline(name, D._stream(name)))-1) < 1e-12

def test_a_mask_has_its_outlines_area_and_lies_where_it_should():
    star = D._outline('star', D._stream('edge'))*26+32
    mask, at = D._mask((64,64), star)
    assert abs(np.asarray(mask, float).sum()/255-26**2) < 26
    assert np.all(np.abs(star.min(0)-at) <= 2) and np.all(np.abs(star.max(0)-at-mask.size) <= 2)

def test_colors_stand_out():
    assert D._distance((0,0,0), (0,0,0)) == 0 and D._distance((0,0,0), (255,255,255)) == pytest.approx(255)
    assert D._distance((0,0,0), (0,9,0)) > D._distance((0,0,0), (9,0,0)) > D._distance((0,0,0), (0,0,9)) # green counts most
    table = 90, 80, 60
    best = D._standing_out(D._stream(1), [table], 1000, *D._any) # none of 12 is that different: the best is taken
    rng = D._stream(1)
    assert best == max((D._color(rng, *D._any) for _ in range(12)), key=lambda c: D._distance(c, table))

def test_the_hidden_fraction():
    mask, _ = D._mask((64,64), D._outline('star', D._stream('edge'))*26+32)
    sheet = mask.point(lambda o: 255)
    assert D._hidden(mask, (0,0), sheet, (0,0)) == 1 and D._hidden(mask, (0,0), sheet, mask.size) == 0
    left = D._hidden(mask, (5,5), sheet, (5-mask.width//2, 5))
    assert .4 < left < .6


# As hard as it says

def nearest_mean(path, feature):
    x, y = ({s: [f(fn) for fn in files(path, s)] for s in ('train', 'val')} for f in (feature, lambda fn: fn.parent.name))
    train, labels = np.array(x['train']), np.array(y['train'])
    scale = train.std(0)+1e-6
    means = np.stack([train[labels == name].mean(0) for name in shape_names])
    calls = [shape_names[(((means-o)/scale)**2).sum(1).argmin()] for o in x['val']]
    return np.mean([a == b for a, b in zip(calls, y['val'])])

def colors(fn):
    with Image.open(fn) as img: x = np.asarray(img)
    counts = np.bincount((x//64*[16,4,1]).sum(2).ravel(), minlength=64)/(x.size/3)
    return np.concatenate([counts, x.mean((0,1))/255, x.std((0,1))/255])

def logistic(path, feature, steps=300):
    import torch
    torch.manual_seed(0)
    def number(fn): return shape_names.index(fn.parent.name)
    x, y = ({s: [f(fn) for fn in files(path, s)] for s in ('train', 'val')} for f in (feature, number))
    xt, xv = (torch.tensor(np.array(x[s]), dtype=torch.float32) for s in ('train', 'val'))
    m, s = xt.mean(0), xt.std(0)+1e-3
    model = torch.nn.Linear(xt.shape[1], 10)
    opt = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-2)
    for _ in range(steps):
        opt.zero_grad()
        torch.nn.functional.cross_entropy(model((xt-m)/s), torch.tensor(y['train'])).backward()
        opt.step()
    return (model((xv-m)/s).argmax(1) == torch.tensor(y['val'])).float().mean().item()

@pytest.mark.parametrize('classify', [nearest_mean, logistic])
def test_colors_do_not_tell_the_class(path, classify): assert classify(path, colors) < .2 # chance .1, n=200, standard error .02

def test_mean_images_do_not_solve_it(path):
    "A flat draft is solved by this (1.00); what is left comes from easy images, whose shape lies near the middle."
    def gray(fn):
        with Image.open(fn) as img: x = np.asarray(img.resize((16,16), Image.Resampling.BOX), float)
        x = abs(x-x[0,0]).mean(2).ravel()
        return x/(np.linalg.norm(x)+1e-6)
    assert nearest_mean(path, gray) < .4 # .39 with Pillow 13

def test_sizes_do_not_tell_the_class(path):
    def size(fn):
        with Image.open(fn) as img: return [*img.size, fn.stat().st_size]
    assert nearest_mean(path, size) < .2

def test_harder_images_have_more_detail():
    "An easy image has few edges: neighboring pixels are alike."
    def edges(img): return np.abs(np.diff(np.asarray(img, float), axis=0)).mean()
    def detail(hard): return np.mean([edges(shape_image(name, 'd', i, hard=hard)) for name in shape_names for i in range(5)])
    assert detail(0) < detail(.5) < detail(1)


# Whole or not there

def wait_for(cond, seconds=60):
    end = time.monotonic()+seconds
    while not cond():
        assert time.monotonic() < end, 'nothing happened'
        time.sleep(.01)

def test_killed_midway(tmp_path):
    p = python(MAKE, tmp_path, 5000, 500, wait=False)
    wait_for(lambda: len(list(tmp_path.glob('.*.tmp/train/*/*.jpg'))) > 20 or p.poll() is not None)
    p.send_signal(signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL
    p.communicate()
    assert not [o for o in tmp_path.iterdir() if not o.name.startswith('.')] # nothing that could be taken for the dataset

def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    kill = '''
import os, signal, sys
from dl2lib import datasets as D
draw, calls = D.shape_image, []
def die(*args):
    calls.append(args)
    if len(calls) == 15: os.kill(os.getpid(), signal.SIGKILL)
    return draw(*args)
D.shape_image = die
D.shapes(sys.argv[1], 20, 10)'''
    p = python(kill, tmp_path, wait=False)
    p.communicate(timeout=60)
    assert p.returncode == -signal.SIGKILL and os.listdir(tmp_path)
    got = shapes(tmp_path, **SMALL)
    assert len(files(got)) == 30 and os.listdir(tmp_path) == [got.name]

def test_interrupted_leaves_nothing(tmp_path, monkeypatch):
    draw, calls = D.shape_image, []
    def interrupt(*args):
        calls.append(args)
        if len(calls) == 15: raise KeyboardInterrupt
        return draw(*args)
    monkeypatch.setattr(D, 'shape_image', interrupt)
    with pytest.raises(KeyboardInterrupt): shapes(tmp_path, **SMALL)
    assert os.listdir(tmp_path) == []
    assert len(files(shapes(tmp_path, **SMALL))) == 30

DRAWS = """
import sys
from dl2lib import datasets as D
draw, calls = D.shape_image, []
def count(*args):
    calls.append(args)
    return draw(*args)
D.shape_image = count
print('ready', flush=True)
sys.stdin.readline()
path = D.shapes(sys.argv[1], 100, 50)
print(len(calls), path)
"""

def test_of_three_at_once_one_draws(path, tmp_path):
    ps = [python(DRAWS, tmp_path, wait=False, stdin=subprocess.PIPE) for _ in range(3)]
    for p in ps: p.stdout.readline() # all have imported: now start together
    for p in ps: p.stdin.write('\n'); p.stdin.flush()
    outs = [p.communicate(timeout=120) for p in ps]
    assert [p.returncode for p in ps] == [0]*3, outs
    made = tmp_path/f'shapes-{D._version}-100-50-42'
    assert sorted(o.strip() for o, _ in outs) == [f'0 {made}', f'0 {made}', f'150 {made}']
    assert os.listdir(tmp_path) == [made.name]
    large = digests(path)
    assert all(large[k] == v for k, v in digests(made).items())

def test_found_is_not_made_anew(path, monkeypatch):
    monkeypatch.setattr(D, 'shape_image', None)
    assert shapes(path.parent, **N) == path
    assert shapes(str(path.parent), **N) == path

def test_damaged_folders_are_refused(tmp_path):
    got = shapes(tmp_path, **SMALL)
    victim = got/'val'/'star'/'star_0000.jpg'
    data = victim.read_bytes()
    victim.unlink()
    with pytest.raises(RuntimeError, match=r'not whole: val has 9 images instead of 10\. Remove the folder'): shapes(tmp_path, **SMALL)
    victim.parent.rmdir()
    with pytest.raises(RuntimeError, match=r'val/star is missing; val has 9'): shapes(tmp_path, **SMALL)
    victim.parent.mkdir(); victim.write_bytes(data)
    assert shapes(tmp_path, **SMALL) == got


# The same images as tensors

TENSORS = 'import sys; from dl2lib.datasets import shapes_tensors; shapes_tensors(16, sys.argv[1], 20, 10)'

def same(a, b):
    import torch
    return len(a) == len(b) == 4 and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b))

def tensor_file(root, size=16): return root/f'shapes-{D._version}-20-10-42-{size}px.npz'

@pytest.fixture
def small(tmp_path):
    "A folder with a small set of tensors, and these."
    return tmp_path, shapes_tensors(16, tmp_path, **SMALL)

@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(fn, *args, **kwargs): raise AssertionError(f'{fn} was opened')
    monkeypatch.setattr(Image, 'open', refuse)

def test_tensors_are_those_of_the_data_block(path):
    import torch
    from dl2lib.datablock import (CategoryProcessor, ImageList, ResizeFixed, SplitData, grandparent_splitter, label_by_func, make_rgb,
                                  parent_labeler, to_byte_tensor)
    il = ImageList.from_files(path, tfms=[make_rgb, ResizeFixed(32), to_byte_tensor])
    proc = CategoryProcessor()
    ll = label_by_func(SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val')), parent_labeler, proc_y=proc)
    x_train, y_train, x_valid, y_valid = shapes_tensors(32, path.parent, **N)
    assert proc.vocab == shape_names # a label means the same class on both ways
    for side, x, y, n in (ll.train, x_train, y_train, 400), (ll.valid, x_valid, y_valid, 200):
        assert (x.dtype, y.dtype, x.shape, y.shape) == (torch.uint8, torch.int64, (n, 3, 32, 32), (n,))
        xs, ys = zip(*(side[i] for i in range(n)))
        assert torch.equal(torch.stack(xs), x) and list(map(int, ys)) == y.tolist()

def test_default_tensors_are_the_whole_set():
    given = inspect.signature(shapes_tensors).parameters
    assert {k: v.default for k, v in given.items()} == dict(
        size=32, **{k: v.default for k, v in inspect.signature(shapes).parameters.items()})

def test_tensors_are_decoded_once(small, no_decoding):
    root, first = small
    assert same(shapes_tensors(16, root, **SMALL), first) and tensor_file(root).exists()
    assert sorted(os.listdir(root)) == sorted([tensor_file(root).name, f'shapes-{D._version}-20-10-42'])

def test_tensors_can_be_written_to(small):
    for x in shapes_tensors(16, small[0], **SMALL): x.zero_() # a read-only array would warn, and a map would change the file
    assert same(shapes_tensors(16, small[0], **SMALL), small[1])

def test_other_arguments_other_tensors(small):
    root, first = small
    assert shapes_tensors(8, root, **SMALL)[0].shape == (20, 3, 8, 8)
    assert not same(shapes_tensors(16, root, **SMALL, seed=7), first)
    assert len(shapes_tensors(16, root, n_train=30, n_valid=10)[1]) == 30
    assert same(shapes_tensors(np.int64(16), str(root), **SMALL), first)

def test_another_generator_makes_other_tensors(small, monkeypatch):
    monkeypatch.setattr(D, '_version', D._version+1)
    assert not same(shapes_tensors(16, small[0], **SMALL), small[1])

def test_tensors_do_not_need_the_folder(small, no_decoding):
    shutil.rmtree(small[0]/f'shapes-{D._version}-20-10-42')
    assert same(shapes_tensors(16, small[0], **SMALL), small[1])

def test_a_changed_image_changes_the_tensors(small):
    root, first = small
    star = root/f'shapes-{D._version}-20-10-42'/'val'/'star'/'star_0000.jpg'
    Image.new('RGB', (120, 100), 'red').save(star)
    now = shapes_tensors(16, root, **SMALL)
    changed = [i for i in range(10) if not (now[2][i] == first[2][i]).all()]
    assert changed == [shape_names.index('star')] and same(now[:2]+now[:2], first[:2]+first[:2])
    star.unlink()
    with pytest.raises(RuntimeError, match='not whole: val has 9 images instead of 10'): shapes_tensors(16, root, **SMALL)

def damages(data, rng):
    yield b''
    yield data[:len(data)//2]
    yield data[:-1]
    yield b'PK'+bytes(100)
    yield pickle.dumps([1])
    for at in rng.randint(0, len(data), 40): # a flipped bit anywhere: in a pixel, a name, a shape, a checksum
        yield data[:at] + bytes([data[at] ^ 1 << rng.randint(8)]) + data[at+1:]
    for at in range(0, 200, 5): yield data[:at] + bytes([data[at] ^ 4]) + data[at+1:] # in the first array's header

def test_damaged_tensors_are_made_again(small):
    root, first = small
    file = tensor_file(root)
    for data in damages(file.read_bytes(), np.random.RandomState(0)):
        file.write_bytes(data)
        assert same(shapes_tensors(16, root, **SMALL), first)

def test_tensors_of_another_file_are_not_taken(small):
    root, first = small
    np.savez(tensor_file(root), x_train=np.zeros(3))
    assert same(shapes_tensors(16, root, **SMALL), first)

def test_interrupted_tensors_leave_nothing(small, monkeypatch):
    root, first = small
    def interrupt(f, **arrays):
        f.write(b'half')
        raise KeyboardInterrupt
    monkeypatch.setattr(np, 'savez', interrupt)
    before = sorted(os.listdir(root))
    with pytest.raises(KeyboardInterrupt): shapes_tensors(8, root, **SMALL)
    assert sorted(os.listdir(root)) == before
    assert same(shapes_tensors(16, root, **SMALL), first)

def test_tensors_on_a_full_disk(small, monkeypatch):
    def full(f, **arrays): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(np, 'savez', full)
    with pytest.raises(OSError, match='disk is full: make room') as e: shapes_tensors(8, small[0], **SMALL)
    assert 'give another folder as root' in e.value.__notes__[0] and e.value.errno == errno.ENOSPC and not tensor_file(small[0], 8).exists()

def test_two_make_tensors_at_once(small, tmp_path):
    root = tmp_path/'other'
    ps = [python(TENSORS, root, wait=False) for _ in range(3)]
    said = [p.communicate(timeout=120) for p in ps]
    assert [p.returncode for p in ps] == [0]*3, said
    assert sorted(os.listdir(root)) == sorted([tensor_file(root).name, f'shapes-{D._version}-20-10-42'])
    assert same(shapes_tensors(16, root, **SMALL), small[1])

@pytest.mark.parametrize('kwargs, error, match', [
    (dict(size=0), ValueError, 'size=0 must be from 1 to 256 pixels'), (dict(size=-1), ValueError, 'size=-1'), (dict(size=257), ValueError, 'size=257'),
    (dict(size=32.), TypeError, r'size=32\.0 must be an integer'), (dict(size='32'), TypeError, "size='32'"), (dict(size=True), TypeError, 'size=True'),
    (dict(size=(32, 32)), TypeError, r'size=\(32, 32\)'), (dict(size=None), TypeError, 'size=None'), (dict(n_train=9), ValueError, 'n_train=9 must be'),
    (dict(seed=1.5), TypeError, r'seed=1\.5')])
def test_tensors_refuse(tmp_path, kwargs, error, match):
    with pytest.raises(error, match=match): shapes_tensors(**{**dict(root=tmp_path), **SMALL, **kwargs})
    assert os.listdir(tmp_path) == []


# Bad input

@pytest.mark.parametrize('kwargs, error, match', [
    (dict(n_train=9), ValueError, r'n_train=9 must be at least 10'), (dict(n_train=-1), ValueError, r'n_train=-1'),
    (dict(n_valid=0), ValueError, r'n_valid=0 must be at least 10'), (dict(n_valid=20.), TypeError, r'n_valid=20\.0 must be an integer'),
    (dict(n_train='20'), TypeError, r"n_train='20'"), (dict(n_train=True), TypeError, r'n_train=True'), (dict(seed=1.5), TypeError, r'seed=1\.5'),
    (dict(seed=None), TypeError, r'seed=None must be an integer')])
def test_arguments(tmp_path, kwargs, error, match):
    with pytest.raises(error, match=match): shapes(tmp_path, **{**SMALL, **kwargs})
    assert os.listdir(tmp_path) == []

def test_root_is_a_file_or_lies_below_one(tmp_path):
    file = tmp_path/'file'
    file.touch()
    for root in file, file/'below', str(file):
        with pytest.raises(NotADirectoryError, match=r'file is a file'): shapes(root, **SMALL)
        with pytest.raises(NotADirectoryError, match=r'file is a file'): imagenette(root=root)

def test_a_file_in_the_place_of_the_dataset(tmp_path):
    (tmp_path/f'shapes-{D._version}-20-10-42').touch()
    with pytest.raises(NotADirectoryError, match='is no folder'): shapes(tmp_path, **SMALL)

@pytest.mark.skipif(not hasattr(os, 'seteuid'), reason='no users to switch between')
def test_read_only_root(tmp_path):
    tmp_path.chmod(0o555)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path('/'): parent.chmod(parent.stat().st_mode | 0o111)
    code = ('import os, sys; from dl2lib.datasets import shapes\nif os.geteuid() == 0: os.seteuid(65534)\n'
            'try: shapes(sys.argv[1], 20, 10)\nexcept PermissionError as e: print(e, *e.__notes__)')
    said = python(code, tmp_path)
    assert 'Shapes belongs there' in said and 'give another folder as root' in said and str(tmp_path) in said
    tmp_path.chmod(0o755)
    assert os.listdir(tmp_path) == []

def test_full_disk(tmp_path, monkeypatch):
    save, calls = Image.Image.save, []
    def full(self, fn, **kwargs):
        calls.append(fn)
        if len(calls) == 12: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(self, fn, **kwargs)
    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(OSError, match='disk is full: make room') as e: shapes(tmp_path, **SMALL)
    assert 'give another folder as root' in e.value.__notes__[0] and e.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []

def test_shape_image_refuses():
    with pytest.raises(ValueError, match="name='hexagon' is none of the shapes: arrow, bolt"): shape_image('hexagon')
    for hard in -.1, 1.1, float('nan'):
        with pytest.raises(ValueError, match='hard='): shape_image('ring', hard=hard)


# Where data lives

def test_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv('DL2LIB_DATA', '~/d')
    assert data_dir() == Path.home()/'d'
    monkeypatch.setenv('DL2LIB_DATA', '') # empty counts as not set
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert data_dir() == tmp_path/'dl2lib'
    monkeypatch.delenv('DL2LIB_DATA'); monkeypatch.delenv('XDG_CACHE_HOME')
    assert data_dir() == Path.home()/'.cache'/'dl2lib'
    monkeypatch.setenv('DL2LIB_DATA', str(tmp_path/'deep'/'er'))
    assert data_dir() == tmp_path/'deep'/'er' and not data_dir().exists() # asking does not create it
    assert shapes(**SMALL).parent == data_dir()

def test_relative_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shapes('.', **SMALL) == Path(f'shapes-{D._version}-20-10-42') and len(files(shapes('.', **SMALL))) == 30


# Imagenette

def fake_imagenette(folder):
    "As many empty files as the real one has, in its folders."
    for split, n in ('train', 9469), ('val', 3925):
        for i, wnid in enumerate(imagenette_names):
            (folder/split/wnid).mkdir(parents=True)
            for j in range(n//10 + (i < n%10)): open(folder/split/wnid/f'{wnid}_{j}.JPEG', 'w').close()

class FakeTorchvision:
    "Writes what torchvision leaves behind: archive and folder."
    calls = []
    def __init__(self, root, split='train', size='full', download=False):
        self.calls.append((split, size, download))
        name = {'160px': 'imagenette2-160', '320px': 'imagenette2-320', 'full': 'imagenette2'}[size]
        (Path(root)/f'{name}.tgz').touch()
        fake_imagenette(Path(root)/name)

@pytest.fixture
def offline(monkeypatch):
    def refuse(request, *args, **kwargs):
        tried.append(getattr(request, 'full_url', request))
        raise URLError('no route to host')
    tried = []
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    return tried

def test_imagenette_found_and_incomplete(tmp_path, offline):
    dest = tmp_path/'imagenette2-160'
    fake_imagenette(dest)
    assert imagenette(root=tmp_path) == dest == imagenette(160, str(tmp_path)) == imagenette(root=dest)
    (dest/'train'/'n01440764'/'n01440764_3.JPEG').unlink()
    (dest/'val'/'n03888257').rename(tmp_path/'away')
    wrong = r'not whole: val/n03888257 is missing; train has 9,468 images instead of 9,469; val has 3,533'
    with pytest.raises(RuntimeError, match=wrong) as e: imagenette(root=tmp_path)
    assert 'Remove the folder' in str(e.value) and str(dest) in str(e.value)
    (tmp_path/'imagenette2').mkdir()
    with pytest.raises(RuntimeError, match='imagenette2 is not whole: train/n01440764 is missing'): imagenette('full', tmp_path)
    assert offline == [] # what is there is never fetched

def test_imagenette_offline(tmp_path, offline):
    with pytest.raises(FileNotFoundError) as e: imagenette(root=tmp_path/'data')
    said = str(e.value)
    for part in ('https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz', 'no route to host',
                 str(tmp_path/'data'/'imagenette2-160'/'train'), 'DL2LIB_DATA', 'shapes()'): assert part in said, part
    assert offline and offline[0].endswith('imagenette2-160.tgz')
    assert os.listdir(tmp_path/'data') == []

def test_imagenette_checks_the_digest(tmp_path, monkeypatch):
    class Response(io.BytesIO):
        length, url, headers = 5, 'https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz', {}
    monkeypatch.setattr(urllib.request, 'urlopen', lambda *args, **kwargs: Response(b'wrong'))
    with pytest.raises(FileNotFoundError, match='corrupted'): imagenette(root=tmp_path)
    assert os.listdir(tmp_path) == []

@pytest.mark.parametrize('size, name, asked', [(160, 'imagenette2-160', '160px'), (320, 'imagenette2-320', '320px'),
                                               ('full', 'imagenette2', 'full')])
def test_imagenette_fetched(tmp_path, monkeypatch, size, name, asked):
    import torchvision.datasets
    monkeypatch.setattr(torchvision.datasets, 'Imagenette', FakeTorchvision)
    monkeypatch.setattr(FakeTorchvision, 'calls', [])
    monkeypatch.setenv('DL2LIB_DATA', str(tmp_path))
    assert imagenette(size) == tmp_path/name and imagenette(size) == tmp_path/name
    assert FakeTorchvision.calls == [('train', asked, True)]
    assert os.listdir(tmp_path) == [name] and sorted(os.listdir(tmp_path/name)) == ['train', 'val'] # no archive is left

def test_torchvision_takes_what_we_give_it():
    from torchvision.datasets import Imagenette
    inspect.signature(Imagenette).bind('root', split='train', size='160px', download=True)
    for _, size in D._imagenette_sizes.values(): assert size in Imagenette._ARCHIVES
    assert sorted(imagenette_names) == sorted(Imagenette._WNID_TO_CLASS)

def test_timeout_is_put_back(tmp_path, offline):
    import socket
    assert socket.getdefaulttimeout() is None
    with pytest.raises(FileNotFoundError): imagenette(root=tmp_path)
    assert socket.getdefaulttimeout() is None

@pytest.mark.parametrize('size', [224, '160', None, 160.5, [160]])
def test_imagenette_size(size):
    with pytest.raises(ValueError, match=r"must be one of 160, 320, 'full'"): imagenette(size)

def test_import_does_nothing(tmp_path):
    code = ('import os, sys, socket\nsocket.socket = None\nimport dl2lib.datasets\n'
            'assert not os.path.exists(os.environ["DL2LIB_DATA"])\nprint([m for m in ("torch", "torchvision", "matplotlib", "IPython") if m in sys.modules])')
    env = dict(os.environ, PYTHONPATH=str(Path(D.__file__).parents[1]), DL2LIB_DATA=str(tmp_path/'none'))
    p = subprocess.run([sys.executable, '-c', code], env=env, text=True, capture_output=True)
    assert (p.returncode, p.stdout.strip()) == (0, '[]'), p.stderr
