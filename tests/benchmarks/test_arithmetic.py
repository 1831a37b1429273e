import time

import pytest
import torch
from torch import nn

from convmae.benchmarks import arithmetic
from convmae.benchmarks.arithmetic import count_macs, matrix_product_peak


def test_multiply_accumulates_are_counted():
    layers = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(16, 5, bias=False)).to("meta")
    images = torch.empty(2, 3, 16, 16, device="meta")
    assert count_macs(lambda: layers(images)) == 2 * (8 * 16 * 48 + 8 * 16 * 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_that_of_the_fastest_product(dtype, monkeypatch):
    # Before each product of the round that warms up, then before and after those of two rounds.
    clock = iter([0, 0, 0, 8, 0, 4, 0, 2, 0, 5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert matrix_product_peak(torch.device("cpu"), dtype, side=64, rounds=2) == 64**3 / 2
    assert next(clock, None) is None


@pytest.mark.parametrize(("seconds", "side"), [([0.0, 0.001, 0.01, 0.04], 2048), ([0.01, 0.3], 512), ([9.0], 256)])
def test_a_slow_processor_multiplies_smaller_matrices(seconds, side, monkeypatch):
    """It doubles the side until a product takes a twentieth of a second, or the side is 2048."""
    clock = iter([time for taken in seconds for time in (0.0, taken)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert arithmetic._side_in_reach(torch.float32) == side
    assert next(clock, None) is None
