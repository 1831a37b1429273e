"""Boxes, masks and images compared by numbers alone, against filled masks and other libraries."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from convmae.data import coco_checks
from convmae.data.coco_files import Images, decoded, read_objects
from convmae.errors import UserError

mask_library = pytest.importorskip("faster_coco_eval.core.mask")

SIZE = (24, 32)


def read(segmentations, boxes=None, size=SIZE):
    """Objects of one image, as a file has them."""
    images = Images(ids=[1], paths=["1.png"], sizes=[size])
    boxes = [[1, 1, 5, 5]] * len(segmentations) if boxes is None else boxes
    entries = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "segmentation": segmentation}
        for number, (box, segmentation) in enumerate(zip(boxes, segmentations, strict=True), 1)
    ]
    found = read_objects(entries, images, [1], masks=any(segmentations))
    assert not found.faults
    return found, coco_checks.geometry(found, images.sizes)


def run_lengths(pixels):
    lengths = mask_library.encode(numpy.asfortranarray(pixels))
    return {"size": list(pixels.shape), "counts": lengths["counts"].decode()}


polygons = st.lists(st.floats(-8, 40, width=32), min_size=6, max_size=12).map(
    lambda found: found[: len(found) // 2 * 2]
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(polygons, min_size=1, max_size=3), min_size=1, max_size=6), st.integers(1, 64))
def test_extents_areas_and_empty_masks_of_polygons_are_those_of_each_alone(objects, chunk):
    segmentations = [None, *objects, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_checks, "_CHUNK", chunk)
        found, where = read(segmentations)
        areas, perimeters = coco_checks._measures(found.objects)
        empty = coco_checks.without_pixels(found, where)
    for number, segmentation in enumerate(segmentations):
        if segmentation is None:
            assert numpy.isnan(where.extents[number]).all()
            assert (areas[number], perimeters[number], empty[number]) == (0, 0, False)
            continue
        points = numpy.array([value for polygon in segmentation for value in polygon]).reshape(-1, 2)
        assert where.extents[number].tolist() == [*points.min(axis=0), *points.max(axis=0)]
        expected = around = 0.0
        for polygon in segmentation:
            x, y = numpy.array(polygon).reshape(-1, 2).T
            around += sum(numpy.hypot(x - numpy.roll(x, -1), y - numpy.roll(y, -1)))
            expected += abs(numpy.dot(x, numpy.roll(y, -1)) - numpy.dot(y, numpy.roll(x, -1))) / 2
        assert areas[number] == pytest.approx(expected, abs=1e-6)
        assert perimeters[number] == pytest.approx(around, abs=1e-6)
        # A mask without a pixel is always found: only such as enclose something are not filled to see.
        assert empty[number] == (decoded(segmentation, SIZE).sum() == 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.2))
def test_extents_and_pixels_of_run_lengths(seed, share):
    pixels = (numpy.random.default_rng(seed).random(SIZE) < share).astype(numpy.uint8)
    found, where = read([run_lengths(pixels)])
    assert found.pixels.tolist() == [pixels.sum()]
    assert coco_checks.without_pixels(found, where).tolist() == [not pixels.any()]
    if pixels.any():
        rows, columns = numpy.nonzero(pixels)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert where.extents[0].tolist() == expected


def test_overlaps_are_torchvision_s():
    corners = numpy.random.default_rng(0).uniform(0, 20, (2, 50, 2, 2))
    boxes, others = numpy.sort(corners, axis=2).reshape(2, 50, 4)
    expected = box_iou(torch.from_numpy(boxes), torch.from_numpy(others)).diagonal()
    assert coco_checks.overlaps(boxes, others) == pytest.approx(expected.numpy())
    nothing = numpy.full((1, 4), numpy.nan)
    assert coco_checks.overlaps(nothing, boxes[:1]).tolist() == [0]


def test_boxes_fit_within_a_pixel_and_a_half_or_a_twentieth_of_a_side():
    other = numpy.array([[100.0, 10, 200, 20]])
    for box, expected in (
        ([104, 11, 196, 21.5], True),
        ([106, 10, 200, 20], False),
        ([100, 10, 200, 22], False),
        ([numpy.nan] * 4, False),
    ):
        assert coco_checks.fits(numpy.array([box], dtype=float), other).tolist() == [expected]


def test_a_box_that_is_clipped_to_its_image_fits_a_mask_that_is_not():
    polygon = [-30, 2, 20, 2, 20, 20, -30, 20]
    _, where = read([[polygon]] * 2 + [None], [[0, 2, 20, 18], [10, 2, 20, 18], [1, 2, 3, 4]])
    assert coco_checks.fitting(where).tolist() == [True, False, True]
    assert coco_checks.share_outside(where) == pytest.approx([0.6, 0.6, 0])


def test_one_convention_must_explain_most_of_what_does_not_fit():
    """Boxes of four are corners, five are somewhere: nobody knows what they are."""
    places = [(3 * n, 2 * n, 9, 7) for n in range(1, 7)] * 3
    shapes = [[[x, y, x + w, y, x + w, y + h, x, y + h]] for x, y, w, h in places]
    boxes = [list(place) for place in places]
    for number in range(4):
        x, y, w, h = places[number + 2]
        boxes[number + 2] = [x, y, x + w, y + h]
    assert "4 of the 18 boxes do not fit their masks and look like corners" in coco_checks.box_convention(
        *read(shapes, boxes)
    )
    for number in range(8, 13):
        boxes[number] = [0, 0, 31, 2]
    assert coco_checks.box_convention(*read(shapes, boxes)) is None
    assert (~coco_checks.fitting(read(shapes, boxes)[1])).sum() >= 5


def test_objects_that_are_there_twice_are_those_of_image_class_and_box():
    found, _ = read([None] * 5, [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4], [0, 2, 3, 4], [1, 2, 3, 4]])
    assert coco_checks.written_twice(found.objects).tolist() == [2, 4]
    found.objects.labels.flags.writeable = True
    found.objects.labels[2] = 0
    assert coco_checks.written_twice(found.objects).tolist() == [4]


def test_categories_of_one_name():
    categories = {1: "cat", 2: "dog", "x": "cat"}
    assert coco_checks.refuse_shared_names("file", {1: "cat", 2: "dog"}, [1, 1]) == []
    told = coco_checks.refuse_shared_names("file", categories, [0, 3, 2])
    assert told == ["'cat': id 1 with 0 objects, id 'x' with 2 objects"]
    with pytest.raises(UserError, match="file has objects of 2 categories named 'cat', of the ids 1 and 'x'"):
        coco_checks.refuse_shared_names("file", categories, [1, 3, 2])
