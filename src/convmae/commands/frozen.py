"""Frozen models put to use on images: what `embed`, `neighbours`, `predict`, `visualise` and others share.

Images are seen as in validation, in order: the shorter side resized, a centre crop, damaged files named.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from convmae import weights as weights_files
from convmae.commands.options import BatchOptions
from convmae.data.augmentation import CenterCrop
from convmae.data.demo import demo_photographs
from convmae.data.folders import EXTENSIONS
from convmae.data.inspection import inspect_images
from convmae.data.lists import is_list
from convmae.data.loading import Loading, build_evaluation_loader
from convmae.data.samples import Transform
from convmae.data.sources import ImageCollection, ImageStream, open_files, open_images, several
from convmae.errors import UserError, check_local
from convmae.kinds import load, load_classifier
from convmae.models.classifier import Classifier
from convmae.models.config import grid_of, height_and_width
from convmae.models.detector import Detector, checked_size
from convmae.models.segmenter import Segmenter
from convmae.pixels import Decoding, decoding_of
from convmae.training.engine import DeviceOptions, loader_workers, start_engine

_SHOWN_ITEMS = 20  # of a finding


@dataclass(frozen=True)
class FrozenModel:
    """A frozen model on its device."""

    network: Any
    fabric: Fabric
    file: Path
    """Where its weights came from."""
    workers: int
    """Processes that load images for it; 0 where its own does."""
    max_pixels: int | None = field(default=None, kw_only=True)
    """Most pixels of an image, None for Pillow's limit."""

    @property
    def decoding(self) -> Decoding:
        """How its images are decoded."""
        return decoding_of(self.network, self.max_pixels)


@dataclass(frozen=True)
class FrozenClassifier(FrozenModel):
    """A frozen classifier, or the encoder of one."""

    network: Classifier

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that it is given, in pixels."""
        return self.network.image_size

    @property
    def crop_pct(self) -> float:
        """Share of the resized shorter side that the centre crop keeps."""
        return self.network.crop_pct

    @property
    def center_crop(self) -> CenterCrop:
        """The transform by which it sees an encoded image, the same as in its validation."""
        return CenterCrop(self.image_size, self.decoding, self.crop_pct)

    def digest(self) -> str:
        """SHA-256 of the weights file: two models that agree in it give the same features."""
        with self.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def load_frozen_classifier(
    weights: Path,
    image_size: int | tuple[int, int] | None,
    crop_pct: float | None,
    engine: DeviceOptions,
    max_pixels: int | None = None,
) -> FrozenClassifier:
    """A classifier on the encoder of any weights file, frozen, on the device that `engine` names.

    image_size: side in pixels of the square images it will be given, or height and width, multiples of 16; crop_pct:
        share of the resized shorter side that the centre crop keeps; by default those of the weights. max_pixels: see
        `Decoding`. Raises UserError for other sizes, and where there are no weights.
    """
    settings: dict[str, Any] = {"global_pool": "avg"}  # pooled features exist, whatever the weights were saved without
    if image_size is not None:
        settings["image_size"] = (image_size, image_size) if isinstance(image_size, int) else image_size
        grid_of(settings["image_size"])
    if crop_pct is not None:
        settings["crop_pct"] = crop_pct
    file = weights_files.locate(Path(weights))  # Python callers may pass a string
    network = load_classifier(file, **settings)
    fabric = start_engine(engine)
    network.to(fabric.device).eval().requires_grad_(False)
    return FrozenClassifier(network, fabric, file, loader_workers(engine, fabric), max_pixels=max_pixels)


@dataclass(frozen=True)
class FrozenDetector(FrozenModel):
    """A frozen detector on its device."""

    network: Detector
    image_size: tuple[int, int]
    """Height and width into which images are fitted."""


def load_frozen_detector(
    weights: Path,
    image_size: int | tuple[int, int] | None,
    engine: DeviceOptions,
    max_pixels: int | None = None,
    max_detections: int | None = None,
) -> FrozenDetector:
    """The detector of a run or weights file, frozen, on the device that `engine` names.

    image_size: pixels into which images are fitted, one number or height and width, multiples of 32; by default that of
        its training, as max_detections is. max_pixels: see `Decoding`. Raises UserError where there is no detector.
    """
    file = weights_files.locate(Path(weights))  # Python callers may pass a string
    network = load(file)
    if not isinstance(network, Detector):
        raise UserError(f"{weights} holds no detector: train one first, with convmae detect train")
    if max_detections is not None:
        network.max_detections = max_detections
    size = checked_size(network.image_size if image_size is None else height_and_width(image_size))
    fabric = start_engine(engine)
    network.to(fabric.device).eval().requires_grad_(False)
    return FrozenDetector(network, fabric, file, loader_workers(engine, fabric), size, max_pixels=max_pixels)


@dataclass(frozen=True)
class FrozenSegmenter(FrozenModel):
    """A frozen segmenter on its device."""

    network: Segmenter


def load_frozen_segmenter(weights: Path, engine: DeviceOptions, max_pixels: int | None = None) -> FrozenSegmenter:
    """The segmenter of a run or weights file, ours or published, frozen, on the device that `engine` names.

    max_pixels: see `Decoding`. Raises UserError where the file holds no segmenter.
    """
    file = weights_files.locate(Path(weights))  # Python callers may pass a string
    network = load(file)
    if not isinstance(network, Segmenter):
        raise UserError(f"{weights} holds no segmenter: train one first, with convmae segment train")
    fabric = start_engine(engine)
    network.to(fabric.device).eval().requires_grad_(False)
    return FrozenSegmenter(network, fabric, file, loader_workers(engine, fabric), max_pixels=max_pixels)


def open_ordered_images(images: str | Path | Sequence[str | Path], split: str = "train") -> ImageCollection:
    """Open an image, folders of images at any depth, lists, `hfds/NAME`, or the `demo` photographs, in a settled order.

    Several folders and lists come in a sequence or with commas between them. Files are called by their paths. split: of
    a Hugging Face data set. Raises UserError where there is nothing to read, for streams, which have no order, and for
    a path that cannot be written down.
    """
    parts = several(images)
    for part in parts:
        check_local("images", part)
    path = Path(parts[0])
    if len(parts) == 1 and path.is_file() and not is_list(path):
        if path.suffix.lower() not in EXTENSIONS:
            raise UserError(f"{images} is no image: accepted are {' '.join(EXTENSIONS)}, or a folder of them")
        return open_files(parts[0], parts)
    if parts == ["demo"]:
        return open_files("demo", [str(photograph) for photograph in demo_photographs()])
    source = open_images(images, split)
    if not isinstance(source, ImageCollection):
        raise UserError(f"{images} is a stream, whose images come in no order: give a folder of images or hfds/NAME")
    if not path.exists():
        return source
    names = [source.image_name(index) for index in range(len(source))]
    if len(parts) == 1 and path.is_dir():
        names = [str(path / name) for name in names]
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the name of {name!a} is not valid UTF-8: rename it") from error
    ordered = open_files(source.name, names)
    ordered.findings = source.findings
    return ordered


class OrderedBatches:
    """The batches of a collection in order from image number `first` on, with a progress bar on the terminal.

    Batches are those of `build_evaluation_loader`, and "position" is the number of the image that follows. One in
    which every image is damaged is passed over; its "failed" come with the next batch, and all are in `damaged`.
    """

    def __init__(
        self,
        model: FrozenModel,
        transform: Transform,
        source: ImageCollection,
        options: BatchOptions,
        description: str,
        first: int = 0,
    ) -> None:
        """transform: makes a sample of each encoded image. description: stands before the progress bar."""
        self.damaged: list[str] = []
        self._description, self._first, self._total = description, first, len(source)
        tell_findings(source, model.decoding)
        self._batch_size = options.batch_size
        loading = Loading(
            batch_size=options.batch_size,
            skip_damaged=options.skip_damaged,
            # For one batch a process is not worth starting.
            num_workers=model.workers if self._total - first > options.batch_size else 0,
            pin_memory=model.fabric.device.type == "cuda",
        )
        self._loader = build_evaluation_loader(source, transform, loading, first=first)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields batches with the transform's entries, "indices" (B,), "failed" and "position"."""
        position, reported = self._first, 0
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task(self._description, total=self._total, completed=position)
            for batch in self._loader:
                position = min(position + self._batch_size, self._total)
                self.damaged += batch["failed"]
                if len(batch["images"]):
                    yield {**batch, "failed": self.damaged[reported:], "position": position}
                    reported = len(self.damaged)
                progress.update(bar, completed=position)


