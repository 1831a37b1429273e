"""Fine-tuning from end to end: what it learns, its figures, the best model, mistakes."""

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import CenterCrop, InterpolationMode, PILToTensor, Resize

import convmae
from convmae import weights
from convmae.data.augmentation import AugmentationOptions
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.engine import DeviceOptions, EngineOptions
from convmae.training.logging import read_metrics
from convmae.training.optimizer import LayerDecayOptions

COLOURS = ["azure", "brown", "crimson", "green", "white", "yellow"]
IN_PROCESS = EngineOptions("cpu", "float32", 0)
EVERY_EPOCH = CheckpointOptions(every_epochs=1, keep=100)


@pytest.fixture
def copied(labelled, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(labelled, tmp_path / "labelled")


@torch.inference_mode()
def judged_by_hand(weights, data, size=32, crop_pct=0.875):
    """Logits (N, 6) and classes (N,) of the validation images, read and cropped one by one."""
    model = convmae.load(weights).eval()
    logits, truth = [], []
    for number, name in enumerate(COLOURS):
        for path in sorted((data / "val" / name).iterdir()):
            image = CenterCrop(size)(Resize(int(size / crop_pct), InterpolationMode.BICUBIC)(Image.open(path)))
            logits.append(model(PILToTensor()(image)[None])[0])
            truth.append(number)
    return torch.stack(logits), torch.tensor(truth)


def share_of_hits(logits, truth):
    return (logits.argmax(dim=1) == truth).float().mean().item()


def model_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def finished(labelled, autoencoder_file, tmp_path_factory, small_finetuning):
    """A run of eight epochs that keeps the checkpoint of each; treat it as read-only."""
    output = tmp_path_factory.mktemp("runs") / "run"
    return small_finetuning(labelled, output, autoencoder_file, epochs=8, checkpoint=EVERY_EPOCH)


def test_it_learns(finished):
    assert finished.top1 > 0.8  # chance is 1/6
    losses = [record["loss"] for record in read_metrics(finished.folder)]
    assert losses[0] == pytest.approx(math.log(6), abs=0.01)  # the new head begins near zero
    assert sum(losses[-6:]) < sum(losses[:6]) / 2
    assert finished.steps == len(losses) == 48


def test_the_figures_are_those_of_the_kept_model_called_directly(finished, labelled):
    logits, truth = judged_by_hand(finished.checkpoint, labelled)
    assert finished.top1 == pytest.approx(share_of_hits(logits, truth))
    hits = (logits.topk(5, dim=1).indices == truth[:, None]).any(dim=1)
    assert finished.top5 == pytest.approx(hits.float().mean().item())
    assert finished.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, truth).item(), rel=1e-3)
    for number, name in enumerate(COLOURS):
        own = truth == number
        assert finished.per_class[name] == pytest.approx(share_of_hits(logits[own], truth[own]))
    assert finished.per_class["brown"] < 1  # it holds an image of another class


