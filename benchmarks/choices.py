"""Measures again the choices that the package made between equal computations, on this machine.

    python benchmarks/choices.py [--rounds 7] [--batch_size 16] [--device cpu] [--output choices.json]

Shapes are those of base at 224x224, 75% masked (letters as in `convmae.packing`). The ways of a comparison take turns
within each round, forward and backward timed apart; ratios are of ways timed in the same round, all figures medians.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import conv2d, gelu, scaled_dot_product_attention

from convmae.masking import random_visible
from convmae.ops.linear import linear, mlp
from convmae.ops.masked_depthwise import masked_depthwise, masked_depthwise_dense
from convmae.packing import Packing

STAGES = {"stage 1": (4, 256), "stage 2": (2, 384)}  # cells along a token's side, channels
PARTS = ("forward", "backward", "both")


class Way(NamedTuple):
    """One way to compute: `compute(*inputs)`, differentiated by all inputs, over so many cells (0: not counted)."""

    compute: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    cells: int = 0


Comparisons = Iterator[tuple[str, dict[str, Way]]]  # what is compared, and the ways by name; ratios are to the first
Random = Callable[..., Tensor]  # a shape to random values that require a gradient
Figures = dict[str, dict[str, float]]  # by way, then by quantity


def attention(random: Random, packing: Packing) -> Comparisons:
    """torch's fused attention against matmul, softmax, matmul."""

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(dim=-1) @ value

    for part, heads, tokens, width in (("decoder", 16, 196, 32), ("encoder", 12, 49, 64)):
        inputs = [random(len(packing.index), heads, tokens, width) for _ in range(3)]
        ways = {"fused": Way(scaled_dot_product_attention, inputs), "matmul, softmax, matmul": Way(plain, inputs)}
        yield f"{part}, {heads}x{tokens}x{width}", ways


