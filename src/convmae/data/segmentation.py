"""How images with a class for each pixel are varied or fitted for a segmenter.

C channels, H height, W width.
"""

import math
import random
from collections.abc import Sequence
from typing import BinaryIO

import torch
from torch import Tensor
from torchvision.transforms import v2

from convmae.data.images import decode_image
from convmae.data.label_maps import LabelMap
from convmae.data.placement import (
    Placement,
    cut,
    fitting_factor,
    mirrored,
    padded_image,
    padded_map,
    placed_image,
    placed_map,
    random_part,
    whole,
)
from convmae.data.samples import Sample, Unstacked, labelled
from convmae.errors import UserError
from convmae.labels import IGNORED
from convmae.pixels import Decoding
from convmae.seeds import seeded

_LONGEST_SIDE = 4  # times the shorter side; beyond that an image is resized by its longer one
_MOST_DRAWS = 10  # of a crop's place


class RandomScaleCrop:
    """A labelled image resized by a random factor, of which a part is cropped or padded to one size, and varied."""

    def __init__(
        self,
        image_size: tuple[int, int],
        scale: tuple[float, float] = (0.5, 2.0),
        largest_share: float = 0.75,
        flip: float = 0.5,
        distortion: float = 0.5,
        decoding: Decoding | int = 3,
    ) -> None:
        """image_size: (H, W); scale: range of the factor, at 1 the shorter sides are equal; flip: probability.

        largest_share: which no class should reach in a crop, 1 for any; distortion: probability of each change of the
        colours, which images with bands do not have. decoding: what pixels mean, or 1 for grey, 3 for RGB, 4 for RGBA.
        """
        if min(image_size) < 1 or not 0 < scale[0] <= scale[1] < math.inf:
            raise UserError(f"a crop needs a positive size and 0 < scale: not {image_size} and {scale}")
        if not (0 < largest_share <= 1 and 0 <= flip <= 1 and 0 <= distortion <= 1):
            raise UserError(
                "largest_share is above 0, flip and distortion from 0 on, none above 1: not "
                f"{largest_share}, {flip} and {distortion}"
            )
        height, width = image_size
        self.image_size, self.decoding = (height, width), Decoding.of(decoding)
        self._scale, self._largest_share, self._flip = scale, largest_share, flip
        varied = distortion and self.decoding.of_colours
        self._distort = _photometric_distortion(distortion) if varied else None

    def __call__(self, file: BinaryIO, annotation: LabelMap, seeds: Sequence[int]) -> list[Sample]:
        """An encoded image, decoded once -> a sample for each seed; raises UndecodableImageError.

        {"image": uint8 (C, H, W), "label": each pixel's, uint8 (H, W)}; what is padded is IGNORED.
        """
        image = decode_image(file, self.decoding)
        height, width = image.shape[1:]
        labels = annotation.read((height, width))
        samples = []
        for seed in seeds:
            placement = self.draw(labels, seed)
            seen = self._distorted(mirrored(placed_image(image, placement), placement.crop), seed)
            classes = mirrored(placed_map(labels, placement), placement.crop)
            samples.append(
                {
                    "image": padded_image(seen, self.image_size, self.decoding.padding_colour),
                    "label": padded_map(classes, self.image_size, IGNORED),
                }
            )
        return samples

    def draw(self, labels: Tensor, seed: int) -> Placement:
        """The part of an image with these labels (h, w) that is seen, and the size to which it is resized.

        Its place is drawn until no class has too large a share, ten times at most.
        """
        numbers = random.Random(seed)
        height, width = labels.shape
        factor = _factor((height, width), numbers.uniform(*self._scale) * min(self.image_size))
        for _ in range(_MOST_DRAWS):
            placement = random_part((height, width), factor, self.image_size, self._flip, numbers)
            if self._largest_share == 1 or _largest_share(cut(labels, placement.crop)) < self._largest_share:
                break
        return placement

    def _distorted(self, image: Tensor, seed: int) -> Tensor:
        """The same image, uint8 (C, H, W), in other colours."""
        if self._distort is None:
            return image
        with seeded(seed):
            colours = self._distort(image[:3])
        return torch.cat([colours, image[3:]])  # transparency stays


class ResizeShorterSide:
    """A whole image, labelled or not, resized once or at several scales; its labels stay as they are."""

    def __init__(self, shorter_side: int, decoding: Decoding | int = 3, scales: Sequence[float] = (1.0,)) -> None:
        """shorter_side: pixels, and the longer side at most four times as many; scales: factors of it, one a view.

        decoding: what pixels mean, or 1 for grey, 3 for RGB, 4 for RGBA.
        """
        if shorter_side < 1 or not scales or not all(0 < scale < math.inf for scale in scales):
            raise UserError(
                f"resizing needs a positive shorter side and positive scales: not {shorter_side} and {list(scales)}"
            )
        self.shorter_side, self.decoding, self.scales = shorter_side, Decoding.of(decoding), tuple(scales)

    def __call__(self, file: BinaryIO, annotation: LabelMap | None = None) -> Sample:
        """An encoded image -> its views, and the labels of its pixels.

        {"image": uint8 (C, h, w) of each scale, "label": Unstacked uint8 (H, W), "original_size": (H, W)}, without an
        annotation no "label". Raises UndecodableImageError.
        """
        image = decode_image(file, self.decoding)
        height, width = image.shape[1:]
        factors = [_factor((height, width), round(self.shorter_side * scale)) for scale in self.scales]
        views = [placed_image(image, whole((height, width), factor)) for factor in factors]
        label = None if annotation is None else Unstacked(annotation.read((height, width)))
        return {**labelled(views, label), "original_size": (height, width)}


def _factor(size: tuple[int, int], shorter_side: float) -> float:
    """The factor by which an image is resized to this shorter side, less where its longer one would be too long."""
    height, width = size
    longer_side = _LONGEST_SIDE * shorter_side
    return fitting_factor(size, (longer_side, shorter_side) if height > width else (shorter_side, longer_side))


def _largest_share(labels: Tensor) -> float:
    """The share of the most frequent class among all pixels that have one; 1 where none has."""
    counts = labels.flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


def _photometric_distortion(probability: float) -> v2.Transform:
    """Brightness, contrast, saturation and hue of uint8 (1 or 3, H, W), each changed with this probability.

    Contrast comes before or after saturation and hue, as published; torchvision's own transform exchanges the colours,
    too. Grey knows neither saturation nor hue.
    """
    brightness, contrast, saturation, hue = (
        v2.RandomApply([jitter], probability)
        for jitter in (
            v2.ColorJitter(brightness=32 / 255),
            v2.ColorJitter(contrast=0.5),
            v2.ColorJitter(saturation=0.5),
            v2.ColorJitter(hue=0.1),
        )
    )
    orders = [v2.Compose([contrast, saturation, hue]), v2.Compose([saturation, hue, contrast])]
    return v2.Compose([brightness, v2.RandomChoice(orders)])
