"""`convmae detect`: object detection and instance segmentation, by a Mask R-CNN on the encoder."""

from convmae.commands.detect.evaluate import evaluate
from convmae.commands.detect.predict import predict
from convmae.commands.detect.train import train

__all__ = ["evaluate", "predict", "train"]
