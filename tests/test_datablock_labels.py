"""The Data Block: the ways to split and to label, and what processors learn; properties and bad input."""
import pickle, statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dl2lib.datablock import (CategoryProcessor, ColumnLabeler, ColumnSplitter, IndexSplitter, ItemList, LabeledData, MultiCategoryProcessor,
                              NameSplitter, Paths, Processor, SplitData, Splitter, StratifiedSplitter, UnknownLabelError, label_by_func,
                              parent_labeler, random_splitter, split_by_func)

FILES = Paths([f'data/{c}/{i}.jpg' for c, n in (('cat', 50), ('dog', 20), ('lynx', 3), ('yeti', 1)) for i in range(n)])

def sides(items, f): return [set(map(str, part)) for part in split_by_func(items, f)]


# Splitters

def test_a_splitter_that_sees_the_list_gives_a_side_for_each():
    class Halves(Splitter):
        def sides(self, items): return [i >= len(items)//2 for i in range(len(items))]
    class Short(Splitter):
        def sides(self, items): return [True]
    class Wrong(Splitter):
        def sides(self, items): return ['left']*len(items)
    assert split_by_func([1, 2, 3, 4], Halves()) == ([1, 2], [3, 4])
    assert repr(Halves()) == 'Halves'
    with pytest.raises(ValueError, match='Short gave 1 sides for 3 items'): split_by_func([1, 2, 3], Short())
    with pytest.raises(ValueError, match="Wrong gave 'left' for 1"): split_by_func([1, 2, 3], Wrong())
    with pytest.raises(NotImplementedError, match='Splitter has to define sides'): split_by_func([1, 2], Splitter())

def test_index_splitter():
    assert split_by_func('abcdef', IndexSplitter([1, -1, 1])) == (['a', 'c', 'd', 'e'], ['b', 'f'])
    assert split_by_func('abc', IndexSplitter(torch.tensor([0]))) == (['b', 'c'], ['a'])
    for bad in ([6], [-7], [0, 100]):
        with pytest.raises(IndexError, match=f'there is no item {bad[-1]}; there are 6'): split_by_func('abcdef', IndexSplitter(bad))
    with pytest.raises(ValueError, match='none of 6 items on the validation side'): split_by_func('abcdef', IndexSplitter([]))
    with pytest.raises(TypeError): IndexSplitter([0.5])

@pytest.mark.parametrize('p', [.1, .2, .5, .9])
def test_stratified_shares_are_exact_and_every_class_has_both_sides(p):
    train, valid = split_by_func(FILES, StratifiedSplitter(parent_labeler, p))
    n, n_valid = Counter(map(parent_labeler, FILES)), Counter(map(parent_labeler, valid))
    for c in n: assert n_valid[c] == (0 if n[c] == 1 else min(max(round(p*n[c]), 1), n[c]-1)), c
    assert {parent_labeler(fn) for fn in train} == set(n)

def test_a_stratified_split_depends_on_the_files_alone_and_few_move_when_some_come():
    f = StratifiedSplitter(parent_labeler)
    torch.manual_seed(0); before = torch.get_rng_state()
    train, valid = sides(FILES, f)
    assert sides(list(FILES)[::-1], f) == [train, valid] and torch.equal(torch.get_rng_state(), before)
    more = Paths(FILES.strs + [f'data/cat/new_{i}.jpg' for i in range(5)])
    moved = (sides(more, f)[1] ^ valid) & set(FILES.strs)
    assert len(moved) <= 3
    assert sides(FILES, StratifiedSplitter(parent_labeler, seed=7))[1] != valid

def test_stratified_by_several_labels_takes_each_combination_for_a_class():
    labels = {f'{i}.jpg': [['a', 'b'], ['b', 'a'], ['a'], []][i % 4] for i in range(40)}
    _, valid = split_by_func(list(labels), StratifiedSplitter(labels.__getitem__, .25))
    assert Counter(tuple(sorted(labels[o])) for o in valid) == {('a', 'b'): 5, ('a',): 2, (): 2}

@pytest.mark.parametrize('p', [0, 1, -1, 2])
def test_a_share_that_is_none(p):
    with pytest.raises(ValueError, match=f'p_valid={p}'): StratifiedSplitter(parent_labeler, p)

@pytest.mark.parametrize('names', [['cat/3.jpg', 'lynx/0'], ['data/cat/3.jpg', 'data/lynx/0.jpg'], [Path('cat/3'), 'lynx/0.jpg']], ids=str)
def test_name_splitter_takes_as_much_of_the_path_as_is_given(names):
    assert sides(FILES, NameSplitter(names))[1] == {'data/cat/3.jpg', 'data/lynx/0.jpg'}

def test_name_splitter_reads_a_text_file(tmp_path):
    (tmp_path/'valid.txt').write_text('cat/3.jpg\r\n\n  lynx/0.jpg \n', encoding='utf-8-sig')
    for fn in tmp_path/'valid.txt', str(tmp_path/'valid.txt'):
        assert sides(FILES, NameSplitter(fn))[1] == {'data/cat/3.jpg', 'data/lynx/0.jpg'}

@pytest.mark.parametrize('names, text', [(['0.jpg'], '0.jpg fits data/cat/0.jpg and data/dog/0.jpg: write the folder'),
                                         (['cat/3.jpg', 'cat/77.jpg', 'bird/1.jpg'], '2 of 3 names fit no item: bird/1.jpg, cat/77.jpg')])
def test_names_that_fit_none_or_several(names, text):
    with pytest.raises(ValueError, match=text): split_by_func(FILES, NameSplitter(names))

def table(tmp_path, text):
    (tmp_path/'t.csv').write_text(text)
    return tmp_path/'t.csv'

@pytest.mark.parametrize('words', [('True', 'False'), ('1', '0'), ('valid', 'train'), ('VAL ', 'Training'), (1, 0), (True, False), (1.0, 0.0)])
def test_column_splitter(words):
    rows = [dict(fn=fn, where=words[i % 3 > 0]) for i, fn in enumerate(FILES.strs)]
    assert sides(FILES, ColumnSplitter(rows, 'where', 'fn'))[1] == set(FILES.strs[::3])

def test_a_table_from_a_file_and_its_rows_without_a_file(tmp_path):
    t = table(tmp_path, 'name,is_valid\ncat/0.jpg,false\ncat/1.jpg,true\ngone.jpg,true\n')
    with pytest.warns(UserWarning, match='1 of 3 rows of the table .*t.csv fit no item: gone.jpg'):
        assert split_by_func(FILES[:2], ColumnSplitter(t)) == ([Path('data/cat/0.jpg')], [Path('data/cat/1.jpg')])

@pytest.mark.parametrize('text, error', [
    ('name,valid\n', 'has no rows'), ('name,side\na.jpg,1\n', "has no column 'is_valid', but name, side"),
    ('file,is_valid\na.jpg,1\n', "has no column 'name'"), ('name,is_valid\n,1\n', "row 1: the column 'name' is empty"),
    ('name,is_valid\na.jpg,perhaps\n', "a.jpg has 'perhaps' in the column 'is_valid'"), ('name,is_valid\na.jpg\n', "a.jpg has None"),
    ('name,is_valid\na.jpg,1\na.jpg,0\n', "a.jpg has '1' and '0'"),
    ('name,is_valid\ncat/0.jpg,1\n', '73 of 74 items have no row in the table .*t.csv: data/cat/1.jpg')])
def test_what_a_table_gets_wrong(tmp_path, text, error):
    with pytest.raises(ValueError, match=error): split_by_func(FILES, ColumnSplitter(table(tmp_path, text)))


# Labelers

def test_column_labeler(tmp_path):
    t = table(tmp_path, 'name,label,tags\ncat/0.jpg,cat,"furry; small"\nyeti/0,yeti,\n')
    both = ItemList([FILES[0], FILES[-1]])
    assert LabeledData.label_by_func(both, ColumnLabeler(t)).y.items == ['cat', 'yeti']
    assert LabeledData.label_by_func(both, ColumnLabeler(t, 'tags', sep=';')).y.items == [['furry', 'small'], []]
    assert ColumnLabeler(t)('other/data/yeti/0.jpg') == 'yeti'
    assert pickle.loads(pickle.dumps(ColumnLabeler(t)))(FILES[0]) == 'cat'
    with pytest.raises(ValueError, match='have no row in the table .*t.csv: data/cat/1.jpg'): LabeledData.label_by_func(ItemList(FILES), ColumnLabeler(t))

def test_a_row_that_fits_a_training_and_a_validation_file_is_no_label():
    sd = SplitData(ItemList(Paths(['train/cat/1.jpg'])), ItemList(Paths(['val/dog/1.jpg'])))
    with pytest.raises(ValueError, match='1.jpg fits train/cat/1.jpg and val/dog/1.jpg'): label_by_func(sd, ColumnLabeler([dict(name='1.jpg', label='a')]))
    mixed = SplitData(ItemList(Paths(['train/cat/1.jpg'])), ItemList([Path('val/dog/2.jpg')]))
    assert label_by_func(mixed, parent_labeler).valid.y.items == ['dog']

def test_labels_of_a_whole_list_are_counted():
    class Few:
        def __call__(self, o): return 'a'
        def labels(self, items): return ['a']
    with pytest.raises(ValueError, match='gave 1 labels for 2 items'): LabeledData.label_by_func(ItemList([1, 2]), Few())


# Processors

def test_the_class_of_the_others_has_rare_and_unseen_labels():
    proc = CategoryProcessor(other='other', min_count=3)
    train = LabeledData(ItemList(range(9)), ItemList(list('aaabbbbcz')), proc_y=proc)
    valid = LabeledData(ItemList(range(3)), ItemList(list('axc')), proc_y=proc)
    assert proc.vocab == ['a', 'b', 'other'] and train.y.items == [0]*3 + [1]*4 + [2, 2] and valid.y.items == [0, 2, 2]
    assert proc.gathered == dict(c=2, z=1, x=1) and valid.y_obj(1) == 'other' and proc.proc1('never seen') == 2
    assert SplitData(train, valid).to_databunch(bs=2).c_out == 3

def test_other_with_a_given_vocabulary_and_as_a_label_of_the_data():
    assert CategoryProcessor(['b', 'a'], other='else')(['a', 'q']) == [1, 2]
    proc = CategoryProcessor(other='b')
    assert proc(['b', 'a', 'b']) == [1, 0, 1] and proc.vocab == ['a', 'b'] and not proc.gathered
    vocab = ['b', 'a']
    CategoryProcessor(vocab, other='else')
    assert vocab == ['b', 'a'] # the caller's list is not ours
    with pytest.raises(ValueError, match='min_count=2 needs a class'): CategoryProcessor(min_count=2)

def test_a_single_unknown_label_is_named():
    proc = CategoryProcessor(['a', 'b'])
    with pytest.raises(UnknownLabelError, match="'whale' is none of the 2 of the vocabulary: a, b"): proc.proc1('whale')

def test_several_labels_become_one_hot_rows_and_come_back():
    proc = MultiCategoryProcessor()
    items = [['b', 'a'], (), {'c'}, ['a', 'a']]
    rows = torch.stack(proc(items))
    assert proc.vocab == ['a', 'b', 'c'] and rows.dtype == torch.float32
    assert rows.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert proc.deprocess(rows) == proc.deprocess(rows.tolist()) == [['a', 'b'], [], ['c'], ['a']]
    assert proc.deproc1(torch.tensor([.4, .6, .51])) == ['b', 'c']

@pytest.mark.parametrize('item, error', [('ab', "'ab': give a list of labels"), (None, 'None: give a list'), ([['a']], 'is no label'), (3, '3: give a list')])
def test_what_is_no_list_of_labels(item, error):
    with pytest.raises(TypeError, match=error): MultiCategoryProcessor()([item])

def test_several_labels_know_the_others_and_name_what_is_unknown():
    items = [['a', 'b'], ['a'], ['q', 'a']]
    assert MultiCategoryProcessor(other='rest', min_count=2).__call__(items)[2].tolist() == [1, 1]
    sd = SplitData(ItemList(Paths(['x/1.jpg'])), ItemList(Paths(['x/2.jpg', 'x/3.jpg'])))
    labels = {'1': ['a'], '2': ['a'], '3': ['a', 'whale']}
    with pytest.raises(UnknownLabelError, match="1 of 2 items.*'whale': x/3.jpg"):
        label_by_func(sd, lambda fn: labels[fn.stem], proc_y=MultiCategoryProcessor())
    with pytest.raises(ValueError, match='2 numbers for 1 classes'): MultiCategoryProcessor(['a']).deproc1([1, 0])

def test_a_batch_of_several_labels_trains():
    x, y = torch.randn(40, 4), [[c for c, v in zip('abc', row) if v > 0] for row in torch.randn(40, 3).tolist()]
    data = SplitData(*(LabeledData(ItemList(list(x[i:i+20])), ItemList(y[i:i+20]), proc_y=MultiCategoryProcessor(list('abc'))) for i in (0, 20)))
    bunch = data.to_databunch(bs=8, seed=0)
    xb, yb = next(iter(bunch.train_dl))
    assert bunch.c_out == 3 and yb.shape == (8, 3) and torch.isfinite(F.binary_cross_entropy_with_logits(torch.randn(8, 3), yb))

def test_processors_of_a_table_and_of_text_learn_from_training_alone():
    class Median(Processor):
        def setup(self, items): self.median = statistics.median(o for o in items if o is not None)
        def proc1(self, o): return self.median if o is None else o
    proc = Median()
    sd = SplitData(ItemList([1, None, 9, 5]), ItemList([None, 1000]))
    ll = label_by_func(sd, str, proc_x=proc)
    assert ll.train.x.items == [1, 5, 9, 5] and ll.valid.x.items == [5, 1000]

def test_everything_pickles():
    for o in (IndexSplitter([1]), NameSplitter(['a']), ColumnSplitter([dict(name='a', is_valid=1)]), StratifiedSplitter(parent_labeler),
              MultiCategoryProcessor(['a'], other='o'), CategoryProcessor(['a'], other='o')):
        assert type(pickle.loads(pickle.dumps(o))) is type(o)
    assert random_splitter('a/b.jpg') == random_splitter(Path('a/b.jpg'))
