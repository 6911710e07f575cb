"""Proves that the README says what is true: its Python blocks run in a fresh process and print what stands below them, and the
make commands and files that it names exist."""
import re

import pytest
from repo_tools import NOTEBOOKS, ROOT, python

README = (ROOT/'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```$', README, re.M | re.S)
PYTHON = [(code, BLOCKS[i+1] if i+1 < len(BLOCKS) else ('', '')) for i, (lang, code) in enumerate(BLOCKS) if lang == 'python']


def test_there_is_a_block_to_run(): assert PYTHON

@pytest.mark.parametrize('code,shown', PYTHON)
def test_python_block_prints_what_the_readme_shows(code, shown, tmp_path):
    assert shown[0] == 'text', f'no ```text block with what it prints follows\n{code}'
    assert python(code, tmp_path) == shown[1]

def test_make_commands_exist():
    targets = set(re.findall(r'^(\w+):', (ROOT/'Makefile').read_text(), re.M))
    named = set(re.findall(r'^make (\w+)|`make (\w+)', README, re.M))
    named = {a or b for a, b in named}
    assert {'train', 'test', 'lab', 'export', 'update'} <= named <= targets, f'named: {named}, in the Makefile: {targets}'

def test_files_exist_and_every_notebook_is_listed():
    linked = [l for l in re.findall(r'\]\(([^)#]+)\)', README) if '://' not in l]
    missing = [f for f in linked if not (ROOT/f).exists()]
    assert not missing, f'named in README.md and not there: {missing}'
    unlisted = [p.name for p in NOTEBOOKS if f'nbs/{p.name}' not in linked]
    assert not unlisted, f"not in README.md's table of notebooks: {unlisted}"

def test_no_machine_path(): assert not re.findall(r'/(?:home|root|tmp|work|Users)/\S*', README)
