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
from convmae.findings import Finding

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

    def open_written(annotations=ENTRIES, images=None, categories=CATEGORIES, skip_damaged=False, **options):
        return open_coco(*coco_files(annotations, categories, images), skip_damaged, **options)

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
    assert source.class_counts == [1, 1, 1]
    name = Path(source.name)
    assert list(source.findings) == [
        Finding("1 objects without width or height, which teach nothing", [f"{name}: annotation 5 of image 9"]),
        Finding(
            "1 of the 5 objects is a crowd, which teaches nothing (CVAT marks single objects with masks so: where "
            "these are such, write iscrowd 0 for them)",
            [f"{name}: annotation 3 of image 5"],
        ),
    ]


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
    "no box, no mask": (entry(4, bbox=None, segmentation=[]), "it has neither a box nor a mask"),
    "box of text": (entry(4, bbox=[0, 0, "wide", 3]), "its box is not four finite numbers"),
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
    left_out, _ = source.findings  # then come classes without objects
    assert left_out.summary == "left out 2 broken annotations"
    assert left_out.items == [f"{tmp_path}/instances.json: annotation {number} ({fault})" for number in (4, 8)]
    assert [len(source.annotation(index).labels) for index in range(3)] == [1, 0, 1]
    truth = source.ground_truth()["annotations"]
    assert [(found["id"], found["image_id"]) for found in truth if not found["iscrowd"]] == [
        (truth[0]["id"], 5),
        (truth[-1]["id"], 9),
    ]