def depthwise_gradient(random: Random, packing: Packing) -> Comparisons:
    """The depthwise convolution, of packed maps and of dense ones: its own gradient against autograd's."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=2, groups=len(bias)).permute(0, 2, 3, 1)

    def composed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return packing.pack(convolve(packing.unpack(x), weight, bias))

    for stage, (side, channels) in STAGES.items():
        weights = [random(channels, 1, 5, 5), random(channels)]
        packed = [random(*packing.index.shape, side, side, channels), *weights]
        own = Way(partial(masked_depthwise, packing=packing), packed)
        yield f"masked, {stage}", {"own gradient": own, "autograd's gradient": Way(composed, packed)}
        dense = [packing.unpack(packed[0]).detach().requires_grad_(), *weights]
        own = Way(masked_depthwise_dense, dense)
        yield f"dense, {stage}", {"own gradient": own, "autograd's gradient": Way(convolve, dense)}


def dense_convolution(random: Random, packing: Packing) -> Comparisons:
    """The depthwise convolution of dense maps in two orders of memory."""
    for stage, (side, channels) in STAGES.items():
        last, first = _nchw(packing.unpack(random(*packing.index.shape, side, side, channels)))
        weights = [random(channels, 1, 5, 5), random(channels)]
        convolve = partial(conv2d, padding=2, groups=channels)
        yield stage, {"channels-last": Way(convolve, [last, *weights]), "NCHW": Way(convolve, [first, *weights])}


def layers(random: Random, packing: Packing) -> Comparisons:
    """Linear layers and MLPs, own against torch's, at the rows of pretraining (packed) and of fine-tuning (dense)."""

    def three_steps(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return linear(gelu(linear(x, weight1, bias1)), weight2, bias2)

    def torch_s(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return functional.linear(gelu(functional.linear(x, weight1, bias1)), weight2, bias2)

    tokens, visible = packing.visible.numel(), packing.index.numel()
    shapes = {
        "stage 1, packed": (visible * 16, 256),
        "stage 1, dense": (tokens * 16, 256),
        "stage 2, dense": (tokens * 4, 384),
        "stage 3, packed": (visible, 768),
        "stage 3, dense": (tokens, 768),
        "decoder": (tokens, 512),
    }
    for part, (rows, width) in shapes.items():
        inputs = [random(rows, width), random(width, width), random(width)]
        ways = {"own": Way(linear, inputs), "torch's": Way(functional.linear, inputs)}
        yield f"linear {width} -> {width}, {part}, {rows} rows", ways
        inputs = [inputs[0], random(4 * width, width), random(4 * width), random(width, 4 * width), random(width)]
        ways = {"own": Way(mlp, inputs), "own, three steps": Way(three_steps, inputs), "torch's": Way(torch_s, inputs)}
        yield f"MLP {width}, {part}, {rows} rows", ways


def pointwise(random: Random, packing: Packing) -> Comparisons:
    """The two layers of stage 1's MLP over visible cells and over all, against 1x1 convolutions of maps."""

    def layers(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return linear(linear(x, weight1, bias1), weight2, bias2)

    def convolutions(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return conv2d(conv2d(x, weight1[..., None, None], bias1), weight2[..., None, None], bias2)

    side, width = STAGES["stage 1"]
    packed = random(*packing.index.shape, side, side, width)
    dense = packing.unpack(packed).detach().requires_grad_()
    last, first = _nchw(dense)
    visible, cells = packed.numel() // width, dense.numel() // width
    weights = [random(4 * width, width), random(4 * width), random(width, 4 * width), random(width)]
    ways = {
        "ours, visible cells": Way(layers, [packed, *weights], visible),
        "ours, all cells": Way(layers, [dense, *weights], cells),
        "1x1 channels-last, all": Way(convolutions, [last, *weights], cells),
        "1x1 NCHW, all cells": Way(convolutions, [first, *weights], cells),
    }
    yield f"stage 1, {width} -> {4 * width} -> {width}", ways


def rows_of_maps(random: Random, packing: Packing) -> Comparisons:
    """Packing and unpacking: copied rows, whose gradient is a copy, against torch's indexing, whose gradient adds."""

    def take(dense: Tensor, side: int) -> Tensor:
        return dense.flatten(0, 2)[packing.cells(side)]

    def put(packed: Tensor, side: int) -> Tensor:
        zeros = packed.new_zeros(packing.visible.numel() * side**2, packed.shape[-1])
        return zeros.index_put((packing.cells(side),), packed.flatten(0, 3))

    for stage, (side, channels) in STAGES.items():
        packed = [random(*packing.index.shape, side, side, channels)]
        dense = [packing.unpack(*packed).detach().requires_grad_()]
        taken, back = Way(partial(take, side=side), dense), Way(partial(put, side=side), packed)
        yield f"pack, {stage}", {"rows copied": Way(packing.pack, dense), "indexing": taken}
        yield f"unpack, {stage}", {"rows copied": Way(packing.unpack, packed), "indexing": back}


def _nchw(dense: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H*s, W*s, C) -> twice (B, C, H*s, W*s): channels-last and contiguous in memory."""
    nchw = dense.detach().permute(0, 3, 1, 2)
    return nchw.clone().requires_grad_(), nchw.contiguous().requires_grad_()


def measure(ways: dict[str, Way], rounds: int, now: Callable[[], float]) -> Figures:
    """Per way: median milliseconds of each part, and its median ratio to the first way's."""
    gradients = {name: torch.randn_like(way.compute(*way.inputs)) for name, way in ways.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in ways}
    for number in range(rounds + 2):  # two to warm up
        for name, way in ways.items():
            start = now()
            output = way.compute(*way.inputs)
            middle = now()
            torch.autograd.grad(output, way.inputs, gradients[name])
            end = now()
            del output  # freed here, not within the next way's time
            for part, taken in zip(PARTS, (middle - start, end - middle, end - start), strict=True):
                seconds[name][part] += [taken] if number >= 2 else []
    first, figures = seconds[next(iter(ways))], Figures()
    for name, parts in seconds.items():
        figures[name] = {part: 1e3 * statistics.median(parts[part]) for part in PARTS}
        for part in PARTS:
            ratios = [own / other for own, other in zip(parts[part], first[part], strict=True)]
            figures[name][f"{part} ratio"] = statistics.median(ratios)
        if ways[name].cells:
            figures[name]["ns a cell"] = 1e6 * figures[name]["both"] / ways[name].cells
    return figures


def choices(
    rounds: int = 7, batch_size: int = 16, device: Literal["cpu", "cuda"] = "cpu", output: Path | None = None
) -> None:
    """Print a table for each choice.

    Args:
        rounds: timed rounds, after two that warm up.
        batch_size: images.
        device: where to measure.
        output: a JSON file for the figures.
    """

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    torch.manual_seed(0)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"batch {batch_size}, {rounds} rounds, {machine}, torch {torch.__version__}"
    Console().print(f"Milliseconds (and ratio to the first way), {title}\n")
    packing = Packing.of(random_visible(batch_size, (14, 14), device=device))
    results: dict[str, dict[str, Figures]] = {}
    for choice in (attention, depthwise_gradient, dense_convolution, layers, pointwise, rows_of_maps):
        cases = results[choice.__name__] = {}
        for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
            random = partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
            for case, ways in choice(random, packing):
                cases[f"{case}, {precision}"] = measure(ways, rounds, now)
        Console().print(_table(choice.__name__.replace("_", " "), cases))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"title": title, "results": results}, indent=2) + "\n")


def _table(title: str, cases: dict[str, Figures]) -> Table:
    extra = ["ns a cell"] if title == "pointwise" else []
    table = Table("", *PARTS, *extra, title=title, title_justify="left")
    for case, ways in cases.items():
        table.add_section()
        table.add_row(f"[bold]{case}")
        for name, figures in ways.items():
            columns = [f"{figures[part]:.2f} ({figures[f'{part} ratio']:.2f}x)" for part in PARTS]
            table.add_row(name, *columns, *(f"{figures[quantity]:.0f}" for quantity in extra))
    return table


if __name__ == "__main__":
    auto_cli(choices, as_positional=False)
