"""Detections of any pictures: results in COCO's form, their ids, pictures."""

import json
import os

import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

import convmae
from convmae.commands.detect.evaluate import evaluate
from convmae.commands.detect.predict import predict
from convmae.data.scenes import CATEGORY_IDS
from convmae.training.engine import DeviceOptions, EngineOptions

IN_PROCESS = EngineOptions("cpu", "float32", 0)
ON_CPU = DeviceOptions("cpu", "float32", 0)


def test_predictions_are_coco_s_results_and_pictures(finished, scenes, tmp_path):
    found = predict(
        str(scenes / "val2017"), finished.folder, tmp_path / "found", threshold=0.0, draw=2, engine=ON_CPU, batch_size=7
    )
    results = json.loads(found.results.read_text())
    assert found.count == len(results) > 0
    names = sorted(str(path) for path in (scenes / "val2017").iterdir())
    for result in results:
        assert result["file_name"] == names[result["image_id"] - 1]
        assert result["category_id"] in CATEGORY_IDS
        assert 0 <= result["score"] <= 1
        assert result["segmentation"]["size"] == [64, 64]
    assert len(found.pictures) == 2
    for path in found.pictures:
        with Image.open(path) as image:
            assert min(image.size) > 300


def test_predictions_of_annotated_pictures_take_their_ids_and_are_those_of_the_evaluation(finished, scenes, tmp_path):
    evaluate(finished.folder, scenes, output=tmp_path / "results.json", engine=IN_PROCESS)
    judged = json.loads((tmp_path / "results.json").read_text())
    file = scenes / "annotations" / "instances_val2017.json"
    images = str(scenes / "val2017")
    found = predict(images, finished.folder, tmp_path / "found", annotations=file, draw=0, engine=ON_CPU)
    results = json.loads(found.results.read_text())
    assert len(results) == len(judged)
    for one, other in zip(results, judged, strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
    assert found.pictures == ()


def test_pictures_of_the_same_name_take_the_ids_of_their_folders(paper_file, tmp_path):
    """As labelling tools write them; a wrong id would be a wrong figure, later and elsewhere."""
    for name in ("a/1.png", "b/1.png", "b/2.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / name)
    file = tmp_path / "file.json"

    def ids_of(**told):
        entries = [{"id": int(number[1:]), "file_name": name} for number, name in told.items()]
        file.write_text(json.dumps({"images": entries}))
        options = {"annotations": file, "threshold": 0.0, "draw": 0, "engine": ON_CPU}
        found = predict(str(tmp_path / "photos"), paper_file, tmp_path / "found", **options)
        results = json.loads(found.results.read_text())
        return {(os.path.relpath(one["file_name"], tmp_path / "photos"), one["image_id"]) for one in results}

    found = ids_of(_3="b/1.png", _5="a/1.png", _9="elsewhere/2.png")
    assert found
    assert found <= {("b/1.png", 3), ("a/1.png", 5), ("b/2.png", 9)}
    with pytest.raises(convmae.UserError, match=r"has one image for both .*a/1\.png and .*b/1\.png"):
        ids_of(_3="1.png", _9="2.png")
    with pytest.raises(convmae.UserError, match=r"does not tell which of its images named 1\.png is .*a/1\.png"):
        ids_of(_3="1.png", _4="1.png", _9="2.png")


def test_ids_of_any_kind_are_taken_by_names_in_any_spelling(paper_file, tmp_path):
    names = {
        "a/my dog.png": r"C:\photos\A\MY%20DOG.PNG",
        "b/2.png": "https://host.example/b/2.png?raw=1",
        "b/é.png": "b/e\u0301.png",
    }
    ids = ["e3b0c442", 7.5, 12]
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / name)
    file = tmp_path / "file.json"
    entries = [{"id": image_id, "file_name": told} for image_id, told in zip(ids, names.values(), strict=True)]
    file.write_text(json.dumps({"images": entries}))
    options = {"annotations": file, "threshold": 0.0, "draw": 0, "engine": ON_CPU}
    found = predict(str(tmp_path / "photos"), paper_file, tmp_path / "found", **options)
    results = json.loads(found.results.read_text())
    told = {os.path.relpath(one["file_name"], tmp_path / "photos"): one["image_id"] for one in results}
    assert told == dict(zip(names, ids, strict=True))
    file.write_text(json.dumps({"images": [*entries, {**entries[0], "file_name": "x.png"}]}))
    with pytest.raises(convmae.UserError, match=r"has several images of one id: give each an id of its own"):
        predict(str(tmp_path / "photos"), paper_file, tmp_path / "found", **options)


def test_pictures_of_another_size_are_detected_in_their_own_pixels(finished, scenes, tmp_path):
    """Twice as large, a picture is fitted back to what the detector sees: its boxes are twice as large."""
    folder = tmp_path / "large"
    folder.mkdir()
    name = sorted((scenes / "val2017").iterdir())[0]
    with Image.open(name) as image:
        image.resize((128, 128), Image.Resampling.NEAREST).save(folder / "large.png")
        image.save(folder / "small.png")
    found = predict(str(folder), finished.folder, tmp_path / "found", draw=0, engine=ON_CPU)
    boxes = {"large.png": [], "small.png": []}
    for result in json.loads(found.results.read_text()):
        left, top, width, height = result["bbox"]
        boxes[os.path.basename(result["file_name"])].append([left, top, left + width, top + height])  # noqa: PTH119
    # Scores of a detector that has learned so little lie close together: rounding may exchange the most certain ones.
    large, small = (torch.tensor(boxes[name]) for name in ("large.png", "small.png"))
    assert (box_iou(large[:5], 2 * small).amax(dim=1) > 0.8).all()


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)], ids=["tall", "wide"])
def test_pictures_of_a_pixel_s_width_are_detected_and_drawn(paper_file, tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "narrow.png")
    found = predict(str(tmp_path / "narrow.png"), paper_file, tmp_path / "found", threshold=0.0, engine=ON_CPU)
    results = json.loads(found.results.read_text())
    assert found.count == len(results)
    assert all(result["segmentation"]["size"] == [size[1], size[0]] for result in results)
    (picture,) = found.pictures
    with Image.open(picture) as image:
        assert max(image.size) > 300