@pytest.mark.parametrize(
    ("changes", "box"),
    [
        ({"area": "large"}, (4, 6, 10, 8)),
        ({"segmentation": [[0, 0, 5, 5]]}, (4, 6, 10, 8)),
        ({"bbox": [4, 6, -10, 8]}, (4, 6, 10, 8)),  # that of the mask
        ({"bbox": [-4, 20, 10, 8], "iscrowd": 7}, (0, 20, 6, 4)),  # what is inside
        ({"bbox": [4, 6, -10, 8], "segmentation": [[0, 0, 5, 5]]}, None),
        ({"bbox": [40, 6, 10, 8], "iscrowd": 7}, None),
    ],
)
def test_broken_objects_are_regions_that_teach_nothing_and_where_detections_do_not_count(changes, box, coco):
    source = coco([entry(1), {**entry(2), **changes}, {**entry(3), **changes, "category_id": 55}], skip_damaged=True)
    found = source.annotation(0)
    assert found.labels == (1,)
    assert found.ignored == (() if box is None else (box, box))
    crowds = [one for one in source.ground_truth()["annotations"] if one["iscrowd"]]
    # That of an unknown category may be any.
    assert [one["category_id"] for one in crowds] == ([] if box is None else [2, 2, 7, 90])
    for one in crowds:
        assert tuple(one["bbox"]) == box
        left, top, width, height = map(int, box)
        filled = Annotation(SIZE, (1,), (box,), (one["segmentation"],)).masks()
        assert numpy.array_equal(next(filled), rectangle(left, top, width, height))
    assert len({one["id"] for one in source.ground_truth()["annotations"]}) == 1 + len(crowds)


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
        ({"id": None}, r"the one at place 2 \(its id is neither a number nor text\)"),
        ({"id": True}, r"the one at place 2 \(its id is neither a number nor text\)"),
        ({"file_name": None}, r"image 9 \(it has no file_name\)"),
        ({"height": -24}, r"image 9 \(its height and width are not whole numbers above 0\)"),
        ({"width": "wide"}, r"image 9 \(its height and width are not whole numbers above 0\)"),
        ({"width": 32.5}, r"image 9 \(its height and width are not whole numbers above 0\)"),
    ],
)
def test_broken_images_are_refused_or_left_out_with_their_objects(change, fault, coco):
    images = [{"id": n, "file_name": f"{n}.png", "height": 24, "width": 32} for n in (5, 3, 9)]
    images[2] |= change
    annotations = [entry(1)] if images[2]["id"] in (None, True) else [entry(1), entry(2, images[2]["id"])]
    with pytest.raises(UserError, match=rf"of the 3 images are broken, the first is {fault}: correct them"):
        coco(annotations, images)
    source = coco(annotations, images, skip_damaged=True)
    assert source.image_ids == ([5] if change == {"id": 3} else [5, 3])
    left_out, _ = source.findings  # then come classes without objects
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
        (b'{"images": [], "annotations": [], "categories": [{"id": null, "name": "a"}]}', "needs categories"),
        (
            b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "each with an id of its own and a name: correct them",
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


# Files as tools write them


def summaries_of(source):
    return [finding.summary for finding in source.findings]


CHILD = "e3b0c442-98fc"


def test_ids_of_any_kind_come_back_as_they_are(coco):
    categories = [{"id": "dog", "name": "dog"}, {"id": 2.5, "name": "cat"}, {"id": 7, "name": "owl"}]
    images = [
        {"id": image_id, "file_name": f"{n}.png", "height": 24, "width": 32} for n, image_id in ((5, CHILD), (3, 0))
    ]
    entries = [entry("a1", CHILD, category_id="dog"), entry(None, 0, category_id=2.5), entry(CHILD, 0, category_id=7)]
    source = coco(entries, images, categories)
    assert (source.category_ids, source.classes) == ([2.5, 7, "dog"], ["cat", "owl", "dog"])
    assert source.image_ids == [CHILD, 0]
    assert [source.annotation(index).labels for index in range(2)] == [(3,), (1, 2)]
    truth = source.ground_truth()
    assert [(one["image_id"], one["category_id"]) for one in truth["annotations"]] == [(CHILD, "dog"), (0, 2.5), (0, 7)]
    assert source.findings == []


def test_ids_of_another_type_are_found_where_they_mean_one_entry(coco, tmp_path):
    entries = [entry(1), entry(2, "9", category_id="7"), entry(3, 9.0, category_id=90)]
    source = coco(entries)
    assert source.annotation(2).labels == (2, 3)
    (other,) = source.findings
    assert other.summary == "1 annotation names its image or category by an id of another type, such as '7' for 7"
    assert other.items == [f"{tmp_path}/instances.json: annotation 2 of image 9"]
    images = [{"id": n, "file_name": f"{m}.png", "height": 24, "width": 32} for n, m in ((5, 5), ("9", 3), (9, 9))]
    exact = coco(entries, images)
    assert [len(exact.annotation(index).labels) for index in range(3)] == [1, 1, 1]
    with pytest.raises(UserError, match=r"there is no image '09'"):
        coco([entry(1, "09")])


@pytest.mark.parametrize("crowd", [None, 0.0, "0", False, "missing"])
@pytest.mark.parametrize("area", [None, 80.0, "80", 0, "missing"])
def test_crowd_and_area_null_missing_or_text(coco, crowd, area):
    one = {**entry(1), "iscrowd": crowd, "area": area}
    one = {key: value for key, value in one.items() if value != "missing"}
    source = coco([one, entry(2, category_id=7), entry(3, category_id=90)])
    assert source.annotation(0).labels == (1, 2, 3)
    first = source.ground_truth()["annotations"][0]
    assert (first["iscrowd"], first["area"]) == (0, 80)
    told = {None, "0", "80"} & {crowd, area} if area != 0 else {None, "0"} & {crowd}
    expected = ["1 annotation has a number as text, or null for one, and is read as it is meant"] * bool(told)
    if area == 0:
        expected.append("1 object has an area of 0, which is measured instead")
    assert summaries_of(source) == expected


def test_a_box_of_text_is_read(coco):
    source = coco([entry(1, bbox=["4", "6.0", 10, "8"]), entry(2, category_id=7), entry(3, category_id=90)])
    assert source.annotation(0).boxes[0] == (4, 6, 10, 8)
    assert len(source.findings) == 1


@pytest.mark.parametrize("told", [{}, {"height": None, "width": None}, {"height": 0, "width": 0}, {"height": 24}])
def test_sizes_that_the_file_does_not_tell_are_those_of_the_headers(coco, told, tmp_path):
    with Image.open(tmp_path / "pictures" / "9.png") as image:
        exif = Image.Exif()
        exif[0x0112] = 6  # turned
        image.save(tmp_path / "pictures" / "turned.jpg", exif=exif)
    names = {5: "5.png", 9: "turned.jpg"}
    images = [{"id": number, "file_name": name, **told} for number, name in names.items()]
    source = coco([], images[:1] if told.get("height") else images)
    assert source.sizes.tolist()[0] == [24, 32]
    assert source.sizes.tolist()[1:] == ([] if told == {"height": 24} else [[32, 24]])
    number = len(source)
    assert summaries_of(source)[0] == (
        f"the file does not tell the size of {number} image, so that its header does"
        if number == 1
        else f"the file does not tell the sizes of {number} images, so that their headers do"
    )


def test_an_image_of_unknown_size_is_broken(coco, tmp_path):
    (tmp_path / "pictures" / "9.png").write_bytes(b"no picture")
    images = [{"id": 5, "file_name": "5.png"}, {"id": 9, "file_name": "9.png"}]
    with pytest.raises(UserError, match=r"image 9 \(neither its entry nor its file tells height and width\)"):
        coco([], images)


def test_sizes_as_text_are_numbers(coco):
    images = [{"id": 5, "file_name": "5.png", "height": "24", "width": 32.0}]
    source = coco([], images)
    assert source.sizes.tolist() == [[24, 32]]
    assert summaries_of(source) == ["the size of 1 image is written as text, and read as numbers"]


@pytest.mark.parametrize("nothing", [None, [], "missing"])
def test_boxes_that_are_missing_are_drawn_around_the_masks(coco, nothing):
    entries = [entry(1), entry(2, segmentation=compressed(rectangle(7, 3, 2, 5))), entry(3, category_id=7), entry(4, 9)]
    for one in entries[:2]:
        one["bbox"] = nothing
        if nothing == "missing":
            del one["bbox"]
    source = coco(entries, categories=CATEGORIES[:2])
    assert source.annotation(0).boxes[:2] == ((4, 6, 10, 8), (7, 3, 2, 5))
    (derived,) = source.findings
    assert derived.summary == "2 objects have no box, so that theirs are drawn around their masks"
    assert source.ground_truth()["annotations"][1]["bbox"] == [7, 3, 2, 5]


GOOD = [4, 6, 14, 6, 14, 14, 4, 14]


@pytest.mark.parametrize(
    "bad", [[], [1, 2], [0, 0, 5, 5], [1, 2, 3, 4, 5, 6, 7], [1, 2, None, 4, 5, 6], [0, 0, 5, 5, 1, 1e9], 7]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_polygon_beside_a_good_one_is_dropped(coco, bad, first):
    polygons = [bad, GOOD] if first else [GOOD, bad]
    source = coco([entry(1, segmentation=polygons), entry(2, 9)], categories=CATEGORIES[1:2])
    assert source.annotation(0).segmentations == ([GOOD],)
    assert summaries_of(source) == ["1 object lost broken polygons, and keeps its others"]


PAIRS = [[4, 6], [14, 6], [14, 14], [4, 14]]


@pytest.mark.parametrize("polygons", [GOOD, PAIRS, [PAIRS], [PAIRS, PAIRS]])
def test_flat_polygons_and_pairs_of_points(coco, polygons):
    source = coco([entry(1, segmentation=polygons), entry(2, 9)], categories=CATEGORIES[1:2])
    (mask,) = source.annotation(0).masks()
    assert numpy.array_equal(mask, rectangle(4, 6, 10, 8))
    assert summaries_of(source) == ["1 object has its polygons as one flat list or as pairs of points"]


# Boxes and masks


def objects_of(form, segmentation=None, scale=(1.0, 1.0)):
    """Eight objects of which boxes or masks are written in another way."""
    rectangles = [(4, 6, 10, 8), (15, 3, 12, 9), (9, 11, 14, 10), (20, 12, 10, 10)] * 2
    entries = []
    for number, box in enumerate(rectangles, 1):
        one = entry(number, 5 if number < 5 else 9, box)
        polygon = one["segmentation"][0]
        polygon[:] = [value * scale[place % 2] for place, value in enumerate(polygon)]
        entries.append({**one, "bbox": form(*box), **({"segmentation": segmentation(box)} if segmentation else {})})
    return entries


FORMS = {
    "corners (left, top, right, bottom)": lambda x, y, w, h: [x, y, x + w, y + h],
    "centre and size": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
    "rows before columns (top, left, height, width)": lambda x, y, w, h: [y, x, h, w],
    "corners with rows first (top, left, bottom, right)": lambda x, y, w, h: [y, x, y + h, x + w],
    "percentages of width and height": lambda x, y, w, h: [x / 0.32, y / 0.24, w / 0.32, h / 0.24],
    "fractions of their images' width and height": lambda x, y, w, h: [x / 32, y / 24, w / 32, h / 24],
}


@pytest.mark.parametrize("what", FORMS)
def test_boxes_of_another_convention_are_refused_or_drawn_around_the_masks(coco, what, tmp_path):
    entries = objects_of(FORMS[what])
    with pytest.raises(UserError) as error:
        coco(entries, categories=CATEGORIES[1:2])
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/instances.json: ")
    assert "of the 8 boxes" in message
    assert f"look like {what}: write left, top, width and height in pixels" in message
    assert message.endswith("or take the boxes of the masks with --boxes-from-masks")
    assert "\n" not in message
    source = coco(entries, categories=CATEGORIES[1:2], boxes_from_masks=True)
    boxes = [box for index in (0, 2) for box in source.annotation(index).boxes]
    assert boxes == [(4, 6, 10, 8), (15, 3, 12, 9), (9, 11, 14, 10), (20, 12, 10, 10)] * 2
    assert [one["bbox"] for one in source.ground_truth()["annotations"]] == [list(box) for box in boxes]
    # In images this small a percentage may be beyond them.
    with pytest.raises(UserError, match="lies outside" if "percent" in what else "look like") as alone:
        coco([{**one, "segmentation": None} for one in entries], masks=False, categories=CATEGORIES[1:2])
    assert "--boxes-from-masks" not in str(alone.value)


@pytest.mark.parametrize("masks", [True, False])
def test_boxes_and_masks_both_in_percent_are_refused_where_they_are_many(coco, masks):
    images = [{"id": 5, "file_name": "5.png", "height": 240, "width": 320}]
    entries = [entry(number, box=(number, 60, 30, 40)) for number in range(60)]
    if not masks:
        entries = [{**one, "segmentation": []} for one in entries]
    what = "masks" if masks else "boxes"
    with pytest.raises(UserError, match=rf"all 60 {what} look like percentages of width and height"):
        coco(entries, images, masks=masks)
    for sound in (entries[:40], [*entries, entry(70, box=(80, 60, 90, 100))]):
        assert coco(sound, images, masks=False).num_objects == len(sound)


def test_boxes_as_coco_writes_them_are_none_of_these(coco):
    exact = objects_of(lambda *box: list(box))
    rounded = objects_of(lambda x, y, w, h: [x + 0.5, y - 0.5, w - 1, h + 1])
    for entries in (exact, rounded):
        assert coco(entries, categories=CATEGORIES[1:2]).findings == []
        assert (
            coco([{**one, "segmentation": []} for one in entries], masks=False, categories=CATEGORIES[1:2]).findings
            == []
        )


def by_rows(box):
    """Run lengths as a tool that goes row by row writes them."""
    pixels = rectangle(*box)
    return {"size": list(pixels.shape), "counts": uncompressed(pixels.T)["counts"]}


def by_rows_compressed(box):
    return {"size": list(SIZE), "counts": compressed(rectangle(*box).T)["counts"]}


MASKS = {
    "the run lengths of about 8 of the 8 masks look as if they went row by row": {"segmentation": by_rows},
    "about 8 of the 8 masks": {"segmentation": by_rows_compressed},
    "8 of the 8 masks look like fractions": {"scale": (1 / 32, 1 / 24)},
    "8 of the 8 masks look like percentages": {"scale": (100 / 320, 100 / 240)},
}


@pytest.mark.parametrize("what", MASKS)
def test_masks_of_another_convention_are_refused(coco, what):
    entries = objects_of(lambda *box: list(box), **MASKS[what])
    percent = "percent" in what
    images = [{"id": n, "file_name": f"{n}.png", "height": 240, "width": 320} for n in (5, 9)] if percent else None
    for boxes_from_masks in (False, True):
        with pytest.raises(UserError, match=what):
            coco(entries, images, CATEGORIES[1:2], boxes_from_masks=boxes_from_masks)
    source = coco(entries, images, CATEGORIES[1:2], masks=False)
    assert source.annotation(0).segmentations == (None,) * 4
    assert source.findings == []
    if "fractions" in what:  # a box that is drawn around such a mask would be as wrong
        with pytest.raises(UserError, match="look like fractions"):
            coco([{**one, "bbox": None} for one in entries], images, CATEGORIES[1:2], masks=False)


def test_boxes_and_masks_both_in_fractions_are_refused(coco):
    entries = objects_of(FORMS["fractions of their images' width and height"], scale=(1 / 32, 1 / 24))
    with pytest.raises(UserError, match="8 of the 8 masks look like fractions"):
        coco(entries)


def test_a_few_boxes_that_do_not_fit_are_counted_and_listed(coco, tmp_path):
    entries = [
        *objects_of(lambda *box: list(box)),
        entry(77, 9, (4, 6, 9, 8), segmentation=[[20, 2, 30, 2, 30, 9, 20, 9]]),
    ]
    source = coco(entries, categories=CATEGORIES[1:2])
    (unfit,) = source.findings
    assert unfit.summary == (
        "1 of the 9 boxes does not fit its object's mask; training sees masks, figures the boxes: correct them, or "
        "take --boxes-from-masks"
    )
    assert unfit.items == [f"{tmp_path}/instances.json: annotation 77 of image 9"]
    (drawn,) = coco(entries, categories=CATEGORIES[1:2], boxes_from_masks=True).findings
    assert drawn.summary == "1 of the 9 boxes does not fit its object's mask; it is drawn around it now"


def test_boxes_that_mostly_fit_nothing_are_refused(coco):
    """Of an image of another size, or of other objects: training would learn what figures call wrong."""
    entries = objects_of(lambda x, y, w, h: [x * 2, y * 2, w * 2, h * 2])
    with pytest.raises(UserError, match=r": 8 of the 8 boxes do not fit their objects' masks: correct either, or take"):
        coco(entries, categories=CATEGORIES[1:2])
    assert coco(entries, categories=CATEGORIES[1:2], boxes_from_masks=True).annotation(0).boxes[0] == (4, 6, 10, 8)
    with pytest.raises(UserError, match=r"2 of the 8 annotations are broken, .* lies outside the 32x24 image"):
        coco(entries, categories=CATEGORIES[1:2], masks=False)


@pytest.mark.parametrize(
    "polygon",
    [
        [0, 0, 5, 5, 10, 10],  # collinear
        [4, 6, 14, 6, 9, 6],
        [40, 6, 50, 6, 50, 14, 40, 14],  # outside
        [-9, -9, -1, -9, -1, -1, -9, -1],
    ],
)
def test_a_mask_without_a_pixel_is_broken(coco, polygon):
    entries = [entry(1), entry(2, segmentation=[polygon]), entry(3, 9)]
    with pytest.raises(UserError, match=r"annotation 2 \(its mask has no pixel in the 32x24 image\)"):
        coco(entries)
    source = coco(entries, skip_damaged=True)
    assert source.annotation(0).ignored == ((4, 6, 10, 8),)
    assert coco(entries, masks=False, categories=CATEGORIES[1:2]).annotation(0).labels == (1, 1)
    empty = {"size": list(SIZE), "counts": [24 * 32]}
    with pytest.raises(UserError, match=r"annotation 2 \(its mask has no pixel"):
        coco([entry(1), entry(2, segmentation=empty)])


def test_an_object_smaller_than_a_pixel_teaches_nothing(coco):
    small = entry(2, box=(8.1, 8.1, 0.3, 0.3))
    source = coco([entry(1), small], categories=CATEGORIES[1:2])
    assert source.annotation(0).labels == (1,)
    assert summaries_of(source) == ["1 mask is so thin that it has no pixel: its object teaches nothing"]


def test_masks_that_images_cut_off_are_counted(coco):
    entries = [entry(1, box=(-5, 6, 10, 8)), entry(2, 9, (24, 10, 8.2, 14.1))]  # a little is COCO's own habit
    source = coco(entries, categories=CATEGORIES[1:2])
    (cut,) = source.findings
    assert cut.summary == "1 object reaches out of its image by more than a twentieth, and is cut off there"
    assert cut.items[0].endswith("annotation 1 of image 5")


# Boxes alone


def test_objects_without_a_mask_among_others_are_counted_and_have_their_boxes(coco):
    entries = [entry(1), entry(2, box=(1, 2, 3, 4)), {**entry(3, box=(5, 6, 7, 8)), "segmentation": None}]
    entries[1]["segmentation"] = []
    source = coco(entries, categories=CATEGORIES[1:2])
    annotation = source.annotation(0)
    assert annotation.boxes == ((4, 6, 10, 8), (1, 2, 3, 4), (5, 6, 7, 8))
    assert [segmentation is None for segmentation in annotation.segmentations] == [False, True, True]
    assert [mask is None for mask in annotation.masks()] == [False, True, True]
    (finding,) = source.findings
    assert finding.summary == "2 objects have no mask and teach their boxes alone"
    assert [item.partition(": ")[2] for item in finding.items] == [
        f"annotation {number} of image 5" for number in (2, 3)
    ]
    assert ["segmentation" in one for one in source.ground_truth()["annotations"]] == [True, False, False]


def test_where_no_object_has_a_mask_only_boxes_are_read_and_only_where_that_is_asked(coco):
    bare = [entry(1, box=(4, 6, 10, 8)), entry(2, box=(1, 2, 3, 4), area=0)]
    for one in bare:
        del one["segmentation"]
    del bare[0]["area"]
    with pytest.raises(UserError, match=r"2 of the 2 annotations are broken, .*it has no segmentation; --masks false"):
        coco(bare)
    with pytest.raises(UserError, match="has no masks that boxes could be drawn around: leave out --boxes-from-masks"):
        coco(bare, masks=False, boxes_from_masks=True)
    source = coco(bare, masks=False, categories=CATEGORIES[1:2])
    assert summaries_of(source) == ["1 object has an area of 0, which is measured instead"]
    assert source.annotation(0).segmentations == (None, None)
    assert [one["area"] for one in source.ground_truth()["annotations"]] == [80, 12]


def test_masks_that_are_not_asked_for_are_read_for_boxes_only(coco):
    entries = [entry(1), entry(2, segmentation=[[0, 0, 5, 5]]), entry(3, 9, bbox=None)]
    source = coco(entries, masks=False, categories=CATEGORIES[1:2])
    assert source.annotation(0).segmentations == (None, None)
    assert source.annotation(2) == Annotation(SIZE, (1,), ((4, 6, 10, 8),), (None,))
    assert "1 object has no box, so that it is drawn around the mask" in summaries_of(source)
    entries[2]["segmentation"] = []
    with pytest.raises(UserError, match=r"annotation 3 \(it has neither a box nor a mask\)"):
        coco(entries, masks=False)
    shifted = [entry(1, bbox=[5, 6, 10, 8]), entry(2, 9, segmentation=[]), entry(3, 9, (1, 2, 3, 4))]
    drawn = coco(shifted, masks=False, boxes_from_masks=True)
    assert [drawn.annotation(index).boxes for index in (0, 2)] == [((4, 6, 10, 8),), ((4, 6, 10, 8), (1, 2, 3, 4))]
    assert drawn.annotation(0).segmentations == (None,)


def test_a_box_outside_its_image_is_broken(coco):
    entries = [entry(number, 9, segmentation=[]) for number in range(6)]
    entries[2]["bbox"] = [40, 6, 10, 8]
    with pytest.raises(UserError, match=r"annotation 2 \(its box lies outside the 32x24 image\)"):
        coco(entries, masks=False)


# Classes


def test_classes_without_objects_are_named_with_the_counts_of_all(coco, tmp_path):
    source = coco([entry(1), entry(2)])
    missing = source.findings[-1]
    assert missing.summary == (
        "2 of the 3 classes have no object here, so that nothing can be learned or judged of them: dog, brush"
    )
    assert missing.items == ["cat (id 2): 2 objects", "dog (id 7): 0 objects", "brush (id 90): 0 objects"]


def test_roboflow_s_supercategory_is_an_unused_class(coco):
    """Its files of one class have two categories of a name, the first of which nothing is."""
    categories = [{"id": 0, "name": "cat", "supercategory": "none"}, {"id": 2, "name": "cat", "supercategory": "cat"}]
    source = coco([entry(1)], categories=categories)
    assert summaries_of(source) == [
        "1 name is that of several categories: give each a name of its own",
        "1 of the 2 classes has no object here, so that nothing can be learned or judged of it: cat",
    ]
    with pytest.raises(
        UserError, match="has objects of 2 categories named 'cat', of the ids 0 and 2: give their objects"
    ):
        coco([entry(1), entry(2, 9, category_id=0)], categories=categories)


def test_crowds_are_counted_with_advice_where_they_are_many(coco):
    entries = [entry(number, box=(4, 6, 10, 8 + number / 8)) for number in range(1, 40)]
    entries[3]["iscrowd"] = 1
    (few,) = coco(entries, categories=CATEGORIES[1:2]).findings
    assert few.summary == "1 of the 39 objects is a crowd, which teaches nothing"
    for one in entries[:9]:
        one["iscrowd"] = 1
    (many,) = coco(entries, categories=CATEGORIES[1:2]).findings
    assert many.summary.startswith("9 of the 39 objects are crowds, which teach nothing (CVAT marks")
    assert len(many.items) == 9


def test_what_is_there_twice_is_counted(coco):
    images = [{"id": n, "file_name": name, "height": 24, "width": 32} for n, name in ((5, "5.png"), (6, "5.png"))]
    entries = [entry(1), entry(2), entry(3, category_id=7), entry(4, 6), entry(1)]
    source = coco(entries, images, CATEGORIES[:2])
    several, twice = source.findings
    assert several.summary.startswith("1 file is listed under several image ids")
    assert several.items[0].endswith("5.png: 2 times")
    assert twice.summary == "2 objects are there twice, with the same image, category and box: take one of each out"
    assert [item.partition(": ")[2] for item in twice.items] == ["annotation 2 of image 5", "annotation 1 of image 5"]


# Classes of a detector


def test_a_file_with_some_of_the_categories_takes_the_classes_of_all(coco):
    categories = [{"id": 90, "name": "brush"}, {"id": 2, "name": "cat"}]
    source = coco([entry(1), entry(2, 9, category_id=90)], categories=categories)
    whole = source.with_categories(["cat", "dog", "brush"], [2, 7, 90], "training.json")
    assert (whole.classes, whole.category_ids) == (["cat", "dog", "brush"], [2, 7, 90])
    assert [whole.annotation(index).labels for index in (0, 2)] == [(1,), (3,)]
    assert whole.class_counts == [1, 0, 1]
    assert [one["category_id"] for one in whole.ground_truth()["annotations"]] == [2, 90]
    assert summaries_of(whole) == [
        "1 of the 3 classes has no object here, so that nothing can be learned or judged of it: dog"
    ]
    assert whole.with_categories(["cat", "dog", "brush"], [2, 7, 90], "training.json") is whole


def test_categories_of_other_ids_are_known_by_their_names_and_keep_their_ids(coco):
    categories = [{"id": 90, "name": "cat"}, {"id": "b", "name": "brush"}]
    source = coco([entry(1, category_id=90), entry(2, 9, category_id="b")], categories=categories)
    whole = source.with_categories(["cat", "dog", "brush"], [2, 7, 90], "{a}/training.json")
    assert whole.category_ids == [90, 7, "b"]
    assert [whole.annotation(index).labels for index in (0, 2)] == [(1,), (3,)]
    (renumbered, _) = whole.findings  # then comes the class without an object
    assert renumbered.summary == ("2 categories have other ids than in {a}/training.json, and are known by their names")
    assert renumbered.items == ["'cat': id 90, there 2", "'brush': id 'b', there 90"]
    exchanged = coco([entry(1, category_id=90)], categories=[{"id": 90, "name": "cat"}])
    with pytest.raises(UserError, match=r"other categories than training\.json, the first is 'cat': id 90, there 2"):
        exchanged.with_categories(["cat", "brush"], [2, 90], "training.json")


def test_unknown_categories_are_named(coco):
    source = coco([entry(1)], categories=CATEGORIES)
    with pytest.raises(UserError) as error:
        source.with_categories(["cat", "Dog"], [2, 7], "training.json")
    assert str(error.value) == (
        f"{source.name} has other categories than training.json, which does not know 'dog' (id 7), 'brush' (id 90): "
        "give both the same names and ids, or take the others out"
    )


# Other layouts


def written(folder, *names):
    for name in names:
        path = folder / name
        if path.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            path.mkdir(parents=True, exist_ok=True)


LAYOUTS = {
    "Roboflow": (
        ["train/_annotations.coco.json", "valid/_annotations.coco.json", "test/_annotations.coco.json"],
        {
            split: (f"{name}/_annotations.coco.json", name)
            for split, name in (("train", "train"), ("val", "valid"), ("test", "test"))
        },
    ),
    "COCO 2014": (
        [
            "annotations/instances_train2014.json",
            "annotations/captions_train2014.json",
            "train2014",
            "val2017",
            "train",
        ],
        {"train": ("annotations/instances_train2014.json", "train2014")},
    ),
    "no year": (
        ["annotations/instances_train.json", "annotations/instances_val.json", "train", "val"],
        {split: (f"annotations/instances_{split}.json", split) for split in ("train", "val")},
    ),
    "beside": (
        ["train.json", "validation.json", "images/train", "images/val"],
        {"train": ("train.json", "images/train"), "val": ("validation.json", "images/val")},
    ),
    "one folder of images": (
        ["annotations/train.json", "annotations/val_annotations.json", "images"],
        {"train": ("annotations/train.json", "images"), "val": ("annotations/val_annotations.json", "images")},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_other_tools_are_found(tmp_path, layout):
    names, expected = LAYOUTS[layout]
    written(tmp_path, *names)
    for split, (file, folder) in expected.items():
        assert find_coco(tmp_path, split) == (tmp_path / file, tmp_path / folder)


def test_what_may_mean_several_files_is_refused(tmp_path):
    written(tmp_path, "annotations/train_a.json", "annotations/train_b.json", "train", "images/train")
    with pytest.raises(
        UserError, match=r"has several annotations for train, annotations/train_a\.json, annotations/train_b"
    ):
        find_coco(tmp_path, "train")
    with pytest.raises(
        UserError, match=r"several folders of images for train, train, images/train: choose one with --i"
    ):
        find_coco(tmp_path, "train", tmp_path / "annotations" / "train_a.json")
    with pytest.raises(UserError, match=r"instances_val2017\.json does not exist"):
        find_coco(tmp_path, "val")
    written(tmp_path, "annotations/minival2014.json", "annotations/valuable.json")
    with pytest.raises(UserError, match=r"instances_val2017\.json does not exist"):
        find_coco(tmp_path, "val")


# File names


def test_files_are_found_by_other_spellings_and_counted(coco):
    names = ("C:\\photos\\5.PNG", "https://example.org/media/3.png?raw=1", "9.png")
    images = [{"id": n, "file_name": name, "height": 24, "width": 32} for n, name in zip((5, 3, 9), names, strict=True)]
    source = coco([], images)
    assert [Path(source.image_name(index)).name for index in range(3)] == ["5.png", "3.png", "9.png"]
    assert [finding.summary for finding in source.findings] == [
        "2 images were found by names that are spelled otherwise than their files"
    ]


def test_a_name_that_fits_two_files_is_refused(coco, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "pictures" / folder).mkdir()
        (tmp_path / "pictures" / folder / "7.png").write_bytes((tmp_path / "pictures" / "5.png").read_bytes())
    images = [{"id": 7, "file_name": "7.png", "height": 24, "width": 32}]
    with pytest.raises(UserError, match=r"image 7 \(its 7\.png may mean .*a/7\.png or .*b/7\.png\)"):
        coco([], images)
