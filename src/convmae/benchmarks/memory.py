"""Peak memory of a stretch of work: the allocator's own count on a GPU, the process's resident memory on a CPU."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Between `start` and `stop`, how far memory rose above where it was at the start, in bytes.

    On a CPU this needs Linux with glibc; elsewhere `stop` returns nan.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        """Reset the peak."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif _RESET.exists():
            # Freed memory that the C library keeps for later would otherwise hide what comes next.
            ctypes.CDLL(None).malloc_trim(0)
            _RESET.write_text("5")  # the kernel's way to set the high-water mark to the present size
            self._before = _resident("VmRSS")

    def stop(self) -> float:
        """Bytes by which the peak since `start` is above the memory at `start`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _resident("VmHWM") - self._before if _RESET.exists() else float("nan")


def state_bytes(model: nn.Module, moments: int = 2) -> int:
    """Weights, and AdamW's moments of the trainable ones: there before a step begins, so not in what the step adds."""
    return sum(p.numel() * p.element_size() * (1 + moments * p.requires_grad) for p in model.parameters())


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def largest_fitting(fits: Callable[[int], bool], start: int) -> int:
    """The largest size for which `fits` holds, to an eighth of `start`, which is known to fit.

    Doubles until one does not fit, then halves the interval; `fits` holds below some size and not above it.
    """
    low, high = start, 2 * start
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(start // 8, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
