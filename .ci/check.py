"""Looks at what `make export` or `make update` is about to read, so that neither writes from something broken.

    python .ci/check.py notebooks    before an export: is each notebook a notebook, does each exported cell parse?
    python .ci/check.py modules      before an update: does each module parse, is the notebook of each of its cells there?

Names every fault, and exits with 1 if there is one. Writes nothing."""
import json, keyword, re, sys
from pathlib import Path

CONFLICT = re.compile(r'^(<{7} |>{7} |\|{7} )', re.M)
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*([\w-]+):?[ \t]*(.*)$')
MARK = re.compile(r'^# %% \.\./(\S+\.ipynb) #\S+$', re.M)


def line_of(text, at): return text.count('\n', 0, at) + 1

def syntax(src): # what is wrong with a piece of Python, or None
    try: compile(src, '', 'exec', dont_inherit=True)
    except (SyntaxError, ValueError) as e:
        if not isinstance(e, SyntaxError): return str(e) # such as a null byte
        lines = src.splitlines()
        shown = lines[e.lineno-1].strip() if e.lineno and e.lineno <= len(lines) else ''
        return f'line {e.lineno}: {e.msg}: {shown}'

def directives(src): # name -> what follows it, of the `#|` lines on top of a cell
    res = {}
    for line in src.splitlines():
        m = DIRECTIVE.match(line)
        if not m and line.strip() and not line.startswith('%%'): break # nbdev looks below a cell magic, too
        if m: res[m[1]] = m[2].strip()
    return res

def read(path): # -> a notebook's code cells, as (id, source); ValueError with what is wrong
    text = path.read_text(encoding='utf-8')
    if text.startswith('\ufeff'): raise ValueError('it begins with a byte order mark: save it as UTF-8 without BOM')
    try: nb = json.loads(text)
    except RecursionError: raise ValueError('no notebook: its JSON is nested too deep') from None
    except json.JSONDecodeError as e:
        if m := CONFLICT.search(text):
            raise ValueError(f'line {line_of(text, m.start())}: a merge conflict. `.venv/bin/nbdev_fix {path}` keeps both sides as cells: '
                             'delete the wrong ones, or take one side whole with `git checkout --ours` or `--theirs`') from e
        raise ValueError(f'line {e.lineno}: no notebook, for it is not JSON ({e.msg}). The last whole version: git checkout -- {path}') from e
    cells = nb.get('cells') if isinstance(nb, dict) else None
    def is_text(o): return isinstance(o, str) or isinstance(o, list) and all(isinstance(l, str) for l in o)
    if not isinstance(cells, list) or not all(isinstance(c, dict) and 'cell_type' in c and is_text(c.get('source')) for c in cells):
        raise ValueError(f'no notebook: it has no list of cells with sources. The last whole version: git checkout -- {path}')
    if any(re.fullmatch(r'`(<{7} .*|={7}|>{7} .*)`', ''.join(c['source'])) for c in cells):
        raise ValueError('cells that `nbdev_fix` made of a merge conflict: delete the marks and what is wrong')
    return [(c.get('id', f'number {i}'), ''.join(c['source'])) for i, c in enumerate(cells) if c['cell_type'] == 'code']

def of_notebooks(): # faults, as texts
    owner = {}
    for path in sorted(p for p in Path('nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.parts)):
        try: cells = read(path)
        except (ValueError, OSError) as e: yield f'{path}: {e}'; continue
        modules = [d['default_exp'] for d in (directives(src) for _, src in cells) if 'default_exp' in d]
        if len(modules) > 1: yield f'{path}: `#| default_exp` is said {len(modules)} times: {", ".join(modules)}'
        module = modules[0] if modules else None
        exported = [(i, src) for i, src in cells if any(d.startswith('export') for d in directives(src))]
        for i, src in exported:
            if wrong := syntax(src): yield f'{path}, cell {i}, {wrong}'
        if exported and not module: yield f'{path}: cells are exported, and no cell says `#| default_exp name`: into which module?'
        if not module: continue
        if not re.fullmatch(r'[a-z]\w*', module) or keyword.iskeyword(module): yield f'{path}: `#| default_exp {module}` is no name of a module'
        if module == 'all': yield f'{path}: `#| default_exp all` would replace dl2lib/all.py, which is written by hand'
        if module in owner: yield f'{path} and {owner[module]} both export dl2lib/{module}.py: give one another `#| default_exp`'
        owner.setdefault(module, path)

def of_modules(): # faults, as texts
    for path in sorted(Path('dl2lib').glob('*.py')):
        try: text = path.read_text(encoding='utf-8')
        except UnicodeDecodeError as e: yield f'{path}: not UTF-8: {e}'; continue
        if m := CONFLICT.search(text): yield f'{path}, line {line_of(text, m.start())}: a merge conflict. If the notebook is right, `make export` writes the module anew'
        elif wrong := syntax(text): yield f'{path}, {wrong}'
        gone = sorted({m[1] for m in MARK.finditer(text) if not Path(m[1]).exists()})
        for book in gone: yield f'{path} comes from {book}, which is not there: if the notebook was moved, run `make export` first'


if __name__ == '__main__':
    faults = list(dict(notebooks=of_notebooks, modules=of_modules)[sys.argv[1]]())
    for fault in faults: print(f'dl2lib: {fault}', file=sys.stderr)
    if faults: sys.exit(f'dl2lib: nothing was written: {len(faults)} {"thing" if len(faults) == 1 else "things"} to mend first')
