import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from convmae.models.layers import Linear, Mlp
from convmae.ops import linear as module
from convmae.ops.linear import linear, mlp

# What each type rounds to, relative to the norm: 2^-24 and 2^-9, times a few for the sums in another order.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def plain_mlp(x, weight1, bias1, weight2, bias2):
    return functional.linear(functional.gelu(functional.linear(x, weight1, bias1)), weight2, bias2)


def leaf(*shape, dtype=torch.float32):
    values = torch.randn(*shape, dtype=torch.float64) / shape[-1] ** 0.5
    return values.to(dtype).requires_grad_()


def assert_same(mine, theirs, tolerance):
    for got, wanted in zip(mine, theirs, strict=True):
        assert got.shape == wanted.shape
        assert (got.double() - wanted.double()).norm() <= tolerance * wanted.double().norm()


def assert_agrees(own, torchs, inputs):
    """Output and gradients of both, against torch's in float64."""
    tolerance = TOLERANCES[inputs[0].dtype]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    got, wanted = own(*inputs), torchs(*exact)
    assert got.dtype is inputs[0].dtype
    assert got.is_contiguous()
    upstream = torch.randn_like(got)
    assert_same([got], [wanted], tolerance)
    gradients = torch.autograd.grad(got, inputs, upstream)
    assert [gradient.dtype for gradient in gradients] == [value.dtype for value in inputs]
    assert_same(gradients, torch.autograd.grad(wanted, exact, upstream.double()), tolerance)


def taken(output):
    """The name of the function that made `output`, behind the views of it."""
    node = output.grad_fn
    while "View" in node.name():
        node = node.next_functions[0][0]
    return node.name()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 5), (3, 343, 7), (2, 16, 40, 33), (1024, 1)])
def test_linear_is_torch_s(dtype, shape):
    inputs = [leaf(*shape, dtype=dtype), leaf(13, shape[-1], dtype=dtype), leaf(13, dtype=dtype)]
    assert_agrees(linear, functional.linear, inputs)
    assert_agrees(linear, functional.linear, inputs[:2])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 5), (3, 343, 7), (2, 16, 40, 33), (9001, 6)])
def test_the_mlp_is_torch_s(dtype, shape):
    width = shape[-1]
    inputs = [leaf(*shape, dtype=dtype)]
    inputs += [leaf(*size, dtype=dtype) for size in ((19, width), (19,), (width + 2, 19), (width + 2,))]
    assert_agrees(mlp, plain_mlp, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_ways_are_taken_where_they_pay(dtype):
    weights = [leaf(8, 8, dtype=dtype), leaf(8, dtype=dtype)]
    assert taken(linear(leaf(1100, 8, dtype=dtype), *weights)) == "_LinearBackward"
    assert taken(mlp(leaf(1100, 8, dtype=dtype), *weights, *weights)) == "_MLPBackward"
    assert taken(linear(leaf(20, 8, dtype=dtype), *weights)) == "AddmmBackward0"
    assert taken(linear(leaf(1100, 8, dtype=torch.float64), *(w.double() for w in weights))) == "AddmmBackward0"
    with torch.backends.mkldnn.flags(enabled=False):
        assert taken(linear(leaf(1100, 8, dtype=dtype), *weights)) == "AddmmBackward0"


def test_autocast_is_torch_s():
    inputs = [leaf(1100, 24), leaf(40, 24), leaf(40), leaf(24, 40), leaf(24)]
    for own, torchs, count in ((linear, functional.linear, 3), (mlp, plain_mlp, 5)):
        with torch.autocast("cpu", torch.bfloat16):
            got, wanted = own(*inputs[:count]), torchs(*inputs[:count])
        assert got.dtype is wanted.dtype is torch.bfloat16
        assert "Addmm" not in taken(got)
        upstream = torch.randn_like(got)
        gradients = torch.autograd.grad(got, inputs[:count], upstream)
        assert all(gradient.dtype is torch.float32 for gradient in gradients)
        assert_same([got, *gradients], [wanted, *torch.autograd.grad(wanted, inputs[:count], upstream)], 1e-2)
    with torch.autocast("cpu", torch.float16):
        assert linear(*inputs[:3]).dtype is torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*(value.double() for value in inputs[:3])).dtype is torch.float64


@pytest.mark.parametrize("trained", [[0], [1], [2], [3], [4], [1, 3], [0, 2, 4]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_frozen_gets_no_gradient(trained, dtype):
    inputs = [leaf(*shape, dtype=dtype) for shape in ((1100, 8), (16, 8), (16,), (8, 16), (8,))]
    for number, value in enumerate(inputs):
        value.requires_grad_(number in trained)
    mlp(*inputs).sum().backward()
    exact = [value.detach().double().requires_grad_() for value in inputs]
    plain_mlp(*exact).sum().backward()
    for number, (value, reference) in enumerate(zip(inputs, exact, strict=True)):
        if number in trained:
            assert_same([value.grad], [reference.grad], TOLERANCES[dtype])
        else:
            assert value.grad is None


def test_any_strides_and_weights_used_twice():
    x, weight = leaf(60, 12, 40), leaf(12, 12)
    double_x, double_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()

    def twice(function, x, weight):
        return function(function(x.transpose(1, 2)[:, ::2], weight), weight)

    twice(linear, x, weight).sum().backward()  # the gradient of a sum has no strides at all
    twice(functional.linear, double_x, double_weight).sum().backward()
    assert_same([x.grad, weight.grad], [double_x.grad, double_weight.grad], 2e-6)


def test_empty_batches():
    x, weight, bias = leaf(1, 6)[:0], leaf(8, 6), leaf(8)
    assert linear(x, weight, bias).shape == (0, 8)
    assert mlp(x, weight, bias, weight.t(), leaf(6)).shape == (0, 6)


def test_mistakes_raise_torch_s_errors():
    with pytest.raises(RuntimeError, match="same dtype"):
        linear(leaf(1100, 8), leaf(8, 8, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError):
        linear(leaf(1100, 8), leaf(8, 9))


def test_nothing_is_kept_without_gradients(monkeypatch):
    kept = []
    monkeypatch.setattr(module._MLP, "apply", lambda *inputs: kept.append(inputs[-1]) or inputs[0])
    with torch.no_grad():
        mlp(leaf(1100, 8), leaf(8, 8), leaf(8), leaf(8, 8), leaf(8))
    assert kept == [False]


def test_checkpointing_and_a_graph_kept_for_a_second_backward():
    layer, x = Mlp(8, 32), leaf(1100, 8)
    output = layer(x)
    first = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
    again = torch.autograd.grad(output.square().sum(), x)
    recomputed = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[0], recomputed[0])


def test_outputs_may_be_changed_in_place():
    x, weight, bias = leaf(1100, 8), leaf(8, 8), leaf(8)
    for layer in (lambda x: linear(x, weight), lambda x: mlp(x, weight, bias, weight, bias)):
        changed = torch.autograd.grad(layer(x).mul_(2).sum(), (x, weight))
        assert_same(changed, torch.autograd.grad(2 * layer(x).sum(), (x, weight)), 1e-6)


def test_meta_fake_compiled_and_exported_tensors_take_torch_s_layers():
    layer = Linear(8, 16).eval()
    x = torch.randn(1100, 8)
    assert Linear(8, 16, device="meta")(torch.empty(1100, 8, device="meta")).shape == (1100, 16)
    exported = torch.export.export(layer, (x,))
    assert "convolution" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), layer(x), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
