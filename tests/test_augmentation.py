"""Proves that the pictures are what they are said to be: perspectives against numpy and torchvision, tensors against Pillow, identity, flips and quarter
turns against torch; that crops and tilts keep within their ranges on any image; that loaders give the same batches for any number of workers; that
bad input is refused by its name; and that nothing waits for a device."""
import math, pickle, random
from functools import partial

import PIL.Image
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dl2lib.augmentation import (CenterCrop, GeneralCrop, PilRandomDihedral, PilRandomFlip, PilTiltRandomCrop, PilTransform, RandomResizedCrop,
                                 affine_batch, default_crop_size, find_coeffs, find_homographies, homography_grid, np_to_float, process_sz,
                                 rotate_batch, rotation_matrix, sample_grid, uniform, warp, warp_batch)
from dl2lib.state import draws_nothing
from dl2lib.datablock import Dataset, ItemList, get_dls, to_byte_tensor, to_float_tensor

np = pytest.importorskip('numpy')
same = partial(torch.testing.assert_close, rtol=0, atol=0)
near = partial(torch.testing.assert_close, rtol=0)
TRANSFORMS = [PilRandomFlip(0.3), PilRandomDihedral(0.9), GeneralCrop((12, 8), 20), CenterCrop(16, 1.5), RandomResizedCrop(16, (.1, .5), (.5, 2.), 'bicubic'),
              PilTiltRandomCrop((16, 12), 20, .2, 'nearest')]
each_transform = pytest.mark.parametrize('f', TRANSFORMS, ids=lambda f: type(f).__name__)


def smooth(w=96, h=80, mode='RGB'):
    "A picture without edges."
    y, x = np.mgrid[:h, :w]
    planes = [127+90*np.sin(x/17+k)*np.cos(y/13-k) for k in range(3)]
    return PIL.Image.fromarray(np.stack(planes, -1).round().astype(np.uint8)).convert(mode)

def noise(w=40, h=30, seed=0): return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))

def batch(n=3, h=16, w=16, dtype=torch.float32, seed=0):
    x = torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed))
    return (x*255).round().to(dtype) if dtype == torch.uint8 else x.to(dtype)

def quad(rng, w, h, far=.2): # corners near those of an image
    return [(a*w + rng.uniform(-far, far)*w, b*h + rng.uniform(-far, far)*h) for a, b in ((0, 0), (0, 1), (1, 1), (1, 0))]

RECT = (0, 0), (0, 50), (70, 50), (70, 0)


# Perspective

def test_coefficients_are_those_of_numpy_and_torchvision():
    from torchvision.transforms.functional import _get_perspective_coeffs
    rng = random.Random(0)
    for _ in range(50):
        orig, targ = quad(rng, 60, 40), quad(rng, 70, 50)
        eqs = [row for (u, v), (x, y) in zip(orig, targ) for row in ([x, y, 1, 0, 0, 0, -u*x, -u*y], [0, 0, 0, x, y, 1, -v*x, -v*y])]
        want = np.linalg.solve(np.array(eqs), np.array(orig).flatten())
        got = find_coeffs(orig, targ)
        assert len(got) == 8 and all(type(o) is float for o in got)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got, _get_perspective_coeffs(orig, targ), rtol=1e-6, atol=1e-6)

def test_homographies_take_the_corners_where_they_belong():
    rng = random.Random(1)
    orig, targ = (torch.tensor([quad(rng, w, h) for _ in range(9)], dtype=torch.float64) for w, h in ((60, 40), (70, 50)))
    m = find_homographies(orig, targ)
    assert m.dtype == torch.float64 and m.shape == (9, 3, 3)
    q = torch.nn.functional.pad(targ, (0, 1), value=1.) @ m.mT
    near(q[..., :2]/q[..., 2:], orig, atol=1e-9)
    same(find_homographies(orig[:1], RECT), find_homographies(orig[:1], torch.tensor([RECT])))
    near(find_homographies(orig, RECT) @ find_homographies(RECT, targ) / (find_homographies(orig, RECT) @ find_homographies(RECT, targ))[:, 2:, 2:], m, atol=1e-9)

def test_homographies_are_differentiable():
    pts = torch.tensor([quad(random.Random(2), 60, 40)], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: find_homographies(p, RECT), (pts,))

