"""The script that says where a step's time goes: each operation under its kind."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn import functional

from convmae.masking import random_visible
from convmae.ops.masked_depthwise import masked_depthwise
from convmae.packing import Packing

PACKING = Packing.of(random_visible(2, (4, 4), 0.5))
WEIGHT, BIAS = torch.randn(128, 1, 5, 5), torch.zeros(128)
MAPS = torch.randn(2, 16, 16, 16)
KERNEL, POINT = torch.randn(16, 1, 5, 5), torch.randn(16, 16, 1, 1)


@pytest.fixture(scope="module")
def script():
    """What benchmarks/profile_step.py defines."""
    return runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "profile_step.py"))


def packed(x):
    masked_depthwise(x.view(2, 8, 2, 2, 128), WEIGHT, BIAS, PACKING)


@pytest.mark.parametrize(
    ("compute", "kind"),
    [
        (lambda x: functional.conv2d(x, KERNEL, padding=2, groups=16), "depthwise convolution"),
        (packed, "depthwise convolution"),
        (lambda x: functional.conv2d(x, POINT), "matrix products"),
        (lambda x: x.view(-1, 256) @ x.view(256, -1), "matrix products"),
        (lambda x: functional.scaled_dot_product_attention(x, x, x), "attention"),
        (lambda x: functional.layer_norm(x, (16,)), "LayerNorm"),
        (functional.gelu, "GELU"),
        (lambda x: x.to(torch.bfloat16), "copies and casts"),
        (torch.sin, "other"),
    ],
)
def test_a_computation_is_of_its_kind_and_of_no_other(script, compute, kind):
    """But for what belongs to none, such as new memory; on a busy machine that may take the longest."""
    with torch.no_grad():
        seconds = script["seconds_by_kind"](compute, MAPS, steps=3)
    assert seconds[kind] > 0
    assert seconds.keys() <= {kind, "other"}


def test_a_whole_step_has_every_kind(script, capsys):
    script["main"]("tiny", image_size=64, batch_size=2, steps=1)
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in (*script["KINDS"], "other"))


def test_a_gpu_s_kernels_are_counted_once_and_by_the_operation_that_started_them(script):
    def event(name, microseconds, device, caller=None):
        return SimpleNamespace(
            name=name,
            self_device_time_total=microseconds,
            self_cpu_time_total=7,
            device_type=device,
            cpu_parent=caller,
            input_shapes=[],
        )

    on_cpu, on_gpu = DeviceType.CPU, DeviceType.CUDA
    adamw = event("Optimizer.step#AdamW.step", 0, on_cpu)
    events = [
        event("aten::gelu", 3e6, on_cpu),
        event("void at::native::vectorized_elementwise_kernel", 3e6, on_gpu),
        event("triton_poi_fused_add_gelu_native_layer_norm_3", 2e6, on_cpu),
        event("triton_poi_fused_add_gelu_native_layer_norm_3", 2e6, on_gpu),
        adamw,
        event("Optimizer.step#AdamW.step", 5e6, on_gpu),
        event("aten::mul_", 1e6, on_cpu, adamw),
    ]
    seconds = script["sum_by_kind"](events, on_gpu=True)
    assert seconds == {"GELU": 3, "fused: triton_poi_fused_add_gelu_native_layer_norm_3": 2, "AdamW": 1}
