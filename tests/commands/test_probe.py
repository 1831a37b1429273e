"""The linear probe in both forms, against scikit-learn and against the published recipe written out."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from timm.optim import Lars
from torch.nn.functional import cross_entropy
from torchvision.transforms import CenterCrop, InterpolationMode, PILToTensor, Resize

import convmae
from convmae.commands.probe import probe
from convmae.data.sources import ImageCollection
from convmae.evaluation.linear import STRENGTHS
from convmae.kinds import load_classifier
from convmae.tasks.classification.job import ClassificationJob
from convmae.training import run
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.engine import DeviceOptions, EngineOptions
from convmae.training.logging import read_metrics
from convmae.training.optimizer import LarsOptions

IN_PROCESS = EngineOptions("cpu", "float32", 0)
CLASSES = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture(scope="module")
def overlapping(write_classes, tmp_path_factory):
    """Six classes of noise whose colours overlap, 12 images each, 6 for validation; treat it as read-only."""
    numbers = np.random.default_rng(0)
    colours = dict(zip(CLASSES, numbers.uniform(40, 215, (6, 3)), strict=True))
    folder = tmp_path_factory.mktemp("overlapping") / "images"
    return write_classes(folder, {"train": 12, "val": 6}, colours, shades=35, noise=30, numbers=numbers)


def crop(path, size=32):
    """The validation view of an image, uint8 (1, 3, size, size)."""
    image = Resize(int(size / 0.875), InterpolationMode.BICUBIC)(Image.open(path))
    return PILToTensor()(CenterCrop(size)(image))[None]


@torch.inference_mode()
def outputs_by_hand(model, folder):
    """What a model makes of the images of a split, (N, ...), and their classes (N,)."""
    paths = [(path, number) for number, name in enumerate(CLASSES) for path in sorted((folder / name).iterdir())]
    return torch.cat([model(crop(path)) for path, _ in paths]), torch.tensor([number for _, number in paths])


def features_by_hand(weights, folder):
    """Mean-pooled, normalised features of a frozen encoder."""
    encoder = load_classifier(weights).encoder.eval()
    maps, labels = outputs_by_hand(encoder, folder)
    return torch.nn.functional.layer_norm(maps.mean(dim=(1, 2)), maps.shape[-1:], eps=1e-6), labels


def share_of_hits(scores, labels):
    return (scores.argmax(dim=1) == labels).float().mean().item()


@pytest.fixture(scope="module")
def fast(overlapping, autoencoder_file, tmp_path_factory):
    """The result of the fast form; treat it as read-only."""
    return probe(str(overlapping), autoencoder_file, tmp_path_factory.mktemp("runs") / "probe", engine=IN_PROCESS)


def test_the_linear_figures_are_scikit_learn_s(fast, overlapping, autoencoder_file):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = features_by_hand(autoencoder_file, overlapping / "train")
    queries, truth = features_by_hand(autoencoder_file, overlapping / "val")
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    # scikit-learn's C weighs the sum of the losses against half of the squared weights.
    regression = linear_model.LogisticRegression(C=1 / (len(features) * fast.strength), max_iter=10_000, tol=1e-8)
    regression.fit(((features - mean) / deviation).numpy(), labels.numpy())
    scores = torch.from_numpy(regression.predict_log_proba(((queries - mean) / deviation).numpy()))
    assert fast.strength in STRENGTHS
    assert fast.top1 == pytest.approx(share_of_hits(scores, truth), abs=1.01 / len(truth))
    top5 = (scores.topk(5, dim=1).indices == truth[:, None]).any(dim=1).float().mean().item()
    assert fast.top5 == pytest.approx(top5, abs=1.01 / len(truth))
    assert 0.4 < fast.top1 < 1  # chance is 1/6, and the classes overlap


def test_the_nearest_neighbours_are_scikit_learn_s(overlapping, autoencoder_file, fast, tmp_path):
    sklearn = pytest.importorskip("sklearn.neighbors")
    features, labels = features_by_hand(autoencoder_file, overlapping / "train")
    queries, truth = features_by_hand(autoencoder_file, overlapping / "val")
    found = []
    for neighbours in (1, 20):
        voting = sklearn.KNeighborsClassifier(
            neighbours, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        )
        voting.fit(features.double().numpy(), labels.numpy())
        found.append(voting.score(queries.double().numpy(), truth.numpy()))
    nearest = probe(str(overlapping), autoencoder_file, tmp_path / "one", neighbours=1, engine=IN_PROCESS)
    assert [nearest.neighbours_top1, fast.neighbours_top1] == pytest.approx(found)
    assert found[0] != found[1]


def test_a_stream_gives_the_same_figures(overlapping, autoencoder_file, fast, tmp_path, streams):
    streamed = probe(f"hfids/{overlapping}", autoencoder_file, tmp_path / "probe", engine=IN_PROCESS)
    assert streamed.neighbours_top1 == fast.neighbours_top1
    assert (streamed.top1, streamed.top5) == pytest.approx((fast.top1, fast.top5), abs=1.01 / 36)


def test_the_published_form_learns_from_a_stream(overlapping, autoencoder_file, tmp_path, streams, small_probe):
    steps_of_all_images = {"epochs": 20, "batch_size": 72, "optimizer": LarsOptions(base_lr=90.0)}
    result = small_probe(f"hfids/{overlapping}|72", tmp_path / "run", autoencoder_file, **steps_of_all_images)
    losses = [record["loss"] for record in read_metrics(result.folder)]
    assert losses[-1] < losses[0] - 0.05
    assert result.top1 > 0.3  # chance is 1/6


def test_each_image_is_read_once(overlapping, autoencoder_file, tmp_path, monkeypatch):
    opened = []
    open_annotated = ImageCollection.open_annotated

    def counting(self, index):
        opened.append(self.image_name(index))
        return open_annotated(self, index)

    monkeypatch.setattr(ImageCollection, "open_annotated", counting)
    probe(str(overlapping), autoencoder_file, tmp_path / "probe", batch_size=7, engine=IN_PROCESS)
    assert sorted(opened) == sorted(map(str, overlapping.rglob("*.png")))


@pytest.mark.parametrize("form", ["fast", "published"])
def test_the_written_classifier_has_the_accuracy_that_was_told(
    overlapping, autoencoder_file, fast, tmp_path, form, small_probe
):
    result = fast if form == "fast" else small_probe(overlapping, tmp_path / "run", autoencoder_file)
    model = convmae.load(result.checkpoint).eval()
    assert model.classes == CLASSES
    scores, truth = outputs_by_hand(model, overlapping / "val")
    assert result.top1 == pytest.approx(share_of_hits(scores, truth))
    predictions = convmae.predict(str(overlapping / "val" / "c"), result.checkpoint, top=1, engine=IN_PROCESS)
    # Class c is number 2, with the images from 12 on.
    assert [one.classes[0] for one in predictions] == [CLASSES[guess] for guess in scores[12:18].argmax(dim=1)]


@pytest.mark.parametrize("form", ["fast", "published"])
def test_only_the_head_is_new(overlapping, named_classifier_file, tmp_path, form, small_probe):
    """Of a fine-tuned classifier with other classes, encoder and norm stay bit for bit."""
    run = small_probe if form == "published" else probe
    result = run(str(overlapping), weights=named_classifier_file, output=tmp_path / "run", engine=IN_PROCESS)
    given, kept = load_file(named_classifier_file), load_file(result.checkpoint / "model.safetensors")
    assert given.keys() == kept.keys()
    different = {name for name in given if not torch.equal(given[name], kept[name])}
    assert different == {"head.weight", "head.bias"}
    assert kept["head.weight"].shape == (6, 32)


def test_the_result_is_written(fast, overlapping, autoencoder_file, tmp_path, capsys, small_probe):
    written = json.loads((fast.folder / "probe.json").read_text())
    assert written == {
        "folder": str(fast.folder),
        "checkpoint": str(fast.folder),
        "top1": fast.top1,
        "top5": fast.top5,
        "neighbours_top1": fast.neighbours_top1,
        "strength": fast.strength,
    }
    result = small_probe(overlapping, tmp_path / "run", autoencoder_file, epochs=1)
    written = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert (written["top1"], written["neighbours_top1"], written["strength"]) == (result.top1, None, None)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["form"] == "published"
    printed = capsys.readouterr().out
    assert f"{result.top1:.2%}" in printed
    assert "linear layer, 1 epochs" in printed


def test_grey_encoders_are_given_grey_images(overlapping, grey_autoencoder_file, tmp_path):
    result = probe(str(overlapping), grey_autoencoder_file, tmp_path / "probe", engine=IN_PROCESS)
    assert convmae.load(result.checkpoint).settings["in_channels"] == 1


def test_the_published_form_is_the_recipe_written_out(
    overlapping, autoencoder_file, tmp_path, monkeypatch, small_probe
):
    """Batch normalisation without weights, a linear layer, LARS with momentum 0.9 and no decay, a cosine to 0."""
    seen, optimizers = [], []
    batches, build = ClassificationJob.batches, run.build_optimizer

    def recording(self, epoch, first):
        for images, targets in batches(self, epoch, first):
            seen.append((images.clone(), targets))
            yield images, targets

    monkeypatch.setattr(ClassificationJob, "batches", recording)
    monkeypatch.setattr(run, "build_optimizer", lambda *given: optimizers.append(build(*given)) or optimizers[-1])
    still = small_probe(overlapping, tmp_path / "still", autoencoder_file, epochs=1, optimizer=LarsOptions(base_lr=0.0))
    start = load_file(still.folder / "checkpoints/step-00000004/head.safetensors")
    seen.clear()
    trained = small_probe(overlapping, tmp_path / "run", autoencoder_file, optimizer=LarsOptions(base_lr=8.0))
    assert isinstance(optimizers[-1], Lars)
    end = load_file(trained.folder / "checkpoints/step-00000016/head.safetensors")
    assert end.keys() == {
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "layer.weight", "layer.bias",
    }  # fmt: skip
    assert start["layer.weight"].std().item() == pytest.approx(0.01, rel=0.2)
    assert not start["layer.bias"].any()

    encoder = load_classifier(autoencoder_file).encoder.eval()
    weight, bias = (start[f"layer.{name}"].clone().requires_grad_() for name in ("weight", "bias"))
    mean, variance = torch.zeros(32), torch.ones(32)
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    losses = []
    assert len(seen) == 16
    for step, (images, targets) in enumerate(seen):
        with torch.no_grad():
            features = torch.nn.functional.layer_norm(encoder(images).mean(dim=(1, 2)), (32,), eps=1e-6)
        assert (
            targets.sum(dim=1).tolist() == targets.max(dim=1).values.tolist() == [1.0] * 16
        )  # neither mixed nor smooth
        own_mean, own_variance = features.mean(dim=0), features.var(dim=0, correction=0)
        mean = 0.9 * mean + 0.1 * own_mean
        variance = 0.9 * variance + 0.1 * features.var(dim=0, correction=1)
        standard = (features - own_mean) / (own_variance + 1e-6).sqrt()
        loss = cross_entropy(standard @ weight.T + bias, targets.argmax(dim=1))
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, (weight, bias))
        # A fifth of 4 epochs of warm-up are 3.2 of 16 steps: 3.
        share = step / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 13)) / 2
        with torch.no_grad():
            trust = 0.001 * weight.norm() / gradients[0].norm()
            for number, (value, scale) in enumerate(((weight, trust), (bias, 1.0))):
                momenta[number] = 0.9 * momenta[number] + scale * gradients[number]
                value -= 8.0 * 16 / 256 * share * momenta[number]
    assert [record["loss"] for record in read_metrics(trained.folder)] == pytest.approx(losses, rel=1e-4)
    for name, expected in (("layer.weight", weight), ("layer.bias", bias)):
        assert not torch.equal(start[name], end[name])
        torch.testing.assert_close(end[name], expected.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(end["norm.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end["norm.running_var"], variance, rtol=1e-4, atol=1e-5)

    queries, _ = features_by_hand(autoencoder_file, overlapping / "val")
    with torch.inference_mode():
        expected = ((queries - mean) / (variance + 1e-6).sqrt()) @ weight.T + bias
        scores, _ = outputs_by_hand(convmae.load(trained.checkpoint).eval(), overlapping / "val")
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)


def test_the_published_form_learns(overlapping, autoencoder_file, tmp_path, small_probe):
    steps_of_all_images = {"epochs": 20, "batch_size": 72, "optimizer": LarsOptions(base_lr=90.0)}
    result = small_probe(overlapping, tmp_path / "run", autoencoder_file, **steps_of_all_images)
    metrics = read_metrics(result.folder)
    losses = [record["loss"] for record in metrics]
    assert losses[0] == pytest.approx(math.log(6), abs=0.05)
    assert losses[-1] < losses[0] - 0.05
    assert result.top1 == metrics[-1]["top1"] > 0.3  # chance is 1/6


def test_a_run_goes_on_only_with_its_own_classes_and_encoder(
    overlapping, autoencoder_file, classifier_file, tmp_path, small_probe
):
    small_probe(overlapping, tmp_path / "run", autoencoder_file, epochs=1)
    fewer, renamed = (shutil.copytree(overlapping, tmp_path / name) for name in ("fewer", "renamed"))
    for split in ("train", "val"):
        shutil.rmtree(fewer / split / "b")
        (renamed / split / "b").rename(renamed / split / "beta")
    for data, weights in ((fewer, autoencoder_file), (renamed, autoencoder_file), (overlapping, classifier_file)):
        with pytest.raises(convmae.UserError, match="another encoder or with other classes: choose another --output"):
            small_probe(data, tmp_path / "run", weights, epochs=2, resume=True)
    assert small_probe(overlapping, tmp_path / "run", autoencoder_file, epochs=2, resume=True).checkpoint.exists()


@pytest.mark.parametrize("form", ["fast", "published"])
def test_a_result_is_never_overwritten(overlapping, autoencoder_file, tmp_path, form, small_probe, files_of):
    first = {"fast": probe, "published": small_probe}[form]
    first(str(overlapping), weights=autoencoder_file, output=tmp_path / "run", engine=IN_PROCESS)
    before = files_of(tmp_path / "run")
    for again in (probe, small_probe):
        with pytest.raises(convmae.UserError, match="choose another --output"):
            again(str(overlapping), weights=autoencoder_file, output=tmp_path / "run", engine=IN_PROCESS)
    if form == "fast":
        with pytest.raises(convmae.UserError, match="holds a result: choose another --output"):
            small_probe(overlapping, tmp_path / "run", autoencoder_file, resume=True)
    assert files_of(tmp_path / "run") == before


@pytest.mark.parametrize("form", ["fast", "published"])
def test_a_damaged_image_stops_and_skip_damaged_goes_on(
    overlapping, autoencoder_file, tmp_path, form, capsys, small_probe
):
    data = shutil.copytree(overlapping, tmp_path / "data")
    broken = [data / "train/b/03.png", data / "val/e/01.png"]
    for path in broken:
        path.write_bytes(b"no picture")
    run = small_probe if form == "published" else probe
    with pytest.raises(convmae.UserError, match=r"png cannot be decoded.*--skip-damaged") as error:
        run(str(data), weights=autoencoder_file, output=tmp_path / "run", engine=IN_PROCESS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "probe.json").exists()
    result = run(str(data), weights=autoencoder_file, output=tmp_path / "other", skip_damaged=True, engine=IN_PROCESS)
    listed = (tmp_path / "other" / "undecodable-images.txt").read_text().splitlines()
    assert sorted(line.partition(":")[0] for line in listed) == list(map(str, broken))
    assert "2 images could not be decoded" in capsys.readouterr().out
    assert (result.top1 * 35) == pytest.approx(round(result.top1 * 35), abs=1e-4)  # 36 images but one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": 0}, "neighbours is 0: it must be at least 1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"weights": "nothing.pth"}, "no weights at nothing.pth"),
        ({"image_size": 40}, "40x40 is not divisible by 16"),
        ({"train_split": "elsewhere"}, "no folder elsewhere/"),
        ({"data": "no/such/folder"}, "no/such/folder does not exist"),
        ({"form": "published", "optimizer": LarsOptions(warmup_epochs=90)}, "warm-up of 90 epochs does not fit"),
        ({"form": "published", "checkpoint": CheckpointOptions(keep=0)}, "keep must be at least 1"),
        ({"form": "published", "batch_size": 1}, "needs two images or more in each pass of a process: raise --batch"),
        ({"form": "published", "batch_size": 4, "accumulate": 4}, "needs two images or more in each pass"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(overlapping, autoencoder_file, tmp_path, changes, message):
    usual = {"data": str(overlapping), "weights": autoencoder_file, "output": tmp_path / "run", "engine": IN_PROCESS}
    with pytest.raises(convmae.UserError, match=message) as error:
        probe(**{**usual, **changes})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_class_that_was_not_learned_is_refused(overlapping, autoencoder_file, tmp_path):
    data = shutil.copytree(overlapping, tmp_path / "data")
    (data / "val" / "f").rename(data / "val" / "g")
    with pytest.raises(convmae.UserError, match="has the class 'g', which the training split lacks"):
        probe(str(data), autoencoder_file, tmp_path / "run", engine=IN_PROCESS)


def test_the_command_line_ends_with_one_line_and_status_2(refused, overlapping, autoencoder_file):
    given = ("--data", overlapping, "--weights", autoencoder_file)
    refused("neighbours is 0", "probe", *given, "--neighbours", "0")
    refused("--form cannot be 'slow'", "probe", *given, "--form", "slow")


@pytest.mark.parametrize("form", ["fast", "published"])
def test_a_share_is_held_out_where_there_is_no_validation_split(
    overlapping, autoencoder_file, tmp_path, form, small_probe
):
    shutil.copytree(overlapping / "train", tmp_path / "data" / "train")
    given = (tmp_path / "data", tmp_path / "out", autoencoder_file)
    with pytest.raises(convmae.UserError, match=r"has no folder val/.*--val-fraction 0\.1"):
        small_probe(*given, form=form, epochs=1)
    result = small_probe(*given, form=form, epochs=1, val_fraction=0.25)
    listed = (tmp_path / "out" / "validation-images.txt").read_text().splitlines()
    total = len(list((tmp_path / "data").rglob("*.png")))
    assert len(listed) == total // 4
    found = convmae.predict(str(tmp_path / "data"), result.checkpoint, engine=DeviceOptions("cpu", "float32", 0))
    right = sum(one.classes[0] == Path(one.path).parent.name for one in found if one.path in listed)
    assert result.top1 == pytest.approx(right / len(listed))
