"""Segmentation from end to end: what a run leaves, its figures, resume bit for bit, label maps, mistakes."""

import csv
import io
import os
import shutil
import signal
from importlib import import_module

import numpy
import pytest
import torch
import yaml
from convmae.commands.segment.evaluate import evaluate
from convmae.commands.segment.predict import predict
from convmae.commands.segment.train import VariationOptions, train
from convmae.tasks.segmentation.judge import print_quality
from convmae.tasks.segmentation.views import InferenceOptions
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import convmae
from convmae import cli, weights
from convmae.data.scenes import SHAPES, draw_scene, write_scenes
from convmae.evaluation.segmentation import SegmentationQuality
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.engine import DeviceOptions, EngineOptions
from convmae.training.logging import LoggingOptions, read_metrics
from convmae.training.loop import Interrupted
from convmae.training.optimizer import SegmentationOptimizerOptions

IN_PROCESS = EngineOptions("cpu", "float32", 0)
ON_CPU = DeviceOptions("cpu", "float32", 0)
TRAINING, VALIDATION = 12, 6
SIZE = (64, 96)  # of the scenes: more than a window of training
CLASSES = ["background", *SHAPES]
WIDE = {"widths": (16, 24, 32), "depths": (1, 1, 2), "num_heads": 4, "head_width": 16, "auxiliary_width": 8}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Generated scenes; treat them as read-only."""
    return write_scenes(tmp_path_factory.mktemp("ade20k") / "scenes", "ade20k", TRAINING, VALIDATION, SIZE)


@pytest.fixture
def copied(scenes, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(scenes, tmp_path / "scenes")


@pytest.fixture
def as_ade20k(copied):
    """A copy with ADE20K's table of classes, in which the background, label 0, is none."""
    (copied / "classes.txt").unlink()
    rows = [f"{number}\t0.1\t1\t1\t{name}, thing" for number, name in enumerate(SHAPES, 1)]
    (copied / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    return copied


def untrained(path, **settings):
    """Weights file of a segmenter so small that a step takes a tenth of a second, and sees all its classes."""
    torch.manual_seed(0)
    segmenter = convmae.Segmenter((64, 64), **WIDE, **{"num_classes": len(CLASSES), "classes": CLASSES, **settings})
    scores = segmenter.decode_head.conv_seg
    with torch.no_grad():
        scores.weight.normal_()
        image = torch.from_numpy(draw_scene(0, (64, 64)).image).permute(2, 0, 1)[None, : segmenter.in_channels]
        scores.bias.sub_(segmenter.eval()(image).mean(dim=(0, 2, 3)))  # else one class is ahead everywhere
    weights.save_model(path, segmenter)
    return path


@pytest.fixture(scope="module")
def segmenter_file(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("weights") / "segmenter.safetensors")


@pytest.fixture(scope="module")
def reduced_file(tmp_path_factory):
    """The same of data whose label 0 is no class."""
    path = tmp_path_factory.mktemp("weights") / "reduced.safetensors"
    return untrained(path, num_classes=len(SHAPES), classes=list(SHAPES), reduce_zero_label=True)


def small_run(data, output, weights, **changes):
    settings = {
        "data": str(data),
        "weights": weights,
        "output": output,
        "epochs": 2,
        "batch_size": 4,
        "variation": VariationOptions(scale=(0.8, 1.5)),
        "optimizer": SegmentationOptimizerOptions(base_lr=0.1),
        "engine": IN_PROCESS,
        "logging": LoggingOptions(every_steps=1),
    }
    return train(**{**settings, **changes})


@pytest.fixture(scope="module")
def finished(scenes, segmenter_file, tmp_path_factory):
    """A run of two epochs; treat it as read-only."""
    return small_run(scenes, tmp_path_factory.mktemp("runs") / "run", segmenter_file)


def pixels_of(path):
    with Image.open(path) as image:
        return numpy.asarray(image)


def label_maps_of(folder, split="validation"):
    return sorted((folder / "annotations" / split).iterdir())


def pictures_of(folder, split="validation"):
    return sorted((folder / "images" / split).iterdir())


def counted(truth, predicted, num_classes):
    """Pixels by true and predicted class, of label maps from 0 on; what is not below num_classes does not count."""
    confusion = numpy.zeros((num_classes, num_classes), int)
    for wanted, found in zip(truth, predicted, strict=True):
        counts = wanted < num_classes
        numpy.add.at(confusion, (wanted[counts], found[counts]), 1)
    return confusion


# Training


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
    assert wanted.sum() == VALIDATION * SIZE[0] * SIZE[1]


def test_the_kept_segmenter_knows_its_classes(finished):
    segmenter = convmae.load(finished.checkpoint)
    assert isinstance(segmenter, convmae.Segmenter)
    assert segmenter.classes == CLASSES
    assert segmenter.settings["reduce_zero_label"] is False


NOTHING_LEARNED = {"optimizer": SegmentationOptimizerOptions(base_lr=0.0, weight_decay=0.0), "epochs": 1}


def test_training_starts_from_a_pretrained_encoder(scenes, tmp_path):
    """At a learning rate of nothing the encoder stays that of pretraining; its positions are for 64 x 64 now."""
    pretrained = convmae.create_autoencoder("tiny", image_size=32)
    file = tmp_path / "pretrained.safetensors"
    weights.save_model(file, pretrained)
    run = small_run(scenes, tmp_path / "run", file, image_size=64, **NOTHING_LEARNED)
    before, after = load_file(file), load_file(run.checkpoint / "model.safetensors")
    encoder = [name for name in before if name.startswith("encoder.") and not name.endswith("pos_embed")]
    assert len(encoder) > 30
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    assert after["encoder.pos_embed"].shape[1:3] == (4, 4)


def test_training_starts_from_a_segmenter(scenes, segmenter_file, tmp_path, caplog):
    """Its last layers stay where they are for so many classes, and begin anew for others."""
    (tmp_path / "many.txt").write_text("\n".join([*CLASSES, "spiral"]))
    before = load_file(segmenter_file)
    learned = [name for name in before if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    for classes, fresh in ((None, False), (tmp_path / "many.txt", True)):
        run = small_run(scenes, tmp_path / f"run{fresh}", segmenter_file, classes=classes, **NOTHING_LEARNED)
        after = load_file(run.checkpoint / "model.safetensors")
        other = {name for name in learned if not torch.equal(before[name], after[name])}
        heads = ("decode_head.conv_seg", "auxiliary_head.conv_seg")
        assert other == ({f"{head}.{part}" for head in heads for part in ("weight", "bias")} if fresh else set())
        assert ("the weights' last layers are for 6 classes, the model's for 7" in caplog.text) is fresh


def test_label_0_is_no_class_of_ade20k(as_ade20k, reduced_file, tmp_path):
    """And nobody needs to say so later: the weights tell."""
    run = small_run(as_ade20k, tmp_path / "run", reduced_file, epochs=1)
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


def test_whether_label_0_is_a_class_can_be_said(as_ade20k, segmenter_file, tmp_path):
    names = tmp_path / "names.txt"
    for reduce, classes in ((True, SHAPES), (False, CLASSES)):
        names.write_text("\n".join(classes))
        run = small_run(
            as_ade20k, tmp_path / f"run{reduce}", segmenter_file, classes=names, reduce_zero_label=reduce, epochs=1
        )
        assert convmae.load(run.checkpoint).settings["reduce_zero_label"] is reduce
        assert run.quality.confusion.shape == (len(classes), len(classes))


def assert_same_run(first, second):
    models = [load_file(run / "best" / "model.safetensors") for run in (first, second)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    names = ("loss", "lr", "grad_norm", "mIoU", "mAcc", "aAcc")
    figures = [[[record.get(name) for name in names] for record in read_metrics(run)] for run in (first, second)]
    assert figures[0] == figures[1]


def test_a_stopped_run_resumes_bit_for_bit(scenes, segmenter_file, tmp_path, monkeypatch):
    options = {"epochs": 3, "checkpoint": CheckpointOptions(every_epochs=1, keep=100)}
    straight = small_run(scenes, tmp_path / "straight", segmenter_file, **options)
    original = supervised.train

    def stopped(*arguments):
        arguments = list(arguments)
        arguments[11] = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None  # after_step
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(supervised, "train", stopped)
        with pytest.raises(Interrupted, match=r"stopped at step 4 of 9: .*continue with --resume"):
            small_run(scenes, tmp_path / "broken", segmenter_file, **options)
    resumed = small_run(scenes, tmp_path / "broken", segmenter_file, resume=True, **options)
    assert_same_run(tmp_path / "straight", tmp_path / "broken")
    assert torch.equal(resumed.quality.confusion, straight.quality.confusion)


def test_a_run_that_is_over_tells_of_its_kept_segmenter(finished, scenes, segmenter_file, tmp_path):
    """Which need not be the last one; here it is another one altogether."""
    run = shutil.copytree(finished.folder, tmp_path / "run")
    shutil.copy(segmenter_file, run / "best" / "model.safetensors")
    resumed = small_run(scenes, run, segmenter_file, resume=True)
    kept = evaluate(segmenter_file, scenes, engine=IN_PROCESS)
    assert torch.equal(resumed.quality.confusion, kept.confusion)
    assert not torch.equal(resumed.quality.confusion, finished.quality.confusion)


def test_a_run_does_not_go_on_with_other_classes(finished, scenes, segmenter_file, tmp_path):
    renamed = tmp_path / "renamed.txt"
    renamed.write_text("\n".join(["plate", *CLASSES[1:]]))
    with pytest.raises(convmae.UserError, match="holds a run with other classes"):
        small_run(scenes, finished.folder, segmenter_file, classes=renamed, resume=True)
    with pytest.raises(convmae.UserError, match="or with another --reduce-zero-label"):
        small_run(scenes, finished.folder, segmenter_file, reduce_zero_label=True, resume=True)


def test_a_run_is_never_overwritten(finished, scenes, segmenter_file):
    with pytest.raises(convmae.UserError, match="holds a run: continue it with --resume"):
        small_run(scenes, finished.folder, segmenter_file)


def test_the_demo_needs_no_data(segmenter_file, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "convmae.tasks.processes.write_scenes",
        lambda folder, layout, image_size: write_scenes(folder, layout, 4, 2, image_size),
    )
    run = small_run("demo", tmp_path / "run", segmenter_file, epochs=1)
    assert len(label_maps_of(run.folder / "scenes")) == 2
    assert convmae.load(run.checkpoint).settings["image_size"] == (128, 128)
    resumed = small_run("demo", tmp_path / "run", segmenter_file, epochs=1, resume=True)
    assert torch.equal(resumed.quality.confusion, run.quality.confusion)


def test_flags_win_over_a_recipe(capsys):
    flags = ["--config", "segment_demo", "--data", "photos", "--epochs", "3", "--reduce-zero-label", "--inference.flip"]
    with pytest.raises(SystemExit) as end:
        cli.main(["segment", "train", *flags, "--inference.scales", "[0.5, 1]", "--print-config"])
    assert end.value.code == 0
    options = yaml.safe_load(capsys.readouterr().out)
    assert (options["data"], options["epochs"], options["reduce_zero_label"]) == ("photos", 3, True)
    assert (options["inference"]["flip"], options["inference"]["scales"]) == (True, [0.5, 1.0])
    assert (options["model"], options["batch_size"], options["image_size"]) == ("tiny", 8, 128)  # the recipe's


# Broken data


def write_labels(path, labels):
    Image.fromarray(labels).save(path)


BROKEN = {
    "a label that is no class": (
        lambda path: write_labels(path, numpy.full(SIZE, 6, numpy.uint8)),
        "has the label 6, but there are 6 classes, counted from 0 on",
    ),
    "another size": (
        lambda path: write_labels(path, numpy.zeros((96, 64), numpy.uint8)),
        "is 64x96, the picture 96x64",
    ),
    "16 bits": (lambda path: write_labels(path, numpy.zeros(SIZE, numpy.uint16)), "has 16-bit labels"),
    "no picture": (lambda path: path.write_bytes(b"none"), "is no PNG that can be read"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_broken_label_map_stops_a_training_with_one_line(copied, segmenter_file, tmp_path, kind, split):
    damage, reason = BROKEN[kind]
    damage(label_maps_of(copied, split)[1])
    with pytest.raises(convmae.UserError) as error:
        small_run(copied, tmp_path / "run", segmenter_file, epochs=1)
    assert str(pictures_of(copied, split)[1]) in str(error.value)
    assert str(label_maps_of(copied, split)[1]) in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def damaged_in_all_ways(folder):
    """What must be listed: beginnings of lines, and a part of each."""
    expected = []
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


def test_what_is_missing_or_broken_is_left_out_and_listed(copied, segmenter_file, tmp_path, capsys):
    expected = damaged_in_all_ways(copied)
    with pytest.raises(convmae.UserError, match=r"1 of the 5 images in .* have no label map .*--skip-damaged"):
        small_run(copied, tmp_path / "run", segmenter_file)
    assert not (tmp_path / "run").exists()
    run = small_run(copied, tmp_path / "run", segmenter_file, epochs=1, skip_damaged=True)
    assert_listed(expected, (run.folder / "undecodable-images.txt").read_text().splitlines())
    assert run.quality.confusion.sum() == (VALIDATION - 3) * SIZE[0] * SIZE[1]
    printed = " ".join(capsys.readouterr().err.split())
    assert "left out 2 without a partner, listed in" in printed
    assert f"left out as missing or damaged │ {len(expected)}" in printed


def test_pictures_without_any_label_cannot_be_judged(copied, segmenter_file):
    for path in label_maps_of(copied):
        write_labels(path, numpy.full(SIZE, 255, numpy.uint8))
    with pytest.raises(convmae.UserError, match=r"no pixel of .* can be judged"):
        evaluate(segmenter_file, copied, engine=IN_PROCESS)


# Evaluation


def test_the_figures_of_a_run_are_those_of_its_kept_segmenter(finished, scenes, tmp_path, capsys):
    quality = evaluate(finished.folder, scenes, output=tmp_path / "figures.csv", batch_size=3, engine=IN_PROCESS)
    assert torch.equal(quality.confusion, finished.quality.confusion)
    assert (tmp_path / "figures.csv").read_text() == (finished.folder / "per-class.csv").read_text()
    printed = capsys.readouterr().out
    assert f"{100 * quality.mIoU:.1f}" in printed
    assert all(name in printed for name in ("mIoU", "mAcc", "aAcc", *CLASSES))


def test_the_figures_are_those_of_the_label_maps(segmenter_file, scenes, tmp_path):
    """Counted by hand in the files, of a segmenter that sees several classes."""
    quality = evaluate(segmenter_file, scenes, engine=IN_PROCESS)
    found = predict(str(scenes / "images" / "validation"), segmenter_file, tmp_path / "found", draw=0, engine=ON_CPU)
    truth = [pixels_of(path) for path in label_maps_of(scenes)]
    confusion = counted(truth, [pixels_of(path) for path in found.label_maps], len(CLASSES))
    assert (confusion == quality.confusion.numpy()).all()
    assert numpy.count_nonzero(confusion.sum(axis=0)) >= 3
    overlaps = confusion.diagonal() / (confusion.sum(axis=0) + confusion.sum(axis=1) - confusion.diagonal())
    assert quality.mIoU == pytest.approx(numpy.nanmean(overlaps))
    assert quality.aAcc == pytest.approx(confusion.diagonal().sum() / confusion.sum())


def test_the_training_pictures_can_be_judged_too(segmenter_file, scenes):
    quality = evaluate(segmenter_file, scenes, "train", engine=IN_PROCESS)
    folders = {"images": scenes / "images" / "training", "annotations": scenes / "annotations" / "training"}
    assert quality.confusion.sum() == TRAINING * SIZE[0] * SIZE[1]
    assert torch.equal(evaluate(segmenter_file, **folders, engine=IN_PROCESS).confusion, quality.confusion)


def test_what_other_processes_left_out_is_listed_too(segmenter_file, copied, monkeypatch, capsys):
    broken = pictures_of(copied)[0]
    broken.write_bytes(b"no picture")
    label_maps_of(copied)[1].unlink()
    monkeypatch.setattr(
        import_module("convmae.commands.segment.evaluate"), "gathered", lambda fabric, found: [*found, "elsewhere.jpg: broken"]
    )
    evaluate(segmenter_file, copied, skip_damaged=True, engine=IN_PROCESS)
    listed = capsys.readouterr().err
    assert "damaged images that were left out: 3" in listed
    assert f"{pictures_of(copied)[1]}: has no label map" in listed
    assert str(broken) in listed
    assert "elsewhere.jpg" in listed


def test_a_class_may_be_called_anything_and_may_not_occur():
    """Brackets are rich's markup elsewhere, where a closing one without its opening one raises."""
    console = Console(file=io.StringIO(), width=80)
    print_quality(SegmentationQuality(torch.tensor([[3, 1], [0, 0]])), ["[/cat]", "dog"], console)
    rows = [line for line in console.file.getvalue().splitlines() if "[/cat]" in line or "dog" in line]
    assert [[cell.strip() for cell in row.strip("│").split("│")] for row in rows] == [
        ["[/cat]", "75.0", "75.0", "100.0"],
        ["dog", "0.0", "-", "0.0"],
    ]


def test_a_segmenter_is_not_judged_by_other_classes(segmenter_file, reduced_file, copied):
    classes = copied / "classes.txt"
    classes.write_text("\n".join(["ring", *[name for name in CLASSES if name != "ring"]]))
    with pytest.raises(convmae.UserError, match="names other classes than the segmenter's"):
        evaluate(segmenter_file, copied, engine=IN_PROCESS)
    folders = {"images": copied / "images" / "validation", "annotations": copied / "annotations" / "validation"}
    assert evaluate(segmenter_file, **folders, engine=IN_PROCESS).confusion.any()
    with pytest.raises(convmae.UserError, match="names other classes than the segmenter's"):
        evaluate(reduced_file, copied, engine=IN_PROCESS)


def test_weights_with_other_synonyms_of_ade20ks_classes_are_judged(as_ade20k, reduced_file):
    """As the published ones, whose television is a "television receiver"."""
    rows = [f"{number}\tshape, {name}" for number, name in enumerate(SHAPES, 1)]
    (as_ade20k / "objectInfo150.txt").write_text("\n".join(["Idx\tName", *rows]) + "\n")
    assert evaluate(reduced_file, as_ade20k, engine=IN_PROCESS).confusion.any()


# How pictures are put through the segmenter


def label_map_by(weights, scenes, tmp_path, **options):
    """Of the first validation picture."""
    picture = str(pictures_of(scenes)[0])
    found = predict(picture, weights, tmp_path / "found", 0, inference=InferenceOptions(**options), engine=ON_CPU)
    return torch.from_numpy(pixels_of(found.label_maps[0]).astype(int))


@pytest.fixture
def image(scenes):
    """The first validation picture, (1, 3, H, W)."""
    return torch.from_numpy(pixels_of(pictures_of(scenes)[0]).copy()).permute(2, 0, 1)[None]


@torch.no_grad()
def test_whole_pictures_are_seen_at_once(segmenter_file, scenes, image, tmp_path):
    network = convmae.load(segmenter_file).eval()
    whole = label_map_by(segmenter_file, scenes, tmp_path, whole=True)
    assert torch.equal(whole, network(image)[0].argmax(dim=0))
    assert not torch.equal(whole, label_map_by(segmenter_file, scenes, tmp_path))


@torch.no_grad()
def test_windows_slide_by_two_thirds_of_the_training_s_crops(segmenter_file, scenes, image, tmp_path):
    """64 of 96 columns are seen from 0 and, moved back from 42, from 32 on."""
    network = convmae.load(segmenter_file).eval()
    left, right = (network(image[..., first : first + 64])[0] for first in (0, 32))
    sums = nn.functional.pad(left, (0, 32)) + nn.functional.pad(right, (32, 0))
    sums[..., 32:64] /= 2
    assert torch.equal(label_map_by(segmenter_file, scenes, tmp_path), sums.argmax(dim=0))


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"window": 48, "stride": 16}, {"window": (48, 48), "stride": (16, 16)}),
        ({"window": (64, 96)}, {"window": (64, 96)}),
        ({"flip": True, "stride": 64}, {"window": (64, 64), "stride": (64, 64), "flip": True}),
    ],
)
def test_windows_steps_and_mirroring_can_be_chosen(segmenter_file, scenes, image, tmp_path, options, arguments):
    network = convmae.load(segmenter_file).eval()
    found = label_map_by(segmenter_file, scenes, tmp_path, **options)
    assert torch.equal(found, network.segment(image, **arguments)[0])
    assert not torch.equal(found, label_map_by(segmenter_file, scenes, tmp_path))


@torch.no_grad()
def test_several_scales_are_averaged(segmenter_file, scenes, image, tmp_path):
    network = convmae.load(segmenter_file).eval()
    larger = nn.functional.interpolate(image.float(), (96, 144), mode="bilinear").round().to(torch.uint8)
    shares = [network(view) for view in (image, larger)]
    shares = [nn.functional.interpolate(scores, SIZE, mode="bilinear").softmax(dim=1)[0] for scores in shares]
    found = label_map_by(segmenter_file, scenes, tmp_path, whole=True, shorter_side=32, scales=(2.0, 3.0))
    assert (found == sum(shares).argmax(dim=0)).float().mean() > 0.99  # the resized picture is rounded otherwise
    assert (found == shares[0].argmax(dim=0)).float().mean() < 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 100}, "100x100 does not suit a segmenter: choose multiples of 16 from 48 on"),
        ({"window": 48, "stride": 64}, "a stride of 64x64 leaves gaps between windows of 48x48"),
        ({"stride": (48, 65)}, "a stride of 48x65 leaves gaps between windows of 64x64"),
        ({"stride": 0}, "a stride of 0x0 leaves gaps"),
        ({"whole": True, "window": 48}, "whole pictures need no window or stride"),
        ({"whole": True, "stride": 48}, "whole pictures need no window or stride"),
        ({"scales": ()}, "positive scales: not 64 and []"),
        ({"scales": (1.0, -1.0)}, "positive scales"),
        ({"shorter_side": 0}, "needs a positive shorter side"),
    ],
)
def test_impossible_ways_are_refused_before_the_work(segmenter_file, scenes, tmp_path, options, message):
    options = {"inference": InferenceOptions(**options)}
    commands = [
        lambda: evaluate(segmenter_file, scenes, **options, engine=IN_PROCESS),
        lambda: predict(str(scenes), segmenter_file, tmp_path / "found", **options, engine=ON_CPU),
        lambda: small_run(scenes, tmp_path / "run", segmenter_file, **options),
    ]
    for command in commands:
        with pytest.raises(convmae.UserError) as error:
            command()
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# Prediction


