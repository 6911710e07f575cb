"scoreboard: rows replaced and kept in order, bad input refused, nothing written where it must not be, a plot that says which rows it shows."
import os

import matplotlib
import pytest
from PIL import Image

from dl2lib.safefile import digest
from dl2lib.scoreboard import plot_scoreboard, record_score

HEAD = 'chapter,new,accuracy,seed\n'


@pytest.fixture
def board(tmp_path, monkeypatch):
    "A folder like nbs/, with an empty scoreboard."
    monkeypatch.delenv('IN_TEST', raising=False)
    (tmp_path/'engine').mkdir()
    for name in ('00_first_program', '03_schedules', '09_optimizers', '09a_zoo'): (tmp_path/f'{name}.ipynb').touch()
    (tmp_path/'scoreboard.csv').write_text(HEAD)
    return tmp_path

def lines(board): return (board/'scoreboard.csv').read_text().splitlines()[1:]


def test_rows_stand_in_the_order_of_the_chapters_and_are_replaced(board, capsys):
    record_score('09_optimizers', 'Adam, one cycle', .8, seed=3, folder=board)
    record_score('03_schedules', 'a schedule', .5, folder=board)
    record_score('09_optimizers', 'LAMB', .7, folder=board)
    record_score('09a_zoo', 'Lion', .75, folder=board)
    record_score('09_optimizers', 'Adam, one cycle', .812345, seed=4, folder=board)
    assert lines(board) == ['03_schedules,a schedule,0.500,42', '09_optimizers,"Adam, one cycle",0.812,4', '09_optimizers,LAMB,0.700,42', '09a_zoo,Lion,0.750,42']
    assert capsys.readouterr().out.splitlines() == [
        'Shapes, Adam, one cycle: 0.80 (the first row)', 'Shapes, a schedule: 0.50 (the first row)', 'Shapes, LAMB: 0.70 (before: 0.80)',
        'Shapes, Lion: 0.75 (before: 0.70)', 'Shapes, Adam, one cycle: 0.81 (before: 0.50)']

@pytest.mark.parametrize('sub', ['.', 'engine'])
def test_it_is_found_from_a_chapter_and_from_a_room(board, monkeypatch, sub):
    monkeypatch.chdir(board/sub)
    record_score('03_schedules', 'a schedule', .5)
    assert lines(board) == ['03_schedules,a schedule,0.500,42']

def test_elsewhere_it_prints_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record_score('03_schedules', 'mine', .5)
    assert 'Shapes, mine: 0.50 (no scoreboard here' in capsys.readouterr().out and os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError, match='there is no scoreboard.csv here'): plot_scoreboard()

def test_nbdev_test_does_not_change_what_is_committed(board, monkeypatch):
    before = (board/'scoreboard.csv').read_bytes()
    monkeypatch.setenv('IN_TEST', '1')
    record_score('03_schedules', 'a schedule', .5, folder=board)
    assert (board/'scoreboard.csv').read_bytes() == before

@pytest.mark.parametrize('args,says', [(('03_schedules', 'x', 50), 'accuracy=50 must be from 0 to 1'), (('03_schedules', 'x', float('nan')), 'accuracy=nan'),
                                       (('03_schedules', 'x', -.1), 'accuracy=-0.1'), (('03_schedule', 'x', .5), 'there is no 03_schedule.ipynb')])
def test_what_is_no_score_is_refused(board, args, says):
    with pytest.raises(ValueError, match=says): record_score(*args, folder=board)
    assert lines(board) == []

def test_a_damaged_file_is_named_with_its_line(board):
    (board/'scoreboard.csv').write_text(HEAD + '03_schedules,a,0.5,42\n03_schedules,b\n')
    with pytest.raises(ValueError, match=r'scoreboard\.csv, line 3: it must have'): record_score('03_schedules', 'c', .5, folder=board)

def test_the_plot_shows_each_row_and_the_file_says_which(board, tmp_path):
    for chapter, score in (('03_schedules', .5), ('09a_zoo', .75)): record_score(chapter, 'new', score, folder=board)
    fig = plot_scoreboard(tmp_path/'p.png', board)
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ['03_schedules: new', '09a_zoo: new'] and [b.get_width() for b in ax.patches] == [.5, .75]
    with Image.open(tmp_path/'p.png') as img: assert img.info['Description'] == digest((board/'scoreboard.csv').read_bytes()).hex()
    matplotlib.pyplot.close(fig)
