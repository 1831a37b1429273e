"""Where the operations of this package go ways of their own: on a CPU that computes now, with oneDNN.

On other devices, and where torch.compile, torch.export, a tracer or a fake tensor only records, torch's own operations
are right. `with torch.backends.mkldnn.flags(enabled=False)` takes those on a CPU too.
"""

import torch
from torch import Tensor


def computes_on_cpu(x: Tensor) -> bool:
    """Whether operations on `x` are computed at once, by a CPU with oneDNN."""
    # The first of these settles it for the compiler, which could not follow the others.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # A subclass of tensors (fake, distributed) has rules of its own.
    if x.device.type != "cpu" or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
