"""From the pictures of a source to batches, for training in a random order without end, for judging in order once.

A transform (RandomCrop, Augmentation, CenterCrop) makes a tensor of an encoded picture. Here it gets its seeds, damaged
pictures are replaced, left out or refused, and processes and workers get their shares. B batch, R views of a picture,
C channels, H height, W width.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

import torch
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from convmae.data.images import UndecodableImageError, UnfitAnnotationError, undecodable_if_damaged
from convmae.data.sampler import ResumableSampler, mixed_seed
from convmae.data.sources import ImageCollection, ImageStream
from convmae.errors import UserError

Transform = Callable[..., Any]
"""An encoded picture, and its annotation if it has one -> uint8 (C, H, W), or what the collate_fn takes; raises
UndecodableImageError.
"""

RandomTransform = Callable[..., Any]
"""An encoded picture, its annotation if it has one, and seeds -> a view of it for each seed, uint8 (C, H, W), or what
the collate_fn takes; raises UndecodableImageError.
"""

_FAILURES_IN_A_ROW = 50  # of unlabelled pictures; more than chance damage: a broken disk, or not pictures at all

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
        """aug_repeats: views of each picture, R."""
        self.source, self.transform, self.seed, self.skip_damaged = source, transform, seed, skip_damaged
        self.aug_repeats = aug_repeats

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """{"images": R of uint8 (C, H, W), "label": int, "key": key, "failed": of the damaged pictures it replaces}.

        "images" are what the transform returns, "failed" names and reasons. The index is taken modulo the length, the
        label is 0 without classes. Raises UserError at the first damaged picture unless skip_damaged, and where 50 in a
        row, of labelled ones all, are damaged.
        """
        epoch, index = key
        seeds = [mixed_seed(self.seed, epoch, index, view) for view in range(self.aug_repeats)]
        failed: list[str] = []
        for attempt in range(_most_failures(self.source)):
            position = (index + attempt) % len(self)
            try:
                images, label = _transformed(
                    self.source, partial(self.source.open_labelled, position), self.transform, seeds
                )
            except UndecodableImageError as error:
                failed.append(_failure(self.source.picture_name(position), error, self.skip_damaged))
            else:
                return {"images": images, "label": label, "key": key, "failed": failed}
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
        """batch_size: samples per rank and step; aug_repeats: views of each, R."""
        self.source, self.transform, self.seed, self.skip_damaged = source, transform, seed, skip_damaged
        self.batch_size, self.aug_repeats = batch_size, aug_repeats
        self.epoch, self.first_batch = SharedCount(), SharedCount()  # workers that live on see them change

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """The next iteration yields `epoch` without its first `batch` batches."""
        self.source.reader.set_epoch(epoch // self.aug_repeats)
        self.epoch.value, self.first_batch.value = epoch, batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields samples as TrainingImages does, without keys, and raises as it does."""
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
        for place, picture in enumerate(self.source.repeated()):
            if place < skipped:
                continue
            try:
                key = (self.seed, epoch, self.source.reader.global_worker_id, place)
                seeds = [mixed_seed(*key, view) for view in range(self.aug_repeats)]
                images, label = _transformed(self.source, picture.open_labelled, self.transform, seeds)
            except UndecodableImageError as error:
                failed.append(_failure(picture.name(), error, self.skip_damaged))
                if len(failed) == _most_failures(self.source):
                    raise _all_failed(self.source, failed) from error
                continue
            yield {"images": images, "label": label, "failed": failed}
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

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 (C, H, W), "label": int, "index": int, "failed": []}; "image" is None for a damaged file.

        Raises UserError for a damaged file unless skip_damaged.
        """
        open_labelled = partial(self.source.open_labelled, index)
        name = partial(self.source.picture_name, index)
        return {"index": index, **_judged(self.source, open_labelled, self.transform, name, self.skip_damaged)}


class StreamedEvaluationImages(IterableDataset):
    """The images of a stream, each once, all seen in the same way."""

    def __init__(self, source: ImageStream, transform: Transform, skip_damaged: bool = False) -> None:
        self.source, self.transform, self.skip_damaged = source, transform, skip_damaged

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields samples as EvaluationImages does, without an "index"."""
        for name, open_labelled in self.source:
            yield _judged(self.source, open_labelled, self.transform, name, self.skip_damaged)


