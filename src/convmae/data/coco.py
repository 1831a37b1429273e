"""Annotated images in COCO's format.

An annotation file is checked once and kept packed; masks are decoded with their image. H height, W width.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy

from convmae.data import coco_checks
from convmae.data.coco_files import (
    Id,
    Images,
    Objects,
    ReadObjects,
    decoded,
    pixels_of,
    read_categories,
    read_content,
    read_images,
    read_objects,
)
from convmae.data.sources import FileReader, ImageCollection, found_part
from convmae.errors import UserError, check_installed
from convmae.findings import Finding

_MANY_CROWDS = 0.05  # share of all objects; COCO's own is a hundredth
_FEW_SLIVERS = 0.001  # share of all objects
_NAMED = 5  # classes in a finding's own line

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""What tools call the parts of a data set."""


class Annotation(NamedTuple):
    """The objects of an image that a detector learns, and where it learns nothing: of crowds and broken objects."""

    size: tuple[int, int]
    """The upright image's (H, W)."""
    labels: tuple[int, ...]
    """Each object's class, of which the first is 1: 0 stands for the background."""
    boxes: tuple[tuple[float, ...], ...]
    """As in the file: left, top, width and height in pixels."""
    segmentations: tuple[Any, ...]
    """As in the file: polygons, or run lengths, compressed or not; None of an object that has a box alone."""
    ignored: tuple[tuple[float, float, float, float], ...] = ()
    """Boxes of regions that teach nothing, inside the image: left, top, width and height in pixels."""

    def masks(self) -> Iterator[Any]:
        """Each object's mask, uint8 (H, W), decoded one after the other; None of an object that has a box alone."""
        for segmentation in self.segmentations:
            yield None if segmentation is None else decoded(segmentation, self.size)


