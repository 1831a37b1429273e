"""COCO's figures against pycocotools', and against what can be counted by hand."""

import contextlib
import copy
import dataclasses
import io
import json
import math

import numpy
import pytest
import torch

from convmae.errors import UserError
from convmae.evaluation.detection import coco_results, judge_detections

mask_library = pytest.importorskip("faster_coco_eval.core.mask")

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
CATEGORY_IDS = [2, 7, 90]
SIZE = (150, 160)


def ellipse(left, top, width, height):
    """uint8 (H, W), with a flattened side so that it touches its box."""
    rows, columns = numpy.mgrid[: SIZE[0], : SIZE[1]]
    across, down = (columns + 0.5 - left) / width, (rows + 0.5 - top) / height
    inside = (across > 0) & (across < 1) & (down > 0) & (down < 1)
    return (inside & ((across - 0.5) ** 2 + (down - 0.5) ** 2 < 0.3)).astype(numpy.uint8)


def compressed(mask):
    lengths = mask_library.encode(numpy.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": lengths["counts"].decode()}


def truth_of(objects, image_ids=(1, 2, 3)):
    """Ground truth of (image_id, category_id, box, crowd), ellipses all."""
    annotations = []
    for number, (image_id, category_id, box, crowd) in enumerate(objects, 1):
        mask = ellipse(*box)
        annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": list(box),
                "area": int(mask.sum()),
                "iscrowd": crowd,
                "segmentation": compressed(mask),
            }
        )
    return {
        "images": [{"id": image_id, "height": SIZE[0], "width": SIZE[1]} for image_id in image_ids],
        "categories": [{"id": category_id, "name": str(category_id)} for category_id in CATEGORY_IDS],
        "annotations": annotations,
    }


def detections_of(found):
    """A detector's output for (category_id, box, score), ellipses all."""
    boxes = [(left, top, left + width, top + height) for _, (left, top, width, height), _ in found]
    masks = [torch.from_numpy(ellipse(*box)) for _, box, _ in found]
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([CATEGORY_IDS.index(category_id) + 1 for category_id, _, _ in found]),
        "scores": torch.tensor([score for _, _, score in found]),
        "masks": torch.stack(masks).bool() if masks else torch.zeros(0, *SIZE, dtype=torch.bool),
    }


def results_of(image_id, *found):
    return coco_results(image_id, detections_of(found), CATEGORY_IDS)


def figures(judged):
    return [getattr(judged, name) for name in NAMES]


OBJECTS = [
    (1, 2, (5, 5, 20, 20), 0),
    (1, 2, (40, 5, 50, 60), 0),
    (1, 90, (10, 30, 120, 110), 0),
    (1, 2, (100, 10, 50, 50), 1),
    (3, 90, (20, 20, 30, 25), 0),
]  # no image 2, no category 7


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_objects_themselves_are_perfect_detections(kind):
    found = [
        result
        for image_id in (1, 2, 3)
        for result in results_of(
            image_id,
            *[(category_id, box, 0.9) for own, category_id, box, crowd in OBJECTS if own == image_id and not crowd],
        )
    ]
    judged = judge_detections(truth_of(OBJECTS), found, kind)
    expected = dict.fromkeys(NAMES, 1.0) | {"AR1": 0.75}  # of the first category an image has two
    assert figures(judged) == pytest.approx([expected[name] for name in NAMES])
    assert judged.per_class == pytest.approx((1.0, math.nan, 1.0), nan_ok=True)


def test_results_are_json_and_hold_the_masks():
    (first, second) = json.loads(json.dumps(results_of(7, (90, (10, 30, 120, 110), 0.5), (2, (5, 5, 20, 20), 0.25))))
    assert (first["image_id"], first["category_id"], first["bbox"], first["score"]) == (7, 90, [10, 30, 120, 110], 0.5)
    assert second["category_id"] == 2
    assert numpy.array_equal(mask_library.decode(first["segmentation"]), ellipse(10, 30, 120, 110))
    assert results_of(7) == []


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize(
    ("false_score", "ap", "ar1"),
    [
        (0.8, 51 / 101, 1 / 2),  # of the 101 levels of recall, 0 to 0.5 are reached, with precision 1
        (0.95, 51 / 202, 0.0),  # with precision 1/2, as the wrong one comes first
    ],
)
def test_one_of_two_objects_found_and_a_false_alarm(kind, false_score, ap, ar1):
    truth = truth_of([(1, 2, (5, 5, 20, 20), 0), (1, 2, (40, 5, 50, 60), 0)])
    found = results_of(1, (2, (5, 5, 20, 20), 0.9), (2, (100, 100, 20, 20), false_score))
    judged = judge_detections(truth, found, kind)
    expected = {"AP": ap, "AP50": ap, "AP75": ap, "AR1": ar1, "AR10": 0.5, "AR100": 0.5}
    assert {name: getattr(judged, name) for name in expected} == pytest.approx(expected)
    assert (judged.ARs, judged.ARm) == (1.0, 0.0)
    assert math.isnan(judged.APl)
    assert judged.per_class == pytest.approx((ap, math.nan, math.nan), nan_ok=True)


