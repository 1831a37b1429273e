"""`convmae finetune`: class folders in, a classifier out, from pretrained weights or from scratch."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from convmae.commands.options import PixelOptions, flat_settings, origin_of, spread
from convmae.commands.pixels import settle_pixels, tell_no_colours
from convmae.data.augmentation import AugmentationOptions
from convmae.data.failures import DecodingFailures
from convmae.data.holdout import open_splits, read_held_out, write_held_out
from convmae.errors import check_rate
from convmae.evaluation.accuracy import Accuracy
from convmae.evaluation.multi_label import AveragePrecision
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
    """Share of validation images whose class is the first guess, in [0, 1]; not a number where images have several."""
    top5: float
    loss: float
    per_class: dict[str, float]
    """Share of each class's validation images that were recognised; its average precision where images have several."""
    confusion_matrix: Path | None
    """None where images are of several classes."""
    loss_curve: Path
    steps: int
    mean_average_precision: float | None = None
    """Where images may be of several classes, in [0, 1]."""


@spread("options", "pixels")
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
    pixels: PixelOptions = PixelOptions(),
    val_fraction: float | None = None,
) -> FinetuningResult:
    """Fine-tune a pretrained encoder to classify images, or train one from scratch; the paper's batches are of 1024.

    Args:
        data: a folder with train/CLASS/images and val/CLASS/images; a table, .csv or .tsv, with the columns path, label
            and split, or one of 0 and 1 for each class; wds/FOLDER, hfds/NAME, hfids/NAME, tfds/NAME or torch/NAME.
        weights: a pretraining run, checkpoint or file, ours or published; left out, training starts from scratch.
        model: size, for training from scratch: tiny, small, base, large or huge.
        image_size: pixels, one number or [height, width], multiples of 16; by default that of the weights, else 224.
        in_channels: 1 (grey), 3 (RGB), 4 (RGBA), or the number of bands of multi-band TIFF and .npy files; by default
            that of the weights, else 3. For another number than theirs the first layer is adapted.
        crop_pct: share of the resized shorter side that the centre crop of an evaluation keeps; by default that of the
            weights, else 0.875.
        aug_repeats: crops taken of each image that is decoded, all in one batch (repeated augmentation); an epoch stays
            as many crops as there are images, and so takes one in aug_repeats of them.
        drop_path: rate of stochastic depth in the last block; it grows linearly from 0.
        train_split: split that is trained on.
        val_split: split that decides which model is the best.
        skip_damaged: leave out and list images that cannot be decoded instead of stopping.
        augmentation: how training images are varied.
        val_fraction: share of each class's training images that is held out to choose the best model, such as 0.1,
            where there is no val_split.

    Where a table gives images several labels, with | between them, each class is learned by itself, by binary
    cross-entropy, and the mean average precision decides which model is the best.

    Raises UserError for settings or data that cannot work, and Interrupted after SIGTERM or Ctrl-C, a checkpoint being
    written.
    """
    settings = flat_settings(locals())
    check_rate(drop_path=drop_path)
    run = Run(options, settings)
    training, validation = open_splits(
        data,
        train_split,
        val_split,
        val_fraction=val_fraction,
        seed=options.seed,
        kept=read_held_out(options.output) if run.checkpoint is not None else (),
        shuffled=True,
    )
    torch.manual_seed(options.seed)
    stated = {"image_size": image_size, "in_channels": in_channels, "crop_pct": crop_pct}
    network = _network(
        weights,
        model,
        training.classes,
        training.multi_label,
        drop_path=drop_path,
        **{name: value for name, value in stated.items() if value is not None},
    )
    decoding = settle_pixels(network, pixels, [training, validation], run)
    if augmentation.auto_augment or augmentation.color_jitter:
        tell_no_colours(training, decoding, "policies and jitter")
    network.set_grad_checkpointing(options.grad_checkpointing)

    fabric = run.start()
    if val_fraction is not None and fabric.is_global_zero:
        write_held_out(options.output, validation)
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
        decoding=decoding,
    )
    return _finish(run.train(fabric, job), training.classes)


def _network(weights: Path | None, model: str, classes: list[str], multi_label: bool, **settings: Any) -> Classifier:
    """The classifier to begin with; a head of the same classes is kept, a new one begins near zero."""
    if weights is None:
        return create_classifier(model, num_classes=len(classes), classes=classes, multi_label=multi_label, **settings)
    network = load_classifier(weights, global_pool="avg", **settings)
    same = network.num_classes == len(classes) and network.classes in (None, classes)
    if not same or network.multi_label != multi_label:
        network.reset_classifier(len(classes))
        nn.init.trunc_normal_(cast(nn.Linear, network.head).weight, std=2e-5)
    network.classes, network.multi_label = classes, multi_label
    return network


def _finish(finished: Finished[Classifier, Accuracy | AveragePrecision], classes: list[str]) -> FinetuningResult:
    """Draw the pictures, write the figures per class, print the summary, and say where everything is."""
    quality, folder = finished.quality, finished.folder
    curve, confusion, table = folder / "loss.png", folder / "confusion.png", folder / "per-class.csv"
    if isinstance(quality, AveragePrecision):
        figure, shares, counts = "average precision", quality.classes, quality.counts
        top1 = top5 = math.nan
        figures = {"mean average precision": f"{quality.score:.2%}"}
    else:
        assert quality is not None
        figure, shares, counts = "accuracy", quality.per_class(), quality.confusion.sum(dim=1)
        top1, top5 = quality.top1, quality.top5
        figures = {"top-1": f"{top1:.2%}", "top-5": f"{top5:.2%}"}
    per_class = dict(zip(classes, shares.tolist(), strict=True))
    if finished.log.active:
        loss_curve(curve, read_metrics(folder))
        if isinstance(quality, Accuracy):
            confusion_picture(confusion, quality.confusion, classes)
        _write_table(table, figure.replace(" ", "_"), per_class, counts.tolist())
    tested = {name: share for name, share in per_class.items() if not math.isnan(share)}
    hardest = sorted(tested, key=tested.__getitem__)[:5]
    drawn = {"confusion matrix": str(confusion)} if isinstance(quality, Accuracy) else {}
    finished.summary(
        "fine-tuning finished",
        {
            **figures,
            "hardest classes": ", ".join(f"{name} {tested[name]:.0%}" for name in hardest),
            "best model": str(finished.checkpoint),
            **drawn,
            f"{figure} per class": str(table),
            "loss curve": str(curve),
            "images that could not be decoded": str(DecodingFailures(folder).count),
        },
    )
    return FinetuningResult(
        folder,
        finished.checkpoint,
        top1,
        top5,
        quality.loss,
        per_class,
        confusion if isinstance(quality, Accuracy) else None,
        curve,
        finished.position.step,
        quality.score if isinstance(quality, AveragePrecision) else None,
    )


def _write_table(path: Path, figure: str, per_class: dict[str, float], counts: list[int]) -> None:
    """Write the figure of each class, "-" for one without images."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "images", figure])
        for (name, share), count in zip(per_class.items(), counts, strict=True):
            rows.writerow((name, count, "-" if math.isnan(share) else share))
