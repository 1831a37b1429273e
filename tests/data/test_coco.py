"""COCO files written for the purpose: what is read, refused and left out."""

import json
import pickle
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from convmae.data.coco import Annotation, find_coco, open_coco
from convmae.errors import UserError

mask_library = pytest.importorskip("faster_coco_eval.core.mask")

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 90, "name": "brush"}]
SIZE = (24, 32)  # of the pictures in these files


def rectangle(left, top, width, height, size=SIZE):
    pixels = numpy.zeros(size, dtype=numpy.uint8)
    pixels[top : top + height, left : left + width] = 1
    return pixels


def compressed(pixels):
    lengths = mask_library.encode(numpy.asfortranarray(pixels))
    return {"size": list(pixels.shape), "counts": lengths["counts"].decode()}


def uncompressed(pixels):
    """COCO's run lengths: of zeros and ones in turn, column by column."""
    flat = [0, *pixels.T.flatten().tolist()]
    ends = [place for place in range(1, len(flat)) if flat[place] != flat[place - 1]]
    counts = numpy.diff([1, *ends, len(flat)]).tolist()
    return {"size": list(pixels.shape), "counts": counts}


def entry(number, image_id=5, box=(4, 6, 10, 8), category_id=2, segmentation=None, **others):
    """An annotation, by default of a rectangle drawn as a polygon."""
    left, top, width, height = box
    right, bottom = left + width, top + height
    polygon = [[left, top, right, top, right, bottom, left, bottom]]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "area": width * height,
        "iscrowd": 0,
        "segmentation": polygon if segmentation is None else segmentation,
        **others,
    }


ENTRIES = [
    entry(1),
    entry(2, 9, (1, 2, 3, 4), 90, compressed(rectangle(1, 2, 3, 4))),
    entry(3, 5, (0, 0, 20, 20), 7, uncompressed(rectangle(0, 0, 20, 20)), iscrowd=1),
    entry(4, 5, (7, 3, 2, 5), 7, uncompressed(rectangle(7, 3, 2, 5))),
    entry(5, 9, (1, 2, 0, 4)),
]


@pytest.fixture
def coco(coco_files):
    """A function that writes an annotation file and opens it with its pictures."""

    def open_written(annotations=ENTRIES, images=None, categories=CATEGORIES, skip_damaged=False):
        return open_coco(*coco_files(annotations, categories, images), skip_damaged)

    return open_written


# Reading


def test_pictures_come_with_their_objects_in_the_order_of_the_file(coco, noise):
    source = coco()
    assert len(source) == 3
    assert source.classes == ["cat", "dog", "brush"]
    assert (source.category_ids, source.image_ids) == ([2, 7, 90], [5, 3, 9])
    assert source.sizes.tolist() == [list(SIZE)] * 3
    assert [Path(source.image_name(index)).name for index in range(3)] == ["5.png", "3.png", "9.png"]
    for index, image_id in enumerate((5, 3, 9)):
        with source.open(index) as file:
            assert numpy.array_equal(numpy.asarray(Image.open(file)), noise(SIZE, image_id))
    found = []
    for index in range(3):
        file, annotation = source.open_annotated(index)
        file.close()
        found.append(annotation)
    assert found[0] == Annotation(
        SIZE,
        (1, 2),
        ((4, 6, 10, 8), (7, 3, 2, 5)),
        (ENTRIES[0]["segmentation"], ENTRIES[3]["segmentation"]),
        ignored=((0, 0, 20, 20),),
    )
    assert found[1] == Annotation(SIZE, (), (), ())
    assert found[2] == Annotation(SIZE, (3,), ((1, 2, 3, 4),), (ENTRIES[1]["segmentation"],))
    assert source.num_objects == 3
    (flat,) = source.findings
    assert flat.summary == "1 objects without width or height, which teach nothing"
    assert len(flat.items) == 1


