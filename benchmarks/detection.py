"""Training steps and inference of the detector, ours against the same model with unfused attention, in turn.

    python benchmarks/detection.py [--form vitdet] [--precision float32] [--rounds 5] [--output detection.json]

Both have the same weights, images and targets, and the generators start each round alike, so that both sample the same
boxes. Images are random, with seven objects each, as many as COCO's have on average. Weights are random too, so the
scores are such that every image has as many detections as there can be.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from convmae.benchmarks.contenders import OURS, Contender, autocast, make_step
from convmae.benchmarks.memory import state_bytes
from convmae.benchmarks.turns import Spread, Turns, machine_name, take_turns
from convmae.benchmarks.unfused import with_unfused_attention
from convmae.errors import UserError
from convmae.kinds import create_detector
from convmae.models.detector import FORMS, Detector, Target

UNFUSED = "unfused"
OBJECTS = 7  # in an image, of COCO's training images 7.3

Detectors = dict[str, Detector]  # by name, the unfused one first


@dataclass(frozen=True)
class Figures:
    """What a way to compute costs."""

    name: str
    images_per_second: Spread
    milliseconds: float
    """Of a batch, the median."""
    ratio: Spread
    """Images/s over those with unfused attention in the same round."""
    peak_gib: float
    """Weights and what the work holds at most; in training gradients and AdamW's moments, too."""
    outcome: float
    """The loss of a batch, or detected objects an image."""


@dataclass(frozen=True)
class Comparison:
    """One form in one precision: training and inference in both ways."""

    form: str
    precision: str
    training: list[Figures]
    inference: list[Figures]


def make_detectors(form: str, model: str, image_size: int, checkpointing: bool) -> Detectors:
    """Both ways with the same weights, of which the relative positions and the scores are not as a new model's."""
    ours = create_detector(model, image_size=(image_size, image_size), form=form)
    ours.set_grad_checkpointing(checkpointing)
    for name, parameter in ours.named_parameters():
        if "positions." in name:
            nn.init.normal_(parameter, std=0.02)
    # Else no class would pass the threshold, and inference would end before its last part: masks and their pasting.
    with torch.no_grad():
        ours.roi_heads.box_predictor.cls_score.bias[1] = 10
    return {UNFUSED: with_unfused_attention(ours), OURS: ours}


