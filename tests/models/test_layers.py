"""Our layers under torch's names: torch's results, and whatever others put in their place is called."""

import torch
from torch import nn

from convmae.models.layers import Linear, Mlp, initialise_linear


def test_they_compute_what_torch_s_layers_compute():
    """On few and on many rows, for the way that is taken differs."""
    for rows in (3, 1100):
        x = torch.randn(rows, 8)
        layer = Linear(8, 16)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
        mlp = Mlp(8, 32)
        theirs = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        theirs[0].load_state_dict(mlp.fc1.state_dict())
        theirs[2].load_state_dict(mlp.fc2.state_dict())
        torch.testing.assert_close(mlp(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_layers_are_torch_s_to_whoever_looks():
    layer = Mlp(8, 32)
    assert list(layer.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert isinstance(layer.fc1, nn.Linear)
    x, seen = torch.randn(1100, 8), []
    expected = layer(x)
    handle = layer.fc1.register_forward_hook(lambda *_: seen.append("hook"))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    handle.remove()
    layer.fc2 = nn.Sequential(layer.fc2, nn.ReLU())  # as an adapter does
    assert (layer(x) >= 0).all()
    assert seen == ["hook"]


def test_the_start_is_a_truncated_normal_without_bias():
    torch.manual_seed(0)
    layer = Linear(400, 400)
    initialise_linear(layer)
    assert layer.bias.abs().max() == 0
    assert abs(layer.weight.mean().item()) < 2e-4
    assert abs(layer.weight.std().item() - 0.02) < 2e-4
