"""Decoding and random crops, on small files written for the purpose."""

import io
import math
import zlib

import numpy
import pytest
import simplejpeg
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms.v2 import functional

from convmae.data.images import RandomCrop, UndecodableImageError, _log_once, decode_image, without_ends
from convmae.errors import UserError
from convmae.pixels import Decoding

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image, image_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def plain(value, size=(20, 16)):
    """A grey RGB image that its value tells from others."""
    return Image.new("RGB", size, (value, value, value))


def photograph(width, height):
    """A smooth coloured image with no symmetry."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def crop_of(data, image_size=(8, 8), decoding=3, scale=(1.0, 1.0)):
    (sample,) = RandomCrop(image_size, decoding, scale)(io.BytesIO(data), None, [0])
    return sample["image"]


# Decoding


@pytest.mark.parametrize(("size", "tolerance"), [((500, 375), 0.3), ((300, 900), 0.3), ((2000, 1500), 1.0)])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
@pytest.mark.parametrize(("mode", "in_channels"), [("RGB", 3), ("RGB", 1), ("RGB", 4), ("L", 3)])
def test_crops_agree_with_the_plain_bicubic_path(size, tolerance, image_format, mode, in_channels):
    data = encoded(photograph(*size).convert(mode), image_format)
    crop = RandomCrop((224, 192), in_channels)
    whole = Image.open(io.BytesIO(data)).convert({1: "L", 3: "RGB", 4: "RGBA"}[in_channels])
    seeds = [0, 1, 2]
    results = [sample["image"] for sample in crop(io.BytesIO(data), None, seeds)]
    mirrored = set()
    for seed, result in zip(seeds, results, strict=True):
        top, left, height, width, mirror = crop.draw(size[1], size[0], seed)
        box = (left, top, left + width, top + height)
        expected = functional.pil_to_tensor(whole.crop(box).resize((192, 224), Image.Resampling.BICUBIC))
        assert result.shape == (in_channels, 224, 192)
        assert result.dtype == torch.uint8
        assert (result.float() - (expected.flip(2) if mirror else expected)).abs().mean() < tolerance
        mirrored.add(mirror)
    assert mirrored == {False, True}


def test_an_upright_jpeg_of_full_size_has_pillows_pixels():
    data = encoded(photograph(250, 200), "JPEG")
    crop = RandomCrop((200, 250), scale=(1.0, 1.0))
    for sample in crop(io.BytesIO(data), 7, range(4)):
        assert sample.keys() == {"image", "label"}
        assert sample["label"] == 7
        result = sample["image"]
        expected = functional.pil_to_tensor(Image.open(io.BytesIO(data)))
        assert torch.equal(result, expected) or torch.equal(result, expected.flip(2))


@pytest.mark.parametrize("size", [(375, 500), (900, 300), (40, 1000)])
def test_crops_are_distributed_as_torchvisions(size):
    """Two samples of 3000 crops: Kolmogorov and Smirnov's largest distance, of which 0.05 has a p-value of 0.001."""
    scale, ratios = (0.2, 1.0), (3 / 4, 4 / 3)
    crop = RandomCrop((8, 8), scale=scale)
    ours = torch.tensor([crop.draw(*size, seed) for seed in range(3000)], dtype=torch.float64)
    torch.manual_seed(0)
    empty = torch.empty(1, *size)
    theirs = [transforms.RandomResizedCrop.get_params(empty, scale, ratios) for _ in range(3000)]
    theirs = torch.tensor(theirs, dtype=torch.float64)
    both = zip((*ours.T[:4], ours[:, 2] * ours[:, 3]), (*theirs.T, theirs[:, 2] * theirs[:, 3]), strict=True)
    for a, b in both:
        places = torch.cat([a, b]).unique()
        shares = [torch.searchsorted(sample.sort().values, places, right=True) / 3000 for sample in (a, b)]
        assert (shares[0] - shares[1]).abs().max() < 0.05
    assert abs(ours[:, 4].mean() - 0.5) < 0.03


def test_several_crops_are_those_of_single_calls():
    crop = RandomCrop((32, 32))
    for data in (encoded(photograph(100, 80), "JPEG"), encoded(photograph(100, 80))):
        together = crop(io.BytesIO(data), None, [5, 6, 7])
        for seed, view in zip((5, 6, 7), together, strict=True):
            assert torch.equal(view["image"], crop(io.BytesIO(data), None, [seed])[0]["image"])
            assert view.keys() == {"image"}


def test_several_crops_of_a_large_jpeg_share_one_reduced_decoding(monkeypatch):
    decoded = []

    def decode(*arguments, decode_jpeg=simplejpeg.decode_jpeg, **options):
        decoded.append(decode_jpeg(*arguments, **options))
        return decoded[-1]

    monkeypatch.setattr("convmae.data.images.simplejpeg.decode_jpeg", decode)
    data = encoded(photograph(1600, 1200), "JPEG")
    crop = RandomCrop((64, 64))
    views = crop(io.BytesIO(data), None, range(4))
    smallest = min(min(crop.draw(1200, 1600, seed)[2:4]) for seed in range(4))
    (pixels,) = decoded
    reduction = 1600 // pixels.shape[1]
    assert smallest / reduction >= 128 > smallest / (2 * reduction)
    assert len(views) == 4


