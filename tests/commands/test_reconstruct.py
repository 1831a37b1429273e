import numpy as np
import pytest
import torch
from PIL import Image

import convmae
from convmae import weights
from convmae.commands.reconstruct import _fit, reconstruct


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    model = convmae.create_autoencoder("tiny", image_size=64)
    weights.save_model(path, model)
    return path


@pytest.fixture
def photos(tmp_path):
    numbers = np.random.default_rng(0)
    for index, size in enumerate([(70, 50), (33, 120), (10, 12)]):
        path = tmp_path / "photos" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_a_folder_with_images_of_any_size(checkpoint, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"no picture")
    path = reconstruct(checkpoint, str(photos), tmp_path / "out" / "r.png")
    assert Image.open(path).format == "PNG"
    captured = capsys.readouterr()
    assert "3 reconstructions" in captured.out
    assert "broken.jpg cannot be decoded" in captured.err


def test_the_weights_have_two_names_of_which_one_is_given(checkpoint, photos, tmp_path, command_line):
    drawn = []
    for given in ({"weights": checkpoint}, {"checkpoint": checkpoint}):
        drawn.append(reconstruct(images=str(photos), output=tmp_path / "r.png", **given).read_bytes())
    assert drawn[0] == drawn[1] == reconstruct(checkpoint, str(photos), tmp_path / "r.png").read_bytes()
    for flag in ("--weights", "--checkpoint"):
        output = tmp_path / f"{flag}.png"
        assert command_line("reconstruct", flag, checkpoint, "--images", photos, "--output", output)[0] == 0
        assert output.read_bytes() == drawn[0]
    for given, message in (
        ({}, "no weights are given: pass --weights"),
        ({"weights": checkpoint, "checkpoint": checkpoint}, "weights and checkpoint mean the same: pass --weights"),
    ):
        with pytest.raises(convmae.UserError, match=message) as error:
            reconstruct(images=str(photos), output=tmp_path / "r.png", **given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"image_size": 96}, {"mask_ratio": 0.3}, {"longest_side": 32}, {"count": 1}])
def test_options(checkpoint, photos, tmp_path, options):
    assert reconstruct(checkpoint, str(photos), tmp_path / "r.png", **options).exists()
    assert reconstruct(checkpoint, str(photos / "0.png"), tmp_path / "one.png", **options).exists()


def test_a_model_with_masks_at_stage_1_is_drawn_too(photos, tmp_path):
    model = convmae.create_autoencoder("tiny", image_size=64, mask_stage=1)
    weights.save_model(tmp_path / "m.safetensors", model)
    for ratio in (None, 0.5):
        assert reconstruct(tmp_path / "m.safetensors", str(photos), tmp_path / "r.png", mask_ratio=ratio).exists()


@pytest.mark.parametrize(
    ("size", "image_size", "longest", "expected"),
    [
        ((500, 375), None, 512, (496, 368)),
        ((1000, 600), None, 512, (512, 304)),
        ((10, 12), None, 512, (32, 32)),
        ((17, 300), None, 512, (16, 304)),
        ((500, 375), 224, 512, (224, 224)),
    ],
)
def test_sides_become_multiples_of_16(size, image_size, longest, expected):
    fitted = _fit(torch.zeros(3, *size, dtype=torch.uint8), image_size, longest)
    assert fitted.shape[-2:] == expected
    assert fitted.dtype == torch.uint8


def test_mistakes_are_one_line(checkpoint, photos, tmp_path):
    classifier = convmae.create_classifier("tiny", image_size=64)
    weights.save_model(tmp_path / "c.safetensors", classifier)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    out = tmp_path / "r.png"
    for call, message in (
        (lambda: reconstruct(tmp_path / "c.safetensors", str(photos), out), "holds no decoder to reconstruct with"),
        (lambda: reconstruct(tmp_path / "nothing", str(photos), out), "no weights at"),
        (lambda: reconstruct(checkpoint, str(tmp_path / "nothing"), out), "does not exist"),
        (lambda: reconstruct(checkpoint, str(tmp_path / "broken"), out), "none of the images"),
        (lambda: reconstruct(checkpoint, str(photos), tmp_path / "r.txt"), "ends in .png"),
        (lambda: reconstruct(checkpoint, str(photos), out, image_size=70), "not divisible by 16"),
        (lambda: reconstruct(checkpoint, str(photos), out, mask_ratio=2.0), r"outside \(0, 1\)"),
        (lambda: reconstruct(checkpoint, str(photos), out, count=0), "at least 1"),
    ):
        with pytest.raises(convmae.UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
        assert not out.exists()


def test_a_list_of_images(checkpoint, photos, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("photos/0.png\nphotos/2.png\n")
    reconstruct(checkpoint, str(tmp_path / "list.txt"), tmp_path / "r.png")
    assert "2 reconstructions" in capsys.readouterr().out
