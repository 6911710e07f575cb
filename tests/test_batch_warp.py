"One warp for the whole batch: matrices, sampling, colours, antialiasing, reproducibility, mixing, and bad input."
import math, pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.cbook import get_sample_data
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as V

from dl2lib import batch_warp as bw
from dl2lib.augmentation import affine_batch, find_coeffs, find_homographies, rotation_matrix
from dl2lib.batch_warp import (AugmentBatch, AugmentCallback, RandomBrightness, RandomContrast, RandomCrop, CutMix, RandomDihedral, AugmentDraws, RandomErase, RandomFlip, MixUp, RandomRotate,
                               RandomSaturation, RandomShear, RandomTilt, RandomZoom, brightness_matrix, contrast_matrix, crop_matrix, dihedral_matrix, erase_boxes,
                               fit_matrix, flip_matrix, mix_targets, move_points, random_boxes, recolour, saturation_matrix,
                               shear_matrix, shrink_factors, tilt_matrix, triangle_taps, zoom_matrix)
from dl2lib.callbacks import BatchTransformXCallback, Callback, Recorder
from dl2lib.state import draws_nothing, set_seed
from dl2lib.datablock import ByteToFloat, Dataset, get_dls, norm_imagenette
from dl2lib.learner import Learner
from dl2lib.practice import lr_find

GEOMETRY = [RandomFlip(), RandomDihedral(), RandomRotate(30), RandomShear(10, 10), RandomZoom(1.5), RandomTilt(.2), RandomCrop()]
COLOUR = [RandomBrightness(.3), RandomContrast(.3), RandomSaturation(.3)]
ALL = [*GEOMETRY, *COLOUR, RandomErase()]
E64 = torch.eye(3, dtype=torch.float64)


def gen(seed=0): return torch.Generator().manual_seed(seed)
def images(n=4, c=3, h=32, w=32, seed=0): return torch.rand(n, c, h, w, generator=gen(seed))
def as_bytes(x): return (x*255).round().to(torch.uint8)
def draws(x, geometry=None, size=None, **kw): # by hand, for images `x`
    own, n, c = tuple(x.shape[:1:-1]), len(x), x.shape[1]
    return AugmentDraws(own, size or own, E64.expand(n, 3, 3) if geometry is None else geometry, kw.pop('colour', torch.eye(c+1, dtype=torch.float64).expand(n, -1, -1)), **kw)
def warped(x, m, size=None, **kw): # each image by its matrix
    return AugmentBatch(size=size, **({'padding_mode': 'zeros', 'antialias': False} | kw)).apply(x, draws(x, m, size))

def smooth(n=2, h=48, w=64): # images that change slowly
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing='ij')
    k = torch.arange(1, n*3+1).view(n, 3, 1, 1)
    return .5 + .45*torch.sin(2*x*(1+k/4) + k)*torch.cos(2*y*(1+k/5))

def photograph(): return PIL.Image.open(get_sample_data('grace_hopper.jpg')).convert('RGB')
def to_tensor(im): return torch.from_numpy(np.array(im)).permute(2, 0, 1)[None]


# --- nothing to do, and exact things -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('ops', [[], [RandomFlip(0.)], [RandomRotate(0)], [RandomZoom(1.)], [RandomTilt(0.)], [RandomShear(0, 0)], [RandomCrop((1, 1), (1, 1))], [RandomBrightness(0.)], [RandomContrast(0.), RandomSaturation(0.)],
                                 [o.__class__(p=0.) for o in ALL]], ids=str)
@pytest.mark.parametrize('size', [None, 33])
def test_what_has_nothing_to_do_returns_the_input_to_the_bit(ops, size):
    x = images(3, h=33, w=33)
    assert AugmentBatch(ops, size)(x) is x
    b = as_bytes(x)
    assert torch.equal(AugmentBatch(ops, size)(b), ByteToFloat()(b))

def test_a_crop_of_everything_is_the_identity_only_where_shapes_agree():
    x = images(2, h=20, w=40)
    assert AugmentBatch([RandomCrop((1, 1), (2, 2))])(x) is x
    assert AugmentBatch(size=(40, 20))(x) is x and AugmentBatch(size=20)(x).shape == (2, 3, 20, 20)

@pytest.mark.parametrize('side', [1, 8, 32, 128])
def test_through_the_sampler_identity_is_exact_at_powers_of_two(side):
    x = images(2, h=side, w=2*side)
    for mode in 'bilinear', 'nearest':
        for padding in 'zeros', 'border', 'reflection':
            assert torch.equal(warped_by_force(x, mode, padding), x)

@pytest.mark.parametrize('h,w', [(7, 5), (33, 100), (224, 224), (3, 500)])
def test_elsewhere_it_is_identity_within_1e4(h, w):
    x = images(2, h=h, w=w)
    for padding in 'zeros', 'border', 'reflection': assert (warped_by_force(x, 'bilinear', padding) - x).abs().max() < 1e-4

def warped_by_force(x, mode, padding): # the first image by the identity, because the second is moved
    m = torch.stack([E64, flip_matrix(torch.ones(1))[0]])
    y = AugmentBatch(mode=mode, padding_mode=padding).apply(x, draws(x, m))
    return torch.stack([y[0], y[1].flip(-1)])

@pytest.mark.parametrize('k', range(8))
@pytest.mark.parametrize('h,w,tol', [(16, 16, 0.), (32, 8, 0.), (30, 50, 1e-4)])
def test_the_eight_ways_are_exact(k, h, w, tol):
    x = images(2, h=h, w=w)
    want = torch.rot90(x.flip(-1) if k >= 4 else x, k % 4, (2, 3))
    got = AugmentBatch().apply(x, draws(x, dihedral_matrix(torch.full((2,), k)), tuple(want.shape[:1:-1])))
    assert got.shape == want.shape and (got-want).abs().max() <= tol

def test_their_matrices_are_whole_numbers():
    m = dihedral_matrix(torch.arange(8))
    assert torch.equal(m, m.round()) and len({tuple(o.flatten().tolist()) for o in m}) == 8
    assert torch.equal(m @ m.mT, E64.expand(8, 3, 3))

def test_flip_is_torchs():
    x = images(64)
    y, d = AugmentBatch([RandomFlip()]), AugmentBatch([RandomFlip()]).draw(x, gen(3))
    flipped = d.geometry[:, 0, 0] < 0
    assert 15 < flipped.sum() < 49
    assert torch.equal(y.apply(x, d), torch.where(flipped[:, None, None, None], x.flip(-1), x))


# --- matrices ------------------------------------------------------------------------------------------------------------------------------

def through(m, p): # points (K,2) by one matrix
    q = F.pad(p, (0, 1), value=1.) @ m.T
    return q[:, :2]/q[:, 2:]

def some_matrices(size, seed=0):
    u = torch.rand(5, 8, generator=gen(seed), dtype=torch.float64)
    return [op.matrices(u[:, :op.n_draws], size) for op in GEOMETRY]

