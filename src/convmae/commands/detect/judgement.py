"""How good a detector is on annotated pictures, over all processes: what training and evaluation share."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.table import Table
from rich.text import Text

from convmae.commands.downstream import gathered, percent, share_buffers
from convmae.data.coco import CocoImages
from convmae.data.detection import ResizeAndPad
from convmae.data.loading import Loading, build_evaluation_loader
from convmae.errors import UserError
from convmae.evaluation.detection import CocoFigures, coco_results, judge_detections
from convmae.models.detector import Detector

ImageResults = tuple[int, list[dict[str, Any]]]
"""A picture's id, and what was found in it as COCO's results."""

_KINDS: tuple[Literal["bbox"], Literal["segm"]] = ("bbox", "segm")


@dataclass(frozen=True)
class DetectionQuality:
    """COCO's figures of boxes and of masks."""

    boxes: CocoFigures
    masks: CocoFigures

    @property
    def score(self) -> float:
        """What makes one model better than another: the AP of boxes."""
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
    """Judges detectors on this process's share of annotated pictures, and on everybody else's."""

    def __init__(
        self,
        fabric: Fabric,
        source: CocoImages,
        image_size: tuple[int, int],
        in_channels: int,
        record: Callable[[int, Sequence[str]], None],
        batch_size: int,
        workers: int,
        skip_damaged: bool,
    ) -> None:
        """image_size: (H, W) into which pictures are fitted. record: told of each batch, see DecodingFailures."""
        self._fabric, self._source, self._record = fabric, source, record
        self._loader = build_evaluation_loader(
            source,
            ResizeAndPad(image_size, in_channels),
            Loading(
                batch_size,
                skip_damaged,
                workers,
                pin_memory=fabric.device.type == "cuda",
                num_replicas=fabric.world_size,
                rank=fabric.global_rank,
            ),
        )
        self._truth = source.ground_truth() if fabric.is_global_zero else None

    def __call__(self, network: Detector) -> DetectionQuality:
        """COCO's figures, the same in every process; the detector is put into evaluation mode and back."""
        share_buffers(self._fabric, network)
        return self.quality(gathered(self._fabric, list(self.detections(network))))

    @torch.inference_mode()
    def detections(self, network: Detector) -> Iterator[ImageResults]:
        """What is found in each picture of this process that can be decoded; others are recorded."""
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
        """COCO's figures of the detections of all processes; pictures that are not among them do not count."""
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
    table = Table(title="COCO's figures, %", title_justify="left")
    table.add_column("")
    for name in ("boxes", "masks"):
        table.add_column(name, justify="right")
    kinds = (quality.boxes, quality.masks)
    for name, meaning in _MEANINGS.items():
        table.add_row(f"{name}, {meaning}", *(percent(getattr(kind, name)) for kind in kinds))
    console.print(table)
    table = Table(title="AP by class, %", title_justify="left")
    table.add_column("class", overflow="fold")
    for name in ("boxes", "masks"):
        table.add_column(name, justify="right")
    for name, *shares in zip(classes, *(kind.per_class for kind in kinds), strict=True):
        table.add_row(Text(name), *map(percent, shares))
    console.print(table)


_MEANINGS = {
    "AP": "overlap 0.50 to 0.95",
    "AP50": "overlap 0.50",
    "AP75": "overlap 0.75",
    "APs": "small objects",
    "APm": "medium objects",
    "APl": "large objects",
    "AR1": "recall of 1 detection a picture",
    "AR10": "recall of 10",
    "AR100": "recall of 100",
    "ARs": "recall, small objects",
    "ARm": "recall, medium objects",
    "ARl": "recall, large objects",
}
