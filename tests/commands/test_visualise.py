import shutil

import pytest
import torch
from PIL import Image

import convmae
from convmae.commands import visualise as module
from convmae.commands.visualise import visualise
from convmae.evaluation.components import principal_components
from convmae.kinds import load_classifier
from convmae.training.engine import DeviceOptions

CPU = DeviceOptions("cpu", "float32", 0)


@pytest.fixture
def drawn(monkeypatch):
    """What the picture is made of."""
    arguments = []
    draw = module.encoder_picture
    monkeypatch.setattr(module, "encoder_picture", lambda *given: arguments.append(given) or draw(*given))
    return arguments


@pytest.mark.parametrize("kind", ["autoencoder_file", "classifier_file", "grey_autoencoder_file"])
def test_any_weights_and_size(photographs, tmp_path, drawn, kind, request):
    path = visualise(
        str(photographs), request.getfixturevalue(kind), tmp_path / "v.png", count=3, image_size=80, engine=CPU
    )
    assert Image.open(path).format == "PNG"
    ((_, images, components, attention, token, _),) = drawn
    assert [tuple(image.shape[1:]) for image in images] == [(80, 80)] * 3
    assert components.shape == (3, 5, 5, 3)
    assert attention.shape == (3, 5, 5)
    torch.testing.assert_close(attention.sum(dim=(1, 2)), torch.ones(3))
    assert token == (2, 2)


@torch.inference_mode()
def test_components_and_attention_are_those_of_the_model(photographs, autoencoder_file, tmp_path, drawn):
    visualise(
        str(photographs), autoencoder_file, tmp_path / "v.png", 2, image_size=64, token=(1, 3), head=2, engine=CPU
    )
    ((_, images, components, attention, token, title),) = drawn
    assert (token, title) == ((1, 3), "attention, head 2")
    encoder = load_classifier(autoencoder_file, image_size=(64, 64)).eval().encoder
    maps = encoder(torch.stack([(image * 255).round().byte() for image in images]))
    expected = principal_components(maps.flatten(0, 2)).view_as(components)
    torch.testing.assert_close(components, expected, rtol=1e-3, atol=1e-3)

    # The last block by hand: tokens up to there, its norm, queries and keys of head 2, softmax.
    pixels = torch.stack([(image * 255).round().byte() for image in images])
    tokens = encoder.convolve(encoder.normalize(pixels).permute(0, 2, 3, 1)).stage3 + encoder.pos_embed
    tokens = tokens.flatten(1, 2)
    for block in encoder.stage3[:-1]:
        tokens = block(tokens)
    block = encoder.stage3[-1]
    query, key, _ = block.attn.qkv(block.norm1(tokens)).view(2, 16, 3, 4, 8)[:, :, :, 2].unbind(2)
    weights = (query @ key.transpose(1, 2) / 8**0.5).softmax(dim=-1)[:, 1 * 4 + 3]
    torch.testing.assert_close(attention, weights.view(2, 4, 4), rtol=1e-3, atol=1e-5)


def test_the_mean_is_over_the_heads(photographs, autoencoder_file, tmp_path, drawn):
    for head in (None, 0, 1, 2, 3):
        visualise(str(photographs), autoencoder_file, tmp_path / "v.png", 1, 32, head=head, engine=CPU)
    mean, *heads = (arguments[3] for arguments in drawn)
    torch.testing.assert_close(mean, torch.stack(heads).mean(dim=0))


def test_one_image_of_one_token(photographs, autoencoder_file, tmp_path):
    assert visualise(
        str(next(photographs.rglob("*.png"))), autoencoder_file, tmp_path / "v.png", image_size=16, engine=CPU
    ).exists()


def test_damaged_images_stop_or_are_listed(photographs, autoencoder_file, tmp_path, capsys, drawn):
    images = shutil.copytree(photographs, tmp_path / "images")
    broken = sorted(images.rglob("*.png"))[0]
    broken.write_bytes(b"no picture")
    with pytest.raises(convmae.UserError, match=r"cannot be decoded.*--skip-damaged"):
        visualise(str(images), autoencoder_file, tmp_path / "v.png", image_size=32, engine=CPU)
    visualise(str(images), autoencoder_file, tmp_path / "v.png", 10, 32, skip_damaged=True, engine=CPU)
    assert len(drawn[0][1]) == 9
    assert str(broken) in capsys.readouterr().err


def test_mistakes_are_one_line(photographs, autoencoder_file, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    output = tmp_path / "v.png"

    def call(images=photographs, weights=autoencoder_file, output=output, image_size=32, **options):
        return visualise(str(images), weights, output, image_size=image_size, engine=CPU, **options)

    for wrong, message in (
        ({"images": tmp_path / "none"}, "does not exist"),
        ({"images": tmp_path / "empty"}, "is empty"),
        ({"images": tmp_path / "broken.png", "skip_damaged": True}, "none of the images"),
        ({"weights": tmp_path / "none"}, "no weights at"),
        ({"weights": tmp_path / "broken.png"}, "damaged or no weights file"),
        ({"output": tmp_path / "v.txt"}, "ends in .png"),
        ({"output": tmp_path / "file" / "v.png"}, "cannot be written to"),
        ({"count": 0}, "choose 1 to 64"),
        ({"image_size": 40}, "not divisible by 16"),
        ({"token": (2, 0)}, "outside the grid of 2 x 2 tokens"),
        ({"token": (0, -1)}, "outside the grid"),
        ({"head": 4}, "heads 0 to 3"),
    ):
        with pytest.raises(convmae.UserError, match=message) as error:
            call(**wrong)
        assert "\n" not in str(error.value)
        assert not output.exists()
