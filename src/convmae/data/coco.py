"""Annotated images in COCO's format.

An annotation file is checked once and kept packed; masks are decoded with their image. H height, W width.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy

from convmae.data.sources import FileReader, ImageCollection, found_part
from convmae.errors import UserError, check_installed
from convmae.findings import Finding


class Annotation(NamedTuple):
    """The objects of an image that a detector learns: neither crowds nor those without width or height."""

    size: tuple[int, int]
    """The upright image's (H, W)."""
    labels: tuple[int, ...]
    """Each object's class, of which the first is 1: 0 stands for the background."""
    boxes: tuple[tuple[float, ...], ...]
    """As in the file: left, top, width and height in pixels."""
    segmentations: tuple[Any, ...]
    """As in the file: polygons, or run lengths, compressed or not; None of an object that has a box alone."""
    ignored: tuple[tuple[float, ...], ...] = ()
    """Boxes of regions that teach nothing, such as crowds: left, top, width and height in pixels."""

    def masks(self) -> Iterator[numpy.ndarray | None]:
        """Each object's mask, uint8 (H, W), decoded one after the other; None of an object that has a box alone."""
        for segmentation in self.segmentations:
            yield None if segmentation is None else _decoded(segmentation, self.size)


@dataclass(frozen=True)
class _Objects:
    """The objects of all images, packed: lists of millions would be copied by every loading process."""

    first: numpy.ndarray
    """Each image's first object, and the number of all objects at the end."""
    labels: numpy.ndarray
    boxes: numpy.ndarray
    areas: numpy.ndarray
    crowd: numpy.ndarray
    texts: numpy.ndarray
    """The bytes of each segmentation as JSON, one after the other."""
    text_ends: numpy.ndarray

    @property
    def zero_size(self) -> numpy.ndarray:
        return (self.boxes[:, 2:] == 0).any(axis=1)

    @property
    def learned(self) -> numpy.ndarray:
        return ~(self.crowd | self.zero_size)

    def segmentation(self, number: int) -> Any:
        start = self.text_ends[number - 1] if number else 0
        return json.loads(self.texts[start : self.text_ends[number]].tobytes())


class CocoImages(ImageCollection):
    """Images with the objects that a file in COCO's format names; label L is the category category_ids[L - 1]."""

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        image_ids: Sequence[int],
        sizes: numpy.ndarray,
        categories: Mapping[int, str],
        objects: _Objects,
        findings: Sequence[Finding],
    ) -> None:
        """sizes: (H, W) of each image; categories: names by rising id; findings: what was left out."""
        self._paths, self._objects, self._learned = list(paths), objects, objects.learned
        super().__init__(name, FileReader(paths), self._paths.__getitem__, list(categories.values()))
        self.image_ids, self.sizes, self.category_ids = list(image_ids), sizes, list(categories)
        self.findings = list(findings)

    @property
    def num_objects(self) -> int:
        """Objects that a detector learns, in all images."""
        return int(self._learned.sum())

    def annotation(self, index: int) -> Annotation:
        """The objects of image number `index`, without crowds and objects of no size."""
        objects = self._objects
        start, end = objects.first[index : index + 2].tolist()
        numbers = [number for number in range(start, end) if self._learned[number]]
        crowds = [number for number in range(start, end) if objects.crowd[number] and not objects.zero_size[number]]
        height, width = self.sizes[index].tolist()
        return Annotation(
            (height, width),
            tuple(objects.labels[numbers].tolist()),
            tuple(map(tuple, objects.boxes[numbers].tolist())),
            tuple(objects.segmentation(number) for number in numbers),
            tuple(map(tuple, objects.boxes[crowds].tolist())),
        )

    def open_annotated(self, index: int) -> tuple[BinaryIO, Any]:
        """The encoded image number `index` and its Annotation; the caller closes it."""
        return self.open(index), self.annotation(index)

    def ground_truth(self) -> dict[str, Any]:
        """What detections are judged by, as annotation files have it: all objects, also crowds and those of no size."""
        objects = self._objects
        owners = numpy.repeat(numpy.arange(len(self)), numpy.diff(objects.first)).tolist()
        found = []
        for number, owner in enumerate(owners):
            segmentation, area = objects.segmentation(number), objects.areas[number].item()
            if math.isnan(area):  # the file tells none
                height, width = self.sizes[owner].tolist()
                width_and_height = objects.boxes[number, 2:]
                area = (
                    width_and_height.prod().item()
                    if segmentation is None
                    else int(_decoded(segmentation, (height, width)).sum())
                )
            found.append(
                {
                    "id": number + 1,
                    "image_id": self.image_ids[owner],
                    "category_id": self.category_ids[objects.labels[number] - 1],
                    "bbox": objects.boxes[number].tolist(),
                    "area": area,
                    "iscrowd": int(objects.crowd[number]),
                    "segmentation": segmentation,
                }
            )
        known = zip(self.image_ids, self._paths, self.sizes.tolist(), strict=True)
        return {
            "images": [
                {"id": image_id, "file_name": path, "height": height, "width": width}
                for image_id, path, (height, width) in known
            ],
            "categories": [
                {"id": category_id, "name": name}
                for category_id, name in zip(self.category_ids, self.classes, strict=True)
            ],
            "annotations": found,
        }