@pytest.mark.parametrize('bad, why', [(((0, 0), (5, 5), (9, 9), (9, 0)), 'on a line'), (((1, 1),)*4, 'on a line'), (((0, 0), (0, 0), (9, 9), (9, 0)), 'on a line'),
                                      (((0, 0), (0, 9), (9, math.nan), (9, 0)), 'finite'), (((0, 0), (0, 9), (9, 9)), 'four points'), ([], 'four points')])
def test_degenerate_corners_are_refused_by_name(bad, why):
    with pytest.raises(ValueError, match=f'orig_pts.*{why}'): find_coeffs(bad, RECT)
    with pytest.raises(ValueError, match=f'targ_pts.*{why}'): find_coeffs(RECT, bad)
    with pytest.raises(ValueError, match=f'src_coords.*{why}'): warp(smooth(), 8, bad)
    with pytest.raises(ValueError, match=f'src_coords.*{why}'): warp_batch(batch(), 8, bad)

def test_the_image_with_degenerate_corners_is_named():
    pts = torch.tensor([RECT]*3, dtype=torch.float64); pts[2, 0] = pts[2, 1]
    with pytest.raises(ValueError, match=r'src_coords\[2\].*on a line'): warp_batch(batch(), 8, pts)
    with pytest.raises(ValueError, match='takes the four points of one image, not of 3'): find_coeffs(torch.tensor([RECT]*3), RECT)

@pytest.mark.parametrize('torn', [((0, 0), (9, 9), (0, 9), (9, 0)), ((0, 0), (0, 9), (3, 3), (9, 0))], ids=['crossing', 'dent'])
def test_an_outline_that_tears_the_picture_is_refused(torn):
    with pytest.raises(ValueError, match='src_coords.*crosses itself or has a dent'): warp(smooth(), 8, torn)
    with pytest.raises(ValueError, match='src_coords.*crosses itself or has a dent'): warp_batch(batch(), 8, torn)

def test_a_mirrored_outline_mirrors():
    im = noise()
    got = warp(im, im.size, ((40, 0), (40, 30), (0, 30), (0, 0)), 'nearest')
    assert got.tobytes() == im.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT).tobytes()

def test_warp_of_all_is_all(): assert warp(noise(), (40, 30), ((0, 0), (0, 30), (40, 30), (40, 0))).tobytes() == noise().tobytes()

def test_warp_that_shrinks_averages():
    im, all_of_it = noise(80, 60), ((0, 0), (0, 60), (80, 60), (80, 0))
    want = im.resize((20, 15), PIL.Image.Resampling.BOX)
    assert np.abs(np.asarray(warp(im, (20, 15), all_of_it), dtype=int) - np.asarray(want, dtype=int)).max() <= 1

@pytest.mark.parametrize('how', [PIL.Image.Resampling.BICUBIC, 'bicubic', 'BICUBIC', 3])
def test_resampling_by_constant_name_or_number(how):
    assert GeneralCrop(8, resample=how).resample == 'bicubic'
    assert warp(smooth(), 32, RECT, how).tobytes() == warp(smooth(), 32, RECT, 'bicubic').tobytes()

def test_resampling_that_is_none():
    for f in lambda: GeneralCrop(8, resample='best'), lambda: warp(smooth(), 8, RECT, 'lanczos'), lambda: PilTiltRandomCrop(8, resample=17):
        with pytest.raises(ValueError, match='resample='): f()


# Tensors and Pillow

@pytest.mark.parametrize('size', [(96, 80), (64, 70)])
def test_the_warp_of_a_batch_is_pillows(size):
    rng, im = random.Random(3), smooth()
    for _ in range(10):
        pts = [(a*.9+4, b*.9+4) for a, b in quad(rng, 96, 80, .04)]
        a = to_byte_tensor(warp(im, size, pts)).float()
        for x in to_byte_tensor(im), to_float_tensor(to_byte_tensor(im)):
            b = warp_batch(x[None], size, pts)[0].float()
            assert (a - (b if x.dtype == torch.uint8 else b*255)).abs().mean() <= 1

