import pytest
import torch

from convmae.benchmarks.memory import PeakMemory, largest_fitting


@pytest.mark.parametrize("pieces", [1, 200])
def test_the_peak_is_what_was_held_at_once(pieces):
    """Large blocks and many small ones, which the C library keeps after they are freed; measured twice in turn."""
    memory = PeakMemory(torch.device("cpu"))
    for _ in range(2):
        memory.start()
        held = [torch.ones(64 * 2**20 // pieces, dtype=torch.float32) for _ in range(pieces)]  # 256 MiB in all
        del held
        assert memory.stop() == pytest.approx(256 * 2**20, rel=0.1)


@pytest.mark.parametrize("start", [1, 7, 64])
@pytest.mark.parametrize("limit", [64, 65, 100, 1000])
def test_the_largest_size_that_fits_is_found_to_an_eighth_of_the_first(start, limit):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    found = largest_fitting(fits, start)
    assert found <= limit < found + max(start // 8, 1) + (start // 8 > 0)
    assert len(tried) == len(set(tried)) <= 24
