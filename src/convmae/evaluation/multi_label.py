"""How well a classifier ranks the images of each class where an image may be of several: average precision."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import BinaryAveragePrecision, MultilabelAveragePrecision


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision of each class over all images, and its mean over the classes that have any."""

    classes: Tensor
    """In [0, 1], (N,); not a number for a class without images."""
    counts: Tensor
    """Images of each class, int64 (N,)."""
    loss: float
    """Mean binary cross-entropy."""

    @property
    def score(self) -> float:
        """The figure in [0, 1] by which the best model is kept: the mean average precision."""
        return self.classes.nanmean().item()

    @property
    def figures(self) -> dict[str, float]:
        """What a run's log keeps."""
        return {"map": self.score, "validation_loss": self.loss}


@torch.inference_mode()
def judge_multi_label(
    fabric: Fabric, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int
) -> AveragePrecision:
    """Average precision of `model` (images -> logits) on the batches of all processes, the same in each of them.

    batches: this process's, images (B, C, H, W) and labels (B, num_classes), 1 where an image is of a class and else 0,
    on its device. The model is put into evaluation mode and back.
    """
    precision: Metric = BinaryAveragePrecision()  # the other one refuses a single class
    if num_classes > 1:
        precision = MultilabelAveragePrecision(num_classes, average="none")
    precision.to(fabric.device)
    loss = MeanMetric().to(fabric.device)
    counts = [SumMetric().to(fabric.device) for _ in range(num_classes)]
    was_training = model.training
    model.eval()
    for images, labels in batches:
        with fabric.autocast():
            logits = model(images).float()
        precision.update(logits.sigmoid(), labels.long())
        loss.update(binary_cross_entropy_with_logits(logits, labels, reduction="none"))
        for count, column in zip(counts, labels.T, strict=True):
            count.update(column)
    model.train(was_training)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive samples")  # they are told as classes without a figure
        values = precision.compute().reshape(-1).cpu()
    positives = torch.stack([count.compute() for count in counts]).long().cpu()
    return AveragePrecision(values.where(positives > 0, torch.nan), positives, loss.compute().item())
