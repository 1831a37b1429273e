"""What pixels mean, from a command's options into the weights file and on to the commands that come after."""

import json

import numpy
import pytest
import tifffile
import torch
import yaml
from PIL import Image

import convmae
from convmae import weights
from convmae.commands.options import PixelOptions
from convmae.data.augmentation import AugmentationOptions
from convmae.data.images import decode_image
from convmae.pixels import Decoding, Pixels, decoding_of, pixels_of

BANDS = 5


def write_bands(path, seed, size=(40, 48), bands=BANDS):
    pixels = numpy.random.default_rng(seed).integers(0, 4096, (*size, bands), dtype=numpy.uint16)
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """Two classes of images of five bands."""
    folder = tmp_path_factory.mktemp("bands")
    for number in range(16):
        write_bands(folder / "train" / "ab"[number % 2] / f"{number}.tif", number)
    for number in range(4):
        write_bands(folder / "val" / "ab"[number % 2] / f"{number}.tif", 50 + number)
    return folder


@pytest.fixture(scope="module")
def transparent(tmp_path_factory):
    """Two classes of images of which half is transparent."""
    folder = tmp_path_factory.mktemp("transparent")
    for split, count in (("train", 16), ("val", 4)):
        for number in range(count):
            pixels = numpy.random.default_rng(number).integers(0, 256, (40, 48, 4), dtype=numpy.uint8)
            pixels[..., 3] = 255
            pixels[:, 24:, 3] = 0
            path = folder / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


def recorded(result):
    return pixels_of(convmae.load(result.checkpoint))


def test_bands_from_pretraining_to_features(bands, tmp_path, small_pretraining, small_finetuning, command_line, capsys):
    pretrained = small_pretraining(
        bands / "train", tmp_path / "pretrained", epochs=1, in_channels=BANDS, pixel_range="0,4095"
    )
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "mean and deviation of 5 bands were measured on the images looked at, and are recorded with the model" in said
    )
    report = (tmp_path / "pretrained" / "data-report.txt").read_text()
    assert "band 5: mean 0.5" in report
    kept = recorded(pretrained)
    assert kept.pixel_range == (0, 4095)
    assert kept.mean == pytest.approx([0.5] * BANDS, abs=0.02)
    assert kept.std == pytest.approx([12**-0.5] * BANDS, abs=0.02)
    assert yaml.safe_load((tmp_path / "pretrained" / "config.yaml").read_text())["pixel_range"] == [0.0, 4095.0]

    tuned = small_finetuning(
        bands, tmp_path / "tuned", pretrained.checkpoint, epochs=1, augmentation=AugmentationOptions()
    )
    said = " ".join(capsys.readouterr().err.split())
    assert "policies and jitter are left out, which are for colours: the images have 5 bands" in said
    assert recorded(tuned) == kept
    assert len(convmae.predict(str(bands / "val"), tuned.checkpoint)) == 4
    features = convmae.embed(str(bands / "val"), tmp_path / "features.safetensors", pretrained.checkpoint)
    assert features.shape[0] == 4
    convmae.reconstruct(pretrained.checkpoint, str(bands / "val"), tmp_path / "reconstruction.png")
    convmae.visualise(str(bands / "val"), pretrained.checkpoint, tmp_path / "seen.png", image_size=32)
    convmae.neighbours(
        str(bands / "train"), bands / "val" / "a" / "0.tif", pretrained.checkpoint, tmp_path / "alike.png", k=2
    )
    probed = convmae.probe(str(bands), pretrained.checkpoint, output=tmp_path / "probe", batch_size=8)
    assert recorded(probed) == kept
    status, _, err = command_line("predict", "--images", bands / "val", "--weights", tmp_path / "probe")
    assert (status, err.strip()) == (0, "")  # older versions of rich end a bar that is not shown with an empty line


def test_an_export_for_timm_keeps_what_pixels_mean(tmp_path):
    timm = pytest.importorskip("timm")
    told = Pixels("black", (0, 9), (0.1,) * BANDS, (0.2,) * BANDS)
    model = convmae.create_classifier("tiny", image_size=32, num_classes=2, in_channels=BANDS, pixels=told)
    weights.save_model(tmp_path / "model.safetensors", model)
    convmae.export(tmp_path / "model.safetensors", "timm", tmp_path / "timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert pixels_of(back) == told
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]["mean"] == [0.1] * BANDS


