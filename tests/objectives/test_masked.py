"""The packed way against the dense one, leaks, and the settings of the autoencoder."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convmae
from convmae.masking import complementary_visible, random_visible

SMALL = {
    "widths": (8, 12, 16),
    "depths": (1, 2, 2),
    "num_heads": 2,
    "decoder_width": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def small(**settings):
    return convmae.ConvMAE(**{"image_size": 64, **SMALL, **settings})


def pair(**settings):
    """The packed and the dense way through the same weights."""
    packed, dense = small(**settings), small(**settings, dense=True)
    dense.load_state_dict(packed.state_dict())
    return packed, dense


def assert_same_to(tolerance, actual, expected):
    """Largest difference relative to the tensor's own scale."""
    scale = expected.abs().max().clamp_min(1e-30)
    assert (actual - expected).abs().max() <= tolerance * scale


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(2, 5)),
    batch=st.integers(1, 3),
    ratio=st.floats(0.05, 0.95),
    kernel_size=st.sampled_from([3, 5, 7, 9]),
    multi_scale=st.booleans(),
    norm_pix=st.booleans(),
    in_channels=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_packed_and_dense_agree(grid, batch, ratio, kernel_size, multi_scale, norm_pix, in_channels, seed):
    torch.manual_seed(seed)
    packed, dense = pair(
        image_size=(16 * grid[0], 16 * grid[1]),
        kernel_size=kernel_size,
        multi_scale=multi_scale,
        norm_pix=norm_pix,
        in_channels=in_channels,
    )
    images = torch.randn(batch, in_channels, 16 * grid[0], 16 * grid[1])
    visible = random_visible(batch, grid, ratio)
    outputs = [model(images, visible) for model in (packed, dense)]
    assert_same_to(1e-5, outputs[0].loss, outputs[1].loss)
    assert_same_to(1e-5, outputs[0].prediction, outputs[1].prediction)
    for output in outputs:
        output.loss.backward()
    gradients = [dict(model.named_parameters()) for model in (packed, dense)]
    # Relative to the whole gradient: single ones (the bias of the keys, for one) are zero but for rounding.
    whole = torch.stack([p.grad.norm() for p in dense.parameters() if p.grad is not None]).norm()
    for name, parameter in gradients[0].items():
        if parameter.requires_grad:
            assert (parameter.grad - gradients[1][name].grad).norm() <= 1e-5 * whole, name


@pytest.mark.parametrize("sets", [2, 3, 4])
def test_packed_and_dense_agree_on_complementary_sets(sets):
    packed, dense = pair(complementary_sets=sets)
    images, visible = torch.randn(2, 3, 64, 64), complementary_visible(2, (4, 4), sets)
    first, second = packed(images, visible), dense(images, visible)
    assert first.prediction.shape == (2 * sets, 16, 768)
    assert_same_to(1e-5, first.prediction, second.prediction)
    assert_same_to(1e-5, first.loss, second.loss)


def test_a_complementary_loss_is_the_mean_over_its_sets():
    model = small()
    images, visible = torch.randn(3, 3, 64, 64), complementary_visible(3, (4, 4), 4)
    together = model(images, visible).loss
    apart = torch.stack([model(images, part).loss for part in visible.chunk(4)]).mean()
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize(
    "form",
    [{}, {"dense": True}, {"norm_pix": False}, {"complementary_sets": 3}, {"decoder_depth": 3}, {"mask_stage": 1}],
)
def test_predicting_masked_tokens_only_changes_no_loss_and_no_gradient(form):
    model = small(**form)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    visible = model(images).visible
    outputs, gradients = [], []
    for masked_only in (False, True):
        model.zero_grad()
        outputs.append(model(images, visible, masked_only=masked_only))
        outputs[-1].loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    whole, part = (output.prediction for output in outputs)
    if "mask_stage" not in form:
        whole = whole[~visible.flatten(1)].view(len(visible), -1, 768)
        assert part.shape[1] == (~visible[0]).sum()
    assert_same_to(1e-5, part, whole)
    assert_same_to(1e-5, outputs[1].loss, outputs[0].loss)
    size = torch.stack([gradient.norm() for gradient in gradients[0].values()]).norm()
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-5 * size, name


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kernel_size", [3, 9])
def test_masked_pixels_change_exactly_nothing(dense, kernel_size):
    model = small(dense=dense, kernel_size=kernel_size)
    images, visible = torch.randn(2, 3, 64, 64), random_visible(2, (4, 4), 0.75)
    hidden = ~visible.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    perturbed = torch.where(hidden, torch.randn_like(images) * 100, images)
    assert torch.equal(model.encode(images, visible), model.encode(perturbed, visible))
    assert torch.equal(model(images, visible).prediction, model(perturbed, visible).prediction)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_loss_is_the_error_on_masked_patches(norm_pix):
    model = small(norm_pix=norm_pix)
    images, visible = torch.randn(2, 3, 64, 64), random_visible(2, (4, 4), 0.5)
    output = model(images, visible)
    errors = []
    for b, row, column in itertools.product(range(2), range(4), range(4)):
        if visible[b, row, column]:
            continue
        patch = images[b, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].permute(1, 2, 0).flatten()
        if norm_pix:
            patch = (patch - patch.mean()) / (patch.var(unbiased=True) + 1e-6).sqrt()
        errors.append((output.prediction[b, 4 * row + column] - patch).square().mean())
    torch.testing.assert_close(output.loss, torch.stack(errors).mean())