def test_composing_is_applying_one_after_the_other():
    p, ms = torch.rand(20, 2, dtype=torch.float64)*2-1, some_matrices((64, 48))
    product = bw._product(ms, 5, 3)
    for i in range(5):
        q = p
        for m in reversed(ms): q = through(m[i], q)
        torch.testing.assert_close(through(product[i], p), q, rtol=0, atol=1e-9)

def test_ops_are_composed_in_their_order_and_the_crop_comes_last():
    x = images(6, h=24, w=40)
    ops = [RandomCrop((.3, .5)), RandomZoom(1.5), RandomRotate(40)]
    tfm = AugmentBatch(ops, 16)
    d, us = tfm.draw(x, gen(1)), torch.rand(6, 4+2+5, dtype=torch.float64, generator=gen(1)).split([4, 2, 5], 1)
    zoom, turn, crop = (op.matrices(u[:, 1:], (40, 24)) for op, u in zip([ops[1], ops[2], ops[0]], [us[0], us[1], us[2]]))
    torch.testing.assert_close(d.geometry, zoom @ turn @ crop)

def test_one_warp_is_close_to_two_and_sharper():
    x = smooth(2, 64, 64)
    a, b = rotation_matrix(torch.tensor([20., -10.]).double()), zoom_matrix(torch.tensor([1.2, 1.1]), torch.zeros(2), torch.zeros(2))
    once, twice = warped(x, a @ b), warped(warped(x, a), b)
    assert (once-twice)[:, :, 16:-16, 16:-16].abs().max() < 2/255

def test_tilt_is_find_homographies():
    moves = (torch.rand(500, 4, 2, generator=gen(), dtype=torch.float64)*2-1)*.24
    corners = torch.tensor([[-1., -1], [-1, 1], [1, 1], [1, -1]], dtype=torch.float64)
    m = tilt_matrix(moves)
    torch.testing.assert_close(m/m[:, 2:, 2:], find_homographies(corners + 2*moves, corners), rtol=1e-9, atol=1e-9)
    assert torch.equal(tilt_matrix(torch.zeros(2, 4, 2)), E64.expand(2, 3, 3))

def test_tilted_corners_never_fold():
    m = RandomTilt(.2499).matrices(torch.randint(2, (2000, 8), generator=gen()).double(), (10, 10)) # all at their extremes
    corners = torch.tensor([[x, y, 1.] for x in (-1, 1) for y in (-1, 1)], dtype=torch.float64)
    assert (m[:, 2] @ corners.T / m[:, 2:, 2] > 0).all() # the horizon lies outside of the image

def test_zoom_crop_and_fit():
    z = zoom_matrix(torch.tensor([2.]), torch.tensor([.5]), torch.tensor([-1.]))[0]
    torch.testing.assert_close(through(z, torch.tensor([[.5, -1], [1, 1]], dtype=torch.float64)), torch.tensor([[.5, -1], [.75, 0]], dtype=torch.float64))
    box = torch.tensor([[-.5, -.25, 1, .75]])
    torch.testing.assert_close(through(crop_matrix(box)[0], torch.tensor([[-1., -1], [1, 1]], dtype=torch.float64)), box.view(2, 2).double())
    x = images(2, h=24, w=48)
    for out in (10, 5), (97, 48), (99, 49): assert torch.equal(fit_matrix((48, 24), out)[0], E64)
    assert fit_matrix((48, 24), (99, 48))[0, 1, 1] < 1 and fit_matrix((48, 24), (96, 50))[0, 0, 0] < 1
    torch.testing.assert_close(AugmentBatch(size=24)(x), x[..., 12:36], rtol=0, atol=1e-5) # the middle, pixel by pixel
    torch.testing.assert_close(AugmentBatch(size=(24, 8), antialias=False)(x[:, :, :, :24]), x[:, :, 8:16, :24], rtol=0, atol=1e-5)

def test_whole_pixels_of_a_crop():
    x = images(2, h=20, w=30)
    box = torch.tensor([[6., 4, 26, 14]]*2)/torch.tensor([30, 20, 30, 20])*2-1
    torch.testing.assert_close(warped(x, crop_matrix(box), (20, 10)), x[:, :, 4:14, 6:26], rtol=0, atol=1e-5)

def test_turns_and_slants_keep_their_shape_in_images_that_are_not_square():
    m = RandomRotate((30, 30)).matrices(torch.zeros(1, 1, dtype=torch.float64), (80, 20))[0]
    p = through(m, torch.tensor([[1., 0], [0, 1]], dtype=torch.float64))*torch.tensor([40., 10])
    torch.testing.assert_close(p.norm(dim=1), torch.tensor([40., 10], dtype=torch.float64))
    s = RandomShear((45, 45), 0).matrices(torch.zeros(1, 2, dtype=torch.float64), (80, 20))[0]
    torch.testing.assert_close(through(s, torch.tensor([[0., 1]], dtype=torch.float64))*40, torch.tensor([[10., 40]], dtype=torch.float64))

def test_points_move_with_the_pixels():
    h, w, out = 60, 80, (50, 70)
    x, pts = torch.zeros(8, 1, h, w), torch.stack([torch.randint(25, 55, (8, 1), generator=gen(1)), torch.randint(20, 40, (8, 1), generator=gen(2))], -1)
    for i, (px, py) in enumerate(pts[:, 0].tolist()): x[i, 0, py-1:py+2, px-1:px+2] = torch.tensor([[1., 2, 1], [2, 4, 2], [1, 2, 1]])
    tfm = AugmentBatch([RandomFlip(), RandomRotate(20), RandomZoom(1.1), RandomTilt(.05)], out, padding_mode='zeros', antialias=False)
    d = tfm.draw(x, gen(5))
    y, moved = tfm.apply(x, d)[:, 0], move_points(pts+.5, d.geometry, (w, h), out)[:, 0]
    ys, xs = torch.meshgrid(torch.arange(out[1])+.5, torch.arange(out[0])+.5, indexing='ij')
    seen = torch.stack([(y*o).sum((1, 2))/y.sum((1, 2)) for o in (xs, ys)], -1)
    assert (seen-moved).abs().max() < .15 # pixels
    back = move_points(moved[:, None], torch.linalg.inv(d.geometry), out, (w, h))
    torch.testing.assert_close(back[:, 0], pts[:, 0]+.5, rtol=0, atol=1e-6, check_dtype=False)

def test_matrices_are_differentiable():
    leaf = torch.full((2,), 1.2, dtype=torch.float64, requires_grad=True)
    ops = [lambda v: flip_matrix(v), lambda v: shear_matrix(v, v, 1.5), lambda v: zoom_matrix(v, v/4, v/5), lambda v: tilt_matrix(v[:, None, None]*torch.rand(2, 4, 2, generator=gen()).double()*.1),
           lambda v: crop_matrix(torch.stack([-v, -v, v, v/2], 1)), lambda v: brightness_matrix(v), lambda v: contrast_matrix(v, 1), saturation_matrix]
    for f in ops: assert torch.autograd.gradcheck(f, leaf)


