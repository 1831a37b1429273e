"""Which members of WebDataset shards are images, how they are read, and what else there is, counted.

WebDataset takes a member's name up to its first dot for the key of a sample, and the rest for the name of a field. An
image whose name is KEY.jpg is therefore that of its sample, and KEY.seg.png beside it another field. Names with dots in
what is meant as the key, such as img.v2.003.jpg, have no such image; each is taken for an image of its own, called by
its whole name without the last extension. What is counted and what is read follow from the same function.
"""

import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from convmae.data.folders import EXTENSIONS, counted, is_image_name, is_left_behind, listed
from convmae.errors import UserError
from convmae.findings import Finding

_META = re.compile(r"__[^/]*__(/|$)")  # WebDataset's own members

_HIDDEN = "{0} in hidden members, as systems and tools leave them, {are} not read"
_LINKS = "{0} stored as a link to another member {are} not read"
_FURTHER = "{0} beside another one of the same sample {are} not read"
_DOTTED = "{0} with a dot in the key {are} read by the whole name, as no field of a sample"


class ShardImage(NamedTuple):
    """An image in a shard."""

    place: int
    """Of its member, among the names that were given."""
    stem: str
    """The member's name without the last extension."""
    key: str
    """WebDataset's key: the name up to the first dot."""


class ShardNames(NamedTuple):
    """What the names of a shard's members mean."""

    images: list[ShardImage]
    """In the order of their members."""
    remarks: dict[str, list[str]]
    """Names of members by what there is to say of them."""


class ShardCount(NamedTuple):
    """What several shards hold."""

    images: int
    findings: list[Finding]


def is_local(location: str) -> bool:
    """Whether a shard is a file, not an address or a command."""
    return "://" not in location and not location.startswith("pipe:")


def interpret(names: Sequence[str]) -> ShardNames:
    """Tell which of the regular members of a shard, or of a part of it with whole samples, are images."""
    samples: dict[str, list[int]] = defaultdict(list)
    remarks: dict[str, list[str]] = defaultdict(list)
    for place, name in enumerate(names):
        if not is_image_name(name):
            continue
        if _META.match(name) or any(map(is_left_behind, name.split("/"))):
            remarks[_HIDDEN].append(name)
        else:
            samples[_split(name)[0]].append(place)
    images = []
    for key, places in samples.items():
        fields = {place: _split(names[place])[1].lower() for place in places}
        plain = next((field for field in fields.values() if f".{field}" in EXTENSIONS), None)
        chosen = [place for place in places if plain in (None, fields[place])]
        remarks[_FURTHER] += [names[place] for place in places if plain not in (None, fields[place])]
        if plain is None and len(places) > 1:
            remarks[_DOTTED] += [names[place] for place in places]
        images += [ShardImage(place, names[place].rpartition(".")[0], key) for place in chosen]
    return ShardNames(sorted(images), remarks)


def labels_of(names: Sequence[str], images: Sequence[ShardImage]) -> list[int | None]:
    """The places of the members that hold the classes of images, NAME.cls beside NAME.jpg; None without a class.

    Raises UserError where images and classes of one name cannot be told apart.
    """
    classes: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        stem, _, kind = name.rpartition(".")
        if kind.lower() == "cls" and not any(map(is_left_behind, name.split("/"))):
            classes[stem].append(place)
    alike: dict[str, int] = defaultdict(int)
    for image in images:
        alike[image.stem] += 1
    seen: dict[str, int] = defaultdict(int)
    labels: list[int | None] = []
    for image in images:
        places = classes.get(image.stem) or classes.get(image.key) or []
        if len(places) > 1 and len(places) != alike[image.stem]:
            raise UserError(
                f"{image.stem} names {counted(alike[image.stem], 'image')} and {len(places)} classes (.cls): "
                "write the shard again, each sample under a key of its own"
            )
        labels.append(places[seen[image.stem] if len(places) > 1 else 0] if places else None)
        seen[image.stem] += 1
    return labels


def count_images(shards: Sequence[str]) -> ShardCount:
    """The images of local shards, as `read_shards` reads them. Raises UserError for a shard that cannot be read."""
    number = 0
    remarks: dict[str, list[str]] = defaultdict(list)
    for shard in shards:
        try:
            with tarfile.open(shard) as archive:
                members = list(archive)
        except Exception as error:  # of files, tar and all that compresses it
            raise UserError(f"the shard {shard} cannot be read, write it again: {error}") from error
        found = interpret([member.name for member in members if member.isreg()])
        number += len(found.images)
        links = [member.name for member in members if member.issym() or member.islnk()]
        found.remarks[_LINKS] += [name for name in links if is_image_name(name)]
        for remark, names in found.remarks.items():
            remarks[remark] += [f"{Path(shard).name}/{name}" for name in names]
    return ShardCount(number, told(remarks))


def told(remarks: dict[str, list[str]]) -> list[Finding]:
    """A finding for each remark."""
    return [
        listed(remark.format(counted(len(names), "image"), are="is" if len(names) == 1 else "are"), names)
        for remark, names in remarks.items()
        if names
    ]


def read_shards(shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the images of shards, {"url": shard} each, one after the other, as {"image": bytes, "target": its name}.

    Where a shard cannot be read to its end, the last "image" is the exception. A shard that is no local file is read
    from end to end, so the members of a sample must follow each other there.
    """
    for shard in (entry["url"] for entry in shards):
        name = Path(shard).name
        try:
            for stem, data in _read_file(shard) if is_local(shard) else _read_stream(shard):
                yield {"image": data, "target": f"{name}/{stem}"}
        except Exception as error:  # of files, networks, tar and all that compresses it
            yield {"image": OSError(f"the shard cannot be read to its end: {error}"), "target": name}


def _read_file(shard: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(shard) as archive:
        members: list[tarfile.TarInfo] = []
        fault = None
        try:
            members.extend(member for member in archive if member.isreg())
        except Exception as error:  # what comes before it is whole
            fault = error
        for image in interpret([member.name for member in members]).images:
            yield image.stem, archive.extractfile(members[image.place]).read()  # type: ignore[union-attr]
        if fault is not None:
            raise fault


def _read_stream(shard: str) -> Iterator[tuple[str, bytes]]:
    from webdataset.gopen import gopen

    faults: list[Exception] = []
    with gopen(shard) as stream:
        for _, sample in groupby(_members(stream, faults), lambda member: _split(member[0])[0]):
            members = list(sample)
            for image in interpret([name for name, _ in members]).images:
                yield image.stem, members[image.place][1]
    if faults:
        raise faults[0]


def _members(stream: Any, faults: list[Exception]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of regular members; what keeps it from going on is added to `faults`."""
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                if member.isreg():
                    wanted = is_image_name(member.name)
                    yield member.name, archive.extractfile(member).read() if wanted else b""  # type: ignore[union-attr]
                archive.members = []  # type: ignore[attr-defined]  # which would grow with the shard
    except Exception as error:  # the last sample before it is whole
        faults.append(error)


def _split(name: str) -> tuple[str, str]:
    """WebDataset's key and field of a member."""
    folder, slash, base = name.rpartition("/")
    key, _, field = base.partition(".")
    return f"{folder}{slash}{key}", field