def find_coco(
    data: Path | None,
    split: Literal["train", "val"],
    annotations: Path | None = None,
    images: Path | None = None,
    flags: tuple[str, str] = ("--annotations", "--images"),
) -> tuple[Path, Path]:
    """The annotation file and the folder of images of one split.

    data: COCO's folder, with annotations/instances_SPLIT2017.json and SPLIT2017/; annotations and images, where given,
    replace these. flags: the command's names of annotations and of images, for messages. Raises UserError where one
    does not exist.
    """
    return (
        found_part("COCO's folder", data, f"annotations/instances_{split}2017.json", annotations, flags[0]),
        found_part("COCO's folder", data, f"{split}2017", images, flags[1]),
    )


def open_coco(annotations: Path, images: Path, skip_damaged: bool = False, *, masks: bool = True) -> CocoImages:
    """The images in the folder `images` that a JSON file in COCO's format annotates.

    skip_damaged: leave out missing images and broken annotations, and tell them in `findings`; otherwise one of them
    raises UserError. So does a file that is not in this format. masks: whether masks are read; otherwise boxes alone
    are. Objects without a mask among others with one are counted in `findings`; where no object has one, all are
    broken.
    """
    check_installed("detection", "masks and COCO's figures need faster-coco-eval", "faster_coco_eval")
    content = _read(annotations)
    categories = _categories(annotations, content["categories"])
    entries, faults = _sound_images(content["images"])
    _refuse(annotations, "images", faults, len(content["images"]), skip_damaged)
    missing = _missing(images, [entry["file_name"] for entry in entries])
    if missing and not skip_damaged:
        raise UserError(
            f"{len(missing)} of the {len(entries)} images of {annotations} are not in {images}, the first is "
            f"{missing[0]}: check the folder, or leave them out with --skip-damaged"
        )
    lost = set(missing)
    entries = [entry for entry in entries if entry["file_name"] not in lost]
    if not entries:
        raise UserError(f"{annotations} names no images that {images} holds: check both")
    labels = {category_id: label for label, category_id in enumerate(categories, 1)}
    needed = masks and not any(_has_mask(entry) for entry in content["annotations"])
    found, broken = _sound_objects(content, entries, labels, masks, needed)
    _refuse(annotations, "annotations", broken, len(content["annotations"]), skip_damaged)
    flat = [
        f"{annotations}: annotation {entry.get('id')} of image {entry['image_id']}"
        for of_image in found
        for entry in of_image
        if min(entry["bbox"][2:]) == 0
    ]
    bare = [
        f"{annotations}: annotation {entry.get('id')} of image {entry['image_id']}"
        for of_image in found
        for entry in of_image
        if masks and not _has_mask(entry) and min(entry["bbox"][2:]) > 0
    ]
    return CocoImages(
        str(annotations),
        [str(images / entry["file_name"]) for entry in entries],
        [entry["id"] for entry in entries],
        numpy.array([(entry["height"], entry["width"]) for entry in entries], dtype=numpy.int64),
        categories,
        _packed(found, labels, masks),
        _findings(
            ([f"{annotations}: {fault}" for fault in faults], "left out {} broken images with their annotations"),
            ([f"{annotations}: {fault}" for fault in broken], "left out {} broken annotations"),
            ([f"{images / name}: is missing" for name in missing], "left out {} images that are missing"),
            (flat, "{} objects without width or height, which teach nothing"),
            (
                bare,
                "{} object has no mask and teaches its box alone"
                if len(bare) == 1
                else "{} objects have no mask and teach their boxes alone",
            ),
        ),
    )


