"""The depthwise convolution that sees masked positions as zeros: the only layer that mixes neighbouring cells.

`masked_depthwise_dense` is the definition: multiply a dense map by the mask, then convolve. `masked_depthwise` gives
the same numbers, gradients included, on packed maps. Shape letters as in `convmae.packing`; k is the kernel size.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, pad

from convmae.ops.eager import computes_on_cpu
from convmae.packing import Packing

# The dense gradient takes so many bytes of a map at a time, which stay in the cache over all shifts of the kernel.
_PART_BYTES = 2 * 2**20


def masked_depthwise_dense(x: Tensor, weight: Tensor, bias: Tensor, visible: Tensor | None = None) -> Tensor:
    """Depthwise convolution of a dense map, with masked cells as zeros and zeros around the border.

    x: (B, H, W, C). weight: (C, 1, k, k), k odd. bias: (C,). visible: (B, H, W) bool at the resolution of `x`, or None
    where every cell is visible. Returns (B, H, W, C); what it holds at masked cells never reaches a visible one.
    """
    if visible is not None:
        x = x * visible[..., None].to(x.dtype)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return _Depthwise.apply(x, weight, bias) if computes_on_cpu(x) else _convolve(x, weight, bias)


def masked_depthwise(x: Tensor, weight: Tensor, bias: Tensor, packing: Packing) -> Tensor:
    """Depthwise convolution of a packed map: cells of masked tokens count as zeros.

    x: (B, K, s, s, C). weight: (C, 1, k, k), k odd. bias: (C,). Returns (B, K, s, s, C).
    """
    return _MaskedDepthwise.apply(x, weight.to(x.dtype), bias.to(x.dtype), packing.visible, packing.index)


class _Depthwise(torch.autograd.Function):
    """Convolve; its own gradient, because torch's for the weight is slow on a CPU (docs/performance.md)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            _convolve(gradient, _turned(weight), None) if need_x else None,
            _dense_weight_gradient(x, gradient, weight) if need_weight else None,
            gradient.flatten(0, 2).sum(0) if need_bias else None,
        )


def _turned(weight: Tensor) -> Tensor:
    """The gradient of a convolution with stride 1 is the convolution with the kernel turned by 180 degrees."""
    return weight.flip(2, 3)


def _dense_weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """Sum, over all cells, of the cell's gradient times each of its k x k neighbours: (C, 1, k, k)."""
    size, margin = weight.shape[-1], weight.shape[-1] // 2
    height, width, channels = x.shape[1:]
    images = max(_PART_BYTES // max(gradient[:1].nbytes, 1), 1)
    sums = torch.zeros(size, size, channels, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    for maps, gradients in zip(x.split(images), gradient.split(images), strict=True):
        padded = pad(maps, (0, 0, margin, margin, margin, margin))
        product = torch.empty_like(maps)
        for row in range(size):
            for column in range(size):
                neighbours = padded[:, row : row + height, column : column + width]
                sums[row, column] += torch.mul(neighbours, gradients, out=product).flatten(0, 2).sum(0)
    return sums.permute(2, 0, 1).reshape(weight.shape).to(weight.dtype)  # (k, k, C) -> (C, 1, k, k)


class _MaskedDepthwise(torch.autograd.Function):
    """Unpack, convolve, pack.

    Autograd would keep the unpacked map and sum the weight's gradient over all cells. This keeps the packed map and
    sums over visible cells only: on a CPU its backward is 1.5 to 2.1 times as fast in float32, 5.3 to 6.5 in bf16.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, visible: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        packing = Packing(visible, index)
        ctx.save_for_backward(x, weight, visible, index)
        return packing.pack(_convolve(packing.unpack(x), weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        x, weight, visible, index = ctx.saved_tensors
        packing = Packing(visible, index)
        of_x = packing.pack(_convolve(packing.unpack(gradient), _turned(weight), None))
        return of_x, _weight_gradient(x, gradient, weight, packing), gradient.flatten(0, 3).sum(0), None, None


def _weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor, packing: Packing) -> Tensor:
    """Sum, over visible cells, of the cell's gradient times each of its k x k neighbours: (C, 1, k, k)."""
    side, size, margin = x.shape[2], weight.shape[-1], weight.shape[-1] // 2
    padded = pad(packing.unpack(x), (0, 0, margin, margin, margin, margin))
    rows = packing.cells(side, margin)
    gradient = gradient.reshape(rows.numel(), -1)  # (B, K, s, s, C) -> (B*K*s*s, C)
    shifts = [
        row * padded.shape[2] + column - margin * (padded.shape[2] + 1) for row in range(size) for column in range(size)
    ]
    padded = padded.flatten(0, 2)
    # One buffer for all shifts: on a CPU fresh memory costs more than the arithmetic.
    neighbour = torch.empty_like(gradient)
    sums = []
    for shift in shifts:
        torch.index_select(padded, 0, rows + shift, out=neighbour)
        sums.append(neighbour.mul_(gradient).sum(0))
    return torch.stack(sums, dim=1).view_as(weight)  # (C, k*k) -> (C, 1, k, k)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C). The permutations only rename axes: channels-last is the faster layout here."""
    y = conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return y.permute(0, 2, 3, 1)
