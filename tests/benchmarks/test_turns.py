import time

import pytest
import torch

from convmae.benchmarks.turns import Spread, take_turns


def test_a_spread_of_ratios_pairs_the_rounds():
    spread = Spread.of_ratios([2.0, 9.0, 8.0], [1.0, 3.0, 8.0])
    assert (spread.median, spread.low, spread.high) == (2, 1, 3)


def test_ways_take_turns_and_draw_alike():
    """Two calls before the timed ones, and memory that one way alone takes."""
    drawn = []

    def way(name, numbers, seconds):
        torch.empty(numbers).normal_()
        torch.manual_seed(torch.initial_seed())  # however much was drawn, what comes first is compared
        drawn.append((name, torch.rand(()).item()))
        time.sleep(seconds)

    ways = {"small": lambda: way("small", 1, 0), "large": lambda: way("large", 64 * 2**20, 0.05)}
    turns = take_turns(ways, torch.device("cpu"), rounds=3)
    assert [name for name, _ in drawn] == ["small", "large"] * 5
    assert all(one == other for (_, one), (_, other) in zip(drawn[::2], drawn[1::2], strict=True))
    assert len({value for _, value in drawn[4:]}) == 3
    assert [len(seconds) for seconds in turns.seconds.values()] == [3, 3]
    assert min(turns.seconds["large"]) >= 0.05
    assert turns.peaks["large"] == pytest.approx(256 * 2**20, rel=0.1)
    assert turns.peaks["small"] < 2**20
