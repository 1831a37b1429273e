"""A small run of a segmenter, and the data that it is of."""

import shutil

import numpy
import pytest
from PIL import Image

from convmae.data.scenes import SHAPES


@pytest.fixture(scope="session")
def scenes(ade20k_scenes):
    """Generated scenes; treat them as read-only."""
    return ade20k_scenes


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


@pytest.fixture(scope="session")
def finished(scenes, segmenter_file, tmp_path_factory, small_segmentation):
    """A run of two epochs; treat it as read-only."""
    return small_segmentation(scenes, tmp_path_factory.mktemp("runs") / "run", segmenter_file)


@pytest.fixture(scope="session")
def pixels_of():
    """pixels_of(path) -> the pixels of a picture or a label map."""

    def read(path):
        with Image.open(path) as image:
            return numpy.asarray(image)

    return read


@pytest.fixture(scope="session")
def label_maps_of():
    """label_maps_of(folder, split="validation") -> its label maps, in order."""
    return lambda folder, split="validation": sorted((folder / "annotations" / split).iterdir())


@pytest.fixture(scope="session")
def pictures_of():
    """pictures_of(folder, split="validation") -> its pictures, in order."""
    return lambda folder, split="validation": sorted((folder / "images" / split).iterdir())


@pytest.fixture(scope="session")
def counted():
    """counted(truth, predicted, num_classes) -> pixels by true and predicted class, of label maps from 0 on.

    What is not below num_classes does not count.
    """

    def count(truth, predicted, num_classes):
        confusion = numpy.zeros((num_classes, num_classes), int)
        for wanted, found in zip(truth, predicted, strict=True):
            counts = wanted < num_classes
            numpy.add.at(confusion, (wanted[counts], found[counts]), 1)
        return confusion

    return count