@pytest.mark.parametrize("channels", [1, 4, BANDS])
def test_colour_weights_begin_a_run_on_other_channels(
    bands, labelled, autoencoder_file, tmp_path, channels, small_finetuning, caplog
):
    data, settings = (bands, {"pixel_range": (0, 4095)}) if channels == BANDS else (labelled, {})
    result = small_finetuning(data, tmp_path / "tuned", autoencoder_file, epochs=1, in_channels=channels, **settings)
    assert convmae.load(result.checkpoint).in_channels == channels
    assert f"the model takes {channels}: the first layer is adapted" in caplog.text


def test_pretraining_goes_on_with_weights_of_other_channels(bands, tmp_path, small_pretraining, caplog):
    torch.manual_seed(0)
    weights.save_model(tmp_path / "rgb.safetensors", convmae.create_autoencoder("tiny", image_size=32))
    result = small_pretraining(
        bands / "train",
        tmp_path / "run",
        epochs=1,
        in_channels=BANDS,
        weights=tmp_path / "rgb.safetensors",
        pixel_range=(0, 4095),
    )
    assert "the first layer is adapted as timm does it, the layer that predicts pixels begins anew" in caplog.text
    assert convmae.load(result.checkpoint).in_channels == BANDS


@pytest.mark.parametrize("background", [None, "black", "none"])
def test_the_background_is_said_recorded_and_kept_to(
    transparent, tmp_path, background, small_pretraining, small_finetuning, capsys
):
    shown = background or "white"
    run = small_pretraining(transparent / "train", tmp_path / "run", epochs=1, background=background)
    said = " ".join(capsys.readouterr().err.split())
    assert "16 of 16 images looked at are transparent in part" in said
    assert recorded(run).background == shown
    tuned = small_finetuning(transparent, tmp_path / "tuned", run.checkpoint, epochs=1)
    assert recorded(tuned).background == shown
    capsys.readouterr()
    convmae.predict(str(transparent / "val"), tuned.checkpoint)
    assert "4 of 4 images looked at are transparent in part" in " ".join(capsys.readouterr().err.split())
    path = transparent / "val" / "a" / "0.png"
    with path.open("rb") as file:
        pixels = decode_image(file, decoding_of(convmae.load(tuned.checkpoint)))
    with Image.open(path) as image:
        hidden = torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)[:, :, 24:]
    value = {"white": 255, "black": 0}.get(shown)
    expected = hidden if value is None else torch.full_like(hidden, value)
    assert torch.equal(pixels[:, :, 24:], expected)


def test_earlier_weights_have_no_background_until_they_are_trained(
    transparent, tmp_path, small_finetuning, capsys, autoencoder_file
):
    model = convmae.load(autoencoder_file)
    description = model.description
    del description["encoder"]["pixels"]  # as versions before wrote it
    weights.save(tmp_path / "earlier.safetensors", model.state_dict(), description)
    convmae.embed(str(transparent / "val"), tmp_path / "f.safetensors", tmp_path / "earlier.safetensors")
    assert "the colours that nobody sees count as well (--background none)" in " ".join(capsys.readouterr().err.split())
    probed = convmae.probe(str(transparent), tmp_path / "earlier.safetensors", output=tmp_path / "probe", batch_size=8)
    assert recorded(probed).background == "none"
    tuned = small_finetuning(transparent, tmp_path / "tuned", tmp_path / "earlier.safetensors", epochs=1)
    assert recorded(tuned).background == "white"


def test_a_run_goes_on_with_the_pixels_that_it_began_with(transparent, tmp_path, small_pretraining):
    data, output = transparent / "train", tmp_path / "run"
    small_pretraining(data, output, epochs=1, background="black")
    with pytest.raises(convmae.UserError, match="holds a run with --background black, not white: leave it out, or"):
        small_pretraining(data, output, epochs=2, resume=True, background="white")
    assert recorded(small_pretraining(data, output, epochs=2, resume=True)).background == "black"


def test_an_earlier_run_goes_on_as_it_began(transparent, tmp_path, small_pretraining):
    data, output = transparent / "train", tmp_path / "run"
    result = small_pretraining(data, output, epochs=1, background="none")
    file = result.checkpoint / weights.MODEL_FILE
    state, description = weights.read(file)
    del description["encoder"]["pixels"]
    weights.save(file, state, description)
    assert recorded(small_pretraining(data, output, epochs=2, resume=True)).background == "none"