def test_label_maps_have_the_pictures_sizes_and_names(photographs, segmenter_file, tmp_path):
    """In folders like theirs, in which nothing else is touched."""
    output = tmp_path / "found"
    (output / "label_maps" / "a").mkdir(parents=True)
    (output / "label_maps" / "a" / "mine.png").write_bytes(b"mine")
    (output / "notes.txt").write_text("mine")
    found = predict(str(photographs), segmenter_file, output, draw=3, engine=ON_CPU)
    pictures = sorted(photographs.rglob("*.png"))
    names = [path.relative_to(photographs) for path in pictures]
    assert sorted(found.label_maps) == [output / "label_maps" / name for name in names]
    for picture, name in zip(pictures, names, strict=True):
        with Image.open(picture) as image, Image.open(output / "label_maps" / name) as labels:
            assert labels.size == image.size
            assert (labels.format, labels.mode, labels.tile[0][3]) == ("PNG", "L", "L")
            assert numpy.asarray(labels).max() < len(CLASSES)
    first = [path.relative_to(output / "label_maps") for path in found.label_maps[:3]]
    assert list(found.overlays) == [output / "overlays" / name for name in first]
    for path in found.overlays:
        assert min(pixels_of(path).shape[:2]) > 300
    files = {path for path in output.rglob("*") if path.is_file()}
    mine = {output / "label_maps" / "a" / "mine.png", output / "notes.txt"}
    assert files == {*mine, *found.label_maps, *found.overlays}
    assert [path.read_bytes() for path in sorted(mine)] == [b"mine", b"mine"]