def test_masks_of_a_large_picture_are_never_all_in_memory(paper_file, tmp_path, monkeypatch):
    """A detector that would make them whole is not asked to."""
    monkeypatch.setattr("convmae.models.detector.PastedMasks.whole", lambda masks: pytest.fail("all masks at once"))
    Image.effect_noise((2100, 64), 80).save(tmp_path / "large.png")
    found = predict(str(tmp_path / "large.png"), paper_file, tmp_path / "found", 0.0, engine=ON_CPU, max_detections=3)
    results = json.loads(found.results.read_text())
    assert 0 < len(results) <= 3
    assert all(result["segmentation"]["size"] == [64, 2100] for result in results)
    assert len(found.pictures) == 1


def test_damaged_pictures_stop_or_are_left_out(finished, copied, tmp_path, capsys):
    broken = sorted((copied / "val2017").iterdir())[0]
    broken.write_bytes(b"no picture")
    images = str(copied / "val2017")
    with pytest.raises(convmae.UserError, match=r"cannot be decoded.*--skip-damaged"):
        predict(images, finished.folder, tmp_path / "found", engine=ON_CPU)
    found = predict(images, finished.folder, tmp_path / "found", draw=0, skip_damaged=True, engine=ON_CPU)
    assert "images that were left out: 1" in capsys.readouterr().err
    assert str(broken) not in found.results.read_text()


@pytest.mark.parametrize(
    ("weights", "arguments", "message"),
    [
        ("nothing.safetensors", [], "no weights at nothing.safetensors"),
        ("{autoencoder}", [], "holds no detector: train one first"),
        ("{paper}", ["--threshold", "2"], "threshold is a score"),
        ("{paper}", ["--image-size", "100"], "does not suit a detector"),
        ("{paper}", ["--batch-size", "0"], "batch_size is 0"),
        ("{paper}", ["--annotations", "{paper}"], "no file in COCO's format"),
    ],
)
def test_the_command_line_ends_with_one_line_and_status_2(
    refused, autoencoder_file, paper_file, weights, arguments, message
):
    arguments = [part.format(autoencoder=autoencoder_file, paper=paper_file) for part in [weights, *arguments]]
    refused(message, "detect", "predict", "--images", "demo", "--weights", *arguments)
