"""What occurs in all label maps of a data set, and which do not fit their images: known before anything is learned.

Of images the headers are read, of label maps all pixels. What was found is kept in the user's cache folder by path,
size and time of change of each file, so that the next time only new files are read. H height, W width.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from convmae.data.ade20k import SegmentationImages
from convmae.data.images import UndecodableImageError, open_upright, undecodable_if_damaged
from convmae.data.label_maps import Contents, read_stored
from convmae.errors import UserError
from convmae.findings import Finding
from convmae.labels import IGNORED

_VERSION = 1  # to be raised when other things come to be kept
_SHOWN_CLASSES = 10
_OF_BANDS = (".npy", ".tif", ".tiff")  # files that may hold more than Pillow knows
_MUCH = 0.5  # share of pixels that count nowhere

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelSurvey:
    """What occurs in the label maps of a data set that can be used."""

    pixels: list[int]
    """Of each class."""
    maps: list[int]
    """In how many label maps each class occurs."""
    ignored: Counter[int] = field(default_factory=Counter)
    """Pixels that count nowhere, by their number, or colour 0xRRGGBB."""
    unlabelled: list[str] = field(default_factory=list)
    """Label maps without a pixel of a class."""
    faults: list[tuple[str, UndecodableImageError]] = field(default_factory=list)
    """Images that cannot be used, by themselves or by their label maps, and why."""

    @property
    def present(self) -> list[int]:
        """The classes that have a pixel."""
        return [label for label, count in enumerate(self.pixels) if count]

    def counts(self, classes: Sequence[str]) -> list[str]:
        """A line for each class."""
        return [
            f"{name}: {pixels:,} pixel{'' if pixels == 1 else 's'} in {maps:,} label map{'' if maps == 1 else 's'}"
            for name, pixels, maps in zip(classes, self.pixels, self.maps, strict=True)
        ]


def survey(
    source: SegmentationImages,
    threads: int = 1,
    progress: Callable[[Iterator[Any]], Iterable[Any]] = iter,
) -> LabelSurvey:
    """Look at all images and label maps of a data set.

    threads: that read at a time. progress: passes on an iterator over all pairs of files. Raises UserError where an
    image is a copy of its label map.
    """
    cache = _Cache(source)
    numbers = range(len(source))
    found: list[_Pair] = []
    try:
        with ThreadPoolExecutor(max(1, threads)) as pool:
            pairs = pool.map(lambda number: _looked_at(source, number, cache), numbers)
            found += progress(iter(pairs))
    finally:
        cache.keep(complete=len(found) == len(source))
    return _summed(source, found)


def absent_classes(classes: Sequence[str], labels: Sequence[int], what: str) -> str:
    """A line that says which classes lack something; what: what that means, after "have no pixel" and a comma."""
    one = len(labels) == 1
    return f"{len(labels)} of the {len(classes)} classes {'has' if one else 'have'} no pixel, {what}: " + named(
        classes, labels
    )


def named(classes: Sequence[str], labels: Sequence[int]) -> str:
    """The names of these classes, of many the first."""
    more = len(labels) - _SHOWN_CLASSES
    some = ", ".join(classes[label] for label in labels[:_SHOWN_CLASSES])
    return f"{some} and {more} more" if more > 0 else some


def findings_of(source: SegmentationImages, found: LabelSurvey) -> list[Finding]:
    """What the owner of a data set should know of its label maps, whatever they are for."""
    findings = []
    if found.unlabelled:
        one = len(found.unlabelled) == 1
        findings.append(
            Finding(
                f"{len(found.unlabelled)} label map{' has' if one else 's have'} no pixel of a class", found.unlabelled
            )
        )
    total = sum(found.pixels) + sum(found.ignored.values())
    if total and (share := sum(found.ignored.values()) / total) > _MUCH:
        findings.append(Finding(f"{share:.0%} of the pixels count nowhere", _ignored_lines(source, found)))
    return findings


def too_few_classes(source: SegmentationImages, found: LabelSurvey) -> UserError:
    """The error that says that fewer than two classes have pixels, and the likely cure."""
    have = f"only {source.classes[found.present[0]]} has" if found.present else "none has"
    return UserError(
        f"of the {len(source.classes)} classes {have} a pixel in the {len(source)} label map"
        f"{'' if len(source) == 1 else 's'} of {source.name}, so nothing can be learned: {likely_cure(source, found)}"
    )


def likely_cure(source: SegmentationImages, found: LabelSurvey) -> str:
    """What is to be done where fewer than two classes have pixels, as far as the pixels that count nowhere tell."""
    classes, present, encoding = source.classes, found.present, source.encoding
    occurring = sorted({encoding.values[label] for label in present} | found.ignored.keys())
    if found.ignored[0] and encoding.reduce_zero_label:
        return f"{found.ignored[0]:,} pixels of 0 count nowhere, leave out --reduce-zero-label if 0 is a class"
    if found.ignored[IGNORED] and not encoding.by_colour:
        values = occurring if len(occurring) == len(classes) else [*encoding.values[:-1], IGNORED]
        return (
            f"{found.ignored[IGNORED]:,} pixels of {IGNORED} count nowhere, say --label-values "
            f"[{','.join(map(str, values))}] if {IGNORED} is a class"
        )
    return "check the label maps and --classes"


def cache_folder() -> Path:
    """The folder for what can be found again: convmae in $XDG_CACHE_HOME, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "convmae")


