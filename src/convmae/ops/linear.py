"""Linear layers and the two-layer MLP, with a CPU's fastest kernels; elsewhere they are torch's own.

On a CPU a matrix product is a 1x1 convolution here: oneDNN computes those, where torch gives a float32 product to MKL,
which leaves half of an AMD processor's vectors unused. Shape letters: R rows; I, H, O channels in, hidden and out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.functional import conv2d, gelu

from convmae.ops.eager import computes_on_cpu

# With fewer rows a convolution costs more to set up than it saves (docs/performance.md).
_FEWEST_ROWS = {torch.float32: 128, torch.bfloat16: 1024}
# An MLP takes so many rows at a time, so that the next rows use the same memory: of a large hidden layer, fresh memory
# costs as much as the arithmetic.
_MLP_ROWS = 8192


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What torch.nn.functional.linear gives: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    dtype = _own_dtype(x, weight)
    if dtype is None:
        return functional.linear(x, weight, bias)
    rows = x.to(dtype).reshape(-1, x.shape[-1])  # (..., I) -> (R, I)
    return _Linear.apply(rows, weight, bias).view(*x.shape[:-1], -1)  # (R, O) -> (..., O)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Linear, GELU, linear: x (..., I), weight1 (H, I), bias1 (H,), weight2 (O, H), bias2 (O,) -> (..., O)."""
    dtype = _own_dtype(x, weight1)
    if dtype is None:
        return functional.linear(gelu(functional.linear(x, weight1, bias1)), weight2, bias2)
    rows = x.to(dtype).reshape(-1, x.shape[-1])  # (..., I) -> (R, I)
    y = _MLP.apply(rows, weight1, bias1, weight2, bias2, torch.is_grad_enabled())
    return y.view(*x.shape[:-1], -1)  # (R, O) -> (..., O)


def _own_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type in which the functions below are to compute, None where torch's own layers are right or faster."""
    if not computes_on_cpu(x):
        return None
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu") and dtype is not torch.float64:  # which autocast leaves as it is
        dtype = torch.get_autocast_dtype("cpu")
    elif dtype is not weight.dtype:
        return None  # torch says what is wrong
    fewest = _FEWEST_ROWS.get(dtype)
    return None if fewest is None or x.numel() < fewest * x.shape[-1] else dtype


class _Linear(torch.autograd.Function):
    """x (R, I), weight (O, I), bias (O,) or None -> (R, O); the weight is rounded to x's type."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return _gradients(gradient.contiguous(), x, weight, ctx.needs_input_grad)


class _MLP(torch.autograd.Function):
    """x (R, I), weight1 (H, I), bias1 (H,), weight2 (O, H), bias2 (O,) -> (R, O).

    Of the hidden layer only what goes into GELU is kept, if `keep`: to compute the rest again costs less than fresh
    memory for it.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, keep: bool
    ) -> Tensor:
        weight1, weight2 = weight1.to(x.dtype), weight2.to(x.dtype)
        y, kept = x.new_empty(x.shape[0], weight2.shape[0]), []
        for part in _parts(x.shape[0]):
            hidden = _product(x[part], weight1, bias1)
            y[part] = _product(gelu(hidden), weight2, bias2)
            if keep:
                kept.append(hidden)
        ctx.save_for_backward(x, weight1, weight2, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        x, weight1, weight2, *kept = ctx.saved_tensors
        need_x, *needed = ctx.needs_input_grad[:5]
        gradient = gradient.contiguous()
        of_x = torch.empty_like(x) if need_x else None
        sums: list[Tensor | None] = [None] * 4  # the gradients of the weights and biases, over all parts in float32
        for part, hidden in zip(_parts(x.shape[0]), kept, strict=True):
            of_hidden, *of_layer2 = _gradients(gradient[part], gelu(hidden), weight2, (True, *needed[2:]))
            assert of_hidden is not None  # it was asked for
            torch.ops.aten.gelu_backward.grad_input(of_hidden, hidden, grad_input=of_hidden)
            of_part, *of_layer1 = _gradients(of_hidden, x[part], weight1, (need_x, *needed[:2]))
            if of_x is not None and of_part is not None:
                of_x[part] = of_part
            sums = [_add(total, value) for total, value in zip(sums, of_layer1 + of_layer2, strict=True)]
        return of_x, *sums, None


def _parts(rows: int) -> list[slice]:
    """All rows in equal parts of at most _MLP_ROWS."""
    length = -(-rows // -(-rows // _MLP_ROWS))
    length = -(-length // 16) * 16  # see _as_map
    return [slice(start, start + length) for start in range(0, rows, length)]


def _add(total: Tensor | None, value: Tensor | None) -> Tensor | None:
    if total is None or value is None:
        return None if value is None else value.float()
    return total.add_(value)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (R, I), weight (O, I), bias (O,) or None -> (R, O)."""
    y = conv2d(_as_map(x), weight[..., None, None], None if bias is None else bias.to(x.dtype))
    # Not a view to autograd, which would forbid whoever gets it to change it in place.
    return torch.ops.aten._unsafe_view(y.permute(0, 2, 3, 1).contiguous(), (x.shape[0], weight.shape[0]))


def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (R, I), weight (O, I) and bias (O,), those needed, from that of the product, (R, O)."""
    need_x, need_weight, need_bias = needed
    # The one product for which torch's own is faster: that of bf16 over the rows.
    as_product = need_weight and x.dtype is torch.bfloat16
    mask = [need_x, need_weight and not as_product, False]
    of_x = of_weight = None
    if any(mask):
        maps = _as_map(gradient), _as_map(x), weight[..., None, None]
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            *maps, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask
        )
    if of_x is not None:
        of_x = of_x.permute(0, 2, 3, 1).reshape(x.shape)
    if of_weight is not None:
        of_weight = of_weight.reshape(weight.shape)
    if as_product:
        of_weight = gradient.t() @ x
    # A product with ones is faster than a sum.
    of_bias = (gradient.new_ones(1, gradient.shape[0]) @ gradient)[0] if need_bias else None
    return of_x, of_weight, of_bias


def _as_map(rows: Tensor) -> Tensor:
    """(R, C) -> (n, C, R / n, 1), channels last in memory: the form that oneDNN takes without copying.

    torch gives oneDNN 1x1 convolutions of 16 images or more; of fewer only where it has several threads.
    """
    images = 1 if rows.shape[0] % 16 else 16
    return rows.view(images, -1, 1, rows.shape[1]).permute(0, 3, 1, 2)