def test_masks_of_polygons_and_of_both_kinds_of_run_lengths(coco):
    source = coco()
    masks = [mask for index in range(3) for mask in source.annotation(index).masks()]
    expected = [rectangle(4, 6, 10, 8), rectangle(7, 3, 2, 5), rectangle(1, 2, 3, 4)]
    assert len(masks) == 3
    assert all(numpy.array_equal(*pair) for pair in zip(masks, expected, strict=True))


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools and NumPy
@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(3, 8), st.integers(1, 3))
def test_polygons_are_filled_as_pycocotools_does(numbers, points, parts):
    theirs = pytest.importorskip("pycocotools.mask")
    polygons = [[numbers.uniform(-5, 35) for _ in range(2 * points)] for _ in range(parts)]
    (mask,) = Annotation(SIZE, (1,), ((0, 0, 1, 1),), (polygons,)).masks()
    assert numpy.array_equal(mask, theirs.decode(theirs.merge(theirs.frPyObjects(polygons, *SIZE))))


def test_the_ground_truth_holds_crowds_and_objects_of_no_size(coco):
    truth = coco().ground_truth()
    by_picture = [ENTRIES[0], ENTRIES[2], ENTRIES[3], ENTRIES[1], ENTRIES[4]]
    assert truth["annotations"] == [{**found, "id": number} for number, found in enumerate(by_picture, 1)]
    assert truth["categories"] == sorted(CATEGORIES, key=lambda category: category["id"])
    assert [image["id"] for image in truth["images"]] == [5, 3, 9]
    json.dumps(truth)


def test_an_area_that_the_file_does_not_tell_is_the_masks(coco):
    entries = [entry(1, segmentation=compressed(rectangle(4, 6, 5, 8))), entry(2)]
    for one in entries:
        del one["area"]
    areas = [found["area"] for found in coco(entries).ground_truth()["annotations"]]
    assert areas == [40, 80]


def test_a_copy_in_another_process_reads_the_same(coco):
    source = coco()
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.annotation(index) for index in range(3)] == [source.annotation(index) for index in range(3)]
    assert copy.image_name(2) == source.image_name(2)


def test_pictures_in_folders_of_their_own(coco, tmp_path):
    (tmp_path / "pictures" / "a").mkdir()
    (tmp_path / "pictures" / "5.png").rename(tmp_path / "pictures" / "a" / "5.png")
    images = [{"id": 5, "file_name": "a/5.png", "height": 24, "width": 32}]
    assert coco([], images).image_name(0).endswith("a/5.png")
    images.append({**images[0], "id": 6, "file_name": "b/5.png"})
    with pytest.raises(UserError, match=r"1 of the 2 images .* the first is b/5\.png"):
        coco([], images)


# Mistakes


