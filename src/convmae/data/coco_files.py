"""What a file in COCO's format says: categories, images and objects, read as tools write them.

Whatever can be meant in one way is accepted and counted; what cannot is a fault, told by the entry's id or place.
Objects are packed while they are read, as lists of millions would fill the memory. H height, W width, N objects.
"""

import json
import math
import sys
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from PIL import ExifTags, Image

from convmae.data.file_names import find_files
from convmae.errors import UserError

Id = int | float | str
"""What tools number images, annotations and categories by; given back as it is in the file."""

_NO_SEGMENTATION = "it has no segmentation; --masks false learns boxes alone"


# Values


def _id(entry: Any, key: str) -> Id | None:
    """An id, None where there is none."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if type(value) in (int, str) or (type(value) is float and math.isfinite(value)) else None


def _number(value: Any) -> float | None:
    """A finite number, also as text; None where it is none."""
    if type(value) is str:
        try:
            value = float(value)
        except ValueError:
            return None
    return value if type(value) in (int, float) and abs(value) <= sys.float_info.max else None


def _length(value: Any) -> int | None:
    """A height or width: 0 where the file does not tell it, None where it is no whole number from 0 on."""
    number = 0 if value is None else _number(value)
    return None if number is None or number < 0 or number != int(number) else int(number)


class _Ids:
    """Which entry an id names; an id that is no entry's may be one of another type, "7" for 7."""

    def __init__(self, ids: Sequence[Id]) -> None:
        self._exact = {value: number for number, value in enumerate(ids)}
        texts = Counter(map(_text, ids))
        self._alike = {_text(value): number for number, value in enumerate(ids) if texts[_text(value)] == 1}

    def find(self, value: Any) -> tuple[int | None, bool]:
        """The entry's number, None where there is none, and whether the id is of another type."""
        if type(value) not in (int, str, float):
            return None, False
        number = self._exact.get(value)
        if number is None and (number := self._alike.get(_text(value))) is not None:
            return number, True
        return number, False


def _text(value: Id) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def id_order(value: Id) -> tuple[bool, Id]:
    """Sorts ids: numbers by their value, then texts."""
    return isinstance(value, str), value


# The file


def read_content(path: Path) -> dict[str, Any]:
    """The file's content; raises UserError unless it has COCO's three lists."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read, check the path: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of wrong bytes, or of wrong JSON
        raise UserError(f"{path} is not JSON, write or download it again: {error}") from error
    lists = ("images", "annotations", "categories")
    lacking = [key for key in lists if not (isinstance(content, dict) and isinstance(content.get(key), list))]
    if lacking:
        raise UserError(
            f"{path} is not in COCO's format, it has no list of {' and of '.join(lacking)}: give the file of instances"
        )
    return content


def read_categories(path: Path, entries: list[Any]) -> dict[Id, str]:
    """Names by rising id; raises UserError where a category has no id of its own, or no name."""
    named = {
        value: entry["name"]
        for entry in entries
        if (value := _id(entry, "id")) is not None and isinstance(entry.get("name"), str)
    }
    if not entries or len(named) < len(entries):
        raise UserError(f"{path} needs categories, each with an id of its own and a name: correct them")
    return dict(sorted(named.items(), key=lambda item: id_order(item[0])))


# Images


@dataclass
class Images:
    """The images that a file names and a folder holds."""

    ids: list[Id] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(H, W) of each upright image."""
    named: int = 0
    """Images that the file names."""
    without: list[Id] = field(default_factory=list)
    """Ids of images that are left out."""
    faults: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Names of files that the folder lacks."""
    respelled: list[str] = field(default_factory=list)
    """Names that are spelled otherwise than their files, with these."""
    measured: list[str] = field(default_factory=list)
    """Images whose size the file does not tell, so that their headers do."""
    texts: list[str] = field(default_factory=list)
    """Images whose size is written as text."""


def read_images(entries: list[Any], folder: Path) -> Images:
    """COCO's entries of images, and where their files are; raises UserError without the folder."""
    images = Images(named=len(entries))
    sound: list[tuple[Id, str, int, int]] = []
    counts = Counter(_id(entry, "id") for entry in entries)
    for place, entry in enumerate(entries):
        image_id = _id(entry, "id")
        if image_id is None:
            images.faults.append(f"the one at place {place} (its id is neither a number nor text)")
            continue
        name, told = entry.get("file_name"), (entry.get("height"), entry.get("width"))
        height, width = map(_length, told)
        if counts[image_id] > 1:  # nobody knows whose the annotations are
            fault = f"{counts[image_id]} images have this id"
        elif not (isinstance(name, str) and name):
            fault = "it has no file_name"
        elif height is None or width is None:
            fault = "its height and width are not whole numbers above 0"
        else:
            if any(type(value) is str for value in told):
                images.texts.append(f"image {image_id}")
            sound.append((image_id, name, height, width))
            continue
        images.faults.append(f"image {image_id} ({fault})")
        images.without.append(image_id)
    found = find_files(folder, [name for _, name, _, _ in sound])
    respelled = set(found.respelled)
    for place, (image_id, name, height, width) in enumerate(sound):
        path = found.paths[place]
        if path is None:
            images.without.append(image_id)
            if place in found.ambiguous:
                images.faults.append(f"image {image_id} (its {name} may mean {' or '.join(found.ambiguous[place])})")
            else:
                images.missing.append(name)
            continue
        if not (height and width):
            size = _size_in_header(path)
            if size is None:
                images.without.append(image_id)
                images.faults.append(f"image {image_id} (neither its entry nor its file tells height and width)")
                continue
            height, width = size
            images.measured.append(f"image {image_id}: {width}x{height}, {path}")
        if place in respelled:
            images.respelled.append(f"{name}: {path}")
        images.ids.append(image_id)
        images.paths.append(path)
        images.sizes.append((height, width))
    return images