class _Pair(NamedTuple):
    """An image's size, (H, W), and its label map's contents, or why they cannot be known."""

    size: tuple[int, int] | None
    contents: Contents | None
    fault: UndecodableImageError | None = None


def _looked_at(source: SegmentationImages, number: int, cache: "_Cache") -> _Pair:
    image, label_map = source.image_name(number), source.annotation(number).path
    try:
        size = cache.size_of(image)
        contents = cache.contents_of(str(label_map))
        _refuse_copies(Path(image), label_map)
        if size is None:
            size = contents.size
        elif size != contents.size:  # a PNG may tell at its end that it is turned
            size = _decoded_size(image)
    except UndecodableImageError as error:
        return _Pair(None, None, error)
    return _Pair(size, contents)


def _refuse_copies(image: Path, label_map: Path) -> None:
    if image.stat().st_size == label_map.stat().st_size and image.read_bytes() == label_map.read_bytes():
        raise UserError(f"{image} is a copy of its label map {label_map}: give the folder of the images themselves")


def _upright_size(path: str) -> tuple[int, int] | None:
    """(H, W) of an image as its header tells it; raises UndecodableImageError.

    None where whoever decodes it will tell: of arrays and bands, and of images that --max-pixels alone admits.
    """
    try:
        return _told_size(path)
    except UndecodableImageError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError) or path.lower().endswith(_OF_BANDS):
            return None
        raise


def _told_size(path: str) -> tuple[int, int]:
    with undecodable_if_damaged(), Image.open(path) as image:
        size = (image.height, image.width)
        if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode it to look behind the pixels
            return size
        try:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        except Exception as error:  # damaged metadata raise as many types as damaged pixels, and do no harm
            _logger.debug("unreadable EXIF of %s: %s", path, error)
            return size
    return size[::-1] if turned else size


def _decoded_size(path: str) -> tuple[int, int]:
    with undecodable_if_damaged(), Path(path).open("rb") as file:
        image = open_upright(file)
    return image.height, image.width


def _summed(source: SegmentationImages, pairs: Sequence[_Pair]) -> LabelSurvey:
    found = LabelSurvey([0] * len(source.classes), [0] * len(source.classes))
    for number, pair in enumerate(pairs):
        name, annotation = source.image_name(number), source.annotation(number)
        if pair.size is None or pair.contents is None:
            assert pair.fault is not None
            found.faults.append((name, pair.fault))
            continue
        try:
            classes = annotation.classes_of(pair.contents, pair.size)
        except UndecodableImageError as error:
            found.faults.append((name, error))
            continue
        of_map: Counter[int] = Counter()
        for value, label in classes.items():
            count = pair.contents.pixels[value]
            if label == IGNORED:
                found.ignored[value] += count
            else:
                of_map[label] += count
        for label, count in of_map.items():
            found.pixels[label] += count
            found.maps[label] += 1
        if not of_map:
            found.unlabelled.append(str(annotation.path))
    return found


def _ignored_lines(source: SegmentationImages, found: LabelSurvey) -> list[str]:
    return [
        f"{f'#{value:06x}' if value > IGNORED else value}: {count:,} pixel{'' if count == 1 else 's'}"
        for value, count in found.ignored.most_common()
    ]


class _Cache:
    """What is known of the files of a data set from earlier times."""

    def __init__(self, source: SegmentationImages) -> None:
        name = hashlib.sha256(os.fsencode(Path(source.name).absolute())).hexdigest()[:32]
        self._file = cache_folder() / "label-maps" / f"{name}.json"
        self._known = self._read()
        self._used: dict[str, Any] = {}
        self._is_new = False

    def size_of(self, image: str) -> tuple[int, int] | None:
        """(H, W) of an image, upright, None where its header does not tell it; raises UndecodableImageError."""
        size = self._looked_up(image, "image", lambda: _upright_size(image))
        return None if size is None else (size[0], size[1])

    def contents_of(self, label_map: str) -> Contents:
        """What occurs in a label map; raises UnfitAnnotationError."""
        (height, width), form, pixels, palette = self._looked_up(
            label_map, "map", lambda: [part if isinstance(part, str) else _plain(part) for part in _read(label_map)]
        )
        return Contents((height, width), form, dict(pixels), dict(palette))

    def _looked_up(self, path: str, what: str, find: Callable[[], Any]) -> Any:
        try:
            status = Path(path).stat()
        except OSError:
            return find()  # which says what is wrong
        key = f"{what} {Path(path).absolute()}"
        stamp = [status.st_size, status.st_mtime_ns]
        known = self._known.get(key)
        if known is None or known[0] != stamp:
            known = [stamp, find()]
            self._is_new = True
        self._used[key] = known
        return known[1]

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_text())
            return content["files"] if content["version"] == _VERSION else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def keep(self, complete: bool) -> None:
        """Write down what is known now, whole or not at all; without a place for it nothing is kept.

        complete: whether all files were asked for, so that the others are gone.
        """
        if not self._is_new:
            return
        files = self._used if complete else self._known | self._used
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"version": _VERSION, "files": files}))
            temporary.replace(self._file)
        except (OSError, UnicodeError) as error:
            _logger.debug("what was found in label maps is not kept: %s", error)


def _read(label_map: str) -> Contents:
    return read_stored(Path(label_map))[1]


def _plain(part: Any) -> list[Any]:
    """A size or a mapping as JSON keeps it."""
    return [list(one) for one in part.items()] if isinstance(part, dict) else list(part)
