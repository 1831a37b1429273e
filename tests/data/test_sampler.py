"""The sampler's promises: disjoint ranks, whole batches, exact resumption."""

import pytest

from convmae.data.sampler import ResumableSampler
from convmae.seeds import mixed_seed


def keys(num_samples, batch_size, num_replicas=1, rank=0, epoch=0, batch=0, seed=0):
    sampler = ResumableSampler(num_samples, batch_size, seed=seed, num_replicas=num_replicas, rank=rank)
    sampler.set_position(epoch, batch)
    result = list(sampler)
    assert len(sampler) == len(result)
    return result


@pytest.mark.parametrize(("num_samples", "batch_size", "num_replicas"), [(103, 4, 3), (96, 8, 2), (7, 7, 1)])
def test_ranks_are_disjoint_and_drop_less_than_a_batch(num_samples, batch_size, num_replicas):
    ranks = [keys(num_samples, batch_size, num_replicas, rank, epoch=5) for rank in range(num_replicas)]
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) % batch_size == 0
    indices = [index for rank in ranks for epoch, index in rank if epoch == 5]
    assert len(set(indices)) == len(indices)
    assert set(indices) <= set(range(num_samples))
    assert 0 <= num_samples - len(indices) < batch_size * num_replicas


@pytest.mark.parametrize("batch", [0, 1, 5, 8])
def test_a_position_continues_the_exact_sequence(batch):
    whole = keys(103, 4, num_replicas=3, rank=1, epoch=2)
    assert len(whole) == 8 * 4
    assert keys(103, 4, num_replicas=3, rank=1, epoch=2, batch=batch) == whole[batch * 4 :]


def test_order_depends_on_seed_and_epoch_only():
    assert keys(50, 5, epoch=3) == keys(50, 5, epoch=3)
    orders = [[index for _, index in keys(50, 5, epoch=e, seed=s)] for e, s in [(0, 0), (1, 0), (0, 1)]]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_a_batch_over_all_ranks_does_not_depend_on_their_number():
    alone = keys(64, 8)
    pair = [keys(64, 4, num_replicas=2, rank=rank) for rank in (0, 1)]
    for batch in range(8):
        together = pair[0][batch * 4 : batch * 4 + 4] + pair[1][batch * 4 : batch * 4 + 4]
        assert set(together) == set(alone[batch * 8 : batch * 8 + 8])


def test_a_tiny_data_set_is_repeated_to_one_batch():
    ranks = [keys(3, 8, num_replicas=2, rank=rank) for rank in (0, 1)]
    assert [len(rank) for rank in ranks] == [8, 8]
    indices = [index for rank in ranks for _, index in rank]
    assert len(set(indices)) == 16  # each repetition has an index, so a random crop, of its own
    assert {index % 3 for index in indices} == {0, 1, 2}


@pytest.mark.parametrize(("num_samples", "batch_size", "aug_repeats"), [(103, 4, 3), (24, 6, 2), (5, 4, 4)])
def test_with_repeats_a_shuffle_lasts_several_epochs(num_samples, batch_size, aug_repeats):
    def shares(first):
        samplers = [
            ResumableSampler(num_samples, batch_size, num_replicas=2, rank=rank, aug_repeats=aug_repeats)
            for rank in (0, 1)
        ]
        for epoch in range(first, first + aug_repeats):
            for sampler in samplers:
                sampler.set_position(epoch)
                yield [index for number, index in sampler if number == epoch]

    alone = ResumableSampler(num_samples, batch_size * aug_repeats, num_replicas=2)
    seen = list(shares(0))
    assert {len(share) for share in seen} == {alone.batches_per_epoch * batch_size}  # as many crops as without
    assert len({index for share in seen for index in share}) == sum(map(len, seen))
    assert seen != list(shares(aug_repeats))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="impossible sampler"):
        ResumableSampler(10, 2, num_replicas=2, rank=2)
    with pytest.raises(ValueError, match="no batch 6"):
        ResumableSampler(10, 2).set_position(0, 6)


def test_mixed_seeds_differ():
    parts = [(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(5)]
    assert len({mixed_seed(*part) for part in parts}) == len(parts)
