"""Ways to compute the same, timed in turn in one process, and what is said of several rounds and of the machine."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from rich.console import Console
from rich.progress import track

from convmae.benchmarks.arithmetic import wait_for
from convmae.benchmarks.memory import PeakMemory


@dataclass(frozen=True)
class Spread:
    """Figures of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Self:
        """Their median, lowest and highest."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def of_ratios(cls, numerators: list[float], denominators: list[float]) -> Self:
        """Median, lowest and highest of the ratios of each round's two figures."""
        return cls.of([a / b for a, b in zip(numerators, denominators, strict=True)])


class Turns(NamedTuple):
    """What ways took, by name: seconds of each round, and bytes of memory at most beyond those before."""

    seconds: dict[str, list[float]]
    peaks: dict[str, float]


def take_turns(
    ways: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, description: str = ""
) -> Turns:
    """Time one call of each way in turn, `rounds` times, after one that warms up and one that measures memory.

    torch's generators are seeded before each call, in a round alike for all, so that what is drawn at random is the
    same work. description: what the progress bar says.
    """
    memory = PeakMemory(device)
    peaks: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        torch.manual_seed(0)
        way()  # compiles, and makes the optimiser's state
    for name, way in ways.items():  # apart from the timing, which measuring memory would disturb
        torch.manual_seed(0)
        memory.start()
        way()
        peaks[name] = memory.stop()
    for number in track(range(rounds), description=description, console=Console(stderr=True), transient=True):
        for name, way in ways.items():
            torch.manual_seed(number)
            wait_for(device)
            began = time.perf_counter()
            way()
            wait_for(device)
            seconds[name].append(time.perf_counter() - began)
    return Turns(seconds, peaks)


def machine_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and how many threads torch uses there."""
    return (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    )


def _processor() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
