"""What the tiny detector learns of generated scenes in two CPU minutes, from a short pretraining on their pictures.

With the same settings and the labels of all training objects shuffled it still learns where objects are, not what they
are: one in five labels is right by chance.
"""

import json
import random

import pytest

import convmae
from convmae.commands.detect.train import JitterOptions
from convmae.data.scenes import write_scenes
from convmae.training.engine import EngineOptions
from convmae.training.logging import LoggingOptions, PictureLoggingOptions
from convmae.training.optimizer import DetectionOptimizerOptions, OptimizerOptions

IN_PROCESS = EngineOptions("cpu", "auto", 0)
SIDE, TRAINING, VALIDATION = 96, 800, 60


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("learning") / "scenes", "coco", TRAINING, VALIDATION, (SIDE, SIDE))


@pytest.fixture(scope="module")
def pretrained(scenes, tmp_path_factory):
    return convmae.pretrain(
        data=str(scenes / "train2017"),
        model="tiny",
        output=tmp_path_factory.mktemp("learning") / "pretrained",
        epochs=4,
        batch_size=32,
        image_size=SIDE,
        optimizer=OptimizerOptions(base_lr=8e-3),
        engine=IN_PROCESS,
        logging=PictureLoggingOptions(pictures_every_epochs=0),
    ).checkpoint


def learned(scenes, annotations, weights, output):
    return convmae.detect.train(
        data=str(scenes),
        train_annotations=annotations,
        weights=weights,
        output=output,
        epochs=4,
        batch_size=4,
        image_size=SIDE,
        anchor_sizes=(12, 24, 48, 96, 192),
        drop_path=0.0,
        evaluate_every_epochs=4,
        jitter=JitterOptions(scale=(0.8, 1.25)),
        optimizer=DetectionOptimizerOptions(base_lr=0.064, warmup_epochs=0.3, weight_decay=0.05),
        engine=IN_PROCESS,
        logging=LoggingOptions(every_steps=100),
    ).quality


def test_a_tiny_detector_learns_what_and_where_the_shapes_are(scenes, pretrained, tmp_path):
    """Measured, in bf16: AP50 of 0.40 for boxes and 0.39 for masks, with shuffled labels 0.18 and 0.18."""
    annotations = scenes / "annotations" / "instances_train2017.json"
    content = json.loads(annotations.read_text())
    categories = [entry["category_id"] for entry in content["annotations"]]
    random.Random(0).shuffle(categories)
    for entry, category in zip(content["annotations"], categories, strict=True):
        entry["category_id"] = category
    (tmp_path / "shuffled.json").write_text(json.dumps(content))

    true = learned(scenes, annotations, pretrained, tmp_path / "true")
    shuffled = learned(scenes, tmp_path / "shuffled.json", pretrained, tmp_path / "shuffled")
    for of_true, of_shuffled in ((true.boxes, shuffled.boxes), (true.masks, shuffled.masks)):
        assert of_true.AP50 > 0.3
        assert of_true.AP50 > 1.6 * of_shuffled.AP50
