"""Proves that the package is fit for use: each module imports alone, quickly and without side effects; the front door is complete;
every public name says what it does; no name is undefined; and the wheel built from the sdist works without Jupyter."""
import ast, importlib, json, re, shutil, sys, tarfile, zipfile

import pytest
from repo_tools import CHAPTERS, MODULES, ROOT, copy_repo, notebooks, python, sh

import dl2lib

LATE = ['torchvision', 'matplotlib.pyplot', 'IPython', 'nbdev', 'fastcore', 'fastprogress']  # loaded where they are used, or never
each_module = pytest.mark.parametrize('name', MODULES)


def test_it_is_this_repository_that_is_tested(): assert dl2lib.__path__ == [str(ROOT/'dl2lib')]

def test_the_version_is_said_once():
    said = re.search(r'^version = (\S+)$', (ROOT/'settings.ini').read_text(), re.M)[1]
    assert dl2lib.__version__ == said


# Imports

LOOK = '''
import json, logging, os, random, signal, sys, threading, warnings
import numpy, torch, PIL.Image
from pathlib import Path
from torch import nn

def state():
    cudnn, image = torch.backends.cudnn, PIL.Image
    return {
        'default dtype': torch.get_default_dtype(), 'default device': torch.get_default_device(), 'grad mode': torch.is_grad_enabled(),
        'threads of torch': (torch.get_num_threads(), torch.get_num_interop_threads()), 'anomaly mode': torch.is_anomaly_enabled(),
        'print options of torch': repr(vars(torch._tensor_str.PRINT_OPTS)), 'print options of numpy': repr(numpy.get_printoptions()),
        'backends': (cudnn.benchmark, cudnn.deterministic, cudnn.enabled, torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        'random state of torch': torch.get_rng_state().tolist(), 'random state of numpy': repr(numpy.random.get_state()),
        'random state of Python': repr(random.getstate()), 'CUDA context': torch.cuda.is_initialized(),
        'limits of Pillow': (image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES), 'folder': os.getcwd(), 'sys.path': sys.path[:],
        'environment': dict(os.environ), 'warning filters': repr(warnings.filters), 'loggers': logging.root.level, 'threads': threading.active_count(),
        'signals': repr([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]), 'sharing': torch.multiprocessing.get_sharing_strategy(),
        'start method': torch.multiprocessing.get_start_method(allow_none=True),
        'foreign classes': {(c.__name__, k): id(v) for c in (Path, torch.Tensor, nn.Module, nn.Parameter, PIL.Image.Image, torch.Generator,
                            torch.utils.data.DataLoader, torch.optim.Optimizer) for k, v in vars(c).items() if k not in ('ls', '__abstractmethods__', '_abc_impl')}}
'''

def import_alone(name, root=ROOT, cwd=ROOT.parent):
    "Import one module in a fresh process; what it loaded of `LATE`, and which global state it changed."
    code = LOOK + f'''
import PIL.ImageFile
before = state()
import dl2lib.{name}
after = state()
print(json.dumps(dict(late=[m for m in {LATE} if m in sys.modules], changed=[k for k in before if before[k] != after[k]])))
'''
    return json.loads(python(code, cwd, root))

@each_module
def test_module_imports_alone_and_changes_nothing(name, tmp_path):
    seen = import_alone(name, cwd=tmp_path)
    assert seen == dict(late=[], changed=[]), f'importing dl2lib.{name} loads or changes: {seen}'

def test_a_module_that_works_at_import_is_seen(tmp_path):
    copy = copy_repo(tmp_path/'copy', exported=False)
    (copy/'dl2lib'/'bad.py').write_text('import matplotlib.pyplot, random, torch\nrandom.random(); torch.set_num_threads(3)\ntorch.nn.Module.shout = 1')
    seen = import_alone('bad', copy, tmp_path)
    assert seen['late'] == ['matplotlib.pyplot']
    assert {'random state of Python', 'threads of torch', 'foreign classes'} <= set(seen['changed'])

def test_the_package_itself_loads_no_chapter(tmp_path):
    assert python("import dl2lib, sys; print([m for m in sys.modules if m.startswith('dl2lib.') or m in ('torch', 'numpy')])", tmp_path) == '[]\n'


# Names

def test_all_gives_every_public_name_of_every_chapter():
    front, owner = vars(importlib.import_module('dl2lib.all')), {}
    for chapter in CHAPTERS:
        module = importlib.import_module(f'dl2lib.{chapter}')
        for name in module.__all__:
            value = getattr(module, name)
            first = owner.setdefault(name, chapter)
            assert first == chapter or getattr(importlib.import_module(f'dl2lib.{first}'), name) is value, f'{name} means one thing in {first} and another in {chapter}'
            assert name in front, f'dl2lib.all lacks {chapter}.{name}: add the chapter to dl2lib/all.py'
            assert front[name] is value, f'dl2lib.all.{name} is not {chapter}.{name}'
    assert front['tensor'] is importlib.import_module('torch').tensor

