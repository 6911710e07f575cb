"""The Data Block: what lies in a folder, images of every kind, splits, labels, batches; oracles, properties and bad input. What a worker
process has to import stands at the top level of this file."""
import gc, io, itertools, math, multiprocessing, os, pickle, random, signal, socket, statistics, struct, threading, time, tracemalloc, warnings, zlib
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from dl2lib.core import compose
from dl2lib.datablock import (ByteToFloat, CategoryProcessor, DataBunch, Dataset, ImageFileError, ImageList, ItemList, LabeledData, MakeRGB,
                              Normalizer, Paths, Processor, ResizeFixed, SplitData, Transform, UnknownLabelError,
                              databunchify, get_dls, get_files, grandparent_splitter, image_extensions, label_by_func, make_rgb,
                              norm_imagenette, normalize_chan, normalize_to, parent_labeler, random_splitter, re_labeler, show_batch,
                              show_image, split_by_func, to_byte_tensor, to_float_tensor)
from dl2lib.images import open_bytes
from dl2lib.loader import collate, mix

same = partial(torch.testing.assert_close, rtol=0, atol=0)


def touch(*paths):
    for p in paths:
        p.parent.mkdir(parents=True, exist_ok=True)
        p.touch()

def save(path, size=(8, 6), colour=(200, 100, 50), mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new('RGB', size, colour).convert(mode).save(path)
    return path

def in_time(f, seconds=20):
    "What `f` returns or raises; a test that would hang fails instead."
    res = []
    def work():
        try: res.append((f(), None))
        except BaseException as e: res.append((None, e))
    t = threading.Thread(target=work, daemon=True)
    t.start(); t.join(seconds)
    assert res, f'it did not end within {seconds} s'
    if res[0][1] is not None: raise res[0][1]
    return res[0][0]

def oracle(path):
    "The visible images below a folder that holds neither links nor anything hidden."
    return {Path(d)/n for d, _, names in os.walk(path) for n in names if Path(n).suffix.lower() in image_extensions}

def rng_states(): return random.getstate(), [o.tolist() if isinstance(o, np.ndarray) else o for o in np.random.get_state()], torch.get_rng_state().tolist()

@pytest.fixture
def folder(tmp_path):
    "Twenty-four small images in four classes, with the layout of Imagenette."
    for side, n in ('train', 4), ('val', 2):
        for c in range(4):
            for i in range(n): save(tmp_path/side/f'c{c}'/f'{i}.png', (8+c, 6+i), (c*60, i*60, 90))
    return tmp_path

def labeled(folder, *tfms, size=8):
    il = ImageList.from_files(folder, tfms=[make_rgb, ResizeFixed(size), to_byte_tensor, *tfms])
    return label_by_func(SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val')), parent_labeler, proc_y=CategoryProcessor())


# Files

@pytest.mark.parametrize('what, error, text', [
    ('missing', FileNotFoundError, 'missing: there is no such folder'),
    ('file.jpg', NotADirectoryError, 'file.jpg is not a folder'),
    ('dangling', NotADirectoryError, 'dangling is not a folder'),
    ('loop', NotADirectoryError, 'loop is not a folder'),
    ('empty', FileNotFoundError, 'empty has no file'),
    ('texts', FileNotFoundError, r'texts has no file that ends with .*\.jpg')])
def test_a_path_that_holds_no_images_is_named(tmp_path, what, error, text):
    touch(tmp_path/'file.jpg', tmp_path/'texts'/'a.txt', tmp_path/'texts'/'jpg')
    (tmp_path/'empty').mkdir()
    (tmp_path/'dangling').symlink_to('nowhere')
    (tmp_path/'loop').symlink_to('loop')
    for p in tmp_path/what, str(tmp_path/what):
        with pytest.raises(error, match=text): get_files(p, image_extensions, recurse=True)
        with pytest.raises(error, match=text): ImageList.from_files(p)

def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    touch(tmp_path/'a'/'1.jpg', tmp_path/'closed'/'2.jpg')
    real = os.scandir
    def scandir(d):
        if os.path.basename(d) == 'closed': raise PermissionError(13, 'Permission denied', d)
        return real(d)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(PermissionError, match='closed: no permission'): get_files(tmp_path, '.jpg', recurse=True)

def test_include(tmp_path):
    touch(tmp_path/'top.jpg', tmp_path/'a'/'1.jpg', tmp_path/'a'/'deep'/'2.jpg', tmp_path/'b'/'3.jpg', tmp_path/'.h'/'4.jpg')
    os.mkfifo(tmp_path/'pipe.jpg')
    with warnings.catch_warnings():
        warnings.simplefilter('error')                      # what was not asked for is not reported either
        assert get_files(tmp_path, '.jpg', recurse=True, include=['a']) == [tmp_path/'a'/'1.jpg', tmp_path/'a'/'deep'/'2.jpg']
        assert get_files(tmp_path, '.jpg', recurse=True, include=('b', '.h')) == [tmp_path/'.h'/'4.jpg', tmp_path/'b'/'3.jpg']
    with pytest.raises(FileNotFoundError, match=r"no folder nope; it has \['.h', 'a', 'b'\]"): get_files(tmp_path, '.jpg', True, include=['a', 'nope'])
    with pytest.raises(FileNotFoundError, match='no folder top.jpg'): get_files(tmp_path, '.jpg', recurse=True, include='top.jpg')
    with pytest.raises(FileNotFoundError, match='no file'): get_files(tmp_path, '.jpg', recurse=True, include=[])
    with pytest.raises(ValueError, match='recurse=True'): get_files(tmp_path, '.jpg', include='a')

def test_extensions_in_either_case_with_or_without_dot(tmp_path):
    touch(*(tmp_path/n for n in ('a.JPG', 'b.jpeg', 'c.Png', 'd.txt', 'jpg', 'e.tar.gz', 'f')))
    def names(ext): return [p.name for p in get_files(tmp_path, ext)]
    assert names(['.jpg', '.PNG']) == ['a.JPG', 'c.Png']
    assert names('jpg') == ['a.JPG']
    assert names('.tar.gz') == names('gz') == ['e.tar.gz']
    assert names(None) == sorted(p.name for p in tmp_path.iterdir())

def test_hidden_files_and_folders_are_left_out_with_a_warning(tmp_path):
    touch(tmp_path/'a.jpg', tmp_path/'._a.jpg', tmp_path/'.DS_Store', tmp_path/'.ipynb_checkpoints'/'b.jpg', tmp_path/'.jpg')
    with pytest.warns(UserWarning, match=r'^3 left out .*/\._a\.jpg, .*/\.ipynb_checkpoints, .*/\.jpg$') as ws:
        assert get_files(tmp_path, '.jpg', recurse=True) == [tmp_path/'a.jpg']
    assert ws[0].filename == __file__                       # it points at the line that asked
    with pytest.warns(UserWarning, match='3 left out') as ws: ImageList.from_files(tmp_path)
    assert ws[0].filename == __file__

def test_what_is_no_plain_file_is_left_out_and_never_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    d = Path('x')
    save(d/'a.jpg'); save(d/'b.jpg', (9, 9))
    (d/'linked.jpg').symlink_to('b.jpg')                    # a link to a file is as good as the file
    (d/'dangling.jpg').symlink_to('nowhere.jpg')
    (d/'self.jpg').symlink_to('self.jpg')
    os.mkfifo(d/'pipe.jpg')
    sock = socket.socket(socket.AF_UNIX); sock.bind(str(d/'socket.jpg'))
    (d/'folder.jpg').mkdir()
    try:
        with pytest.warns(UserWarning, match='^4 left out .*x/dangling.jpg, x/pipe.jpg, x/self.jpg, x/socket.jpg$'):
            il = in_time(lambda: ImageList.from_files(d))
        assert list(il.items) == [d/'a.jpg', d/'b.jpg', d/'linked.jpg']
        assert in_time(lambda: [im.size for im in il]) == [(8, 6), (9, 9), (9, 9)]
        for name in 'dangling.jpg', 'self.jpg', 'pipe.jpg', 'socket.jpg', 'folder.jpg':
            with pytest.raises(ImageFileError, match=name): in_time(lambda: ImageList([d/name])[0])
    finally: sock.close()

@pytest.mark.parametrize('links, expected, left_out', [
    ({'a/me': 'a/me'}, 'a/1 b/2', 1),                       # a link to itself
    ({'a/up': '.'}, 'a/1 b/2', 1),                          # to the top
    ({'a/up': 'a'}, 'a/1 b/2', 1),                          # to its own folder
    ({'a/b': 'b', 'b/a': 'a'}, 'a/1 b/2', 2),               # two that lead into each other
    ({'c': 'b'}, 'a/1 b/2', 1),                             # to a neighbour, whose files are here already
    ({'c': '../out'}, 'a/1 b/2 c/3 c/deep/4', 0),           # out of the tree: followed
    ({'c': '../out', 'd': '../out'}, 'a/1 b/2 c/3 c/deep/4', 1),
    ({'0': '../out/deep', 'c': '../out'}, '0/4 a/1 b/2 c/3', 1),
    ({'c': '../out', '../out/back': '.'}, 'a/1 b/2 c/3 c/deep/4', 1)])
def test_links_to_folders_end_and_no_file_is_listed_twice(tmp_path, links, expected, left_out):
    top = tmp_path/'top'
    touch(top/'a'/'1.jpg', top/'b'/'2.jpg', tmp_path/'out'/'3.jpg', tmp_path/'out'/'deep'/'4.jpg')
    for name, goal in links.items(): (top/name).symlink_to(top/goal)
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        found = in_time(lambda: get_files(top, None, recurse=True))
    assert found == [top/f'{o}.jpg' for o in expected.split()]
    assert len({os.path.realpath(p) for p in found}) == len(found)
    assert [str(w.message).split()[0] for w in ws] == [str(left_out)]*bool(left_out)

def test_many_folders_that_all_link_to_each_other_end(tmp_path):
    for a in range(12):
        touch(tmp_path/f'd{a:02d}'/'x.jpg')
        for b in range(12): (tmp_path/f'd{a:02d}'/f'to{b:02d}').symlink_to(tmp_path/f'd{b:02d}')
    with pytest.warns(UserWarning, match='144 left out'): assert len(in_time(lambda: get_files(tmp_path, '.jpg', recurse=True))) == 12

def test_names_that_are_unicode_bytes_or_long(tmp_path, capsys):
    long = 'n'*251 + '.jpg'
    names = ['äöü.jpg', '\u732b.JPG', 'a b\n.jpg', '\U0001F41F.jpg', os.fsdecode(b'\xff\xfe.jpg'), long]
    il_path = tmp_path/'日本'/('d'*200)/('e'*200)/'train'/'cat'
    for n in names: save(il_path/n)
    il = ImageList.from_files(tmp_path, tfms=to_byte_tensor)
    assert sorted(il.items) == sorted(il_path/n for n in names)
    for i in range(len(names)): assert il[i].shape == (3, 6, 8)
    print(il, il.items, LabeledData.label_by_func(il, parent_labeler))
    capsys.readouterr().out.encode('utf-8')                 # what is printed is text
    assert all(isinstance(random_splitter(fn), bool) for fn in il.items)
    (il_path/names[4]).write_bytes(b'no image')
    with pytest.raises(ImageFileError, match=r'\\udcff\\udcfe.jpg'): list(il)
    assert pickle.loads(pickle.dumps(il.items)) == il.items

class ShuffledScan:
    "What `os.scandir` gives, in another order each time."
    real, rng = staticmethod(os.scandir), random.Random(0)
    def __init__(self, d):
        with self.real(d) as it: self.entries = list(it)
        self.rng.shuffle(self.entries)
    def __enter__(self): return iter(self.entries)
    def __exit__(self, *args): pass

def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    for d in 'b', 'a', 'a/c', 'B', 'a b', 'a-b', 'x': touch(*(tmp_path/'top'/d/f'{i}.jpg' for i in (10, 9, 2, 1)))
    touch(tmp_path/'out'/'q'/'1.jpg', tmp_path/'out'/'2.jpg', *(tmp_path/'top'/f'{i}.jpg' for i in (2, 1)))
    for i in 3, 1, 2: (tmp_path/'top'/f'l{i}').symlink_to(tmp_path/'out'/('q' if i == 2 else ''))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        first = get_files(tmp_path/'top', None, recurse=True)
        monkeypatch.setattr(os, 'scandir', ShuffledScan)
        for _ in range(10): assert get_files(tmp_path/'top', None, recurse=True).strs == first.strs
    shown = [os.path.relpath(p, tmp_path/'top') for p in first]
    assert shown[:3] == ['1.jpg', '2.jpg', 'B/1.jpg']        # a folder's files first, by name, then its folders by name
    assert shown == sorted(shown, key=lambda s: (s.split('/')[:-1], s.split('/')[-1]))

@pytest.mark.parametrize('seed', range(5))
def test_get_files_agrees_with_os_walk_on_random_trees(tmp_path, seed):
    rng, folders = random.Random(seed), [tmp_path]
    for i in range(12):
        folders.append(rng.choice(folders)/rng.choice('abcdef')); folders[-1].mkdir(exist_ok=True)
    for i in range(60): touch(rng.choice(folders)/f'{rng.choice("xyz")}{i}{rng.choice([".jpg", ".PNG", ".txt", "", ".jpg.bak", ".Tiff"])}')
    found = get_files(tmp_path, image_extensions, recurse=True)
    assert len(found) == len(set(found)) and set(found) == oracle(tmp_path)
    top = {p for p in oracle(tmp_path) if p.parent == tmp_path}
    if top: assert set(get_files(tmp_path, image_extensions)) == top

def test_files_below_a_relative_path_or_with_a_slash_at_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path/'train'/'a'/'1.jpg')
    for p in '.', Path('.'), 'train', 'train/', './train/a//': assert get_files(p, recurse=True) == [Path('train/a/1.jpg')]
    assert parent_labeler(get_files('train/a/')[0]) == 'a'

def test_path_ls():
    here = Path(__file__).parent
    assert Path(__file__) in here.ls() and sorted(here.ls()) == sorted(here.iterdir())


# Paths

def test_paths_behave_as_a_list_of_path():
    strs = [f'd/{i}.jpg' for i in range(10)]
    ps, ref = Paths(strs), [Path(s) for s in strs]
    assert ps == ref and list(ps) == ref and len(ps) == 10 and ps[3] == ref[3] and ps[-1] == ref[-1]
    assert ps[2:7:2] == ref[2:7:2] and isinstance(ps[2:], Paths)
    assert ps == Paths(ref) and ps == strs and ps != ref[:-1] and ps != ref[::-1] and ps != 3 and ps != [1]*10 and Paths(['./a']) == Paths(['a'])
    assert ref[4] in ps and Path('other') not in ps and ps.index(ref[4]) == 4
    ps[0] = Path('new.jpg'); del ps[1]; ps.append('last.jpg'); ps[1:3] = ['x', Path('y')]
    ref[0] = Path('new.jpg'); del ref[1]; ref.append(Path('last.jpg')); ref[1:3] = [Path('x'), Path('y')]
    assert ps == ref and ps + ['z'] == ref + [Path('z')] and all(isinstance(s, str) for s in ps.strs)
    with pytest.raises(IndexError): ps[10]
    with pytest.raises(TypeError): Paths([3])
    assert repr(ps) == 'Paths(10: new.jpg, x, y, ...)'

def traced(f): # bytes that the result of `f` keeps. The least of three: Python's table of interned strings may grow during any one of them
    return min(traced_once(f) for _ in range(3))

def traced_once(f):
    tracemalloc.start()
    try:
        kept = f() # noqa: F841 - it has to live while it is measured
        return tracemalloc.get_traced_memory()[0]
    finally: tracemalloc.stop()

def test_paths_and_lists_of_them_take_at_most_16_bytes_an_item_beyond_the_strings():
    strs, n = [f'folder{i%10}/image_{i}.jpg' for i in range(10_000)], 10_000
    assert traced(lambda: Paths(strs))/n <= 16
    assert traced(lambda: [Path(s) for s in strs])/n > 100  # the measure sees what it has to
    paths = Paths(strs)
    def block():
        il = ImageList(paths, tfms=[make_rgb])
        return label_by_func(SplitData.split_by_func(il, random_splitter), parent_labeler, proc_y=CategoryProcessor())
    block()
    assert traced(block)/n <= 16+8                          # the two sides, and a pointer to each label

def test_listing_takes_at_most_16_bytes_an_item_beyond_the_strings(tmp_path):
    for d in range(4): touch(*(tmp_path/f'c{d}'/f'{i}.jpg' for i in range(500)))
    get_files(tmp_path, '.jpg', recurse=True)
    beyond = traced(lambda: get_files(tmp_path, '.jpg', recurse=True)) - sum(map(len, get_files(tmp_path, '.jpg', recurse=True).strs))
    assert beyond/2000 <= 16 + 57                           # a string's own head is up to 56 bytes, rounded


# Items

def test_index_out_of_range_says_so(folder):
    il = ImageList.from_files(folder)
    ll = labeled(folder)
    for i in len(il), -len(il)-1, [0, len(il)]:
        with pytest.raises(IndexError, match='ImageList has 24 items'): il[i]
    with pytest.raises(IndexError, match='the mask has 3 entries'): il[[True, False, True]]
    with pytest.raises(IndexError, match='index 16 is out of range'): ll.train[16]
    with pytest.raises(IndexError, match='index 8 is out of range'): ll.valid.y[8]

def test_several_indices_give_a_list(folder):
    il = ItemList([10, 20, 30, 40], tfms=[lambda o: o+1])
    assert il[1:3] == [21, 31] and il[[0, -1]] == [11, 41] and il[(0,)] == [11] and il[[]] == [] and list(il) == [11, 21, 31, 41]
    for mask in [False, True, False, True], np.array([False, True, False, True]), torch.tensor([False, True, False, True]): assert il[mask] == [21, 41]
    assert il[torch.tensor(2)] == il[np.int64(2)] == 31 and il[torch.tensor([2])] == [31]
    images = ImageList.from_files(folder)
    assert [im.size for im in images[::8]] == [images[i].size for i in (0, 8, 16)]

def test_new_keeps_path_and_transforms_and_nothing_is_opened_early(tmp_path):
    il = ImageList(['no/such.jpg'], path=tmp_path, tfms=[make_rgb])
    new = il.new(['other.jpg'])
    assert type(new) is ImageList and new.path == tmp_path and new.tfms is il.tfms and new.items == ['other.jpg']
    with pytest.raises(ImageFileError, match='no/such.jpg'): il[0]

def test_a_transform_that_fails_names_the_item(tmp_path):
    fn = tmp_path/'odd.tif'
    PIL.Image.fromarray(np.zeros((4, 4), np.float32)).save(fn)
    il = ImageList([fn], tfms=[make_rgb])
    with pytest.raises(ValueError, match='mode F.*odd.tif'): il[0]
    with pytest.raises(ValueError, match='odd.tif'): list(DataLoader(Dataset(il, [0]), num_workers=1))
    def broken(o): return {}[o]
    with pytest.raises(KeyError) as e: ItemList(['thing'], tfms=broken)['0' == 1]
    assert 'thing' in str(e.value) or 'item thing' in e.value.__notes__
    def raises(o): raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'bad')
    with pytest.raises(UnicodeDecodeError) as e: ItemList(['thing'], tfms=raises)[0]
    assert 'item thing' in e.value.__notes__

