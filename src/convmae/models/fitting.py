"""How the weights of one model are made to fit another: other grids, other classes, parts that one of them lacks."""

import logging
from collections.abc import Mapping

from timm.models import adapt_input_conv
from torch import Tensor

from convmae.errors import UserError
from convmae.models.positions import resized_offsets, resized_pos_embed, resized_table
from convmae.weights import StateDict, check

_log = logging.getLogger(__name__)

_FIRST_LAYER = "encoder.downsample1.proj.weight"
_SIDE = 4  # of the cells that the first layer takes
_CELL = _SIDE * _SIDE
_PREDICTION = "decoder.prediction"

_SCALES = {".ls1.gamma": ".attn.proj", ".ls2.gamma": ".mlp.fc2"}
"""The layer whose result is scaled, by the end of the scale's name."""


def fit(state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> StateDict:
    """The tensors of `state` for a model whose own state dict is `model`.

    Position embeddings of another grid are resized bicubically. For another number of channels the first layer is
    adapted, and the layer that predicts pixels begins anew, which is logged. Raises UserError that names the first
    tensor that does not fit.
    """
    fitting = _for_channels(state, model)
    for name, own in model.items():
        if name.endswith("pos_embed") and name in state and state[name].shape[-1] == own.shape[-1]:
            fitting[name] = resized_pos_embed(state[name], (own.shape[1], own.shape[2]))
    check(fitting, model)
    return fitting


def _for_channels(state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> StateDict:
    """The same tensors for images with as many channels as the model's have."""
    fitting = dict(state)
    if _FIRST_LAYER not in state or _FIRST_LAYER not in model:
        return fitting
    layer, own = state[_FIRST_LAYER], model[_FIRST_LAYER]
    if layer.shape == own.shape or len(layer) != len(own) or layer.shape[1] % _CELL or own.shape[1] % _CELL:
        return fitting
    before, after = layer.shape[1] // _CELL, own.shape[1] // _CELL
    kernel = layer.unflatten(1, (_SIDE, _SIDE, before)).permute(0, 3, 1, 2)  # (D, f*f*C) -> (D, C, f, f)
    if before == 1:  # what sees the same in every channel sums up to the same
        kernel = kernel.expand(-1, after, -1, -1) / after
    elif before == 3:
        kernel = adapt_input_conv(after, kernel)
    else:
        raise UserError(
            f"the weights are for images with {before} channels, the model takes {after}: only weights for 1 or 3 "
            "can be adapted; leave --in-channels out, or train from scratch"
        )
    fitting[_FIRST_LAYER] = kernel.permute(0, 2, 3, 1).flatten(1).contiguous()
    begun = [
        name
        for name in (f"{_PREDICTION}.weight", f"{_PREDICTION}.bias")
        if name in state and name in model and len(state[name]) * after == len(model[name]) * before
    ]
    fitting |= {name: model[name] for name in begun}
    _log.warning(
        "the weights are for images with %d channels, the model takes %d: the first layer is adapted as timm does it%s",
        before,
        after,
        ", the layer that predicts pixels begins anew" if begun else "",
    )
    return fitting


def fit_encoder(state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> StateDict:
    """The encoder of any model's weights, under our names, for a plain encoder whose own state dict is `model`.

    Relative positions are left out, and layer scale is multiplied into the layers before it; positions are resized.
    Raises UserError that names the first tensor that does not fit.
    """
    prefix = "encoder."
    given = {name: value for name, value in without_downstream(state).items() if name.startswith(prefix)}
    fitting = fit(given, {prefix + name: value for name, value in model.items()})
    return {name.removeprefix(prefix): value for name, value in fitting.items()}


def fit_objective(state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> tuple[StateDict, list[str], list[str]]:
    """The tensors of any weights, under our names, to begin a pretraining of a model whose own state dict is `model`.

    Of weights with a decoder that is all of them. Of others it is the encoder, and what stands between it and the
    decoder where the file has just these; relative positions and layer scale as in `fit_encoder`. Returns the parts of
    the model that stay its own and those of the file that are left out, too. Raises UserError that names the first
    tensor that does not fit.
    """
    own, given = _parts(model), _parts(state)
    if "decoder" in given or own.keys() <= given.keys():
        return fit(state, model), [], []
    taken = list(given) if given.keys() == own.keys() - {"decoder"} else ["encoder"]
    plain = {name: value for name, value in without_downstream(state).items() if name.split(".")[0] in taken}
    kept = {name: value for name, value in model.items() if name.split(".")[0] not in taken}
    anew, left_out = ([part for part in parts if part not in taken] for parts in (own, given))
    return fit({**kept, **plain}, model), anew, left_out


def _parts(state: Mapping[str, Tensor]) -> dict[str, None]:
    """The parts to which its tensors belong, in their order."""
    return dict.fromkeys(name.split(".")[0] for name in state)


def fit_downstream(
    state: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    last_layers: tuple[str, ...],
    counting: str,
    background: int = 0,
) -> StateDict:
    """Make the weights of any model with an encoder fit a detector or a segmenter.

    state: under our names: of an autoencoder, a classifier, an encoder, or of such a model. model: its own state dict.
    last_layers: beginnings of the names of its tensors that there are for each class. counting: the name of one of
        these, as long as there are classes and background.

    Parts that the model does not have, such as a decoder, are left out; parts that the file does not have, relative
    positions and layer scale stay the model's, and so do last layers for another number of classes. Where the model has
    no layer scale, the file's is multiplied into the layers before it. Tables of positions are resized where the model
    was built for other grids. Raises UserError that names the first tensor that does not fit.
    """
    if not any(name.endswith(tuple(_SCALES)) for name in model):
        state = without_layer_scale(state)
    parts = {name.split(".")[0] for name in model}
    given = {
        name: _resized_positions(value, model[name]) if "positions." in name and name in model else value
        for name, value in state.items()
        if name.split(".")[0] in parts and not (_is_downstream(name) and name not in model)
    }
    if counting in given and len(given[counting]) != len(model[counting]):
        _log.warning(
            "the weights' last layers are for %d classes, the model's for %d: the model keeps its own, untrained",
            len(given[counting]) - background,
            len(model[counting]) - background,
        )
        given = {name: value for name, value in given.items() if not name.startswith(last_layers)}
        given |= {name: value for name, value in model.items() if name.startswith(last_layers)}
    known = {name.split(".")[0] for name in given}
    kept = {name: value for name, value in model.items() if name.split(".")[0] not in known or _is_downstream(name)}
    return fit({**kept, **given}, model)


def _is_downstream(name: str) -> bool:
    """Whether a tensor belongs to what the encoder has in a downstream form only."""
    return "positions." in name or name.endswith(tuple(_SCALES))


def _resized_positions(table: Tensor, own: Tensor) -> Tensor:
    """A file's table of relative positions in the size of the model's, where both are of as many heads or channels."""
    if table.ndim != own.ndim or table.shape[-1] != own.shape[-1]:
        return table  # which does not fit, and is told by its name
    return resized_offsets(table, len(own)) if own.ndim == 2 else resized_table(table, (own.shape[0], own.shape[1]))


def without_downstream(state: Mapping[str, Tensor]) -> StateDict:
    """A downstream model's tensors for a plain encoder: no relative positions, which have no place there, nor scale."""
    return {name: value for name, value in without_layer_scale(state).items() if not _is_downstream(name)}


def without_layer_scale(state: Mapping[str, Tensor]) -> StateDict:
    """The same function without layer scale, which is multiplied into the layers before it, exactly.

    Raises UserError that names a scale that is not as long as its layer's result.
    """
    plain = {name: value for name, value in state.items() if not name.endswith(tuple(_SCALES))}
    for scale, layer in _SCALES.items():
        for name, gamma in state.items():
            if not name.endswith(scale):
                continue
            for part in ("weight", "bias"):
                scaled = name.removesuffix(scale) + f"{layer}.{part}"
                if scaled not in plain:
                    continue  # which is told by its name where the weights meet the model
                if gamma.shape != plain[scaled].shape[:1]:
                    raise UserError(
                        f"the weights do not fit each other: {name} is {tuple(gamma.shape)} and {scaled} "
                        f"{tuple(plain[scaled].shape)}; save or download the file again"
                    )
                plain[scaled] = plain[scaled] * gamma.view(-1, *[1] * (plain[scaled].ndim - 1))
    return plain