# --- boxes -----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('w,h', [(160, 128), (100, 100), (1000, 100), (100, 1000), (2, 2), (1, 1), (7, 300)])
@pytest.mark.parametrize('scale,ratio', [((.08, 1), (3/4, 4/3)), ((.35, 1), (3/4, 4/3)), ((.02, .2), (.3, 3.3)), ((1, 1), (1, 1)), ((.5, .5), (2, 3))])
def test_boxes_lie_within_their_ranges(w, h, scale, ratio):
    b = random_boxes(torch.rand(1000, 4, generator=gen(), dtype=torch.float64), (w, h), scale, ratio)
    assert (b[:, :2] >= -1-1e-12).all() and (b[:, 2:] <= 1+1e-12).all()
    pw, ph = ((b[:, i+2]-b[:, i])/2*n for i, n in ((0, w), (1, h)))
    area, r = pw*ph/(w*h), pw/ph
    assert (r > ratio[0]-1e-9).all() and (r < ratio[1]+1e-9).all() and (area < scale[1]+1e-9).all()
    most = max(min(w, h*k)*min(w/k, h) for k in [*ratio, min(max(w/h, ratio[0]), ratio[1])])/(w*h) # the largest there is
    assert (area > min(scale[0], most)-1e-9).all()

def test_the_area_is_uniform_and_all_places_are_reached():
    b = random_boxes(torch.rand(20000, 4, generator=gen(), dtype=torch.float64), (100, 100), (.2, .6), (1, 1))
    area = (b[:, 2]-b[:, 0])*(b[:, 3]-b[:, 1])/4
    assert abs(area.mean() - .4) < .005 and abs(area.std() - .4/12**.5) < .005
    assert (b[:, :2].min(0).values < -.999).all() and (b[:, 2:].max(0).values > .999).all()


# --- against others --------------------------------------------------------------------------------------------------------------------------

def test_the_warp_is_pillows():
    x, (h, w) = as_bytes(smooth(1)), (48, 64)
    quad = torch.tensor([[3., 2], [1, 45], [60, 47], [62, 5]], dtype=torch.float64)
    corners = torch.tensor([[0., 0], [0, h], [w, h], [w, 0]], dtype=torch.float64)
    im = PIL.Image.fromarray(x[0].permute(1, 2, 0).numpy())
    want = to_tensor(im.transform((w, h), PIL.Image.Transform.PERSPECTIVE, find_coeffs(quad, corners), PIL.Image.Resampling.BILINEAR))/255
    size = torch.tensor([w, h])
    got = warped(x, tilt_matrix(((quad-corners)/size)[None]))
    assert (got-want).abs().mean() < 1/255 and (got-want).abs().max() < 3/255

@pytest.mark.parametrize('angle', [-170., -33.3, 5., 90., 123.])
def test_rotation_is_torchvisions(angle):
    x = smooth(2)
    want = V.rotate(x, angle, V.InterpolationMode.BILINEAR)
    got = warped(x, bw._in_pixels(rotation_matrix(torch.full((2,), angle).double()), (64, 48)))
    assert (got-want).abs().mean() < 1/255
    middle = slice(None), slice(None), slice(16, 32), slice(24, 40) # never from beyond the edge
    assert (got-want)[middle].abs().max() < 1e-3

def test_affine_is_torchvisions():
    x = smooth(2)
    want = V.affine(x, angle=0, translate=[0, 0], scale=1., shear=[12., 0.], interpolation=V.InterpolationMode.BILINEAR)
    got = min(((warped(x, shear_matrix(torch.full((2,), s), torch.zeros(2), 64/48))-want).abs().mean() for s in (12., -12.)))
    assert got < 1/255
    want = V.affine(x, angle=0, translate=[0, 0], scale=1.4, shear=[0., 0.], interpolation=V.InterpolationMode.BILINEAR)
    assert (warped(x, zoom_matrix(torch.full((2,), 1.4), torch.zeros(2), torch.zeros(2)))-want).abs().max() < 1/255

def test_perspective_is_torchvisions():
    x, (w, h) = smooth(2), (64, 48)
    start = [[0, 0], [w-1, 0], [w-1, h-1], [0, h-1]]
    end = [[4, 3], [w-9, 1], [w-2, h-4], [6, h-8]]
    want = V.perspective(x, start, end, V.InterpolationMode.BILINEAR)
    def norm(p): return torch.tensor(p, dtype=torch.float64)/torch.tensor([w, h])*2-1
    def of(shift): return find_homographies(norm(start)+2*shift/torch.tensor([w, h]), norm(end)+2*shift/torch.tensor([w, h])).expand(2, 3, 3)
    assert min((warped(x, of(shift))-want).abs().mean() for shift in (0., .5)) < 1/255 # its corners are pixels, ours edges

@pytest.mark.parametrize('mode', ['bilinear', 'nearest', 'bicubic'])
@pytest.mark.parametrize('padding', ['zeros', 'border', 'reflection'])
def test_each_way_of_sampling_is_grid_samples(mode, padding):
    x, m = images(3, h=20, w=24), some_matrices((24, 20), 3)[2][:3]
    want = F.grid_sample(x, F.affine_grid(m[:, :2].float(), (3, 3, 15, 18), align_corners=False), mode, padding, align_corners=False)
    torch.testing.assert_close(warped(x, m, (18, 15), mode=mode, padding_mode=padding), want, rtol=0, atol=1e-4 if mode != 'nearest' else 1)
    if mode != 'nearest': torch.testing.assert_close(warped(x, m, (18, 15), mode=mode, padding_mode=padding), affine_batch(x, m, (18, 15), mode, padding), rtol=0, atol=1e-4)

def test_colours_are_torchvisions():
    x, f = images(3)*.5+.2, torch.tensor([.8, 1., 1.15])
    def got(m): return recolour(x, m[:, :-1].float())
    for i in range(3):
        torch.testing.assert_close(got(brightness_matrix(f))[i], V.adjust_brightness(x[i], f[i].item()))
        torch.testing.assert_close(got(saturation_matrix(f))[i], V.adjust_saturation(x[i], f[i].item()), rtol=0, atol=2e-3) # its weights have four digits
        torch.testing.assert_close(got(contrast_matrix(f))[i], (x[i]-.5)*f[i]+.5)
        grey = contrast_matrix(f, middle=V.rgb_to_grayscale(x[i]).mean().item())
        torch.testing.assert_close(got(grey)[i], V.adjust_contrast(x[i], f[i].item()), rtol=0, atol=1e-3)

