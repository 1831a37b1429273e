"""Images with a class for each pixel, in ADE20K's layout.

A label map is a PNG file of its image's size and name, read and checked together with it. H height, W width.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor

from convmae.data.images import UndecodableImageError, UnfitAnnotationError, undecodable_if_damaged
from convmae.data.sources import EXTENSIONS, FileReader, ImageCollection, found_part
from convmae.errors import UserError
from convmae.findings import Finding
from convmae.labels import IGNORED

_ADE20K_TABLE = "objectInfo150.txt"  # of its classes, in its folder


class LabelMap(NamedTuple):
    """The file with the class of each pixel of an image."""

    path: Path
    num_classes: int
    reduce_zero_label: bool
    """Whether 0 in the file is IGNORED and the classes begin at 1."""

    def read(self, size: tuple[int, int]) -> Tensor:
        """uint8 (H, W) of an image of this size, classes from 0 on or IGNORED; raises UnfitAnnotationError."""
        stored = self._stored()
        if stored.shape != size:
            (height, width), (wanted_height, wanted_width) = stored.shape, size
            turned = ", perhaps before its EXIF data turn it" if stored.shape == size[::-1] else ""
            raise self._unfit(f"is {width}x{height}, the image {wanted_width}x{wanted_height}{turned}")
        first = int(self.reduce_zero_label)
        largest = int(stored.max(where=stored != IGNORED, initial=0))
        if largest >= first + self.num_classes:
            raise self._unfit(
                f"has the label {largest}, but there are {self.num_classes} classes, counted from {first} on: check "
                "their list and --reduce-zero-label"
            )
        classes = numpy.full(256, IGNORED, dtype=numpy.uint8)
        classes[first : first + self.num_classes] = numpy.arange(self.num_classes)
        return torch.from_numpy(classes[stored])

    def _stored(self) -> numpy.ndarray:
        """The numbers in the file, uint8 (H, W); of a palette its indices."""
        try:
            with undecodable_if_damaged(), Image.open(self.path, formats=["PNG"]) as image:
                stored = image.tile  # which reading forgets
                mode, numbers = image.mode, numpy.asarray(image)
                storage = stored[0][3]  # Pillow's mode hides that it spreads grey of 2 and 4 bits over 8
        except UndecodableImageError as error:
            raise self._unfit(f"is no PNG that can be read: {error}") from error
        if mode == "P" or storage in ("1", "L"):
            return numbers.astype(numpy.uint8)
        if mode in ("L", "I", "I;16"):
            bits = {"L;2": 2, "L;4": 4}.get(str(storage), 16)
            raise self._unfit(f"has {bits}-bit labels: write them with 8 bits")
        raise self._unfit(f"has colours or transparency ({mode}), not labels: write one number of 8 bits a pixel")

    def _unfit(self, reason: str) -> UnfitAnnotationError:
        return UnfitAnnotationError(f"its label map {self.path} {reason}")


class SegmentationImages(ImageCollection):
    """Images with their label maps."""

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        maps: Sequence[str],
        classes: Sequence[str],
        reduce_zero_label: bool,
        findings: Sequence[Finding],
    ) -> None:
        """maps: the label map of each path, in the same order. findings: what was left out."""
        super().__init__(name, FileReader(paths), list(paths).__getitem__, classes)
        self._maps, self.reduce_zero_label, self.findings = list(maps), reduce_zero_label, list(findings)

    def annotation(self, index: int) -> LabelMap:
        """The label map of image number `index`, not yet read."""
        return LabelMap(Path(self._maps[index]), len(self.classes), self.reduce_zero_label)

    def open_annotated(self, index: int) -> tuple[BinaryIO, Any]:
        """The encoded image number `index` and its LabelMap; the caller closes it."""
        return self.open(index), self.annotation(index)


def find_ade20k(
    data: Path | None,
    split: Literal["train", "val"],
    images: Path | None = None,
    annotations: Path | None = None,
    flags: tuple[str, str] = ("--images", "--annotations"),
) -> tuple[Path, Path]:
    """The folder of images and the folder of label maps of one split.

    data: ADE20K's folder, with images/training, images/validation, annotations/training and annotations/validation;
    images and annotations, where given, replace these. flags: the command's names of images and of annotations, for
    messages. Raises UserError where a folder does not exist.
    """
    part = {"train": "training", "val": "validation"}[split]
    return (
        found_part("ADE20K's folder", data, f"images/{part}", images, flags[0]),
        found_part("ADE20K's folder", data, f"annotations/{part}", annotations, flags[1]),
    )


def is_ade20k(data: Path | None, classes: Path | None = None) -> bool:
    """Whether a folder is ADE20K itself, or a file of classes is its table, so that label 0 is no class."""
    in_folder = data is not None and Path(data, _ADE20K_TABLE).is_file()
    return in_folder or (classes is not None and Path(classes).name == _ADE20K_TABLE)


def read_classes(data: Path | None, file: Path | None) -> list[str]:
    """The names of the classes in the order of their labels.

    They stand in `file`, or else in classes.txt of the folder `data`, one a line, or in ADE20K's own table there, of
    whose synonyms the first is taken. Raises UserError where there is no such file, it cannot
    be read, or a name is empty or comes twice.
    """
    path = _usual_classes(data) if file is None else Path(file)
    if path is None:
        lacking = f"there is no classes.txt in {data}" if data else "nothing names the classes"
        raise UserError(f"{lacking}: write a text file with the name of a class a line, and give it as --classes")
    lines, is_table = _lines(path), path.name == _ADE20K_TABLE
    names = _first_synonyms(_table(path, lines)) if is_table else [line.strip() for line in lines]
    for place, name in enumerate(names):
        where = f"{path}, line {place + 1 + is_table},"
        if not name:
            raise UserError(f"{where} names no class: remove it, or name the class of label {place}")
        if name in names[:place]:
            raise UserError(f"{where} names the class {name} again: give each class a name of its own")
    if not 2 <= len(names) <= IGNORED:
        raise UserError(f"{path} names {len(names)} classes: it must be 2 to {IGNORED}, one a line")
    return names


def names_classes(data: Path | None) -> bool:
    """Whether a folder itself holds the names of its classes."""
    return _usual_classes(data) is not None


def calls_classes(data: Path, names: Sequence[str]) -> bool:
    """Whether a folder that names its classes calls them so; in ADE20K's own table each synonym of a class will do.

    Published weights have the second of "television, television receiver, ...". Raises UserError where the folder
    does not name its classes, or names them wrongly.
    """
    own, path = read_classes(data, None), _usual_classes(data)
    assert path is not None
    synonyms = [{name} for name in own]
    if path.name == _ADE20K_TABLE:
        synonyms = [
            {name, *map(str.strip, row.split(","))} for name, row in zip(own, _table(path, _lines(path)), strict=True)
        ]
    return len(names) == len(own) and all(name in known for name, known in zip(names, synonyms, strict=True))


def _usual_classes(data: Path | None) -> Path | None:
    usual = [] if data is None else [Path(data, "classes.txt"), Path(data, _ADE20K_TABLE)]
    return next((path for path in usual if path.is_file()), None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read, check --classes: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: give a text file with a class a line as --classes") from error


def _table(path: Path, lines: list[str]) -> list[str]:
    """All synonyms of each class in ADE20K's table, as they stand there."""
    header, *rows = [[field.strip() for field in line.split("\t")] for line in lines] or [[""]]
    if header[-1] != "Name":
        raise UserError(f"{path}, line 1, does not end with the column Name: download the file again")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header) or row[0] != str(number):
            raise UserError(f"{path}, line {number + 1}, is not the row of class {number}: download the file again")
    return [row[-1] for row in rows]


