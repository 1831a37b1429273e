"""Image files that are in two sets of data, where figures of one would flatter what learned from the other."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

_SAMPLE = 4096  # bytes that tell most files of one size apart


def shared_files(files: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of a file of `files` and one of `others` that are the same, or hold the same bytes.

    Files that cannot be read are none. Sizes are compared first, then a few bytes of those of one size, then all.
    """
    by_size: dict[int, list[str]] = {}
    for path in dict.fromkeys(files):
        by_size.setdefault(_size(path), []).append(path)
    sizes = {path: _size(path) for path in dict.fromkeys(others)}
    alike = {size for size in sizes.values() if size > 0 and size in by_size}
    if not alike:
        return []
    samples: dict[tuple[int, bytes], list[str]] = {}
    for size in alike:
        for path in by_size[size]:
            samples.setdefault((size, _sample(path, size)), []).append(path)
    digests: dict[tuple[int, bytes], dict[bytes, str]] = {}
    pairs = []
    for path, size in sizes.items():
        key = (size, _sample(path, size)) if size in alike else None
        if key is None or key not in samples:
            continue
        if key not in digests:
            digests[key] = {_digest(candidate): candidate for candidate in reversed(samples[key])}
        if (own := _digest(path)) and own in digests[key]:
            pairs.append((digests[key][own], path))
    return pairs


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


def _sample(path: str, size: int) -> bytes:
    try:
        with Path(path).open("rb") as file:
            file.seek(max(0, size // 2 - _SAMPLE // 2))
            return hashlib.blake2b(file.read(_SAMPLE), digest_size=16).digest()
    except OSError:
        return b""


def _digest(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return b""
