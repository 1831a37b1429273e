import pytest
import torch

import convmae
from convmae.models.attention import AttentionOnMaps
from convmae.models.encoder import Downsample, Normalize, merge_cells


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


def windowed(attention, **settings):
    small = {"image_size": (64, 64), "widths": (8, 12, 16), "depths": (1, 1, 4), "num_heads": 2}
    return convmae.ConvViT(**{**small, **settings}, attention=attention)


@pytest.mark.parametrize("positions", ["shared", "own", "decomposed"])
@pytest.mark.parametrize("global_blocks", [(), (0, 3), (0, 1, 2, 3)])
def test_one_window_over_the_map_without_positions_changes_nothing(positions, global_blocks):
    plain = windowed(None)
    model = windowed(AttentionOnMaps(positions, 4, global_blocks, (4, 4)))
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all("positions." in name for name in result.missing_keys)  # zero at first
    shared = 1 if len(global_blocks) in (0, 4) else 2
    assert len(result.missing_keys) == {"shared": shared, "own": 4, "decomposed": 8}[positions]
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), plain(images))


@pytest.mark.parametrize("positions", ["shared", "own", "decomposed"])
def test_windows_of_other_sizes_than_the_map_s(positions):
    """Without a global block, what a token sees ends at its window and the convolutions' reach."""
    apart = windowed(AttentionOnMaps(positions, 3, (), (4, 4)))
    together = windowed(AttentionOnMaps(positions, 3, (2,), (4, 4)))
    for size in ((64, 64), (48, 160), (112, 16)):
        for model, everywhere in ((apart, False), (together, True)):
            images = torch.randn(1, 3, *size, requires_grad=True)
            y = model(images)
            assert y.shape == (1, size[0] // 16, size[1] // 16, 16)
            y[0, 0, 0].sum().backward()
            seen = images.grad[0].abs().amax(dim=0) > 0
            beyond = torch.ones_like(seen)
            beyond[: 48 + 32, : 48 + 32] = False  # 5x5 kernels at strides 4 and 8 reach less than 32 pixels
            assert seen[:48, :48].all()
            assert bool(seen[beyond].any()) is (everywhere and bool(beyond.any()))


@pytest.mark.parametrize("attention", [None, "shared", "own", "decomposed"])
def test_gradient_checkpointing_changes_no_gradient(attention):
    if attention is not None:
        attention = AttentionOnMaps(attention, 3, (1,), (4, 4))
    model = windowed(attention, drop_path=0.5).train()
    for name, parameter in model.named_parameters():
        if "positions." in name:
            torch.nn.init.normal_(parameter)
    images, outputs, gradients = torch.randn(2, 3, 64, 96), [], []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(1)  # of the dropped paths
        outputs.append(model(images))
        outputs[-1].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert torch.equal(*outputs)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_layer_scale_and_epsilon_are_the_transformer_s():
    plain = windowed(None)
    model = windowed(AttentionOnMaps("own", 0, (0, 1, 2, 3), (4, 4), layer_scale=0.5, norm_eps=1e-3))
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    scales = {f"stage3.{block}.{scale}.gamma" for block in range(4) for scale in ("ls1", "ls2")}
    assert set(missing) == scales | {f"stage3.{block}.attn.positions.table" for block in range(4)}
    epsilons = {name: module.eps for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    assert {eps for name, eps in epsilons.items() if name.startswith("stage3")} == {1e-3}
    assert {eps for name, eps in epsilons.items() if not name.startswith("stage3")} == {1e-5}
    with torch.no_grad():
        for block in plain.stage3:
            block.norm1.eps = block.norm2.eps = 1e-3
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.mul_(0.5)
                layer.bias.mul_(0.5)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), plain(images))


def test_drop_path_grows_over_windowed_blocks_too():
    model = windowed(AttentionOnMaps("shared", 4, (0,), (4, 4)), drop_path=0.5)
    blocks = [*model.stage1, *model.stage2, *model.stage3]
    assert [block.drop_path.drop_prob for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_the_start_for_training_with_labels_is_the_published_one():
    model = windowed(AttentionOnMaps("decomposed", 4, (0,), (4, 4)), widths=(16, 24, 96))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.initialise_for_supervision()
    for name, value in model.state_dict().items():
        linear = name.startswith(("projection", "stage3")) and not ("norm" in name or "positions" in name)
        if not linear:
            assert torch.equal(value, before[name]), name
        elif name.endswith("bias"):
            assert value.abs().max() == 0, name
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
