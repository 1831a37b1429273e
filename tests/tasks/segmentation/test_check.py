"""What is wrong with label maps is found before a training or an evaluation, counted, said or refused."""

import numpy
import pytest
from PIL import Image

from convmae import UserError
from convmae.data.ade20k import open_segmentation
from convmae.data.label_maps import default_encoding, label_encoding
from convmae.data.loading import Loading
from convmae.tasks.segmentation import check
from convmae.tasks.segmentation.check import check_evaluation, check_training

SIZE = (16, 20)
CLASSES = ["sky", "tree", "dog"]
STRICT, LENIENT = Loading(batch_size=2), Loading(batch_size=2, skip_damaged=True)


def maps(*present):
    """A label map for each tuple of numbers, in stripes of equal height."""
    return [
        numpy.repeat(numpy.array(some, numpy.uint8), SIZE[0] // len(some))[:, None].repeat(SIZE[1], 1)
        for some in present
    ]


@pytest.fixture
def opened(tmp_path):
    """opened("train", label_maps, encoding=None, first=0) -> images, told apart by their numbers from `first` on."""

    def write(name, labels, encoding=None, first=0, classes=CLASSES):
        folders = [tmp_path / name / part for part in ("images", "maps")]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for number, one in enumerate(labels):
            pixels = numpy.random.default_rng(first + number).integers(0, 256, (*one.shape, 3), numpy.uint8)
            Image.fromarray(pixels).save(folders[0] / f"{number}.png")
            Image.fromarray(one).save(folders[1] / f"{number}.png")
        return open_segmentation(*folders, classes, encoding or default_encoding(len(classes)))

    return write


def summaries(source):
    return [finding.summary for finding in source.findings]


def test_sound_data_have_no_findings(opened, fabric):
    training = opened("train", maps((0, 1), (2, 1)))
    validation = opened("val", maps((0, 1), (2, 2)), first=10)
    check_training(fabric, training, validation, STRICT)
    check_evaluation(fabric, validation, STRICT)
    assert training.findings == validation.findings == []


def test_classes_that_lack_pixels_are_named_for_training_and_for_validation(opened, fabric):
    training = opened("train", maps((0, 1), (1, 1)))
    validation = opened("val", maps((1, 2), (255, 255)), first=10)
    check_training(fabric, training, validation, STRICT)
    (absent,) = training.findings
    assert absent.summary == "1 of the 3 classes has no pixel, so it cannot be learned: dog"
    assert absent.items == [
        "sky: 160 pixels in 1 label map",
        "tree: 480 pixels in 2 label maps",
        "dog: 0 pixels in 0 label maps",
    ]
    assert summaries(validation) == [
        "1 label map has no pixel of a class",
        "1 of the 3 classes has no pixel, so it is not judged: sky",
        "1 class has pixels here and none in training: dog",
    ]
    evaluated = opened("val", maps((1, 2), (255, 255)), first=10)
    check_evaluation(fabric, evaluated, STRICT)
    assert summaries(evaluated) == summaries(validation)[:2]


@pytest.mark.parametrize("skip", [STRICT, LENIENT])
def test_one_class_stops_a_training_whatever_is_left_out(opened, fabric, skip):
    training = opened("train", maps((0, 255), (0, 255)), classes=CLASSES[:2])
    validation = opened("val", maps((0, 255)), first=10, classes=CLASSES[:2])
    with pytest.raises(UserError, match=r"only sky has a pixel in the 2 label maps .*say --label-values \[0,255\]"):
        check_training(fabric, training, validation, skip)
    encoding = label_encoding([0, 255], explicit=True)
    training = opened("train", maps((0, 255), (0, 255)), encoding, classes=CLASSES[:2])
    validation = opened("val", maps((0, 255)), encoding, first=10, classes=CLASSES[:2])
    check_training(fabric, training, validation, skip)
    assert training.findings == validation.findings == []


def test_an_evaluation_on_one_class_says_what_may_be_wrong(opened, fabric):
    source = opened("val", maps((0, 255), (0, 0)), classes=CLASSES[:2])
    check_evaluation(fabric, source, STRICT)
    assert summaries(source) == [
        "1 of the 2 classes has no pixel, so it is not judged: tree (160 pixels of 255 count nowhere, say "
        "--label-values [0,255] if 255 is a class)"
    ]


def test_a_validation_that_cannot_judge_stops_before_the_training(opened, fabric):
    training = opened("train", maps((0, 1), (2, 1)))
    validation = opened("val", maps((255, 255)), first=10)
    with pytest.raises(UserError, match=rf"no pixel of {validation.name} can be judged"):
        check_training(fabric, training, validation, STRICT)
    with pytest.raises(UserError, match=rf"no pixel of {validation.name} can be judged"):
        check_evaluation(fabric, validation, STRICT)


def test_faults_of_the_validation_stop_or_are_left_out_before_the_training(opened, fabric):
    training = opened("train", maps((0, 1), (2, 1)))
    validation = opened("val", maps((0, 1), (2, 7), (2, 8)), first=10)
    names = [validation.image_name(number) for number in (1, 2)]
    with pytest.raises(UserError) as error:
        check_training(fabric, training, validation, STRICT)
    assert str(error.value).startswith(f"{names[0]} cannot be used, correct or delete it and its annotation, or leave")
    assert str(error.value).endswith(
        "has the label 7, but there are 3 classes, counted from 0 on: check their list and "
        "--reduce-zero-label; 1 more cannot be used either"
    )
    check_training(fabric, training, validation, LENIENT)
    faults, absent = validation.findings
    assert faults.summary == "left out 2 images that cannot be used"
    assert [item.split(": ")[0] for item in faults.items] == names
    assert absent.summary == "1 of the 3 classes has no pixel, so it is not judged: dog"


def test_images_of_both_parts_are_counted(opened, fabric):
    training = opened("train", maps((0, 1), (2, 1)))
    validation = opened("val", maps((0, 1), (2, 2)), first=1)
    check_training(fabric, training, validation, STRICT)
    (same,) = validation.findings
    assert same.summary.startswith("1 image is in training, too, such as ")
    assert same.items == [f"{validation.image_name(0)} = {training.image_name(1)}"]


def test_the_first_process_looks_and_tells_the_others(opened, fabric, monkeypatch):
    """Of two processes this is the second: it takes what is broadcast, here what another survey found."""
    training = opened("train", maps((0, 1), (2, 1)))
    validation = opened("val", maps((0, 1), (2, 2)), first=10)
    found = iter([check.survey(training), UserError("the first process refuses")])
    monkeypatch.setattr(type(fabric), "is_global_zero", False)
    monkeypatch.setattr(fabric, "broadcast", lambda nothing: next(found))
    monkeypatch.setattr(check, "survey", None)
    with pytest.raises(UserError, match="the first process refuses"):
        check_training(fabric, training, validation, STRICT)