def _findings(*found: tuple[Sequence[str], str]) -> list[Finding]:
    """A finding for each list that is not empty, whose length its summary tells."""
    return [Finding(summary.format(len(items)), items) for items, summary in found if items]


def _read(path: Path) -> dict[str, Any]:
    """The file's content; raises UserError unless it has COCO's three lists."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read, check the path: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of wrong bytes, or of wrong JSON
        raise UserError(f"{path} is not JSON, write or download it again: {error}") from error
    lists = ("images", "annotations", "categories")
    lacking = [key for key in lists if not (isinstance(content, dict) and isinstance(content.get(key), list))]
    if lacking:
        raise UserError(
            f"{path} is not in COCO's format, it has no list of {' and of '.join(lacking)}: give the file of instances"
        )
    return content


def _categories(path: Path, entries: list[Any]) -> dict[int, str]:
    """Names by rising id."""
    named = {
        entry["id"]: entry["name"]
        for entry in entries
        if _number(entry, "id") is not None and isinstance(entry.get("name"), str)
    }
    if not entries or len(named) < len(entries):
        raise UserError(f"{path} needs categories, each with a number of its own as id, and a name: correct them")
    return dict(sorted(named.items()))


def _number(entry: Any, key: str) -> int | None:
    """An id, None where there is none."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if type(value) is int else None


def _refuse(path: Path, what: str, faults: list[str], total: int, skip_damaged: bool) -> None:
    if faults and not skip_damaged:
        raise UserError(
            f"{path}: {len(faults)} of the {total} {what} are broken, the first is {faults[0]}: correct them, or leave "
            "them out with --skip-damaged"
        )


def _sound_images(entries: list[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """COCO's entries of images that nothing is wrong with, and what is wrong with each of the others."""
    sound, faults = [], []
    counts = Counter(_number(entry, "id") for entry in entries)
    for place, entry in enumerate(entries):
        image_id = _number(entry, "id")
        if image_id is None:
            faults.append(f"the one at place {place} (its id is not a number)")
        elif counts[image_id] > 1:  # nobody knows whose the annotations are
            faults.append(f"image {image_id} ({counts[image_id]} images have this id)")
        elif not (isinstance(entry.get("file_name"), str) and entry["file_name"]):
            faults.append(f"image {image_id} (it has no file_name)")
        elif min(_number(entry, "height") or 0, _number(entry, "width") or 0) < 1:
            faults.append(f"image {image_id} (its height and width are not whole numbers above 0)")
        else:
            sound.append(entry)
    return sound, faults


def _missing(folder: Path, names: list[str]) -> list[str]:
    """Which of the files `names` the folder lacks, by one listing of each folder that should hold some."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one with the images")
    paths = [folder / name for name in names]
    parents = {path.parent for path in paths}
    there = {parent: {path.name for path in parent.iterdir()} for parent in parents if parent.is_dir()}
    return [name for name, path in zip(names, paths, strict=True) if path.name not in there.get(path.parent, ())]


def _sound_objects(
    content: dict[str, Any], images: list[dict[str, Any]], labels: Mapping[int, int], masks: bool, needed: bool
) -> tuple[list[list[dict[str, Any]]], list[str]]:
    """The sound annotations of each of `images`, COCO's entries, and what is wrong with each of the others."""
    known = {_number(image, "id") for image in content["images"]} - {None}
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    sound: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in sizes}
    faults = []
    for place, annotation in enumerate(content["annotations"]):
        image_id = _number(annotation, "image_id")
        if image_id in known and image_id not in sizes:
            continue  # it goes with its image, which is left out
        if fault := _fault(annotation, sizes, labels, masks, needed):
            own = _number(annotation, "id")
            faults.append(f"{f'the one at place {place}' if own is None else f'annotation {own}'} ({fault})")
        else:
            sound[annotation["image_id"]].append(annotation)
    return list(sound.values()), faults


def _has_mask(annotation: Any) -> bool:
    return isinstance(annotation, dict) and bool(annotation.get("segmentation"))


def _fault(
    annotation: Any, sizes: Mapping[int, tuple[int, int]], labels: Mapping[int, int], masks: bool, needed: bool
) -> str | None:
    """What is wrong with an annotation, None if nothing is; masks: whether they are read; needed: by each object."""
    if not isinstance(annotation, dict):
        return "it is not an object"
    image_id, category_id = (_number(annotation, key) for key in ("image_id", "category_id"))
    if image_id is None or image_id not in sizes:
        return f"there is no image {annotation.get('image_id')!r:.40}"
    if category_id not in labels:
        return f"there is no category {annotation.get('category_id')!r:.40}"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return "its iscrowd is not 0 or 1"
    if "area" in annotation and not _are_finite([annotation["area"]]):
        return "its area is not a finite number"
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and _are_finite(box)):
        return "its box is not four finite numbers"
    if min(box[2:]) < 0:
        return "its box has a negative width or height"
    if not masks or not (_has_mask(annotation) or needed):
        return None
    return _segmentation_fault(annotation.get("segmentation"), sizes[image_id])


