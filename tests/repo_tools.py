"What several test files share: where things are, copies of the repository, and fresh processes."
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BY_HAND = ['__init__.py', 'all.py']                 # the files of dl2lib that no notebook exports

def notebooks(root=ROOT):
    "The course, and then the rooms behind it: notebooks, each lane in the order of its file names."
    return [p for lane in ('nbs', 'nbs/engine') for p in sorted((root/lane).glob('*.ipynb')) if p.name[0] not in '._']

NOTEBOOKS = notebooks()
COURSE, ENGINE = ([p for p in NOTEBOOKS if (p.parent.name == 'engine') is room] for room in (False, True))
NOT_RECUT = '''03_schedules 04_callbacks 04b_runner 06_hooks 07_convnet 07a_lsuv 07b_resnet 09a_zoo 09b_learner 09c_progress
    09d_practice 09e_checkpoints 09f_inference 10_augmentation 10a_batch_warp 11_train 08_datacache'''.split() # notebooks that have not yet the form of test_form.py
MODULES = sorted(p.stem for p in (ROOT/'dl2lib').glob('*.py') if p.name[0] != '_')
CHAPTERS = [m for m in MODULES if m != 'all']
OF_MAKE = {'MAKEFLAGS', 'MFLAGS', 'MAKEOVERRIDES', 'MAKELEVEL', 'PYTHON'}  # what a make above us would hand to one below


def environment(root=ROOT,  # its dl2lib is the one that the process imports
                **extra):
    "The environment for a child process: as a user's shell would give it, not as make or pytest left it."
    env = {k: v for k, v in os.environ.items() if k not in OF_MAKE | {'IN_TEST', 'MPLBACKEND'}}
    return env | {'PYTHONPATH': str(root)} | extra

def sh(args, cwd, root=ROOT, timeout=600, ok=True, **extra):
    "Run a command to its end; unless `ok` is False, one that fails shows all that it said."
    res = subprocess.run([str(a) for a in args], cwd=cwd, env=environment(root, **extra), text=True, timeout=timeout,
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if ok: assert res.returncode == 0, f'{args} gave {res.returncode}\n{res.stdout}\n{res.stderr}'
    return res

def python(code, cwd, root=ROOT, **kw):
    "What `code` prints in a fresh Python process."
    return sh([sys.executable, '-c', code], cwd, root, **kw).stdout

def nbdev(command, root, *args):
    "Run an nbdev command on the repository at `root`."
    exe = shutil.which(command, path=str(Path(sys.executable).parent))
    assert exe, f'{command} is not beside {sys.executable}: run the tests from the environment that `make test` makes'
    return sh([exe, *args], root, root, OMP_NUM_THREADS='1') # nbdev_test has workers of its own


def copy_repo(dest,           # folder to make
              root=ROOT,
              exported=True,  # with the exported modules, or only those written by hand
             ):
    "A copy of what belongs to the library: notebooks, modules, settings and the files that package it."
    for name in ('settings.ini', 'setup.py', 'constraints.txt', 'MANIFEST.in', 'README.md', 'LICENSE', 'Makefile', 'pytest.ini'):
        if (root/name).exists(): (dest/name).parent.mkdir(parents=True, exist_ok=True); shutil.copy(root/name, dest/name)
    for sub in ('nbs/engine', 'dl2lib', '.ci'): (dest/sub).mkdir(parents=True)
    for p in (root/'.ci').iterdir(): shutil.copy(p, dest/'.ci')
    for p in [*notebooks(root), *(root/'nbs').glob('*.csv')]: shutil.copy(p, dest/p.relative_to(root))
    for p in (root/'dl2lib').glob('*.py'):
        if exported or p.name in BY_HAND: shutil.copy(p, dest/'dl2lib')
    return dest


def read_nb(path): return json.loads(Path(path).read_text(encoding='utf-8'))

def source(cell): return ''.join(cell['source'])

def code_cells(path): return [c for c in read_nb(path)['cells'] if c['cell_type'] == 'code']

def directives(cell):
    "The `#|` lines on top of a code cell: name to what follows it."
    res = {}
    for line in source(cell).splitlines():
        m = re.match(r'\s*#\s*\|\s*([\w-]+):?\s*(.*)', line)
        if not m and line.strip(): break
        if m: res[m[1]] = m[2].strip()
    return res

def front_door(root=ROOT):
    "The modules of dl2lib in the order in which all.py brings them: the order of the whole library."
    return re.findall(r'^from dl2lib\.(\w+) import', (root/'dl2lib'/'all.py').read_text(encoding='utf-8'), re.M)

def module_of(path):
    "The module that a notebook exports, or None."
    return next((d['default_exp'] for d in map(directives, code_cells(path)) if 'default_exp' in d), None)

def replace_body(src, func, new):
    "The source `src` with the body of its function `func` replaced by the one line `new`."
    node = next(n for n in ast.walk(ast.parse(src)) if isinstance(n, ast.FunctionDef) and n.name == func)
    lines = src.splitlines(keepends=True)
    at = lambda line, col: sum(len(l.encode()) for l in lines[:line-1]) + col   # ast counts bytes
    raw, first, last = src.encode(), node.body[0], node.body[-1]
    return (raw[:at(first.lineno, first.col_offset)] + new.encode() + raw[at(last.end_lineno, last.end_col_offset):]).decode()
