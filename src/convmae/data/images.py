"""Encoded images decoded, whole or as the random crops that pretraining sees.

Pillow reads the header, from which a crop is drawn, and decodes; upright JPEG files simplejpeg does, which is faster. A
JPEG is decoded at a reduced size where the crop allows it, and only the crop is resampled. Tensors stay uint8; the
device normalises. C channels, H height, W width.

Images come out upright (EXIF orientation is applied); of an animation the first frame. Transparent pixels show the
background, unless alpha is asked for. What a pixel's number means, and how many channels there are, `Decoding` says;
images with bands and more than 8 bits are read in `bands`.
"""

import io
import logging
import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import BinaryIO, NamedTuple

import numpy
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import functional

from convmae.data.bands import (
    Numbers,
    UnfitPixelsError,
    as_image,
    check_size,
    read_numbers,
    scaled,
    too_large,
    wrong_bands,
)
from convmae.data.samples import Sample, labelled
from convmae.errors import UserError
from convmae.pixels import BACKGROUNDS, Decoding

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's mode
_COLOUR_SPACES = {"L": "GRAY", "RGB": "RGB", "RGBA": "RGBA"}  # simplejpeg's names for them
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the crop's sides keep this many times image_size.
_REDUCING_GAP = 2.0
_ASPECT_RATIOS = (3 / 4, 4 / 3)  # of crops, width / height

FAR_BELOW_16_BITS = 2**14
"""Images of 16 bits without a value so large use too little of their range to be read whole."""

_logger = logging.getLogger(__name__)


class UndecodableImageError(Exception):
    """An image that cannot be opened or decoded; the message is the reason."""


class UnfitAnnotationError(UndecodableImageError):
    """An image whose labels or annotations are not its own, or cannot be read; the message is the reason."""


@contextmanager
def undecodable_if_damaged() -> Iterator[None]:
    """Turn what opening and decoding raise inside into UndecodableImageError."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UndecodableImageError("not an image, or of an unknown format") from error
    except Image.DecompressionBombError as error:
        pixels, limit = map(int, re.findall(r"\d+", str(error))[:2])
        raise UndecodableImageError(too_large(pixels, limit)) from error
    except Exception as error:  # on damaged files Pillow's plugins raise errors of many unrelated types
        raise UndecodableImageError(" ".join(str(error).split()) or type(error).__name__) from error


class Crop(NamedTuple):
    """A part of an image as it is stored, in pixels, and whether it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


class RandomCrop:
    """An encoded image's random resized crops, mirrored or not."""

    def __init__(
        self,
        image_size: tuple[int, int],
        decoding: Decoding | int = 3,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
    ) -> None:
        """image_size: (H, W) of the crops; decoding: what pixels mean, or 1 for grey, 3 for RGB, 4 for RGBA.

        scale: share of the area; flip: probability of being mirrored.
        """
        self.decoding = Decoding.of(decoding)
        if min(image_size) < 1 or not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"a crop needs a positive size and 0 < scale <= 1: not {image_size} and {scale}")
        height, width = image_size
        self.image_size = (height, width)
        self._scale, self._flip = scale, flip

    def __call__(self, file: BinaryIO, label: int | None, seeds: Sequence[int]) -> list[Sample]:
        """An encoded image, decoded once, and its class, if it has one -> a sample for each seed.

        {"image": uint8 (C, H, W), "label": the class}, without a class no "label". Raises UndecodableImageError.
        """
        with undecodable_if_damaged():
            encoded = file.read()
            numbers = read_numbers(encoded, self.decoding)
            if numbers is not None:
                pixels = _as_tensor(_from_numbers(numbers, self.decoding))
                return [labelled(view, label) for view in self.views(pixels, seeds)]
            with opened(io.BytesIO(encoded), self.decoding) as image:
                # The header tells the size, so the crops are known before a pixel is decoded.
                crops = [self.draw(image.height, image.width, seed) for seed in seeds]
                regions = _decode_crops(encoded, image, crops, self.decoding, self.image_size)
        return [labelled(self._resized(region, crop), label) for region, crop in zip(regions, crops, strict=True)]

    def views(self, pixels: Tensor, seeds: Sequence[int]) -> list[Tensor]:
        """Crops, uint8 (C, H, W), of an image that is decoded already, uint8 (C, h, w), one for each seed."""
        crops = [self.draw(pixels.shape[1], pixels.shape[2], seed) for seed in seeds]
        return [
            self._resized(
                pixels[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width].permute(1, 2, 0), crop
            )
            for crop in crops
        ]

    def draw(self, height: int, width: int, seed: int) -> Crop:
        """A crop of an image of this size: a share of its area and an aspect ratio, both random, at a random place."""
        numbers = random.Random(seed)
        mirrored = numbers.random() < self._flip
        for _ in range(10):
            area = height * width * numbers.uniform(*self._scale)
            ratio = math.exp(numbers.uniform(*map(math.log, _ASPECT_RATIOS)))
            crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < crop_height <= height and 0 < crop_width <= width:
                break
        else:  # the largest central part whose aspect ratio is allowed
            crop_height = max(1, min(height, round(width / _ASPECT_RATIOS[0])))
            crop_width = max(1, min(width, round(height * _ASPECT_RATIOS[1])))
            top, left = (height - crop_height) // 2, (width - crop_width) // 2
            return Crop(top, left, crop_height, crop_width, mirrored)
        top, left = numbers.randint(0, height - crop_height), numbers.randint(0, width - crop_width)
        return Crop(top, left, crop_height, crop_width, mirrored)

    def _resized(self, region: Tensor, crop: Crop) -> Tensor:
        """A crop's pixels (h, w, C) -> (C, H, W), with the channels last in memory, as torch resizes fast."""
        pixels = region[None].permute(0, 3, 1, 2)
        resized = interpolate(pixels, self.image_size, mode="bicubic", antialias=True)[0]
        return resized.flip(2) if crop.mirrored else resized