def test_colours_and_normalization_are_one_matrix():
    x = images(5)
    tfm = AugmentBatch(COLOUR, norm=norm_imagenette)
    d = tfm.draw(x, gen(2))
    b, k, s = (torch.rand(5, 6, dtype=torch.float64, generator=gen(2)).view(5, 3, 2)[:, i, 1].float()*.6+.7 for i in range(3))
    b, k, s = (o.view(5, 1, 1, 1) for o in (b, k, s))
    y = (x*b-.5)*k+.5
    y = y*s + (1-s)*(y*torch.tensor([.299, .587, .114]).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(tfm.apply(x, d), norm_imagenette(y), rtol=0, atol=1e-5)
    torch.testing.assert_close(AugmentBatch(norm=norm_imagenette)(x), norm_imagenette(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(AugmentBatch(norm=norm_imagenette)(as_bytes(x)), norm_imagenette(ByteToFloat()(as_bytes(x))), rtol=0, atol=1e-5)

@pytest.mark.parametrize('c', [1, 2, 4])
def test_other_numbers_of_channels(c):
    x = images(3, c)
    tfm = AugmentBatch([*GEOMETRY, RandomBrightness(), RandomContrast(), RandomErase()], 16, ([.5]*c, [.2]*c))
    assert tfm(x).shape == (3, c, 16, 16)
    torch.testing.assert_close(AugmentBatch([RandomBrightness((2, 2))])(x), 2*x)

@pytest.mark.parametrize('norm', [None, norm_imagenette])
@pytest.mark.parametrize('ops', [[RandomBrightness((3, 3))], [RandomBrightness((3, 3)), RandomSaturation((2, 2))]])
def test_clip(ops, norm):
    x = images(3)
    plain = AugmentBatch(ops)(x).clamp(0, 1)
    torch.testing.assert_close(AugmentBatch(ops, clip=True, norm=norm)(x), plain if norm is None else norm(plain), rtol=0, atol=1e-5)
    far = x*3
    assert torch.equal(AugmentBatch(clip=True)(far), far.clamp(0, 1)) and far.max() > 2 # the input stays

def test_erase():
    x = images(200, h=30, w=20)
    op = RandomErase(.5, (.1, .2), (.5, 2), value=7.)
    y = AugmentBatch([op], norm=norm_imagenette)(x, gen())
    gone = (y == 7).all(1)
    assert torch.equal(gone, (y == 7).any(1)) and 70 < gone.any(2).any(1).sum() < 130
    for g in gone[gone.any(2).any(1)]:
        rows, cols = g.any(1).nonzero(), g.any(0).nonzero()
        assert g.sum() == len(rows)*len(cols) and g.sum()/600 < .25 and len(rows) == rows[-1]-rows[0]+1
    torch.testing.assert_close(y.masked_fill(gone[:, None], 0), norm_imagenette(x).masked_fill(gone[:, None], 0), rtol=0, atol=1e-5)
    whole = erase_boxes(x, torch.tensor([[-1., -1, 1, 1]]).expand(200, 4), 3.)
    assert (whole == 3).all() and torch.equal(erase_boxes(x, torch.full((200, 4), math.nan)), x)


# --- shrinking -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('f', [3, 5.3])
@pytest.mark.parametrize('kind', ['bytes', 'floats'])
def test_a_photograph_shrinks_as_pillow_shrinks_it(f, kind):
    im = photograph()
    size = round(im.width/f), round(im.height/f)
    want, x = to_tensor(im.resize(size, PIL.Image.Resampling.BILINEAR)), to_tensor(im)
    if kind == 'floats': x = x/255
    with_, without = ((AugmentBatch(size=size, antialias=a)(x)*255-want).abs().mean() for a in (True, False))
    assert with_ < 3 and with_ < .6*without

def test_each_image_is_blurred_as_much_as_it_shrinks():
    x = to_tensor(photograph())[..., :512, :].expand(3, -1, -1, -1)/255
    m = torch.stack([E64, torch.diag(torch.tensor([1/4, 1/4, 1.])).double(), torch.diag(torch.tensor([1., 1/4, 1.])).double()])
    y = AugmentBatch(size=128).apply(x, draws(x, m, (128, 128)))
    inner = slice(None), slice(2, -2), slice(2, -2) # beyond the edge there is nothing to agree about
    torch.testing.assert_close(y[0][inner], AugmentBatch(size=128)(x[:1])[0][inner], rtol=0, atol=1e-5)
    torch.testing.assert_close(y[1], x[1, :, 192:320, 192:320], rtol=0, atol=1e-4) # it does not shrink
    assert torch.equal(shrink_factors(m, (512, 512), (128, 128)), torch.tensor([[4., 4], [1, 1], [4, 1]]).double())

def test_blurring_is_free_where_nothing_shrinks(monkeypatch):
    x, asked, interpolate = images(4), [], F.interpolate
    monkeypatch.setattr(bw, '_blur', lambda x, *taps: asked.append('blur') or x)
    monkeypatch.setattr(bw.F, 'interpolate', lambda x, *args, **kw: asked.append('shrink') or interpolate(x, *args, **kw))
    for tfm in AugmentBatch([RandomFlip(), RandomRotate(30), RandomZoom(1.3)]), AugmentBatch([RandomCrop((.1, 1))], 40), AugmentBatch(size=31), AugmentBatch(size=8, antialias=False), AugmentBatch(size=8, mode='nearest'):
        tfm(x)
    assert not asked
    AugmentBatch(size=16)(x)
    assert asked == ['shrink']
    AugmentBatch(size=16).apply(x, draws(x, torch.diag_embed(torch.tensor([[.5, .5, 1], [1, 1, 1]]*2).double()), (16, 16)))
    assert asked == ['shrink', 'blur']

def test_a_turn_does_not_shrink():
    m = rotation_matrix(torch.tensor([0., 30, 45, 90]).double())
    torch.testing.assert_close(shrink_factors(m, (50, 50), (50, 50)), torch.ones(4, 2).double())
    m = tilt_matrix(torch.tensor([[[.2, 0], [0, 0], [0, 0], [-.2, 0]]]))
    got, eps = shrink_factors(m, (60, 40), (30, 20))[0], 1e-6
    p = through(m[0], torch.tensor([[0., 0], [eps, 0], [0, eps]], dtype=torch.float64))
    jac = (p[1:]-p[0]).T/eps*torch.tensor([[60/30, 60/20], [40/30, 40/20]]) # d(source pixel)/d(result pixel)
    torch.testing.assert_close(got, jac.norm(dim=1), rtol=1e-4, atol=1e-4)

def test_taps_are_weights():
    t = triangle_taps(torch.tensor([.3, 1., 2., 3.5]).double())
    assert t.shape == (4, 7) and torch.allclose(t.sum(1), torch.ones(4).double()) and torch.equal(t, t.flip(1))
    assert (t[:2] == torch.tensor([0, 0, 0, 1., 0, 0, 0])).all() and t[2].tolist() == [0, 0, .25, .5, .25, 0, 0]
    assert triangle_taps(torch.ones(2).double()).shape == (2, 1)
    x = images(2)
    assert torch.equal(bw._blur(x, torch.ones(2, 1), torch.tensor([[0., 1, 0]]*2)), x)
    want = F.conv2d(F.pad(x, (1, 1, 1, 1), mode='replicate'), (torch.tensor([.25, .5, .25])[:, None]*torch.tensor([.2, .6, .2])).expand(3, 1, 3, 3), groups=3)
    torch.testing.assert_close(bw._blur(x, torch.tensor([[.2, .6, .2]]*2), torch.tensor([[.25, .5, .25]]*2)), want)


# --- draws -----------------------------------------------------------------------------------------------------------------------------------

def test_each_image_has_its_own_draw_and_its_own_probability():
    x = images(1).expand(400, 3, 32, 32)
    for op in [RandomFlip(.3), RandomRotate(30, p=.3), RandomZoom(1.5, p=.3), RandomTilt(.2, p=.3), RandomShear(20, p=.3), RandomCrop(p=.3), RandomDihedral(p=.3)]:
        m = AugmentBatch([op]).draw(x, gen(1)).geometry
        moved = (m != E64).any(2).any(1)
        assert 70 < moved.sum() < 170, op
        if op.n_draws > 1: assert len(m[moved].unique(dim=0)) == moved.sum()
    for op in [RandomBrightness(.2, p=.3), RandomContrast(.2, p=.3), RandomSaturation(.2, p=.3)]:
        m = AugmentBatch([op]).draw(x, gen(1)).colour
        assert 70 < (m != torch.eye(4)).any(2).any(1).sum() < 170

def test_by_hand_it_draws_afresh_or_from_a_generator():
    x, tfm = images(8), AugmentBatch(ALL, 24)
    assert not torch.equal(tfm(x), tfm(x))
    assert torch.equal(tfm(x, gen(5)), tfm(x, gen(5))) and not torch.equal(tfm(x, gen(5)), tfm(x, gen(6)))
    before = torch.get_rng_state()
    tfm(x, gen(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9); a = tfm(x); torch.manual_seed(9)
    assert torch.equal(tfm(x), a)
    d = tfm.draw(x)
    assert torch.equal(tfm.apply(x, d), tfm.apply(x, d))

def test_bytes_are_floats_times_255():
    x = as_bytes(images(8))
    for ops in [], GEOMETRY, COLOUR, ALL:
        tfm = AugmentBatch(ops, 20, norm_imagenette)
        torch.testing.assert_close(tfm(x, gen(1)), tfm(x/255, gen(1)), rtol=0, atol=2e-5)
    assert tfm(x).dtype == torch.float32

@pytest.mark.parametrize('kind', ['floats', 'bytes', 'half', 'channels_last'])
def test_a_batch_in_parts_is_the_same_batch(kind, monkeypatch):
    x, tfm, parts = images(100), AugmentBatch(ALL, 24, norm_imagenette, clip=True), []
    x = dict(floats=x, bytes=as_bytes(x), half=x.half(), channels_last=x.contiguous(memory_format=torch.channels_last))[kind]
    d, augment = tfm.draw(x, gen(1)), bw._augment
    want = tfm.apply(x, d)
    monkeypatch.setattr(bw, '_in_parts', partial(bw._in_parts, size=24*24*12*30)) # 30 images a thread
    monkeypatch.setattr(bw, '_augment', lambda x, *args, **kw: parts.append(len(x)) or augment(x, *args, **kw))
    got = tfm.apply(x, d)
    assert torch.equal(got, want) and got.stride() == want.stride() and got.dtype == want.dtype
    assert sum(parts) == 100 and (parts[0] == 30*torch.get_num_threads() or len(parts) == 1)

def test_large_batches_are_done_in_parts_and_nothing_to_do_is_still_the_input():
    x = images(300, h=64, w=64)
    assert AugmentBatch([RandomRotate(0)])(x) is x
    tfm = AugmentBatch(GEOMETRY, norm=norm_imagenette)
    d = tfm.draw(x, gen(1))
    torch.testing.assert_close(tfm.apply(x, d), tfm.apply(x.clone().requires_grad_(), d).detach(), rtol=0, atol=1e-6) # which is done at once

def test_an_op_alone_is_a_transform():
    x = images(8)
    assert torch.equal(RandomRotate(30)(x, gen(1)), AugmentBatch([RandomRotate(30)])(x, gen(1)))
    assert RandomRotate(30).valid(x) is x

def test_valid_is_still_and_says_so():
    x, tfm = as_bytes(images(4, h=40, w=60)), AugmentBatch(ALL, 16, norm_imagenette)
    assert torch.equal(tfm.valid(x), tfm.valid(x)) and tfm.valid(x).shape == (4, 3, 16, 16)
    torch.testing.assert_close(tfm.valid(x), AugmentBatch(size=16, norm=norm_imagenette)(x))
    torch.testing.assert_close(tfm.valid(x), norm_imagenette(AugmentBatch(size=16)(x)), rtol=0, atol=1e-5)
    assert draws_nothing(tfm.valid) and not draws_nothing(tfm) and tfm.valid is tfm.valid and tfm.valid.valid is tfm.valid

def test_it_pickles_and_its_arguments_are_its_attributes():
    tfm = AugmentBatch(ALL, (20, 24), norm_imagenette, 'bicubic', 'border', False, True)
    x, again = images(4), AugmentBatch(**{k: getattr(tfm, k) for k in ('ops', 'size', 'norm', 'mode', 'padding_mode', 'antialias', 'clip')})
    tfm.valid
    for o in again, pickle.loads(pickle.dumps(tfm)): assert torch.equal(o(x, gen(1)), tfm(x, gen(1))) and repr(o) == repr(tfm)
    for op in ALL:
        args = {k: v for k, v in vars(op).items()}
        assert vars(type(op)(**args)) == args
    assert 'RandomRotate(degrees=(-30.0, 30.0), p=1.0)' in repr(tfm)


# --- types and layouts -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double(dtype):
    x = images(4)
    for ops in GEOMETRY, COLOUR, ALL:
        tfm = AugmentBatch(ops, 24, norm_imagenette)
        y = tfm(x.to(dtype), gen(1))
        assert y.dtype == dtype
        assert (y.float()-tfm(x.to(dtype).float(), gen(1))).abs().max() < (.02 if dtype == torch.bfloat16 else 2e-3)

@pytest.mark.parametrize('ops', [[], [RandomFlip(1.)], GEOMETRY, [RandomBrightness()], COLOUR, ALL], ids=str)
@pytest.mark.parametrize('size', [None, 24, 12])
def test_channels_last_in_channels_last_out(ops, size):
    x = images(4)
    tfm, cl = AugmentBatch(ops, size, norm_imagenette), x.contiguous(memory_format=torch.channels_last)
    y, z = tfm(x, gen(1)), tfm(cl, gen(1))
    assert y.is_contiguous() and z.is_contiguous(memory_format=torch.channels_last) and not z.is_contiguous()
    torch.testing.assert_close(y, z)
    assert tfm(as_bytes(cl)).is_contiguous(memory_format=torch.channels_last)

@pytest.mark.parametrize('ops', [GEOMETRY, COLOUR, ALL])
def test_the_input_stays(ops):
    for x in images(4), as_bytes(images(4)), images(1).expand(4, 3, 32, 32):
        before = x.clone()
        AugmentBatch(ops, 24, norm_imagenette, clip=True)(x)
        assert torch.equal(x, before)

@pytest.mark.parametrize('ops', [[], GEOMETRY, COLOUR, ALL])
def test_gradients_flow_to_the_images(ops):
    x = images(2, h=6, w=7).double().requires_grad_()
    tfm = AugmentBatch(ops, 5, norm_imagenette)
    d = tfm.draw(x, gen(3))
    assert torch.autograd.gradcheck(lambda x: tfm.apply(x, d), x)

def test_gradients_flow_to_the_matrices():
    x = smooth(2, 16, 16).double()
    angle = torch.tensor([7., -12.], dtype=torch.float64, requires_grad=True)
    def f(a, k): return AugmentBatch(padding_mode='border').apply(x, draws(x, rotation_matrix(a), colour=contrast_matrix(k)))
    assert torch.autograd.gradcheck(f, (angle, torch.tensor([1.1, .9], dtype=torch.float64, requires_grad=True)), eps=1e-7, atol=1e-3)

def test_it_learns_an_angle_back():
    x = smooth(1, 32, 32)
    want = warped(x, rotation_matrix(torch.tensor([15.])).double(), padding_mode='border')
    a = torch.tensor([5.], requires_grad=True)
    opt = torch.optim.Adam([a], lr=1.)
    for _ in range(60):
        loss = (warped(x, rotation_matrix(a).double(), padding_mode='border')-want).square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
    assert abs(a.item()-15) < .5

class Counts(TorchDispatchMode):
    def __init__(self): super().__init__(); self.reads, self.copies = 0, 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        self.reads += name in ('_local_scalar_dense', 'nonzero', 'masked_select', 'equal')
        if name == '_to_copy' and str(kwargs.get('device')) == 'meta': self.copies += 1
        return func(*args, **kwargs)

@pytest.mark.parametrize('x', [images(4), as_bytes(images(4)), images(4).half()], ids=['floats', 'bytes', 'half'])
def test_nothing_is_asked_back_and_one_copy_is_sent(x):
    tfm = AugmentBatch(ALL, 12, norm_imagenette, clip=True)
    with Counts() as counts: tfm(x)
    assert counts.reads == 0
    x = x.to('meta') # a device that has no values: whoever asks it for one fails
    with Counts() as counts: y = tfm(x)
    assert y.device.type == 'meta' and y.shape == (4, 3, 12, 12) and counts.reads == 0 and counts.copies == 1


# --- under a Learner -------------------------------------------------------------------------------------------------------------------------

class Keep(Callback):
    "Keeps what the model gets."
    _order = 50
    def __init__(self): self.train, self.valid = {}, {}
    def begin_batch(self): (self.train if self.run.in_train else self.valid).setdefault((self.run.epoch, self.run.iter), self.run.xb.clone())

class Flat(nn.Module):
    "A model that draws nothing."
    def __init__(self, c=4): super().__init__(); self.lin = nn.Linear(3, c)
    def forward(self, x): return self.lin(x.float().mean((2, 3)))

def data(n=40, bs=8, seed=3, **kw):
    ds = Dataset(as_bytes(images(n, h=16, w=16)), torch.arange(n) % 4)
    return SimpleNamespace(**dict(zip(('train_dl', 'valid_dl'), get_dls(ds, ds, bs, seed=seed, **kw))))

def learner(*cbs, d=None, loss=F.cross_entropy):
    torch.manual_seed(0)
    return Learner(Flat(), d or data(), loss, lr=.1, cbs=list(cbs))

def fit(*cbs, epochs=2, d=None, **kw):
    learn = learner(*cbs, keep := Keep(), d=d, **kw)
    learn.fit(epochs)
    return keep, learn

AUG = partial(AugmentBatch, ALL, 12, norm_imagenette)

def test_as_a_batch_transform_and_as_a_callback():
    keep, _ = fit(BatchTransformXCallback(AUG()))
    again, _ = fit(AugmentCallback(ALL, 12, norm=norm_imagenette))
    assert len(keep.train) == 10 and len(keep.valid) == 6
    d = data()
    for (epoch, i), x in keep.valid.items(): torch.testing.assert_close(x, AUG().valid(list(d.valid_dl)[i][0]))
    for k, x in again.valid.items(): assert torch.equal(x, keep.valid[k])
    assert not torch.equal(keep.train[0, 0], keep.train[1, 0])
    learn = Learner(Flat(), data(), F.cross_entropy, cb_funcs=[partial(AugmentCallback, [RandomFlip()], 12)])
    learn.fit(1)

@pytest.mark.parametrize('cb', [lambda: AugmentCallback(ALL, 12, norm=norm_imagenette), lambda: [BatchTransformXCallback(ByteToFloat()), MixUp()], lambda: [BatchTransformXCallback(ByteToFloat()), CutMix()]])
@pytest.mark.parametrize('workers', [0, 2])
def test_batch_k_is_batch_k_whatever_else_was_drawn(cb, workers):
    def cbs(): return cb() if isinstance(cb(), list) else [cb()]
    class Noise(Callback): # draws from everything
        _order = -5
        def begin_batch(self): torch.rand(17); np.random.rand(3); __import__('random').random()
    want, _ = fit(*cbs())
    set_seed(99)
    d = data(num_workers=workers)
    got, _ = fit(Noise(), *cbs(), d=d)
    assert want.train.keys() == got.train.keys() and all(torch.equal(want.train[k], got.train[k]) for k in want.train)
    last = data()
    last.train_dl.load_state_dict(dict(seed=3, n_pass=1, batch=4)) # the last batch first
    got, _ = fit(*cbs(), d=last, epochs=1)
    assert list(got.train) == [(0, 0)] and torch.equal(got.train[0, 0], want.train[1, 4])

def test_lr_find_leaves_it_alone():
    plain, found = learner(AugmentCallback(ALL, 12), MixUp(), keep := Keep()), learner(AugmentCallback(ALL, 12), MixUp(), kept := Keep())
    plain.fit(1)
    try: lr_find(found, max_iter=8, plot=False)
    except ValueError as e: assert 'loss never falls' in str(e)
    kept.train.clear()
    found.fit(1)
    assert all(torch.equal(keep.train[k], kept.train[k]) for k in keep.train) and found.loss_func is F.cross_entropy
    assert torch.equal(plain.model.lin.weight, found.model.lin.weight)


# --- mixing ----------------------------------------------------------------------------------------------------------------------------------

def test_targets_are_mixed():
    perm, lam = torch.tensor([1, 2, 0]), torch.tensor([.7, .5, 1.])
    want = torch.tensor([[.7, .3, 0], [0, .5, .5], [0, 0, 1]])
    torch.testing.assert_close(mix_targets(torch.tensor([0, 1, 2]), perm, lam, 3), want)
    torch.testing.assert_close(mix_targets(torch.eye(3), perm, lam, 3), want)
    torch.testing.assert_close(mix_targets(torch.tensor([2, 2, 2]), perm, lam, 3), torch.tensor([[0., 0, 1]]*3))
    torch.testing.assert_close(mix_targets(torch.tensor([1., 3, 5]), perm, lam, 1), torch.tensor([1.6, 4, 5]))

class See(Callback):
    "Looks at what a mix has done, before the loss."
    _order = 60
    def __init__(self, check): self.check, self.n = check, 0
    def after_pred(self):
        if self.run.in_train: self.check(self.run); self.n += 1

def mixed_run(cb, check):
    x = as_bytes(torch.rand(40, 3, 16, 12, generator=gen(4)))
    ds = Dataset(x, torch.arange(40) % 4)
    d = SimpleNamespace(train_dl=torch.utils.data.DataLoader(list(zip(x, ds.y)), 8), valid_dl=None)
    def look(run): check(run, x[run.iter*8:run.iter*8+8]/255, ds.y[run.iter*8:run.iter*8+8])
    learn = learner(BatchTransformXCallback(ByteToFloat()), cb, see := See(look), d=d)
    learn.fit(2)
    assert see.n == 10
    return learn

def test_mixup():
    lams = []
    def check(run, x, y):
        perm, lam = run.mix_up.perm, run.mix_up.lam
        assert sorted(perm.tolist()) == list(range(8)) and len(lam.unique()) == 8 and torch.equal(run.yb, y) # the metrics' labels stay
        k = lam.view(8, 1, 1, 1)
        torch.testing.assert_close(run.xb, k*x + (1-k)*x[perm])
        want = lam[:, None]*F.one_hot(y, 4) + (1-lam)[:, None]*F.one_hot(y[perm], 4)
        torch.testing.assert_close(run.loss_func(run.pred, y), -(want*run.pred.log_softmax(1)).sum(1).mean())
        lams.append(lam)
    learn = mixed_run(MixUp(.4), check)
    lams = torch.cat(lams)
    assert lams.min() >= 0 and lams.max() <= 1 and .3 < lams.mean() < .7 and learn.loss_func is F.cross_entropy

def test_cutmix():
    def check(run, x, y):
        perm, lam = run.cut_mix.perm, run.cut_mix.lam
        for i in range(8):
            other = (run.xb[i] != x[i]).any(0)
            rows, cols = other.any(1).nonzero()[:, 0], other.any(0).nonzero()[:, 0]
            if perm[i] == i or not len(rows): continue
            box = slice(rows[0], rows[-1]+1), slice(cols[0], cols[-1]+1)
            assert torch.equal(run.xb[i][:, *box], x[perm[i]][:, *box])
            assert abs((1-lam[i]) - len(rows)*len(cols)/(16*12)) < 1e-6
    mixed_run(CutMix(1.), check)

def test_a_box_of_everything_and_of_nothing():
    for lam in 0., 1.:
        x = images(4)
        y, got = CutMix().mix(x, torch.tensor([1, 2, 3, 0]), torch.full((4,), lam), torch.rand(4, 2))
        assert torch.equal(y, x if lam else x[[1, 2, 3, 0]]) and torch.equal(got, torch.full((4,), lam))

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_validation_is_not_mixed_and_the_loss_comes_back(cb):
    keep, learn = fit(BatchTransformXCallback(ByteToFloat()), cb(), epochs=1)
    for (_, i), x in keep.valid.items(): assert torch.equal(x, list(data().valid_dl)[i][0]/255)
    assert learn.loss_func is F.cross_entropy
    class Stop(Callback):
        def after_backward(self): raise RuntimeError('stop')
    learn = learner(BatchTransformXCallback(ByteToFloat()), cb(), Stop())
    with pytest.raises(RuntimeError, match='stop'): learn.fit(1)
    assert learn.loss_func is F.cross_entropy

@pytest.mark.parametrize('cb', [MixUp, CutMix])
@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(label_smoothing=.1), nn.CrossEntropyLoss(weight=torch.tensor([1., 2, 3, 4]))])
def test_losses_that_take_probabilities(cb, loss):
    _, learn = fit(BatchTransformXCallback(ByteToFloat()), cb(), Recorder(), loss=loss)
    assert all(map(math.isfinite, learn.recorder.losses)) and learn.loss_func is loss

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_mixing_floats_and_what_cannot_be_mixed(cb):
    x = as_bytes(images(16, h=8, w=8))
    d = SimpleNamespace(train_dl=torch.utils.data.DataLoader(list(zip(x, torch.rand(16, 4))), 8), valid_dl=None)
    learner(BatchTransformXCallback(ByteToFloat()), cb(), d=d, loss=F.mse_loss).fit(1)
    with pytest.raises(TypeError, match=f'{cb.__name__}: the loss nll_loss does not take probabilities'): fit(BatchTransformXCallback(ByteToFloat()), cb(), loss=F.nll_loss)
    with pytest.raises(TypeError, match='put ByteToFloat before'): fit(cb())
    with pytest.raises(ValueError, match='take one callback that mixes'): fit(BatchTransformXCallback(ByteToFloat()), MixUp(), CutMix())
    for bad in 0, -1, math.inf, math.nan:
        with pytest.raises(ValueError, match='alpha'): cb(bad)

def test_nothing_is_asked_back_by_the_mixes():
    x, y, lam, perm = images(4), torch.arange(4), torch.rand(4), torch.randperm(4)
    with Counts() as counts:
        for cb in MixUp(), CutMix(): cb.mix(x, perm, lam, torch.rand(4, 2))
        mix_targets(y, perm, lam, 5)
    assert counts.reads == 0


# --- bad input -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('x,error,match', [
    (torch.rand(3, 8, 8), ValueError, r'x has shape \(3, 8, 8\).*x\[None\]'), (torch.rand(8), ValueError, 'x has shape'),
    (torch.zeros(4, 3, 8, 8, dtype=torch.int64), TypeError, 'labels'), (torch.zeros(2, 3, 8, 8, dtype=torch.bool), TypeError, 'x has torch.bool'),
    (torch.rand(0, 3, 8, 8), ValueError, 'nothing in it'), (torch.rand(2, 3, 0, 8), ValueError, 'nothing in it'), (torch.rand(2, 0, 8, 8), ValueError, 'nothing in it'),
    (np.zeros((2, 3, 8, 8)), TypeError, 'ndarray')])