class CocoImages(ImageCollection):
    """Images with the objects that a file in COCO's format names; label L is the category category_ids[L - 1]."""

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        image_ids: Sequence[Id],
        sizes: numpy.ndarray,
        categories: Mapping[Id, str],
        objects: Objects,
        findings: Sequence[Finding],
    ) -> None:
        """sizes: (H, W) of each image; categories: names by id; findings: what was left out or reinterpreted."""
        self.paths, self._objects, self._found = list(paths), objects, list(findings)
        super().__init__(name, FileReader(paths), self.paths.__getitem__, list(categories.values()))
        self.image_ids, self.sizes, self.category_ids = list(image_ids), sizes, list(categories)
        self._first = numpy.searchsorted(objects.owners[objects.by_image], numpy.arange(len(self.paths) + 1))
        counts = numpy.bincount(objects.labels[objects.learned], minlength=len(categories) + 1)
        self.class_counts: list[int] = counts[1:].tolist()
        """Objects of each class that a detector learns."""
        self.findings = [*self._found, *self._classes_without_objects()]

    @property
    def num_objects(self) -> int:
        """Objects that a detector learns, in all images."""
        return sum(self.class_counts)

    def annotation(self, index: int) -> Annotation:
        """The objects of image number `index`, without crowds and objects of no size."""
        objects = self._objects
        numbers = objects.by_image[self._first[index] : self._first[index + 1]]
        learned = numbers[objects.learned[numbers]]
        height, width = self.sizes[index].tolist()
        ignored = numbers[objects.crowd[numbers] | objects.damaged[numbers]]
        return Annotation(
            (height, width),
            tuple(objects.labels[learned].tolist()),
            tuple(map(tuple, objects.boxes[learned].tolist())),
            tuple(objects.segmentation(number) for number in learned.tolist()),
            tuple(box for number in ignored.tolist() if (box := _inside(objects.boxes[number], (height, width)))),
        )

    def open_annotated(self, index: int) -> tuple[BinaryIO, Any]:
        """The encoded image number `index` and its Annotation; the caller closes it."""
        return self.open(index), self.annotation(index)

    def ground_truth(self) -> dict[str, Any]:
        """What detections are judged by, as annotation files have it: all objects, also crowds and those of no size.

        Images and categories have the user's ids. Broken objects that were left out are crowds, of every category where
        theirs is unknown: detections there do not count.
        """
        objects = self._objects
        found: list[dict[str, Any]] = []
        for number in objects.by_image.tolist():
            owner, label = int(objects.owners[number]), int(objects.labels[number])
            height, width = self.sizes[owner].tolist()
            entry = {"image_id": self.image_ids[owner], **self._true_object(number, (height, width))}
            if "bbox" not in entry:
                continue  # nobody knows where it is
            categories = [self.category_ids[label - 1]] if label else self.category_ids
            found += [
                {"id": len(found) + place, "category_id": one, **entry} for place, one in enumerate(categories, 1)
            ]
        known = zip(self.image_ids, self.paths, self.sizes.tolist(), strict=True)
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

    def _true_object(self, number: int, size: tuple[int, int]) -> dict[str, Any]:
        """Box, mask, area and whether it is a crowd, of one object for ground_truth; {} for one of unknown place."""
        objects = self._objects
        if objects.damaged[number]:
            box = _inside(objects.boxes[number], size)
            if box is None:
                return {}
            left, top, width, height = box
            right, bottom = left + width, top + height
            polygon = [left, top, right, top, right, bottom, left, bottom]
            return {"bbox": list(box), "area": width * height, "iscrowd": 1, "segmentation": [polygon]}
        box, area = objects.boxes[number].tolist(), objects.areas[number].item()
        segmentation = objects.segmentation(number)
        if math.isnan(area):  # the file tells none
            area = box[2] * box[3] if segmentation is None else pixels_of(segmentation, size)
        mask = {} if segmentation is None else {"segmentation": segmentation}
        return {"bbox": box, "area": area, "iscrowd": int(objects.crowd[number]), **mask}

    def with_categories(self, classes: Sequence[str], category_ids: Sequence[Id], owner: str) -> "CocoImages":
        """The same images with the classes of `owner`, of which this file may lack some.

        Categories are the same by id and name, or else by a name that only one of each has. Detections keep this file's
        ids. Raises UserError that names categories which `owner` has not.
        """
        if (list(classes), list(category_ids)) == (self.classes, self.category_ids):
            return self
        by_both = {pair: label for label, pair in enumerate(zip(category_ids, classes, strict=True), 1)}
        mine, theirs = Counter(self.classes), Counter(classes)
        by_name = {name: label for label, name in enumerate(classes, 1) if theirs[name] == mine[name] == 1}
        labels, renumbered, unknown = [0], [], []
        ids = list(category_ids)
        for category_id, name in zip(self.category_ids, self.classes, strict=True):
            label = by_both.get((category_id, name)) or by_name.get(name)
            if label is None:
                unknown.append(f"{name!r} (id {category_id!r})")
                continue
            labels.append(label)
            if ids[label - 1] != category_id:
                renumbered.append(f"{name!r}: id {category_id!r}, there {ids[label - 1]!r}")
            ids[label - 1] = category_id
        if unknown:
            shown = ", ".join(unknown[:_NAMED]) + (f" and {len(unknown) - _NAMED} more" if unknown[_NAMED:] else "")
            raise UserError(
                f"{self.name} has other categories than {owner}, which does not know {shown}: give both the same names "
                "and ids, or take the others out"
            )
        if len(set(ids)) < len(ids):
            raise UserError(
                f"{self.name} has other categories than {owner}, the first is {renumbered[0]}: give both the same ids"
            )
        added = _findings(
            (
                renumbered,
                f"{{}} category has another id than in {owner}, and is known by its name",
                f"{{}} categories have other ids than in {owner}, and are known by their names",
            )
        )
        return CocoImages(
            self.name,
            self.paths,
            self.image_ids,
            self.sizes,
            dict(zip(ids, classes, strict=True)),
            replace(self._objects, labels=numpy.array(labels)[self._objects.labels]),
            [*self._found, *added],
        )

    def _classes_without_objects(self) -> list[Finding]:
        empty = [place for place, count in enumerate(self.class_counts) if not count]
        if not empty or len(empty) == len(self.classes):  # of which the commands say that there is nothing to do
            return []
        names = ", ".join(self.classes[place] for place in empty[:_NAMED]) + (", ..." if empty[_NAMED:] else "")
        summary = (
            f"{len(empty)} of the {len(self.classes)} classes {'has' if len(empty) == 1 else 'have'} no object here, "
            f"so that nothing can be learned or judged of {'it' if len(empty) == 1 else 'them'}: {names}"
        )
        told = zip(self.category_ids, self.classes, self.class_counts, strict=True)
        return [Finding(summary, [f"{name} (id {category_id}): {count} objects" for category_id, name, count in told])]


