"""`convmae check`: look at data before anybody trains on them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from convmae.commands.detect.splits import open_splits as open_annotated_splits
from convmae.commands.options import PixelOptions, spread
from convmae.commands.segment.label_maps import LabelMapOptions
from convmae.commands.segment.splits import open_splits as open_segmentation_splits
from convmae.data.ade20k import SegmentationImages
from convmae.data.coco import Annotation, CocoImages
from convmae.data.headers import Headers, read_headers
from convmae.data.images import UndecodableImageError, decode_image
from convmae.data.inspection import inspect_images
from convmae.data.label_survey import survey
from convmae.data.labelled import compare_splits, images_of_classes, open_labelled_images
from convmae.data.loading import Loading
from convmae.data.placement import fitting_factor, placed_image, placed_map, whole
from convmae.data.sources import ImageCollection, ImageStream, open_images
from convmae.errors import UserError, check_choice, check_local
from convmae.findings import REPORT_FILE, Finding, report, told
from convmae.pixels import Decoding, Pixels
from convmae.tasks.segmentation.check import check_training
from convmae.training.checkpoint import replace_file
from convmae.training.engine import DeviceOptions, start_engine
from convmae.visualize import DrawnPicture, SegmentedPicture, detection_picture, segmentation_picture

PICTURE_FILE = "samples.png"

_TASKS = ("pretraining", "classification", "detection", "segmentation")
_HEADERS = 2000  # images whose headers are read
_SAMPLES = 12  # images in the picture
_LONGEST_DRAWN = 512  # pixels of their longer side
_SHOWN_CLASSES = 30  # in the table; the report has all


@dataclass(frozen=True)
class CheckResult:
    """What a look at the data found, and where it is written down."""

    report: Path
    """Text file with all findings and their items."""
    picture: Path | None
    """File with some images drawn with their labels; None of streams, and where no image can be decoded."""
    images: dict[str, int]
    """How many images each data set has; of streams as many as are promised."""
    class_counts: dict[str, dict[str, int]]
    """What each data set has of each class: images, objects or pixels."""
    findings: dict[str, list[Finding]]
    """What its owner should know of each data set."""


@dataclass
class _Data:
    """What was opened of the data."""

    sources: list[ImageCollection | ImageStream]
    unit: str = "images"
    """What is counted of each class."""
    counts: list[list[int]] | None = None
    """Of each class, in each source."""


@spread("pixels", "label_maps")
def check(
    data: str | list[str] | None = None,
    task: Literal["pretraining", "classification", "detection", "segmentation"] = "pretraining",
    output: Path = Path("check"),
    in_channels: int = 3,
    split: str = "train",
    train_split: str = "train",
    val_split: str = "val",
    train_annotations: Path | None = None,
    train_images: Path | None = None,
    val_annotations: Path | None = None,
    val_images: Path | None = None,
    masks: bool = True,
    boxes_from_masks: bool = False,
    classes: Path | None = None,
    reduce_zero_label: bool | None = None,
    pixels: PixelOptions = PixelOptions(),
    label_maps: LabelMapOptions = LabelMapOptions(),
) -> CheckResult:
    """Look at data before anybody trains on them: all checks of a training, counts by class, a picture of samples.

    Args:
        data: what the command that trains takes as its data.
        task: what the data are for: pretraining, classification (finetune and probe), detection or segmentation.
        output: folder for data-report.txt, with all that was found, and samples.png.
        in_channels: 1 (grey), 3 (RGB), 4 (RGBA), or the number of bands.
        split: of a Hugging Face data set for pretraining.
        train_split: for classification, the split that is trained on.
        val_split: for classification, the split that decides which model is the best.
        train_annotations: for detection and segmentation as these take it, and so are the next three.
        train_images: the training images.
        val_annotations: the annotations of the validation images.
        val_images: the validation images.
        masks: for detection, whether objects have masks.
        boxes_from_masks: for detection, draw boxes around masks instead of taking those of the files.
        classes: for segmentation, the list of classes.
        reduce_zero_label: for segmentation, whether label 0 is no class and label 1 the first.

    What a training would leave out with --skip-damaged is listed. Raises UserError for what would stop a training, in
    the end if there is something to be seen before.
    """
    check_choice("task", task, _TASKS)
    check_local("output", output)
    if data is None and task in ("pretraining", "classification"):
        raise UserError(f"{task} needs --data")
    decoding = Decoding(
        in_channels, pixels.background or "white", Pixels(**pixels.recorded).pixel_range, pixels.max_pixels
    )
    root = None if data is None else Path(str(data))
    openers: dict[str, Callable[[bool], _Data]] = {
        "pretraining": lambda _: _Data([open_images(data, split)]),  # type: ignore[arg-type]  # some, see above
        "classification": lambda _: _classification(str(data), train_split, val_split),
        "detection": lambda skip_damaged: _detection(
            *open_annotated_splits(
                root,
                train_annotations,
                train_images,
                val_annotations,
                val_images,
                skip_damaged=skip_damaged,
                masks=masks,
                boxes_from_masks=boxes_from_masks,
            )
        ),
        "segmentation": lambda skip_damaged: _segmentation(
            *open_segmentation_splits(
                root,
                train_images,
                train_annotations,
                val_images,
                val_annotations,
                classes=classes,
                reduce_zero_label=reduce_zero_label,
                label_maps=label_maps,
                skip_damaged=skip_damaged,
            ),
            skip_damaged,
        ),
    }
    stops: UserError | None = None
    try:
        found = openers[task](False)
    except UserError as error:
        if task not in ("detection", "segmentation"):
            raise
        found, stops = openers[task](True), error  # which raises where --skip-damaged would not help
    return _tell(found, decoding, Path(output), stops)


def _classification(data: str, train_split: str, val_split: str) -> _Data:
    training = open_labelled_images(data, train_split)
    validation = open_labelled_images(data, val_split, training.classes, multi_label=training.multi_label)
    compare_splits(training, validation)
    sources = [training, validation]
    labels = [source.labels for source in sources if isinstance(source, ImageCollection)]
    if len(labels) < 2 or any(one is None for one in labels):
        return _Data(sources)
    counts = [images_of_classes(one, training).tolist() for one in labels if one is not None]
    return _Data(sources, "images", counts)


def _detection(training: CocoImages, validation: CocoImages) -> _Data:
    return _Data([training, validation], "objects", [training.class_counts, validation.class_counts])


def _segmentation(training: SegmentationImages, validation: SegmentationImages, skip_damaged: bool) -> _Data:
    engine = DeviceOptions(accelerator="cpu")
    check_training(
        start_engine(engine), training, validation, Loading(1, skip_damaged, num_workers=engine.workers or 2)
    )
    surveys = [survey(source) for source in (training, validation)]  # which is known by now
    return _Data([training, validation], "pixels", [found.pixels for found in surveys])


def _tell(found: _Data, decoding: Decoding, output: Path, stops: UserError | None) -> CheckResult:
    """Look at the images, print what was found, and write it down; raises what would stop a training."""
    console = Console(stderr=True)
    progress = partial(_tracked, console)
    rows, findings = [], {}
    for source in found.sources:
        try:
            source.findings = [*source.findings, *inspect_images(source, decoding).findings]
        except UserError as error:
            stops = stops or error
        if isinstance(source, ImageCollection):
            headers = read_headers(source, _HEADERS, progress)
            rows.append((source.name, str(len(source)), _sizes(headers), _kinds(headers)))
            if headers.unknown:
                number = len(headers.unknown)
                have = "image has a header" if number == 1 else "images have headers"
                source.findings = [*source.findings, Finding(f"{number} {have} that cannot be read", headers.unknown)]
        else:
            rows.append((source.name, str(source.reader.num_samples), "?", "?"))
        findings[source.name] = list(source.findings)
    output.mkdir(parents=True, exist_ok=True)
    drawn = _draw(output / PICTURE_FILE, found.sources[0], decoding)
    counts = _counts(found)
    written = output / REPORT_FILE
    text = report(findings) + _count_lines(counts, found.unit)
    replace_file(written, lambda path: path.write_text(text, encoding="utf-8"))
    _print(rows, counts, found.unit)
    for line in told(findings):
        Console().print(line, style="yellow", markup=False, soft_wrap=True)
    where = f"report: {written}" + (f"; samples: {output / PICTURE_FILE}" if drawn else "")
    Console().print(where, markup=False, soft_wrap=True)
    if stops is not None:
        raise stops
    return CheckResult(
        written,
        output / PICTURE_FILE if drawn else None,
        {
            source.name: len(source) if isinstance(source, ImageCollection) else source.reader.num_samples
            for source in found.sources
        },
        counts,
        findings,
    )


def _tracked(console: Console, numbers: Iterator[Any]) -> Iterable[Any]:
    return track(list(numbers), "reading headers", console=console, transient=True, disable=not console.is_terminal)


def _sizes(headers: Headers) -> str:
    if not headers.heights:
        return "-"
    pairs = [(min(sides), round(median(sides)), max(sides)) for sides in (headers.widths, headers.heights)]
    (least_width, usual_width, most_width), (least_height, usual_height, most_height) = pairs
    if (least_width, least_height) == (most_width, most_height):
        return f"all {usual_width}x{usual_height}"
    return f"{usual_width}x{usual_height} ({least_width}-{most_width} x {least_height}-{most_height})"


def _kinds(headers: Headers) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in headers.kinds.most_common(4)) or "-"


def _counts(found: _Data) -> dict[str, dict[str, int]]:
    if found.counts is None:
        return {}
    names = found.sources[0].classes
    return {
        source.name: dict(zip(names, counts, strict=True))
        for source, counts in zip(found.sources, found.counts, strict=True)
    }


def _count_lines(counts: dict[str, dict[str, int]], unit: str) -> str:
    lines = []
    for name, of_classes in counts.items():
        lines += [f"{name}: {unit} of each class", *(f"    {one}: {count}" for one, count in of_classes.items())]
    return "".join(f"{line}\n" for line in lines)


def _print(rows: Sequence[tuple[str, ...]], counts: dict[str, dict[str, int]], unit: str) -> None:
    table = Table(title="data", title_justify="left")
    for heading in ("data set", "images", "width x height", "format and colours"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if not counts:
        return
    classes = list(next(iter(counts.values())))
    table = Table(title=f"{unit} of each class", title_justify="left")
    table.add_column("class", overflow="fold")
    for heading in ("training", "validation"):
        table.add_column(heading, justify="right")
    for name in classes[:_SHOWN_CLASSES]:
        table.add_row(name, *(f"{of_classes[name]:,}" for of_classes in counts.values()))
    if len(classes) > _SHOWN_CLASSES:
        table.add_row(f"and {len(classes) - _SHOWN_CLASSES} more, in the report", "", "")
    Console().print(table)


# The picture


def _draw(path: Path, source: ImageCollection | ImageStream, decoding: Decoding) -> bool:
    """Save a picture of some images with their labels, evenly spread; whether there was one to draw."""
    if isinstance(source, ImageStream):
        return False
    shown = replace(decoding.of_pictures, padding=None)
    objects: list[DrawnPicture] = []
    segmented: list[SegmentedPicture] = []
    for index in source.evenly_spread(_SAMPLES):
        try:
            with source.open(index) as file:
                image = decode_image(file, shown)
            if isinstance(source, SegmentationImages):
                labels = source.annotation(index).read((image.shape[1], image.shape[2]))
                segmented.append(_segmented(image, labels, Path(source.image_name(index)).name))
            else:
                objects.append(_drawn(image, source, index))
        except (OSError, UndecodableImageError):
            continue  # which is among the findings, or will be among those of a training
    if segmented:
        segmentation_picture(path, _in_rows(segmented), source.classes)
    elif objects:
        detection_picture(path, _in_rows(objects), source.classes)
    return bool(segmented or objects)


def _in_rows(pictures: list[Any]) -> list[list[Any]]:
    return [pictures[start : start + 4] for start in range(0, len(pictures), 4)]


def _colours(image: Tensor) -> Tensor:
    """uint8 (C, H, W) -> float (1 or 3, H, W) in [0, 1]; of bands the first."""
    return image[:3] / 255 if len(image) >= 3 else image[:1] / 255


def _segmented(image: Tensor, labels: Tensor, title: str) -> SegmentedPicture:
    height, width = image.shape[1:]
    placement = whole((height, width), min(1.0, fitting_factor((height, width), (_LONGEST_DRAWN, _LONGEST_DRAWN))))
    return SegmentedPicture(_colours(placed_image(image, placement)), placed_map(labels, placement), title)


def _drawn(image: Tensor, source: ImageCollection, index: int) -> DrawnPicture:
    """An image with its objects, or with the name of its class as its title."""
    height, width = image.shape[1:]
    factor = min(1.0, fitting_factor((height, width), (_LONGEST_DRAWN, _LONGEST_DRAWN)))
    placement = whole((height, width), factor)
    seen = _colours(placed_image(image, placement))
    objects: dict[str, Any] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    title = Path(source.image_name(index)).name
    if isinstance(source, CocoImages):
        annotation: Annotation = source.annotation(index)
        boxes = torch.tensor(annotation.boxes, dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        sides = torch.tensor([placement.size[1] / width, placement.size[0] / height] * 2)
        objects = {"boxes": boxes * sides, "labels": torch.tensor(annotation.labels, dtype=torch.int64)}
        if annotation.segmentations and all(one is not None for one in annotation.segmentations):
            masks = (placed_map(torch.from_numpy(mask), placement) for mask in annotation.masks())
            objects["masks"] = list(masks)
    elif source.classes and source.labels is not None:
        label = source.labels[index]
        names = numpy.flatnonzero(label) if source.multi_label else [label]
        title = ", ".join(source.classes[int(name)] for name in names) or "no class"
    return DrawnPicture(seen, objects, title)
