"""Where labelled images come from: class folders, or any of the data sets that timm names by a prefix.

A class is known by its number in the source's `classes`; nothing is decoded here.
"""

import io
import logging
import os
import re
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy
import torch
from timm.data import create_dataset

from convmae.data import hugging_face
from convmae.data.duplicates import repeated_images
from convmae.data.folders import counted, image_files, is_left_behind, listed, subfolders
from convmae.data.lists import Table, is_list, read_labels, read_table, repeated
from convmae.data.shards import interpret, labels_of, told
from convmae.data.sources import (
    FileReader,
    ImageCollection,
    ImageStream,
    no_images,
    opening,
    parse_location,
    stream_hugging_face,
)
from convmae.errors import UserError, check_installed
from convmae.findings import Finding

_logger = logging.getLogger(__name__)

# The names under which data sets keep the same split.
_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "test"))

_TENSORFLOW_FORMAT = "array_record"  # the one whose examples can be read in any order

_WITHOUT_CLASS = "{0} without a class {are} left out"  # of the members of a shard

_CLASS_NAMES_FILE = "classes.txt"  # beside shards, a class a line


class MissingSplitError(UserError):
    """A data set without a split of the name that was asked for."""


def open_labelled_images(
    data: str | Path,
    split: str,
    classes: Sequence[str] | None = None,
    shuffled: bool = False,
    multi_label: bool = False,
) -> ImageCollection | ImageStream:
    """The labelled images of one split.

    data: a folder that holds SPLIT/CLASS/images at any depth, or SPLIT.csv; a table (.csv, .tsv) with a column of
    paths, one of labels or one for each class, and one of splits, see `lists`; `wds/FOLDER` (a local folder of
    WebDataset shards whose names tell the split); `hfds/NAME` (Hugging Face data set, a hub name or a local folder);
    `hfids/NAME` (the same, streamed; `|N` gives the number of training images where it is unknown); `tfds/NAME`
    (TensorFlow data set, a name or the folder of one); or `torch/NAME` (torchvision's cifar10, cifar100, mnist, ...).
    split: `train`, `val`, or whatever the data set calls it; the usual synonyms are found. classes: those of the
    training split, which another split must not exceed. shuffled: for training, of a stream, whose order is its own.
    multi_label: whether the images of the training split may be of several classes.

    Raises UserError where there is nothing to read, fewer than two classes, or an unknown one; MissingSplitError where
    there is no such split.
    """
    prefix, _, name = str(data).partition("/")
    source: ImageCollection | ImageStream
    if prefix == "hfds":
        source = _open_hugging_face(str(data), name, split, classes)
    elif prefix == "hfids":
        source = _stream_hugging_face(str(data), name, split, shuffled)
    elif prefix == "tfds":
        source = _open_tensorflow(str(data), name, split)
    elif prefix == "torch":
        source = _open_torchvision(str(data), split)
    elif prefix == "wds":
        source = _open_shards(str(data), Path(name), split)
    elif is_list(Path(data)):
        source = _open_table(Path(data), split, classes, multi_label)
    else:
        source = _open_folder(Path(data), split, classes, multi_label)
    unknown = sorted(set(source.classes) - set(classes if classes is not None else source.classes))
    if unknown:
        alike = [name for name in classes or () if name.casefold() == unknown[0].casefold()]
        cure = f"name it '{alike[0]}', as there" if alike else "remove it"
        raise UserError(f"{source.name} has the class '{unknown[0]}', which the training split lacks: {cure}")
    if len(source.classes) < (1 if source.multi_label else 2):
        found = f"only one class, '{source.classes[0]}'" if source.classes else "no classes"
        raise UserError(f"{source.name} has {found}: classification needs two or more")
    if classes is not None and source.classes != list(classes)[: len(source.classes)]:
        raise UserError(f"{source.name} numbers its classes in another order than the training split: write it again")
    if classes is not None and source.multi_label != multi_label:
        several = "of several classes an image" if source.multi_label else "of one class an image"
        raise UserError(f"{source.name} is {several}, and the training split is not: write both in one form")
    if isinstance(source, ImageCollection) and source.labels is not None:
        _check_labels(source, source.labels, is_training=classes is None)
    return source


