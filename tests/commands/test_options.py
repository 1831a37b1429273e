"""Options that commands share: once in the code, flat in signature, help, YAML and Python call."""

import inspect
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import convmae
from convmae import UserError
from convmae.commands import COMMANDS, command
from convmae.commands.options import BatchOptions, CropOptions, flat_settings, spread
from convmae.training.engine import EngineOptions
from convmae.training.options import EncoderRunOptions, RunOptions, SupervisedRunOptions


@dataclass(frozen=True)
class Inner:
    """A group in a group, which stays one option."""

    depth: int = 1


@dataclass(frozen=True)
class Base:
    """What both know."""

    speed: float
    """Metres a second. It
    may be negative."""
    inner: Inner = Inner()
    """How deep."""


@dataclass(frozen=True)
class Group(Base):
    """With one more."""

    name: str = "nobody"
    """Of the thing."""


@dataclass(frozen=True)
class Deeper(Inner):
    """What one command has instead."""

    width: int = 2


@spread("group")
def example(data: str, group: Group = Group(speed=3.0, inner=Deeper(5)), last: int = 7) -> tuple:
    """Do something.

    Args:
        data: the data.
        last: the last.

    Raises nothing.
    """
    return data, group, last


def test_the_signature_is_flat():
    parameters = inspect.signature(example).parameters
    assert list(parameters) == ["data", "speed", "inner", "name", "last"]
    assert [parameters[name].default for name in ("speed", "name")] == [3.0, "nobody"]
    assert parameters["inner"].annotation is Deeper  # the command's own
    assert parameters["speed"].annotation is float
    assert example.__name__ == "example"


def test_a_call_gathers_the_group():
    assert example("x") == ("x", Group(3.0, Deeper(5), "nobody"), 7)
    assert example("x", 1.0, name="me", last=8) == ("x", Group(1.0, Deeper(5), "me"), 8)
    with pytest.raises(TypeError, match="hight"):
        example("x", hight=3)
    with pytest.raises(TypeError, match="data"):
        example()


def test_the_docstring_explains_every_option():
    assert inspect.getdoc(example) == inspect.cleandoc(
        """Do something.

        Args:
            data: the data.
            last: the last.
            speed: metres a second. It may be negative.
            inner: how deep.
            name: of the thing.

        Raises nothing.
        """
    )


TRAINING = {
    "pretrain": EncoderRunOptions,
    "probe": RunOptions,
    "finetune": SupervisedRunOptions,
    "detect.train": SupervisedRunOptions,
    "segment.train": SupervisedRunOptions,
}


@pytest.mark.parametrize(("name", "group"), TRAINING.items())
def test_training_commands_take_the_same_options_under_the_same_explanation(name, group):
    function = command(name)
    parameters = inspect.signature(function).parameters
    assert {field.name for field in fields(group)} <= parameters.keys()
    text = inspect.getdoc(function)
    assert "seed: of weights, order, and all that is drawn at random." in text
    assert "ema_decay: keep a moving average of the weights" in text
    if name != "probe":
        assert "weights" in parameters
        assert "grad_checkpointing: compute the encoder's blocks twice, for less memory." in text


@pytest.mark.parametrize("name", ["predict", "embed", "neighbours"])
def test_commands_that_use_a_model_share_how_images_are_read_and_cropped(name):
    parameters = inspect.signature(command(name)).parameters
    for field in (*fields(BatchOptions), *fields(CropOptions)):
        assert field.name in parameters


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(UserError, match="batch_size is 0: it must be at least 1"):
        BatchOptions(batch_size=0)


def test_settings_of_a_run_are_flat_and_plain():
    options = SupervisedRunOptions(Path("runs/x"), 3, 8)
    settings = flat_settings({"data": Path("photos"), "options": options, "drop_path": 0.1})
    assert (settings["data"], settings["output"], settings["epochs"], settings["drop_path"]) == (
        "photos",
        "runs/x",
        3,
        0.1,
    )
    assert settings["engine"] == {"accelerator": "auto", "precision": "auto", "workers": None} | {
        "devices": EngineOptions().devices,
        "num_nodes": 1,
    }
    assert "options" not in settings


def test_each_command_is_named_once_and_found():
    for name, entry in COMMANDS.items():
        found = getattr(convmae, name)
        if isinstance(entry, str):
            assert found is command(entry)
            assert found.__name__ == name
        else:
            for part, module in entry.items():
                if part != "_help":
                    assert command(module) is getattr(found, module.rpartition(".")[2])
        assert name in dir(convmae)
    with pytest.raises(AttributeError, match="'dance'"):
        convmae.dance  # noqa: B018