def test_a_run_leaves_everything_a_user_wants(
    labelled, autoencoder_file, tmp_path, capsys, monkeypatch, small_finetuning
):
    drawn = []
    monkeypatch.setattr("convmae.commands.finetune.confusion_picture", lambda *given: drawn.append(given))
    result = small_finetuning(labelled, tmp_path / "run", autoencoder_file, epochs=4)
    logits, truth = judged_by_hand(result.checkpoint, labelled)
    ((path, confusion, classes),) = drawn
    assert path == result.confusion_matrix
    assert classes == COLOURS
    expected = torch.zeros(6, 6, dtype=torch.int64)
    for true, guess in zip(truth, logits.argmax(dim=1), strict=True):
        expected[true, guess] += 1
    assert torch.equal(confusion, expected)

    with (tmp_path / "run" / "per-class.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["class", "images", "accuracy"]
    assert [(name, int(count)) for name, count, _ in rows] == [(name, 3) for name in COLOURS]
    assert {name: float(share) for name, _, share in rows} == pytest.approx(result.per_class)
    printed = capsys.readouterr().err
    assert "fine-tuning finished" in printed
    assert f"{result.top1:.2%}" in printed
    assert "48 images of 6 classes, 4 epochs of 6 steps of 8 images" in printed


def test_pictures_settings_and_the_classes_are_kept(finished, labelled):
    assert Image.open(finished.confusion_matrix).format == Image.open(finished.loss_curve).format == "PNG"
    assert yaml.safe_load((finished.folder / "config.yaml").read_text())["optimizer"]["layer_decay"] == 0.8
    model = convmae.load(finished.folder)
    assert model.classes == COLOURS
    assert model.settings["image_size"] in ([32, 32], (32, 32))
    one, *others = convmae.predict(str(labelled / "val/green/01.png"), finished.folder, engine=DeviceOptions("cpu"))
    assert not others
    logits, truth = judged_by_hand(finished.folder, labelled)
    assert truth[10] == COLOURS.index("green")
    assert one.classes == tuple(COLOURS[number] for number in logits[10].topk(5).indices)


def test_the_share_that_evaluation_sees_is_kept_with_the_model(labelled, autoencoder_file, tmp_path, small_finetuning):
    result = small_finetuning(labelled, tmp_path / "run", autoencoder_file, epochs=1, crop_pct=0.5)
    assert convmae.load(result.folder).crop_pct == 0.5
    assert result.top1 == pytest.approx(share_of_hits(*judged_by_hand(result.folder, labelled, crop_pct=0.5)))
    logits, _ = judged_by_hand(result.folder, labelled, crop_pct=0.5)
    (one,) = convmae.predict(str(labelled / "val/green/01.png"), result.folder, engine=DeviceOptions("cpu", "float32"))
    assert one.probabilities == pytest.approx(logits[10].softmax(dim=0).topk(5).values.tolist(), rel=1e-3)


def test_the_best_model_is_that_of_the_first_epoch_with_the_highest_accuracy(finished, labelled, same):
    evaluated = [record for record in read_metrics(finished.folder) if "top1" in record]
    assert [record["step"] for record in evaluated] == list(range(6, 49, 6))
    by_hand = [
        share_of_hits(*judged_by_hand(finished.folder / "checkpoints" / f"step-{record['step']:08d}", labelled))
        for record in evaluated
    ]
    assert [record["top1"] for record in evaluated] == pytest.approx(by_hand)
    best = evaluated[by_hand.index(max(by_hand))]["step"]
    assert 6 < best < 48
    kept = model_of(finished.folder / "best")
    assert same(kept, model_of(finished.folder / "checkpoints" / f"step-{best:08d}"))
    assert not same(kept, model_of(finished.folder / "checkpoints" / "step-00000048"))
    assert finished.checkpoint == finished.folder / "best"


@pytest.mark.parametrize("kind", ["autoencoder_file", "named_classifier_file"])
def test_training_starts_from_the_given_encoder_with_a_new_head(labelled, tmp_path, kind, request, small_finetuning):
    weights = request.getfixturevalue(kind)
    still = LayerDecayOptions(base_lr=0.0, min_lr=0.0)
    result = small_finetuning(labelled, tmp_path / "run", weights, epochs=1, optimizer=still, seed=5)
    given, kept = load_file(weights), model_of(result.checkpoint)
    encoder = [name for name in kept if name.startswith("encoder.")]
    assert len(encoder) > 40
    assert all(torch.equal(given[name], kept[name]) for name in encoder)
    assert kept["head.weight"].shape == (6, 32)
    assert 1e-5 < kept["head.weight"].std() < 4e-5  # the head begins near zero: std 2e-5
    assert not kept["head.bias"].any()


def test_a_head_of_the_same_classes_goes_on(labelled, finished, tmp_path, same, small_finetuning):
    still = LayerDecayOptions(base_lr=0.0, min_lr=0.0)
    again = small_finetuning(labelled, tmp_path / "run", finished.checkpoint, epochs=1, optimizer=still)
    assert same(model_of(again.checkpoint), model_of(finished.checkpoint))
    assert again.top1 == finished.top1


def test_a_head_of_other_classes_is_not_taken(copied, finished, tmp_path, small_finetuning):
    for split in ("train", "val"):
        (copied / split / "green").rename(copied / split / "teal")
    still = LayerDecayOptions(base_lr=0.0, min_lr=0.0)
    result = small_finetuning(copied, tmp_path / "run", finished.checkpoint, epochs=1, optimizer=still)
    given, kept = model_of(finished.checkpoint), model_of(result.checkpoint)
    different = {name for name in given if not torch.equal(given[name], kept[name])}
    assert different == {"head.weight", "head.bias"}
    assert convmae.load(result.checkpoint).classes == ["azure", "brown", "crimson", "teal", "white", "yellow"]


def test_it_trains_from_scratch(labelled, tmp_path, small_finetuning):
    result = small_finetuning(labelled, tmp_path / "run", epochs=4, optimizer=LayerDecayOptions(base_lr=0.03))
    losses = [record["loss"] for record in read_metrics(result.folder)]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    assert convmae.load(result.checkpoint).settings["widths"] in ((48, 96, 192), [48, 96, 192])


def test_the_average_is_what_is_evaluated_and_kept(labelled, autoencoder_file, tmp_path, same, small_finetuning):
    settings = {"epochs": 1, "checkpoint": EVERY_EPOCH}
    result = small_finetuning(labelled, tmp_path / "run", autoencoder_file, ema_decay=0.9, **settings)
    last = result.folder / "checkpoints" / "step-00000006"
    kept = model_of(result.checkpoint)
    assert same(kept, load_file(last / "average.safetensors"))
    assert not same(kept, model_of(last))
    logits, truth = judged_by_hand(result.checkpoint, labelled)
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, truth).item(), rel=1e-3)
    plain = small_finetuning(labelled, tmp_path / "plain", autoencoder_file, **settings)
    assert same(model_of(plain.checkpoint), model_of(last))  # the average leaves training alone


