"""A stopped run goes on as if nothing had happened, bit for bit, whichever command it is of."""

import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from convmae.data.augmentation import AugmentationOptions
from convmae.training.checkpoint import CheckpointOptions, read_state
from convmae.training.logging import read_metrics
from convmae.training.loop import Interrupted

# All that draws random numbers is on: augmentation, mixup, erasing, dropped paths.
VARIED = {"augmentation": AugmentationOptions(), "drop_path": 0.2, "epochs": 4}


class Course(NamedTuple):
    """A run, and the step in the midst of one of its epochs at which it is stopped."""

    run: str
    data: str
    weights: str | None
    stop: int
    steps: int
    changes: dict[str, Any]
    of_stream: str = "{}"


COURSES = {
    "pretrain": Course("small_pretraining", "photos", None, 4, 9, {}),
    "pretrain, two crops an image": Course("small_pretraining", "photos", None, 4, 9, {"aug_repeats": 2}),
    "pretrain, average": Course("small_pretraining", "photos", None, 4, 9, {"ema_decay": 0.9}),
    "finetune": Course("small_finetuning", "labelled", "autoencoder_file", 16, 24, VARIED),
    "finetune, average": Course(
        "small_finetuning", "labelled", "autoencoder_file", 16, 24, VARIED | {"ema_decay": 0.9}
    ),
    "finetune, two crops an image": Course(
        "small_finetuning", "labelled", "autoencoder_file", 16, 24, VARIED | {"aug_repeats": 2}
    ),
    "finetune, stream": Course("small_finetuning", "labelled", "autoencoder_file", 16, 24, VARIED, "hfids/{}|48"),
    "finetune, stream, two crops an image": Course(
        "small_finetuning", "labelled", "autoencoder_file", 16, 24, VARIED | {"aug_repeats": 2}, "hfids/{}|48"
    ),
    "probe": Course("small_probe", "labelled", "autoencoder_file", 8, 12, {}),
    "probe, average": Course("small_probe", "labelled", "autoencoder_file", 8, 12, {"ema_decay": 0.9}),
    "detect, paper": Course("small_detection", "coco_scenes", "paper_file", 4, 9, {"epochs": 3}),
    "detect, vitdet": Course("small_detection", "coco_scenes", "vitdet_file", 4, 9, {"epochs": 3}),
    "segment": Course("small_segmentation", "ade20k_scenes", "segmenter_file", 4, 9, {"epochs": 3}),
}


@pytest.fixture
def assert_same_run(same):
    """assert_same_run(first, second): weights, averages, best model, training state and figures from the last epoch."""

    def check(first: Path, second: Path):
        last = sorted(path.name for path in (first / "checkpoints").iterdir())[-1]
        assert sorted(path.name for path in (second / "checkpoints").iterdir())[-1] == last
        models = [sorted(str(path.relative_to(run)) for path in _models(run, last)) for run in (first, second)]
        assert models[0] == models[1]
        for name in models[0]:
            assert same(load_file(first / name), load_file(second / name)), name
        assert same(*(read_state(run / "checkpoints" / last) for run in (first, second)))
        assert same(*map(_figures, (first, second)))

    return check


def _models(run: Path, last: str) -> list[Path]:
    """All weights of the last checkpoint, and what was kept."""
    kept = [path for path in (run / "best" / "model.safetensors", run / "model.safetensors") if path.exists()]
    return [*(run / "checkpoints" / last).glob("*.safetensors"), *kept]


def _figures(run: Path) -> list[dict[str, float]]:
    """What was logged, but for the speed."""
    return [
        {name: value for name, value in record.items() if not name.endswith("_per_second")}
        for record in read_metrics(run)
    ]


def _result(result: Any) -> dict[str, Any]:
    """What a command returns, with paths from the run's folder on."""
    return {
        name: value.relative_to(result.folder) if isinstance(value, Path) else value
        for name, value in asdict(result).items()
    }


@pytest.mark.parametrize("course", COURSES.values(), ids=COURSES)
def test_a_stopped_run_resumes_bit_for_bit(course, request, tmp_path, at_step, same, assert_same_run):
    if course.of_stream != "{}":
        request.getfixturevalue("streams")
    run, data = request.getfixturevalue(course.run), course.of_stream.format(request.getfixturevalue(course.data))
    changes = {"checkpoint": CheckpointOptions(every_epochs=1, keep=1), **course.changes}
    if course.weights is not None:
        changes["weights"] = request.getfixturevalue(course.weights)
    straight = run(data, tmp_path / "straight", **changes)
    with (
        at_step(course.stop),
        pytest.raises(Interrupted, match=rf"stopped at step {course.stop} of {course.steps}: .*continue with --resume"),
    ):
        run(data, tmp_path / "broken", **changes)
    assert [path.name for path in (tmp_path / "broken/checkpoints").iterdir()] == [f"step-{course.stop:08d}"]
    resumed = run(data, tmp_path / "broken", resume=True, **changes)
    assert_same_run(tmp_path / "straight", tmp_path / "broken")
    assert same(_result(straight), _result(resumed))
    assert bool(list((tmp_path / "broken/checkpoints").glob("*/average.safetensors"))) is ("ema_decay" in changes)