@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstruct_keeps_visible_pixels_and_denormalises_the_others(norm_pix):
    model = small(norm_pix=norm_pix)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    visible = random_visible(2, (4, 6), 0.5)
    picture = model.reconstruct(images, visible)
    seen = visible.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(images)
    torch.testing.assert_close(picture[seen], images[seen] / 255, rtol=0, atol=1e-5)
    # A decoder that predicts its target exactly must give back the image; the target of masked patches is known.
    patches = model.patchify(images).flatten(2)
    target = patches
    if norm_pix:
        target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    model.decoder.forward = lambda latent, packing, predicted: target
    torch.testing.assert_close(model.reconstruct(images, visible), images / 255, rtol=0, atol=1e-4)
    assert model(images, visible).loss < 1e-10


def test_uint8_images_are_normalised_by_the_model():
    model = small()
    images, visible = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), random_visible(2, (4, 4))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(model(images, visible).loss, model((images / 255 - mean) / std, visible).loss)


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (128, 160)])
def test_inputs_of_another_size_than_the_model_s(size):
    packed, dense = pair()
    images = torch.randn(2, 3, *size)
    visible = packed.draw_visible(images)
    assert visible.shape == (2, size[0] // 16, size[1] // 16)
    assert_same_to(1e-5, packed(images, visible).prediction, dense(images, visible).prediction)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"multi_scale": False},
        {"complementary_sets": 4},
        {"mask_stage": 1},
        {"masked_convolution": False},
        {"mask_ratio": 0.5, "in_channels": 6},
    ],
)
def test_every_trainable_parameter_learns_and_loss_falls(settings):
    model = small(**settings)
    coarse = torch.randn(4, settings.get("in_channels", 3), 8, 8)
    images = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator()
    losses = []
    for _ in range(30):
        output = model(images, generator=generator.manual_seed(0))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_drawn_masks_follow_the_generator():
    model, images = small(), torch.randn(2, 3, 64, 64)
    drawn = [model(images, generator=torch.Generator().manual_seed(seed)).visible for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_torch_compile_finds_no_graph_break():
    torch.compiler.reset()
    for form in ({}, {"complementary_sets": 4}):
        model = small(**form)
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for masked_only in (False, True):
            torch.manual_seed(3)
            loss = compiled(images, masked_only=masked_only).loss
            loss.backward()
            torch.manual_seed(3)
            torch.testing.assert_close(loss, model(images).loss)


def test_torch_compile_takes_batches_of_any_size():
    torch.compiler.reset()
    model = small()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        images = torch.randn(batch, 3, 64, 64)
        torch.manual_seed(3)
        loss = compiled(images, masked_only=True).loss
        loss.backward()
        torch.manual_seed(3)
        torch.testing.assert_close(loss, model(images).loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 100}, "100x100 is not divisible by 16"),
        ({"image_size": (64, 40)}, "64x40 is not divisible by 16"),
        ({"image_size": 16}, "single token"),
        ({"mask_ratio": 1.0}, r"outside \(0, 1\)"),
        ({"kernel_size": 4}, "not odd"),
        ({"num_heads": 3}, "does not divide into 3 heads"),
        ({"decoder_num_heads": 5}, "does not divide into 5 heads"),
        ({"decoder_depth": 0}, "decoder of 0 blocks"),
        ({"mask_stage": 2}, "mask stage 2"),
        ({"mask_stage": 1, "complementary_sets": 4}, "drop one option"),
        ({"complementary_sets": 1}, "1 complementary sets"),
        ({"complementary_sets": 17}, "choose 2 to 16"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(convmae.UserError, match=message) as error:
        small(**settings)
    assert "\n" not in str(error.value)


def test_a_visible_map_of_another_grid_is_refused():
    with pytest.raises(convmae.UserError, match=r"pass \(2, 4, 4\)"):
        small()(torch.randn(2, 3, 64, 64), random_visible(2, (3, 4)))
    with pytest.raises(convmae.UserError, match=r"pass \(2, 16, 16\)"):
        small(mask_stage=1)(torch.randn(2, 3, 64, 64), random_visible(2, (4, 4)))


def test_everything_may_be_visible():
    packed, dense = pair()
    images, visible = torch.randn(2, 3, 64, 64), torch.ones(2, 4, 4, dtype=torch.bool)
    assert packed(images, visible).loss == 0
    assert packed(images, visible, masked_only=True).loss == 0
    assert_same_to(1e-5, packed.encode(images, visible), dense.encode(images, visible))
