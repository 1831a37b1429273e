"""ConvMAE: Masked Convolution Meets Masked Autoencoders."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from convmae.errors import UserError
from convmae.models.autoencoder import ConvMAE
from convmae.models.classifier import Classifier
from convmae.models.encoder import ConvViT
from convmae.models.registry import create_autoencoder, create_classifier, load

if TYPE_CHECKING:
    from convmae.commands.bench import bench
    from convmae.commands.info import info
    from convmae.commands.pretrain import pretrain
    from convmae.commands.reconstruct import reconstruct

__all__ = [
    "Classifier",
    "ConvMAE",
    "ConvViT",
    "UserError",
    "bench",
    "create_autoencoder",
    "create_classifier",
    "info",
    "load",
    "pretrain",
    "reconstruct",
]


def __getattr__(name: str) -> Any:
    """The commands, imported at first use: their engine takes as long to import as torch."""
    if name in ("bench", "info", "pretrain", "reconstruct"):
        return getattr(import_module(f"convmae.commands.{name}"), name)
    raise AttributeError(f"module 'convmae' has no attribute '{name}'")
