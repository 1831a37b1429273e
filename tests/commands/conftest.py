"""A small run of each training command, as short as it can be and still have several epochs of several steps."""

import pytest

import convmae
from convmae.data.augmentation import NO_AUGMENTATION
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.engine import EngineOptions
from convmae.training.logging import LoggingOptions, PictureLoggingOptions
from convmae.training.optimizer import (
    DetectionOptimizerOptions,
    LarsOptions,
    LayerDecayOptions,
    SegmentationOptimizerOptions,
)

IN_PROCESS = EngineOptions("cpu", "float32", 0)
EACH_STEP = LoggingOptions(every_steps=1)


@pytest.fixture(scope="session")
def photos(write_photographs, tmp_path_factory):
    """Twelve small pictures in nested folders."""
    files = [(f"depth{index % 3}/deeper/{index}.png", (80, 60)) for index in range(12)]
    return write_photographs(tmp_path_factory.mktemp("photos") / "images", files)


@pytest.fixture(scope="session")
def small_pretraining():
    """small_pretraining(data, output, **changes): of twelve photos three steps an epoch."""

    def run(data, output, **changes):
        settings = {
            "model": "tiny",
            "epochs": 3,
            "batch_size": 4,
            "image_size": 32,
            "engine": EngineOptions("cpu", workers=0),
            "logging": PictureLoggingOptions(every_steps=1, pictures_every_epochs=2),
        }
        return convmae.pretrain(data=str(data), output=output, **{**settings, **changes})

    return run


@pytest.fixture(scope="session")
def small_finetuning():
    """small_finetuning(data, output, weights=None, **changes): of 48 images six steps an epoch; nothing is varied."""

    def run(data, output, weights=None, **changes):
        settings = {
            "weights": weights,
            "model": "tiny",
            "epochs": 2,
            "batch_size": 8,
            "image_size": 32,
            "drop_path": 0.0,
            "augmentation": NO_AUGMENTATION,
            "optimizer": LayerDecayOptions(base_lr=0.1, layer_decay=0.8),
            "engine": IN_PROCESS,
            "logging": EACH_STEP,
        }
        return convmae.finetune(data=str(data), output=output, **{**settings, **changes})

    return run


@pytest.fixture(scope="session")
def small_probe():
    """small_probe(data, output, weights, **changes): of the published form, of 48 images three steps an epoch."""

    def run(data, output, weights, **changes):
        settings = {
            "form": "published",
            "epochs": 4,
            "batch_size": 16,
            "optimizer": LarsOptions(base_lr=8.0),
            "engine": IN_PROCESS,
            "checkpoint": CheckpointOptions(every_epochs=1, keep=1),
            "logging": EACH_STEP,
        }
        return convmae.probe(data=str(data), weights=weights, output=output, **{**settings, **changes})

    return run


@pytest.fixture(scope="session")
def small_detection():
    """small_detection(data, output, weights, **changes): of twelve scenes three steps an epoch."""
    from convmae.commands.detect.train import JitterOptions

    def run(data, output, weights, **changes):
        settings = {
            "epochs": 2,
            "batch_size": 4,
            "jitter": JitterOptions(scale=(0.5, 1.5)),
            "optimizer": DetectionOptimizerOptions(base_lr=0.1),
            "engine": IN_PROCESS,
            "logging": EACH_STEP,
        }
        return convmae.detect.train(data=str(data), weights=weights, output=output, **{**settings, **changes})

    return run


@pytest.fixture(scope="session")
def small_segmentation():
    """small_segmentation(data, output, weights, **changes): of twelve scenes three steps an epoch."""
    from convmae.commands.segment.train import VariationOptions

    def run(data, output, weights, **changes):
        settings = {
            "epochs": 2,
            "batch_size": 4,
            "variation": VariationOptions(scale=(0.8, 1.5)),
            "optimizer": SegmentationOptimizerOptions(base_lr=0.1),
            "engine": IN_PROCESS,
            "logging": EACH_STEP,
        }
        return convmae.segment.train(data=str(data), weights=weights, output=output, **{**settings, **changes})

    return run
