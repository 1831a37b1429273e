"""Encoded images decoded, whole or as the random crops that pretraining sees.

Pillow reads the header, from which a crop is drawn, and decodes; upright JPEG files simplejpeg does, which is faster. A
JPEG is decoded at a reduced size where the crop allows it, and only the crop is resampled. Tensors stay uint8; the
device normalises. C channels, H height, W width.

Images come out upright (EXIF orientation is applied); of an animation the first frame; without alpha unless
it is asked for; of 16-bit grey the high byte.
"""

import io
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional

from convmae.data.samples import Sample, labelled
from convmae.errors import UserError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's mode
_COLOUR_SPACES = {"L": "GRAY", "RGB": "RGB", "RGBA": "RGBA"}  # simplejpeg's names for them
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the crop's sides keep this many times image_size.
_REDUCING_GAP = 2.0
_ASPECT_RATIOS = (3 / 4, 4 / 3)  # of crops, width / height

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
        self, image_size: tuple[int, int], in_channels: int = 3, scale: tuple[float, float] = (0.2, 1.0)
    ) -> None:
        """image_size: (H, W) of the crops; in_channels: 1 grey, 3 RGB, 4 RGBA; scale: share of the area."""
        self._mode = pillow_mode(in_channels)
        self.in_channels = in_channels
        if min(image_size) < 1 or not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"a crop needs a positive size and 0 < scale <= 1: not {image_size} and {scale}")
        height, width = image_size
        self.image_size = (height, width)
        self._scale = scale

    def __call__(self, file: BinaryIO, label: int | None, seeds: Sequence[int]) -> list[Sample]:
        """An encoded image, decoded once, and its class, if it has one -> a sample for each seed.

        {"image": uint8 (C, H, W), "label": the class}, without a class no "label". Raises UndecodableImageError.
        """
        with undecodable_if_damaged():
            encoded = file.read()
            with Image.open(io.BytesIO(encoded)) as image:
                # The header tells the size, so the crops are known before a pixel is decoded.
                crops = [self.draw(image.height, image.width, seed) for seed in seeds]
                regions = _decode_crops(encoded, image, crops, self._mode, self.image_size)
        return [labelled(self._resized(region, crop), label) for region, crop in zip(regions, crops, strict=True)]

    def draw(self, height: int, width: int, seed: int) -> Crop:
        """A crop of an image of this size: a share of its area and an aspect ratio, both random, at a random place."""
        numbers = random.Random(seed)
        mirrored = numbers.random() < 0.5
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
    encoded: bytes, image: Image.Image, crops: Sequence[Crop], mode: str, image_size: tuple[int, int]
) -> list[Tensor]:
    """The crops' pixels (h, w, C), upright and in `mode`, of an image that is open and not decoded yet.

    They are at a reduced size where all still exceed image_size.
    """
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
        region = _converted(region if _is_upright(image) else ImageOps.exif_transpose(region), mode)
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


def open_upright(file: BinaryIO, in_channels: int = 3) -> Image.Image:
    """A whole encoded image, upright, 1 grey, 3 RGB or 4 RGBA; raises UndecodableImageError."""
    mode = pillow_mode(in_channels)
    with undecodable_if_damaged(), Image.open(file) as image:
        return _converted(ImageOps.exif_transpose(image), mode)


def decode_image(file: BinaryIO, in_channels: int = 3) -> Tensor:
    """A whole encoded image -> uint8 (C, H, W), upright; raises UndecodableImageError."""
    return functional.pil_to_tensor(open_upright(file, in_channels))


def pillow_mode(in_channels: int) -> str:
    """Pillow's name for images of so many channels; raises UserError where it has none."""
    if in_channels not in _MODES:
        raise UserError(f"images have 1 (grey), 3 (RGB) or 4 (RGBA) channels: in_channels cannot be {in_channels}")
    return _MODES[in_channels]


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in Pillow's mode L, RGB or RGBA; raises ValueError where its numbers have no known range."""
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range: convert the file to 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 instead of scaling
        image = Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)
