"""`convmae predict`: the classes of images by a fine-tuned classifier."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from convmae.commands.frozen import (
    OrderedBatches,
    checked_output,
    load_frozen_classifier,
    open_ordered_images,
    report_damaged,
)
from convmae.commands.options import BatchOptions, CropOptions, LimitOptions, spread
from convmae.errors import UserError
from convmae.training.checkpoint import replace_file

_SHOWN, _SHOWN_CLASSES = 20, 3  # images in the table on the terminal, and classes of each


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the most probable first."""

    path: str
    classes: tuple[str, ...]
    """Names, or numbers where the weights file records no names; where an image may be of several, the likely ones."""
    probabilities: tuple[float, ...]


@spread("crop", "reading", "limits")
@torch.inference_mode()
def predict(
    images: str | list[str],
    weights: Path,
    output: Path | None = None,
    top: int = 5,
    crop: CropOptions = CropOptions(),
    reading: BatchOptions = BatchOptions(),
    limits: LimitOptions = LimitOptions(),
    threshold: float | None = None,
) -> list[Prediction]:
    """Tell the most probable classes of images.

    Args:
        images: an image; a folder of images at any depth; a list of images, .txt, or .csv with a column path; several
            folders and lists with commas between them; hfds/NAME; or demo.
        weights: a fine-tuning run's folder, or a classifier's weights file.
        output: a CSV file with a row for each image: path, class_1, probability_1, class_2, ...
        top: classes to name for each image; the terminal shows three.
        threshold: least probability of a class that is named, where the classifier was trained on several classes an
            image, by default 0.5; top does not count then.

    Raises UserError for weights without a classification head and for unreadable images.
    """
    if top < 1:
        raise UserError(f"top is {top}: it must be at least 1")
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}: choose a probability from 0 to 1")
    if output is not None:
        output = checked_output(output, (".csv",))
    source = open_ordered_images(images, reading.split)
    model = load_frozen_classifier(weights, crop.image_size, crop.crop_pct, reading.engine, limits.max_pixels)
    network = model.network
    if not network.num_classes:
        raise UserError(f"{weights} has no classification head: fine-tune first, with convmae finetune")
    if threshold is not None and not network.multi_label:
        raise UserError(f"{weights} gives each image one class, so there is no threshold: leave it out, or give --top")
    least = 0.5 if threshold is None else threshold
    classes = network.classes or [str(number) for number in range(network.num_classes)]
    batches = OrderedBatches(model, model.center_crop, source, reading, "predicting")
    predictions = []
    for batch in batches:
        with model.fabric.autocast():
            logits = network(batch["images"].to(model.fabric.device, non_blocking=True))
        logits = logits.float()
        if network.multi_label:
            found = logits.sigmoid().sort(dim=1, descending=True)
        else:
            found = logits.softmax(dim=1).topk(min(top, len(classes)), dim=1)
        for index, probabilities, numbers in zip(
            batch["indices"].tolist(), *map(torch.Tensor.tolist, found), strict=True
        ):
            if network.multi_label:
                probabilities = [probability for probability in probabilities if probability >= least]
            names = tuple(classes[number] for number in numbers[: len(probabilities)])
            predictions.append(Prediction(source.image_name(index), names, tuple(probabilities)))
    report_damaged(batches.damaged)
    if not predictions:
        raise UserError(f"none of the images of {images} can be decoded: check the files")
    _show(predictions)
    if output is not None:
        replace_file(output, lambda path: _write(path, predictions))
        Console().print(f"{len(predictions)} predictions: {output}", soft_wrap=True)
    return predictions


def _show(predictions: Sequence[Prediction]) -> None:
    several = any(len(one.classes) > 1 for one in predictions)
    table = Table("image", "class", "probability", *(["then"] if several else []))
    table.columns[0].overflow = "fold"
    for one in predictions[:_SHOWN]:
        named = [(name, f"{probability:.1%}") for name, probability in zip(one.classes, one.probabilities, strict=True)]
        first, *others = named or [("-", "-")]
        then = ", ".join(f"{name} {probability}" for name, probability in others[: _SHOWN_CLASSES - 1])
        table.add_row(*map(Text, (one.path, *first, *([then] if several else []))))
    Console().print(table)
    if len(predictions) > _SHOWN:
        Console().print(f"and {len(predictions) - _SHOWN} more")


def _write(path: Path, predictions: Sequence[Prediction]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        ranks = range(1, max(len(one.classes) for one in predictions) + 1)
        rows.writerow(["path", *(f"{column}_{rank}" for rank in ranks for column in ("class", "probability"))])
        for one in predictions:
            pairs = zip(one.classes, one.probabilities, strict=True)
            values = [value for pair in pairs for value in pair]
            rows.writerow([one.path, *values, *[""] * (2 * len(ranks) - len(values))])
