"""Proves that the notebooks and documents that are recut keep the house's form: short lines, the skeleton of a chapter, plain words.
What is not recut yet stands in `NOT_RECUT` (repo_tools.py): that list only ever shrinks, and is asked here to be no longer than needed."""
import ast, importlib, inspect, io, re, tokenize

import pytest
from repo_tools import CHAPTERS, COURSE, NOT_RECUT, NOTEBOOKS, ROOT, code_cells, directives, module_of, read_nb, source

WIDTH = 120
DOCS = [ROOT/n for n in ('README.md', 'CONTRIBUTING.md', 'GLOSSARY.md', 'TODAY.md')]
RECUT = [p for p in NOTEBOOKS if p.stem not in NOT_RECUT]
WORDS = { # what the prose avoids: what stands instead (STYLE, *Terms*)
    r'(?<!standard )\bdeviations?': 'standard deviation, or std', r'\bfirst weights': 'initial weights', r'\blearnt\b': 'learned',
    r'\bcolou?rings?\b|\w*colour\w*': 'color', r'\w*grey\w*': 'gray', r'\bwhoever\b': 'you, or the user', r'\b(no|some)body\b': 'you, or a passive',
    r'\bof (its|their|his|her) own\b': 'its own ...', r'\bneeded (is|are)\b': 'we need', r'\bshares? of\b': 'fraction of', r'\btaken off\b': 'subtracted',
    r'\bpaths? beside\b': 'shortcut, or skip connection', r'\bpacks?\b': 'chunk', r'\bgoal is gone\b': 'dangling', r'\bsuch as it was\b': 'as it was'}
JUSTIFIED = { # (notebook or document, word as it stands there): why
}


# Lines

def exported(path): return [c for c in code_cells(path) if any(d.startswith('export') for d in directives(c))]

def long_lines(path): return [f"{c['id']}: {len(l)} columns: {l}" for c in exported(path) for l in source(c).splitlines() if len(l) > WIDTH]

@pytest.mark.parametrize('path', RECUT, ids=lambda p: p.stem)
def test_exported_lines_are_short(path):
    assert not long_lines(path), f'more than {WIDTH} columns in {path.name}:\n' + '\n'.join(long_lines(path))


# The skeleton of a chapter

def faults_of_form(nb):
    "What a chapter of the course lacks, as messages."
    code = [c for c in nb['cells'] if c['cell_type'] == 'code' and source(c).strip()]
    text = [source(c) for c in nb['cells'] if c['cell_type'] == 'markdown']
    if not any(c['outputs'] for c in code[:4]): yield 'nothing is shown by its fourth code cell: start with something that runs and is seen'
    if not any(re.match(r'#+ Recap\b', t) for t in text): yield 'there is no recap (## Recap)'
    found = sorted(n for t in text for n in re.findall(r'^\*\*(\d)\.', t, re.M))
    if found != ['1', '2', '3']: yield f'there must be three exercises (**1.** **2.** **3.**), there are {found}'
    long = [f'{len(t.split())} words: {t[:60]!r}' for t in text[1:] if len(re.sub(r'\|.*\||```.*?```', '', t, flags=re.S).split()) > 80]
    if long: yield f'text cells of more than 80 words: {long}'

@pytest.mark.parametrize('path', [p for p in RECUT if p in COURSE], ids=lambda p: p.stem)
def test_a_chapter_has_its_skeleton(path): assert list(faults_of_form(read_nb(path))) == []

def cell(kind, src, outputs=()): return dict(cell_type=kind, source=src, outputs=list(outputs), id='x')

def chapter(first=('shown',), recap='## Recap', exercises='123', words=80):
    return dict(cells=[cell('markdown', '# Title'), cell('code', '1', first), cell('markdown', ' '.join(['word']*words)), cell('markdown', recap),
                       *(cell('markdown', f'**{n}.** Do it.') for n in exercises)])

@pytest.mark.parametrize('change,says', [(dict(first=()), 'nothing is shown'), (dict(recap='## End'), 'no recap'), (dict(exercises='12'), 'three exercises'),
                                         (dict(words=81), 'more than 80 words')])
def test_a_lack_of_form_is_seen(change, says):
    assert list(faults_of_form(chapter())) == []
    assert [says in f for f in faults_of_form(chapter(**change))] == [True]


# Words