def _size_in_header(path: str) -> tuple[int, int] | None:
    """(H, W) of the upright image, None where the file does not tell."""
    try:
        with Image.open(path) as image:
            (width, height), turned = image.size, image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # on damaged files Pillow's plugins raise errors of many unrelated types
        return None
    return (width, height) if turned else (height, width)


# Objects


@dataclass(frozen=True)
class Objects:
    """The objects of all images, packed: lists of millions would be copied by every loading process."""

    owners: numpy.ndarray
    """Number of the image of each object, (N,)."""
    labels: numpy.ndarray
    """Each object's class, of which the first is 1; 0 where the file has no such category."""
    boxes: numpy.ndarray
    """Left, top, width and height, (N, 4); not numbers where an object that is left out has none."""
    areas: numpy.ndarray
    """Pixels, not a number where the file does not tell."""
    crowd: numpy.ndarray
    damaged: numpy.ndarray
    """Objects that are left out; they are kept as regions that teach nothing."""
    pixelless: numpy.ndarray
    """Objects whose mask is thinner than a pixel, and has none."""
    coordinates: numpy.ndarray
    """Of all polygons' points, x and y in turn."""
    polygon_ends: numpy.ndarray
    """Where each polygon's coordinates end."""
    polygons: numpy.ndarray
    """The number of polygons up to the end of each object."""
    texts: numpy.ndarray
    """The bytes of all run lengths as JSON."""
    text_ends: numpy.ndarray
    """Where each object's text ends."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def zero_size(self) -> numpy.ndarray:
        """Objects without width or height, as COCO itself has some."""
        return (self.boxes[:, 2:] == 0).any(axis=1)

    @cached_property
    def learned(self) -> numpy.ndarray:
        """Objects that a detector learns."""
        return ~(self.crowd | self.damaged | self.zero_size | self.pixelless)

    @cached_property
    def by_image(self) -> numpy.ndarray:
        """The objects' numbers, image by image."""
        return numpy.argsort(self.owners, kind="stable")

    @cached_property
    def has_polygons(self) -> numpy.ndarray:
        return numpy.diff(self.polygons, prepend=0) > 0

    @cached_property
    def has_run_lengths(self) -> numpy.ndarray:
        return numpy.diff(self.text_ends, prepend=0) > 0

    @property
    def has_mask(self) -> numpy.ndarray:
        return self.has_polygons | self.has_run_lengths

    def segmentation(self, number: int) -> Any:
        """Polygons or run lengths of an object, None where it has none."""
        start = self.text_ends[number - 1] if number else 0
        if self.text_ends[number] > start:
            return json.loads(self.texts[start : self.text_ends[number]].tobytes())
        first = int(self.polygons[number - 1]) if number else 0
        ends = self.polygon_ends[first : self.polygons[number]].tolist()
        if not ends:
            return None
        starts = [int(self.polygon_ends[first - 1]) if first else 0, *ends[:-1]]
        return [self.coordinates[start:end].tolist() for start, end in zip(starts, ends, strict=True)]

    def without_masks(self) -> "Objects":
        """The same objects without any segmentation."""
        nothing, none = numpy.zeros(0), numpy.zeros(len(self), dtype=numpy.int64)
        return replace(
            self,
            coordinates=nothing,
            polygon_ends=nothing.astype(numpy.int64),
            polygons=none,
            texts=nothing.astype(numpy.uint8),
            text_ends=none,
        )


