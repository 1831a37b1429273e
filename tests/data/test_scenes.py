"""Generated scenes: the same everywhere, exact masks, classes that only the outline tells, two layouts."""

import hashlib
import json
import math
import os
import subprocess
import sys

import numpy
import pytest
from PIL import Image

from convmae.data import scenes
from convmae.data.scenes import CATEGORY_IDS, FIRST_VALIDATION_SCENE, SHAPES, draw_scene, write_scenes
from convmae.errors import UserError

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

LONG_AFTER = 1000.0  # when every shape has left the picture

# Areas of shapes in a circle of radius 1: of n corners n/2 sin(2 pi/n); of the star, whose inner corners lie at
# cos(2 pi/5) / cos(pi/5), five times twice half that radius times sin(pi/5); the ring's hole has radius 0.55.
AREAS = {
    "disc": math.pi,
    "ring": math.pi * (1 - 0.55**2),
    "triangle": 3 / 2 * math.sin(2 * math.pi / 3),
    "square": 2.0,
    "star": 5 * math.sin(math.pi / 5) * math.cos(2 * math.pi / 5) / math.cos(math.pi / 5),
}


@pytest.fixture(scope="module")
def many():
    return [draw_scene(index, (64, 64), seed=7) for index in range(400)]


def digest(scene):
    return hashlib.sha256(b"".join(part.tobytes() for part in scene)).hexdigest()


def shifted(array, down, right):
    """(H, W) moved, with zeros where nothing comes from."""
    height, width = array.shape
    padded = numpy.pad(array, ((max(down, 0), max(-down, 0)), (max(right, 0), max(-right, 0))))
    return padded[max(-down, 0) :, max(-right, 0) :][:height, :width]


def touches_border(mask):
    return bool(mask[[0, -1]].any() or mask[:, [0, -1]].any())


# Drawing


def test_a_scene_is_what_it_says():
    scene = draw_scene(3, (64, 96))
    number = len(scene.labels)
    assert number >= 1
    assert (scene.image.shape, scene.image.dtype) == ((64, 96, 3), numpy.uint8)
    assert (scene.masks.shape, scene.masks.dtype) == ((number, 64, 96), bool)
    assert (scene.labels.shape, scene.labels.dtype) == ((number,), numpy.int64)