@pytest.mark.parametrize("damage", ["zeros", "rest"])
def test_a_slightly_damaged_jpeg_is_decoded_as_pillow_does(damage):
    data = bytearray(encoded(photograph(400, 300), "JPEG", quality=95))
    middle = len(data) // 2
    if damage == "zeros":
        data[middle : middle + 50] = bytes(50)
    else:
        data[-2:-2] = bytes(30)  # between the last pixel and the end marker
    expected = functional.pil_to_tensor(Image.open(io.BytesIO(data)))
    result = crop_of(bytes(data), (300, 400))
    assert torch.equal(result, expected) or torch.equal(result, expected.flip(2))


def _grey16(image_format):
    pixels = numpy.full((20, 20), 0x8012, numpy.uint16)
    return encoded(Image.fromarray(pixels), image_format)


def _palette():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, *RED])
    return encoded(image, transparency=bytes([0, 100]))


def _animation(image_format, **options):
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, BLUE)]
    return encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(_grey16("PNG"), (128, 128, 128, 255), id="16-bit PNG"),
        pytest.param(_grey16("TIFF"), (128, 128, 128, 255), id="16-bit TIFF"),
        pytest.param(encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG"), (*RED, 255), id="CMYK JPEG"),
        pytest.param(_palette(), (*RED, 100), id="palette with transparency"),
        pytest.param(encoded(Image.new("L", (20, 20), 77), "JPEG"), (77, 77, 77, 255), id="grey JPEG"),
        pytest.param(encoded(Image.new("LA", (20, 20), (77, 9))), (77, 77, 77, 9), id="grey with alpha"),
        pytest.param(encoded(Image.new("RGBA", (20, 20), (*RED, 9))), (*RED, 9), id="RGBA"),
        pytest.param(encoded(Image.new("1", (20, 20), 1)), (255, 255, 255, 255), id="bilevel"),
        pytest.param(_animation("GIF"), (*RED, 255), id="animated GIF"),
        pytest.param(_animation("WEBP", lossless=True), (*RED, 255), id="animated WebP"),
        pytest.param(encoded(Image.new("RGB", (20, 20), RED), "BMP"), (*RED, 255), id="BMP"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_common_kind_of_file(data, expected):
    colours = torch.tensor(expected, dtype=torch.float)
    opacity = colours[3] / 255
    luma = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
    for background, behind in (("white", 255), ("black", 0), ("grey", 128), ("none", None)):
        seen = colours[:3] if behind is None else opacity * colours[:3] + (1 - opacity) * behind
        for channels, wanted in ((1, (seen * luma).sum()[None]), (3, seen), (4, colours)):
            pixels = crop_of(data, decoding=Decoding(channels, background)).float()
            assert pixels.shape == (channels, 8, 8)
            torch.testing.assert_close(pixels.mean((1, 2)), wanted, atol=2, rtol=0)
            whole = decode_image(io.BytesIO(data), Decoding(channels, background)).float()
            assert whole.shape == (channels, 20, 20)
            torch.testing.assert_close(whole.mean((1, 2)), wanted, atol=2, rtol=0)


def _half_seen(mode):
    """The left half is seen, the right half hides another colour."""
    image = Image.new("RGBA", (20, 20), (*RED, 255))
    image.paste((*BLUE, 0), (10, 0, 20, 20))
    return image if mode == "RGBA" else image.convert(mode)


def _with_transparent_colour(mode, image_format="PNG"):
    """One colour, at the right, is called transparent in the file's header."""
    image = Image.new(mode, (20, 20), RED if mode == "RGB" else 77)
    image.paste(BLUE if mode == "RGB" else 5, (10, 0, 20, 20))
    return encoded(image, image_format, transparency=BLUE if mode == "RGB" else 5)


def _grey16_with_transparent_value():
    pixels = numpy.full((20, 20), 77 * 257, numpy.uint16)
    pixels[:, 10:] = 5 * 257
    chunks = encoded(Image.fromarray(pixels))
    end = chunks.index(b"IDAT") - 4
    body = b"tRNS" + (5 * 257).to_bytes(2)
    return chunks[:end] + (2).to_bytes(4) + body + zlib.crc32(body).to_bytes(4) + chunks[end:]


@pytest.mark.parametrize(
    ("data", "left"),
    [
        pytest.param(encoded(_half_seen("RGBA")), RED, id="RGBA PNG"),
        pytest.param(encoded(_half_seen("RGBA"), "WEBP", lossless=True, exact=True), RED, id="WebP"),
        pytest.param(encoded(_half_seen("RGBA"), "TIFF"), RED, id="TIFF"),
        pytest.param(encoded(_half_seen("RGBA"), "GIF"), RED, id="GIF"),
        pytest.param(encoded(_half_seen("LA")), (76, 76, 76), id="LA PNG"),
        pytest.param(encoded(_half_seen("RGBA").quantize(4)), RED, id="palette PNG"),
        pytest.param(_with_transparent_colour("RGB"), RED, id="tRNS of RGB"),
        pytest.param(_with_transparent_colour("L"), (77, 77, 77), id="tRNS of grey"),
        pytest.param(_grey16_with_transparent_value(), (77, 77, 77), id="tRNS of 16-bit grey"),
    ],
)
def test_what_is_hidden_shows_the_background(data, left):
    for background, value in (("white", 255), ("black", 0), ("grey", 128)):
        crop = RandomCrop((20, 20), Decoding(3, background), (1.0, 1.0), flip=0.0)
        for pixels in (
            decode_image(io.BytesIO(data), Decoding(3, background)),
            crop(io.BytesIO(data), None, [0])[0]["image"],
        ):
            assert pixels[:, :, :9].float().mean((1, 2)).tolist() == pytest.approx(left, abs=2)
            assert pixels[:, :, 11:].unique().tolist() == [value]


def test_without_a_background_pixels_are_timms(tmp_path):
    image = _half_seen("RGBA")
    pixels = decode_image(io.BytesIO(encoded(image)), Decoding(3, "none"))
    assert torch.equal(pixels, functional.pil_to_tensor(image.convert("RGB")))
    assert pixels[2, 0, 15] == 255


def test_the_largest_size_holds_for_one_decoding_alone(monkeypatch):
    data = encoded(plain(9, (20, 16)))
    for limit in (None, 320):
        assert decode_image(io.BytesIO(data), Decoding(max_pixels=limit)).shape == (3, 16, 20)
    for read in (decode_image, lambda file, decoding: RandomCrop((8, 8), decoding)(file, None, [0])):
        with pytest.raises(UndecodableImageError, match="it has 320 pixels, more than 319: raise --max-pixels"):
            read(io.BytesIO(data), Decoding(max_pixels=319))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # from twice as many on Pillow refuses
    with pytest.raises(UndecodableImageError, match="it has 320 pixels, more than 200: raise --max-pixels"):
        decode_image(io.BytesIO(data))
    assert decode_image(io.BytesIO(data), Decoding(max_pixels=320)).shape == (3, 16, 20)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_of_streams_the_first_such_image_is_logged_once(caplog):
    announcing = Decoding(3, "black", announces=True)
    transparent, dim = encoded(_half_seen("RGBA")), encoded(Image.fromarray(numpy.full((4, 5), 4095, numpy.uint16)))
    _log_once.cache_clear()
    with caplog.at_level("WARNING", "convmae"):
        for data in (encoded(plain(9)), encoded(plain(9).convert("RGBA"))):
            decode_image(io.BytesIO(data), announcing)
        assert not caplog.messages
        for data in (transparent, dim, transparent, dim):
            decode_image(io.BytesIO(data), Decoding(3, "black"))
            assert len(caplog.messages) == 0
        for data in (transparent, dim, transparent, dim):
            decode_image(io.BytesIO(data), announcing)
    assert caplog.messages == [
        "images are transparent in part: the background is black (--background)",
        "images of 16 bits are far below their range: give that of your data, such as --pixel-range 0,4095",
    ]


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([1.0, 2.5, 16.0]))
def test_without_its_ends_an_image_keeps_its_middle(height, width, longest):
    top, left, kept_height, kept_width = without_ends(height, width, longest)
    assert (2 * top + kept_height, 2 * left + kept_width) == (height, width)
    assert max(kept_height, kept_width) <= math.ceil(longest * min(height, width)) + 1
    if max(height, width) <= longest * min(height, width):
        assert (top, left) == (0, 0)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("orientation", "red_side"), [(1, "top"), (3, "bottom"), (6, "left"), (8, "right")])
