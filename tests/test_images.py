"""Opening images: every decoder upright, whole, and no larger than needed; Pillow's settings in workers."""
import io, math, pickle, struct
from functools import partial

import numpy as np
import PIL.ExifTags, PIL.Image, PIL.ImageFile
import pytest
import torch
from test_datablock import in_time, same
from test_datacache import folder, noise # noqa: F401 (a fixture)

from dl2lib import images
from dl2lib.datablock import (Dataset, ImageFileError, ImageList, ItemList, MakeRGB, ResizeFixed, Transform, get_dls, image_extensions,
                              make_rgb, to_byte_tensor)
from dl2lib.images import jpeg_decoder, open_bytes, open_image, orientation

pytestmark = pytest.mark.filterwarnings('ignore:.*TorchVision are deprecated')
DECODERS = pytest.mark.parametrize('decoder', [open_image, open_bytes, jpeg_decoder], ids=lambda f: f.__name__)

def image_list(folder, size=8, **kw): return ImageList.from_files(folder, tfms=[make_rgb, ResizeFixed(size), to_byte_tensor], **kw)

def pixels(im): return im if isinstance(im, torch.Tensor) else to_byte_tensor(make_rgb(im))

def smooth(w, h, seed=0):
    "A picture that a JPEG keeps: no two of its eight orientations are alike."
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return PIL.Image.fromarray(small).resize((w, h), PIL.Image.Resampling.BICUBIC)

BACK = [None, None, 'FLIP_LEFT_RIGHT', 'ROTATE_180', 'FLIP_TOP_BOTTOM', 'TRANSPOSE', 'ROTATE_90', 'TRANSVERSE', 'ROTATE_270'] # how a camera stores it

def stored(im, turned, path, **kw):
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = turned
    im = im.transpose(getattr(PIL.Image.Transpose, BACK[turned])) if turned > 1 else im
    im.save(path, exif=exif, **kw)
    return path


# Which files

def test_every_ending_that_pillow_opens_is_an_image_or_needs_another_program():
    PIL.Image.init()
    opened = {e for e, name in PIL.Image.registered_extensions().items() if name in PIL.Image.OPEN}
    assert opened - image_extensions <= set('.eps .ps .wmf .emf .mpg .mpeg .h5 .hdf .grib .bufr .iim'.split())
    assert set('.avif .jp2 .mpo .tga .apng'.split()) <= image_extensions

@pytest.mark.parametrize('ending, fmt', [('.avif', 'AVIF'), ('.jp2', 'JPEG2000'), ('.mpo', 'MPO'), ('.tga', 'TGA'), ('.apng', 'PNG'), ('.qoi', 'QOI'), ('.dds', 'DDS'),
                                         ('.ico', 'ICO'), ('.pcx', 'PCX'), ('.sgi', 'SGI'), ('.dib', 'DIB'), ('.jpe', 'JPEG')])
def test_a_class_in_any_format_that_pillow_decodes_is_listed_and_opened(tmp_path, ending, fmt):
    PIL.Image.init()
    for name in 'a', 'b':
        (tmp_path/name).mkdir()
        smooth(32, 24).save(tmp_path/name/f'1{ending if name == "a" else ".png"}', format=fmt if name == 'a' else 'PNG')
    il = image_list(tmp_path)
    assert sorted(p.parent.name for p in il.items) == ['a', 'b'] and il[0].shape == (3, 8, 8)


# Upright

@pytest.mark.parametrize('turned', range(1, 9))
@DECODERS
def test_a_photograph_is_turned_upright_by_every_decoder(tmp_path, decoder, turned):
    im = smooth(61, 45)
    fn = stored(im, turned, tmp_path/'a.jpg', quality=100, subsampling=0)
    got = pixels(decoder(fn))
    assert got.shape == (3, 45, 61) and (got.int() - to_byte_tensor(im).int()).abs().float().mean() < 2
    raw = pixels(decoder(fn, exif=False))
    assert raw.shape == ((3, 61, 45) if turned > 4 else (3, 45, 61))
    assert ((raw.shape != got.shape) or (raw.int()-got.int()).abs().float().mean() > 5) == (turned > 1)
    assert orientation(fn) == turned and pixels(partial(decoder, exif=False)(fn)).shape == raw.shape

