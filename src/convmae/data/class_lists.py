"""The files in which tools list classes: names, often with numbers or colours, in text, CSV, YAML or JSON.

A list is read whole or refused: a heading, a comment or a number taken for a name would shift all classes by one.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from convmae.errors import UserError
from convmae.findings import Finding
from convmae.labels import IGNORED

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255 each."""

_NAME_HEADINGS = ("name", "names", "class", "classes", "class name", "label", "labels", "label name", "category")
_NUMBER_HEADINGS = ("id", "index", "idx", "number", "value", "pixel value", "class id", "label id", "category id")
_COLOUR_HEADINGS = ("color", "colour", "rgb", "color rgb", "colour rgb")
_CHANNEL_HEADINGS = (("r", "red"), ("g", "green"), ("b", "blue"))
_LISTS = ("names", "classes", "labels", "categories")  # keys under which YAML and JSON files have them
_NAME_KEYS = ("name", "label", "title")
_NUMBER_KEYS = ("id", "index", "value")
_COLOUR_KEYS = ("color", "colour", "rgb")

_NO_CLASS = "__ignore__"  # LabelMe's first line, of the number -1

_SEPARATOR = r"\s*[\s,;:=]\s*"
_NUMBER, _COLOUR = r"(?P<number>\d+)", _SEPARATOR.join(rf"(?P<{channel}>\d+)" for channel in "rgb")
_NAME = r"(?P<name>\S|\S.*\S)"
# A line of names with numbers or colours; that form is taken which all lines have.
_LINES = [
    re.compile(form)
    for form in (
        rf"(?P<name>[^:]+):(?:{_COLOUR})?:[^:]*:[^:]*",  # CVAT's label:color_rgb:parts:actions
        rf"{_NUMBER}{_SEPARATOR}(?P<name>\D|\D.*?){_SEPARATOR}{_COLOUR}",
        rf"{_NUMBER}{_SEPARATOR}{_COLOUR}{_SEPARATOR}(?P<name>\D.*)",
        rf"{_COLOUR}{_SEPARATOR}(?P<name>\D.*)",
        rf"(?P<name>\D|\D.*?){_SEPARATOR}{_COLOUR}",
        rf"{_NUMBER}{_SEPARATOR}{_NAME}",
        rf"(?P<name>\D|\D.*?)\s*[,;:=\t]\s*{_NUMBER}",
    )
]
_NUMBERED = _LINES[5]


class ClassList(NamedTuple):
    """The classes of a file, in the order of their labels."""

    names: list[str]
    numbers: list[int] | None = None
    """The label of each, where the file gives others than 0, 1, 2 and so on."""
    colours: list[Colour] | None = None
    """The colour of each, where the file gives one to all."""
    findings: Sequence[Finding] = ()


class ClassRow(NamedTuple):
    """What a file says of a class, and where."""

    place: str
    name: str
    number: int | None = None
    colour: Colour | None = None


def read_class_list(path: Path, flag: str = "--classes") -> ClassList:
    """The classes of a text, CSV, YAML or JSON file.

    Text is a name a line, with or without a number or a colour before or after it, or CVAT's labelmap.txt; lines that
    begin with # are comments. CSV has a heading, or rows of which one column is no number. YAML and JSON hold a list,
    or a mapping from number to name or back, by itself or under `names`, as data.yaml has it. flag: the command's name
    of the file, for messages.

    Raises UserError where the file cannot be read, is of none of these forms, or names, numbers or colours cannot be.
    """
    text = read_text(path, flag)
    suffix = path.suffix.lower()
    if suffix == ".json" or (text.lstrip()[:1] in ("[", "{") and _is_json(text)):
        rows = _rows_of_tree(path, _json(path, text))
    elif suffix in (".yaml", ".yml") or _is_yaml(text):
        rows = _rows_of_tree(path, _yaml(path, text))
    else:
        lines = _lines(text)
        separator = _separator(lines, suffix)
        rows = _rows_of_table(path, lines, separator) if separator else _rows_of_lines(path, lines)
    return class_list(path, rows)


