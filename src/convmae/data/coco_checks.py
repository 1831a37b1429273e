"""What can be told of objects in COCO's format before anybody looks at a pixel: whether boxes, masks and images agree.

Boxes are arrays (N, 4) of N objects, as left, top, right and bottom in pixels unless told otherwise.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy

from convmae.data.coco_files import Objects, ReadObjects, pixels_of
from convmae.errors import UserError

_LOOSE = 0.05  # share of its side by which an edge may be off, but always
_LOOSE_PIXELS = 1.5
_OVERLAP = 0.5  # intersection over union from which a box is that of its mask
_MANY = 0.2  # share of objects that one convention explains and COCO's does not
_SOME = 0.05  # the same without masks, where few objects tell, but all must be explained
_SMALLEST_SIDE = 8  # of an image, in which objects of a pixel are told from fractions
_OUTSIDE = 0.05  # share of an object that may be outside its image untold
_NO_ACCIDENT = 50  # objects
_SAMPLE = 1000  # run lengths that are read in another order
_CHUNK = 1 << 20  # coordinates at a time, as several arrays are made of them

_CONVENTIONS: dict[str, Callable[[numpy.ndarray], Sequence[numpy.ndarray]]] = {
    "corners (left, top, right, bottom)": lambda box: (box[0], box[1], box[2], box[3]),
    "centre and size": lambda box: (
        box[0] - box[2] / 2,
        box[1] - box[3] / 2,
        box[0] + box[2] / 2,
        box[1] + box[3] / 2,
    ),
    "rows before columns (top, left, height, width)": lambda box: (box[1], box[0], box[1] + box[3], box[0] + box[2]),
    "corners with rows first (top, left, bottom, right)": lambda box: (box[1], box[0], box[3], box[2]),
}
"""How tools other than COCO's write four numbers of a box, (4, N) -> its edges."""


class Geometry(NamedTuple):
    """Where the objects of a file are, (N, 4) each; not numbers where they are not told."""

    boxes: numpy.ndarray
    """Left, top, width and height, as in the file."""
    extents: numpy.ndarray
    """Of the masks."""
    sizes: numpy.ndarray
    """Width and height of the objects' images, (N, 2)."""

    def clipped(self, boxes: numpy.ndarray) -> numpy.ndarray:
        """What of the boxes lies inside the images, of no size where nothing does."""
        return numpy.clip(boxes, 0, numpy.tile(self.sizes, 2))


def edges(boxes: numpy.ndarray) -> numpy.ndarray:
    """Left, top, width and height -> left, top, right and bottom."""
    return numpy.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def geometry(read: ReadObjects, sizes: Sequence[tuple[int, int]]) -> Geometry:
    """Boxes and extents of masks; sizes: (H, W) of the images."""
    objects = read.objects
    extents = read.extents.copy()
    with_polygons = numpy.flatnonzero(objects.has_polygons)
    if len(with_polygons):
        points = objects.coordinates.reshape(-1, 2)
        starts = _starts(objects, with_polygons) // 2
        for column, extreme in enumerate((numpy.minimum, numpy.minimum, numpy.maximum, numpy.maximum)):
            extents[with_polygons, column] = extreme.reduceat(points[:, column % 2], starts)
    of_images = numpy.array(sizes, dtype=numpy.float64).reshape(-1, 2)[:, ::-1]
    return Geometry(objects.boxes, extents, of_images[objects.owners])


def _starts(objects: Objects, with_polygons: numpy.ndarray) -> numpy.ndarray:
    """Where the coordinates of these objects begin."""
    ends = numpy.concatenate([[0], objects.polygon_ends])
    before = numpy.concatenate([[0], objects.polygons])
    return ends[before[with_polygons]]


def fits(boxes: numpy.ndarray, others: numpy.ndarray) -> numpy.ndarray:
    """Whether each edge of a box is near that of the other, bool (N,)."""
    loose = numpy.maximum(_LOOSE_PIXELS, _LOOSE * (others[:, 2:] - others[:, :2]))
    return (numpy.abs(boxes - others) <= numpy.tile(loose, 2)).all(axis=1)


def overlaps(boxes: numpy.ndarray, others: numpy.ndarray) -> numpy.ndarray:
    """Intersection over union, (N,); 0 where one of them is not told."""
    inner = numpy.minimum(boxes[:, 2:], others[:, 2:]) - numpy.maximum(boxes[:, :2], others[:, :2])
    shared = inner.clip(0).prod(axis=1)
    union = _areas(boxes) + _areas(others) - shared
    return numpy.divide(shared, union, out=numpy.zeros(len(boxes)), where=union > 0)


def _areas(boxes: numpy.ndarray) -> numpy.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1)


def fitting(found: Geometry) -> numpy.ndarray:
    """Whether box and mask are those of one object, bool (N,), also where only one is told."""
    boxes, extents = edges(found.boxes), found.extents
    known = ~numpy.isnan(boxes[:, 0] + extents[:, 0])
    agree = fits(boxes, extents) | (overlaps(boxes, extents) >= _OVERLAP)
    # Some tools clip one of them to the image.
    boxes, extents = found.clipped(boxes), found.clipped(extents)
    return ~known | agree | fits(boxes, extents) | (overlaps(boxes, extents) >= _OVERLAP)


