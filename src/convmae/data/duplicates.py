"""Files of two data sets that hold the same: what is learned from should not be judged by."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

_BEGINNING = 2**16  # bytes by which files of one size are told apart before they are read whole


def duplicates(files: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """(file, other) for each of `files` that is one of `others`, or holds the same bytes; files that are gone are none.

    Only files of the same size are opened, and only those are read whole that begin alike.
    """
    by_size = _by_size(others)
    found: list[tuple[str, str]] = []
    for size, some in _by_size(files).items():
        if size in by_size:
            found += _alike(some, by_size[size], size)
    return sorted(found)


def _by_size(files: Iterable[str]) -> dict[int, list[str]]:
    sizes: dict[int, list[str]] = defaultdict(list)
    for file in files:
        try:
            sizes[Path(file).stat().st_size].append(file)
        except OSError:
            continue  # whoever reads it says so
    return sizes


def _alike(files: Sequence[str], others: Sequence[str], size: int) -> list[tuple[str, str]]:
    """The pairs of the same bytes among files of one size."""
    for length in (min(size, _BEGINNING), size):
        known = {_digest(other, length): other for other in reversed(others)}
        digests = {file: _digest(file, length) for file in files}
        files = [file for file, digest in digests.items() if digest in known]
        candidates = {digests[file] for file in files}
        others = [other for other in others if _digest(other, length) in candidates] if length < size else others
        if not files:
            break
    return [(file, known[digests[file]]) for file in files]


def _digest(path: str, length: int) -> bytes:
    """Of the first `length` bytes; of a file that cannot be read a digest that no other has."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.blake2b(file.read(length)).digest()
    except OSError:
        return path.encode(errors="surrogateescape")
