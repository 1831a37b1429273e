"""The ways to compute a training step that are timed side by side: ours, the published formulation, a plain ViT."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from convmae import weights
from convmae.benchmarks.arithmetic import count_macs
from convmae.benchmarks.published import PublishedClassifier, PublishedConvMAE
from convmae.benchmarks.vit import MaskedViT
from convmae.kinds import create_autoencoder, create_classifier
from convmae.models.encoder import Normalize
from convmae.training.optimizer import OptimizerOptions, build_optimizer

OURS, PUBLISHED, VIT = "ours", "published", "MAE, plain ViT"


class Contender(NamedTuple):
    """A model and its loss for uint8 images (B, 3, H, W), under a given mask (B, H/16, W/16) or one of its own."""

    name: str
    model: nn.Module
    loss_of: Callable[[Tensor, Tensor | None], Tensor]
    compiles: bool


def make_contenders(task: Literal["pretrain", "finetune"], model: str, image_size: int) -> list[Contender]:
    """The published formulation first, ours last; both with the same weights."""
    return _autoencoders(model, image_size) if task == "pretrain" else _classifiers(model, image_size)


class _Normalized(nn.Module):
    """The published formulation with ours' weights, on uint8 images: it takes normalised ones."""

    def __init__(self, published: nn.Module, ours: nn.Module) -> None:
        super().__init__()
        published.load_state_dict(weights.to_published(ours.state_dict()))
        self.normalize, self.published = Normalize(3), published

    def forward(self, images: Tensor, *others: Tensor | None) -> Any:
        return self.published(self.normalize(images), *others)


def _autoencoders(model: str, image_size: int) -> list[Contender]:
    ours = create_autoencoder(model, image_size=image_size)
    settings = ours.settings
    widths, depths, heads = settings["widths"], settings["depths"], settings["num_heads"]
    decoder = {name: settings[name] for name in ("decoder_width", "decoder_depth", "decoder_num_heads")}
    published = _Normalized(
        PublishedConvMAE(image_size=image_size, widths=widths, depths=depths, num_heads=heads, **decoder), ours
    )
    vit = MaskedViT((image_size, image_size), widths[2], depths[2] + 1, heads, **decoder)
    return [
        Contender(PUBLISHED, published, lambda x, visible: published(x, visible)[0], False),
        Contender(VIT, vit, vit, True),
        Contender(OURS, ours, lambda x, visible: ours(x, visible, masked_only=True).loss, True),
    ]


def _classifiers(model: str, image_size: int) -> list[Contender]:
    ours = create_classifier(model, image_size=image_size)
    settings = {name: ours.settings[name] for name in ("widths", "depths", "num_heads", "num_classes")}
    published = _Normalized(PublishedClassifier(image_size=image_size, **settings), ours)

    def labels(x: Tensor) -> Tensor:
        return torch.arange(x.shape[0], device=x.device) % ours.num_classes

    return [
        Contender(PUBLISHED, published, lambda x, _: cross_entropy(published(x), labels(x)), False),
        Contender(OURS, ours, lambda x, _: cross_entropy(ours(x), labels(x)), True),
    ]


def count_steps(task: Literal["pretrain", "finetune"], model: str, image_size: int) -> dict[str, int]:
    """Multiply-accumulates of one image's forward in each way, by the names of the contenders."""
    with torch.device("meta"):
        image = torch.empty(1, 3, image_size, image_size, dtype=torch.uint8)
        contenders = make_contenders(task, model, image_size)
        return {name: count_macs(partial(loss_of, image, None)) for name, _, loss_of, _ in contenders}


def make_step(contender: Contender, precision: str, compiled: bool) -> Callable[[Tensor], None]:
    """A training step, which draws masks of its own as training does: to look at a given one the host would wait."""
    optimizer = build_optimizer(contender.model, OptimizerOptions(), batch_size=256)
    loss_of: Any = contender.loss_of
    if compiled and contender.compiles:
        loss_of = torch.compile(loss_of)

    def step(images: Tensor) -> None:
        with autocast(images.device, precision):
            loss = loss_of(images, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward in that precision, float32 or bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
