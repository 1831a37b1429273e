"""The kinds of models that a weights file may hold: one table, which loading, creating, filling and exporting read.

A file of ours says its kind. Published files and those of earlier versions are known by their tensors, in one place.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convmae import weights
from convmae.errors import UserError
from convmae.models.classifier import Classifier, checkpoint_filter_fn
from convmae.models.config import EncoderConfig
from convmae.models.detector import Detector, fit_detector
from convmae.models.fitting import fit
from convmae.models.segmenter import Segmenter, fit_segmenter
from convmae.models.sizes import (
    TINY_DETECTOR,
    TINY_SEGMENTER,
    decoder_heads,
    encoder_in_file,
    is_tiny,
    named,
    other_backbone,
)
from convmae.objectives import OBJECTIVES
from convmae.objectives.masked import ConvMAE

_ADE20K_CLASSES = 150  # besides label 0, which is none of them
_EXPORTS = ("onnx", "torch-export", "timm", "reference")

WeightsSource = str | Path | Mapping[str, Any]
"""Whatever `convmae.weights.read` takes, or what torch.load gave."""


@dataclass(frozen=True)
class Kind:
    """One kind of model."""

    name: str
    """Under "kind" in a weights file's description."""
    called: str
    """Its name in a sentence, with the article."""
    model: Callable[..., Any]
    """Its class, which takes `image_size`, `encoder` and the settings of its head."""
    fit: Callable[[weights.StateDict, Any], weights.StateDict]
    """(tensors under our names, model of this kind) -> tensors with the names and shapes of the model's: of a file of
    this kind, and but for autoencoders of any file with an encoder, with which it begins then."""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its head on the tiny encoder."""
    tensor: str = ""
    """Name of a tensor by which a published file, or one of an earlier version, is known."""
    of_another: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its head on the encoder of another kind's weights."""
    exports: tuple[str, ...] = ()
    """Formats of `convmae export` that hold it, or what it knows of an image."""
    instead: str = ""
    """What can be done with it where a format does not hold it."""


_CLASSIFIER = Kind(
    "classifier", "a classifier", Classifier, checkpoint_filter_fn, of_another={"num_classes": 0}, exports=_EXPORTS
)
_DETECTOR = Kind(
    "detector",
    "a detector",
    Detector,
    fit_detector,
    TINY_DETECTOR,
    "rpn.head.cls_logits.weight",
    instead="use it with convmae detect predict, or convmae.load in Python",
)
_SEGMENTER = Kind(
    "segmenter",
    "a segmenter",
    Segmenter,
    fit_segmenter,
    TINY_SEGMENTER,
    "decode_head.conv_seg.weight",
    exports=("reference",),
    instead="--format reference writes it whole, in mmsegmentation's form",
)


def _fit_whole(state: weights.StateDict, model: nn.Module) -> weights.StateDict:
    """All tensors of an objective's file, in the size of the model's tables of positions."""
    return fit(state, model.state_dict())


_OBJECTIVES = [
    Kind(name, "an autoencoder", objective, _fit_whole, objective.tiny, objective.tensor, exports=_EXPORTS)
    for name, objective in OBJECTIVES.items()
]

KINDS = {kind.name: kind for kind in (*_OBJECTIVES, _DETECTOR, _SEGMENTER, _CLASSIFIER)}
"""All kinds by their names."""


def load(
    path_or_state_dict: WeightsSource,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    **settings: Any,
) -> ConvMAE | Classifier | Detector | Segmenter:
    """Build and fill the model that a weights file holds: an autoencoder, a detector, a segmenter, else a classifier.

    path_or_state_dict: whatever `convmae.weights.read` takes, or what torch.load gave. Our names or the published
        ones, whose sizes come from the tensors.
    num_heads, decoder_num_heads: no tensor tells them. Our own files record them and the named sizes are known; for
        other widths 64 channels a head, at least 4 heads, are assumed with a warning.
    settings: any other argument of the model, such as mask_ratio or image_size.

    An encoder alone becomes a classifier with num_classes=0. Raises UserError if the tensors do not fit the model.
    """
    state, facts = _read(path_or_state_dict)
    return _load(_kind_in_file(state, facts), state, facts, num_heads, settings, decoder_num_heads)


def load_classifier(path_or_state_dict: WeightsSource, num_heads: int | None = None, **settings: Any) -> Classifier:
    """Build a classifier on the encoder of any weights file: of any model, or of an encoder alone.

    path_or_state_dict, num_heads: see `load`. settings: any other argument of Classifier, such as num_classes,
        image_size or drop_path; by default the file's.

    The file's head is kept where it is for so many classes; otherwise the classifier begins with a fresh one, or with
    none if neither the file nor `settings` says how many classes there are.
    """
    return _load(_CLASSIFIER, *_read(path_or_state_dict), num_heads, settings)


def load_detector(path_or_state_dict: WeightsSource, num_heads: int | None = None, **settings: Any) -> Detector:
    """Build a detector on the encoder of any weights file, such as that of pretraining, or the detector that it holds.

    path_or_state_dict, num_heads: see `load`. settings: any other argument of Detector, such as form, num_classes or
        drop_path; by default what a detector's file tells, and for the tiny encoder those of the named size.

    A detector's last layers are kept where they are for so many classes, and otherwise begin anew; on another model's
    encoder all but the encoder does. Raises UserError if the tensors do not fit the model.
    """
    return _load(_DETECTOR, *_read(path_or_state_dict), num_heads, settings)


