"""Training a segmenter from end to end: what a run leaves, what it starts from, broken data, what it refuses."""

import csv
import shutil

import numpy
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import convmae
from convmae import weights
from convmae.commands.segment.evaluate import evaluate
from convmae.commands.segment.predict import predict
from convmae.commands.segment.train import VariationOptions, train
from convmae.data.scenes import SHAPES, write_scenes
from convmae.training.engine import DeviceOptions, EngineOptions
from convmae.training.logging import read_metrics
from convmae.training.optimizer import SegmentationOptimizerOptions

IN_PROCESS = EngineOptions("cpu", "float32", 0)
ON_CPU = DeviceOptions("cpu", "float32", 0)
CLASSES = ["background", *SHAPES]


def test_a_run_leaves_everything_a_user_wants(finished, scenes):
    assert finished.steps == 6
    records = read_metrics(finished.folder)
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    judged = [[record[name] for name in ("mIoU", "mAcc", "aAcc")] for record in records if "mIoU" in record]
    assert len(judged) == 2
    assert max(judged) == [finished.quality.mIoU, finished.quality.mAcc, finished.quality.aAcc]
    for path in (finished.picture, finished.loss_curve, finished.folder / "confusion.png"):
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors()) > 50
    assert yaml.safe_load((finished.folder / "config.yaml").read_text())["data"] == str(scenes)
    assert not (finished.folder / "undecodable-images.txt").exists()


def test_the_figures_of_each_class_are_written_down(finished):
    header, *rows = csv.reader((finished.folder / "per-class.csv").read_text().splitlines())
    assert header == ["class", "IoU", "accuracy", "share_of_pixels"]
    assert [row[0] for row in rows] == CLASSES
    confusion = finished.quality.confusion.numpy()
    right, wanted, found = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    shares = numpy.array([right / (wanted + found - right), right / wanted, wanted / wanted.sum()])
    assert [[float(share) for share in row[1:]] for row in rows] == pytest.approx(shares.T)
    assert wanted.sum() == 6 * (64, 96)[0] * (64, 96)[1]


def test_the_kept_segmenter_knows_its_classes(finished):
    segmenter = convmae.load(finished.checkpoint)
    assert isinstance(segmenter, convmae.Segmenter)
    assert segmenter.classes == CLASSES
    assert segmenter.settings["reduce_zero_label"] is False


NOTHING_LEARNED = {"optimizer": SegmentationOptimizerOptions(base_lr=0.0, weight_decay=0.0), "epochs": 1}


def test_training_starts_from_a_pretrained_encoder(scenes, tmp_path, small_segmentation):
    """At a learning rate of nothing the encoder stays that of pretraining; its positions are for 64 x 64 now."""
    pretrained = convmae.create_autoencoder("tiny", image_size=32)
    file = tmp_path / "pretrained.safetensors"
    weights.save_model(file, pretrained)
    run = small_segmentation(scenes, tmp_path / "run", file, image_size=64, **NOTHING_LEARNED)
    before, after = load_file(file), load_file(run.checkpoint / "model.safetensors")
    encoder = [name for name in before if name.startswith("encoder.") and not name.endswith("pos_embed")]
    assert len(encoder) > 30
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    assert after["encoder.pos_embed"].shape[1:3] == (4, 4)