BROKEN = {
    "negative": (entry(4, box=(4, 6, -10, 8)), "its box has a negative width or height"),
    "infinite": (entry(4, bbox=[0, 0, float("inf"), 3]), "its box is not four finite numbers"),
    "not a number": (entry(4, bbox=[float("nan"), 0, 1, 3]), "its box is not four finite numbers"),
    "beyond floats": (entry(4, bbox=[10**400, 0, 1, 3]), "its box is not four finite numbers"),
    "three numbers": (entry(4, bbox=[0, 0, 1]), "its box is not four finite numbers"),
    "no box": (entry(4, bbox=None), "its box is not four finite numbers"),
    "two points": (entry(4, segmentation=[[0, 0, 5, 5]]), "a polygon has 4 numbers, not three points or more"),
    "odd": (entry(4, segmentation=[[0, 0, 5, 5, 1, 2, 3]]), "a polygon has 7 numbers, not three points or more"),
    "words": (entry(4, segmentation=[[0, 0, 5, 5, 1, "a"]]), "a polygon is not a list of finite numbers"),
    "far": (entry(4, segmentation=[[0, 0, 5, 5, 1, 1e9]]), "a polygon lies far outside the 32x24 image"),
    "other size": (
        entry(4, segmentation=compressed(rectangle(1, 1, 2, 2, (32, 24)))),
        "its run lengths are of another size than the 32x24 image",
    ),
    "short": (entry(4, segmentation={"size": SIZE, "counts": [5, 5]}), "its run lengths are not those of 32x24 pixels"),
    "long": (
        entry(4, segmentation={"size": SIZE, "counts": [5, 5, 9999]}),
        "its run lengths are not those of 32x24 pixels",
    ),
    "fraction": (
        entry(4, segmentation={"size": SIZE, "counts": [5.5]}),
        "its run lengths are not those of 32x24 pixels",
    ),
    "garbage": (
        entry(4, segmentation={"size": SIZE, "counts": "01"}),
        "its run lengths are not those of 32x24 pixels",
    ),
    "category": (entry(4, category_id=3), "there is no category 3"),
    "image": (entry(4, image_id=77), "there is no image 77"),
    "crowd": (entry(4, iscrowd=2), "its iscrowd is not 0 or 1"),
    "area": (entry(4, area="large"), "its area is not a finite number"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_annotations_are_refused_or_left_out(name, coco, tmp_path):
    broken, fault = BROKEN[name]
    annotations = [entry(1), broken, {**broken, "id": 8}, entry(5, 9)]
    with pytest.raises(UserError) as error:
        coco(annotations)
    assert str(error.value) == (
        f"{tmp_path}/instances.json: 2 of the 4 annotations are broken, the first is annotation 4 ({fault}): correct "
        "them, or leave them out with --skip-damaged"
    )
    source = coco(annotations, skip_damaged=True)
    (left_out,) = source.findings
    assert left_out.summary == "left out 2 broken annotations"
    assert left_out.items == [f"{tmp_path}/instances.json: annotation {number} ({fault})" for number in (4, 8)]
    assert [len(source.annotation(index).labels) for index in range(3)] == [1, 0, 1]
    assert len(source.ground_truth()["annotations"]) == 2


def test_an_annotation_without_an_id_is_called_by_its_place(coco):
    nameless = {key: value for key, value in entry(1, image_id=4).items() if key != "id"}
    with pytest.raises(UserError, match=r"the first is the one at place 1 \(there is no image 4\)"):
        coco([entry(1), nameless])
    with pytest.raises(UserError, match=r"the one at place 0 \(it is not an object\)"):
        coco(["annotation"])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"id": 3}, r"image 3 \(2 images have this id\)"),
        ({"id": "9"}, r"the one at place 2 \(its id is not a number\)"),
        ({"file_name": None}, r"image 9 \(it has no file_name\)"),
        ({"height": 0}, r"image 9 \(its height and width are not whole numbers above 0\)"),
        ({"width": "32"}, r"image 9 \(its height and width are not whole numbers above 0\)"),
    ],
)
def test_broken_images_are_refused_or_left_out_with_their_objects(change, fault, coco):
    images = [{"id": n, "file_name": f"{n}.png", "height": 24, "width": 32} for n in (5, 3, 9)]
    images[2] |= change
    annotations = [entry(1), entry(2, images[2]["id"])] if images[2]["id"] != "9" else [entry(1)]
    with pytest.raises(UserError, match=rf"of the 3 images are broken, the first is {fault}: correct them"):
        coco(annotations, images)
    source = coco(annotations, images, skip_damaged=True)
    assert source.image_ids == ([5] if change == {"id": 3} else [5, 3])
    (left_out,) = source.findings
    assert left_out.summary == f"left out {3 - len(source)} broken images with their annotations"
    assert len(left_out.items) == 3 - len(source)
    assert len(source.ground_truth()["annotations"]) == 1


