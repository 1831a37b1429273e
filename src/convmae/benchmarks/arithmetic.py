"""How much arithmetic a computation is, and how fast a device does arithmetic at best."""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from convmae.ops.linear import linear


def count_macs(compute: Callable[[], object]) -> int:
    """Multiply-accumulates of what `compute` does, as torch counts them; tensors on the meta device cost nothing."""
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops() // 2


def matrix_product_peak(device: torch.device, dtype: torch.dtype, side: int | None = None, rounds: int = 10) -> float:
    """Multiply-accumulates a second of the fastest of some square matrix products, by torch and by `linear`.

    side: rows of the matrices, by default 8192 on a GPU and 2048 on a CPU, fewer where that takes long.
    """
    side = side or (8192 if device.type == "cuda" else _side_in_reach(dtype))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [torch.matmul, linear]
    fastest = float("inf")
    for number in range(rounds + 1):
        for way in ways:
            wait_for(device)
            began = time.perf_counter()
            way(a, b)
            wait_for(device)
            if number:  # the first warms up
                fastest = min(fastest, time.perf_counter() - began)
    return side**3 / fastest


def _side_in_reach(dtype: torch.dtype) -> int:
    """2048, or half as much or less where a CPU takes long: in bf16 without instructions for it, half a minute."""
    side, seconds = 128, 0.0
    while side < 2048 and seconds < 0.05:
        side *= 2
        matrix = torch.ones(side, side, dtype=dtype)
        began = time.perf_counter()
        matrix @ matrix
        seconds = time.perf_counter() - began
    return side


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
