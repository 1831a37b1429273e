"""Detection from end to end: what a run leaves, its figures, resume bit for bit, predictions, mistakes."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib import import_module

import pytest
import torch
import yaml
from convmae.commands.detect.evaluate import evaluate
from convmae.commands.detect.predict import predict
from convmae.commands.detect.train import JitterOptions, train
from convmae.tasks.detection.job import AnnotatedBatch
from convmae.tasks.detection.judge import DetectionQuality, print_quality
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torchvision.ops import box_iou

import convmae
from convmae import cli, weights
from convmae.data.scenes import CATEGORY_IDS, SHAPES, write_scenes
from convmae.evaluation.detection import CocoFigures
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.engine import DeviceOptions, EngineOptions, start_engine
from convmae.training.logging import LoggingOptions, read_metrics
from convmae.training.loop import Interrupted
from convmae.training.optimizer import DetectionOptimizerOptions

IN_PROCESS = EngineOptions("cpu", "float32", 0)
ON_CPU = DeviceOptions("cpu", "float32", 0)
TRAINING, VALIDATION = 12, 20  # of the validation scenes one has no objects


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Generated scenes of 64 x 64; treat them as read-only."""
    return write_scenes(tmp_path_factory.mktemp("coco") / "scenes", "coco", TRAINING, VALIDATION, (64, 64))


