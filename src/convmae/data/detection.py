"""How images with boxes and masks are varied or fitted for a detector.

C channels, H height, W width, N objects of an image.
"""

import math
import random
from collections.abc import Sequence
from itertools import repeat
from typing import Any, BinaryIO, NamedTuple

import numpy
import torch
from torch import Tensor

from convmae.cropped_masks import cropped_masks
from convmae.data.coco import Annotation
from convmae.data.images import Crop, UnfitAnnotationError, decode_image
from convmae.data.placement import (
    Placement,
    fitting_factor,
    mirrored,
    mirrored_boxes,
    padded_image,
    placed_boxes,
    placed_image,
    random_part,
    shown_lines,
    whole,
)
from convmae.data.samples import Sample
from convmae.errors import UserError
from convmae.pixels import Decoding


class LargeScaleJitter:
    """An annotated image resized by a random factor, then cropped or padded to one size, mirrored or not."""

    def __init__(
        self,
        image_size: tuple[int, int],
        scale: tuple[float, float] = (0.1, 2.0),
        flip: float = 0.5,
        decoding: Decoding | int = 3,
        masks: bool = True,
    ) -> None:
        """image_size: (H, W); scale: range of the factor, of which 1 fits an image into (H, W); flip: probability.

        decoding: what pixels mean, or 1 for grey, 3 for RGB, 4 for RGBA. masks: whether objects have masks; otherwise
        the boxes of the annotations move with the image.
        """
        if min(image_size) < 1 or not 0 < scale[0] <= scale[1] < math.inf or not 0 <= flip <= 1:
            raise UserError(
                f"jitter needs a positive size, 0 < scale, and flip from 0 to 1: not {image_size}, {scale} and {flip}"
            )
        height, width = image_size
        self.image_size, self.decoding = (height, width), Decoding.of(decoding)
        self._scale, self._flip, self._masks = scale, flip, masks

    def __call__(self, file: BinaryIO, annotation: Annotation, seeds: Sequence[int]) -> list[Sample]:
        """An encoded image, decoded once -> a sample for each seed; raises UndecodableImageError.

        {"image": uint8 (C, H, W), "target": {"boxes": float32 (N, 4), left, top, right and bottom in pixels, "labels":
        int64 (N,), "masks": CroppedMasks of the N, "ignored": float32 (M, 4), boxes of what teaches nothing}}. Without
        masks there is no "masks". Objects of which no pixel remains are left out, and boxes of less than a pixel.
        """
        image = _decode_annotated(file, annotation, self.decoding)
        placements = [self.draw(*annotation.size, seed) for seed in seeds]
        lines = [[line.numpy() for line in shown_lines(placement)] for placement in placements]
        boxes = _corners(annotation.boxes)
        seen: list[list[_Seen]] = [[] for _ in placements]
        masks = annotation.masks() if self._masks else repeat(None, len(boxes))
        for number, mask in enumerate(masks):  # one at a time, as those of a large image fill the memory
            for placement, (rows, columns), found in zip(placements, lines, seen, strict=True):
                one = _seen_box(boxes[number], placement) if mask is None else _seen_mask(mask, rows, columns)
                if one is not None:
                    found.append(_Seen(annotation.labels[number], *one))
        ignored = _corners(annotation.ignored)
        return [
            {
                "image": mirrored(
                    padded_image(placed_image(image, placement), self.image_size, self.decoding.padding_colour),
                    placement.crop,
                ),
                "target": self._target(found, placed_boxes(ignored, placement), placement.crop),
            }
            for placement, found in zip(placements, seen, strict=True)
        ]

    def _target(self, seen: Sequence["_Seen"], ignored: Tensor, crop: Crop) -> dict[str, Any]:
        """The target of a sample; seen: what is seen of its objects; ignored: float (M, 4), both not mirrored."""
        height, width = self.image_size
        boxes = torch.tensor([one.box for one in seen], dtype=torch.float32).reshape(-1, 4)
        target = {
            "boxes": mirrored_boxes(boxes, crop, width),
            "labels": torch.tensor([one.label for one in seen], dtype=torch.int64),
            "ignored": mirrored_boxes(ignored[(ignored[:, 2:] > ignored[:, :2]).all(dim=1)], crop, width),
        }
        if not self._masks:
            return target
        known = torch.tensor([one.mask is not None for one in seen], dtype=torch.bool)
        crops = [torch.zeros(0, 0, dtype=torch.uint8) if one.mask is None else one.mask for one in seen]
        places = target["boxes"].long() * known[:, None]  # of a mask, whose box is its own, they are whole
        return {
            **target,
            "masks": cropped_masks([mirrored(mask, crop) for mask in crops], places.tolist(), (height, width)),
        }

    def draw(self, height: int, width: int, seed: int) -> Placement:
        """The part of an image of this size that is seen, and the size to which it is resized."""
        numbers = random.Random(seed)
        factor = numbers.uniform(*self._scale) * fitting_factor((height, width), self.image_size)
        return random_part((height, width), factor, self.image_size, self._flip, numbers)