def test_label_maps_hold_the_labels_of_the_training_s_files(segmenter_file, reduced_file, scenes, tmp_path):
    """Where label 0 was no class, the first has label 1; a file of the same weights without that shows the numbers."""
    state, _ = weights.read(reduced_file)
    plain = tmp_path / "plain.safetensors"
    weights.save(plain, state, {**convmae.load(reduced_file).settings, "reduce_zero_label": False})
    one, other = (label_map_by(file, scenes, tmp_path) for file in (reduced_file, plain))
    assert torch.equal(one, other + 1)
    assert len(other.unique()) >= 3


def test_a_picture_alone_and_the_demo_go_by_their_names(segmenter_file, scenes, tmp_path, monkeypatch):
    picture = pictures_of(scenes)[2]
    found = predict(str(picture), segmenter_file, tmp_path / "alone", engine=ON_CPU)
    assert found.label_maps == (tmp_path / "alone" / "label_maps" / f"{picture.stem}.png",)
    assert len(found.overlays) == 1
    small = tmp_path / "small.png"
    Image.new("RGB", (20, 30)).save(small)
    monkeypatch.setattr("convmae.commands.inference.demo_photographs", lambda: [small])
    (tmp_path / "demo").mkdir()  # a folder of that name is not meant
    monkeypatch.chdir(tmp_path)
    found = predict("demo", segmenter_file, tmp_path / "found", engine=ON_CPU)
    assert found.label_maps == (tmp_path / "found" / "label_maps" / "small.png",)
    assert pixels_of(found.label_maps[0]).shape == (30, 20)


