"""The same image in training and in validation, whose figures would be too good."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator

from convmae.data.folders import counted, listed
from convmae.data.sources import ImageCollection
from convmae.findings import Finding

_BEGINNING = 65536  # bytes that are compared before the whole file is
_MOST_SIZES = 500_000  # images whose sizes are asked for
_MOST_READ = 20_000  # images of which something is read


def repeated_images(training: ImageCollection, validation: ImageCollection) -> list[Finding]:
    """Findings of validation images whose file has the same bytes as one of training.

    Files of the same size are compared by a digest of their beginning, then of all bytes. Of large sets not all are
    compared, which another finding says. Nothing is found where sizes are unknown before an image is read.
    """
    images = len(training) + len(validation)
    if images > _MOST_SIZES:
        return [Finding(f"images that are in training, too, were not looked for: there are more than {_MOST_SIZES}")]
    by_size: dict[int, list[int]] = defaultdict(list)
    for index in range(len(training)):
        if size := training.size_of(index):
            by_size[size].append(index)
    alike: dict[int, list[int]] = defaultdict(list)
    for index in range(len(validation)):
        if (size := validation.size_of(index)) and size in by_size:
            alike[size].append(index)
    found: list[str] = []
    read, compared = 0, 0
    for size, judged in sorted(alike.items(), key=lambda entry: len(by_size[entry[0]]) + len(entry[1])):
        learned = by_size[size]
        if read + len(judged) + len(learned) > _MOST_READ:
            break
        read += len(judged) + len(learned)
        compared += len(judged)
        found += _same(training, learned, validation, judged, size)
    findings = []
    if found:
        are = "is" if len(found) == 1 else "are"
        findings.append(listed(f"{counted(len(found), 'image')} {are} in training, too, such as {found[0]}", found))
    left = sum(map(len, alike.values())) - compared
    if left:
        text = f"images that are in training, too, were looked for among {compared} of {compared + left} of equal size"
        findings.append(Finding(text))
    return findings


def _same(
    training: ImageCollection, learned: list[int], validation: ImageCollection, judged: list[int], size: int
) -> Iterator[str]:
    beginnings: dict[bytes, list[int]] = defaultdict(list)
    for index in learned:
        beginnings[_digest(training, index, _BEGINNING)].append(index)
    for index in judged:
        candidates = beginnings.get(_digest(validation, index, _BEGINNING), [])
        if size > _BEGINNING and candidates:
            whole = _digest(validation, index)
            candidates = [other for other in candidates if _digest(training, other) == whole]
        if candidates:
            yield f"{validation.image_name(index)} = {training.image_name(candidates[0])}"


def _digest(source: ImageCollection, index: int, length: int = -1) -> bytes:
    """Of its first bytes; of an image that cannot be opened, which its reader will tell, one that no other has."""
    try:
        with source.open(index) as file:
            return hashlib.blake2b(file.read(length)).digest()
    except OSError:
        return f"{source.name} {index}".encode()
