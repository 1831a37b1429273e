"""Training a classifier on labelled images and judging it on others: what fine-tuning and the published probe share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from convmae.data.augmentation import (
    Augmentation,
    AugmentationOptions,
    BatchAugmentation,
    CenterCrop,
)
from convmae.data.failures import DecodingFailures
from convmae.data.loading import build_evaluation_loader, build_training_loader
from convmae.data.sources import ImageCollection, ImageStream
from convmae.errors import UserError
from convmae.evaluation.accuracy import Accuracy, evaluate
from convmae.models.classifier import Classifier
from convmae.training.checkpoint import CheckpointFolder
from convmae.training.logging import RunLog
from convmae.training.loop import Plan, Position, train


class Supervision(NamedTuple):
    """What a training step works on: the loss."""

    loss: Tensor


class Supervised(nn.Module):
    """A classifier with its loss: (normalised images (B, C, H, W), soft targets (B, N)) -> loss."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.criterion = SoftTargetCrossEntropy()

    def forward(self, batch: tuple[Tensor, Tensor]) -> Supervision:
        images, targets = batch
        return Supervision(self.criterion(self.classifier(images).float(), targets))


class Trained(NamedTuple):
    """Where a run ended, the accuracy then, and the highest where this run and not an earlier part reached it."""

    position: Position
    last: Accuracy
    best: Accuracy | None


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
        shared: dict[str, Any] = {
            "batch_size": batch_size,
            "skip_damaged": skip_damaged,
            "num_workers": workers,
            "pin_memory": fabric.device.type == "cuda",
            "num_replicas": fabric.world_size,
            "rank": fabric.global_rank,
        }
        vary = Augmentation(size, channels, augmentation)
        self._training = build_training_loader(training, vary, seed=seed, aug_repeats=aug_repeats, **shared)
        center_crop = CenterCrop(size, channels, network.crop_pct)
        self._validation = build_evaluation_loader(validation, center_crop, **shared)

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
            images, labels = self._on_device(batch)
            if len(images):
                yield images, labels

    def _on_device(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        device = self._fabric.device
        return batch["images"].to(device, non_blocking=True), batch["labels"].to(device, non_blocking=True)


def train_classifier(
    fabric: Fabric,
    wrapped: _FabricModule,
    optimizer: _FabricOptimizer,
    schedule: Scheduler,
    batches: LabelledBatches,
    plan: Plan,
    checkpoints: CheckpointFolder,
    write_model: Callable[[Path], None],
    log: RunLog,
    restored: dict[str, Any] | None,
    judged: nn.Module,
    save_best: Callable[[], None] = lambda: None,
    best_top1: float = -1.0,
    evaluate_every_epochs: int = 1,
    after_step: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train to the end of the plan, see `convmae.training.loop.train`, with evaluations after epochs.

    judged: images -> logits, what is evaluated. save_best: called in one process whenever its top-1 is the highest yet,
    of a resumed run higher than best_top1.
    """
    accuracy: Accuracy | None = None
    best: Accuracy | None = None

    def after_epoch(epoch: int) -> None:
        nonlocal best_top1, accuracy, best
        if message := batches.failures.warning():
            log.say(message, style="bold red")
        if (epoch + 1) % evaluate_every_epochs and epoch + 1 < plan.epochs:
            return
        accuracy = evaluate(fabric, judged, batches.validation(), batches.num_classes)
        if not accuracy.confusion.sum():
            raise UserError("no validation image can be decoded: check the files")
        if accuracy.top1 > best_top1:
            best_top1, best = accuracy.top1, accuracy
            if fabric.is_global_zero:
                save_best()
        figures = {"top1": accuracy.top1, "top5": accuracy.top5, "validation_loss": accuracy.loss}
        log.evaluation((epoch + 1) * plan.steps_per_epoch, epoch, figures)
        fabric.barrier()

    position = train(
        fabric, wrapped, optimizer, schedule, batches.training, plan, checkpoints, write_model, log, restored,
        after_epoch, after_step,
    )  # fmt: skip
    if accuracy is None:  # resumed after its last step
        after_epoch(plan.epochs - 1)
    assert accuracy is not None
    return Trained(position, accuracy, best)
