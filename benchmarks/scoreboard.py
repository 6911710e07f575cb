"""Draws the scoreboard for the README, from the rows that the chapters have written into nbs/scoreboard.csv.

    python benchmarks/scoreboard.py

writes images/scoreboard.png, which holds the digest of the rows: tests/test_readme.py notices a picture that is out of date."""
from pathlib import Path

from dl2lib.scoreboard import plot_scoreboard

ROOT = Path(__file__).resolve().parent.parent

if __name__ == '__main__':
    plot_scoreboard(ROOT/'images'/'scoreboard.png', ROOT/'nbs')
    print('wrote images/scoreboard.png')
