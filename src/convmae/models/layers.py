"""Layers that every part of the models uses, under torch's and timm's names; `convmae.ops` computes them."""

from torch import Tensor, nn
from torch.nn.functional import gelu

from convmae.ops.linear import linear, mlp


class Linear(nn.Linear):
    """nn.Linear, faster on a CPU: (..., I) -> (..., O)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Linear, GELU, linear: (..., C) -> (..., C)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if _untouched(self.fc1) and _untouched(self.fc2):
            return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return self.fc2(gelu(self.fc1(x)))


def initialise_linear(layer: nn.Linear) -> None:
    """Truncated normal 0.02 and zero bias, the published start of models that are trained with labels."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)


def _untouched(layer: nn.Module) -> bool:
    """Whether nobody put an adapter in the layer's place, or a hook on it: what only a call of the layer would run."""
    return type(layer) is Linear and not layer._forward_hooks and not layer._forward_pre_hooks
