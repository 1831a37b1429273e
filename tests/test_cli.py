import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
import yaml
from PIL import Image
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader

from convmae import cli
from convmae.commands import COMMANDS


def test_ctrl_c_ends_without_a_traceback(command_line, monkeypatch):
    def info(model: str = "base"):
        raise KeyboardInterrupt

    monkeypatch.setattr("convmae.commands.info.info", info)
    assert command_line("info") == (130, "", "convmae: stopped\n")


def of_weights(weights):
    """A command line of each command that takes weights before it opens any data."""
    for line in (
        "pretrain --data demo --model tiny",
        "reconstruct --images demo",
        "predict --images demo",
        "embed --data demo --output e.parquet",
        "visualise --images demo",
        "export --format reference --output w.pth",
        "detect predict --images demo --output d",
        "segment predict --images demo --output s",
    ):
        yield [*line.split(), "--weights", weights]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "--model", "giant"], "unknown model 'giant': choose one of tiny"),
        (["info", "--image-size", "100"], "100x100 is not divisible by 16"),
        (["pretrain", "--data", "demo", "--mask-ratio", "1.5"], "outside (0, 1)"),
        (["pretrain", "--data", "demo", "--model", "giant"], "unknown model"),
        (["pretrain", "--data", "no/such/folder", "--model", "tiny"], "no/such/folder does not exist"),
        (["pretrain"], "data"),
        (["pretrain", "--data", "demo", "--epochs", "many"], "epochs"),
        (["pretrain", "--data", "demo", "--no-such-flag", "3"], "unrecognized arguments: --no_such_flag"),
        (["pretrain", "--config", "no-such-recipe", "--data", "demo"], "base_1600ep"),
        (["reconstruct", "--checkpoint", "nothing.safetensors"], "no weights at nothing.safetensors"),
        (["info", "--task", "segmentation", "--image-size", "40"], "40x40 does not suit a segmenter"),
        (["segment", "train", "--data", "no/such/folder"], "no/such/folder/images/training does not exist"),
        (["dance"], "invalid choice: 'dance'"),
        (["detect", "dance"], "dance"),
        (["detect"], "expected a subcommand to be one of {train,eval,predict}"),
        (["segment", "dance"], "dance"),
        (["segment"], "expected a subcommand to be one of {train,eval,predict}"),
        (["pretrain", "--data", "demo", "--image-size", "32,48"], "--image-size cannot be '32,48'"),
        (["pretrain", "--data", "demo", "--engine.accelerator", "abacus"], "--engine.accelerator cannot be 'abacus'"),
        (["pretrain", "--data", __file__, "--model", "tiny"], "is a file: give the folder"),
        (["pretrain", "--config", __file__, "--data", "demo"], "is no configuration"),
        (["pretrain", "--data", "demo", "--model", "tiny", "--output", "/proc/nothing"], "/proc/nothing"),
        (["pretrain", "--data", "demo", "--model", "tiny", "--weights", __file__], "test_cli.py is damaged"),
        (["pretrain", "--data", "demo", "--output", "s3://a/b"], "output cannot be s3://a/b, from or to which nothing"),
        (["pretrain", "--data", "https://a/b", "--model", "tiny"], "https://a/b does not exist: give a folder"),
        (["segment", "train", "--data", "https://a/b"], "https://a/b/images/training does not exist"),
        (["scenes", "--output", "https://a/b"], "output cannot be https://a/b"),
        *((command, "weights cannot be https://a.b/c.pth, ") for command in of_weights("https://a.b/c.pth")),
    ],
)
def test_mistakes_are_one_line_with_status_2(refused, arguments, message):
    refused(message, *arguments)


def test_a_missing_option_keeps_the_name_that_the_user_types(command_line):
    status, _, err = command_line("pretrain")
    assert status == 2
    assert "--data" in err


@pytest.mark.parametrize(
    "flags",
    [
        [
            "--image-size",
            "64",
            "--optimizer.base-lr",
            "0.5",
            "--resume",
            "--compile",
            "--multi-scale",
            "false",
        ],
        [
            "--image_size=64",
            "--optimizer.base_lr=0.5",
            "--resume=true",
            "--compile=true",
            "--multi_scale=false",
        ],
    ],
)
def test_flags_with_hyphens_and_bare_switches(command_line, flags):
    status, out, _ = command_line("pretrain", "--data", "x", *flags, "--print_config")
    assert status == 0
    options = yaml.safe_load(out)
    assert (options["image_size"], options["optimizer"]["base_lr"]) == (64, 0.5)
    assert (options["resume"], options["compile"], options["multi_scale"]) == (True, True, False)


@pytest.mark.parametrize(
    ("flags", "value"), [([], None), (["--reduce-zero-label"], True), (["--reduce-zero-label", "false"], False)]
)
def test_a_switch_that_has_a_default_of_its_own(command_line, flags, value):
    """True, false, or left to the command."""
    status, out, _ = command_line("segment", "train", *flags, "--data", "x", "--print_config")
    assert status == 0
    assert yaml.safe_load(out)["reduce_zero_label"] is value


@pytest.mark.parametrize(
    "flags", [["--config", "base_200ep", "--epochs", "7"], ["--epochs", "7", "--config=base_200ep"]]
)
def test_flags_win_over_a_recipe_on_either_side_of_it(command_line, flags):
    status, out, _ = command_line("pretrain", "--data", "x", *flags, "--print-config")
    assert status == 0
    options = yaml.safe_load(out)
    assert options["epochs"] == 7
    assert options["batch_size"] == 2048


def test_every_option_is_explained(command_line):
    commands = [
        [name, part] if part else [name]
        for name, entry in COMMANDS.items()
        for part in (entry.keys() - {"_help"} if isinstance(entry, dict) else [None])
    ]
    assert ["detect", "train"] in commands
    assert ["segment", "train"] in commands
    for command in commands:
        status, out, _ = command_line(*command, "--help")
        assert status == 0
        lines = out[out.index("options:") :].splitlines()
        options = [number for number, line in enumerate(lines) if line.startswith("  --")]
        for number in options:
            text = " ".join(lines[number : number + 2]).split(maxsplit=2)
            assert len(text) == 3, lines[number]
            assert not text[2].startswith("(type"), lines[number]


def test_python_dash_m_works():
    done = subprocess.run([sys.executable, "-m", "convmae", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)


def test_the_version_is_told(command_line):
    status, out, _ = command_line("--version")
    assert status == 0
    assert out.strip() == "convmae 0.1.0"


def test_warnings_that_a_user_cannot_act_on_are_silent(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("timm.scheduler"), "level", logging.NOTSET)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05broken")
    told = []
    for quiet in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if quiet:
                cli.quiet_libraries()
            Image.open(tmp_path / "a.jpg").getexif()
            DataLoader([1], num_workers=os.cpu_count() + 1)
            CosineLRScheduler(torch.optim.SGD([torch.zeros(1)], lr=1.0), t_initial=1)
            warnings.warn("what matters", stacklevel=1)
        told.append([str(one.message)[:27] for one in caught if one.category is UserWarning])
        told.append([record.message[:16] for record in caplog.records])
        caplog.clear()
    assert told[0] == ["Corrupt EXIF data.  Expecti", "This DataLoader will create", "what matters"]
    assert told[1] == ["Cosine annealing"]
    assert told[2:] == [["what matters"], []]
