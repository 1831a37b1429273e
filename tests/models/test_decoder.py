"""The decoder: mask tokens in the places of what is masked, and nothing of the order of the visible ones."""

import pytest
import torch

from convmae import UserError
from convmae.masking import random_visible
from convmae.models.decoder import Decoder
from convmae.packing import Packing

GRID = (4, 6)


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    decoder = Decoder(in_width=12, outputs=5, grid=GRID, width=16, depth=2, num_heads=4)
    torch.nn.init.normal_(decoder.mask_token)
    return decoder.eval()


@pytest.fixture
def visible():
    return random_visible(2, GRID, 0.75, generator=torch.Generator().manual_seed(1))


def test_it_is_the_blocks_over_tokens_laid_out_one_by_one(decoder, visible):
    """The same computed with a loop over the tokens in place of the scatter."""
    packing = Packing.of(visible)
    latent = torch.randn(2, packing.index.shape[1], 12)
    rows = []
    for image in range(2):
        tokens = decoder.mask_token[0].expand(24, -1).clone()
        for place, token in zip(packing.index[image].tolist(), latent[image], strict=True):
            tokens[place] = decoder.embed(token)
        rows.append(tokens + decoder.pos_embed[0].flatten(0, 1))
    expected = torch.stack(rows)
    for block in decoder.blocks:
        expected = block(expected)
    expected = decoder.prediction(decoder.norm(expected))
    actual = decoder(latent, packing)
    assert actual.shape == (2, 24, 5)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_predicting_some_tokens_is_a_part_of_predicting_all(decoder, visible):
    packing = Packing.of(visible)
    masked = Packing.of(~visible)
    latent = torch.randn(2, packing.index.shape[1], 12)
    every = decoder(latent, packing)
    some = decoder(latent, packing, masked)
    assert some.shape == (2, 18, 5)
    torch.testing.assert_close(some, every.gather(1, masked.index[..., None].expand(-1, -1, 5)), rtol=1e-5, atol=1e-6)


def test_every_parameter_but_the_fixed_positions_learns(decoder, visible):
    packing = Packing.of(visible)
    decoder(torch.randn(2, packing.index.shape[1], 12), packing).square().mean().backward()
    without = [name for name, parameter in decoder.named_parameters() if parameter.grad is None]
    assert without == ["pos_embed"]
    assert not decoder.pos_embed.requires_grad


def test_impossible_settings_are_one_line():
    with pytest.raises(UserError, match="width 16 does not divide into 3 heads"):
        Decoder(12, 5, GRID, width=16, num_heads=3)
    with pytest.raises(UserError, match="a decoder of 0 blocks predicts nothing"):
        Decoder(12, 5, GRID, width=16, depth=0, num_heads=4)
