"""Unlabelled pictures for pretraining: from a source of encoded pictures to batches of random crops.

Pillow decodes the pictures, a JPEG at a reduced size where the crop allows it, and only the crop is
resampled. Tensors stay uint8; the device normalises. B batch, C channels, H height, W width.

Pictures come out upright (EXIF orientation is applied); of an animation the first frame; without alpha unless
it is asked for; of 16-bit grey the high byte. What cannot be decoded, truncated files included, is replaced
by the next.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO

import numpy
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from timm.data.readers.shared_count import SharedCount
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from convmae.data.sampler import ResumableSampler, seeded
from convmae.data.sources import ImageCollection, ImageStream
from convmae.errors import UserError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's mode
_FAILURES_IN_A_ROW = 50  # more than chance damage: a broken disk, or not pictures at all
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the crop's sides keep this many times image_size.
_REDUCING_GAP = 2.0

_logger = logging.getLogger(__name__)


class RandomCrop:
    """An encoded picture's random resized crop, flipped or not, by torch's global generator."""

    def __init__(
        self, image_size: tuple[int, int], in_channels: int = 3, scale: tuple[float, float] = (0.2, 1.0)
    ) -> None:
        """image_size: (H, W) of the crops; in_channels: 1 grey, 3 RGB, 4 RGBA; scale: share of the area."""
        self._mode = pillow_mode(in_channels)
        if min(image_size) < 1 or not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"a crop needs a positive size and 0 < scale <= 1: not {image_size} and {scale}")
        height, width = image_size
        self.image_size = (height, width)
        self._crop = v2.RandomResizedCrop(self.image_size, scale, interpolation=InterpolationMode.BICUBIC)
        self._flip = v2.RandomHorizontalFlip()

    def __call__(self, file: BinaryIO) -> Tensor:
        """An encoded picture -> uint8 (C, H, W); raises whatever Pillow raises on damaged files."""
        with Image.open(file) as image:
            # The header tells the size, so the crop is known before a pixel is decoded.
            crop = self._crop.make_params([image])
            cropped = _decode_crop(image, **crop, mode=self._mode, image_size=self.image_size)
        pixels = functional.pil_to_tensor(cropped)
        return self._flip(functional.resize(pixels, list(self.image_size), InterpolationMode.BICUBIC))


def _decode_crop(
    image: Image.Image, top: int, left: int, height: int, width: int, mode: str, image_size: tuple[int, int]
) -> Image.Image:
    """The crop's pixels, upright and in `mode`, at a reduced size where it still exceeds image_size."""
    # draft() takes the smallest size wanted for the whole image and does nothing unless it is a JPEG. The
    # longer side stands for both, since EXIF may exchange them.
    pixels = max(image_size) * _REDUCING_GAP
    full_width = image.width
    drafted = image.draft(mode, (math.ceil(full_width * pixels / width), math.ceil(image.height * pixels / height)))
    reduction = round(full_width / drafted[1][2]) if drafted else 1
    image.load()
    right, bottom = round((left + width) / reduction), round((top + height) / reduction)
    cropped = image.crop((round(left / reduction), round(top / reduction), right, bottom))
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            cropped = ImageOps.exif_transpose(cropped)
    except Exception as error:  # damaged metadata raise as many types as damaged pixels, and do no harm
        _logger.debug("unreadable EXIF: %s", error)
    return _converted(cropped, mode)


def open_upright(file: BinaryIO, in_channels: int = 3) -> Image.Image:
    """A whole encoded picture, upright, 1 grey, 3 RGB or 4 RGBA; raises whatever Pillow raises on damaged files."""
    with Image.open(file) as image:
        return _converted(ImageOps.exif_transpose(image), pillow_mode(in_channels))


def decode_image(file: BinaryIO, in_channels: int = 3) -> Tensor:
    """A whole encoded picture -> uint8 (C, H, W), upright; raises whatever Pillow raises on damaged files."""
    return functional.pil_to_tensor(open_upright(file, in_channels))


def pillow_mode(in_channels: int) -> str:
    """Pillow's name for pictures of so many channels; raises UserError where it has none."""
    if in_channels not in _MODES:
        raise UserError(f"images have 1 (grey), 3 (RGB) or 4 (RGBA) channels: in_channels cannot be {in_channels}")
    return _MODES[in_channels]


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in Pillow's mode L, RGB or RGBA; raises ValueError where its numbers have no known range."""
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range: convert the file to 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 instead of scaling
        image = Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


class UndecodableImageError(Exception):
    """A picture that cannot be opened or decoded; the message is the reason."""


