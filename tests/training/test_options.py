"""What training commands take alike is checked once, and the first option that cannot be is named."""

import math
from pathlib import Path

import pytest

from convmae import UserError
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.logging import LoggingOptions
from convmae.training.options import EncoderRunOptions, RunOptions, SupervisedRunOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0: it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulate": -1}, "accumulate is -1"),
        ({"max_skipped": 0}, "max_skipped is 0"),
        ({"evaluate_every_epochs": 0}, "evaluate_every_epochs is 0"),
        ({"logging": LoggingOptions(every_steps=0)}, "logging_every_steps is 0"),
        ({"checkpoint": CheckpointOptions(every_epochs=0)}, "checkpoint_every_epochs is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0: choose it from 0 to less than 1"),
        ({"ema_decay": -0.1}, "ema_decay is -0.1"),
        ({"ema_decay": math.nan}, "ema_decay is nan"),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        SupervisedRunOptions(**{"output": tmp_path, "epochs": 3, "batch_size": 4, **changes})


def test_a_string_will_do_for_the_folder():
    assert RunOptions("runs/x", 3, 4).output == Path("runs/x")


def test_a_run_that_lacks_an_option_does_what_others_do_without_it():
    """Neither is an option where it means nothing: a frozen encoder, a run without a judge."""
    assert (RunOptions("x", 3, 4).grad_checkpointing, RunOptions("x", 3, 4).evaluate_every_epochs) == (False, 1)
    assert EncoderRunOptions("x", 3, 4).evaluate_every_epochs == 1
    with pytest.raises(TypeError, match="grad_checkpointing"):
        RunOptions("x", 3, 4, grad_checkpointing=True)
    with pytest.raises(TypeError, match="evaluate_every_epochs"):
        EncoderRunOptions("x", 3, 4, evaluate_every_epochs=2)