def test_what_is_no_batch_of_images(x, error, match):
    for ops in [], ALL:
        with pytest.raises(error, match=match): AugmentBatch(ops)(x)

def test_channels():
    x = images(2, 1)
    with pytest.raises(ValueError, match='x has 1 channels, and norm means of 3'): AugmentBatch(norm=norm_imagenette)(x)
    with pytest.raises(ValueError, match='RandomSaturation: the images have 1 channels'): AugmentBatch([RandomSaturation()])(x)

def test_matrices():
    x = images(4)
    tfm = AugmentBatch()
    with pytest.raises(ValueError, match='draws.geometry: 3 matrices for 4 images'): tfm.apply(x, draws(x, E64.expand(3, 3, 3)))
    with pytest.raises(ValueError, match='draws.geometry must be'): tfm.apply(x, draws(x, E64))
    with pytest.raises(ValueError, match='draws.colour'): tfm.apply(x, draws(x, colour=torch.eye(3)[None]))
    with pytest.raises(ValueError, match='draws.size'): tfm.apply(images(4, h=30), draws(x))
    for bad in math.nan, math.inf:
        m = E64.repeat(4, 1, 1)
        m[2, 0, 1] = bad
        with pytest.raises(ValueError, match='draws.geometry: matrix 2'): tfm.apply(x, draws(x, m))

