"""Proves that notebooks and modules agree: what nbs/ exports is dl2lib/ to the byte, compared both ways; that a drift is found
and the message says which command mends it; that notebooks are clean and have the agreed parts; that an edit reaches the module
and comes back; and that no notebook imports a later one."""
import ast, re, shutil, sys
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from repo_tools import (BY_HAND, CHAPTERS, COURSE, NOTEBOOKS, ROOT, code_cells, copy_repo, directives, front_door, module_of, nbdev, notebooks, python,
                        read_nb, replace_body, sh, source)

each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)


# Drift

def changed(path, root):
    "When a file was last changed, as something to compare: a change not committed comes after every commit. None: no git here."
    def git(*args): return sh(['git', *args], root, ok=False)
    status = git('status', '--porcelain', '--', path)
    if status.returncode: return None
    if status.stdout.strip(): return 1, path.stat().st_mtime
    return 0, float(git('log', '-1', '--format=%ct', '--', path).stdout.strip() or 0)

def advice(notebook, module, root):
    "Which command mends a module that is not what its notebook exports."
    nb, mod = (p.relative_to(root).as_posix() for p in (notebook, module))
    t_nb, t_mod = changed(notebook, root), changed(module, root)
    to_module, to_notebook = 'run `make export` to write the notebook into the module', 'run `make update` to bring the module into the notebook'
    if t_nb == t_mod: return f'{mod} is not what {nb} exports: if the notebook is right {to_module}; if the module is right {to_notebook}'
    if t_nb > t_mod: return f'{nb} was changed after {mod}: {to_module} (only if the module is right after all, {to_notebook})'
    return f'{mod} was changed after {nb}: {to_notebook} (only if the notebook is right after all, {to_module})'

def drift(root, scratch):
    "Where the modules at `root` differ from what its notebooks export into an emptied copy: messages that say what to do."
    fresh = copy_repo(scratch, root, exported=False)
    nbdev('nbdev_export', fresh)
    here, there = ({p.name: p for p in (r/'dl2lib').glob('*.py') if p.name not in BY_HAND} for r in (root, fresh))
    notebook = {f'{module_of(p)}.py': p for p in notebooks(root)}
    res = []
    for name in sorted(here.keys() | there.keys()):
        if name not in here: res.append(f'dl2lib/{name} is missing: run `make export`, which writes it')
        elif name not in there: res.append(f'dl2lib/{name} comes from no notebook: delete it, then run `make export`')
        elif here[name].read_bytes() == there[name].read_bytes(): continue
        elif name in notebook: res.append(advice(notebook[name], here[name], root))
        else: res.append(f'dl2lib/{name} is not what the notebooks give: run `make export` (after `make update`, where that is named too)')
    return res

def test_modules_are_what_the_notebooks_export(tmp_path):
    assert NOTEBOOKS, 'there is no notebook in nbs/'
    missing = [name for name in BY_HAND if not (ROOT/'dl2lib'/name).exists()]
    assert not missing, f'written by hand and missing from dl2lib/: {missing}'
    messages = drift(ROOT, tmp_path/'copy')
    assert not messages, 'notebooks and modules differ:\n' + '\n'.join(messages)


@pytest.fixture
def tracked(tmp_path):
    "A small repository under git: two notebooks, exported and committed."
    root = copy_repo(tmp_path/'tracked', exported=False)
    for p in notebooks(root): p.unlink()
    for name in ('00_one', '01_two'): write_small(root, name, 'def answer(): return 1')
    nbdev('nbdev_export', root)
    git(root, 'init', '-q')
    commit(root)
    assert drift(root, tmp_path/'before') == []
    return root

def git(root, *args): return sh(['git', '-c', 'user.name=t', '-c', 'user.email=t@example.com', '-c', 'commit.gpgsign=false', *args], root)

def commit(root): git(root, 'add', '-A'); git(root, 'commit', '-qm', 'x')