def random_targets(image_size: int, batch_size: int, num_classes: int, device: torch.device) -> list[Target]:
    """Rectangles whose sides are a sixteenth to half of the image's."""

    def target() -> Target:
        sides = torch.randint(image_size // 16, image_size // 2, (OBJECTS, 2))
        corners = (torch.rand(OBJECTS, 2) * (image_size - sides)).long()
        boxes = torch.cat([corners, corners + sides], dim=1)
        masks = torch.zeros(OBJECTS, image_size, image_size, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        labels = torch.randint(1, num_classes + 1, (OBJECTS,))
        return {"boxes": boxes.float().to(device), "labels": labels.to(device), "masks": masks.to(device)}

    return [target() for _ in range(batch_size)]


def compare(
    form: str, precision: str, detectors: Detectors, images: Tensor, targets: list[Target], rounds: int
) -> Comparison:
    """Time both ways, inference first: it has the weights that nothing has trained."""
    device, batch = images.device, len(images)

    def detect(detector: Detector) -> list[Target]:
        with torch.inference_mode(), autocast(device, precision):
            return detector.eval().detect(images)

    def loss_of(detector: Detector) -> Callable[[Tensor, Tensor | None], Tensor]:
        return lambda x, _: detector.train()(x, targets).loss

    def first_loss(detector: Detector) -> float:
        torch.manual_seed(0)
        with torch.no_grad(), autocast(device, precision):
            return loss_of(detector)(images, None).item()

    found = {name: sum(len(of_image["boxes"]) for of_image in detect(way)) for name, way in detectors.items()}
    turns = take_turns({name: partial(detect, way) for name, way in detectors.items()}, device, rounds, "inference")
    inference = _figures(detectors, turns, {name: number / batch for name, number in found.items()}, batch, moments=0)

    losses = {name: first_loss(way) for name, way in detectors.items()}
    contenders = [Contender(name, way, loss_of(way), compiles=False) for name, way in detectors.items()]
    steps = {c.name: partial(make_step(c, precision, compiled=False), images) for c in contenders}
    turns = take_turns(steps, device, rounds, "training")
    return Comparison(form, precision, _figures(detectors, turns, losses, batch, moments=2), inference)


def _figures(detectors: Detectors, turns: Turns, outcomes: dict[str, float], batch: int, moments: int) -> list[Figures]:
    return [
        Figures(
            name,
            Spread.of([batch / s for s in turns.seconds[name]]),
            1e3 * statistics.median(turns.seconds[name]),
            Spread.of_ratios(turns.seconds[UNFUSED], turns.seconds[name]),
            (turns.peaks[name] + state_bytes(detector, moments)) / 2**30,
            outcomes[name],
        )
        for name, detector in detectors.items()
    ]


def main(
    form: Literal["both", "paper", "vitdet"] = "both",
    model: str = "base",
    image_size: int = 1024,
    batch_size: int = 1,
    rounds: int = 5,
    precision: Literal["both", "float32", "bf16"] = "both",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    checkpointing: bool = False,
    output: Path | None = None,
) -> list[Comparison]:
    """Print a table for each form and precision.

    Args:
        form: paper, vitdet, or both in turn.
        model: size: tiny, small, base, large or huge.
        image_size: pixels, a multiple of 32 from 64 on.
        batch_size: images a step.
        rounds: timed rounds, after one that warms up and one that measures memory.
        precision: float32, bf16 autocast, or both in turn.
        device: cpu, cuda, or cuda where there is one.
        checkpointing: whether training computes the encoder's blocks twice.
        output: a JSON file for the figures.
    """
    if rounds < 1 or batch_size < 1:
        raise UserError("rounds and batch_size must be at least 1: raise them")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device on this machine: use --device cpu")
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    torch.set_float32_matmul_precision("high" if place.type == "cuda" else "highest")  # as in training
    comparisons = []
    for chosen in FORMS if form == "both" else [form]:
        for kind in ["float32", "bf16"] if precision == "both" else [precision]:
            torch.manual_seed(0)
            detectors = make_detectors(chosen, model, image_size, checkpointing)
            images = torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8).to(place)
            targets = random_targets(image_size, batch_size, detectors[OURS].num_classes, place)
            for detector in detectors.values():
                detector.to(place)
            comparisons.append(compare(chosen, kind, detectors, images, targets, rounds))
    title = (
        f"detector, {model}, {image_size}x{image_size}, batch {batch_size}, {rounds} rounds, {machine_name(place)}, "
        f"torch {torch.__version__}{', checkpointing' if checkpointing else ''}"
    )
    _print(title, comparisons)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"title": title, "comparisons": [asdict(x) for x in comparisons]}, indent=2))
    return comparisons


def _print(title: str, comparisons: list[Comparison]) -> None:
    console = Console()
    console.print(title)
    for comparison in comparisons:
        trained, inferred = comparison.training, comparison.inference
        columns = {f"training {way.name}": _column(way, trained[0], "loss") for way in trained}
        columns |= {f"inference {way.name}": _column(way, inferred[0], "objects an image") for way in inferred}
        table = Table()
        table.add_column(f"{comparison.form}, {comparison.precision}", no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right")
        for row in dict.fromkeys(row for column in columns.values() for row in column):
            table.add_row(row, *(column.get(row, "") for column in columns.values()))
        console.print(table)


def _column(way: Figures, first: Figures, outcome: str) -> dict[str, str]:
    speed, ratio = way.images_per_second, way.ratio
    return {
        "images/s": f"{speed.median:.3f}",
        "  range": f"{speed.low:.3f}-{speed.high:.3f}",
        "  ratio": f"{ratio.median:.2f}x",
        "  range of ratio": f"{ratio.low:.2f}-{ratio.high:.2f}",
        "ms a batch": f"{way.milliseconds:.0f}",
        "memory, GiB": f"{way.peak_gib:.2f}",
        "  ratio of memory": f"{way.peak_gib / first.peak_gib:.2f}x",
        outcome: f"{way.outcome:.6g}",
    }


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False)
    except UserError as error:
        sys.exit(f"detection.py: {error}")
