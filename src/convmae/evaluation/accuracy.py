"""How often a classifier is right: top-1, top-5 and the confusion matrix, over all processes."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

_TOP = 5


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1] over all images; `confusion` (N, N) counts images by true class (row) and predicted class."""

    top1: float
    """Of images whose class is the most probable one."""
    top5: float
    """Of images whose class is among the five most probable."""
    loss: float
    """Mean cross-entropy."""
    confusion: Tensor

    @property
    def score(self) -> float:
        """The figure in [0, 1] by which the best model is kept: top1."""
        return self.top1

    @property
    def figures(self) -> dict[str, float]:
        """What a run's log keeps."""
        return {"top1": self.top1, "top5": self.top5, "validation_loss": self.loss}

    def per_class(self) -> Tensor:
        """Share of each class's images that were recognised, (N,); not a number for a class without images."""
        return self.confusion.diagonal() / self.confusion.sum(dim=1)


@torch.inference_mode()
def judge_classifier(
    fabric: Fabric, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int
) -> Accuracy:
    """Accuracy of `model` (images -> logits) on the batches of all processes together, the same in each of them.

    batches: this process's, images (B, C, H, W) and labels (B,) on its device. The model is put into evaluation mode
    and back. With fewer than five classes top5 is 1.
    """
    metrics = _Metrics(num_classes, fabric.device)
    was_training = model.training
    model.eval()
    for images, labels in batches:
        with fabric.autocast():
            logits = model(images).float()
        metrics.update(logits, labels)
    model.train(was_training)
    return metrics.compute()


def judge_logits(logits: Tensor, labels: Tensor, num_classes: int) -> Accuracy:
    """Accuracy of the logits (or other scores) of N images, (N, num_classes), for their true classes (N,)."""
    metrics = _Metrics(num_classes, logits.device)
    metrics.update(logits, labels)
    return metrics.compute()


class _Metrics:
    """torchmetrics' accuracies, which add up over batches and processes."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._accuracies = MetricCollection(
            {
                "top1": MulticlassAccuracy(num_classes, average="micro"),
                "top5": MulticlassAccuracy(num_classes, top_k=min(_TOP, num_classes), average="micro"),
                "confusion": MulticlassConfusionMatrix(num_classes),
            },
            compute_groups=False,
        ).to(device)
        self._loss = MeanMetric().to(device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self._accuracies.update(logits, labels)
        self._loss.update(cross_entropy(logits, labels, reduction="none"))

    def compute(self) -> Accuracy:
        values = self._accuracies.compute()
        return Accuracy(
            values["top1"].item(), values["top5"].item(), self._loss.compute().item(), values["confusion"].cpu()
        )
