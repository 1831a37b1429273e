"""Where labelled pictures come from: class folders, shards, a Hugging Face data set, or one of torchvision's.

A class is known by its number in `ImageCollection.classes`; nothing is decoded here.
"""

import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy
import torch
from timm.data import create_dataset
from timm.data.readers import create_reader
from torchvision.datasets.folder import find_classes, make_dataset

from convmae.data.sources import EXTENSIONS, ImageCollection
from convmae.errors import UserError

# The names under which data sets keep the same split.
_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "test"))

_CLASS_NAMES_FILE = "classes.txt"  # beside shards, a class a line


def open_labelled_images(data: str | Path, split: str, classes: Sequence[str] | None = None) -> ImageCollection:
    """The labelled pictures of one split.

    data: a folder that holds SPLIT/CLASS/pictures at any depth; `wds/FOLDER` (a local folder of WebDataset shards whose
    names tell the split); `hfds/NAME` (Hugging Face data set, a hub name or a local folder); or `torch/NAME`
    (torchvision's cifar10, cifar100, mnist, fashion_mnist, ..., downloaded at first).
    split: `train`, `val`, or whatever the data set calls it; the usual synonyms are found. classes: those of the
    training split, which another split may not exceed.

    Raises UserError where there is nothing to read, fewer than two classes, or an unknown one.
    """
    prefix, _, name = str(data).partition("/")
    if prefix == "hfds":
        collection = _open_hugging_face(str(data), name, split)
    elif prefix == "torch":
        collection = _open_torchvision(str(data), split)
    elif prefix == "wds":
        collection = _open_shards(str(data), Path(name), split)
    elif prefix in ("hfids", "tfds"):
        raise UserError(f"{data} is a stream, whose order cannot be resumed: use a folder, wds/, hfds/ or torch/")
    else:
        collection = _open_folder(Path(data), split, classes)
    if len(collection.classes) < 2:
        found = f"only one class, '{collection.classes[0]}'" if collection.classes else "no classes"
        raise UserError(f"{collection.name} has {found}: classification needs two or more")
    unknown = sorted(set(collection.classes) - set(classes if classes is not None else collection.classes))
    if unknown:
        raise UserError(f"{collection.name} has the class '{unknown[0]}', which the training split lacks: remove it")
    return collection


class _FolderReader:
    """Picture files with a class each: reader[index] -> (binary file, class)."""

    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return Path(path).open("rb"), label

    def filename(self, index: int) -> str:
        return self.samples[index][0]


def _open_folder(folder: Path, split: str, classes: Sequence[str] | None) -> ImageCollection:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}: give a folder with train/CLASS/images and val/CLASS/images")
    found = next((folder / name for name in _called(split) if (folder / name).is_dir()), None)
    if found is None:
        raise UserError(f"{folder} has no folder {split}/: it must hold train/CLASS/images and val/CLASS/images")
    try:
        names = find_classes(found)[0]
    except FileNotFoundError as error:
        raise UserError(
            f"{found} has no class folders: put the images of each class into a folder of its own"
        ) from error
    if classes is not None and set(names) <= set(classes):
        names = list(classes)
    samples = make_dataset(
        str(found), {name: number for number, name in enumerate(names)}, extensions=EXTENSIONS, allow_empty=True
    )
    empty = sorted(set(range(len(names))) - {label for _, label in samples})
    if not samples:
        raise UserError(f"{found} holds no images: accepted are {' '.join(EXTENSIONS)}")
    if classes is None and empty:
        raise UserError(f"{found / names[empty[0]]} holds no images: fill the class folder or delete it")
    reader = _FolderReader(samples)
    return ImageCollection(str(found), reader, reader.filename, names)