def write_small(root, name, code):
    "A notebook of two cells, for the module that its name says."
    from execnb.nbio import mk_cell, new_nb, write_nb
    cells = [mk_cell(s, id=f'{name}-{i}') for i, s in enumerate([f'#| default_exp {name[3:]}', f'#| export\n{code}'])]
    write_nb(new_nb(cells), root/'nbs'/f'{name}.ipynb')

def edit(path, old='return 1', new='return 2'):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))

@pytest.mark.parametrize('case', ['notebook', 'module', 'both committed at once', 'no notebook', 'no module', 'index'])
def test_a_drift_says_which_way_to_go(tracked, tmp_path, case):
    nb, mod = tracked/'nbs'/'01_two.ipynb', tracked/'dl2lib'/'two.py'
    if case == 'notebook': edit(nb)
    if case == 'module': edit(mod)
    if case == 'both committed at once': edit(nb); edit(mod, new='return 3'); commit(tracked)
    if case == 'no notebook': nb.unlink()
    if case == 'no module': mod.unlink()
    if case == 'index': (tracked/'dl2lib'/'_modidx.py').write_text('d = {}\n')
    first = drift(tracked, tmp_path/'after')[-1]
    want = {'notebook': r'nbs/01_two\.ipynb was changed after dl2lib/two\.py: run `make export`',
            'module': r'dl2lib/two\.py was changed after nbs/01_two\.ipynb: run `make update`',
            'both committed at once': r'if the notebook is right run `make export`.* if the module is right run `make update`',
            'no notebook': r'dl2lib/two\.py comes from no notebook: delete it', 'no module': r'dl2lib/two\.py is missing: run `make export`',
            'index': r'dl2lib/_modidx\.py .*run `make export`'}[case]
    assert re.search(want, first), first


# What is broken is named before anything is written

def check(root, what='notebooks'): return sh([sys.executable, ROOT/'.ci'/'check.py', what], root, ok=False)

def break_cell(path, old, new): path.write_text(path.read_text(encoding='utf-8').replace(old, new), encoding='utf-8')

def conflict(path, mark='"source"'): # as git leaves it
    head, at, tail = path.read_text(encoding='utf-8').partition(mark)
    path.write_text(f'{head}\n<<<<<<< HEAD\n{at}\n=======\n{at}\n>>>>>>> other\n{tail}', encoding='utf-8')

BROKEN = {
    'conflict': (conflict, ['nbs/01_two.ipynb: line', 'a merge conflict. `.venv/bin/nbdev_fix nbs/01_two.ipynb`']),
    'cut short': (lambda p: p.write_bytes(p.read_bytes()[:200]), ['nbs/01_two.ipynb: line', 'it is not JSON']),
    'empty': (lambda p: p.write_text(''), ['nbs/01_two.ipynb: line 1', 'it is not JSON']),
    'another JSON': (lambda p: p.write_text('[1]'), ['nbs/01_two.ipynb: no notebook: it has no list of cells']),
    'syntax': (lambda p: break_cell(p, 'def answer(): return 1', 'def answer() return 1'), ['nbs/01_two.ipynb, cell 01_two-1, line 2: ', 'def answer() return 1']),
    'a magic': (lambda p: break_cell(p, 'def answer(): return 1', '%time 1'), ['nbs/01_two.ipynb, cell 01_two-1, line 2: ', '%time 1']),
    'no module': (lambda p: break_cell(p, '#| default_exp two', '# nothing'), ['nbs/01_two.ipynb: cells are exported, and no cell says `#| default_exp name`']),
    'another\'s module': (lambda p: break_cell(p, 'default_exp two', 'default_exp one'), ['nbs/01_two.ipynb and nbs/00_one.ipynb both export dl2lib/one.py']),
    'null source': (lambda p: break_cell(p, '"source": [', '"source": null, "x": ['), ['nbs/01_two.ipynb: no notebook: it has no list of cells with sources']),
    'outside': (lambda p: break_cell(p, 'def answer(): return 1', 'return 1'), ['nbs/01_two.ipynb, cell 01_two-1, line 2: ', 'return 1']),
    'below a magic': (lambda p: break_cell(p, '#| export', '%%time\\n", "#| export'), ['nbs/01_two.ipynb, cell 01_two-1, line 1: ', '%%time']),
    'the front door': (lambda p: break_cell(p, 'default_exp two', 'default_exp all'), ['`#| default_exp all` would replace dl2lib/all.py']),
    'twice': (lambda p: break_cell(p, '#| export', '#| default_exp three\\n", "#| export'), ['`#| default_exp` is said 2 times: two, three']),
    'BOM': (lambda p: p.write_bytes(b'\xef\xbb\xbf' + p.read_bytes()), ['nbs/01_two.ipynb: it begins with a byte order mark']),
    'no name': (lambda p: break_cell(p, 'default_exp two', 'default_exp 2 two'), ['`#| default_exp 2 two` is no name of a module'])}

