"""Shows whether a change left training the same: every step's loss of small runs of each training command.

    python benchmarks/same_losses.py --output before.json
    python benchmarks/same_losses.py --output after.json
    python benchmarks/same_losses.py --compare before.json after.json

All runs are tiny, in float32, on one thread of the CPU, from fixed seeds and on images that the script makes, so that
two runs of the same code on the same machine give the same digits. It takes some minutes.
"""

import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import convmae
from convmae import UserError
from convmae.data.augmentation import AugmentationOptions
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.engine import EngineOptions
from convmae.training.logging import LoggingOptions, PictureLoggingOptions, read_metrics
from convmae.training.optimizer import (
    DetectionOptimizerOptions,
    LarsOptions,
    LayerDecayOptions,
    OptimizerOptions,
    SegmentationOptimizerOptions,
)

CLASSES = ("blue", "green", "red")
IMAGES = {"train": 8, "val": 4}  # of each class
FIGURES = ("loss", "grad_norm", "lr")
"""What is written down of each step."""

_COMMON: dict[str, Any] = {
    "engine": EngineOptions(accelerator="cpu", precision="float32", workers=0),
    "checkpoint": CheckpointOptions(every_epochs=100, keep=1),
    "logging": LoggingOptions(every_steps=1),
    "seed": 3,
}
_PRETRAINING: dict[str, Any] = {
    **_COMMON,
    "model": "tiny",
    "image_size": 64,
    "epochs": 7,  # of three steps
    "batch_size": 8,
    "optimizer": OptimizerOptions(base_lr=0.02, warmup_epochs=1),
    "logging": PictureLoggingOptions(every_steps=1, pictures_every_epochs=0),
}
_FINETUNING: dict[str, Any] = {
    **_COMMON,
    "model": "tiny",
    "image_size": 64,
    "epochs": 7,
    "batch_size": 8,
    "optimizer": LayerDecayOptions(base_lr=0.02, warmup_epochs=1),
}
_DETECTION: dict[str, Any] = {
    **_COMMON,
    "image_size": 64,
    "epochs": 7,
    "batch_size": 4,
    "evaluate_every_epochs": 3,
    "optimizer": DetectionOptimizerOptions(base_lr=0.03),
}
_SEGMENTATION: dict[str, Any] = {
    **_COMMON,
    "image_size": 64,
    "epochs": 7,
    "batch_size": 4,
    "evaluate_every_epochs": 3,
    "optimizer": SegmentationOptimizerOptions(base_lr=0.03),
}

Record = dict[str, Any]
"""Of a run: "steps", by figure a list; "evaluations", "final", by name; "weights", a digest of the kept model's."""


def runs(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and call of each run, in the order in which they build on each other."""
    images = _write_images(folder / "images")
    coco, ade20k = folder / "coco", folder / "ade20k"
    for place, layout in ((coco, "coco"), (ade20k, "ade20k")):
        convmae.scenes(output=place, layout=layout, train=12, val=4, image_size=(64, 96))
    data = str(images / "train")
    pretrained = folder / "runs" / "pretrain"

    def run(command: Callable[..., Any], settings: Record, name: str, **others: Any) -> tuple[str, Callable[[], Any]]:
        return name, lambda: command(**{**settings, "output": folder / "runs" / name, **others})

    pretrain, finetune, probe = convmae.pretrain, convmae.finetune, convmae.probe
    yield run(pretrain, _PRETRAINING, "pretrain", data=data)
    yield run(pretrain, _PRETRAINING, "pretrain complementary", data=data, complementary_sets=4)
    yield run(pretrain, _PRETRAINING, "pretrain mask_stage 1", data=data, mask_stage=1)
    yield run(pretrain, _PRETRAINING, "pretrain masked cells seen", data=data, masked_convolution=False)
    yield run(
        pretrain, _PRETRAINING, "pretrain dense, two passes", data=data, dense=True, accumulate=2, aug_repeats=2,
        norm_pix=False, multi_scale=False, optimizer=OptimizerOptions(base_lr=0.02, warmup_epochs=1, clip_grad=0.5),
    )  # fmt: skip
    yield run(pretrain, _PRETRAINING, "pretrain again", data=data, weights=pretrained, in_channels=3, mask_ratio=0.5)
    plain = AugmentationOptions(None, mixup=0.0, cutmix=0.0, label_smoothing=0.0)
    yield run(finetune, _FINETUNING, "finetune", data=str(images), augmentation=plain, drop_path=0.0)
    yield run(finetune, _FINETUNING, "finetune average, mixup", data=str(images), ema_decay=0.9, aug_repeats=2)
    yield run(
        finetune, {**_FINETUNING, "image_size": 48}, "finetune pretrained", data=str(images), weights=pretrained,
        accumulate=2, optimizer=LayerDecayOptions(base_lr=0.02, warmup_epochs=1, clip_grad=1.0),
    )  # fmt: skip
    yield run(probe, _COMMON, "probe fast", data=str(images), weights=pretrained, batch_size=8)
    yield run(
        probe, _COMMON, "probe published", data=str(images), weights=pretrained, form="published", batch_size=8,
        epochs=7, optimizer=LarsOptions(base_lr=3.0),
    )  # fmt: skip
    detect = convmae.detect.train
    yield run(detect, _DETECTION, "detect paper", data=str(coco), model="tiny", form="paper")
    yield run(
        detect, _DETECTION, "detect vitdet", data=str(coco), weights=pretrained, form="vitdet", accumulate=2,
        grad_checkpointing=True,
        optimizer=DetectionOptimizerOptions(base_lr=0.03, schedule="steps", layer_decay=0.8, clip_grad=10.0),
    )  # fmt: skip
    segment = convmae.segment.train
    yield run(segment, _SEGMENTATION, "segment", data=str(ade20k), model="tiny")
    yield run(segment, _SEGMENTATION, "segment pretrained", data=str(ade20k), weights=pretrained, accumulate=2)


def measure(folder: Path) -> dict[str, Record]:
    """What each run did, by its name; their files go into `folder`."""
    torch.set_num_threads(1)
    records = {}
    for name, call in runs(folder):
        result = call()
        steps = [record for record in read_metrics(result.folder) if "loss" in record and "lr" in record]
        judged = [record for record in read_metrics(result.folder) if record.keys() - {*_OF_STEPS, *FIGURES}]
        records[name] = {
            "steps": {figure: [record[figure] for record in steps] for figure in FIGURES},
            "evaluations": {
                f"{key} at step {record['step']}": value
                for record in judged
                for key, value in record.items()
                if key not in {*_OF_STEPS, *FIGURES}
            },
            "final": dict(_numbers("", result)),
            "weights": _digest(result.checkpoint / "model.safetensors"),
        }
    return records


_OF_STEPS = ("step", "epoch", "images_per_second", "skipped_steps")  # what else the log has of a step


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a command's result, with their names."""
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, torch.Tensor):
        yield from _numbers(name, value.flatten().tolist())
    elif is_dataclass(value):
        yield from _numbers(name, {field.name: getattr(value, field.name) for field in fields(value)})
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _numbers(f"{name}.{key}".lstrip("."), entry)
    elif isinstance(value, list | tuple):
        yield from _numbers(name, dict(enumerate(value)))


