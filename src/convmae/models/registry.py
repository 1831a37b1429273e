"""The table of sizes, timm's registration of the classifiers, and `load`: a weights file to the model that it holds."""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models import resolve_pretrained_cfg as resolve_timm_cfg
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from convmae import weights
from convmae.errors import UserError
from convmae.models.autoencoder import ConvMAE
from convmae.models.classifier import Classifier, checkpoint_filter_fn
from convmae.models.detector import Detector, fit_detector
from convmae.models.encoder import PATCH
from convmae.models.fitting import fit
from convmae.models.segmenter import Segmenter, fit_segmenter

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
# For pictures of 128 pixels or so.
_TINY_DETECTOR = {
    "window": 4,
    "head_width": 48,
    "box_width": 256,
    "anchor_sizes": (16, 32, 64, 128, 256),
    "proposals": 100,
    "rois": 32,
}
_TINY_SEGMENTER = {"head_width": 48, "auxiliary_width": 32}
_ADE20K_CLASSES = 150  # besides label 0, which is none of them
_OF_THE_ENCODER = ("in_channels", "widths", "depths", "num_heads", "mlp_ratio", "kernel_size")


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


def create_detector(model: str = "base", **settings: Any) -> Detector:
    """A Detector of a named size (tiny, small, base, large, huge); `settings` of Detector override it."""
    heads = _TINY_DETECTOR if model.removeprefix("convmae_") == "tiny" else {}
    return Detector(**{**_size(model), **heads, **settings})


def create_segmenter(model: str = "base", **settings: Any) -> Segmenter:
    """A Segmenter of a named size (tiny, small, base, large, huge); `settings` of Segmenter override it."""
    heads = _TINY_SEGMENTER if model.removeprefix("convmae_") == "tiny" else {}
    return Segmenter(**{**_size(model), **heads, **settings})


def load(
    path_or_state_dict: str | Path | Mapping[str, Any],
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    **settings: Any,
) -> ConvMAE | Classifier | Detector | Segmenter:
    """Build and fill the model that a weights file holds: an autoencoder, a detector, a segmenter, else a classifier.

    path_or_state_dict: whatever `convmae.weights.read` takes, or what torch.load gave. Our names or the published
        ones; sizes come from the tensors.
    num_heads, decoder_num_heads: no tensor tells them. Our own files record them and the named sizes are known; for
        other widths 64 channels a head, at least 4 heads, are assumed with a warning.
    settings: any other argument of the model, such as mask_ratio or image_size.

    An encoder alone becomes a classifier with num_classes=0. Raises UserError if the tensors do not fit the model.
    """
    state, facts = _read(path_or_state_dict)
    if _is_detector(state):
        return _detector(state, facts, num_heads, settings)
    if weights.is_segmenter(state):
        return _segmenter(state, facts, num_heads, settings)
    if "decoder.mask_token" not in state:
        return _classifier(state, facts, num_heads, settings)
    known = _known(state, facts, num_heads)
    known["decoder_num_heads"] = (
        decoder_num_heads or facts.get("decoder_num_heads") or _heads(known["decoder_width"], "decoder_num_heads")
    )
    model = ConvMAE(**{**known, **settings})
    fill(model, state, resize_positions=True)
    return model


def load_classifier(
    path_or_state_dict: str | Path | Mapping[str, Any], num_heads: int | None = None, **settings: Any
) -> Classifier:
    """Build a classifier on the encoder of any weights file: of any model, or of an encoder alone.

    path_or_state_dict, num_heads: see `load`. settings: any other argument of Classifier, such as num_classes,
        image_size or drop_path; by default the file's.

    The file's head is kept where it is for so many classes; otherwise the classifier begins with a fresh one, or with
    none if neither the file nor `settings` says how many classes there are.
    """
    return _classifier(*_read(path_or_state_dict), num_heads, settings)


def load_detector(
    path_or_state_dict: str | Path | Mapping[str, Any], num_heads: int | None = None, **settings: Any
) -> Detector:
    """Build a detector on the encoder of any weights file, such as that of pretraining, or the detector that it holds.

    path_or_state_dict, num_heads: see `load`. settings: any other argument of Detector, such as form, num_classes or
        drop_path; by default what a detector's file tells, and for the tiny encoder those of the named size.

    A detector's last layers are kept where they are for so many classes, and otherwise begin anew; on another model's
    encoder all but the encoder does. Raises UserError if the tensors do not fit the model.
    """
    return _detector(*_read(path_or_state_dict), num_heads, settings)


def load_segmenter(
    path_or_state_dict: str | Path | Mapping[str, Any], num_heads: int | None = None, **settings: Any
) -> Segmenter:
    """Build a segmenter on the encoder of any weights file, such as that of pretraining, or the one that it holds.

    path_or_state_dict, num_heads: see `load`; published segmenters, under mmsegmentation's names, too. settings: any
        other argument of Segmenter, such as num_classes or drop_path; by default what a segmenter's file tells, and for
        the tiny encoder those of the named size.

    A segmenter's last layers are kept where they are for so many classes, and otherwise begin anew; on another model's
    encoder all but the encoder does. Raises UserError if the tensors do not fit the model.
    """
    return _segmenter(*_read(path_or_state_dict), num_heads, settings)


def fill(model: nn.Module, state: Mapping[str, Tensor], resize_positions: bool = False) -> None:
    """Copy all of a state dict under our names into a model that has exactly its tensors.

    resize_positions: position embeddings of another grid are resized bicubically. Raises UserError that names the first
        tensor that does not fit.
    """
    model.load_state_dict(fit(state, model.state_dict(), resize_positions))