def _transformed(
    source: ImageCollection | ImageStream,
    open_labelled: Callable[[], tuple[BinaryIO, int | None]],
    transform: Callable[..., Any],
    *arguments: Any,
) -> tuple[Any, int | None]:
    """What the transform makes of a picture and of the arguments, and the label; raises UndecodableImageError.

    In place of a label, the transform takes an annotation.
    """
    with undecodable_if_damaged():
        file, label = open_labelled()
    with file:
        if source.annotated:
            return transform(file, label, *arguments), None
        images = transform(file, *arguments)
    if source.classes and (label is None or not 0 <= label < len(source.classes)):
        raise UserError(f"{source.name} has images without a class (number {label}): choose another split")
    return images, label


def _judged(
    source: ImageCollection | ImageStream,
    open_labelled: Callable[[], tuple[BinaryIO, int | None]],
    transform: Transform,
    name: Callable[[], str],
    skip_damaged: bool,
) -> dict[str, Any]:
    try:
        image, label = _transformed(source, open_labelled, transform)
    except UndecodableImageError as error:
        return {"image": None, "label": 0, "failed": [_failure(name(), error, skip_damaged)]}
    return {"image": image, "label": label, "failed": []}


def _failure(name: str, error: UndecodableImageError, skip_damaged: bool) -> str:
    """What to report of a damaged picture; raises UserError unless they are to be skipped."""
    if not skip_damaged:
        fault = "cannot be decoded, replace or delete it"
        if isinstance(error, UnfitAnnotationError):
            fault = "cannot be used, correct or delete it and its annotation"
        raise UserError(f"{name} {fault}, or leave such images out with --skip-damaged: {error}") from error
    return f"{name}: {error}"


def _most_failures(source: ImageCollection | ImageStream) -> int:
    """How many damaged pictures in a row are too many: of labelled ones, which the user asked to skip, all."""
    return len(source) if source.classes else min(_FAILURES_IN_A_ROW, len(source))


def _all_failed(source: ImageCollection | ImageStream, failed: list[str]) -> UserError:
    return UserError(f"{source.name}: {len(failed)} images in a row cannot be decoded, check the files: {failed[-1]}")


# Batches


class ImageLoader(DataLoader):
    """A DataLoader whose workers' UserErrors arrive as they were raised."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            # A worker's error arrives as a whole traceback, of which the last line is the message.
            message = str(error).strip().splitlines()[-1].removeprefix("convmae.errors.UserError: ")
            raise UserError(message) from error


class TrainingLoader(ImageLoader):
    """Whole batches, the same number on every rank; its length is what remains of the epoch.

    Call `set_position` before each epoch, or the last one is replayed.
    """

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """The next iteration yields `epoch` from batch number `batch` on.

        A collection continues the exact sequence. A stream continues with the same samples, but where `batch` is
        no multiple of num_workers its batches are in another order, and damaged pictures shift the start.
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


