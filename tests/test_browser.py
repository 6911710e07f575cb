"""Proves that `make browser` would see what it looks for (the browser itself is run by that command, not here): errors, cells that never
ran, pictures, tables and formulas that are missing; and that it says what to install where something is missing."""
import sys

import pytest
from repo_tools import NOTEBOOKS, ROOT, read_nb, sh

from browser import chosen, faults, outputs

PICTURE, ROWS = {'image/png': 'x', 'text/plain': '<Figure>'}, {'text/html': '<table border="1">\n<thead>\n<tr style="text-align: left;">\n<th>epoch</th>'}

def cell(src, *datas, n=1, kind='code'):
    if kind == 'markdown': return dict(cell_type=kind, source=src)
    return dict(cell_type=kind, source=src, execution_count=n, outputs=[dict(output_type='display_data', data=d) for d in datas])

def nb(*cells): return dict(cells=list(cells))
GOOD = nb(cell('$x$', kind='markdown'), cell('plot()', PICTURE), cell('fit()', ROWS), cell('#| export\nx = 1'), cell(''))
SEEN = dict(pictures=1, tables=1, epochs=1, formulas=1, red=[], unset=0)

def test_nothing_wrong(): assert faults(GOOD, GOOD, SEEN) == []

def test_outputs_are_counted():
    assert outputs(GOOD) == dict(pictures=1, tables=1, epochs=1)
    assert outputs(nb(cell('x', {'text/html': '<table><thead><tr><th>layer</th></tr></thead></table><table></table>'}))) == dict(pictures=0, tables=2, epochs=0)

@pytest.mark.parametrize('k,text', [('pictures', 'pictures: 1 came out, 0'), ('tables', 'tables: 1 came out, 0'), ('epochs', 'epochs: 1 came out, 0'),
                                    ('formulas', 'no formula was set')])
def test_what_is_not_in_the_page_is_said(k, text): assert [text in f for f in faults(GOOD, GOOD, {**SEEN, k: 0})] == [True]

def test_a_formula_in_red_or_not_set_is_said():
    assert faults(GOOD, GOOD, {**SEEN, 'red': ['x'], 'unset': 1}) == ['a formula is in red: x', '1 paragraphs show the source of a formula']

def test_a_picture_that_no_longer_comes_out_is_said():
    said = faults(nb(GOOD['cells'][0], cell('plot()'), cell('fit()', ROWS)), GOOD, SEEN)
    assert said == ['pictures: 0 came out, the notebook in the repository has 1']

def test_an_error_and_a_cell_that_never_ran_are_said():
    bad = cell('#| hide\nboom()')
    bad['outputs'] = [dict(output_type='error', ename='NameError', evalue='boom')]
    said = faults(nb(*GOOD['cells'], bad, cell('never()', n=None), cell('#| eval: false\nx', n=None)), GOOD, SEEN)
    assert said == ['NameError: boom (cell that begins: boom())', 'never run: the cell that begins: never()']

def test_progress_tables_of_the_chapter_about_them_are_recognized():
    kept = outputs(read_nb(next(p for p in NOTEBOOKS if p.stem == '09c_progress')))
    assert kept['epochs'] >= 1 and kept['pictures'] >= 1

def test_notebooks_are_chosen_by_name():
    assert [p.stem for p in chosen(['nbs/engine/00_core.ipynb', '03_schedules'])] == ['03_schedules', '00_core'] and chosen([]) == NOTEBOOKS
    with pytest.raises(SystemExit, match='no such notebook: 99_none'): chosen(['99_none'])

def test_without_a_browser_it_says_what_to_install(tmp_path):
    res = sh([sys.executable, ROOT/'tests'/'browser.py', '00_core', '--out', tmp_path/'out'], tmp_path, ok=False, PATH='', CHROMIUM='')
    assert res.returncode == 1 and 'apt-get install -y chromium' in res.stderr and not (tmp_path/'out').exists()
