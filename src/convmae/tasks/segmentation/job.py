"""Images with label maps as a run's job: varied crops, a segmenter's losses, mIoU on other images."""

from collections.abc import Iterator
from pathlib import Path

from lightning.fabric import Fabric
from torch import Tensor, nn

from convmae import weights
from convmae.data.ade20k import SegmentationImages
from convmae.data.failures import DecodingFailures
from convmae.data.loading import Loading, build_training_loader
from convmae.data.segmentation import RandomScaleCrop
from convmae.errors import UserError
from convmae.evaluation.segmentation import SegmentationQuality
from convmae.models.segmenter import SegmentationLosses, Segmenter
from convmae.tasks.processes import check_batch_statistics, share_batch_statistics, shares_batch_statistics
from convmae.tasks.segmentation.judge import Judge
from convmae.tasks.segmentation.views import Inference
from convmae.training.run import Job


class SegmenterTraining(nn.Module):
    """A segmenter as the training loop takes it: (images, labels) -> its losses."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, batch: tuple[Tensor, Tensor]) -> SegmentationLosses:
        return self.segmenter(*batch)


class SegmentationJob(Job[Segmenter, SegmentationQuality]):
    """A segmenter on images with label maps, judged on others by mIoU."""

    figure = "mIoU"

    def __init__(
        self,
        fabric: Fabric,
        network: Segmenter,
        training: SegmentationImages,
        validation: SegmentationImages,
        crop: RandomScaleCrop,
        inference: Inference,
        loading: Loading,
        *,
        origin: str,
        folder: Path,
        seed: int,
    ) -> None:
        """crop: varies images for training. inference: how validation images are put through the network.

        origin: where the weights come from, for the run's first line. folder: the run's. Raises UserError for passes of
        one image, which have no batch statistics.
        """
        check_batch_statistics(loading.batch_size, shared=shares_batch_statistics(fabric))
        share_batch_statistics(fabric, network)
        self.network, self.module = network, SegmenterTraining(network)
        self.origin, self.data = origin, training.name
        same = validation.name == training.name  # as where one folder holds all images
        self.findings = {
            training.name: training.findings,
            f"{validation.name}{', validation' if same else ''}": validation.findings,
        }
        self.contents = f"{len(training.classes)} classes in {len(training)} images"
        self.failures = DecodingFailures(folder)
        self._fabric, self._folder, self._training = fabric, folder, training
        self._loader = build_training_loader(training, crop, loading, seed=seed)
        self._judge = Judge(fabric, validation, inference, self.failures.record, loading)

    @property
    def passes(self) -> int:
        """Batches of an epoch for each process."""
        return len(self._loader)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, uint8 (B, C, H, W), and labels, uint8 (B, H, W), on the device, from batch number `first` on."""
        self._loader.set_position(epoch, first)
        for batch in self._loader:
            self.failures.record(len(batch["images"]), batch["failed"])
            yield self._fabric.to_device((batch["images"], batch["labels"]))

    def load(self, file: Path, network: Segmenter) -> None:
        """Fill the network; raises UserError where the file is of other classes or of label maps written otherwise."""
        training = self._training
        state, facts = weights.read(file)
        known = weights.flat(facts)
        encoding = training.encoding
        stated = {name: known.get(name) for name in ("classes", "reduce_zero_label", "label_encoding")}
        if stated != {
            "classes": training.classes,
            "reduce_zero_label": encoding.reduce_zero_label,
            "label_encoding": encoding.description,
        }:
            raise UserError(
                f"{self._folder} holds a run with other classes than {training.name}, or with another "
                "--reduce-zero-label, --label-values, --ignored-labels or --label-colours: choose another --output"
            )
        weights.fill(network, state)

    def judge(self, network: Segmenter) -> SegmentationQuality:
        """mIoU and its like on the validation images of all processes."""
        return self._judge(network)

    def warning(self) -> str | None:
        """A sentence where more images than the odd one cannot be decoded, else None."""
        return self.failures.warning()