class ReadObjects(NamedTuple):
    """The objects of a file and what is to be told of them; `notes` has the numbers of objects by what they share."""

    objects: Objects
    ids: list[Any]
    places: list[int]
    faults: dict[int, str]
    """Which annotations are broken, and what is wrong with them, by their places."""
    notes: dict[str, list[int]]
    extents: numpy.ndarray
    """Left, top, right and bottom of the run lengths of each object, (N, 4); not numbers elsewhere."""
    pixels: numpy.ndarray
    """Pixels of the run lengths of each object, -1 elsewhere."""

    def name(self, number: int) -> str:
        """What messages call an object."""
        return _entry_name(self.ids[number], self.places[number])


def _entry_name(entry_id: Any, place: int) -> str:
    return f"the one at place {place}" if entry_id is None else f"annotation {entry_id}"


def read_objects(annotations: list[Any], images: Images, category_ids: Sequence[Id], masks: bool = True) -> ReadObjects:
    """COCO's entries of annotations, which are taken out of the list as they are read.

    masks: whether they are read; otherwise they are where a box is missing. Some objects may lack one, but not all.
    """
    needed = masks and not any(isinstance(entry, dict) and entry.get("segmentation") for entry in annotations)
    reader = _ObjectReader(images, category_ids, masks, needed)
    for place, entry in enumerate(annotations):
        annotations[place] = None  # its memory is needed for those that follow
        reader.add(place, entry)
    return reader.packed()


