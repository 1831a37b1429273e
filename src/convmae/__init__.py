"""ConvMAE: Masked Convolution Meets Masked Autoencoders."""

from importlib import import_module
from typing import Any

import convmae.models.timm  # noqa: F401 (registers the models by their names)
from convmae.commands import COMMANDS, command
from convmae.errors import UserError
from convmae.kinds import (
    create_autoencoder,
    create_classifier,
    create_detector,
    create_segmenter,
    load,
    load_classifier,
    load_detector,
    load_segmenter,
)
from convmae.models.classifier import Classifier
from convmae.models.config import EncoderConfig
from convmae.models.detector import Detector
from convmae.models.encoder import ConvViT
from convmae.models.segmenter import Segmenter
from convmae.objectives.masked import ConvMAE

__all__ = [
    "Classifier",
    "ConvMAE",
    "ConvViT",
    "Detector",
    "EncoderConfig",
    "Segmenter",
    "UserError",
    "create_autoencoder",
    "create_classifier",
    "create_detector",
    "create_segmenter",
    "load",
    "load_classifier",
    "load_detector",
    "load_segmenter",
]


def __getattr__(name: str) -> Any:
    """The commands, imported at first use."""
    match COMMANDS.get(name):
        case str(module):
            return command(module)
        case dict():  # a command with subcommands is the module that holds them
            return import_module(f"convmae.commands.{name}")
    raise AttributeError(f"module 'convmae' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, *COMMANDS]
