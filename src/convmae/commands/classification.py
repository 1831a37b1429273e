"""A classifier's loss and its labelled batches: what fine-tuning and the published probe share."""

from collections.abc import Iterator
from typing import Any

from lightning.fabric import Fabric
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from convmae.commands.supervised import Supervision
from convmae.data.augmentation import (
    Augmentation,
    AugmentationOptions,
    BatchAugmentation,
    CenterCrop,
)
from convmae.data.failures import DecodingFailures
from convmae.data.loading import Loading, build_evaluation_loader, build_training_loader
from convmae.data.sources import ImageCollection, ImageStream
from convmae.errors import UserError
from convmae.evaluation.accuracy import Accuracy, evaluate
from convmae.models.classifier import Classifier


class Supervised(nn.Module):
    """A classifier with its loss: (normalised images (B, C, H, W), soft targets (B, N)) -> loss."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.criterion = SoftTargetCrossEntropy()

    def forward(self, batch: tuple[Tensor, Tensor]) -> Supervision:
        images, targets = batch
        return Supervision(self.criterion(self.classifier(images).float(), targets))


class LabelledBatches:
    """This process's training and validation batches, on its device."""

    def __init__(
        self,
        fabric: Fabric,
        network: Classifier,
        training: ImageCollection | ImageStream,
        validation: ImageCollection | ImageStream,
        failures: DecodingFailures,
        batch_size: int,
        workers: int,
        augmentation: AugmentationOptions,
        seed: int,
        skip_damaged: bool,
        aug_repeats: int = 1,
    ) -> None:
        """batch_size: images of one pass of one process; aug_repeats: how many of them are crops of one picture."""
        if (augmentation.mixup or augmentation.cutmix) and batch_size % 2:
            raise UserError(f"mixup and cutmix need pairs, a pass has {batch_size} images: choose an even number")
        size, channels = network.settings["image_size"], network.settings["in_channels"]
        self.num_classes = len(training.classes)
        self.num_images = training.reader.num_samples if isinstance(training, ImageStream) else len(training)
        self.failures = failures
        self._fabric, self._seed, self._aug_repeats = fabric, seed, aug_repeats
        self._normalize = network.encoder.normalize
        self._vary = BatchAugmentation(augmentation, self.num_classes, fabric.device)
        loading = Loading(
            batch_size,
            skip_damaged,
            workers,
            pin_memory=fabric.device.type == "cuda",
            num_replicas=fabric.world_size,
            rank=fabric.global_rank,
        )
        vary = Augmentation(size, channels, augmentation)
        self._training = build_training_loader(training, vary, loading, seed=seed, aug_repeats=aug_repeats)
        center_crop = CenterCrop(size, channels, network.crop_pct)
        self._validation = build_evaluation_loader(validation, center_crop, loading)

    def __len__(self) -> int:
        """Training batches an epoch."""
        self._training.set_position(0)
        return len(self._training)

    def training(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Varied, normalised images (B, C, H, W) and soft targets (B, N) of an epoch, from batch number `first` on."""
        self._training.set_position(epoch, first)
        for number, batch in enumerate(self._training, start=first):
            self.failures.record(len(batch["images"]) // self._aug_repeats, batch["failed"])
            images, labels = self._on_device(batch)
            yield self._vary(self._normalize(images), labels, self._seed, epoch, number, self._fabric.global_rank)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images (B, C, H, W) and labels (B,), each image once over all processes."""
        for batch in self._validation:
            self.failures.record(len(batch["images"]), batch["failed"])
            if len(batch["images"]):
                yield self._on_device(batch)

    def _on_device(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        device = self._fabric.device
        return batch["images"].to(device, non_blocking=True), batch["labels"].to(device, non_blocking=True)

    def judge(self, model: nn.Module) -> Accuracy:
        """How good `model` (images -> logits) is on the validation images of all processes."""
        accuracy = evaluate(self._fabric, model, self.validation(), self.num_classes)
        if not accuracy.confusion.sum():
            raise UserError("no validation image can be decoded: check the files")
        return accuracy