def bytes_of(root): return {p.relative_to(root): p.read_bytes() for p in root.rglob('*') if p.is_file() and '.git' not in p.parts}

@pytest.mark.parametrize('case', BROKEN)
def test_a_broken_notebook_is_named_and_nothing_is_written(tracked, case):
    spoil, says = BROKEN[case]
    spoil(tracked/'nbs'/'01_two.ipynb')
    before, res = bytes_of(tracked), check(tracked)
    assert res.returncode == 1 and all(s in res.stderr for s in says) and 'nothing was written: 1 thing to mend first' in res.stderr, res.stderr
    assert bytes_of(tracked) == before

def test_all_that_is_broken_is_named_at_once(tracked):
    conflict(tracked/'nbs'/'00_one.ipynb')
    BROKEN['syntax'][0](tracked/'nbs'/'01_two.ipynb')
    said = check(tracked).stderr
    assert 'nbs/00_one.ipynb' in said and 'nbs/01_two.ipynb' in said and '2 things' in said

def test_nbdev_fix_mends_a_conflict_as_the_message_says(tracked):
    nb = tracked/'nbs'/'01_two.ipynb'
    text = nb.read_text()
    git(tracked, 'checkout', '-qb', 'other'); edit(nb, new='return 2'); commit(tracked)
    git(tracked, 'checkout', '-q', '-'); nb.write_text(text); edit(nb, new='return 3'); commit(tracked)
    assert sh(['git', '-c', 'user.name=t', '-c', 'user.email=t@example.com', 'merge', 'other'], tracked, ok=False).returncode
    assert 'nbs/01_two.ipynb: line' in check(tracked).stderr
    fix = shutil.which('nbdev_fix', path=str(Path(sys.executable).parent))
    sh([fix, 'nbs/01_two.ipynb'], tracked, ok=False) # gives 1, since a choice is left to be made
    book = read_nb(nb)
    assert [source(c) for c in book['cells'][1:]] == ['`<<<<<<< HEAD`', '#| export\ndef answer(): return 3', '`=======`', '#| export\ndef answer(): return 2', '`>>>>>>> other`']
    assert 'nbs/01_two.ipynb: cells that `nbdev_fix` made of a merge conflict' in check(tracked).stderr
    book['cells'] = [book['cells'][i] for i in (0, 2)]
    from execnb.nbio import write_nb
    write_nb(book, nb)
    assert check(tracked).returncode == 0

@pytest.mark.parametrize('spoil,says', [
    (lambda p: p.write_text(p.read_text() + '\n<<<<<<< HEAD\nx = 1\n=======\nx = 2\n>>>>>>> other\n'), r'dl2lib/two\.py, line \d+: a merge conflict'),
    (lambda p: p.write_text(p.read_text().replace('def answer():', 'def answer(')), r'dl2lib/two\.py, line \d+: .*def answer\('),
    (lambda p: (p.parent.parent/'nbs'/'01_two.ipynb').rename(p.parent.parent/'nbs'/'engine'/'01_two.ipynb'), r'dl2lib/two\.py comes from nbs/01_two\.ipynb, which is not there')])
def test_a_broken_module_is_named_before_an_update(tracked, spoil, says):
    assert check(tracked, 'modules').returncode == 0
    spoil(tracked/'dl2lib'/'two.py')
    before, res = bytes_of(tracked), check(tracked, 'modules')
    assert res.returncode == 1 and re.search(says, res.stderr), res.stderr
    assert bytes_of(tracked) == before

