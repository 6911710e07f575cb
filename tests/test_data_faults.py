"""What public bug reports of other libraries found wrong in silence, tried on ours: passes that end early, splits that follow repeated names,
classes that vanish, labels that are missing, generators that nobody seeds, targets that are no labels. What a worker has to import stands at
the top level."""
import multiprocessing, pickle, random, unicodedata, warnings
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from test_datablock import assert_same_batches, folder, labeled, passes, save # noqa: F401 (a fixture)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Sampler, SubsetRandomSampler, WeightedRandomSampler

from dl2lib.callbacks import AvgStatsCallback, accuracy
from dl2lib.check import check, explain
from dl2lib.datablock import (CategoryProcessor, ColumnLabeler, ColumnSplitter, DataBunch, Dataset, ImageList, ItemList, LabeledData,
                              MultiCategoryProcessor, NameSplitter, Processor, ResizeFixed, SplitData, StratifiedSplitter, Transform,
                              get_dls, get_files, grandparent_splitter, image_extensions, label_by_func, make_rgb, parent_labeler,
                              random_splitter, show_batch, split_by_func, to_byte_tensor)
from dl2lib.files import Paths
from dl2lib.learner import Learner
from dl2lib.loader import SeededDataset, collate

TFMS = [make_rgb, ResizeFixed(8), to_byte_tensor]
workers = pytest.mark.parametrize('workers', [0, 1, 2])


# 1. An exception of a user's code is never the end of a pass

class Raises:
    "Gives what it gets, but raises for one item."
    def __init__(self, error, item): self.error, self.item = error, item
    def __call__(self, o):
        if o == self.item: raise self.error('by the user')
        return torch.tensor(float(o))

ERRORS = pytest.mark.parametrize('error', [StopIteration, StopAsyncIteration, IndexError, KeyError, ValueError, ZeroDivisionError, AssertionError,
                                           GeneratorExit])

def data(error, item): return LabeledData(ItemList(list(range(8)), tfms=Raises(error, item)), ItemList(list(range(8))))

@workers
@ERRORS
@pytest.mark.parametrize('item', [0, 3, 4, 7])
def test_no_exception_ends_a_pass(error, item, workers):
    if error is GeneratorExit and workers: return # a worker that ends so is a dead worker
    train = data(error, item)
    dl, valid = get_dls(train, train, 2, seed=0, num_workers=workers)
    for loader in dl, valid:
        seen = []
        with pytest.raises(BaseException) as e:
            for x, _ in loader: seen += x.tolist()
        assert isinstance(e.value, (error, RuntimeError)) and len(seen) < 8
        if error is not GeneratorExit: assert f'item {item}' in str(e.value) + ' '.join(getattr(e.value, '__notes__', []))

@ERRORS
def test_nor_an_iteration_over_the_data_itself(error):
    for what in data(error, 4), data(error, 4).x, SeededDataset(data(error, 4), 0), Dataset(data(error, 4).x, list(range(8))):
        for run in list, lambda o: [v for v in o], lambda o: list(reversed(o)) if not isinstance(o, (ItemList, SeededDataset)) else list(o), lambda o: list(enumerate(o)):
            with pytest.raises(BaseException) as e: run(what)
            assert isinstance(e.value, (error, RuntimeError))

class Plain(torch.utils.data.Dataset):
    "A user's own dataset."
    def __init__(self, error): self.error = error
    def __len__(self): return 8
    def __getitem__(self, i):
        if i == 5: raise self.error
        return torch.tensor(float(i)), i

@workers
@pytest.mark.parametrize('error', [StopIteration, IndexError])
def test_nor_one_over_a_dataset_of_the_users(error, workers):
    with pytest.raises(RuntimeError, match='item 5'): list(get_dls(Plain(error), None, 2, seed=0, num_workers=workers)[0])

def stops(samples): raise StopIteration

@workers
def test_nor_a_collate_fn(workers):
    with pytest.raises(RuntimeError, match='before batch 0 of 4: collate_fn raised StopIteration|StopIteration'):
        list(get_dls(Dataset(range(8), range(8)), None, 2, seed=0, num_workers=workers, collate_fn=stops)[0])

def test_nor_get_preds_and_validation():
    sides = [LabeledData(ItemList([[float(i)] for i in range(8)], tfms=tf), ItemList([i % 2 for i in range(8)])) for tf in (torch.tensor, Fails())]
    learn = Learner(nn.Linear(1, 2), DataBunch(*get_dls(*sides, 2, seed=0)), F.cross_entropy)
    for f in learn.get_preds, learn.validate, lambda: learn.fit(1):
        with pytest.raises(RuntimeError, match=r'StopIteration.*item \[5.0\]'): f()

class Fails:
    def __call__(self, o): return next(iter([])) if o == [5.] else torch.tensor(o)


# 2. What tells two items apart decides a random split

SCANS = [f'scans/p{i}/scan/t1.png' for i in range(400)]
by_random = [random_splitter, partial(random_splitter, p_valid=.3), lambda o: random_splitter(o, .3), lambda o: random_splitter(Path(o), seed=3)]