def test_12_bits_are_said_and_their_range_recorded(tmp_path, small_pretraining, capsys, command_line):
    numbers = numpy.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(8):
        pixels = numbers.integers(0, 4096, (40, 48), dtype=numpy.uint16)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.png")
    small_pretraining(tmp_path / "data", tmp_path / "run", epochs=1, in_channels=1)
    assert "of which 16 of 256 levels remain" in " ".join(capsys.readouterr().err.split())
    arguments = ["--data", tmp_path / "data", "--model", "tiny", "--epochs", 1, "--batch-size", 4, "--image-size", 32]
    arguments += ["--engine.accelerator", "cpu", "--engine.workers", 0, "--output", tmp_path / "ranged"]
    status, _, err = command_line("pretrain", *arguments, "--in-channels", 1, "--pixel-range", "0,4095")
    assert status == 0
    assert "levels remain" not in err
    model = convmae.load(tmp_path / "ranged")
    assert decoding_of(model) == Decoding(1, "white", (0, 4095))


def test_detectors_and_segmenters_take_bands(tmp_path, coco_scenes, ade20k_scenes, small_detection, small_segmentation):
    for folder, names in ((coco_scenes, ("train2017", "val2017")), (ade20k_scenes, ("images",))):
        for path in folder.rglob("*"):
            target = tmp_path / folder.parent.name / path.relative_to(folder)
            if path.is_file() and path.relative_to(folder).parts[0] in names:
                with Image.open(path) as image:
                    seen = numpy.asarray(image.convert("RGB")).astype(numpy.uint16) * 16
                target.parent.mkdir(parents=True, exist_ok=True)
                array = numpy.concatenate([seen, seen[..., :2]], axis=2)
                tifffile.imwrite(target.with_suffix(".tif"), array, photometric="minisblack", planarconfig="contig")
            elif path.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.name.startswith("instances"):
                    content = json.loads(path.read_text())
                    for entry in content["images"]:
                        entry["file_name"] = entry["file_name"].rpartition(".")[0] + ".tif"
                    target.write_text(json.dumps(content))
                else:
                    target.write_bytes(path.read_bytes())
    settings = {"epochs": 1, "in_channels": BANDS, "pixel_range": (0, 4080), "model": "tiny", "image_size": 64}
    detected = small_detection(tmp_path / coco_scenes.parent.name, tmp_path / "detector", None, **settings)
    assert len(recorded(detected).mean) == BANDS
    images = tmp_path / coco_scenes.parent.name / "val2017"
    convmae.detect.predict(str(images), detected.checkpoint, tmp_path / "detections", draw=1)
    convmae.detect.evaluate(detected.checkpoint, tmp_path / coco_scenes.parent.name)
    segmented = small_segmentation(tmp_path / ade20k_scenes.parent.name, tmp_path / "segmenter", None, **settings)
    assert len(recorded(segmented).mean) == BANDS
    images = tmp_path / ade20k_scenes.parent.name / "images" / "validation"
    convmae.segment.predict(str(images), segmented.checkpoint, tmp_path / "segmentation", draw=1)
    convmae.segment.evaluate(segmented.checkpoint, tmp_path / ade20k_scenes.parent.name)


def test_images_may_be_larger_where_that_is_asked_for(photographs, named_classifier_file, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)
    images = str(photographs)
    with pytest.raises(convmae.UserError, match="more than 2200: raise --max-pixels if you trust the file"):
        convmae.predict(images, named_classifier_file)
    assert len(convmae.predict(images, named_classifier_file, max_pixels=10_000)) == 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pixel_range": "0;4095"}, "pixel_range is '0;4095': give numbers with commas between them, such as 0,4095"),
        ({"pixel_range": "5"}, "give two numbers, the lower one first"),
        ({"mean": "0.5"}, "mean and std belong together"),
    ],
)
def test_options_that_cannot_be_are_refused(given, message):
    with pytest.raises(convmae.UserError, match=message):
        PixelOptions(**given)
    assert PixelOptions(pixel_range="0, 4095").pixel_range == (0, 4095)
