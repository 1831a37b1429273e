import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convmae.masking import random_visible
from convmae.ops.masked_depthwise import masked_depthwise, masked_depthwise_dense
from convmae.packing import Packing


def by_definition(x, weight, bias, visible):
    """sum over the kernel of weight * masked neighbour, in plain loops over the kernel's positions."""
    margin = weight.shape[-1] // 2
    padded = torch.nn.functional.pad(x * visible[..., None], (0, 0, margin, margin, margin, margin))
    height, width = x.shape[1:3]
    out = bias.expand_as(x).clone()
    for row in range(weight.shape[-1]):
        for column in range(weight.shape[-1]):
            out += weight[:, 0, row, column] * padded[:, row : row + height, column : column + width]
    return out


@pytest.mark.parametrize("size", [3, 5, 7, 9])
def test_the_dense_form_is_the_definition(size):
    x, visible = torch.randn(2, 8, 12, 3), torch.rand(2, 8, 12) < 0.5
    weight, bias = torch.randn(3, 1, size, size), torch.randn(3)
    torch.testing.assert_close(
        masked_depthwise_dense(x, weight, bias, visible),
        by_definition(x, weight, bias, visible),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (3, 5, 8, 2), (2, 40, 33, 130)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dense_gradients_are_those_of_the_definition(size, shape, dtype):
    make = lambda *shape: torch.randn(*shape, dtype=dtype).requires_grad_()  # noqa: E731
    inputs = [make(*shape), make(shape[-1], 1, size, size), make(shape[-1])]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    output = masked_depthwise_dense(*inputs)
    upstream = torch.randn_like(output)
    got = torch.autograd.grad(output, inputs, upstream)
    everywhere = torch.ones(shape[:3], dtype=torch.bool)
    wanted = torch.autograd.grad(by_definition(*exact, everywhere), exact, upstream.double())
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype is dtype
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


def test_frozen_dense_weights_get_no_gradient():
    x, weight, bias = torch.randn(1, 4, 4, 2), torch.randn(2, 1, 3, 3), torch.randn(2, requires_grad=True)
    masked_depthwise_dense(x, weight, bias).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(bias.grad, torch.full((2,), 16.0))


@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    side=st.sampled_from([1, 2, 4]),
    size=st.sampled_from([3, 5, 7, 9]),
    ratio=st.floats(0.05, 0.95),
)
def test_the_packed_form_agrees_gradients_included(batch, grid, side, size, ratio):
    packing = Packing.of(random_visible(batch, grid, ratio))
    cells = packing.visible.repeat_interleave(side, 1).repeat_interleave(side, 2)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, weight, bias = make(batch, grid[0] * side, grid[1] * side, 3), make(3, 1, size, size), make(3)
    expected = packing.pack(masked_depthwise_dense(x, weight, bias, cells))
    packed = masked_depthwise(packing.pack(x), weight, bias, packing)
    torch.testing.assert_close(packed, expected)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, weight, bias), upstream)
    got = torch.autograd.grad(packed, (x, weight, bias), upstream)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_against_finite_differences():
    packing = Packing.of(random_visible(2, (2, 2), 0.5))
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    assert torch.autograd.gradcheck(
        lambda x, w, b: masked_depthwise(x, w, b, packing), (make(2, 2, 2, 2, 2), make(2, 1, 3, 3), make(2))
    )


def test_bf16_stays_close_to_float32():
    packing = Packing.of(random_visible(4, (7, 7), 0.75))
    x, weight, bias = torch.randn(4, 12, 4, 4, 16), torch.randn(16, 1, 5, 5), torch.randn(16)
    weights = [weight.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = masked_depthwise(x, weights[0], bias, packing)
    rounded = masked_depthwise(x.bfloat16(), weights[1], bias, packing)
    # bf16 has 8 bits of mantissa: inputs are off by 2^-9 relative, sums of 25 terms by a little more.
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.1)
    exact.square().sum().backward()
    rounded.float().square().sum().backward()
    error = (weights[0].grad - weights[1].grad).norm() / weights[0].grad.norm()
    assert error < 0.01