@pytest.mark.parametrize('make,match', [
    (lambda: RandomFlip(1.5), 'RandomFlip: p=1.5'), (lambda: RandomFlip(-.1), 'RandomFlip: p=-0.1'), (lambda: RandomRotate(p=math.nan), 'RandomRotate: p=nan'), (lambda: RandomFlip(True), 'RandomFlip: p=True'),
    (lambda: RandomRotate((20, 10)), r'RandomRotate: degrees=\(20, 10\): the range is reversed'), (lambda: RandomRotate(-10), 'RandomRotate: degrees=-10'), (lambda: RandomRotate('a'), "RandomRotate: degrees='a'"),
    (lambda: RandomZoom((2, 1)), 'RandomZoom: zoom.*reversed'), (lambda: RandomZoom(.5), 'RandomZoom: zoom'), (lambda: RandomZoom((0, 1)), 'RandomZoom: zoom'), (lambda: RandomShear(x=(5, 1)), 'RandomShear: x.*reversed'),
    (lambda: RandomShear(y=80), 'RandomShear: y'), (lambda: RandomTilt(.25), 'RandomTilt: magnitude=0.25'), (lambda: RandomTilt(-.1), 'RandomTilt: magnitude'), (lambda: RandomTilt(math.nan), 'RandomTilt: magnitude'),
    (lambda: RandomCrop((1, .3)), 'RandomCrop: scale.*reversed'), (lambda: RandomCrop((0, 1)), 'RandomCrop: scale'), (lambda: RandomCrop((.1, 1.1)), 'RandomCrop: scale'), (lambda: RandomCrop(ratio=(2, 1)), 'RandomCrop: ratio.*reversed'),
    (lambda: RandomBrightness((1.2, .8)), 'RandomBrightness: amount.*reversed'), (lambda: RandomContrast(1.5), 'RandomContrast: amount'), (lambda: RandomSaturation((-1, 1)), 'RandomSaturation: amount'),
    (lambda: RandomErase(scale=(.5, .1)), 'RandomErase: scale.*reversed'), (lambda: RandomErase(2), 'RandomErase: p=2'), (lambda: RandomRotate((math.nan, 1)), 'RandomRotate: degrees'), (lambda: RandomRotate(math.inf), 'RandomRotate: degrees')])