def test_each_image_has_its_own_corners():
    rng, x = random.Random(4), batch(4, 20, 30)
    pts = torch.tensor([quad(rng, 30, 20) for _ in range(4)])
    near(warp_batch(x, 12, pts), torch.cat([warp_batch(x[i:i+1], 12, pts[i]) for i in range(4)]), atol=1e-6)

def test_the_perspective_is_torchvisions():
    import torchvision.transforms.v2.functional as T
    rng, x = random.Random(5), to_float_tensor(to_byte_tensor(smooth()))[None]
    for _ in range(5):
        pts = [(round(a), round(b)) for a, b in quad(rng, 96, 80, .1)] # it takes whole numbers
        want = T.perspective(x, startpoints=pts, endpoints=[(0, 0), (0, 80), (96, 80), (96, 0)], interpolation=T.InterpolationMode.BILINEAR)
        assert (warp_batch(x, None, pts)-want).abs().mean() < 1/255

def test_rotation_is_pillows_also_where_an_image_is_not_square():
    im, x = smooth(), to_float_tensor(to_byte_tensor(smooth()))[None]
    m = rotation_matrix(torch.tensor([20.]))*torch.tensor([[1, 80/96, 1], [96/80, 1, 1], [1, 1, 1]])
    got, want = affine_batch(x, m), to_float_tensor(to_byte_tensor(im.rotate(20, PIL.Image.Resampling.BILINEAR)))
    inside = to_byte_tensor(PIL.Image.new('L', im.size, 255).rotate(20))[0] == 255
    assert (got[0]-want)[:, inside].abs().mean() < 1/255


# Exactness

@pytest.mark.parametrize('n', [1, 2, 16, 64, 128])
@pytest.mark.parametrize('rows', [2, 3])
def test_identity_is_exact_at_powers_of_two(n, rows):
    x = batch(2, n, n)
    same(affine_batch(x, torch.eye(3)[None, :rows].repeat(2, 1, 1)), x)
    same(warp_batch(x, None, ((0, 0), (0, n), (n, n), (n, 0))), x)
    same(affine_batch(batch(2, n, n, torch.uint8), torch.eye(3)[None, :rows].repeat(2, 1, 1)), batch(2, n, n, torch.uint8))

@pytest.mark.parametrize('size', [(160, 160), (224, 224), (100, 37)])
def test_identity_elsewhere(size):
    x = batch(2, *size)
    near(affine_batch(x, torch.eye(3).repeat(2, 1, 1)), x, atol=1e-4)
    same(affine_batch(batch(2, *size, torch.uint8), torch.eye(2, 3).repeat(2, 1, 1)), batch(2, *size, torch.uint8))

@pytest.mark.parametrize('n', [64, 100])
def test_flips_and_right_angles(n):
    x = batch(4, n, n)
    check = same if n == 64 else partial(near, atol=1e-4)
    for k, y in enumerate(affine_batch(x, rotation_matrix(torch.tensor([0., 90, 180, 270])))): check(y, torch.rot90(x[k], k, (1, 2)))
    check(affine_batch(x, torch.diag(torch.tensor([-1., 1, 1])).repeat(4, 1, 1)), x.flip(-1))
    check(affine_batch(x, torch.diag(torch.tensor([1., -1, 1])).repeat(4, 1, 1)), x.flip(-2))

def test_rotation_matrices():
    thetas = torch.tensor([0., 90, -90, 180, 450, 720, 33.3, -500], dtype=torch.float64)
    m = rotation_matrix(thetas)
    for t, o in zip(thetas.tolist(), m):
        c, s = math.cos(math.radians(t)), math.sin(math.radians(t))
        near(o, torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64), atol=1e-12)
    assert set(m[:6].flatten().tolist()) == {0., 1., -1.}
    assert thetas[1] == 90 # the caller's own are left alone
    assert rotation_matrix(torch.tensor([90])).dtype == torch.float32
    assert torch.autograd.gradcheck(rotation_matrix, (torch.tensor([10., 100], dtype=torch.float64, requires_grad=True),))
    with pytest.raises(ValueError, match='thetas has shape'): rotation_matrix(torch.tensor(90.))