@pytest.mark.parametrize('f', by_random, ids=['function', 'partial', 'lambda', 'path'])
@pytest.mark.parametrize('items', [SCANS, [f'/data/{o}' for o in SCANS], Paths(SCANS), [f'{i}/x.png' for i in range(400)], [f'a/b/c{i}/d/e/f.png' for i in range(400)]])
def test_names_that_repeat_are_split_item_by_item(f, items):
    train, valid = split_by_func(items, f)
    assert .1 < len(valid)/400 < .4 and sorted(map(str, [*train, *valid])) == sorted(map(str, items))

@pytest.mark.parametrize('f', by_random, ids=['function', 'partial', 'lambda', 'path'])
def test_a_file_keeps_its_side_when_others_are_added_or_the_folder_moves(f):
    def sides(root, names): return {str(Path(o).relative_to(root)): False for o in SplitData.split_by_func(ItemList(Paths([f'{root}/{o}' for o in names]), path=root), f).train.items}
    few, many = sides('/a', SCANS[::3]), sides('/a', SCANS + ['scans/other.png', 'x/y/z/p.png'])
    assert all((o in few) == (o in many) for o in SCANS[::3]) and many == sides('/elsewhere/on/another/machine', SCANS + ['scans/other.png', 'x/y/z/p.png'])

def test_stratified_takes_other_items_for_another_seed():
    picked = {tuple(split_by_func(SCANS, StratifiedSplitter(lambda fn: int(fn.split('/')[1][1:]) % 2, .2, seed))[1]) for seed in range(6)}
    assert len(picked) == 6 and all(len(o) == 80 for o in picked)
    assert len({tuple(StratifiedSplitter(lambda fn: 'one', .2, seed).sides(SCANS)) for seed in range(6)}) == 6 # called by itself

def test_items_that_are_arrays_tensors_or_dicts_are_told_apart():
    big = [np.where(np.arange(5000) == i, 1, 0) for i in range(60)] # their reprs are all the same
    for items in big, list(map(torch.tensor, big)), [dict(image=o) for o in big], [(o, 1) for o in big]:
        train, valid = split_by_func(items, random_splitter)
        assert 3 < len(valid) < 30
    with pytest.raises(ValueError, match='they are all the same item'): split_by_func(['a.png']*10, random_splitter)
    with pytest.raises(ValueError, match='splitting: random_splitter on .*not Thing'): split_by_func([Thing(), Thing()], random_splitter)
    assert StratifiedSplitter(str, .5).sides(['a', 'a', 'b', 'b']) == [False]*4 # the same item is never on both sides

class Thing:
    def __repr__(self): return f'<Thing at {id(self):#x}>'

def test_one_name_in_two_unicode_forms_is_one_name():
    a, b = (f'x/caf{o}.png' for o in ('\u00e9', 'e\u0301'))
    assert a != b and all(random_splitter(a, seed=s) is random_splitter(b, seed=s) for s in range(20))


# 3. No class vanishes

def test_an_empty_class_and_an_unknown_format_are_named_by_listing_and_check(tmp_path):
    for side, n in ('train', 3), ('val', 2):
        for c in 'cat', 'dog':
            for i in range(n): save(tmp_path/side/c/f'{i}.png', (8, 8), (i*40, len(c+side)*20, ord(c[0])))
    (tmp_path/'train'/'whale').mkdir()
    (tmp_path/'train'/'lynx').mkdir(); (tmp_path/'train'/'lynx'/'1.HEIC').touch()
    with pytest.warns(UserWarning) as seen: il = ImageList.from_files(tmp_path, tfms=TFMS)
    said = ' '.join(str(w.message) for w in seen)
    assert 'train/whale' in said and 'train/lynx/1.HEIC' in said and 'Pillow does not decode 1 .heic' in said
    sd = SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val'))
    for report in check(sd, parent_labeler), check(label_by_func(sd, parent_labeler, proc_y=CategoryProcessor())):
        assert 'whale' in str(report) and '1.HEIC' in str(report) and report.problems
    assert not pickle.loads(pickle.dumps(il)).notes == []

@pytest.mark.parametrize('ending', ['.svg', '.NEF', '.heif', '.jxl', '.eps', '.dng'])
def test_what_has_an_images_ending_and_is_left_out_is_named(tmp_path, ending):
    save(tmp_path/'a'/'1.png'); save(tmp_path/'b'/'1.png')
    (tmp_path/'b'/f'2{ending}').touch(); (tmp_path/'b'/'notes.txt').touch()
    with pytest.warns(UserWarning, match=f'b/2{ending}') as seen: found = get_files(tmp_path, image_extensions, recurse=True)
    assert len(found) == 2 and len(seen) == 1 and 'notes.txt' not in str(seen[0].message)