def test_resuming_a_finished_run_changes_nothing(labelled, autoencoder_file, tmp_path, same, small_finetuning):
    first = small_finetuning(labelled, tmp_path / "run", autoencoder_file)
    before = model_of(first.checkpoint)
    again = small_finetuning(labelled, tmp_path / "run", autoencoder_file, resume=True)
    assert again == first
    assert same(model_of(again.checkpoint), before)


@pytest.mark.parametrize("change", ["renamed", "fewer"])
def test_a_run_does_not_go_on_with_other_classes(
    finished, copied, autoencoder_file, change, files_of, small_finetuning
):
    for split in ("train", "val"):
        if change == "renamed":
            (copied / split / "azure").rename(copied / split / "zinc")
        else:
            shutil.rmtree(copied / split / "azure")
    before = files_of(finished.folder)
    with pytest.raises(convmae.UserError, match=r"holds a run with other classes than .*: choose another --output"):
        small_finetuning(copied, finished.folder, autoencoder_file, resume=True)
    assert files_of(finished.folder) == before


def test_a_run_is_never_overwritten(finished, labelled, autoencoder_file, files_of, small_finetuning):
    before = files_of(finished.folder)
    with pytest.raises(convmae.UserError, match=r"holds a run: continue it with --resume, or choose another --output"):
        small_finetuning(labelled, finished.folder, autoencoder_file)
    assert files_of(finished.folder) == before


