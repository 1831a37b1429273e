"""What pretraining is worth: the same probes and the same fine-tuning from pretrained and from random weights.

    python benchmarks/learning.py [--data digits] [--seeds 3] [--output runs/learning]

digits: scikit-learn's 1,797 handwritten digits (pip install 'convmae[demo]') at 64x64. The first 1,200 are
pretrained on without their labels and are the labelled training images too, the other 597 are tested on. Any folder of
class folders takes their place: two thirds of each class for training, the rest for testing.

Every seed pretrains, probes with all labels and with ten a class, and fine-tunes on both from pretrained weights, with
layer decay 0.8, and from scratch, without. Prints a table of means and ranges over the seeds; beside it in the output's
folder, `learning.json` and `learning.png`. A seed whose results are there already is not run again.
"""

import json
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

import convmae
from convmae import weights as weights_files
from convmae.data.augmentation import AugmentationOptions
from convmae.data.sources import EXTENSIONS
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.engine import EngineOptions
from convmae.training.logging import LoggingOptions, PictureLoggingOptions
from convmae.training.optimizer import LayerDecayOptions, OptimizerOptions

SHOTS = 10  # labelled images a class of the small training set
TRAINING_DIGITS = 1200
TRAINING_SHARE = 2 / 3  # of a folder's images
WHOLE = 1.0  # crop_pct: these images have no margin to leave out
ENGINE = EngineOptions(workers=1)
# Nothing that turns one digit into another: no flips, no mixing, no erasing.
CROPS = AugmentationOptions(
    auto_augment=None, crop_scale=(0.5, 1.0), flip=0.0, random_erasing=0.0, mixup=0.0, cutmix=0.0
)


def main(
    data: str = "digits",
    seeds: int = 3,
    output: Path = Path("runs/learning"),
    model: str = "tiny",
    image_size: int = 64,
    epochs: int = 100,
    batch_size: int = 64,
    base_lr: float = 8e-3,
    finetune_steps: int = 400,
) -> None:
    """Run what is missing and print the table.

    Args:
        data: digits, or a folder of class folders.
        seeds: how many runs.
        output: folder for images, runs and results.
        model: size.
        image_size: pixels along the side.
        epochs: of pretraining; every image is reconstructed four times an epoch, from complementary masks.
        batch_size: of pretraining.
        base_lr: of pretraining, for 256 images.
        finetune_steps: of each fine-tuning.
    """
    settings = {
        "data": data,
        "model": model,
        "image_size": image_size,
        "epochs": epochs,
        "batch_size": batch_size,
        "base_lr": base_lr,
        "finetune_steps": finetune_steps,
    }
    kept = output / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        sys.exit(f"{output} holds results of other settings: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(settings, indent=2) + "\n")
    torch.set_num_threads(1)  # beside one process that loads images: the least processor time, on two cores
    if not (output / "images").exists():
        write_images(data, output / "images.incomplete")
        (output / "images.incomplete").rename(output / "images")
    results = []
    for seed in range(seeds):
        done = output / f"seed-{seed}" / "result.json"
        if not done.exists():
            result = run(seed, output, model, image_size, epochs, batch_size, base_lr, finetune_steps)
            done.write_text(json.dumps(result, indent=2) + "\n")
        results.append(json.loads(done.read_text()))
    (output / "learning.json").write_text(json.dumps(results, indent=2) + "\n")
    tell(results)
    draw(output / "learning.png", results)


# Images


def write_images(data: str, folder: Path) -> None:
    """folder/train/CLASS/images and folder/val/CLASS/images."""
    if data != "digits":
        link_images(Path(data), folder)
        return
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("train" if number < TRAINING_DIGITS else "val") / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * 255 / 16).astype(numpy.uint8))
        grey.resize((64, 64), Image.Resampling.BICUBIC).save(path)


def link_images(source: Path, folder: Path) -> None:
    """Links to the images of class folders, each class shuffled and divided."""
    for each in sorted(path for path in source.iterdir() if path.is_dir()):
        files = sorted(path for path in each.rglob("*") if path.suffix.lower() in EXTENSIONS)
        random.Random(0).shuffle(files)
        for number, file in enumerate(files):
            split = "train" if number < TRAINING_SHARE * len(files) else "val"
            link(file, folder / split / each.name / f"{number:05d}{file.suffix}")