class _ObjectReader:
    """Packs COCO's entries of annotations, one after the other."""

    def __init__(self, images: Images, category_ids: Sequence[Id], masks: bool, needed: bool) -> None:
        from faster_coco_eval.core import mask
        from faster_coco_eval.mask_api_new_cpp import toUncompressedRLE

        self._library, self._uncompressed = mask, toUncompressedRLE
        self._images, self._categories = _Ids([*images.ids, *images.without]), _Ids(category_ids)
        self._sizes, self._masks, self._needed = images.sizes, masks, needed
        self._ids: list[Any] = []
        self._places: list[int] = []
        self._faults: dict[int, str] = {}
        self._notes: dict[str, list[int]] = {}
        self._owners, self._labels, self._pixels = array("q"), array("q"), array("q")
        self._crowd, self._damaged = bytearray(), bytearray()
        self._boxes, self._areas, self._extents = array("d"), array("d"), array("d")
        self._coordinates, self._polygon_ends, self._polygons = array("d"), array("q"), array("q")
        self._texts, self._text_ends = bytearray(), array("q")

    def add(self, place: int, entry: Any) -> None:
        """Pack one entry, or tell what is wrong with it."""
        if not isinstance(entry, dict):
            self._faults[place] = f"{_entry_name(None, place)} (it is not an object)"
            return
        image, image_alike = self._images.find(entry.get("image_id"))
        if image is None:
            self._faults[place] = f"{_entry_name(entry.get('id'), place)} ({_unknown('image', entry)})"
            return
        if image >= len(self._sizes):
            return  # it goes with its image, which is left out
        category, category_alike = self._categories.find(entry.get("category_id"))
        fault = _unknown("category", entry) if category is None else None
        if image_alike or category_alike:
            self._note("ids")
        crowd, area, box = entry.get("iscrowd", 0), entry.get("area", math.nan), entry.get("bbox")
        if type(crowd) is not int:
            self._note_text(crowd)
            crowd = int(crowd) if type(crowd) is bool else 0 if crowd is None else _number(crowd)
        if crowd not in (0, 1):
            fault, crowd = fault or "its iscrowd is not 0 or 1", 0
        if type(area) is not float:  # which may be not a number, where there is none
            self._note_text(area)
            area = math.nan if area is None else _number(area)
        elif "area" in entry:
            area = _number(area)
        if area is None:
            fault, area = fault or "its area is not a finite number", math.nan
        box_fault = self._read_box(box)
        segmentation = entry.get("segmentation")
        has_mask, mask_fault = False, None
        if segmentation and (self._masks or not box):
            mask_fault = self._read_segmentation(segmentation, self._sizes[image])
            has_mask = mask_fault is None
        if not has_mask:
            self._pixels.append(-1)
            self._extents.extend((math.nan,) * 4)
            if not segmentation and not box:
                box_fault = box_fault or "it has neither a box nor a mask"
            elif not segmentation and self._needed:
                mask_fault = _NO_SEGMENTATION
            elif not segmentation and self._masks:
                self._note("no mask")
        fault = fault or box_fault or mask_fault
        if fault:
            self._faults[place] = f"{_entry_name(entry.get('id'), place)} ({fault})"
        elif not box:
            self._note("no box")
        self._polygons.append(len(self._polygon_ends))
        self._text_ends.append(len(self._texts))
        self._owners.append(image)
        self._labels.append(0 if category is None else category + 1)
        self._areas.append(area)
        self._crowd.append(int(crowd))
        self._damaged.append(fault is not None)
        self._ids.append(entry.get("id"))
        self._places.append(place)

    def packed(self) -> ReadObjects:
        """All that was read."""
        objects = Objects(
            owners=_integers(self._owners),
            labels=_integers(self._labels),
            boxes=_numbers(self._boxes).reshape(-1, 4),
            areas=_numbers(self._areas),
            crowd=numpy.frombuffer(self._crowd, dtype=bool),
            damaged=numpy.frombuffer(self._damaged, dtype=bool),
            pixelless=numpy.zeros(len(self._labels), dtype=bool),
            coordinates=_numbers(self._coordinates),
            polygon_ends=_integers(self._polygon_ends),
            polygons=_integers(self._polygons),
            texts=numpy.frombuffer(self._texts, dtype=numpy.uint8),
            text_ends=_integers(self._text_ends),
        )
        damaged = self._damaged
        sound = {what: [one for one in numbers if not damaged[one]] for what, numbers in self._notes.items()}
        notes = {what: numbers for what, numbers in sound.items() if numbers}
        extents, pixels = _numbers(self._extents).reshape(-1, 4), _integers(self._pixels)
        return ReadObjects(objects, self._ids, self._places, self._faults, notes, extents, pixels)

    def _note(self, what: str) -> None:
        """Of the object that is being read."""
        found = self._notes.setdefault(what, [])
        if not found or found[-1] != len(self._labels):
            found.append(len(self._labels))

    def _note_text(self, value: Any) -> None:
        if value is None or type(value) is str:
            self._note("texts")

    def _read_box(self, box: Any) -> str | None:
        """Pack the box, or what stands for one that is missing or wrong; returns what is wrong."""
        fault = None
        if not box:  # to be drawn around the mask
            box = None if box is None or box == [] else [None]
        if box is not None:
            if isinstance(box, list) and str in map(type, box):
                self._note("texts")
                box = [_number(number) for number in box]
            if not (isinstance(box, list) and len(box) == 4 and _are_finite(box)):
                fault = "its box is not four finite numbers"
            elif box[2] < 0 or box[3] < 0:
                fault = "its box has a negative width or height"
        self._boxes.extend((math.nan,) * 4 if box is None or fault else box)
        return fault

    def _read_segmentation(self, segmentation: Any, size: tuple[int, int]) -> str | None:
        """Pack polygons or run lengths; returns what is wrong, and then has packed nothing."""
        if isinstance(segmentation, list):
            fault = self._read_polygons(segmentation, size)
            if fault is None:
                self._pixels.append(-1)
                self._extents.extend((math.nan,) * 4)
            return fault
        return self._read_run_lengths(segmentation, size) if isinstance(segmentation, dict) else _NO_SEGMENTATION

    def _read_polygons(self, segmentation: list[Any], size: tuple[int, int]) -> str | None:
        first = segmentation[0]
        if not isinstance(first, list) or len(first) == 2 or (first and isinstance(first[0], list)):
            segmentation = self._in_cocos_form(segmentation)
        faults = [_polygon_fault(polygon, size) for polygon in segmentation]
        if all(faults):
            return faults[0]
        for polygon, fault in zip(segmentation, faults, strict=True):
            if fault:
                self._note("broken polygons")
            else:
                self._coordinates.fromlist(polygon)
                self._polygon_ends.append(len(self._coordinates))
        return None

    def _in_cocos_form(self, segmentation: list[Any]) -> list[Any]:
        """Polygons as one flat list, or as pairs of points, -> lists of x and y in turn."""
        if all(type(number) in (int, float) for number in segmentation):
            formed = [segmentation]
        elif all(_is_point(point) for point in segmentation):
            formed = [[number for point in segmentation for number in point]]
        else:
            formed = [
                [number for point in polygon for number in point]
                if isinstance(polygon, list) and polygon and all(_is_point(point) for point in polygon)
                else polygon
                for polygon in segmentation
            ]
            if formed == segmentation:
                return segmentation
        self._note("other polygons")
        return formed

    def _read_run_lengths(self, segmentation: dict[str, Any], size: tuple[int, int]) -> str | None:
        height, width = size
        if segmentation.get("size") != [height, width]:
            return f"its run lengths are of another size than the {width}x{height} image"
        compressed = {"size": [height, width], "counts": segmentation.get("counts")}
        try:
            if isinstance(compressed["counts"], list):
                lengths = compressed["counts"]
                compressed = self._library.frPyObjects(compressed, height, width)
            else:
                lengths = self._uncompressed([compressed])[0]["counts"]
            if sum(lengths) != height * width:
                raise ValueError
            left, top, box_width, box_height = self._library.toBbox([compressed])[0].tolist()
        except (ValueError, RuntimeError, TypeError, KeyError, OverflowError):  # of counts of wrong types or sums
            return f"its run lengths are not those of {width}x{height} pixels"
        self._pixels.append(sum(lengths[1::2]))
        self._extents.extend((left, top, left + box_width, top + box_height))
        self._texts += json.dumps(segmentation, separators=(",", ":")).encode()
        return None


