"""Files of features, Parquet or safetensors: written in parts that outlive a killed run, joined at the end, read back.

A part is a file that begins at a known image and says at which the next part begins, so that following the parts from
image 0 finds where a run stood. N images, (...) the shape of one image's features.
"""

import json
import math
import shutil
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from convmae.errors import UserError, check_installed
from convmae.training.checkpoint import replace_file

SUFFIXES = (".parquet", ".safetensors")

_RUN_FILE = "run.json"
_PART_SECONDS = 10.0  # a killed run loses at most so much
_PART_BYTES = 64 * 2**20  # of features in a part, and in a row group of Parquet
_LONGEST_HEADER = 10**8  # bytes of JSON that safetensors reads


@dataclass(frozen=True)
class Features:
    """What a file holds: features (N, ...) float32, the path of each image, and facts about how they were computed."""

    features: Tensor
    paths: list[str]
    facts: dict[str, str]


class _Part(NamedTuple):
    """Features (n, ...) of images number `indices` (n,)."""

    features: Tensor
    indices: Tensor


class FeatureParts:
    """The parts of one run, in `folder`; `position` is the first image that is in none of them.

    run: what identifies the run, plain values. Raises UserError where the folder holds another run's parts.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self._folder = folder
        self.position = 0
        self.damaged: list[str] = []
        """Name and reason of the damaged images that the parts left out, as this object found them."""
        self._begin(dict(run))
        while (path := self._path(self.position)).exists():
            with safe_open(path, framework="pt") as part:
                facts = part.metadata()
            self.damaged += json.loads(facts["damaged"])
            self.position = int(facts["position"])
        self._waiting: list[_Part] = []
        self._waiting_damaged: list[str] = []
        self._waiting_position, self._last_write = self.position, time.monotonic()

    def add(self, features: Tensor, indices: Tensor, position: int, damaged: Sequence[str]) -> None:
        """Add features (n, ...) of images `indices` (n,) up to image number `position`, and what was damaged there."""
        self._waiting.append(_Part(features, indices))
        self._waiting_position = position
        self._waiting_damaged += damaged
        size = sum(part.features.nbytes for part in self._waiting)
        if size >= _PART_BYTES or time.monotonic() - self._last_write >= _PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the features that were added since the last part as a part of their own."""
        if not self._waiting:
            return
        tensors = {name: torch.cat([getattr(part, name) for part in self._waiting]) for name in _Part._fields}
        facts = {"position": str(self._waiting_position), "damaged": json.dumps(self._waiting_damaged)}
        replace_file(self._path(self.position), lambda path: save_file(tensors, path, metadata=facts))
        self.position = self._waiting_position
        self._waiting, self._waiting_damaged, self._last_write = [], [], time.monotonic()

    def join(self, output: Path, names: Sequence[str], facts: Mapping[str, str]) -> tuple[int, ...]:
        """Write all parts to `output` in one move, remove them, and return the shape (N, ...).

        names: path of every image by its number. facts: go into the file. Raises UserError if there are no features.
        """
        paths: list[str] = []
        shape: list[int] = []
        for part in self._open_parts():
            shape = part.get_slice("features").get_shape()[1:]
            paths += [names[index] for index in part.get_tensor("indices").tolist()]
        if not paths:
            shutil.rmtree(self._folder)
            raise UserError("none of the images can be decoded: check the files")
        write = _write_parquet if output.suffix.lower() == ".parquet" else _write_safetensors
        features = (part.get_tensor("features") for part in self._open_parts())
        replace_file(output, lambda path: write(path, features, shape, paths, facts))
        shutil.rmtree(self._folder)
        return (len(paths), *shape)

    def _begin(self, run: dict[str, Any]) -> None:
        path = self._folder / _RUN_FILE
        if not path.exists() or not self._path(0).exists():  # nothing computed yet that could be lost
            replace_file(path, lambda temporary: _write_json(temporary, run))
            return
        other = json.loads(path.read_text())
        different = [name for name in run if other.get(name) != run[name]]
        if different:
            raise UserError(
                f"{self._folder} holds the parts of an unfinished run with other {', '.join(different)}: delete that "
                "folder, or choose another --output"
            )

    def _path(self, first: int) -> Path:
        return self._folder / f"part-{first:09d}.safetensors"

    def _open_parts(self) -> Iterator[Any]:
        position = 0
        while position < self.position:
            with safe_open(self._path(position), framework="pt") as part:
                position = int(part.metadata()["position"])
                yield part


