"""The course of a run, by a job so small that all can be told: what it keeps, averages, judges and restores."""

from dataclasses import dataclass

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from convmae import UserError
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.engine import EngineOptions
from convmae.training.logging import LoggingOptions, read_metrics
from convmae.training.loop import Interrupted
from convmae.training.optimizer import OptimizerOptions
from convmae.training.options import SupervisedRunOptions
from convmae.training.run import Job, Run, StepLoss, divide_batch


@dataclass(frozen=True)
class Closeness:
    """How near the weights are to those that made the data."""

    score: float

    @property
    def figures(self):
        return {"closeness": self.score}


class Line(nn.Module):
    """A batch -> the squared error of a line through it."""

    def __init__(self, line):
        super().__init__()
        self.line = line

    def forward(self, batch):
        x, y = batch
        return StepLoss((self.line(x) - y).square().mean())


class LineJob(Job):
    """Learns y = 3x; judged by closeness to 3, unless `judged` says otherwise."""

    origin, data, contents, unit = "a line", "points", "4 points a batch", "points"

    def __init__(self, judged=True, scores=None):
        torch.manual_seed(0)
        self.network = nn.Linear(1, 1, bias=False)
        self.module = Line(self.network)
        self.figure = "closeness" if judged else None
        self.judged, self.scores, self.calls = judged, list(scores or []), []

    passes = 4

    def batches(self, epoch, first):
        for number in range(first, self.passes):
            x = torch.rand(4, 1, generator=torch.Generator().manual_seed(100 * epoch + number))
            yield x, 3 * x

    def save(self, file, network):
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, file)

    def load(self, file, network):
        network.load_state_dict(load_file(file))

    def judge(self, network):
        if not self.judged:
            return None
        self.calls.append(network.weight.item())
        return Closeness(self.scores.pop(0) if self.scores else 1 / (1 + abs(3 - network.weight.item())))

    def after_epoch(self, epoch, last):
        self.calls.append((epoch, last))


def options(folder, kind=SupervisedRunOptions, **changes):
    settings = {
        "output": folder,
        "epochs": 3,
        "batch_size": 4,
        "optimizer": OptimizerOptions(base_lr=30.0, warmup_epochs=0),
        "engine": EngineOptions("cpu", "float32"),
        "checkpoint": CheckpointOptions(every_epochs=1, keep=10),
        "logging": LoggingOptions(every_steps=1),
    }
    return kind(**{**settings, **changes})


def train(folder, job=None, **changes):
    run = Run(options(folder, **changes), {"data": "points"})
    return run.train(run.start(), job or LineJob())


def weight_in(file):
    return load_file(file)["weight"].item()


def test_it_learns_and_tells(tmp_path, capsys):
    finished = train(tmp_path)
    losses = [record["loss"] for record in read_metrics(tmp_path)]
    assert len(losses) == finished.position.step == 12
    assert losses[-1] < losses[0] / 2
    assert "points_per_second" in read_metrics(tmp_path)[0]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"data": "points"}
    finished.summary("finished", {"own": "row"})
    printed = capsys.readouterr().err
    assert "a line, 0.0 M parameters, on points: 4 points a batch, 3 epochs of 4 steps of 4 points; 1 x cpu" in printed
    for part in ("finished", "own", "row", "12 (0 skipped)", "time"):
        assert part in printed


def test_the_first_of_the_best_models_is_kept_and_what_the_network_ends_with(tmp_path):
    job = LineJob(scores=[0.2, 0.9, 0.9])
    finished = train(tmp_path, job)
    second_epoch = weight_in(tmp_path / "checkpoints/step-00000008/model.safetensors")
    assert weight_in(tmp_path / "best/model.safetensors") == second_epoch == finished.network.weight.item()
    assert finished.checkpoint == tmp_path / "best"
    assert finished.quality == Closeness(0.9)
    assert [record["closeness"] for record in read_metrics(tmp_path) if "closeness" in record] == [0.2, 0.9, 0.9]


