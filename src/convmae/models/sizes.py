"""The names of encoders: sizes of ConvViT, other backbones, and the encoder that a weights file holds.

Base is the paper's (table 7 of its appendix); the others are ours, in line with public third-party configurations.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from convmae import weights
from convmae.errors import UserError
from convmae.models.backbone import Backbone
from convmae.models.config import EncoderConfig

_log = logging.getLogger(__name__)

ENCODERS = {
    "tiny": EncoderConfig(widths=(48, 96, 192), depths=(1, 1, 4), num_heads=6),
    "small": EncoderConfig(widths=(128, 256, 384), depths=(2, 2, 11), num_heads=6),
    "base": EncoderConfig(),
    "large": EncoderConfig(widths=(384, 768, 1024), depths=(2, 2, 20), num_heads=16),
    "huge": EncoderConfig(widths=(768, 1024, 1280), depths=(2, 2, 31), num_heads=16),
}

BACKBONES: dict[str, Callable[..., Backbone]] = {}
"""Encoders that are no ConvViT, by the word before the slash of their names: `FAMILY/NAME` is what BACKBONES[FAMILY]
makes of NAME and, where given, of `in_channels`, `drop_path` and whatever else its own description says. That is
{"encoder": {"name": "FAMILY/NAME", ...}}."""

# What stands on the tiny encoder. On the others it has the paper's sizes, which are its own defaults.
TINY_DECODER = {"decoder_width": 128, "decoder_depth": 2, "decoder_num_heads": 4}
TINY_DETECTOR = {  # for images of 128 pixels or so
    "window": 4,
    "head_width": 48,
    "box_width": 256,
    "anchor_sizes": (16, 32, 64, 128, 256),
    "proposals": 100,
    "rois": 32,
}
TINY_SEGMENTER = {"head_width": 48, "auxiliary_width": 32}

_ENCODER_HEADS = {config.widths[2]: config.num_heads for config in ENCODERS.values()}
_DECODER_HEADS = {512: 16, TINY_DECODER["decoder_width"]: TINY_DECODER["decoder_num_heads"]}


def named(model: str) -> EncoderConfig:
    """The encoder of a named size, with or without timm's `convmae_` before it. Raises UserError for other names."""
    name = model.removeprefix("convmae_")
    if name not in ENCODERS:
        raise UserError(f"unknown model '{model}': choose one of {', '.join(ENCODERS)}")
    return ENCODERS[name]


def other_backbone(name: str, **settings: Any) -> Backbone | None:
    """The encoder called FAMILY/NAME, None where no family of BACKBONES is called so. settings: what it is told."""
    family, _, name = name.partition("/")
    return BACKBONES[family](name, **settings) if family in BACKBONES else None


def is_tiny(config: EncoderConfig) -> bool:
    """Whether an encoder is as wide as the tiny one, whatever it is for."""
    return config.widths == ENCODERS["tiny"].widths


def decoder_heads(width: int) -> int:
    """Heads of a decoder so wide."""
    return _DECODER_HEADS.get(width) or _guess(width, "decoder_num_heads")


def encoder_in_file(
    state: Mapping[str, Tensor], facts: Mapping[str, Any], num_heads: int | None = None
) -> EncoderConfig:
    """The encoder of the model that a weights file holds.

    state, facts: what `weights.read` gave. num_heads: where the file is not to be believed or does not say it; of a
    width that no named size has, 64 channels a head are assumed aloud. Only of published files and those of earlier
    versions are the tensors asked. Raises UserError for an encoder that is no ConvViT.
    """
    names = [field.name for field in fields(EncoderConfig)]
    if "kind" in facts:
        known = dict(facts["encoder"])
        if not known.keys() <= set(names):
            raise UserError(
                f"these weights are on the encoder {known.get('name', 'of somebody else')}, which is none of ours: "
                "build it and pass it as encoder="
            )
    else:
        known = {**weights.sizes(state), **facts}
        known["image_size"] = known.get("pos_embed_size", known["image_size"])  # a detector's, whose size is another
        known = {name: known[name] for name in names if name in known}
    width = known["widths"][2]
    known["num_heads"] = num_heads or known.get("num_heads") or _ENCODER_HEADS.get(width) or _guess(width, "num_heads")
    return EncoderConfig(**known)


def _guess(width: int, argument: str) -> int:
    """Heads of a width that no named size has."""
    guess = max(4, width // 64)
    _log.warning(
        "no tensor tells the number of heads of width %d: assuming %s=%d; pass it if it differs",
        width,
        argument,
        guess,
    )
    return guess
