"""How labelled images are varied for training, one by one and as a batch, and cropped for everything else.

timm's transforms and augmentations do the work. B batch, C channels, H height, W width, N classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms.v2 import functional

from convmae.data.images import RandomCrop, open_image, own_limit, without_ends
from convmae.data.samples import Sample, labelled
from convmae.errors import UserError
from convmae.pixels import Decoding
from convmae.seeds import seeded


def _posterize(image: Image.Image, bits_to_keep: int, **others: Any) -> Image.Image:
    # At its strongest timm keeps no bit, which Pillow 13 refuses; before, it gave a black image.
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **others)


auto_augment.NAME_TO_OP |= {name: _posterize for name in auto_augment.NAME_TO_OP if name.startswith("Posterize")}


@dataclass(frozen=True)
class AugmentationOptions:
    """How training images are varied; the defaults are those of the paper's fine-tuning."""

    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment or another of timm's policies by its name; null for none."""
    color_jitter: float = 0.0
    """Strength of colour jitter, for when auto_augment is off."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of an image's area in a random crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    random_erasing: float = 0.25
    """Probability that a rectangle of an image is replaced by noise."""
    mixup: float = 0.8
    """Alpha of mixup; 0 for none."""
    cutmix: float = 1.0
    """Alpha of cutmix; 0 for none. With both, each batch takes one of them."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""


NO_AUGMENTATION = AugmentationOptions(None, 0.0, (0.08, 1.0), 0.5, 0.0, 0.0, 0.0, 0.0)
"""Random resized crop and flip only: the published linear probe."""


_MOST_OBLONG = 16  # times as long as the crop, of which the rest is not seen


class Augmentation:
    """An encoded image's random crops, varied."""

    def __init__(self, image_size: tuple[int, int], decoding: Decoding | int, options: AugmentationOptions) -> None:
        """image_size: (H, W); decoding: what pixels mean, or 1 for grey, 3 for RGB, 4 for RGBA.

        Images with bands are cropped and mirrored only: policies and jitter are for colours. Raises UserError for
        impossible options.
        """
        self._decoding = Decoding.of(decoding)
        if self._decoding.channels == 4 and options.auto_augment:
            raise UserError("augmentation policies know no transparency: pass --augmentation.auto_augment null")
        if not 0 < options.crop_scale[0] <= options.crop_scale[1] <= 1:
            raise UserError(f"crop_scale {options.crop_scale} is no range of shares: choose 0 < low <= high <= 1")
        if options.color_jitter < 0 or not 0 <= options.flip <= 1:
            raise UserError("color_jitter and flip cannot be below 0, nor flip above 1: choose others")
        self._crop = RandomCrop(image_size, self._decoding, options.crop_scale, options.flip)
        try:
            self._transform = create_transform(
                (3, *image_size),
                is_training=True,
                scale=options.crop_scale,
                hflip=options.flip,
                color_jitter=options.color_jitter,
                auto_augment=options.auto_augment,
                interpolation="bicubic",
                normalize=False,
            )
        except (AssertionError, ValueError) as error:  # what timm says of a policy that it does not know
            raise UserError(f"unknown policy auto_augment '{options.auto_augment}': see timm's") from error

    def __call__(self, file: BinaryIO, label: int | None, seeds: Sequence[int]) -> list[Sample]:
        """An encoded image, decoded once, and its class, if it has one -> a sample for each seed.

        {"image": uint8 (C, H, W), "label": the class}, without a class no "label". Raises UndecodableImageError.
        """
        grey = self._decoding.channels == 1  # policies mix in colours, so grey comes last
        image = open_image(file, replace(self._decoding, channels=3) if grey else self._decoding)
        if isinstance(image, Tensor):
            return [labelled(view, label) for view in self._crop.views(image, seeds)]
        samples = []
        for seed in seeds:
            with seeded(seed), own_limit(self._decoding):
                pixels = self._transform(image)
            samples.append(labelled(_grey(pixels) if grey else pixels, label))
        return samples


class CenterCrop:
    """An encoded image's centre: the shorter side resized, bicubic, of which the crop keeps the share crop_pct."""

    def __init__(self, image_size: tuple[int, int], decoding: Decoding | int = 3, crop_pct: float = 224 / 256) -> None:
        """image_size: (H, W); decoding: what pixels mean, or 1 for grey, 3 for RGB, 4 for RGBA."""
        self._decoding = Decoding.of(decoding)
        self._longest = _MOST_OBLONG * max(image_size) / min(image_size)
        transform = create_transform((3, *image_size), crop_pct=crop_pct, interpolation="bicubic", normalize=False)
        *self._resizing, self._to_tensor = transform.transforms

    def __call__(self, file: BinaryIO, label: int | None = None) -> Sample:
        """An encoded image and its class, if it has one -> {"image": uint8 (C, H, W), "label": the class}.

        Without a class no "label". Raises UndecodableImageError.
        """
        image = open_image(file, self._decoding)
        height, width = image.shape[1:] if isinstance(image, Tensor) else (image.height, image.width)
        with own_limit(self._decoding):
            if max(height, width) > self._longest * min(height, width):  # resized, the ends alone may be gigabytes
                image = functional.crop(image, *without_ends(height, width, self._longest))
            for part in self._resizing:
                image = part(image)
        return labelled(image if isinstance(image, Tensor) else self._to_tensor(image), label)


class BatchAugmentation:
    """Random erasing, mixup and cutmix of a normalised batch, and label smoothing."""

    def __init__(
        self, options: AugmentationOptions, num_classes: int, device: torch.device, multi_label: bool = False
    ) -> None:
        """multi_label: whether an image may be of several classes; label smoothing then takes each towards a half."""
        if not 0 <= options.label_smoothing < 1 or not 0 <= options.random_erasing <= 1:
            raise UserError("label_smoothing and random_erasing are shares: choose 0 to 1")
        self._num_classes, self._smoothing, self._multi_label = num_classes, options.label_smoothing, multi_label
        self._erase = RandomErasing(options.random_erasing, mode="pixel", device=str(device))
        self._mixup = None
        if options.mixup > 0 or options.cutmix > 0:
            self._mixup = Mixup(
                options.mixup,
                options.cutmix,
                label_smoothing=options.label_smoothing,
                num_classes=num_classes,
                multi_label=multi_label,
            )

    def __call__(self, images: Tensor, labels: Tensor, *seeds: int) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, H, W), changed in place, and labels (B,) -> images and soft targets (B, N).

        Where images may be of several classes, labels are 1 for each of these and else 0, (B, N).
        """
        with seeded(*seeds):
            images = self._erase(images)
            if self._mixup is not None:
                return self._mixup(images, labels)
        return images, mixup_target(labels, self._num_classes, smoothing=self._smoothing, multi_label=self._multi_label)


def _grey(pixels: Tensor) -> Tensor:
    """uint8 (3, H, W) -> (1, H, W) with Pillow's weights."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (pixels * weights).sum(0, keepdim=True).round().clamp(0, 255).to(torch.uint8)
