"""The encoder in folders and repositories; nothing here asks the network."""

import json

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

import convmae
from convmae import ConvViT, weights
from convmae.models import hub


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def small():
    return ConvViT(
        image_size=(32, 48), in_channels=1, widths=(8, 12, 16), depths=(1, 2, 2), num_heads=2, kernel_size=3
    ).eval()


def test_a_folder_brings_the_encoder_back(tmp_path):
    encoder, images = small(), torch.randn(2, 1, 32, 48)
    encoder.save_pretrained(tmp_path)
    back = ConvViT.from_pretrained(tmp_path)
    assert back.settings == encoder.settings
    assert not back.training
    assert torch.equal(back(images), encoder(images))
    assert torch.equal(convmae.load(tmp_path).eval().forward_features(images), encoder(images))
    state, facts = weights.read(tmp_path)
    assert all(name.startswith("encoder.") for name in state)
    assert facts["kind"] == "encoder"
    assert facts["encoder"]["num_heads"] == json.loads((tmp_path / "config.json").read_text())["num_heads"] == 2


def test_the_model_card_says_what_it_is_and_how_to_load_it(tmp_path):
    small().save_pretrained(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "convmae"
    assert card.data.license == "apache-2.0"
    assert "masked-autoencoder" in card.data.tags
    assert "https://arxiv.org/abs/2205.03892" in card.text
    assert 'ConvViT.from_pretrained("USER/NAME")' in card.text
    assert "| 1 | 4 | 8 | 1 |\n| 2 | 8 | 12 | 2 |\n| 3 | 16 | 16 | 2 |\n\nChannels of an image: 1." in card.text
    assert "{{" not in card.text


@pytest.mark.parametrize("kind", ["autoencoder", "classifier"])
def test_a_run_s_folder_gives_its_encoder(tmp_path, kind):
    create = convmae.create_autoencoder if kind == "autoencoder" else convmae.create_classifier
    model = create("tiny", image_size=32)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    weights.save_model(checkpoint / weights.MODEL_FILE, model)
    for path in (tmp_path / "run", checkpoint, checkpoint / weights.MODEL_FILE):
        encoder = ConvViT.from_pretrained(path, image_size=64, drop_path=0.2)
        assert torch.equal(encoder.projection.weight, model.encoder.projection.weight)
        assert encoder.settings["image_size"] == (64, 64)
        assert encoder.stage3[-1].drop_path.drop_prob == 0.2


def test_a_repository_is_downloaded(tmp_path, monkeypatch):
    encoder = small()
    encoder.save_pretrained(tmp_path)
    asked = []

    def download(name, file, **others):
        asked.append((name, file, others["revision"]))
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    back = ConvViT.from_pretrained("someone/encoder", revision="v1")
    assert asked == [("someone/encoder", "model.safetensors", "v1")]
    assert torch.equal(back.projection.weight, encoder.projection.weight)


def test_pushing_uploads_weights_settings_and_card(monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            self.repo_id = "someone/encoder"

        def create_repo(self, **settings):
            return self

        def upload_folder(self, folder_path, **settings):
            uploaded["files"] = sorted(path.name for path in folder_path.iterdir())
            uploaded["encoder"] = ConvViT.from_pretrained(folder_path)
            return "https://huggingface.co/someone/encoder/commit/1"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    encoder = small()
    assert encoder.push_to_hub("someone/encoder").startswith("https://")
    assert uploaded["files"] == ["README.md", "config.json", "model.safetensors"]
    assert torch.equal(uploaded["encoder"].projection.weight, encoder.projection.weight)


def test_mistakes_are_one_line(tmp_path):
    for name, message in (
        ("someone/nothing-of-this-name", r"cannot be had from the Hugging Face Hub \(\w+\)"),
        ("a/folder/that/is/not/here", "pass a folder, a weights file, or user/name"),
        (tmp_path, "no model.safetensors in"),
    ):
        with pytest.raises(convmae.UserError, match=message) as error:
            ConvViT.from_pretrained(name)
        assert "\n" not in str(error.value)
