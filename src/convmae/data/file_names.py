"""Files that are named otherwise than they lie on the disk, as annotation tools of other systems name them."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from convmae.errors import UserError


class FoundFiles(NamedTuple):
    """Where the files of some names are."""

    paths: list[str | None]
    """The file of each name, None where there is none, or more than one that may be meant."""
    respelled: list[int]
    """Places of names that are spelled otherwise than their files."""
    ambiguous: dict[int, list[str]]
    """The files that may be meant, by the places of names that fit several."""


def name_parts(name: str) -> tuple[str, ...]:
    """The folders and the file of a name or URL, alike in all spellings: letter case, \\, %20, Unicode's forms."""
    if "://" in name:
        name = urlsplit(name).path
    name = unicodedata.normalize("NFC", unquote(name).replace("\\", "/")).casefold()
    return tuple(part for part in unicodedata.normalize("NFC", name).split("/") if part not in ("", ".", ".."))


def agreeing_parts(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts two names share from the end on, where one is the end of the other; else 0."""
    shared = min(len(one), len(other))
    return shared if one[len(one) - shared :] == other[len(other) - shared :] else 0


def find_files(folder: Path, names: Sequence[str]) -> FoundFiles:
    """The file in `folder`, at any depth, that each of `names` means.

    A name as it lies on the disk comes first. Another means the one file that it fits but for its spelling, and for
    folders in front, of which a foreign absolute path or a URL has too many. Raises UserError without the folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one with the images")
    exact = _exact(folder, names)
    paths = [str(folder / name) if there else None for name, there in zip(names, exact, strict=True)]
    respelled: list[int] = []
    ambiguous: dict[int, list[str]] = {}
    if all(exact):
        return FoundFiles(paths, respelled, ambiguous)
    files = _files_by_name(folder)
    owners = {path: name_parts(name) for path, name in zip(paths, names, strict=True) if path is not None}
    meant: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if paths[place] is not None:
            continue
        parts = name_parts(name)
        fits: dict[int, list[str]] = {}
        for path, own in files.get(parts[-1] if parts else "", ()):
            # A file that another entry names exactly is that one's.
            if (shared := agreeing_parts(parts, own)) and owners.get(path, parts) == parts:
                fits.setdefault(shared, []).append(path)
        best = fits[max(fits)] if fits else []
        if len(best) == 1:
            meant.setdefault(best[0], []).append(place)
        elif best:
            ambiguous[place] = best
    for path, places in meant.items():
        if len({name_parts(names[place]) for place in places}) > 1:  # different names: nobody knows whose it is
            ambiguous.update({place: [path] for place in places})
            continue
        for place in places:
            paths[place] = path
        respelled += places
    return FoundFiles(paths, sorted(respelled), ambiguous)


def _exact(folder: Path, names: Sequence[str]) -> list[bool]:
    """Whether the folder has each of the files, by one listing of each folder that should hold some.

    A look at each file would be slower, and on some systems blind to letter case.
    """
    listed: dict[str, set[str]] = {}
    there = []
    for name in names:
        path = folder / name
        parent, own = str(path.parent), path.name
        if parent not in listed:
            try:
                with os.scandir(parent) as entries:
                    listed[parent] = {entry.name for entry in entries if not entry.is_dir()}
            except (OSError, ValueError):  # of no folder, of names that no system has
                listed[parent] = set()
        there.append(own in listed[parent])
    return there


def _files_by_name(folder: Path) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """All files below the folder with their parts, by the last of these."""
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(parent, name)
            parts = name_parts(path.relative_to(folder).as_posix())
            found.setdefault(parts[-1] if parts else "", []).append((str(path), parts))
    return found