def class_list(path: Path, rows: Sequence[ClassRow]) -> ClassList:
    """The classes of a file's rows, checked; see `read_class_list`."""
    findings = []
    if rows and rows[0].name == _NO_CLASS and rows[0].number is None:
        findings.append(Finding(f"{path}, {rows[0].place}, {_NO_CLASS} is no class: the next one has the label 0"))
        rows = rows[1:]
    seen: dict[str, ClassRow] = {}
    for label, row in enumerate(rows):
        where = f"{path}, {row.place},"
        if not row.name:
            raise UserError(f"{where} names no class: remove it, or name the class of label {label}")
        if row.name in seen:
            raise UserError(f"{where} names the class {row.name} again: give each class a name of its own")
        seen[row.name] = row
    if not 2 <= len(rows) <= IGNORED:
        raise UserError(f"{path} names {len(rows)} classes: it must be 2 to {IGNORED}, one a line")
    rows, numbers = _in_order(path, rows)
    colours = [row.colour for row in rows if row.colour is not None]
    for row in rows:
        if row.colour is not None and colours.count(row.colour) > 1:
            raise UserError(f"{path} gives the colour {row.colour} to several classes: give each a colour of its own")
    complete = len(colours) == len(rows)
    return ClassList([row.name for row in rows], numbers, colours if complete else None, findings)


