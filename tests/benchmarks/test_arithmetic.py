import time

import pytest
import torch
from torch import nn

from convmae.benchmarks.arithmetic import count_macs, matrix_product_peak


def test_multiply_accumulates_are_counted():
    layers = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(16, 5, bias=False)).to("meta")
    images = torch.empty(2, 3, 16, 16, device="meta")
    assert count_macs(lambda: layers(images)) == 2 * (8 * 16 * 48 + 8 * 16 * 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_no_slower_than_a_product(dtype):
    a, b = torch.randn(2, 512, 512).to(dtype).unbind(0)
    a @ b
    peak = matrix_product_peak(torch.device("cpu"), dtype, side=512, rounds=20)
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    assert peak > 0.5 * 20 * 512**3 / (time.perf_counter() - began)
