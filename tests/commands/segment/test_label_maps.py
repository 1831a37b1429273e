"""Label maps as tools write them, from training to predictions: other numbers, colours and names, lacking classes."""

import numpy
import pytest
import torch
from PIL import Image

import convmae
from convmae.commands.segment.evaluate import evaluate
from convmae.commands.segment.predict import predict
from convmae.commands.segment.train import train
from convmae.data.scenes import SHAPES
from convmae.training.engine import DeviceOptions, EngineOptions

IN_PROCESS = EngineOptions("cpu", "float32", 0)
ON_CPU = DeviceOptions("cpu", "float32", 0)
CLASSES = ["background", *SHAPES]
COLOURS = [(0, 0, 0), (200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]


@pytest.fixture
def rewritten(copied, label_maps_of, pixels_of):
    """rewritten(change): the copy, each of whose label maps is what `change` makes of its numbers."""

    def rewrite(change):
        for split in ("training", "validation"):
            for path in label_maps_of(copied, split):
                changed = change(pixels_of(path))
                (changed if isinstance(changed, Image.Image) else Image.fromarray(changed)).save(path)
        return copied

    return rewrite


@pytest.fixture(scope="module")
def of_numbers(scenes, segmenter_file, tmp_path_factory, small_segmentation):
    """How good one epoch of the label maps as they are makes a segmenter."""
    return small_segmentation(scenes, tmp_path_factory.mktemp("runs") / "run", segmenter_file, epochs=1).quality


def masks(labels):
    return (255 * (labels > 0)).astype(numpy.uint8)


def test_masks_of_0_and_255_stop_and_train_with_their_values_from_then_on(
    rewritten, segmenter_file, tmp_path, small_segmentation, label_maps_of, pixels_of
):
    data = rewritten(masks)
    (data / "classes.txt").write_text("background\nshape\n")
    with pytest.raises(convmae.UserError, match=r"only background has a pixel .* say --label-values \[0,255\] if"):
        small_segmentation(data, tmp_path / "run", segmenter_file)
    assert not (tmp_path / "run").exists()
    run = small_segmentation(data, tmp_path / "run", segmenter_file, epochs=1, label_values=(0, 255))
    truth = [pixels_of(path) for path in label_maps_of(data)]
    shares = [sum(int((labels == value).sum()) for labels in truth) for value in (0, 255)]
    assert run.quality.confusion.sum(dim=1).tolist() == shares
    again = evaluate(run.folder, data, engine=IN_PROCESS)  # nobody needs to say so later
    assert torch.equal(again.confusion, run.quality.confusion)
    found = predict(str(data / "images" / "validation"), run.folder, tmp_path / "found", draw=0, engine=ON_CPU)
    predicted = [pixels_of(path) for path in found.label_maps]
    assert {int(value) for labels in predicted for value in numpy.unique(labels)} <= {0, 255}
    right = sum(int((one == other).sum()) for one, other in zip(truth, predicted, strict=True))
    assert right == run.quality.confusion.diagonal().sum()
    with pytest.raises(convmae.UserError, match=r"another --reduce-zero-label, --label-values, .*: choose another"):
        small_segmentation(data, tmp_path / "run", segmenter_file, epochs=1, label_values=(255, 0), resume=True)


def test_masks_of_0_and_1_with_a_reduced_zero_label_stop(rewritten, segmenter_file, tmp_path, small_segmentation):
    data = rewritten(lambda labels: (labels > 0).astype(numpy.uint8))
    (data / "classes.txt").write_text("background\nshape\n")
    with pytest.raises(convmae.UserError, match=r"only background has a pixel .* leave out --reduce-zero-label"):
        small_segmentation(data, tmp_path / "run", segmenter_file, reduce_zero_label=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("listed", ["labelmap.txt", "label_colours"])
def test_colours_are_the_classes_of_a_list(rewritten, of_numbers, segmenter_file, tmp_path, small_segmentation, listed):
    """CVAT's list in the folder is enough for RGB; a palette goes by its colours where that is asked for."""
    by_colour = listed == "label_colours"
    order = numpy.array([3, 0, 1, 5, 4, 2])

    def painted(labels):
        if not by_colour:
            return numpy.array(COLOURS, numpy.uint8)[labels]
        image = Image.fromarray(numpy.argsort(order)[labels].astype(numpy.uint8))
        image.putpalette([channel for label in order for channel in COLOURS[label]])
        return image

    data = rewritten(painted)
    (data / "classes.txt").unlink()
    rows = [f"{name}:{','.join(map(str, colour))}::" for name, colour in zip(CLASSES, COLOURS, strict=True)]
    file = data / ("colours.txt" if by_colour else "labelmap.txt")
    file.write_text("\n".join(["# label:color_rgb:parts:actions", *rows]))
    options = {"label_colours": str(file)} if by_colour else {}
    run = small_segmentation(data, tmp_path / "run", segmenter_file, epochs=1, **options)
    assert torch.equal(run.quality.confusion, of_numbers.confusion)
    assert torch.equal(evaluate(run.folder, data, engine=IN_PROCESS).confusion, run.quality.confusion)
    found = predict(str(data / "images" / "validation"), run.folder, tmp_path / "found", draw=0, engine=ON_CPU)
    with Image.open(found.label_maps[0]) as image:
        labels = numpy.asarray(image)
        assert numpy.array_equal(numpy.asarray(image.convert("RGB")), numpy.array(COLOURS, numpy.uint8)[labels])


def test_suffixes_are_those_of_the_command_line(copied, segmenter_file, command_line, label_maps_of, pictures_of):
    for path in label_maps_of(copied):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    for path in pictures_of(copied):
        path.rename(path.with_name(f"{path.stem}_image{path.suffix}"))
    arguments = ["segment", "eval", "--data", copied, "--weights", segmenter_file, "--engine.accelerator", "cpu"]
    status, _, err = command_line(*arguments)
    assert (status, "no image in" in err) == (2, True)
    status, out, err = command_line(
        *arguments, "--image-suffix", "_image", "--label-suffix", "_mask", "--engine.workers", "0"
    )
    assert (status, "mIoU" in out) == (0, True)


def test_classes_without_pixels_are_said_and_listed_and_never_no_number(
    rewritten, segmenter_file, tmp_path, small_segmentation, capsys
):
    data = rewritten(lambda labels: numpy.minimum(labels, 3))
    run = small_segmentation(data, tmp_path / "run", segmenter_file, epochs=1)
    err = capsys.readouterr().err
    assert f"2 of the 6 classes have no pixel, so they cannot be learned: {', '.join(CLASSES[4:])}" in err
    report = (run.folder / "data-report.txt").read_text()
    assert f"{CLASSES[5]}: 0 pixels in 0 label maps" in report
    evaluate(run.folder, data, engine=IN_PROCESS)
    printed = capsys.readouterr()
    assert "so they are not judged" in printed.err
    assert "no pixel of these" in printed.out
    assert "nan" not in printed.out.lower()


def test_faults_of_the_validation_stop_before_anything_is_learned(
    copied, segmenter_file, tmp_path, small_segmentation, label_maps_of
):
    Image.fromarray(numpy.full((64, 96), 9, numpy.uint8)).save(label_maps_of(copied)[3])
    with pytest.raises(convmae.UserError, match="has the label 9, but there are 6 classes"):
        small_segmentation(copied, tmp_path / "run", segmenter_file)
    assert not (tmp_path / "run").exists()


def test_other_numbers_of_a_list_are_those_of_the_label_maps(
    rewritten, of_numbers, segmenter_file, tmp_path, small_segmentation
):
    data = rewritten(lambda labels: (labels + 7).astype(numpy.uint8))
    (data / "classes.txt").write_text("\n".join(f"{7 + number} {name}" for number, name in enumerate(CLASSES)))
    run = small_segmentation(data, tmp_path / "run", segmenter_file, epochs=1)
    assert torch.equal(run.quality.confusion, of_numbers.confusion)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_values": (0, 255)}, "--label-values gives 2 values to 6 classes: give one to each"),
        ({"label_values": (0, 1, 2, 3, 4, 300)}, "300 is no label of 8 bits"),
        ({"label_values": tuple(range(6)), "reduce_zero_label": True}, "leave out --reduce-zero-label"),
        ({"label_colours": "voc"}, "voc has no colour for disc: let --label-colours name the same classes as"),
        ({"label_colours": "nowhere.txt"}, "nowhere.txt cannot be read"),
        ({"label_suffix": "_mask"}, "holds no label maps whose names end in _mask"),
    ],
)
def test_impossible_label_maps_are_refused_before_anything_is_written(
    scenes, segmenter_file, tmp_path, changes, message
):
    with pytest.raises(convmae.UserError) as error:
        train(data=str(scenes), weights=segmenter_file, output=tmp_path / "run", engine=IN_PROCESS, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(convmae.UserError) as error:
        evaluate(segmenter_file, scenes, engine=IN_PROCESS, **changes)
    assert message in str(error.value)
