"""A data set a hundred times Imagenette's: 1.3 million empty files in 1,000 folders, listed, split and labelled.

    python benchmarks/scale_listing.py [FILES] [FOLDERS] [ROUNDS]

makes them in a temporary folder (TMPDIR says where) and removes them, whatever happens; writes results/scale_listing.md. Takes about four minutes."""
import gc, os, shutil, statistics, sys, tempfile, time
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

from common import ratios, save, spread, table
from dl2lib.datablock import CategoryProcessor, ImageList, SplitData, get_files, grandparent_splitter, image_extensions, label_by_func, parent_labeler

SMALL, REPEATS = 13_394, 15
splitter = partial(grandparent_splitter, valid_name='val')


def make(top, files, folders):
    "`files` empty files, spread over `folders` class folders, of which a fifth lie in val/ and bear names that train/ has too."
    n_valid, made = max(folders//5, 1), 0
    for i in range(folders):
        d = top/('val' if i < n_valid else 'train')/f'n{i if i < n_valid else i-n_valid:08d}'
        d.mkdir(parents=True)
        stop = files*(i+1)//folders
        for j in range(made, stop): os.close(os.open(f'{d}/n{i:08d}_{j}.JPEG', os.O_CREAT | os.O_WRONLY | os.O_EXCL))
        made = stop


def stages(top): # -> seconds of each, what is kept
    at, times = time.perf_counter(), {}
    def tick(name):
        nonlocal at
        times[name], at = time.perf_counter()-at, time.perf_counter()
    files = get_files(top, image_extensions, recurse=True);                              tick('list')
    sd = SplitData.split_by_func(ImageList(files, top), splitter);                       tick('split')
    ll = label_by_func(sd, parent_labeler, proc_y=CategoryProcessor());                  tick('label')
    return times, ll


def per_file(top, n, repeats): # microseconds of each stage, medians
    runs = []
    for _ in range(repeats):
        gc.collect()
        runs.append(stages(top)[0])
    return {k: 1e6*statistics.median(r[k] for r in runs)/n for k in runs[0]}


def reachable(x)->int: # bytes of all objects that `x` leads to, code and modules left out
    seen, stack, size = set(), [x], 0
    while stack:
        o = stack.pop()
        if id(o) in seen or isinstance(o, (type, FunctionType, BuiltinFunctionType, ModuleType, CodeType)): continue
        seen.add(id(o))
        size += sys.getsizeof(o)
        stack += gc.get_referents(o)
    return size


def memory(top, n): # bytes an item beyond path strings: of a list of files, of labelled data; and bytes of a path string
    files, ll = get_files(top, image_extensions, recurse=True), stages(top)[1]
    assert len(files) == len(ll.train)+len(ll.valid) == n, (len(files), n)
    strings = sum(map(sys.getsizeof, files.strs))
    return [(reachable(o)-strings)/n for o in (files, ll)] + [strings/n]


def main(files=1_300_000, folders=1_000, rounds=3):
    files, folders, rounds = int(files), int(folders), int(rounds)
    few = max(SMALL*folders//files, 2) # as many files in a folder
    top = Path(tempfile.mkdtemp(prefix='dl2lib_scale_'))
    try:
        start = time.perf_counter()
        make(top/'large', files, folders)
        made = time.perf_counter()-start
        make(top/'small', SMALL, few)
        small, large = [], []
        for r in range(rounds):
            small.append(per_file(top/'small', SMALL, REPEATS)); large.append(per_file(top/'large', files, 1))
            print(r, small[-1], large[-1], flush=True)
        mem = {n: memory(top/d, n) for d, n in (('small', SMALL), ('large', files))}
    finally:
        start = time.perf_counter()
        shutil.rmtree(top)
        removed = time.perf_counter()-start
    rows = [[k, *(spread([o[k] for o in side]) for side in (small, large)),
             spread(ratios({s: [o[k] for o in side] for s, side in (('l', large), ('s', small))}, 'l', 's')), 1.3 if k == 'list' else ''] for k in small[0]]
    sizes = [[what, *(f'{mem[n][i]:.1f}' for n in mem)] for i, what in enumerate(('`get_files`', 'labelled data, both sides, of which 8 refer to the labels'))]
    save('scale_listing', f'# {files:,} files in {folders:,} folders\n\n'
         f'Empty files, {files//folders:,} in a folder, against {SMALL:,} in {few} folders of the same shape; they were made in {made:.0f} s and removed in {removed:.0f} s. '
         f'Microseconds a file: median (range) of n = {rounds} interleaved rounds; the small tree {REPEATS} times in each, of which the median counts. '
         '`python benchmarks/scale_listing.py`\n\n'
         + table(['', f'{SMALL:,} files', f'{files:,} files', 'ratio', 'target: at most'], rows)
         + f'\n\nBytes an item that are kept beyond the path strings ({mem[files][2]:.0f} bytes each), counted over all objects that the data lead to; target: at most 16 beyond strings and labels:\n\n'
         + table(['', f'{SMALL:,} files', f'{files:,} files'], sizes))


if __name__ == '__main__': main(*sys.argv[1:])