def test_the_grid_is_affine_grids():
    m = torch.randn(3, 2, 3, dtype=torch.float64)
    near(homography_grid(m, (30, 20)), torch.nn.functional.affine_grid(m, (3, 1, 20, 30), align_corners=False), atol=1e-12)
    last = torch.tensor([[[0., 0, 1]]], dtype=torch.float64).expand(3, -1, -1)
    same(homography_grid(torch.cat([m, last], 1), (30, 20)), homography_grid(m, (30, 20)))


# What comes out

@pytest.mark.parametrize('dtype', [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('f', [lambda x: affine_batch(x, rotation_matrix(torch.tensor([10., 20, 30])), (12, 10)),
                               lambda x: rotate_batch(x, (12, 10), 30, generator=torch.Generator().manual_seed(0)),
                               lambda x: warp_batch(x, (12, 10), ((1, 2), (2, 14), (15, 13), (13, 1)))], ids=['affine', 'rotate', 'warp'])
def test_dtype_size_and_memory_format_stay(f, dtype):
    x, exact = batch(dtype=dtype), f(batch(dtype=dtype).double())
    before = x.clone()
    for given in x, x.contiguous(memory_format=torch.channels_last):
        y = f(given)
        assert y.dtype == dtype and y.shape == (3, 3, 10, 12)
        assert y.is_contiguous(memory_format=torch.channels_last if given is not x else torch.contiguous_format)
        near(y.double(), exact, atol={torch.uint8: .51, torch.float16: 1e-3, torch.bfloat16: 5e-3}.get(dtype, 1e-5))
    same(x, before)

def test_gradients_reach_images_matrices_and_corners():
    x = batch(2, 6, 6, torch.float64).requires_grad_()
    m = (torch.eye(3, dtype=torch.float64)*.83 + .05).repeat(2, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, m: affine_batch(x, m, 5), (x, m))
    pts = torch.tensor(((.6, .4), (.3, 5.1), (5.2, 5.3), (4.9, .7)), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: warp_batch(x, 5, p), (pts,))

def test_modes_and_padding():
    x, m = torch.ones(1, 1, 8, 8), torch.tensor([[[1., 0, 1], [0, 1, 0]]])
    assert affine_batch(x, m)[0, 0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    for padding in 'border', 'reflection': same(affine_batch(x, m, padding_mode=padding), x)
    for mode in 'nearest', 'bicubic': assert affine_batch(batch(), torch.eye(3).repeat(3, 1, 1), mode=mode).shape == (3, 3, 16, 16)

def test_rotate_draws_for_each_image_within_its_range_and_reproducibly():
    x = batch(1, 32, 32).expand(200, -1, -1, -1)
    torch.manual_seed(0); a = rotate_batch(x, None, 30)
    torch.manual_seed(0); same(rotate_batch(x, None, 30), a)
    assert not torch.equal(rotate_batch(x, None, 30), a)
    g = torch.Generator().manual_seed(0)
    same(rotate_batch(x, None, 30, generator=g), a)
    state = torch.get_rng_state()
    rotate_batch(x, None, 30, generator=g)
    same(torch.get_rng_state(), state) # one that is given spares torch's
    assert len({o.numpy().tobytes() for o in a}) == 200
    same(rotate_batch(x, None, 0), x)
    torch.manual_seed(0)
    angles = (torch.rand(200)*2-1)*30
    same(affine_batch(x, rotation_matrix(angles)), a)
    assert angles.min() < -25 and angles.max() > 25


# Transforms of PIL images

@each_transform
def test_transforms_give_new_images_draw_from_python_pickle_and_print(f):
    im = noise()
    before = im.tobytes()
    random.seed(5); torch.manual_seed(1); a = [f(im).tobytes() for _ in range(12)]
    random.seed(5); torch.manual_seed(2); assert [pickle.loads(pickle.dumps(f))(im).tobytes() for _ in range(12)] == a
    assert im.tobytes() == before
    assert draws_nothing(f) == (len(set(a)) == 1) == (type(f) in (GeneralCrop, CenterCrop))
    assert f._order == 11 and repr(eval(repr(f))) == repr(f)

@each_transform
@pytest.mark.parametrize('x, what', [(torch.zeros(3, 8, 8, dtype=torch.uint8), r'tensor uint8 \(3, 8, 8\)'), (np.zeros((8, 8, 3), np.uint8), 'ndarray'), (7, 'int'), (None, 'NoneType')], ids=['tensor', 'array', 'int', 'None'])
def test_what_is_no_pil_image_is_refused(f, x, what):
    with pytest.raises(TypeError, match=f'{type(f).__name__} takes a PIL image, not.*{what}'): f(x)

@pytest.mark.parametrize('mode', ['1', 'P', 'PA'])
def test_modes_that_cannot_be_mixed_are_refused(mode):
    for f in TRANSFORMS[2:]:
        with pytest.raises(ValueError, match=f'mode {mode}'): f(smooth(mode='RGB').convert('L' if mode == 'PA' else mode) if mode != 'PA' else PIL.Image.new('PA', (9, 9)))
    with pytest.raises(TypeError, match='np_to_float'): np_to_float(PIL.Image.new(mode, (9, 9)))

@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'CMYK', 'LA'])
def test_other_modes_stay(mode):
    for f in TRANSFORMS: assert f(PIL.Image.new(mode, (30, 40))).mode == mode

def test_flips():
    random.seed(0)
    im = noise()
    flipped = im.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    seen = [PilRandomFlip(.3)(im).tobytes() for _ in range(2000)]
    assert set(seen) == {im.tobytes(), flipped} and 500 < seen.count(flipped) < 700
    eight = [PilRandomDihedral(.8)(im) for _ in range(4000)]
    eight = [(o.size, o.tobytes()) for o in eight]
    counts = [eight.count(kind) for kind in set(eight)]
    assert len(counts) == 8 and sorted(counts)[0] > 320 and sorted(counts)[6] < 480 and 1080 < max(counts) < 1320 # 1/10 each; as it is, 1/5 and 1/10

def test_np_to_float():
    for im in noise(), smooth(mode='L'): same(np_to_float(im), to_float_tensor(to_byte_tensor(im)))
    same(np_to_float(np.asarray(noise())), np_to_float(noise()))
    assert np_to_float._order == 30 and draws_nothing(np_to_float)
    for bad in np.zeros((3, 3)), np.zeros(3, np.uint8), PIL.Image.new('F', (3, 3)), 'x':
        with pytest.raises(TypeError, match='np_to_float takes an image of 8 bits'): np_to_float(bad)

def test_sizes():
    assert process_sz(8) == process_sz([8]) == process_sz((8, 8)) == (8, 8) and process_sz([8, np.int64(4)]) == (8, 4)
    assert default_crop_size(5, 9) == [5, 5] and default_crop_size(9, 5) == [5, 5]
    for bad in 0, -1, (8, 0), (1, 2, 3), 2.5, '8', None, True, (8, math.nan), []:
        with pytest.raises(ValueError, match='size='): process_sz(bad)
        if bad is not None:
            for f in (lambda: GeneralCrop(bad), lambda: GeneralCrop(8, bad), lambda: CenterCrop(bad), lambda: RandomResizedCrop(bad), lambda: PilTiltRandomCrop(bad),
                      lambda: warp(smooth(), bad, RECT), lambda: affine_batch(batch(), torch.eye(3).repeat(3, 1, 1), bad), lambda: warp_batch(batch(), bad, RECT), lambda: rotate_batch(batch(), bad, 1)):
                with pytest.raises(ValueError, match='size='): f()

def test_crops_take_what_they_say():
    im = noise(40, 30)
    assert GeneralCrop(30)(im).tobytes() == im.crop((5, 0, 35, 30)).tobytes()
    assert GeneralCrop((10, 20), (10, 20))(im).tobytes() == im.crop((15, 5, 25, 25)).tobytes()
    assert GeneralCrop(30, 1000)(im).tobytes() == GeneralCrop(30)(im).tobytes() # shrunk to what fits
    assert CenterCrop((40, 30), 1)(im).tobytes() == im.tobytes()
    assert CenterCrop((20, 15), 2)(im).tobytes() == im.resize((20, 15), PIL.Image.Resampling.BILINEAR, box=(10, 7.5, 30, 22.5)).tobytes()

def test_a_readers_own_crop_gets_whole_numbers():
    class Corner(GeneralCrop):
        def get_corners(self, w, h, wc, hc):
            left = random.randint(0, w-wc)
            return left, 0, left+wc, hc
    assert type(GeneralCrop(8, 20).apply(noise())) is PIL.Image.Image and Corner(8, 20)(noise()).size == (8, 8)
    assert repr(Corner(8, 20)) == "Corner(size=(8, 8), crop_size=(20, 20), resample='bilinear')"

@pytest.mark.parametrize('w, h', [(500, 375), (1000, 100), (100, 1000), (2, 2), (1, 1), (37, 2)])
@pytest.mark.parametrize('scale, ratio', [((.08, 1.), (3/4, 4/3)), ((.05, .1), (.8, 1.25)), ((.1, .1), (1, 1))])
def test_random_resized_crops_keep_within_their_ranges(w, h, scale, ratio):
    f = RandomResizedCrop(8, scale, ratio)
    random.seed(0)
    for _ in range(1000):
        left, top, right, bottom = f.get_corners(w, h, 0, 0)
        assert 0 <= left < right <= w and 0 <= top < bottom <= h
        wc, hc = right-left, bottom-top
        assert ratio[0]-1e-9 <= wc/hc <= ratio[1]+1e-9
        possible = max(min(h*r/w, w/r/h) for r in (*ratio, min(max(w/h, ratio[0]), ratio[1]))) # of the area, by the largest box of a right ratio
        assert min(scale[0], possible)-1e-9 <= wc*hc/(w*h) <= scale[1]+1e-9
    assert f(noise(w, h)).size == (8, 8)

def test_random_resized_crops_fall_back_to_the_largest():
    f = RandomResizedCrop(8, scale=(.9, 1.))
    random.seed(0)
    for w, h, want in (1000, 100, (400/3, 100)), (100, 1000, (100, 400/3)):
        sizes = {tuple(round(o, 6) for o in f.draw_size(w, h)) for _ in range(100)}
        assert sizes == {tuple(round(o, 6) for o in want)}
    assert len({round(f.get_corners(1000, 100, 0, 0)[0]) for _ in range(100)}) > 50 # and lies anywhere

def test_random_resized_crops_use_their_whole_ranges_evenly():
    f = RandomResizedCrop(8, scale=(.1, .3), ratio=(.5, 2.))
    random.seed(0)
    sizes = [f.draw_size(100, 100) for _ in range(4000)]
    areas, logs = sorted(wc*hc/1e4 for wc, hc in sizes), sorted(math.log2(wc/hc) for wc, hc in sizes)
    for vs, lo, hi in (areas, .1, .3), (logs, -1, 1):
        assert all(abs((vs[int(q*4000)]-lo)/(hi-lo) - q) < .04 for q in (.1, .25, .5, .75, .9))

@pytest.mark.parametrize('w, h', [(300, 200), (32, 32), (24, 24), (2, 2), (1, 1), (500, 3)])
@pytest.mark.parametrize('magnitude', [0, .1, .249])
def test_tilts_stay_inside_and_are_as_large_as_asked(w, h, magnitude):
    f = PilTiltRandomCrop(16, 32, magnitude)
    random.seed(0)
    tilts = []
    for _ in range(300):
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = pts = f.draw_corners(w, h)
        assert all(-1e-9 <= x <= w+1e-9 and -1e-9 <= y <= h+1e-9 for x, y in pts)
        wide, high = ((dx-ax)+(cx-bx))/2, ((by-ay)+(cy-dy))/2
        assert abs(wide-high) < 1e-9 and (wide <= 32+1e-9)
        tilts.append(abs(bx-ax)/2/wide)
        find_homographies(pts, RECT)
    assert max(tilts) <= magnitude+1e-9 and max(tilts) >= .9*magnitude
    assert f(noise(w, h)).size == (16, 16)

def test_tilts_show_nothing_from_outside():
    random.seed(0)
    white = PIL.Image.new('L', (24, 20), 255)
    assert all(PilTiltRandomCrop(16, size, .2)(white).getextrema() == (255, 255) for size in (8, 20, 100) for _ in range(50))

@pytest.mark.parametrize('f, name', [
    (lambda: PilRandomFlip(1.5), 'PilRandomFlip.*p=1.5'), (lambda: PilRandomFlip(math.nan), 'p=nan'), (lambda: PilRandomDihedral(-.1), 'PilRandomDihedral.*p=-0.1'), (lambda: PilRandomFlip('x'), "p='x'"),
    (lambda: CenterCrop(8, .5), 'scale=0.5'), (lambda: CenterCrop(8, math.inf), 'scale=inf'), (lambda: RandomResizedCrop(8, (1., .5)), r'scale=\(1.0, 0.5\)'),
    (lambda: RandomResizedCrop(8, (0, 1)), r'scale=\(0, 1\)'), (lambda: RandomResizedCrop(8, (.5, 1.5)), 'at most 1'), (lambda: RandomResizedCrop(8, .5), 'scale='),
    (lambda: RandomResizedCrop(8, ratio=(2, 1)), r'ratio=\(2, 1\)'), (lambda: RandomResizedCrop(8, ratio=(1, math.inf)), 'ratio='), (lambda: RandomResizedCrop(8, ratio=(math.nan, 1)), 'ratio='),
    (lambda: PilTiltRandomCrop(8, magnitude=.25), 'magnitude=0.25'), (lambda: PilTiltRandomCrop(8, magnitude=-.1), 'magnitude=-0.1')])
def test_bad_arguments_are_named(f, name):
    with pytest.raises(ValueError, match=name): f()

def test_uniform():
    random.seed(0)
    vs = [uniform(2, 5) for _ in range(1000)]
    assert 2 <= min(vs) < 2.1 and 4.9 < max(vs) <= 5 and uniform(3, 3) == 3


# Bad input of batch functions

EYE = torch.eye(3).repeat(3, 1, 1)
USES = [lambda x: affine_batch(x, EYE), lambda x: rotate_batch(x, None, 5), lambda x: warp_batch(x, 8, ((0, 0), (0, 8), (8, 8), (8, 0))), lambda x: sample_grid(x, homography_grid(EYE, 8))]

@pytest.mark.parametrize('f', USES, ids=['affine_batch', 'rotate_batch', 'warp_batch', 'sample_grid'])
@pytest.mark.parametrize('x, error, why', [
    (torch.rand(3, 8, 8), ValueError, 'x has shape'), (torch.rand(2, 3, 3, 8, 8), ValueError, 'x has shape'), (torch.rand(0, 3, 8, 8), ValueError, 'x is empty'), (torch.rand(3, 3, 0, 8), ValueError, 'x is empty'),
    (torch.arange(3), TypeError, 'labels'), (torch.ones(3, 3, 8, 8, dtype=torch.long), TypeError, 'x is int64'), (torch.ones(3, 3, 8, 8, dtype=torch.bool), TypeError, 'x is bool'),
    (noise(), TypeError, 'x is Image'), ([1], TypeError, 'x is list')], ids=['rank 3', 'rank 5', 'no image', 'no pixel', 'labels', 'whole numbers', 'bool', 'PIL', 'list'])
def test_bad_images_are_named(f, x, error, why):
    with pytest.raises(error, match=why): f(x)

@pytest.mark.parametrize('m, error, why', [
    (EYE[:2], ValueError, '2 matrices for 3 images'), (torch.eye(3).repeat(4, 1, 1), ValueError, '4 matrices for 3 images'), (torch.eye(3), ValueError, 'm has shape'), (torch.eye(4).repeat(3, 1, 1), ValueError, 'm has shape'),
    (EYE.long(), TypeError, 'm is torch.int64'), ([[1]], TypeError, 'm is list'), (torch.where(torch.arange(27).view(3, 3, 3) == 13, math.nan, EYE), ValueError, r'm\[1\] holds NaN')])
def test_bad_matrices_are_named(m, error, why):
    with pytest.raises(error, match=why): affine_batch(batch(), m)

def test_bad_corners_and_degrees_are_named():
    with pytest.raises(ValueError, match='src_coords has the corners of 2 images, x has 3'): warp_batch(batch(), 8, [RECT]*2)
    with pytest.raises(ValueError, match='takes those of one'): warp(noise(), 8, [RECT]*2)
    for bad in -1, math.nan, math.inf, (10, -10), None:
        with pytest.raises(ValueError, match='degrees='): rotate_batch(batch(), None, bad)


# Loaders

class Pictures(ItemList):
    def get(self, i): return noise(30+i % 7, 40, seed=i)

TFMS = [RandomResizedCrop(16, (.3, 1)), PilRandomFlip(), PilRandomDihedral(), PilTiltRandomCrop(12, 14, .2), to_byte_tensor]

def passes(workers, **kwargs):
    dl, _ = get_dls(Dataset(Pictures(range(24), tfms=TFMS), list(range(24))), None, 8, seed=3, num_workers=workers, **kwargs)
    return [torch.stack([x for x, _ in dl]) for _ in range(2)]

@pytest.fixture(scope='module')
def alone(): return passes(0)

@pytest.mark.parametrize('workers', [1, 2, 4])
def test_batches_are_the_same_for_any_number_of_workers(alone, workers): same(passes(workers), alone)

def test_batches_are_the_same_under_spawn(alone): same(passes(1, multiprocessing_context='spawn'), alone)

def test_each_pass_draws_anew(alone): assert not torch.equal(alone[0].sort(0)[0], alone[1].sort(0)[0])

def test_a_training_on_turned_batches_depends_on_the_seed_alone():
    from dl2lib.callbacks import BatchTransformXCallback, Callback
    from dl2lib.learner import Learner
    from types import SimpleNamespace
    class Keep(Callback):
        _order = 50
        def begin_fit(self): self.train, self.valid = [], []
        def begin_batch(self): (self.train if self.run.in_train else self.valid).append(self.xb.clone())
    def fit(noise_seed):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*8*8, 2))
        ds = Dataset(batch(12, 8, 8), torch.arange(12) % 2)
        turn = partial(rotate_batch, degrees=40)
        turn.valid = lambda x: x
        train_dl, valid_dl = get_dls(ds, ds, 4, seed=1)
        torch.manual_seed(noise_seed)
        Learner(model, SimpleNamespace(train_dl=train_dl, valid_dl=valid_dl), torch.nn.functional.cross_entropy, cbs=[BatchTransformXCallback(turn), keep := Keep()]).fit(2)
        return keep
    a, b = fit(1), fit(2)
    same(a.train, b.train)
    assert len(a.train) == 6
    same(torch.cat(a.valid[:2]), batch(12, 8, 8)) # validation is left as it is