def read_text(path: Path, flag: str = "--classes") -> str:
    """The text of a file of classes; raises UserError where it cannot be read or is no text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read, check {flag}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: give a text file with a class a line as {flag}") from error


def _in_order(path: Path, rows: Sequence[ClassRow]) -> tuple[Sequence[ClassRow], list[int] | None]:
    """The rows by rising numbers, and the numbers unless they are those of the places."""
    numbered = [row for row in rows if row.number is not None]
    if not numbered:
        return rows, None
    if len(numbered) < len(rows):
        lacking = next(row for row in rows if row.number is None)
        raise UserError(f"{path}, {lacking.place}, has no number, and others have: number all classes, or none")
    ordered = sorted(numbered, key=lambda row: row.number or 0)
    numbers = [row.number for row in ordered if row.number is not None]
    for one, other in pairwise(ordered):
        if one.number == other.number:
            raise UserError(f"{path} gives the number {one.number} to both {one.name} and {other.name}: correct one")
    if not 0 <= numbers[0] <= numbers[-1] <= IGNORED:
        wrong = ordered[0] if numbers[0] < 0 else ordered[-1]
        raise UserError(
            f"{path}, {wrong.place}, has the number {wrong.number}, but label maps have 8 bits: number the classes "
            "from 0 on"
        )
    return ordered, None if numbers == list(range(len(rows))) else numbers


# Text: a class a line


def _lines(text: str) -> list[tuple[str, str]]:
    """(place, content) of each line but comments."""
    lines = [(f"line {number}", line.strip()) for number, line in enumerate(text.rstrip().splitlines(), 1)]
    is_heading = lines and _headings(lines[0][1].lstrip("#")) and lines[0][1].startswith("#")
    if is_heading:
        lines[0] = (lines[0][0], lines[0][1].lstrip("# "))
    lines = [(place, line) for place, line in lines if not line.startswith("#")]
    return [] if lines == [("line 1", "")] else lines


def _rows_of_lines(path: Path, lines: list[tuple[str, str]]) -> list[ClassRow]:
    words = re.split(_SEPARATOR, lines[0][1]) if lines else []
    headed = all(map(_is_heading, words)) and any(map(_is_name_heading, words))  # a class may be called red
    for some in (lines, lines[1:]) if headed else (lines,):
        for form in _LINES:
            matches = [form.fullmatch(line) for _, line in some]
            rows = [_row(place, match) for (place, _), match in zip(some, matches, strict=True) if match]
            if rows and len(rows) == len(some) and not _are_names(rows):
                return rows
    if headed:
        raise UserError(
            f"{path}, line 1, {lines[0][1]!r} looks like a heading: remove it, or number the lines where a class is "
            "called so"
        )
    numbered = [_NUMBERED.fullmatch(line) is not None for _, line in lines]
    if sum(numbered) > len(lines) / 2 and not all(numbered):
        place, line = lines[numbered.index(False)]
        raise UserError(f"{path}, {place}, {line!r} has no number, and others have: number all classes, or none")
    return [ClassRow(place, line) for place, line in lines]


def _are_names(rows: list[ClassRow]) -> bool:
    """Whether the numbers belong to the names, as in "2 door" and "4 door": they count nothing, and without them the
    names are the same."""
    numbers = sorted(row.number for row in rows if row.number is not None)
    counted = numbers and numbers == list(range(numbers[0], numbers[0] + len(rows))) and numbers[0] in (0, 1)
    return not counted and len({row.name for row in rows}) < len(rows)


def _row(place: str, match: re.Match[str]) -> ClassRow:
    found = match.groupdict()
    number = int(found["number"]) if found.get("number") else None
    colour = _colour([found[channel] for channel in "rgb"]) if found.get("r") else None
    return ClassRow(place, found["name"].strip(), number, colour)


# CSV


def _separator(lines: list[tuple[str, str]], suffix: str) -> str:
    """What divides the columns, where the lines are a table; other files than CSV are one with a heading alone."""
    if not lines:
        return ""
    first = lines[0][1]
    separators = [separator for separator in (",", ";", "\t") if separator in first]
    if suffix in (".csv", ".tsv"):
        return max(separators, key=first.count, default=",")
    return next((separator for separator in separators if _headings(first, separator)), "")


def _headings(line: str, separator: str = ",") -> list[str] | None:
    """The words of a line that is nothing but headings of several columns, else None."""
    words = [_plain(word) for word in line.split(separator)]
    return words if len(words) > 1 and all(map(_is_heading, words)) else None


def _is_heading(word: str) -> bool:
    known = (
        *_NAME_HEADINGS,
        *_NUMBER_HEADINGS,
        *_COLOUR_HEADINGS,
        *(name for some in _CHANNEL_HEADINGS for name in some),
    )
    return _plain(word) in known


def _plain(word: str) -> str:
    return re.sub(r"[\s_-]+", " ", word.strip().strip("\"'").lower())


def _rows_of_table(path: Path, lines: list[tuple[str, str]], separator: str) -> list[ClassRow]:
    cells = list(csv.reader([line for _, line in lines], delimiter=separator, skipinitialspace=True))
    table = [[cell.strip() for cell in row] for row in cells]
    places = [place for place, _ in lines]
    width = len(table[0])
    for place, row in zip(places, table, strict=True):
        if len(row) != width:
            raise UserError(f"{path}, {place}, has {len(row)} columns, the first {width}: correct it")
    if any(map(_is_name_heading, table[0])) and (width > 1 or len(table) > 1):
        columns = _headed_columns(path, table[0])
        places, table = places[1:], table[1:]
    else:
        columns = _bare_columns(path, table)
    return [_row_of_cells(path, place, row, columns) for place, row in zip(places, table, strict=True)]


class _Columns(NamedTuple):
    name: int
    number: int | None = None
    colour: tuple[int, ...] = ()


def _is_name_heading(word: str) -> bool:
    return _plain(word) in _NAME_HEADINGS


def _headed_columns(path: Path, headings: list[str]) -> _Columns:
    words = [_plain(heading) for heading in headings]
    numbers = [place for place, word in enumerate(words) if word in (*_NUMBER_HEADINGS, "trainid", "train id")]
    # "label,name" and "class,name" number the classes; "id,label" names them.
    names = [place for place, word in enumerate(words) if word in _NAME_HEADINGS]
    certain = [place for place in names if words[place] in ("name", "names", "class name", "label name")]
    if len(names) > 1 and len(certain) == 1:
        numbers += [place for place in names if place not in certain]
        names = certain
    if len(names) != 1 or len(numbers) > 1:
        several = [headings[place] for place in sorted(numbers if len(names) == 1 else names)]
        raise UserError(
            f"{path}, line 1, has several columns of {'numbers' if len(names) == 1 else 'names'}: "
            f"{', '.join(several)}: leave in the one that the label maps go by"
        )
    channels = [next((words.index(word) for word in some if word in words), None) for some in _CHANNEL_HEADINGS]
    colour = tuple(place for place in channels if place is not None)
    if len(colour) != 3:
        colour = tuple(place for place, word in enumerate(words) if word in _COLOUR_HEADINGS)[:1]
    return _Columns(names[0], numbers[0] if numbers else None, colour)


def _bare_columns(path: Path, table: list[list[str]]) -> _Columns:
    """The columns of a table without a heading: the one that holds no number, and those that hold numbers alone."""
    width = len(table[0])
    are_numbers = [all(row[place].isdecimal() for row in table) for place in range(width)]
    headed = [len(table) > 1 and all(row[place].isdecimal() for row in table[1:]) for place in range(width)]
    if headed != are_numbers:
        raise UserError(
            f"{path}, line 1, has columns of unknown names: call them name, id, r, g and b, as far as they are there"
        )
    names = [place for place in range(width) if not are_numbers[place]]
    numbers = [place for place in range(width) if are_numbers[place]]
    if len(names) != 1 or len(numbers) not in (0, 1, 3, 4):
        raise UserError(
            f"{path} has {width} columns without a heading: begin with a line that calls them name, id, r, g and b, as "
            "far as they are there"
        )
    if len(numbers) in (1, 4):
        return _Columns(names[0], numbers[0], tuple(numbers[1:]))
    return _Columns(names[0], None, tuple(numbers))


def _row_of_cells(path: Path, place: str, row: list[str], columns: _Columns) -> ClassRow:
    number = None if columns.number is None else _number(row[columns.number])
    if columns.number is not None and number is None:
        raise UserError(f"{path}, {place}, has the number {row[columns.number]!r}: give a whole one")
    colour = None
    if columns.colour:
        cells = [row[column] for column in columns.colour]
        colour = _colour(cells if len(cells) == 3 else cells[0])
        if colour is None:
            raise UserError(f"{path}, {place}, has the colour {' '.join(cells)!r}: give three numbers from 0 to 255")
    return ClassRow(place, row[columns.name], number, colour)


# YAML and JSON


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _is_yaml(text: str) -> bool:
    """Whether a text of another suffix is a list in YAML all the same: no class is called "- sky"."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    key = re.fullmatch(rf"({'|'.join(_LISTS)}):", lines[0].strip()) if lines else None
    return bool(lines) and (key is not None or all(line.lstrip().startswith("- ") for line in lines))


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is no JSON, check it: {_one_line(error)}") from error


