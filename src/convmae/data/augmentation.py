"""From labelled pictures to batches: augmented ones for training, centre crops for everything else.

timm's transforms and augmentations do the work; here they get their seeds, and damaged files are dealt with.
B batch, C channels, H height, W width, N classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset

from convmae.data.images import (
    ImageLoader,
    TrainingLoader,
    UndecodableImageError,
    collate,
    open_upright,
    pillow_mode,
    undecodable_if_damaged,
)
from convmae.data.sampler import ResumableSampler, seeded
from convmae.data.sources import ImageCollection
from convmae.errors import UserError


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


class BatchAugmentation:
    """Random erasing, mixup and cutmix of a normalised batch, and label smoothing."""

    def __init__(self, options: AugmentationOptions, num_classes: int, device: torch.device) -> None:
        if not 0 <= options.label_smoothing < 1 or not 0 <= options.random_erasing <= 1:
            raise UserError("label_smoothing and random_erasing are shares: choose 0 to 1")
        self._num_classes, self._smoothing = num_classes, options.label_smoothing
        self._erase = RandomErasing(options.random_erasing, mode="pixel", device=str(device))
        self._mixup = None
        if options.mixup > 0 or options.cutmix > 0:
            self._mixup = Mixup(
                options.mixup, options.cutmix, label_smoothing=options.label_smoothing, num_classes=num_classes
            )

    def __call__(self, images: Tensor, labels: Tensor, *seeds: int) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, H, W), changed in place, and labels (B,) -> images and soft targets (B, N)."""
        with seeded(*seeds):
            images = self._erase(images)
            if self._mixup is not None:
                return self._mixup(images, labels)
        return images, mixup_target(labels, self._num_classes, smoothing=self._smoothing)


class LabelledTrainingImages(Dataset):
    """Augmented images by key: dataset[epoch, index] depends on (seed, epoch, index) and on nothing else."""

    def __init__(
        self,
        source: ImageCollection,
        image_size: tuple[int, int],
        in_channels: int,
        options: AugmentationOptions,
        seed: int = 0,
        skip_damaged: bool = False,
    ) -> None:
        pillow_mode(in_channels)  # refuses what no picture has before the run begins
        if in_channels == 4 and options.auto_augment:
            raise UserError("augmentation policies know no transparency: pass --augmentation.auto_augment null")
        if not 0 < options.crop_scale[0] <= options.crop_scale[1] <= 1:
            raise UserError(f"crop_scale {options.crop_scale} is no range of shares: choose 0 < low <= high <= 1")
        if options.color_jitter < 0 or not 0 <= options.flip <= 1:
            raise UserError("color_jitter and flip cannot be below 0, nor flip above 1: choose others")
        self.source, self.in_channels, self.seed, self.skip_damaged = source, in_channels, seed, skip_damaged
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

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """{"image": uint8 (C, H, W), "label": int, "failed": names and reasons of the damaged files it replaces}.

        The index is taken modulo the length. Raises UserError for a damaged file, or with skip_damaged if all are.
        """
        epoch, index = key
        failed: list[str] = []
        for attempt in range(len(self)):
            position = (index + attempt) % len(self)
            try:
                image, label = _load(self.source, position, 3 if self.in_channels == 1 else self.in_channels)
            except UndecodableImageError as error:
                if not self.skip_damaged:
                    _refuse(self.source, position, error)
                failed.append(f"{self.source.picture_name(position)}: {error}")
                continue
            with seeded(self.seed, epoch, index):
                pixels = self._transform(image)
            # Policies mix in colours, so grey comes last.
            return {"image": _grey(pixels) if self.in_channels == 1 else pixels, "label": label, "failed": failed}
        raise UserError(f"{self.source.name}: no image can be decoded, check the files: {failed[-1]}")


class EvaluationImages(Dataset):
    """Centre crops by index: the shorter side resized, bicubic, of which the crop keeps the share crop_pct."""

    def __init__(
        self,
        source: ImageCollection,
        image_size: tuple[int, int],
        in_channels: int = 3,
        skip_damaged: bool = False,
        crop_pct: float = 224 / 256,
    ) -> None:
        pillow_mode(in_channels)
        self.source, self.in_channels, self.skip_damaged = source, in_channels, skip_damaged
        self._transform: Callable[[Image.Image], Tensor] = create_transform(
            (3, *image_size), crop_pct=crop_pct, interpolation="bicubic", normalize=False
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 (C, H, W), "label": int, "index": int, "failed": []}; "image" is None for a damaged file.

        Raises UserError for a damaged file unless skip_damaged.
        """
        try:
            image, label = _load(self.source, index, self.in_channels)
        except UndecodableImageError as error:
            if not self.skip_damaged:
                _refuse(self.source, index, error)
            return {
                "image": None,
                "label": 0,
                "index": index,
                "failed": [f"{self.source.picture_name(index)}: {error}"],
            }
        return {"image": self._transform(image), "label": label, "index": index, "failed": []}


def build_training_loader(
    dataset: LabelledTrainingImages,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    num_replicas: int = 1,
    rank: int = 0,
) -> TrainingLoader:
    """This rank's shuffled batches {"images": uint8 (B, C, H, W), "labels": (B,), "failed": list}."""
    return TrainingLoader(
        dataset,
        batch_size=batch_size,
        sampler=ResumableSampler(len(dataset), batch_size, seed=dataset.seed, num_replicas=num_replicas, rank=rank),
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        drop_last=True,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # see convmae.data.images.build_loader
    )


def build_evaluation_loader(
    dataset: EvaluationImages,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    num_replicas: int = 1,
    rank: int = 0,
    first: int = 0,
) -> ImageLoader:
    """Batches in order from image number `first` on, each image on one rank only.

    {"images": uint8 (B, C, H, W), "labels": (B,), "indices": (B,), "failed": list}; damaged images are left out, so
    batches may be smaller, or empty.
    """
    return ImageLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(first + rank, len(dataset), num_replicas),
        num_workers=num_workers,
        collate_fn=_collate_decoded,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )


def _collate_decoded(samples: list[dict[str, Any]]) -> dict[str, Any]:
    decoded = [sample for sample in samples if sample["image"] is not None]
    return {
        "images": torch.stack([sample["image"] for sample in decoded]) if decoded else torch.empty(0),
        "labels": torch.tensor([sample["label"] for sample in decoded], dtype=torch.int64),
        "indices": torch.tensor([sample["index"] for sample in decoded], dtype=torch.int64),
        "failed": [failure for sample in samples for failure in sample["failed"]],
    }


def _load(source: ImageCollection, index: int, in_channels: int) -> tuple[Image.Image, int]:
    with undecodable_if_damaged():
        file, label = source.open_labelled(index)
        with file:
            return open_upright(file, in_channels), label


def _refuse(source: ImageCollection, index: int, error: UndecodableImageError) -> NoReturn:
    raise UserError(
        f"{source.picture_name(index)} cannot be decoded, replace or delete it, or leave such images out with "
        f"--skip-damaged: {error}"
    ) from error


def _grey(pixels: Tensor) -> Tensor:
    """uint8 (3, H, W) -> (1, H, W) with Pillow's weights."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (pixels * weights).sum(0, keepdim=True).round().clamp(0, 255).to(torch.uint8)
