"""The MAE baseline against the same computed over all patches by timm's own patch embedding."""

import torch
from timm.layers import PatchEmbed

from convmae.benchmarks.vit import MaskedViT
from convmae.masking import random_visible


def test_it_reconstructs_what_timm_s_vit_encodes():
    model = MaskedViT((64, 96), width=32, depth=2, num_heads=4, decoder_width=16, decoder_depth=2, decoder_num_heads=2)
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    visible = random_visible(3, (4, 6), 0.75)
    index = visible.flatten(1).nonzero()[:, 1].view(3, 6)

    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    normalised = (images / 255 - mean) / std
    embed = model.vit.patch_embed
    assert isinstance(embed, PatchEmbed)
    tokens = embed.proj(normalised).flatten(2).transpose(1, 2) + model.pos_embed.flatten(1, 2)
    tokens = tokens.gather(1, index[..., None].expand(-1, -1, 32))
    latent = model.decoder.embed(model.vit.norm(model.vit.blocks(tokens)))
    everywhere = model.decoder.mask_token.repeat(3, 24, 1)
    everywhere[visible.flatten(1)] = latent.flatten(0, 1)
    everywhere = everywhere + model.decoder.pos_embed.flatten(1, 2)
    for block in model.decoder.blocks:
        everywhere = block(everywhere)
    prediction = model.decoder.prediction(model.decoder.norm(everywhere))

    target = normalised.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = (prediction - target).square()[~visible.flatten(1)].mean()
    torch.testing.assert_close(model(images, visible), expected)


def test_base_is_vit_b():
    with torch.device("meta"):
        model = MaskedViT()
    encoder = sum(p.numel() for p in model.vit.parameters())
    assert encoder == 85_646_592  # timm's vit_base_patch16_224 without class token, positions and head: 85.6 M
    assert sum(p.requires_grad for p in model.vit.parameters()) == len(list(model.vit.parameters()))
