"""Encoded pictures decoded, whole or as the random crop that pretraining sees.

Pillow decodes the pictures, a JPEG at a reduced size where the crop allows it, and only the crop is
resampled. Tensors stay uint8; the device normalises. C channels, H height, W width.

Pictures come out upright (EXIF orientation is applied); of an animation the first frame; without alpha unless
it is asked for; of 16-bit grey the high byte.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from convmae.errors import UserError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's mode
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the crop's sides keep this many times image_size.
_REDUCING_GAP = 2.0

_logger = logging.getLogger(__name__)


class UndecodableImageError(Exception):
    """A picture that cannot be opened or decoded; the message is the reason."""


@contextmanager
def undecodable_if_damaged() -> Iterator[None]:
    """Turn what opening and decoding raise inside into UndecodableImageError."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UndecodableImageError("not an image, or of an unknown format") from error
    except Exception as error:  # on damaged files Pillow's plugins raise errors of many unrelated types
        raise UndecodableImageError(" ".join(str(error).split()) or type(error).__name__) from error


class RandomCrop:
    """An encoded picture's random resized crop, flipped or not, by torch's global generator."""

    def __init__(
        self, image_size: tuple[int, int], in_channels: int = 3, scale: tuple[float, float] = (0.2, 1.0)
    ) -> None:
        """image_size: (H, W) of the crops; in_channels: 1 grey, 3 RGB, 4 RGBA; scale: share of the area."""
        self._mode = pillow_mode(in_channels)
        if min(image_size) < 1 or not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"a crop needs a positive size and 0 < scale <= 1: not {image_size} and {scale}")
        height, width = image_size
        self.image_size = (height, width)
        self._crop = v2.RandomResizedCrop(self.image_size, scale, interpolation=InterpolationMode.BICUBIC)
        self._flip = v2.RandomHorizontalFlip()

    def __call__(self, file: BinaryIO) -> Tensor:
        """An encoded picture -> uint8 (C, H, W); raises UndecodableImageError."""
        with undecodable_if_damaged(), Image.open(file) as image:
            # The header tells the size, so the crop is known before a pixel is decoded.
            crop = self._crop.make_params([image])
            cropped = _decode_crop(image, **crop, mode=self._mode, image_size=self.image_size)
        pixels = functional.pil_to_tensor(cropped)
        return self._flip(functional.resize(pixels, list(self.image_size), InterpolationMode.BICUBIC))


def _decode_crop(
    image: Image.Image, top: int, left: int, height: int, width: int, mode: str, image_size: tuple[int, int]
) -> Image.Image:
    """The crop's pixels, upright and in `mode`, at a reduced size where it still exceeds image_size."""
    # draft() takes the smallest size wanted for the whole image and does nothing unless it is a JPEG. The
    # longer side stands for both, since EXIF may exchange them.
    pixels = max(image_size) * _REDUCING_GAP
    full_width = image.width
    drafted = image.draft(mode, (math.ceil(full_width * pixels / width), math.ceil(image.height * pixels / height)))
    reduction = round(full_width / drafted[1][2]) if drafted else 1
    image.load()
    right, bottom = round((left + width) / reduction), round((top + height) / reduction)
    cropped = image.crop((round(left / reduction), round(top / reduction), right, bottom))
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            cropped = ImageOps.exif_transpose(cropped)
    except Exception as error:  # damaged metadata raise as many types as damaged pixels, and do no harm
        _logger.debug("unreadable EXIF: %s", error)
    return _converted(cropped, mode)


def open_upright(file: BinaryIO, in_channels: int = 3) -> Image.Image:
    """A whole encoded picture, upright, 1 grey, 3 RGB or 4 RGBA; raises UndecodableImageError."""
    mode = pillow_mode(in_channels)
    with undecodable_if_damaged(), Image.open(file) as image:
        return _converted(ImageOps.exif_transpose(image), mode)


def decode_image(file: BinaryIO, in_channels: int = 3) -> Tensor:
    """A whole encoded picture -> uint8 (C, H, W), upright; raises UndecodableImageError."""
    return functional.pil_to_tensor(open_upright(file, in_channels))


def pillow_mode(in_channels: int) -> str:
    """Pillow's name for pictures of so many channels; raises UserError where it has none."""
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
