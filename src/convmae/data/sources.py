"""Where images come from: folders, lists, shards, the Hugging Face hub or the demo; with classes, see `labelled`.

A source hands out encoded images: by index (ImageCollection), or one after the other (ImageStream). timm's
readers find them; nothing is decoded here.
"""

import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy
import torch
from numpy import ndarray
from timm.data.readers import create_reader

from convmae.data import hugging_face
from convmae.data.demo import DemoReader
from convmae.data.folders import EXTENSIONS, FolderImages, counted, image_files, listed
from convmae.data.lists import is_list, read_list, repeated
from convmae.data.shards import count_images, is_local, read_shards
from convmae.errors import UserError, check_installed
from convmae.findings import Finding
from convmae.seeds import mixed_seed

_PREFIXES = ("wds/", "hfds/", "hfids/", "tfds/", "torch/")


class ImageCollection:
    """Encoded images that are opened by index; `classes` names their classes, where they have any."""

    def __init__(
        self,
        name: str,
        reader: Any,
        image_name: Callable[[int], str],
        classes: Sequence[str] = (),
        labels: ndarray | None = None,
    ) -> None:
        """labels: of all images, where they are known before these are opened, see `labels`; else the reader tells."""
        self.name, self.image_name, self.classes, self._reader = name, image_name, list(classes), reader
        self.findings: list[Finding] = []
        """What its owner should know of it."""
        self.labels = labels
        """Numbers of classes, int64 (N,), or whether an image is of a class, bool (N, classes); None: unknown yet."""

    @property
    def multi_label(self) -> bool:
        """Whether an image may be of several classes, or of none."""
        return self.labels is not None and self.labels.ndim == 2

    def select(self, name: str, indices: Sequence[int]) -> "ImageCollection":
        """The images of these numbers, which are called as they are here."""
        part = _Part(self._reader, self.image_name, indices)
        labels = None if self.labels is None else self.labels[part.indices]
        return ImageCollection(name, part, part.image_name, self.classes, labels)

    def size_of(self, index: int) -> int | None:
        """Bytes of the encoded image number `index`; None where that is unknown before it is read."""
        size = getattr(self._reader, "size_of", None)
        return None if size is None else size(index)

    def __len__(self) -> int:
        return len(self._reader)

    def evenly_spread(self, most: int) -> list[int]:
        """Numbers of at most so many images, evenly spread over all, rising."""
        count = min(most, len(self))
        return [number * len(self) // count for number in range(count)]

    def open(self, index: int) -> BinaryIO:
        """The encoded image number `index`, 0 <= index < len(self); the caller closes it."""
        return self._reader[index][0]

    def open_annotated(self, index: int) -> tuple[BinaryIO, Any]:
        """The encoded image number `index` and its annotation: the number of its class, None where it has no class.

        Where images are of several classes, 1.0 for each of them and 0.0 for the others, float32 (classes,). The caller
        closes the file. Subclasses have annotations of their own.
        """
        file, label = self._reader[index]
        if self.labels is not None:
            label = self.labels[index]
        if self.multi_label:
            return file, torch.from_numpy(label.astype(numpy.float32))
        return file, int(label) if self.classes and label is not None else None


class _Part:
    """Some of the images of a reader, and what they are called."""

    def __init__(self, reader: Any, image_name: Callable[[int], str], indices: Sequence[int]) -> None:
        self.indices = numpy.array(indices, dtype=numpy.int64)
        self._reader, self._image_name = reader, image_name

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self._reader[int(self.indices[index])]

    def image_name(self, index: int) -> str:
        return self._image_name(int(self.indices[index]))

    def size_of(self, index: int) -> int | None:
        size = getattr(self._reader, "size_of", None)
        return None if size is None else size(int(self.indices[index]))


class StreamedImage(NamedTuple):
    """An encoded image that a stream has just read."""

    name: Callable[[], str]
    """Finds out what it is called."""
    open_annotated: Callable[[], tuple[BinaryIO, Any]]
    """Opens the file, which the caller closes, and tells the number of its class, None where it has no class."""


class ImageStream:
    """Encoded images one after the other, this rank's and worker's share of the shards.

    `classes` names their classes, where they have any. Streams made for training are shuffled.
    """

    multi_label = False  # images of a stream are of one class

    def __init__(self, name: str, reader: Any, num_shards: int, classes: Sequence[str] = ()) -> None:
        self.name, self.num_shards, self.reader, self.classes = name, num_shards, reader, list(classes)
        self.findings: list[Finding] = []
        """What its owner should know of it."""

    def configure(self, batch_size: int, num_workers: int, num_replicas: int, rank: int, seed: int) -> None:
        """Tell timm's reader which share to read, and in which order; to be called before the first iteration."""
        self.reader.batch_size, self.reader.common_seed = batch_size, seed
        self.reader.dist_num_replicas, self.reader.dist_rank = num_replicas, rank
        self.reader.set_loader_cfg(num_workers=max(1, num_workers))

    def __len__(self) -> int:
        """Samples an epoch on this rank, rounded up to whole batches in every worker."""
        return len(self.reader)

    def __iter__(self) -> Iterator[StreamedImage]:
        """Yields each image of one epoch; raises UserError where the stream breaks."""
        try:
            if self.reader.ds is None:
                self._start()
            images = iter(self.reader)
            while (found := next(images, None)) is not None:
                yield self._named(*found)
        except UserError:
            raise
        except Exception as error:  # of files and networks, through several libraries
            raise UserError(f"{self.name} cannot be read any further: {_reason(error)}") from error

    def repeated(self) -> Iterator[StreamedImage]:
        """Yields images without end, epoch after epoch; raises UserError where the stream breaks or is empty."""
        while True:
            empty = True
            for image in self:
                empty = False
                yield image
            if empty:
                raise UserError(f"{self.name}: a worker has no shard to read: use fewer processes or more shards")

    def _start(self) -> None:
        raise NotImplementedError

    def _named(self, encoded: Any, key: Any) -> StreamedImage:
        raise NotImplementedError


class _ShardStream(ImageStream):
    """WebDataset shards."""

    def _start(self) -> None:
        from timm.data.readers import reader_wds

        # timm's last four stages group members as WebDataset does, shuffle by the worker's start-up seed, decode, and
        # insist on a label. Here the order follows (seed, epoch, worker), and the bytes and names pass through.
        self.reader._lazy_init()
        self.reader.ds.pipeline[-4:] = [
            read_shards,
            reader_wds.detshuffle2(
                self.reader.sample_shuffle_size,
                self.reader.sample_initial_size,
                seed=mixed_seed(self.reader.common_seed, self.reader.global_worker_id),
                epoch=self.reader.epoch_count,
            ),
        ]

    def _named(self, encoded: bytes | OSError, key: str) -> StreamedImage:
        def open_annotated() -> tuple[BinaryIO, None]:
            if isinstance(encoded, OSError):
                raise encoded
            return io.BytesIO(encoded), None

        return StreamedImage(lambda: key, open_annotated)


class _HuggingFaceStream(ImageStream):
    """A Hugging Face data set, streamed; the reader's target is the class, where there are classes."""

    def _start(self) -> None:
        import datasets

        # Otherwise the reader decodes, and one damaged image ends the stream.
        self.reader._lazy_init()
        self.reader.ds = self.reader.ds.cast_column(self.reader.input_key, datasets.Image(decode=False))

    def _named(self, encoded: dict[str, Any] | None, key: Any) -> StreamedImage:
        data, path = (encoded["bytes"], encoded["path"]) if encoded else (b"", None)

        def name() -> str:
            if path and "/" in path:
                return path
            # Its place in the stream is another in every epoch.
            return f"{self.name}, {path or f'image with the checksum {zlib.crc32(data):08x}'}"

        def open_annotated() -> tuple[BinaryIO, int | None]:
            if encoded is None:
                raise ValueError("the row has no image")
            file = fsspec.open(path, "rb").open() if data is None else io.BytesIO(data)
            return file, key if self.classes else None

        return StreamedImage(name, open_annotated)


def open_images(data: str | Path | Sequence[str | Path], split: str = "train") -> ImageCollection | ImageStream:
    """Find the images that `data` names, without their classes.

    data: a folder with images at any depth; a list of images, .txt, .csv or .tsv, see `lists`; several of these, in a
    sequence or with commas between them; `wds/FOLDER/shards-{0000..0003}.tar` (WebDataset; `|N` appended
    gives the number of images, otherwise local shards are counted); `hfds/NAME` (Hugging Face data set, a
    hub name or a local folder); `hfids/NAME` (the same, streamed; `|N` where their number is unknown); or
    `demo`. split: of a Hugging Face data set; elsewhere unused. Raises UserError where there is nothing to
    read.
    """
    parts = several(data)
    if len(parts) > 1:
        return _open_several(parts)
    data = parts[0]
    prefix, _, rest = data.partition("/")
    if data == "demo":
        reader = DemoReader()
        return ImageCollection("demo", reader, reader.filename)
    if prefix == "wds":
        return _open_shards(data, rest)
    if prefix in ("hfds", "hfids"):
        return _open_hugging_face(data, prefix, rest, split)
    if is_list(Path(data)):
        return _open_list(Path(data))
    return _open_folder(Path(data))


def several(data: str | Path | Sequence[str | Path]) -> list[str]:
    """The places that `data` names: a sequence of them, or folders and files with commas between them."""
    if not isinstance(data, str | Path):
        parts = [str(part) for part in data]
    elif "," in str(data) and not str(data).startswith(_PREFIXES) and not Path(data).exists():
        parts = [part.strip() for part in str(data).split(",") if part.strip()]
    else:
        parts = [str(data)]
    if not parts:
        raise UserError("no data are given: name a folder with images")
    return parts


def _open_several(parts: Sequence[str]) -> ImageCollection:
    paths: list[str] = []
    findings: list[Finding] = []
    for part in parts:
        if part == "demo" or part.startswith(_PREFIXES):
            raise UserError(f"{part} cannot be joined with other data: give folders and lists of images")
        source = _open_list(Path(part)) if is_list(Path(part)) else _open_folder(Path(part))
        names = [source.image_name(index) for index in range(len(source))]
        paths += names if is_list(Path(part)) else [os.path.join(part, name) for name in names]  # noqa: PTH118
        findings += [Finding(f"{part}: {finding.summary}", finding.items) for finding in source.findings]
    source = open_files(", ".join(parts), paths)
    source.findings = [*findings, *_repeated(paths)]
    return source


def _open_list(file: Path) -> ImageCollection:
    paths = read_list(file)
    source = open_files(str(file), paths)
    source.findings = _repeated(paths)
    return source


def _repeated(paths: Sequence[str]) -> list[Finding]:
    found = repeated([os.path.normpath(path) for path in paths])
    text = (
        f"{counted(len(found), 'image')} {'is' if len(found) == 1 else 'are'} named more than once, and read as often"
    )
    return [listed(f"{text}, such as {found[0]}", found)] if found else []


class FileReader:
    """Image files: reader[index] -> (binary file, label 0)."""

    def __init__(self, paths: Sequence[str], folder: str | Path = "") -> None:
        """folder: the one in which the paths are, where they are not whole."""
        self._paths, self._folder = list(paths), Path(folder)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return (self._folder / self._paths[index]).open("rb"), 0

    def size_of(self, index: int) -> int | None:
        """Bytes of a file; None where it cannot be opened."""
        try:
            return (self._folder / self._paths[index]).stat().st_size
        except OSError:
            return None


def open_files(name: str, paths: Sequence[str]) -> ImageCollection:
    """Image files in the given order, each called by its path. They are opened when they are read."""
    return ImageCollection(name, FileReader(paths), list(paths).__getitem__)


def found_part(folder: str, data: Path | None, usual: str, given: Path | None, flag: str) -> Path:
    """A part of a data set: `given`, or else the `usual` one in `data`.

    folder: what messages call the folder of such a data set; flag: the command's name of `given`. Raises UserError
    where the part does not exist.
    """
    if given is None and data is None:
        raise UserError(f"there is no {usual} without {folder}: give it as --data, or another path with {flag}")
    path = Path(data or "", usual) if given is None else Path(given)  # Python callers may pass a string
    if not path.exists():
        cure = f"check {flag}" if given else f"give {folder} as --data, or another path with {flag}"
        raise UserError(f"{path} does not exist: {cure}")
    return path


def _open_folder(folder: Path) -> ImageCollection:
    if not folder.exists():
        raise UserError(f"{folder} does not exist: give a folder with images, or `demo`")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give the folder that holds the images")
    if not any(folder.iterdir()):
        raise UserError(f"{folder} is empty: put images into it")
    found = image_files(folder)
    if not found.paths:
        raise no_images(folder, found)
    reader = FileReader(found.paths, folder)
    source = ImageCollection(str(folder), reader, found.paths.__getitem__)
    source.findings = found.findings
    return source


def no_images(folder: Path, found: FolderImages) -> UserError:
    """What is wrong with a folder without an image, and what it holds instead."""
    instead = f"; it holds {found.others}" if found.others else ""
    left_out = f"; {found.findings[0].summary}" if found.findings else ""
    return UserError(f"{folder} holds no images: accepted are {' '.join(EXTENSIONS)}{instead}{left_out}")


def _open_shards(data: str, location: str) -> ImageStream:
    check_installed("shards", "reading shards needs WebDataset", "webdataset")
    location, num_samples = parse_location(data, location)
    folder, _, pattern = location.rpartition("/")
    if not pattern.endswith((".tar", ".tar.gz", ".tgz")):
        raise UserError(f"{data} names no shards: write wds/FOLDER/shards-{{0000..0003}}.tar")
    from timm.data.readers import reader_wds

    shards = [f"{folder}/{name}" if folder else name for name in reader_wds.expand_urls(pattern)]
    local = is_local(location)
    missing = [shard for shard in shards if local and not Path(shard).is_file()]
    if len(missing) == len(shards):
        raise UserError(f"{data} matches no shard: there is no {missing[0]}; check the folder and {{first..last}}")
    if missing:
        raise UserError(f"the shard {missing[0]} does not exist: check {{first..last}} in {data}")
    if not local and num_samples is None:
        raise UserError(f"remote shards cannot be counted: append the number of images, {data}|N")
    findings: list[Finding] = []
    if num_samples is None:
        num_samples, findings = count_images(shards)
    if not num_samples:
        raise UserError(f"the shards of {data} hold no images: accepted are {' '.join(EXTENSIONS)}")
    # timm knows shards by ".tar" in the pattern.
    reader = create_reader("wds/", root=folder, split=".tar", is_training=True, num_samples=num_samples)
    reader.split_info.filenames = tuple(reader_wds.expand_urls(pattern))
    stream = _ShardStream(data, reader, len(shards))
    stream.findings = findings
    return stream


def _open_hugging_face(data: str, prefix: str, location: str, split: str) -> ImageCollection | ImageStream:
    check_installed("hub", "reading Hugging Face data sets needs `datasets`", "datasets")
    name, num_samples = parse_location(data, location)
    with opening(data, split):
        table = hugging_face.load(name, split, streamed=prefix == "hfids")
        column = hugging_face.image_column(data, table.features or {})
        # timm requires a label column; naming the images' own column as the label makes do without.
        if prefix == "hfids":
            return stream_hugging_face(data, name, split, column, column, num_samples)
        reader = hugging_face.HuggingFaceReader(table, column)
    return ImageCollection(data, reader, "row {}".format)


def stream_hugging_face(
    data: str,
    name: str,
    split: str,
    column: str,
    target: str,
    num_samples: int | None,
    classes: Sequence[str] = (),
    shuffled: bool = True,
) -> ImageStream:
    """A stream of the images in one column of a Hugging Face data set, and of their classes in another.

    data: what the user calls it, for messages; name: the hub's name or a local folder; target: the column of classes,
    whose names `classes` are. num_samples: how many images there are, where the data set does not tell. Raises
    UserError where a shuffled stream does not know, and whatever `datasets` raises.
    """
    if num_samples is None and not shuffled:
        num_samples = 1  # timm's reader asks for it and does not use it
    try:
        reader = create_reader(
            f"hfids/{name}",
            split=split,
            input_key=column,
            target_key=target,
            input_img_mode="",
            is_training=shuffled,
            num_samples=num_samples,
        )
    except ValueError as error:
        if "num_samples" in str(error):
            raise UserError(f"the length of {data} is unknown: append it, {data}|N") from error
        raise
    return _HuggingFaceStream(data, reader, reader.builder.as_streaming_dataset(split=split).num_shards, classes)


def parse_location(data: str, location: str) -> tuple[str, int | None]:
    """`LOCATION|N` -> (LOCATION, N), where `|N` may lack; raises UserError without a location or a positive N."""
    location, separator, count = location.partition("|")
    if not location:
        raise UserError(f"{data} names no data: add a name or a folder, {str(data).partition('/')[0]}/NAME")
    if separator and not (count.isdecimal() and int(count)):
        raise UserError(f"{data}: after | comes the number of images, not {count!r}")
    return location, int(count) if separator else None


@contextmanager
def opening(data: str, split: str) -> Iterator[None]:
    """Turn what a library raises inside, a type of its own for each mistake, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"{data} needs a package that is not installed: pip install {error.name}") from error
    except Exception as error:
        raise UserError(f"{data}, split {split}, cannot be opened, check both: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What a library says went wrong, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
