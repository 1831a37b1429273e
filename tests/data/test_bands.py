"""Images whose pixels are numbers: written by tifffile, imagecodecs and NumPy, compared with the arrays written."""

import io

import imagecodecs
import numpy
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from convmae.data.bands import scaled, upright
from convmae.data.images import RandomCrop, UndecodableImageError, decode_image, open_image
from convmae.pixels import Decoding

RANGE = (0.0, 4095.0)


def values(shape, low=0, high=4096, dtype=numpy.uint16):
    return numpy.random.default_rng(0).integers(low, high, shape).astype(dtype)


def tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    numpy.save(file, array)
    return file.getvalue()


def decoded(data, channels=3, **options):
    return decode_image(io.BytesIO(data), Decoding(channels, **options))


def in_range(array, low=0.0, high=4095.0):
    """A second formulation: by Python's numbers, (H, W, C) -> (C, H, W)."""
    levels = [min(255, max(0, round((float(value) - low) / (high - low) * 255))) for value in array.flat]
    return torch.tensor(levels, dtype=torch.uint8).view(array.shape).permute(2, 0, 1)


BANDS = values((6, 5, 13))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(tiff(BANDS, photometric="minisblack", planarconfig="contig"), id="pixel after pixel"),
        pytest.param(
            tiff(BANDS.transpose(2, 0, 1).copy(), photometric="minisblack", planarconfig="separate"),
            id="band after band",
        ),
        pytest.param(tiff(BANDS.transpose(2, 0, 1).copy(), photometric="minisblack"), id="a page for each band"),
        pytest.param(tiff(BANDS, photometric="minisblack", planarconfig="contig", compression="lzw"), id="LZW"),
        pytest.param(tiff(BANDS, photometric="minisblack", planarconfig="contig", bigtiff=True), id="BigTIFF"),
        pytest.param(tiff(BANDS, photometric="minisblack", planarconfig="contig", byteorder=">"), id="big-endian"),
        pytest.param(npy(BANDS), id="npy, bands last"),
        pytest.param(npy(BANDS.transpose(2, 0, 1)), id="npy, bands first"),
        pytest.param(npy(BANDS.astype(numpy.float32)), id="npy, float32"),
    ],
)
def test_all_bands_are_read_from_every_layout(data):
    assert torch.equal(decoded(data, 13, pixel_range=RANGE), in_range(BANDS))
    crop = RandomCrop((6, 5), Decoding(13, pixel_range=RANGE), (1.0, 1.0), flip=0.0)
    top, left, height, width, _ = crop.draw(6, 5, 3)
    (sample,) = crop(io.BytesIO(data), None, [3])
    region = in_range(BANDS)[:, top : top + height, left : left + width]
    expected = torch.nn.functional.interpolate(region[None], (6, 5), mode="bicubic", antialias=True)[0]
    assert torch.equal(sample["image"], expected)


@pytest.mark.parametrize("bands", [2, 5])
def test_bands_of_8_bits_stay_as_they_are(bands):
    array = values((6, 5, bands), 0, 256, numpy.uint8)
    for data in (tiff(array, photometric="minisblack", planarconfig="contig"), npy(array)):
        for pixel_range in (None, (0, 50)):
            found = decoded(data, bands, pixel_range=pixel_range)
            assert torch.equal(found, torch.from_numpy(array).permute(2, 0, 1))


def test_four_bands_are_no_transparency():
    array = values((6, 5, 4), 0, 256, numpy.uint8)
    unknown = tiff(array, photometric="rgb", extrasamples=["unspecified"])
    for data in (unknown, npy(array)):
        assert torch.equal(decoded(data, 4), torch.from_numpy(array).permute(2, 0, 1))
        with pytest.raises(UndecodableImageError, match="4"):
            decoded(data, 3)
    assert isinstance(open_image(io.BytesIO(unknown), 4), torch.Tensor)
    assert isinstance(open_image(io.BytesIO(tiff(array, photometric="rgb")), 4), Image.Image)


