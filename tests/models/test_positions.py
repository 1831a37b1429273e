import math

import pytest
import torch
from timm.layers import gen_relative_position_index
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

from convmae.models.attention import attend
from convmae.models.positions import (
    DecomposedPositions,
    RelativePositionTable,
    resized_pos_embed,
    sincos_pos_embed,
)


def test_position_embedding_is_the_published_formula():
    height, width, channels = 3, 5, 16
    table = sincos_pos_embed((height, width), channels)[0]
    quarter = channels // 4
    for row in range(height):
        for column in range(width):
            expected = []
            for coordinate in (column, row):
                angles = [coordinate / 10000 ** (i / quarter) for i in range(quarter)]
                expected += [torch.tensor(a).sin() for a in angles] + [torch.tensor(a).cos() for a in angles]
            torch.testing.assert_close(table[row, column], torch.stack(expected), rtol=0, atol=1e-6)


def test_position_embeddings_follow_the_grid():
    table = sincos_pos_embed((14, 14), 32)
    assert torch.equal(resized_pos_embed(table, (14, 14)), table)
    assert resized_pos_embed(table, (7, 20)).shape == (1, 7, 20, 32)
    constant = torch.ones(1, 14, 14, 4)
    torch.testing.assert_close(resized_pos_embed(constant, (9, 30)), torch.ones(1, 9, 30, 4))


def assert_same_gradients(one, other, parameters):
    """Of two results of the same parameters, for one random gradient that comes from above."""
    above = torch.randn_like(other)
    for mine, theirs in zip(
        torch.autograd.grad(one, parameters, above.to(one.dtype)),
        torch.autograd.grad(other, parameters, above),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def looked_up(table, grid):
    """The bias of each pair of tokens by an index into a table (2H - 1, 2W - 1, h), as Swin and BEiT do it."""
    tokens = grid[0] * grid[1]
    index = gen_relative_position_index(grid).flatten()
    return table.flatten(0, 1)[index].view(tokens, tokens, -1).permute(2, 0, 1)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6), (1, 1)])
def test_relative_positions_are_looked_up_in_the_table(grid):
    positions = RelativePositionTable(grid, num_heads=3)
    assert positions(grid).abs().max() == 0  # at first
    torch.nn.init.normal_(positions.table)
    expected = looked_up(positions.table, grid)
    assert torch.equal(positions(grid), expected)
    assert_same_gradients(positions(grid), expected, [positions.table])


def bicubic_weights(old, new):
    """What each of `new` places takes from `old` ones, (new, old): Keys' cubic of -0.75, the borders repeated."""
    weights = torch.zeros(new, old)
    for place in range(new):
        centre = (place + 0.5) * old / new - 0.5
        for source in range(math.floor(centre) - 1, math.floor(centre) + 3):
            distance = abs(centre - source)
            if distance <= 1:
                weight = 1.25 * distance**3 - 2.25 * distance**2 + 1
            else:
                weight = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            weights[place, min(max(source, 0), old - 1)] += weight
    return weights


@pytest.mark.parametrize("other", [(6, 6), (2, 3), (3, 7), (5, 4)])
def test_a_table_of_another_grid_is_resized_bicubically(other):
    grid = (4, 4)
    positions = RelativePositionTable(grid, num_heads=2)
    torch.nn.init.normal_(positions.table)
    rows, columns = (bicubic_weights(7, 2 * side - 1) for side in other)
    resized = torch.einsum("ya,xb,abh->yxh", rows, columns, positions.table)
    expected = looked_up(resized, other)
    torch.testing.assert_close(positions(other), expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(positions(other), expected, [positions.table])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("grid", "tables"),
    [((4, 4), (4, 4)), ((3, 5), (3, 5)), ((1, 3), (1, 3)), ((4, 6), (7, 3)), ((5, 5), (4, 4))],
)
def test_decomposed_positions_are_timm_s_bias(grid, tables, dtype):
    """The longer queries and keys against softmax attention with the whole bias spelled out."""
    batch, heads, tokens, width = 2, 3, grid[0] * grid[1], 8
    query, key, value = torch.randn(3, batch, heads, tokens, width).unbind(0)
    query, key, value = (x.requires_grad_() for x in (query, key, value))
    positions = DecomposedPositions(tables, width)
    assert max(table.abs().max() for table in positions.parameters()) == 0  # at first
    for table in positions.parameters():
        torch.nn.init.normal_(table, std=0.5)

    longer_query, longer_key = positions.extend(query.to(dtype), key.to(dtype), grid)
    got = attend(longer_query, longer_key, value.to(dtype), scale=1.0)
    bias = get_decomposed_rel_pos_bias(query.flatten(0, 1), positions.height, positions.width, grid, grid)
    scores = query @ key.transpose(-1, -2) / width**0.5 + bias.view(batch, heads, tokens, tokens)
    expected = scores.softmax(-1) @ value

    assert longer_query.dtype is longer_key.dtype is got.dtype is dtype
    assert longer_query.shape[-1] % 8 == 0
    if dtype is torch.float32:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert_same_gradients(got, expected, [query, key, value, *positions.parameters()])
    else:
        torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.1)