def test_two_passes_make_the_step_of_one_large_batch(labelled, autoencoder_file, tmp_path, small_finetuning):
    figures = []
    for accumulate in (1, 2):
        run = small_finetuning(labelled, tmp_path / str(accumulate), autoencoder_file, accumulate=accumulate)
        assert run.steps == 12
        metrics = read_metrics(run.folder)
        figures.append([(record["loss"], record["grad_norm"]) for record in metrics])
    torch.testing.assert_close(torch.tensor(figures[0]), torch.tensor(figures[1]), rtol=1e-4, atol=1e-5)


def test_evaluations_may_be_rarer_than_epochs(labelled, autoencoder_file, tmp_path, small_finetuning):
    result = small_finetuning(labelled, tmp_path / "run", autoencoder_file, epochs=5, evaluate_every_epochs=2)
    assert [record["step"] for record in read_metrics(result.folder) if "top1" in record] == [12, 24, 30]


def test_a_damaged_validation_image_loses_no_training(copied, autoencoder_file, tmp_path, small_finetuning):
    (copied / "val" / "green" / "01.png").write_bytes(b"no picture")
    rarely = {"epochs": 2, "checkpoint": CheckpointOptions(every_epochs=100)}
    with pytest.raises(convmae.UserError, match=r"green/01.png cannot be decoded.*--skip-damaged"):
        small_finetuning(copied, tmp_path / "run", autoencoder_file, **rarely)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000006"]
    result = small_finetuning(copied, tmp_path / "run", autoencoder_file, resume=True, skip_damaged=True, **rarely)
    assert result.steps == 12
    assert [record["step"] for record in read_metrics(result.folder) if "top1" in record] == [12]


def test_without_one_validation_image_nothing_is_judged(copied, autoencoder_file, tmp_path, small_finetuning):
    for path in (copied / "val").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(convmae.UserError, match="no validation image can be decoded"):
        small_finetuning(copied, tmp_path / "run", autoencoder_file, epochs=1, skip_damaged=True)


def test_a_best_model_that_was_moved_away_is_found_anew(
    labelled, autoencoder_file, tmp_path, monkeypatch, small_finetuning
):
    once = {"checkpoint": EVERY_EPOCH, "epochs": 3}
    small_finetuning(labelled, tmp_path / "run", autoencoder_file, **once)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000018")
    (tmp_path / "run" / "best").rename(tmp_path / "deployed")
    result = small_finetuning(labelled, tmp_path / "run", autoencoder_file, resume=True, **once)
    assert result.top1 == pytest.approx(share_of_hits(*judged_by_hand(result.checkpoint, labelled)))


def test_weights_without_pooling_are_pooled(labelled, tmp_path, small_finetuning):
    model = convmae.create_classifier("tiny", image_size=32, num_classes=0, global_pool="")
    weights.save_model(tmp_path / "maps.safetensors", model)
    result = small_finetuning(labelled, tmp_path / "run", tmp_path / "maps.safetensors", epochs=1)
    assert convmae.load(result.folder)(torch.zeros(2, 3, 32, 32)).shape == (2, 6)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_stops_and_skip_damaged_goes_on(copied, autoencoder_file, tmp_path, split, small_finetuning):
    broken = copied / split / "green" / "01.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(convmae.UserError, match=r"green/01.png cannot be decoded.*--skip-damaged") as error:
        small_finetuning(copied, tmp_path / "run", autoencoder_file, epochs=1)
    assert "\n" not in str(error.value)
    result = small_finetuning(copied, tmp_path / "other", autoencoder_file, epochs=1, skip_damaged=True)
    (line,) = (tmp_path / "other" / "undecodable-images.txt").read_text().splitlines()
    assert line.startswith(str(broken))
    with (result.folder / "per-class.csv").open(newline="") as file:
        counts = {row["class"]: int(row["images"]) for row in csv.DictReader(file)}
    assert counts == {name: 2 if (split, name) == ("val", "green") else 3 for name in COLOURS}