class _ShardReader:
    """Pictures inside uncompressed tar files, found by the place of their bytes: reader[index] -> (file, class)."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = list(shards)
        found = [
            (number, *place) for number, shard in enumerate(shards) for place in _labelled_members(shard)
        ]  # arrays, since lists of millions would be copied by every loading process
        self._places = numpy.array(found, dtype=numpy.int64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        shard, offset, size, label = self._places[index].tolist()
        with self._shards[shard].open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), label

    @property
    def num_classes(self) -> int:
        return int(self._places[:, 3].max(initial=-1)) + 1

    def filename(self, index: int) -> str:
        shard, offset, *_ = self._places[index].tolist()
        with tarfile.open(self._shards[shard], "r:") as members:
            name = next(member.name for member in members if member.offset_data == offset)
        return f"{self._shards[shard]}/{name}"


def _labelled_members(shard: Path) -> Iterator[tuple[int, int, int]]:
    """Offset, size and class of each picture with a class in a shard: members KEY.jpg and KEY.cls."""
    pictures: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as members:
            for member in members:
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                key = f"{folder}/{stem}"
                if f".{kind.lower()}" in EXTENSIONS:
                    pictures[key] = (member.offset_data, member.size)
                elif kind == "cls":
                    labels[key] = int(cast(BinaryIO, members.extractfile(member)).read())
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"the shard {shard} cannot be read, write it again, uncompressed: {error}") from error
    for key, place in pictures.items():
        if labels.get(key, -1) >= 0:
            yield *place, labels[key]


def _open_shards(data: str, folder: Path, split: str) -> ImageCollection:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: write wds/FOLDER, of a local folder with shards *.tar")
    words = {shard: set(re.split("[^a-z]+", str(shard.relative_to(folder)).lower())) for shard in folder.rglob("*.tar")}
    matching = ([shard for shard in words if name.lower() in words[shard]] for name in _called(split))
    shards = next((sorted(found) for found in matching if found), [])
    if not shards:
        raise UserError(f"{folder} has no shards called {split}: name them like {split}-0000.tar")
    reader = _ShardReader(shards)
    if not len(reader):
        raise UserError(f"the shards of {data} ({split}) hold no images with a class: write KEY.jpg and KEY.cls")
    names = folder / _CLASS_NAMES_FILE
    classes = names.read_text().splitlines() if names.is_file() else [str(label) for label in range(reader.num_classes)]
    if reader.num_classes > len(classes):
        raise UserError(f"{names} names {len(classes)} classes, {data} ({split}) has more: add them, a line each")
    return ImageCollection(f"{data} ({split})", reader, reader.filename, classes)


def _open_hugging_face(data: str, name: str, split: str) -> ImageCollection:
    if find_spec("datasets") is None:
        raise UserError("reading Hugging Face data sets needs `datasets`: pip install 'convmae[hub]'")
    import datasets

    try:
        available = datasets.get_dataset_split_names(name)
        split = next((known for known in _called(split) if known in available), split)
        features = datasets.load_dataset_builder(name).info.features
        features = features or datasets.load_dataset(name, split=split).features  # local files tell theirs when read
        columns = {
            kind: [key for key, feature in features.items() if isinstance(feature, kind)]
            for kind in (datasets.Image, datasets.ClassLabel)
        }
        if not all(columns.values()):
            raise UserError(f"{data} has no column of images or none of classes: its columns are {', '.join(features)}")
        image, label = columns[datasets.Image][0], columns[datasets.ClassLabel][0]
        reader = create_reader(f"hfds/{name}", split=split, input_key=image, target_key=label)
    except UserError:
        raise
    except Exception as error:  # no such data set or split, no network: `datasets` has a type for each
        raise _unopened(data, split, error) from error
    return ImageCollection(f"{data} ({split})", reader, "row {}".format, features[label].names)


class _TorchvisionReader:
    """A torchvision data set, whose pictures are decoded already: reader[index] -> (binary file, class)."""

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
    try:
        dataset = create_dataset(data, root=str(root), split=split, download=True)
    except (AssertionError, OSError, RuntimeError) as error:  # unknown, no network, damaged download
        raise _unopened(data, split, error) from error
    classes = [str(name) for name in getattr(dataset, "classes", [])]
    return ImageCollection(f"{data} ({split})", _TorchvisionReader(dataset), "picture {}".format, classes)


def _unopened(data: str, split: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{data}, split {split}, cannot be opened, check both: {reason}")


def _called(split: str) -> tuple[str, ...]:
    """All names of a split, the given one first."""
    synonyms = next((names for names in _SYNONYMS if split in names), ())
    return (split, *(name for name in synonyms if name != split))
