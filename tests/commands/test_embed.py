import json
import shutil
import signal
import subprocess
import sys

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.transforms import CenterCrop, InterpolationMode, PILToTensor, Resize

import convmae
from convmae.commands.embed import embed
from convmae.evaluation import feature_files
from convmae.evaluation.feature_files import read_features
from convmae.kinds import load_classifier
from convmae.models.classifier import Classifier
from convmae.training.engine import DeviceOptions
from convmae.training.loop import Interrupted

pyarrow = pytest.importorskip("pyarrow")
CPU = DeviceOptions("cpu", "float32", 0)


@pytest.fixture
def images(photographs, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(photographs, tmp_path / "images")


@pytest.fixture
def seen(monkeypatch):
    """How many images the model was given."""
    count = []
    forward = Classifier.forward_features

    def counting(self, images):
        count.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Classifier, "forward_features", counting)
    return count


def crop(path, size):
    """The validation view of an image: shorter side to 256 / 224 of the size, centre crop; uint8 (1, 3, size, size)."""
    image = Resize(int(size / 0.875), InterpolationMode.BICUBIC)(Image.open(path))
    return PILToTensor()(CenterCrop(size)(image))[None]


@torch.inference_mode()
def expected(model, path, stage, size):
    image = crop(path, size)
    if stage == "pooled":
        return model.fc_norm(model.encoder(image).mean(dim=(1, 2)))[0]
    if stage == "stage3":
        return model.encoder(image)[0]
    return getattr(model.encoder.convolve(model.encoder.normalize(image).permute(0, 2, 3, 1)), stage)[0]


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
@pytest.mark.parametrize(("stage", "shape"), [("pooled", (32,)), ("stage1", (16, 16, 16)), ("stage3", (4, 4, 32))])
def test_features_are_those_of_the_model_called_directly(photographs, autoencoder_file, tmp_path, suffix, stage, shape):
    made = embed(
        str(photographs), tmp_path / f"f{suffix}", autoencoder_file, stage, image_size=64, batch_size=4, engine=CPU
    )
    assert made.shape == (10, *shape)
    assert made.damaged == []
    read = read_features(made.output)
    assert sorted(read.paths) == sorted(map(str, photographs.rglob("*.png")))
    model = load_classifier(autoencoder_file, image_size=(64, 64)).eval()
    for path, features in zip(read.paths, read.features, strict=True):
        torch.testing.assert_close(features, expected(model, path, stage, 64), rtol=1e-4, atol=1e-4)
    assert list(tmp_path.iterdir()) == [made.output]


def test_other_libraries_read_the_files(photographs, classifier_file, tmp_path):
    pandas = pytest.importorskip("pandas")
    tables, maps = tmp_path / "f.parquet", tmp_path / "maps.parquet"
    embed(str(photographs), tables, classifier_file, engine=CPU)
    embed(str(photographs), tmp_path / "f.safetensors", classifier_file, engine=CPU)
    embed(str(photographs), maps, classifier_file, "stage2", engine=CPU)

    tensor = load_file(tmp_path / "f.safetensors")["features"]
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        metadata = file.metadata()
    table = pandas.read_parquet(tables)
    assert table["path"].tolist() == json.loads(metadata["paths"])
    numpy.testing.assert_array_equal(numpy.stack(table["features"]), tensor.numpy())
    assert tensor.dtype == torch.float32
    assert (metadata["stage"], metadata["weights"], metadata["image_size"]) == (
        "pooled", str(classifier_file), "32x32",
    )  # fmt: skip

    column = pyarrow.parquet.read_table(maps)["features"].combine_chunks()
    assert column.type.shape == [4, 4, 24]
    numpy.testing.assert_array_equal(column.to_numpy_ndarray(), read_features(maps).features.numpy())


