"""Float batches of 64 images, 3x128x128, from JPEG files: the lesson's way, this library's ways, fastai, and decoding by hand.

    python benchmarks/bench_batches.py FOLDER [ROUNDS] [BATCHES]

FOLDER is Imagenette's (train/ and val/); writes results/bench_batches.md. 15 rounds of 16 batches take about four minutes on two CPU cores.
fastai is left out where it is not installed: the `bench` extra brings it."""
import importlib.util, random, statistics, sys, tempfile, time
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from common import interleaved, ratios, save, spread, table
from dl2lib import datacache, images
from dl2lib.datablock import (ByteToFloat, CategoryProcessor, ImageList, ResizeFixed, SplitData, get_files, grandparent_splitter, image_extensions,
                              label_by_func, make_rgb, parent_labeler, to_byte_tensor)

BS, SIZE, WARM, TURNS = 64, 128, 4, 4 # TURNS of one process in a round
LESSON, PIL_, BYTES, FASTAI = "the lesson's way", 'dl2lib, PIL', 'dl2lib, PIL, bytes from the decoder on', "fastai's DataBlock"
JPEG, HAND, CACHE, ALONE = 'dl2lib, `jpeg_decoder`', '`decode_jpeg` and resize by hand', 'dl2lib, `cached`', ', one thread'
TARGETS = [*((0, ref, k+how, goal) for k in (PIL_, BYTES) for how in ('', ALONE) for ref, goal in ((LESSON, 1.15), (FASTAI, 2.))),
           (0, HAND, JPEG, 1/1.05), (0, HAND, JPEG+ALONE, 1/1.05), (0, LESSON, CACHE, 8.),
           (2, LESSON, PIL_, 1.4), (2, FASTAI, PIL_, 2.3), (2, LESSON, BYTES, 1.4), (2, FASTAI, BYTES, 2.3), (2, LESSON, JPEG, 1.4), (2, FASTAI, JPEG, 2.3)]


# The lesson's way, without its item lists: each image becomes floats by itself, torch's DataLoader stacks them

class LessonSet:
    def __init__(self, path):
        self.fns = get_files(path/'train', image_extensions, recurse=True)
        names = sorted({fn.parent.name for fn in self.fns})
        self.ys = [names.index(fn.parent.name) for fn in self.fns]

    def __len__(self): return len(self.fns)
    def __getitem__(self, i):
        im = PIL.Image.open(self.fns[i]).convert('RGB').resize((SIZE, SIZE), PIL.Image.BILINEAR)
        return torch.from_numpy(np.array(im)).permute(2, 0, 1).float().div_(255.), self.ys[i]


def lesson(path, workers):
    ds = LessonSet(path)
    return ds, DataLoader(ds, BS, shuffle=True, drop_last=True, num_workers=workers), lambda x: x


def block(path, workers, decoder=None, cache=None): # dl2lib
    il = ImageList.from_files(path, tfms=[make_rgb, ResizeFixed(SIZE), to_byte_tensor], **({} if decoder is None else dict(decoder=decoder)))
    sd = SplitData.split_by_func(il, partial(grandparent_splitter, valid_name='val'))
    if cache is not None: sd = datacache.cached(sd, cache)
    data = label_by_func(sd, parent_labeler, proc_y=CategoryProcessor()).to_databunch(BS, seed=1, drop_last=True, num_workers=workers)
    return data.train_ds, data.train_dl, ByteToFloat()


def fastai(path, workers):
    from fastai.vision.all import CategoryBlock, DataBlock, GrandparentSplitter, ImageBlock, Resize, get_image_files, parent_label
    db = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, splitter=GrandparentSplitter('train', 'val'), get_y=parent_label,
                   item_tfms=Resize(SIZE, 'squish'))
    dls = db.dataloaders(path, bs=BS, num_workers=workers, device='cpu') # its training loader shuffles and drops the last batch by itself
    return dls, dls.train, lambda x: x


# What a reader of torchvision's documentation would write: no labels, no seeds, no names in errors

def read_by_hand(fns):
    ims = [F.interpolate(decode_jpeg(read_file(fn), mode=ImageReadMode.RGB)[None], (SIZE, SIZE), mode='bilinear', antialias=True)[0] for fn in fns]
    return torch.stack(ims).float().div_(255.)


def by_hand(path, workers):
    fns = get_files(path/'train', image_extensions, recurse=True).strs
    def batches():
        order = random.sample(fns, len(fns))
        for i in range(0, len(order)-BS+1, BS): yield (read_by_hand(order[i:i+BS]),)
    class Loader:
        def __len__(self): return len(fns)//BS
        def __iter__(self): return batches()
    return fns, Loader(), lambda x: x


def makers(path, cache):
    res = {LESSON: lesson, PIL_: block, BYTES: partial(block, decoder=images.open_bytes), JPEG: partial(block, decoder=images.jpeg_decoder),
           HAND: by_hand, CACHE: partial(block, cache=cache), FASTAI: fastai}
    return {k: f for k, f in res.items() if f is not fastai or importlib.util.find_spec('fastai')}


def picture_sizes(fns, n=500): # of some, in words
    sizes = sorted(PIL.Image.open(fn).size for fn in random.Random(1).sample(list(fns), n))
    w, h = (statistics.median(side) for side in zip(*sizes))
    return f'{w:.0f}x{h:.0f} pixels ({"all" if len(set(sizes)) == 1 else "median"} of {n})'