def test_ops(make, match):
    with pytest.raises(ValueError, match=match): make()

def test_the_transform_itself():
    with pytest.raises(TypeError, match='call it'): AugmentBatch([RandomFlip])
    with pytest.raises(TypeError, match='is no op of a batch'): AugmentBatch([ByteToFloat()])
    with pytest.raises(ValueError, match='more than one RandomCrop'): AugmentBatch([RandomCrop(), RandomCrop()])
    for size in 0, -1, (0, 5), (1, 2, 3), 1.5:
        with pytest.raises(ValueError, match='size'): AugmentBatch(size=size)
    with pytest.raises(ValueError, match="mode='linear'"): AugmentBatch(mode='linear')
    with pytest.raises(ValueError, match="padding_mode='mirror'"): AugmentBatch(padding_mode='mirror')
    for norm in ([.5], [0.]), ([.5, .5], [.2]), ([.5], [-1.]):
        with pytest.raises(ValueError, match='norm'): AugmentBatch(norm=norm)
    with pytest.raises(TypeError, match='norm'): AugmentBatch(norm=3)


# --- pictures --------------------------------------------------------------------------------------------------------------------------------

def test_pictures():
    matplotlib = pytest.importorskip('matplotlib'); matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    x = as_bytes(images(1))[0]
    fig = bw.show_augmented(x, AugmentBatch(ALL, 24, norm_imagenette), 7, cols=4)
    assert len(fig.axes) == 8 and sum(bool(ax.images) for ax in fig.axes) == 7
    fig = bw.show_extremes(x, [o for o in ALL if o.n_draws])
    assert sum(bool(ax.images) for ax in fig.axes) == 3*len([o for o in ALL if o.n_draws])
    plt.close('all')


