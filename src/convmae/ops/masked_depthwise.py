"""The depthwise convolution that sees masked positions as zeros: the only layer that mixes neighbouring cells.

The definition is `masked_depthwise_dense`: multiply the map by the mask, then convolve. `masked_depthwise` gives the same
numbers at the visible cells of a packed map. Shape letters: see `convmae.packing`; k is the kernel size.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from convmae.packing import Packing


def masked_depthwise_dense(x: Tensor, weight: Tensor, bias: Tensor, visible: Tensor | None = None) -> Tensor:
    """Depthwise convolution of a dense map, with masked cells as zeros and zeros around the border.

    x: (B, H, W, C). weight: (C, 1, k, k), k odd. bias: (C,). visible: (B, H, W) bool at the resolution of `x`, or None
    where every cell is visible. Returns (B, H, W, C); what it holds at masked cells never reaches a visible one.
    """
    if visible is not None:
        x = x * visible[..., None].to(x.dtype)
    channels, size = weight.shape[0], weight.shape[-1]
    # The permutations only rename the axes: the memory stays channels-last, the faster layout of this convolution.
    x = conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), bias.to(x.dtype), padding=size // 2, groups=channels)
    return x.permute(0, 2, 3, 1)


def masked_depthwise(x: Tensor, weight: Tensor, bias: Tensor, packing: Packing) -> Tensor:
    """Depthwise convolution of a packed map: cells of masked tokens count as zeros.

    x: (B, K, s, s, C). weight: (C, 1, k, k), k odd. bias: (C,). Returns (B, K, s, s, C).
    """
    return packing.pack(masked_depthwise_dense(packing.unpack(x), weight, bias))
