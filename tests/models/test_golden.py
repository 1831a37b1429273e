"""Parity with the published implementation (the golden values), through the public loading function.

The tolerance is the golden files' own: rtol 1e-4, atol 1e-5 of a tensor's scale, in float32.
"""

import pytest
import torch

import convmae
from convmae import weights

FILES = ["pretrain_tiny", "complementary_tiny"]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * max(expected.abs().max().item(), 1e-30))


def published_weights(golden):
    return {name.removeprefix("weights."): value for name, value in golden.items() if name.startswith("weights.")}


def visible_of(golden):
    """The mask of the golden file, 1 = masked, as our visible map."""
    return golden["mask"].unflatten(1, (14, 14)) == 0


def row_major_latent(golden):
    """The golden latent is in the order of the sorted noise: reorder it."""
    order = golden["ids_restore"].argsort(dim=1)
    sets = golden["latent"].shape[0] // order.shape[0]
    kept = torch.cat(order[:, : 49 * sets].split(49, dim=1))
    rows = kept.argsort(dim=1)
    return golden["latent"].gather(1, rows[..., None].expand_as(golden["latent"]))


@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
@pytest.mark.parametrize("name", FILES)
def test_autoencoder_matches_the_published_code(golden, name, dense):
    golden = golden(name)
    model = convmae.load({"model": published_weights(golden)}, num_heads=4, decoder_num_heads=4, dense=dense)
    visible = visible_of(golden)

    output = model(golden["images"], visible=visible)
    output.loss.backward()

    assert_close(output.loss, golden["loss"])
    assert_close(output.prediction[:, ::7, ::16], golden["pred_slice"])
    assert_close(model.encode(golden["images"], visible), row_major_latent(golden))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: grad.norm() for name, grad in weights.to_published(gradients).items()}
    expected = {n.removeprefix("grad_norm."): v for n, v in golden.items() if n.startswith("grad_norm.")}
    assert norms.keys() == expected.keys()
    for parameter, value in expected.items():
        torch.testing.assert_close(
            norms[parameter], value, rtol=1e-4, atol=1e-5, msg=lambda m, p=parameter: f"{p}: {m}"
        )


def test_classifier_matches_the_published_code(golden):
    golden = golden("classifier_tiny")
    model = convmae.load(published_weights(golden), num_heads=4).eval()
    features = model.forward_features(golden["images"])
    assert_close(model.forward_head(features, pre_logits=True), golden["features"])
    assert_close(model(golden["images"]), golden["logits"])