def test_a_scene_depends_on_seed_and_index_alone():
    before = digest(draw_scene(5))
    numpy.random.seed(1)
    assert digest(draw_scene(5)) == before
    assert len({before, digest(draw_scene(6)), digest(draw_scene(5, seed=1)), digest(draw_scene(5, time=0.5))}) == 4
    program = (
        "import hashlib; from convmae.data.scenes import draw_scene; "
        "print(hashlib.sha256(b''.join(part.tobytes() for part in draw_scene(5))).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "3"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == before


@pytest.mark.parametrize("index", range(8))
def test_pixels_are_painted_exactly_where_the_masks_are(index):
    background = draw_scene(index, (64, 80), time=LONG_AFTER)
    assert len(background.labels) == 0
    for time in (0.0, 0.7):
        scene = draw_scene(index, (64, 80), time=time)
        painted = scene.masks.any(axis=0)
        changed = (scene.image != background.image).any(axis=2)
        assert not (changed & ~painted).any()
        assert changed[painted].mean() > 0.98  # a shape's colour may be the background's by chance


def test_each_pixel_belongs_to_one_shape_that_can_be_seen(many):
    overlapping = 0
    for scene in many:
        assert scene.masks.sum(axis=0).max(initial=0) <= 1
        assert (scene.masks.sum(axis=(1, 2)) >= 12).all()
        expected = numpy.zeros((64, 64), int)
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            expected[mask] = label + 1
        assert (scene.label_map() == expected).all()
        boxes = [[(side.min(), side.max()) for side in numpy.nonzero(mask)] for mask in scene.masks]
        overlapping += any(
            all(low <= high_2 and low_2 <= high for (low, high), (low_2, high_2) in zip(box, other, strict=True))
            for number, box in enumerate(boxes)
            for other in boxes[:number]
        )
    assert overlapping > 40  # so the covering is tested at all


def test_areas_are_those_of_the_shapes():
    ratios = {name: [] for name in SHAPES}
    for index in range(60):
        scene = draw_scene(index, (384, 384))
        if len(scene.labels) and not touches_border(scene.masks[0]):  # the first shape lies in front
            rows, columns = numpy.nonzero(scene.masks[0])
            radius = numpy.hypot(rows - rows.mean(), columns - columns.mean()).max()
            ratios[SHAPES[scene.labels[0]]].append(len(rows) / radius**2)
    for name, area in AREAS.items():
        assert len(ratios[name]) >= 4
        assert ratios[name] == pytest.approx([area] * len(ratios[name]), rel=0.06), name  # radii are 32 pixels or more


def test_a_scene_keeps_its_shapes_at_another_size():
    for index in range(5):
        small, large = draw_scene(index, (64, 64)), draw_scene(index, (128, 128))
        assert small.labels.tolist() == large.labels.tolist()
        shares = [scene.masks.mean(axis=(1, 2)) for scene in (small, large)]
        assert shares[0] == pytest.approx(shares[1], abs=0.015)


def test_shapes_move_by_their_velocity():
    compared = 0
    for index in range(30):
        moments = [draw_scene(index, (192, 192), time=time) for time in (0.0, 0.1, 0.2)]
        # The first shape lies in front, and in so short a time none leaves the picture.
        if any(not len(scene.labels) or touches_border(scene.masks[0]) for scene in moments):
            continue
        starts = [[int(side.min()) for side in numpy.nonzero(scene.masks[0])] for scene in moments]
        steps = numpy.diff(starts, axis=0)
        assert abs(steps[0] - steps[1]).max() <= 1  # the same way in the same time, but for whole pixels
        before, after = moments[0], moments[2]
        down, right = (starts[2][axis] - starts[0][axis] for axis in (0, 1))
        assert 0.1 * 0.2 * 192 - 2 < math.hypot(down, right) < 0.4 * 0.2 * 192 + 2
        assert (shifted(before.masks[0], down, right) == after.masks[0]).all()
        for channel in range(3):
            painted = shifted(before.image[..., channel] * before.masks[0], down, right)
            assert (painted == after.image[..., channel] * after.masks[0]).all()
        compared += 1
    assert compared >= 10


def test_colour_does_not_tell_the_class_and_classes_are_balanced(many):
    colours = numpy.array([scene.image[mask].mean(axis=0) for scene in many for mask in scene.masks])
    labels = numpy.concatenate([scene.labels for scene in many])
    assert len(labels) > 1000
    shares = numpy.bincount(labels, minlength=len(SHAPES)) / len(labels)
    assert shares == pytest.approx(0.2, abs=0.05)  # four standard deviations
    half = len(labels) // 2
    centroids = numpy.stack([colours[:half][labels[:half] == label].mean(axis=0) for label in range(len(SHAPES))])
    nearest = numpy.linalg.norm(colours[half:, None] - centroids, axis=2).argmin(axis=1)
    assert (nearest == labels[half:]).mean() < 0.2 + 0.07  # chance, and four standard deviations


def test_every_twentieth_scene_is_empty(many):
    empty = [index for index, scene in enumerate(many) if not len(scene.labels)]
    assert empty == list(range(19, 400, 20))
    assert many[19].masks.shape == (0, 64, 64)
    assert not many[19].label_map().any()
    assert max(len(scene.labels) for scene in many) >= 5


def test_impossible_scenes_are_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="scenes of 31x64 are too small"):
        draw_scene(0, (31, 64))
    with pytest.raises(UserError, match="0 training and 5 validation scenes"):
        write_scenes(tmp_path / "coco", "coco", train=0, val=5)
    with pytest.raises(UserError, match="there is no layout voc: choose coco or ade20k"):
        write_scenes(tmp_path / "voc", "voc", train=5, val=5)
    scenes._photographs.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'convmae\[demo\]'"):
        write_scenes(tmp_path / "coco", "coco", train=5, val=5)
    assert not list(tmp_path.iterdir())


# Layouts

SCENES = {"train": 21, "val": 6, "image_size": (64, 80), "seed": 2}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "coco", "coco", **SCENES)


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "ade20k", "ade20k", **SCENES)


@pytest.mark.parametrize(("split", "first", "number"), [("train2017", 0, 21), ("val2017", FIRST_VALIDATION_SCENE, 6)])
def test_coco_files_hold_the_scenes(coco, split, first, number):
    from faster_coco_eval import COCO
    from faster_coco_eval.core import mask as coco_masks

    written = COCO(str(coco / "annotations" / f"instances_{split}.json"))
    assert [category["name"] for category in written.loadCats(CATEGORY_IDS)] == list(SHAPES)
    assert sorted(written.getImgIds()) == list(range(first, first + number))
    assert len(list((coco / split).iterdir())) == number
    for index in range(first, first + number):
        scene = draw_scene(index, (64, 80), seed=2)
        [entry] = written.loadImgs(index)
        with Image.open(coco / split / entry["file_name"]) as image:
            assert image.size == (entry["width"], entry["height"]) == (80, 64)
            difference = numpy.asarray(image).astype(int) - scene.image
        assert abs(difference).mean() < 6  # JPEG's loss
        annotations = written.loadAnns(sorted(written.getAnnIds(index)))
        assert [CATEGORY_IDS.index(one["category_id"]) for one in annotations] == scene.labels.tolist()
        for annotation, mask in zip(annotations, scene.masks, strict=True):
            encoded = coco_masks.frPyObjects(annotation["segmentation"], 64, 80)
            assert (coco_masks.decode(encoded) == mask).all()
            assert annotation["area"] == mask.sum() == coco_masks.area(encoded)
            assert annotation["bbox"] == coco_masks.toBbox(encoded).tolist()
            assert annotation["iscrowd"] == 0
            assert annotation["id"] > 0


