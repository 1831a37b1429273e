import json
import math
import sys

import pytest

from convmae import UserError
from convmae.training.logging import LoggingOptions, RunLog, read_metrics


def test_metrics_go_to_the_file_and_to_tensorboard(tmp_path):
    log = RunLog(tmp_path, LoggingOptions())
    log.start(epochs=2, total_steps=4, step=0)
    log.advance(2, 0)
    log.metrics(2, 0, {"loss": 0.5, "lr": 0.1, "images_per_second": 3.0})
    log.finish()
    assert read_metrics(tmp_path) == [{"step": 2, "epoch": 0, "loss": 0.5, "lr": 0.1, "images_per_second": 3.0}]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 0.5)]


def test_the_later_line_of_a_step_counts(tmp_path):
    lines = [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 2, "loss": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1, 3]


def test_half_a_line_does_no_harm(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1}]


def test_an_evaluation_joins_the_figures_of_its_step(tmp_path, capsys):
    log = RunLog(tmp_path, LoggingOptions())
    log.start(epochs=3, total_steps=6, step=0)
    log.metrics(2, 0, {"loss": 0.5, "lr": 0.1, "images_per_second": 3.0})
    log.evaluation(2, 0, {"top1": 0.25, "top5": 0.75})
    log.evaluation(4, 1, {"top1": 0.5, "top5": math.nan})
    log.evaluation(2, 0, {"top1": 0.3, "top5": 0.8})  # written again after a resume
    log.finish()
    first, second = read_metrics(tmp_path)
    assert first == {
        "step": 2, "epoch": 0, "loss": 0.5, "lr": 0.1, "images_per_second": 3.0, "top1": 0.3, "top5": 0.8,
    }  # fmt: skip
    assert (second["step"], second["epoch"], second["top1"]) == (4, 1, 0.5)
    assert math.isnan(second["top5"])
    assert "loss" not in second
    assert "epoch 2/3  top1 0.5000  top5 -" in capsys.readouterr().err


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics(tmp_path) == []


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    log = RunLog(tmp_path, LoggingOptions())
    log.start(epochs=1, total_steps=1, step=0)
    log.metrics(1, 0, {"loss": math.nan, "lr": 0.1, "images_per_second": 3.0, "grad_norm": math.inf})
    log.finish()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["grad_norm"] is None
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])


def test_other_processes_stay_silent(tmp_path, capsys):
    log = RunLog(tmp_path / "run", LoggingOptions(), active=False)
    log.start(1, 1, 0)
    log.advance(1, 0)
    log.metrics(1, 0, {"loss": 0.5, "lr": 0.1, "images_per_second": 3.0})
    log.evaluation(1, 0, {"top1": 0.5})
    log.say("hello")
    log.summary("end", {"a": "b"})
    log.finish()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_there_are_lines_with_the_time_left(tmp_path, capsys):
    log = RunLog(tmp_path, LoggingOptions())
    log.start(epochs=2, total_steps=4, step=0)
    log.metrics(2, 0, {"loss": 0.5, "lr": 0.1, "images_per_second": 3.0})
    log.finish()
    assert "epoch 1/2  step 2/4  loss 0.5000  lr 1.00e-01  3 images/s  0:00:00 left" in capsys.readouterr().err


@pytest.fixture
def not_logged_in(monkeypatch, tmp_path):
    """Weights & Biases, where nobody has logged in, which looks at the environment once."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_wandb_without_login_is_one_line_before_anything_is_written(tmp_path, not_logged_in):
    for folder in (tmp_path / "new", tmp_path / "run"):
        if folder.name == "run":
            folder.mkdir()
            (folder / "metrics.jsonl").touch()
        with pytest.raises(UserError, match=r"log in with `wandb login`, .* WANDB_MODE=offline") as error:
            RunLog(folder, LoggingOptions(wandb="project"))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_wandb_offline_needs_no_login(tmp_path, not_logged_in, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    log = RunLog(tmp_path / "run", LoggingOptions(wandb="project"))
    log.start(epochs=1, total_steps=1, step=0)
    log.evaluation(1, 0, {"top1": 0.5})
    log.finish()
    wandb.finish()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_missing_is_said_plainly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # its import fails
    with pytest.raises(UserError, match=r"pip install 'convmae\[wandb\]'"):
        RunLog(tmp_path / "run", LoggingOptions(wandb="project"))
    assert not (tmp_path / "run").exists()
