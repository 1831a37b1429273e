"""The speed baseline computes what the published model computes: same loss, outputs and gradients.

The values in golden/ are outputs of the published implementation on seeded weights, in float32 on a CPU. Its
masks come from `noise`, whose ascending order cut into quarters of 49 tokens gives the visible sets.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from convmae.benchmarks.published import PublishedClassifier, PublishedConvMAE

GOLDEN = Path(__file__).parent.parent / "golden"
GRID, LENGTH, VISIBLE = (14, 14), 196, 49  # 224 / 16 = 14; a quarter of 196 tokens stays visible


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A golden file as its weights and everything else."""
    tensors = load_file(GOLDEN / f"{name}_tiny.safetensors")
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    return weights, {k: v for k, v in tensors.items() if not k.startswith("weights.")}


def normalise(images: Tensor) -> Tensor:
    """uint8 -> float with the mean and standard deviation of ImageNet."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return (images / 255 - mean) / std


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    """rtol 1e-4, atol 1e-5 of the tensor's scale."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * scale, msg=lambda text: f"{what}: {text}")


def tiny_autoencoder(**changes: bool) -> PublishedConvMAE:
    return PublishedConvMAE(
        widths=(16, 24, 48),
        depths=(2, 1, 3),
        num_heads=4,
        decoder_width=32,
        decoder_depth=2,
        decoder_num_heads=4,
        **changes,
    )


@pytest.mark.parametrize(("name", "sets"), [("pretrain", 1), ("complementary", 4)])
def test_autoencoder_matches_golden_values(name: str, sets: int) -> None:
    weights, golden = load(name)
    model = tiny_autoencoder()
    model.load_state_dict(weights)

    order = golden["noise"].argsort(dim=1)[:, : sets * VISIBLE]
    order = torch.cat(order.split(VISIBLE, dim=1))  # (B, sets * K) -> (sets * B, K), set 0 of every image first
    visible = torch.zeros(order.shape[0], LENGTH, dtype=torch.bool).scatter(1, order, True)
    assert torch.equal(visible, golden["mask"] == 0)
    images = normalise(golden["images"]).repeat(sets, 1, 1, 1)

    loss, prediction, latent = model(images, visible.unflatten(1, GRID))
    loss.backward()

    assert_near(loss.detach(), golden["loss"], "loss")
    assert_near(prediction.detach()[:, ::7, ::16], golden["pred_slice"], "prediction")
    rank = order.argsort(dim=1)  # row-major order of the visible tokens, for a latent in the order of the sorted noise
    row_major = golden["latent"].gather(1, rank.unsqueeze(2).expand_as(golden["latent"]))
    assert_near(latent.detach(), row_major, "latent")

    expected = {k.removeprefix("grad_norm."): v for k, v in golden.items() if k.startswith("grad_norm.")}
    gradients = {k: p.grad.norm() for k, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()  # both position embeddings are fixed
    for key, value in expected.items():
        assert_near(gradients[key], value, f"gradient of {key}")


def test_classifier_matches_golden_values() -> None:
    weights, golden = load("classifier")
    model = PublishedClassifier(widths=(16, 24, 48), depths=(2, 1, 3), num_heads=4, num_classes=10)
    model.load_state_dict(weights)
    images = normalise(golden["images"])

    assert_near(model.features(images).detach(), golden["features"], "features")
    logits = model(images)
    assert_near(logits.detach(), golden["logits"], "logits")
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())  # the position embedding too


def test_masked_pixels_do_not_reach_the_latent() -> None:
    torch.manual_seed(0)
    model = tiny_autoencoder()
    images = torch.randn(2, 3, 224, 224)
    visible = torch.zeros(2, LENGTH, dtype=torch.bool)
    visible[:, torch.randperm(LENGTH)[:VISIBLE]] = True
    visible = visible.unflatten(1, GRID)
    pixels = visible.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2).unsqueeze(1)  # (B, 1, 224, 224)

    _, _, latent = model(images, visible)
    _, _, perturbed = model(torch.where(pixels, images, torch.randn_like(images)), visible)
    assert torch.equal(latent, perturbed)


def test_draws_a_mask_and_takes_other_settings() -> None:
    torch.manual_seed(0)
    model = tiny_autoencoder(norm_pix=False, multi_scale=False)
    loss, prediction, latent = model(torch.randn(2, 3, 224, 224))
    loss.backward()
    assert prediction.shape == (2, LENGTH, 768)
    assert latent.shape == (2, VISIBLE, 48)
    assert torch.isfinite(loss)
    assert not any("output_decode" in name for name in model.state_dict())


def test_wrong_number_of_visible_tokens_is_refused() -> None:
    visible = torch.ones(1, *GRID, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="must show 49 tokens"):
        tiny_autoencoder()(torch.zeros(1, 3, 224, 224), visible)


def test_base_has_the_published_size() -> None:
    # Table of sizes of the paper's base model: autoencoder 115.0 M and classifier 85.4 M parameters.
    with torch.device("meta"):
        autoencoder, classifier = PublishedConvMAE(), PublishedClassifier()
    assert sum(p.numel() for p in autoencoder.parameters()) == pytest.approx(115.0e6, abs=0.05e6)
    assert sum(p.numel() for p in classifier.parameters()) == pytest.approx(85.4e6, abs=0.05e6)
