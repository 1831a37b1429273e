"""That pretraining learns, on pictures that it was not shown, and the script that measures how much it is worth."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import convmae
from convmae.data.images import decode_image
from convmae.data.sources import open_images
from convmae.masking import random_visible
from convmae.training.engine import EngineOptions
from convmae.training.logging import PictureLoggingOptions
from convmae.training.optimizer import OptimizerOptions


@pytest.fixture(scope="module")
def learning():
    """What benchmarks/learning.py defines."""
    return runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "learning.py"))


def test_digits_that_it_never_saw_are_reconstructed_better_than_by_the_mean_of_what_is_visible(learning, tmp_path):
    learning["write_images"]("digits", tmp_path / "digits")
    run = convmae.pretrain(
        data=str(tmp_path / "digits" / "train"),
        model="tiny",
        output=tmp_path / "run",
        epochs=3,
        batch_size=16,
        image_size=64,
        norm_pix=False,
        complementary_sets=4,
        crop_scale=(0.5, 1.0),
        optimizer=OptimizerOptions(base_lr=1.6e-2),
        engine=EngineOptions(accelerator="cpu", workers=0),
        logging=PictureLoggingOptions(pictures_every_epochs=0),
    )
    model = convmae.load(run.checkpoint)
    source = open_images(tmp_path / "digits" / "val")
    digits = torch.stack([decode_image(source.open(index)) for index in range(0, len(source), 5)])
    visible = random_visible(len(digits), (4, 4), 0.75, torch.Generator().manual_seed(0))
    seen = interpolate(visible[:, None].float(), scale_factor=16)
    truth = digits / 255
    mean = (truth * seen).sum(dim=(2, 3), keepdim=True) / seen.sum(dim=(2, 3), keepdim=True)

    def error(guess):
        return ((guess - truth).square() * (1 - seen)).sum() / (1 - seen).sum() / 3

    assert error(model.reconstruct(digits, visible)) < 0.7 * error(mean)


def test_the_comparison_runs_on_any_folder_of_classes_and_goes_on_where_it_stopped(learning, tmp_path, capsys):
    numbers = np.random.default_rng(0)
    for name, colour in (("dark", 60), ("light", 190)):
        for index in range(18):
            path = tmp_path / "pictures" / name / "nested" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = numbers.normal(colour, 30, (36, 36, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path)
    settings = {"epochs": 1, "batch_size": 8, "image_size": 32, "finetune_steps": 2, "output": tmp_path / "out"}
    learning["main"](str(tmp_path / "pictures"), seeds=1, **settings)
    assert len(list((tmp_path / "out/images/train/dark").iterdir())) == 12
    assert len(list((tmp_path / "out/images/val/dark").iterdir())) == 6
    assert len(list((tmp_path / "out/seed-0/few/train/light").iterdir())) == 10
    (result,) = json.loads((tmp_path / "out/learning.json").read_text())
    rows = {"linear probe, all labels", "k-NN", "linear probe, 10 labels a class"}
    rows |= {"fine-tuning, all labels", "fine-tuning, 10 labels a class"}
    assert result["top1"]["pretrained"].keys() == result["top1"]["random"].keys() == rows
    assert result["top1"]["random"]["linear probe, all labels"] == 1  # colours are told apart without learning
    with Image.open(tmp_path / "out/learning.png") as picture:
        assert picture.width > 500
    assert "everything, cpu minutes: " in capsys.readouterr().out
    before = (tmp_path / "out/seed-0/result.json").stat().st_mtime_ns
    with pytest.raises(SystemExit, match="holds results of other settings: choose another --output"):
        learning["main"](str(tmp_path / "pictures"), seeds=1, **{**settings, "epochs": 2})
    learning["main"](str(tmp_path / "pictures"), seeds=1, **settings)  # nothing left to run
    assert (tmp_path / "out/seed-0/result.json").stat().st_mtime_ns == before
