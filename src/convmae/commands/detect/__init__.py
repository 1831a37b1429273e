"""`convmae detect`: object detection and instance segmentation, by a Mask R-CNN on the encoder."""

from convmae.commands.detect.evaluation import evaluate
from convmae.commands.detect.prediction import predict
from convmae.commands.detect.training import train

__all__ = ["evaluate", "predict", "train"]
