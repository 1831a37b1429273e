"""COCO files written for the purpose: what is read, refused and left out, and where objects are after the jitter."""

import io
import json
import pickle
import random
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode, functional

from convmae.data import detection
from convmae.data.detection import (
    Annotation,
    LargeScaleJitter,
    ResizeAndPad,
    collate_resized,
    collate_targets,
    find_coco,
    open_coco,
)
from convmae.data.images import UndecodableImageError
from convmae.data.loading import build_evaluation_loader, build_training_loader
from convmae.data.sources import open_images
from convmae.errors import UserError

mask_library = pytest.importorskip("faster_coco_eval.core.mask")

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 90, "name": "brush"}]
SIZE = (24, 32)  # of the pictures in these files


def encoded(pixels, image_format="PNG", **options):
    """uint8 (H, W) or (H, W, 3) -> an encoded picture."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **options)
    file.seek(0)
    return file


def noise(size, seed=0, channels=3):
    return numpy.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=numpy.uint8)


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
def coco(tmp_path):
    """Write three pictures, of the ids 5, 3 and 9, and their annotations; a function that opens them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for image_id in (5, 3, 9):
        (folder / f"{image_id}.png").write_bytes(encoded(noise(SIZE, image_id)).read())

    def open_written(annotations=ENTRIES, images=None, categories=CATEGORIES, skip_damaged=False):
        height, width = SIZE
        if images is None:
            images = [{"id": n, "file_name": f"{n}.png", "height": height, "width": width} for n in (5, 3, 9)]
        path = tmp_path / "instances.json"
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        return open_coco(path, folder, skip_damaged)

    return open_written


# Reading


def test_pictures_come_with_their_objects_in_the_order_of_the_file(coco):
    source = coco()
    assert len(source) == 3
    assert source.classes == ["cat", "dog", "brush"]
    assert (source.category_ids, source.image_ids) == ([2, 7, 90], [5, 3, 9])
    assert source.sizes.tolist() == [list(SIZE)] * 3
    assert [Path(source.picture_name(index)).name for index in range(3)] == ["5.png", "3.png", "9.png"]
    for index, image_id in enumerate((5, 3, 9)):
        with source.open(index) as file:
            assert numpy.array_equal(numpy.asarray(Image.open(file)), noise(SIZE, image_id))
    found = []
    for index in range(3):
        file, annotation = source.open_labelled(index)
        file.close()
        found.append(annotation)
    assert found[0] == Annotation(
        SIZE, (1, 2), ((4, 6, 10, 8), (7, 3, 2, 5)), (ENTRIES[0]["segmentation"], ENTRIES[3]["segmentation"])
    )
    assert found[1] == Annotation(SIZE, (), (), ())
    assert found[2] == Annotation(SIZE, (3,), ((1, 2, 3, 4),), (ENTRIES[1]["segmentation"],))
    assert (source.num_objects, source.zero_size, source.left_out) == (3, 1, [])


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
    assert copy.picture_name(2) == source.picture_name(2)


def test_pictures_in_folders_of_their_own(coco, tmp_path):
    (tmp_path / "pictures" / "a").mkdir()
    (tmp_path / "pictures" / "5.png").rename(tmp_path / "pictures" / "a" / "5.png")
    images = [{"id": 5, "file_name": "a/5.png", "height": 24, "width": 32}]
    assert coco([], images).picture_name(0).endswith("a/5.png")
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
    "no segmentation": (entry(4, segmentation=[]), "it has no segmentation"),
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
    assert source.left_out == [f"{tmp_path}/instances.json: annotation {number} ({fault})" for number in (4, 8)]
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
    assert len(source.left_out) == 3 - len(source)
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
    assert source.left_out == [f"{tmp_path}/pictures/{name}: is missing" for name in ("5.png", "3.png")]
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
    monkeypatch.setattr(detection, "find_spec", lambda name: None)
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


@pytest.mark.parametrize("transform", [LargeScaleJitter((8, 8)), ResizeAndPad((8, 8))])
def test_a_picture_of_another_size_than_annotated_is_refused(transform):
    arguments = ([0],) if isinstance(transform, LargeScaleJitter) else ()
    with pytest.raises(UndecodableImageError, match="it is 32x24, the annotations say 24x32"):
        transform(encoded(noise(SIZE)), Annotation((32, 24), (), (), ()), *arguments)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = encoded(noise(SIZE), "JPEG", exif=exif)
    transform(turned, Annotation((32, 24), (), (), ()), *arguments)
    turned.seek(0)
    with pytest.raises(UndecodableImageError, match="it is 24x32, the annotations say 32x24"):
        transform(turned, Annotation(SIZE, (), (), ()), *arguments)


# Jitter


