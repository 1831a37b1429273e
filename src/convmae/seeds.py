"""Random numbers that follow from a few integers and from nothing else, so that whoever resumes draws the same."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def mixed_seed(*parts: int) -> int:
    """One 64-bit seed from several non-negative integers; neighbouring inputs give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Inside, the random numbers of Python, NumPy and torch (CPU) follow from `parts`; outside they go on as before."""
    seed = mixed_seed(*parts)
    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reset the accelerator's generators too.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(of_python)
            numpy.random.set_state(of_numpy)
