"""What entries of a COCO file say, in the forms that tools write."""

import json
import math
import pickle

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convmae.data.coco_files import Images, decoded, id_order, pixels_of, read_categories, read_objects
from convmae.errors import UserError

mask_library = pytest.importorskip("faster_coco_eval.core.mask")

SIZE = (24, 32)
POLYGON = [4, 6, 14, 6, 14, 14, 4, 14]


def images():
    return Images(ids=[1, "b"], paths=["1.png", "b.png"], sizes=[SIZE, SIZE], without=[3])


def entry(**others):
    return {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 6, 10, 8], "segmentation": [POLYGON], **others}


def test_categories_are_sorted_numbers_before_texts(tmp_path):
    entries = [{"id": value, "name": str(value)} for value in ("b", 10, 2.5, "10", 2)]
    assert list(read_categories(tmp_path, entries)) == [2, 2.5, 10, "10", "b"]
    assert sorted(["a", 3, 1.5], key=id_order) == [1.5, 3, "a"]
    for wrong in (None, True, [1], float("nan")):
        with pytest.raises(UserError, match="needs categories, each with an id of its own and a name"):
            read_categories(tmp_path, [{"id": wrong, "name": "a"}])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.lists(st.lists(st.floats(0, 20), min_size=6, max_size=6), min_size=1, max_size=3),
            st.integers(0, 2**32 - 1).map(lambda seed: seed),
            st.none(),
        ),
        max_size=8,
    )
)
def test_packed_segmentations_are_those_of_the_file(kinds):
    """Polygons, run lengths and none, in any order; through a copy for another process, too."""
    segmentations = []
    for kind in kinds:
        if isinstance(kind, int):
            pixels = (numpy.random.default_rng(kind).random(SIZE) < 0.3).astype(numpy.uint8)
            lengths = mask_library.encode(numpy.asfortranarray(pixels))
            kind = {"size": list(SIZE), "counts": lengths["counts"].decode()}
        segmentations.append(kind)
    more = [*segmentations, [POLYGON]]  # some object has a mask
    found = read_objects([entry(segmentation=kind) for kind in more], images(), [1])
    objects = pickle.loads(pickle.dumps(found.objects))
    assert [objects.segmentation(number) for number in range(len(objects))] == more
    assert objects.has_mask.tolist() == [kind is not None for kind in more]
    bare = objects.without_masks()
    assert [bare.segmentation(number) for number in range(len(bare))] == [None] * len(bare)


def test_entries_are_taken_out_of_the_list_and_those_of_images_that_are_left_out_ignored():
    entries = [entry(), entry(image_id=3), entry(image_id="b", id=None), "nothing", entry(image_id=8, id="x")]
    found = read_objects(entries, images(), [1])
    assert entries == [None] * 5
    assert found.objects.owners.tolist() == [0, 1]
    assert [found.name(number) for number in range(2)] == ["annotation 1", "the one at place 2"]
    assert found.faults == {
        3: "the one at place 3 (it is not an object)",
        4: "annotation x (there is no image 8)",
    }


def test_broken_objects_keep_what_is_known_of_them():
    entries = [entry(area="x"), entry(category_id=9), entry(bbox=[1, 2]), entry(segmentation=[[1, 2]])]
    found = read_objects(entries, images(), [1])
    assert found.objects.damaged.all()
    assert not found.objects.learned.any()
    assert found.objects.labels.tolist() == [1, 0, 1, 1]
    assert numpy.isnan(found.objects.boxes).all(axis=1).tolist() == [False, False, True, False]
    assert found.objects.has_mask.tolist() == [True, True, True, False]
    assert found.notes == {}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"iscrowd": 1.0, "area": 3}, (True, 3)),
        ({"iscrowd": "1", "area": "3.5"}, (True, 3.5)),
        ({"iscrowd": True, "area": 1e3}, (True, 1000)),
        ({"iscrowd": None, "area": None}, (False, math.nan)),
        ({}, (False, math.nan)),
    ],
)
def test_crowds_and_areas(values, expected):
    found = read_objects([entry(**values)], images(), [1])
    assert found.faults == {}
    assert (bool(found.objects.crowd[0]), found.objects.areas[0]) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("value", ["yes", 2, -1, [1], math.nan, "nan"])
def test_what_is_no_crowd(value):
    found = read_objects([entry(iscrowd=value)], images(), [1])
    assert found.faults == {0: "annotation 1 (its iscrowd is not 0 or 1)"}


@pytest.mark.parametrize("value", ["large", math.nan, math.inf, "inf", [3], True, 10**400])
def test_what_is_no_area(value):
    found = read_objects([entry(area=value)], images(), [1])
    assert found.faults == {0: "annotation 1 (its area is not a finite number)"}


def test_pixels_are_those_of_the_decoded_mask():
    pixels = (numpy.random.default_rng(0).random(SIZE) < 0.3).astype(numpy.uint8)
    lengths = mask_library.encode(numpy.asfortranarray(pixels))
    ends = numpy.flatnonzero(numpy.diff(pixels.T.ravel(), prepend=0, append=2))
    counts = numpy.diff(ends, prepend=0).tolist()
    for segmentation in (
        {"size": list(SIZE), "counts": lengths["counts"].decode()},
        {"size": list(SIZE), "counts": counts},
    ):
        assert numpy.array_equal(decoded(json.loads(json.dumps(segmentation)), SIZE), pixels)
        assert pixels_of(segmentation, SIZE) == pixels.sum()
    assert pixels_of([POLYGON], SIZE) == decoded([POLYGON], SIZE).sum() == 80