def test_transforms_run_in_their_order():
    class Log(Transform):
        def __init__(self, name, order): self.name, self._order = name, order
        def __call__(self, o): return o + self.name
    assert ItemList([''], tfms=[Log('c', 30), Log('a', -1), Log('b', 0), lambda o: o+'B'])[0] == 'abcB'
    im = PIL.Image.new('RGB', (4, 6), (255, 0, 51))
    out = ItemList([im], tfms=[to_float_tensor, to_byte_tensor, ResizeFixed(8), MakeRGB()])[0]
    assert out.dtype == torch.float32 and out.shape == (3, 8, 8)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([1., 0., .2]))


# Broken images

def bomb(pixels): # a PNG of 57 bytes that claims to be an image of so many pixels
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))
    head = struct.pack('>IIBBBBB', 10_000, pixels//10_000, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')

def jpeg():
    b = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 80).save(b, 'JPEG')
    return b.getvalue()

broken_files = {'truncated.jpg': lambda: jpeg()[:1500], 'headless.jpg': lambda: jpeg()[100:], 'empty.jpg': lambda: b'', 'text.jpg': lambda: b'just words',
                'tail.png': lambda: bomb(10_000), 'bomb.png': lambda: bomb(100_000_000), 'big_bomb.png': lambda: bomb(10**9)}

