"""Where the time of a training step goes, by kind of computation: ours beside the published formulation.

    python benchmarks/profile_step.py [--model base] [--batch_size 16] [--precision bf16] [--compile true]

torch's profiler tells the time that each operation took itself: on a GPU that of its kernels, on a CPU that of the
processor. What a kind holds is in KINDS. Compiled kernels may fuse several kinds and are listed by name.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from convmae.benchmarks.arithmetic import wait_for
from convmae.benchmarks.contenders import make_contenders, make_step

# The kind of an operation is that of the first part of a name here that it, or an operation that called it, contains.
KINDS = {
    "AdamW": ("Optimizer.step", "_fused_adamw"),
    "depthwise convolution": ("masked_depthwise", "_convolve", "_parameter_gradients"),
    "attention": ("scaled_dot_product", "attention", "flash", "bmm", "softmax"),
    "LayerNorm": ("layer_norm",),
    "GELU": ("gelu",),
    "matrix products": ("mm", "linear", "convolution", "gemm", "nvjet", "cutlass"),
    "copies and casts": ("copy", "cat", "index", "scatter", "gather", "zero_", "fill_", "Memcpy", "Memset"),
}


def kind_of(event: FunctionEvent) -> str:
    """The kind of a profiled operation; a convolution with one input channel a group is a depthwise one."""
    names, caller = [], event
    while caller is not None:
        shapes = caller.input_shapes or []
        if "convolution" in caller.name and any(len(shape) == 4 and shape[1] == 1 < shape[2] for shape in shapes[1:3]):
            return "depthwise convolution"
        names.append(caller.name)
        caller = caller.cpu_parent
    if names[0].startswith("triton_") and not any("Optimizer.step" in name for name in names):
        return f"fused: {names[0]}"
    for kind, parts in KINDS.items():
        if any(part in name for name in names for part in parts):
            return kind
    return "other"


def seconds_by_kind(step: Callable[[Tensor], object], images: Tensor, steps: int) -> dict[str, float]:
    """Seconds a step of each kind, after two steps that warm up."""
    for _ in range(2):
        step(images)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * images.is_cuda
    with profile(activities=activities, record_shapes=True) as profiled:
        for _ in range(steps):
            step(images)
        wait_for(images.device)
    return {kind: time / steps for kind, time in sum_by_kind(profiled.events(), images.is_cuda).items()}


def sum_by_kind(events: Iterable[FunctionEvent], on_gpu: bool) -> dict[str, float]:
    """Seconds of each kind. Operations know the time of their kernels, which are listed once more by themselves."""
    seconds: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CPU:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            seconds[kind_of(event)] += own / 1e6
    return dict(seconds)


def main(
    model: str = "base",
    task: Literal["pretrain", "finetune"] = "pretrain",
    image_size: int = 224,
    batch_size: int = 16,
    precision: Literal["float32", "bf16"] = "bf16",
    device: Literal["cpu", "cuda"] = "cpu",
    compile: bool = False,
    steps: int = 3,
) -> None:
    """Print a table: seconds of a step and their share, by kind.

    Args:
        model: size: tiny, small, base, large or huge.
        task: pretrain or finetune.
        image_size: pixels, a multiple of 16.
        batch_size: images a step.
        precision: float32 or bf16 autocast.
        device: cpu or cuda.
        compile: whether ours is compiled.
        steps: steps to profile, after two that warm up.
    """
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as in training
    images = torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8, device=device)
    found = {}
    contenders = make_contenders(task, model, image_size)
    for contender in (contenders[0], contenders[-1]):
        contender.model.to(device)
        found[contender.name] = seconds_by_kind(make_step(contender, precision, compile), images, steps)
        contender.model.to("meta")  # which frees its memory
    table = Table(f"{precision}, batch {batch_size}", *found)
    whole = {name: sum(seconds.values()) for name, seconds in found.items()}
    table.add_row("all", *(f"{whole[name]:.3f} s" for name in found), end_section=True)
    ours = list(found.values())[-1]
    for kind in sorted({kind for seconds in found.values() for kind in seconds}, key=lambda kind: -ours.get(kind, 0)):
        cells = ((seconds.get(kind, 0), whole[name]) for name, seconds in found.items())
        table.add_row(kind, *(f"{own:.3f} s ({own / all_kinds:.0%})" for own, all_kinds in cells))
    Console().print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