def _read(source: str | Path | Mapping[str, Any]) -> tuple[weights.StateDict, dict[str, Any]]:
    """Tensors under our names, and what the source says of its model."""
    return weights.unwrap(source) if isinstance(source, Mapping) else weights.read(source)


def _known(state: weights.StateDict, facts: dict[str, Any], num_heads: int | None) -> dict[str, Any]:
    """The settings of the model that the tensors are of."""
    known = {**weights.sizes(state), **facts}
    known["num_heads"] = num_heads or facts.get("num_heads") or _heads(known["widths"][2], "num_heads")
    return known


def _classifier(
    state: weights.StateDict, facts: dict[str, Any], num_heads: int | None, settings: dict[str, Any]
) -> Classifier:
    known = _known(state, facts, num_heads)
    if _is_detector(state) or weights.is_segmenter(state):  # whose sizes and classes are its own
        known = {**known, **weights.sizes(state), "classes": None, "num_classes": 0}
    accepted = inspect.signature(Classifier).parameters
    known = {name: value for name, value in known.items() if name in accepted}
    known = {"num_classes": 0, **known}
    if settings.get("num_classes", known["num_classes"]) != known["num_classes"]:
        known.pop("classes", None)
    model = Classifier(**{**known, **settings})
    model.load_state_dict(checkpoint_filter_fn(state, model))
    return model


def _is_detector(state: weights.StateDict) -> bool:
    return "rpn.head.cls_logits.weight" in state


def _detector(
    state: weights.StateDict, facts: dict[str, Any], num_heads: int | None, settings: dict[str, Any]
) -> Detector:
    known = _known(state, facts, num_heads)
    if not _is_detector(state):
        of_tiny = _TINY_DETECTOR if tuple(known["widths"]) == ENCODERS["tiny"]["widths"] else {}
        sizes = {name: known[name] for name in _OF_THE_ENCODER}
        known = {**of_tiny, **sizes, "pos_embed_size": known["image_size"]}
    elif "form" not in known:
        raise UserError("these weights do not tell the detector's settings: fill a convmae.Detector with them by hand")
    elif settings.get("num_classes", known["num_classes"]) != known["num_classes"]:
        known.update(classes=None, category_ids=None)
    model = Detector(**{**known, **settings})
    model.load_state_dict(fit_detector(state, model))
    return model


def _segmenter(
    state: weights.StateDict, facts: dict[str, Any], num_heads: int | None, settings: dict[str, Any]
) -> Segmenter:
    known = _known(state, facts, num_heads)
    if not weights.is_segmenter(state):
        of_tiny = _TINY_SEGMENTER if tuple(known["widths"]) == ENCODERS["tiny"]["widths"] else {}
        known = {**of_tiny, **{name: known[name] for name in _OF_THE_ENCODER}}
    else:
        known.setdefault("reduce_zero_label", known["num_classes"] == _ADE20K_CLASSES)  # as the published one's
        if settings.get("num_classes", known["num_classes"]) != known["num_classes"]:
            known["classes"] = None
    model = Segmenter(**{**known, **settings})
    model.load_state_dict(fit_segmenter(state, model))
    return model


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


_TIMM_CFG: dict[str, Any] = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (224 // PATCH, 224 // PATCH),
    "crop_pct": 224 / 256,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "encoder.downsample1.proj",
    "classifier": "head",
    "license": "apache-2.0",
    "paper_name": "ConvMAE: Masked Convolution Meets Masked Autoencoders",
    "paper_ids": "arXiv:2205.03892",
}
# `register_model` looks for this name.
default_cfgs = generate_default_cfgs({f"convmae_{size}": _TIMM_CFG for size in ENCODERS})


def _timm(size: str, pretrained: bool, settings: dict[str, Any]) -> nn.Module:
    """What timm.create_model returns: a Classifier, or with features_only=True timm's wrapper of one."""
    name = f"convmae_{size}"
    source = resolve_timm_cfg(name, settings.get("pretrained_cfg"), settings.get("pretrained_cfg_overlay"))
    if pretrained and not (source.has_weights or source.state_dict):
        raise UserError(f"no weights of {name} can be downloaded: use checkpoint_path=FILE or convmae.load(FILE)")
    model = build_model_with_cfg(
        _with_timm_names,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
        **{**_size(size), **settings},
    )
    if isinstance(model, FeatureGetterNet):
        model.register_load_state_dict_pre_hook(_for_the_wrapped_model)
    elif pretrained and source.label_names and len(source.label_names) == model.num_classes:
        model.classes = list(source.label_names)
    return model


def _with_timm_names(**settings: Any) -> Classifier:
    """A Classifier whose arguments have timm's names."""
    ours = {"in_chans": "in_channels", "img_size": "image_size", "drop_path_rate": "drop_path"}
    return Classifier(**{ours.get(name, name): value for name, value in settings.items()})


def _for_the_wrapped_model(model: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Weights of a whole model loaded into timm's wrapper, which calls its model `model`."""
    own = f"{prefix}model."
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(own)]:
        state[own + name.removeprefix(prefix)] = state.pop(name)


@register_model
def convmae_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Tiny (2-3 M parameters), for CPUs, demos and tests."""
    return _timm("tiny", pretrained, kwargs)


@register_model
def convmae_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Small (22 M parameters)."""
    return _timm("small", pretrained, kwargs)


@register_model
def convmae_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Base (85 M parameters), the paper's model."""
    return _timm("base", pretrained, kwargs)


@register_model
def convmae_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Large (272 M parameters)."""
    return _timm("large", pretrained, kwargs)


@register_model
def convmae_huge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Huge (653 M parameters)."""
    return _timm("huge", pretrained, kwargs)
