"""A detector's figures: those of the run that made it, on the terminal and in files."""

import json
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