def compare_splits(training: ImageCollection | ImageStream, validation: ImageCollection | ImageStream) -> None:
    """Add to the findings of the validation images what makes their figures miss something, or too good.

    These are classes without an image, and images that are in training, too. Raises UserError where no validation image
    is of any class.
    """
    if not isinstance(validation, ImageCollection) or validation.labels is None:
        return
    counts = images_of_classes(validation.labels, training)
    if not counts.any():
        raise UserError(f"{validation.name} has no image of any class, so no figure can be given: add some")
    validation.findings += _empty_classes(training.classes, counts, "no validation image and no figure")
    if isinstance(training, ImageCollection):
        validation.findings += repeated_images(training, validation)


def images_of_classes(labels: numpy.ndarray, training: ImageCollection | ImageStream) -> numpy.ndarray:
    """How many images of these labels each of training's classes has, (classes,).

    labels: (N,) numbers, or (N, C) of 0 and 1 for the first C classes: another split may know the first of them only.
    """
    counts = numpy.zeros(len(training.classes), dtype=numpy.int64)
    known = labels.sum(axis=0) if labels.ndim == 2 else numpy.bincount(labels, minlength=len(counts))[: len(counts)]
    counts[: len(known)] = known
    return counts


def _empty_classes(classes: Sequence[str], counts: numpy.ndarray, what: str) -> list[Finding]:
    """A finding if some classes have no image; what: what they have none of, and what follows."""
    empty = [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    if not empty:
        return []
    have = "has" if len(empty) == 1 else "have"
    return [listed(f"{len(empty)} of {len(classes)} classes {have} {what}, such as {empty[0]}", empty)]


def _check_labels(source: ImageCollection, labels: numpy.ndarray, is_training: bool) -> None:
    """Refuse images without a class, and a training split in which nothing can be told apart; count empty classes."""
    if not source.multi_label:
        outside = labels[(labels < 0) | (labels >= len(source.classes))]
        if len(outside):
            raise UserError(
                f"{source.name} has {counted(len(outside), 'image')} without a class (number {outside[0]}): choose "
                "another split"
            )
    if not is_training:
        return
    counts = images_of_classes(labels, source)
    if (counts > 0).sum() < (1 if source.multi_label else 2):
        raise UserError(f"{source.name} has images of fewer classes than can be told apart: add images of others")
    source.findings += _empty_classes(source.classes, counts, "no training image and will not be learned")


def _open_table(file: Path, split: str, classes: Sequence[str] | None, multi_label: bool) -> ImageCollection:
    """The rows of a split in a table; all of them are training's where no column tells the splits."""
    if file.suffix.lower() == ".txt":
        raise UserError(f"{file} has no classes: give a table, .csv, with the columns path and label")
    table = read_table(file)
    splits = table.splits
    if splits is None and split not in _called("train"):
        raise MissingSplitError(f"{file} has no column 'split', so all its images are for training: add one")
    if splits is not None:
        found = next((name for name in map(str.lower, _called(split)) if name in splits), None)
        if found is None:
            raise MissingSplitError(
                f"{file} has no row of the split '{split}': its column of splits holds {', '.join(sorted(set(splits)))}"
            )
        chosen = [row for row, name in enumerate(splits) if name == found]
    else:
        chosen = list(range(len(table.paths)))
    # The form of the labels, one or several an image, is that of all rows.
    several = read_labels(table, None, multi_label).labels.ndim == 2
    rows = Table(
        table.file,
        [table.paths[row] for row in chosen],
        {name: [values[row] for row in chosen] for name, values in table.columns.items()},
        [table.lines[row] for row in chosen],
    )
    return _listed_images(f"{file} ({split})" if splits else str(file), rows, classes, several)


def _listed_images(name: str, table: Table, classes: Sequence[str] | None, multi_label: bool) -> ImageCollection:
    read = read_labels(table, classes, multi_label)
    again = repeated(table.paths)
    if again:
        raise UserError(
            f"{table.file} lists {counted(len(again), 'image')} more than once, such as {again[0]}: write each in one "
            "row, several labels with | between them"
        )
    source = ImageCollection(name, FileReader(table.paths), table.paths.__getitem__, read.classes, read.labels)
    if read.unused:
        source.findings.append(Finding(f"columns that are not used: {', '.join(read.unused)}"))
    if read.labels.ndim == 2 and (count := int((~read.labels.any(axis=1)).sum())):
        are = "is" if count == 1 else "are"
        source.findings.append(Finding(f"{counted(count, 'image')} {are} of no class, and learned or judged as such"))
    return source


def _open_folder(folder: Path, split: str, classes: Sequence[str] | None, multi_label: bool) -> ImageCollection:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}: give a folder with train/CLASS/images and val/CLASS/images")
    found = next((folder / name for name in _called(split) if (folder / name).is_dir()), None)
    if found is None:
        table = next((folder / f"{name}.csv" for name in _called(split) if (folder / f"{name}.csv").is_file()), None)
        if table is not None:
            return _listed_images(str(table), read_table(table), classes, multi_label)
        raise MissingSplitError(
            f"{folder} has no folder {split}/: it must hold train/CLASS/images and val/CLASS/images"
        )
    names = own = subfolders(found)
    if not names:
        raise UserError(f"{found} has no class folders: put the images of each class into a folder of its own")
    if classes is not None and set(names) <= set(classes):
        names = list(classes)
    images = image_files(found, in_classes=True)
    numbers = {name: number for number, name in enumerate(names)}
    # Class by class, the folders of each sorted by their whole path.
    ordered = sorted((path.partition(os.sep)[0], *os.path.split(path)) for path in images.paths)
    paths = [os.path.join(found, folder, name) for _, folder, name in ordered]  # noqa: PTH118
    labels = numpy.array([numbers[name] for name, *_ in ordered], dtype=numpy.int64)
    if not paths:
        raise no_images(found, images)
    empty = sorted(set(own) - {names[label] for label in numpy.unique(labels).tolist()})
    if classes is None and empty:
        raise UserError(f"{found / empty[0]} holds no images: fill the class folder or delete it")
    source = ImageCollection(str(found), FileReader(paths), paths.__getitem__, names, labels)
    source.findings = [*images.findings, *_alike(own)]
    return source