def said(src):
    "Comments and strings of a piece of Python, line by line; magics and what does not parse are left out."
    try: tokens = list(tokenize.generate_tokens(io.StringIO(src).readline))
    except (tokenize.TokenError, SyntaxError): return ''
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, 'FSTRING_MIDDLE', tokenize.STRING)}
    return '\n'.join(t.string for t in tokens if t.type in kinds)

def prose(path):
    "(cell, text) of a notebook: its words, and what its code says in comments, docstrings and messages; of a document, its paragraphs."
    if path.suffix == '.md': return [(t.split('\n')[0][:40], t) for t in re.split(r'\n\s*\n', path.read_text(encoding='utf-8'))]
    return [(c['id'], source(c) if c['cell_type'] == 'markdown' else said(source(c))) for c in read_nb(path)['cells']]

def avoided(name, cells):
    "Words that the prose avoids, with their cells and what to write instead."
    for where, text in cells:
        plain = ' '.join(re.sub(r'```.*?```|`[^`]*`|\]\([^)]*\)', ' ', text, flags=re.S).split())
        for word, instead in WORDS.items():
            for m in re.finditer(word, plain, re.I):
                if (name, m[0].lower()) not in JUSTIFIED: yield f'{name}, {where}: {m[0]!r}; write {instead}'

@pytest.mark.parametrize('path', RECUT + DOCS, ids=lambda p: p.stem)
def test_the_prose_uses_plain_words(path): assert list(avoided(path.stem, prose(path))) == []

def test_a_word_is_found_with_its_cell_in_text_comments_and_strings_and_not_in_names():
    cells = [('a', 'Whoever says so.'), ('b', 'the standard deviation, `deviation`, an outlier'), ('c', said('colour = 1 # a deviation\nprint("grey")'))]
    assert [f.partition(';')[0] for f in avoided('x', cells)] == ["x, a: 'Whoever'", "x, c: 'deviation'", "x, c: 'grey'"]

def test_each_exception_is_still_needed():
    found = {(p.stem, m[0].lower()) for p in RECUT + DOCS for _, t in prose(p) for w in WORDS for m in re.finditer(w, t, re.I)}
    assert not JUSTIFIED.keys() - found


# The list of what is still to do

def test_the_list_of_chapters_not_recut_holds_no_other():
    assert set(NOT_RECUT) <= {p.stem for p in NOTEBOOKS}, 'a notebook that is gone, or renamed, stands in NOT_RECUT'

@pytest.mark.parametrize('name', NOT_RECUT)
def test_a_chapter_that_has_the_form_is_on_no_list(name):
    path = next(p for p in NOTEBOOKS if p.stem == name)
    faults = long_lines(path) + list(avoided(name, prose(path))) + (list(faults_of_form(read_nb(path))) if path in COURSE else [])
    assert faults, f'{name} has the form: take it off NOT_RECUT'


# Modules

def left_by_loops(src):
    "Names that loops and `with` at module level leave behind in the module."
    def stored(target): return (n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    def look(nodes):
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)): continue
            if isinstance(node, (ast.For, ast.AsyncFor)): yield from stored(node.target)
            if isinstance(node, ast.NamedExpr): yield from stored(node.target)
            if isinstance(node, (ast.With, ast.AsyncWith)): yield from (n for i in node.items if i.optional_vars for n in stored(i.optional_vars))
            yield from look(ast.iter_child_nodes(node))
    yield from look(ast.parse(src).body)

@pytest.mark.parametrize('name', CHAPTERS)
def test_no_loop_leaves_its_variable_in_a_module(name):
    src = (ROOT/'dl2lib'/f'{name}.py').read_text(encoding='utf-8')
    assert list(left_by_loops(src)) == []
    module = importlib.import_module(f'dl2lib.{name}')
    single = [k for k, v in vars(module).items() if len(k.strip('_')) == 1 and not inspect.ismodule(v)]
    assert not single, f'dl2lib.{name} has attributes of one letter: {single}'

def test_what_a_loop_leaves_is_seen():
    assert list(left_by_loops('for a, (b, c) in x: pass\nwith open(f) as g: pass\ndef f():\n    for d in x: pass\n[e for e in x]\nif x:\n    for h in x: y[0] = 1\nclass C:\n    for i in x: pass\nfor x[0] in y: pass')) == ['a', 'b', 'c', 'g', 'h', 'i']

def test_the_modules_named_are_there(): assert {module_of(p) for p in NOTEBOOKS} - {None} == set(CHAPTERS)
