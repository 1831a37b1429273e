"""What tests of segmentation share: a segmenter, pictures with their label maps, how they load."""

import pytest

import convmae
from convmae.data.ade20k import find_ade20k, open_segmentation
from convmae.data.label_maps import default_encoding
from convmae.data.loading import Loading
from convmae.training.engine import DeviceOptions, start_engine


@pytest.fixture
def fabric():
    return start_engine(DeviceOptions("cpu", "float32"))


@pytest.fixture
def network(segmenter_file):
    """A segmenter that is used."""
    return convmae.load(segmenter_file).eval()


@pytest.fixture
def source_of(ade20k_scenes, network):
    """source_of("train" or "val", folder=...) -> its pictures; those that are damaged are left out."""

    def opened(split, folder=ade20k_scenes):
        folders = find_ade20k(folder, split, None, None)
        return open_segmentation(*folders, network.classes, default_encoding(len(network.classes)), True)

    return opened


@pytest.fixture
def pairs():
    """How two pictures at a time are loaded."""
    return Loading(batch_size=2, skip_damaged=True)
