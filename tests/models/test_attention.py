import pytest
import torch

from convmae.masking import random_visible
from convmae.models.attention import Attention, TransformerBlock, attend
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
