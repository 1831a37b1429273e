"""Training a detector from end to end: what a run leaves, what it starts from, what it refuses."""

import csv
import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import convmae
from convmae import weights
from convmae.commands.detect.evaluate import evaluate
from convmae.commands.detect.predict import predict
from convmae.commands.detect.train import JitterOptions, train
from convmae.data.scenes import CATEGORY_IDS, SHAPES, write_scenes
from convmae.training.engine import DeviceOptions, EngineOptions
from convmae.training.logging import read_metrics
from convmae.training.optimizer import DetectionOptimizerOptions

IN_PROCESS = EngineOptions("cpu", "float32", 0)


def test_a_run_leaves_everything_a_user_wants(finished, scenes):
    assert finished.steps == 6
    losses = [record["loss"] for record in read_metrics(finished.folder)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert [record["box_AP"] for record in read_metrics(finished.folder) if "box_AP" in record][
        -1
    ] <= finished.quality.score
    for path in (finished.picture, finished.loss_curve):
        with Image.open(path) as image:
            assert min(image.size) > 300
    rows = list(csv.reader((finished.folder / "per-class.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["class", *SHAPES]
    assert yaml.safe_load((finished.folder / "config.yaml").read_text())["data"] == str(scenes)
    assert not (finished.folder / "undecodable-images.txt").exists()


def test_the_kept_detector_knows_its_classes(finished):
    detector = convmae.load(finished.checkpoint)
    assert isinstance(detector, convmae.Detector)
    assert detector.classes == list(SHAPES)
    assert tuple(detector.settings["category_ids"]) == CATEGORY_IDS


def test_training_starts_from_the_given_weights(scenes, tmp_path, small_detection):
    """At a learning rate of nothing the encoder stays that of pretraining, its positions in their grid."""
    pretrained = convmae.create_autoencoder("tiny", image_size=32)
    file = tmp_path / "pretrained.safetensors"
    weights.save_model(file, pretrained)
    options = {"optimizer": DetectionOptimizerOptions(base_lr=0.0, weight_decay=0.0), "form": "vitdet", "epochs": 1}
    run = small_detection(scenes, tmp_path / "run", file, image_size=64, window=2, **options)
    before, after = load_file(file), load_file(run.checkpoint / "model.safetensors")
    encoder = [name for name in before if name.startswith("encoder.")]
    assert len(encoder) > 30
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    assert convmae.load(run.checkpoint).settings["form"] == "vitdet"


def test_two_processes_train_one_detector(scenes, paper_file, tmp_path):
    flags = {"--data": scenes, "--weights": paper_file, "--output": tmp_path / "run", "--epochs": 1, "--batch-size": 4}
    flags |= {"--engine.accelerator": "cpu", "--engine.precision": "float32", "--engine.workers": 0}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "convmae"]
    command = [sys.executable, *torchrun, "detect", "train", *(str(part) for flag in flags.items() for part in flag)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("detector finished") == 1
    assert "2 x cpu" in done.stderr
    here = evaluate(tmp_path / "run", scenes, engine=IN_PROCESS)
    logged = next(record for record in read_metrics(tmp_path / "run") if "box_AP" in record)
    assert here.figures == pytest.approx({name: logged[name] for name in here.figures}, abs=1e-6)


def test_a_run_does_not_go_on_with_other_classes(finished, copied, detector_file, change_annotations, small_detection):
    def rename(content):
        content["categories"][0]["name"] = "plate"

    for split in ("train", "val"):
        change_annotations(copied, split, rename)
    with pytest.raises(convmae.UserError, match="holds a run with other classes"):
        small_detection(copied, finished.folder, detector_file, resume=True)


def test_a_run_is_never_overwritten(finished, scenes, detector_file, small_detection):
    with pytest.raises(convmae.UserError, match="holds a run: continue it with --resume"):
        small_detection(scenes, finished.folder, detector_file)


def test_what_is_missing_or_broken_stops_or_is_left_out_and_listed(
    copied, paper_file, tmp_path, change_annotations, small_detection
):
    def damage(content):
        content["annotations"][0]["bbox"][2] = -5
        content["annotations"][1]["segmentation"] = [[1, 2, 3, 4]]

    change_annotations(copied, "train", damage)
    missing = sorted((copied / "val2017").iterdir())[3]
    missing.unlink()
    with pytest.raises(convmae.UserError, match=r"2 of the .* annotations are broken, the first is annotation 1"):
        small_detection(copied, tmp_path / "run", paper_file)
    assert not (tmp_path / "run").exists()
    run = small_detection(copied, tmp_path / "run", paper_file, epochs=1, skip_damaged=True)
    first, *broken, second, lost = (run.folder / "data-report.txt").read_text().splitlines()
    assert first.endswith("instances_train2017.json: left out 2 broken annotations")
    assert "negative width" in broken[0]
    assert "three points" in broken[1]
    assert second.endswith("instances_val2017.json: left out 1 images that are missing")
    assert lost == f"    {missing}: is missing"
    assert not (run.folder / "undecodable-images.txt").exists()


def test_validation_may_lack_classes_and_what_is_found_is_said(
    copied, paper_file, tmp_path, capsys, change_annotations, small_detection
):
    """One category less; an image of training among those of validation; a crowd; boxes of some masks elsewhere."""
    gone = CATEGORY_IDS[0]

    def fewer(content):
        content["categories"] = [one for one in content["categories"] if one["id"] != gone]
        content["annotations"] = [one for one in content["annotations"] if one["category_id"] != gone]

    def crowd(content):
        content["annotations"][0]["iscrowd"] = 1

    change_annotations(copied, "val", fewer)
    change_annotations(copied, "train", crowd)
    image, twin = sorted((copied / "val2017").iterdir())[2], sorted((copied / "train2017").iterdir())[1]
    image.write_bytes(twin.read_bytes())
    run = small_detection(copied, tmp_path / "run", paper_file, epochs=1)
    said = " ".join(capsys.readouterr().err.split())
    listed = (run.folder / "data-report.txt").read_text()
    for finding in (
        "is a crowd, which teaches nothing",
        f"1 of the {len(SHAPES)} classes has no object here, so that nothing can be learned or judged of it: ",
        "1 image is in training, too",
    ):
        assert finding in listed
        assert finding in said
    assert f"    {image} = {twin}" in listed.splitlines()
    assert f"{SHAPES[0]} (id {gone}): 0 objects" in listed
    detector = convmae.load(run.checkpoint)
    assert (detector.classes, detector.settings["category_ids"]) == (list(SHAPES), list(CATEGORY_IDS))
    rows = list(csv.reader((run.folder / "per-class.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["class", *SHAPES]


def test_unknown_categories_of_validation_are_named(copied, paper_file, tmp_path, change_annotations, small_detection):
    change_annotations(copied, "val", lambda content: content["categories"].append({"id": 90, "name": "spiral"}))
    with pytest.raises(convmae.UserError, match=r"which does not know 'spiral' \(id 90\)"):
        small_detection(copied, tmp_path / "run", paper_file)
    assert not (tmp_path / "run").exists()


def test_ids_of_text_are_kept_by_the_detector(copied, paper_file, tmp_path, change_annotations, small_detection):
    """Through training, judging, the weights file and a resumed run."""

    def rename(content):
        for category in content["categories"]:
            category["id"] = f"c{category['id']}"
        for entry in content["annotations"]:
            entry |= {"category_id": f"c{entry['category_id']}", "image_id": f"i{entry['image_id']}", "id": None}
        for image in content["images"]:
            image["id"] = f"i{image['id']}"

    for split in ("train", "val"):
        change_annotations(copied, split, rename)
    run = small_detection(copied, tmp_path / "run", paper_file, epochs=1)
    assert convmae.load(run.checkpoint).settings["category_ids"] == [f"c{number}" for number in CATEGORY_IDS]
    resumed = small_detection(copied, tmp_path / "run", paper_file, epochs=1, resume=True)
    assert resumed.quality == run.quality


@pytest.mark.parametrize("split", ["train", "val"])
def test_there_must_be_something_to_learn_and_to_judge_by(
    copied, paper_file, tmp_path, split, change_annotations, small_detection
):
    """Boxes alone, as some tools export them, are all left out; what then trains is nothing."""

    def drop_masks(content):
        for annotation in content["annotations"]:
            annotation["segmentation"] = []

    change_annotations(copied, split, drop_masks)
    with pytest.raises(convmae.UserError, match=rf"instances_{split}2017\.json has no objects, or only crowds"):
        small_detection(copied, tmp_path / "run", paper_file, skip_damaged=True)
    assert not (tmp_path / "run").exists()


def test_the_demo_needs_no_data(paper_file, tmp_path, monkeypatch, annotations_of, small_detection):
    monkeypatch.setattr(
        "convmae.tasks.processes.write_scenes",
        lambda folder, layout, image_size: write_scenes(folder, layout, 4, 4, image_size),
    )
    run = small_detection("demo", tmp_path / "run", paper_file, epochs=1, image_size=64)
    assert len(annotations_of(run.folder / "scenes")["images"]) == 4
    resumed = small_detection("demo", tmp_path / "run", paper_file, epochs=1, image_size=64, resume=True)
    assert resumed.quality == run.quality


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"drop_path": 1.0}, "drop_path is 1.0: choose it from 0 to less than 1"),
        ({"form": "yolo"}, "form cannot be 'yolo'"),
        ({"image_size": 100}, "image size 100x100 does not suit a detector: choose multiples of 32"),
        ({"batch_size": 4, "accumulate": 3}, "does not divide"),
        ({"jitter": JitterOptions(scale=(0.0, 1.0))}, "jitter needs"),
        ({"train_images": "nowhere"}, "nowhere does not exist: check --train-images"),
        ({"val_annotations": "nowhere.json"}, "nowhere.json does not exist: check --val-annotations"),
        ({"data": None}, "without COCO's folder"),
        ({"data": "demo", "image_size": 100}, "image size 100x100 does not suit a detector"),
        ({"anchor_sizes": (0, 16, 32, 64, 128)}, "anchors of 0 pixels"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(scenes, paper_file, tmp_path, changes, message):
    given = {**changes, "data": changes["data"]} if "data" in changes else changes
    with pytest.raises(convmae.UserError, match=message) as error:
        train(**{"data": str(scenes), "weights": paper_file, "output": tmp_path / "run", "engine": IN_PROCESS, **given})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere/annotations/instances_train2017.json does not exist"),
        (["--data", "nowhere", "--no-such-flag", "3"], "--no_such_flag"),
        (["--optimizer.schedule", "sawtooth"], "--optimizer.schedule cannot be 'sawtooth'"),
    ],
)
def test_the_command_line_ends_with_one_line_and_status_2(refused, arguments, message):
    refused(message, "detect", "train", *arguments)


# Boxes without masks


@pytest.fixture
def bare(copied, change_annotations):
    """Scenes whose objects have boxes alone."""

    def drop_masks(content):
        for annotation in content["annotations"]:
            del annotation["segmentation"], annotation["area"]

    for split in ("train", "val"):
        change_annotations(copied, split, drop_masks)
    return copied


def test_boxes_alone_are_learned_judged_and_predicted(bare, scenes, paper_file, tmp_path, small_detection, capsys):
    with pytest.raises(convmae.UserError, match=r"it has no segmentation.*--masks false"):
        small_detection(bare, tmp_path / "run", paper_file)
    run = small_detection(bare, tmp_path / "run", paper_file, epochs=1, masks=False, max_detections=30)
    assert run.quality.masks is None
    logged = [record for record in read_metrics(run.folder) if "box_AP" in record]
    assert len(logged) == 1
    assert not any(name.startswith("mask") for name in logged[0])
    rows = list(csv.reader((run.folder / "per-class.csv").read_text().splitlines()))
    assert rows[0] == ["class", "box_AP"]
    with Image.open(run.picture) as image:
        assert min(image.size) > 300
    detector = convmae.load(run.checkpoint)
    assert (detector.has_masks, detector.max_detections) == (False, 30)

    capsys.readouterr()
    quality = evaluate(run.folder, bare, output=tmp_path / "results.json", engine=IN_PROCESS)
    printed = capsys.readouterr()
    assert quality.figures == pytest.approx(run.quality.figures, abs=1e-6, nan_ok=True)
    assert "masks" not in printed.out
    full = list(Counter(one["image_id"] for one in read_json(tmp_path / "results.json")).values())
    assert max(full) <= 30
    assert ("--max-detections allows" in printed.err) is (max(full) == 30)
    found = predict(
        str(bare / "val2017"), run.folder, tmp_path / "found", 0.0, 1, engine=DeviceOptions("cpu", "float32", 0)
    )
    results = read_json(found.results)
    assert len(results) == found.count > 0
    assert not any("segmentation" in result for result in results)
    assert len(found.pictures) == 1

    with pytest.raises(convmae.UserError, match="holds a run without masks: give --masks false"):
        small_detection(scenes, run.folder, paper_file, resume=True)


def read_json(path):
    return json.loads(path.read_text())


def test_objects_without_a_mask_among_others_are_counted_and_learn(
    copied, paper_file, tmp_path, change_annotations, small_detection
):
    def drop_some(content):
        content["annotations"][0]["segmentation"] = []

    change_annotations(copied, "train", drop_some)
    run = small_detection(copied, tmp_path / "run", paper_file, epochs=1)
    assert "1 object has no mask and teaches its box alone" in (run.folder / "data-report.txt").read_text()
    assert run.quality.masks is not None
