"""What all training commands take alike means the same in each of them."""

from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from convmae.models import encoder
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.logging import read_metrics
from convmae.training.run import Run


class Training(NamedTuple):
    """A command's small run, what it is of, and how many images a step takes."""

    run: str
    data: str
    weights: str | None
    batch_size: int


COMMANDS = {
    "pretrain": Training("small_pretraining", "photos", None, 4),
    "probe": Training("small_probe", "labelled", "autoencoder_file", 8),
    "finetune": Training("small_finetuning", "labelled", "autoencoder_file", 8),
    "detect": Training("small_detection", "coco_scenes", "paper_file", 2),
    "segment": Training("small_segmentation", "ade20k_scenes", "segmenter_file", 2),
}


@pytest.fixture(scope="module", params=COMMANDS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def train(name, request):
    """train(output, **changes) -> the folder of a run of one epoch."""
    command = COMMANDS[name]
    run, data = request.getfixturevalue(command.run), request.getfixturevalue(command.data)
    weights = {} if command.weights is None else {"weights": request.getfixturevalue(command.weights)}
    usual = {"epochs": 1, "batch_size": command.batch_size, "checkpoint": CheckpointOptions(keep=1), **weights}
    return lambda output, **changes: run(data, output, **{**usual, **changes}).folder


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory):
    """The folder of a run without any of these; treat it as read-only."""
    return train(tmp_path_factory.mktemp("runs") / "plain")


def losses_of(folder):
    return [record["loss"] for record in read_metrics(folder) if "loss" in record]


def last_of(folder, file="model.safetensors"):
    """A weights file of the only checkpoint."""
    (checkpoint,) = (folder / "checkpoints").iterdir()
    return load_file(checkpoint / file)


def test_ema_decay_keeps_the_average_and_leaves_training_alone(name, train, plain, tmp_path, same):
    folder = train(tmp_path / "run", ema_decay=0.5)
    assert losses_of(folder) == losses_of(plain)
    file = "head.safetensors" if name == "probe" else "model.safetensors"
    trained, average = last_of(folder, file), last_of(folder, "average.safetensors")
    assert same(trained, last_of(plain, file))
    assert not same(trained, average)
    if name == "probe":  # kept as a classifier, whose head the average is with its statistics
        head = load_file(folder / "model.safetensors")
        weight = average["layer.weight"] / (average["norm.running_var"] + 1e-6).sqrt()
        torch.testing.assert_close(head["head.weight"], weight)
        torch.testing.assert_close(head["head.bias"], average["layer.bias"] - weight @ average["norm.running_mean"])
    else:
        assert same(load_file(folder / "best" / "model.safetensors"), average)


def test_grad_checkpointing_changes_no_loss(name, train, plain, tmp_path, monkeypatch):
    if name == "probe":
        with pytest.raises(TypeError, match="grad_checkpointing"):  # nothing goes back through a frozen encoder
            train(tmp_path / "run", grad_checkpointing=True)
        return
    blocks, original = [], encoder.checkpoint

    def recorded(block, *arguments, **named):
        blocks.append(block)
        return original(block, *arguments, **named)

    monkeypatch.setattr(encoder, "checkpoint", recorded)
    folder = train(tmp_path / "run", grad_checkpointing=True)
    assert len(blocks) >= len(losses_of(plain))
    assert losses_of(folder) == losses_of(plain)


def test_accumulate_makes_a_step_of_several_passes(name, train, plain, tmp_path):
    """Of as many images a pass as before, half the steps."""
    folder = train(tmp_path / "run", batch_size=2 * COMMANDS[name].batch_size, accumulate=2)
    assert len(losses_of(plain)) >= 3
    assert len(losses_of(folder)) == len(losses_of(plain)) // 2
    assert all(0 < loss < 20 for loss in losses_of(folder))


def test_compile_is_of_the_module_with_the_loss(train, plain, tmp_path, monkeypatch):
    compiled, jobs, course = [], [], Run.train
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    monkeypatch.setattr(Run, "train", lambda run, fabric, job: jobs.append(job) or course(run, fabric, job))
    train(tmp_path / "plain")
    assert compiled == []
    folder = train(tmp_path / "compiled", compile=True)
    assert compiled == [jobs[-1].module]
    assert losses_of(folder) == losses_of(plain)
