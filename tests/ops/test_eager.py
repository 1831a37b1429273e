"""Our own operations run where a CPU computes at once, and nowhere else."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from convmae.ops.eager import computes_on_cpu

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def test_a_plain_tensor_on_the_cpu_is_computed():
    assert computes_on_cpu(torch.ones(2))
    assert computes_on_cpu(torch.nn.Parameter(torch.ones(2)))


def test_without_values_or_without_onednn_nothing_is():
    assert not computes_on_cpu(torch.ones(2, device="meta"))
    with FakeTensorMode():
        assert not computes_on_cpu(torch.ones(2))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not computes_on_cpu(torch.ones(2))


def test_whoever_records_gets_torch_s_operations():
    def own_way(x):
        return x + int(computes_on_cpu(x))

    x = torch.zeros(1)
    assert own_way(x) == 1
    assert torch.compile(own_way, backend="eager", fullgraph=True)(x) == 0
    assert torch.jit.trace(own_way, x, check_trace=False)(x) == 0
