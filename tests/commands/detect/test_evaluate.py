"""A detector's figures: those of the run that made it, on the terminal and in files."""

import json
import shutil
from importlib import import_module

import pytest

import convmae
from convmae.commands.detect.evaluate import evaluate
from convmae.data.scenes import CATEGORY_IDS, SHAPES
from convmae.training.engine import EngineOptions

IN_PROCESS = EngineOptions("cpu", "float32", 0)


def test_the_figures_of_a_run_are_those_of_its_kept_detector(finished, scenes, tmp_path, annotations_of):
    quality = evaluate(finished.folder, scenes, output=tmp_path / "results.json", batch_size=3, engine=IN_PROCESS)
    assert quality.figures == pytest.approx(finished.quality.figures, abs=1e-6)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["category_id"] for result in results} <= set(CATEGORY_IDS)
    assert {result["image_id"] for result in results} <= {image["id"] for image in annotations_of(scenes)["images"]}


def test_what_other_processes_left_out_is_listed_too(finished, copied, monkeypatch, capsys):
    broken = sorted((copied / "val2017").iterdir())[0]
    broken.write_bytes(b"no picture")

    def gathered_from_two(fabric, found):
        return [*found, "elsewhere.jpg: broken"] if all(isinstance(one, str) for one in found) else list(found)

    monkeypatch.setattr(import_module("convmae.commands.detect.evaluate"), "gathered", gathered_from_two)
    evaluate(finished.folder, copied, skip_damaged=True, engine=IN_PROCESS)
    listed = capsys.readouterr().err
    assert "images that were left out: 2" in listed
    assert str(broken) in listed
    assert "elsewhere.jpg" in listed


def test_it_prints_the_twelve_figures_of_boxes_and_masks(finished, scenes, capsys):
    evaluate(finished.folder, scenes, engine=IN_PROCESS)
    printed = capsys.readouterr().out
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl", *SHAPES):
        assert f"{name}" in printed
    assert "boxes" in printed
    assert "masks" in printed


def test_a_detector_is_not_judged_by_other_categories(finished, copied, change_annotations):
    change_annotations(copied, "val", lambda content: content["categories"].append({"id": 90, "name": "spiral"}))
    with pytest.raises(convmae.UserError, match="has other categories than the detector"):
        evaluate(finished.folder, copied, engine=IN_PROCESS)


def test_roboflow_s_layout_and_ids_of_text_give_the_same_figures(
    finished, scenes, copied, tmp_path, change_annotations, annotations_of
):
    """Results carry the ids of the file that is judged, whatever the detector's were."""
    images = {image["id"]: f"image-{image['id']}" for image in annotations_of(scenes)["images"]}
    categories = {CATEGORY_IDS[0]: "first", CATEGORY_IDS[1]: 0.5}

    def rename(content):
        for image in content["images"]:
            image |= {"id": images[image["id"]], "file_name": f"C:\\data\\{image['file_name'].upper()}"}
        for category in content["categories"]:
            category["id"] = categories.get(category["id"], category["id"])
        for entry in content["annotations"]:
            entry |= {
                "image_id": images[entry["image_id"]],
                "category_id": categories.get(entry["category_id"], entry["category_id"]),
            }

    change_annotations(copied, "val", rename)
    roboflow = tmp_path / "roboflow"
    shutil.move(copied / "val2017", roboflow / "valid")
    shutil.move(copied / "annotations/instances_val2017.json", roboflow / "valid" / "_annotations.coco.json")
    quality = evaluate(finished.folder, roboflow, output=tmp_path / "results.json", engine=IN_PROCESS)
    assert quality.figures == pytest.approx(finished.quality.figures, abs=1e-6)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results
    assert {result["category_id"] for result in results} <= {"first", 0.5, *CATEGORY_IDS[2:]}
    assert {result["image_id"] for result in results} <= set(images.values())


def test_there_must_be_something_to_judge_by(finished, copied, change_annotations):
    def crowds_all(content):
        for entry in content["annotations"]:
            entry["iscrowd"] = 1

    change_annotations(copied, "val", crowds_all)
    with pytest.raises(convmae.UserError, match=r"instances_val2017\.json has no objects, or only crowds"):
        evaluate(finished.folder, copied, engine=IN_PROCESS)


def test_corner_boxes_are_refused_or_taken_from_the_masks(finished, copied, change_annotations, annotations_of):
    def to_corners(content):
        for entry in content["annotations"]:
            left, top, width, height = entry["bbox"]
            entry["bbox"] = [left, top, left + width, top + height]

    change_annotations(copied, "val", to_corners)
    with pytest.raises(convmae.UserError, match=r"look like corners .* or take the boxes of the masks with --boxes-fr"):
        evaluate(finished.folder, copied, engine=IN_PROCESS)
    quality = evaluate(finished.folder, copied, boxes_from_masks=True, engine=IN_PROCESS)
    assert quality.figures == pytest.approx(finished.quality.figures, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere", "--weights", "nothing"], "nowhere/annotations/instances_val2017.json does not"),
        (["--annotations", "nowhere.json", "--weights", "nothing"], "nowhere.json does not exist: check --annot"),
        ([], "weights"),
    ],
)
def test_the_command_line_ends_with_one_line_and_status_2(refused, arguments, message):
    refused(message, "detect", "eval", *arguments)