def test_a_listing_that_leaves_nothing_out_is_quiet(tmp_path):
    save(tmp_path/'a'/'deep'/'er'/'1.png'); save(tmp_path/'1.jpg'); (tmp_path/'notes.txt').touch()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(get_files(tmp_path, image_extensions, recurse=True)) == 2 and get_files(tmp_path, '.png', recurse=True).notes == []

def test_a_listing_of_a_million_files_needs_no_second_look_at_each(tmp_path, monkeypatch):
    for i in range(30): save(tmp_path/f'c{i}'/'1.png')
    import os
    asked = []
    monkeypatch.setattr(os, 'stat', lambda *a, **k: asked.append(a) or os.lstat(a[0]))
    get_files(tmp_path, image_extensions, recurse=True)
    assert len(asked) <= 2


# 4. No missing label becomes a class

MISSING = [None, '', '  ', float('nan'), np.nan, np.float32('nan'), ['a', ''], ['a', None], ('a', float('nan')), {'a', ''}]

@pytest.mark.parametrize('missing', MISSING, ids=repr)
def test_a_missing_label_of_a_labeler_is_an_error_that_names_the_item(missing):
    sd = SplitData(ItemList(['a', 'b', 'c']), ItemList(['d']))
    labels = dict(a='x', b='y', c=missing, d='x')
    for proc in None, CategoryProcessor(), CategoryProcessor(other='other'), MultiCategoryProcessor():
        with pytest.raises(ValueError, match='no label for c'): label_by_func(sd, labels.get, proc_y=proc)

@pytest.mark.parametrize('missing', ['', None, float('nan')])
def test_a_processor_by_itself_refuses_it_too(missing):
    for items in ['a', 'b', missing], ['a', missing]:
        with pytest.raises(ValueError, match='no label'): CategoryProcessor()(items)
    with pytest.raises(ValueError, match='1 of 2 items have no label'): MultiCategoryProcessor()([['a'], ['b', missing]])

@pytest.mark.parametrize('text, row', [('name,label\na.jpg,x\nb.jpg,\n', 2), ('name,label\na.jpg,x\nb.jpg\n', 2), ('label,name\nx,a.jpg\n"  ",b.jpg\n', 2)],
                         ids=['empty', 'short', 'blank'])
def test_an_empty_cell_and_a_short_row_are_named_with_file_and_row(tmp_path, text, row):
    (tmp_path/'t.csv').write_text(text)
    with pytest.raises(ValueError, match=rf't\.csv, row {row}: b.jpg has no label'): ColumnLabeler(tmp_path/'t.csv').labels(['a.jpg', 'b.jpg'])
    assert ColumnLabeler(tmp_path/'t.csv').labels(['a.jpg']) == ['x'] # the row of a file that is not there does no harm
    if 'b.jpg\n' in text and ',b' not in text:
        with pytest.raises(ValueError, match='has no label'): ColumnLabeler(tmp_path/'t.csv', sep=';').labels(['a.jpg', 'b.jpg'])

def test_an_empty_cell_of_several_labels_is_an_item_without_one(tmp_path):
    (tmp_path/'t.csv').write_text('name,label\na.jpg,x;y;\nb.jpg,\n')
    assert ColumnLabeler(tmp_path/'t.csv', sep=';').labels(['a.jpg', 'b.jpg']) == [['x', 'y'], []]


# 5. One class is nothing to learn

def test_one_class_is_refused_and_says_what_was_probably_meant(tmp_path):
    for i in range(20): save(tmp_path/'photos'/'one_class'/f'{i}.png', (8, 8), (i*12, 0, 0))
    il = ImageList.from_files(tmp_path/'photos'/'one_class', tfms=TFMS)
    sd = SplitData.split_by_func(il, random_splitter)
    with pytest.raises(ValueError, match="all .* training items have the label 'one_class'.*one folder too deep"):
        label_by_func(sd, parent_labeler, proc_y=CategoryProcessor())
    assert any('one_class' in p and 'too deep' in p for p in check(sd, parent_labeler).problems)
    ll = label_by_func(sd, parent_labeler, proc_y=CategoryProcessor(vocab=['one_class', 'other']))
    assert any('nothing to tell apart' in p for p in ll.check().problems)
    assert MultiCategoryProcessor()([['sun'], [], ['sun']])[1].tolist() == [0.]         # a label that is there or not

def test_the_command_refuses_one_class(tmp_path, capsys):
    from dl2lib.train import main
    for i in range(20): save(tmp_path/'one_class'/f'{i}.png', (8, 8), (i*12, 0, 0))
    for path in tmp_path, tmp_path/'one_class':
        assert main([str(path), '--out', str(tmp_path/'out'), '--epochs', '1']) == 2
        said = capsys.readouterr().err
        assert 'one folder too deep' in said and len(said.splitlines()) == 1


# 10. What has no order stays where it stands

class Crop:
    def __init__(self, size): self.size = size
    def __call__(self, im): return im.crop((0, 0, self.size, self.size))

