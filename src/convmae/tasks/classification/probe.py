"""The published linear probe: one layer on a frozen encoder, as a run's job."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convmae.errors import UserError
from convmae.evaluation.linear import LinearProbe
from convmae.models.classifier import Classifier
from convmae.tasks.classification.job import ClassificationJob


class ProbedEncoder(nn.Module):
    """A frozen encoder, batch normalisation without weights, one linear layer (the published linear probe)."""

    def __init__(self, classifier: Classifier, num_classes: int) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.norm = nn.BatchNorm1d(classifier.num_features, eps=1e-6, affine=False)
        self.layer = nn.Linear(classifier.num_features, num_classes)
        nn.init.trunc_normal_(self.layer.weight, std=0.01)
        nn.init.zeros_(self.layer.bias)

    def train(self, mode: bool = True) -> "ProbedEncoder":
        """Training mode for the layer and its statistics; the encoder stays in evaluation mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or normalised float -> logits (B, num_classes)."""
        with torch.no_grad():
            features = self.classifier.forward_head(self.classifier.forward_features(images), pre_logits=True)
        return self.layer(self.norm(features.float()))

    def linear_probe(self) -> LinearProbe:
        """Normalisation and layer as one linear function of the features."""
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        weight = self.layer.weight.detach() / (self.norm.running_var + self.norm.eps).sqrt()
        return LinearProbe(weight, self.layer.bias.detach() - weight @ self.norm.running_mean, 0.0)


class ProbeJob(ClassificationJob[ProbedEncoder]):
    """The layer under training. The last model counts, as published; no best one is kept."""

    figure = None
    model_file = "head.safetensors"  # the layer with its statistics: the encoder is the user's, and stays

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Takes the arguments of ClassificationJob, of which the network is a ProbedEncoder."""
        super().__init__(*arguments, **named)
        self._identity = {"encoder": _digest(self.network.classifier), "classes": json.dumps(self.classes)}

    def save(self, file: Path, network: ProbedEncoder) -> None:
        """Write layer and statistics, and of which encoder and classes they are."""
        head = {name: value.contiguous() for name, value in network.state_dict().items() if "classifier" not in name}
        save_file(head, file, self._identity)

    def load(self, file: Path, network: ProbedEncoder) -> None:
        """Fill layer and statistics; raises UserError where the file is of another encoder or other classes."""
        with safe_open(file, framework="pt") as stored:
            if stored.metadata() != self._identity:
                raise UserError(
                    f"{self._folder} holds a run of another encoder or with other classes: choose another --output"
                )
        network.load_state_dict(load_file(file), strict=False)


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()
