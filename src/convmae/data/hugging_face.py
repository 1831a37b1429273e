"""Which columns of a Hugging Face data set hold images and classes, and how its rows are read."""

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from numpy import ndarray

from convmae.data.lists import LABEL_COLUMNS, class_names
from convmae.errors import UserError

_IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "png")  # where several columns hold bytes

_logger = logging.getLogger(__name__)


def split_names(name: str) -> list[str]:
    """The splits of a data set."""
    import datasets

    datasets.disable_progress_bars()
    return datasets.get_dataset_split_names(name)


def load(name: str, split: str, streamed: bool) -> Any:
    """The data set, with one line of ours in the place of progress bars where it may have to be downloaded."""
    import datasets

    if not streamed and not Path(name).exists():
        _logger.info("%s is downloaded and prepared where that has not been done before", name)
    datasets.disable_progress_bars()
    return datasets.load_dataset(name, split=split, streaming=streamed)


def image_column(data: str, features: Mapping[str, Any]) -> str:
    """The column of images: the first of that type, else the one that holds encoded files.

    Raises UserError where there is none, or where several hold files and none is called as images are.
    """
    import datasets

    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    files = [key for key, feature in features.items() if _holds_files(feature)]
    if not images and len(files) > 1:
        files = [key for key in files if key.lower() in _IMAGE_COLUMNS] or files
        if len(files) > 1:
            raise UserError(f"{data} has several columns of files, {', '.join(files)}: name that of the images 'image'")
    if not images and not files:
        raise UserError(f"{data} has no column of images: its columns are {', '.join(features) or 'unknown'}")
    return (images or files)[0]


def label_column(data: str, features: Mapping[str, Any]) -> str:
    """The column of classes: the first of that type, else one of text or whole numbers that is called as labels are.

    Raises UserError where there is none, or more than one.
    """
    import datasets

    classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if classes:
        return classes[0]
    plain = [key for key, feature in features.items() if _is_text_or_number(feature)]
    named = [key for key in plain if key.lower() in LABEL_COLUMNS]
    if len(named) != 1:
        what = f"several columns of classes, {', '.join(named)}" if named else "no column of classes"
        raise UserError(f"{data} has {what}: name that of the classes 'label'")
    return named[0]


def classes_and_labels(
    data: str, table: Any, column: str, classes: Sequence[str] | None
) -> tuple[list[str], ndarray | None]:
    """Names of the classes in a column, and the class of each row, int64 (N,), -1 for none.

    classes: those of the training split, whose numbers the rows take. The names of text and numbers are the values,
    sorted. Raises UserError where a row has no value.
    """
    feature = table.features[column]
    values = table.data.column(column).to_pylist()
    names = getattr(feature, "names", None)
    if names is not None:
        return list(names), numpy.array([-1 if value is None else value for value in values], dtype=numpy.int64)
    missing = sum(value is None or value == "" for value in values)
    if missing:
        first = next(row for row, value in enumerate(values) if value is None or value == "")
        raise UserError(f"{data}: {missing} of {len(values)} rows have no '{column}', the first is row {first}: add it")
    texts = [str(value) for value in values]
    own = class_names(texts)
    names = list(classes) if classes is not None and set(own) <= set(classes) else own
    numbers = {name: number for number, name in enumerate(names)}
    return names, numpy.array([numbers[text] for text in texts], dtype=numpy.int64)


class HuggingFaceReader:
    """The rows of a column of images: reader[index] -> (binary file, None)."""

    def __init__(self, table: Any, column: str) -> None:
        import datasets

        self._column = column
        self._images = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[BinaryIO, None]:
        encoded = self._images[index][self._column]
        if encoded is None:
            raise ValueError("the row has no image")
        if encoded["bytes"] is not None:
            return io.BytesIO(encoded["bytes"]), None
        return Path(encoded["path"]).open("rb"), None


def _holds_files(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _is_text_or_number(feature: Any) -> bool:
    kind = str(getattr(feature, "dtype", ""))
    return kind in ("string", "large_string", "bool") or kind.lstrip("u").startswith("int")
