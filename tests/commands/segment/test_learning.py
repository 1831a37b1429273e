"""What the tiny segmenter learns of generated scenes in a CPU minute, from scratch.

Seven of eight pixels are background, so a segmenter is judged by the mean of the classes' overlaps, beside what two
others would have that know less: one that sees no shape at all, and one that sees every outline exactly and no name.
"""

import numpy
import torch
from PIL import Image

import convmae
from convmae.commands.segment.train import VariationOptions
from convmae.data.scenes import SHAPES, write_scenes
from convmae.training.engine import EngineOptions
from convmae.training.logging import LoggingOptions
from convmae.training.optimizer import SegmentationOptimizerOptions

SIDE, TRAINING, VALIDATION = 64, 1600, 60


def mean_overlap(predicted, true):
    """The mean over classes of shared pixels over those that either has."""
    overlaps = []
    for label in range(len(SHAPES) + 1):
        found, there = predicted == label, true == label
        overlaps.append((found & there).sum() / (found | there).sum())
    return float(numpy.mean(overlaps))


def test_a_tiny_segmenter_learns_what_and_where_the_shapes_are(tmp_path):
    """Measured, in bf16: mIoU of 0.32, 0.32 and 0.31 with the seeds 0, 1 and 2; the two others have 0.15 and 0.21."""
    scenes = write_scenes(tmp_path / "scenes", "ade20k", TRAINING, VALIDATION, (SIDE, SIDE))
    result = convmae.segment.train(
        data=str(scenes),
        model="tiny",
        output=tmp_path / "run",
        epochs=5,
        batch_size=8,
        image_size=SIDE,
        drop_path=0.0,
        evaluate_every_epochs=5,
        variation=VariationOptions(scale=(0.8, 1.25), largest_share=1, distortion=0),
        optimizer=SegmentationOptimizerOptions(base_lr=0.064, warmup_epochs=0.3, layer_decay=1, clip_grad=1),
        engine=EngineOptions("cpu", "auto", 0),
        logging=LoggingOptions(every_steps=200),
    )
    files = sorted((scenes / "annotations" / "validation").iterdir())
    true = numpy.stack([numpy.asarray(Image.open(file)) for file in files])
    nothing = mean_overlap(numpy.zeros_like(true), true)
    frequent = 1 + int(torch.from_numpy(true).flatten().bincount()[1:].argmax())
    outlines = mean_overlap(numpy.where(true == 0, 0, frequent), true)
    assert result.quality.confusion.sum() == true.size
    assert nothing < outlines < 0.25
    assert result.quality.mIoU > 0.27
    assert result.quality.mIoU > 1.2 * outlines
