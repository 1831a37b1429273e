"""A few small images and tiny weights files for the commands that put a trained model to use."""

import numpy as np
import pytest
import torch
from PIL import Image

import convmae
from convmae import weights

_SMALL = {"widths": (16, 24, 32), "depths": (1, 1, 2), "num_heads": 4, "image_size": 32}


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of ten small images of different shapes, in nested folders; treat it as read-only."""
    folder = tmp_path_factory.mktemp("photographs") / "images"
    numbers = np.random.default_rng(0)
    for index in range(10):
        path = folder / ("a", "b/c")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = numbers.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40 + 3 * index, 50), Image.Resampling.BICUBIC).save(path)
    return folder


def _trained(create, folder, name, **settings):
    """A weights file whose features differ visibly between images, as those of a trained model do."""
    torch.manual_seed(0)
    model = create("tiny", **_SMALL, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    path = folder / f"{name}.safetensors"
    weights.save_model(path, model)
    return path


@pytest.fixture(scope="session")
def autoencoder_file(tmp_path_factory):
    """Weights file of a tiny autoencoder for images of 32 x 32."""
    return _trained(convmae.create_autoencoder, tmp_path_factory.mktemp("weights"), "autoencoder")


@pytest.fixture(scope="session")
def grey_autoencoder_file(tmp_path_factory):
    """The same for grey images."""
    return _trained(convmae.create_autoencoder, tmp_path_factory.mktemp("weights"), "grey", in_channels=1)


@pytest.fixture(scope="session")
def classifier_file(tmp_path_factory):
    """Weights file of a tiny classifier of three classes without names."""
    return _trained(convmae.create_classifier, tmp_path_factory.mktemp("weights"), "classifier", num_classes=3)


@pytest.fixture(scope="session")
def named_classifier_file(tmp_path_factory):
    """The same with names."""
    folder = tmp_path_factory.mktemp("weights")
    return _trained(convmae.create_classifier, folder, "named", num_classes=3, classes=["cat", "dog", "[b]owl"])