@pytest.mark.parametrize('crop', [Crop(32), lambda im: im.crop((0, 0, 32, 32)), partial(PIL.Image.Image.crop, box=(0, 0, 32, 32))], ids=['object', 'lambda', 'partial'])
def test_a_transform_without_an_order_runs_where_it_was_written(crop):
    im = PIL.Image.new('RGB', (100, 50))
    il = ItemList([im], tfms=[make_rgb, ResizeFixed(40), crop, to_byte_tensor])
    assert il[0].shape == (3, 32, 32)
    assert [row[0] for row in il.explain(0)][1:] == ['make_rgb', 'ResizeFixed((40, 40))', il.explain(0)[3][0], 'to_byte_tensor']
    assert ItemList([im], tfms=[crop, to_byte_tensor, ResizeFixed(40), make_rgb])[0].shape == (3, 40, 40)

def test_every_exported_transform_has_an_order():
    from dl2lib import all as everything
    tfms = [v for k, v in vars(everything).items() if isinstance(v, type) and issubclass(v, Transform) or k in ('make_rgb', 'to_byte_tensor', 'to_float_tensor', 'np_to_float', 'norm_imagenette')]
    assert len(tfms) > 10 and all(isinstance(t._order, int) for t in tfms)


# 11. A generator of a transform's own is seeded like the global ones

GENERATORS = dict(numpy=lambda: np.random.default_rng(0), python=lambda: random.Random(0), state=lambda: np.random.RandomState(0),
                  torch=lambda: torch.Generator().manual_seed(0), bits=lambda: np.random.Generator(np.random.MT19937(0)))
def draw(g):
    if isinstance(g, torch.Generator): return torch.rand((), generator=g).item()
    return float(g.random()) if hasattr(g, 'random') else float(g.random_sample())

class Jitters(Transform): # an attribute
    def __init__(self, g): self.g = g
    def __call__(self, x): return torch.tensor(float(x) + draw(self.g))
class Nested(Jitters): # as albumentations keeps them: parts that share the generator of the whole
    def __init__(self, g): self.parts = [dict(rng=g, p=.5)]
    def __call__(self, x): return torch.tensor(float(x) + draw(self.parts[0]['rng']))
class OfClass(Transform):
    g = np.random.default_rng(0)
    def __call__(self, x): return torch.tensor(float(x) + draw(self.g))
rng = np.random.default_rng(0)
def by_global(x): return torch.tensor(float(x) + draw(rng))
class CallsGlobal(Transform):
    def __call__(self, x): return by_global(x)
class Slots(Transform):
    __slots__ = ('g',)
    def __init__(self): self.g = random.Random(0)
    def __call__(self, x): return torch.tensor(float(x) + draw(self.g))

TRANSFORMS = [*(cls(make()) for cls in (Jitters, Nested) for make in GENERATORS.values()), OfClass(), by_global, CallsGlobal(), partial(by_global), Jitters(rng).__call__, Slots()]

@pytest.mark.parametrize('tfm', TRANSFORMS, ids=[f'{i}' for i in range(len(TRANSFORMS))])
def test_a_generator_of_its_own_changes_nothing_for_any_number_of_workers(tfm):
    ref = None
    for kw in dict(), dict(num_workers=1), dict(num_workers=2), dict(num_workers=2, persistent_workers=True), dict(num_workers=1, multiprocessing_context='spawn'):
        if 'spawn' in kw.values() and tfm is not TRANSFORMS[0]: continue # seconds each
        dl, _ = get_dls(Dataset(ItemList(list(range(6)), tfms=tfm), list(range(6))), None, 2, seed=3, **kw)
        got = passes(dl, 3)
        ref = ref or got
        assert_same_batches(ref, got)
    noise = [[(x - y).tolist() for x, y in p] for p in ref]
    flat = [o for p in noise for b in p for o in b]
    assert len(set(flat)) == 18 # no two items, and no two passes, alike

def test_it_is_left_where_it_was():
    g = np.random.default_rng(0)
    before = g.bit_generator.state
    list(get_dls(Dataset(ItemList(list(range(6)), tfms=Jitters(g)), list(range(6))), None, 2, seed=3)[0])
    assert g.bit_generator.state == before

def test_what_cannot_be_seeded_is_named():
    with pytest.raises(TypeError, match='SystemRandom cannot be seeded'):
        list(get_dls(Dataset(ItemList([0, 1], tfms=Jitters(random.SystemRandom())), [0, 1]), None, 2, seed=3)[0])


# 13. Tables

NAMES = ['pets/cat/1.jpg', 'pets/cat/2.jpg', 'pets/dog/1.jpg']

def table(tmp_path, text, encoding):
    (tmp_path/'t.csv').write_bytes(text.encode(encoding))
    return tmp_path/'t.csv'

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le-bom'])
def test_encodings_that_say_what_they_are_are_read(tmp_path, encoding):
    text = 'name,label\ncat/1.jpg,chat\nélan/2.jpg,élan\n'
    raw = b'\xff\xfe' + text.encode('utf-16-le') if encoding == 'utf-16-le-bom' else text.encode(encoding)
    (tmp_path/'t.csv').write_bytes(raw)
    assert ColumnLabeler(tmp_path/'t.csv').labels(['cat/1.jpg', 'élan/2.jpg']) == ['chat', 'élan']

