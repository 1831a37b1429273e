"""What a detector or a segmenter needs of an encoder: ConvViT has it, and so may any other module."""

import re
from typing import Any, Protocol

from torch import Tensor

from convmae.errors import UserError


class Backbone(Protocol):
    """A module that turns images (B, C, H, W), uint8 or normalised float, into maps of several strides.

    timm's contract for models is nearly all of it.
    """

    feature_info: list[dict[str, Any]]
    """Of each map, the largest first, its channels `num_chs` and its stride `reduction`."""

    @property
    def in_channels(self) -> int:
        """Channels of the images."""

    @property
    def description(self) -> dict[str, Any]:
        """What a weights file records: under "encoder" what it is, in words of its own that JSON can hold."""

    def forward_intermediates(
        self, x: Tensor, *, output_fmt: str = "NCHW", intermediates_only: bool = False
    ) -> list[Tensor]:
        """The maps of `feature_info`; called with "NHWC", for (B, H / f, W / f, C), and for the maps alone."""

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) to the normalised floats that the network takes; float images pass through."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which of its parameters belong to one layer, in timm's words."""

    def no_weight_decay(self) -> set[str]:
        """Its parameters without weight decay, besides biases and norms."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training computes its blocks twice to use less memory."""


def refuse_settings(changes: dict[str, Any], **own: Any) -> None:
    """Raise UserError where settings of a ConvViT come with an encoder that is made already.

    changes: fields of a configuration; own: other arguments, None or 0 where nobody gave them.
    """
    given = [*changes, *(name for name, value in own.items() if value)]
    if given:
        raise UserError(f"{', '.join(given)} cannot be set of an encoder that is made already: leave it out")


def prefixed_matcher(matcher: dict[str, Any], prefix: str = "encoder.") -> dict[str, Any]:
    """The group matcher of an encoder, for a model in which its parameters' names begin with `prefix`.

    Its values are regular expressions, or timm's lists of (expression, layer or None).
    """

    def prefixed(pattern: str) -> str:
        # Each alternative may have an anchor of its own; `[^` and `\^` are none.
        return rf"^{re.escape(prefix)}(?:" + re.sub(r"(?<![\[\\])\^", "", pattern) + ")"

    return {
        name: prefixed(given) if isinstance(given, str) else [(prefixed(part), layer) for part, layer in given]
        for name, given in matcher.items()
    }