@contextmanager
def undecodable_if_damaged() -> Iterator[None]:
    """Turn what opening and decoding raise inside into UndecodableImageError."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UndecodableImageError("not an image, or of an unknown format") from error
    except Exception as error:  # on damaged files Pillow's plugins raise errors of many unrelated types
        raise UndecodableImageError(" ".join(str(error).split()) or type(error).__name__) from error


def _seeded_crop(crop: RandomCrop, open_file: Callable[[], BinaryIO], *seeds: int) -> Tensor:
    """The random crop that `seeds` determine, uint8 (C, H, W)."""
    with seeded(*seeds), undecodable_if_damaged(), open_file() as file:
        return crop(file)


class PretrainingImages(Dataset):
    """Random crops by key: dataset[epoch, index] depends on (seed, epoch, index) and on nothing else."""

    def __init__(self, source: ImageCollection, crop: RandomCrop, seed: int = 0) -> None:
        self.source, self.crop, self.seed = source, crop, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """{"image": uint8 (C, H, W), "failed": names and reasons of the undecodable pictures it replaces}.

        The index is taken modulo the length. Raises UserError where 50 in a row, or all, are undecodable.
        """
        epoch, index = key
        failed: list[str] = []
        for attempt in range(min(_FAILURES_IN_A_ROW, len(self))):
            position = (index + attempt) % len(self)
            try:
                image = _seeded_crop(self.crop, partial(self.source.open, position), self.seed, epoch, index)
            except UndecodableImageError as error:
                failed.append(f"{self.source.picture_name(position)}: {error}")
            else:
                return {"image": image, "failed": failed}
        raise _all_failed(self.source.name, failed)


class StreamedPretrainingImages(IterableDataset):
    """Random crops of a stream; each depends on the seed, the epoch, the worker and its place there."""

    def __init__(self, source: ImageStream, crop: RandomCrop, batch_size: int, seed: int = 0) -> None:
        self.source, self.crop, self.batch_size, self.seed = source, crop, batch_size, seed
        self.epoch, self.first_batch = SharedCount(), SharedCount()  # workers that live on see them change

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """The next iteration yields `epoch` without its first `batch` batches."""
        self.source.reader.set_epoch(epoch)
        self.epoch.value, self.first_batch.value = epoch, batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields samples as PretrainingImages does; raises UserError where 50 in a row are undecodable."""
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # Batch b comes from worker b % num_workers. What was seen is read again, but not decoded.
        skipped = len(range(worker_id, self.first_batch.value, num_workers)) * self.batch_size
        wanted = len(self.source) // num_workers - skipped
        if not wanted:
            return
        failed: list[str] = []
        for place, (name, open_file) in enumerate(self.source):
            if place < skipped:
                continue
            seeds = self.seed, self.epoch.value, self.source.reader.global_worker_id, place
            try:
                image = _seeded_crop(self.crop, open_file, *seeds)
            except UndecodableImageError as error:
                failed.append(f"{name or f'sample {place} of worker {seeds[2]}'}: {error}")
                if len(failed) == _FAILURES_IN_A_ROW:
                    raise _all_failed(self.source.name, failed) from error
                continue
            yield {"image": image, "failed": failed}
            failed = []
            wanted -= 1
            if not wanted:
                return


def _all_failed(name: str, failed: list[str]) -> UserError:
    return UserError(f"{name}: {len(failed)} images in a row cannot be decoded, check the files: {failed[-1]}")


# Batches


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples -> {"images": uint8 (B, C, H, W), "failed": names and reasons of undecodable pictures}.

    Where samples have a "label", also {"labels": int64 (B,)}.
    """
    batch = {
        "images": default_collate([sample["image"] for sample in samples]),
        "failed": [failure for sample in samples for failure in sample["failed"]],
    }
    if "label" in samples[0]:
        batch["labels"] = torch.tensor([sample["label"] for sample in samples])
    return batch


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
    """Whole batches of random crops, the same number on every rank; its length is what remains of the epoch.

    Call `set_position` before each epoch, or the last one is replayed.
    """

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """The next iteration yields `epoch` from batch number `batch` on.

        A folder continues the exact sequence. A stream continues with the same samples, but where `batch` is
        no multiple of num_workers its batches are in another order, and undecodable pictures shift the start.
        """
        positioned: Any = self.sampler if self._stream is None else self._stream
        positioned.set_position(epoch, batch)

    @property
    def _stream(self) -> StreamedPretrainingImages | None:
        return self.dataset if isinstance(self.dataset, StreamedPretrainingImages) else None

    def __len__(self) -> int:
        if self._stream is None:
            return super().__len__()
        return len(self._stream.source) // self._stream.batch_size - self._stream.first_batch.value


def build_loader(
    source: ImageCollection | ImageStream,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    in_channels: int = 3,
    scale: tuple[float, float] = (0.2, 1.0),
    seed: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    num_replicas: int = 1,
    rank: int = 0,
) -> TrainingLoader:
    """This rank's batches {"images": uint8 (batch_size, in_channels, *image_size), "failed": list}.

    batch_size: samples per rank and step. The crops of a folder do not depend on num_workers; a stream is
    split among the workers, of which there are at most as many as shards. Raises UserError on impossible
    sizes.
    """
    crop = RandomCrop(image_size, in_channels, scale)
    dataset: PretrainingImages | StreamedPretrainingImages
    sampler = None
    if isinstance(source, ImageStream):
        most = max(1, source.num_shards // num_replicas)
        if num_workers > most:
            _logger.warning("%s: %d loader workers instead of %d, one a shard", source.name, most, num_workers)
            num_workers = most
        source.configure(batch_size, num_workers, num_replicas, rank, seed)
        dataset = StreamedPretrainingImages(source, crop, batch_size, seed)
    else:
        dataset = PretrainingImages(source, crop, seed)
        sampler = ResumableSampler(len(dataset), batch_size, seed=seed, num_replicas=num_replicas, rank=rank)
    return TrainingLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        drop_last=True,
        persistent_workers=num_workers > 0,
        # Each pass draws a seed for the workers; from the global generator, a resumed run would have one draw more.
        generator=torch.Generator(),
    )
