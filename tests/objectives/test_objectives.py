"""What pretraining asks of every objective."""

import inspect

import pytest
import torch

from convmae.models.config import EncoderConfig
from convmae.objectives import OBJECTIVES

SMALL = EncoderConfig(image_size=(64, 64), widths=(16, 24, 32), depths=(1, 1, 2), num_heads=2)


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    made = OBJECTIVES[request.param]
    own = {name: value for name, value in made.tiny.items() if name in inspect.signature(made).parameters}
    return made(encoder=SMALL, **own)


def test_its_name_is_that_of_the_table(objective):
    assert OBJECTIVES[objective.kind] is type(objective)
    assert objective.description["kind"] == objective.kind
    assert objective.description["encoder"] == SMALL.settings


def test_a_step_learns_and_may_be_followed(objective):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    loss = objective.training_loss(images).loss
    loss.backward()
    assert loss.ndim == 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.encoder.parameters())
    objective.after_step(1)


def test_its_pictures_are_the_same_each_time_and_change_nothing(objective):
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    for training in (True, False):
        objective.train(training)
        first, second = objective.examples(images), objective.examples(images)
        assert objective.training is training
        visible, made = first
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert visible.dtype is torch.bool
        assert visible.shape == (2, 4, 6)
        assert made.shape == images.shape
        assert 0 <= made.min() <= made.max() <= 1
