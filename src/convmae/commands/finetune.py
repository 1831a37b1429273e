"""`convmae finetune`: class folders in, a classifier out, from pretrained weights or from scratch."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from convmae.commands.options import flat_settings, origin_of, spread
from convmae.data.augmentation import AugmentationOptions
from convmae.data.failures import DecodingFailures
from convmae.data.labelled import open_labelled_images
from convmae.errors import check_rate
from convmae.evaluation.accuracy import Accuracy
from convmae.kinds import create_classifier, load_classifier
from convmae.models.classifier import Classifier
from convmae.tasks.classification.job import FinetuningJob
from convmae.tasks.processes import process_loading
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.logging import read_metrics
from convmae.training.optimizer import LayerDecayOptions
from convmae.training.options import SupervisedRunOptions
from convmae.training.run import Finished, Run, divide_batch
from convmae.visualize import confusion_picture, loss_curve


@dataclass(frozen=True)
class FinetuningResult:
    """Where a finished run left what it made, and how good the kept model is on the validation images."""

    folder: Path
    checkpoint: Path
    """Folder with the best model's file; pass it to convmae.load or any --weights."""
    top1: float
    """Share of validation images whose class is the first guess, in [0, 1]."""
    top5: float
    loss: float
    per_class: dict[str, float]
    """Share of each class's validation images that were recognised."""
    confusion_matrix: Path
    loss_curve: Path
    steps: int


@spread("options")
def finetune(
    data: str,
    weights: Path | None = None,
    model: str = "base",
    options: SupervisedRunOptions = SupervisedRunOptions(
        output=Path("runs/finetune"),
        epochs=100,
        batch_size=256,
        optimizer=LayerDecayOptions(),
        checkpoint=CheckpointOptions(every_epochs=5, keep=1),
    ),
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    crop_pct: float | None = None,
    aug_repeats: int = 1,
    drop_path: float = 0.1,
    train_split: str = "train",
    val_split: str = "val",
    skip_damaged: bool = False,
    augmentation: AugmentationOptions = AugmentationOptions(),
) -> FinetuningResult:
    """Fine-tune a pretrained encoder to classify images, or train one from scratch; the paper's batches are of 1024.

    Args:
        data: a folder with train/CLASS/images and val/CLASS/images; wds/FOLDER, hfds/NAME,
            hfids/NAME, tfds/NAME or torch/NAME.
        weights: a pretraining run, checkpoint or file, ours or published; left out, training starts from scratch.
        model: size, for training from scratch: tiny, small, base, large or huge.
        image_size: pixels, one number or [height, width], multiples of 16; by default that of the weights, else 224.
        in_channels: 1 (grey), 3 (RGB) or 4 (RGBA); by default that of the weights, else 3.
        crop_pct: share of the resized shorter side that the centre crop of an evaluation keeps; by default that of the
            weights, else 0.875.
        aug_repeats: crops taken of each image that is decoded, all in one batch (repeated augmentation); an epoch stays
            as many crops as there are images, and so takes one in aug_repeats of them.
        drop_path: rate of stochastic depth in the last block; it grows linearly from 0.
        train_split: split that is trained on.
        val_split: split that decides which model is the best.
        skip_damaged: leave out and list images that cannot be decoded instead of stopping.
        augmentation: how training images are varied.

    Raises UserError for settings or data that cannot work, and Interrupted after SIGTERM or Ctrl-C, a checkpoint being
    written.
    """
    settings = flat_settings(locals())
    check_rate(drop_path=drop_path)
    training = open_labelled_images(data, train_split, shuffled=True)
    validation = open_labelled_images(data, val_split, training.classes)
    run = Run(options, settings)
    torch.manual_seed(options.seed)
    stated = {"image_size": image_size, "in_channels": in_channels, "crop_pct": crop_pct}
    network = _network(
        weights,
        model,
        training.classes,
        drop_path=drop_path,
        **{name: value for name, value in stated.items() if value is not None},
    )
    network.set_grad_checkpointing(options.grad_checkpointing)

    fabric = run.start()
    images_of_a_pass = divide_batch(options.batch_size, fabric.world_size, options.accumulate)
    job = FinetuningJob(
        fabric,
        network,
        network,
        training,
        validation,
        process_loading(fabric, options.engine, images_of_a_pass, skip_damaged),
        origin=origin_of(weights, model),
        data=data,
        folder=options.output,
        augmentation=augmentation,
        seed=options.seed,
        aug_repeats=aug_repeats,
    )
    return _finish(run.train(fabric, job), training.classes)


def _network(weights: Path | None, model: str, classes: list[str], **settings: Any) -> Classifier:
    """The classifier to begin with; a head of the same classes is kept, a new one begins near zero."""
    if weights is None:
        return create_classifier(model, num_classes=len(classes), classes=classes, **settings)
    network = load_classifier(weights, global_pool="avg", **settings)
    if network.num_classes != len(classes) or network.classes not in (None, classes):
        network.reset_classifier(len(classes))
        nn.init.trunc_normal_(cast(nn.Linear, network.head).weight, std=2e-5)
    network.classes = classes
    return network


def _finish(finished: Finished[Classifier, Accuracy], classes: list[str]) -> FinetuningResult:
    """Draw the pictures, write the accuracy per class, print the summary, and say where everything is."""
    accuracy, folder = cast(Accuracy, finished.quality), finished.folder
    curve, confusion, table = folder / "loss.png", folder / "confusion.png", folder / "per-class.csv"
    per_class = dict(zip(classes, accuracy.per_class().tolist(), strict=True))
    if finished.log.active:
        loss_curve(curve, read_metrics(folder))
        confusion_picture(confusion, accuracy.confusion, classes)
        with table.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["class", "images", "accuracy"])
            counts = accuracy.confusion.sum(dim=1).tolist()
            rows.writerows(
                (name, count, "" if math.isnan(share) else share)
                for (name, share), count in zip(per_class.items(), counts, strict=True)
            )
    tested = {name: share for name, share in per_class.items() if not math.isnan(share)}
    hardest = sorted(tested, key=tested.__getitem__)[:5]
    finished.summary(
        "fine-tuning finished",
        {
            "top-1": f"{accuracy.top1:.2%}",
            "top-5": f"{accuracy.top5:.2%}",
            "hardest classes": ", ".join(f"{name} {tested[name]:.0%}" for name in hardest),
            "best model": str(finished.checkpoint),
            "confusion matrix": str(confusion),
            "accuracy per class": str(table),
            "loss curve": str(curve),
            "images that could not be decoded": str(DecodingFailures(folder).count),
        },
    )
    return FinetuningResult(
        folder,
        finished.checkpoint,
        accuracy.top1,
        accuracy.top5,
        accuracy.loss,
        per_class,
        confusion,
        curve,
        finished.position.step,
    )