def mask_convention(read: ReadObjects, found: Geometry) -> str | None:
    """What is wrong with the file's masks, and how to mend it, if another convention than COCO's explains many."""
    boxes, extents, sizes = edges(found.boxes), found.extents, numpy.tile(found.sizes, 2)
    sound = ~read.objects.damaged
    masks = sound & ~numpy.isnan(extents[:, 0])
    number = int(masks.sum())
    in_fractions = masks & _in_fractions(extents, found.sizes)
    if (count := int(in_fractions.sum())) > _MANY * number:
        return (
            f"{count} of the {number} masks look like fractions of their images' width and height: write them in pixels"
        )
    if _all_in_percent(extents[masks], found.sizes[masks]):
        return f"all {number} masks look like percentages of width and height: write them in pixels"
    unfit = masks & ~numpy.isnan(boxes[:, 0]) & ~fits(boxes, extents)
    in_percent = unfit & fits(boxes, extents * sizes / 100)
    if (count := int(in_percent.sum())) > _MANY * number:
        return f"{count} of the {number} masks look like percentages of width and height: write them in pixels"
    suspects = numpy.flatnonzero(unfit & read.objects.has_run_lengths)
    if len(suspects) > _MANY * number:
        sample = suspects[:: -(-len(suspects) // _SAMPLE)]
        read_by_rows = numpy.array([_extent_by_rows(read.objects, index, found.sizes[index]) for index in sample])
        explained = int(fits(boxes[sample], read_by_rows).sum()) * len(suspects) // len(sample)
        if explained > _MANY * number:
            return (
                f"the run lengths of about {explained} of the {number} masks look as if they went row by row: write "
                "them column by column, as COCO's go"
            )
    return None


def _in_fractions(numbers: numpy.ndarray, sizes: numpy.ndarray) -> numpy.ndarray:
    """Whether four numbers of a box or an extent are shares of its image, bool (N,)."""
    low, high = numbers.min(axis=1), numbers.max(axis=1)
    return (low >= 0) & (high > 0) & (high <= 1) & (sizes.min(axis=1) > _SMALLEST_SIDE)


def _all_in_percent(boxes: numpy.ndarray, sizes: numpy.ndarray) -> bool:
    """Whether so many boxes keep to the first 100 pixels of images at least twice as large that it is no accident."""
    return len(boxes) >= _NO_ACCIDENT and bool(boxes.max() <= 100 + _LOOSE_PIXELS and sizes.min() >= 200)


def _extent_by_rows(objects: Objects, index: int, size: numpy.ndarray) -> list[float]:
    """The extent of run lengths that are taken row by row."""
    from faster_coco_eval.core import mask

    width, height = size.astype(int).tolist()
    turned = {"size": [width, height], "counts": objects.segmentation(index)["counts"]}
    if isinstance(turned["counts"], list):
        turned = mask.frPyObjects(turned, width, height)
    top, left, box_height, box_width = mask.toBbox([turned])[0].tolist()
    return [left, top, left + box_width, top + box_height]


def box_convention(read: ReadObjects, found: Geometry) -> str | None:
    """What is wrong with the file's boxes, if another convention than COCO's explains many: by masks, or by images."""
    written, sizes = found.boxes, found.sizes
    known = ~read.objects.damaged & ~numpy.isnan(written[:, 0])
    number = int(known.sum())
    in_fractions = known & _in_fractions(written, sizes)
    if (count := int(in_fractions.sum())) > _MANY * number:
        return f"{count} of the {number} boxes look like fractions of their images' width and height"
    boxes = edges(written)
    if _all_in_percent(boxes[known], sizes[known]):
        return f"all {number} boxes look like percentages of width and height"
    compared = known & ~numpy.isnan(found.extents[:, 0])
    unfit = compared & ~fits(boxes, found.extents) & ~fits(found.clipped(boxes), found.clipped(found.extents))
    counts = {
        what: int((unfit & fits(converted, found.extents)).sum()) for what, converted in _converted(written, sizes)
    }
    best = max(counts, key=lambda what: counts[what])
    if counts[best] > _MANY * int(compared.sum()) and 2 * counts[best] > unfit.sum():
        return f"{counts[best]} of the {number} boxes do not fit their masks and look like {best}"
    alone = known & ~compared
    outside = alone & ~_inside(boxes, sizes)
    if outside.sum() > _SOME * number:
        for what, edges_of in _CONVENTIONS.items():
            converted = numpy.stack(edges_of(written.T), axis=1)
            inside = _inside(converted, sizes)
            # One that explains all is no accident: boxes of objects that images cut off may be outside, too.
            if inside[alone].mean() > 0.99:
                count = int((outside & inside).sum())
                return f"{count} of the {number} boxes reach out of their images and look like {what}"
    return None


def _converted(written: numpy.ndarray, sizes: numpy.ndarray) -> list[tuple[str, numpy.ndarray]]:
    """What the file's boxes would be by each other convention."""
    found = [(what, numpy.stack(edges_of(written.T), axis=1)) for what, edges_of in _CONVENTIONS.items()]
    return [*found, ("percentages of width and height", edges(written) * numpy.tile(sizes, 2) / 100)]


def _inside(boxes: numpy.ndarray, sizes: numpy.ndarray) -> numpy.ndarray:
    """Whether boxes of some size lie in their images, but for a little; bool (N,)."""
    loose = numpy.maximum(_LOOSE_PIXELS, _LOOSE * sizes)
    inside = (boxes[:, :2] >= -loose) & (boxes[:, 2:] <= sizes + loose) & (boxes[:, 2:] >= boxes[:, :2])
    return numpy.all(inside, axis=1)


def share_outside(found: Geometry) -> numpy.ndarray:
    """The share of each mask's extent, or else of the box, that its image cuts off, (N,)."""
    boxes = numpy.where(numpy.isnan(found.extents), edges(found.boxes), found.extents)
    areas = _areas(boxes)
    inside = numpy.divide(_areas(found.clipped(boxes)), areas, out=numpy.ones(len(boxes)), where=areas > 0)
    return 1 - inside


def cut_off(found: Geometry) -> numpy.ndarray:
    """Which objects lose a part to the edges of their images that is worth telling, bool (N,)."""
    return share_outside(found) > _OUTSIDE


def without_pixels(read: ReadObjects, found: Geometry) -> numpy.ndarray:
    """Which objects have a mask of no pixel, bool (N,); only masks that may be so are filled."""
    objects = read.objects
    has_mask = objects.has_polygons | objects.has_run_lengths
    sides = found.clipped(found.extents)
    thin = (sides[:, 2:] - sides[:, :2]).min(axis=1) < 2
    areas, perimeters = _measures(objects)
    # What covers no pixel is about a pixel wide at most: a convex shape has a pixel's centre inside where its area is
    # more than half its perimeter.
    narrow = areas < perimeters / 2 + 4
    suspect = objects.has_polygons & (thin | narrow | cut_off(found))
    empty = has_mask & (read.pixels == 0)
    sizes = found.sizes.astype(int).tolist()
    for number in numpy.flatnonzero(suspect).tolist():
        width, height = sizes[number]
        empty[number] = pixels_of(objects.segmentation(number), (height, width)) == 0
    return empty


def _measures(objects: Objects) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Area, by the shoelace formula, and perimeter of each object's polygons together, (N,) each; 0 without any."""
    areas, perimeters = numpy.zeros(len(objects.polygon_ends)), numpy.zeros(len(objects.polygon_ends))
    starts = numpy.concatenate([[0], objects.polygon_ends])
    first = 0
    while first < len(areas):
        last = max(first + 1, int(numpy.searchsorted(objects.polygon_ends, starts[first] + _CHUNK)))
        x, y = objects.coordinates[starts[first] : starts[last]].reshape(-1, 2).T
        begins = (starts[first:last] - starts[first]) // 2
        following = numpy.arange(1, len(x) + 1)
        following[numpy.append(begins[1:], len(x)) - 1] = begins  # the last point is joined to the first
        areas[first:last] = numpy.abs(numpy.add.reduceat(x * y[following] - x[following] * y, begins)) / 2
        perimeters[first:last] = numpy.add.reduceat(numpy.hypot(x - x[following], y - y[following]), begins)
        first = last
    before = numpy.concatenate([[0], objects.polygons])
    sums = (numpy.concatenate([[0], numpy.cumsum(measure)]) for measure in (areas, perimeters))
    of_areas, of_perimeters = (totals[before[1:]] - totals[before[:-1]] for totals in sums)
    return of_areas, of_perimeters


def written_twice(objects: Objects) -> numpy.ndarray:
    """Numbers of learned objects that have the image, the class and the box of an earlier one."""
    numbers = numpy.flatnonzero(objects.learned)
    columns = (*objects.boxes[numbers].T, objects.labels[numbers], objects.owners[numbers])
    order = numpy.lexsort(columns)  # stable: of equal ones the first comes first
    rows = numpy.stack(columns, axis=1)[order]
    return numpy.sort(numbers[order[1:][(rows[1:] == rows[:-1]).all(axis=1)]])


def refuse_shared_names(name: str, categories: dict, counts: Sequence[int]) -> list[str]:
    """Categories of one name, of which at most one has objects; raises UserError where more have.

    categories: names by id; counts: of the objects of each.
    """
    by_name: dict[str, list[tuple[object, int]]] = {}
    for (category_id, category), count in zip(categories.items(), counts, strict=True):
        by_name.setdefault(category, []).append((category_id, count))
    shared = {category: found for category, found in by_name.items() if len(found) > 1}
    for category, found in shared.items():
        used = [f"{category_id!r}" for category_id, count in found if count]
        if len(used) > 1:
            raise UserError(
                f"{name} has objects of {len(used)} categories named {category!r}, of the ids {' and '.join(used)}: "
                "give their objects one id, or the categories names of their own"
            )
    return [
        f"{category!r}: {', '.join(f'id {category_id!r} with {count} objects' for category_id, count in found)}"
        for category, found in shared.items()
    ]
