"""Random numbers that follow from a few integers and from nothing else."""

import random
import subprocess
import sys

import numpy
import torch

from convmae.seeds import mixed_seed, seeded


def drawn():
    return random.random(), numpy.random.rand(), torch.rand(()).item()


def test_neighbours_have_unrelated_seeds():
    seeds = [mixed_seed(a, b) for a in range(30) for b in range(30)]
    assert len(set(seeds)) == 900
    assert all(0 <= seed < 2**64 for seed in seeds)
    ones = [seed.bit_count() for seed in seeds]
    assert 31 < sum(ones) / len(ones) < 33  # of 64 bits half are set
    assert mixed_seed(1, 23) != mixed_seed(12, 3)
    assert mixed_seed(1) != mixed_seed(1, 0)


def test_another_process_draws_the_same():
    code = "from convmae.seeds import mixed_seed; print(mixed_seed(3, 1, 4))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == mixed_seed(3, 1, 4)


def test_inside_all_three_follow_from_the_seed_and_outside_they_go_on():
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    expected = [drawn(), drawn()]
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    outside = [drawn()]
    with seeded(1, 2):
        first = drawn()
    with seeded(1, 3):
        other = drawn()
    with seeded(1, 2):
        again = drawn()
    outside.append(drawn())
    assert outside == expected
    assert first == again
    assert not set(first) & set(other)


def test_an_error_inside_changes_nothing_outside():
    state = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    try:
        with seeded(5):
            drawn()
            raise ValueError
    except ValueError:
        pass
    assert state == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