def test_a_class_without_validation_images_has_no_accuracy(copied, autoencoder_file, tmp_path, small_finetuning):
    shutil.rmtree(copied / "val" / "green")
    result = small_finetuning(copied, tmp_path / "run", autoencoder_file, epochs=1)
    assert [name for name, share in result.per_class.items() if math.isnan(share)] == ["green"]
    assert 0 <= result.top1 <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0: it must be at least 1"),
        ({"evaluate_every_epochs": 0}, "evaluate_every_epochs is 0"),
        ({"drop_path": 1.0}, "drop_path is 1.0: choose it from 0 to less than 1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0: choose it from 0 to less than 1"),
        ({"batch_size": 5, "augmentation": AugmentationOptions()}, "mixup and cutmix need pairs, a pass has 5 images"),
        ({"batch_size": 6, "accumulate": 2, "augmentation": AugmentationOptions()}, "a pass has 3 images"),
        ({"batch_size": 8, "accumulate": 3}, "choose a multiple of 3"),
        ({"aug_repeats": 3}, "8 images a pass and process are no multiple of aug_repeats 3"),
        ({"aug_repeats": 0}, "aug_repeats is 0: it must be at least 1"),
        (
            {"batch_size": 96, "accumulate": 3},
            "has too few images for a batch of 96 in 3 passes: lower --batch-size or --accumulate",
        ),
        ({"in_channels": 0, "weights": None}, "in_channels is 0: it must be at least 1"),
        ({"in_channels": 2, "weights": None}, r"it has 3 channels \(RGB\), the model takes 2: set --in-channels"),
        ({"image_size": 40}, "40x40 is not divisible by 16"),
        ({"weights": Path("nothing.pth")}, "no weights at nothing.pth"),
        ({"weights": None, "model": "giant"}, "unknown model 'giant'"),
        ({"val_split": "elsewhere"}, "no folder elsewhere/"),
        ({"optimizer": LayerDecayOptions(layer_decay=1.5)}, "a layer decay of 1.5 is out of range"),
        ({"optimizer": LayerDecayOptions(warmup_epochs=9)}, "warm-up of 9 epochs does not fit a run of 2"),
        ({"augmentation": AugmentationOptions(auto_augment="magic")}, "unknown policy auto_augment 'magic'"),
        ({"augmentation": AugmentationOptions(label_smoothing=1.0)}, "are shares: choose 0 to 1"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    labelled, autoencoder_file, tmp_path, changes, message, small_finetuning
):
    with pytest.raises(convmae.UserError, match=message) as error:
        small_finetuning(labelled, tmp_path / "run", **{"weights": autoencoder_file, **changes})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_folders_that_do_not_fit_are_refused(copied, autoencoder_file, tmp_path, refused, small_finetuning):
    def refused(message):
        with pytest.raises(convmae.UserError, match=message) as error:
            small_finetuning(copied, tmp_path / "run", autoencoder_file)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()

    (copied / "train" / "empty").mkdir()
    refused("empty holds no images")
    (copied / "train" / "empty").rmdir()
    shutil.copytree(copied / "val" / "green", copied / "val" / "teal")
    refused("has the class 'teal', which the training split lacks")
    shutil.rmtree(copied / "val")
    refused("no folder val/")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "epochs is 0: it must be at least 1"),
        (["--drop-path", "1"], "drop_path is 1.0: choose it from 0 to less than 1"),
        (["--batch-size", "5"], "mixup and cutmix need pairs"),
        (["--augmentation.mixup", "much"], "augmentation"),
    ],
)
def test_the_command_line_ends_with_one_line_and_status_2(refused, labelled, flags, message):
    small = ["--model", "tiny", "--image-size", "32", "--engine.accelerator", "cpu", "--engine.workers", "0"]
    refused(message, "finetune", "--data", labelled, *small, *flags)


# Several classes an image, and images held out