def load_segmenter(path_or_state_dict: WeightsSource, num_heads: int | None = None, **settings: Any) -> Segmenter:
    """Build a segmenter on the encoder of any weights file, such as that of pretraining, or the one that it holds.

    path_or_state_dict, num_heads: see `load`; published segmenters, under mmsegmentation's names, too. settings: any
        other argument of Segmenter, such as num_classes or drop_path; by default what a segmenter's file tells, and for
        the tiny encoder those of the named size.

    A segmenter's last layers are kept where they are for so many classes, and otherwise begin anew; on another model's
    encoder all but the encoder does. Raises UserError if the tensors do not fit the model.
    """
    return _load(_SEGMENTER, *_read(path_or_state_dict), num_heads, settings)


def create_autoencoder(model: str = "base", **settings: Any) -> ConvMAE:
    """A ConvMAE of a named size (tiny, small, base, large, huge); `settings` of ConvMAE override it."""
    return create(ConvMAE.kind, model, **settings)


def create_classifier(model: str = "base", **settings: Any) -> Classifier:
    """A Classifier of a named size (tiny, small, base, large, huge); `settings` of Classifier override it."""
    return create(Classifier.kind, model, **settings)


def create_detector(model: str = "base", **settings: Any) -> Detector:
    """A Detector of a named size (tiny, small, base, large, huge); `settings` of Detector override it."""
    return create(Detector.kind, model, **settings)


def create_segmenter(model: str = "base", **settings: Any) -> Segmenter:
    """A Segmenter of a named size (tiny, small, base, large, huge); `settings` of Segmenter override it."""
    return create(Segmenter.kind, model, **settings)


def create(kind: str, model: str = "base", **settings: Any) -> Any:
    """A model of any kind in a named size, or on one of BACKBONES; `settings` of its class override it."""
    if (backbone := other_backbone(model, **_of_the_encoder(settings))) is not None:
        return KINDS[kind].model(encoder=backbone, **_of_the_head(settings))
    encoder = named(model)
    head = KINDS[kind].tiny if is_tiny(encoder) else {}
    return KINDS[kind].model(**{"encoder": encoder, **head, **settings})


def _of_the_encoder(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a model's settings another encoder than ConvViT is told."""
    return {name: settings[name] for name in ("in_channels", "drop_path") if name in settings}


def _of_the_head(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rest."""
    return {name: value for name, value in settings.items() if name not in _of_the_encoder(settings)}


def kind_of(path_or_state_dict: WeightsSource) -> Kind:
    """What kind of model a weights file holds; of an encoder alone the classifier, which `load` makes of it."""
    return _kind_in_file(*_read(path_or_state_dict))


def _read(source: WeightsSource) -> tuple[weights.StateDict, dict[str, Any]]:
    """The source's tensors under our names, and what it says of its model."""
    return weights.unwrap(source) if isinstance(source, Mapping) else weights.read(source)


def _kind_in_file(state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Kind:
    """The kind that a file says; where it says none, the one whose tensor is in it."""
    if "kind" not in facts:
        return next((kind for kind in KINDS.values() if kind.tensor and kind.tensor in state), _CLASSIFIER)
    if facts["kind"] == "encoder":
        return _CLASSIFIER
    if facts["kind"] not in KINDS:
        raise UserError(f"these weights are of the kind '{facts['kind']}', which this version does not know: update it")
    return KINDS[facts["kind"]]


def _load(
    kind: Kind,
    state: weights.StateDict,
    facts: dict[str, Any],
    num_heads: int | None,
    settings: dict[str, Any],
    decoder_num_heads: int | None = None,
) -> Any:
    """A model of a kind, filled with the weights of that kind or, where it can begin so, on another kind's encoder."""
    encoder = settings.get("encoder")
    if encoder is None and "name" in facts.get("encoder", {}):
        known = dict(facts["encoder"])
        encoder = other_backbone(known.pop("name"), **{**known, **_of_the_encoder(settings)})
        settings = _of_the_head(settings)
    if encoder is None:
        encoder = encoder_in_file(state, facts, num_heads)
    if _kind_in_file(state, facts) is not kind:
        tiny = isinstance(encoder, EncoderConfig) and is_tiny(encoder)
        head = {**kind.of_another, **(kind.tiny if tiny else {})}
    else:
        head = {**kind.of_another, **_head_in_file(kind, state, facts, decoder_num_heads)}
        if settings.get("num_classes", head.get("num_classes")) != head.get("num_classes"):
            of_its_classes = ("classes", "category_ids", "label_encoding")
            head = {name: value for name, value in head.items() if name not in of_its_classes}
    model = kind.model(**{"encoder": encoder, **head, **settings})
    model.load_state_dict(kind.fit(state, model))
    return model


def _head_in_file(
    kind: Kind, state: Mapping[str, Tensor], facts: Mapping[str, Any], decoder_num_heads: int | None
) -> dict[str, Any]:
    """The settings of a file's model besides its encoder's."""
    if "kind" in facts:
        head = dict(facts.get("head", {}))
        if decoder_num_heads and "decoder_num_heads" in head:
            head["decoder_num_heads"] = decoder_num_heads
        return head
    known = {**weights.sizes(state), **facts}
    if kind is _DETECTOR and "form" not in known:
        raise UserError("these weights do not tell the detector's settings: fill a convmae.Detector with them by hand")
    if kind is _SEGMENTER:
        known.setdefault("reduce_zero_label", known["num_classes"] == _ADE20K_CLASSES)  # as the published one's
    if "decoder_width" in known:
        known["decoder_num_heads"] = (
            decoder_num_heads or facts.get("decoder_num_heads") or decoder_heads(known["decoder_width"])
        )
    arguments = inspect.signature(kind.model).parameters
    return {name: value for name, value in known.items() if name in arguments}