def annotated(masks):
    """An annotation of masks (H, W), the labels in order."""
    segmentations = tuple(compressed(mask) for mask in masks)
    return Annotation(masks[0].shape, tuple(range(1, len(masks) + 1)), ((0, 0, 1, 1),) * len(masks), segmentations)


def blobs(size, number, seed):
    """Masks of overlapping rectangles of any size."""
    numbers = random.Random(seed)
    masks = []
    for _ in range(number):
        left, top = numbers.randrange(size[1]), numbers.randrange(size[0])
        masks.append(rectangle(left, top, numbers.randint(1, size[1]), numbers.randint(1, size[0]), size))
    return masks


def sample_of(transform, pixels, annotation, seed=0):
    (sample,) = transform(encoded(pixels), annotation, [seed])
    return sample


def test_a_factor_of_one_changes_nothing():
    pixels, masks = noise((20, 30)), blobs((20, 30), 3, seed=1)
    sample = sample_of(LargeScaleJitter((20, 30), (1.0, 1.0), flip=0.0), pixels, annotated(masks))
    assert torch.equal(sample["image"], torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(sample["target"]["masks"], torch.from_numpy(numpy.stack(masks)))
    assert sample["target"]["labels"].tolist() == [1, 2, 3]


def test_whole_factors_repeat_pixels():
    pixels, masks = noise((8, 10)), blobs((8, 10), 3, seed=1)
    sample = sample_of(LargeScaleJitter((8, 10), (2.0, 2.0), flip=0.0), pixels, annotated(masks))
    doubled = torch.from_numpy(numpy.kron(numpy.stack(masks), numpy.ones((2, 2), numpy.uint8)))
    windows = [doubled[:, top : top + 8, left : left + 10] for top in range(0, 9, 2) for left in range(0, 11, 2)]
    found = sample["target"]["masks"]
    assert any(torch.equal(found, window[window.flatten(1).any(dim=1).bool()]) for window in windows)


def test_a_smaller_mask_takes_the_pixels_in_the_middle():
    masks = blobs((9, 12), 3, seed=2)
    sample = sample_of(LargeScaleJitter((9, 12), (1 / 3, 1 / 3), flip=0.0), noise((9, 12)), annotated(masks))
    expected = torch.from_numpy(numpy.stack(masks)[:, 1::3, 1::3])
    assert expected.flatten(1).any(dim=1).all()
    assert torch.equal(sample["target"]["masks"][:, :3, :4], expected)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(12, 40), st.integers(12, 40)),
    st.tuples(st.integers(8, 40), st.integers(8, 40)),
    st.sampled_from([(0.1, 2.0), (0.3, 0.6), (1.0, 1.0), (1.5, 3.0)]),
    st.integers(0, 2**64 - 1),
)
def test_objects_stay_where_their_pixels_are(size, image_size, scale, seed):
    masks = blobs(size, 3, seed)
    annotation = annotated(masks)
    jitter = LargeScaleJitter(image_size, scale, in_channels=1)
    empty = sample_of(jitter, numpy.zeros(size, numpy.uint8), annotation, seed)["image"][0] == 0  # without the padding
    found = None
    for label, mask in enumerate(masks, 1):
        # A picture that is white where the object is. A pixel that resampling left quite white or quite black is in
        # the object or outside; the nearest pixel has a part in all others.
        sample = sample_of(jitter, 255 * mask, annotation, seed)
        image, target = sample["image"][0], sample["target"]
        assert found is None or torch.equal(target["masks"], found)
        found = target["masks"]
        kept = target["labels"].tolist()
        if label not in kept:
            assert not (image == 255).any()
            continue
        seen = found[kept.index(label)].bool()
        assert seen[(image == 255) & empty].all()
        assert not seen[(image == 0) | ~empty].any()
        rows, columns = seen.nonzero().T
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert target["boxes"][kept.index(label)].tolist() == box


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.integers(0, 2**64 - 1),
)
def test_the_factor_fits_the_whole_picture_and_the_rest_is_cropped_away(size, image_size, seed):
    crop, new = LargeScaleJitter(image_size).draw(*size, seed)
    factor = random.Random(seed).uniform(0.1, 2.0) * min(image_size[0] / size[0], image_size[1] / size[1])
    places = ((crop.top, crop.height), (crop.left, crop.width))
    for (start, length), whole, resized, room in zip(places, size, new, image_size, strict=True):
        assert 0 <= start <= start + length <= whole
        assert 1 <= resized <= room
        wanted = max(1, round(whole * factor))
        if wanted <= room:
            assert (start, length, resized) == (0, whole, wanted)
        else:  # of the picture as much as fills the room, but for a part of a pixel
            assert resized == room
            assert abs(length - min(whole, max(1, room / factor))) <= 0.5


