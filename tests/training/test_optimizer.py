import math

import pytest
import torch

import convmae
from convmae import UserError
from convmae.training.optimizer import OptimizerOptions, build_optimizer, build_schedule


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
