"""ConvMAE: Masked Convolution Meets Masked Autoencoders."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
from convmae.models import timm as _timm  # noqa: F401 (registers the models)
from convmae.models.classifier import Classifier
from convmae.models.detector import Detector
from convmae.models.encoder import ConvViT
from convmae.models.segmenter import Segmenter
from convmae.objectives.masked import ConvMAE

if TYPE_CHECKING:
    from convmae.commands import detect, segment
    from convmae.commands.bench import bench
    from convmae.commands.embed import embed
    from convmae.commands.export import export
    from convmae.commands.finetune import finetune
    from convmae.commands.info import info
    from convmae.commands.neighbours import neighbours
    from convmae.commands.predict import predict
    from convmae.commands.pretrain import pretrain
    from convmae.commands.probe import probe
    from convmae.commands.reconstruct import reconstruct
    from convmae.commands.scenes import scenes
    from convmae.commands.visualise import visualise

__all__ = [
    "Classifier",
    "ConvMAE",
    "ConvViT",
    "Detector",
    "Segmenter",
    "UserError",
    "bench",
    "create_autoencoder",
    "create_classifier",
    "create_detector",
    "create_segmenter",
    "detect",
    "embed",
    "export",
    "finetune",
    "info",
    "load",
    "load_classifier",
    "load_detector",
    "load_segmenter",
    "neighbours",
    "predict",
    "pretrain",
    "probe",
    "reconstruct",
    "scenes",
    "segment",
    "visualise",
]


def __getattr__(name: str) -> Any:
    """The commands, imported at first use: their engine takes as long to import as torch."""
    if name in __all__:  # what the imports above have not bound
        module = import_module(f"convmae.commands.{name}")
        return getattr(module, name, module)  # a command with subcommands is the module that holds them
    raise AttributeError(f"module 'convmae' has no attribute '{name}'")
