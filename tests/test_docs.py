"""Proves that CONTRIBUTING.md, GLOSSARY.md and TODAY.md say what is true, as far as it can be run: their links lead somewhere, the commands and
names that they give exist, each term stands in the chapter that it names, and what is said to be gone from libraries is gone."""
import importlib, re, warnings

import numpy as np
import PIL.Image
import pytest
import torch
from repo_tools import CHAPTERS, NOTEBOOKS, ROOT, module_of, read_nb, source

DOCS = {n: (ROOT/n).read_text(encoding='utf-8') for n in ('CONTRIBUTING.md', 'GLOSSARY.md', 'TODAY.md')}
each_doc = pytest.mark.parametrize('name', DOCS)
TERMS = re.findall(r'^\| \*\*(.+?)\*\* \| (.+) \| (.+) \|$', DOCS['GLOSSARY.md'], re.M)


@each_doc
def test_links_lead_somewhere(name):
    linked = [l for l in re.findall(r'\]\(([^)#]+)\)', DOCS[name]) if '://' not in l]
    assert linked and not [l for l in linked if not (ROOT/l).exists()]

@each_doc
def test_no_machine_path_and_no_long_text(name):
    assert not re.findall(r'/(?:home|root|tmp|work|Users)/\S*', DOCS[name])

@each_doc
def test_commands_and_files_exist(name):
    text, targets = DOCS[name], set(re.findall(r'^(\w+):', (ROOT/'Makefile').read_text(), re.M))
    assert set(re.findall(r'`make (\w+)', text)) <= targets
    named = re.findall(r'`((?:tests|benchmarks|dl2lib|nbs)/\w+\.\w+)`|(?:pytest|python) ((?:tests|benchmarks)/\w+\.py)', text)
    files = {a or b for a, b in named} - {'nbs/NN_name.ipynb', 'tests/test_name.py'} # what a new chapter is called
    assert not [f for f in files if not (ROOT/f).exists()]

def test_contributing_names_each_file_of_tests_for_the_whole():
    said = set(re.findall(r'`(test_\w+\.py)`', DOCS['CONTRIBUTING.md'])) - {'test_X.py'}
    assert said and not [f for f in said if not (ROOT/'tests'/f).exists()]
    whole = {p.name for p in (ROOT/'tests').glob('test_*.py')} - {f'test_{m}.py' for m in CHAPTERS}
    assert said <= whole, 'test_X.py belongs to a module: name it so'

def test_terms_are_in_order_and_said_once():
    names = [t[0].casefold() for t in TERMS]
    assert len(names) > 50 and len(set(names)) == len(names)
    assert [re.sub('[^a-z ]', '', n) for n in names] == sorted(re.sub('[^a-z ]', '', n) for n in names)

def defined(name): # the names that a module does not only import, those of its engine among them
    module = importlib.import_module(name)
    return {*module.__all__, *(n for n, v in vars(module).items() if getattr(v, '__module__', None) == name)}

@pytest.mark.parametrize('term,meaning,chapters', TERMS, ids=[t[0] for t in TERMS])
def test_names_of_a_term_belong_to_its_chapters(term, meaning, chapters):
    books = [p for p in NOTEBOOKS if p.relative_to(ROOT).as_posix() in chapters]
    assert books, f'{term}: no chapter is named'
    names = set(re.findall(r'`(\w+)`', meaning)) - {'code', 'after_loss'}
    known = {n for p in books for n in defined(f'dl2lib.{module_of(p)}')}
    known |= {n for p in books for n in ('find_coeffs',) if n in '\n'.join(source(c) for c in read_nb(p)['cells'])}
    if 'lr_find' in names: known.add('lr_find') # stands in 09d as a method of the Learner too
    assert names <= known, f'{term}: {names-known} are not of {[p.name for p in books]}'

def test_what_is_said_to_be_gone_is_gone():
    with pytest.raises((RuntimeError, AttributeError)): torch.solve(torch.ones(2, 1), torch.eye(2))
    assert not hasattr(PIL.Image, 'ANTIALIAS') and PIL.Image.Resampling.LANCZOS is not None
    if int(np.__version__.split('.')[0]) >= 2:
        with pytest.raises(ValueError): np.array([1, 2], copy=False)
    p = torch.ones(2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        p.add_(-.5, torch.ones(2))
    assert p.tolist() == p.new_ones(2).add_(torch.ones(2), alpha=-.5).tolist()
    assert said == [] or 'deprecated' in str(said[0].message) # torch warns once a process

def test_what_is_said_of_decay_holds():
    "An L2 penalty and decay are the same for plain SGD, and not for Adam, where large gradients shield a weight from the penalty."
    from dl2lib.optimizers import AverageGrad, AverageSqrGrad, Optimizer, StatefulOptimizer, StepCount, adam_step, l2_reg, sgd_step, weight_decay
    def shrunk(make, grads): # how much smaller the weights are for the decay, after ten steps
        ends = []
        for wd in 0., .1:
            p = torch.nn.Parameter(torch.ones(2))
            opt = make([p], wd)
            for i in range(10):
                p.grad = grads*(-1)**i
                opt.step()
            ends.append(p.detach().clone())
        return ends[0]-ends[1]
    small_and_large = torch.tensor([.01, 10.])
    def sgd(part): return lambda ps, wd: Optimizer(ps, [part, sgd_step], lr=.01, wd=wd)
    def adam(part): return lambda ps, wd: StatefulOptimizer(ps, [part, adam_step], [AverageGrad(dampening=True), AverageSqrGrad(), StepCount()], lr=.01, wd=wd)
    torch.testing.assert_close(shrunk(sgd(l2_reg), small_and_large), shrunk(sgd(weight_decay), small_and_large), rtol=1e-2, atol=1e-4)
    penalty, decay = shrunk(adam(l2_reg), small_and_large), shrunk(adam(weight_decay), small_and_large)
    assert penalty[0] > 5*penalty[1] and decay[0].item() == pytest.approx(decay[1].item(), rel=.1)

def test_what_is_said_of_the_editions_holds():
    def error(p, n): return (p*(1-p)/n)**.5
    assert round(100*error(.8, 500), 1) == 1.8 and 100/500 == .2
