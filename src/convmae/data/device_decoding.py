"""JPEG files decoded on the device: the loading processes only read them and draw the crops.

Plain JPEG files (8 bits, grey or RGB, upright) travel encoded and are decoded a batch at a time, by nvJPEG on a GPU.
Everything else is decoded where it is read, as without this module. D samples decoded there, R views of a picture,
B batch, C channels, H height, W width.
"""

import io
import logging
from typing import Any, BinaryIO, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import io as torchvision_io

from convmae.data.images import Crop, RandomCrop, is_plain_jpeg, undecodable_if_damaged
from convmae.data.loading import TrainingImages, collate
from convmae.errors import UserError

_READ_MODES = {1: "GRAY", 3: "RGB"}  # by channels
_END_OF_IMAGE = b"\xff\xd9"

_logger = logging.getLogger(__name__)


class EncodedCrops(NamedTuple):
    """A JPEG file and the crops to be taken of it."""

    encoded: bytes
    crops: list[Crop]


class DeferredCrop:
    """RandomCrop that leaves plain JPEG files to the device."""

    def __init__(self, crop: RandomCrop) -> None:
        self.crop = crop

    def __call__(self, file: BinaryIO, seeds: list[int]) -> EncodedCrops | list[Tensor]:
        """What RandomCrop returns, for a plain JPEG file the same crops still to be taken; raises as it does."""
        with undecodable_if_damaged():
            encoded = file.read()
            with Image.open(io.BytesIO(encoded)) as image:
                complete = encoded.endswith(_END_OF_IMAGE)  # a device may not notice
                if complete and self.crop.in_channels in _READ_MODES and is_plain_jpeg(image):
                    return EncodedCrops(encoded, [self.crop.draw(image.height, image.width, seed) for seed in seeds])
        return self.crop(io.BytesIO(encoded), seeds)


def collate_encoded(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of TrainingImages with DeferredCrop -> what DeviceDecoder takes.

    {"encoded": their places in the batch, keys and EncodedCrops, "images": uint8 (D*R, C, H, W) of the others,
    "labels": of all as many as samples, "failed": list}
    """
    decoded = [sample for sample in samples if not isinstance(sample["images"], EncodedCrops)]
    return {
        # As bytes, since every tensor would take a file descriptor on its way to the training process.
        "encoded": [
            (place, sample["key"], sample["images"])
            for place, sample in enumerate(samples)
            if isinstance(sample["images"], EncodedCrops)
        ],
        "images": collate(decoded)["images"] if decoded else torch.empty(0, dtype=torch.uint8),
        "labels": [sample["label"] for sample in samples],
        "failed": [failure for sample in samples for failure in sample["failed"]],
    }


class DeviceDecoder:
    """Batches of collate_encoded -> those of build_training_loader without it, on the device."""

    def __init__(self, images: TrainingImages, crop: RandomCrop, device: torch.device) -> None:
        """images: the loader's data set; crop: what its DeferredCrop defers. Raises UserError where nothing decodes."""
        if not hasattr(torchvision_io, "decode_jpeg"):  # deprecated since 0.29, to be removed some day
            raise UserError("this torchvision decodes no JPEG files: leave --decode out, or install torchvision 0.29")
        self._crop, self._device, self._repeats = crop, device, images.aug_repeats
        # Takes over where the device cannot decode.
        self._images = TrainingImages(images.source, crop, images.seed, images.skip_damaged, images.aug_repeats)
        self._warned = False

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"images": uint8 (B, C, H, W) on the device, "labels": int64 (B,), "failed": list}.

        Raises UserError where a file that the device does not decode is one too many, as TrainingImages does.
        """
        labels, failed = list(batch["labels"]), list(batch["failed"])
        views: dict[int, list[Tensor]] = {}
        try:
            pictures = self._decode([found.encoded for _, _, found in batch["encoded"]])
            for (place, _, found), pixels in zip(batch["encoded"], pictures, strict=True):
                views[place] = [self._resized(pixels, crop) for crop in found.crops]
        except RuntimeError as error:  # which of the files is to blame it does not tell
            if not self._warned:
                _logger.warning("the device does not decode a batch of JPEG files, the CPU does: %s", error)
            self._warned = True
            for place, key, _ in batch["encoded"]:
                sample = self._images[key]
                views[place] = [image.to(self._device) for image in sample["images"]]
                labels[place] = sample["label"]
                failed += sample["failed"]
        others = iter(batch["images"].to(self._device, non_blocking=True))
        for place in range(len(labels)):
            if place not in views:
                views[place] = [next(others) for _ in range(self._repeats)]
        return {
            "images": torch.stack([image for place in range(len(labels)) for image in views[place]]),
            "labels": torch.tensor(labels).repeat_interleave(self._repeats),
            "failed": failed,
        }

    def _decode(self, files: list[bytes]) -> list[Tensor]:
        """JPEG files -> uint8 (C, h, w) each, on the device."""
        if not files:
            return []
        encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
        return torchvision_io.decode_jpeg(encoded, _READ_MODES[self._crop.in_channels], device=self._device)

    def _resized(self, pixels: Tensor, crop: Crop) -> Tensor:
        """A picture (C, h, w) -> its crop, uint8 (C, H, W)."""
        top, left, height, width, mirrored = crop
        region = pixels[None, :, top : top + height, left : left + width].float()  # a GPU resizes no integers
        resized = interpolate(region, self._crop.image_size, mode="bicubic", antialias=True)[0]
        resized = resized.round().clamp(0, 255).to(torch.uint8)
        return resized.flip(2) if mirrored else resized
