"""`convmae segment`: a class for each pixel, by an UperNet on the encoder."""

from convmae.commands.segment.evaluation import evaluate
from convmae.commands.segment.prediction import predict
from convmae.commands.segment.training import train

__all__ = ["evaluate", "predict", "train"]
