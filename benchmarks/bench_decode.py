"""From a JPEG file to bytes at 128 pixels on one thread: Pillow's full decoding, a scaled one, and torchvision's decoder.

    OMP_NUM_THREADS=1 python benchmarks/bench_decode.py [ROUNDS]

The photograph is matplotlib's sample, cut and resized to two usual sizes; writes results/bench_decode.md. 15 rounds take about half a minute."""
import sys, tempfile
from pathlib import Path

import matplotlib.cbook
import numpy as np
import PIL.Image
import torch
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg

from common import interleaved, ratios, save, spread, table
from dl2lib.datablock import ImageList, ResizeFixed, make_rgb, to_byte_tensor

TFMS, FILES = [make_rgb, ResizeFixed(128), to_byte_tensor], 20
FULL, SCALED, VISION = 'Pillow, full size', 'dl2lib, decoded at the scale that is needed', "torchvision's `decode_jpeg`, resized by torch"


def full(fn):
    with PIL.Image.open(fn) as im: return torch.from_numpy(np.array(im.convert('RGB').resize((128, 128), PIL.Image.Resampling.BILINEAR))).permute(2, 0, 1)

def by_vision(fn):
    x = decode_jpeg(torch.frombuffer(bytearray(Path(fn).read_bytes()), dtype=torch.uint8), ImageReadMode.RGB)
    return F.interpolate(x[None], (128, 128), mode='bilinear', antialias=True)[0]


def main(rounds=15):
    torch.set_num_threads(1)
    rounds, rows = int(rounds), []
    photo = PIL.Image.open(matplotlib.cbook.get_sample_data('grace_hopper.jpg', asfileobj=False)).crop((0, 0, 512, 384))
    with tempfile.TemporaryDirectory() as folder:
        for size in (500, 375), (1000, 750):
            fn = Path(folder)/f'{size[0]}.jpg'
            photo.resize(size, PIL.Image.Resampling.LANCZOS).save(fn, quality=90)
            il = ImageList([fn]*FILES, tfms=TFMS)
            ways = {FULL: lambda fn: full(fn), SCALED: il._get, VISION: by_vision}
            times = interleaved({k: lambda r, f=f: [f(fn) for _ in range(FILES)] and None for k, f in ways.items()}, rounds)
            for k, f in ways.items():
                far = (f(fn).float() - full(fn).float()).abs().mean().item()
                rows.append([f'{size[0]}x{size[1]}', k, spread(times[k], '.2f', 1000/FILES), spread(ratios(times, FULL, k)), spread(ratios(times, VISION, k)), f'{far:.2f}'])
    save('bench_decode', '# Decoding a JPEG at the scale that is needed\n\n'
         f'From a file that is known to the system to 3x128x128 bytes, one thread. Median (range) of n = {rounds} interleaved rounds of {FILES} images; '
         'ratios are taken within a round. The difference is the mean of all pixels to the full decoding, of 255. `OMP_NUM_THREADS=1 python benchmarks/bench_decode.py`\n\n'
         + table(['size', '', 'ms an image', 'times as fast as Pillow', "times as fast as torchvision's", 'difference'], rows))


if __name__ == '__main__': main(*sys.argv[1:])