@pytest.mark.parametrize('encoding, line', [('latin-1', 3), ('cp1252', 3)])
def test_others_are_named_with_their_line_and_the_remedy(tmp_path, encoding, line):
    fn = table(tmp_path, 'name,label\na.jpg,chat\nb.jpg,élan\n', encoding)
    for make in ColumnLabeler, partial(ColumnSplitter, valid_col='label'):
        with pytest.raises(ValueError, match=rf't\.csv, line {line}: the byte 0xe9.*encoding='): make(fn)
    assert ColumnLabeler(fn, encoding=encoding).labels(['b.jpg']) == ['élan']

def test_names_that_are_numbers_and_numpys():
    for kind in int, str, float, np.int64, np.float64:
        rows = [dict(name=kind(i), label='ab'[i % 2]) for i in range(1, 5)]
        assert ColumnLabeler(rows).labels(['x/1.jpg', 'x/2.jpg', 'x/4.jpg']) == ['b', 'a', 'a']
    assert ColumnLabeler([dict(name='007', label='bond'), dict(name=7, label='seven')]).labels(['007.jpg', '7.jpg']) == ['bond', 'seven']

class Frame:
    "What of a pandas DataFrame is used."
    def __init__(self, rows): self.rows, self.columns = rows, list(rows[0])
    def to_dict(self, orient): return [dict(r) for r in self.rows] if orient == 'records' else {}
    def __iter__(self): return iter(self.columns)
    def __len__(self): return len(self.rows)
    def __bool__(self): raise ValueError('the truth value of a DataFrame is ambiguous')

@pytest.mark.parametrize('frame', [Frame, 'pandas'])
def test_a_dataframe_is_a_table(frame):
    rows = [dict(name=fn, label=fn.split('/')[1], is_valid=i == 0, n=7.) for i, fn in enumerate(NAMES)]
    if frame == 'pandas':
        pandas = pytest.importorskip('pandas')
        frame = pandas.DataFrame
    assert ColumnLabeler(frame(rows)).labels(NAMES) == ['cat', 'cat', 'dog']
    assert ColumnSplitter(frame(rows)).sides(NAMES) == [True, False, False]
    rows[1]['label'] = float('nan')
    with pytest.raises(ValueError, match='row 2: pets/cat/2.jpg has no label'): ColumnLabeler(frame(rows)).labels(NAMES)
    rows[2]['name'] = float('nan')
    with pytest.raises(ValueError, match="row 3: the column 'name' is empty"): ColumnLabeler(frame(rows))

def test_backslashes_and_unicode_forms_in_names():
    nfd = unicodedata.normalize('NFD', 'élan')
    rows = [dict(name='pets\\cat\\1.jpg', label='a'), dict(name=f'{nfd}/2.jpg', label='b'), dict(name='./dog/1.jpg', label='c')]
    assert ColumnLabeler(rows).labels(['pets/cat/1.jpg', 'x/élan/2.jpg', Path('dog/1.jpg')]) == ['a', 'b', 'c']
    assert NameSplitter([f'{nfd}\\2.jpg']).sides(['élan/2.jpg', 'a/2.jpg']) == [True, False]

@pytest.mark.parametrize('row, text', [('Cat/1.JPG', r"the nearest row is 2, 'Cat/1.JPG'"), ('cat/l.jpg', "'cat/l.jpg'"), ('cats/1.jpg', "'cats/1.jpg'")])
def test_a_file_without_a_row_shows_the_nearest(tmp_path, row, text):
    fn = table(tmp_path, f'name,label\nzebra/9.jpg,z\n{row},c\nyak/7.jpg,y\n', 'utf-8')
    with pytest.raises(ValueError, match=rf'1 of 1 items have no row in the table .*t\.csv: pets/cat/1.jpg.*{text}'): ColumnLabeler(fn).labels(['pets/cat/1.jpg'])

@pytest.mark.parametrize('text, why', [('name;label\na;b\n', 'separated by commas'), ('name,label\na.jpg,b,c\n', 'row 1 has more cells'), ('name,label\n', 'has no rows'), ('', 'has no rows'),
                                       ('name,label\n,x\n', "row 1: the column 'name' is empty"), ('name,label\na,x\na,y\n', "'x' and 'y'.* rows 1 and 2")])
def test_what_else_a_table_gets_wrong(tmp_path, text, why):
    with pytest.raises(ValueError, match=why): ColumnLabeler(table(tmp_path, text, 'utf-8'))


# 14. Samplers, devices, NumPy's numbers