@pytest.mark.parametrize('ending', ['.png', '.webp', '.tif'])
def test_other_formats_are_turned_too(tmp_path, ending):
    im = smooth(61, 45)
    fn = stored(im, 6, tmp_path/f'a{ending}', **(dict(lossless=True) if ending == '.webp' else {}))
    for decoder in open_image, open_bytes, jpeg_decoder: same(pixels(decoder(fn)), to_byte_tensor(im))

def test_what_is_turned_says_so_no_longer(tmp_path):
    fn = stored(smooth(61, 45), 6, tmp_path/'a.jpg')
    im = open_image(fn)
    assert im.getexif().get(PIL.ExifTags.Base.Orientation, 1) == 1
    assert PIL.ImageOps.exif_transpose(im).size == im.size == (61, 45)

@pytest.mark.parametrize('bad', [b'Exif\0\0', b'Exif\0\0MM\0*\xff\xff\xff\xff', b'nonsense', b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0'])
def test_damaged_exif_data_does_not_spoil_the_pixels(tmp_path, bad):
    smooth(61, 45).save(tmp_path/'a.jpg', exif=bad)
    assert orientation(tmp_path/'a.jpg') == 1
    for decoder in open_image, open_bytes, jpeg_decoder: assert pixels(decoder(tmp_path/'a.jpg')).shape == (3, 45, 61)


# No larger than needed

@pytest.mark.parametrize('turned', [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize('size', [(500, 375), (1000, 750), (509, 381), (263, 777)], ids=str)
def test_a_scaled_decoding_gives_the_same_picture(tmp_path, size, turned):
    fn = stored(smooth(*size), turned, tmp_path/'a.jpg', quality=90)
    il = ImageList([fn], tfms=[make_rgb, ResizeFixed((64, 48)), to_byte_tensor])
    small, full = il.get(fn), open_image(fn)
    assert small.width < full.width and small.width >= 1.4*64 and small.height >= 1.4*48
    a, b = il[0].int(), to_byte_tensor(ResizeFixed((64, 48))(make_rgb(full))).int()
    assert (a-b).abs().float().mean() < 1 and (a-b).abs().max() < 12

@pytest.mark.parametrize('tfms', [[ResizeFixed(64)], [MakeRGB(), ResizeFixed(64)], [ResizeFixed(64), make_rgb, to_byte_tensor], (make_rgb, ResizeFixed((64, 64)))],
                         ids=['resize', 'class', 'order', 'tuple'])
def test_it_is_decoded_small_where_the_next_step_resizes(tmp_path, tfms):
    smooth(500, 400).save(tmp_path/'a.jpg')
    il = ImageList([tmp_path/'a.jpg'], tfms=tfms)
    assert il.get(il.items[0]).size == (125, 100) and il.opened(il.items[0]).size == (500, 400)
    assert 'content_box' not in getattr(il[0], 'info', {})

class Half(ResizeFixed): # needs all of the picture
    def __call__(self, im): return super().__call__(im.crop((0, 0, im.width//2, im.height)))

def look(im): return im

@pytest.mark.parametrize('tfms', [None, [], [make_rgb], [look, ResizeFixed(64)], [make_rgb, look, ResizeFixed(64)], [Half(64)], [lambda im: im, make_rgb, ResizeFixed(64)]])
def test_and_whole_where_anything_else_comes_first(tmp_path, tfms):
    smooth(500, 400).save(tmp_path/'a.jpg')
    il = ImageList([tmp_path/'a.jpg'], tfms=tfms)
    assert il.get(il.items[0]).size == (500, 400)

@pytest.mark.parametrize('kw', [dict(format='PNG'), dict(format='JPEG', mode='CMYK'), dict(format='WEBP')], ids=str)
def test_other_formats_are_decoded_whole(tmp_path, kw):
    kw = dict(kw)
    smooth(500, 400).convert(kw.pop('mode', 'RGB')).save(tmp_path/'a', **kw)
    assert open_image(tmp_path/'a', size=(64, 64)).size == (500, 400)

def test_a_decoder_of_the_users_own_is_given_the_path_alone(tmp_path):
    smooth(500, 400).save(tmp_path/'a.jpg')
    def mine(fn): return PIL.Image.open(fn).rotate(90, expand=True)
    assert ImageList([tmp_path/'a.jpg'], tfms=[ResizeFixed(64)], decoder=mine).get(tmp_path/'a.jpg').size == (400, 500)
    assert ImageList([tmp_path/'a.jpg'], tfms=[ResizeFixed(64)], decoder=partial(open_image, exif=False)).get(tmp_path/'a.jpg').size == (125, 100)

def test_the_limit_is_asked_before_the_scale(tmp_path, monkeypatch):
    smooth(500, 400).save(tmp_path/'a.jpg')
    monkeypatch.setattr(PIL.Image, 'MAX_IMAGE_PIXELS', 199_999)
    with pytest.raises(ImageFileError, match='500x400 pixels'): ImageList([tmp_path/'a.jpg'], tfms=[ResizeFixed(8)])[0]


# Pillow's settings reach the workers

@pytest.mark.parametrize('context', ['fork', 'spawn', 'forkserver'])
def test_settings_of_pillow_reach_every_kind_of_worker(tmp_path, monkeypatch, context):
    smooth(200, 150).save(tmp_path/'whole.jpg', quality=95)
    (tmp_path/'cut.jpg').write_bytes((tmp_path/'whole.jpg').read_bytes()[:-1500])
    il = ImageList([tmp_path/'cut.jpg']*4, tfms=[make_rgb, ResizeFixed(16), to_byte_tensor])
    dl, _ = get_dls(Dataset(il, range(4)), None, 2, seed=0, num_workers=1, multiprocessing_context=context)
    with pytest.raises(ImageFileError): list(dl)
    monkeypatch.setattr(PIL.ImageFile, 'LOAD_TRUNCATED_IMAGES', True)  # after the loader was made, as in a later cell
    assert sum(len(y) for _, y in dl) == 4
    monkeypatch.setattr(PIL.Image, 'MAX_IMAGE_PIXELS', 20_000)
    with pytest.raises(ImageFileError, match='than the 20000'): list(dl)

def say_it(i): print(f'worker {i}')

def test_a_worker_init_fn_of_the_users_is_called_too(tmp_path, capfd):
    dl, _ = get_dls(Dataset(range(4), range(4)), None, 2, seed=0, num_workers=1, multiprocessing_context='spawn', worker_init_fn=say_it)
    assert len(list(dl)) == 2
    assert 'worker 0' in capfd.readouterr().out


# The JPEG decoder

def as_bytes(fn): return to_byte_tensor(make_rgb(open_image(fn)))

@pytest.mark.parametrize('mode, kw', [
    *(('RGB', dict(format='JPEG', quality=q, subsampling=s)) for q, s in ((95, 0), (75, 2), (20, 1))), ('RGB', dict(format='JPEG', progressive=True)),
    ('L', dict(format='JPEG')), ('CMYK', dict(format='JPEG')), ('RGB', dict(format='JPEG', exif=b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0')),
    *((m, dict(format='PNG')) for m in ('RGB', 'L', 'P', 'RGBA', 'LA', '1', 'I;16')), ('RGB', dict(format='PNG', transparency=(1, 2, 3))), ('P', dict(format='GIF')),
    ('RGB', dict(format='WEBP', lossless=True)), ('RGBA', dict(format='WEBP')), ('RGB', dict(format='BMP')), ('RGB', dict(format='TIFF')), ('RGB', dict(format='PPM'))])
def test_the_jpeg_decoder_against_pillow(tmp_path, mode, kw):
    im = noise((33, 21), 4)
    im = PIL.Image.fromarray((np.asarray(im.convert('L')).astype(np.uint16)*257)) if mode == 'I;16' else im.convert(mode)
    im.save(tmp_path/'image', **kw)
    a, b = jpeg_decoder(tmp_path/'image'), as_bytes(tmp_path/'image')
    assert a.dtype == torch.uint8 and a.shape == b.shape == ((3, 33, 21) if 'exif' in kw else (3, 21, 33))
    diff = (a.int() - b.int()).abs()
    if kw['format'] == 'JPEG': assert diff.max() <= 4 and diff.float().mean() < .5 # other builds of libjpeg round otherwise
    else: assert diff.max() == 0
    same(jpeg_decoder(str(tmp_path/'image')), a)

def test_the_jpeg_decoder_behind_an_image_list(folder):
    il = image_list(folder, decoder=jpeg_decoder)
    assert il[0].shape == (3, 8, 8) and il[0].dtype == torch.uint8
    diff = torch.stack([(a.int()-b.int()).abs().float().mean() for a, b in zip(il, image_list(folder))])
    assert diff.max() < 1
    pickle.loads(pickle.dumps(il))[0]

def test_the_jpeg_decoder_refuses_what_pillow_refuses(folder, tmp_path, monkeypatch):
    fn = folder/'train'/'c0'/'0.jpg'
    whole = fn.read_bytes()
    for n in [*range(0, len(whole)-2, 7), len(whole)-2, len(whole)-1]:
        (tmp_path/'a.jpg').write_bytes(whole[:n])
        with pytest.raises(ImageFileError, match=r'a\.jpg cannot be read'): ImageList([tmp_path/'a.jpg'], decoder=jpeg_decoder)[0]
    monkeypatch.setattr(PIL.Image, 'MAX_IMAGE_PIXELS', 319)
    with pytest.raises(ImageFileError, match='20x16 pixels are more than the 319'): ImageList([fn], decoder=jpeg_decoder)[0]
    monkeypatch.setattr(PIL.Image, 'MAX_IMAGE_PIXELS', None)
    assert ImageList([fn], decoder=jpeg_decoder)[0].shape == (3, 16, 20)
    huge = bytearray(whole)
    at = next(i for i in range(len(huge)) if huge[i] == 0xff and huge[i+1] in (0xc0, 0xc2))
    huge[at+5:at+9] = b'\xff\xff\xff\xff'
    (tmp_path/'bomb.jpg').write_bytes(huge)
    monkeypatch.undo()
    with pytest.raises(ImageFileError, match='65535x65535 pixels are more'): ImageList([tmp_path/'bomb.jpg'], decoder=jpeg_decoder)[0]

def test_the_jpeg_header_is_read_past_a_thumbnail_and_fill_bytes(tmp_path):
    out = io.BytesIO(); noise((9, 7), 1).save(out, 'JPEG')
    thumb = io.BytesIO(); noise((3, 2), 1).save(thumb, 'JPEG')
    app = thumb.getvalue()
    b = out.getvalue()[:2] + b'\xff\xff\xff\xe5' + struct.pack('>H', len(app)+2) + app + out.getvalue()[2:]
    assert images._jpeg_size(b) == (9, 7, 3)
    (tmp_path/'a').write_bytes(b)
    assert jpeg_decoder(tmp_path/'a').shape == (3, 7, 9)

def test_without_the_operator_torchvisions_function_does_the_same(folder, monkeypatch):
    import torchvision # noqa: F401 - it has to be there before the operators are hidden
    fn = folder/'train'/'c0'/'0.jpg'
    ref, real = jpeg_decoder(fn), images._torchvision_jpeg.__wrapped__
    for ops in type('', (), {}), type('', (), dict(decode_jpeg=type('', (), dict(default=type('', (), dict(_schema=type('', (), dict(arguments=[1])))))))):
        monkeypatch.setattr(torch.ops, 'image', ops, raising=False)
        public = real()
        monkeypatch.undo()
        same(public(torch.frombuffer(bytearray(fn.read_bytes()), dtype=torch.uint8), True), ref)