def _first_synonyms(classes: list[str]) -> list[str]:
    """The first synonym of each class; all of them where the first is not its alone."""
    firsts = [synonyms.partition(",")[0].strip() for synonyms in classes]
    counts = Counter(firsts)
    return [first if counts[first] == 1 else synonyms for first, synonyms in zip(firsts, classes, strict=True)]


def open_segmentation(
    images: Path, annotations: Path, classes: Sequence[str], reduce_zero_label: bool, skip_damaged: bool = False
) -> SegmentationImages:
    """The images of one folder whose label maps another holds, at any depth, under the same names with .png.

    classes: names in the order of the labels; reduce_zero_label: whether label 0 is no class and label 1 the first.
    skip_damaged: leave out images without a label map and label maps without an image, and tell them in `findings`;
    otherwise one of them raises UserError. So does a folder without a single pair.
    """
    if len(classes) + reduce_zero_label > IGNORED:
        raise UserError(
            f"{len(classes)} classes from {int(reduce_zero_label)} on need the label {IGNORED}, which no class can "
            "have: leave out one"
        )
    image_files = _by_name(images, "images", EXTENSIONS)
    label_maps = _by_name(annotations, "label maps", (".png",))
    pairs = sorted(image_files.keys() & label_maps.keys())
    if not pairs:
        raise UserError(
            f"no image in {images} has a label map in {annotations}, of the same name with .png: check both folders"
        )
    unlabelled = [image_files[name] for name in sorted(image_files.keys() - label_maps.keys())]
    unseen = [label_maps[name] for name in sorted(label_maps.keys() - image_files.keys())]
    if unlabelled and not skip_damaged:
        raise UserError(
            f"{len(unlabelled)} of the {len(image_files)} images in {images} have no label map in {annotations}, the "
            f"first is {unlabelled[0]}: check the folders, or leave them out with --skip-damaged"
        )
    if unseen and not skip_damaged:
        raise UserError(
            f"{len(unseen)} of the {len(label_maps)} label maps in {annotations} have no image in {images}, the "
            f"first is {unseen[0]}: check the folders, or leave them out with --skip-damaged"
        )
    return SegmentationImages(
        str(images),
        [image_files[name] for name in pairs],
        [label_maps[name] for name in pairs],
        classes,
        reduce_zero_label,
        [
            Finding(f"left out {len(found)} {what}", [f"{path}: {fault}" for path in found])
            for found, what, fault in (
                (unlabelled, "images without a label map", "has no label map"),
                (unseen, "label maps without an image", "has no image"),
            )
            if found
        ],
    )


def _by_name(folder: Path, what: str, extensions: Sequence[str]) -> dict[str, str]:
    """The files with these extensions at any depth, by their path inside the folder without the extension."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one with the {what}")
    found: dict[str, str] = {}
    for parent, _, names in os.walk(folder, followlinks=True):
        for path in (Path(parent, name) for name in sorted(names)):
            if path.suffix.lower() in extensions:
                name = path.relative_to(folder).with_suffix("").as_posix()
                if name in found:
                    raise UserError(f"{found[name]} and {path} differ in the extension alone: rename or move one")
                found[name] = str(path)
    if not found:
        raise UserError(f"{folder} holds no {what}: accepted are {' '.join(extensions)}")
    return found
