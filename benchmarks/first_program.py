"""Runs the README's first program, in a folder of its own, and keeps what it prints and its picture.

    python benchmarks/first_program.py

writes results/first_program.md and images/first_program.png. What stands under the program in README.md is to be the same: tests/test_readme.py looks."""
import os, re, subprocess, sys, tempfile, time
from pathlib import Path

from common import save

ROOT = Path(__file__).resolve().parent.parent


def main():
    code = re.findall(r'^```python\n(.*?)^```$', (ROOT/'README.md').read_text(encoding='utf-8'), re.M | re.S)[0]
    start = time.time()
    with tempfile.TemporaryDirectory() as d:
        said = subprocess.run([sys.executable, '-c', code], cwd=d, env=os.environ | {'PYTHONPATH': str(ROOT)}, text=True, capture_output=True)
        if said.returncode: raise SystemExit(said.stdout + said.stderr)
        (ROOT/'images').mkdir(exist_ok=True)
        (ROOT/'images/first_program.png').write_bytes(Path(d, 'first_program.png').read_bytes())
    save('first_program', f"# The README's first program\n\n```text\n{said.stdout}```\n\nIt took {time.time()-start:.0f} s. `python benchmarks/first_program.py`")


if __name__ == '__main__': main()
