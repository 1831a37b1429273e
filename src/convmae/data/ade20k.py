"""Images with a class for each pixel, in ADE20K's layout or any other two folders.

A label map is a PNG file of its image's size and name, but for suffixes, see `label_maps`.
"""

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from convmae.data.class_lists import ClassList, ClassRow, class_list, read_class_list, read_text
from convmae.data.label_maps import LabelEncoding, LabelMap
from convmae.data.sources import EXTENSIONS, FileReader, ImageCollection, found_part
from convmae.errors import UserError
from convmae.findings import Finding

_ADE20K_TABLE = "objectInfo150.txt"  # of its classes, in its folder
_HINTING = 100  # label maps by which another suffix is guessed


class SegmentationImages(ImageCollection):
    """Images with their label maps."""

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        maps: Sequence[str],
        classes: Sequence[str],
        encoding: LabelEncoding,
        findings: Sequence[Finding],
    ) -> None:
        """maps: the label map of each path, in the same order. findings: what was left out."""
        super().__init__(name, FileReader(paths), list(paths).__getitem__, classes)
        self._maps, self.encoding = list(maps), encoding
        self.findings: list[Finding] = list(findings)

    def annotation(self, index: int) -> LabelMap:
        """The label map of image number `index`, not yet read."""
        return LabelMap(Path(self._maps[index]), self.encoding)

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


def read_classes(data: Path | None, file: Path | None) -> ClassList:
    """The classes in the order of their labels.

    They stand in `file`, see `class_lists`, or else in classes.txt or CVAT's labelmap.txt of the folder `data`, or in
    ADE20K's own table there, of whose synonyms the first is taken. Raises UserError where there is no such file, it
    cannot be read, or a name is empty or comes twice.
    """
    path = _usual_classes(data) if file is None else Path(file)
    if path is None:
        lacking = f"there is no classes.txt in {data}" if data else "nothing names the classes"
        raise UserError(f"{lacking}: write a text file with the name of a class a line, and give it as --classes")
    if path.name != _ADE20K_TABLE:
        return read_class_list(path)
    names = _first_synonyms(_table(path))
    return class_list(path, [ClassRow(f"line {number}", name) for number, name in enumerate(names, 2)])


def names_classes(data: Path | None) -> bool:
    """Whether a folder itself holds the names of its classes."""
    return _usual_classes(data) is not None


def calls_classes(data: Path, names: Sequence[str]) -> bool:
    """Whether a folder that names its classes calls them so; in ADE20K's own table each synonym of a class will do.

    Published weights have the second of "television, television receiver, ...". Raises UserError where the folder
    does not name its classes, or names them wrongly.
    """
    own, path = read_classes(data, None).names, _usual_classes(data)
    assert path is not None
    synonyms = [{name} for name in own]
    if path.name == _ADE20K_TABLE:
        synonyms = [{name, *map(str.strip, row.split(","))} for name, row in zip(own, _table(path), strict=True)]
    return len(names) == len(own) and all(name in known for name, known in zip(names, synonyms, strict=True))


def _usual_classes(data: Path | None) -> Path | None:
    usual = [] if data is None else [Path(data, name) for name in ("classes.txt", _ADE20K_TABLE, "labelmap.txt")]
    return next((path for path in usual if path.is_file()), None)