def test_a_mask_from_the_first_pixel_on_begins_with_no_zeros():
    from faster_coco_eval.core import mask as coco_masks

    for mask in (numpy.ones((3, 2), bool), numpy.array([[1, 0], [0, 1]], bool), numpy.zeros((2, 3), bool)):
        counts = scenes._run_lengths(mask)
        encoded = coco_masks.frPyObjects({"size": list(mask.shape), "counts": counts}, *mask.shape)
        assert (coco_masks.decode(encoded) == mask).all()
        assert sum(counts) == mask.size


@pytest.mark.parametrize(("split", "first", "number"), [("training", 0, 21), ("validation", FIRST_VALIDATION_SCENE, 6)])
def test_ade20k_files_hold_the_scenes(ade20k, split, first, number):
    assert (ade20k / "classes.txt").read_text().splitlines() == ["background", *SHAPES]
    assert not (ade20k / "objectInfo150.txt").exists()
    names = sorted(path.name for path in (ade20k / "images" / split).iterdir())
    assert names == [f"{index:012d}.jpg" for index in range(first, first + number)]
    assert len(list((ade20k / "annotations" / split).iterdir())) == number
    seen = set()
    for index in range(first, first + number):
        scene = draw_scene(index, (64, 80), seed=2)
        with Image.open(ade20k / "images" / split / f"{index:012d}.jpg") as image:
            assert abs(numpy.asarray(image).astype(int) - scene.image).mean() < 6  # JPEG's loss
        with Image.open(ade20k / "annotations" / split / f"{index:012d}.png") as labels:
            assert labels.mode == "P"
            assert (numpy.asarray(labels) == scene.label_map()).all()
            colours = numpy.asarray(labels.convert("RGB")).astype(int)
        seen |= {(label, *colours[scene.label_map() == label][0]) for label in numpy.unique(scene.label_map())}
    assert len(seen) == len({label for label, *_ in seen}) == len(SHAPES) + 1  # a colour for each class
    painted = numpy.array(sorted(colour for _, *colour in seen))
    apart = abs(painted[:, None] - painted).sum(axis=2) + 1000 * numpy.eye(len(painted))
    assert apart.min() > 100


def test_the_pictures_are_the_same_in_both_layouts(coco, ade20k):
    for theirs, ours in (("train2017", "training"), ("val2017", "validation")):
        for path in (coco / theirs).iterdir():
            assert path.read_bytes() == (ade20k / "images" / ours / path.name).read_bytes()


@pytest.mark.parametrize("layout", ["coco", "ade20k"])
def test_the_same_scenes_are_not_written_twice(layout, request, monkeypatch):
    folder = request.getfixturevalue(layout)
    monkeypatch.setattr(scenes, "draw_scene", lambda *arguments: pytest.fail("drawn again"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_scenes(folder, layout, **SCENES) == folder
    for other in ({"train": 20}, {"val": 7}, {"image_size": (80, 64)}, {"seed": 3}):
        with pytest.raises(UserError, match=r"holds scenes of other arguments, .*: give another folder"):
            write_scenes(folder, layout, **{**SCENES, **other})
    with pytest.raises(UserError, match="holds other files: give another folder"):
        write_scenes(folder, "ade20k" if layout == "coco" else "coco", **SCENES)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("content", ["no JSON", "[]", json.dumps({"info": {"year": 2017}})])
@pytest.mark.parametrize(
    ("layout", "record"), [("coco", "annotations/instances_val2017.json"), ("ade20k", "scenes.json")]
)
def test_other_files_are_not_overwritten(layout, record, content, tmp_path):
    file = tmp_path / record
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    with pytest.raises(UserError, match="holds other files: give another folder"):
        write_scenes(tmp_path, layout, train=1, val=1)
    with pytest.raises(UserError, match="is a file"):
        write_scenes(file, layout, train=1, val=1)
    assert file.read_text() == content


@pytest.mark.parametrize(("layout", "pictures"), [("coco", "val2017"), ("ade20k", "images/validation")])
def test_an_interrupted_writing_leaves_nothing_that_looks_complete(layout, pictures, tmp_path, monkeypatch):
    folder = tmp_path / "scenes"
    folder.mkdir()  # an empty folder may be there

    def interrupted(index, *arguments):
        if index == FIRST_VALIDATION_SCENE + 1:
            raise KeyboardInterrupt
        return draw_scene(index, *arguments)

    monkeypatch.setattr(scenes, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(folder, layout, train=2, val=2, image_size=(32, 32))
    assert not list(folder.iterdir())
    leftover = tmp_path / "scenes.incomplete"
    (leftover / pictures / "stray.jpg").write_bytes(b"")
    monkeypatch.undo()
    write_scenes(folder, layout, train=2, val=2, image_size=(32, 32))
    assert not leftover.exists()
    assert len(list((folder / pictures).iterdir())) == 2