@pytest.fixture
def copied(scenes, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(scenes, tmp_path / "scenes")


@pytest.fixture(scope="module", params=["paper", "vitdet"])
def detector_file(request, tmp_path_factory):
    """Weights file of a detector so small that a step takes a tenth of a second."""
    return untrained(tmp_path_factory.mktemp("weights") / f"{request.param}.safetensors", request.param)


@pytest.fixture(scope="module")
def paper_file(tmp_path_factory):
    """The same of the paper's form alone."""
    return untrained(tmp_path_factory.mktemp("weights") / "paper.safetensors", "paper")


def untrained(path, form):
    torch.manual_seed(0)
    detector = convmae.Detector(
        (64, 64),
        num_classes=len(SHAPES),
        form=form,
        widths=(16, 24, 32),
        depths=(1, 1, 2),
        num_heads=4,
        pos_embed_size=(32, 32),
        window=2,
        head_width=16,
        box_width=32,
        anchor_sizes=(16, 32, 64, 128, 256),
        proposals=50,
        rois=16,
    )
    weights.save_model(path, detector)
    return path


def small_run(data, output, weights, **changes):
    settings = {
        "data": str(data),
        "weights": weights,
        "output": output,
        "epochs": 2,
        "batch_size": 4,
        "jitter": JitterOptions(scale=(0.5, 1.5)),
        "optimizer": DetectionOptimizerOptions(base_lr=0.1),
        "engine": IN_PROCESS,
        "logging": LoggingOptions(every_steps=1),
    }
    return train(**{**settings, **changes})


@pytest.fixture(scope="module")
def finished(scenes, detector_file, tmp_path_factory):
    """A run of two epochs; treat it as read-only."""
    return small_run(scenes, tmp_path_factory.mktemp("runs") / "run", detector_file)


def annotations_of(folder, split="val"):
    return json.loads((folder / "annotations" / f"instances_{split}2017.json").read_text())


def change_annotations(folder, split, change):
    path = folder / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Training


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


def test_training_starts_from_the_given_weights(scenes, tmp_path):
    """At a learning rate of nothing the encoder stays that of pretraining, its positions in their grid."""
    pretrained = convmae.create_autoencoder("tiny", image_size=32)
    file = tmp_path / "pretrained.safetensors"
    weights.save_model(file, pretrained)
    options = {"optimizer": DetectionOptimizerOptions(base_lr=0.0, weight_decay=0.0), "form": "vitdet", "epochs": 1}
    run = small_run(scenes, tmp_path / "run", file, image_size=64, window=2, **options)
    before, after = load_file(file), load_file(run.checkpoint / "model.safetensors")
    encoder = [name for name in before if name.startswith("encoder.")]
    assert len(encoder) > 30
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    assert convmae.load(run.checkpoint).settings["form"] == "vitdet"


def assert_same_run(first, second):
    models = [load_file(run / "best" / "model.safetensors") for run in (first, second)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    names = ("loss", "lr", "grad_norm", "box_AP", "mask_AP")
    figures = [[[record.get(name) for name in names] for record in read_metrics(run)] for run in (first, second)]
    assert figures[0] == figures[1]


def test_a_stopped_run_resumes_bit_for_bit(scenes, detector_file, tmp_path, monkeypatch):
    options = {"epochs": 3, "checkpoint": CheckpointOptions(every_epochs=1, keep=100)}
    straight = small_run(scenes, tmp_path / "straight", detector_file, **options)
    original = supervised.train

    def stopped(*arguments):
        arguments = list(arguments)
        arguments[11] = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None  # after_step
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(supervised, "train", stopped)
        with pytest.raises(Interrupted, match=r"stopped at step 4 of 9: .*continue with --resume"):
            small_run(scenes, tmp_path / "broken", detector_file, **options)
    resumed = small_run(scenes, tmp_path / "broken", detector_file, resume=True, **options)
    assert_same_run(tmp_path / "straight", tmp_path / "broken")
    assert resumed.quality.figures == straight.quality.figures


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


def test_boxes_keep_their_pixels_in_bf16():
    """Fabric turns the floats of a batch into bf16, of which 1001.5 is not one."""
    fabric = start_engine(DeviceOptions("cpu", "bf16", 0))

    class Keeper(torch.nn.Module):
        def forward(self, batch):
            return batch.targets[0]["boxes"]

    boxes = torch.tensor([[1001.5, 3.0, 1003.5, 7.0]])
    batch = AnnotatedBatch(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), [{"boxes": boxes}])
    assert torch.equal(fabric.setup_module(Keeper())(batch), boxes)


def test_a_run_does_not_go_on_with_other_classes(finished, copied, detector_file):
    def rename(content):
        content["categories"][0]["name"] = "plate"

    for split in ("train", "val"):
        change_annotations(copied, split, rename)
    with pytest.raises(convmae.UserError, match="holds a run with other classes"):
        small_run(copied, finished.folder, detector_file, resume=True)


def test_a_run_is_never_overwritten(finished, scenes, detector_file):
    with pytest.raises(convmae.UserError, match="holds a run: continue it with --resume"):
        small_run(scenes, finished.folder, detector_file)


def test_what_is_missing_or_broken_stops_or_is_left_out_and_listed(copied, paper_file, tmp_path):
    def damage(content):
        content["annotations"][0]["bbox"][2] = -5
        content["annotations"][1]["segmentation"] = [[1, 2, 3, 4]]

    change_annotations(copied, "train", damage)
    missing = sorted((copied / "val2017").iterdir())[3]
    missing.unlink()
    with pytest.raises(convmae.UserError, match=r"2 of the .* annotations are broken, the first is annotation 1"):
        small_run(copied, tmp_path / "run", paper_file)
    assert not (tmp_path / "run").exists()
    run = small_run(copied, tmp_path / "run", paper_file, epochs=1, skip_damaged=True)
    listed = (run.folder / "undecodable-images.txt").read_text().splitlines()
    assert len(listed) == 3
    assert "negative width" in listed[0]
    assert "three points" in listed[1]
    assert missing.name in listed[2]


@pytest.mark.parametrize("split", ["train", "val"])
def test_there_must_be_something_to_learn_and_to_judge_by(copied, paper_file, tmp_path, split):
    """Boxes alone, as some tools export them, are all left out; what then trains is nothing."""

    def drop_masks(content):
        for annotation in content["annotations"]:
            annotation["segmentation"] = []

    change_annotations(copied, split, drop_masks)
    with pytest.raises(convmae.UserError, match=rf"instances_{split}2017\.json has no objects, or only crowds"):
        small_run(copied, tmp_path / "run", paper_file, skip_damaged=True)
    assert not (tmp_path / "run").exists()


def test_the_demo_needs_no_data(paper_file, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "convmae.tasks.processes.write_scenes",
        lambda folder, layout, image_size: write_scenes(folder, layout, 4, 4, image_size),
    )
    run = small_run("demo", tmp_path / "run", paper_file, epochs=1, image_size=64)
    assert len(annotations_of(run.folder / "scenes")["images"]) == 4
    resumed = small_run("demo", tmp_path / "run", paper_file, epochs=1, image_size=64, resume=True)
    assert resumed.quality == run.quality


# Evaluation


def test_the_figures_of_a_run_are_those_of_its_kept_detector(finished, scenes, tmp_path):
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
    assert "damaged images that were left out: 2" in listed
    assert str(broken) in listed
    assert "elsewhere.jpg" in listed


def test_it_prints_the_twelve_figures_of_boxes_and_masks(finished, scenes, capsys):
    evaluate(finished.folder, scenes, engine=IN_PROCESS)
    printed = capsys.readouterr().out
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl", *SHAPES):
        assert f"{name}" in printed
    assert "boxes" in printed
    assert "masks" in printed


def test_a_class_may_be_called_anything():
    """Brackets are rich's markup elsewhere, where a closing one without its opening one raises."""
    figures = CocoFigures(*[0.5] * 12, per_class=(0.25,))
    console = Console(file=io.StringIO(), width=80)
    print_quality(DetectionQuality(figures, figures), ["[/cat]"], console)
    assert "[/cat]" in console.file.getvalue()


def test_a_detector_is_not_judged_by_other_categories(finished, copied):
    change_annotations(copied, "val", lambda content: content["categories"].append({"id": 90, "name": "spiral"}))
    with pytest.raises(convmae.UserError, match="has other categories than the detector"):
        evaluate(finished.folder, copied, engine=IN_PROCESS)


# Prediction


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
    large, small = (torch.tensor(boxes[name])[:1] for name in ("large.png", "small.png"))
    assert box_iou(large, 2 * small).item() > 0.8


def test_damaged_pictures_stop_or_are_left_out(finished, copied, tmp_path, capsys):
    broken = sorted((copied / "val2017").iterdir())[0]
    broken.write_bytes(b"no picture")
    images = str(copied / "val2017")
    with pytest.raises(convmae.UserError, match=r"cannot be decoded.*--skip-damaged"):
        predict(images, finished.folder, tmp_path / "found", engine=ON_CPU)
    found = predict(images, finished.folder, tmp_path / "found", draw=0, skip_damaged=True, engine=ON_CPU)
    assert "damaged images that were left out: 1" in capsys.readouterr().err
    assert str(broken) not in found.results.read_text()


# Mistakes


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
        (["train", "--data", "nowhere"], "nowhere/annotations/instances_train2017.json does not exist"),
        (["train", "--data", "nowhere", "--no-such-flag", "3"], "--no_such_flag"),
        (["train", "--optimizer.schedule", "sawtooth"], "--optimizer.schedule cannot be 'sawtooth'"),
        (["eval", "--data", "nowhere", "--weights", "nothing"], "nowhere/annotations/instances_val2017.json does not"),
        (
            ["eval", "--annotations", "nowhere.json", "--weights", "nothing"],
            "nowhere.json does not exist: check --annot",
        ),
        (["eval"], "weights"),
        (["predict", "--images", "demo", "--weights", "nothing.safetensors"], "no weights at nothing.safetensors"),
        (["predict", "--images", "demo", "--weights", "{autoencoder}"], "holds no detector: train one first"),
        (["predict", "--images", "demo", "--weights", "{paper}", "--threshold", "2"], "threshold is a score"),
        (["predict", "--images", "demo", "--weights", "{paper}", "--image-size", "100"], "does not suit a detector"),
        (["predict", "--images", "demo", "--weights", "{paper}", "--batch-size", "0"], "batch_size is 0"),
        (
            ["predict", "--images", "demo", "--weights", "{paper}", "--annotations", "{paper}"],
            "no file in COCO's format",
        ),
        (["dance"], "dance"),
        ([], "expected a subcommand to be one of {train,eval,predict}"),
    ],
)
def test_the_command_line_ends_with_one_line_and_status_2(
    autoencoder_file, paper_file, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    arguments = [part.format(autoencoder=autoencoder_file, paper=paper_file) for part in arguments]
    with pytest.raises(SystemExit) as end:
        cli.main(["detect", *arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
