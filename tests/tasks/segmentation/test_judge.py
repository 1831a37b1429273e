"""Segmenters are judged on the pixels with a class, and told in tables and files."""

import csv
import io
import math
import shutil

import numpy
import pytest
import torch
from PIL import Image
from rich.console import Console

from convmae import UserError
from convmae.evaluation.segmentation import SegmentationQuality
from convmae.tasks.segmentation.judge import Judge, print_quality, write_quality
from convmae.tasks.segmentation.views import Inference, InferenceOptions

SOME_MISSING = SegmentationQuality(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 0]]))


@pytest.fixture
def judge_of(fabric, network, pairs):
    """judge_of(source) -> its judge, and what it could not read."""

    def make(source):
        left_out = []
        infer = Inference(InferenceOptions(whole=True), network, 2)
        return Judge(fabric, source, infer, lambda _, failed: left_out.extend(failed), pairs), left_out

    return make


def test_every_pixel_with_a_class_is_counted_and_the_mode_stays(ade20k_scenes, source_of, judge_of, network):
    """Counted by hand, one picture after the other."""
    judge, left_out = judge_of(source_of("val"))
    network.train()
    confusion = judge(network).confusion
    assert network.training
    network.eval()
    expected = torch.zeros(len(network.classes), len(network.classes), dtype=torch.int64)
    folders = [ade20k_scenes / part / "validation" for part in ("images", "annotations")]
    for picture, label_map in zip(*(sorted(folder.iterdir()) for folder in folders), strict=True):
        with Image.open(picture) as image, Image.open(label_map) as labels, torch.no_grad():
            found = network(torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None])[0].argmax(dim=0)
            truth = torch.from_numpy(numpy.array(labels)).long()
        for true, guess in zip(truth.flatten().tolist(), found.flatten().tolist(), strict=True):
            expected[true, guess] += 1
    assert torch.equal(confusion, expected)
    assert left_out == []


def test_pictures_without_any_label_cannot_be_judged(ade20k_scenes, source_of, judge_of, network, tmp_path):
    data = shutil.copytree(ade20k_scenes, tmp_path / "scenes")
    for path in (data / "annotations" / "validation").iterdir():
        Image.fromarray(numpy.full((64, 96), 255, numpy.uint8)).save(path)
    judge, _ = judge_of(source_of("val", data))
    with pytest.raises(UserError, match=r"no pixel of .* can be judged"):
        judge(network)


def test_what_cannot_be_read_is_told_and_does_not_count(ade20k_scenes, source_of, judge_of, network, tmp_path):
    data = shutil.copytree(ade20k_scenes, tmp_path / "scenes")
    broken = sorted((data / "images" / "validation").iterdir())[2]
    broken.write_bytes(b"no picture")
    judge, left_out = judge_of(source_of("val", data))
    assert judge(network).confusion.sum() == 5 * 64 * 96
    assert len(left_out) == 1
    assert left_out[0].startswith(str(broken))


def test_a_class_may_be_called_anything_and_may_not_occur():
    """Brackets are rich's markup elsewhere, where a closing one without its opening one raises."""
    console = Console(file=io.StringIO(), width=80)
    print_quality(SegmentationQuality(torch.tensor([[3, 1], [0, 0]])), ["[/cat]", "dog"], console)
    *rows, note = [line for line in console.file.getvalue().splitlines() if "[/cat]" in line or "dog" in line]
    assert note.startswith("no pixel of this class is in the label maps: dog; - is what nothing can be said of")
    assert [[cell.strip() for cell in row.strip("│").split("│")] for row in rows] == [
        ["[/cat]", "75.0", "75.0", "100.0"],
        ["dog", "0.0", "-", "0.0"],
    ]


def test_a_class_that_is_absent_does_not_hide_how_good_the_others_are():
    """By hand: a is right in 3 of the 4 pixels that it has or is given, b in all, c has none and is given one."""
    quality = SegmentationQuality(torch.tensor([[3, 0, 1, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    console = Console(file=io.StringIO(), width=100)
    print_quality(quality, ["a", "b", "c", "d"], console)
    printed = console.file.getvalue()
    assert "nan" not in printed.lower()
    figures = {
        line.split("│")[1].split(",")[0].strip(): line.split("│")[2].strip()
        for line in printed.splitlines()[1:]
        if line.count("│") == 3
    }
    assert figures["mIoU"] == f"{100 * (0.75 + 1 + 0) / 3:.1f}"
    assert figures["mIoU of the classes that have pixels"] == f"{100 * (0.75 + 1) / 2:.1f}"
    assert "no pixel of these 2 classes is in the label maps: c, d; " in printed
    rows = [line.strip("│").split("│") for line in printed.splitlines() if line.startswith(("│ c", "│ d"))]
    assert [[cell.strip() for cell in row] for row in rows] == [["c", "0.0", "-", "0.0"], ["d", "-", "-", "0.0"]]


def test_the_file_has_nothing_where_there_is_no_such_class(tmp_path):
    write_quality(tmp_path / "classes.csv", SOME_MISSING, ["cat, tame", "dog", "owl"])
    header, *rows = csv.reader((tmp_path / "classes.csv").read_text().splitlines())
    assert header == ["class", "IoU", "accuracy", "share_of_pixels"]
    assert rows == [["cat, tame", "0.75", "0.75", "1.0"], ["dog", "0.0", "", "0.0"], ["owl", "", "", "0.0"]]
    assert math.isnan(SOME_MISSING.iou[2])
