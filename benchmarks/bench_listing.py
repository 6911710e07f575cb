"""Listing the images of a folder: `get_files` against torchvision, fastai, `rglob`, and a walk that keeps nothing.

    python benchmarks/bench_listing.py FOLDER [ROUNDS]

FOLDER is Imagenette's (train/ and val/); writes results/bench_listing.md. 25 rounds take about fifteen seconds. fastai is left out where it
is not installed: the `bench` extra brings it."""
import importlib.util, os, sys
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from common import interleaved, ratios, save, spread, table
from dl2lib.datablock import get_files, image_extensions

TURNS = 3
OURS, WALK = '`get_files(path, image_extensions, recurse=True)`', 'an `os.walk` that keeps nothing'
TORCHVISION, FASTAI, RGLOB = "torchvision's `make_dataset`, train and val", "fastai's `get_image_files`", '`Path.rglob`, filtered by ending'
TARGETS = {TORCHVISION: .5, FASTAI: .3, WALK: 2.}


def walk(path):
    for _ in os.walk(path): pass


def listings(path): # name -> function that lists `path`
    res = {OURS: lambda: get_files(path, image_extensions, recurse=True),
           TORCHVISION: lambda: [fn for d in ('train', 'val') for fn, _ in make_dataset(path/d, extensions=IMG_EXTENSIONS)],
           RGLOB: lambda: [p for p in path.rglob('*') if p.suffix.lower() in image_extensions],
           WALK: lambda: walk(path)}
    if importlib.util.find_spec('fastai'):
        from fastai.data.transforms import get_image_files
        res[FASTAI] = lambda: get_image_files(path)
    return res


def arm(f): return lambda r: f() and None # what it returns is freed within the time, too


def main(folder, rounds=25):
    path, rounds = Path(folder), int(rounds)
    fs = listings(path)
    found = {k: {os.fspath(p) for p in f()} for k, f in fs.items() if k != WALK}
    wrong = {k: len(v) for k, v in found.items() if v != found[OURS]}
    if wrong: raise SystemExit(f'not the same files as the {len(found[OURS])} of get_files: {wrong}')
    times = interleaved({k: arm(f) for k, f in fs.items()}, rounds, turns=TURNS)
    rows = [[k, spread(v, '.1f', 1000/TURNS), *(['', ''] if k == OURS else [spread(ratios(times, OURS, k)), TARGETS.get(k, '')])] for k, v in times.items()]
    save('bench_listing', '# Listing the images of a folder\n\n'
         f'{len(found[OURS]):,} files in {len({os.path.dirname(p) for p in found[OURS]})} folders, already known to the system; all ways but the empty walk gave the same paths. '
         f'Median (range) of n = {rounds} interleaved rounds of {TURNS} listings each; ratios are taken within a round. `python benchmarks/bench_listing.py FOLDER`\n\n'
         + table(['', 'ms', "`get_files`' time by it", 'target: at most'], rows), ['fastai'])


if __name__ == '__main__': main(*sys.argv[1:])