def test_a_resumed_run_replaces_its_best_model_by_a_better_one_only(tmp_path):
    train(tmp_path, LineJob(scores=[0.5, 0.8]), epochs=2)
    kept = weight_in(tmp_path / "best/model.safetensors")
    job = LineJob(scores=[0.7, 0.8])  # of the third epoch, and of the best model when it is judged anew
    finished = train(tmp_path, job, epochs=3, resume=True)
    assert weight_in(tmp_path / "best/model.safetensors") == kept == finished.network.weight.item()
    assert finished.quality == Closeness(0.8)
    train(tmp_path, LineJob(scores=[0.9]), epochs=4, resume=True)
    assert weight_in(tmp_path / "best/model.safetensors") == weight_in(
        tmp_path / "checkpoints/step-00000016/model.safetensors"
    )


def test_a_run_that_nothing_judges_keeps_its_newest_checkpoint(tmp_path):
    job = LineJob(judged=False)
    finished = train(tmp_path, job)
    assert finished.quality is None
    assert finished.checkpoint == tmp_path / "checkpoints/step-00000012"
    assert not (tmp_path / "best").exists()
    assert job.calls == [(0, False), (1, False), (2, True)]


def test_evaluations_may_be_rarer_than_epochs_but_the_last_is_judged(tmp_path):
    train(tmp_path, epochs=5, evaluate_every_epochs=2)
    assert [record["epoch"] for record in read_metrics(tmp_path) if "closeness" in record] == [1, 3, 4]


def test_the_average_is_judged_and_kept_and_leaves_training_alone(tmp_path):
    job, plain = LineJob(), LineJob()
    train(tmp_path / "plain", plain)
    finished = train(tmp_path / "run", job, ema_decay=0.6)
    last = tmp_path / "run/checkpoints/step-00000012"
    assert weight_in(last / "model.safetensors") == weight_in(
        tmp_path / "plain/checkpoints/step-00000012/model.safetensors"
    )
    average = weight_in(last / "average.safetensors")
    assert average != weight_in(last / "model.safetensors")
    assert job.calls[-2] == average  # judged before the epoch ends
    assert finished.network.weight.item() in [call for call in job.calls if isinstance(call, float)]


def test_where_nothing_judges_the_average_of_the_end_is_kept(tmp_path):
    finished = train(tmp_path, LineJob(judged=False), ema_decay=0.6)
    average = weight_in(tmp_path / "checkpoints/step-00000012/average.safetensors")
    assert finished.checkpoint == tmp_path / "best"
    assert weight_in(tmp_path / "best/model.safetensors") == average
    with pytest.raises(UserError, match="holds a run with a moving average: give its --ema-decay again"):
        train(tmp_path, LineJob(judged=False), resume=True, epochs=4)


@pytest.mark.parametrize("ema_decay", [None, 0.6])
def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path, ema_decay, at_step):
    train(tmp_path / "straight", ema_decay=ema_decay)
    with at_step(6), pytest.raises(Interrupted, match="stopped at step 6 of 12"):
        train(tmp_path / "broken", ema_decay=ema_decay)
    train(tmp_path / "broken", ema_decay=ema_decay, resume=True)
    for name in ("checkpoints/step-00000012/model.safetensors", "best/model.safetensors"):
        assert weight_in(tmp_path / "straight" / name) == weight_in(tmp_path / "broken" / name)


def test_the_module_with_the_loss_is_what_is_compiled(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    train(tmp_path / "plain", epochs=1)
    assert not compiled
    job = LineJob()
    train(tmp_path / "compiled", job, epochs=1, compile=True)
    assert compiled == [job.module]


def test_passes_of_a_step_are_of_one_epoch(tmp_path):
    assert train(tmp_path / "two", accumulate=2, batch_size=8).position.step == 6
    with pytest.raises(UserError, match=r"points has too few points for a batch of 20 in 5 passes: lower --batch-size"):
        train(tmp_path / "five", accumulate=5, batch_size=20)
    assert not (tmp_path / "five").exists()


@pytest.mark.parametrize(("batch", "processes", "accumulate"), [(256, 1, 1), (4096, 8, 4), (6, 3, 2)])
def test_the_passes_of_all_processes_make_the_batch(batch, processes, accumulate):
    assert divide_batch(batch, processes, accumulate) * processes * accumulate == batch


@pytest.mark.parametrize(("batch", "processes", "accumulate"), [(10, 2, 2), (2, 3, 1), (8, 1, 16)])
def test_a_batch_that_does_not_divide_is_refused(batch, processes, accumulate):
    with pytest.raises(UserError, match=rf"{processes} processes x {accumulate} passes: choose a multiple of"):
        divide_batch(batch, processes, accumulate)