def check_names(output: Path, names: Sequence[str]) -> None:
    """Raise UserError if the file could not hold the names of so many images, or lacks the package that writes it."""
    if output.suffix.lower() == ".parquet":
        _need_pyarrow()
        return
    longest = len(json.dumps(json.dumps(list(names), ensure_ascii=False), ensure_ascii=False).encode())
    if longest > _LONGEST_HEADER - 10_000:
        raise UserError(f"safetensors cannot hold the paths of {len(names)} images: choose a name ending in .parquet")


def read_features(path: Path) -> Features:
    """Read a file that `FeatureParts.join` wrote, whole. Raises UserError for any other file."""
    path = Path(path)
    if path.suffix.lower() == ".parquet":
        _need_pyarrow()
    read = _read_parquet if path.suffix.lower() == ".parquet" else _read_safetensors
    try:
        return read(path)
    except (KeyError, ValueError, SafetensorError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"{path} holds no features: give a file that convmae embed wrote") from error


def _need_pyarrow() -> None:
    check_installed("parquet", "Parquet needs pyarrow (names ending in .safetensors do not)", "pyarrow")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


def _write_safetensors(
    path: Path, features: Iterable[Tensor], shape: Sequence[int], paths: Sequence[str], facts: Mapping[str, str]
) -> None:
    # By hand, since the library wants the whole tensor in memory: length of the header, JSON header, bytes.
    header = {
        "__metadata__": {**facts, "paths": json.dumps(paths, ensure_ascii=False)},
        "features": {
            "dtype": "F32",
            "shape": [len(paths), *shape],
            "data_offsets": [0, 4 * len(paths) * math.prod(shape)],
        },
    }
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # which aligns the numbers
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for part in features:
            part.numpy().tofile(file)


def _read_safetensors(path: Path) -> Features:
    with safe_open(path, framework="pt") as file:
        facts = dict(file.metadata() or {})
        return Features(file.get_tensor("features"), json.loads(facts.pop("paths")), facts)


def _write_parquet(
    path: Path, features: Iterable[Tensor], shape: Sequence[int], paths: Sequence[str], facts: Mapping[str, str]
) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    # Pooled features are a list that every reader knows, maps a tensor that Arrow's readers give its shape back.
    number, pooled = pyarrow.float32(), len(shape) == 1
    kind = pyarrow.list_(number, shape[0]) if pooled else pyarrow.fixed_shape_tensor(number, shape)
    schema = pyarrow.schema({"path": pyarrow.string(), "features": kind}, metadata=facts)
    written = 0
    with ParquetWriter(path, schema, use_dictionary=False) as writer:
        for group in _regrouped(features, max(1, _PART_BYTES // (4 * math.prod(shape)))):
            numbers = pyarrow.array(group.flatten().numpy())
            column = pyarrow.FixedSizeListArray.from_arrays(numbers, math.prod(shape))
            if not pooled:
                column = pyarrow.ExtensionArray.from_storage(kind, column)
            names = pyarrow.array(paths[written : written + len(group)], pyarrow.string())
            writer.write_batch(pyarrow.record_batch([names, column], schema=schema))
            written += len(group)


def _regrouped(features: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """The rows of all parts in groups of `rows`, but for the last one, wherever the parts began."""
    waiting: Tensor | None = None
    for part in features:
        waiting = part if waiting is None else torch.cat([waiting, part])
        while len(waiting) >= rows:
            yield waiting[:rows]
            waiting = waiting[rows:]
    if waiting is not None and len(waiting):
        yield waiting


def _read_parquet(path: Path) -> Features:
    from pyarrow import FixedShapeTensorType
    from pyarrow.parquet import read_table
    from pyarrow.types import is_fixed_size_list

    table = read_table(path)
    column = table["features"].combine_chunks()
    tensor_type = column.type if isinstance(column.type, FixedShapeTensorType) else None
    storage = column.storage if tensor_type else column
    if not tensor_type and not is_fixed_size_list(column.type):
        raise ValueError("a column of lists of any length")
    shape = tensor_type.shape if tensor_type else [column.type.list_size]
    features = torch.from_numpy(storage.flatten().to_numpy().copy()).view(len(column), *shape)
    facts = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return Features(features, table["path"].to_pylist(), facts)
