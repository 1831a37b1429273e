"""`convmae detect predict`: what a detector finds in images, as COCO's results and drawn."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torchvision.models.detection.transform import resize_boxes

from convmae.commands.frozen import OrderedBatches, load_frozen_detector, open_ordered_images, report_damaged
from convmae.commands.options import BatchOptions, LimitOptions, spread
from convmae.data.detection import ResizeAndPad
from convmae.data.file_names import agreeing_parts, name_parts
from convmae.data.images import decode_image
from convmae.data.placement import fitting_factor, placed_image, whole
from convmae.data.sources import ImageCollection
from convmae.errors import UserError, check_local
from convmae.evaluation.detection import coco_results
from convmae.pixels import Decoding
from convmae.tasks.detection.judge import warn_of_full_images
from convmae.training.checkpoint import replace_file
from convmae.visualize import DrawnPicture, detection_picture

RESULTS_FILE = "detections.json"
_SHOWN = 20  # images in the table on the terminal
_LONGEST_DRAWN = 2048  # pixels of the longer side of an image that is drawn


@dataclass(frozen=True)
class DetectionsResult:
    """Where the detections are."""

    results: Path
    """JSON, in COCO's format of results; each entry has the image's file_name, too."""
    pictures: tuple[Path, ...]
    """Files of the drawn pictures."""
    count: int
    """Detections that reach the threshold, in all images."""


@spread("reading", "limits")
@torch.inference_mode()
def predict(
    images: str,
    weights: Path,
    output: Path = Path("detections"),
    threshold: float = 0.5,
    draw: int = 100,
    annotations: Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    reading: BatchOptions = BatchOptions(batch_size=2),
    limits: LimitOptions = LimitOptions(),
    max_detections: int | None = None,
) -> DetectionsResult:
    """Find objects in images: write COCO's results, and draw boxes, masks, names and scores.

    Args:
        images: an image, a folder of images at any depth, hfds/NAME, or demo.
        weights: a detector's run or weights file.
        output: a folder for detections.json and the drawn pictures.
        threshold: score in [0, 1] from which a detection is drawn and counted; the file has all from 0.05 on.
        draw: the most pictures to draw, the first ones; 0 for none.
        annotations: a file in COCO's format whose image ids the results take, by the images' file names; by default
            images are numbered from 1 on.
        image_size: pixels into which images are fitted, one number or [height, width], multiples of 32; by default
            that of the training.
        max_detections: the most objects in an image; by default as in the training, where it is 100 unless told.

    Raises UserError for weights without a detector, for unreadable images, and for those that `annotations` lacks.
    """
    if not 0 <= threshold <= 1 or draw < 0:
        raise UserError("threshold is a score from 0 to 1, and draw at least 0: change them")
    output = Path(output)  # Python callers may pass a string
    check_local("output", output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: choose a folder for the detections")
    source = open_ordered_images(images, reading.split)
    image_ids = _image_ids(source, annotations)
    model = load_frozen_detector(weights, image_size, reading.engine, limits.max_pixels, max_detections)
    network = model.network
    fit = ResizeAndPad(model.image_size, model.decoding)
    batches = OrderedBatches(model, fit, source, reading, "detecting")
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    category_ids = network.settings["category_ids"] or range(1, network.num_classes + 1)
    results: list[dict[str, Any]] = []
    numbers: list[int] = []
    drawn: list[Path] = []
    counts: dict[str, list[str]] = {}
    for batch in batches:
        with model.fabric.autocast():
            found = network.detect(
                batch["images"].to(model.fabric.device, non_blocking=True),
                batch["sizes"],
                batch["original_sizes"],
                whole_masks=False,
            )
        for index, detection in zip(batch["indices"].tolist(), found, strict=True):
            name = source.image_name(index)
            results += [
                {**result, "file_name": name} for result in coco_results(image_ids[index], detection, category_ids)
            ]
            numbers.append(len(detection["scores"]))
            kept = detection["scores"] >= threshold
            certain = {key: value[kept].cpu() for key, value in detection.items()}
            counts[name] = [network.classes[label - 1] for label in certain["labels"].tolist()]
            if len(drawn) < draw:
                path = output / "pictures" / f"{index + 1:06d}-{Path(name).stem[:60]}.png"
                _draw(path, source, index, model.decoding, certain, network.classes)
                drawn.append(path)
    report_damaged(batches.damaged)
    if not counts:
        raise UserError(f"none of the images of {images} can be decoded: check the files")
    text = json.dumps(results)
    replace_file(output / RESULTS_FILE, lambda path: path.write_text(text))
    _show(counts, threshold)
    warn_of_full_images(numbers, network.max_detections)
    Console().print(
        f"detections: {output / RESULTS_FILE}; {len(drawn)} pictures: {output / 'pictures'}"
        + (f" (the first of {len(counts)}, more with --draw)" if 0 < len(drawn) < len(counts) else ""),
        markup=False,
        soft_wrap=True,
    )
    return DetectionsResult(output / RESULTS_FILE, tuple(drawn), sum(map(len, counts.values())))


def _image_ids(source: ImageCollection, annotations: Path | None) -> list[Any]:
    """The id of each image in COCO's results: its place, or what a file of annotations says of its name."""
    if annotations is None:
        return list(range(1, len(source) + 1))
    try:
        entries = json.loads(Path(annotations).read_bytes())["images"]
        told = {entry["id"]: Path(entry["file_name"]) for entry in entries}
        parts = {entry["id"]: name_parts(entry["file_name"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{annotations} is no file in COCO's format: it needs images with id and file_name") from error
    if len(told) < len(entries):
        raise UserError(f"{annotations} has several images of one id: give each an id of its own")
    by_name: dict[str, list[Any]] = {}  # a name in any spelling
    for image_id, own in parts.items():
        by_name.setdefault(own[-1] if own else "", []).append(image_id)
    paths = [Path(source.image_name(index)) for index in range(len(source))]
    spelled = [name_parts(str(path)) for path in paths]
    unknown = [path.name for path, own in zip(paths, spelled, strict=True) if own[-1] not in by_name]
    if unknown:
        raise UserError(f"{annotations} lacks {len(unknown)} of the {len(paths)} images, the first is {unknown[0]}")
    found: dict[Any, Path] = {}
    for path, own in zip(paths, spelled, strict=True):
        image_ids = by_name[own[-1]]
        if len(image_ids) > 1:  # the file's folders may begin elsewhere than the user's, so they count only here
            shared = {image_id: agreeing_parts(own, parts[image_id]) for image_id in image_ids}
            image_ids = [image_id for image_id in image_ids if shared[image_id] == len(parts[image_id])]
        if len(image_ids) > 1:  # that differ in spelling alone
            image_ids = [image_id for image_id in image_ids if told[image_id].name == path.name]
        if len(image_ids) != 1:
            raise UserError(f"{annotations} does not tell which of its images named {path.name} is {path}: rename them")
        if image_ids[0] in found:
            raise UserError(
                f"{annotations} has one image for both {found[image_ids[0]]} and {path}: give only one of them"
            )
        found[image_ids[0]] = path
    return list(found)


def _draw(
    path: Path,
    source: ImageCollection,
    index: int,
    decoding: Decoding,
    detection: dict[str, Any],
    classes: list[str],
) -> None:
    with source.open(index) as file:
        image = decode_image(file, decoding.of_pictures)
    height, width = image.shape[1:]
    if max(height, width) > _LONGEST_DRAWN:  # the picture shows no more of a larger one, which would fill the memory
        placement = whole((height, width), fitting_factor((height, width), (_LONGEST_DRAWN, _LONGEST_DRAWN)))
        image, size = placed_image(image, placement), placement.size
        detection = {**detection, "boxes": resize_boxes(detection["boxes"], [height, width], list(size))}
        if "masks" in detection:
            detection["masks"] = detection["masks"].resized(size)
    detection_picture(path, [[DrawnPicture(image / 255, detection, "")]], classes)


def _show(counts: dict[str, list[str]], threshold: float) -> None:
    table = Table("image", f"detections of score {threshold:g} or more")
    table.columns[0].overflow = "fold"
    for name, found in list(counts.items())[:_SHOWN]:
        numbers = {label: found.count(label) for label in dict.fromkeys(found)}
        table.add_row(Text(name), Text(", ".join(f"{number} {label}" for label, number in numbers.items()) or "-"))
    Console().print(table)
    if len(counts) > _SHOWN:
        Console().print(f"and {len(counts) - _SHOWN} more")
