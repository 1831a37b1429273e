"""JPEG files decoded on the device: the loading processes only read them and draw the crops.

Plain JPEG files (8 bits, grey or RGB, upright, not progressive) travel encoded and are decoded a batch at a time, by
nvJPEG on a GPU. Everything else is decoded where it is read, as without this module. D samples decoded there, B batch,
C channels, H height, W width.
"""

import io
import logging
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import io as torchvision_io

from convmae.data.images import Crop, RandomCrop, is_plain_jpeg, opened, undecodable_if_damaged
from convmae.data.loading import TrainingImages
from convmae.data.samples import Sample, collate, labelled
from convmae.errors import UserError

_READ_MODES = {1: "GRAY", 3: "RGB"}  # by channels
_JPEG = b"\xff\xd8"
_END_OF_IMAGE = b"\xff\xd9"

_logger = logging.getLogger(__name__)


class EncodedCrop(NamedTuple):
    """A JPEG file and the crop to be taken of it."""

    encoded: bytes
    crop: Crop


class EncodedViews(NamedTuple):
    """A JPEG file and the crops to be taken of it, for one batch."""

    encoded: bytes
    crops: list[Crop]
    places: list[int]
    """Where in the batch each of the crops stands."""
    key: tuple[int, int]
    """The (epoch, index) of the image in the data set."""


class DeferredCrop:
    """RandomCrop that leaves plain JPEG files to the device; for grey or RGB, since it knows no alpha."""

    def __init__(self, crop: RandomCrop) -> None:
        self.crop = crop

    def __call__(self, file: BinaryIO, label: int | None, seeds: Sequence[int]) -> list[Sample]:
        """An encoded image and its class, if it has one -> a sample for each seed.

        {"image": EncodedCrop of a plain JPEG file, else uint8 (C, H, W), "label": the class}, without a class no
        "label". Raises UndecodableImageError.
        """
        with undecodable_if_damaged():
            encoded = file.read()
            if not encoded.startswith(_JPEG):  # images with bands, which Pillow does not know, among them
                return self.crop(io.BytesIO(encoded), label, seeds)
            with opened(io.BytesIO(encoded), self.crop.decoding) as image:
                complete = encoded.endswith(_END_OF_IMAGE)  # a device may not notice
                # A GPU has no engine for progressive files: the training process would do much of the work.
                baseline = not image.info.get("progressive")
                if complete and baseline and is_plain_jpeg(image):
                    crops = [self.crop.draw(image.height, image.width, seed) for seed in seeds]
                    return [labelled(EncodedCrop(encoded, crop), label) for crop in crops]
        return self.crop(io.BytesIO(encoded), label, seeds)


def collate_encoded(samples: list[Sample]) -> dict[str, Any]:
    """Samples of DeferredCrop with their keys -> what DeviceDecoder takes.

    {"encoded": EncodedViews of each plain JPEG file, "images": uint8 (D, C, H, W) of the other samples, "samples": how
    many these are together, "failed": list}
    """
    # Files as bytes, since every tensor would take a file descriptor on its way to the training process.
    encoded: dict[tuple[int, int], EncodedViews] = {}
    decoded: list[Sample] = []
    for place, sample in enumerate(samples):
        if isinstance(sample["image"], EncodedCrop):
            file, crop = sample["image"]
            views = encoded.setdefault(sample["key"], EncodedViews(file, [], [], sample["key"]))
            views.crops.append(crop)
            views.places.append(place)
        else:
            decoded.append(sample)
    return {
        "encoded": list(encoded.values()),
        "images": collate(decoded)["images"],
        "samples": len(samples),
        "failed": [failure for sample in samples for failure in sample["failed"]],
    }


class DeviceDecoder:
    """Turns batches of collate_encoded into crops on the device, decoding there what came encoded; drops labels."""

    def __init__(self, images: TrainingImages, crop: RandomCrop, device: torch.device) -> None:
        """images: the loader's data set; crop: the one in its DeferredCrop. Raises UserError where nothing decodes."""
        self._crop, self._device = crop, device
        # Takes over where the device cannot decode.
        self._images = TrainingImages(images.source, crop, images.seed, images.skip_damaged, images.aug_repeats)
        self._warned = False
        if not hasattr(torchvision_io, "decode_jpeg"):  # deprecated since 0.29, to be removed some day
            raise UserError("this torchvision decodes no JPEG files: leave --decode out, or install torchvision 0.29")
        sample = io.BytesIO()
        Image.new("RGB", (16, 16)).save(sample, "JPEG")
        try:
            self._decode([sample.getvalue()])
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{device} decodes no JPEG files, leave --decode out: {reason}") from error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of collate_encoded -> {"images": uint8 (B, C, H, W) on the device, "failed": list}.

        Files that the device refuses are decoded here. Raises UserError where none of 50 in a row can be, or one cannot
        and damaged images are not skipped.
        """
        failed = list(batch["failed"])
        images: dict[int, Tensor] = {}
        decoded = self._decode_each([views.encoded for views in batch["encoded"]])
        for views, pixels in zip(batch["encoded"], decoded, strict=True):
            resized = None if pixels is None else self._views(pixels, views.crops)
            if resized is None:
                samples = self._images[views.key]
                resized = [sample["image"].to(self._device) for sample in samples]
                failed += [failure for sample in samples for failure in sample["failed"]]
            images |= zip(views.places, resized, strict=True)
        others = iter(batch["images"].to(self._device, non_blocking=True))
        ordered = [images[place] if place in images else next(others) for place in range(batch["samples"])]
        return {"images": torch.stack(ordered), "failed": failed}

    def _decode_each(self, files: list[bytes]) -> list[Tensor | None]:
        """JPEG files -> uint8 (C, h, w) each, on the device; None for each file that the device refuses."""
        if not files:
            return []
        try:
            return list(self._decode(files))
        except RuntimeError as error:  # which of the files is to blame it does not tell
            self._warn(error)
        decoded: list[Tensor | None] = []
        for file in files:
            try:
                decoded += self._decode([file])
            except RuntimeError:
                decoded.append(None)
        return decoded

    def _decode(self, files: list[bytes]) -> list[Tensor]:
        """JPEG files -> uint8 (C, h, w) each, on the device; raises RuntimeError where it refuses one."""
        if self._device.type == "cuda":
            # torchvision decodes on a stream of its own, into memory that the step before may still be using.
            torch.cuda.current_stream(self._device).synchronize()
        encoded = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
        return torchvision_io.decode_jpeg(encoded, _READ_MODES[self._crop.decoding.channels], device=self._device)

    def _views(self, pixels: Tensor, crops: list[Crop]) -> list[Tensor] | None:
        """An image (C, h, w) -> its crops, None where the device refuses: it knows a largest reduction."""
        try:
            return [self._resized(pixels, crop) for crop in crops]
        except RuntimeError as error:
            self._warn(error)
            return None

    def _warn(self, error: RuntimeError) -> None:
        if not self._warned:
            _logger.warning("the CPU decodes the JPEG files that the device refuses: %s", error)
        self._warned = True

    def _resized(self, pixels: Tensor, crop: Crop) -> Tensor:
        """An image (C, h, w) -> its crop, uint8 (C, H, W)."""
        top, left, height, width, mirrored = crop
        region = pixels[None, :, top : top + height, left : left + width].float()  # a GPU resizes no integers
        resized = interpolate(region, self._crop.image_size, mode="bicubic", antialias=True)[0]
        resized = resized.round().clamp(0, 255).to(torch.uint8)
        return resized.flip(2) if mirrored else resized
