"""Measures the choices that the package made between equal computations: attention, depthwise convolution, packing.

    python benchmarks/choices.py [--rounds 7] [--batch_size 16] [--device cpu] [--output choices.json]

The shapes are those of base at 224x224. The candidates of a row run in turn, round after round; the median counts.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import conv2d, scaled_dot_product_attention

from convmae.masking import random_visible
from convmae.ops.masked_depthwise import masked_depthwise, masked_depthwise_dense
from convmae.packing import Packing

Candidates = dict[str, Callable[[], object]]


def choices(
    rounds: int = 7, batch_size: int = 16, device: Literal["cpu", "cuda"] = "cpu", output: Path | None = None
) -> None:
    """Print a table for each choice.

    Args:
        rounds: timed rounds, after one that warms up.
        batch_size: images.
        device: where to measure.
        output: a JSON file for the milliseconds.
    """
    console, results = Console(), {}
    for dtype in (torch.float32, torch.bfloat16):
        for title, candidates in _all(batch_size, torch.device(device), dtype):
            name = f"{title}, {str(dtype).removeprefix('torch.')}"
            results[name] = _time(candidates, rounds, device)
            table = Table(title=name, title_justify="left")
            for column in ("", "ms", "over the first"):
                table.add_column(column, justify="left" if not column else "right")
            first = next(iter(results[name].values()))
            for candidate, milliseconds in results[name].items():
                table.add_row(candidate, f"{milliseconds:.1f}", f"{milliseconds / first:.2f}x")
            console.print(table)
    if output is not None:
        output.write_text(json.dumps(results, indent=2))


def _all(batch: int, device: torch.device, dtype: torch.dtype):
    """(title, candidates) of every comparison."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    for part, heads, tokens, width in (("decoder", 16, 196, 32), ("encoder", 12, 49, 64)):
        query, key, value = (random(batch, heads, tokens, width) for _ in range(3))
        yield (
            f"attention of the {part}, forward and backward",
            {
                "fused": _both(lambda q=query, k=key, v=value: scaled_dot_product_attention(q, k, v)),
                "matmul, softmax, matmul": _both(lambda q=query, k=key, v=value: _plain_attention(q, k, v)),
            },
        )
    packing = Packing.of(random_visible(batch, (14, 14), device=device))
    for stage, side, channels in ((1, 4, 256), (2, 2, 384)):
        packed = random(batch, packing.index.shape[1], side, side, channels)
        weight, bias = random(channels, 1, 5, 5), random(channels)
        unpacked = packing.unpack(packed).detach()
        last = unpacked.permute(0, 3, 1, 2).requires_grad_()  # channels-last memory
        first = unpacked.permute(0, 3, 1, 2).contiguous().requires_grad_()
        yield (
            f"masked depthwise convolution of stage {stage}, forward and backward",
            {
                "own gradient, visible cells": _both(
                    lambda x=packed, w=weight, b=bias: masked_depthwise(x, w, b, packing)
                ),
                "autograd's gradient": _both(
                    lambda x=packed, w=weight, b=bias: packing.pack(masked_depthwise_dense(packing.unpack(x), w, b))
                ),
            },
        )
        leaf = unpacked.clone().requires_grad_()
        layouts = {
            "channels-last": lambda x=last, w=weight, b=bias: conv2d(x, w, b, padding=2, groups=len(b)),
            "NCHW": lambda x=first, w=weight, b=bias: conv2d(x, w, b, padding=2, groups=len(b)),
        }
        yield f"dense depthwise convolution of stage {stage}, forward", {k: _forward(f) for k, f in layouts.items()}
        yield f"dense depthwise convolution of stage {stage}, both", {k: _both(f) for k, f in layouts.items()}
        yield (
            f"packing a map of stage {stage}, forward and backward",
            {
                "rows copied, both ways": _both(lambda d=leaf: packing.pack(d)),
                "indexing, autograd adds": _both(lambda d=leaf, s=side: _indexed(d, packing, s)),
            },
        )
    rows, cells = random(batch * 49 * 16, 256), random(batch, 256, 56, 56)
    matrices = nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 256)).to(device, dtype)
    kernels = nn.Sequential(nn.Conv2d(256, 1024, 1), nn.Conv2d(1024, 256, 1)).to(device, dtype)
    last = cells.detach().to(memory_format=torch.channels_last).requires_grad_()
    dense = last.detach().permute(0, 2, 3, 1).requires_grad_()
    yield (
        "pointwise layers of an MLP of stage 1, forward and backward",
        {
            "matrix product, visible cells": _both(lambda: matrices(rows)),
            "matrix product, all cells": _both(lambda: matrices(dense)),
            "1x1 convolution, all cells, channels-last": _both(lambda: kernels(last)),
            "1x1 convolution, all cells, NCHW": _both(lambda: kernels(cells)),
        },
    )


def _plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(dim=-1) @ value


def _indexed(dense: Tensor, packing: Packing, side: int) -> Tensor:
    """Packing.pack by torch's own indexing."""
    image = torch.arange(dense.shape[0], device=dense.device)[:, None]
    blocks = dense.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, H, s, W, s, C)
    return blocks[image, packing.index // packing.grid[1], :, packing.index % packing.grid[1]]


def _forward(compute: Callable[[], Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            compute()

    return run


def _both(compute: Callable[[], Tensor]) -> Callable[[], object]:
    gradient = torch.randn_like(compute())
    return lambda: compute().backward(gradient)


def _time(candidates: Candidates, rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each, run in turn."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in taken.items()}


if __name__ == "__main__":
    auto_cli(choices, as_positional=False)
