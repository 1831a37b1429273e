"""How images with boxes and masks are varied or fitted for a detector.

C channels, H height, W width, N objects of an image.
"""

import math
import random
from collections.abc import Sequence
from typing import BinaryIO

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from convmae.data.coco import Annotation
from convmae.data.images import UnfitAnnotationError, decode_image
from convmae.data.placement import (
    Placement,
    fitting_factor,
    mirrored,
    padded_image,
    padded_map,
    placed_image,
    placed_map,
    random_part,
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
    ) -> None:
        """image_size: (H, W); scale: range of the factor, of which 1 fits an image into (H, W); flip: probability.

        decoding: what pixels mean, or 1 for grey, 3 for RGB, 4 for RGBA.
        """
        if min(image_size) < 1 or not 0 < scale[0] <= scale[1] < math.inf or not 0 <= flip <= 1:
            raise UserError(
                f"jitter needs a positive size, 0 < scale, and flip from 0 to 1: not {image_size}, {scale} and {flip}"
            )
        height, width = image_size
        self.image_size, self.decoding = (height, width), Decoding.of(decoding)
        self._scale, self._flip = scale, flip

    def __call__(self, file: BinaryIO, annotation: Annotation, seeds: Sequence[int]) -> list[Sample]:
        """An encoded image, decoded once -> a sample for each seed; raises UndecodableImageError.

        {"image": uint8 (C, H, W), "target": {"boxes": float32 (N, 4), left, top, right and bottom in pixels, "labels":
        int64 (N,), "masks": uint8 (N, H, W)}}. Objects of which no pixel remains are left out.
        """
        image = _decode_annotated(file, annotation, self.decoding)
        placements = [self.draw(*annotation.size, seed) for seed in seeds]
        masks: list[list[Tensor]] = [[] for _ in placements]
        for mask in annotation.masks():  # one at a time, as those of a large image fill the memory
            for placement, placed in zip(placements, masks, strict=True):
                placed.append(_placed_mask(torch.from_numpy(mask), placement, self.image_size))
        return [
            {
                "image": mirrored(
                    padded_image(placed_image(image, placement), self.image_size, self.decoding.padding_colour),
                    placement.crop,
                ),
                "target": _target(annotation.labels, placed, self.image_size),
            }
            for placement, placed in zip(placements, masks, strict=True)
        ]

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


def _placed_mask(mask: Tensor, placement: Placement, image_size: tuple[int, int]) -> Tensor:
    """uint8 (h, w) -> (H, W)."""
    return mirrored(padded_map(placed_map(mask, placement), image_size, fill=0), placement.crop)


def _target(labels: Sequence[int], masks: Sequence[Tensor], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """The target of a sample, from labels and masks of N objects, uint8 (H, W) each; those without a pixel go."""
    stacked = torch.stack(list(masks)) if masks else torch.zeros(0, *image_size, dtype=torch.uint8)
    kept = stacked.flatten(1).any(dim=1).bool()  # torch keeps uint8
    stacked = stacked[kept]
    inclusive = masks_to_boxes(stacked)  # the last row and column themselves, not their ends
    return {
        "boxes": inclusive + torch.tensor([0.0, 0.0, 1.0, 1.0]),
        "labels": torch.tensor(labels, dtype=torch.int64)[kept],
        "masks": stacked,
    }