def _alike(names: Sequence[str]) -> list[Finding]:
    """A finding for classes whose names differ in case alone."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name.casefold()].append(name)
    alike = [", ".join(group) for group in groups.values() if len(group) > 1]
    text = "names of classes differ in case alone and stay classes of their own"
    return [listed(f"{text}, such as {alike[0]}", alike)] if alike else []


class _ShardReader:
    """Images inside uncompressed tar files, found by the place of their bytes: reader[index] -> (file, class)."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = list(shards)
        remarks: dict[str, list[str]] = defaultdict(list)
        found = [
            (number, *place) for number, shard in enumerate(shards) for place in _labelled_members(shard, remarks)
        ]  # arrays, since lists of millions would be copied by every loading process
        self.findings = told(remarks)
        self._places = numpy.array(found, dtype=numpy.int64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        shard, offset, size, label = self._places[index].tolist()
        with self._shards[shard].open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), label

    @property
    def labels(self) -> numpy.ndarray:
        return self._places[:, 3]

    def size_of(self, index: int) -> int:
        return int(self._places[index, 2])

    def filename(self, index: int) -> str:
        shard, offset, *_ = self._places[index].tolist()
        return f"{self._shards[shard]}/{_names_by_offset(self._shards[shard])[offset]}"


@lru_cache(maxsize=1)  # names are asked for in order, if at all
def _names_by_offset(shard: Path) -> dict[int, str]:
    with tarfile.open(shard, "r:") as members:
        return {member.offset_data: member.name for member in members}


