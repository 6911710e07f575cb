"""What the Data Block says before training (`explain`, `check`), bytes that go through the transforms as tensors, and loaders that go on where
another one stopped."""
import io, multiprocessing, os, pickle, random, struct, zlib
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
from test_datablock import Jitter, assert_same_batches, folder, labeled, rng_states, same, save # noqa: F401 (a fixture)

from dl2lib.check import CheckError, explain
from dl2lib.datablock import (CategoryProcessor, Dataset, ImageFileError, ImageList, ItemList, LabeledData, MultiCategoryProcessor, Paths,
                              ResizeFixed, SplitData, get_dls, grandparent_splitter, label_by_func, make_rgb, open_image,
                              parent_labeler, to_byte_tensor)
from dl2lib.loader import SeededDataset, collate

TFMS = [make_rgb, ResizeFixed(8), to_byte_tensor]
by_folder = partial(grandparent_splitter, valid_name='val')

def split(folder, tfms=TFMS): return SplitData.split_by_func(ImageList.from_files(folder, tfms=tfms), by_folder)


# explain

def stages(table): return [row[0] for row in table]

def test_explain_shows_each_stage_of_an_item(folder):
    table = labeled(folder).train.explain(5)
    assert stages(table) == ['x: item', 'x: get', 'x: make_rgb', 'x: ResizeFixed((8, 8))', 'x: to_byte_tensor', 'y: item', 'y: CategoryProcessor']
    assert [row[1:3] for row in table][1:5] == [['PIL image RGB', '9x7'], ['PIL image RGB', '9x7'], ['PIL image RGB', '8x8'], ['tensor uint8', '3x8x8']]
    assert table[4][3] == '60 to 90, mean 70' and table[5][3] == 'c1' and table[6][1:4] == ['int', '', '1']
    assert all(float(row[4]) >= 0 for row in table[1:5]) and 'ms' in repr(table)

def test_explain_of_each_kind_of_data(folder):
    data = labeled(folder)
    bunch = data.to_databunch(bs=5, seed=0)
    table = bunch.explain(-1)
    assert table[-2][:3] == ['batch: x', 'tensor uint8', '5x3x8x8'] and table[-1][:3] == ['batch: y', 'tensor int64', '5']
    assert stages(data.explain(0)) == stages(data.train.explain(0)) and stages(data.train.x.explain(0))[0] == 'item'
    words = ItemList(['one', 'three'], tfms=[str.upper, len]).explain(1)
    assert [row[:4] for row in words] == [['item', 'str', '', 'three'], ['str.upper', 'str', '', 'THREE'], ['len', 'int', '', '5']]
    with pytest.raises(IndexError, match='16 is out of range'): data.explain(16)
    assert [row[1] for row in explain(Dataset([1], [2.]))][-1] == 'tuple'
    with pytest.raises(TypeError, match='not int'): explain(3)

def test_explain_ends_where_it_fails_and_names_why(folder):
    def fall(x): raise RuntimeError('over')
    table = split(folder, [make_rgb, fall, to_byte_tensor]).train.explain(0)
    assert table[-1] == ['fall', 'failed', '', 'RuntimeError: over', ''] and stages(table) == ['item', 'get', 'make_rgb', 'fall']
    assert 'fails here' in repr(table)

def test_explain_of_a_batch_that_does_not_stack(folder):
    il = label_by_func(split(folder, [make_rgb, to_byte_tensor]), parent_labeler, proc_y=CategoryProcessor())
    table = il.to_databunch(bs=8, seed=0).explain(0)
    assert table[-1][:2] == ['batch: collate', 'failed'] and 'give all images one size' in table[-1][3]

def test_explain_and_check_leave_the_generators_alone(folder):
    data, states = labeled(folder, Jitter()), rng_states()
    data.to_databunch(bs=4, seed=0).explain(0); data.check()
    assert rng_states() == states


# check

def png(w, h): # a header that claims this size
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')

def encoded(fmt, im):
    f = io.BytesIO()
    im.save(f, fmt)
    return f.getvalue()