def _inside(box: numpy.ndarray, size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """The part of a box of left, top, width and height that is inside the image, None where nothing is."""
    if numpy.isnan(box).any():
        return None
    height, width = size
    left, top = max(0.0, float(box[0])), max(0.0, float(box[1]))
    right, bottom = min(float(width), float(box[0] + box[2])), min(float(height), float(box[1] + box[3]))
    return (left, top, right - left, bottom - top) if right > left and bottom > top else None


# Finding the files


def find_coco(
    data: Path | None,
    split: Literal["train", "val", "test"],
    annotations: Path | None = None,
    images: Path | None = None,
    flags: tuple[str, str] = ("--annotations", "--images"),
) -> tuple[Path, Path]:
    """The annotation file and the folder of images of one split.

    data: COCO's folder, with annotations/instances_SPLIT2017.json and SPLIT2017/, or one of another usual form:
    Roboflow's SPLIT/_annotations.coco.json with the images beside it, or files whose names tell the split; annotations
    and images, where given, replace these. flags: the command's names of annotations and of images, for messages.
    Raises UserError where one does not exist, or several may be meant.
    """
    usual = f"annotations/instances_{split}2017.json"
    if annotations is None and data is not None and not (data / usual).exists():
        annotations = _annotation_file(data, split, flags[0])
    file = found_part("COCO's folder", data, usual, annotations, flags[0])
    if images is None and data is not None and not (data / f"{split}2017").exists():
        images = _image_folder(data, split, file, flags[1])
    return file, found_part("COCO's folder", data, f"{split}2017", images, flags[1])


def _annotation_file(data: Path, split: str, flag: str) -> Path | None:
    """The one file of this split in a folder that is not named as COCO's, None where there is none."""
    beside = [path for name in _SPLITS[split] for path in sorted((data / name).glob("*.json"))]
    named = [
        path
        for folder in (data / "annotations", data)
        for path in sorted(folder.glob("*.json"))
        if _split_in_name(path, split)
    ]
    found = [path for path in beside if path.name == "_annotations.coco.json"] or [*named, *beside]
    found = [path for path in found if path.name.startswith("instances")] or found
    return _only(found, f"annotations for {split}", data, flag)


def _split_in_name(path: Path, split: str) -> str | None:
    """How a file's name tells this split, such as train2014; None where it does not."""
    words = "|".join(sorted(_SPLITS[split], key=len, reverse=True))
    found = re.search(rf"(?<![a-z])(?:{words})(?:20\d\d)?(?![a-z0-9])", path.stem.lower())
    return found[0] if found else None


def _image_folder(data: Path, split: str, file: Path, flag: str) -> Path | None:
    """The one folder of this split's images, None where there is none."""
    if file.parent.name.lower() in _SPLITS[split]:
        return file.parent
    parents = (data, data / "images")
    own = _split_in_name(file, split) or split  # train2014 goes with train2014
    named = [folder for parent in parents if (folder := parent / own).is_dir()] or [
        folder for name in _SPLITS[split] for parent in parents if (folder := parent / name).is_dir()
    ]
    return _only(named, f"folders of images for {split}", data, flag) or next(
        (folder for folder in (data / "images",) if folder.is_dir()), None
    )


def _only(found: Sequence[Path], what: str, data: Path, flag: str) -> Path | None:
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(data)) for path in found[:_NAMED])
        raise UserError(f"{data} has several {what}, {names}: choose one with {flag}")
    return found[0] if found else None