class ResizeAndPad:
    """A whole image, annotated or not, resized to fit into one size and padded at the right and the bottom."""

    def __init__(self, image_size: tuple[int, int], decoding: Decoding | int = 3) -> None:
        """image_size: (H, W); decoding: what pixels mean, or 1 for grey, 3 for RGB, 4 for RGBA."""
        if min(image_size) < 1:
            raise UserError(f"an image needs a positive size: not {image_size}")
        height, width = image_size
        self.image_size, self.decoding = (height, width), Decoding.of(decoding)

    def __call__(self, file: BinaryIO, annotation: Annotation | None = None) -> Sample:
        """An encoded image -> {"image": uint8 (C, H, W), "size": (h, w), "original_size": (h, w)}.

        "size" is that of the resized image inside the padded one. Raises UndecodableImageError.
        """
        image = _decode_annotated(file, annotation, self.decoding)
        height, width = image.shape[1:]
        placement = whole((height, width), fitting_factor((height, width), self.image_size))
        return {
            "image": padded_image(placed_image(image, placement), self.image_size, self.decoding.padding_colour),
            "size": placement.size,
            "original_size": (height, width),
        }


def _decode_annotated(file: BinaryIO, annotation: Annotation | None, decoding: Decoding) -> Tensor:
    """An encoded image -> uint8 (C, h, w); raises UndecodableImageError, also where annotations tell another size."""
    image = decode_image(file, decoding)
    height, width = image.shape[1:]
    if annotation is not None and annotation.size != (height, width):
        told = f"{annotation.size[1]}x{annotation.size[0]}"
        turned = ", perhaps before its EXIF data turn it" if annotation.size == (width, height) else ""
        raise UnfitAnnotationError(f"it is {width}x{height}, the annotations say {told}{turned}")
    return image


class _Seen(NamedTuple):
    """What is seen of an object in a sample, not mirrored."""

    label: int
    box: tuple[float, float, float, float]
    mask: Tensor | None
    """uint8, inside the box; None of an object that has a box alone."""


def _corners(boxes: Sequence[Sequence[float]]) -> Tensor:
    """Boxes as annotations have them -> left, top, right and bottom, float32 (N, 4)."""
    left, top, width, height = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4).unbind(dim=1)
    return torch.stack([left, top, left + width, top + height], dim=1).float()


def _seen_box(box: Tensor, placement: Placement) -> tuple[tuple[float, float, float, float], None] | None:
    """What is seen of a box (4,); None where it is less than a pixel."""
    left, top, right, bottom = placed_boxes(box[None], placement)[0].tolist()
    return ((left, top, right, bottom), None) if min(right - left, bottom - top) >= 1 else None


def _seen_mask(
    mask: numpy.ndarray, rows: numpy.ndarray, columns: numpy.ndarray
) -> tuple[tuple[float, float, float, float], Tensor] | None:
    """The box and the mask of what these rows and columns of a mask uint8 (h, w) show; None where that is no pixel.

    It is what resizing the whole mask to the nearest pixels shows, but only the object's part is looked at.
    """
    columns_with_some: Any = mask.any(axis=0)
    across = _extent(columns_with_some[columns])
    if across is None:
        return None
    part = mask[:, columns[across]]
    rows_with_some: Any = part.any(axis=1)
    down = _extent(rows_with_some[rows])
    if down is None:
        return None
    part = part[rows[down]]
    inside = _extent(part.any(axis=0))  # columns may have been left with pixels in rows alone that nobody sees
    assert inside is not None
    left, top, right = across.start + inside.start, down.start, across.start + inside.stop
    return (left, top, right, down.stop), torch.from_numpy(numpy.ascontiguousarray(part[:, inside]))


def _extent(flags: Any) -> slice | None:
    """From the first flag that is set to the last, bool (L,); None where none is."""
    places = numpy.flatnonzero(flags)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else None