def test_what_is_here_is_not_broken():
    for what in ('notebooks', 'modules'): assert check(ROOT, what).returncode == 0, check(ROOT, what).stderr

def test_a_notebook_moves_between_the_lanes(tracked, tmp_path):
    old, new = tracked/'nbs'/'01_two.ipynb', tracked/'nbs'/'engine'/'01_two.ipynb'
    old.rename(new)
    nbdev('nbdev_export', tracked)
    assert drift(tracked, tmp_path/'moved') == [] and '# %% ../nbs/engine/01_two.ipynb' in (tracked/'dl2lib'/'two.py').read_text()
    edit(tracked/'dl2lib'/'two.py') # an edited module comes back into a room
    assert check(tracked, 'modules').returncode == 0
    nbdev('nbdev_update', tracked)
    assert 'return 2' in new.read_text() and not old.exists()
    new.rename(old)
    nbdev('nbdev_export', tracked)
    assert drift(tracked, tmp_path/'back') == []


# The state of each notebook

def test_notebooks_are_clean(tmp_path):
    copy = copy_repo(tmp_path/'copy')
    nbdev('nbdev_clean', copy)
    dirty = [p.name for p in NOTEBOOKS if p.read_bytes() != (copy/p.relative_to(ROOT)).read_bytes()]
    assert not dirty, f'run `make export`, which cleans them: {dirty}'

def texts(nb):
    "All that a notebook says in words: sources, printed text, text and HTML shown; pictures are left out."
    for cell in nb['cells']:
        yield source(cell)
        for out in cell.get('outputs', []):
            yield ''.join(out.get('text', []))
            for kind, data in out.get('data', {}).items():
                if kind.startswith('text'): yield ''.join(data)

@each_notebook
def test_notebook_is_small_and_free_of_machine_paths(path):
    assert path.stat().st_size < 1_000_000, f'{path.name} has {path.stat().st_size:,} bytes: show less, or smaller pictures'
    found = [t for t in texts(read_nb(path)) if re.search(r'/(home|root|tmp|work|Users)/|[A-Z]:\\Users', t)]
    assert not found, f'{path.name} shows where it was run:\n' + found[0][:1000]

@each_notebook
def test_notebook_keeps_its_outputs_and_no_error(path):
    outputs = [out for cell in code_cells(path) for out in cell['outputs']]
    assert outputs, f'{path.name} has no outputs: run it, then save it'
    errors = [f"{out['ename']}: {out['evalue']}" for out in outputs if out['output_type'] == 'error']
    assert not errors, f'{path.name} was saved with errors: {errors}'

@each_notebook
def test_notebook_has_the_agreed_parts(path):
    text = [source(c) for c in read_nb(path)['cells'] if c['cell_type'] == 'markdown']
    top = text[0] if read_nb(path)['cells'][0]['cell_type'] == 'markdown' else ''
    assert re.match(r'# \S.*\n\s*> \S', top), f'{path.name} must open with a title (# ...) and a line that says what it is (> ...)'
    for part in ('Needs', 'Adds', 'Next', 'Time'): assert re.search(rf'\*{part}\b', '\n'.join(text[:3])), f'{path.name}: *{part}* is not said at the top'
    if path in COURSE: assert any(re.search(r'^#+ .*\bexercises\b', t, re.I | re.M) for t in text), f'{path.name} has no section of exercises'
    assert module_of(path) or path == COURSE[0], f'{path.name} has no `#| default_exp`: only the first program exports nothing'


# An edit, both ways