# Promise 8

class Waits(TorchDispatchMode):
    "Counts what asks a device for values: reads of one number, copies to the host."
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        to = str(kwargs.get('device') or args[0].device) if name == '_to_copy' else None
        self.n += name == '_local_scalar_dense' or to == 'cpu' != args[0].device.type
        return func(*args, **kwargs)

@pytest.mark.parametrize('device', ['cpu', 'meta']) # a tensor of meta has no values: to ask for one is an error
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32], ids=str)
def test_nothing_waits_for_the_device(device, dtype):
    x = batch(dtype=dtype).to(device)
    with Waits() as waits:
        for f in USES[:3]: assert f(x).device.type == device
    assert waits.n == 0
    with Waits() as waits: torch.ones(2).sum().item()
    assert waits.n == 1 # the counter counts

def test_maps_on_the_device_are_not_looked_into():
    x = batch().to('meta')
    assert affine_batch(x, EYE.to('meta'), 8).shape == (3, 3, 8, 8)
    with pytest.raises(ValueError, match='src_coords lies on meta.*CPU'): warp_batch(x, 8, torch.zeros(4, 2, device='meta'))

@pytest.mark.cuda
def test_cuda_gives_what_the_cpu_gives():
    rng = random.Random(6)
    pts = torch.tensor([quad(rng, 40, 30, .1) for _ in range(5)])
    for dtype in torch.float32, torch.uint8:
        x = batch(5, 30, 40, dtype)
        for f in (lambda x: rotate_batch(x, 24, 30, generator=torch.Generator().manual_seed(0)), lambda x: warp_batch(x, (20, 24), pts, padding_mode='border'),
                  lambda x: affine_batch(x, rotation_matrix(torch.arange(5.)*20))):
            torch.cuda.set_sync_debug_mode('error') # whatever waits is an error
            try: y = f(x.to('cuda', non_blocking=True))
            finally: torch.cuda.set_sync_debug_mode('default')
            assert y.device.type == 'cuda' and y.dtype == dtype
            near(y.cpu().float(), f(x).float(), atol=1e-4 if dtype == torch.float32 else 1)
