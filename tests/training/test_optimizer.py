import math

import pytest
import torch

import convmae
from convmae import UserError
from convmae.training.optimizer import (
    LarsOptions,
    LayerDecayOptions,
    OptimizerOptions,
    build_lars,
    build_optimizer,
    build_schedule,
)


def test_biases_norms_and_nothing_else_go_without_decay():
    model = convmae.create_autoencoder("tiny", image_size=32)
    optimizer = build_optimizer(model, OptimizerOptions(), batch_size=2048)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in decay, name
        else:
            without = name.endswith("bias") or ".norm" in name or name.startswith("norm")
            assert decay[id(parameter)] == (0.0 if without else 0.05), name
    assert {group["lr"] for group in optimizer.param_groups} == {1.5e-4 * 8}  # linear scaling: 2048 / 256
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}


def test_the_schedule_is_warm_up_then_half_a_cosine():
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimizerOptions(base_lr=1.0), batch_size=256)
    schedule = build_schedule(optimizer, OptimizerOptions(warmup_epochs=2, min_lr=0.1), epochs=10, steps_per_epoch=5)
    for step in range(50):
        schedule.step_update(step)
        expected = step / 10 if step < 10 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / 40))
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(expected)] * 2


@pytest.mark.parametrize(("epochs", "warmup"), [(1600, 40), (200, 40), (50, 10), (5, 1)])
def test_the_default_warm_up(epochs, warmup):
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimizerOptions(), batch_size=256)
    schedule = build_schedule(optimizer, OptimizerOptions(), epochs, steps_per_epoch=100)
    assert schedule.warmup_t == 100 * warmup


def test_a_warm_up_as_long_as_the_run_is_refused():
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimizerOptions(), batch_size=256)
    with pytest.raises(UserError, match="warm-up of 40 epochs does not fit a run of 30"):
        build_schedule(optimizer, OptimizerOptions(warmup_epochs=40), epochs=30, steps_per_epoch=5)


def published_layer(name, depth):
    """The layer id of a parameter as the published fine-tuning code counts: 0 to depth + 1."""
    _, *parts = name.split(".")
    if name.startswith("encoder."):
        return int(parts[1]) + 1 if parts[0] == "stage3" else 0
    return depth + 1


def test_each_layer_learns_at_its_own_rate():
    depth, options = 3, LayerDecayOptions(warmup_epochs=1, min_lr=1e-5)
    model = convmae.create_classifier("tiny", depths=(1, 1, depth), image_size=32, num_classes=5)
    optimizer = build_optimizer(model, options, batch_size=512)
    schedule = build_schedule(optimizer, options, epochs=3, steps_per_epoch=4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # Half of the warm-up, the peak, the middle of the cosine: the head's rate, of which layers get their share.
    peak = 5e-4 * 512 / 256
    for step, rate in ((2, peak / 2), (4, peak), (8, (peak + 1e-5) / 2)):
        schedule.step_update(step)
        found = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        expected = {name: rate * 0.65 ** (depth + 1 - published_layer(name, depth)) for name in names.values()}
        assert found == pytest.approx(expected)
    assert len(set(found.values())) == depth + 2
    assert found["encoder.pos_embed"] == found["encoder.projection.weight"] == found["encoder.stage2.0.norm1.weight"]
    assert found["fc_norm.weight"] == found["head.bias"] == max(found.values())


def test_with_layer_decay_vectors_and_positions_go_without_weight_decay():
    model = convmae.create_classifier("tiny", image_size=32, num_classes=5)
    optimizer = build_optimizer(model, LayerDecayOptions(weight_decay=0.3), batch_size=256)
    decay = [(p, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(names[id(p)] for p, _ in decay) == sorted(names.values())
    for parameter, value in decay:
        without = parameter.ndim == 1 or names[id(parameter)] == "encoder.pos_embed"
        assert value == (0.0 if without else 0.3), names[id(parameter)]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


@pytest.mark.parametrize("layer_decay", [0.0, 1.1])
def test_a_layer_decay_out_of_range_is_refused(layer_decay):
    model = convmae.create_classifier("tiny", image_size=32)
    with pytest.raises(UserError, match=rf"layer decay of {layer_decay} is out of range"):
        build_optimizer(model, LayerDecayOptions(layer_decay=layer_decay), batch_size=256)


def test_lars_takes_the_published_steps():
    """The published probe's LARS written out: trust ratio 0.001 for the matrix, plain momentum for the bias."""
    layer = torch.nn.Linear(5, 3)
    parameters = [parameter.detach().clone() for parameter in layer.parameters()]
    momenta = [torch.zeros_like(parameter) for parameter in parameters]
    lars = build_lars(layer, LarsOptions(base_lr=0.1, momentum=0.8), batch_size=1024)
    for _ in range(4):
        gradients = [torch.randn_like(parameter) for parameter in parameters]
        for own, gradient in zip(layer.parameters(), gradients, strict=True):
            own.grad = gradient.clone()
        lars.step()
        gradients[0] *= 0.001 * parameters[0].norm() / gradients[0].norm()
        for parameter, momentum, gradient in zip(parameters, momenta, gradients, strict=True):
            momentum.mul_(0.8).add_(gradient)
            parameter -= 0.1 * 1024 / 256 * momentum
        for own, expected in zip(layer.parameters(), parameters, strict=True):
            torch.testing.assert_close(own.detach(), expected)


@pytest.mark.parametrize(
    ("options", "epochs", "warmup"),
    [
        (LayerDecayOptions(), 100, 5),
        (LayerDecayOptions(), 10, 2),
        (LarsOptions(), 90, 10),
        (LarsOptions(), 20, 4),
    ],
)
def test_each_recipe_has_its_default_warm_up(options, epochs, warmup):
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    assert build_schedule(optimizer, options, epochs, steps_per_epoch=100).warmup_t == 100 * warmup