def _unknown(what: str, entry: Mapping[str, Any]) -> str:
    return f"there is no {what} {entry.get(f'{what}_id')!r:.40}"


def _are_finite(numbers: list[Any]) -> bool:
    return set(map(type, numbers)) <= {int, float} and abs(sum(numbers)) <= sys.float_info.max


def _integers(numbers: array) -> numpy.ndarray:
    return numpy.frombuffer(numbers, dtype=numpy.int64)


def _numbers(numbers: array) -> numpy.ndarray:
    return numpy.frombuffer(numbers, dtype=numpy.float64)


def _is_point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(type(number) in (int, float) for number in point)


def _polygon_fault(polygon: Any, size: tuple[int, int]) -> str | None:
    """What is wrong with a polygon, None if nothing is. It is called millions of times: sums and extremes are fast."""
    try:
        low, high = min(polygon), max(polygon)
        if not (isinstance(polygon, list) and abs(sum(polygon)) <= sys.float_info.max):
            raise ValueError
        if type(low) not in (int, float) or max(abs(low), abs(high)) > sys.float_info.max:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        if polygon == []:
            return "a polygon has 0 numbers, not three points or more"
        return "a polygon is not a list of finite numbers"
    if len(polygon) % 2 or len(polygon) < 6:
        return f"a polygon has {len(polygon)} numbers, not three points or more"
    height, width = size
    nearest = min(size)
    # Filling would take as long as the polygon is large.
    if (low < -nearest or high > 2 * nearest) and not (
        _is_near(polygon[::2], width) and _is_near(polygon[1::2], height)
    ):
        return f"a polygon lies far outside the {width}x{height} image"
    return None


def _is_near(coordinates: list[float], extent: int) -> bool:
    return min(coordinates) >= -extent and max(coordinates) <= 2 * extent


def decoded(segmentation: Any, size: tuple[int, int]) -> numpy.ndarray:
    """A segmentation of the file -> uint8 (H, W)."""
    from faster_coco_eval.core import mask

    return mask.decode(_compressed(segmentation, size))


def pixels_of(segmentation: Any, size: tuple[int, int]) -> int:
    """Pixels of a segmentation's mask."""
    from faster_coco_eval.core import mask

    return int(mask.area([_compressed(segmentation, size)])[0])


def _compressed(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    from faster_coco_eval.core import mask

    if isinstance(segmentation, list):
        return mask.merge(mask.frPyObjects(segmentation, *size))
    return mask.frPyObjects(segmentation, *size) if isinstance(segmentation["counts"], list) else segmentation