# --- a GPU -----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('kind', ['floats', 'bytes'])
def test_cuda_agrees(kind):
    x = images(16, h=100, w=80)
    x = as_bytes(x) if kind == 'bytes' else x
    for mode in 'bilinear', 'bicubic':
        for size in None, 64, 32:
            tfm = AugmentBatch(ALL, size, norm_imagenette, mode, clip=True)
            d = tfm.draw(x, gen(1))
            d.boxes = None # an edge of a box may fall on a pixel's centre
            torch.testing.assert_close(tfm.apply(x.cuda(), d).cpu(), tfm.apply(x, d), rtol=0, atol=1e-3 if mode == 'bicubic' else 3e-4)
    tfm = AugmentBatch([RandomFlip(), RandomRotate(30), RandomZoom(1.3), RandomTilt(.1), RandomBrightness(), RandomContrast(), RandomSaturation()])
    d = tfm.draw(x, gen(1))
    torch.testing.assert_close(tfm.apply(x.cuda(), d).cpu(), tfm.apply(x, d), rtol=0, atol=1e-4)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_cuda_waits_for_nothing():
    x, tfm = as_bytes(images(16)).cuda(), AugmentBatch(ALL, 24, norm_imagenette)
    tfm(x); torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        y = tfm(x)
        xb, lam = CutMix().mix(y, torch.arange(16, device='cuda'), torch.rand(16, device='cuda'), torch.rand(16, 2, device='cuda'))
        mix_targets(torch.arange(16, device='cuda'), torch.arange(16, device='cuda'), lam, 16)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert y.is_cuda and xb.is_cuda
