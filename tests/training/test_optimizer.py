import math

import pytest
import torch

import convmae
from convmae import UserError
from convmae.training.optimizer import (
    DetectionOptimizerOptions,
    LarsOptions,
    LayerDecayOptions,
    OptimizerOptions,
    SegmentationOptimizerOptions,
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
    lars = build_optimizer(layer, LarsOptions(base_lr=0.1, momentum=0.8), batch_size=1024)
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
        (DetectionOptimizerOptions(), 25, 0.12),
        (DetectionOptimizerOptions(), 1, 0.12),
        (SegmentationOptimizerOptions(), 127, 1.19),
        (SegmentationOptimizerOptions(), 3, 0.6),
    ],
)
def test_each_recipe_has_its_default_warm_up(options, epochs, warmup):
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    assert build_schedule(optimizer, options, epochs, steps_per_epoch=100).warmup_t == 100 * warmup


def tiny_detector(form, **settings):
    return convmae.create_detector("tiny", form=form, image_size=(64, 64), head_width=16, box_width=16, **settings)


@pytest.mark.parametrize("form", ["paper", "vitdet"])
def test_a_detector_learns_at_the_paper_s_rate_and_its_positions_without_decay(form):
    model = tiny_detector(form)
    optimizer = build_optimizer(model, DetectionOptimizerOptions(), batch_size=32)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm2d)
        for parameter in module.parameters()
    }
    positions = 0
    for name, parameter in model.named_parameters():
        is_position = name == "encoder.pos_embed" or "positions" in name
        positions += is_position
        without = is_position or name.endswith("bias") or id(parameter) in norms
        assert decay.pop(id(parameter)) == (0.0 if without else 0.1), name
    assert not decay
    assert positions == 1 + (2 if form == "paper" else 2 * 4)
    # The paper's: 8e-5 for 32 images, one rate for all layers.
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([8e-5] * len(optimizer.param_groups))
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


@pytest.mark.parametrize("form", ["paper", "vitdet"])
def test_the_layers_of_a_detector_s_encoder_learn_at_their_own_rates(form):
    """As ViTDet counts: 0 before the transformer, i + 1 for block i, all after the encoder at the full rate."""
    depth, options = 3, DetectionOptimizerOptions(base_lr=1.6e-3, layer_decay=0.8, warmup_epochs=0)
    model = tiny_detector(form, depths=(1, 1, depth))
    optimizer = build_optimizer(model, options, batch_size=16)
    build_schedule(optimizer, options, epochs=3, steps_per_epoch=4).step_update(0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {name: 1e-4 * 0.8 ** (depth + 1 - detector_layer(name, depth)) for name in names.values()}
    assert found == pytest.approx(expected)
    tables = {"encoder.window_positions.table", "encoder.global_positions.table"}
    assert tables <= found.keys() if form == "paper" else "encoder.stage3.1.attn.positions.width" in found


def detector_layer(name, depth):
    """The layer id of a detector's parameter as ViTDet's published code counts: 0 to depth + 1."""
    if not name.startswith("encoder."):
        return depth + 1
    return int(name.split(".")[2]) + 1 if name.startswith("encoder.stage3.") else 0


def test_vitdet_s_schedule_is_a_warm_up_and_two_steps():
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    options = DetectionOptimizerOptions(schedule="steps", warmup_epochs=250 / 7375)
    schedule = build_schedule(optimizer, options, epochs=25, steps_per_epoch=7375)  # 184,375 iterations
    expected = {
        0: 0.0,
        125: 0.5,
        249: 0.996,
        250: 1.0,
        163_888: 1.0,
        163_889: 0.1,
        177_545: 0.1,
        177_546: 0.01,
        184_374: 0.01,
    }
    for step, rate in expected.items():
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate), step


@pytest.mark.parametrize("steps_at", [(0.0, 0.5), (0.9, 0.5), (0.5, 1.0), (163_889, 177_546)])
def test_steps_outside_the_run_are_refused(steps_at):
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    options = DetectionOptimizerOptions(schedule="steps", steps_at=steps_at)
    with pytest.raises(UserError, match="are no shares of the run: choose 0 < first <= second < 1"):
        build_schedule(optimizer, options, epochs=2, steps_per_epoch=100)


def test_a_detector_s_cosine_ends_at_zero():
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    schedule = build_schedule(optimizer, DetectionOptimizerOptions(), epochs=4, steps_per_epoch=16)
    for step, rate in ((0, 0), (1, 0.5), (2, 1), (2 + 31, 0.5), (64, 0)):
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, abs=1e-9), step


def test_an_unknown_schedule_is_refused():
    adamw = build_optimizer(torch.nn.Linear(2, 2), OptimizerOptions(), 256)
    with pytest.raises(convmae.UserError, match="schedule cannot be 'sawtooth': choose cosine or steps"):
        build_schedule(adamw, DetectionOptimizerOptions(schedule="sawtooth"), 10, 10)


@pytest.mark.parametrize("power", [1.0, 0.9])
def test_segmentation_s_schedule_is_a_warm_up_and_what_remains_of_the_run(power):
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    options = SegmentationOptimizerOptions(min_lr=0.1, power=power)
    schedule = build_schedule(optimizer, options, epochs=127, steps_per_epoch=1263)
    total = 127 * 1263  # about the published 160,000; the warm-up is the published 1500
    expected = {step: step / 1500 for step in (0, 1, 750, 1499)}
    expected |= {step: 0.1 + 0.9 * (1 - step / total) ** power for step in (1500, 1501, 80_000, total - 1)}
    for step, rate in {**expected, total: 0.1}.items():
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, abs=1e-12), step


def test_the_layers_of_a_segmentation_learn_at_their_own_rates():
    """In the warm-up, at its end, half-way and at the end of the run."""
    depth, options = 3, SegmentationOptimizerOptions(warmup_epochs=1)
    model = convmae.create_classifier("tiny", depths=(1, 1, depth), image_size=32, num_classes=5)
    optimizer = build_optimizer(model, options, batch_size=16)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}
    schedule = build_schedule(optimizer, options, epochs=5, steps_per_epoch=8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for step, rate in ((0, 0), (4, 0.5e-4), (8, 0.8e-4), (20, 0.5e-4), (40, 0)):  # 1e-4 for the paper's 16 images
        schedule.step_update(step)
        found = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        expected = {name: rate * 0.75 ** (depth + 1 - published_layer(name, depth)) for name in names.values()}
        assert found == pytest.approx(expected, abs=1e-12), step


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan])
def test_a_power_that_does_not_end_the_run_is_refused(power):
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    with pytest.raises(UserError, match=f"a power of {power:g} is out of range: choose one above 0"):
        build_schedule(optimizer, SegmentationOptimizerOptions(power=power), epochs=10, steps_per_epoch=10)
