import pytest
import torch

from convmae.training.changes import changed_course, changed_settings, resumed_step
from convmae.training.optimizer import LarsOptions, OptimizerOptions, build_optimizer, build_schedule


def test_each_setting_that_changed_is_a_line():
    before = {
        "epochs": 2,
        "optimizer": {"base_lr": 0.1, "betas": [0.9, 0.95]},
        "output": "a",
        "resume": False,
        "old": 1,
    }
    now = {"epochs": 4, "optimizer": {"base_lr": 0.2, "betas": [0.9, 0.95]}, "output": "b", "resume": True, "new": 1}
    assert changed_settings(before, now) == [
        "epochs was 2 before, is 4 now",
        "optimizer.base_lr was 0.1 before, is 0.2 now",
    ]
    assert changed_settings(before, {**before, "resume": True}) == []
    assert changed_settings({}, now) == []


def stopped(step, epochs, steps_per_epoch, batch_size=256, **state):
    """The training state of a run that was stopped after so many steps."""
    optimizer, schedule = _optimizer_and_schedule(epochs, steps_per_epoch, batch_size)
    schedule.step_update(step - 1)
    return {
        "step": step,
        "steps_per_epoch": steps_per_epoch,
        "contents": "8 images",
        "optimizer": optimizer.state_dict(),
        "random_states": [{}],
        **state,
    }


def _optimizer_and_schedule(epochs, steps_per_epoch, batch_size=256, options=None):
    options = options or OptimizerOptions(base_lr=1.0, warmup_epochs=0)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), options, batch_size)
    return optimizer, build_schedule(optimizer, options, epochs, steps_per_epoch)


def course(restored, epochs, steps_per_epoch, batch_size=256, contents="8 images", processes=1, options=None):
    schedule = _optimizer_and_schedule(epochs, steps_per_epoch, batch_size, options)[1]
    return changed_course(restored, steps_per_epoch, contents, processes, schedule)


@pytest.mark.parametrize("step", [1, 7, 10, 20])
def test_an_unchanged_run_says_nothing(step):
    assert course(stopped(step, 4, 5), 4, 5) == []


def test_more_epochs_lift_the_learning_rate_and_that_is_said():
    """By the cosine's own formula: (1 + cos(pi t / T)) / 2 of the highest."""
    (line,) = course(stopped(20, 4, 5), 8, 5)
    old, new = ((1 + torch.cos(torch.tensor(torch.pi * 19 / total)).item()) / 2 for total in (20, 40))
    assert line.startswith(f"the learning rate at step 20 was {old:.3g} by the schedule before, is {new:.3g} now, ")
    assert line.endswith(f"{new / old:.3g} times as much")
    assert new / old > 80


def test_another_batch_another_number_of_images_and_of_processes():
    restored = stopped(7, 4, 5, random_states=[{}, {}])
    data, steps, processes, rate = course(restored, 4, 10, batch_size=128, contents="9 images")
    assert data == "the data were 8 images before, are 9 images now"
    assert steps == "an epoch was of 5 steps before, is of 10 now: epoch 2 begins again"
    assert processes == "processes were 2 before, are 1 now: what is drawn at random begins anew"
    assert "at step 10 was" in rate
    assert resumed_step(restored, 10) == 10
    assert resumed_step(restored, 5) == 7


def test_a_checkpoint_of_an_earlier_version_and_another_optimiser():
    restored = stopped(10, 4, 5)
    del restored["contents"]
    assert course(restored, 4, 5) == []
    (line,) = course(restored, 4, 5, options=LarsOptions(base_lr=8.0, warmup_epochs=0))
    assert line.startswith("the learning rate at step 10 was")
