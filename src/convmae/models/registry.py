"""The table of sizes, timm's registration of the classifiers, and `load`: a weights file to the model that it holds."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from convmae import weights
from convmae.errors import UserError
from convmae.models.autoencoder import ConvMAE
from convmae.models.classifier import Classifier
from convmae.models.encoder import resized_pos_embed

_log = logging.getLogger(__name__)

# Base is the paper's (table 7 of its appendix); the others are ours, in line with public third-party configurations.
ENCODERS: dict[str, dict[str, Any]] = {
    "tiny": {"widths": (48, 96, 192), "depths": (1, 1, 4), "num_heads": 6},
    "small": {"widths": (128, 256, 384), "depths": (2, 2, 11), "num_heads": 6},
    "base": {"widths": (256, 384, 768), "depths": (2, 2, 11), "num_heads": 12},
    "large": {"widths": (384, 768, 1024), "depths": (2, 2, 20), "num_heads": 16},
    "huge": {"widths": (768, 1024, 1280), "depths": (2, 2, 31), "num_heads": 16},
}
_TINY_DECODER = {"decoder_width": 128, "decoder_depth": 2, "decoder_num_heads": 4}


def _size(model: str) -> dict[str, Any]:
    name = model.removeprefix("convmae_")
    if name not in ENCODERS:
        raise UserError(f"unknown model '{model}': choose one of {', '.join(ENCODERS)}")
    return ENCODERS[name]


def create_autoencoder(model: str = "base", **settings: Any) -> ConvMAE:
    """A ConvMAE of a named size (tiny, small, base, large, huge); `settings` of ConvMAE override it."""
    decoder = _TINY_DECODER if model.removeprefix("convmae_") == "tiny" else {}
    return ConvMAE(**{**_size(model), **decoder, **settings})


def create_classifier(model: str = "base", **settings: Any) -> Classifier:
    """A Classifier of a named size (tiny, small, base, large, huge); `settings` of Classifier override it."""
    return Classifier(**{**_size(model), **settings})


def load(
    path_or_state_dict: str | Path | Mapping[str, Any],
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    **settings: Any,
) -> ConvMAE | Classifier:
    """Build and fill the model that a weights file holds: an autoencoder if it has a decoder, else a classifier.

    path_or_state_dict: whatever `convmae.weights.read` takes, or what torch.load gave. Our names or the published
        ones; sizes come from the tensors.
    num_heads, decoder_num_heads: no tensor tells them. Our own files record them and the named sizes are known; for
        other widths 64 channels a head, at least 4 heads, are assumed with a warning.
    settings: any other argument of the model, such as mask_ratio or image_size.

    An encoder alone becomes a classifier with num_classes=0. Raises UserError if the tensors do not fit the model.
    """
    if isinstance(path_or_state_dict, Mapping):
        state, facts = weights.unwrap(path_or_state_dict)
    else:
        state, facts = weights.read(path_or_state_dict)
    found = weights.sizes(state)
    known = {**found, **facts}
    known["num_heads"] = num_heads or facts.get("num_heads") or _heads(found["widths"][2], "num_heads")
    model: ConvMAE | Classifier
    if "decoder.mask_token" in state:
        known["decoder_num_heads"] = (
            decoder_num_heads or facts.get("decoder_num_heads") or _heads(found["decoder_width"], "decoder_num_heads")
        )
        model = ConvMAE(**{**known, **settings})
    else:
        model = Classifier(**{"num_classes": 0, **known, **settings})
    fill(model, state, resize_positions=True)
    return model


def fill(model: nn.Module, state: Mapping[str, Tensor], resize_positions: bool = False) -> None:
    """Copy all of a state dict into a model.

    resize_positions: position embeddings of another grid are resized bicubically. Raises UserError that names the first
        tensor that does not fit.
    """
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    if missing or unexpected:
        fault = f"lacks {missing[0]}" if missing else f"has {unexpected[0]} besides"
        raise UserError(f"the weights do not fit the model: the file {fault}; check the model's settings")
    fitting = dict(state)
    for name, value in expected.items():
        if resize_positions and name.endswith("pos_embed") and state[name].shape[-1] == value.shape[-1]:
            fitting[name] = resized_pos_embed(state[name], (value.shape[1], value.shape[2]))
        if value.shape != fitting[name].shape:
            raise UserError(
                f"the weights do not fit the model: {name} is {tuple(state[name].shape)} in the file and "
                f"{tuple(value.shape)} in the model; check the model's settings"
            )
    model.load_state_dict(fitting)


def _heads(width: int, argument: str) -> int:
    """Heads of a known width, else a guess that is said aloud."""
    if argument == "num_heads":
        known = {size["widths"][2]: size["num_heads"] for size in ENCODERS.values()}
    else:
        known = {512: 16, _TINY_DECODER["decoder_width"]: _TINY_DECODER["decoder_num_heads"]}
    if width in known:
        return known[width]
    guess = max(4, width // 64)
    _log.warning(
        "no tensor tells the number of heads of width %d: assuming %s=%d; pass it if it differs",
        width,
        argument,
        guess,
    )
    return guess


def _timm(size: str, pretrained: bool, settings: dict[str, Any]) -> Classifier:
    if pretrained:
        raise UserError(
            f"no weights of convmae_{size} can be downloaded: use checkpoint_path=FILE or convmae.load(FILE)"
        )
    # timm hands these to every model; here they say nothing new.
    accepted = {k: v for k, v in settings.items() if not k.startswith("pretrained_") and k != "cache_dir"}
    if "in_chans" in accepted:
        accepted["in_channels"] = accepted.pop("in_chans")
    if "img_size" in accepted:
        accepted["image_size"] = accepted.pop("img_size")
    if "drop_path_rate" in accepted:
        accepted["drop_path"] = accepted.pop("drop_path_rate")
    return create_classifier(size, **accepted)


@register_model
def convmae_tiny(pretrained: bool = False, **kwargs: Any) -> Classifier:
    """Tiny (2-3 M parameters), for CPUs, demos and tests."""
    return _timm("tiny", pretrained, kwargs)


@register_model
def convmae_small(pretrained: bool = False, **kwargs: Any) -> Classifier:
    """Small (22 M parameters)."""
    return _timm("small", pretrained, kwargs)


@register_model
def convmae_base(pretrained: bool = False, **kwargs: Any) -> Classifier:
    """Base (85 M parameters), the paper's model."""
    return _timm("base", pretrained, kwargs)


@register_model
def convmae_large(pretrained: bool = False, **kwargs: Any) -> Classifier:
    """Large (272 M parameters)."""
    return _timm("large", pretrained, kwargs)


@register_model
def convmae_huge(pretrained: bool = False, **kwargs: Any) -> Classifier:
    """Huge (653 M parameters)."""
    return _timm("huge", pretrained, kwargs)
