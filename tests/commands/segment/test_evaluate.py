"""A segmenter's figures: those of the run that made it, of its label maps, and of the right classes."""

from importlib import import_module

import numpy
import pytest
import torch

import convmae
from convmae.commands.segment.evaluate import evaluate
from convmae.commands.segment.predict import predict
from convmae.data.scenes import SHAPES
from convmae.tasks.segmentation.views import InferenceOptions
from convmae.training.engine import DeviceOptions, EngineOptions

IN_PROCESS = EngineOptions("cpu", "float32", 0)
ON_CPU = DeviceOptions("cpu", "float32", 0)
CLASSES = ["background", *SHAPES]


def test_the_figures_of_a_run_are_those_of_its_kept_segmenter(finished, scenes, tmp_path, capsys):
    quality = evaluate(finished.folder, scenes, output=tmp_path / "figures.csv", batch_size=3, engine=IN_PROCESS)
    assert torch.equal(quality.confusion, finished.quality.confusion)
    assert (tmp_path / "figures.csv").read_text() == (finished.folder / "per-class.csv").read_text()
    printed = capsys.readouterr().out
    assert f"{100 * quality.mIoU:.1f}" in printed
    assert all(name in printed for name in ("mIoU", "mAcc", "aAcc", *CLASSES))


def test_the_figures_are_those_of_the_label_maps(segmenter_file, scenes, tmp_path, counted, label_maps_of, pixels_of):
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
    assert quality.confusion.sum() == 12 * (64, 96)[0] * (64, 96)[1]
    assert torch.equal(evaluate(segmenter_file, **folders, engine=IN_PROCESS).confusion, quality.confusion)


def test_what_other_processes_left_out_is_listed_too(
    segmenter_file, copied, monkeypatch, capsys, label_maps_of, pictures_of
):
    broken = pictures_of(copied)[0]
    broken.write_bytes(b"no picture")
    label_maps_of(copied)[1].unlink()
    monkeypatch.setattr(
        import_module("convmae.commands.segment.evaluate"),
        "gathered",
        lambda fabric, found: [*found, "elsewhere.jpg: broken"],
    )
    evaluate(segmenter_file, copied, skip_damaged=True, engine=IN_PROCESS)
    listed = capsys.readouterr().err
    assert "left out 1 images without a label map" in listed
    assert "images that were left out: 2" in listed
    assert f"{pictures_of(copied)[1]}: has no label map" in listed
    assert str(broken) in listed
    assert "elsewhere.jpg" in listed


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 100}, "100x100 does not suit a segmenter: choose multiples of 16 from 48 on"),
        ({"window": 48, "stride": 64}, "a stride of 64x64 leaves gaps between windows of 48x48"),
        ({"stride": (48, 65)}, "a stride of 48x65 leaves gaps between windows of 64x64"),
        ({"stride": 0}, "a stride of 0x0 leaves gaps"),
        ({"whole": True, "window": 48}, "whole images need no window or stride"),
        ({"whole": True, "stride": 48}, "whole images need no window or stride"),
        ({"scales": ()}, "positive scales: not 64 and []"),
        ({"scales": (1.0, -1.0)}, "positive scales"),
        ({"shorter_side": 0}, "needs a positive shorter side"),
    ],
)
def test_impossible_ways_are_refused_before_the_work(
    segmenter_file, scenes, tmp_path, options, message, small_segmentation
):
    options = {"inference": InferenceOptions(**options)}
    commands = [
        lambda: evaluate(segmenter_file, scenes, **options, engine=IN_PROCESS),
        lambda: predict(str(scenes), segmenter_file, tmp_path / "found", **options, engine=ON_CPU),
        lambda: small_segmentation(scenes, tmp_path / "run", segmenter_file, **options),
    ]
    for command in commands:
        with pytest.raises(convmae.UserError) as error:
            command()
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere", "--weights", "nothing"], "nowhere/images/validation does not exist"),
        (["--data", "{scenes}", "--weights", "nothing"], "no weights at nothing"),
        (["--data", "{scenes}", "--weights", "{autoencoder}"], "holds no segmenter: train one first"),
        (["--data", "{scenes}", "--weights", "{segmenter}", "--output", "table.txt"], "ends in .csv"),
        (["--data", "{scenes}", "--weights", "{segmenter}", "--split", "test"], "--split cannot be 'test'"),
        (["--data", "{scenes}", "--weights", "{segmenter}", "--inference.stride", "65"], "leaves gaps"),
        (["--data", "{scenes}", "--weights", "{segmenter}", "--inference.window", "50"], "multiples of 16"),
        (["--data", "{scenes}", "--weights", "{segmenter}", "--inference.scales", "[]"], "positive scales"),
        ([], "weights"),
    ],
)
def test_the_command_line_ends_with_one_line_and_status_2(
    refused, autoencoder_file, segmenter_file, scenes, arguments, message
):
    files = {"autoencoder": autoencoder_file, "segmenter": segmenter_file, "scenes": scenes}
    refused(message, "segment", "eval", *(part.format(**files) for part in arguments))
