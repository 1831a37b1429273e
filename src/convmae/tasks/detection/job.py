"""Annotated images as a run's job: jittered batches, a detector's losses, COCO's figures on other images."""

from collections.abc import Iterator
from pathlib import Path

from lightning.fabric import Fabric
from torch import Tensor, nn

from convmae import weights
from convmae.data.coco import CocoImages
from convmae.data.detection import LargeScaleJitter
from convmae.data.failures import DecodingFailures
from convmae.data.loading import Loading, build_training_loader
from convmae.errors import UserError
from convmae.models.detector import DetectionLosses, Detector
from convmae.tasks.detection.judge import DetectionQuality, Judge
from convmae.tasks.processes import share_batch_statistics
from convmae.training.run import Job


class AnnotatedBatch:
    """uint8 images (B, C, H, W) and their targets.

    A class of its own, since Fabric would turn the boxes of any tuple, mapping or dataclass into bf16, which has no
    single pixels beyond 256.
    """

    def __init__(self, images: Tensor, targets: list[dict[str, Tensor]]) -> None:
        self.images, self.targets = images, targets


class DetectorTraining(nn.Module):
    """A detector as the training loop takes it: a batch -> its losses."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: AnnotatedBatch) -> DetectionLosses:
        return self.detector(batch.images, batch.targets)


class DetectionJob(Job[Detector, DetectionQuality]):
    """A detector on annotated images, judged on others by the AP of its boxes."""

    figure = "box_AP"

    def __init__(
        self,
        fabric: Fabric,
        network: Detector,
        training: CocoImages,
        validation: CocoImages,
        jitter: LargeScaleJitter,
        loading: Loading,
        *,
        origin: str,
        folder: Path,
        seed: int,
    ) -> None:
        """jitter: varies training images. origin: which model it is, for the run's first line. folder: the run's."""
        share_batch_statistics(fabric, network)
        self.network, self.module = network, DetectorTraining(network)
        self.origin, self.data = origin, training.name
        self.findings = {source.name: source.findings for source in (training, validation)}
        counts = training.class_counts
        self.contents = (
            f"{training.num_objects} objects of {len(counts)} classes ({min(counts)} to {max(counts)} each) in "
            f"{len(training)} images"
        )
        self.failures = DecodingFailures(folder)
        self._fabric, self._folder, self._training = fabric, folder, training
        self._loader = build_training_loader(training, jitter, loading, seed=seed)
        self._judge = Judge(fabric, validation, network.image_size, jitter.decoding, self.failures.record, loading)

    @property
    def passes(self) -> int:
        """Batches of an epoch for each process."""
        return len(self._loader)

    def batches(self, epoch: int, first: int) -> Iterator[AnnotatedBatch]:
        """Jittered images and their targets, on the device, of an epoch from batch number `first` on."""
        self._loader.set_position(epoch, first)
        for batch in self._loader:
            self.failures.record(len(batch["images"]), batch["failed"])
            yield AnnotatedBatch(*self._fabric.to_device((batch["images"], batch["targets"])))

    def load(self, file: Path, network: Detector) -> None:
        """Fill the network; raises UserError where the file is of other classes."""
        training = self._training
        state, facts = weights.read(file)
        known = weights.flat(facts)
        if (had := known.get("masks", True)) != network.has_masks:
            raise UserError(
                f"{self._folder} holds a run with{'' if had else 'out'} masks: give --masks {str(had).lower()}, or "
                "choose another --output"
            )
        if (known.get("classes"), known.get("category_ids")) != (training.classes, training.category_ids):
            raise UserError(
                f"{self._folder} holds a run with other classes than {training.name}: choose another --output"
            )
        weights.fill(network, state)

    def judge(self, network: Detector) -> DetectionQuality:
        """COCO's figures on the validation images of all processes."""
        return self._judge(network)

    def warning(self) -> str | None:
        """A sentence where more images than the odd one cannot be decoded, else None."""
        return self.failures.warning()