def broken_files():
    "Twenty ways in which a file is no usable image: name -> bytes."
    rng = np.random.default_rng(0)
    im = PIL.Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    good = {f: encoded(f, im) for f in ('JPEG', 'PNG', 'GIF', 'BMP', 'TIFF', 'WEBP')}
    jpg, p = good['JPEG'], good['PNG']
    flipped = bytearray(p); flipped[len(p)//2] ^= 255
    noise = jpg[:len(jpg)//2] + rng.integers(0, 256, len(jpg)//2, dtype=np.uint8).tobytes()
    return {'empty.jpg': b'', 'text.jpg': b'not an image at all\n', 'page.jpg': b'<html><body>404 Not Found</body></html>', 'archive.png': b'PK\x03\x04'+bytes(60),
            'drawing.jpg': b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'pointer.jpg': b'version https://git-lfs.github.com/spec/v1\nsize 12345\n',
            'head.jpg': jpg[:120], 'half.jpg': jpg[:len(jpg)//2], 'tail.jpg': jpg[:-2], 'noise.jpg': noise, 'zeros.jpg': bytes(len(jpg)),
            'half.png': p[:len(p)//2], 'bit.png': bytes(flipped), 'signature.png': p[:8], 'bomb.png': png(60_000, 60_000),
            'half.gif': good['GIF'][:len(good['GIF'])//2], 'half.bmp': good['BMP'][:len(good['BMP'])//2], 'half.tif': good['TIFF'][:len(good['TIFF'])//2],
            'half.webp': good['WEBP'][:len(good['WEBP'])//2], 'floats.tif': encoded('TIFF', PIL.Image.new('F', (9, 9)))}

@pytest.fixture(scope='module')
def thousand(tmp_path_factory):
    "A thousand small images, twenty of them broken in different ways."
    root = tmp_path_factory.mktemp('thousand')
    for i in range(980):
        side = 'val' if i % 5 == 0 else 'train'
        save(root/side/f'c{i % 7}'/f'{i}.png', (6, 5), (i % 256, i // 256, 7))
    broken = broken_files()
    for i, (name, data) in enumerate(broken.items()): (root/('val' if i % 3 == 0 else 'train')/f'c{i % 7}'/name).write_bytes(data)
    return root, broken

def test_check_names_all_twenty_broken_files_of_a_thousand(thousand):
    root, broken = thousand
    sd = split(root)
    assert len(sd.train)+len(sd.valid) == 1000 and len(broken) == 20
    with pytest.raises(CheckError, match='20 unreadable') as e: sd.check(parent_labeler)
    for name in broken: assert str(e.value).count(os.sep+name+':') == 1, name
    assert {o.name for o, _ in e.value.report.unreadable} == set(broken)

def test_check_leaves_out_what_is_unreadable_on_request(thousand):
    root, broken = thousand
    for sd in split(root), label_by_func(split(root), parent_labeler, proc_y=CategoryProcessor()):
        report = sd.check(unreadable='skip')
        assert len(report.unreadable) == 20 and report.n == (len(sd.train), len(sd.valid)) and '20 unreadable' in repr(report)
        kept = [o.name for side in (report.data.train, report.data.valid) for o in getattr(side, 'x', side).items]
        assert len(kept) == 980 and not set(kept) & set(broken)
        assert type(report.data.train) is type(sd.train) and not report.data.check().unreadable
    for dl in get_dls(report.data.train, report.data.valid, 64, seed=0): assert sum(len(y) for _, y in dl) == len(dl.dataset)
    train = report.data.train
    assert [train.y_obj(i) for i in range(20)] == [train.x.items[i].parent.name for i in range(20)]

def test_a_file_that_has_gone_since_it_was_listed_is_named(folder):
    sd = split(folder)
    sd.train.items[3].unlink(); sd.valid.items[0].unlink(); sd.valid.items[0].mkdir()
    assert {o for o, _ in sd.check(unreadable='skip').unreadable} == {sd.train.items[3], sd.valid.items[0]}

def test_the_same_picture_on_both_sides_is_found_by_its_pixels(folder):
    for fmt, target in ('bmp', 'val/c0/copy.bmp'), ('png', 'val/c1/other_class.png'), ('png', 'train/c3/again.png'):
        PIL.Image.open(folder/'train/c2/1.png').save(folder/target, fmt)
    PIL.Image.open(folder/'train/c2/1.png').convert('L').save(folder/'val/c2/grey.png') # other pixels
    report = split(folder).check()
    assert not any(o.name == 'grey.png' for _, b in report.duplicates for o in b)
    assert [({o.name for o in a}, {o.name for o in b}) for a, b in report.duplicates if len(a) == 2] == [({'1.png', 'again.png'}, {'1.png', 'copy.bmp', 'other_class.png'})] # val/c2/1.png is the fixture's
    assert '8 with the same content' in report.problems[0]

def test_items_that_are_no_images_are_compared_too():
    text = SplitData(ItemList(['a b', 'c']), ItemList(['d', 'a b']))
    assert text.check().duplicates == [(['a b'], ['a b'])]
    tensors = SplitData(ItemList([torch.zeros(2), torch.ones(2)]), ItemList([torch.ones(2, 1), torch.ones(2)]))
    report = tensors.check()
    assert len(report.duplicates) == 1 and [n for n, _ in report.shapes.values()] == [3, 1] and 'do not stack' in repr(report)

def test_labels_that_training_lacks_are_named_with_their_files_and_so_are_those_that_validation_lacks(folder):
    save(folder/'val/whale/1.png', colour=(1, 2, 3)); save(folder/'val/whale/2.png', colour=(1, 2, 4)); save(folder/'train/lynx/1.png', colour=(9, 9, 9))
    report = split(folder).check(parent_labeler)
    assert {k: [o.name for o in v] for k, v in report.unseen.items()} == {'whale': ['1.png', '2.png']}
    assert report.balance == {**{f'c{i}': [4, 2] for i in range(4)}, 'lynx': [1, 0], 'whale': [0, 2]}
    text = repr(report)
    assert "'whale' has no training item, but 2 in validation" in text and os.path.join('whale', '1.png') in text and '1 labels have no validation item: lynx' in text

def test_check_of_several_labels_and_of_a_class_for_the_others():
    labels = {'a': ['x', 'y'], 'b': ['x'], 'c': ['y', 'z'], 'd': []}
    sd = SplitData(ItemList(list('ab')), ItemList(list('cd')))
    report = label_by_func(sd, labels.__getitem__, proc_y=MultiCategoryProcessor(other='rest')).check()
    assert report.balance == dict(rest=[0, 1], x=[2, 0], y=[1, 1]) and report.gathered == dict(z=1) and 'z (1)' in repr(report)
    assert sd.check(labels.__getitem__).balance == dict(x=[2, 0], y=[1, 1], z=[0, 1])

def test_check_without_labels_or_with_a_wrong_policy(folder):
    assert split(folder).check().balance == {}
    distinct = SplitData(ItemList(['a', 'b']), ItemList(['c', 'd']))
    assert 'no problems' in repr(distinct.check()) and not distinct.check().problems
    with pytest.raises(ValueError, match="unreadable='ignore'"): split(folder).check(unreadable='ignore')
    with pytest.raises(ValueError, match='labeling: <lambda>'): split(folder).check(lambda fn: 1/0)

def test_check_does_not_depend_on_the_threads(thousand):
    reports = [repr(split(thousand[0]).check(parent_labeler, unreadable='skip', threads=n)) for n in (1, 3)]
    assert reports[0] == reports[1]


# Bytes as tensors

@pytest.mark.parametrize('size', [7, (20, 9), (3, 40)])
def test_resizing_bytes_agrees_with_pillow(size):
    im = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 23, 3), dtype=np.uint8))
    a, b = to_byte_tensor(ResizeFixed(size)(im)), ResizeFixed(size)(to_byte_tensor(im))
    assert a.shape == b.shape and b.dtype == torch.uint8 and (a.int()-b.int()).abs().max() <= 1

def test_make_rgb_of_bytes():
    t = torch.randint(256, (4, 5, 6), dtype=torch.uint8)
    same(make_rgb(t), t[:3]); same(make_rgb(t[:3]), t[:3]); same(make_rgb(t[:1]), t[:1].repeat(3, 1, 1))
    for bad in (t[:2], t.float(), t[0]):
        with pytest.raises(ValueError, match='make_rgb takes PIL images, or bytes of 1, 3 or 4 channels'): make_rgb(bad)
    same(to_byte_tensor(t), t)
    with pytest.raises(TypeError, match='takes a PIL image, not Tensor'): to_byte_tensor(t.float())

def bytes_decoder(fn): return to_byte_tensor(open_image(fn))

def failing_decoder(fn): raise ValueError('no such codec')

def test_another_decoder_gives_the_same_batches_and_stays_with_its_list(folder):
    il = ImageList.from_files(folder, tfms=TFMS, decoder=bytes_decoder)
    assert isinstance(il.get(il.items[0]), torch.Tensor)
    other = label_by_func(SplitData.split_by_func(il, by_folder), parent_labeler, proc_y=CategoryProcessor())
    for (x, y), (u, v) in zip(labeled(folder).to_databunch(4, seed=1).train_dl, other.to_databunch(4, seed=1, num_workers=1).train_dl):
        assert (x.int()-u.int()).abs().max() <= 1; same(y, v)
    assert pickle.loads(pickle.dumps(other)).train.x.decoder is bytes_decoder
    with pytest.raises(ImageFileError, match='0.png cannot be read as an image: ValueError: no such codec'):
        ImageList.from_files(folder, decoder=failing_decoder)[0]


# Loaders that go on

def rest(dl, n): return [[(x.clone(), y.clone()) for x, y in dl] for _ in range(n)]

@pytest.mark.parametrize('kw', [{}, dict(num_workers=2), dict(num_workers=2, persistent_workers=True), dict(num_workers=1, multiprocessing_context='spawn')], ids=str)
@pytest.mark.parametrize('stop', [0, 1, 3])
def test_another_loader_goes_on_to_the_bit_where_one_stopped(folder, kw, stop):
    data = labeled(folder, Jitter())
    ref = rest(data.to_databunch(bs=5, seed=3).train_dl, 3)
    dl = data.to_databunch(bs=5, seed=3).train_dl
    rest(dl, 1)
    state = dl.state_dict()
    for i, _ in enumerate(dl, 1):
        if i > stop: break
        state = dl.state_dict()
    assert state == dict(seed=3, n_pass=1, batch=stop)
    again = data.to_databunch(bs=5, seed=99, **kw).train_dl
    if 'persistent_workers' in kw: rest(again, 1) # its workers have the other seed
    again.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert again.state_dict() == state
    assert_same_batches(rest(again, 2), [ref[1][stop:], ref[2]])
    assert again.state_dict() == dict(seed=3, n_pass=3, batch=0)

def test_state_of_a_loader_within_and_after_a_loop(folder):
    dl = labeled(folder).to_databunch(bs=5, seed=3).train_dl
    next(iter(dl))
    assert dl.state_dict() == dict(seed=3, n_pass=0, batch=0)  # a look
    states = [dl.state_dict() for _ in dl]
    assert states == [dict(seed=3, n_pass=0, batch=i) for i in (1, 2, 3)] + [dict(seed=3, n_pass=1, batch=0)]
    for i, _ in enumerate(dl):
        if i == 1: break
    assert dl.state_dict() == dict(seed=3, n_pass=2, batch=0) # left early: the next run is another pass
    dl.load_state_dict(dict(seed=3, n_pass=0, batch=2))
    next(iter(dl))
    assert dl.state_dict()['batch'] == 2                       # a look changes nothing here either
    assert len(list(dl)) == 2 and len(list(dl)) == 4

def test_a_state_of_other_data_is_refused(folder):
    dl = labeled(folder).to_databunch(bs=5, seed=3).train_dl
    for bad in (dict(batch=4), dict(batch=-1), dict(n_pass=-1)):
        with pytest.raises(ValueError, match='this loader has 4 batches a pass'): dl.load_state_dict(dict(seed=3, n_pass=0, batch=0) | bad)
    with pytest.raises(KeyError): dl.load_state_dict({})
    assert dl.state_dict() == dict(seed=3, n_pass=0, batch=0)

@pytest.mark.parametrize('kw', [{}, dict(num_workers=2)], ids=str)
def test_a_loader_knows_which_samples_its_last_batch_has(folder, kw):
    dl = labeled(folder).to_databunch(bs=5, seed=3, **kw).train_dl
    assert dl.live_idxs == []
    for _ in range(2):
        for x, y in dl:
            assert len(dl.live_idxs) == len(y)
            same(x, torch.stack(dl.dataset.ds.x[dl.live_idxs]))
    assert dl.live_idxs == []


class Wobble(ResizeFixed): # inherits `random = False`, and draws all the same
    def __call__(self, item): return super().__call__(item).rotate(random.uniform(-90, 90))

def wobbling_decoder(fn): return open_image(fn).rotate(random.uniform(-90, 90))

@pytest.mark.parametrize('kw', [dict(tfms=[make_rgb, Wobble(8), to_byte_tensor]), dict(tfms=TFMS, decoder=wobbling_decoder)], ids=['transform', 'decoder'])
def test_what_does_not_say_of_itself_that_it_is_still_is_seeded(folder, kw):
    sd = SplitData.split_by_func(ImageList.from_files(folder, **kw), by_folder)
    data = label_by_func(sd, parent_labeler, proc_y=CategoryProcessor())
    assert_same_batches(rest(data.to_databunch(5, seed=3).train_dl, 2), rest(data.to_databunch(5, seed=3, num_workers=2).train_dl, 2))
    a, b = (SeededDataset(data.train, 1).__getitems__([(p, 0)])[0][0] for p in (0, 1))
    assert not torch.equal(a, b)

def test_where_every_step_says_that_it_is_still_nothing_is_seeded(folder, monkeypatch):
    data, seeded = labeled(folder), []
    monkeypatch.setattr('dl2lib.loader.seed_cpu', seeded.append)
    list(data.to_databunch(5, seed=3).train_dl)
    assert not seeded
    data.train.x.tfms = [*data.train.x.tfms, Jitter()] # also when it is changed later
    list(data.to_databunch(5, seed=3).train_dl)
    assert len(seeded) == 16