def _table(path: Path) -> list[str]:
    """All synonyms of each class in ADE20K's table, as they stand there."""
    lines = read_text(path).rstrip().splitlines()
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
    images: Path,
    annotations: Path,
    classes: Sequence[str],
    encoding: LabelEncoding,
    skip_damaged: bool = False,
    image_suffix: str = "",
    label_suffix: str = "",
) -> SegmentationImages:
    """The images of one folder whose label maps another holds, at any depth, under the same names with .png.

    classes: names in the order of the labels; encoding: how label maps write them. skip_damaged: leave out images
    without a label map and label maps without an image, and tell them in `findings`; otherwise one of them raises
    UserError. So does a folder without a single pair, and a file that is both an image and its label map.

    image_suffix, label_suffix: what the names of images and of label maps have at their ends besides what they share;
    files without it are passed over, and told in `findings`.
    """
    label_maps, other_maps = _by_name(annotations, "label maps", (".png",), label_suffix)
    both = frozenset(map(os.path.realpath, label_maps.values())) if label_suffix else frozenset()
    image_files, other_images = _by_name(images, "images", EXTENSIONS, image_suffix, both)
    pairs = sorted(image_files.keys() & label_maps.keys())
    if not pairs:
        raise UserError(
            f"no image in {images} has a label map in {annotations}, of the same name with .png"
            f"{f' after {label_suffix}' if label_suffix else ''}: check both folders{_hint(image_files, label_maps)}"
        )
    for name in pairs:
        if _are_one_file(image_files[name], label_maps[name]):
            raise UserError(
                f"{label_maps[name]} is taken for an image and for its label map: give another folder of images or of "
                f"label maps, or tell them apart by --label-suffix{_hint(image_files, label_maps)}"
            )
    unlabelled = [image_files[name] for name in sorted(image_files.keys() - label_maps.keys())]
    unseen = [label_maps[name] for name in sorted(label_maps.keys() - image_files.keys())]
    if unlabelled and not skip_damaged:
        raise UserError(
            f"{len(unlabelled)} of the {len(image_files)} images in {images} have no label map in {annotations}, the "
            f"first is {unlabelled[0]}: check the folders, or leave them out with --skip-damaged"
            f"{_hint(*(map(_stem, files) for files in (unlabelled, unseen)))}"
        )
    if unseen and not skip_damaged:
        raise UserError(
            f"{len(unseen)} of the {len(label_maps)} label maps in {annotations} have no image in {images}, the "
            f"first is {unseen[0]}: check the folders, or leave them out with --skip-damaged"
        )
    used = {*image_files.values(), *label_maps.values()}
    passed_over = sorted({*other_maps, *other_images} - used)
    suffixes = " and ".join(suffix for suffix in (image_suffix, label_suffix) if suffix)
    findings = [
        Finding(f"left out {len(found)} {what}", [f"{path}: {fault}" for path in found])
        for found, what, fault in (
            (unlabelled, "images without a label map", "has no label map"),
            (unseen, "label maps without an image", "has no image"),
        )
        if found
    ]
    if passed_over:
        files = "1 file whose name does" if len(passed_over) == 1 else f"{len(passed_over)} files whose names do"
        findings.append(Finding(f"passed over {files} not end in {suffixes}", passed_over))
    return SegmentationImages(
        str(images),
        [image_files[name] for name in pairs],
        [label_maps[name] for name in pairs],
        classes,
        encoding,
        findings,
    )


def _by_name(
    folder: Path, what: str, extensions: Sequence[str], suffix: str, apart: frozenset[str] = frozenset()
) -> tuple[dict[str, str], list[str]]:
    """The files with these extensions at any depth, by their path inside the folder without suffix and extension.

    And those whose names do not end in the suffix. apart: real paths of files that are neither.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one with the {what}")
    found: dict[str, str] = {}
    others: list[str] = []
    for parent, _, names in os.walk(folder, followlinks=True):
        for path in (Path(parent, name) for name in sorted(names)):
            if path.suffix.lower() not in extensions or (apart and os.path.realpath(path) in apart):
                continue
            if not path.stem.endswith(suffix):
                others.append(str(path))
                continue
            name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix)
            if name in found:
                raise UserError(f"{found[name]} and {path} differ in the extension alone: rename or move one")
            found[name] = str(path)
    if not found:
        ending = f" whose names end in {suffix}" if suffix else ""
        raise UserError(f"{folder} holds no {what}{ending}: accepted are {' '.join(extensions)}")
    return found, others


def _are_one_file(path: str, other: str) -> bool:
    try:
        return Path(path).samefile(other)
    except OSError:  # one is gone, and whoever reads it says so
        return False


def _stem(path: str) -> str:
    return Path(path).stem


def _hint(images: Iterable[str], label_maps: Iterable[str]) -> str:
    """What to say where the names of label maps are those of images and more, in all cases the same.

    Both without folders and extensions.
    """
    known = sorted(images)
    suffixes = set()
    for name in islice(label_maps, _HINTING):
        place = bisect_left(known, name)
        if place and name.startswith(known[place - 1]):
            suffixes.add(name.removeprefix(known[place - 1]))
    suffix = suffixes.pop() if len(suffixes) == 1 else ""
    return f" (perhaps --label-suffix {suffix})" if suffix and not suffix[0].isalnum() else ""
