"""The masked depthwise convolution in plain PyTorch: the definition of correct, and what CPUs compute.

Shape letters as in `convmae.packing`; k is the kernel size. `packing` is None for a dense map.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from convmae.packing import Packing

# The dense gradient takes so many bytes of a map at a time, which stay in the cache over all shifts of the kernel.
_PART_BYTES = 2 * 2**20


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing | None) -> Tensor:
    """x (B, H, W, C) or packed (B, K, s, s, C), weight (C, 1, k, k), bias (C,) -> the shape of x."""
    if packing is None:
        return convolve_dense(x, weight, bias).contiguous()
    return packing.pack(convolve_dense(packing.unpack(x), weight, bias))


def parameter_gradients(x: Tensor, gradient: Tensor, size: int, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """Sums over visible cells: of the cell's gradient times each of its k x k neighbours, of the gradient alone.

    x, gradient: (B, H, W, C) or packed (B, K, s, s, C); size: k. Returns the gradients of weight (C, 1, k, k) and bias
    (C,).
    """
    of_bias = gradient.flatten(0, -2).sum(0)
    if packing is None:
        return _dense_weight_gradient(x, gradient, size), of_bias
    return _packed_weight_gradient(x, gradient, size, packing), of_bias


def _dense_weight_gradient(x: Tensor, gradient: Tensor, size: int) -> Tensor:
    margin = size // 2
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
    return _as_weight(sums.flatten(0, 1), x)


def _packed_weight_gradient(x: Tensor, gradient: Tensor, size: int, packing: Packing) -> Tensor:
    side, margin = x.shape[2], size // 2
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
    return _as_weight(torch.stack(sums), x)


def _as_weight(sums: Tensor, x: Tensor) -> Tensor:
    """(k*k, C) -> (C, 1, k, k)."""
    size = round(sums.shape[0] ** 0.5)
    return sums.t().contiguous().view(-1, 1, size, size).to(x.dtype)


def convolve_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C). The permutations only rename axes: channels-last is the faster layout here."""
    y = conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    return y.permute(0, 2, 3, 1)
