"""How good a detector is on annotated images, over all processes: what training and evaluation share."""

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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

COLUMNS = {"box": "boxes", "mask": "masks"}
"""What a table calls a kind of figures."""


@dataclass(frozen=True)
class DetectionQuality:
    """COCO's figures of boxes and of masks."""

    boxes: CocoFigures
    masks: CocoFigures | None
    """None of a detector that finds boxes alone."""

    @property
    def score(self) -> float:
        """The figure in [0, 1] by which the best model is kept: the AP of boxes, 0 where there is none."""
        return 0.0 if math.isnan(self.boxes.AP) else self.boxes.AP

    @property
    def figures(self) -> dict[str, float]:
        """What a run's log keeps."""
        return {f"{name}_{figure}": getattr(of, figure) for name, of in self.kinds.items() for figure in ("AP", "AP50")}

    @property
    def kinds(self) -> dict[str, CocoFigures]:
        """The figures of "box" and, where there are masks, of "mask"."""
        return {"box": self.boxes} if self.masks is None else {"box": self.boxes, "mask": self.masks}


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
        return self.quality(gathered(self._fabric, list(self.detections(network))), network)

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
                found = network.detect(images, batch["sizes"], batch["original_sizes"], whole_masks=False)
            for index, detection in zip(batch["indices"].tolist(), found, strict=True):
                image_id = self._source.image_ids[index]
                yield image_id, coco_results(image_id, detection, self._source.category_ids)
        network.train(was_training)

    def quality(self, found: Sequence[ImageResults], network: Detector) -> DetectionQuality:
        """COCO's figures of the detections of all processes; images that are not among them do not count.

        network: the detector that found them. Raises UserError where there is no image.
        """
        if not found:
            raise UserError("no validation image can be decoded: check the files")
        quality: DetectionQuality | None = None
        if self._truth is not None:
            seen = [image_id for image_id, _ in found]
            results = [result for _, of_image in found for result in of_image]
            boxes = judge_detections(self._truth, results, "bbox", seen, network.max_detections)
            masks = None
            if network.has_masks:
                masks = judge_detections(self._truth, results, "segm", seen, network.max_detections)
            quality = DetectionQuality(boxes, masks)
        return cast(DetectionQuality, self._fabric.broadcast(quality))


def print_quality(
    quality: DetectionQuality, classes: Sequence[str], console: Console, max_detections: int = 100
) -> None:
    """COCO's twelve figures of boxes and, where there are any, of masks, and the AP of each class, in per cent.

    max_detections: of the detector, for the figures' names.
    """
    names = [COLUMNS[kind] for kind in quality.kinds]
    meanings = _MEANINGS | {"AR100": f"recall of {max(100, max_detections)}"}
    totals = (
        (f"{name}, {meaning}", *(getattr(figures, name) for figures in quality.kinds.values()))
        for name, meaning in meanings.items()
    )
    console.print(shares_table("COCO's figures, %", names, totals))
    rows = zip(classes, *(figures.per_class for figures in quality.kinds.values()), strict=True)
    console.print(shares_table("AP by class, %", names, rows, "class"))


def write_quality(path: Path, quality: DetectionQuality, classes: Sequence[str]) -> None:
    """A CSV file with the AP of each class; empty where the images have no object of it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["class", *(f"{kind}_AP" for kind in quality.kinds)])
        for name, *shares in zip(classes, *(figures.per_class for figures in quality.kinds.values()), strict=True):
            rows.writerow([name, *("" if math.isnan(share) else share for share in shares)])


def warn_of_full_images(counts: Iterable[int], max_detections: int) -> None:
    """Say on the terminal's error stream in how many images detections may have been cut off.

    counts: of the detections of each image.
    """
    if full := sum(count >= max_detections for count in counts):
        images = f"{full} images have" if full > 1 else "1 image has"
        Console(stderr=True, highlight=False).print(
            f"{images} {max_detections} detections, the most that --max-detections allows: raise it, there may be more",
            style="yellow",
            soft_wrap=True,
        )


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