def test_detections_inside_a_crowd_are_not_false():
    crowded = [(1, 2, (5, 5, 20, 20), 0), (1, 2, (60, 60, 60, 60), 1)]
    found = results_of(1, (2, (5, 5, 20, 20), 0.5), (2, (75, 75, 20, 20), 0.9))
    for kind in ("bbox", "segm"):
        precisions = [judge_detections(truth_of(objects), found, kind).AP for objects in (crowded, crowded[:1])]
        assert precisions == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_without_detections_all_figures_are_zero(kind):
    judged = judge_detections(truth_of(OBJECTS), [], kind)
    assert figures(judged) == [0.0] * 12
    assert judged.per_class == pytest.approx((0.0, math.nan, 0.0), nan_ok=True)


def test_without_objects_or_pictures_there_are_no_figures():
    found = results_of(1, (2, (5, 5, 20, 20), 0.9))
    for judged in (
        judge_detections(truth_of([]), found, "bbox"),
        judge_detections(truth_of([]), [], "segm"),
        judge_detections(truth_of(OBJECTS), found, "segm", image_ids=[]),
        judge_detections(truth_of([], image_ids=()), [], "segm"),
    ):
        assert all(map(math.isnan, [*figures(judged), *judged.per_class]))
        assert len(judged.per_class) == 3


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ids_may_be_anything(kind):
    """As tools write them: hashes, fractions, numbers in another order; classes keep the order of the file."""
    found = results_of(1, (2, (5, 5, 20, 20), 0.9), (90, (40, 40, 22, 21), 0.4)) + results_of(
        3, (90, (20, 20, 30, 25), 0.9)
    )
    expected = judge_detections(truth_of(OBJECTS), found, kind, image_ids=[1, 3])
    images = {1: "e3b0", 2: 7.5, 3: 1}
    categories = {2: "z", 7: 1.25, 90: 0}
    truth = truth_of(OBJECTS)
    for entry in truth["annotations"] + found:
        entry |= {"image_id": images[entry["image_id"]], "category_id": categories[entry["category_id"]]}
    for entry, renamed in ((image, images) for image in truth["images"]):
        entry["id"] = renamed[entry["id"]]
    for entry in truth["categories"]:
        entry["id"] = categories[entry["id"]]
    judged = judge_detections(truth, found, kind, image_ids=["e3b0", 1])
    assert judged == expected
    assert judged.AP > 0


def test_only_the_judged_images_count():
    found = results_of(3, (90, (20, 20, 30, 25), 0.9)) + results_of(1, (2, (100, 100, 9, 9), 0.99))
    for kind in ("bbox", "segm"):
        judged = judge_detections(truth_of(OBJECTS), found, kind, image_ids=[3, 2])
        assert judged == judge_detections(truth_of(OBJECTS[4:], image_ids=(2, 3)), found[:1], kind)
        assert figures(judged)[0] == pytest.approx(1.0)


def test_objects_are_counted_whatever_their_id_is():
    truth = truth_of(OBJECTS)
    expected = judge_detections(truth, results_of(1, (2, (5, 5, 20, 20), 0.9)), "bbox")
    for entry in truth["annotations"]:
        entry["id"] = 0
    assert figures(judge_detections(truth, results_of(1, (2, (5, 5, 20, 20), 0.9)), "bbox")) == pytest.approx(
        figures(expected), nan_ok=True
    )
    assert expected.AP > 0


