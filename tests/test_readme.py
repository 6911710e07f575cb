"""Proves that the README says what is true: its program runs and does what stands below it, every number comes from a file of
measurements that it links, and the make commands and files that it names exist."""
import re

import pytest
from PIL import Image
from repo_tools import COURSE, NOTEBOOKS, ROOT, code_cells, python, source

from dl2lib.safefile import digest

README = (ROOT/'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```$', README, re.M | re.S)
PROSE = re.sub(r'^```.*?^```$', '', README, flags=re.M | re.S)
PARTS = [p for block in re.split(r'\n\s*\n', PROSE) for p in (block.splitlines() if block.lstrip().startswith(('|', '- ')) else [block])]
UNMEASURED = {'3.11', '3.13', '3.14', '2.0', '2019', '11'} # Pythons, the licence, the lesson


def links_of(part): return [l for l in re.findall(r'\]\(([^)#]+)\)', part) if '://' not in l]

def numbers_of(text): # not those in code, in names of files, in targets of links
    text = re.sub(r'`[^`]*`|\]\([^)]*\)|\b\d\d[a-z]?_\w+', ' ', text)
    return re.findall(r'(?<![\w.,])\d+(?:[.,]\d+)*(?!\w)', text)


def test_program_does_what_the_readme_shows(tmp_path):
    (lang, code), (kind, shown) = (BLOCKS[next(i for i, b in enumerate(BLOCKS) if b[0] == 'python')+k] for k in (0, 1))
    assert (lang, kind, [b[0] for b in BLOCKS].count('python')) == ('python', 'text', 1)
    first = next(c for c in code_cells(COURSE[0]))
    assert code == source(first) + "\nlearn.show_results(18, fname='first_program.png')\n", 'one program: the first cell of the book, and a line that saves the picture'
    kept = (ROOT/'benchmarks/results/first_program.md').read_text(encoding='utf-8')
    assert f'```text\n{shown}```' in kept, 'run benchmarks/first_program.py, and put what it prints under the program'
    said, shown = python(code, tmp_path).split('\n'), shown.split('\n')
    assert [l.split()[:1] for l in said] == [l.split()[:1] for l in shown] # the header, an epoch a line
    last, before = ([float(v) for v in lines[-2].split()[1:5]] for lines in (said, shown))
    assert abs(last[3]-before[3]) < .1, (last, before) # processors differ in their last digits, and training makes much of them
    assert (tmp_path/'first_program.png').read_bytes()[:4] == b'\x89PNG'

def test_the_picture_of_the_scoreboard_shows_the_committed_rows():
    with Image.open(ROOT/'images'/'scoreboard.png') as img: shown = img.info['Description']
    assert shown == digest((ROOT/'nbs'/'scoreboard.csv').read_bytes()).hex(), 'run benchmarks/scoreboard.py, and commit images/scoreboard.png'

def test_every_number_comes_from_a_file_that_is_linked_beside_it():
    checked = 0
    for part in PARTS:
        results = ' '.join((ROOT/l).read_text(encoding='utf-8') for l in links_of(part) if l.startswith('benchmarks/results/'))
        found = set(re.findall(r'(?<![\w.,])\d+(?:[.,]\d+)*', results))
        unknown = [n for n in numbers_of(part) if n not in found and n not in UNMEASURED]
        assert not unknown, f'{unknown} stand in no file of benchmarks/results that is linked in\n{part}'
        checked += bool(results) and len(numbers_of(part))
    assert checked > 20

def test_the_look_for_numbers_finds_them():
    assert numbers_of('in `x3` 0.66 of [9,469](a1.md), 5 of [00_core](nbs/00_core.ipynb), n=3; 1.05.') == ['0.66', '9,469', '5', '3', '1.05']

def test_make_commands_exist():
    targets = set(re.findall(r'^(\w+):', (ROOT/'Makefile').read_text(), re.M))
    named = set(re.findall(r'^make (\w+)|`make (\w+)', README, re.M))
    named = {a or b for a, b in named}
    assert {'train', 'test', 'lab', 'export', 'update'} <= named <= targets, f'named: {named}, in the Makefile: {targets}'

def test_files_exist_and_every_notebook_is_listed():
    missing = [f for f in links_of(README) if not (ROOT/f).exists()]
    assert not missing, f'named in README.md and not there: {missing}'
    unlisted = [p.name for p in NOTEBOOKS if p.relative_to(ROOT).as_posix() not in links_of(README)]
    assert not unlisted, f"not in README.md's table of notebooks: {unlisted}"

def test_no_machine_path(): assert not re.findall(r'/(?:home|root|tmp|work|Users)/\S*', README)