# Opening


def open_coco(
    annotations: Path,
    images: Path,
    skip_damaged: bool = False,
    *,
    masks: bool = True,
    boxes_from_masks: bool = False,
) -> CocoImages:
    """The images in the folder `images` that a JSON file in COCO's format annotates.

    skip_damaged: leave out missing images and broken annotations, and tell them in `findings`; otherwise one of them
    raises UserError. So does a file that is not in this format, or whose boxes or masks are of another convention.
    masks: whether masks are read; otherwise boxes alone are. Objects without a mask among others with one are counted
    in `findings`; where no object has one, all are broken. boxes_from_masks: draw boxes around masks instead of taking
    the file's.
    """
    check_installed("detection", "masks and COCO's figures need faster-coco-eval", "faster_coco_eval")
    name = str(annotations)
    content = read_content(annotations)
    categories = read_categories(annotations, content["categories"])
    known = read_images(content["images"], images)
    _refuse(name, "images", known.faults, known.named, skip_damaged)
    if known.missing and not skip_damaged:
        raise UserError(
            f"{len(known.missing)} of the {known.named - len(known.faults)} images of {annotations} are not in "
            f"{images}, the first is {known.missing[0]}: check the folder, or leave them out with --skip-damaged"
        )
    if not known.ids:
        raise UserError(f"{annotations} names no images that {images} holds: check both")
    total = len(content["annotations"])
    read = read_objects(content["annotations"], known, list(categories), masks or boxes_from_masks)
    with numpy.errstate(all="ignore"):  # of objects that have no box, and of such as no image holds
        objects, found = _checked(name, read, known, boxes_from_masks)
    if not masks:
        objects = objects.without_masks()
    broken = [read.faults[place] for place in sorted(read.faults)]
    _refuse(name, "annotations", broken, total, skip_damaged)
    counts = numpy.bincount(objects.labels[objects.learned], minlength=len(categories) + 1)[1:].tolist()
    shared_names = coco_checks.refuse_shared_names(name, categories, counts)
    crowds = numpy.flatnonzero(objects.crowd & ~objects.damaged).tolist()
    many = len(crowds) > _MANY_CROWDS * len(objects)
    advice = (
        " (CVAT marks single objects with masks so: where these are such, write iscrowd 0 for them)" if many else ""
    )

    def told(numbers: Sequence[int]) -> list[str]:
        return [f"{name}: {read.name(number)} of image {known.ids[objects.owners[number]]}" for number in numbers]

    repeated = Counter(known.paths)
    twice = coco_checks.written_twice(objects).tolist()
    findings = _findings(
        ([f"{name}: {fault}" for fault in known.faults], "left out {} broken images with their annotations"),
        ([f"{name}: {fault}" for fault in broken], "left out {} broken annotations"),
        ([f"{images / missing}: is missing" for missing in known.missing], "left out {} images that are missing"),
        (
            known.respelled,
            "{} image was found by a name that is spelled otherwise than its file",
            "{} images were found by names that are spelled otherwise than their files",
        ),
        (
            known.measured,
            "the file does not tell the size of {} image, so that its header does",
            "the file does not tell the sizes of {} images, so that their headers do",
        ),
        (
            known.texts,
            "the size of {} image is written as text, and read as numbers",
            "the sizes of {} images are written as text, and read as numbers",
        ),
        *((told(read.notes.get(note, ())), *summaries) for note, summaries in _NOTES.items()),
        *((told(numbers), *summaries) for numbers, *summaries in found),
        (
            told(numpy.flatnonzero(objects.zero_size & ~objects.damaged).tolist()),
            "{} objects without width or height, which teach nothing",
        ),
        (
            told(numpy.flatnonzero(objects.pixelless & ~objects.zero_size).tolist()),
            "{} mask is so thin that it has no pixel: its object teaches nothing",
            "{} masks are so thin that they have no pixel: their objects teach nothing",
        ),
        (
            told(crowds),
            f"{{}} of the {len(objects)} objects is a crowd, which teaches nothing{advice}",
            f"{{}} of the {len(objects)} objects are crowds, which teach nothing{advice}",
        ),
        (
            [f"{path}: {count} times" for path, count in repeated.items() if count > 1],
            "{} file is listed under several image ids, whose objects are background to each other: give it one",
            "{} files are listed under several image ids, whose objects are background to each other: give each one",
        ),
        (
            told(twice),
            "{} object is there twice, with the same image, category and box: take one out",
            "{} objects are there twice, with the same image, category and box: take one of each out",
        ),
        (
            shared_names,
            "{} name is that of several categories: give each a name of its own",
            "{} names are those of several categories: give each a name of its own",
        ),
    )
    return CocoImages(
        name,
        known.paths,
        known.ids,
        numpy.array(known.sizes, dtype=numpy.int64).reshape(-1, 2),
        categories,
        objects,
        findings,
    )


