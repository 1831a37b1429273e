"""`convmae check`: what is counted, what is drawn, and what ends with status 2 after all was told."""

import json
import shutil

import numpy
import pytest
from PIL import Image

import convmae
from convmae.data.scenes import CATEGORY_IDS, SHAPES, draw_scene


def test_a_folder_of_images(photographs, tmp_path, command_line):
    folder = shutil.copytree(photographs, tmp_path / "photographs")
    (folder / "notes.txt").write_text("no picture")
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(folder / "clear.png")
    status, out, err = command_line("check", "--data", folder, "--output", tmp_path / "check")
    assert (status, err.strip()) == (0, "")  # older versions of rich end a bar that is not shown with an empty line
    said = " ".join(out.split())
    assert "11 images (1 other file ignored: .txt 1)" in said
    assert "1 of 11 images looked at is transparent in part, and seen on white (--background)" in said
    assert "RGBA" in said
    report = (tmp_path / "check" / "data-report.txt").read_text()
    assert f"    {folder / 'clear.png'}" in report or "    clear.png" in report
    with Image.open(tmp_path / "check" / "samples.png") as picture:
        assert min(picture.size) > 200


def test_labelled_images_are_counted_by_class(labelled, tmp_path):
    result = convmae.check(str(labelled), "classification", tmp_path / "check")
    training, validation = result.class_counts.values()
    assert set(training.values()) == {8}
    assert set(validation.values()) == {3}
    assert list(result.images.values()) == [48, 18]
    _, found = result.findings.values()
    assert found == []
    repeated = shutil.copytree(labelled, tmp_path / "labelled")
    shutil.copy(repeated / "train" / "azure" / "00.png", repeated / "val" / "azure" / "00.png")
    _, found = convmae.check(str(repeated), "classification", tmp_path / "other").findings.values()
    assert [finding.summary.split(",")[0] for finding in found] == ["1 image is in training"]


def test_objects_are_counted_and_what_stops_a_training_comes_last(coco_scenes, tmp_path, command_line):
    result = convmae.check(str(coco_scenes), "detection", tmp_path / "check")
    content = json.loads((coco_scenes / "annotations" / "instances_train2017.json").read_text())
    truth = [one["category_id"] for one in content["annotations"]]
    counts = {shape: truth.count(number) for shape, number in zip(SHAPES, CATEGORY_IDS, strict=True)}
    assert next(iter(result.class_counts.values())) == counts
    assert all(f"    {shape}: {count}\n" in result.report.read_text() for shape, count in counts.items())
    broken = shutil.copytree(coco_scenes, tmp_path / "scenes")
    content["annotations"][0]["bbox"][2] = -5
    (broken / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    status, out, err = command_line("check", "--data", broken, "--task", "detection", "--output", tmp_path / "broken")
    assert status == 2
    assert err.strip().count("\n") == 0
    assert "1 of the" in err
    assert "negative width" in err
    assert "left out 1 broken annotation" in out
    assert "negative width" in (tmp_path / "broken" / "data-report.txt").read_text()


def test_pixels_are_counted(ade20k_scenes, tmp_path):
    result = convmae.check(str(ade20k_scenes), "segmentation", tmp_path / "check")
    training = next(iter(result.class_counts.values()))
    maps = [draw_scene(number, (64, 96)).label_map() for number in range(12)]
    assert training == {
        name: sum(int((numpy.asarray(one) == label).sum()) for one in maps)
        for label, name in enumerate(["background", *SHAPES])
    }
    assert result.picture == tmp_path / "check" / "samples.png"
    with Image.open(result.picture) as picture:
        assert min(picture.size) > 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "classification"], "classification needs --data"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--data", "nowhere", "--task", "detection"], "nowhere/annotations/instances_train2017.json does not exist"),
        (["--data", "nowhere", "--task", "segmentation"], "nowhere/images/training does not exist"),
    ],
)
def test_what_cannot_be_opened_is_one_line(refused, arguments, message):
    refused(message, "check", *arguments)
