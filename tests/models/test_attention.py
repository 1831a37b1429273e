import itertools

import pytest
import torch
from timm.layers import gen_relative_position_index

from convmae.masking import random_visible
from convmae.models.attention import Attention, MapAttention, MapBlock, TransformerBlock, attend
from convmae.models.positions import DecomposedPositions, RelativePositionTable
from convmae.packing import Packing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_softmax_of_scaled_products(dtype):
    query, key, value = torch.randn(3, 2, 4, 10, 8).unbind(0)
    expected = ((query @ key.transpose(-1, -2)) / 8**0.5).softmax(-1) @ value
    got = attend(query.to(dtype), key.to(dtype), value.to(dtype)).float()
    torch.testing.assert_close(got, expected, **({} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.03}))


def test_attention_agrees_with_torch_s_module():
    ours, theirs = Attention(16, 4), torch.nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("token", [0, 5, 8])
def test_weights_are_those_by_which_values_are_summed(token):
    attention, x = Attention(16, 4), torch.randn(2, 9, 16)
    query, key, _ = attention.qkv(x).view(2, 9, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
    identity = torch.eye(9).expand(2, 4, 9, 9)  # with these as values, attention returns its weights
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, identity)[:, :, token]
    torch.testing.assert_close(attention.weights(x, token), expected)


def test_large_logits_stay_finite_in_low_precision():
    query = torch.full((1, 1, 4, 64), 300.0)  # products of 64 * 300 * 300 overflow fp16, and scale first must not
    for dtype in (torch.bfloat16, torch.float16):
        scaled = query.to(dtype) / 8
        assert attend(scaled, scaled, scaled).isfinite().all()


def test_a_block_of_some_queries_gives_their_rows_of_the_whole():
    block, x = TransformerBlock(16, 4), torch.randn(3, 12, 16)
    queries = Packing.of(random_visible(3, (3, 4), 0.5))
    whole = block(x)
    expected = torch.stack([rows[index] for rows, index in zip(whole, queries.index, strict=True)])
    torch.testing.assert_close(block(x, queries), expected)


def assert_same_gradients(one, other, parameters):
    """Of two results of the same parameters, for one random gradient that comes from above."""
    above = torch.randn_like(other)
    for mine, theirs in zip(
        torch.autograd.grad(one, parameters, above.to(one.dtype)),
        torch.autograd.grad(other, parameters, above),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("channels", [8, 5])
def test_attention_with_a_bias_a_scale_and_narrow_values(dtype, scale, biased, channels):
    query, key = torch.randn(2, 3, 4, 10, 8).unbind(0)
    value = torch.randn(3, 4, 10, channels)
    bias = torch.randn(4, 10, 10) if biased else None
    scores = (query @ key.transpose(-1, -2)) * (8**-0.5 if scale is None else scale)
    expected = (scores + (bias if biased else 0)).softmax(-1) @ value
    got = attend(query.to(dtype), key.to(dtype), value.to(dtype), bias, scale)
    assert got.dtype is dtype
    assert got.shape == (3, 4, 10, channels)
    tolerance = {} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(got.float(), expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_the_scores_learns(dtype):
    query, key, value = torch.randn(3, 3, 4, 10, 8).to(dtype).unbind(0)
    bias = torch.randn(4, 10, 10, requires_grad=True)
    got = attend(query, key, value, bias)
    scores = query.float() @ key.float().transpose(-1, -2) / 8**0.5
    expected = (scores + bias).softmax(-1) @ value.float()
    above = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, bias, above.to(y.dtype))[0] for y in (got, expected)]
    tolerance = {} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(*gradients, **tolerance)


def looked_up(table, grid):
    """The bias of each pair of tokens by an index into a table (2H - 1, 2W - 1, h), as Swin and BEiT do it."""
    tokens = grid[0] * grid[1]
    index = gen_relative_position_index(grid).flatten()
    return table.flatten(0, 1)[index].view(tokens, tokens, -1).permute(2, 0, 1)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (6, 9), (3, 5), (2, 3)])
def test_windows_attend_each_for_itself(size, decomposed):
    """Window after window of the map, zeros beyond its borders, against all of them in one batch."""
    window, width, heads = 4, 16, 2
    positions = DecomposedPositions((window, window), width // heads) if decomposed else None
    in_windows, whole = MapAttention(width, heads, window, positions), MapAttention(width, heads, 0, positions)
    for parameter in in_windows.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    whole.load_state_dict(in_windows.state_dict())
    bias = None if decomposed else torch.randn(heads, window**2, window**2)
    x = torch.randn(2, *size, width)
    padded = torch.zeros(2, 12, 12, width)
    padded[:, : size[0], : size[1]] = x
    expected = torch.zeros(2, 12, 12, width)
    for row, column in itertools.product(range(0, 12, window), repeat=2):
        part = (slice(None), slice(row, row + window), slice(column, column + window))
        expected[part] = whole(padded[part], bias)
    torch.testing.assert_close(in_windows(x, bias), expected[:, : size[0], : size[1]])


def test_attention_on_a_whole_map_is_attention_over_its_tokens():
    plain, on_map, x = Attention(16, 4), MapAttention(16, 4), torch.randn(2, 3, 5, 16)
    on_map.load_state_dict(plain.state_dict())
    torch.testing.assert_close(on_map(x).flatten(1, 2), plain(x.flatten(1, 2)))
    never = torch.full((4, 15, 15), -torch.inf)  # a bias that lets a token see itself alone: its value goes through
    itself = on_map(x, never.diagonal_scatter(torch.zeros(4, 15), dim1=1, dim2=2))
    torch.testing.assert_close(itself, plain.proj(plain.qkv(x)[..., 32:]))


@pytest.mark.parametrize("window", [0, 4])
def test_a_table_of_its_own_is_the_bias_that_a_block_would_be_given(window):
    grid = (window, window) if window else (5, 3)
    with_table = MapAttention(16, 4, window, RelativePositionTable(grid, 4))
    given = MapAttention(16, 4, window)
    torch.nn.init.normal_(with_table.positions.table)
    given.load_state_dict(with_table.state_dict(), strict=False)
    x = torch.randn(2, 5, 3, 16)
    bias = looked_up(with_table.positions.table, grid)
    torch.testing.assert_close(with_table(x), given(x, bias))
    assert not torch.allclose(with_table(x), given(x), atol=1e-3)
    assert_same_gradients(with_table(x), given(x, bias), [with_table.positions.table])


def test_layer_scale_is_a_factor_of_each_channel_of_a_branch():
    block = MapBlock(16, 4, 2.0, 0.0, MapAttention(16, 4), layer_scale=0.3, norm_eps=1e-2)
    assert torch.equal(block.ls1.gamma, torch.full((16,), 0.3))
    assert torch.equal(block.ls2.gamma, torch.full((16,), 0.3))
    for scale in (block.ls1, block.ls2):
        torch.nn.init.normal_(scale.gamma)
    x = torch.randn(2, 3, 5, 16)

    def normalised(x):
        return torch.nn.functional.layer_norm(x, (16,), eps=1e-2)

    y = x + block.ls1.gamma * block.attn(normalised(x))
    expected = y + block.ls2.gamma * block.mlp(normalised(y))
    torch.testing.assert_close(block(x), expected)
    plain = MapBlock(16, 4, 2.0, 0.0, MapAttention(16, 4))
    assert not any("ls" in name for name in plain.state_dict())
