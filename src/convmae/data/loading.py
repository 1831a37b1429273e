"""From the images of a source to batches, for training in a random order without end, for judging in order once.

A transform makes samples of an encoded image and its annotation, see `samples`. Here it gets its seeds, damaged
images are replaced, left out or refused, and processes and workers get their shares. B batch, C channels, H height,
W width.
"""

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, TypeVar

import torch
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from convmae.data.images import UndecodableImageError, UnfitAnnotationError, undecodable_if_damaged
from convmae.data.sampler import ResumableSampler
from convmae.data.samples import RandomTransform, Sample, Transform, collate
from convmae.data.sources import ImageCollection, ImageStream
from convmae.errors import UserError, check_positive, leave_if_started_again
from convmae.quiet import quiet_libraries
from convmae.seeds import mixed_seed

T = TypeVar("T")

_FAILURES_IN_A_ROW = 50  # of unlabelled images; more than chance damage: a broken disk, or no images at all

_logger = logging.getLogger(__name__)


# Samples


class TrainingImages(Dataset):
    """Varied images by key: dataset[epoch, index] depends on (seed, epoch, index) and on nothing else."""

    def __init__(
        self,
        source: ImageCollection,
        transform: RandomTransform,
        seed: int = 0,
        skip_damaged: bool = True,
        aug_repeats: int = 1,
    ) -> None:
        """aug_repeats: how many samples a key gives, each another view of the same image."""
        self.source, self.transform, self.seed, self.skip_damaged = source, transform, seed, skip_damaged
        self.aug_repeats = aug_repeats

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> list[Sample]:
        """A sample for each view, with its "key" and "failed".

        A damaged image is replaced by the next that is none, whose first view has the names and reasons of those that
        it replaces in "failed". The index is taken modulo the length. Raises UserError at the first damaged image
        unless skip_damaged, and where 50 unlabelled images in a row, or all labelled ones, are damaged.
        """
        epoch, index = key
        seeds = [mixed_seed(self.seed, epoch, index, view) for view in range(self.aug_repeats)]
        failed: list[str] = []
        for attempt in range(_most_failures(self.source)):
            position = (index + attempt) % len(self)
            try:
                samples = _transformed(
                    self.source, partial(self.source.open_annotated, position), self.transform, seeds
                )
            except UndecodableImageError as error:
                failed.append(failure_line(self.source.image_name(position), error, self.skip_damaged))
            else:
                return [{**sample, "key": key} for sample in _with_failures(samples, failed)]
        raise _all_failed(self.source, failed)