@pytest.mark.parametrize('chapter', CHAPTERS)
def test_every_public_function_and_class_says_what_it_does(chapter):
    module = importlib.import_module(f'dl2lib.{chapter}')
    tree = ast.parse((ROOT/'dl2lib'/f'{chapter}.py').read_text(encoding='utf-8'))
    silent = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in module.__all__ and not ast.get_docstring(n)]
    assert not silent, f'without a docstring in dl2lib/{chapter}.py: {silent}'

def lint(root):
    "Undefined names and unused imports in the package; all.py re-exports, so its imports are used."
    return sh([sys.executable, '-m', 'ruff', 'check', '--isolated', '--no-cache', '--output-format', 'concise', '--select', 'F401,F811,F821,F822,F823',
               '--per-file-ignores', 'all.py:F401', 'dl2lib'], root, ok=False)

def test_no_name_is_undefined_and_no_import_unused():
    res = lint(ROOT)
    assert res.returncode == 0, res.stdout + res.stderr

def test_the_linter_sees_what_it_is_asked_for(tmp_path):
    copy = copy_repo(tmp_path, exported=False)
    (copy/'dl2lib'/'bad.py').write_text("import os\n__all__ = ['absent']\ndef f(): return nowhere\n")
    said = lint(copy).stdout
    assert {c for c in ('F401', 'F822', 'F821') if c in said} == {'F401', 'F822', 'F821'}, said


# Packaging

IMPORT_ALL = f'''
import importlib, sys
from importlib.abc import MetaPathFinder
ABSENT = 'IPython ipykernel jupyter jupyter_client jupyterlab nbclient nbformat nbdev execnb fastcore fastprogress pytest'.split()
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ABSENT: raise ModuleNotFoundError(f'No module named {{name!r}} (as where only the library is installed)', name=name)
sys.meta_path.insert(0, Absent())
for name in {MODULES!r}: print(importlib.import_module('dl2lib.'+name).__file__)
'''

def test_the_wheel_built_from_the_sdist_works_without_jupyter(tmp_path):
    copy, out, site = copy_repo(tmp_path/'copy'), tmp_path/'dist', tmp_path/'site'
    (copy/'tests').mkdir(); shutil.copy(ROOT/'tests'/'conftest.py', copy/'tests')
    sh([sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, copy], tmp_path)     # an sdist, and from it a wheel
    sdist, wheel = next(out.glob('*.tar.gz')), next(out.glob('*.whl'))
    shipped = {n.partition('/')[2] for n in tarfile.open(sdist).getnames()}
    books = {p.relative_to(copy).as_posix() for p in notebooks(copy)}
    assert {'settings.ini', 'setup.py', 'constraints.txt', 'Makefile', 'LICENSE', 'README.md', 'pytest.ini', '.ci/run', '.ci/venv', 'tests/conftest.py'} | books <= shipped
    inside = zipfile.ZipFile(wheel).namelist()
    assert {n for n in inside if '.dist-info/' not in n} == {f'dl2lib/{p.name}' for p in (copy/'dl2lib').glob('*.py')}
    meta = zipfile.ZipFile(wheel).read(next(n for n in inside if n.endswith('/METADATA'))).decode()
    assert re.search(r'^Requires-Python: (>=3\.11,<3\.15|<3\.15,>=3\.11)$', meta, re.M) and 'Apache-2.0' in meta
    needed = {re.split(r'[^\w-]', r)[0] for r in re.findall(r'^Requires-Dist: (?!.*extra ==)(.*)$', meta, re.M)}
    assert needed == {'torch', 'torchvision', 'numpy', 'pillow', 'matplotlib', 'filelock', 'fastprogress'}
    sh([sys.executable, '-m', 'pip', 'install', '--no-index', '--no-deps', '--target', site, wheel], tmp_path)
    where = python(IMPORT_ALL, tmp_path, site).split()
    assert len(where) == len(MODULES) and all(w.startswith(str(site)) for w in where)

def test_the_command_is_what_settings_say(tmp_path):
    said = re.search(r'^console_scripts = dl2lib-train=dl2lib\.train:main dl2lib-predict=dl2lib\.train:predict_main$', (ROOT/'settings.ini').read_text(), re.M)
    assert said and callable(importlib.import_module('dl2lib.train').main)

def test_pins_are_exact_and_hold_no_path():
    lines = [l for l in (ROOT/'constraints.txt').read_text().splitlines() if l and not l.startswith('#')]
    assert [l for l in lines if not re.fullmatch(r'[a-z0-9-]+==[\w.+]+', l)] == [] and lines == sorted(lines, key=lambda l: l.partition("==")[0])
    names = {l.partition('==')[0] for l in lines}
    settings = (ROOT/'settings.ini').read_text()
    asked = {re.split(r'[<>=]', r)[0] for key in ('requirements', 'dev_requirements') for r in re.search(rf'^{key} = (.*)$', settings, re.M)[1].split()}
    assert asked <= names, f'asked for in settings.ini and not pinned in constraints.txt: {asked - names}'