def _digest(path: Path) -> str:
    """Of all tensors of a weights file, under their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write_images(folder: Path) -> Path:
    """Class folders of smooth noise around a colour each, with splits train and val."""
    numbers = numpy.random.default_rng(0)
    for split, count in IMAGES.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                coarse = numbers.integers(0, 160, (5, 4, 3), dtype=numpy.uint8)
                coarse[..., 2 - label] += 90
                image = Image.fromarray(coarse).resize((80 + 3 * index, 72), Image.Resampling.BICUBIC)
                image.save(folder / split / name / f"{index}.png")
    return folder


def differences(old: Record, new: Record) -> tuple[float, int]:
    """The largest difference of any number of two runs, and how many figures differ or only one of them has."""
    pairs = [
        (one, other)
        for figure in FIGURES
        for one, other in _paired(dict(enumerate(old["steps"][figure])), dict(enumerate(new["steps"][figure])))
    ]
    for part in ("evaluations", "final"):
        pairs += _paired(old[part], new[part])
    apart = [_apart(one, other) for one, other in pairs]
    return max(apart, default=0.0), sum(value > 0 for value in apart) + (old["weights"] != new["weights"])


def _paired(old: dict[Any, float], new: dict[Any, float]) -> list[tuple[float | None, float | None]]:
    return [(old.get(key), new.get(key)) for key in {**old, **new}]


def _apart(old: float | None, new: float | None) -> float:
    if old is None or new is None:
        return math.inf
    if math.isnan(old) or math.isnan(new):
        return 0.0 if math.isnan(old) and math.isnan(new) else math.inf
    return 0.0 if old == new else abs(old - new)


def compare(old: dict[str, Record], new: dict[str, Record]) -> bool:
    """Print a line for each run; returns whether all are the same to the last digit."""
    table = Table()
    table.add_column("command", no_wrap=True)
    for column in ("steps", "first loss", "last loss", "largest difference", "figures that differ", "weights"):
        table.add_column(column, justify="right")
    same = True
    for name in {**old, **new}:
        if name not in old or name not in new:
            table.add_row(name, *["-"] * 3, f"only in the {'old' if name in old else 'new'} file", "-", "-")
            same = False
            continue
        losses = new[name]["steps"]["loss"]
        largest, number = differences(old[name], new[name])
        equal = old[name]["weights"] == new[name]["weights"]
        same = same and not number
        ends = [repr(losses[0]), repr(losses[-1])] if losses else ["-", "-"]
        table.add_row(name, str(len(losses)), *ends, repr(largest), str(number), "same" if equal else "different")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print("all the same, to the last digit" if same else "not the same")
    return same


def main() -> bool:
    """Measure or compare; returns whether there is nothing to complain of."""
    parser = ArgumentParser(description="Every step's loss of small runs of each training command, to compare.")
    parser.add_argument("--output", type=Path, help="a JSON file for what is measured")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="two such files, to compare")
    chosen = parser.parse_args()
    if (chosen.output is None) == (chosen.compare is None):
        raise UserError("there is nothing to do: give --output FILE or --compare OLD NEW")
    if chosen.compare:
        old, new = (json.loads(path.read_text()) for path in chosen.compare)
        return compare(old, new)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder))
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(measured, indent=1))  # each number as repr writes it
    return True


if __name__ == "__main__":
    try:
        sys.exit(0 if main() else 1)
    except UserError as error:
        sys.exit(f"same_losses.py: {error}")