@workers
def test_a_weighted_sampler_is_seeded_as_all_else(workers):
    def loader(seed, **kw): return get_dls(Dataset(range(10), range(10)), None, 4, seed=seed, num_workers=workers, sampler=WeightedRandomSampler([1.]*9 + [20.], 100), **kw)[0]
    a, b = loader(1), loader(1)
    torch.manual_seed(99)
    assert_same_batches(passes(a, 2), passes(b, 2))
    first, second = [[y for _, yb in p for y in yb.tolist()] for p in passes(loader(1), 2)]
    assert len(first) == 100 and first != second and Counter(first)[9] > 40 and len(loader(1)) == 25 and len(loader(1, drop_last=True)) == 25
    dl, whole = loader(1), passes(loader(1), 1)[0]
    for i, _ in enumerate(dl):
        if i == 4: state = dl.state_dict(); break
    again = loader(2)
    again.load_state_dict(state)
    assert_same_batches([list(again)], [whole[5:]])

class Own(Sampler):
    def __init__(self, n): self.g, self.n = torch.Generator(), n
    def __len__(self): return self.n
    def __iter__(self): return iter(torch.randperm(self.n, generator=self.g))

class Liar(Sampler):
    def __init__(self, idxs, n): self.idxs, self.n = idxs, n
    def __len__(self): return self.n
    def __iter__(self): return iter(self.idxs)

def test_samplers_of_other_kinds_and_what_they_get_wrong():
    ds = Dataset(range(10), range(10))
    assert_same_batches(*(passes(get_dls(ds, None, 4, seed=1, sampler=Own(10))[0], 2) for _ in range(2)))
    assert sorted(y for _, yb in get_dls(ds, None, 2, seed=1, sampler=SubsetRandomSampler([1, 3, 5]))[0] for y in yb.tolist()) == [1, 3, 5]
    with pytest.raises(ValueError, match='sampler Liar says that it has 5 positions, and gave 3'): list(get_dls(ds, None, 2, sampler=Liar([0, 1, 2], 5))[0])
    with pytest.raises(ValueError, match='sampler Liar gave the positions 10, -1'): list(get_dls(ds, None, 2, sampler=Liar([0, 10, -1], 3))[0])
    with pytest.raises(ValueError, match='sampler='): get_dls(ds, None, 2, sampler=iter([1]))
    for k, v in dict(batch_size=2, shuffle=True, batch_sampler=[[0]], dataset=ds).items():
        with pytest.raises(ValueError, match=f'instead of {k}'): get_dls(ds, None, 2, **{k: v})