def test_an_edit_of_a_notebook_changes_the_import_and_an_edit_of_a_module_comes_back(tmp_path):
    copy = copy_repo(tmp_path/'copy')
    nb, mod = copy/'nbs'/'08_datablock.ipynb', copy/'dl2lib'/'datablock.py'
    ask = "from pathlib import Path; from dl2lib.datablock import parent_labeler; print(parent_labeler(Path('train/dog/1.jpg')))"
    assert python(ask, tmp_path, copy) == 'dog\n'

    book = read_nb(nb)
    cell = next(c for c in book['cells'] if c['cell_type'] == 'code' and 'export' in directives(c) and 'def parent_labeler(' in source(c))
    cell['source'] = replace_body(source(cell), 'parent_labeler', "return 'from the notebook'")
    from execnb.nbio import write_nb
    write_nb(book, nb)
    nbdev('nbdev_export', copy)
    assert python(ask, tmp_path, copy) == 'from the notebook\n'

    before = read_nb(nb)
    mod.write_text(mod.read_text(encoding='utf-8').replace("return 'from the notebook'", "return 'from the module'"), encoding='utf-8')
    edited = mod.read_bytes()
    nbdev('nbdev_update', copy)
    assert python(ask, tmp_path, copy) == 'from the module\n'
    after = read_nb(nb)
    differ = [(b, a) for b, a in zip(before['cells'], after['cells'], strict=True) if b != a]
    assert len(differ) == 1 and source(differ[0][0]).replace('from the notebook', 'from the module') == source(differ[0][1])
    nbdev('nbdev_export', copy)
    assert mod.read_bytes() == edited


# The order of the chapters

def imported(src):
    "The modules of dl2lib that a piece of code imports, wherever in it."
    for node in ast.walk(ast.parse(src)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = {0: node.module, 1: 'dl2lib' + (f'.{node.module}' if node.module else '')}.get(node.level, '')
            names = [f'dl2lib.{a.name}' for a in node.names] if base == 'dl2lib' else [base]
        elif isinstance(node, ast.Call) and getattr(node.func, 'attr', getattr(node.func, 'id', '')) in ('import_module', '__import__'):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        else: continue
        yield from (n.split('.')[1] for n in names if isinstance(n, str) and n.startswith('dl2lib.'))

def test_imported_sees_every_way_to_import():
    src = '''
import dl2lib.a
from dl2lib import b
def f():
    from dl2lib.c import x
    from .d import x
    from . import e
    importlib.import_module('dl2lib.f')
import dl2libre.g, torch.h
'''
    assert set(imported(src)) == set('abcdef')

ORDER = {name: i for i, name in enumerate(front_door())}
LATE = {('datablock', 'check')} # methods that stand in their class, thin, and import the room behind them when they are called

def test_the_front_door_names_every_module_once():
    named = front_door()
    assert len(named) == len(set(named)) and sorted(named) == CHAPTERS, 'dl2lib/all.py brings each module that a notebook exports, once'

def test_the_course_is_read_in_the_order_of_the_modules():
    exported = [module_of(p) for p in COURSE if module_of(p)]
    assert exported == sorted(exported, key=ORDER.get), 'the chapters are numbered in the order in which dl2lib/all.py brings their modules'

@each_notebook
def test_no_notebook_imports_a_later_module(path):
    name, last = module_of(path), COURSE[-1]
    for cell in code_cells(path):
        exports = any(d.startswith('export') for d in directives(cell))
        for m in imported(TransformerManager().transform_cell(source(cell))):
            if m == 'all': assert (name is None or path == last) and not exports, f'{path.name} imports dl2lib.all, which needs every chapter:\n{source(cell)}'
            elif m in ORDER: # cells that are not exported may import what their own notebook has exported
                assert name is None or (name, m) in LATE or ORDER[m] < ORDER[name] + (not exports), f'{path.name} imports {m}, which comes later in dl2lib/all.py:\n{source(cell)}'
            else: assert m == '__version__', f'{path.name} imports dl2lib.{m}, which no notebook exports:\n{source(cell)}'

@pytest.mark.parametrize('name', CHAPTERS)
def test_no_module_imports_a_later_one(name):
    for m in imported((ROOT/'dl2lib'/f'{name}.py').read_text(encoding='utf-8')):
        assert m == '__version__' or (name, m) in LATE or ORDER.get(m, len(ORDER)) < ORDER[name], f'dl2lib/{name}.py imports {m}, which comes later in dl2lib/all.py, or nowhere'