@pytest.mark.parametrize("photometric", ["minisblack", "rgb"])
@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_no_band_is_lost_or_invented(photometric, channels):
    data = tiff(values((6, 5, 5), 0, 256, numpy.uint8), photometric=photometric, planarconfig="contig")
    with pytest.raises(
        UndecodableImageError, match=f"it has 5 bands, the model takes {channels}: set --in-channels, or convert"
    ):
        decoded(data, channels)


@pytest.mark.parametrize(
    ("data", "channels", "message"),
    [
        (tiff(values((6, 5, 2), 0, 256, numpy.uint8), photometric="minisblack", planarconfig="contig"), 1, "2 bands"),
        (tiff(values((6, 5)), photometric="minisblack"), 5, "it has 1 band, the model takes 5"),
        (tiff(values((7, 6, 5)), photometric="minisblack"), 5, r"it is an array of 7x6x5 \(QYX\)"),
        (npy(values((3, 5, 3))), 3, "whose first and last axes might both be the bands"),
        (npy(values((6, 5, 2))), 3, "neither the first axis nor the last is the model's 3 bands: set --in-channels"),
        (npy(values((2, 6, 5, 3))), 3, "shape 2x6x5x3: save"),
        (npy(values((6, 5))), 13, "it has 1 band, the model takes 13"),
        (npy(numpy.array([["a"]])), 1, "of the type"),
        (npy(numpy.array([[object()]])), 1, "allow_pickle"),
    ],
)
def test_what_does_not_fit_says_so(data, channels, message):
    with pytest.raises(UndecodableImageError, match=message) as error:
        decoded(data, channels)
    assert "\n" not in str(error.value)


def test_usual_files_say_how_many_channels_they_have():
    file = io.BytesIO()
    Image.new("RGB", (5, 6)).save(file, "PNG")
    with pytest.raises(UndecodableImageError, match=r"it has 3 channels \(RGB\), the model takes 13"):
        decoded(file.getvalue(), 13)


def test_a_grey_array_is_grey_in_colours_too():
    array = values((6, 5))
    expected = in_range(array[..., None])
    for channels in (1, 3):
        assert torch.equal(decoded(npy(array), channels, pixel_range=RANGE), expected.expand(channels, -1, -1))


# More than 8 bits


def as_png(array):
    return imagecodecs.png_encode(array)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
@pytest.mark.parametrize("write", [as_png, tiff])
def test_12_of_16_bits_become_256_levels_in_their_range_and_16_without(shape, write):
    array = numpy.linspace(0, 4095, numpy.prod(shape)).round().astype(numpy.uint16).reshape(shape)
    channels = 3 if len(shape) == 3 else 1
    data = write(array)
    expected = array if len(shape) == 3 else array[..., None]
    assert torch.equal(decoded(data, channels, pixel_range=RANGE), in_range(expected))
    high_bytes = torch.from_numpy((expected >> 8).astype(numpy.uint8)).permute(2, 0, 1)
    assert torch.equal(decoded(data, channels), high_bytes)
    assert high_bytes.unique().numel() <= 16


@pytest.mark.parametrize("dtype", [numpy.int16, numpy.int32, numpy.float32])
def test_values_of_other_types_need_a_range(dtype):
    array = values((6, 5), -1000, 3000, dtype)  # as of a CT
    data = tiff(array, photometric="minisblack")
    expected = in_range(array[..., None], -1024.0, 2000.0)
    assert torch.equal(decoded(data, 1, pixel_range=(-1024, 2000)), expected)
    assert torch.equal(decoded(npy(array), 1, pixel_range=(-1024, 2000)), expected)
    for written in (data, npy(array)):
        with pytest.raises(UndecodableImageError, match="no known range: give it with --pixel-range LOW,HIGH"):
            decoded(written, 1)