def test_data_on_the_gpu_is_not_pinned(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    class Fake(torch.Tensor):
        @property
        def device(self): return torch.device('cuda')
    on_gpu = torch.zeros(4, 2).as_subclass(Fake)
    for ds in Dataset(on_gpu, range(4)), torch.utils.data.TensorDataset(on_gpu), Dataset(ItemList([on_gpu[0]]*4), range(4)):
        assert get_dls(ds, None, 2)[0].pin_memory is False
    assert get_dls(Dataset(torch.zeros(4), range(4)), None, 2)[0].pin_memory is True

def test_numpys_numbers_are_numbers():
    n = np.int64(4)
    assert ResizeFixed(n).size == (4, 4) and ResizeFixed((n, np.int32(3))).size == (4, 3)
    dl, _ = get_dls(Dataset(range(8), range(8)), None, n, seed=np.uint8(3))
    assert len(dl) == 2 and random_splitter('a/1', np.float32(.3), np.int64(2)) in (True, False)
    proc = CategoryProcessor()
    assert proc([np.int64(10), 9, np.int32(2), 2]) == [2, 1, 0, 0] and proc.vocab == [2, 9, 10] and proc.deproc1(np.int64(1)) == 9
    assert explain(ItemList([1, 2]), np.int64(1))[0][3] == '2' and split_by_func([1, 2], lambda o: np.bool_(o == 2)) == ([1], [2])


# 8. A batch size above the number of items

@pytest.mark.parametrize('n, bs', [(120, 128), (1, 64), (3, 4)])
def test_a_batch_larger_than_the_data_is_one_smaller_batch(n, bs):
    dl, valid = get_dls(Dataset(range(n), range(n)), Dataset(range(n), range(n)), bs, seed=0)
    assert [len(x) for x, _ in dl] == [n] == [len(x) for x, _ in valid] and len(dl) == 1
    with pytest.raises(ValueError, match=f'bs={bs} with drop_last leaves no batch of {n} training items'): get_dls(Dataset(range(n), range(n)), None, bs, drop_last=True)


# 9. The lesson's own calls

def test_split_by_func_looks_at_items_and_opens_none(folder, monkeypatch):
    il = ImageList.from_files(folder, tfms=TFMS)
    monkeypatch.setattr(ImageList, 'get', lambda self, fn: pytest.fail('opened'))
    train, valid = split_by_func(il, partial(grandparent_splitter, valid_name='val'))
    assert isinstance(train, Paths) and len(train) == 16 and len(valid) == 8 and all(isinstance(o, Path) for o in train)


# 15. Targets that are no labels

def targets(folder, f, **kw):
    il = ImageList.from_files(folder, tfms=TFMS)
    return label_by_func(SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val')), f, **kw)

def unexpected(report): return [p for p in report.problems if 'same content' not in p] # the fixture has some pictures on both sides

KINDS = dict(number=lambda fn: float(fn.stem)/2, numpy=lambda fn: np.float64(fn.stem), tensor=lambda fn: torch.tensor([1., float(fn.stem)]), points=lambda fn: torch.rand(3, 2)*8,
             mask=lambda fn: (torch.rand(8, 8) > .5).long(), array=lambda fn: np.ones((2, 3), dtype=np.float32), boxes=lambda fn: [1., 2., 3., 4.])

@pytest.mark.filterwarnings('ignore:FigureCanvasAgg')
@pytest.mark.parametrize('kind', KINDS)
def test_they_go_through_check_explain_and_show_batch(folder, kind):
    import matplotlib.pyplot as plt
    ll = targets(folder, KINDS[kind])
    report = ll.check()
    assert unexpected(report) == [] and not report.balance and 'training targets: ' in str(report)
    bunch = ll.to_databunch(4, seed=0)
    table = bunch.explain(1)
    assert table.note == '' and any(row[0].startswith('batch: y') for row in table)
    show_batch(bunch)
    plt.close('all')
    _, y = next(iter(bunch.train_dl))
    for t in y if isinstance(y, list) else [y]: assert kind == 'mask' or t.dtype == torch.float32

def test_targets_that_do_not_stack_are_found(folder):
    shapes = iter(range(100))
    report = targets(folder, lambda fn: torch.zeros(1 + next(shapes) % 2)).check()
    assert any('do not stack' in p for p in report.problems)

class Scale(Processor): # has no way back
    def setup(self, items): self.most = max(items)
    def proc1(self, o): return o/self.most
class Length(Processor):
    def proc1(self, o): return len(o)
class Bare: # the lesson's first one: a function of the items
    def __call__(self, items): return [float(o) for o in items]

@pytest.mark.parametrize('proc', [Scale(), [Scale()], Bare()], ids=['scale', 'list', 'bare'])
def test_explain_and_check_do_without_a_way_back(folder, proc):
    ll = targets(folder, lambda fn: float(fn.stem)+1, proc_y=proc)
    assert ll.explain(0).note == '' and unexpected(ll.check()) == []
    assert [row[0] for row in ll.explain(0)][-1] == 'y: processed item'
    words = LabeledData(ItemList(['one', 'three']), ItemList([0., 1.]), proc_x=Length())
    assert [row[3] for row in words.explain(1)][0] == '5'

def test_a_mask_is_drawn_and_no_title(folder):
    import matplotlib.pyplot as plt
    show_batch(targets(folder, KINDS['mask']).to_databunch(4, seed=0), c=2, r=2)
    axs = plt.gcf().axes
    assert all(len(ax.images) == 2 and ax.get_title() == '' for ax in axs)
    show_batch(targets(folder, KINDS['points']).to_databunch(4, seed=0), c=2, r=2)
    assert all(len(ax.images) == 1 and len(ax.lines) == 1 and ax.get_title() == '' for ax in plt.gcf().axes)
    show_batch(targets(folder, KINDS['number']).to_databunch(4, seed=0), c=2, r=2)
    assert all(float(ax.get_title()) in (0, .5, 1, 1.5) for ax in plt.gcf().axes)
    plt.close('all')

class Two:
    def __len__(self): return 6
    def __getitem__(self, i): return (torch.full((3, 8, 8), i/6), torch.zeros(1, 4, 4)), float(i)

def test_several_inputs(folder):
    import matplotlib.pyplot as plt
    bunch = DataBunch(*get_dls(Two(), None, 4, seed=0))
    table = explain(bunch, 2)
    assert [row[0] for row in table][-3:] == ['batch: x[0]', 'batch: x[1]', 'batch: y'] and table.note == ''
    show_batch(bunch, c=4, r=2)
    assert sum(len(ax.images) for ax in plt.gcf().axes) == 8 and sum(ax.get_title() != '' for ax in plt.gcf().axes) == 4
    plt.close('all')

def test_float_labels_are_float32_and_a_loss_takes_them():
    dl, _ = get_dls(Dataset(torch.rand(6, 2), [np.float64(o) for o in range(6)]), None, 3, seed=0)
    learn = Learner(nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)), DataBunch(dl, None), F.mse_loss)
    learn.fit(1)
    batch = collate([(1.5, [2.5, 3]), (0., [1., 4])])
    assert batch[0].dtype == torch.float32 and batch[1][0].dtype == torch.float32 and batch[1][1].dtype == torch.int64


# 7. A last batch of one item is refused before the first step, where BatchNorm would break at it

def bn_models():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3*64, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    deep = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)) # one pixel is left
    wide = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(3*64, 8), Frozen(8), nn.Linear(8, 2))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3*64, 2))
    return dict(flat=flat, deep=deep, wide=wide, frozen=frozen, plain=plain)

class Frozen(nn.BatchNorm1d): # stays in evaluation mode
    def train(self, mode=True): return super().train(False)