def same_pictures(path, made, n=256):
    "The largest difference in 255ths of the same pictures to the lesson's, for each way."
    ds, res = made[LESSON][0], {}
    idxs = random.Random(1).sample(range(len(ds)), n)
    want, fns = torch.stack([ds[i][0] for i in idxs]), [ds.fns[i] for i in idxs]
    for k, (d, _, to_float) in made.items():
        if k == HAND: x = read_by_hand([str(fn) for fn in fns])
        elif k == FASTAI: x = torch.cat([b[0] for b in d.test_dl(fns, num_workers=0)]).as_subclass(torch.Tensor)
        elif k == LESSON: x = want
        else:
            at = {fn: i for i, fn in enumerate(d.x.items)}
            x = to_float(torch.stack([d.x[at[fn]] for fn in fns]))
        assert x.shape == want.shape and x.dtype == want.dtype, (k, x.shape, x.dtype)
        res[k] = 255*(x-want).abs()
    return {k: f'{d.max():.0f} ({d.mean():.2f})' for k, d in res.items()}


class Turns:
    """An arm: `n` further batches of a run through `dl` that goes on from round to round. Where there are workers, the first few batches, which they have
    prefetched, do not count, and afterwards they get the time to prefetch again while nobody is measured."""
    def __init__(self, made, n, workers):
        self.ds, self.dl, self.to_float = made
        self.n, self.warm, self.left = n, WARM if workers else 0, 0

    def take(self, n):
        for _ in range(n): self.to_float(next(self.batches)[0]).view(-1)[::1024].sum() # of each page a number: what comes from a worker has to be read once
        self.left -= n

    def __call__(self, r):
        if self.left < self.warm+self.n: # the workers of a run that is over go with it
            self.batches, self.left = iter(self.dl), len(self.dl)
            self.take(1+self.warm)
        self.take(self.warm)
        start = time.perf_counter()
        self.take(self.n)
        seconds = time.perf_counter()-start
        if self.warm: time.sleep(.3)
        return seconds


def alone(turn): # with one thread
    def f(r):
        n = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            return turn(r)
        finally: torch.set_num_threads(n)
    return f


def main(folder, rounds=15, batches=16):
    path, rounds, batches, threads = Path(folder), int(rounds), TURNS*(int(batches)//TURNS), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as cache:
        ways = makers(path, cache)
        made = {k: f(path, 0) for k, f in ways.items()}
        diff, sizes = same_pictures(path, made), picture_sizes(made[LESSON][0].fns)
        turns = {k: Turns(m, batches//TURNS, 0) for k, m in made.items()}
        turns |= {k+ALONE: alone(Turns(ways[k](path, 0), batches//TURNS, 0)) for k in (PIL_, BYTES, JPEG)}
        times = {0: interleaved(turns, rounds, turns=TURNS)}
        torch.set_num_threads(1) # of which the workers have no more
        times[2] = interleaved({k: Turns(f(path, 2), batches, 2) for k, f in ways.items() if k != HAND}, rounds)
    n, rows, goals = BS*batches, [], []
    for k in [o for k in ways for o in (k, k+ALONE) if o in turns]:
        rows.append([k, diff.get(k, ''), *(spread([n/s for s in times[w][k]], ',.0f') if k in times[w] else '' for w in times)])
    for w, a, b, goal in TARGETS:
        if a in times[w] and b in times[w]: goals.append([f'{w} workers' if w else 'one process', f'{b}, against {a}', spread(ratios(times[w], a, b)), f'{goal:.2f}'])
    save('bench_batches', TEXT.format(BS=BS, SIZE=SIZE, rounds=rounds, batches=batches, WARM=WARM, TURNS=TURNS, sizes=sizes, threads=threads)
         + table(['', 'largest (mean) difference', 'one process', 'two workers'], rows) + '\n\nHow many times as fast:\n\n'
         + table(['', '', 'times', 'target: at least'], goals), ['fastai'])


TEXT = """# Float batches from JPEG files

Images a second, as batches of {BS} floats from 0 to 1, {SIZE}x{SIZE}, from Imagenette's training images in random order. These have {sizes}; their
files are already known to the system. Median (range) of n = {rounds} interleaved rounds of {batches} batches; ratios are taken within a round. In one
process torch has its {threads} threads, and dl2lib reads the images of a batch by as many; with workers each process has one. Differences are those
of 256 pictures to the lesson's, in 255ths. `python benchmarks/bench_batches.py FOLDER`

All ways squash with a bilinear, antialiased filter and augment nothing; all but the one by hand give labels too. The lesson's way makes floats of each
image, and torch's DataLoader stacks them. dl2lib and fastai make floats once a batch; fastai's is its default pipeline with `Resize({SIZE}, 'squish')`.
"Bytes from the decoder on": Pillow decodes, torch resizes. Of each page of a batch one number is read, since what comes from a worker still has to be
fetched. In one process a round has {TURNS} turns. Two workers live through the rounds; between their turns they prefetch and wait, and the first {WARM}
batches of a turn do not count.

"""

if __name__ == '__main__': main(*sys.argv[1:])
