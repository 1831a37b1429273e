"""The depthwise convolution that sees masked positions as zeros: the only layer that mixes neighbouring cells.

`masked_depthwise_dense` works on dense maps, `masked_depthwise` on packed ones, with the same numbers, gradients
included. Both are one custom operator, `convmae::masked_depthwise`, so that torch.compile goes through without a graph
break; the plain PyTorch form computes it on CPUs, a Triton kernel on GPUs. Shape letters as in `convmae.packing`; k is
the kernel size.
"""

import logging
import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from convmae.errors import UserError
from convmae.ops import masked_depthwise_reference
from convmae.ops.eager import computes_on_cpu
from convmae.packing import Packing

Backend = Literal["auto", "reference", "triton"]

_logger = logging.getLogger(__name__)


def masked_depthwise_dense(
    x: Tensor, weight: Tensor, bias: Tensor, visible: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Depthwise convolution of a dense map, with masked cells as zeros and zeros around the border.

    x: (B, H, W, C). weight: (C, 1, k, k), k odd. bias: (C,). visible: (B, H, W) bool at the resolution of `x`, or None
    where every cell is visible. backend: see `masked_depthwise`. Returns (B, H, W, C); what it holds at masked cells
    never reaches a visible one.
    """
    if visible is not None:
        x = x * visible[..., None].to(x.dtype)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if backend == "auto" and not (computes_on_cpu(x) or _computes_on_gpu(x)):
        # Exported graphs hold torch's own operators only; torch.compile makes good CPU code of them.
        return masked_depthwise_reference.convolve_dense(x, weight, bias)
    return _masked_depthwise(x, weight, bias, None, None, backend)


def masked_depthwise(x: Tensor, weight: Tensor, bias: Tensor, packing: Packing, backend: Backend = "auto") -> Tensor:
    """Depthwise convolution of a packed map: cells of masked tokens count as zeros.

    x: (B, K, s, s, C). weight: (C, 1, k, k), k odd. bias: (C,). backend: "reference", plain PyTorch; "triton", on GPUs;
    "auto", Triton on a GPU where it is installed, else the reference. Returns (B, K, s, s, C). Raises UserError for a
    backend that is not available.
    """
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return _masked_depthwise(x, weight, bias, packing.index, packing.slots, backend)


def _computes_on_gpu(x: Tensor) -> bool:
    # A proxy of torch.fx and what torch.jit traces are no tensors on a GPU, or come to stand in an exported graph.
    return not (torch.compiler.is_exporting() or torch.jit.is_tracing()) and isinstance(x, Tensor) and x.is_cuda


# The operator: `index` and `slots` are a Packing's, or None for a dense map, all of whose cells are visible.
# torch keeps compiled graphs on disk and finds them by the forward alone: once released, another backward needs another
# name for the operator.


@torch.library.custom_op("convmae::masked_depthwise", mutates_args=())
def _masked_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None, slots: Tensor | None, backend: str
) -> Tensor:
    return _kernels(backend, x).convolve(x, weight, bias, _packing(index, slots))


@_masked_depthwise.register_fake
def _(x, weight, bias, index, slots, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op("convmae::masked_depthwise_parameter_gradients", mutates_args=())
def _parameter_gradients(
    x: Tensor, gradient: Tensor, size: int, index: Tensor | None, slots: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return _kernels(backend, x).parameter_gradients(x, gradient, size, _packing(index, slots))


@_parameter_gradients.register_fake
def _(x, gradient, size, index, slots, backend):
    return x.new_empty(x.shape[-1], 1, size, size), x.new_empty(x.shape[-1])


def _keep(ctx, inputs, output) -> None:
    x, weight, _, index, slots, ctx.backend = inputs
    ctx.save_for_backward(x, weight, index, slots)


def _backward(ctx, gradient: Tensor):
    x, weight, index, slots = ctx.saved_tensors
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    of_x = of_weight = of_bias = None
    if need_x:
        # The gradient of a convolution with stride 1 is the convolution with the kernel turned by 180 degrees.
        of_x = _masked_depthwise(gradient, weight.flip(2, 3), None, index, slots, ctx.backend)
    if need_weight or need_bias:
        of_weight, of_bias = _parameter_gradients(x, gradient, weight.shape[-1], index, slots, ctx.backend)
    return of_x, of_weight if need_weight else None, of_bias if need_bias else None, None, None, None


_masked_depthwise.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.convmae.masked_depthwise)
def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of visible cells, all of which a packed map holds; from shapes, as torch's counter gives them."""
    return 2 * math.prod(x) * weight[-1] ** 2


@register_flop_formula(torch.ops.convmae.masked_depthwise_parameter_gradients)
def _flops_of_parameter_gradients(x: Sequence[int], gradient: Sequence[int], size: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * size**2


def _packing(index: Tensor | None, slots: Tensor | None) -> Packing | None:
    return None if index is None or slots is None else Packing(index, slots)


def _kernels(backend: str, x: Tensor) -> ModuleType:
    """The module whose `convolve` and `parameter_gradients` compute."""
    if backend == "auto":
        usable = x.is_cuda and x.dtype is not torch.float64 and find_spec("triton") is not None
        return _chosen("triton" if usable else "reference")
    return _chosen(backend)


@cache
def _chosen(backend: str) -> ModuleType:
    if backend == "reference":
        return masked_depthwise_reference
    if backend != "triton":
        raise UserError(f"unknown backend '{backend}': choose auto, reference or triton")
    if find_spec("triton") is None:
        raise UserError("the backend triton needs the package triton: pip install triton, or choose reference")
    from convmae.ops import masked_depthwise_triton

    _logger.info("masked depthwise convolution: Triton kernels")
    return masked_depthwise_triton
