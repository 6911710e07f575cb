"""A batch augmented: this library's one warp, kornia, fastai, albumentations, torchvision, and torch's bare `grid_sample`.

    python benchmarks/bench_augment.py [DEVICE] [ROUNDS]

writes results/bench_augment.md (or bench_augment_cuda.md). On a CPU 64x3x128x128 and one thread, about two minutes for 15 rounds; on a GPU 512x3x224x224.
What is not installed is left out: the `bench` extra brings it."""
import importlib.util, sys, warnings

import numpy as np
import torch
from torch.nn import functional as F

from common import interleaved, ratios, save, spread, table
from dl2lib.augmentation import homography_grid
from dl2lib.batch_warp import AugmentBatch, RandomBrightness, RandomContrast, RandomFlip, RandomRotate, RandomTilt, RandomZoom

DEGREES, ZOOM, TILT, LIGHT = 10, 1.1, .1, .2
FLOATS, BYTES, APPLY = 'dl2lib, floats', 'dl2lib, bytes', 'dl2lib, floats, not clipped, draws apart'
FLOATS_AS_IS, BYTES_AS_IS = 'dl2lib, floats, not clipped', 'dl2lib, bytes, not clipped' # what it does unless it is told to clip
KORNIA, FASTAI, ALBU, TV = 'kornia `AugmentationSequential`, floats', "fastai's batch transforms, floats", 'albumentations, an image at a time, bytes', 'torchvision v2, an image at a time, bytes'
BARE, COPY = 'bare `grid_sample`, floats', 'a copy in memory, floats'
TARGETS = dict(cpu=[(FLOATS, KORNIA, 2.4), (FLOATS, FASTAI, 3.), (BYTES, ALBU, 1.3), (BYTES, TV, 5.)],
               cuda=[(FLOATS, KORNIA, 3.), (FLOATS, FASTAI, 3.), (BYTES, TV, 20.)])
LIMITS = dict(cpu=[(FLOATS_AS_IS, BARE, 1.5), (BYTES_AS_IS, BARE, 1.8)], cuda=[(FLOATS_AS_IS, BARE, 1.5), (APPLY, COPY, 4.)])


def ops(): return [RandomFlip(), RandomRotate(DEGREES), RandomZoom(ZOOM), RandomTilt(TILT), RandomBrightness(LIGHT), RandomContrast(LIGHT)]

def ours(clip=True): return AugmentBatch(ops(), padding_mode='zeros', antialias=False, clip=clip) # the others clip, and do not antialias


def kornia(x, xb):
    import kornia.augmentation as K
    tfm = K.AugmentationSequential(K.RandomHorizontalFlip(p=.5), K.RandomAffine(DEGREES, scale=(1., ZOOM), p=1.), K.RandomPerspective(2*TILT, p=1.),
                                   K.RandomBrightness((1-LIGHT, 1+LIGHT), p=1.), K.RandomContrast((1-LIGHT, 1+LIGHT), p=1.))
    return lambda: tfm(x)


def fastai(x, xb):
    from fastai.vision.all import Brightness, Contrast, Flip, Pipeline, Rotate, TensorImage, Warp, Zoom, setup_aug_tfms
    kw = dict(p=1., pad_mode='zeros')
    tfms = [Flip(p=.5, pad_mode='zeros'), Rotate(DEGREES, **kw), Zoom(1., ZOOM, **kw), Warp(magnitude=2*TILT, **kw), Brightness(LIGHT, p=1.), Contrast(LIGHT, p=1.)]
    tfm, x = Pipeline(setup_aug_tfms(tfms), split_idx=0), TensorImage(x)
    return lambda: tfm(x)


def albumentations(x, xb):
    import albumentations as A
    tfm = A.Compose([A.HorizontalFlip(p=.5), A.Affine(rotate=(-DEGREES, DEGREES), scale=(1., ZOOM), p=1.), A.Perspective(scale=(0., TILT), p=1.),
                     A.RandomBrightnessContrast(LIGHT, LIGHT, p=1.)])
    ims = list(xb.permute(0, 2, 3, 1).cpu().contiguous().numpy())
    return lambda: torch.from_numpy(np.stack([tfm(image=im)['image'] for im in ims])).permute(0, 3, 1, 2).float().div_(255)


def torchvision(x, xb):
    from torchvision.transforms import v2
    tfm = v2.Compose([v2.RandomHorizontalFlip(.5), v2.RandomAffine(DEGREES, scale=(1., ZOOM), interpolation=v2.InterpolationMode.BILINEAR),
                      v2.RandomPerspective(2*TILT, p=1.), v2.ColorJitter(LIGHT, LIGHT)])
    return lambda: torch.stack([tfm(im) for im in xb]).float().div_(255)


PEERS = {KORNIA: ('kornia', kornia), FASTAI: ('fastai', fastai), ALBU: ('albumentations', albumentations), TV: ('torchvision', torchvision)}