_NOTES = {
    "ids": (
        "{} annotation names its image or category by an id of another type, such as '7' for 7",
        "{} annotations name image or category by an id of another type, such as '7' for 7",
    ),
    "texts": (
        "{} annotation has a number as text, or null for one, and is read as it is meant",
        "{} annotations have numbers as text, or null for one, and are read as they are meant",
    ),
    "other polygons": (
        "{} object has its polygons as one flat list or as pairs of points",
        "{} objects have their polygons as one flat list or as pairs of points",
    ),
    "broken polygons": (
        "{} object lost broken polygons, and keeps its others",
        "{} objects lost broken polygons, and keep their others",
    ),
    "no box": (
        "{} object has no box, so that it is drawn around the mask",
        "{} objects have no box, so that theirs are drawn around their masks",
    ),
    "no mask": (
        "{} object has no mask and teaches its box alone",
        "{} objects have no mask and teach their boxes alone",
    ),
}
"""What is said of objects that share a note of their reading: of one, of several."""


_Told = tuple[Any, ...]
"""Numbers of objects, and what is said of one or several."""


def _checked(name: str, read: ReadObjects, images: Images, boxes_from_masks: bool) -> tuple[Objects, list[_Told]]:
    """The objects with the boxes that they shall have, and what is to be told of them; new faults are added to `read`.

    Raises UserError where boxes or masks are of another convention than COCO's.
    """
    told: list[_Told] = []
    found = coco_checks.geometry(read, images.sizes)
    if wrong := coco_checks.mask_convention(read, found):
        raise UserError(f"{name}: {wrong}")
    objects = read.objects
    has_mask, boxless = objects.has_mask, numpy.isnan(objects.boxes[:, 0])
    if boxes_from_masks and len(objects) and not has_mask.any():
        raise UserError(f"{name} has no masks that boxes could be drawn around: leave out --boxes-from-masks")
    if wrong := coco_checks.box_convention(read, found):
        all_masks = bool((has_mask | objects.damaged).all())
        if not (boxes_from_masks and all_masks):
            cure = ", or take the boxes of the masks with --boxes-from-masks" if all_masks else ""
            raise UserError(f"{name}: {wrong}: write left, top, width and height in pixels{cure}")
    unfit = ~objects.damaged & ~boxless & ~coco_checks.fitting(found)
    compared = int((~objects.damaged & ~boxless & has_mask).sum())
    if not boxes_from_masks and 2 * unfit.sum() > compared:
        raise UserError(
            f"{name}: {int(unfit.sum())} of the {compared} boxes do not fit their objects' masks: correct either, or "
            "take the boxes of the masks with --boxes-from-masks"
        )
    one = many = "training sees masks, figures the boxes: correct them, or take --boxes-from-masks"
    if boxes_from_masks:
        one, many = "it is drawn around it now", "they are drawn around them now"
    of_all = f"of the {compared} boxes"
    told.append(
        (
            numpy.flatnonzero(unfit).tolist(),
            f"{{}} {of_all} does not fit its object's mask; {one}",
            f"{{}} {of_all} do not fit their objects' masks; {many}",
        )
    )
    around = found.clipped(found.extents)
    around[:, 2:] -= around[:, :2]
    drawn = has_mask & (boxless | boxes_from_masks)
    objects = replace(objects, boxes=numpy.where(drawn[:, None], around, objects.boxes))
    return _with_pixels(read._replace(objects=objects), found, told), told