def noisy(seed):
    """Objects of all sizes in twelve pictures, crowds among them, and detections that often hit them."""
    numbers = numpy.random.default_rng(seed)

    def box():
        width, height = numbers.integers(6, 130, 2)
        return (*numbers.integers(0, (SIZE[1] - width, SIZE[0] - height)).tolist(), int(width), int(height))

    objects = [
        (image_id, int(numbers.choice([2, 90])), box(), int(numbers.random() < 0.15))
        for image_id in range(1, 12)
        for _ in range(numbers.integers(0, 7))
    ]
    results = []
    for image_id in range(1, 13):
        found = [(int(numbers.choice(CATEGORY_IDS)), box(), numbers.random()) for _ in range(3)]
        for own, category_id, (left, top, width, height), _ in objects:
            if own == image_id:
                for _ in range(numbers.integers(0, 4)):
                    moved = numpy.array([left, top, width, height]) + numbers.normal(0, 2, 4)
                    moved[2:] = moved[2:].clip(3)
                    found.append((category_id, tuple(moved.tolist()), round(numbers.random(), 2)))
        results += results_of(image_id, *found)
    return truth_of(objects, range(1, 13)), results


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_figures_are_those_of_pycocotools(kind, seed):
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    truth, results = noisy(seed)
    judged = judge_detections(truth, results, kind)
    unused = "bbox" if kind == "segm" else "segmentation"
    with contextlib.redirect_stdout(io.StringIO()):
        expected = coco.COCO()
        expected.dataset = {"info": {}, **copy.deepcopy(truth)}
        expected.createIndex()
        found = expected.loadRes([{key: result[key] for key in result if key != unused} for result in results])
        evaluation = cocoeval.COCOeval(expected, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert figures(judged) == pytest.approx(evaluation.stats.tolist(), abs=1e-9)
    assert 0.05 < judged.AP < 0.9
    for number, value in enumerate(judged.per_class):
        of_class = evaluation.eval["precision"][:, :, number, 0, -1].mean()
        assert math.isnan(value) if of_class < 0 else value == pytest.approx(of_class)


def test_judging_is_silent_and_leaves_its_arguments_alone(capfd):
    truth, results = noisy(0)
    before = copy.deepcopy((truth, results))
    first = judge_detections(truth, results, "segm")
    assert (truth, results) == before
    judge_detections(truth, results, "bbox")
    assert judge_detections(truth, results, "segm") == first
    assert capfd.readouterr() == ("", "")
    assert set(dataclasses.asdict(first)) == {*NAMES, "per_class"}


def test_the_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setattr("convmae.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'convmae\[detection\]'"):
        judge_detections(truth_of(OBJECTS), [], "bbox")
    with pytest.raises(UserError, match=r"pip install 'convmae\[detection\]'"):
        results_of(1)


# Boxes alone, and many detections


def test_results_without_masks_have_none():
    detections = detections_of([(2, (5, 5, 20, 20), 0.9)])
    with_masks = coco_results(1, detections, CATEGORY_IDS)
    del detections["masks"]
    (result,) = coco_results(1, detections, CATEGORY_IDS)
    assert {**result, "segmentation": with_masks[0]["segmentation"]} == with_masks[0]
    assert "segmentation" not in result
    assert judge_detections(truth_of(OBJECTS), [result], "bbox") == judge_detections(
        truth_of(OBJECTS), with_masks, "bbox"
    )


def test_masks_of_objects_without_one_are_neither_missed_nor_false():
    truth = truth_of([(1, 2, (5, 5, 20, 20), 0), (1, 2, (60, 60, 60, 60), 0)])
    truth["annotations"][1]["segmentation"] = None
    found = results_of(1, (2, (5, 5, 20, 20), 0.5), (2, (60, 60, 60, 60), 0.9))
    assert pytest.approx(1.0) == judge_detections(truth, found, "segm").AP
    assert pytest.approx(1.0) == judge_detections(truth, found[:1], "segm").AP
    assert pytest.approx(1.0) == judge_detections(truth, found, "bbox").AP
    assert pytest.approx(51 / 101) == judge_detections(truth, found[:1], "bbox").AP


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_detections_beyond_a_hundred_count_where_more_are_allowed(kind):
    boxes = [(12 * column, 12 * row, 8, 8) for row in range(12) for column in range(12)]
    truth = truth_of([(1, 2, box, 0) for box in boxes])
    found = results_of(1, *[(2, box, 0.9) for box in boxes])
    assert pytest.approx(100 / 144) == judge_detections(truth, found, kind).AR100
    many = judge_detections(truth, found, kind, max_detections=300)
    assert (many.AP, many.AR100, many.per_class[0]) == pytest.approx((1, 1, 1))
    assert pytest.approx(10 / 144) == many.AR10
    assert judge_detections(truth, found, kind, max_detections=5) == judge_detections(truth, found, kind)
