import pytest
import torch

import convmae
from convmae.models.encoder import Downsample, Normalize, merge_cells, resized_pos_embed, sincos_pos_embed


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


@pytest.mark.parametrize("factor", [2, 4])
def test_downsample_is_a_strided_convolution(factor):
    layer = Downsample(3, 8, factor)
    x = torch.randn(2, 16, 24, 3)
    kernel = layer.proj.weight.unflatten(1, (factor, factor, 3)).permute(0, 3, 1, 2)
    y = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), kernel, layer.proj.bias, stride=factor).permute(0, 2, 3, 1)
    y = torch.nn.functional.gelu(torch.nn.functional.layer_norm(y, (8,), layer.norm.weight, layer.norm.bias, eps=1e-5))
    torch.testing.assert_close(layer(x), y)


def test_merge_cells_keeps_row_column_channel_order():
    x = torch.arange(2 * 4 * 2.0).view(1, 2, 4, 2)  # (B, H, W, C)
    merged = merge_cells(x, 2)
    assert merged.shape == (1, 1, 2, 8)
    assert merged[0, 0, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


def test_normalize_undoes_itself():
    images = torch.randint(0, 256, (2, 5, 4, 4), dtype=torch.uint8)
    for channels in (3, 5):
        layer = Normalize(channels)
        torch.testing.assert_close(layer.undo(layer(images[:, :channels])), images[:, :channels] / 255)


def test_layer_norm_eps_are_the_published_ones():
    model = convmae.create_autoencoder("tiny", image_size=32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            convolutional = "downsample" in name or "stage1" in name or "stage2" in name
            assert module.eps == (1e-5 if convolutional else 1e-6), name


def test_initialisation_follows_the_recipe():
    model = convmae.create_autoencoder("tiny", image_size=32)
    encoder = model.encoder

    def xavier_bound(weight):
        return (6 / sum(weight.shape)) ** 0.5

    for linear in (
        encoder.projection,
        encoder.stage3[0].attn.qkv,
        model.decoder.prediction,
        encoder.downsample3.proj,
    ):
        bound = xavier_bound(linear.weight)
        assert 0.95 * bound < linear.weight.abs().max() <= bound
    for linear in (encoder.projection, encoder.stage3[0].mlp.fc1, model.decoder.embed):
        assert linear.bias.abs().max() == 0
    # torch's convolutions: uniform within 1 / sqrt(fan in), the bias included
    for linear in (
        encoder.downsample1.proj,
        encoder.stage1[0].pointwise1,
        encoder.stage2[0].mlp.fc2,
        model.project1,
    ):
        bound = linear.weight.shape[1] ** -0.5
        assert 0.9 * bound < linear.weight.abs().max() <= bound
        assert 0 < linear.bias.abs().max() <= bound
    assert 0.015 < model.decoder.mask_token.std() < 0.025
    assert not encoder.pos_embed.requires_grad


def test_the_classifier_trains_its_positions_and_takes_any_size():
    model = convmae.create_classifier("tiny", image_size=64, num_classes=3)
    assert model.encoder.pos_embed.requires_grad
    for size in ((64, 64), (32, 96)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 3)
    with pytest.raises(convmae.UserError, match="not divisible by 16"):
        model(torch.randn(1, 3, 60, 64))


def test_drop_path_grows_linearly_over_all_blocks():
    model = convmae.create_classifier("tiny", image_size=32, drop_path=0.5)  # 1 + 1 + 4 blocks
    blocks = [*model.encoder.stage1, *model.encoder.stage2, *model.encoder.stage3]
    assert [block.drop_path.drop_prob for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