def _with_pixels(read: ReadObjects, found: coco_checks.Geometry, told: list[_Told]) -> Objects:
    """The objects, those damaged of which their images show nothing; adds to what is to be told, and to faults."""
    objects = read.objects
    sound = ~(objects.damaged | objects.zero_size)
    empty = sound & coco_checks.without_pixels(read, found)
    extents = found.extents
    small = (extents[:, 2:] - extents[:, :2]).min(axis=1) < 1
    inside = coco_checks.share_outside(found) == 0
    small &= inside & (objects.boxes[:, 2:].min(axis=1) < 2)
    # The odd sliver among thousands is a slip of the hand, as COCO itself may have some.
    if (slivers := empty & inside).sum() <= _FEW_SLIVERS * len(objects):
        small |= slivers
    outside = sound & ~objects.has_mask & (coco_checks.share_outside(found) >= 1)
    faults = dict.fromkeys(numpy.flatnonzero(outside).tolist(), "its box lies outside")
    faults |= dict.fromkeys(numpy.flatnonzero(empty & ~small).tolist(), "its mask has no pixel in")
    for number, fault in faults.items():
        width, height = found.sizes[number].astype(int).tolist()
        read.faults[read.places[number]] = f"{read.name(number)} ({fault} the {width}x{height} image)"
    damaged = objects.damaged.copy()
    damaged[list(faults)] = True
    untold = sound & ~damaged & ~empty & (objects.areas <= 0)
    told += [
        (
            numpy.flatnonzero(sound & ~empty & ~damaged & coco_checks.cut_off(found)).tolist(),
            "{} object reaches out of its image by more than a twentieth, and is cut off there",
            "{} objects reach out of their images by more than a twentieth, and are cut off there",
        ),
        (
            numpy.flatnonzero(untold).tolist(),
            "{} object has an area of 0, which is measured instead",
            "{} objects have areas of 0, which are measured instead",
        ),
    ]
    return replace(
        objects,
        damaged=damaged,
        pixelless=empty & small,
        areas=numpy.where(untold, math.nan, objects.areas),
    )


def _findings(*found: tuple[Any, ...]) -> list[Finding]:
    """A finding for each list that is not empty, whose length its summary tells: of one, of several, or of any."""
    return [
        # Not by str.format: names in a summary may have braces.
        Finding((summaries[0] if len(items) == 1 else summaries[-1]).replace("{}", str(len(items)), 1), items)
        for items, *summaries in found
        if items
    ]


def _refuse(name: str, what: str, faults: list[str], total: int, skip_damaged: bool) -> None:
    if faults and not skip_damaged:
        raise UserError(
            f"{name}: {len(faults)} of the {total} {what} are broken, the first is {faults[0]}: correct them, or leave "
            "them out with --skip-damaged"
        )