def test_missing_pictures_are_refused_or_left_out(coco, tmp_path):
    for name in ("5.png", "3.png"):
        (tmp_path / "pictures" / name).unlink()
    with pytest.raises(UserError) as error:
        coco()
    assert str(error.value) == (
        f"2 of the 3 images of {tmp_path}/instances.json are not in {tmp_path}/pictures, the first is 5.png: check the "
        "folder, or leave them out with --skip-damaged"
    )
    source = coco(skip_damaged=True)
    assert source.image_ids == [9]
    left_out = source.findings[0]  # then comes an object without height
    assert left_out.summary == "left out 2 images that are missing"
    assert left_out.items == [f"{tmp_path}/pictures/{name}: is missing" for name in ("5.png", "3.png")]
    assert source.annotation(0).labels == (3,)
    (tmp_path / "pictures" / "9.png").unlink()
    with pytest.raises(UserError, match=r"names no images that .*pictures holds: check both"):
        coco(skip_damaged=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON, write or download it again"),
        (b"\xff\xfe\x00", "is not JSON, write or download it again"),
        (b"[" * 100_000, "is not JSON, write or download it again"),
        (b"[]", "is not in COCO's format, it has no list of images and of annotations and of categories"),
        (b'{"images": [], "categories": []}', "it has no list of annotations: give the file of instances"),
        (b'{"images": [], "annotations": [], "categories": []}', "needs categories"),
        (b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "names no images"),
        (b'{"images": [], "annotations": [], "categories": [{"id": "a", "name": "a"}]}', "needs categories"),
        (
            b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "each with a number of its own as id, and a name: correct them",
        ),
    ],
)
def test_files_of_another_format_are_refused(content, message, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_coco(path, tmp_path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_missing_files_and_folders_are_named(coco, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read, check the path: No such file"):
        open_coco(tmp_path / "nowhere.json", tmp_path)
    coco()
    with pytest.raises(UserError, match="nowhere is not a folder: give the one with the images"):
        open_coco(tmp_path / "instances.json", tmp_path / "nowhere")


def test_the_missing_library_names_its_extra(coco, monkeypatch):
    monkeypatch.setattr("convmae.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'convmae\[detection\]'"):
        coco()


def test_cocos_folder_and_paths_that_replace_its_parts(tmp_path):
    annotations, images = tmp_path / "annotations" / "instances_val2017.json", tmp_path / "val2017"
    with pytest.raises(UserError, match=r"instances_val2017\.json does not exist: .* another path with --annotations"):
        find_coco(tmp_path, "val")
    annotations.parent.mkdir()
    annotations.touch()
    with pytest.raises(UserError, match=r"val2017 does not exist: .* another path with --images"):
        find_coco(tmp_path, "val")
    images.mkdir()
    assert find_coco(tmp_path, "val") == (annotations, images)
    assert find_coco(None, "train", annotations, images) == (annotations, images)
    assert find_coco(tmp_path, "val", images=tmp_path) == (annotations, tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist: check --val-images"):
        find_coco(tmp_path, "val", images=tmp_path / "nowhere", flags=("--val-annotations", "--val-images"))
    with pytest.raises(UserError, match="give it as --data, or another path with --images"):
        find_coco(None, "train", annotations)


# Masks that are missing


def test_objects_without_a_mask_among_others_are_counted_and_have_their_boxes(coco):
    source = coco([entry(1), entry(2, segmentation=[]), {**entry(3), "segmentation": None}])
    annotation = source.annotation(0)
    assert [segmentation is None for segmentation in annotation.segmentations] == [False, True, True]
    assert [mask is None for mask in annotation.masks()] == [False, True, True]
    (finding,) = source.findings
    assert finding.summary == "2 objects have no mask and teach their boxes alone"
    assert [item.partition(": ")[2] for item in finding.items] == [
        f"annotation {number} of image 5" for number in (2, 3)
    ]


def test_where_no_object_has_a_mask_only_boxes_are_read_and_only_where_that_is_asked(coco_files, coco):
    bare = [
        {key: value for key, value in entry(number).items() if key not in ("segmentation", "area")} for number in (1, 2)
    ]
    with pytest.raises(UserError, match=r"2 of the 2 annotations are broken, .*it has no segmentation; --masks false"):
        coco(bare)
    source = open_coco(*coco_files(bare, CATEGORIES), masks=False)
    assert source.findings == []
    assert source.annotation(0).segmentations == (None, None)
    areas = [found["area"] for found in source.ground_truth()["annotations"]]
    assert areas == [found["bbox"][2] * found["bbox"][3] for found in bare]