def test_doubles_and_colours_of_floats_are_read_in_a_range():
    for array in (values((6, 5), dtype=numpy.float64), values((6, 5, 3), dtype=numpy.float32)):
        channels = 1 if array.ndim == 2 else 3
        data = tiff(array, photometric="minisblack" if channels == 1 else "rgb")
        assert torch.equal(decoded(data, channels, pixel_range=RANGE), in_range(array.reshape(6, 5, -1)))
        with pytest.raises(UndecodableImageError, match="no known range"):
            decoded(data, channels)


def test_the_order_of_bytes_does_not_matter():
    array = values((6, 5), 0, 65536)
    expected = torch.from_numpy((array >> 8).astype(numpy.uint8))[None]
    for data in (npy(array.astype(">u2")), npy(array), tiff(array, byteorder=">"), tiff(array, byteorder="<")):
        assert torch.equal(decoded(data, 1), expected)


def test_what_is_no_number_is_refused():
    array = values((6, 5), dtype=numpy.float32)
    array[2, 3] = numpy.nan
    with pytest.raises(UndecodableImageError, match="1 of its 30 values are no finite numbers"):
        decoded(npy(array), 1, pixel_range=RANGE)


@pytest.mark.parametrize("write", [as_png, lambda array: tiff(array, photometric="rgb", extrasamples=["unassalpha"])])
def test_alpha_of_16_bits_has_all_of_them_whatever_the_range_of_colours(write):
    array = numpy.zeros((6, 5, 4), numpy.uint16)
    array[..., :3] = 4095
    array[..., 3] = 0x8080
    found = decoded(write(array), 3, pixel_range=RANGE, background="black")
    assert (found.int() - 128).abs().max() <= 1
    assert decoded(write(array), 4, pixel_range=RANGE)[:, 0, 0].tolist() == [255, 255, 255, 128]


def test_scaling_clips_and_keeps_bytes():
    array = numpy.array([-5.0, 0.0, 1.0, 2.0, 9.0])
    assert scaled(array, (0, 2)).tolist() == [0, 0, 128, 255, 255]
    assert scaled(numpy.array([0, 7, 255], numpy.uint8), (0, 2)).tolist() == [0, 7, 255]
    assert scaled(numpy.array([False, True]), None).tolist() == [0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_are_turned_as_pillow_turns_colours(orientation):
    array = values((6, 5, 3), 0, 256, numpy.uint8)
    image = Image.fromarray(array)
    exif = image.getexif()
    exif[274] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    with Image.open(file) as stored:
        assert numpy.array_equal(upright(array, orientation), numpy.asarray(ImageOps.exif_transpose(stored)))
    bands = values((6, 5, 13), 0, 256, numpy.uint8)
    data = tiff(bands, photometric="minisblack", planarconfig="contig", extratags=[(274, "H", 1, orientation, True)])
    found = decoded(data, 13)
    assert torch.equal(found, torch.from_numpy(upright(bands, orientation).copy()).permute(2, 0, 1))


def test_arrays_have_a_largest_size_too():
    for data in (npy(BANDS), tiff(BANDS, photometric="minisblack", planarconfig="contig")):
        assert decoded(data, 13, max_pixels=30).shape == (13, 6, 5)
        with pytest.raises(UndecodableImageError, match="it has 30 pixels, more than 29: raise --max-pixels"):
            decoded(data, 13, max_pixels=29)


def test_without_the_packages_the_cure_is_named(monkeypatch):
    monkeypatch.setattr("convmae.data.bands.find_spec", lambda name: None)
    for data, channels in (
        (tiff(BANDS, photometric="minisblack", planarconfig="contig"), 13),
        (as_png(values((6, 5, 3))), 3),
    ):
        with pytest.raises(UndecodableImageError, match=r"pip install 'convmae\[bands\]'"):
            decoded(data, channels, pixel_range=RANGE)
