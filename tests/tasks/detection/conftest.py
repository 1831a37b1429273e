"""What tests of detection share: a detector, annotated pictures, how they load."""

import pytest

import convmae
from convmae.data.coco import find_coco, open_coco
from convmae.data.loading import Loading
from convmae.training.engine import DeviceOptions, start_engine


@pytest.fixture
def fabric():
    return start_engine(DeviceOptions("cpu", "float32"))


@pytest.fixture
def network(paper_file):
    """A detector that is used."""
    return convmae.load(paper_file).eval()


@pytest.fixture
def source_of(coco_scenes):
    """source_of("train" or "val", folder=...) -> its pictures; those that are missing are left out."""
    return lambda split, folder=coco_scenes: open_coco(*find_coco(folder, split), skip_damaged=True)


@pytest.fixture
def fours():
    """How four pictures at a time are loaded."""
    return Loading(batch_size=4, skip_damaged=True)
