"""How good a detector is on annotated images, over all processes: what training and evaluation share."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from lightning.fabric import Fabric
from rich.console import Console

from convmae.data.coco import CocoImages
from convmae.data.detection import ResizeAndPad
from convmae.data.loading import Loading, build_evaluation_loader
from convmae.errors import UserError
from convmae.evaluation.detection import CocoFigures, coco_results, judge_detections
from convmae.models.detector import Detector
from convmae.pixels import Decoding
from convmae.tasks.processes import gathered, share_buffers
from convmae.tasks.tables import shares_table

ImageResults = tuple[int | float | str, list[dict[str, Any]]]
"""An image's id, and what was found in it as COCO's results."""

_KINDS: tuple[Literal["bbox"], Literal["segm"]] = ("bbox", "segm")


@dataclass(frozen=True)
class DetectionQuality:
    """COCO's figures of boxes and of masks."""

    boxes: CocoFigures
    masks: CocoFigures

    @property
    def score(self) -> float:
        """The figure in [0, 1] by which the best model is kept: the AP of boxes, 0 where there is none."""
        return 0.0 if math.isnan(self.boxes.AP) else self.boxes.AP

    @property
    def figures(self) -> dict[str, float]:
        """What a run's log keeps."""
        return {
            "box_AP": self.boxes.AP,
            "box_AP50": self.boxes.AP50,
            "mask_AP": self.masks.AP,
            "mask_AP50": self.masks.AP50,
        }


class Judge:
    """Judges detectors on annotated images, of which each process takes its share; the figures are those of all."""

    def __init__(
        self,
        fabric: Fabric,
        source: CocoImages,
        image_size: tuple[int, int],
        decoding: Decoding | int,
        record: Callable[[int, Sequence[str]], None],
        loading: Loading,
    ) -> None:
        """image_size: (H, W) into which images are fitted. decoding: what pixels mean. record: called for each batch
        with the number of its images and the names and faults of damaged ones.
        """
        self._fabric, self._source, self._record = fabric, source, record
        self._loader = build_evaluation_loader(source, ResizeAndPad(image_size, decoding), loading)
        self._truth = source.ground_truth() if fabric.is_global_zero else None

    def __call__(self, network: Detector) -> DetectionQuality:
        """COCO's figures, the same in every process; the detector is put into evaluation mode and back."""
        share_buffers(self._fabric, network)
        return self.quality(gathered(self._fabric, list(self.detections(network))))

    @torch.inference_mode()
    def detections(self, network: Detector) -> Iterator[ImageResults]:
        """Yields what is found in each image of this process that can be decoded; others are recorded."""
        was_training = network.training
        network.eval()
        for batch in self._loader:
            self._record(len(batch["images"]), batch["failed"])
            if not len(batch["images"]):
                continue
            images = batch["images"].to(self._fabric.device, non_blocking=True)
            with self._fabric.autocast():
                found = network.detect(images, batch["sizes"], batch["original_sizes"])
            for index, detection in zip(batch["indices"].tolist(), found, strict=True):
                image_id = self._source.image_ids[index]
                yield image_id, coco_results(image_id, detection, self._source.category_ids)
        network.train(was_training)

    def quality(self, found: Sequence[ImageResults]) -> DetectionQuality:
        """COCO's figures of the detections of all processes; images that are not among them do not count.

        Raises UserError where there is none.
        """
        if not found:
            raise UserError("no validation image can be decoded: check the files")
        quality: DetectionQuality | None = None
        if self._truth is not None:
            seen = [image_id for image_id, _ in found]
            results = [result for _, of_image in found for result in of_image]
            boxes, masks = (judge_detections(self._truth, results, kind, seen) for kind in _KINDS)
            quality = DetectionQuality(boxes, masks)
        return cast(DetectionQuality, self._fabric.broadcast(quality))


def print_quality(quality: DetectionQuality, classes: Sequence[str], console: Console) -> None:
    """COCO's twelve figures of boxes and of masks, and the AP of each class, in per cent."""
    kinds = (quality.boxes, quality.masks)
    totals = ((f"{name}, {meaning}", *(getattr(kind, name) for kind in kinds)) for name, meaning in _MEANINGS.items())
    console.print(shares_table("COCO's figures, %", ("boxes", "masks"), totals))
    rows = zip(classes, *(kind.per_class for kind in kinds), strict=True)
    console.print(shares_table("AP by class, %", ("boxes", "masks"), rows, "class"))


_MEANINGS = {
    "AP": "overlap 0.50 to 0.95",
    "AP50": "overlap 0.50",
    "AP75": "overlap 0.75",
    "APs": "small objects",
    "APm": "medium objects",
    "APl": "large objects",
    "AR1": "recall of 1 detection an image",
    "AR10": "recall of 10",
    "AR100": "recall of 100",
    "ARs": "recall, small objects",
    "ARm": "recall, medium objects",
    "ARl": "recall, large objects",
}
