"""What every objective has: it is a module around an encoder that learns from images alone."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn


class Loss(Protocol):
    """What a training step of an objective gives: more than a loss, perhaps."""

    @property
    def loss(self) -> Tensor:
        """A scalar."""


class Objective(nn.Module, ABC):
    """What is masked, what goes in, what is predicted, the loss.

    Its class takes `image_size`, `encoder` and settings of its own.
    """

    kind: ClassVar[str]
    """Its name in OBJECTIVES and in weights files."""
    tiny: ClassVar[Mapping[str, Any]] = {}
    """Its own settings on the tiny encoder."""
    tensor: ClassVar[str] = ""
    """Name of a tensor by which a published file, or one of an earlier version, is known; empty where there is none."""
    encoder: Any
    """What is kept after pretraining; it has `set_grad_checkpointing`."""

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What a weights file records; see `convmae.weights.Described`."""

    @abstractmethod
    def training_loss(self, images: Tensor) -> Loss:
        """The loss of a step on images (B, C, H, W), uint8 or normalised float."""

    def after_step(self, step: int) -> None:
        """What happens once the optimiser has done so many steps, such as following with a teacher; here nothing."""

    def examples(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """For a picture: what the network saw (B, H, W), and the images (B, C, H, W) in [0, 1] that it makes of it.

        The same for the same weights. None where there is nothing to look at.
        """
        return None