def link(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(file.resolve())


def choose_few(images: Path, folder: Path, seed: int) -> None:
    """A labelled set with ten random training images of each class, and all the validation images."""
    folder.mkdir(parents=True)
    (folder / "val").symlink_to((images / "val").resolve())
    for each in sorted((images / "train").iterdir()):
        files = sorted(each.iterdir())
        for file in random.Random(seed).sample(files, min(SHOTS, len(files))):
            link(file, folder / "train" / each.name / file.name)


# Runs


def run(
    seed: int,
    output: Path,
    model: str,
    image_size: int,
    epochs: int,
    batch_size: int,
    base_lr: float,
    finetune_steps: int,
) -> dict[str, Any]:
    """Top-1 on the test images of everything that is compared, and what it cost."""
    images, folder = output / "images", output / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a seed that was not finished
    few = folder / "few"
    choose_few(images, few, seed)
    start = time.monotonic(), cpu_seconds()
    pretrained = convmae.pretrain(
        data=str(images / "train"),
        model=model,
        output=folder / "pretrain",
        epochs=epochs,
        batch_size=batch_size,
        image_size=image_size,
        norm_pix=False,
        complementary_sets=4,
        crop_scale=(0.5, 1.0),
        seed=seed,
        optimizer=OptimizerOptions(base_lr=base_lr, warmup_epochs=epochs / 10),
        engine=ENGINE,
        checkpoint=CheckpointOptions(every_epochs=50, keep=1),
        logging=PictureLoggingOptions(every_steps=50, pictures_every_epochs=0),
    )
    cost = {"pretraining": (time.monotonic() - start[0], cpu_seconds() - start[1])}
    torch.manual_seed(seed)
    untrained = convmae.create_autoencoder(model, image_size=image_size)
    weights_files.save_model(folder / "random.safetensors", untrained)
    top1: dict[str, dict[str, float]] = {}
    for name, weights in (("pretrained", pretrained.checkpoint), ("random", folder / "random.safetensors")):
        figures = top1[name] = {}
        for labels, data in (("all labels", images), (f"{SHOTS} labels a class", few)):
            place = folder / f"{name}, {labels}"
            probed = convmae.probe(
                str(data),
                weights,
                place / "probe",
                crop_pct=WHOLE,
                engine=EngineOptions(workers=1, precision="float32"),
            )
            figures[f"linear probe, {labels}"] = probed.top1
            if data is images:
                figures["k-NN"] = probed.neighbours_top1
            figures[f"fine-tuning, {labels}"] = finetune(
                data, weights if name == "pretrained" else None, place / "finetune", model, image_size, finetune_steps,
                seed,
            )  # fmt: skip
    cost["everything"] = (time.monotonic() - start[0], cpu_seconds() - start[1])
    return {
        "seed": seed,
        "seconds": {name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in cost.items()},
        "top1": top1,
    }


def finetune(
    data: Path, weights: Path | None, output: Path, model: str, image_size: int, steps: int, seed: int
) -> float:
    """Top-1 of the last model, so that the test images choose nothing."""
    images = sum(path.is_file() for path in (data / "train").rglob("*"))
    batch_size = min(50, images)
    epochs = max(1, steps // (images // batch_size))
    return convmae.finetune(
        data=str(data),
        weights=weights,
        model=model,
        output=output,
        epochs=epochs,
        batch_size=batch_size,
        image_size=image_size,
        crop_pct=WHOLE,
        evaluate_every_epochs=epochs,
        seed=seed,
        augmentation=CROPS,
        optimizer=LayerDecayOptions(base_lr=5e-3, layer_decay=0.8 if weights else 1.0),
        engine=ENGINE,
        checkpoint=CheckpointOptions(every_epochs=epochs, keep=1),
        logging=LoggingOptions(every_steps=50),
    ).top1


def cpu_seconds() -> float:
    """Of this process and of those that it has ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# Results


def tell(results: list[dict[str, Any]]) -> None:
    """Print a row for each way to judge: mean (lowest - highest) over the seeds."""
    table = Table(title=f"top-1 on the test images, {len(results)} seeds: mean (range)", title_justify="left")
    for heading in ("", "random weights", "pretrained"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in results[0]["top1"]["random"]:
        cells = []
        for weights in ("random", "pretrained"):
            values = [result["top1"][weights][name] for result in results]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})")
        table.add_row(name.replace("fine-tuning", "fine-tuning / training from scratch"), *cells)
    console = Console()
    console.print(table)
    for part in ("pretraining", "everything"):
        for kind in ("cpu", "wall"):
            minutes = ", ".join(f"{result['seconds'][part][kind] / 60:.1f}" for result in results)
            console.print(f"{part}, {kind} minutes: {minutes}")


def draw(path: Path, results: list[dict[str, Any]]) -> None:
    """The table as bars, a point for each seed."""
    figure = Figure(figsize=(7.5, 3.5), layout="constrained")
    axes = figure.subplots()
    names = list(results[0]["top1"]["random"])
    for shift, weights, colour in ((0.2, "random", "tab:gray"), (-0.2, "pretrained", "tab:blue")):
        values = [[100 * result["top1"][weights][name] for name in names] for result in results]
        places = [place + shift for place in reversed(range(len(names)))]
        axes.barh(
            places, [statistics.mean(column) for column in zip(*values, strict=True)], 0.38, color=colour, label=weights
        )
        for run_values in values:
            axes.plot(run_values, places, ".", color="black", markersize=4)
    axes.set_yticks(list(reversed(range(len(names)))), names)
    axes.set_xlabel("top-1 (%)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
