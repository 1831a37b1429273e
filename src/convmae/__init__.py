"""ConvMAE: Masked Convolution Meets Masked Autoencoders."""

from convmae.errors import UserError
from convmae.models.autoencoder import ConvMAE
from convmae.models.classifier import Classifier
from convmae.models.encoder import ConvViT
from convmae.models.registry import create_autoencoder, create_classifier, load

__all__ = ["Classifier", "ConvMAE", "ConvViT", "UserError", "create_autoencoder", "create_classifier", "load"]