def _labelled_members(shard: Path, remarks: dict[str, list[str]]) -> Iterator[tuple[int, int, int]]:
    """Offset, size and class of each image with a class in a shard: members KEY.jpg and KEY.cls.

    remarks: gets the names of the other images by what there is to say of them.
    """
    try:
        with tarfile.open(shard, "r:") as archive:
            members = [member for member in archive if member.isreg()]
            names = [member.name for member in members]
            images, found = interpret(names)
            for image, label in zip(images, labels_of(names, images), strict=True):
                member = members[image.place]
                if member.sparse is not None:  # type: ignore[attr-defined]
                    raise tarfile.TarError(f"{member.name} is a sparse file")
                number = -1
                if label is not None:
                    text = cast(BinaryIO, archive.extractfile(members[label])).read()
                    number = _number(names[label], text)
                if number < 0:
                    found[_WITHOUT_CLASS].append(member.name)
                else:
                    yield member.offset_data, member.size, number
    except UserError as error:
        raise UserError(f"the shard {shard}: {error}") from error
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"the shard {shard} cannot be read, write it again, uncompressed: {error}") from error
    for remark, noted in found.items():
        remarks[remark] += [f"{shard.name}/{name}" for name in noted]


def _number(name: str, text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} holds {text[:20]!r}, not the number of a class: write numbers from 0 on") from None


def _open_shards(data: str, folder: Path, split: str) -> ImageCollection:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: write wds/FOLDER, of a local folder with shards *.tar")
    tars = [path for suffix in ("tar", "tar.gz", "tgz") for path in folder.rglob(f"*.{suffix}")]
    tars = [path for path in tars if not any(map(is_left_behind, path.relative_to(folder).parts))]
    words = {shard: set(re.split("[^a-z]+", str(shard.relative_to(folder)).lower())) for shard in tars}
    matching = ([shard for shard in words if name.lower() in words[shard]] for name in _called(split))
    shards = next((sorted(found) for found in matching if found), [])
    if not shards:
        raise MissingSplitError(f"{folder} has no shards called {split}: name them like {split}-0000.tar")
    if packed := [shard for shard in shards if shard.suffix != ".tar"]:
        raise UserError(f"{packed[0]} is compressed, so that no image can be read at its place: unpack it to .tar")
    reader = _ShardReader(shards)
    if not len(reader):
        raise UserError(f"the shards of {data} ({split}) hold no images with a class: write KEY.jpg and KEY.cls")
    names = folder / _CLASS_NAMES_FILE
    num_classes = int(reader.labels.max()) + 1
    classes = names.read_text().splitlines() if names.is_file() else [str(label) for label in range(num_classes)]
    if num_classes > len(classes):
        raise UserError(f"{names} names {len(classes)} classes, {data} ({split}) has more: add them, a line each")
    source = ImageCollection(f"{data} ({split})", reader, reader.filename, classes, reader.labels)
    source.findings = reader.findings
    return source


def _open_hugging_face(data: str, name: str, split: str, classes: Sequence[str] | None) -> ImageCollection:
    with opening(data, split):
        split = _hugging_face_split(data, name, split)
        table = hugging_face.load(name, split, streamed=False)
        features = table.features or {}
        image, label = _hugging_face_columns(data, features)
        names, labels = hugging_face.classes_and_labels(data, table, label, classes)
        reader = hugging_face.HuggingFaceReader(table, image)
    source = _collection(data, split, reader, "row", names)
    source.labels = labels
    return source


def _stream_hugging_face(data: str, location: str, split: str, shuffled: bool) -> ImageStream:
    name, num_samples = parse_location(data, location)
    with opening(data, split):
        split = _hugging_face_split(data, name, split)
        features = hugging_face.load(name, split, streamed=True).features or {}
        image, label = _hugging_face_columns(data, features)
        classes = getattr(features[label], "names", None)
        if classes is None:
            raise UserError(
                f"the classes in '{label}' of {data} are unknown before all is read: read it as hfds/{name}"
            )
        stream = stream_hugging_face(data, name, split, image, label, num_samples, list(classes), shuffled)
    stream.name = f"{data} ({split})"
    if shuffled and stream.num_shards == 1 and stream.reader.num_samples > stream.reader.shuffle_size:
        _logger.warning(
            "%s is one shard of %d images, shuffled %d at a time: if they are sorted by class, read them as hfds/ or "
            "from their folder",
            *(stream.name, stream.reader.num_samples, stream.reader.shuffle_size),
        )
    return stream


def _hugging_face_split(data: str, name: str, split: str) -> str:
    """The split's own name."""
    check_installed("hub", "reading Hugging Face data sets needs `datasets`", "datasets")
    if not name:
        raise UserError(f"{data} names no data set: write {data}NAME")
    available = hugging_face.split_names(name)
    found = next((known for known in _called(split) if known in available), None)
    if found is None:
        known = ", ".join(available)
        raise MissingSplitError(f"{data}, split {split}, cannot be opened, check both: its splits are {known}")
    return found