def build_training_loader(
    source: ImageCollection | ImageStream,
    transform: RandomTransform,
    *,
    batch_size: int,
    collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    aug_repeats: int = 1,
    seed: int = 0,
    skip_damaged: bool = True,
    num_workers: int = 0,
    pin_memory: bool = False,
    num_replicas: int = 1,
    rank: int = 0,
) -> TrainingLoader:
    """This rank's shuffled batches {"images": uint8 (B, C, H, W), "labels": int64 (B,), "failed": list}.

    batch_size: views per rank and step; aug_repeats: how many of them, side by side, are of one picture, which is
    decoded once. An epoch has as many views as there are pictures, so each picture is seen in one of aug_repeats
    epochs. The images of a collection do not depend on num_workers; a stream is split among the workers, of which there
    are at most as many as shards and as batches an epoch. collate_fn: replaces `collate`, for other batches than these.
    Raises UserError unless aug_repeats divides batch_size.
    """
    if aug_repeats < 1 or batch_size % aug_repeats:
        raise UserError(
            f"{batch_size} images a pass and process are no multiple of aug_repeats {aug_repeats}: change one of them"
        )
    samples = batch_size // aug_repeats
    dataset: TrainingImages | StreamedTrainingImages
    sampler = None
    if isinstance(source, ImageStream):
        # An epoch is rounded up to whole batches in every worker.
        num_workers = min(num_workers, max(1, source.reader.num_samples // (batch_size * num_replicas)))
        num_workers = _share_stream(source, batch_size, num_workers, num_replicas, rank, seed)
        dataset = StreamedTrainingImages(source, transform, samples, seed, skip_damaged, aug_repeats)
    else:
        dataset = TrainingImages(source, transform, seed, skip_damaged, aug_repeats)
        sampler = ResumableSampler(
            len(dataset), samples, seed=seed, num_replicas=num_replicas, rank=rank, aug_repeats=aug_repeats
        )
    return TrainingLoader(
        dataset,
        batch_size=samples,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn or collate,
        pin_memory=pin_memory,
        drop_last=True,
        persistent_workers=num_workers > 0,
        # Each pass draws a seed for the workers; from the global generator, a resumed run would have one draw more.
        generator=torch.Generator(),
    )


def build_evaluation_loader(
    source: ImageCollection | ImageStream,
    transform: Transform,
    *,
    batch_size: int,
    collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    skip_damaged: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
    num_replicas: int = 1,
    rank: int = 0,
    first: int = 0,
) -> ImageLoader:
    """Batches in order, each image on one rank only; of a collection from image number `first` on.

    {"images": uint8 (B, C, H, W), "labels": (B,), "indices": (B,), "failed": list}; damaged images are left out, so
    batches may be smaller, or empty. Those of a stream have no "indices" and, with workers, no settled order.
    collate_fn: makes other batches than these of samples as EvaluationImages gives them.
    """
    dataset: EvaluationImages | StreamedEvaluationImages
    sampler = None
    if isinstance(source, ImageStream):
        num_workers = _share_stream(source, batch_size, num_workers, num_replicas, rank)
        dataset = StreamedEvaluationImages(source, transform, skip_damaged)
    else:
        dataset = EvaluationImages(source, transform, skip_damaged)
        sampler = range(first + rank, len(dataset), num_replicas)
    return ImageLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn or _collate_decoded,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )


def _share_stream(
    source: ImageStream, batch_size: int, num_workers: int, num_replicas: int, rank: int, seed: int = 0
) -> int:
    """Tell the stream who reads it; the number of workers, at most one a shard."""
    most = max(1, source.num_shards // num_replicas)
    if num_workers > most:
        _logger.warning("%s: %d loader workers instead of %d, one a shard", source.name, most, num_workers)
        num_workers = most
    source.configure(batch_size, num_workers, num_replicas, rank, seed)
    return num_workers


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of training images -> the batch that build_training_loader describes."""
    # The channels lie last in memory, in single images as in batches: nothing is copied in another order.
    images = default_collate([image.permute(1, 2, 0) for sample in samples for image in sample["images"]])
    return {
        "images": images.permute(0, 3, 1, 2),
        "labels": torch.tensor([sample["label"] for sample in samples for _ in sample["images"]]),
        "failed": [failure for sample in samples for failure in sample["failed"]],
    }


def _collate_decoded(samples: list[dict[str, Any]]) -> dict[str, Any]:
    decoded = [sample for sample in samples if sample["image"] is not None]
    batch = {
        "images": torch.stack([sample["image"] for sample in decoded]) if decoded else torch.empty(0),
        "labels": torch.tensor([sample["label"] for sample in decoded], dtype=torch.int64),
        "failed": [failure for sample in samples for failure in sample["failed"]],
    }
    if "index" in samples[0]:
        batch["indices"] = torch.tensor([sample["index"] for sample in decoded], dtype=torch.int64)
    return batch
