"""timm's registration of the classifiers: after `import convmae`, timm.create_model("convmae_base", ...) makes one."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models import resolve_pretrained_cfg as resolve_timm_cfg
from timm.models._features import FeatureGetterNet
from torch import nn

from convmae.errors import UserError
from convmae.models.classifier import Classifier, checkpoint_filter_fn
from convmae.models.config import PATCH
from convmae.models.sizes import ENCODERS

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
        **{"encoder": ENCODERS[size], **settings},
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
