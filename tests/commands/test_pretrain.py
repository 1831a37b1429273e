"""Pretraining from end to end: resume bit for bit, damaged images, mistakes, several processes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import auto_parser
from PIL import Image
from safetensors.torch import load_file

import convmae
from convmae.commands.pretrain import pretrain
from convmae.training.checkpoint import CheckpointOptions, read_state
from convmae.training.engine import EngineOptions
from convmae.training.logging import PictureLoggingOptions, read_metrics
from convmae.training.optimizer import OptimizerOptions
from convmae.training.folder import plain_settings

IN_PROCESS = EngineOptions(accelerator="cpu", workers=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve small pictures in nested folders."""
    folder = tmp_path_factory.mktemp("photos")
    numbers = np.random.default_rng(0)
    for index in range(12):
        path = folder / f"depth{index % 3}" / "deeper" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = numbers.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).save(path)
    return folder


def small_run(photos, output, **changes):
    settings = {
        "data": str(photos),
        "model": "tiny",
        "output": output,
        "epochs": 3,
        "batch_size": 4,
        "image_size": 32,
        "engine": IN_PROCESS,
        "logging": PictureLoggingOptions(every_steps=1, pictures_every_epochs=2),
    }
    return pretrain(**{**settings, **changes})


def command(photos, output, *flags):
    """The same small run on the command line."""
    return [
        *("pretrain", "--data", str(photos), "--model", "tiny", "--output", str(output), "--image-size", "32"),
        *("--batch-size", "4", "--engine.accelerator", "cpu", "--engine.workers", "1", "--logging.every-steps", "1"),
        *flags,
    ]  # fmt: skip


def python_m(*arguments, launcher=("-m",)):
    return [sys.executable, *launcher, "convmae", *arguments]