@pytest.mark.parametrize('name', broken_files)
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_a_broken_image_is_named_here_and_in_a_worker(tmp_path, name, workers):
    good = [save(tmp_path/f'{i}.png') for i in range(5)]
    (tmp_path/name).write_bytes(broken_files[name]())
    il = ImageList(good + [tmp_path/name], tfms=[make_rgb, to_byte_tensor])
    with pytest.raises(ImageFileError, match=f'{name} cannot be read as an image'): il[5]
    dl, _ = get_dls(Dataset(il, range(6)), None, bs=2, seed=0, num_workers=workers)
    with pytest.raises(ImageFileError, match=f'{name} cannot be read as an image'): list(dl)
    if 'bomb' in name:
        with pytest.raises(ImageFileError, match='MAX_IMAGE_PIXELS|exceeds limit'): il[5]

def test_the_limit_of_pixels_is_the_one_that_pillow_has(tmp_path, monkeypatch):
    fn = save(tmp_path/'a.png', (20, 20))
    monkeypatch.setattr(PIL.Image, 'MAX_IMAGE_PIXELS', 400)
    assert ImageList([fn])[0].size == (20, 20)
    monkeypatch.setattr(PIL.Image, 'MAX_IMAGE_PIXELS', 399)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ImageFileError, match='a.png .*20x20 pixels'): ImageList([fn])[0]
    monkeypatch.setattr(PIL.Image, 'MAX_IMAGE_PIXELS', None)
    assert ImageList([fn])[0].size == (20, 20)

def test_an_opened_image_holds_no_file(tmp_path):
    fns = [save(tmp_path/f'{i}.{ext}') for i in range(3) for ext in ('jpg', 'png', 'gif', 'tif')]
    before = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else None
    with warnings.catch_warnings():
        warnings.simplefilter('error')                      # a ResourceWarning would be an error
        ims = list(ImageList(fns))
    if before is not None: assert len(os.listdir('/proc/self/fd')) == before
    for im in ims: assert make_rgb(im).resize((2, 2)).mode == 'RGB'


# Modes of images

ramp = (np.tile(np.arange(256)*257, (3, 1))).astype(np.uint16) # 0 to 65535

def write_ramp(path, kind):
    if kind == 'I;16 PNG': PIL.Image.fromarray(ramp).save(path.with_suffix('.png'))
    elif kind == 'I;16 TIFF': PIL.Image.fromarray(ramp).save(path.with_suffix('.tif'))
    elif kind == 'I;16B TIFF': PIL.Image.frombytes('I;16B', (256, 3), ramp.astype('>u2').tobytes()).save(path.with_suffix('.tif'))
    elif kind == 'I TIFF': PIL.Image.fromarray(ramp.astype(np.int32)).save(path.with_suffix('.tif'))
    else: path.with_suffix('.pgm').write_bytes(b'P5\n256 3\n65535\n' + ramp.astype('>u2').tobytes())
    return next(path.parent.glob(path.name + '.*'))

@pytest.mark.parametrize('kind, mode', [('I;16 PNG', 'I;16'), ('I;16 TIFF', 'I;16'), ('I;16B TIFF', 'I;16B'), ('16-bit PGM', 'I'), ('I TIFF', 'I')])
def test_16_bits_are_scaled_not_clipped(tmp_path, kind, mode):
    il = ImageList([write_ramp(tmp_path/'ramp', kind)])
    assert il[0].mode == mode
    a = np.asarray(make_rgb(il[0]))
    assert a.shape == (3, 256, 3) and (a == np.arange(256)[None, :, None]).all()

def test_16_bits_are_rounded():
    a = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    exact = np.floor(a.astype(np.float64)*255/65535 + .5).astype(np.uint8)
    assert (np.asarray(make_rgb(PIL.Image.fromarray(a)))[..., 1] == exact).all()

@pytest.mark.parametrize('a, text', [(np.full((2, 2), 70_000, np.int32), 'mode I with values from 70000'), (np.array([[-1, 5]], np.int32), 'mode I .* -1'),
                                     (np.zeros((2, 2), np.float32), 'mode F')])
def test_32_bits_are_refused_by_name(tmp_path, a, text):
    PIL.Image.fromarray(a).save(tmp_path/'deep.tif')
    with pytest.raises(ValueError, match=text): make_rgb(PIL.Image.fromarray(a))
    with pytest.raises(ValueError, match=f'{text}.*deep.tif'): ImageList([tmp_path/'deep.tif'], tfms=make_rgb)[0]

def palette(transparency=None):
    im = PIL.Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8), 'L').convert('L')
    im = PIL.Image.frombytes('P', (2, 2), im.tobytes())
    im.putpalette([250, 10, 20, 30, 240, 50, 60, 70, 230])
    return im, {} if transparency is None else dict(transparency=transparency)

colours = np.array([[[250, 10, 20], [30, 240, 50]], [[60, 70, 230], [250, 10, 20]]], np.uint8)
rgba = PIL.Image.fromarray(np.dstack([colours, [[0, 255], [128, 0]]]).astype(np.uint8))
grey = PIL.Image.fromarray(np.array([[0, 90], [200, 255]], np.uint8))
as_rgb = {'RGB.png': ((PIL.Image.fromarray(colours), {}), colours), 'P.png': (palette(), colours), 'P transparent.png': (palette(1), colours),
          'P alpha.png': (palette(b'\x00\xff\x80'), colours), 'P.gif': (palette(), colours), 'RGBA.png': ((rgba, {}), colours),
          'L.png': ((grey, {}), np.dstack([grey]*3)), 'LA.png': ((PIL.Image.merge('LA', [grey, rgba.getchannel('A')]), {}), np.dstack([grey]*3)),
          '1.png': ((grey.point(lambda v: v > 100, '1'), {}), np.dstack([np.where(np.asarray(grey) > 100, 255, 0)]*3)),
          'CMYK.tif': ((PIL.Image.fromarray(colours).convert('CMYK'), {}), colours)}

