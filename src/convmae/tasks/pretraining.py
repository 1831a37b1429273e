"""Pretraining as a run's job: crops of unlabelled images, an objective's loss, pictures of its reconstructions."""

from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from convmae.data.device_decoding import DeferredCrop, DeviceDecoder, collate_encoded
from convmae.data.failures import DecodingFailures
from convmae.data.images import RandomCrop
from convmae.data.loading import Loading, TrainingImages, build_training_loader
from convmae.data.sources import ImageCollection, ImageStream
from convmae.errors import UserError, check_choice
from convmae.objectives import Objective
from convmae.training.run import Job, Judgement, StepLoss
from convmae.visualize import reconstruction_picture

_EXAMPLES = 6  # images in a picture


class ObjectiveTraining(nn.Module):
    """An objective as the training loop takes it: images (B, C, H, W) -> its loss."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, images: Tensor) -> StepLoss:
        return StepLoss(self.objective.training_loss(images).loss)


class PretrainingJob(Job[Objective, Judgement]):
    """An objective on the images of a source; nothing judges it."""

    def __init__(
        self,
        fabric: Fabric,
        objective: Objective,
        source: ImageCollection | ImageStream,
        crop: RandomCrop,
        loading: Loading,
        *,
        origin: str,
        folder: Path,
        seed: int,
        aug_repeats: int = 1,
        decode: str = "cpu",
        pictures_every_epochs: int = 0,
    ) -> None:
        """crop: makes random crops of an image. origin: which model it is, for the run's first line. folder: the run's.

        aug_repeats: how many of a batch's crops are of one image. decode: "cpu", or "gpu" where the device decodes JPEG
        files. pictures_every_epochs: epochs between two pictures of reconstructions; 0 draws the last only. Raises
        UserError where the device cannot decode.
        """
        if pictures_every_epochs < 0:
            raise UserError("pictures_every_epochs must be at least 0: raise it")
        self.network, self.module = objective, ObjectiveTraining(objective)
        self.origin, self.data = origin, source.name
        count = source.reader.num_samples if isinstance(source, ImageStream) else len(source)
        self.contents = "1 image" if count == 1 else f"{count} images"
        self.findings = {source.name: source.findings}
        self.picture = folder / "reconstructions" / "latest.png"
        self.failures = DecodingFailures(folder)
        self._fabric, self._aug_repeats = fabric, aug_repeats
        self._pictures_every_epochs = pictures_every_epochs
        on_device = _decodes_on_device(decode, source, crop.decoding.channels, fabric.device)
        self._loader = build_training_loader(
            source,
            DeferredCrop(crop) if on_device else crop,
            loading,
            seed=seed,
            aug_repeats=aug_repeats,
            collate_fn=collate_encoded if on_device else None,
        )
        self._decoder = None
        if on_device:
            assert isinstance(self._loader.dataset, TrainingImages)
            self._decoder = DeviceDecoder(self._loader.dataset, crop, fabric.device)
        self._examples = _examples(source, crop, seed) if isinstance(source, ImageCollection) else []

    @property
    def passes(self) -> int:
        """Batches of an epoch for each process."""
        self._loader.set_position(0)
        return len(self._loader)

    def batches(self, epoch: int, first: int) -> Iterator[Tensor]:
        """Crops of an epoch from batch number `first` on, uint8 (B, C, H, W) on the device."""
        self._loader.set_position(epoch, first)
        for found in self._loader:
            batch = found if self._decoder is None else self._decoder(found)
            self.failures.record(len(batch["images"]) // self._aug_repeats, batch["failed"])
            if not self._examples:  # of a stream
                self._examples.extend(batch["images"][:: self._aug_repeats][:_EXAMPLES].clone())  # the batch may go
            yield batch["images"].to(self._fabric.device, non_blocking=True)

    def after_step(self, step: int) -> None:
        """Tell the objective that so many steps are done, which may move a teacher on."""
        self.network.after_step(step)

    def after_epoch(self, epoch: int, last: bool) -> None:
        """Draw what the objective makes of the examples, where it is time to."""
        every = self._pictures_every_epochs
        if self._fabric.is_global_zero and (last or (every and (epoch + 1) % every == 0)):
            self._draw(self.picture if last else self.picture.with_name(f"epoch-{epoch + 1:04d}.png"))

    def warning(self) -> str | None:
        """A sentence where more images than the odd one cannot be decoded, else None."""
        return self.failures.warning()

    def _draw(self, path: Path) -> None:
        """Save the reconstructions of the examples, always under the same masks."""
        images = torch.stack(self._examples).to(self._fabric.device)
        found = self.network.examples(images)
        if found is not None:
            visible, reconstructions = found
            reconstruction_picture(path, list((images / 255).cpu()), list(visible.cpu()), list(reconstructions.cpu()))


def _decodes_on_device(
    decode: str, source: ImageCollection | ImageStream, in_channels: int, device: torch.device
) -> bool:
    """Whether the device decodes; raises UserError where it cannot."""
    check_choice("decode", decode, ("cpu", "gpu"))
    if decode == "gpu" and isinstance(source, ImageStream):
        raise UserError(f"{source.name} is a stream, which only the CPU decodes: leave --decode out")
    if decode == "gpu" and in_channels == 4:
        raise UserError("a GPU decodes no RGBA: leave --decode out, or use --in-channels 3")
    if decode == "gpu" and in_channels not in (1, 3):
        raise UserError("a GPU decodes JPEG files, which have no bands: leave --decode out")
    if decode == "gpu" and device.type != "cuda":
        raise UserError(f"--decode gpu needs a CUDA device, this run is on {device.type}: leave it out")
    return decode == "gpu"


def _examples(source: ImageCollection, crop: RandomCrop, seed: int) -> list[Tensor]:
    """Crops, uint8 (C, H, W) each, of six images, evenly spread: those that every picture of the run shows."""
    images = TrainingImages(source, crop, seed)
    return [images[0, index][0]["image"] for index in source.evenly_spread(_EXAMPLES)]