def same_tensors(a, b):
    """Whether two nested structures hold exactly the same."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def assert_same_checkpoint(first: Path, second: Path):
    assert first.name == second.name
    assert same_tensors(load_file(first / "model.safetensors"), load_file(second / "model.safetensors"))
    assert same_tensors(read_state(first), read_state(second))


def test_a_run_leaves_everything_a_user_wants(photos, tmp_path, capsys):
    result = small_run(photos, tmp_path / "run")
    assert result.steps == 9
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "loss.png",
        "reconstructions/epoch-0002.png",
        "reconstructions/latest.png",
        "checkpoints/step-00000009/model.safetensors",
        "checkpoints/step-00000009/training_state.pt",
    } <= files
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert {"loss", "lr", "images_per_second", "epoch", "grad_norm", "skipped_steps"} <= lines[0].keys()
    # Linear scaling and the default warm-up of a fifth of a short run: 1.8 steps, rounded to 2.
    assert [line["lr"] for line in lines[:3]] == pytest.approx([0, 1.5e-4 * 4 / 256 / 2, 1.5e-4 * 4 / 256])
    printed = capsys.readouterr().err
    assert "pretraining finished" in printed
    assert "step-00000009" in printed
    model = convmae.load(tmp_path / "run")
    assert model.settings["image_size"] in ([32, 32], (32, 32))


def test_the_kept_configuration_makes_the_same_run(photos, tmp_path):
    settings = {
        "complementary_sets": 2,
        "optimizer": OptimizerOptions(base_lr=0.01, clip_grad=1.0),
        "image_size": (32, 48),
    }
    small_run(photos, tmp_path / "run", epochs=2, **settings)
    path = tmp_path / "run" / "config.yaml"
    parser = auto_parser(pretrain, as_positional=False)
    options = parser.instantiate(parser.parse_args(["--config", str(path)]))
    options.pop("config")
    assert plain_settings(dict(options)) == yaml.safe_load(path.read_text())
    assert options.optimizer == settings["optimizer"]
    assert options.image_size == (32, 48)


@pytest.mark.parametrize(
    ("kill", "aug_repeats"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGKILL, 1), (signal.SIGTERM, 2)]
)
def test_a_killed_run_resumes_bit_for_bit(photos, tmp_path, kill, aug_repeats):
    """2N steps straight against N, kill, resume: weights, optimiser and random states are exactly the same."""
    flags = ["--epochs", "40", "--checkpoint.every-epochs", "2", "--aug-repeats", str(aug_repeats)]
    straight = command(photos, tmp_path / "straight", *flags)
    broken = command(photos, tmp_path / "broken", *flags)
    subprocess.run(python_m(*straight), check=True, capture_output=True)

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
    for step in (112, 114, 120):  # the last three epochs with checkpoints are 36, 38 and 40 of 3 steps
        name = f"checkpoints/step-{step:08d}"
        if (tmp_path / "straight" / name).exists():
            assert_same_checkpoint(tmp_path / "straight" / name, tmp_path / "broken" / name)
    assert (tmp_path / "broken" / "checkpoints" / "step-00000120").exists()


def test_another_number_of_workers_changes_nothing(photos, tmp_path):
    a = small_run(photos, tmp_path / "a", epochs=2)
    b = small_run(photos, tmp_path / "b", epochs=2, engine=EngineOptions(accelerator="cpu", workers=2))
    assert same_tensors(load_file(a.checkpoint / "model.safetensors"), load_file(b.checkpoint / "model.safetensors"))


def test_resuming_a_finished_run_ends_at_once(photos, tmp_path):
    first = small_run(photos, tmp_path / "run", epochs=1)
    again = small_run(photos, tmp_path / "run", epochs=1, resume=True)
    assert again.steps == first.steps
    assert again.loss == first.loss


def test_a_run_is_never_overwritten(photos, tmp_path):
    small_run(photos, tmp_path / "run", epochs=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(convmae.UserError, match=r"holds a run: continue it with --resume, or choose another --output"):
        small_run(photos, tmp_path / "run", epochs=1)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_changed_settings_of_a_resumed_run_are_kept_beside_the_old_ones(photos, tmp_path):
    small_run(photos, tmp_path / "run", epochs=1)
    small_run(photos, tmp_path / "run", epochs=2, resume=True)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["epochs"] == 1
    assert yaml.safe_load((tmp_path / "run" / "config-from-step-00000003.yaml").read_text())["epochs"] == 2


def test_a_checkpoint_of_another_shape_is_refused(photos, tmp_path):
    first = small_run(photos, tmp_path / "run", epochs=1)
    with pytest.raises(convmae.UserError, match="do not fit the model"):
        small_run(photos, tmp_path / "run", epochs=2, resume=True, kernel_size=7)
    with pytest.raises(convmae.UserError, match="do not fit the model"):
        small_run(photos, tmp_path / "other", weights=first.checkpoint, multi_scale=False)
    assert not (tmp_path / "other").exists()


def test_training_starts_from_given_weights(photos, tmp_path):
    first = small_run(photos, str(tmp_path / "first"), epochs=1)
    still = OptimizerOptions(base_lr=0.0)
    options = {"epochs": 1, "weights": first.checkpoint, "optimizer": still, "seed": 5}
    second = small_run(photos, tmp_path / "second", **options)
    states = [load_file(run.checkpoint / "model.safetensors") for run in (first, second)]
    assert same_tensors(*states)
    larger = small_run(photos, tmp_path / "larger", image_size=64, **options)
    assert convmae.load(larger.checkpoint).encoder.pos_embed.shape[1:3] == (4, 4)


def test_damaged_images_are_skipped_counted_and_listed(photos, tmp_path, capsys):
    for path in photos.rglob("*.png"):
        (tmp_path / "data" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data" / "3.png").write_bytes(b"no picture")
    truncated = (tmp_path / "data" / "7.png").read_bytes()[:-200]
    (tmp_path / "data" / "7.png").write_bytes(truncated)
    small_run(tmp_path / "data", tmp_path / "run", epochs=12)
    listed = (tmp_path / "run" / "undecodable-images.txt").read_text().splitlines()
    assert len(listed) == 2
    assert "3.png" in "".join(listed)
    assert "7.png" in "".join(listed)
    printed = " ".join(capsys.readouterr().err.split())
    assert "of the images cannot be decoded: see" in printed  # 2 of 12: far more than a few percent
    assert "images that could not be decoded │ 2" in printed


def test_a_stream_of_nan_stops_the_run_with_a_clear_message(photos, tmp_path):
    with pytest.raises(
        convmae.UserError, match=r"not finite 3 steps in a row, up to step 3: last good checkpoint none"
    ):
        small_run(photos, tmp_path / "run", weights=_poisoned(tmp_path), max_skipped=3)


def _poisoned(tmp_path):
    model = convmae.create_autoencoder("tiny", image_size=32)
    model.decoder.prediction.bias.data.fill_(torch.nan)
    torch.save(model.state_dict(), tmp_path / "poisoned.pth")
    return tmp_path / "poisoned.pth"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 40}, "40x40 is not divisible by 16"),
        ({"mask_ratio": 0.0}, r"outside \(0, 1\)"),
        ({"epochs": 0}, "at least 1"),
        ({"batch_size": 5, "accumulate": 2}, "choose a multiple of 2"),
        ({"decode": "gpu", "in_channels": 4}, "a GPU decodes no RGBA: leave --decode out"),
        ({"decode": "gpu"}, "--decode gpu needs a CUDA device, this run is on cpu: leave it out"),
        ({"decode": "tpu"}, "decode cannot be 'tpu': choose one of cpu, gpu"),
        ({"aug_repeats": 3}, "4 images a pass and process are no multiple of aug_repeats 3"),
        ({"aug_repeats": 0}, "aug_repeats is 0: it must be at least 1"),
        ({"optimizer": OptimizerOptions(warmup_epochs=9)}, "warm-up of 9 epochs does not fit a run of 3"),
        ({"checkpoint": CheckpointOptions(keep=0)}, "keep must be at least 1"),
        ({"logging": PictureLoggingOptions(every_steps=0)}, "logging_every_steps"),
        ({"in_channels": 2}, "channels"),
        ({"weights": Path("nothing.pth")}, "no weights at nothing.pth"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(photos, tmp_path, changes, message):
    with pytest.raises(convmae.UserError, match=message) as error:
        small_run(photos, tmp_path / "run", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "without images"])
def test_folders_without_images_are_refused(tmp_path, kind):
    data = tmp_path / "data"
    if kind != "missing":
        data.mkdir()
    if kind == "without images":
        (data / "notes.txt").write_text("no picture")
    with pytest.raises(convmae.UserError, match="data") as error:
        small_run(data, tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        {"aug_repeats": 4},
        {"complementary_sets": 4},
        {"mask_stage": 1},
        {"masked_convolution": False},
        {"in_channels": 1},
        {"image_size": (32, 64), "norm_pix": False, "multi_scale": False},
    ],
)
def test_other_forms_train_too(photos, tmp_path, changes):
    result = small_run(photos, tmp_path / "run", epochs=1, **changes)
    assert 0 < result.loss < 10


@pytest.mark.parametrize("aug_repeats", [1, 2])
def test_a_device_that_decodes_sees_the_same_crops(photos, tmp_path, monkeypatch, aug_repeats):
    """The CPU stands for the device: the losses differ by the rounding of resized pixels only."""
    for path in photos.rglob("*.png"):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.open(path).save(tmp_path / "data" / f"{path.stem}.jpg", quality=95)
    options = {"epochs": 2, "aug_repeats": aug_repeats}
    here = small_run(tmp_path / "data", tmp_path / "here", **options)
    monkeypatch.setattr("convmae.tasks.pretraining._decodes_on_device", lambda *given: True)
    there = small_run(tmp_path / "data", tmp_path / "there", decode="gpu", **options)
    losses = [[record["loss"] for record in read_metrics(run.folder)] for run in (here, there)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert len(losses[0]) == 6


def test_two_processes_train_one_model(photos, tmp_path):
    """torchrun: one run folder, equal parameters, resumable bit for bit with the same number of processes."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m")
    for name, epochs in (("straight", "4"), ("parts", "2"), ("parts", "4")):
        flags = [
            "--epochs",
            epochs,
            "--optimizer.warmup-epochs",
            "0",
            "--optimizer.min-lr",
            "1e-5",
            "--resume",
        ]
        flags += [
            "--optimizer.base-lr",
            "6.4e-4",
        ]  # min_lr is lr: constant, so that the shorter run is a part of the longer
        run = subprocess.run(
            python_m(*command(photos, tmp_path / name, *flags), launcher=torchrun),
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("pretraining finished") == 1
        assert "2 x cpu" in run.stderr
    assert_same_checkpoint(*(tmp_path / name / "checkpoints" / "step-00000012" for name in ("straight", "parts")))
    assert len(read_state(tmp_path / "straight" / "checkpoints" / "step-00000012")["random_states"]) == 2
