"""The order in which a training run sees its samples.

A sample's key is (epoch, index). The order is a function of (seed, epoch) alone, so a run that resumes in the
midst of an epoch continues the exact sequence, and every rank works out its own share without talking to the
others.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from convmae.seeds import mixed_seed


class ResumableSampler(Sampler[tuple[int, int]]):
    """This rank's keys (epoch, index) of one epoch, shuffled, from any batch on.

    All ranks get the same number of whole batches; the samples that do not fill a last batch on every rank
    are dropped, and the next shuffle drops others. Batch b of all ranks together is the b-th run of
    `batch_size * num_replicas` keys in the epoch's order. A data set of fewer samples than that is repeated
    to fill one batch: `index` then runs past the data set's length, so that each repetition gets its own
    random crop, and the data set takes it modulo its length.

    With aug_repeats = R (repeated augmentation) a key stands for R crops: an epoch has as many crops as there are
    samples, so a shuffle lasts R epochs, each of which takes the next share.

    The epoch does not advance by itself: call `set_position` before each epoch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        aug_repeats: int = 1,
    ) -> None:
        """num_samples: the data set's length, >= 1; batch_size: keys per rank and step."""
        if num_samples < 1 or batch_size < 1 or aug_repeats < 1 or not 0 <= rank < num_replicas:
            raise ValueError(
                f"impossible sampler: {num_samples=}, {batch_size=}, {aug_repeats=}, {num_replicas=}, {rank=}"
            )
        self.batch_size, self.seed, self.num_replicas, self.rank = batch_size, seed, num_replicas, rank
        self.aug_repeats = aug_repeats
        self._global_batch = batch_size * num_replicas
        global_crops = self._global_batch * aug_repeats
        self._num_indices = num_samples * max(1, -(-global_crops // num_samples))
        self.batches_per_epoch = self._num_indices // global_crops
        self._epoch, self._first_batch = 0, 0

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """The next iteration yields `epoch` from batch number `batch` on, 0 <= batch <= batches_per_epoch."""
        if epoch < 0 or not 0 <= batch <= self.batches_per_epoch:
            raise ValueError(f"no batch {batch} in epoch {epoch} of {self.batches_per_epoch} batches")
        self._epoch, self._first_batch = epoch, batch

    def __len__(self) -> int:
        """Keys of this rank that remain from the position on."""
        return (self.batches_per_epoch - self._first_batch) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self._epoch
        shuffle, share = divmod(epoch, self.aug_repeats)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, shuffle))
        order = torch.randperm(self._num_indices, generator=generator)
        first, end = (share * self.batches_per_epoch + batch for batch in (self._first_batch, self.batches_per_epoch))
        kept = order[first * self._global_batch : end * self._global_batch]
        for index in kept[self.rank :: self.num_replicas].tolist():
            yield epoch, index
