"""Proves that every notebook runs: by nbdev_test as `make test` runs it, and in a real Jupyter kernel, where what a cell displays is
exercised too and has to be of the kinds (text, HTML, picture) that the saved notebook shows. Cells marked `#| slow`, `#| cuda` or
`#| eval: false` are skipped, as nbdev skips them."""
import base64, csv, io, os

import nbformat
import pytest
from PIL import Image
from repo_tools import COURSE, NOTEBOOKS, ROOT, nbdev, source
from run_notebook import executed, run_in_kernel


def test_nbdev_test():
    said = os.environ.get('NBDEV_TEST')              # `make test` runs it before pytest, and says how it went
    if said is None: nbdev('nbdev_test', ROOT, '--n_workers', '2')
    else: assert said == 'passed', 'nbdev_test failed: its own output stands above that of pytest'


def kinds(cell, name):
    "What a cell shows: 'printed', 'text', 'html', 'picture' ...; a picture has to be one. What goes to stderr is not looked at."
    res = set()
    for out in cell.outputs:
        if out.output_type == 'stream': res |= {'printed'} if out.name == 'stdout' else set()
        elif pictures := [v for k, v in out.data.items() if k in ('image/png', 'image/jpeg', 'image/webp')]:
            res |= {picture(o, name, cell) for o in pictures}
        elif 'text/html' in out.data: res.add('html')
        else: res |= {k.partition('/')[0] for k in out.data}
    return res

def picture(data, name, cell):
    with Image.open(io.BytesIO(base64.b64decode(data))) as img: spread = [hi-lo for lo, hi in img.convert('RGB').getextrema()]
    assert max(spread) > 0, f'{name}: an empty picture comes from\n{source(cell)}'
    return 'picture'

def different(path, saved, nb):
    "Cells whose outputs are of other kinds than those in the saved notebook, as messages."
    for old, new in zip(saved.cells, nb.cells, strict=True):
        was, now = kinds(old, path.name), kinds(new, path.name)
        if was != now: yield f'{path.name} shows {sorted(now)} where the saved notebook has {sorted(was)}; run it and save it anew. The cell:\n{source(new)}'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_in_a_kernel_and_shows_what_was_saved(path):
    saved, nb, *_ = executed(path)
    messages = list(different(path, saved, nb))
    assert not messages, '\n\n'.join(messages)


# The scoreboard: what a chapter's last run wrote in the copy, beside the committed rows

TOLERANCE = .06 # 00_first_program: 0.844 with 1 and with 2 threads; sums in another order act like another seed (1, 2, 42: 0.880, 0.832, 0.844)

def scores(root):
    "(chapter, what is new) -> accuracy"
    with open(root/'nbs'/'scoreboard.csv', newline='', encoding='utf-8') as f: return {(r['chapter'], r['new']): float(r['accuracy']) for r in csv.DictReader(f)}

def other_scores(stem, kept, now):
    "Where the rows of a chapter differ, as messages."
    kept, now = ({k: v for k, v in rows.items() if k[0] == stem} for rows in (kept, now))
    if kept.keys() != now.keys(): yield f'{stem} writes the rows {sorted(now)}, nbs/scoreboard.csv has {sorted(kept)}: run the chapter and commit the file'
    yield from (f'{k[1]}: {now[k]} now, {kept[k]} in nbs/scoreboard.csv' for k in kept.keys() & now.keys() if abs(kept[k]-now[k]) > TOLERANCE)

@pytest.mark.parametrize('path', COURSE, ids=lambda p: p.stem)
def test_a_chapter_gets_the_score_that_is_committed(path):
    assert list(other_scores(path.stem, scores(ROOT), scores(executed(path)[3]))) == []

def test_another_score_is_seen():
    kept = {('a', 'x'): .5, ('b', 'x'): .6}
    assert list(other_scores('a', kept, {**kept, ('b', 'x'): .1})) == []
    assert list(other_scores('a', kept, {**kept, ('a', 'x'): .57})) == ['x: 0.57 now, 0.5 in nbs/scoreboard.csv']
    assert 'writes the rows [], nbs/scoreboard.csv has' in next(other_scores('a', kept, {('b', 'x'): .6}))
    assert "writes the rows [('a', 'x'), ('a', 'y')]" in next(other_scores('a', kept, {**kept, ('a', 'y'): .5}))

def test_every_row_belongs_to_a_chapter():
    assert {c for c, _ in scores(ROOT)} <= {p.stem for p in COURSE}


# The checks above, on notebooks that have what they look for

def small(tmp_path, *cells):
    "A notebook with these cells, each (source, outputs)."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(src, outputs=outs) for src, outs in cells])
    nbformat.write(nb, tmp_path/'small.ipynb')
    return tmp_path/'small.ipynb'

def printed(text): return nbformat.v4.new_output('stream', name='stdout', text=text)

def test_a_failing_cell_is_shown_with_its_notebook(tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r'(?s)small\.ipynb: this cell failed:\n1/0.*ZeroDivisionError'):
        run_in_kernel(small(tmp_path, ('a = 1', []), ('1/0', []), ('a', [])), ROOT, tmp_path)

def test_a_kernel_that_dies_is_named(tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"small\.ipynb: Kernel died\nThe cell that began last:\nimport os; os"):
        run_in_kernel(small(tmp_path, ('print(1)', []), ('import os; os._exit(1)', [])), ROOT, tmp_path)

def test_skipped_cells_and_kinds_of_output(tmp_path):
    plot = 'import matplotlib.pyplot as plt\nplt.plot([1, 2]);'
    path = small(tmp_path, ('#| slow\n1/0', []), ('#| cuda\n1/0', []), ('#| eval: false\n1/0', []), ("print('now')", [printed('then')]),
                 (plot, [printed('no picture then')]), ('3', []), ("import dl2lib; print(dl2lib.__file__)", [printed('x')]))
    saved, nb, _ = run_in_kernel(path, ROOT, tmp_path)
    assert [sorted(kinds(c, '')) for c in nb.cells] == [['printed'], ['picture'], ['text'], ['printed']]
    assert nb.cells[-1].outputs[0].text.strip() == str(ROOT/'dl2lib'/'__init__.py')
    messages = list(different(path, saved, nb))
    assert len(messages) == 2 and 'plt.plot' in messages[0] and messages[0].startswith("small.ipynb shows ['picture'] where the saved notebook has ['printed']")

@pytest.mark.parametrize('kind', ['png', 'jpeg'])
def test_an_empty_picture_is_seen(tmp_path, kind):
    blank = ('import io\nfrom PIL import Image\nfrom IPython import display\nf = io.BytesIO()\n'
             f'Image.new("RGB", (8, 8), "white").save(f, "{kind}")\ndisplay.display(display.Image(f.getvalue()))')
    saved, nb, _ = run_in_kernel(small(tmp_path, (blank, [])), ROOT, tmp_path)
    with pytest.raises(AssertionError, match='(?s)small.ipynb: an empty picture comes from.*white'): list(different(tmp_path/'small.ipynb', saved, nb))
