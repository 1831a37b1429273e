import csv
import shutil

import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, PILToTensor, Resize

import convmae
from convmae import weights
from convmae.commands.predict import predict
from convmae.training.engine import DeviceOptions

CPU = DeviceOptions("cpu", "float32", 0)


@torch.inference_mode()
def expected(weights, path, size=32, crop_pct=0.875):
    """Softmax of the model's logits on the validation view of an image, (N,)."""
    model = convmae.load(weights, image_size=(size, size)).eval()
    image = CenterCrop(size)(Resize(int(size / crop_pct), InterpolationMode.BICUBIC)(Image.open(path)))
    return model(PILToTensor()(image)[None])[0].softmax(dim=0)


@pytest.mark.parametrize("size", [None, 48])
def test_probabilities_are_the_softmax_of_the_logits(photographs, named_classifier_file, size):
    predictions = predict(str(photographs), named_classifier_file, image_size=size, batch_size=4, engine=CPU)
    assert sorted(one.path for one in predictions) == sorted(map(str, photographs.rglob("*.png")))
    for one in predictions[::3]:
        values, order = expected(named_classifier_file, one.path, size or 32).sort(descending=True)
        torch.testing.assert_close(torch.tensor(one.probabilities), values, rtol=1e-4, atol=1e-5)
        assert list(one.classes) == [("cat", "dog", "[b]owl")[index] for index in order]


def test_the_crop_is_that_of_the_weights_unless_stated(photographs, classifier_file, tmp_path):
    model = convmae.load_classifier(classifier_file, crop_pct=1.0)
    weights.save_model(tmp_path / "whole.safetensors", model)
    path = str(photographs / "a" / "8.png")
    for file, stated, used in (("whole", None, 1.0), ("whole", 0.875, 0.875), (classifier_file, 0.5, 0.5)):
        file = tmp_path / f"{file}.safetensors" if file == "whole" else file
        (one,) = predict(path, file, crop_pct=stated, engine=CPU)
        values = expected(classifier_file, path, crop_pct=used).sort(descending=True).values
        torch.testing.assert_close(torch.tensor(one.probabilities), values, rtol=1e-4, atol=1e-5)
    with pytest.raises(convmae.UserError, match=r"crop_pct is 0\.0: a centre crop keeps a share above 0"):
        predict(path, classifier_file, crop_pct=0.0, engine=CPU)


def test_classes_without_names_are_numbers(photographs, classifier_file):
    one, *others = predict(str(next(photographs.rglob("*.png"))), classifier_file, top=1, engine=CPU)
    assert not others
    assert one.classes == (str(expected(classifier_file, one.path).argmax().item()),)


def test_the_table_shows_twenty_and_the_file_has_all(photographs, named_classifier_file, tmp_path, capsys):
    folder = tmp_path / "many"
    folder.mkdir()
    source = next(photographs.rglob("*.png"))
    for number in range(23):
        shutil.copy(source, folder / f"{number:02d}.png")
    predictions = predict(str(folder), named_classifier_file, tmp_path / "p.csv", top=2, engine=CPU)
    printed = capsys.readouterr().out
    assert "and 3 more" in printed
    assert "23 predictions" in printed
    assert any(f"{one.classes[0]} " in printed for one in predictions)
    with (tmp_path / "p.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "class_1", "probability_1", "class_2", "probability_2"]
    for row, one in zip(rows, predictions, strict=True):
        assert row[0] == one.path
        assert (row[1], row[3]) == one.classes
        assert (float(row[2]), float(row[4])) == one.probabilities


def test_damaged_images_stop_or_are_listed(photographs, classifier_file, tmp_path, capsys):
    images = shutil.copytree(photographs, tmp_path / "images")
    broken = next(images.rglob("*.png"))
    broken.write_bytes(b"no picture")
    with pytest.raises(convmae.UserError, match=r"cannot be decoded.*--skip-damaged"):
        predict(str(images), classifier_file, engine=CPU)
    assert len(predict(str(images), classifier_file, skip_damaged=True, engine=CPU)) == 9
    assert str(broken) in capsys.readouterr().err


def test_mistakes_are_one_line(photographs, classifier_file, autoencoder_file, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for call, message in (
        (lambda: predict(str(photographs), autoencoder_file, engine=CPU), "no classification head: fine-tune first"),
        (lambda: predict(str(photographs), tmp_path / "none", engine=CPU), "no weights at"),
        (lambda: predict(str(tmp_path / "empty"), classifier_file, engine=CPU), "is empty"),
        (lambda: predict(str(tmp_path / "none"), classifier_file, engine=CPU), "does not exist"),
        (lambda: predict(str(tmp_path / "broken.png"), classifier_file, engine=CPU), "cannot be decoded"),
        (lambda: predict(str(tmp_path / "broken.png"), classifier_file, skip_damaged=True, engine=CPU), "none of"),
        (lambda: predict(str(photographs), classifier_file, tmp_path / "p.txt", engine=CPU), "ends in .csv"),
        (lambda: predict(str(photographs), classifier_file, tmp_path / "file" / "p.csv", engine=CPU), "be written"),
        (lambda: predict(str(photographs), classifier_file, top=0, engine=CPU), "at least 1"),
        (lambda: predict(str(photographs), classifier_file, image_size=40, engine=CPU), "not divisible by 16"),
    ):
        with pytest.raises(convmae.UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
