"""Triton kernels of the masked depthwise convolution: cells read their neighbours through the index of visible tokens.

Nothing is unpacked: what is read and written are the rows of the packed map, R = B*K*s*s of them. On a dense map every
cell is a token of its own (K = H*W, s = 1) and stands where it is. Products are summed in float32. The only module that
imports triton. Shape letters as in `convmae.packing`; k is the kernel size.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from convmae.errors import UserError
from convmae.packing import Packing

_PART_ROWS = 512  # whose products one program of the parameters' gradients sums
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = bool(knobs.runtime.interpret)  # TRITON_INTERPRET=1: the kernels below run on a CPU, slowly


def _tuned(*blocks: tuple[int, int, int]) -> Callable[[Any], Any]:
    """Each GPU takes the fastest of these (rows, channels, warps) for a kind of map, at its first call.

    What it found is kept on disk, as compiled kernels are. The interpreter takes the first.
    """
    configs = [
        triton.Config({"ROWS": rows, "CHANNELS": channels}, num_warps=warps)
        for rows, channels, warps in blocks[: 1 if _INTERPRETED else None]
    ]
    return triton.autotune(configs, key=["channels", "SIZE", "SIDE", "PACKED"], cache_results=True)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing | None) -> Tensor:
    """x (B, H, W, C) or packed (B, K, s, s, C), weight (C, 1, k, k), bias (C,) -> the shape of x."""
    x = _checked(x)
    channels, size = weight.shape[0], weight.shape[-1]
    y = torch.empty_like(x)
    rows = x.numel() // channels
    taps = weight.view(channels, -1).t().contiguous()  # (C, 1, k, k) -> (k*k, C)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _convolve[lambda block: (triton.cdiv(rows, block["ROWS"]), triton.cdiv(channels, block["CHANNELS"]))](
            x, taps, bias, y, *_layout(x, packing), rows, channels,
            SIZE=size, SIDE=_side(x, packing), PACKED=packing is not None, BIAS=bias is not None,
        )  # fmt: skip
    return y


def parameter_gradients(x: Tensor, gradient: Tensor, size: int, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """Sums over visible cells: of the cell's gradient times each of its k x k neighbours, of the gradient alone.

    x, gradient: (B, H, W, C) or packed (B, K, s, s, C); size: k. Returns the gradients of weight (C, 1, k, k) and bias
    (C,).
    """
    x, gradient = _checked(x), gradient.contiguous()
    channels = x.shape[-1]
    rows = x.numel() // channels
    parts = triton.cdiv(rows, _PART_ROWS)
    # Each program writes its own sums: added up afterwards they come out the same every time, as atomics would not.
    sums = torch.empty(parts, size * size + 1, channels, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _parameter_gradients[lambda block: (size, triton.cdiv(channels, block["CHANNELS"]), parts)](
            x, gradient, sums, *_layout(x, packing), rows, channels,
            SIZE=size, SIDE=_side(x, packing), PACKED=packing is not None,
            TAPS=triton.next_power_of_2(size), PART_ROWS=_PART_ROWS,
        )  # fmt: skip
    of_weight, of_bias = sums.sum(0).to(x.dtype).split([size * size, 1])
    return of_weight.t().reshape(channels, 1, size, size).contiguous(), of_bias[0].clone()


def _checked(x: Tensor) -> Tensor:
    if x.dtype not in _DTYPES:
        raise UserError(f"the backend triton computes float32, bfloat16 and float16, not {x.dtype}: choose reference")
    if not x.is_cuda and not _INTERPRETED:
        raise UserError(f"the backend triton needs a GPU, the map is on {x.device}: choose auto or reference")
    return x.contiguous()


def _layout(x: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor, int, int, int]:
    """Index and slots, tokens an image, height and width of the grid of tokens."""
    if packing is None:
        return x, x, x.shape[1] * x.shape[2], x.shape[1], x.shape[2]  # neither index nor slots are looked at
    return packing.index, packing.slots, packing.index.shape[1], *packing.grid


def _side(x: Tensor, packing: Packing | None) -> int:
    return 1 if packing is None else x.shape[2]


@triton.jit
def _places(row, known, index, tokens, width, SIDE: tl.constexpr, PACKED: tl.constexpr):
    """Image of each row, and its row and column among the image's cells; only rows that are `known` are looked up."""
    cell = row % (SIDE * SIDE)
    token = row // (SIDE * SIDE)  # counted over all images
    place = tl.load(index + token, mask=known, other=0).to(tl.int32) if PACKED else token % tokens
    return token // tokens, place // width * SIDE + cell // SIDE, place % width * SIDE + cell % SIDE