@pytest.mark.parametrize('name', as_rgb)
def test_every_mode_becomes_three_channels(tmp_path, name):
    (im, options), expected = as_rgb[name]
    im.save(tmp_path/name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        il = ImageList([tmp_path/name], tfms=[make_rgb, to_byte_tensor])
        assert il.get(il.items[0]).mode in (im.mode, 'RGBA')
        same(il[0], torch.from_numpy(np.ascontiguousarray(expected.astype(np.uint8).transpose(2, 0, 1))))

def test_cmyk_jpeg(tmp_path):
    PIL.Image.new('CMYK', (8, 8), (0, 255, 255, 0)).save(tmp_path/'red.jpg', quality=95)
    il = ImageList([tmp_path/'red.jpg'], tfms=[make_rgb])
    assert il.get(il.items[0]).mode == 'CMYK'
    assert np.abs(np.asarray(il[0]).astype(int) - [255, 0, 0]).max() < 12

@pytest.mark.parametrize('ext', ['gif', 'webp', 'png', 'tif'])
def test_an_animation_gives_its_first_frame(tmp_path, ext):
    frames = [PIL.Image.new('RGB', (8, 8), c) for c in ('red', 'lime', 'blue')]
    frames[0].save(tmp_path/f'a.{ext}', save_all=True, append_images=frames[1:])
    il = ImageList([tmp_path/f'a.{ext}'], tfms=[make_rgb])
    with PIL.Image.open(il.items[0]) as im: assert im.n_frames == 3
    assert np.abs(np.asarray(il[0]).astype(int) - [255, 0, 0]).max() <= 2

def test_image_without_colour_or_with_a_palette_is_no_tensor_by_accident():
    for mode in '1', 'P', 'I', 'F', 'I;16', 'PA':
        with pytest.raises(TypeError, match=f'mode {mode}: put make_rgb before it'): to_byte_tensor(PIL.Image.new(mode, (2, 2)))
    with pytest.raises(TypeError, match='not Tensor'): to_byte_tensor(torch.zeros(3, 2, 2))
    for mode, c in ('L', 1), ('LA', 2), ('RGB', 3), ('RGBA', 4), ('CMYK', 4): assert to_byte_tensor(PIL.Image.new(mode, (5, 3))).shape == (c, 3, 5)

def test_tensors_of_an_image_hold_its_pixels():
    a = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    t = to_byte_tensor(PIL.Image.fromarray(a))
    assert t.is_contiguous() and t.dtype == torch.uint8
    same(t, torch.from_numpy(a.transpose(2, 0, 1).copy()))
    same(to_float_tensor(t), torch.from_numpy(a.transpose(2, 0, 1).astype(np.float32))/255)
    same(to_float_tensor(t), ByteToFloat()(t))
    for bad in t.float(), t.long():
        with pytest.raises(TypeError, match='to_float_tensor takes bytes'): to_float_tensor(bad)
    with pytest.raises(TypeError, match='int64'): ByteToFloat()(t.long())
    f = t.float()
    assert ByteToFloat()(f) is f

@pytest.mark.parametrize('size', [0, -3, (8,), (8, 0), (8, 9, 10), 1.5, '128', (8., 8.), None])
def test_resize_refuses_what_is_no_size(size):
    with pytest.raises(ValueError, match='ResizeFixed'): ResizeFixed(size)

def test_resize():
    im = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    assert ResizeFixed(16)(im).size == (16, 16) and ResizeFixed((20, 10))(im).size == (20, 10)
    assert (np.asarray(ResizeFixed((60, 40))(im)) == np.asarray(im)).all()
    ref = torch.nn.functional.interpolate(to_byte_tensor(im)[None].float(), (10, 15), mode='bilinear', antialias=True)[0]
    assert (to_byte_tensor(ResizeFixed((15, 10))(im)).float() - ref).abs().max() < 1.5


# Splitting

def test_grandparent_splitter():
    fns = ['x/train/a/1.jpg', Path('x/valid/a/2.jpg'), 'x/test/a/3.jpg', '4.jpg', 'train/5.jpg']
    assert [grandparent_splitter(fn) for fn in fns] == [False, True, None, None, None]
    assert grandparent_splitter('x/val/a/1.jpg', valid_name='val') is True and grandparent_splitter('x/fit/a/1.jpg', train_name='fit') is False

def test_random_splitter_depends_on_the_file_alone():
    names = [f'c{i%7}/{i}.jpg' for i in range(10_000)]
    before = rng_states()
    sides = {n: random_splitter(n) for n in names}
    for other in reversed(names[::3]): assert random_splitter(f'/elsewhere/train/{other}') is sides[other] is random_splitter(Path(other))
    assert rng_states() == before
    for p in 0.05, 0.2, 0.5, 0.9:                            # 4.5 standard deviations
        assert abs(statistics.mean(random_splitter(n, p_valid=p) for n in names) - p) < 4.5*math.sqrt(p*(1-p)/1e4)
    assert all(random_splitter(n, 0.5) for n in names if sides[n])   # a larger share holds the smaller one
    a, b = [[random_splitter(n, seed=s) for n in names] for s in (1, 2)]
    assert abs(statistics.mean(x and y for x, y in zip(a, b)) - 0.04) < 0.01 # seeds are independent

def test_random_splitter_takes_what_names_itself():
    assert random_splitter(('a', 3)) is random_splitter(('a', 3)) and random_splitter(7) is random_splitter(7)
    with pytest.raises(TypeError, match='not object'): random_splitter(object())

@pytest.mark.parametrize('p', [0, 1, -.1, 1.5, math.nan])
def test_random_splitter_refuses_a_share_that_is_none(p):
    with pytest.raises(ValueError, match='p_valid='): random_splitter('a/1.jpg', p)

fns = [f'{side}/c/{i}.jpg' for side in ('train', 'val') for i in range(3)]

@pytest.mark.parametrize('f, text', [
    (grandparent_splitter, r'grandparent_splitter puts none of 6 items on the validation side; training: 3, such as train/c/0.jpg; validation: 0; neither: 3, such as val/c/0.jpg'),
    (partial(grandparent_splitter, valid_name='val', train_name='fit'), r"grandparent_splitter\(valid_name='val', train_name='fit'\) puts none of 6 items on the training side"),
    (lambda fn: None, 'none of 6 items on the training side; .*neither: 6, such as train/c/0.jpg'),
    (lambda fn: 'valid', "gave 'valid' for train/c/0.jpg: it has to be True"),
    (lambda fn: 2, 'gave 2 for train/c/0.jpg'),
    (lambda fn: [True], r'gave \[True\] for train/c/0.jpg'),
    (lambda fn: 1/0, 'on train/c/0.jpg: ZeroDivisionError'),
    (lambda fn: int(fn[-5]) > 0 or {}['key'], "on train/c/0.jpg: KeyError: 'key'"),
    (partial(random_splitter, p_valid=3), r'random_splitter\(p_valid=3\) on train/c/0.jpg: ValueError: p_valid=3')])
@pytest.mark.parametrize('many', [list, Paths])
def test_a_splitter_that_fails_names_item_and_side(f, text, many):
    f2 = f if many is list else (f if isinstance(f, partial) or f is grandparent_splitter else lambda p: f(str(p)))
    with pytest.raises(ValueError, match='splitting: .*' + text): split_by_func(many(fns), f2)
    with pytest.raises(ValueError, match='splitting: .*' + text): SplitData.split_by_func(ItemList(many(fns)), f2)

@pytest.mark.parametrize('items', [[], Paths()])
def test_splitting_nothing(items):
    with pytest.raises(ValueError, match='none of 0 items'): split_by_func(items, random_splitter)

def test_what_is_on_neither_side_is_left_out_with_a_warning():
    items = Paths(fns + [f'test/c/{i}.jpg' for i in range(7)])
    f = partial(grandparent_splitter, valid_name='val')
    with pytest.warns(UserWarning, match='^7 of 13 items are on neither side and left out: test/c/0.jpg, .*test/c/4.jpg, ...$') as ws:
        train, valid = split_by_func(items, f)
    assert train == fns[:3] and valid == fns[3:] and isinstance(train, Paths) and ws[0].filename == __file__
    with pytest.warns(UserWarning, match='7 of 13') as ws: SplitData.split_by_func(ItemList(items), f)
    assert ws[0].filename == __file__

def test_split_keeps_order_and_takes_several_kinds_of_truth():
    for f in (lambda i: i > 2), (lambda i: np.bool_(i > 2)), (lambda i: torch.tensor(i > 2)), (lambda i: int(i > 2)):
        assert split_by_func(range(6), f) == ([0, 1, 2], [3, 4, 5])

def test_split_data_asks_the_training_list(folder):
    sd = SplitData.split_by_func(ImageList.from_files(folder, tfms=[make_rgb]), partial(grandparent_splitter, valid_name='val'))
    assert sd.path == folder and sd.tfms == [make_rgb] and len(sd.train) == 16 and len(sd.valid) == 8 and type(sd.valid) is ImageList
    with pytest.raises(AttributeError): sd.nonsense
    with pytest.raises(AttributeError): SplitData.__new__(SplitData).train


# Labelling

def test_re_labeler():
    assert re_labeler(Path('x_y/great_pyrenees_173.jpg'), r'^(.+)_\d+') == 'great_pyrenees'
    for pat, text in (r'^(\d+)$', 'does not match'), (r'\d+', 'has no group'):
        with pytest.raises(ValueError, match=text): re_labeler('a/dog_1.jpg', pat)

def test_vocabulary_is_the_training_sets_sorted(folder):
    ll = labeled(folder)
    assert ll.train.proc_y is ll.valid.proc_y and ll.train.proc_y.vocab == ['c0', 'c1', 'c2', 'c3']
    for side in ll.train, ll.valid:
        assert [side.y_obj(i) for i in range(len(side))] == [fn.parent.name for fn in side.x.items] == side.y_obj(list(range(len(side))))
        assert side.y_obj(slice(0, 2)) == [fn.parent.name for fn in side.x.items[:2]]
    sd = SplitData(ItemList(list('cab')), ItemList(list('bc')))
    ll = label_by_func(sd, str.upper, proc_y=CategoryProcessor())
    assert ll.proc_y.vocab == ['A', 'B', 'C'] and ll.train.y.items == [2, 0, 1] and ll.valid.y.items == [1, 2]

@pytest.mark.parametrize('labels', [[3, 1, 2], [2.5, -1.], [True, False], [('b', 1), ('a', 2)], [1, 'a', '1', 2]])
def test_vocabulary_of_other_labels_is_sorted_and_does_not_depend_on_the_order(labels):
    vocabs = [CategoryProcessor(), CategoryProcessor()]
    vocabs[0](labels); vocabs[1](labels[::-1])
    assert vocabs[0].vocab == vocabs[1].vocab and len(vocabs[0].vocab) == len(labels)
    if len({type(o) for o in labels}) == 1: assert vocabs[0].vocab == sorted(labels)

def test_a_given_vocabulary():
    proc = CategoryProcessor(['dog', 'cat'])
    assert proc(['cat', 'dog', 'cat']) == [1, 0, 1] and proc.deprocess([0, 1]) == ['dog', 'cat']
    assert CategoryProcessor({'b', 'c', 'a'}).vocab == ['a', 'b', 'c']
    with pytest.raises(ValueError, match='twice: b'): CategoryProcessor(['a', 'b', 'b'])
    with pytest.raises(UnknownLabelError, match="'whale'"): CategoryProcessor(['dog'])(['dog', 'whale'])

@pytest.mark.parametrize('idx', [-1, 4, 400, torch.tensor(-1), torch.tensor(4), np.int64(-4)])
def test_a_class_that_there_is_not(idx, folder):
    proc = labeled(folder).train.proc_y
    with pytest.raises(IndexError, match=rf'class {int(idx)} is none of the 4'): proc.deproc1(idx)
    with pytest.raises(IndexError, match=rf'class {int(idx)} is none'): proc.deprocess([0, idx])
    assert proc.deprocess(torch.tensor([0, 3])) == ['c0', 'c3']

def test_a_label_that_only_validation_has_names_label_and_file(folder):
    save(folder/'val'/'whale'/'moby.png'); save(folder/'val'/'yak'/'y.png')
    with pytest.raises(UnknownLabelError, match="2 of 10 items have labels .*'whale', 'yak'.*val/whale/moby.png, .*val/yak/y.png") as e: labeled(folder)
    assert e.value.places == [8, 9] and isinstance(e.value, ValueError)

@pytest.mark.parametrize('f, text', [
    (lambda fn: None, 'gives no label for train/c/0.jpg'), (lambda fn: math.nan, 'gives no label for train/c/0.jpg, but nan'),
    (lambda fn: np.float64('nan'), 'gives no label'), (lambda fn: {}['x'], "on train/c/0.jpg: KeyError: 'x'"),
    (partial(re_labeler, pat='(dog)'), r"re_labeler\(pat='\(dog\)'\) on train/c/0.jpg: ValueError: '\(dog\)' does not match")])
def test_a_labeler_that_fails_names_the_item(f, text):
    sd = SplitData(ItemList(Paths(fns[:3])), ItemList(Paths(fns[3:])))
    with pytest.raises(ValueError, match='labeling: .*' + text): label_by_func(sd, f, proc_y=CategoryProcessor())

@pytest.mark.parametrize('label', [torch.tensor(1), ['a'], np.array([1]), {'a': 1}])
def test_what_cannot_be_a_label_is_refused(label):
    sd = SplitData(ItemList([1]), ItemList([2]))
    with pytest.raises(TypeError, match='is no label'): label_by_func(sd, lambda o: label, proc_y=CategoryProcessor())

@pytest.mark.parametrize('kw', [dict(proc_y=CategoryProcessor), dict(proc_x=Processor), dict(proc_y=[CategoryProcessor])])
def test_a_processor_given_as_a_class(kw):
    sd = SplitData(ItemList(['a']), ItemList(['b']))
    with pytest.raises(TypeError, match=r'is a class: give an instance, \w+\(\)'): label_by_func(sd, str, **kw)

class Plus(Processor):
    def __init__(self, n, order=0): self.n, self._order, self.calls = n, order, 0
    def setup(self, items): self.calls += 1
    def proc1(self, o): return f'{o}+{self.n}'
    def deproc1(self, o): return o.removesuffix(f'+{self.n}')

def test_processors_are_set_up_once_and_undone_in_reverse():
    procs = [Plus(2, order=2), Plus(1, order=1)]
    sd = SplitData(ItemList(['a', 'b']), ItemList(['c']))
    ll = label_by_func(sd, str.upper, proc_x=procs, proc_y=Plus(3))
    assert ll.train.x.items == ['a+1+2', 'b+1+2'] and ll.valid.x.items == ['c+1+2'] and ll.valid.y.items == ['C+3']
    assert ll.train.x_obj(1) == 'b' and ll.train.x_obj([0, 1]) == ['a', 'b'] and ll.valid.y_obj(0) == 'C' and ll.train.y_obj(slice(None)) == ['A', 'B']
    assert [p.calls for p in procs] == [1, 1]

def test_a_setup_that_fails_leaves_the_processor_as_it_was():
    class Bad(Processor):
        def setup(self, items): raise ValueError('no')
    p = Bad()
    for _ in range(2):
        with pytest.raises(ValueError, match='no'): p([1])

def test_lengths_and_pairs(folder):
    ll = labeled(folder)
    assert len(ll.train) == 16 and len(ll.valid) == 8 and len(Dataset([1, 2], 'ab')) == 2 and Dataset([1, 2], 'ab')[1] == (2, 'b')
    x, y = ll.train[[0, 1]]
    assert len(x) == 2 and y == [0, 0]
    with pytest.raises(ValueError, match='2 inputs and 3 targets'): Dataset([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match='2 items and 1 labels'): LabeledData(ItemList([1, 2]), ItemList([1]))


# Batches

class Jitter(Transform):
    "Adds draws of all three generators to an image's bytes."
    _order = 25
    def __call__(self, t):
        a = torch.tensor([random.randrange(100), np.random.randint(100), int(torch.randint(100, ()))], dtype=torch.uint8)
        return t//4 + a[:, None, None] + torch.randint(50, t.shape, dtype=torch.uint8)

def passes(dl, n=2): return [[(x.clone(), y.clone()) for x, y in dl] for _ in range(n)]

def assert_same_batches(a, b):
    for p, q in zip(a, b, strict=True):
        for (x, y), (u, v) in zip(p, q, strict=True): same(x, u); same(y, v)

@pytest.mark.parametrize('kw', [dict(num_workers=1), dict(num_workers=2), dict(num_workers=4), dict(num_workers=2, persistent_workers=True),
                                dict(num_workers=4, persistent_workers=True, prefetch_factor=1),
                                dict(num_workers=2, multiprocessing_context='spawn'),
                                dict(num_workers=2, multiprocessing_context='spawn', persistent_workers=True)], ids=str)
@pytest.mark.filterwarnings('ignore:This DataLoader will create 4 worker processes')
def test_batches_do_not_depend_on_the_workers(folder, kw):
    data = labeled(folder, Jitter())
    ref, other = data.to_databunch(bs=5, seed=3), data.to_databunch(bs=5, seed=3, **kw)
    random.seed(1); np.random.seed(2); torch.manual_seed(3)  # which has no say
    n = 3
    assert_same_batches(passes(ref.train_dl, n), passes(other.train_dl, n))
    assert ref.train_dl.n_pass == other.train_dl.n_pass == n
    if 'multiprocessing_context' in kw: return             # spawned workers take seconds to start
    assert_same_batches(passes(ref.valid_dl), passes(other.valid_dl))
    assert other.valid_dl.n_pass == 0

class Recorder:
    "A decoder that draws nothing, and notes which threads it runs in. It may wait at each image until as many threads have come to one, or fail at chosen files."
    random = False
    def __init__(self, together=0, bad=()): self.seen, self.bad, self.barrier = [], set(bad), threading.Barrier(together) if together else None
    def __call__(self, fn):
        self.seen.append(threading.current_thread())
        if self.barrier: self.barrier.wait(20)
        if fn.name in self.bad: raise ValueError(f'it is {fn.name}')
        return PIL.Image.open(fn)

@pytest.fixture
def torch_threads():
    "Sets how many threads torch uses; looks whether they are as many in the end."
    before, wanted = torch.get_num_threads(), []
    def use(n): wanted.append(n); torch.set_num_threads(n)
    yield use
    now = torch.get_num_threads()
    torch.set_num_threads(before)
    assert now == wanted[-1]

def recorded(folder, rec, *tfms, n=16, **kw):
    il = ImageList(sorted(get_files(folder, image_extensions, recurse=True))[:n], tfms=[make_rgb, ResizeFixed(8), to_byte_tensor, *tfms], decoder=rec)
    return get_dls(LabeledData(il, ItemList([0]*n)), None, bs=n, seed=0, **kw)[0]

@pytest.mark.parametrize('decoder', [None, open_bytes])
def test_batches_do_not_depend_on_the_threads(folder, torch_threads, decoder):
    def batches(n):
        torch_threads(n)
        data = labeled(folder)
        for ll in data.train, data.valid: ll.x.decoder = decoder or ll.x.decoder
        data = data.to_databunch(bs=9, seed=3)
        return passes(data.train_dl), passes(data.valid_dl)
    ref = batches(1)
    for n in 2, 5:
        for a, b in zip(ref, batches(n)): assert_same_batches(a, b)

def test_images_are_read_by_several_threads(folder, torch_threads):
    torch_threads(2)
    rec = Recorder(together=2)                             # one thread alone would wait for ever
    next(iter(recorded(folder, rec)))
    assert len(rec.seen) == 16 and len(set(rec.seen)) == 2 and not any(t.is_alive() for t in set(rec.seen))

@pytest.mark.parametrize('why', ['one thread of torch', 'a random transform', 'a decoder that does not say', 'few items', 'a worker'])
def test_images_are_read_by_the_thread_that_asks(folder, torch_threads, why):
    torch_threads(1 if why == 'one thread of torch' else 2)
    rec = Recorder()
    if why == 'a decoder that does not say': rec.random = True
    dl = recorded(folder, NotInThreads() if why == 'a worker' else rec, *[Jitter()]*(why == 'a random transform'), n=7 if why == 'few items' else 16,
                  num_workers=int(why == 'a worker'))
    assert len(next(iter(dl))[0]) in (7, 16)
    if why != 'a worker': assert set(rec.seen) == {threading.current_thread()}

class NotInThreads:
    random = False
    def __call__(self, fn):
        assert threading.current_thread() is threading.main_thread()
        return PIL.Image.open(fn)

@pytest.mark.parametrize('n', [1, 2, 4])
def test_of_several_broken_images_the_first_is_named(folder, torch_threads, n):
    torch_threads(n)
    rec = Recorder(bad=['1.png', '3.png'])
    dl = recorded(folder, rec)
    order = [dl.dataset.ds.x.items[i] for _, i in next(iter(dl.batch_sampler))]
    first = next(fn for fn in order if fn.name in rec.bad)
    for _ in range(5):
        with pytest.raises(ImageFileError, match=f'{first} cannot be read as an image: ValueError: it is {first.name}'): next(iter(dl))

def test_an_interrupt_ends_the_threads(folder, torch_threads):
    torch_threads(2)
    rec, before = Recorder(), signal.signal(signal.SIGINT, signal.default_int_handler)
    once = threading.Lock()
    def press(x):
        if len(rec.seen) > 4 and once.acquire(blocking=False): signal.raise_signal(signal.SIGINT)
        return x
    press.random = False
    try:
        with pytest.raises(KeyboardInterrupt): next(iter(recorded(folder, rec, press)))
    finally: signal.signal(signal.SIGINT, before)
    for t in set(rec.seen) - {threading.current_thread()}: t.join(20)
    assert not any(t.is_alive() for t in set(rec.seen) - {threading.current_thread()})

def test_seeds_of_samples_differ():
    keys = [ks for n in (1, 2, 3) for ks in itertools.product(range(8), repeat=n)]
    assert len({mix(*ks) for ks in keys}) == len(keys) and 0 <= mix(-1, 2**70) < 2**64
    changed = statistics.mean((mix(7, 0, i) ^ mix(7, 0, i+1)).bit_count() for i in range(1000))
    assert abs(changed-32) < .6                             # half of the bits; 4.7 standard deviations

def test_a_sample_depends_on_seed_pass_and_index_alone(folder):
    data = labeled(folder, Jitter())
    a, b = data.to_databunch(bs=5, seed=3).train_dl, data.to_databunch(bs=3, seed=3).train_dl   # other batches, the same samples
    def by_image(p): return {x.sum((1, 2)).tolist().__str__(): None for xb, _ in p for x in xb}
    for p, q in zip(passes(a), passes(b)): assert by_image(p).keys() == by_image(q).keys()
    with pytest.raises(AssertionError): assert_same_batches(passes(a, 1), passes(data.to_databunch(bs=5, seed=4).train_dl, 1))

def test_drawing_in_between_changes_nothing_and_is_not_disturbed(folder):
    data = labeled(folder, Jitter())
    ref = passes(data.to_databunch(bs=5, seed=3).train_dl)
    dl, got = data.to_databunch(bs=5, seed=3).train_dl, []
    for _ in range(2):
        got.append([])
        for b in dl: got[-1].append(b); random.random(), np.random.rand(7), torch.rand(5)
    assert_same_batches(ref, got)

@pytest.mark.parametrize('workers', [0, 2])
def test_making_batches_leaves_the_global_generators_alone(folder, workers):
    before = rng_states()
    data = labeled(folder, Jitter()).to_databunch(bs=4, seed=0, num_workers=workers)
    passes(data.train_dl), passes(data.valid_dl), next(iter(data.train_dl))
    assert rng_states() == before
    ll = labeled(folder, Jitter())
    ll.to_databunch(bs=4, seed=0)                           # which opens the first image, for its channels
    assert rng_states() == before

def test_an_item_by_hand_draws_afresh(folder):
    train = labeled(folder, Jitter()).train
    assert not torch.equal(train[0][0], train[0][0])

def test_a_look_at_one_batch_changes_nothing(folder):
    for kw in dict(), dict(num_workers=2), dict(num_workers=2, persistent_workers=True):
        dl, ref = (labeled(folder, Jitter()).to_databunch(bs=5, seed=3, **k).train_dl for k in (kw, {}))
        first = next(iter(dl))
        same(first[0], next(iter(dl))[0])
        assert dl.n_pass == 0
        got = passes(dl)
        assert_same_batches(passes(ref), got)
        same(first[0], got[0][0][0])
        it = iter(dl); next(it)
        assert dl.n_pass == 2
        next(it)
        assert dl.n_pass == 3                               # from the second batch on it is a pass, even where it is left early
        it.close()

def test_the_pass_can_be_put_back(folder):
    dl = labeled(folder, Jitter()).to_databunch(bs=5, seed=3, num_workers=2, persistent_workers=True).train_dl
    first, second, third = passes(dl, 3)
    dl.n_pass = 1
    assert_same_batches([second, third], passes(dl))

def test_every_item_once_a_pass_in_another_order_each_time():
    dl, valid = get_dls(Dataset(range(50), range(50)), Dataset(range(7), range(7)), bs=8, seed=0)
    orders = [[int(i) for xb, _ in p for i in xb] for p in passes(dl, 3)]
    for o in orders: assert sorted(o) == list(range(50)) and o != list(range(50))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [xb.tolist() for xb, _ in valid] == [list(range(7))] == [xb.tolist() for xb, _ in valid]
    assert len(dl) == 7 and len(valid) == 1

def test_orders_are_shuffled_evenly():
    dl, n = get_dls(Dataset(range(6), range(6)), None, bs=6, seed=11)[0], 600
    counts = np.zeros((6, 6))
    for k in range(n):
        dl.n_pass = k
        for place, i in enumerate(next(iter(dl))[0].tolist()): counts[place, i] += 1
    chi2 = ((counts-n/6)**2/(n/6)).sum()
    assert chi2 < 60                                        # 25 degrees of freedom: beyond 60 once in 10,000

@pytest.mark.parametrize('n, bs, drop, sizes', [(10, 4, False, [4, 4, 2]), (10, 4, True, [4, 4]), (8, 4, True, [4, 4]), (4, 4, False, [4]), (5, 1, False, [1]*5)])
def test_sizes_of_batches(n, bs, drop, sizes):
    dl, valid = get_dls(Dataset(range(n), range(n)), Dataset(range(n), range(n)), bs, seed=0, drop_last=drop)
    assert [len(x) for x, _ in dl] == sizes and len(dl) == len(sizes)
    assert sum(len(x) for x, _ in valid) == n and max(len(x) for x, _ in valid) == min(2*bs, n)

@pytest.mark.parametrize('bs, text', [(0, 'bs=0'), (-4, 'bs=-4'), (2.0, 'bs=2.0'), (1.5, 'bs=1.5'), ('8', "bs='8'"), (True, 'bs=True'), (None, 'bs=None'),
                                     ])
def test_a_batch_size_that_is_none(bs, text):
    with pytest.raises(ValueError, match=text): get_dls(Dataset(range(10), range(10)), None, bs)

def test_empty_training_set_and_kinds_of_numbers():
    with pytest.raises(ValueError, match='training dataset is empty'): get_dls(Dataset([], []), None, 1)
    assert len(get_dls(Dataset(range(4), range(4)), None, np.int64(2), seed=np.int64(5))[0]) == 2
    with pytest.raises(TypeError): get_dls(Dataset(range(4), range(4)), None, 2, seed=0.5)
    a, b = (passes(get_dls(Dataset(range(30), range(30)), None, 30)[0], 1) for _ in range(2))
    assert a[0][0][0].tolist() != b[0][0][0].tolist()       # without a seed, each has its own
    a, b = ((torch.manual_seed(1), passes(get_dls(Dataset(range(30), range(30)), None, 30)[0], 1))[1] for _ in range(2))
    assert_same_batches(a, b)                               # drawn from torch's generator

@pytest.mark.parametrize('workers', [0, 2])
def test_images_of_different_sizes_say_which_have_which(folder, workers):
    il = ImageList.from_files(folder, tfms=[make_rgb, to_byte_tensor])
    ll = label_by_func(SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val')), parent_labeler, proc_y=CategoryProcessor())
    with pytest.raises(ValueError, match=r'cannot be stacked: .*3x\d+x\d+ and int \(\S*/c\d/\d.png.*\); 3x\d+x\d+ and int .*ResizeFixed'):
        list(ll.to_databunch(bs=16, seed=0, num_workers=workers).train_dl)

@pytest.mark.parametrize('workers', [0, 2])
def test_images_without_to_byte_tensor_say_so(folder, workers):
    il = ImageList.from_files(folder, tfms=[make_rgb, ResizeFixed(4)])
    with pytest.raises(ValueError, match=r'PIL image RGB 4x4 and int \(\S*\.png.*end the transforms with to_byte_tensor'):
        list(get_dls(Dataset(il, range(len(il))), None, bs=4, seed=0, num_workers=workers)[0])

def test_collate_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r'3x2x2 \(item 0\); 1x2x2 \(item 1\).*make_rgb'): collate([torch.zeros(3, 2, 2), torch.zeros(1, 2, 2)])
    with pytest.raises(ValueError, match='NoneType .*make tensors'): collate([(torch.zeros(2), None), (torch.zeros(2), None)])
    with pytest.raises(ValueError, match='cannot be stacked'): collate([dict(a=1), dict(b=2)])
    x, y = collate([(torch.ones(2), 3), (torch.zeros(2), 4)])
    same(x, torch.tensor([[1., 1], [0, 0]])); same(y, torch.tensor([3, 4]))

class Fails(Transform):
    "Raises, or kills its process, at one item."
    def __init__(self, how): self.how, self.main = how, os.getpid()
    def __call__(self, i):
        if i == 13 and self.how == 'raise': raise RuntimeError('unlucky')
        if i == 13 and os.getpid() != self.main: os.kill(os.getpid(), signal.SIGKILL)
        return i

def no_children(seconds=10):
    gc.collect()
    end = time.time() + seconds
    while multiprocessing.active_children() and time.time() < end: time.sleep(.05)
    return not multiprocessing.active_children()

@pytest.mark.parametrize('persistent', [False, True])
@pytest.mark.parametrize('how, text', [('raise', 'unlucky'), ('kill', 'DataLoader worker')])
def test_a_failure_in_a_worker_leaves_no_process_behind(how, text, persistent):
    ds = Dataset(ItemList(list(range(40)), tfms=[Fails(how)]), range(40))
    dl, _ = get_dls(ds, None, bs=2, seed=0, num_workers=2, persistent_workers=persistent)
    with pytest.raises(RuntimeError, match=text) as e: list(dl)
    assert no_children(), 'workers live on while somebody holds the exception'
    if how == 'raise': assert 'item 13' in str(e.value)
    else: assert 'num_workers=0' in str(e.value)
    ds.x.tfms = None                                        # the cause removed, the same loader works
    assert sorted(int(i) for x, _ in dl for i in x) == list(range(40))
    del dl, e                                               # the traceback holds the loader
    assert no_children()

@pytest.mark.parametrize('persistent', [False, True])
def test_a_loop_left_early_leaves_no_process_behind(persistent):
    dl, _ = get_dls(Dataset(range(40), range(40)), None, bs=2, seed=0, num_workers=2, persistent_workers=persistent)
    it = iter(dl); next(it); next(it); it.close()
    assert persistent or no_children()
    for _ in dl: break
    assert dl.n_pass == 1
    del it, dl
    assert no_children()

@pytest.fixture
def impatient(monkeypatch): # whoever presses Ctrl-C once presses again, at every step of torch's clean-up
    iterator, presses = torch.utils.data.dataloader._MultiProcessingDataLoaderIter, []
    def pressing(f):
        def g(*args, **kwargs): presses.append(f); signal.raise_signal(signal.SIGINT); return f(*args, **kwargs)
        return g
    monkeypatch.setattr(iterator, '_mark_worker_as_unavailable', pressing(iterator._mark_worker_as_unavailable))
    monkeypatch.setattr(multiprocessing.process.BaseProcess, 'join', pressing(multiprocessing.process.BaseProcess.join))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield presses
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler

@pytest.mark.parametrize('how, persistent', [('end', False), ('left', False), *itertools.product(['error', 'interrupt', 'killed', 'started'], [False, True])])
def test_interrupts_of_the_clean_up_leave_no_process_behind(impatient, monkeypatch, how, persistent):
    def strike(i):
        if how == 'error' and i == 13: raise RuntimeError('unlucky')
        if how == 'killed' and i == 13: os.kill(os.getpid(), signal.SIGKILL)
        return i
    dl, _ = get_dls(Dataset(ItemList(list(range(40)), tfms=[strike]), range(40)), None, bs=2, seed=0, num_workers=2, persistent_workers=persistent)
    if how == 'started':
        start = multiprocessing.process.BaseProcess.start
        monkeypatch.setattr(multiprocessing.process.BaseProcess, 'start', lambda p: (start(p), impatient.append(p), signal.raise_signal(signal.SIGINT)))
    def use():
        batches = iter(dl)
        for i, b in enumerate(batches):
            if i == 3 and how == 'left': batches.close()
            if i == 3 and how == 'interrupt': monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, '_next_data', lambda self: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt): use()
    assert impatient and no_children(2)

def test_a_clean_up_that_was_broken_off_is_brought_to_its_end(monkeypatch):
    "Torch does not begin again, and its workers would live on."
    dl, _ = get_dls(Dataset(range(40), range(40)), None, bs=2, seed=0, num_workers=2)
    batches = iter(dl)
    next(batches)
    inner = batches.gi_frame.f_locals['batches']
    inner._shutdown = True                    # as if it had begun
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert no_children(2)

def test_error_in_the_middle_of_a_pass_does_not_count_it_twice_nor_undo_it():
    ds = Dataset(ItemList(list(range(40)), tfms=[Fails('raise')]), range(40))
    dl, _ = get_dls(ds, None, bs=4, seed=0)
    with pytest.raises(RuntimeError, match='unlucky'): list(dl)
    assert dl.n_pass in (0, 1)


# DataBunch

def test_data_bunch_knows_channels_and_classes(folder):
    data = labeled(folder).to_databunch(bs=4, seed=0)
    assert (data.c_in, data.c_out, len(data.train_ds), len(data.valid_ds)) == (3, 4, 16, 8) and isinstance(data.train_ds, LabeledData)
    assert repr(data) == 'DataBunch: 16 training and 8 validation items, c_in=3, c_out=4'
    il = ImageList.from_files(folder, tfms=[lambda im: im.convert('L'), ResizeFixed(4), to_byte_tensor])
    ll = label_by_func(SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val')), parent_labeler, proc_y=[CategoryProcessor()])
    assert (ll.to_databunch(4).c_in, ll.to_databunch(4).c_out, ll.to_databunch(4, c_in=7, c_out=9).c_in) == (1, 4, 7)
    assert ll.to_databunch(4, c_out=5).c_out == 5
    with pytest.raises(ValueError, match='c_out=3 is less than the 4 classes.*c0, c1'): ll.to_databunch(4, c_out=3)
    unlabeled = SplitData(il, il)
    with pytest.raises(TypeError, match='ImageList has no labels yet: label_by_func'): unlabeled.to_databunch(4)
    plain = databunchify(SplitData(Dataset(torch.zeros(8, 5), torch.zeros(8)), Dataset(torch.zeros(2, 5), torch.zeros(2))), 4)
    assert (plain.c_in, plain.c_out) == (None, None)

def test_data_bunch_of_other_loaders_and_without_validation():
    ds = Dataset(range(4), range(4))
    data = DataBunch(DataLoader(ds, 2), None, c_in=1)
    assert data.train_ds is ds and data.valid_ds is None and '4 training and 0 validation' in repr(data)
    assert DataBunch(*get_dls(ds, None, 2)).valid_dl is None

def test_a_broken_first_image_is_known_before_training(folder):
    (folder/'train'/'c0'/'0.png').write_bytes(b'')
    with pytest.raises(ImageFileError, match='c0/0.png'): labeled(folder).to_databunch(bs=4)

def test_all_that_loading_needs_pickles(folder):
    ll = labeled(folder, Jitter())
    data = ll.to_databunch(bs=4, seed=0)
    il = ImageList.from_files(folder, tfms=[MakeRGB(), ResizeFixed(5), to_byte_tensor])
    for o in il, ll, ll.train, data.train_ds, data.train_dl.dataset, il.items, SplitData(il, il), norm_imagenette, ByteToFloat(), Dataset([1], [2]):
        new = pickle.loads(pickle.dumps(o))
        assert type(new) is type(o)
    new = pickle.loads(pickle.dumps(ll))
    assert new.train.x.items == ll.train.x.items and new.valid.y.items == ll.valid.y.items and new.train.proc_y.vocab == ll.train.proc_y.vocab
    same(pickle.loads(pickle.dumps(il))[3], il[3])
    norm_imagenette(torch.zeros(1, 3, 2, 2))
    assert norm_imagenette.kept and not pickle.loads(pickle.dumps(norm_imagenette)).kept
    e = pickle.loads(pickle.dumps(ImageFileError('a.jpg cannot be read')))
    assert str(e) == 'a.jpg cannot be read'


# On the device

def test_normalize_chan_against_torch():
    x, mean, std = torch.rand(4, 3, 5, 6), torch.tensor([.4, .5, .6]), torch.tensor([.2, .3, .4])
    ref = torch.stack([(x[:, c]-mean[c])/std[c] for c in range(3)], 1)
    torch.testing.assert_close(normalize_chan(x, mean, std), ref)
    torch.testing.assert_close(normalize_chan(x[0], mean, std), ref[0])
    torch.testing.assert_close(Normalizer(mean, std)(x), ref)
    half = Normalizer(mean, std)(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), ref, rtol=1e-2, atol=1e-2)
    assert Normalizer(mean, std)(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)

@pytest.mark.parametrize('f', [norm_imagenette, partial(normalize_chan, mean=torch.tensor([.5]*3), std=torch.tensor([.2]*3))])
def test_normalizing_what_is_not_fit_for_it(f):
    for dtype in torch.uint8, torch.int64:
        with pytest.raises(TypeError, match='takes floats, not .*ByteToFloat'): f(torch.zeros(2, 3, 4, 4, dtype=dtype))
    for shape in (2, 1, 4, 4), (4, 4), (2, 4, 3), (3,):
        with pytest.raises(ValueError, match='3 means for images of shape'): f(torch.zeros(shape))

def test_normalizer_refuses_constants_that_do_not_fit():
    for mean, std in ([.5]*3, [.2]*2), ([.5], [0.]), ([.5], [-1.]), ([.5], [math.nan]):
        with pytest.raises(ValueError, match='as many standard deviations as means'): Normalizer(mean, std)

def test_normalizer_keeps_its_constants():
    norm = Normalizer([.5]*3, [.2]*3)
    x = torch.rand(2, 3, 4, 4)
    norm(x)
    kept = norm.kept[x.device, x.dtype]
    norm(x)
    assert norm.kept[x.device, x.dtype] is kept and len(norm.kept) == 1

class Waits(TorchDispatchMode):
    "Counts what would make the host wait for a device."
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

def test_batch_transforms_ask_nothing_back():
    x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    with Waits() as waits: compose(x, [ByteToFloat(), norm_imagenette])
    assert waits.n == 0
    with Waits() as waits: x.sum().item()
    assert waits.n == 1

def test_normalize_to():
    train, valid = torch.randn(500)*4+7, torch.randn(20)
    a, b = normalize_to(train, valid)
    assert abs(a.mean()) < 1e-5 and abs(a.std()-1) < 1e-5
    torch.testing.assert_close(b, (valid-train.mean())/train.std())

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_batches_reach_the_gpu_as_bytes_and_are_made_floats_there(folder):
    data = labeled(folder, Jitter()).to_databunch(bs=8, seed=0, num_workers=2)
    norm, tfm = Normalizer(norm_imagenette.mean, norm_imagenette.std), ByteToFloat()
    for n, (xb, yb) in enumerate(data.train_dl):
        assert xb.is_pinned() and xb.dtype == torch.uint8
        on_gpu = xb.to('cuda', non_blocking=True)
        res = compose(on_gpu, [tfm, norm])
        assert res.device.type == 'cuda' and res.dtype == torch.float32
        torch.testing.assert_close(res.cpu(), compose(xb, [tfm, norm_imagenette]), rtol=1e-6, atol=1e-6)
        if n == 0: kept = norm.kept[on_gpu.device, torch.float32]
    assert n > 0 and len(norm.kept) == 1 and norm.kept[on_gpu.device, torch.float32] is kept and kept[0].device == on_gpu.device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')                 # with the constants in place, nothing waits
    try: compose(on_gpu, [tfm, norm])
    finally: torch.cuda.set_sync_debug_mode('default')


# Pictures

@pytest.fixture
def plt():
    import matplotlib.pyplot as plt
    yield plt
    plt.close('all')

@pytest.mark.parametrize('im', [torch.rand(3, 4, 5), torch.randint(256, (3, 4, 5), dtype=torch.uint8), torch.rand(1, 4, 5), torch.rand(4, 5), torch.randn(3, 4, 5).bfloat16(),
                                *(PIL.Image.new(m, (5, 4)) for m in ('RGB', 'L', 'P', 'RGBA', 'CMYK', '1', 'LA', 'I;16', 'I', 'F'))], ids=lambda o: o.mode if isinstance(o, PIL.Image.Image) else f'{o.dtype}-{o.ndim}')
def test_show_image(plt, im):
    ax = plt.subplots()[1]
    show_image(im, ax, title='what')
    assert ax.get_title() == 'what' and ax.images[0].get_array().shape[:2] == (4, 5)
    show_image(im)
    plt.gcf().canvas.draw()

def test_grey_is_drawn_as_it_is(plt):
    for im in torch.full((1, 4, 4), 128, dtype=torch.uint8), torch.full((4, 4), 128/255), PIL.Image.new('L', (4, 4), 128):
        ax = plt.subplots()[1]
        show_image(im, ax)
        assert np.allclose(ax.images[0].to_rgba(ax.images[0].get_array())[0, 0, :3], 128/255, atol=.01)

def test_show_batch_of_a_databunch_has_the_right_titles(plt, folder):
    data = labeled(folder).to_databunch(bs=8, seed=0)
    xb, yb = next(iter(data.train_dl))
    show_batch(data, c=3)
    axs = plt.gcf().axes
    assert len(axs) == 9 and [ax.get_title() for ax in axs[:8]] == [f'c{i}' for i in yb.tolist()] and not axs[8].images
    assert (axs[0].images[0].get_array() == xb[0].permute(1, 2, 0).numpy()).all()
    assert data.train_dl.n_pass == 0

def test_show_batch_of_images_and_of_plain_data(plt):
    show_batch(torch.rand(30, 3, 4, 4), labels=list(range(30)))
    assert len(plt.gcf().axes) == 16 and plt.gcf().axes[5].get_title() == '5'
    show_batch([PIL.Image.new('RGB', (4, 4))]*2)
    assert len(plt.gcf().axes) == 4
    show_batch(DataBunch(*get_dls(Dataset(torch.rand(8, 3, 4, 4), torch.arange(8)), None, 8, seed=0)))
    assert sorted(int(ax.get_title()) for ax in plt.gcf().axes) == list(range(8))