def all_arms(x, xb):
    tfm, plain = ours(), ours(False)
    draws = tfm.draw(x)
    grid = homography_grid(draws.geometry.float(), x.shape[-1]).contiguous().to(x.device)
    arms = {FLOATS: lambda: tfm(x), BYTES: lambda: tfm(xb), FLOATS_AS_IS: lambda: plain(x), BYTES_AS_IS: lambda: plain(xb), APPLY: lambda: plain.apply(x, draws)}
    for k, (name, f) in PEERS.items():
        if importlib.util.find_spec(name) and not (k == ALBU and x.is_cuda): arms[k] = f(x, xb)
    return arms | {BARE: lambda: F.grid_sample(x, grid, align_corners=False), COPY: lambda: x.clone()}


def on_device(f, device): # seconds: on a GPU those between two events of its stream
    if device == 'cpu': return lambda r: (f(), None)[1]
    def timed(r):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record(); f(); end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)/1000
    return timed


def check(arms, x): # that every arm gives a batch of floats from 0 to 1 that differs from what it was given
    for k, f in arms.items():
        y = f()
        assert y.shape == x.shape and y.is_floating_point(), (k, y.shape, y.dtype)
        if k == COPY: continue
        assert -1 < y.min() and y.max() < 2 and .01 < (y.to(x.device)-x).abs().mean() < .5, (k, y.min(), y.max())


def same_as_kornia(device): # mean and largest difference, in 255ths, of a smooth batch warped by the same matrices
    if not importlib.util.find_spec('kornia'): return 'kornia is not installed'
    from kornia.geometry.transform import warp_perspective
    n = 128
    x = F.interpolate(torch.rand(16, 3, 6, 6, generator=torch.Generator().manual_seed(1)), (n, n), mode='bicubic').clamp(0, 1).to(device)
    tfm = AugmentBatch(ops()[:4], padding_mode='zeros', antialias=False)
    draws = tfm.draw(x)
    s = torch.tensor([[n/2, 0, (n-1)/2], [0, n/2, (n-1)/2], [0, 0, 1]], dtype=torch.float64) # to kornia's pixels, whose centres are whole numbers
    want = warp_perspective(x, torch.linalg.inv(s @ draws.geometry @ torch.linalg.inv(s)).float().to(device), (n, n), align_corners=True)
    diff = 255*(tfm.apply(x, draws)-want).abs()
    assert diff.mean() < 1, diff.mean()
    return f'the same 16 smooth images by the same matrices, ours and kornia\'s `warp_perspective`: they differ by {diff.mean():.4f} of 255 in the mean, {diff.max():.2f} at most'


def main(device='cpu', rounds=15):
    warnings.simplefilter('ignore')
    kind, rounds = torch.device(device).type, int(rounds)
    if kind == 'cpu': torch.set_num_threads(1)
    shape = (64, 3, 128, 128) if kind == 'cpu' else (512, 3, 224, 224)
    torch.manual_seed(1)
    xb = F.interpolate(torch.rand(shape[0], 3, 16, 16), shape[2:], mode='bilinear').mul(255).byte().to(device)
    x = xb.float()/255
    arms = all_arms(x, xb)
    check(arms, x)
    if importlib.util.find_spec('cv2'):
        import cv2
        cv2.setNumThreads(1)
    times = interleaved({k: on_device(f, kind) for k, f in arms.items()}, rounds, warmup=3)
    rows = [[k, *([spread(v, '.2f', 1000)] if kind == 'cuda' else []), spread(ratios(times, k, BARE))] for k, v in times.items()]
    goals = [[f'{a}, against {b}', 'times as fast', spread(ratios(times, b, a)), f'at least {g}'] for a, b, g in TARGETS[kind] if b in times]
    goals += [[f'{a}, against {b}', 'times its time', spread(ratios(times, a, b)), f'at most {g}'] for a, b, g in LIMITS[kind]]
    save('bench_augment' + '_cuda'*(kind == 'cuda'), TEXT.format(shape='x'.join(map(str, shape)), rounds=rounds, same=same_as_kornia(device), DEGREES=DEGREES, ZOOM=ZOOM, TILT=TILT, LIGHT=LIGHT)
         + table(['', *(['ms'] if kind == 'cuda' else []), 'times bare `grid_sample`'], rows) + '\n\n'
         + table(['', '', 'median (range)', 'target'], goals), ['kornia', 'fastai', 'albumentations', 'opencv-python-headless'])


TEXT = """# A batch augmented

{shape}; median (range) of n = {rounds} interleaved rounds; ratios are taken within a round. On a CPU one thread. `python benchmarks/bench_augment.py DEVICE`

All do this, each image with draws of its own: flip with probability 0.5; turn up to {DEGREES} degrees; zoom 1 to {ZOOM}; perspective, corners up to
{TILT} of a side; brightness and contrast within {LIGHT}; bilinear, zeros beyond the edge, no antialiasing, clipped to 0 to 1; out comes one batch of floats.
kornia, albumentations and torchvision turn and zoom in one sampling, and sample once more for the perspective; fastai samples once. The perspective of kornia, albumentations and
torchvision moves corners inwards only, fastai's has two numbers; brightness of fastai and contrast are each library's own formula. What works with an image at a
time gets bytes, as it is quickest with, and its results are stacked and made floats. "Not clipped" is what dl2lib does unless told to clip. "Draws apart": `apply` of what was drawn before.

Checked: {same}.

"""

if __name__ == '__main__': main(*sys.argv[1:])
