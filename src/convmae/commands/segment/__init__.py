"""`convmae segment`: a class for each pixel, by an UperNet on the encoder."""

from convmae.commands.segment.evaluate import evaluate
from convmae.commands.segment.predict import predict
from convmae.commands.segment.train import train

__all__ = ["evaluate", "predict", "train"]