@triton.jit
def _rows_at(image, y, x, known, slots, tokens, height, width, SIDE: tl.constexpr, PACKED: tl.constexpr):
    """Rows of the cells at (y, x), any of which may be outside the image, and which of them are known and visible."""
    visible = known & (y >= 0) & (y < height * SIDE) & (x >= 0) & (x < width * SIDE)
    slot = y // SIDE * width + x // SIDE
    if PACKED:
        slot = tl.load(slots + image * height * width + slot, mask=visible, other=-1)
        visible = visible & (slot >= 0)
    row = ((image * tokens + slot) * SIDE + y % SIDE) * SIDE + x % SIDE
    return row.to(tl.int64), visible  # times the channels it may exceed 32 bits


@_tuned((32, 64, 4), (16, 64, 4), (64, 64, 4), (16, 128, 4), (32, 128, 4), (64, 128, 8))
@triton.jit
def _convolve(
    x, taps, bias, y, index, slots, tokens, height, width, rows, channels,
    SIZE: tl.constexpr, SIDE: tl.constexpr, PACKED: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x (R, C), taps (k*k, C), bias (C,) -> y (R, C); a program computes (ROWS, CHANNELS) of it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known, exists = row < rows, channel < channels
    image, top, left = _places(row, known, index, tokens, width, SIDE, PACKED)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    if BIAS:
        total += tl.load(bias + channel, mask=exists, other=0).to(tl.float32)[None, :]
    for i in range(SIZE):
        for j in range(SIZE):
            source, visible = _rows_at(
                image, top + i - SIZE // 2, left + j - SIZE // 2, known, slots, tokens, height, width, SIDE, PACKED
            )
            values = tl.load(
                x + source[:, None] * channels + channel[None, :], mask=visible[:, None] & exists[None, :], other=0
            )
            tap = tl.load(taps + (i * SIZE + j) * channels + channel, mask=exists, other=0)
            total += values.to(tl.float32) * tap.to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=known[:, None] & exists[None, :])


@_tuned((16, 64, 4), (8, 64, 4), (8, 128, 8), (16, 64, 8), (16, 32, 4), (32, 32, 4))
@triton.jit
def _parameter_gradients(
    x, gradient, sums, index, slots, tokens, height, width, rows, channels,
    SIZE: tl.constexpr, SIDE: tl.constexpr, PACKED: tl.constexpr,
    TAPS: tl.constexpr, PART_ROWS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x and gradient (R, C) -> sums (parts, k*k + 1, C), the bias last.

    A program sums one row of taps over PART_ROWS rows, ROWS at a time; the first one the bias, too.
    """
    i, part = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    j = tl.arange(0, TAPS)
    exists = channel < channels
    total = tl.zeros((TAPS, ROWS, CHANNELS), tl.float32)
    alone = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, PART_ROWS, ROWS):
        row = part * PART_ROWS + first + tl.arange(0, ROWS)
        known = row < rows
        image, top, left = _places(row, known, index, tokens, width, SIDE, PACKED)
        source, visible = _rows_at(
            image[None, :], top[None, :] + i - SIZE // 2, left[None, :] + j[:, None] - SIZE // 2,
            known[None, :] & (j < SIZE)[:, None], slots, tokens, height, width, SIDE, PACKED,
        )  # fmt: skip
        values = tl.load(
            x + source[:, :, None] * channels + channel[None, None, :],
            mask=visible[:, :, None] & exists[None, None, :],
            other=0,
        )
        upstream = tl.load(
            gradient + row.to(tl.int64)[:, None] * channels + channel[None, :],
            mask=known[:, None] & exists[None, :],
            other=0,
        ).to(tl.float32)
        total += values.to(tl.float32) * upstream[None, :, :]
        alone += upstream
    sums += part * (SIZE * SIZE + 1) * channels
    place = (i * SIZE + j[:, None]) * channels + channel[None, :]
    tl.store(sums + place, tl.sum(total, axis=1), mask=(j < SIZE)[:, None] & exists[None, :])
    if i == 0:
        tl.store(sums + SIZE * SIZE * channels + channel, tl.sum(alone, axis=0), mask=exists)