@pytest.fixture(scope="module")
def table(labelled, tmp_path_factory):
    """The same images by a table, each of its colour and of "dark" or not; a class without a validation image."""
    rows = ["path,labels,split"]
    for path in sorted(labelled.rglob("*.png")):
        dark = "|dark" if path.parent.name in ("brown", "crimson", "green") else ""
        rare = "|rare" if path.name == "07.png" else ""
        rows.append(f"{path},{path.parent.name}{dark}{rare},{path.parts[-3]}")
    file = tmp_path_factory.mktemp("table") / "images.csv"
    file.write_text("\n".join(rows))
    return file


@pytest.fixture(scope="module")
def several(table, autoencoder_file, tmp_path_factory, small_finetuning):
    """A run with several classes an image; treat it as read-only."""
    output = tmp_path_factory.mktemp("several") / "run"
    return small_finetuning(table, output, autoencoder_file, epochs=6, batch_size=8)


NAMES = sorted([*COLOURS, "dark", "rare"])


def judged_rows(table, weights):
    """Validation paths, probabilities (N, 8), and truth (N, 8), each image by itself."""
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
    model = convmae.load(weights).eval()
    found = []
    with torch.inference_mode():
        for row in rows:
            image = CenterCrop(32)(Resize(36, InterpolationMode.BICUBIC)(Image.open(row["path"])))
            found.append(model(PILToTensor()(image)[None])[0].sigmoid())
    truth = torch.tensor([[float(name in row["labels"].split("|")) for name in NAMES] for row in rows])
    return [row["path"] for row in rows], torch.stack(found), truth


