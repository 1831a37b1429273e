"""Pretraining from end to end: what a run leaves and starts from, damaged images, other forms, mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from jsonargparse import auto_parser
from safetensors.torch import load_file

import convmae
from convmae import weights
from convmae.commands.pretrain import pretrain
from convmae.models.sizes import ENCODERS
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.engine import EngineOptions
from convmae.training.folder import plain_settings
from convmae.training.logging import PictureLoggingOptions
from convmae.training.optimizer import OptimizerOptions

IN_PROCESS = EngineOptions(accelerator="cpu", workers=0)


def test_a_run_leaves_everything_a_user_wants(photos, tmp_path, capsys, small_pretraining):
    result = small_pretraining(photos, tmp_path / "run")
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


def test_the_kept_configuration_makes_the_same_run(photos, tmp_path, small_pretraining):
    settings = {
        "complementary_sets": 2,
        "optimizer": OptimizerOptions(base_lr=0.01, clip_grad=1.0),
        "image_size": (32, 48),
    }
    small_pretraining(photos, tmp_path / "run", epochs=2, **settings)
    path = tmp_path / "run" / "config.yaml"
    parser = auto_parser(pretrain, as_positional=False)
    options = parser.instantiate(parser.parse_args(["--config", str(path)]))
    options.pop("config")
    assert plain_settings(dict(options)) == yaml.safe_load(path.read_text())
    assert options.optimizer == settings["optimizer"]
    assert options.image_size == (32, 48)


def test_another_number_of_workers_changes_nothing(photos, tmp_path, same, small_pretraining):
    a = small_pretraining(photos, tmp_path / "a", epochs=2)
    b = small_pretraining(photos, tmp_path / "b", epochs=2, engine=EngineOptions(accelerator="cpu", workers=2))
    assert same(load_file(a.checkpoint / "model.safetensors"), load_file(b.checkpoint / "model.safetensors"))


def test_resuming_a_finished_run_ends_at_once(photos, tmp_path, small_pretraining):
    first = small_pretraining(photos, tmp_path / "run", epochs=1)
    again = small_pretraining(photos, tmp_path / "run", epochs=1, resume=True)
    assert again.steps == first.steps
    assert again.loss == first.loss


def test_a_run_is_never_overwritten(photos, tmp_path, small_pretraining, files_of):
    small_pretraining(photos, tmp_path / "run", epochs=1)
    before = files_of(tmp_path / "run")
    with pytest.raises(convmae.UserError, match=r"holds a run: continue it with --resume, or choose another --output"):
        small_pretraining(photos, tmp_path / "run", epochs=1)
    assert before == files_of(tmp_path / "run")


def test_changed_settings_of_a_resumed_run_are_kept_beside_the_old_ones(photos, tmp_path, small_pretraining):
    small_pretraining(photos, tmp_path / "run", epochs=1)
    small_pretraining(photos, tmp_path / "run", epochs=2, resume=True)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["epochs"] == 1
    assert yaml.safe_load((tmp_path / "run" / "config-from-step-00000003.yaml").read_text())["epochs"] == 2


def test_a_checkpoint_of_another_shape_is_refused(photos, tmp_path, small_pretraining):
    first = small_pretraining(photos, tmp_path / "run", epochs=1)
    with pytest.raises(convmae.UserError, match="do not fit the model"):
        small_pretraining(photos, tmp_path / "run", epochs=2, resume=True, kernel_size=7)
    with pytest.raises(convmae.UserError, match="do not fit the model"):
        small_pretraining(photos, tmp_path / "other", weights=first.checkpoint, multi_scale=False)
    assert not (tmp_path / "other").exists()


def test_training_starts_from_given_weights(photos, tmp_path, same, small_pretraining):
    first = small_pretraining(photos, str(tmp_path / "first"), epochs=1)
    still = OptimizerOptions(base_lr=0.0)
    options = {"epochs": 1, "weights": first.checkpoint, "optimizer": still, "seed": 5}
    second = small_pretraining(photos, tmp_path / "second", **options)
    states = [load_file(run.checkpoint / "model.safetensors") for run in (first, second)]
    assert same(*states)
    larger = small_pretraining(photos, tmp_path / "larger", image_size=64, **options)
    assert convmae.load(larger.checkpoint).encoder.pos_embed.shape[1:3] == (4, 4)


def _authors_encoder(encoder, path):
    torch.save({"model": weights.to_published(_named(encoder))}, path)


def _bare(encoder, path):
    torch.save(encoder.state_dict(), path)


def _of_timm(encoder, path):
    classifier = timm.create_model("convmae_tiny", img_size=32, num_classes=3)
    classifier.encoder.load_state_dict(encoder.state_dict())
    timm.models.save_for_hf(classifier, path, safe_serialization=True)


def _of_a_run(encoder, path):
    classifier = convmae.create_classifier("tiny", image_size=32, num_classes=0)
    classifier.encoder.load_state_dict(encoder.state_dict())
    (path / "best").mkdir(parents=True)
    weights.save_model(path / "best" / "model.safetensors", classifier)


def _named(encoder):
    return {f"encoder.{name}": value for name, value in encoder.state_dict().items()}


STILL = OptimizerOptions(base_lr=0.0)


@pytest.mark.parametrize(
    ("save", "left_out"),
    [
        (lambda encoder, path: encoder.save_pretrained(path), ""),
        (_authors_encoder, ""),
        (_bare, ""),
        (_of_timm, "; left out: fc_norm, head"),
        (_of_a_run, "; left out: fc_norm"),
    ],
    ids=["save_pretrained", "the authors'", "an encoder's state dict", "timm's folder", "a finetuning's run"],
)
def test_training_starts_from_an_encoder_and_says_what_begins_anew(
    photos, tmp_path, same, small_pretraining, caplog, save, left_out
):
    encoder = convmae.ConvViT(32, encoder=ENCODERS["tiny"])
    save(encoder, tmp_path / "encoder")
    begun = small_pretraining(photos, tmp_path / "run", epochs=1, weights=tmp_path / "encoder", optimizer=STILL)
    alone = small_pretraining(photos, tmp_path / "alone", epochs=1, optimizer=STILL)
    state, anew = (load_file(run.checkpoint / "model.safetensors") for run in (begun, alone))
    assert same({name: value for name, value in state.items() if name.startswith("encoder.")}, _named(encoder))
    others = {name for name in state if not name.startswith("encoder.")}
    assert same({name: state[name] for name in others}, {name: anew[name] for name in others})
    message = "has no decoder; taken from it: encoder; begun anew: project1, project2, norm, decoder" + left_out
    assert [
        record.message for record in caplog.records if message in record.message and record.message.endswith(message)
    ]


def test_what_stands_before_the_decoder_is_taken_from_a_file_that_has_it(
    photos, tmp_path, same, small_pretraining, caplog
):
    state = convmae.create_autoencoder("tiny", image_size=32).state_dict()
    half = {name: value for name, value in state.items() if not name.startswith("decoder.")}
    torch.save(half, tmp_path / "half.pth")
    run = small_pretraining(photos, tmp_path / "run", epochs=1, weights=tmp_path / "half.pth", optimizer=STILL)
    found = load_file(run.checkpoint / "model.safetensors")
    assert same({name: found[name] for name in half}, half)
    assert "taken from it: encoder, project1, project2, norm; begun anew: decoder" in caplog.text


def test_a_derivative_with_other_mlps_is_trained_on_and_resumed(photos, tmp_path, small_pretraining):
    model = convmae.create_autoencoder("tiny", image_size=32, mlp_ratio=(8, 8, 4))
    weights.save_published(tmp_path / "derivative.pth", model.state_dict())
    small_pretraining(photos, tmp_path / "run", epochs=1, weights=tmp_path / "derivative.pth")
    (tmp_path / "derivative.pth").unlink()
    run = small_pretraining(photos, tmp_path / "run", epochs=2, resume=True)
    assert run.steps == 6
    assert convmae.load(run.checkpoint).encoder.config.mlp_ratio == (8, 8, 4)


def test_weights_that_mean_something_else_are_refused_or_said(photos, tmp_path, small_pretraining, caplog):
    model = convmae.create_autoencoder("tiny", image_size=32, num_heads=12, norm_pix=False)
    weights.save_model(tmp_path / "other.safetensors", model)
    with pytest.raises(
        convmae.UserError, match="of a model with 12 attention heads, this one has 6: choose the --model"
    ):
        small_pretraining(photos, tmp_path / "run", weights=tmp_path / "other.safetensors")
    assert not (tmp_path / "run").exists()
    torch.save({"model": model.state_dict(), "args": {"norm_pix_loss": False}}, tmp_path / "other.pth")
    small_pretraining(photos, tmp_path / "run", epochs=1, weights=tmp_path / "other.pth")
    assert "was trained with norm_pix False, this run has True" in caplog.text


def test_damaged_images_are_skipped_counted_and_listed(photos, tmp_path, capsys, small_pretraining):
    for path in photos.rglob("*.png"):
        (tmp_path / "data" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data" / "3.png").write_bytes(b"no picture")
    truncated = (tmp_path / "data" / "7.png").read_bytes()[:-200]
    (tmp_path / "data" / "7.png").write_bytes(truncated)
    small_pretraining(tmp_path / "data", tmp_path / "run", epochs=12)
    listed = (tmp_path / "run" / "undecodable-images.txt").read_text().splitlines()
    assert len(listed) == 2
    assert "3.png" in "".join(listed)
    assert "7.png" in "".join(listed)
    printed = " ".join(capsys.readouterr().err.split())
    assert "of the images cannot be decoded or used: see" in printed  # 2 of 12: far more than a few percent
    assert "images that could not be decoded │ 2" in printed


def test_a_stream_of_nan_stops_the_run_with_a_clear_message(photos, tmp_path, small_pretraining):
    with pytest.raises(
        convmae.UserError, match=r"not finite 3 steps in a row, up to step 3: last good checkpoint none"
    ):
        small_pretraining(photos, tmp_path / "run", weights=_poisoned(tmp_path), max_skipped=3)


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
        ({"in_channels": 2}, r"it has 3 channels \(RGB\), the model takes 2: set --in-channels, or convert the file"),
        ({"decode": "gpu", "in_channels": 5}, "it has 3 channels"),
        ({"weights": Path("nothing.pth")}, "no weights at nothing.pth"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(photos, tmp_path, changes, message, small_pretraining):
    with pytest.raises(convmae.UserError, match=message) as error:
        small_pretraining(photos, tmp_path / "run", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "without images"])
def test_folders_without_images_are_refused(tmp_path, kind, small_pretraining):
    data = tmp_path / "data"
    if kind != "missing":
        data.mkdir()
    if kind == "without images":
        (data / "notes.txt").write_text("no picture")
    with pytest.raises(convmae.UserError, match="data") as error:
        small_pretraining(data, tmp_path / "run")
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
def test_other_forms_train_too(photos, tmp_path, changes, small_pretraining):
    result = small_pretraining(photos, tmp_path / "run", epochs=1, **changes)
    assert 0 < result.loss < 10


def test_a_run_inside_its_data_does_not_learn_from_its_own_pictures(photos, tmp_path, capsys, small_pretraining):
    data = shutil.copytree(photos, tmp_path / "photos")
    for output in (data / "runs" / "first", data):
        small_pretraining(data, output, epochs=1)
        assert "12 images, 1 epochs of 3 steps" in capsys.readouterr().err
        assert list(output.rglob("latest.png"))
        again = small_pretraining(data, output, epochs=2, resume=True)
        printed = capsys.readouterr().err
        assert "12 images, 2 epochs of 3 steps" in printed
        assert "drawn by training runs in this folder are left out" in printed
        assert again.steps == 6
    assert f"{data}: " in (data / "data-report.txt").read_text()


def test_several_folders_and_lists_are_one_data_set(photos, tmp_path, capsys, command_line, small_pretraining):
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted((photos / "depth1").rglob("*.png"))))
    data = [str(photos / "depth0"), str(tmp_path / "list.txt")]
    flags = ["--model", "tiny", "--epochs", "1", "--batch-size", "4", "--image-size", "32", "--engine.workers", "0"]
    joined = ",".join(data)
    status, _, printed = command_line("pretrain", "--data", joined, *flags, "--output", tmp_path / "a")
    assert status == 0, printed
    assert "8 images, 1 epochs of 2 steps" in " ".join(printed.split())
    (tmp_path / "several.yaml").write_text(yaml.safe_dump({"data": data}))
    status, _, printed = command_line(
        "pretrain", "--config", tmp_path / "several.yaml", *flags, "--output", tmp_path / "b"
    )
    assert status == 0, printed
    assert yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())["data"] == data
    one, other = (load_file(convmae.weights.locate(tmp_path / name)) for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
