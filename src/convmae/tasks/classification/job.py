"""Labelled images as a run's job: varied batches, a classifier's loss, its accuracy on other images.

Where an image may be of several classes, the loss is binary cross-entropy and average precision stands for accuracy.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from convmae import weights
from convmae.data.augmentation import Augmentation, AugmentationOptions, BatchAugmentation, CenterCrop
from convmae.data.failures import DecodingFailures
from convmae.data.folders import counted
from convmae.data.loading import Loading, build_evaluation_loader, build_training_loader
from convmae.data.sources import ImageCollection, ImageStream
from convmae.errors import UserError
from convmae.evaluation.accuracy import Accuracy, judge_classifier
from convmae.evaluation.multi_label import AveragePrecision, judge_multi_label
from convmae.models.classifier import Classifier
from convmae.pixels import Decoding, decoding_of
from convmae.training.run import Job, N, StepLoss


class ClassifierTraining(nn.Module):
    """A classifier as the training loop takes it: normalised images (B, C, H, W), soft targets (B, N) -> its loss."""

    def __init__(self, classifier: nn.Module, multi_label: bool = False) -> None:
        """multi_label: whether an image may be of several classes."""
        super().__init__()
        self.classifier = classifier
        self.criterion: nn.Module = nn.BCEWithLogitsLoss() if multi_label else SoftTargetCrossEntropy()

    def forward(self, batch: tuple[Tensor, Tensor]) -> StepLoss:
        images, targets = batch
        return StepLoss(self.criterion(self.classifier(images).float(), targets))


class ClassificationJob(Job[N, Accuracy | AveragePrecision]):
    """A model from images to logits on the labelled images of a source, judged on those of another."""

    figure: str | None = "top1"

    def __init__(
        self,
        fabric: Fabric,
        network: N,
        encoder: Classifier,
        training: ImageCollection | ImageStream,
        validation: ImageCollection | ImageStream,
        loading: Loading,
        *,
        origin: str,
        data: str,
        folder: Path,
        augmentation: AugmentationOptions,
        seed: int,
        aug_repeats: int = 1,
        decoding: Decoding | None = None,
    ) -> None:
        """network: what is trained; encoder: the classifier that it is or has, which tells how images are prepared.

        origin, data: where weights and images come from, for the run's first line. folder: the run's. aug_repeats: how
        many of a batch's images are crops of one. decoding: by default as the encoder says. Raises UserError for an odd
        batch with mixup or cutmix.
        """
        if (augmentation.mixup or augmentation.cutmix) and loading.batch_size % 2:
            raise UserError(
                f"mixup and cutmix need pairs, a pass has {loading.batch_size} images: choose an even number"
            )
        self.multi_label = training.multi_label
        if self.multi_label and self.figure is not None:
            self.figure = "map"
        self.network, self.module = network, ClassifierTraining(network, self.multi_label)
        self.origin, self.data = origin, data
        self.findings = {source.name: source.findings for source in (training, validation)}
        self.classes = list(training.classes)
        count = training.reader.num_samples if isinstance(training, ImageStream) else len(training)
        several = ", several an image" if self.multi_label else ""
        self.contents = f"{counted(count, 'image')} of {len(self.classes)} classes{several}"
        self.failures = DecodingFailures(folder)
        self._fabric, self._folder, self._seed, self._aug_repeats = fabric, folder, seed, aug_repeats
        self._normalize = encoder.encoder.normalize
        self._vary = BatchAugmentation(augmentation, len(self.classes), fabric.device, self.multi_label)
        size, decoding = encoder.image_size, decoding or decoding_of(encoder)
        self._training = build_training_loader(
            training, Augmentation(size, decoding, augmentation), loading, seed=seed, aug_repeats=aug_repeats
        )
        self._validation = build_evaluation_loader(validation, CenterCrop(size, decoding, encoder.crop_pct), loading)

    @property
    def passes(self) -> int:
        """Batches of an epoch for each process."""
        self._training.set_position(0)
        return len(self._training)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Varied, normalised images (B, C, H, W) and soft targets (B, N) of an epoch, from batch number `first` on."""
        self._training.set_position(epoch, first)
        for number, batch in enumerate(self._training, start=first):
            self.failures.record(len(batch["images"]) // self._aug_repeats, batch["failed"])
            images, labels = self._on_device(batch)
            yield self._vary(self._normalize(images), labels, self._seed, epoch, number, self._fabric.global_rank)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images (B, C, H, W) and labels (B,) or (B, N), each image once over all processes."""
        for batch in self._validation:
            self.failures.record(len(batch["images"]), batch["failed"])
            if len(batch["images"]):
                yield self._on_device(batch)

    def judge(self, network: N) -> Accuracy | AveragePrecision:
        """Accuracy of a network (images -> logits) on the validation images of all processes.

        Raises UserError where none of them can be decoded.
        """
        if self.multi_label:
            precision = judge_multi_label(self._fabric, network, self.validation(), len(self.classes))
            if not precision.counts.sum():
                raise UserError("no validation image of any class can be decoded: check the files")
            return precision
        accuracy = judge_classifier(self._fabric, network, self.validation(), len(self.classes))
        if not accuracy.confusion.sum():
            raise UserError("no validation image can be decoded: check the files")
        return accuracy

    def warning(self) -> str | None:
        """A sentence where more images than the odd one cannot be decoded, else None."""
        return self.failures.warning()

    def _on_device(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        device = self._fabric.device
        return batch["images"].to(device, non_blocking=True), batch["labels"].to(device, non_blocking=True)


class FinetuningJob(ClassificationJob[Classifier]):
    """A classifier under training, which goes on with its own classes only."""

    def load(self, file: Path, network: Classifier) -> None:
        """Fill the network; raises UserError where the file is of other classes."""
        state, facts = weights.read(file)
        known = weights.flat(facts)
        if known.get("classes") != self.classes or known.get("multi_label", False) != self.multi_label:
            raise UserError(f"{self._folder} holds a run with other classes than {self.data}: choose another --output")
        weights.fill(network, state)
