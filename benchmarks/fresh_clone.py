"""The README's two commands in a fresh clone: how long they take, and how they end.

    python benchmarks/fresh_clone.py [--no-test] [PYTHON ...]

clones the last commit into a temporary folder for each interpreter (none: the one that make finds), with data of its own, and writes
results/fresh_clone.md. Takes half an hour each on two CPU cores, and 8 GB."""
import os, re, subprocess, sys, tempfile, time
from pathlib import Path

from common import save, table

ROOT = Path(__file__).resolve().parent.parent
STEPS = [('make .venv/.dl2lib-installed', 'the environment, which either command makes first'), ('make train', 'Shapes drawn, three epochs, pictures and a model'),
         ('make test', 'every notebook twice, and every test')]


def run(python, steps): # an interpreter, or None -> rows of the table, GB of the environment, the commit
    rows = []
    with tempfile.TemporaryDirectory() as d:
        clone = Path(d, 'dl2lib')
        subprocess.run(['git', 'clone', '-q', ROOT, clone], check=True)
        head = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=clone, check=True, text=True, capture_output=True).stdout.strip()
        env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')} | dict(DL2LIB_DATA=f'{d}/data', PIP_NO_CACHE_DIR='1')
        for command, what in steps:
            start = time.time()
            done = subprocess.run([*command.split(), *([f'PYTHON={python}'] if python else [])], cwd=clone, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            took, said = round(time.time()-start), done.stdout.strip().splitlines()
            print(command, f'{took} s, exit {done.returncode}', *said[-5:], sep='\n', flush=True)
            ends = next((l for l in reversed(said) if re.search(r'validation accuracy|passed|failed', l)), '')
            version = subprocess.run([clone/'.venv/bin/python', '-V'], text=True, capture_output=True).stdout.split()[-1]
            rows.append([version, f'`{command}`', what, f'{took//60}:{took%60:02}', done.returncode, re.sub(r' in [\d.]+s.*', '', ends.strip('= '))])
        size = sum(p.lstat().st_size for p in (clone/'.venv').rglob('*'))/1e9
    return rows, size, head

def main(*options):
    pythons, steps = [o for o in options if o != '--no-test'] or [None], STEPS[:2] if '--no-test' in options else STEPS
    rows, sizes, heads = zip(*(run(p, steps) for p in pythons))
    save('fresh_clone', f'# From a fresh clone, commit {heads[0]}\n\nThe environment takes {max(sizes):.1f} GB. pip had none of the packages kept from before; how long the first step takes depends on the network.\n\n'
         + table(['Python', 'command', 'what it does', 'min:s', 'exit status', 'its last word'], sum(rows, [])) + '\n\n`python benchmarks/fresh_clone.py`')


if __name__ == '__main__': main(*sys.argv[1:])