class StreamedTrainingImages(IterableDataset):
    """Varied images of a stream; each depends on the seed, the epoch, the worker and its place there."""

    def __init__(
        self,
        source: ImageStream,
        transform: RandomTransform,
        batch_size: int,
        seed: int = 0,
        skip_damaged: bool = True,
        aug_repeats: int = 1,
    ) -> None:
        """batch_size: images per rank and step, before they are repeated; aug_repeats: views of each."""
        self.source, self.transform, self.seed, self.skip_damaged = source, transform, seed, skip_damaged
        self.batch_size, self.aug_repeats = batch_size, aug_repeats
        self.epoch, self.first_batch = SharedCount(), SharedCount()  # workers that live on see them change

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """The next iteration yields `epoch` without its first `batch` batches; an int each, from 0 on."""
        self.source.reader.set_epoch(epoch // self.aug_repeats)
        self.epoch.value, self.first_batch.value = epoch, batch

    def __iter__(self) -> Iterator[list[Sample]]:
        """Yields a list of samples for each image, one for each view, with "failed".

        Damaged images are passed over; the next sample has their names and reasons in "failed". Raises UserError at the
        first unless skip_damaged, and where 50 unlabelled images in a row, or all labelled ones, are damaged.
        """
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch = self.epoch.value
        # Batch b comes from worker b % num_workers. What was seen is read again, but not decoded: the epoch's first
        # batches, and the shares of the stream that earlier epochs took.
        seen = len(range(worker_id, self.first_batch.value, num_workers)) * self.batch_size
        share = len(self.source) // num_workers // self.aug_repeats
        skipped = epoch % self.aug_repeats * share + seen
        wanted = share - seen
        if not wanted:
            return
        failed: list[str] = []
        for place, image in enumerate(self.source.repeated()):
            if place < skipped:
                continue
            try:
                key = (self.seed, epoch, self.source.reader.global_worker_id, place)
                seeds = [mixed_seed(*key, view) for view in range(self.aug_repeats)]
                samples = _transformed(self.source, image.open_annotated, self.transform, seeds)
            except UndecodableImageError as error:
                failed.append(failure_line(image.name(), error, self.skip_damaged))
                if len(failed) == _most_failures(self.source):
                    raise _all_failed(self.source, failed) from error
                continue
            yield _with_failures(samples, failed)
            failed = []
            wanted -= 1
            if not wanted:
                return


class EvaluationImages(Dataset):
    """Images by index, all seen in the same way."""

    def __init__(self, source: ImageCollection, transform: Transform, skip_damaged: bool = False) -> None:
        self.source, self.transform, self.skip_damaged = source, transform, skip_damaged

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """The transform's sample of image number `index`, with "index" and "failed"; of a damaged image only these two.

        Raises UserError for a damaged image unless skip_damaged.
        """
        open_annotated = partial(self.source.open_annotated, index)
        name = partial(self.source.image_name, index)
        return {"index": index, **_judged(self.source, open_annotated, self.transform, name, self.skip_damaged)}


class StreamedEvaluationImages(IterableDataset):
    """The images of a stream, each once, all seen in the same way."""

    def __init__(self, source: ImageStream, transform: Transform, skip_damaged: bool = False) -> None:
        self.source, self.transform, self.skip_damaged = source, transform, skip_damaged

    def __iter__(self) -> Iterator[Sample]:
        """Yields the transform's sample of each image, with "failed"; of a damaged image only this.

        Raises UserError for a damaged image unless skip_damaged.
        """
        for name, open_annotated in self.source:
            yield _judged(self.source, open_annotated, self.transform, name, self.skip_damaged)


def _transformed(
    source: ImageCollection | ImageStream,
    open_annotated: Callable[[], tuple[BinaryIO, Any]],
    transform: Callable[..., T],
    *seeds: Sequence[int],
) -> T:
    """What the transform makes of an image, its annotation and the seeds; raises UndecodableImageError."""
    with undecodable_if_damaged():
        file, annotation = open_annotated()
    with file:
        made = transform(file, annotation, *seeds)
    # Other annotations than the number of a class are checked where they are read.
    labelled = annotation is not None and (not isinstance(annotation, int) or 0 <= annotation < len(source.classes))
    if source.classes and not labelled:
        raise UserError(f"{source.name} has images without a class (number {annotation}): choose another split")
    return made


def _with_failures(samples: list[Sample], failed: list[str]) -> list[Sample]:
    """The views of an image, the first with the names and reasons of the damaged images that it replaces."""
    return [{**sample, "failed": [] if view else failed} for view, sample in enumerate(samples)]


def _judged(
    source: ImageCollection | ImageStream,
    open_annotated: Callable[[], tuple[BinaryIO, Any]],
    transform: Transform,
    name: Callable[[], str],
    skip_damaged: bool,
) -> Sample:
    try:
        return {**_transformed(source, open_annotated, transform), "failed": []}
    except UndecodableImageError as error:
        return {"failed": [failure_line(name(), error, skip_damaged)]}


def failure_line(name: str, error: UndecodableImageError, skip_damaged: bool) -> str:
    """Name and fault of a damaged image in one line; raises UserError unless skip_damaged."""
    if not skip_damaged:
        fault = "cannot be decoded, replace or delete it"
        if isinstance(error, UnfitAnnotationError):
            fault = "cannot be used, correct or delete it and its annotation"
        raise UserError(f"{name} {fault}, or leave such images out with --skip-damaged: {error}") from error
    return f"{name}: {error}"


def _most_failures(source: ImageCollection | ImageStream) -> int:
    """How many damaged images in a row are too many: of labelled ones, which the user asked to skip, all."""
    return len(source) if source.classes else min(_FAILURES_IN_A_ROW, len(source))


def _all_failed(source: ImageCollection | ImageStream, failed: list[str]) -> UserError:
    return UserError(f"{source.name}: {len(failed)} images in a row cannot be decoded, check the files: {failed[-1]}")


# Batches


class ImageLoader(DataLoader):
    """A DataLoader whose workers' UserErrors arrive as they were raised, and their deaths as one."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        leave_if_started_again()
        try:
            yield from super().__iter__()
        except (RuntimeError, OSError, EOFError) as error:
            # One that dies while it is started leaves a broken pipe; torch tells of others, by their numbers.
            if "DataLoader worker (pid" not in str(error) and not isinstance(error, BrokenPipeError | EOFError):
                raise
            raise UserError(_deaths(error)) from error
        except UserError as error:
            # A worker's error arrives as a whole traceback, of which the last line is the message.
            message = str(error).strip().splitlines()[-1].removeprefix("convmae.errors.UserError: ")
            raise UserError(message) from error


def _deaths(error: Exception) -> str:
    guard = ""
    if multiprocessing.get_start_method() != "fork":
        guard = (
            'in a Python script, put what it does under `if __name__ == "__main__":`, which such processes need; else '
        )
    reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"a process that loads images has died ({reason}): {guard}the memory may be full: lower --engine.workers"


class TrainingLoader(ImageLoader):
    """Whole batches, the same number on every rank; its length is what remains of the epoch.

    Call `set_position` before each epoch, or the last one is replayed.
    """

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """The next iteration yields `epoch` from batch number `batch` on.

        A collection continues the exact sequence. A stream continues with the same samples, but where `batch` is
        no multiple of num_workers its batches are in another order, and damaged images shift the start.
        """
        positioned: Any = self.sampler if self._stream is None else self._stream
        positioned.set_position(epoch, batch)

    @property
    def _stream(self) -> StreamedTrainingImages | None:
        return self.dataset if isinstance(self.dataset, StreamedTrainingImages) else None

    def __len__(self) -> int:
        if self._stream is None:
            return super().__len__()
        crops = self._stream.batch_size * self._stream.aug_repeats
        return len(self._stream.source) // crops - self._stream.first_batch.value


@dataclass(frozen=True)
class Loading:
    """How images become batches, whatever they are for."""

    batch_size: int
    """Samples per process and step."""
    skip_damaged: bool = False
    """Whether damaged images are left out, in training replaced by others, instead of an error."""
    num_workers: int = 0
    """Loading processes; without any, the process itself loads."""
    pin_memory: bool = False
    """Whether batches lie in memory that a GPU copies from while it computes."""
    num_replicas: int = 1
    """Processes that share the images."""
    rank: int = 0
    """Which of them this is."""


def build_training_loader(
    source: ImageCollection | ImageStream,
    transform: RandomTransform,
    loading: Loading,
    *,
    seed: int = 0,
    aug_repeats: int = 1,
    collate_fn: Callable[[list[Sample]], dict[str, Any]] | None = None,
) -> TrainingLoader:
    """A loader of this process's shuffled batches, as `collate` makes them of the transform's samples.

    aug_repeats: how many samples of a batch, side by side, are of one image, which is decoded once. An epoch has as
    many samples as there are images, so each image is seen in one of aug_repeats epochs. What is seen of a
    collection does not depend on num_workers; a stream is split among the workers, of which there are at most as many
    as shards and as batches an epoch. collate_fn: makes a batch of samples in the place of `collate`. Raises UserError
    unless aug_repeats divides the batch size.
    """
    check_positive(aug_repeats=aug_repeats)
    if loading.batch_size % aug_repeats:
        raise UserError(
            f"{loading.batch_size} images a pass and process are no multiple of aug_repeats {aug_repeats}: change one "
            "of them"
        )
    distinct_images = loading.batch_size // aug_repeats
    dataset: TrainingImages | StreamedTrainingImages
    sampler, num_workers = None, loading.num_workers
    if isinstance(source, ImageStream):
        # An epoch is rounded up to whole batches in every worker.
        whole_batches = source.reader.num_samples // (loading.batch_size * loading.num_replicas)
        num_workers = _share_stream(source, loading, min(num_workers, max(1, whole_batches)), seed)
        dataset = StreamedTrainingImages(source, transform, distinct_images, seed, loading.skip_damaged, aug_repeats)
    else:
        dataset = TrainingImages(source, transform, seed, loading.skip_damaged, aug_repeats)
        sampler = ResumableSampler(
            len(dataset),
            distinct_images,
            seed=seed,
            num_replicas=loading.num_replicas,
            rank=loading.rank,
            aug_repeats=aug_repeats,
        )
    return TrainingLoader(
        dataset,
        batch_size=distinct_images,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=partial(_collate_views, collate_fn or collate),
        pin_memory=loading.pin_memory,
        drop_last=True,
        persistent_workers=num_workers > 0,
        worker_init_fn=quiet_libraries,
        # Each pass draws a seed for the workers; from the global generator, a resumed run would have one draw more.
        generator=torch.Generator(),
    )


def build_evaluation_loader(
    source: ImageCollection | ImageStream, transform: Transform, loading: Loading, *, first: int = 0
) -> ImageLoader:
    """A loader of batches in order, as `collate` makes them, from image number `first` on.

    Each image is seen in one process only. Damaged images are left out, so batches may be smaller, or empty. Batches of
    a stream begin at its start, have no "indices" and, with workers, no settled order.
    """
    dataset: EvaluationImages | StreamedEvaluationImages
    sampler, num_workers = None, loading.num_workers
    if isinstance(source, ImageStream):
        num_workers = _share_stream(source, loading, num_workers)
        dataset = StreamedEvaluationImages(source, transform, loading.skip_damaged)
    else:
        dataset = EvaluationImages(source, transform, loading.skip_damaged)
        sampler = range(first + loading.rank, len(dataset), loading.num_replicas)
    return ImageLoader(
        dataset,
        batch_size=loading.batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=loading.pin_memory,
        worker_init_fn=quiet_libraries,
        generator=torch.Generator(),
    )


def _share_stream(source: ImageStream, loading: Loading, num_workers: int, seed: int = 0) -> int:
    """Tell the stream who reads it; the number of workers, at most one a shard."""
    most = max(1, source.num_shards // loading.num_replicas)
    if num_workers > most:
        _logger.warning("%s: %d loader workers instead of %d, one a shard", source.name, most, num_workers)
        num_workers = most
    source.configure(loading.batch_size, num_workers, loading.num_replicas, loading.rank, seed)
    return num_workers


def _collate_views(collate_fn: Callable[[list[Sample]], dict[str, Any]], views: list[list[Sample]]) -> dict[str, Any]:
    """The views of each image -> a batch of all."""
    return collate_fn([sample for samples in views for sample in samples])