def test_a_segmenter_of_grey_pictures_sees_coloured_ones(scenes, tmp_path):
    grey = untrained(tmp_path / "grey.safetensors", in_channels=1)
    with Image.open(pictures_of(scenes)[0]) as image:
        image.convert("L").save(tmp_path / "grey.png")
    found = predict(str(tmp_path / "grey.png"), grey, tmp_path / "of_grey", engine=ON_CPU)
    assert (label_map_by(grey, scenes, tmp_path).numpy() == pixels_of(found.label_maps[0])).mean() > 0.95
    assert evaluate(grey, scenes, engine=IN_PROCESS).confusion.any()


@pytest.mark.parametrize("output", [".", "found", "../photos/found"])
def test_label_maps_are_not_written_among_the_pictures(segmenter_file, tmp_path, monkeypatch, output):
    """The next time they would be taken for pictures."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "1.png")
    monkeypatch.chdir(tmp_path / "photos")
    for images in (".", str(tmp_path / "photos")):
        with pytest.raises(convmae.UserError, match=r"lies among the pictures of .*: choose another --output"):
            predict(images, segmenter_file, output, engine=ON_CPU)
    assert len(list((tmp_path / "photos").iterdir())) == 1


def test_two_pictures_of_one_name_are_refused(segmenter_file, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("1.png", "1.jpg"):
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / name)
    with pytest.raises(convmae.UserError, match=r"1\.jpg and .*1\.png would both be called 1\.png: rename one"):
        predict(str(tmp_path / "photos"), segmenter_file, tmp_path / "found", engine=ON_CPU)
    assert not (tmp_path / "found").exists()


def test_damaged_pictures_stop_or_are_left_out(segmenter_file, copied, tmp_path, capsys):
    broken = pictures_of(copied)[0]
    broken.write_bytes(b"no picture")
    images = str(broken.parent)
    with pytest.raises(convmae.UserError, match=r"cannot be decoded.*--skip-damaged"):
        predict(images, segmenter_file, tmp_path / "found", engine=ON_CPU)
    found = predict(images, segmenter_file, tmp_path / "found", draw=1, skip_damaged=True, engine=ON_CPU)
    assert "damaged images that were left out: 1" in capsys.readouterr().err
    assert [path.stem for path in found.label_maps] == [path.stem for path in pictures_of(copied)[1:]]
    assert [path.stem for path in found.overlays] == [pictures_of(copied)[1].stem]


# Mistakes


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


def test_data_must_name_its_classes(copied, segmenter_file, tmp_path):
    (copied / "classes.txt").unlink()
    with pytest.raises(convmae.UserError, match=r"there is no classes\.txt in .*scenes: write a text file"):
        small_run(copied, tmp_path / "run", segmenter_file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere"], "nowhere/images/training does not exist: give ADE20K's folder as --data"),
        (["train", "--data", "nowhere", "--no-such-flag", "3"], "--no_such_flag"),
        (["train", "--data", "{scenes}", "--model", "giant"], "unknown model 'giant'"),
        (["train", "--data", "{scenes}", "--model", "tiny", "--batch-size", "1"], "batch normalisation needs two"),
        (["eval", "--data", "nowhere", "--weights", "nothing"], "nowhere/images/validation does not exist"),
        (["eval", "--data", "{scenes}", "--weights", "nothing"], "no weights at nothing"),
        (["eval", "--data", "{scenes}", "--weights", "{autoencoder}"], "holds no segmenter: train one first"),
        (["eval", "--data", "{scenes}", "--weights", "{segmenter}", "--output", "table.txt"], "ends in .csv"),
        (["eval", "--data", "{scenes}", "--weights", "{segmenter}", "--split", "test"], "--split cannot be 'test'"),
        (["eval", "--data", "{scenes}", "--weights", "{segmenter}", "--inference.stride", "65"], "leaves gaps"),
        (["eval", "--data", "{scenes}", "--weights", "{segmenter}", "--inference.window", "50"], "multiples of 16"),
        (["eval", "--data", "{scenes}", "--weights", "{segmenter}", "--inference.scales", "[]"], "positive scales"),
        (["eval"], "weights"),
        (["predict", "--images", "demo", "--weights", "nothing.safetensors"], "no weights at nothing.safetensors"),
        (["predict", "--images", "nowhere", "--weights", "{segmenter}"], "nowhere does not exist"),
        (["predict", "--images", "demo", "--weights", "{autoencoder}"], "holds no segmenter: train one first"),
        (["predict", "--images", "demo", "--weights", "{segmenter}", "--draw", "-1"], "draw cannot be below 0"),
        (["predict", "--images", "demo", "--weights", "{segmenter}", "--batch-size", "0"], "batch_size is 0"),
        (["predict", "--images", "demo", "--weights", "{segmenter}", "--output", "{segmenter}"], "is a file: choose"),
        (["dance"], "dance"),
        ([], "expected a subcommand to be one of {train,eval,predict}"),
    ],
)
def test_the_command_line_ends_with_one_line_and_status_2(
    autoencoder_file, segmenter_file, scenes, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    arguments = [
        part.format(autoencoder=autoencoder_file, segmenter=segmenter_file, scenes=scenes) for part in arguments
    ]
    with pytest.raises(SystemExit) as end:
        cli.main(["segment", *arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
