"""Images whose pixels are numbers rather than 8-bit colours: bands, 16 and 32 bits, arrays.

Pillow reads the others. tifffile and imagecodecs read what Pillow would cut to 8 bits or to the first bands. C bands,
H height, W width.
"""

import io
from importlib.util import find_spec
from typing import NamedTuple

import numpy
from numpy.lib import format as npy_format
from PIL import Image, TiffImagePlugin

from convmae.pixels import Decoding

_SAMPLES, _EXTRA, _BITS, _FORMAT, _PHOTOMETRIC, _ORIENTATION = 277, 338, 258, 339, 262, 274  # tags of TIFF
_UNKNOWN, _PREMULTIPLIED = 0, 1  # kinds of extra samples in TIFF
_RGB = 2  # TIFF's photometric interpretation
_COLOUR_PNG = (2, 4, 6)  # PNG's types of RGB, of grey with alpha, of RGBA
_CURE = "give it with --pixel-range LOW,HIGH, or convert the file to 8 or 16 bits"


class UnfitPixelsError(ValueError):
    """Pixels that are sound, and not what the model takes; the message says what they are and what to do."""


class Numbers(NamedTuple):
    """The pixels of an image as its file holds them."""

    values: numpy.ndarray
    """(H, W, C), upright."""
    colours: bool = False
    """Whether they are grey or RGB, perhaps with alpha, rather than bands."""
    premultiplied: bool = False
    """Whether the colours are multiplied by their alpha already."""


