import multiprocessing
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from convmae.evaluation.segmentation import SegmentationMetrics, SegmentationQuality
from convmae.labels import IGNORED

CPU = torch.device("cpu")


def label_maps(num_classes, shape=(3, 20, 30), ignored=0.1):
    """What was predicted and what is true, which often agree; some pixels do not count."""
    labels = torch.randint(num_classes, shape)
    predicted = torch.where(torch.rand(shape) < 0.6, labels, torch.randint(num_classes, shape))
    return predicted, torch.where(torch.rand(shape) < ignored, IGNORED, labels)


def quality_of(num_classes, *maps):
    metrics = SegmentationMetrics(num_classes, CPU)
    for predicted, labels in maps:
        metrics.update(predicted, labels)
    return metrics.compute()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_pixels_are_counted_by_true_and_predicted_class(dtype):
    predicted, labels = label_maps(5)
    expected = numpy.zeros((5, 5), int)
    for true, guess in zip(labels.flatten().tolist(), predicted.flatten().tolist(), strict=True):
        if true != IGNORED:
            expected[true, guess] += 1
    quality = quality_of(5, (predicted.to(dtype), labels.to(dtype)))
    assert quality.confusion.dtype == torch.int64
    assert numpy.array_equal(quality.confusion, expected)
    assert expected.sum() == (labels != IGNORED).sum() < labels.numel()


def test_figures_are_those_of_torchmetrics_where_every_class_occurs():
    predicted, labels = label_maps(7)
    quality = quality_of(7, (predicted, labels))
    settings = {"num_classes": 7, "ignore_index": IGNORED}
    iou, accuracy = (
        [kind(**settings, average=average)(predicted, labels) for average in ("none", "macro")]
        for kind in (MulticlassJaccardIndex, MulticlassAccuracy)
    )
    torch.testing.assert_close(quality.iou.float(), iou[0])
    torch.testing.assert_close(quality.accuracy.float(), accuracy[0])
    micro = MulticlassAccuracy(**settings, average="micro")(predicted, labels)
    expected = {"mIoU": iou[1].item(), "mAcc": accuracy[1].item(), "aAcc": micro.item()}
    assert quality.figures == pytest.approx(expected, rel=1e-5)
    assert quality.score == quality.mIoU
    assert 0.3 < quality.mIoU < quality.mAcc < 1


def test_classes_that_do_not_occur_do_not_count():
    """Class 1 is only predicted, class 3 neither true nor predicted, class 4 only where no pixel counts."""
    labels = torch.tensor([[0, 0, 0, 2], [2, 2, 2, 255]])
    predicted = torch.tensor([[0, 0, 1, 2], [2, 2, 0, 4]])
    quality = quality_of(5, (predicted, labels))
    nan = torch.nan
    iou, accuracy = torch.tensor([2 / 4, 0, 3 / 4, nan, nan]), torch.tensor([2 / 3, nan, 3 / 4, nan, nan])
    torch.testing.assert_close(quality.iou.float(), iou, equal_nan=True)
    torch.testing.assert_close(quality.accuracy.float(), accuracy, equal_nan=True)
    assert quality.figures == pytest.approx(
        {"mIoU": (2 / 4 + 0 + 3 / 4) / 3, "mAcc": (2 / 3 + 3 / 4) / 2, "aAcc": 5 / 7}
    )


def test_a_right_prediction_is_perfect():
    labels = torch.tensor([[4, 1, 1], [255, 4, 2]])
    assert quality_of(6, (labels.where(labels != 255, 0), labels)).figures == {"mIoU": 1, "mAcc": 1, "aAcc": 1}


def test_without_a_pixel_that_counts_there_are_no_figures():
    quality = quality_of(3, (torch.zeros(4, 4, dtype=torch.int64), torch.full((4, 4), IGNORED)))
    assert quality.figures == pytest.approx({"mIoU": torch.nan, "mAcc": torch.nan, "aAcc": torch.nan}, nan_ok=True)
    assert quality.score == 0.0


def test_pictures_of_any_size_add_up():
    maps = [label_maps(4, shape) for shape in ((8, 5), (2, 3, 6), (11, 1))]
    together = [torch.cat([part[kind].flatten() for part in maps]) for kind in (0, 1)]
    assert torch.equal(quality_of(4, *maps).confusion, quality_of(4, together).confusion)


def test_counts_too_large_for_float32_stay_exact():
    many = 2**24 + 1  # float32 makes it 2**24
    quality = SegmentationQuality(torch.tensor([[many, 1], [0, many]]))
    assert quality.aAcc == 2 * many / (2 * many + 1) < 1
    assert quality.iou.tolist() == [many / (many + 1)] * 2
    metrics = SegmentationMetrics(2, CPU)
    metrics._confusion.confmat += 2**53  # float64 makes the next number this one
    metrics.update(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
    assert metrics.compute().confusion[0, 0] == 2**53 + 1


def test_on_mps_which_cannot_count_the_processor_does():
    metrics = SegmentationMetrics(2, SimpleNamespace(type="mps"))
    metrics.update(torch.tensor([[1, 0]]), torch.tensor([[1, 1]]))
    assert metrics.compute().confusion.tolist() == [[0, 0], [1, 1]]


def count_in_a_process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(rank)
    metrics = SegmentationMetrics(4, CPU)
    for _ in range(3 * rank):  # the first has no pictures
        metrics.update(*label_maps(4))
    torch.save(metrics.compute().confusion, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="others import torch for seconds")
def test_processes_add_up(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_in_a_process, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    torch.manual_seed(1)
    expected = quality_of(4, *(label_maps(4) for _ in range(3))).confusion
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), expected)
