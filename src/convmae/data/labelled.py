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
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy
import torch
from timm.data import create_dataset
from timm.data.readers import create_reader

from convmae.data.folders import image_files, is_left_behind, listed, subfolders
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


def open_labelled_images(
    data: str | Path, split: str, classes: Sequence[str] | None = None, shuffled: bool = False
) -> ImageCollection | ImageStream:
    """The labelled images of one split.

    data: a folder that holds SPLIT/CLASS/images at any depth; `wds/FOLDER` (a local folder of WebDataset shards whose
    names tell the split); `hfds/NAME` (Hugging Face data set, a hub name or a local folder); `hfids/NAME` (the same,
    streamed; `|N` gives the number of training images where it is unknown); `tfds/NAME` (TensorFlow data set, a name or
    the folder of one); or `torch/NAME` (torchvision's cifar10, cifar100, mnist, fashion_mnist, ...).
    split: `train`, `val`, or whatever the data set calls it; the usual synonyms are found. classes: those of the
    training split, which another split must not exceed. shuffled: for training, of a stream, whose order is its own.

    Raises UserError where there is nothing to read, fewer than two classes, or an unknown one.
    """
    prefix, _, name = str(data).partition("/")
    source: ImageCollection | ImageStream
    if prefix == "hfds":
        source = _open_hugging_face(str(data), name, split)
    elif prefix == "hfids":
        source = _stream_hugging_face(str(data), name, split, shuffled)
    elif prefix == "tfds":
        source = _open_tensorflow(str(data), name, split)
    elif prefix == "torch":
        source = _open_torchvision(str(data), split)
    elif prefix == "wds":
        source = _open_shards(str(data), Path(name), split)
    else:
        source = _open_folder(Path(data), split, classes)
    unknown = sorted(set(source.classes) - set(classes if classes is not None else source.classes))
    if unknown:
        alike = [name for name in classes or () if name.casefold() == unknown[0].casefold()]
        cure = f"name it '{alike[0]}', as there" if alike else "remove it"
        raise UserError(f"{source.name} has the class '{unknown[0]}', which the training split lacks: {cure}")
    if len(source.classes) < 2:
        found = f"only one class, '{source.classes[0]}'" if source.classes else "no classes"
        raise UserError(f"{source.name} has {found}: classification needs two or more")
    if classes is not None and source.classes != list(classes)[: len(source.classes)]:
        raise UserError(f"{source.name} numbers its classes in another order than the training split: write it again")
    return source


def _open_folder(folder: Path, split: str, classes: Sequence[str] | None) -> ImageCollection:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}: give a folder with train/CLASS/images and val/CLASS/images")
    found = next((folder / name for name in _called(split) if (folder / name).is_dir()), None)
    if found is None:
        raise UserError(f"{folder} has no folder {split}/: it must hold train/CLASS/images and val/CLASS/images")
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

    def filename(self, index: int) -> str:
        shard, offset, *_ = self._places[index].tolist()
        with tarfile.open(self._shards[shard], "r:") as members:
            name = next(member.name for member in members if member.offset_data == offset)
        return f"{self._shards[shard]}/{name}"


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
        raise UserError(f"{folder} has no shards called {split}: name them like {split}-0000.tar")
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


def _open_hugging_face(data: str, name: str, split: str) -> ImageCollection:
    with opening(data, split):
        split, image, label, classes = _hugging_face_columns(data, name, split, streamed=False)
        reader = create_reader(f"hfds/{name}", split=split, input_key=image, target_key=label)
    return _collection(data, split, reader, "row", classes)


def _stream_hugging_face(data: str, location: str, split: str, shuffled: bool) -> ImageStream:
    name, num_samples = parse_location(data, location)
    with opening(data, split):
        split, image, label, classes = _hugging_face_columns(data, name, split, streamed=True)
        stream = stream_hugging_face(data, name, split, image, label, num_samples, classes, shuffled)
    stream.name = f"{data} ({split})"
    if shuffled and stream.num_shards == 1 and stream.reader.num_samples > stream.reader.shuffle_size:
        _logger.warning(
            "%s is one shard of %d images, shuffled %d at a time: if they are sorted by class, read them as hfds/ or "
            "from their folder",
            *(stream.name, stream.reader.num_samples, stream.reader.shuffle_size),
        )
    return stream


def _hugging_face_columns(data: str, name: str, split: str, streamed: bool) -> tuple[str, str, str, list[str]]:
    """The split's own name, the columns of images and of their classes, and the classes."""
    check_installed("hub", "reading Hugging Face data sets needs `datasets`", "datasets")
    import datasets

    if not name:
        raise UserError(f"{data} names no data set: write {data}NAME")
    available = datasets.get_dataset_split_names(name)
    split = next((known for known in _called(split) if known in available), split)
    features = datasets.load_dataset_builder(name).info.features
    # Local files tell theirs when they are read.
    features = features or datasets.load_dataset(name, split=split, streaming=streamed).features or {}
    image, label = _columns(data, features, datasets.Image, datasets.ClassLabel)
    return split, image, label, list(features[label].names)


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
        known = ", ".join(features) or "unknown"
        cure = "choose another; a local folder needs SPLIT/CLASS/images with two classes or more"
        raise UserError(f"{data} has no column of images or none of classes, its columns are {known}: {cure}")
    return images[0], labels[0]


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