def _segmentation_fault(segmentation: Any, size: tuple[int, int]) -> str | None:
    height, width = size
    if not segmentation or not isinstance(segmentation, list | dict):
        return "it has no segmentation; --masks false learns boxes alone"
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not (isinstance(polygon, list) and _are_finite(polygon)):
                return "a polygon is not a list of finite numbers"
            if len(polygon) % 2 or len(polygon) < 6:
                return f"a polygon has {len(polygon)} numbers, not three points or more"
            # Filling would take as long as the polygon is large.
            if not (_is_near(polygon[::2], width) and _is_near(polygon[1::2], height)):
                return f"a polygon lies far outside the {width}x{height} image"
        return None
    if segmentation.get("size") != [height, width]:
        return f"its run lengths are of another size than the {width}x{height} image"
    try:
        _decoded(segmentation, size)
    except (ValueError, RuntimeError, TypeError, KeyError):  # of counts of wrong types or sums
        return f"its run lengths are not those of {width}x{height} pixels"
    return None


def _are_finite(numbers: list[Any]) -> bool:
    return all(type(number) in (int, float) and abs(number) <= sys.float_info.max for number in numbers)


def _is_near(coordinates: list[float], extent: int) -> bool:
    return min(coordinates) >= -extent and max(coordinates) <= 2 * extent


def _decoded(segmentation: Any, size: tuple[int, int]) -> numpy.ndarray:
    """A segmentation of the file -> uint8 (H, W)."""
    from faster_coco_eval.core import mask

    if isinstance(segmentation, list):
        return mask.decode(mask.merge(mask.frPyObjects(segmentation, *size)))
    if isinstance(segmentation["counts"], list):
        segmentation = mask.frPyObjects(segmentation, *size)
    return mask.decode(segmentation)


def _packed(annotations: list[list[dict[str, Any]]], labels: Mapping[int, int], masks: bool) -> _Objects:
    """The objects of all images, from COCO's entries of annotations for each image."""
    every = [annotation for found in annotations for annotation in found]
    segmentations = [annotation["segmentation"] if masks and _has_mask(annotation) else None for annotation in every]
    texts = [json.dumps(segmentation, separators=(",", ":")).encode() for segmentation in segmentations]
    return _Objects(
        first=numpy.cumsum([0, *map(len, annotations)], dtype=numpy.int64),
        labels=numpy.array([labels[annotation["category_id"]] for annotation in every], dtype=numpy.int64),
        boxes=numpy.array([annotation["bbox"] for annotation in every], dtype=numpy.float64).reshape(-1, 4),
        areas=numpy.array([annotation.get("area", math.nan) for annotation in every], dtype=numpy.float64),
        crowd=numpy.array([annotation.get("iscrowd", 0) for annotation in every], dtype=bool),
        texts=numpy.frombuffer(b"".join(texts), dtype=numpy.uint8),
        text_ends=numpy.cumsum([len(text) for text in texts], dtype=numpy.int64),
    )
