"""How well pixels are told apart: intersection over union and accuracy, counted over all processes.

The definitions are mmsegmentation's. N classes, H height, W width; 255 marks pixels that do not count.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from convmae.labels import IGNORED


@dataclass(frozen=True)
class SegmentationQuality:
    """Shares in [0, 1]; not a number where no pixel counts."""

    confusion: Tensor
    """Pixels by true class (row) and predicted class, int64 (N, N), without those that do not count."""

    @property
    def mIoU(self) -> float:  # noqa: N802
        """The mean of `iou` over the classes that occur in the truth or the prediction."""
        return self.iou.nanmean().item()

    @property
    def mAcc(self) -> float:  # noqa: N802
        """The mean of `accuracy` over the classes that occur in the truth."""
        return self.accuracy.nanmean().item()

    @property
    def aAcc(self) -> float:  # noqa: N802
        """Share of the pixels that are right."""
        return (self._right.sum() / self.confusion.sum()).item()

    @property
    def iou(self) -> Tensor:
        """Each class's right pixels as a share of all that it has or is given, (N,)."""
        return self._right / (self.confusion.sum(dim=0) + self.confusion.sum(dim=1) - self._right)

    @property
    def accuracy(self) -> Tensor:
        """Share of each class's pixels that were recognised, (N,)."""
        return self._right / self.confusion.sum(dim=1)

    @property
    def score(self) -> float:
        """The figure in [0, 1] by which the best model is kept: mIoU, 0 where there is none."""
        return 0.0 if math.isnan(self.mIoU) else self.mIoU

    @property
    def figures(self) -> dict[str, float]:
        """What a run's log keeps."""
        return {"mIoU": self.mIoU, "mAcc": self.mAcc, "aAcc": self.aAcc}

    @property
    def _right(self) -> Tensor:
        return self.confusion.diagonal().double()  # float32 tells no more than 17 million pixels apart


class SegmentationMetrics:
    """torchmetrics' confusion matrix, which adds up over images and processes."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        # The checks would take as long as the counting, and more: they sort all pixels.
        self._confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED, validate_args=False)
        # Without a counting operator torchmetrics compares each pixel with each cell, hundreds of gigabytes.
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._confusion.to(self._device)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Count pixels, integers (..., H, W): `predicted` in [0, N), `labels` in [0, N) or 255."""
        self._confusion.update(predicted.to(self._device), labels.to(self._device))

    def compute(self) -> SegmentationQuality:
        """The quality of what all processes counted, the same in each of them; every process must call this."""
        return SegmentationQuality(self._confusion.compute().cpu())