def test_a_killed_run_goes_on_where_it_stood(photographs, autoencoder_file, tmp_path, seen, monkeypatch):
    """The file is the same to the byte, and the model sees only the rest."""
    straight, broken = tmp_path / "straight" / "f.parquet", tmp_path / "broken" / "f.parquet"
    monkeypatch.setattr(feature_files, "_PART_BYTES", 3 * 32 * 4)  # several row groups of Parquet
    embed(str(photographs), straight, autoencoder_file, batch_size=2, engine=CPU)
    assert sum(seen) == 10

    program = f"""
import os, signal
from convmae.commands.embed import embed
from convmae.evaluation import feature_files
from convmae.models.classifier import Classifier
from convmae.training.engine import DeviceOptions
feature_files._PART_SECONDS = 0
calls, forward = [], Classifier.forward_features
def forward_features(self, images):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, images)
Classifier.forward_features = forward_features
embed({str(photographs)!r}, {str(broken)!r}, {str(autoencoder_file)!r}, batch_size=2,
      engine=DeviceOptions("cpu", "float32", 0))
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not broken.exists()
    seen.clear()
    embed(str(photographs), broken, autoencoder_file, batch_size=2, engine=CPU)
    assert sum(seen) == 4
    assert broken.read_bytes() == straight.read_bytes()
    assert list(broken.parent.iterdir()) == [broken]


def test_a_run_killed_while_joining_computes_nothing_again(photographs, autoencoder_file, tmp_path, seen, monkeypatch):
    output = tmp_path / "f.parquet"

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feature_files, "_write_parquet", full_disk)
        with pytest.raises(OSError, match="No space"):
            embed(str(photographs), output, autoencoder_file, engine=CPU)
    seen.clear()
    assert embed(str(photographs), output, autoencoder_file, engine=CPU).shape == (10, 32)
    assert seen == []


def test_ctrl_c_loses_nothing(photographs, autoencoder_file, tmp_path, seen, monkeypatch):
    forward = Classifier.forward_features

    def interrupted(self, images):
        if len(seen) == 2:
            raise KeyboardInterrupt
        return forward(self, images)

    straight, broken = tmp_path / "straight.safetensors", tmp_path / "broken.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "forward_features", interrupted)
        with pytest.raises(Interrupted, match="the same command goes on"):
            embed(str(photographs), broken, autoencoder_file, batch_size=3, engine=CPU)
    seen.clear()
    embed(str(photographs), broken, autoencoder_file, batch_size=3, engine=CPU)
    assert sum(seen) == 4
    embed(str(photographs), straight, autoencoder_file, batch_size=3, engine=CPU)
    assert straight.read_bytes() == broken.read_bytes()


def test_a_damaged_image_stops_and_skip_damaged_goes_on(images, autoencoder_file, tmp_path, seen, capsys):
    broken = sorted(images.rglob("*.png"))[3]
    broken.write_bytes(b"no picture")
    output = tmp_path / "f.safetensors"
    with pytest.raises(convmae.UserError, match=rf"{broken.name} cannot be decoded.*--skip-damaged") as error:
        embed(str(images), output, autoencoder_file, batch_size=2, engine=CPU)
    assert "\n" not in str(error.value)
    assert not output.exists()
    assert sum(seen) == 2
    made = embed(str(images), output, autoencoder_file, batch_size=2, skip_damaged=True, engine=CPU)
    assert sum(seen) == 9  # two of the first run and seven of the second
    assert made.shape == (9, 32)
    assert len(made.damaged) == 1
    assert str(broken) in made.damaged[0]
    captured = capsys.readouterr()
    assert "images that were left out: 1" in captured.err
    assert str(broken) in captured.err
    assert str(broken) not in read_features(output).paths


def test_what_an_interrupted_run_left_out_is_listed_at_the_end(images, autoencoder_file, tmp_path, monkeypatch):
    first, *_, last = sorted(images.rglob("*.png"))
    for path in (first, last):
        path.write_bytes(b"no picture")
    options = {"batch_size": 5, "skip_damaged": True, "engine": CPU}
    with monkeypatch.context() as patch:
        patch.setattr(feature_files.FeatureParts, "join", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(str(images), tmp_path / "f.parquet", autoencoder_file, **options)
    made = embed(str(images), tmp_path / "f.parquet", autoencoder_file, **options)
    assert [failure.partition(":")[0] for failure in made.damaged] == [str(first), str(last)]


def test_parts_of_another_run_are_refused(images, autoencoder_file, classifier_file, tmp_path, monkeypatch):
    output = tmp_path / "f.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(feature_files.FeatureParts, "join", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(str(images), output, autoencoder_file, engine=CPU)
    bf16 = DeviceOptions("cpu", "bf16", 0)
    for call, different in (
        (lambda: embed(str(images), output, classifier_file, engine=CPU), "weights"),
        (lambda: embed(str(images), output, autoencoder_file, "stage2", engine=CPU), "stage"),
        (lambda: embed(str(images), output, autoencoder_file, image_size=64, engine=CPU), "image size"),
        (lambda: embed(str(images), output, autoencoder_file, crop_pct=1.0, engine=CPU), "crop_pct"),
        (lambda: embed(str(images), output, autoencoder_file, engine=bf16), "precision"),
        (lambda: embed(str(images / "a"), output, autoencoder_file, engine=CPU), "data, number of images, names"),
    ):
        with pytest.raises(convmae.UserError, match=rf"unfinished run with other {different}.*delete that") as error:
            call()
        assert "\n" not in str(error.value)
    next(images.rglob("*.png")).rename(images / "renamed.png")
    with pytest.raises(convmae.UserError, match="other names of images"):
        embed(str(images), output, autoencoder_file, engine=CPU)


def test_an_existing_output_is_kept_unless_overwritten(photographs, autoencoder_file, tmp_path):
    output = tmp_path / "f.parquet"
    output.write_text("mine")
    with pytest.raises(convmae.UserError, match="exists: replace it with --overwrite"):
        embed(str(photographs), output, autoencoder_file, engine=CPU)
    assert output.read_text() == "mine"
    embed(str(photographs), output, autoencoder_file, overwrite=True, engine=CPU)
    assert len(read_features(output).paths) == 10


def test_hugging_face_data_sets_are_read(photographs, autoencoder_file, tmp_path):
    pytest.importorskip("datasets")
    made = embed(f"hfds/{photographs}", tmp_path / "f.parquet", autoencoder_file, engine=CPU)
    assert made.shape == (10, 32)
    assert read_features(made.output).paths[3] == "row 3"
    with pytest.raises(convmae.UserError, match=r"split validation, cannot be opened"):
        embed(f"hfds/{photographs}", tmp_path / "g.parquet", autoencoder_file, split="validation", engine=CPU)


def test_mistakes_are_one_line(images, autoencoder_file, tmp_path, monkeypatch):
    output = tmp_path / "f.parquet"
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    (tmp_path / "file").touch()
    for call, message in (
        (lambda: embed(str(tmp_path / "none"), output, autoencoder_file), "does not exist"),
        (lambda: embed(str(tmp_path / "empty"), output, autoencoder_file), "is empty"),
        (lambda: embed(str(tmp_path / "broken"), output, autoencoder_file, skip_damaged=True, engine=CPU), "none of"),
        (lambda: embed(str(images), tmp_path / "f.csv", autoencoder_file), "ends in .parquet or .safetensors"),
        (lambda: embed(str(images), tmp_path / "file" / "f.parquet", autoencoder_file), "cannot be written to"),
        (lambda: embed(str(images), output, tmp_path / "none"), "no weights at"),
        (lambda: embed(str(images), output, autoencoder_file, image_size=40), "not divisible by 16"),
        (lambda: embed(str(images), output, autoencoder_file, batch_size=0, engine=CPU), "at least 1"),
    ):
        with pytest.raises(convmae.UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
        assert not output.exists()
    monkeypatch.setattr("convmae.errors.find_spec", lambda name: None)
    with pytest.raises(convmae.UserError, match=r"pip install 'convmae\[parquet\]'"):
        embed(str(images), output, autoencoder_file)
    monkeypatch.setattr(feature_files, "_LONGEST_HEADER", 10_100)
    with pytest.raises(convmae.UserError, match=r"choose a name ending in \.parquet"):
        embed(str(images), tmp_path / "f.safetensors", autoencoder_file)
