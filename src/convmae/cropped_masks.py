"""Masks of objects, each kept only where its object is: thousands in one image would fill the memory as whole ones.

N objects of an image, H its height, W its width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CroppedMasks(NamedTuple):
    """The masks of an image's objects; as a tuple of tensors it moves between processes and devices as they do."""

    pixels: Tensor
    """uint8 (P,), 0 or 1: the mask of each object inside its box, row by row, one object after the other."""
    boxes: Tensor
    """int64 (N, 4): left, top, right and bottom in pixels; the box of an object without a mask has no area."""
    size: tuple[int, int]
    """The image's (H, W)."""

    @property
    def known(self) -> Tensor:
        """Which objects have a mask, bool (N,)."""
        return (self.boxes[:, 2:] > self.boxes[:, :2]).all(dim=1)

    def whole(self, numbers: Sequence[int] | None = None) -> Tensor:
        """The masks of these objects, by default of all, over the whole image: uint8 (len(numbers), H, W)."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        ends, boxes = sides.prod(dim=1).cumsum(0).tolist(), self.boxes.tolist()
        numbers = range(len(boxes)) if numbers is None else numbers
        masks = self.pixels.new_zeros(len(numbers), *self.size)
        for mask, number in zip(masks, numbers, strict=True):
            left, top, right, bottom = boxes[number]
            start = ends[number - 1] if number else 0
            mask[top:bottom, left:right] = self.pixels[start : ends[number]].view(bottom - top, right - left)
        return masks


def cropped_masks(crops: Sequence[Tensor], boxes: Sequence[Sequence[int]], size: tuple[int, int]) -> CroppedMasks:
    """Collect masks uint8 (bottom - top, right - left), one for each box (left, top, right, bottom), of an image."""
    pixels = torch.cat([crop.flatten() for crop in crops]) if crops else torch.zeros(0, dtype=torch.uint8)
    return CroppedMasks(pixels, torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4), size)
