"""Detectors are judged on what can be decoded, and told in tables."""

import io
import math
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from convmae import UserError
from convmae.data.detection import LargeScaleJitter
from convmae.evaluation.detection import CocoFigures
from convmae.tasks.detection.judge import (
    DetectionQuality,
    Judge,
    print_quality,
    warn_of_full_images,
    write_quality,
)

HALF = CocoFigures(*[0.5] * 12, per_class=(0.25,))


class Annotator(torch.nn.Module):
    """A detector that knows the truth, or all of it but the classes."""

    def __init__(self, source, classes_known=True):
        super().__init__()
        self.source, self.known, self.asked = source, classes_known, 0
        self.has_masks, self.max_detections = True, 100

    def detect(self, images, sizes, original_sizes, whole_masks):
        found = []
        for _ in range(len(images)):
            with self.source.open(self.asked) as file:
                whole = LargeScaleJitter((64, 64), (1.0, 1.0), 0.0, 3)
                target = whole(file, self.source.annotation(self.asked), [0])[0]["target"]
            labels = target["labels"] if self.known else target["labels"] % len(self.source.classes) + 1
            found.append(
                {**target, "labels": labels, "scores": torch.ones(len(labels)), "masks": target["masks"].whole()}
            )
            self.asked += 1
        return found


@pytest.fixture
def judge_of(fabric, fours):
    """judge_of(source) -> its judge, and what it could not read."""

    def make(source):
        left_out = []
        return Judge(fabric, source, (64, 64), 3, lambda _, failed: left_out.extend(failed), fours), left_out

    return make


def test_the_truth_is_perfect_and_true_outlines_by_wrong_names_are_worth_nothing(source_of, judge_of):
    source = source_of("val")
    judge, left_out = judge_of(source)
    knowing = Annotator(source)
    quality = judge(knowing)
    assert knowing.training  # as before
    assert pytest.approx((1, 1), abs=0.01) == (quality.boxes.AP, quality.masks.AP)
    assert quality.score == quality.boxes.AP
    assert quality.figures == {
        "box_AP": quality.boxes.AP,
        "box_AP50": quality.boxes.AP50,
        "mask_AP": quality.masks.AP,
        "mask_AP50": quality.masks.AP50,
    }
    assert judge(Annotator(source, classes_known=False)).score < 0.1
    assert left_out == []


def test_pictures_that_cannot_be_decoded_are_told_and_do_not_count(coco_scenes, source_of, judge_of, network, tmp_path):
    data = shutil.copytree(coco_scenes, tmp_path / "scenes")
    files = sorted((data / "val2017").iterdir())
    files[1].write_bytes(b"no picture")
    source = source_of("val", data)
    judge, left_out = judge_of(source)
    found = list(judge.detections(network))
    assert [image_id for image_id, _ in found] == [source.image_ids[index] for index in range(20) if index != 1]
    assert len(left_out) == 1
    assert left_out[0].startswith(str(files[1]))
    with pytest.raises(UserError, match="no validation image can be decoded"):
        judge.quality([], network)


def test_without_any_object_a_detector_is_worth_nothing():
    assert DetectionQuality(replace(HALF, AP=math.nan), HALF).score == 0


def test_a_class_may_be_called_anything():
    """Brackets are rich's markup elsewhere, where a closing one without its opening one raises."""
    console = Console(file=io.StringIO(), width=80)
    print_quality(DetectionQuality(HALF, HALF), ["[/cat]"], console)
    assert "[/cat]" in console.file.getvalue()


def test_classes_without_objects_have_no_figure_in_tables_or_files(tmp_path):
    console = Console(file=io.StringIO(), width=80)
    absent = replace(HALF, per_class=(0.25, math.nan))
    print_quality(DetectionQuality(absent, absent), ["cat", "dog"], console)
    assert "nan" not in console.file.getvalue()
    assert "-: the images have none" in console.file.getvalue()
    write_quality(tmp_path / "table.csv", DetectionQuality(absent, absent), ["cat", "dog"])
    assert (tmp_path / "table.csv").read_text().split() == ["class,box_AP,mask_AP", "cat,0.25,0.25", "dog,,"]


def test_without_masks_there_are_figures_of_boxes_alone(tmp_path):
    quality = DetectionQuality(HALF, None)
    assert set(quality.figures) == {"box_AP", "box_AP50"}
    console = Console(file=io.StringIO(), width=80)
    print_quality(quality, ["cat"], console, max_detections=300)
    assert "masks" not in console.file.getvalue()
    assert "AR100, recall of 300" in console.file.getvalue()
    write_quality(tmp_path / "table.csv", quality, ["cat"])
    assert (tmp_path / "table.csv").read_text().split() == ["class,box_AP", "cat,0.25"]


@pytest.mark.parametrize(
    ("counts", "said"),
    [([3, 9], ""), ([3, 10], "1 image has 10 detections"), ([10, 10, 0], "2 images have 10 detections")],
)
def test_images_at_the_cap_are_counted(counts, said, capsys):
    warn_of_full_images(counts, 10)
    told = capsys.readouterr().err
    assert (said in told) if said else told == ""
    assert ("--max-detections" in told) is bool(said)
