"""Lists of images: text files with a path a line, and tables with a column of paths, and of classes if there are any.

Paths are relative to the folder of the list. All of them must exist.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
from numpy import ndarray

from convmae.errors import UserError

SUFFIXES = (".txt", ".csv", ".tsv")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path")
LABEL_COLUMNS = (
    *("label", "labels", "class", "classes", "category", "categories", "tag", "tags", "target"),
    *("class_name", "label_name", "fine_label"),
)
_SPLIT_COLUMNS = ("split", "subset", "fold")
_SEPARATORS = ("|", ";")  # of the classes of an image


class Table(NamedTuple):
    """A table of images as it stands in its file."""

    file: Path
    paths: list[str]
    columns: dict[str, list[str]]
    """All other columns by their names."""
    lines: list[int]
    """Of the rows in the file, from 1 on."""

    def column(self, names: Sequence[str]) -> str | None:
        """The name of the only column that is called so, whatever its case; raises UserError where several are."""
        found = [name for name in self.columns if name.lower() in names]
        if len(found) > 1:
            raise UserError(
                f"{self.file} has the columns {' and '.join(found)}, which mean the same: leave one of them"
            )
        return found[0] if found else None

    @property
    def splits(self) -> list[str] | None:
        """The split of each image; None where the table does not tell."""
        name = self.column(_SPLIT_COLUMNS)
        return None if name is None else [value.lower() for value in self.columns[name]]


class Labels(NamedTuple):
    """The classes of the images of a table."""

    classes: list[str]
    labels: ndarray
    """Numbers of classes, int64 (N,); where images are of several, whether they are of a class, bool (N, classes)."""
    unused: list[str]
    """Columns that say nothing of classes."""


def is_list(path: Path) -> bool:
    """Whether a path is a file that by its name lists images."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def read_list(file: Path) -> list[str]:
    """The paths of the images that a text file or a table lists, in its order.

    Raises UserError for a file that lists none, and where one that is listed does not exist.
    """
    if file.suffix.lower() != ".txt":
        return read_table(file).paths
    lines = [(number, line.strip()) for number, line in enumerate(_text(file).splitlines(), start=1)]
    listed = [(number, line) for number, line in lines if line]
    return _existing(file, [line for _, line in listed], [number for number, _ in listed])


def read_table(file: Path) -> Table:
    """The images that a table lists: comma, semicolon or tab between its columns, whose names are the first line.

    Raises UserError without a column of paths, for rows of another length, and where an image does not exist.
    """
    text = _text(file)
    first = text.partition("\n")[0]
    header: list[str] = []
    for delimiter in (",", ";", "\t"):
        header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        if any(name.lower() in PATH_COLUMNS for name in header):
            break
    else:
        raise UserError(f"{file} has no column of paths: name one 'path' in its first line, which is {first[:80]!r}")
    if len(set(header)) < len(header):
        raise UserError(f"{file} names a column twice, in its first line: {first[:80]}")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    next(reader)
    rows, lines = [], []
    for row in reader:
        if not any(map(str.strip, row)):
            continue
        if len(row) != len(header):
            raise UserError(f"{file} has {len(row)} columns in line {reader.line_num}, not {len(header)}: correct it")
        rows.append([value.strip() for value in row])
        lines.append(reader.line_num)
    columns = {name: [row[place] for row in rows] for place, name in enumerate(header)}
    table = Table(file, [], columns, lines)
    name = table.column(PATH_COLUMNS)
    assert name is not None
    paths = _existing(file, columns.pop(name), lines)
    return Table(file, paths, columns, lines)


def read_labels(table: Table, classes: Sequence[str] | None = None, multi_label: bool = False) -> Labels:
    """The classes of the images: of a column of labels, or of a column for each class that holds 0 or 1.

    Several labels of an image stand in a column with | or ; between them. classes: those of the training split, whose
    numbers are taken; multi_label: whether its images are of several classes. Raises UserError where an image has no
    label, and names the line.
    """
    column = table.column(LABEL_COLUMNS)
    split = table.column(_SPLIT_COLUMNS)
    others = [name for name in table.columns if name not in (column, split)]
    if column is None:
        return _indicators(table, others, classes)
    values = table.columns[column]
    used = [separator for separator in _SEPARATORS if any(separator in value for value in values)]
    if len(used) > 1:
        raise UserError(f"{table.file} separates labels by | and by ;: use one of them")
    if used or multi_label:
        separator = used[0] if used else _SEPARATORS[0]
        several = [[name.strip() for name in value.split(separator) if name.strip()] for value in values]
        names = _known(class_names([name for one in several for name in one]), classes)
        numbers = {name: number for number, name in enumerate(names)}
        indicators = numpy.zeros((len(several), len(names)), dtype=bool)
        for row, one in enumerate(several):
            indicators[row, [numbers[name] for name in one]] = True
        return Labels(names, indicators, others)
    missing = [line for line, value in zip(table.lines, values, strict=True) if not value]
    if missing:
        raise UserError(
            f"{table.file} has no {column} in {len(missing)} of {len(values)} rows, the first is line {missing[0]}: "
            "add it, or delete them"
        )
    names = _known(class_names(values), classes)
    numbers = {name: number for number, name in enumerate(names)}
    return Labels(names, numpy.array([numbers[value] for value in values], dtype=numpy.int64), others)


def class_names(labels: Sequence[str]) -> list[str]:
    """The different labels, sorted: as numbers where all of them are."""
    different = set(labels)
    try:
        return sorted(different, key=lambda label: (float(label), label))
    except ValueError:
        return sorted(different)


def repeated(paths: Sequence[str]) -> list[str]:
    """The paths that stand more than once in a list."""
    return [path for path, count in Counter(paths).items() if count > 1]


def _known(own: list[str], classes: Sequence[str] | None) -> list[str]:
    return list(classes) if classes is not None and set(own) <= set(classes) else own


def _indicators(table: Table, names: list[str], classes: Sequence[str] | None) -> Labels:
    if not names:
        raise UserError(
            f"{table.file} has no column of classes: add one called 'label', or one of 0 and 1 for each class"
        )
    for name in names:
        for line, value in zip(table.lines, table.columns[name], strict=True):
            if value not in ("0", "1", "0.0", "1.0"):
                raise UserError(
                    f"{table.file} holds {value!r} for '{name}' in line {line}: without a column 'label', all others "
                    "are classes and hold 0 or 1"
                )
    ordered = list(classes) if classes is not None and set(names) == set(classes) else names
    indicators = numpy.array([[float(value) == 1 for value in table.columns[name]] for name in ordered]).T
    return Labels(ordered, indicators.reshape(len(table.paths), len(ordered)), [])


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not in UTF-8: save it in that encoding") from error


def _existing(file: Path, names: Sequence[str], lines: Sequence[int]) -> list[str]:
    """The paths of these names. Raises UserError where one is no file, or where there is none."""
    if not names:
        raise UserError(f"{file} lists no image: write a path a line, or give a folder with images")
    paths = []
    missing = []
    for name, line in zip(names, lines, strict=True):
        path = file.parent / name
        if not path.is_file() and "\\" in name and (other := file.parent / name.replace("\\", "/")).is_file():
            path = other
        elif not path.is_file():
            missing.append((line, name))
        paths.append(str(path))
    if missing:
        are = "does" if len(missing) == 1 else "do"
        line, name = missing[0]
        raise UserError(
            f"{len(missing)} of the {len(names)} images listed in {file} {are} not exist, the first is {name!r} in "
            f"line {line}: paths are relative to the folder of the list"
        )
    return paths
