"""`convmae bench`: a training step, ours against the published formulation and a plain ViT, in turn in one process."""

import gc
import json
import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from convmae.benchmarks.arithmetic import matrix_product_peak
from convmae.benchmarks.contenders import (
    OURS,
    PUBLISHED,
    VIT,
    Contender,
    autocast,
    count_steps,
    make_contenders,
    make_step,
)
from convmae.benchmarks.memory import largest_fitting, state_bytes
from convmae.benchmarks.turns import Spread, machine_name, take_turns
from convmae.errors import UserError, check_local
from convmae.masking import random_visible

_IMAGENET, _EPOCHS = 1_281_167, 1600  # training images, and epochs of the paper's longest run


@dataclass(frozen=True)
class StepFigures:
    """What a training step costs in one way to compute it."""

    name: str
    images_per_second: Spread
    milliseconds: float
    """Of a step, the median."""
    ratio: Spread
    """Images/s over those of the published formulation in the same round."""
    gmac: float
    """Billions of multiply-accumulates, forward, one image."""
    share_of_peak: float
    """Multiply-accumulates a second, forward and backward as three times the forward, over those of a large product."""
    peak_gib: float
    """Weights, gradients, AdamW's moments, and what a step holds at most."""
    loss: float
    """Of the first step's images under one mask; ours and the published formulation have the same weights."""


@dataclass(frozen=True)
class BenchResult:
    """The ways to compute a step in one precision, timed in turn."""

    precision: str
    peak_gmacs: float
    """Billions of multiply-accumulates a second of a large matrix product in this precision."""
    steps: list[StepFigures]
    time_over_vit: Spread | None
    """Our time over that of MAE with a plain ViT in the same round; None for fine-tuning."""
    largest_batches: dict[str, int] | None = None
    """Images of the largest step of each that fits on the device, where it was asked for."""


def bench(
    model: str = "base",
    task: Literal["pretrain", "finetune"] = "pretrain",
    image_size: int = 224,
    batch_size: int = 16,
    rounds: int = 5,
    precision: Literal["both", "float32", "bf16"] = "both",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    compile: Literal["auto", "yes", "no"] = "auto",  # the flag's name is torch's
    largest_batch: bool = False,
    output: Path | None = None,
) -> list[BenchResult]:
    """Time a training step (forward, backward, AdamW) of ours against two others, in turn in one process.

    The published formulation, on the same weights, computes the convolution stages densely, with 1x1 convolutions and
    LayerNorm on NCHW maps, and spells attention out as matmul, softmax, matmul; it is never compiled. For pretraining
    there is also MAE with timm's ViT of the same width (ViT-B beside base) and the same decoder, compiled where ours
    is.

    Args:
        model: size: tiny, small, base, large or huge.
        task: pretrain, the masked autoencoder, or finetune, the classifier on whole images.
        image_size: pixels, a multiple of 16.
        batch_size: images a step.
        rounds: timed rounds, after two that warm up and measure memory; a round is one step of each.
        precision: float32, bf16 autocast, or both in turn.
        device: cpu, cuda, or cuda where there is one.
        compile: whether to compile ours and the plain ViT with torch.compile; auto does on a GPU.
        largest_batch: search for the largest batch that fits on the GPU, too.
        output: a JSON file for the figures.
    """
    if output is not None:
        check_local("output", output)
    if rounds < 1 or batch_size < 1:
        raise UserError("rounds and batch_size must be at least 1: raise them")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device on this machine: use --device cpu")
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    if largest_batch and place.type != "cuda":
        raise UserError("the largest batch is that of a GPU's memory: leave --largest-batch out, or use --device cuda")
    if place.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as in training
    compiled = compile == "yes" or (compile == "auto" and place.type == "cuda")
    torch.manual_seed(0)
    contenders = make_contenders(task, model, image_size)
    macs = count_steps(task, model, image_size)
    images = torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8, device=place)
    start = {c.name: {key: value.clone() for key, value in c.model.state_dict().items()} for c in contenders}

    results = []
    for kind in ["float32", "bf16"] if precision == "both" else [precision]:
        for contender in contenders:
            contender.model.load_state_dict(start[contender.name])
            contender.model.to(place)
        results.append(_compare(contenders, images, kind, rounds, compiled, macs))
    title = (
        f"convmae {model}, {task}, {image_size}x{image_size}, batch {batch_size}, {rounds} rounds, "
        f"{machine_name(place)}, torch {torch.__version__}{', compiled' if compiled else ''}"
    )
    _print(title, results)
    if task == "pretrain" and place.type == "cuda":
        _print_cost(results[-1])
    if largest_batch:
        for number, result in enumerate(results):
            found = {
                c.name: search_largest_batch(c, contenders, images, result.precision, compiled) for c in contenders
            }
            results[number] = replace(result, largest_batches=found)
            Console().print(f"Largest batches, {result.precision}: {found}")
    if output is not None:
        output = Path(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"title": title, "results": [asdict(result) for result in results]}, indent=2))
    return results