def checked_output(output: Path, suffixes: Sequence[str]) -> Path:
    """The path, when a file of that kind can be written there. Raises UserError otherwise, before the work begins."""
    output = Path(output)  # Python callers may pass a string
    check_local("output", output)
    if output.suffix.lower() not in suffixes:
        raise UserError(f"{output} has no known format: choose a name that ends in {' or '.join(suffixes)}")
    if output.is_dir():
        raise UserError(f"{output} is a folder: choose the name of a file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise UserError(f"{output.parent} cannot be written to, choose another --output: {error.strerror}") from error
    return output


def tell_findings(source: ImageCollection | ImageStream, decoding: Decoding | None = None) -> None:
    """Say what was found in a data set, and the first of each, on the terminal's error stream.

    decoding: look at the images first, which raises UserError where they are not what a model takes.
    """
    seen = () if decoding is None else inspect_images(source, decoding).findings
    console = Console(stderr=True, highlight=False)
    for finding in (*source.findings, *seen):
        console.print(f"{source.name}: {finding.summary}", style="yellow", markup=False, soft_wrap=True)
        for item in finding.items[:_SHOWN_ITEMS]:
            console.print(f"    {item}", markup=False, soft_wrap=True)
        if (more := len(finding.items) - _SHOWN_ITEMS) > 0:
            console.print(f"    and {more} more")


def report_damaged(damaged: Sequence[str]) -> None:
    """List what was left out, each with its reason, on the terminal's error stream."""
    if damaged:
        console = Console(stderr=True, highlight=False)
        console.print(f"images that were left out: {len(damaged)}", style="bold red")
        for failure in damaged:
            console.print(failure, markup=False, soft_wrap=True)
