"""Proves that the exercises' checks check: run in the notebook's own kernel, each accepts the notebook's solution and every other right
answer, says so, and rejects each plausible wrong answer by a sentence that names the mistake. The answers stand in tests/exercises/, a file
a notebook. An untouched stub is "not written yet", and breaks nothing."""
import re

import nbformat
import pytest
from repo_tools import COURSE, NOT_RECUT, NOTEBOOKS, ROOT, read_nb, source
from run_notebook import CHECK, answers_of, checks_of, executed, run_with_answers, said_by

WITH = [p for p in NOTEBOOKS if checks_of(read_nb(p))]
each = pytest.mark.parametrize('path', WITH, ids=lambda p: p.stem)


def lacks(checks, answers):
    "What an exercise has too little of, as messages."
    for c in checks:
        if c not in answers: yield f'{c} has no answers'; continue
        right, wrong = answers[c]['right'], answers[c]['wrong']
        if not right: yield f'{c}: no right answer but the solution: give one that is written another way'
        if len(wrong) < 4: yield f'{c}: {len(wrong)} wrong answers, there must be at least 4'
        if any(len(word) < 3 for _, word in wrong): yield f'{c}: a wrong answer without the word that the sentence must contain'
        if len({code for code, _ in wrong}) < len(wrong): yield f'{c}: a wrong answer is there twice'
    yield from (f'{c} is no check of this notebook' for c in answers if c not in checks)

def mistaken(verdicts):
    "Verdicts that are not what they should be, as messages."
    for check, code, word, printed in verdicts:
        said = printed.split('\n')[-1] # the answer itself may print, too
        if word == 'right': fine = said == 'right'
        else: fine = re.match(r'\S+( \S+){4,}$', said) and word in said and not re.match(r'\w+: ', said) # an exception is no sentence
        if not fine: yield f'{check} says {said!r} of an answer that is {"right" if word == "right" else f"wrong ({word})"}:\n{code}'

def parts(nb):
    "Of each check, in order: the cell with the stub before it, its own, and the folded one with the solution after it."
    code = [c for c in nb['cells'] if c['cell_type'] == 'code' and source(c).strip()]
    return {name: code[i-1:i+2] for i, c in enumerate(code) for name, _ in CHECK.findall(source(c))}


@each
def test_each_check_has_answers(path): assert list(lacks(checks_of(read_nb(path)), answers_of(path.stem))) == []

@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.stem not in NOT_RECUT or p in WITH], ids=lambda p: p.stem)
def test_each_exercise_has_a_check_of_the_form(path):
    prompts = [m for c in read_nb(path)['cells'] if c['cell_type'] == 'markdown' for m in re.findall(r'^\*\*\d\.', source(c), re.M)]
    assert len(prompts) == len(checks_of(read_nb(path)))

@each
def test_checks_accept_what_is_right_and_reject_what_is_wrong(path):
    assert list(mistaken(executed(path)[2])) == []

@each
def test_a_stub_runs_and_its_solution_is_right_and_folded(path):
    kept = {c['id']: c for c in read_nb(path)['cells']}
    for name, (stub, check, solution) in parts(executed(path)[1]).items():
        assert said_by(check) == 'not written yet', f'{name}: the stub of {path.name} gives {said_by(check)!r}\n{source(stub)}'
        assert said_by(solution) == 'right', f'{name}: the solution in {path.name} gives {said_by(solution)!r}\n{source(solution)}'
        hidden = kept[solution['id']]['metadata'].get('jupyter', {}).get('source_hidden')
        assert hidden and source(solution).startswith('# Solution'), f'{name}: the cell after the check holds the solution, begins with "# Solution", and is folded'
        assert not {n for n in re.findall(r'^def (\w+)', source(stub), re.M)} & {n for n in re.findall(r'^def (\w+)', source(solution), re.M)}, \
            f"{name}: the solution's name would replace the reader's answer"

@pytest.mark.parametrize('path', [p for p in COURSE if p.stem not in NOT_RECUT], ids=lambda p: p.stem)
def test_a_chapter_has_three_exercises(path): assert len(checks_of(read_nb(path))) == 3

def test_every_file_belongs_to_a_notebook():
    files = {p.stem for p in (ROOT/'tests'/'exercises').glob('*.py')}
    assert files == {p.stem for p in WITH}


# The tests above, on checks that do not check

CHECKS = dict(accepts='pass', rejects="return print('double(3) should have been another number')", mute='assert double(3) == 6',
              curt="if double(3) != 6: return print('no')", good="if double(3) != 6: return print(f'double(3) should be 6, not {double(3)}')",
              crashes='if double(3) != 6: 1/0')
ANSWER = dict(check_double=dict(right=['def double(x): return x+x'], wrong=[('def double(x): return x', 'should be 6')]))

def notebook(tmp_path, body):
    check = f"def check_double(double):\n    if double is ...: return print('not written yet')\n    {body}\n    print('right')\n\ncheck_double(double)"
    cells = ['double = ...', check, '# Solution\ndef double_solution(x): return 2*x\n\ncheck_double(double_solution)']
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), tmp_path/'nb.ipynb')
    return tmp_path/'nb.ipynb'

@pytest.mark.parametrize('kind,says', [('accepts', "says 'right' of an answer that is wrong"), ('mute', "says 'AssertionError:"),
                                       ('curt', "says 'no' of an answer that is wrong"), ('rejects', 'of an answer that is right'),
                                       ('crashes', "says 'ZeroDivisionError:"), ('good', None)])
def test_a_check_that_does_not_check_is_seen(tmp_path, kind, says):
    _, nb, verdicts = run_with_answers(notebook(tmp_path, CHECKS[kind]), ROOT, tmp_path, ANSWER)
    found = list(mistaken(verdicts))
    assert len(verdicts) == 2 and (says in '\n'.join(found) if says else found == [])
    assert said_by(parts(nb)['check_double'][1]) == 'not written yet'

def test_what_an_exercise_lacks_is_said():
    found = list(lacks({'check_double': ['double'], 'check_other': ['x']}, {**ANSWER, 'check_gone': {}}))
    assert [f.partition(':')[0] for f in found] == ['check_double', 'check_other has no answers', 'check_gone is no check of this notebook']