def _compare(
    contenders: list[Contender],
    images: Tensor,
    precision: str,
    rounds: int,
    compiled: bool,
    macs: dict[str, int],
) -> BenchResult:
    """Time one step of each in turn, `rounds` times."""
    if compiled:
        torch.compiler.reset()
    device, batch = images.device, images.shape[0]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    peak = matrix_product_peak(device, dtype)
    losses = {c.name: _loss_under_one_mask(c, images, precision) for c in contenders}
    steps = {c.name: partial(make_step(c, precision, compiled), images) for c in contenders}
    seconds, peaks = take_turns(steps, device, rounds, precision)
    figures = [
        StepFigures(
            c.name,
            Spread.of([batch / s for s in seconds[c.name]]),
            1e3 * statistics.median(seconds[c.name]),
            Spread.of_ratios(seconds[PUBLISHED], seconds[c.name]),
            macs[c.name] / 1e9,
            3 * macs[c.name] * batch / statistics.median(seconds[c.name]) / peak,
            (peaks[c.name] + state_bytes(c.model)) / 2**30,
            losses[c.name],
        )
        for c in contenders
    ]
    over_vit = Spread.of_ratios(seconds[OURS], seconds[VIT]) if VIT in seconds else None
    return BenchResult(precision, peak / 1e9, figures, over_vit)


@torch.no_grad()
def _loss_under_one_mask(contender: Contender, images: Tensor, precision: str) -> float:
    height, width = (side // 16 for side in images.shape[2:])
    generator = torch.Generator().manual_seed(0)
    visible = random_visible(images.shape[0], (height, width), generator=generator, device=images.device)
    with autocast(images.device, precision):
        return contender.loss_of(images, visible).item()


def search_largest_batch(
    contender: Contender, contenders: list[Contender], images: Tensor, precision: str, compiled: bool
) -> int:
    """The most images of a step that fit on the device with nothing else there, where a step of `images` does."""
    if compiled:
        torch.compiler.reset()
    for other in contenders:
        other.model.to("cpu")
    contender.model.to(images.device)
    step = make_step(contender, precision, compiled)
    step(images)  # makes the optimiser's state

    def fits(batch: int) -> bool:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            step(images[torch.arange(batch, device=images.device) % images.shape[0]])
        except RuntimeError as error:  # the allocator's, or that of a library that found no room
            if "out of memory" not in str(error):
                raise
            contender.model.zero_grad()
            return False
        return True

    return largest_fitting(fits, images.shape[0])


def _print(title: str, results: list[BenchResult]) -> None:
    console = Console()
    console.print(title)
    for result in results:
        columns = [_column(step, result.steps[0]) for step in result.steps]
        table = Table(result.precision)
        for step in result.steps:
            table.add_column(step.name, justify="right")
        for row in columns[0]:
            table.add_row(row, *(column[row] for column in columns))
        console.print(table)
        console.print(f"The peak is that of a large matrix product: {result.peak_gmacs:.0f} GMAC/s.")
        if (over := result.time_over_vit) is not None:
            console.print(f"Our time over that of {VIT}: {over.median:.2f}x ({over.low:.2f}-{over.high:.2f}).")


def _column(step: StepFigures, first: StepFigures) -> dict[str, str]:
    speed, ratio = step.images_per_second, step.ratio
    return {
        "images/s": f"{speed.median:.2f}",
        "  range": f"{speed.low:.2f}-{speed.high:.2f}",
        "  ratio": f"{ratio.median:.2f}x",
        "  range of ratio": f"{ratio.low:.2f}-{ratio.high:.2f}",
        "ms a step": f"{step.milliseconds:.1f}",
        "GMAC an image": f"{step.gmac:.2f}",
        "share of the peak": f"{step.share_of_peak:.0%}",
        "memory, GiB": f"{step.peak_gib:.2f}",
        "  ratio of memory": f"{step.peak_gib / first.peak_gib:.2f}x",
        "loss": f"{step.loss:.6f}",
    }


def _print_cost(result: BenchResult) -> None:
    hours = _EPOCHS * _IMAGENET / result.steps[-1].images_per_second.median / 3600
    Console().print(
        f"At this speed ({result.precision}) {_EPOCHS} epochs of ImageNet-1K ({_IMAGENET:,} images) take "
        f"{hours:,.0f} hours of one such device."
    )
