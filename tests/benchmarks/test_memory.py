import pytest
import torch

from convmae.benchmarks.memory import PeakMemory


@pytest.mark.parametrize("pieces", [1, 200])
def test_the_peak_is_what_was_held_at_once(pieces):
    """Large blocks and many small ones, which the C library keeps after they are freed; measured twice in turn."""
    memory = PeakMemory(torch.device("cpu"))
    for _ in range(2):
        memory.start()
        held = [torch.ones(64 * 2**20 // pieces, dtype=torch.float32) for _ in range(pieces)]  # 256 MiB in all
        del held
        assert memory.stop() == pytest.approx(256 * 2**20, rel=0.1)