def read_numbers(encoded: bytes, decoding: Decoding) -> Numbers | None:
    """The pixels of an encoded image that Pillow would not read whole, None where it does.

    Raises UnfitPixelsError for another number of bands than `decoding` asks for, and whatever libraries raise.
    """
    if encoded.startswith(npy_format.MAGIC_PREFIX):
        return _read_array(encoded, decoding)
    if encoded[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _read_tiff(encoded, decoding)
    if decoding.pixel_range and encoded.startswith(b"\x89PNG") and encoded[24:25] == b"\x10":
        return _read_png(encoded, decoding) if encoded[25] in _COLOUR_PNG else None
    return None


def scaled(values: numpy.ndarray, pixel_range: tuple[float, float] | None) -> numpy.ndarray:
    """Values of any type to uint8, the range's lower end to 0, its upper one to 255, the nearest of what is between.

    pixel_range: of values of more than 8 bits; those of 8 bits stay. Without one, of 16 bits the high byte is taken.
    Raises UnfitPixelsError for values of unknown range, ValueError for some that are no numbers.
    """
    values = native(values)
    if values.dtype == numpy.uint8:
        return values
    if values.dtype == bool:
        return values.astype(numpy.uint8) * 255
    if values.dtype.kind not in "uif":
        raise UnfitPixelsError(f"its pixels are of the type {values.dtype}: convert the file to 8 or 16 bits")
    if pixel_range is None:
        if values.dtype != numpy.uint16:
            bits = 8 * values.dtype.itemsize
            raise UnfitPixelsError(f"{bits}-bit pixels of the type {values.dtype} have no known range: {_CURE}")
        return (values >> 8).astype(numpy.uint8)
    if values.dtype.kind == "f" and not numpy.isfinite(values).all():
        count = int((~numpy.isfinite(values)).sum())
        raise ValueError(f"{count} of its {values.size} values are no finite numbers: replace them in the file")
    low, high = pixel_range
    wide = numpy.float64 if values.dtype.itemsize > 2 else numpy.float32
    steps: numpy.ndarray = numpy.subtract(values, low, dtype=wide) * wide(255 / (high - low))
    return numpy.rint(steps.clip(0, 255)).astype(numpy.uint8)


def native(values: numpy.ndarray) -> numpy.ndarray:
    """The same values in the machine's order of bytes, by which types are compared."""
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def as_image(numbers: Numbers, pixel_range: tuple[float, float] | None) -> Image.Image:
    """Grey or RGB numbers, with alpha or not, as an image of 8 bits; alpha has the whole range of its type."""
    values = numbers.values
    if values.shape[2] in (2, 4):
        alpha = values[..., -1:]
        full = (0, numpy.iinfo(values.dtype).max) if values.dtype.kind in "ui" else (0.0, 1.0)
        values = numpy.concatenate([scaled(values[..., :-1], pixel_range), scaled(alpha, full)], axis=2)
    else:
        values = scaled(values, pixel_range)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[values.shape[2]]
    height, width = values.shape[:2]
    if numbers.premultiplied:
        mode = mode.replace("A", "a")
    image = Image.frombytes(mode, (width, height), numpy.ascontiguousarray(values).tobytes())
    return image.convert(mode.upper()) if numbers.premultiplied else image


def check_size(height: int, width: int, decoding: Decoding) -> None:
    """Raise ValueError, which names the option, for more pixels than are allowed."""
    limit = decoding.max_pixels
    if limit is None and Image.MAX_IMAGE_PIXELS is not None:
        limit = 2 * Image.MAX_IMAGE_PIXELS  # from which on Pillow refuses
    if limit is not None and height * width > limit:
        raise UnfitPixelsError(too_large(height * width, limit))


def too_large(pixels: int, limit: int) -> str:
    """What is said of an image with more pixels than the limit."""
    return f"it has {pixels} pixels, more than {limit}: raise --max-pixels if you trust the file and have the memory"


def wrong_bands(bands: int, decoding: Decoding, what: str = "bands") -> UnfitPixelsError:
    """What is raised for another number of bands than a model takes."""
    found = f"{bands} {what}" if bands != 1 else f"1 {what.removesuffix('s')}"
    return UnfitPixelsError(
        f"it has {found}, the model takes {decoding.channels}: set --in-channels, or convert the file"
    )


def _read_array(encoded: bytes, decoding: Decoding) -> Numbers:
    """A NumPy array (H, W), (H, W, C) or (C, H, W)."""
    file = io.BytesIO(encoded)
    version = npy_format.read_magic(file)
    header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape = header(file)[0]
    told = "x".join(map(str, shape))
    channels = decoding.channels
    if len(shape) == 2:
        axis, bands = None, 1
    elif len(shape) != 3:
        raise UnfitPixelsError(f"its array has the shape {told}: save (H, W), (H, W, C) or (C, H, W)")
    else:
        # Of 1 band, too, since a grey image fits every model that takes colours.
        fitting = [axis for axis in (0, 2) if shape[axis] in ({channels, 1} if decoding.of_colours else {channels})]
        exact = [axis for axis in fitting if shape[axis] == channels]
        fitting = exact or fitting
        if len(fitting) == 2:
            raise UnfitPixelsError(
                f"its array has the shape {told}, whose first and last axes might both be the bands: save it as "
                "(H, W, C) in a TIFF file"
            )
        if not fitting:
            raise UnfitPixelsError(
                f"its array has the shape {told}, of which neither the first axis nor the last is the model's "
                f"{channels} {'bands' if channels > 1 else 'band'}: set --in-channels, or convert the file"
            )
        axis = fitting[0]
        bands = shape[axis]
    if 0 in shape:
        raise ValueError(f"its array has the shape {told}, it is empty")
    if bands not in (channels, 1) or (bands == 1 and not (channels == 1 or decoding.of_colours)):
        raise wrong_bands(bands, decoding)
    size = [length for place, length in enumerate(shape) if place != axis]
    check_size(size[0], size[1], decoding)
    file.seek(0)
    values = numpy.load(file, allow_pickle=False)
    values = values[..., None] if axis is None else numpy.moveaxis(values, axis, 2)
    return Numbers(values, colours=bands == 1)


def _read_tiff(encoded: bytes, decoding: Decoding) -> Numbers | None:
    """A TIFF file; None where Pillow reads all of its first page."""
    tags = _tags(encoded)
    samples = int(tags.get(_SAMPLES, 1))
    extra = _several(tags.get(_EXTRA, ()))
    bits = max(_several(tags.get(_BITS, (1,))))
    colours = samples - len(extra) in (1, 3) and _UNKNOWN not in extra and len(extra) <= 1
    if decoding.of_colours and colours and bits != 64 and (samples == 1 or bits <= 8):
        return None
    if decoding.of_colours and colours and bits == 16 and decoding.pixel_range is None:
        return None  # of which Pillow takes the high byte, as of a single sample
    if samples == 4 and not extra and tags.get(_PHOTOMETRIC) != _RGB and bits <= 8:
        if decoding.of_colours:
            return None  # CMYK
        raise wrong_bands(samples, decoding, "channels (CMYK)")
    if decoding.of_colours and not colours and samples != decoding.channels:
        raise wrong_bands(samples, decoding)
    _check_reader("tifffile", f"it has {samples} samples of {bits} bits, which TIFF files with bands have")
    import tifffile

    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        page = file.pages.first
        check_size(page.imagelength, page.imagewidth, decoding)
        if samples > 1:
            values, axes = page.asarray(), page.axes
        else:  # bands may be pages
            series = file.series[0]
            if numpy.prod(series.shape) > page.imagelength * page.imagewidth * decoding.channels:
                raise _pages(series, decoding)
            values, axes = series.asarray(), series.axes
        kept = [place for place, axis in enumerate(axes) if axis in "YX" or values.shape[place] > 1]
        axes = "".join(axes[place] for place in kept)
        values = values.reshape([values.shape[place] for place in kept])
        others = [place for place, axis in enumerate(axes) if axis not in "YX"]
        if len(others) > 1:
            raise _pages(file.series[0], decoding)
        values = numpy.moveaxis(values, others[0], 2) if others else values[..., None]
    bands = values.shape[2]
    if bands != decoding.channels and not (colours and decoding.of_colours):
        raise wrong_bands(bands, decoding)
    is_colours = colours and decoding.of_colours and samples == bands
    premultiplied = is_colours and _PREMULTIPLIED in extra
    return Numbers(upright(values, int(tags.get(_ORIENTATION, 1))), is_colours, premultiplied)


def _read_png(encoded: bytes, decoding: Decoding) -> Numbers:
    """A PNG file with colours of 16 bits, of which Pillow takes the high bytes."""
    _check_reader("imagecodecs", "reading colours of 16 bits in a --pixel-range")
    import imagecodecs

    with Image.open(io.BytesIO(encoded)) as image:
        check_size(image.height, image.width, decoding)
        orientation = image.getexif().get(_ORIENTATION, 1)
    values = imagecodecs.png_decode(encoded)
    return Numbers(upright(values, orientation), colours=True)


def pages_of_tiff(encoded: bytes) -> int:
    """How many pages a TIFF file has."""
    with Image.open(io.BytesIO(encoded)) as image:
        return getattr(image, "n_frames", 1)


def upright(values: numpy.ndarray, orientation: int) -> numpy.ndarray:
    """(H, W, C) turned and mirrored as EXIF's number of an orientation asks; unknown numbers ask for nothing."""
    match orientation:
        case 2:
            return values[:, ::-1]
        case 3:
            return values[::-1, ::-1]
        case 4:
            return values[::-1]
        case 5:
            return values.swapaxes(0, 1)
        case 6:
            return numpy.rot90(values, -1)
        case 7:
            return values[::-1, ::-1].swapaxes(0, 1)
        case 8:
            return numpy.rot90(values)
        case _:
            return values


def _tags(encoded: bytes) -> TiffImagePlugin.ImageFileDirectory_v2:
    """The tags of a TIFF file's first page; Pillow itself fails at some numbers of samples."""
    file = io.BytesIO(encoded)
    header = file.read(16 if encoded[2:4] in (b"+\0", b"\0+") else 8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    return tags


def _several(value: object) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (int(value),)  # type: ignore[call-overload]


def _pages(series: object, decoding: Decoding) -> UnfitPixelsError:
    shape, axes = "x".join(map(str, series.shape)), series.axes  # type: ignore[attr-defined]
    return UnfitPixelsError(
        f"it is an array of {shape} ({axes}), the model takes {decoding.channels} bands: set --in-channels, or convert "
        "the file"
    )


def _check_reader(package: str, need: str) -> None:
    if find_spec(package) is None:
        raise UnfitPixelsError(f"{need}: pip install 'convmae[bands]'")