def _decode_crops(
    encoded: bytes, image: Image.Image, crops: Sequence[Crop], decoding: Decoding, image_size: tuple[int, int]
) -> list[Tensor]:
    """The crops' pixels (h, w, C), upright, of an image that is open and not decoded yet.

    They are at a reduced size where all still exceed image_size.
    """
    mode = _MODES[decoding.channels]
    # draft() takes the smallest size wanted for the whole image and does nothing unless it is a JPEG. The
    # longer side stands for both, since EXIF may exchange them.
    longest = max(image_size) * _REDUCING_GAP
    full_width = image.width
    wanted_width = math.ceil(full_width * longest / min(crop.width for crop in crops))
    wanted_height = math.ceil(image.height * longest / min(crop.height for crop in crops))
    plain_jpeg = is_plain_jpeg(image)  # which draft() hides
    drafted = image.draft(mode, (wanted_width, wanted_height))
    reduction = round(full_width / drafted[1][2]) if drafted else 1
    boxes = [
        [round(edge / reduction) for edge in (crop.top, crop.left, crop.top + crop.height, crop.left + crop.width)]
        for crop in crops
    ]
    if plain_jpeg:
        try:
            pixels = simplejpeg.decode_jpeg(
                encoded, _COLOUR_SPACES[mode], min_height=image.height, min_width=image.width
            )
        except ValueError as error:  # raised for the least damage: Pillow shall judge it, and find the words
            _logger.debug("simplejpeg does not decode a JPEG: %s", error)
        else:
            return [torch.from_numpy(pixels[top:bottom, left:right]) for top, left, bottom, right in boxes]
    image.load()
    regions = []
    for top, left, bottom, right in boxes:
        region = image.crop((left, top, right, bottom))
        region = _converted(region if _is_upright(image) else ImageOps.exif_transpose(region), decoding)
        regions.append(functional.pil_to_tensor(region).permute(1, 2, 0))
    return regions


def is_plain_jpeg(image: Image.Image) -> bool:
    """Whether an image that is open and not decoded yet is a JPEG of 8 bits, in grey or RGB, and upright."""
    return image.format == "JPEG" and image.mode in ("L", "RGB") and _is_upright(image)


def _is_upright(image: Image.Image) -> bool:
    """Whether the EXIF data ask for no turn; unreadable ones do not."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception as error:  # damaged metadata raise as many types as damaged pixels, and do no harm
        _logger.debug("unreadable EXIF: %s", error)
        return True


@contextmanager
def own_limit(decoding: Decoding) -> Iterator[None]:
    """Inside, Pillow's limit of pixels, which is the process's and holds for crops too, gives way to a decoding's."""
    before = Image.MAX_IMAGE_PIXELS
    if decoding.max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def opened(file: BinaryIO, decoding: Decoding) -> Iterator[Image.Image]:
    """An encoded image that is open and not decoded yet; raises what Pillow does, and for too many pixels ValueError.

    The decoding's limit of pixels holds inside.
    """
    with own_limit(decoding), Image.open(file) as image:
        if decoding.max_pixels is not None:
            check_size(image.height, image.width, decoding)
        if not decoding.of_colours:
            raise wrong_bands(len(image.getbands()), decoding, f"channels ({image.mode})")
        yield image


