"""Whether weights fit a model: all of its tensors, in its shapes, and nothing else."""

from collections.abc import Mapping

from torch import Tensor

from convmae.errors import UserError
from convmae.models.encoder import resized_pos_embed
from convmae.weights import StateDict


def fit(state: Mapping[str, Tensor], model: Mapping[str, Tensor], resize_positions: bool = False) -> StateDict:
    """The tensors of `state` for a model whose own state dict is `model`.

    resize_positions: position embeddings of another grid are resized bicubically. Raises UserError that names the first
        tensor that does not fit.
    """
    fitting = dict(state)
    for name, own in model.items():
        if name not in state:
            raise UserError(f"the weights do not fit the model: the file lacks {name}; check the model's settings")
        if resize_positions and name.endswith("pos_embed") and state[name].shape[-1] == own.shape[-1]:
            fitting[name] = resized_pos_embed(state[name], (own.shape[1], own.shape[2]))
        if own.shape != fitting[name].shape:
            raise UserError(
                f"the weights do not fit the model: {name} is {tuple(state[name].shape)} in the file and "
                f"{tuple(own.shape)} in the model; check the model's settings"
            )
    for name in state:
        if name not in model:
            raise UserError(
                f"the weights do not fit the model: the file has {name} besides; check the model's settings"
            )
    return fitting