def test_training_starts_from_a_segmenter(scenes, segmenter_file, tmp_path, caplog, small_segmentation):
    """Its last layers stay where they are for so many classes, and begin anew for others."""
    (tmp_path / "many.txt").write_text("\n".join([*CLASSES, "spiral"]))
    before = load_file(segmenter_file)
    learned = [name for name in before if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    for classes, fresh in ((None, False), (tmp_path / "many.txt", True)):
        run = small_segmentation(scenes, tmp_path / f"run{fresh}", segmenter_file, classes=classes, **NOTHING_LEARNED)
        after = load_file(run.checkpoint / "model.safetensors")
        other = {name for name in learned if not torch.equal(before[name], after[name])}
        heads = ("decode_head.conv_seg", "auxiliary_head.conv_seg")
        assert other == ({f"{head}.{part}" for head in heads for part in ("weight", "bias")} if fresh else set())
        assert ("the weights' last layers are for 6 classes, the model's for 7" in caplog.text) is fresh


def test_label_0_is_no_class_of_ade20k(
    as_ade20k, reduced_file, tmp_path, counted, label_maps_of, pixels_of, small_segmentation
):
    """And nobody needs to say so later: the weights tell."""
    run = small_segmentation(as_ade20k, tmp_path / "run", reduced_file, epochs=1)
    settings = convmae.load(run.checkpoint).settings
    assert settings["classes"] == list(SHAPES)
    assert settings["reduce_zero_label"] is True
    truth = [pixels_of(path) for path in label_maps_of(as_ade20k)]
    assert run.quality.confusion.sum() == sum(numpy.count_nonzero(labels) for labels in truth)
    assert torch.equal(evaluate(run.folder, as_ade20k, engine=IN_PROCESS).confusion, run.quality.confusion)
    found = predict(str(as_ade20k / "images" / "validation"), run.folder, tmp_path / "found", draw=0, engine=ON_CPU)
    predicted = [pixels_of(path) for path in found.label_maps]
    assert min(labels.min() for labels in predicted) >= 1
    confusion = counted([labels - 1 for labels in truth], [labels - 1 for labels in predicted], len(SHAPES))
    assert (confusion == run.quality.confusion.numpy()).all()


def test_whether_label_0_is_a_class_can_be_said(as_ade20k, segmenter_file, tmp_path, small_segmentation):
    names = tmp_path / "names.txt"
    for reduce, classes in ((True, SHAPES), (False, CLASSES)):
        names.write_text("\n".join(classes))
        run = small_segmentation(
            as_ade20k, tmp_path / f"run{reduce}", segmenter_file, classes=names, reduce_zero_label=reduce, epochs=1
        )
        assert convmae.load(run.checkpoint).settings["reduce_zero_label"] is reduce
        assert run.quality.confusion.shape == (len(classes), len(classes))


def test_a_run_that_is_over_tells_of_its_kept_segmenter(finished, scenes, segmenter_file, tmp_path, small_segmentation):
    """Which need not be the last one; here it is another one altogether."""
    run = shutil.copytree(finished.folder, tmp_path / "run")
    shutil.copy(segmenter_file, run / "best" / "model.safetensors")
    resumed = small_segmentation(scenes, run, segmenter_file, resume=True)
    kept = evaluate(segmenter_file, scenes, engine=IN_PROCESS)
    assert torch.equal(resumed.quality.confusion, kept.confusion)
    assert not torch.equal(resumed.quality.confusion, finished.quality.confusion)


def test_a_run_does_not_go_on_with_other_classes(finished, scenes, segmenter_file, tmp_path, small_segmentation):
    renamed = tmp_path / "renamed.txt"
    renamed.write_text("\n".join(["plate", *CLASSES[1:]]))
    with pytest.raises(convmae.UserError, match="holds a run with other classes"):
        small_segmentation(scenes, finished.folder, segmenter_file, classes=renamed, resume=True)
    with pytest.raises(convmae.UserError, match="or with another --reduce-zero-label"):
        small_segmentation(scenes, finished.folder, segmenter_file, reduce_zero_label=True, resume=True)


def test_a_run_is_never_overwritten(finished, scenes, segmenter_file, small_segmentation):
    with pytest.raises(convmae.UserError, match="holds a run: continue it with --resume"):
        small_segmentation(scenes, finished.folder, segmenter_file)


def test_the_demo_needs_no_data(segmenter_file, tmp_path, monkeypatch, label_maps_of, small_segmentation):
    monkeypatch.setattr(
        "convmae.tasks.processes.write_scenes",
        lambda folder, layout, image_size: write_scenes(folder, layout, 4, 2, image_size),
    )
    run = small_segmentation("demo", tmp_path / "run", segmenter_file, epochs=1)
    assert len(label_maps_of(run.folder / "scenes")) == 2
    assert convmae.load(run.checkpoint).settings["image_size"] == (128, 128)
    resumed = small_segmentation("demo", tmp_path / "run", segmenter_file, epochs=1, resume=True)
    assert torch.equal(resumed.quality.confusion, run.quality.confusion)


def test_flags_win_over_a_recipe(command_line):
    flags = ["--config", "segment_demo", "--data", "photos", "--epochs", "3", "--reduce-zero-label", "--inference.flip"]
    status, out, _ = command_line("segment", "train", *flags, "--inference.scales", "[0.5, 1]", "--print-config")
    assert status == 0
    options = yaml.safe_load(out)
    assert (options["data"], options["epochs"], options["reduce_zero_label"]) == ("photos", 3, True)
    assert (options["inference"]["flip"], options["inference"]["scales"]) == (True, [0.5, 1.0])
    assert (options["model"], options["batch_size"], options["image_size"]) == ("tiny", 8, 128)  # the recipe's


def write_labels(path, labels):
    Image.fromarray(labels).save(path)


BROKEN = {
    "a label that is no class": (
        lambda path: write_labels(path, numpy.full((64, 96), 6, numpy.uint8)),
        "has the label 6, but there are 6 classes, counted from 0 on",
    ),
    "another size": (
        lambda path: write_labels(path, numpy.zeros((96, 64), numpy.uint8)),
        "is 64x96, the image 96x64",
    ),
    "16 bits": (lambda path: write_labels(path, numpy.zeros((64, 96), numpy.uint16)), "has 16-bit labels"),
    "no picture": (lambda path: path.write_bytes(b"none"), "is no PNG that can be read"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_broken_label_map_stops_a_training_with_one_line(
    copied, segmenter_file, tmp_path, kind, split, label_maps_of, pictures_of, small_segmentation
):
    damage, reason = BROKEN[kind]
    damage(label_maps_of(copied, split)[1])
    with pytest.raises(convmae.UserError) as error:
        small_segmentation(copied, tmp_path / "run", segmenter_file, epochs=1)
    assert str(pictures_of(copied, split)[1]) in str(error.value)
    assert str(label_maps_of(copied, split)[1]) in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def damaged_in_all_ways(copied, pictures_of, label_maps_of):
    """What must be listed of the copy: beginnings of lines, and a part of each."""
    folder, expected = copied, []
    for split in ("training", "validation"):
        pictures, maps = pictures_of(folder, split), label_maps_of(folder, split)
        pictures[0].write_bytes(b"no picture")
        expected.append((str(pictures[0]), "not an image"))
        if split == "training":
            for number, (damage, reason) in enumerate(BROKEN.values(), 1):
                damage(maps[number])
                expected.append((str(pictures[number]), reason))
        else:
            maps[1].unlink()
            expected.append((str(pictures[1]), "has no label map"))
            pictures[2].unlink()
            expected.append((str(maps[2]), "has no image"))
    return expected


def assert_listed(expected, lines):
    assert len(lines) == len(expected)
    for name, reason in expected:
        assert any(line.startswith(name) and reason in line for line in lines), (name, reason)


def test_what_is_missing_or_broken_is_left_out_and_listed(
    copied, segmenter_file, tmp_path, capsys, small_segmentation, damaged_in_all_ways
):
    expected = damaged_in_all_ways
    with pytest.raises(convmae.UserError, match=r"1 of the 5 images in .* have no label map .*--skip-damaged"):
        small_segmentation(copied, tmp_path / "run", segmenter_file)
    assert not (tmp_path / "run").exists()
    run = small_segmentation(copied, tmp_path / "run", segmenter_file, epochs=1, skip_damaged=True)
    report = (run.folder / "data-report.txt").read_text().splitlines()
    named = [line.strip() for line in report if line.startswith(f"    {copied}") and " = " not in line]
    assert_listed(expected, named)
    damaged = (run.folder / "undecodable-images.txt").read_text().splitlines()
    assert_listed([one for one in expected if "label map" not in one[1] and one[1] != "has no image"], damaged)
    assert run.quality.confusion.sum() == (6 - 3) * (64, 96)[0] * (64, 96)[1]
    printed = " ".join(capsys.readouterr().err.split())
    assert "left out 5 images that cannot be used" in printed
    assert "left out 1 images without a label map" in printed
    assert "left out 1 label maps without an image" in printed
    assert f"images that could not be used │ {len(expected) - 2}" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"drop_path": 1.0}, "drop_path is 1.0: choose it from 0 to less than 1"),
        ({"batch_size": 1}, "batch normalisation needs two images or more in each pass"),
        ({"batch_size": 4, "accumulate": 4}, "batch normalisation needs two images or more in each pass"),
        ({"batch_size": 4, "accumulate": 3}, "does not divide"),
        ({"image_size": 100}, "image size 100x100 does not suit a segmenter: choose multiples of 16 from 48 on"),
        ({"data": "demo", "image_size": 100}, "image size 100x100 does not suit a segmenter"),
        ({"variation": VariationOptions(scale=(2.0, 1.0))}, "a crop needs a positive size and 0 < scale"),
        ({"classes": "nowhere.txt"}, "nowhere.txt cannot be read, check --classes"),
        ({"train_images": "nowhere"}, "nowhere does not exist: check --train-images"),
        ({"val_annotations": "nowhere"}, "nowhere does not exist: check --val-annotations"),
        ({"data": None}, "there is no images/training without ADE20K's folder: give it as --data"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(scenes, segmenter_file, tmp_path, changes, message):
    given = {"data": str(scenes), "weights": segmenter_file, "output": tmp_path / "run", "engine": IN_PROCESS}
    with pytest.raises(convmae.UserError, match=message) as error:
        train(**{**given, **changes})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_data_must_name_its_classes(copied, segmenter_file, tmp_path, small_segmentation):
    (copied / "classes.txt").unlink()
    with pytest.raises(convmae.UserError, match=r"there is no classes\.txt in .*scenes: write a text file"):
        small_segmentation(copied, tmp_path / "run", segmenter_file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere/images/training does not exist: give ADE20K's folder as --data"),
        (["--data", "nowhere", "--no-such-flag", "3"], "--no_such_flag"),
        (["--data", "{scenes}", "--model", "giant"], "unknown model 'giant'"),
        (["--data", "{scenes}", "--model", "tiny", "--batch-size", "1"], "batch normalisation needs two"),
    ],
)
def test_the_command_line_ends_with_one_line_and_status_2(refused, scenes, arguments, message):
    refused(message, "segment", "train", *(part.format(scenes=scenes) for part in arguments))