def open_image(file: BinaryIO, decoding: Decoding | int = 3) -> Image.Image | Tensor:
    """A whole encoded image, upright: grey, RGB or RGBA as Pillow's, bands as uint8 (C, H, W).

    Raises UndecodableImageError.
    """
    decoding = Decoding.of(decoding)
    with undecodable_if_damaged():
        encoded = file.read()
        numbers = read_numbers(encoded, decoding)
        if numbers is not None:
            return _from_numbers(numbers, decoding)
        with opened(io.BytesIO(encoded), decoding) as image:
            return _converted(ImageOps.exif_transpose(image), decoding)


def open_upright(file: BinaryIO, decoding: Decoding | int = 3) -> Image.Image:
    """A whole encoded image of colours, upright, 1 grey, 3 RGB or 4 RGBA; raises UndecodableImageError."""
    image = open_image(file, decoding)
    if isinstance(image, Tensor):
        raise UndecodableImageError("it has bands, which are no colours")
    return image


def decode_image(file: BinaryIO, decoding: Decoding | int = 3) -> Tensor:
    """A whole encoded image -> uint8 (C, H, W), upright; raises UndecodableImageError."""
    return _as_tensor(open_image(file, decoding))


def is_transparent(image: Image.Image) -> bool:
    """Whether an image that is open has a pixel through which something is seen; decodes it where it may have."""
    return image.has_transparency_data and _least_alpha(image.convert("RGBA")) < 255


def without_ends(height: int, width: int, longest: float) -> tuple[int, int, int, int]:
    """The centre of an image, (top, left, height, width), of which no side is `longest` times the other or more.

    What is cut off at both ends is of the same length, so that the middle stays where it was.
    """
    most = math.ceil(longest * min(height, width))
    top, left = max(0, (height - most) // 2), max(0, (width - most) // 2)
    return top, left, height - 2 * top, width - 2 * left


def _as_tensor(image: Image.Image | Tensor) -> Tensor:
    return image if isinstance(image, Tensor) else functional.pil_to_tensor(image)


def _from_numbers(numbers: Numbers, decoding: Decoding) -> Image.Image | Tensor:
    """Numbers of an image as grey, RGB or RGBA, or as bands uint8 (C, H, W)."""
    bands = numbers.values.shape[2]
    if numbers.colours and decoding.of_colours:
        return _converted(as_image(numbers, decoding.pixel_range), decoding)
    if bands == decoding.channels and bands in (1, 3):
        return as_image(numbers, decoding.pixel_range)
    if bands != decoding.channels:
        raise wrong_bands(bands, decoding)
    pixels = numpy.ascontiguousarray(scaled(numbers.values, decoding.pixel_range))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _converted(image: Image.Image, decoding: Decoding) -> Image.Image:
    """The image in Pillow's mode L, RGB or RGBA; raises ValueError where its numbers have no known range."""
    mode = _MODES[decoding.channels]
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled_grey(image, decoding)
    if decoding.announces and mode != "RGBA" and is_transparent(image):
        _say_once(f"images are transparent in part: the background is {decoding.background} (--background)")
    if decoding.background != "none" and mode != "RGBA" and image.has_transparency_data:
        return _composited(image.convert("RGBA"), decoding.background).convert(mode)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _say_once(message: str) -> None:
    """Log a message, once and by one of the loading processes."""
    worker = get_worker_info()
    if worker is None or worker.id == 0:
        _log_once(message)


@cache
def _log_once(message: str) -> None:
    _logger.warning(message)


def _scaled_grey(image: Image.Image, decoding: Decoding) -> Image.Image:
    """A grey image of 16 or 32 bits as one of 8, with alpha where the file calls one value transparent."""
    values, pixel_range = numpy.asarray(image), decoding.pixel_range
    if image.mode.startswith("I;16"):
        values = values.astype(numpy.uint16)  # of whatever byte order
        if decoding.announces and pixel_range is None and values.max(initial=0) < FAR_BELOW_16_BITS:
            _say_once(
                "images of 16 bits are far below their range: give that of your data, such as --pixel-range 0,4095"
            )
    elif pixel_range is None:
        raise UnfitPixelsError(
            "32-bit pixels have no known range: give it with --pixel-range LOW,HIGH, or convert the file to 8 or 16 "
            "bits"
        )
    grey = Image.fromarray(scaled(values, pixel_range))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(numpy.where(values == transparent, 0, 255).astype(numpy.uint8)))
    return grey


def _composited(image: Image.Image, background: str) -> Image.Image:
    """An RGBA image as it is seen on a background."""
    if _least_alpha(image) == 255:
        return image
    value = BACKGROUNDS[background]
    assert value is not None
    return Image.alpha_composite(Image.new("RGBA", image.size, (value, value, value, 255)), image)


def _least_alpha(image: Image.Image) -> int:
    """The least alpha of an RGBA image."""
    least, _ = image.getchannel("A").getextrema()
    return int(least)  # type: ignore[arg-type]