def test_a_run_that_died_resumes_bit_for_bit(
    small_finetuning, labelled, autoencoder_file, tmp_path, at_step, assert_same_run
):
    """Without a checkpoint of its last moment, in the midst of the third epoch: it goes on from that of the second."""
    options = {**VARIED, "ema_decay": 0.9, "checkpoint": CheckpointOptions(every_epochs=2, keep=1)}
    small_finetuning(labelled, tmp_path / "straight", autoencoder_file, **options)
    with at_step(16, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
        small_finetuning(labelled, tmp_path / "broken", autoencoder_file, **options)
    assert [path.name for path in (tmp_path / "broken/checkpoints").iterdir()] == ["step-00000012"]
    assert read_metrics(tmp_path / "broken")[-1]["step"] == 15
    small_finetuning(labelled, tmp_path / "broken", autoencoder_file, resume=True, **options)
    assert_same_run(tmp_path / "straight", tmp_path / "broken")


# Processes of their own


def command(photos, output, *flags):
    """A small pretraining on the command line."""
    return [
        *("pretrain", "--data", str(photos), "--model", "tiny", "--output", str(output), "--image-size", "32"),
        *("--batch-size", "4", "--engine.accelerator", "cpu", "--engine.workers", "1", "--logging.every-steps", "1"),
        *flags,
    ]  # fmt: skip


def python_m(*arguments, launcher=("-m",)):
    return [sys.executable, *launcher, "convmae", *arguments]


KILLED = ("--epochs", "40", "--checkpoint.every-epochs", "2")


@pytest.fixture(scope="module")
def never_killed(photos, tmp_path_factory):
    """never_killed(aug_repeats) -> the folder of a run that nobody stopped."""
    folders = {}

    def run(aug_repeats):
        if aug_repeats not in folders:
            folders[aug_repeats] = tmp_path_factory.mktemp("runs") / "straight"
            flags = (*KILLED, "--aug-repeats", str(aug_repeats))
            subprocess.run(python_m(*command(photos, folders[aug_repeats], *flags)), check=True, capture_output=True)
        return folders[aug_repeats]

    return run


@pytest.mark.parametrize(
    ("kill", "aug_repeats"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGKILL, 1), (signal.SIGTERM, 2)]
)
def test_a_killed_run_resumes_bit_for_bit(photos, tmp_path, kill, aug_repeats, never_killed, assert_same_run, same):
    """2N steps straight against N, kill, resume: weights, optimiser and random states are exactly the same."""
    straight = never_killed(aug_repeats)
    broken = command(photos, tmp_path / "broken", *KILLED, "--aug-repeats", str(aug_repeats))
    running = subprocess.Popen(python_m(*broken), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "broken" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 20):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(kill)
    message = running.communicate(timeout=60)[1]
    if kill == signal.SIGKILL:
        assert running.returncode == -signal.SIGKILL
    else:
        assert running.returncode == 128 + kill
        assert "checkpoint" in message
        assert "continue with --resume" in message
        assert "Traceback" not in message
    assert not list((tmp_path / "broken").glob("checkpoints/step-00000120"))

    resumed = subprocess.run(python_m(*broken, "--resume"), check=True, capture_output=True, text=True)
    assert "resumed at step" in resumed.stderr
    names = {f"step-{step:08d}" for step in (108, 114, 120)}  # of the epochs 36, 38 and 40 of 3 steps
    for run in (straight, tmp_path / "broken"):
        assert {path.name for path in (run / "checkpoints").iterdir()} == names
    for name in names:
        checkpoints = [run / "checkpoints" / name for run in (straight, tmp_path / "broken")]
        assert same(*(load_file(checkpoint / "model.safetensors") for checkpoint in checkpoints))
        assert same(*map(read_state, checkpoints))
    assert_same_run(straight, tmp_path / "broken")


def test_two_processes_train_one_model_and_resume_bit_for_bit(photos, tmp_path, assert_same_run):
    """torchrun: one run folder, equal parameters, resumable bit for bit with the same number of processes."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m")
    # min_lr is lr: constant, so that the shorter run is a part of the longer
    constant = ("--optimizer.warmup-epochs", "0", "--optimizer.min-lr", "1e-5", "--optimizer.base-lr", "6.4e-4")
    for name, epochs in (("straight", "4"), ("parts", "2"), ("parts", "4")):
        arguments = command(photos, tmp_path / name, "--epochs", epochs, *constant, "--resume")
        run = subprocess.run(python_m(*arguments, launcher=torchrun), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("pretraining finished") == 1
        assert "2 x cpu" in run.stderr
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
    assert len(read_state(tmp_path / "straight" / "checkpoints" / "step-00000012")["random_states"]) == 2


def test_what_a_resumed_run_does_otherwise_is_said_and_kept(photos, tmp_path, capsys, small_pretraining):
    small_pretraining(photos, tmp_path / "run", epochs=2)
    capsys.readouterr()
    small_pretraining(photos, tmp_path / "run", epochs=8, batch_size=6, resume=True)
    said = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("changed since this run was stopped")
    ]
    kept = (tmp_path / "run" / "changes.txt").read_text().splitlines()
    assert [line.split(": ", 1)[1] for line in said] == [line.split(": ", 1)[1] for line in kept]
    assert {line.split(": ", 1)[0] for line in kept} == {"resumed at step 6"}
    for part in (
        "epochs was 2 before, is 8 now",
        "batch_size was 4 before, is 6 now",
        "was of 3 steps before, is of 2",
    ):
        assert any(part in line for line in said)
    assert "the learning rate at step 4 was" in said[-1]
    small_pretraining(photos, tmp_path / "run", epochs=8, batch_size=6, resume=True)  # as in the part before
    assert "changed since" not in capsys.readouterr().err