def _yaml(path: Path, text: str) -> Any:
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)  # all words stay words: classes may be called no, on or 3
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML, check it: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _rows_of_tree(path: Path, tree: Any) -> list[ClassRow]:
    rows = list(_entries(path, tree))
    if not rows:
        raise UserError(f"{path} lists no classes: give a list of names, or a mapping from label to name")
    return rows


def _entries(path: Path, tree: Any) -> Iterator[ClassRow]:
    if isinstance(tree, Mapping):
        lists = [key for key in _LISTS if isinstance(tree.get(key), list | Mapping)]
        if len(lists) > 1:
            raise UserError(f"{path} has several lists, {' and '.join(lists)}: leave in the one of the classes")
        if lists:
            rows = list(_entries(path, tree[lists[0]]))
            if (count := _number(tree.get("nc"))) not in (None, len(rows)):
                raise UserError(f"{path} names {len(rows)} classes, but says nc: {count}: correct one of them")
            yield from rows
            return
    items = list(tree.items()) if isinstance(tree, Mapping) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in items:
        place = f"entry {key}"
        known: tuple[Any, Any, Any]  # name, number, colour
        number = _number(key) if isinstance(tree, Mapping) else None
        if isinstance(value, Mapping):
            name, own, colour = (
                next((value[key] for key in keys if key in value), None)
                for keys in (_NAME_KEYS, _NUMBER_KEYS, _COLOUR_KEYS)
            )
            if number is None and isinstance(tree, Mapping) and name is None:
                name = key
            known = (name, own if number is None else number, colour)
        elif not isinstance(tree, Mapping) or number is not None:
            known = (value, number, None)
        elif _number(value) is not None:
            known = (key, value, None)
        else:
            known = (key, None, value)
        name, own, colour = known
        if not isinstance(name, str | int | float) or isinstance(name, bool):
            raise UserError(f"{path}, {place}, names no class: give a list of names, or a mapping from label to name")
        if own is not None and _number(own) is None:
            raise UserError(f"{path}, {place}, has the number {own!r}: give a whole one")
        if colour is not None and _colour(colour) is None:
            raise UserError(
                f"{path}, {place}, {str(name)!r} has neither a number nor a colour: give a list of names, or a mapping "
                "from label to name"
            )
        yield ClassRow(place, str(name).strip(), _number(own), None if colour is None else _colour(colour))


def _number(value: Any) -> int | None:
    """A whole number, also as text, else None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value.strip()) else None


def _colour(value: Any) -> Colour | None:
    """A colour as #rrggbb, as "r, g, b" or as three numbers, else None."""
    if isinstance(value, str):
        if re.fullmatch(r"#[0-9a-fA-F]{6}", value.strip()):
            red, green, blue = bytes.fromhex(value.strip()[1:])
            return red, green, blue
        value = re.split(r"[\s,;]+", value.strip().strip("()[]"))
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    channels = [_number(channel) for channel in value]
    red, green, blue = (channel if channel is not None and channel <= 255 else -1 for channel in channels)
    return (red, green, blue) if min(red, green, blue) >= 0 else None