def test_factors_places_and_mirroring_are_spread_evenly():
    drawn = [LargeScaleJitter((100, 100)).draw(100, 100, seed) for seed in range(2000)]
    factors = numpy.array([new[0] / crop.height for crop, new in drawn])
    assert abs(numpy.quantile(factors, [0.25, 0.5, 0.75]) - [0.575, 1.05, 1.525]).max() < 0.06
    places = numpy.array([crop.top / (100 - crop.height) for crop, _ in drawn if crop.height < 90])
    assert abs(numpy.quantile(places, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.06
    assert abs(sum(crop.mirrored for crop, _ in drawn) / 2000 - 0.5) < 0.05


def test_a_mirrored_sample_is_the_others_mirror_image():
    pixels, annotation = noise(SIZE), annotated(blobs(SIZE, 4, seed=3))
    for seed in range(5):
        plain, mirrored = (
            sample_of(LargeScaleJitter((16, 20), (0.5, 1.5), flip), pixels, annotation, seed) for flip in (0.0, 1.0)
        )
        assert torch.equal(mirrored["image"].flip(2), plain["image"])
        assert torch.equal(mirrored["target"]["masks"].flip(2), plain["target"]["masks"])
        assert torch.equal(mirrored["target"]["labels"], plain["target"]["labels"])
        left, top, right, bottom = plain["target"]["boxes"].T
        assert torch.equal(mirrored["target"]["boxes"], torch.stack([20 - right, top, 20 - left, bottom], dim=1))


def test_several_views_are_those_of_single_calls():
    pixels, annotation = noise(SIZE), annotated(blobs(SIZE, 4, seed=3))
    jitter = LargeScaleJitter((16, 20))
    together = jitter(encoded(pixels), annotation, [5, 6, 7])
    for seed, view in zip((5, 6, 7), together, strict=True):
        alone = sample_of(jitter, pixels, annotation, seed)
        assert torch.equal(view["image"], alone["image"])
        assert all(torch.equal(view["target"][key], alone["target"][key]) for key in ("boxes", "labels", "masks"))
    assert len({view["image"].numpy().tobytes() for view in together}) == 3


def test_objects_that_vanish_are_left_out():
    masks = [rectangle(3, 3, 1, 1, (40, 40)), rectangle(0, 0, 40, 40, (40, 40))]
    jitter = LargeScaleJitter((40, 40), (0.1, 0.1), flip=0.0)
    sample = sample_of(jitter, noise((40, 40)), annotated(masks))
    assert sample["target"]["labels"].tolist() == [2]
    assert sample["target"]["boxes"].tolist() == [[0, 0, 4, 4]]
    for annotation in (annotated(masks[:1]), Annotation((40, 40), (), (), ())):
        target = sample_of(jitter, noise((40, 40)), annotation)["target"]
        shapes = {key: (value.dtype, tuple(value.shape)) for key, value in target.items()}
        assert shapes == {
            "boxes": (torch.float32, (0, 4)),
            "labels": (torch.int64, (0,)),
            "masks": (torch.uint8, (0, 40, 40)),
        }


@pytest.mark.parametrize(("in_channels", "colour"), [(1, [127]), (3, [124, 116, 104]), (4, [127] * 4)])
def test_padding_is_at_the_right_and_the_bottom(in_channels, colour):
    jitter = LargeScaleJitter((20, 20), (0.5, 0.5), flip=0.0, in_channels=in_channels)
    sample = sample_of(jitter, noise((40, 30)), annotated([rectangle(0, 0, 30, 40, (40, 30))]))
    outside = torch.ones(20, 20, dtype=torch.bool)
    outside[:10, :8] = False  # 40x30 fits as 20x15, of which a half
    padding = torch.tensor(colour)[:, None]
    assert (sample["image"][:, outside] == padding).all()
    assert torch.equal(sample["target"]["masks"][0].bool(), ~outside)


def test_impossible_jitter_is_refused():
    for options in ({"image_size": (0, 8)}, {"scale": (0.0, 1.0)}, {"scale": (2.0, 1.0)}, {"flip": 1.5}):
        with pytest.raises(UserError, match="jitter needs a positive size, 0 < scale, and flip from 0 to 1"):
            LargeScaleJitter(**{"image_size": (8, 8), **options})
    with pytest.raises(UserError, match="in_channels cannot be 2"):
        LargeScaleJitter((8, 8), in_channels=2)
    with pytest.raises(UserError, match="positive size"):
        ResizeAndPad((8, 0))


@pytest.mark.parametrize(
    ("size", "inside"), [((40, 30), (20, 15)), ((10, 40), (8, 32)), ((5, 8), (20, 32)), ((1, 500), (1, 32))]
)
def test_a_whole_picture_fits_and_is_padded(size, inside):
    pixels = noise(size)
    for annotation in (None, Annotation(size, (), (), ())):
        sample = ResizeAndPad((20, 32))(encoded(pixels), annotation)
        assert (sample["size"], sample["original_size"]) == (inside, size)
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        expected = functional.resize(image, list(inside), InterpolationMode.BILINEAR, antialias=True)
        height, width = inside
        assert torch.equal(sample["image"][:, :height, :width], expected)
        colour = torch.tensor([124, 116, 104])[:, None, None]
        assert (sample["image"][:, height:] == colour).all()
        assert (sample["image"][:, :, width:] == colour).all()


# Batches


def same(first, second):
    keys = ("boxes", "labels", "masks")
    return len(first) == len(second) and all(
        torch.equal(a["images"], b["images"])
        and all(torch.equal(x[key], y[key]) for x, y in zip(a["targets"], b["targets"], strict=True) for key in keys)
        for a, b in zip(first, second, strict=True)
    )


def training_loader(source, **options):
    jitter = LargeScaleJitter((16, 20))
    return build_training_loader(
        source, jitter, **{"batch_size": 2, "collate_fn": collate_targets, "skip_damaged": False, **options}
    )


def evaluation_loader(source, **options):
    return build_evaluation_loader(source, ResizeAndPad((16, 20)), batch_size=2, collate_fn=collate_resized, **options)


def epoch_of(batches, epoch=0, batch=0):
    batches.set_position(epoch, batch)
    return list(batches)


def test_training_batches_do_not_depend_on_workers_and_a_position_continues_them(coco):
    source = coco()
    without, with_workers = (training_loader(source, batch_size=1, num_workers=number) for number in (0, 2))
    epochs = [epoch_of(without, epoch) for epoch in (0, 1)]
    assert not same(*epochs)
    for epoch in (1, 0):
        assert same(epoch_of(with_workers, epoch), epochs[epoch])
    assert same(epoch_of(without, epoch=1, batch=2), epochs[1][2:])
    for batch in epochs[0]:
        assert (batch["images"].dtype, batch["images"].shape) == (torch.uint8, (1, 3, 16, 20))
        (target,) = batch["targets"]
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        assert batch["failed"] == []
    (both,) = epoch_of(training_loader(source, aug_repeats=2))
    assert both["images"].shape == (2, 3, 16, 20)
    assert not torch.equal(*both["images"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_batches_tell_the_sizes(coco, num_workers):
    first, second = evaluation_loader(coco(), num_workers=num_workers)
    assert first["images"].shape == (2, 3, 16, 20)
    assert (first["sizes"], first["original_sizes"]) == ([(15, 20)] * 2, [SIZE] * 2)
    assert (first["indices"].tolist(), second["indices"].tolist()) == ([0, 1], [2])
    assert first["failed"] == second["failed"] == []


def test_pictures_without_annotations_are_batched_alike(coco, tmp_path):
    coco()
    plain = list(evaluation_loader(open_images(tmp_path / "pictures")))
    order = [batch["indices"].tolist() for batch in plain]
    assert order == [[0, 1], [2]]  # 3.png, 5.png and 9.png
    expected = ResizeAndPad((16, 20))(encoded(noise(SIZE, 9)))
    assert torch.equal(plain[1]["images"][0], expected["image"])
    assert plain[1]["original_sizes"] == [SIZE]


def test_damaged_pictures_and_those_of_another_size_are_refused_or_left_out(coco, tmp_path):
    (tmp_path / "pictures" / "5.png").write_bytes(b"damaged")
    (tmp_path / "pictures" / "3.png").write_bytes(encoded(noise((32, 24))).read())
    source = coco()
    for loader in (training_loader(source, batch_size=3), evaluation_loader(source)):
        with pytest.raises(
            UserError, match=r"(5\.png cannot be decoded|3\.png cannot be used), .* with --skip-damaged: "
        ):
            list(loader)
    first, second = evaluation_loader(source, skip_damaged=True)
    assert (len(first["images"]), first["sizes"], first["indices"].tolist()) == (0, [], [])
    assert first["failed"] == [
        f"{tmp_path}/pictures/5.png: not an image, or of an unknown format",
        f"{tmp_path}/pictures/3.png: it is 24x32, the annotations say 32x24, perhaps before its EXIF data turn it",
    ]
    assert second["indices"].tolist() == [2]
    (batch,) = epoch_of(training_loader(source, batch_size=3, skip_damaged=True))
    assert len(batch["images"]) == len(batch["targets"]) == 3
    assert {failure.partition(": ")[0][-5:] for failure in batch["failed"]} == {"5.png", "3.png"}