@pytest.mark.parametrize("size", [40, 640])  # the larger JPEG is decoded at a reduced size
def test_exif_orientation_is_applied_once(image_format, orientation, red_side, size):
    # As stored, the red side is where the camera's rotation put it; upright, red is on top.
    image = Image.new("RGB", (size, size), BLUE)
    half = size // 2
    box = {
        "top": (0, 0, size, half),
        "bottom": (0, half, size, size),
        "left": (0, 0, half, size),
        "right": (half, 0, size, size),
    }
    image.paste(RED, box[red_side])
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = crop_of(encoded(image, image_format, exif=exif)).float()
    assert pixels[0, :3].min() > 200 > 50 > pixels[0, 5:].max()
    assert pixels[2, 5:].min() > 200 > 50 > pixels[2, :3].max()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_metadata_do_no_harm():
    data = encoded(plain(50), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffgarbage")
    assert (crop_of(data).float() - 50).abs().max() < 2


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode):
    with pytest.raises(UndecodableImageError, match="convert the file"):
        crop_of(encoded(Image.new(mode, (20, 20)), "TIFF"))


def test_impossible_crops_are_refused():
    with pytest.raises(UserError, match="in_channels cannot be 0"):
        RandomCrop((8, 8), decoding=0)
    with pytest.raises(UserError, match="0 < scale <= 1"):
        RandomCrop((8, 8), scale=(0.5, 2.0))
    with pytest.raises(UserError, match="positive size"):
        RandomCrop((0, 8))