def _hugging_face_columns(data: str, features: Mapping[str, Any]) -> tuple[str, str]:
    """The columns of images and of their classes."""
    try:
        return hugging_face.image_column(data, features), hugging_face.label_column(data, features)
    except UserError as error:
        if "several" in str(error):
            raise
        raise _no_columns(data, features) from error


class _TensorflowReader:
    """A TensorFlow data set that can be read at any place: reader[index] -> (binary file, class)."""

    def __init__(self, source: Sequence[Any], image: str, label: str) -> None:
        self._source, self._image, self._label = source, image, label

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        example = self._source[index]
        return io.BytesIO(example[self._image]), int(example[self._label])


def _open_tensorflow(data: str, name: str, split: str) -> ImageCollection:
    check_installed("tfds", "reading TensorFlow data sets needs more packages", "tensorflow_datasets", "array_record")
    import tensorflow_datasets
    from filelock import FileLock

    lock = Path(tempfile.gettempdir()) / f"convmae-tfds-{name.replace('/', '-')}.lock"
    with opening(data, split), FileLock(lock):  # of several processes one prepares it
        try:
            if Path(name).is_dir():
                builder = tensorflow_datasets.builder_from_directory(name, file_format=_TENSORFLOW_FORMAT)
            else:
                builder = tensorflow_datasets.builder(name, file_format=_TENSORFLOW_FORMAT)
        except ValueError as error:
            if "file format" not in str(error):
                raise
            cure = "convert it, tfds convert_format"
            raise UserError(f"{data} is not written as {_TENSORFLOW_FORMAT}: {cure}") from error
        builder.download_and_prepare()  # does nothing where that is done
        features = builder.info.features
        image, label = _columns(
            data, features, tensorflow_datasets.features.Image, tensorflow_datasets.features.ClassLabel
        )
        split = next((known for known in _called(split) if known in builder.info.splits), split)
        undecoded = {image: tensorflow_datasets.decode.SkipDecoding()}
        reader = _TensorflowReader(builder.as_data_source(split=split, decoders=undecoded), image, label)
    return _collection(data, split, reader, "example", features[label].names)


def _columns(data: str, features: Mapping[str, Any], image: type, classes: type) -> tuple[str, str]:
    """The first column of images and the first of classes."""
    images, labels = ([key for key, kind in features.items() if isinstance(kind, one)] for one in (image, classes))
    if not images or not labels:
        raise _no_columns(data, features)
    return images[0], labels[0]


def _no_columns(data: str, features: Mapping[str, Any]) -> UserError:
    known = ", ".join(features) or "unknown"
    cure = "choose another; a local folder needs SPLIT/CLASS/images with two classes or more"
    return UserError(f"{data} has no column of images or none of classes, its columns are {known}: {cure}")


def _collection(data: str, split: str, reader: Any, unit: str, classes: Sequence[str]) -> ImageCollection:
    """A collection whose images are known by their numbers alone."""
    name = f"{data} ({split})"
    return ImageCollection(name, reader, partial("{}, {} {}".format, name, unit), classes)


class _TorchvisionReader:
    """A torchvision data set, whose images are decoded already: reader[index] -> (binary file, class)."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        image, label = self._dataset[index]
        file = io.BytesIO()
        image.save(file, "BMP")
        file.seek(0)
        return file, label


def _open_torchvision(data: str, split: str) -> ImageCollection:
    root = Path(torch.hub.get_dir()) / "datasets"
    with opening(data, split):
        dataset = create_dataset(data, root=str(root), split=split, download=True)
    named = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", [])  # the second of iNaturalist
    classes = [name if isinstance(name, str) else ", ".join(name) for name in named]  # ImageNet has synonyms
    return _collection(data, split, _TorchvisionReader(dataset), "image", classes)


def _called(split: str) -> tuple[str, ...]:
    """All names of a split, the given one first."""
    synonyms = next((names for names in _SYNONYMS if split in names), ())
    return (split, *(name for name in synonyms if name != split))
