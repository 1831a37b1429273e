"""How good a segmenter is on labelled images, over all processes: what training and evaluation share."""

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lightning.fabric import Fabric
from rich.console import Console

from convmae.data.ade20k import SegmentationImages
from convmae.data.loading import Loading, build_evaluation_loader
from convmae.errors import UserError
from convmae.evaluation.segmentation import SegmentationMetrics, SegmentationQuality
from convmae.models.segmenter import Segmenter
from convmae.tasks.processes import share_buffers
from convmae.tasks.segmentation.views import Inference
from convmae.tasks.tables import shares_table


class Judge:
    """Judges segmenters on labelled images, of which each process takes its share; the figures are those of all."""

    def __init__(
        self,
        fabric: Fabric,
        source: SegmentationImages,
        inference: Inference,
        record: Callable[[int, Sequence[str]], None],
        loading: Loading,
    ) -> None:
        """record: called for each batch with the number of its images and the names and faults of damaged ones.

        loading: batches are of one image, whatever size it says.
        """
        self._fabric, self._source, self._inference, self._record = fabric, source, inference, record
        one_by_one = replace(loading, batch_size=1)  # they have different sizes
        self._loader = build_evaluation_loader(source, inference.transform, one_by_one)

    def __call__(self, network: Segmenter, progress: Callable[[Iterator[None]], object] = list) -> SegmentationQuality:
        """The quality, the same in every process; the segmenter is put into evaluation mode and back.

        progress: takes an iterator over the images of this process and goes through it to the end. Raises UserError
        where no pixel of any process counts.
        """
        share_buffers(self._fabric, network)
        metrics = SegmentationMetrics(network.num_classes, self._fabric.device)
        was_training = network.training
        network.eval()
        progress(self._count(network, metrics))
        network.train(was_training)
        quality = metrics.compute()
        if not quality.confusion.any():
            raise UserError(f"no pixel of {self._source.name} can be judged: check the images and their label maps")
        return quality

    @torch.inference_mode()
    def _count(self, network: Segmenter, metrics: SegmentationMetrics) -> Iterator[None]:
        """Count this process's pixels, image by image."""
        for batch in self._loader:
            self._record(len(batch["images"]), batch["failed"])
            if len(batch["images"]):
                (views,), (labels,), (size,) = batch["images"], batch["labels"], batch["original_sizes"]
                with self._fabric.autocast():
                    found = self._inference(network, views, size)
                metrics.update(found, labels.to(found.device, non_blocking=True))
            yield


def print_quality(quality: SegmentationQuality, classes: Sequence[str], console: Console) -> None:
    """The means, and overlap, accuracy and share of the pixels of each class, in per cent; classes without pixels."""
    totals = [
        ("mIoU, overlap of predicted and true pixels, mean of the classes", quality.mIoU),
        ("mAcc, share of a class's pixels that are found, mean of the classes", quality.mAcc),
        ("aAcc, share of all pixels that are right", quality.aAcc),
    ]
    has_pixels = quality.confusion.sum(dim=1) > 0
    if quality.iou[~has_pixels].isfinite().any():
        totals.append(("mIoU of the classes that have pixels", quality.iou[has_pixels].mean().item()))
    console.print(shares_table("segmentation, %", [""], totals))
    names = ("IoU", "accuracy", "of all pixels")
    console.print(shares_table("by class, %", names, _by_class(quality, classes), "class"))
    if absent := [name for name, has in zip(classes, has_pixels.tolist(), strict=True) if not has]:
        console.print(
            f"no pixel of {'this class' if len(absent) == 1 else f'these {len(absent)} classes'} is in the label maps: "
            f"{', '.join(absent)}; - is what nothing can be said of; IoU is 0 where a class is predicted all the same, "
            "and counts in mIoU",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def write_quality(path: Path, quality: SegmentationQuality, classes: Sequence[str]) -> None:
    """A CSV file with IoU, accuracy and share of the pixels of each class; empty where there is no such class."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "IoU", "accuracy", "share_of_pixels"])
        for name, *shares in _by_class(quality, classes):
            rows.writerow([name, *("" if math.isnan(share) else share for share in shares)])


def _by_class(quality: SegmentationQuality, classes: Sequence[str]) -> Iterator[tuple[str, float, float, float]]:
    shares = quality.confusion.sum(dim=1) / quality.confusion.sum()
    yield from zip(classes, quality.iou.tolist(), quality.accuracy.tolist(), shares.tolist(), strict=True)
