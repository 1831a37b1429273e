"""Where a part of an image is seen in an image of another size: cut out, resized, mirrored, padded.

Images and what lies on them, masks or labels, are moved alike. C channels, h height and w width before, H and W
after.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from convmae.data.images import Crop
from convmae.pixels import Decoding


class Placement(NamedTuple):
    """A part of an image, and the size to which it is resized."""

    crop: Crop
    size: tuple[int, int]
    """Height and width in pixels, (H, W)."""


def fitting_factor(size: tuple[int, int], room: tuple[float, float]) -> float:
    """The factor by which an image of this size is resized to fit into the room, both (height, width)."""
    return min(room[0] / size[0], room[1] / size[1])


def resized(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """(height, width) times the factor, in whole pixels, one at least."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def whole(size: tuple[int, int], factor: float) -> Placement:
    """All of an image of this size, resized by the factor."""
    return Placement(Crop(0, 0, *size, mirrored=False), resized(size, factor))


def random_part(
    size: tuple[int, int], factor: float, room: tuple[int, int], flip: float, numbers: random.Random
) -> Placement:
    """A part at a random place that fills the room once it is resized by the factor, or all of an image that fits in.

    size and room: (height, width); flip: probability of being mirrored.
    """
    # What will be cropped away is not resized. A crop begins and ends at whole pixels of the image.
    (crop_height, new_height), (crop_width, new_width) = (
        (side, wanted) if wanted <= most else (min(side, max(1, round(most / factor))), most)
        for side, wanted, most in zip(size, resized(size, factor), room, strict=True)
    )
    top, left = numbers.randint(0, size[0] - crop_height), numbers.randint(0, size[1] - crop_width)
    return Placement(Crop(top, left, crop_height, crop_width, numbers.random() < flip), (new_height, new_width))


def cut(pixels: Tensor, crop: Crop) -> Tensor:
    """The part of (..., h, w) that a crop covers, not mirrored."""
    return functional.crop(pixels, crop.top, crop.left, crop.height, crop.width)


def placed_image(image: Tensor, placement: Placement) -> Tensor:
    """The part of an image uint8 (C, h, w), resized with antialiasing, not mirrored -> (C, H, W)."""
    region = cut(image, placement.crop)
    return functional.resize(region, list(placement.size), InterpolationMode.BILINEAR, antialias=True)


def placed_map(values: Tensor, placement: Placement) -> Tensor:
    """The part of masks or labels uint8 (h, w), each new pixel that of the nearest, not mirrored -> (H, W)."""
    region = cut(values, placement.crop)[None]
    return functional.resize(region, list(placement.size), InterpolationMode.NEAREST_EXACT)[0]


def shown_lines(placement: Placement) -> tuple[Tensor, Tensor]:
    """Which row and which column of the image `placed_map` takes for those of its result, rising: int64 (H,), (W,)."""
    crop, (height, width) = placement.crop, placement.size
    rows, columns = torch.arange(crop.height).float()[:, None], torch.arange(crop.width).float()[None]
    rows = functional.resize(rows[None], [height, 1], InterpolationMode.NEAREST_EXACT)[0, :, 0]
    columns = functional.resize(columns[None], [1, width], InterpolationMode.NEAREST_EXACT)[0, 0]
    return rows.long() + crop.top, columns.long() + crop.left


def placed_boxes(boxes: Tensor, placement: Placement) -> Tensor:
    """What is seen of boxes float (N, 4), left, top, right and bottom in pixels, not mirrored -> (N, 4).

    A box beyond the part of the image has no width or no height.
    """
    crop, (height, width) = placement.crop, placement.size
    corner, part, sides = (
        torch.tensor(pair * 2, dtype=boxes.dtype)
        for pair in ([crop.left, crop.top], [crop.width, crop.height], [width, height])
    )
    return ((boxes - corner) * sides / part).clamp_min(0).minimum(sides)


def padded_image(image: Tensor, size: tuple[int, int], colour: Sequence[float] | None = None) -> Tensor:
    """uint8 (C, h, w) -> (C, H, W) with a colour at the right and the bottom, by default the mean one."""
    return _padded(image, size, Decoding(len(image)).padding_colour if colour is None else colour)


def padded_map(values: Tensor, size: tuple[int, int], fill: int) -> Tensor:
    """uint8 (h, w) -> (H, W) with `fill` at the right and the bottom."""
    return _padded(values[None], size, (fill,))[0]


def _padded(pixels: Tensor, size: tuple[int, int], fill: Sequence[float]) -> Tensor:
    height, width = pixels.shape[-2:]
    return functional.pad(pixels, [0, 0, size[1] - width, size[0] - height], fill=list(fill))


def mirrored(pixels: Tensor, crop: Crop) -> Tensor:
    """(..., H, W) left to right where the crop is mirrored."""
    return functional.horizontal_flip(pixels) if crop.mirrored else pixels


def mirrored_boxes(boxes: Tensor, crop: Crop, width: int) -> Tensor:
    """Boxes (N, 4) of an image of this width, left to right where the crop is mirrored."""
    left, top, right, bottom = boxes.unbind(dim=1)
    return torch.stack([width - right, top, width - left, bottom], dim=1) if crop.mirrored else boxes