@pytest.mark.parametrize('loader', ['ours', 'torch'])
@pytest.mark.parametrize('loop', ['learner', 'runner'])
@pytest.mark.parametrize('name', bn_models())
def test_a_lone_last_item_is_refused_where_batchnorm_would_break(name, loop, loader):
    model, n_fits = bn_models()[name], 0
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ds = torch.utils.data.TensorDataset(torch.rand(9, 3, 8, 8), torch.arange(9) % 2)
    def fit(**kw):
        dl = get_dls(ds, None, kw.pop('bs', 4), seed=0, **kw)[0] if loader == 'ours' else torch.utils.data.DataLoader(ds, kw.pop('bs', 4), **kw)
        if loop == 'learner': return Learner(model, DataBunch(dl, None), F.cross_entropy).fit(2)
        from dl2lib.runner import get_runner
        learn, run = get_runner(model, DataBunch(dl, None), lr=.1)
        run.fit(2, learn)
    if name in ('flat', 'deep'):
        with pytest.raises(ValueError, match='the last batch of an epoch has one item, and [12] .BatchNorm.*drop_last=True'): fit()
        after = model.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items()) # no step, no statistics
    else: fit()
    for kw in dict(drop_last=True), dict(bs=5), dict(bs=9), dict(bs=3), dict(bs=20): fit(**kw)
    assert not any(m._forward_pre_hooks for m in model.modules())

def test_the_command_has_the_remedy(tmp_path, capsys):
    from dl2lib.train import make_data
    for c in 'ab':
        for i in range(40): save(tmp_path/c/f'{i}.png', (8, 8), (i*6, ord(c), 0))
    data, _ = make_data(tmp_path, size=8, seed=1)
    n = len(data.train_ds)
    for bs in range(2, n):
        if n % bs == 1: break
    data, _ = make_data(tmp_path, size=8, bs=bs, seed=1)
    assert len(data.train_dl) == n//bs and [len(y) for _, y in data.train_dl] == [bs]*(n//bs)


# Going on costs nothing

def test_a_loader_of_a_million_items_goes_on_without_opening_what_came_before():
    opened, n = [], 1_000_000
    def counting(o): opened.append(o); return torch.tensor(o)
    dl, _ = get_dls(LabeledData(ItemList(list(range(n)), tfms=counting), ItemList(range(n))), None, 64, seed=1)
    dl.load_state_dict(dict(seed=1, n_pass=3, batch=10_000))
    assert not opened
    batches = iter(dl)
    x, y = next(batches)
    assert len(opened) == 64 and x.tolist() == y.tolist() == opened == dl.live_idxs and len(opened) == 64
    batches.close()


# The lesson's way of calling things, cell for cell, with 120 images and its batch size of 128

@pytest.mark.filterwarnings('ignore:This DataLoader will create 4')
def test_the_lessons_cells_run(tmp_path, monkeypatch):
    for side, n in ('train', 10), ('val', 2):
        for c in range(10):
            for i in range(n): save(tmp_path/side/f'n0{c}'/f'{i}.JPEG', (160+c, 130+i), (c*25, i*25, 128))
    ns = dict(path=tmp_path, bs=128)
    exec('''
from dl2lib.all import *
from functools import partial
import torch
splitter = partial(grandparent_splitter, valid_name='val')
il = ImageList.from_files(path, tfms=make_rgb)
train, valid = split_by_func(il, splitter)
assert (len(train), len(valid)) == (100, 20)
tfms = [make_rgb, ResizeFixed(128), to_byte_tensor, to_float_tensor]
il = ImageList.from_files(path, tfms=tfms)
sd = SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val'))
ll = label_by_func(sd, parent_labeler, proc_y=CategoryProcessor())
assert ll.train.proc_y is ll.valid.proc_y
assert ll.train.y_obj(0) == 'n00' and ll.train.y_obj(slice(2)) == ['n00', 'n00'] and ll.train.y.items[0] == 0
train_dl, valid_dl = get_dls(ll.train, ll.valid, bs, num_workers=4)
x, y = next(iter(train_dl))
assert x.shape == (100, 3, 128, 128) and x.dtype == torch.float32
assert ll.train.proc_y.vocab[y[0]] in ll.train.proc_y.vocab
SplitData.to_databunch = databunchify
data = ll.to_databunch(bs, c_in=3, c_out=10, num_workers=4)
assert len(data.train_ds) == 100 and len(data.valid_ds) == 20
cbfs = [partial(AvgStatsCallback, accuracy), CudaCallback]
_m, _s = tensor([0.47, 0.48, 0.45]), tensor([0.29, 0.28, 0.30])
norm = partial(normalize_chan, mean=_m, std=_s)
cbfs.append(partial(BatchTransformXCallback, norm))
learn, run = get_learn_run([8, 8], data, 0.2, conv_layer, cbs=cbfs)
run.fit(1, learn)
''', ns)
    assert ns['run'].avg_stats.valid_stats.count == 20