def test_several_classes_an_image_are_learned_and_judged(several, table, capsys):
    from sklearn.metrics import average_precision_score

    _, probabilities, truth = judged_rows(table, several.checkpoint)
    expected = {
        name: average_precision_score(truth[:, number], probabilities[:, number])
        for number, name in enumerate(NAMES)
        if name != "rare"
    }
    assert {name: several.per_class[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    assert math.isnan(several.per_class["rare"])
    assert several.mean_average_precision == pytest.approx(sum(expected.values()) / 7, abs=1e-3)
    by_chance = truth[:, [NAMES.index(name) for name in expected]].mean().item()
    assert several.mean_average_precision > 2 * by_chance
    assert expected["dark"] > 0.8  # half of the images would score 0.5 by chance
    assert several.confusion_matrix is None
    assert not (several.folder / "confusion.png").exists()
    losses = [record["loss"] for record in read_metrics(several.folder)]
    assert losses[0] == pytest.approx(math.log(2), abs=0.01)  # each class by itself, the new head near zero
    evaluated = [record["map"] for record in read_metrics(several.folder) if "map" in record]
    assert max(evaluated) == pytest.approx(several.mean_average_precision)
    with (several.folder / "per-class.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["class", "images", "average_precision"]
    assert ["rare", "0", "-"] in rows
    assert [int(count) for _, count, _ in rows] == truth.sum(0).int().tolist()
    report = (several.folder / "data-report.txt").read_text()
    assert "1 of 8 classes has no validation image and no figure, such as rare" in report


def test_the_model_names_all_classes_above_a_threshold(several, table, tmp_path):
    assert convmae.load(several.checkpoint).multi_label
    paths, probabilities, _ = judged_rows(table, several.checkpoint)
    list_file = tmp_path / "list.txt"
    list_file.write_text("\n".join(paths))
    for threshold in (None, 0.2, 1.0):
        least = 0.5 if threshold is None else threshold
        found = convmae.predict(
            str(list_file),
            several.checkpoint,
            tmp_path / "p.csv",
            threshold=threshold,
            engine=DeviceOptions("cpu", "float32", 0),
        )
        assert [one.path for one in found] == paths
        for one, values in zip(found, probabilities, strict=True):
            assert set(one.classes) == {name for name, value in zip(NAMES, values, strict=True) if value >= least}
            assert sorted(one.probabilities, reverse=True) == list(one.probabilities)
        with (tmp_path / "p.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        most = max(len(one.classes) for one in found)
        assert len(header) == 1 + 2 * most
        assert {len(row) for row in rows} == {len(header)}
    with pytest.raises(convmae.UserError, match=r"threshold is 2: choose a probability from 0 to 1"):
        convmae.predict(str(list_file), several.checkpoint, threshold=2)


def test_a_run_of_several_classes_resumes(table, several, autoencoder_file, tmp_path, same, small_finetuning, labelled):
    copy = shutil.copytree(several.folder, tmp_path / "run")
    again = small_finetuning(table, copy, autoencoder_file, epochs=6, batch_size=8, resume=True)
    assert again.mean_average_precision == pytest.approx(several.mean_average_precision)
    assert same(model_of(again.checkpoint), model_of(several.checkpoint))
    with pytest.raises(convmae.UserError, match="several classes an image, which only convmae finetune learns"):
        convmae.probe(str(table), autoencoder_file, output=tmp_path / "probe", engine=IN_PROCESS)


def test_a_classifier_of_one_class_an_image_takes_no_threshold(finished, labelled):
    with pytest.raises(convmae.UserError, match="gives each image one class, so there is no threshold"):
        convmae.predict(str(labelled / "val"), finished.folder, threshold=0.5, engine=IN_PROCESS)


def test_a_share_is_held_out_where_there_is_no_validation_split(
    labelled, autoencoder_file, tmp_path, small_finetuning, capsys
):
    data = tmp_path / "data"
    shutil.copytree(labelled / "train", data / "train")
    with pytest.raises(convmae.UserError, match=r"has no folder val/.*--val-fraction 0\.1"):
        small_finetuning(data, tmp_path / "run", autoencoder_file)
    settings = {"val_fraction": 0.25, "checkpoint": EVERY_EPOCH}
    first = small_finetuning(data, tmp_path / "run", autoencoder_file, epochs=1, **settings)
    listed = (tmp_path / "run" / "validation-images.txt").read_text().splitlines()
    assert [Path(name).parent.name for name in listed] == [name for name in COLOURS for _ in range(2)]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["val_fraction"] == 0.25
    assert "36 images of 6 classes" in capsys.readouterr().err
    right = 0
    for one in convmae.predict([str(data / "train")], first.checkpoint, engine=DeviceOptions("cpu", "float32", 0)):
        right += one.path in listed and one.classes[0] == Path(one.path).parent.name
    assert first.top1 == pytest.approx(right / 12)
    (data / "train" / "green" / "new.png").write_bytes((data / "train" / "green" / "00.png").read_bytes())
    small_finetuning(data, tmp_path / "run", autoencoder_file, epochs=2, resume=True, **settings)
    assert (tmp_path / "run" / "validation-images.txt").read_text().splitlines() == listed
    assert "37 images of 6 classes" in capsys.readouterr().err


def test_the_same_image_on_both_sides_is_told(labelled, autoencoder_file, tmp_path, small_finetuning, capsys):
    data = shutil.copytree(labelled, tmp_path / "data")
    shutil.copy(data / "train" / "green" / "03.png", data / "val" / "green" / "other.png")
    (data / "val" / "green" / "._x.png").write_bytes(b"resource fork")
    shutil.rmtree(data / "val" / "white")
    small_finetuning(data, tmp_path / "run", autoencoder_file, epochs=1)
    printed = capsys.readouterr().err
    assert "1 image is in training, too, such as" in printed
    assert "1 image in hidden files and folders, as systems and tools leave them, is left out, such as" in printed
    assert "1 of 6 classes has no validation image and no figure, such as white" in printed
    report = (tmp_path / "run" / "data-report.txt").read_text()
    assert f"{data}/val/green/other.png = {data}/train/green/03.png" in report
    with (tmp_path / "run" / "per-class.csv").open(newline="") as file:
        assert ["white", "0", "-"] in list(csv.reader(file))
