"Runs a notebook in a real Jupyter kernel, and then the answers to its exercises: what test_notebooks.py and test_exercises.py look at."
import importlib.util, re, tempfile
from functools import lru_cache
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from repo_tools import ROOT, copy_repo, directives, environment, source

SKIP = set(re.search(r'^tst_flags = (.*)$', (ROOT/'settings.ini').read_text(), re.M)[1].split())
CHECK = re.compile(r'^def (check_\w+)\((.*?)\):\n    if .*: return print\(.not written yet.\)', re.M)


def skipped(cell):
    d = directives(cell)
    return bool(SKIP & d.keys()) or d.get('eval') == 'false'

def run_in_kernel(path, root, home, extra=()):
    """The cells of a notebook that are not skipped, saved and run: two notebooks; and the cells that ran `extra` pieces of code after them.
    The error of a failing cell shows the cell; one in `extra` stays in its output."""
    saved = nbformat.read(path, 4)
    saved.cells = [c for c in saved.cells if c.cell_type == 'code' and not skipped(c)]
    nb = nbformat.v4.new_notebook(metadata=saved.metadata, cells=[nbformat.v4.new_code_cell(c.source, id=c.id) for c in saved.cells])
    after = [nbformat.v4.new_code_cell(src, metadata=dict(tags=['raises-exception'])) for src in extra]
    nb.cells += after
    env = environment(root, **{f'{k}_DIR': str(home/k.lower()) for k in ('JUPYTER_CONFIG', 'JUPYTER_RUNTIME', 'JUPYTER_DATA')}, IPYTHONDIR=str(home/'ipython'))
    begun = [] # the cells, as they are sent to the kernel
    client = NotebookClient(nb, on_cell_start=lambda cell, cell_index: begun.append(cell), timeout=900, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}})
    try: client.execute(env=env)
    except CellExecutionError:
        cell, error = next((c, o) for c in nb.cells for o in c.outputs if o.output_type == 'error')
        trace = re.sub(r'\x1b\[[0-9;]*m', '', '\n'.join(error.traceback))
        pytest.fail(f'{path.name}: this cell failed:\n{source(cell)}\n\n{trace[-4000:]}', pytrace=False)
    except (CellTimeoutError, DeadKernelError) as e:
        pytest.fail(f'{path.name}: {e}\nThe cell that began last:\n{source(begun[-1]) if begun else None}', pytrace=False)
    nb.cells = nb.cells[:len(saved.cells)]
    return saved, nb, after


# Exercises

def checks_of(nb):
    "The checks of a notebook's exercises: name to the names of what is handed to it."
    return {name: args.split(', ') for c in nb['cells'] if c['cell_type'] == 'code' for name, args in CHECK.findall(source(c))}

def answers_of(stem, folder=ROOT/'tests'/'exercises'):
    "What tests/exercises has for a notebook: check -> dict(right=[code ...], wrong=[(code, word of the sentence that rejects it) ...])."
    path = folder/f'{stem}.py'
    if not path.exists(): return {}
    spec = importlib.util.spec_from_file_location(f'answers_{stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ANSWERS

def trials_of(answers, checks):
    "(check, code that gives an answer to it, 'right' or the word that must be said) of each answer."
    return [(check, code, word) for check, a in answers.items() if check in checks
            for code, word in [*((c, 'right') for c in a['right']), *a['wrong']]]

def run_with_answers(path, root, home, answers):
    "The notebook as saved, as run, and [(check, code, word, what was said)] of each answer."
    checks = checks_of(nbformat.read(path, 4))
    trials = trials_of(answers, checks)
    saved, nb, cells = run_in_kernel(path, root, home, [f'{code}\n{check}({", ".join(checks[check])})' for check, code, _ in trials])
    return saved, nb, [(*t, said_by(c)) for t, c in zip(trials, cells, strict=True)]

def said_by(cell):
    "What a cell printed; an exception as it would be shown in its last line."
    return ''.join(o.text if o.output_type == 'stream' and o.name == 'stdout' else f'{o.ename}: {o.evalue}' if o.output_type == 'error' else ''
                   for o in cell.outputs).strip()

_folders = [] # of the copies: they go when the tests end

@lru_cache(maxsize=None)
def executed(path):
    "A notebook of the repository, run once in a copy of it: as saved, as run, its answers' verdicts, the folder of the copy."
    _folders.append(tempfile.TemporaryDirectory(prefix='dl2lib-notebook-'))
    home = Path(_folders[-1].name)
    copy = copy_repo(home/'repo')
    board = copy/'nbs'/'scoreboard.csv' # without the chapter's own rows: what is there afterwards, it has written
    board.write_text(''.join(l for l in board.read_text(encoding='utf-8').splitlines(keepends=True) if not l.startswith(f'{path.stem},')), encoding='utf-8')
    return *run_with_answers(copy/path.relative_to(ROOT), copy, home, answers_of(path.stem)), copy
