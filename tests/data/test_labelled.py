"""Class folders and labelled data sets: what was written comes back with its class."""

import io
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy
import pytest
import torch
import webdataset
from filelock import FileLock
from PIL import Image
from torchvision.datasets import FakeData

from convmae.data import labelled
from convmae.data.augmentation import CenterCrop
from convmae.data.labelled import open_labelled_images
from convmae.data.loading import Loading, build_evaluation_loader
from convmae.errors import UserError


def write(folder, *values):
    """A plain picture per value, named after it; any folder in between is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        plain(value).save(folder / f"{value:03d}.png")


def plain(value):
    return Image.new("RGB", (6, 5), (value, value, 255 - value))


def contents(collection):
    """(name of the class, value of the picture) of every picture, sorted."""
    found = []
    for index in range(len(collection)):
        file, label = collection.open_annotated(index)
        with file, Image.open(file) as image:
            red, green, blue = image.convert("RGB").getpixel((3, 2))
        assert red == green == 255 - blue
        found.append((collection.classes[label], red))
    return sorted(found)


def streamed_contents(stream):
    """The same of a stream."""
    found = []
    for picture in stream:
        file, label = picture.open_annotated()
        with file, Image.open(file) as image:
            found.append((stream.classes[label], image.convert("RGB").getpixel((3, 2))[0]))
    return sorted(found)


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        open_labelled_images(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path):
    """Three classes to train on, pictures of the last in nested folders, two to validate on."""
    write(tmp_path / "train" / "ant", 1, 2)
    write(tmp_path / "train" / "bee", 11)
    write(tmp_path / "train" / "cow", 21)
    write(tmp_path / "train" / "cow" / "young" / "brown", 22, 23)
    write(tmp_path / "val" / "bee", 12)
    write(tmp_path / "val" / "cow", 24, 25)
    return tmp_path


OF_TRAINING = [("ant", 1), ("ant", 2), ("bee", 11), ("cow", 21), ("cow", 22), ("cow", 23)]


# Class folders


@pytest.mark.parametrize("split", ["train", "training"])
@pytest.mark.parametrize("name", ["train", "training"])
def test_training_folder_at_any_depth_and_by_any_name(folder, split, name):
    (folder / "train").rename(folder / name)
    collection = open_labelled_images(folder, split)
    assert collection.classes == ["ant", "bee", "cow"]
    assert contents(collection) == OF_TRAINING
    assert collection.name == str(folder / name)
    names = {collection.image_name(index) for index in range(6)}
    assert str(folder / name / "cow" / "young" / "brown" / "023.png") in names


@pytest.mark.parametrize("split", ["val", "valid", "validation", "eval", "test"])
@pytest.mark.parametrize("name", ["val", "valid", "validation", "eval", "test"])
def test_validation_folder_by_any_name(folder, split, name):
    (folder / "val").rename(folder / name)
    assert contents(open_labelled_images(str(folder), split)) == [("bee", 12), ("cow", 24), ("cow", 25)]


def test_the_asked_name_comes_before_its_synonyms(folder):
    write(folder / "test" / "ant", 3)
    write(folder / "test" / "bee", 13)
    assert contents(open_labelled_images(folder, "test")) == [("ant", 3), ("bee", 13)]
    assert contents(open_labelled_images(folder, "val")) == [("bee", 12), ("cow", 24), ("cow", 25)]
    (folder / "val").rename(folder / "holdout")
    assert contents(open_labelled_images(folder, "holdout")) == [("bee", 12), ("cow", 24), ("cow", 25)]


def test_fewer_classes_keep_the_numbers_of_training(folder):
    training = open_labelled_images(folder, "train")
    validation = open_labelled_images(folder, "val", training.classes)
    assert validation.classes == training.classes
    assert {validation.open_annotated(index)[1] for index in range(3)} == {1, 2}
    (folder / "val" / "ant").mkdir()  # empty, as no picture of it was kept
    assert contents(open_labelled_images(folder, "val", training.classes)) == contents(validation)


def test_only_known_extensions_in_any_case_are_pictures(folder):
    plain(13).save(folder / "train" / "bee" / "013.BMP")
    (folder / "train" / "bee" / "notes.txt").write_text("no image")
    (folder / "train" / "notes.txt").write_text("no image")
    assert contents(open_labelled_images(folder, "train")) == sorted([*OF_TRAINING, ("bee", 13)])


def test_a_class_that_training_lacks_is_refused(folder):
    write(folder / "val" / "dog", 31)
    message = refusal(folder, "val", ["ant", "bee", "cow"])
    assert message == f"{folder / 'val'} has the class 'dog', which the training split lacks: remove it"


def test_an_empty_class_folder_of_training_is_refused(folder):
    (folder / "train" / "bat").mkdir()
    assert refusal(folder, "train").startswith(f"{folder / 'train' / 'bat'} holds no images: fill")


def test_a_single_class_is_refused(tmp_path):
    write(tmp_path / "train" / "ant", 1)
    assert "has only one class, 'ant'" in refusal(tmp_path, "train")


def test_folder_mistakes_name_the_cure(tmp_path):
    assert "nowhere does not exist: give a folder" in refusal(tmp_path / "nowhere", "train")
    (tmp_path / "file").write_text("no folder")
    assert "file is a file: give a folder" in refusal(tmp_path / "file", "train")
    assert "has no folder train/: it must hold" in refusal(tmp_path, "train")
    write(tmp_path / "train", 1)
    assert f"{tmp_path / 'train'} has no class folders" in refusal(tmp_path, "train")
    (tmp_path / "train" / "ant").mkdir()
    (tmp_path / "train" / "bee").mkdir()
    assert "holds no images: accepted are .png" in refusal(tmp_path, "train")


# Hugging Face data sets


@pytest.fixture
def datasets(tmp_path_factory, monkeypatch):
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    return module


def test_hugging_face_folder_of_images(datasets, folder):
    for path in (folder / "train" / "cow" / "young" / "brown").iterdir():  # `datasets` takes no class from a nested one
        path.rename(folder / "train" / "cow" / path.name)
    training = open_labelled_images(f"hfds/{folder}", "train")
    assert training.name == f"hfds/{folder} (train)"
    assert training.classes == ["ant", "bee", "cow"]
    assert contents(training) == OF_TRAINING
    validation = open_labelled_images(f"hfds/{folder}", "val", training.classes)  # `datasets` says validation
    assert contents(validation) == [("bee", 12), ("cow", 24), ("cow", 25)]
    assert validation.image_name(2) == f"hfds/{folder} (validation), row 2"
    message = refusal(f"hfds/{folder}", "nowhere")
    assert message.startswith(f"hfds/{folder}, split nowhere, cannot be opened, check both: ")


def test_hugging_face_columns_of_any_name(datasets, tmp_path):
    columns = {"number": [7, 8, 9], "kind": [1, 0, 1], "photo": [plain(value) for value in (5, 6, 7)]}
    kinds = datasets.ClassLabel(names=["dull", "bright"])
    features = datasets.Features({"number": datasets.Value("int64"), "kind": kinds, "photo": datasets.Image()})
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "data" / "train.parquet")
    collection = open_labelled_images(f"hfds/{tmp_path / 'data'}", "training")
    assert contents(collection) == [("bright", 5), ("bright", 7), ("dull", 6)]


@pytest.mark.parametrize(
    ("labels", "names"),
    [(["owl", "ant", "owl", "bee"], ["ant", "bee", "owl"]), ([10, 9, 10, -1], ["-1", "9", "10"])],
)
def test_hugging_face_labels_as_text_or_numbers(datasets, tmp_path, labels, names):
    """Names are the values, sorted; another split takes the numbers of training."""
    pandas = pytest.importorskip("pandas")
    files = []
    for value in range(4):
        file = io.BytesIO()
        plain(value).save(file, "PNG")
        files.append(file.getvalue())
    (tmp_path / "data").mkdir()
    pandas.DataFrame({"id": range(4), "photo": files, "Label": labels}).to_parquet(tmp_path / "data" / "train.parquet")
    pandas.DataFrame({"id": [0], "photo": files[2:3], "Label": labels[2:3]}).to_parquet(
        tmp_path / "data" / "validation.parquet"
    )
    training = open_labelled_images(f"hfds/{tmp_path / 'data'}", "train")
    assert training.classes == names
    assert contents(training) == sorted((str(label), value) for value, label in enumerate(labels))
    validation = open_labelled_images(f"hfds/{tmp_path / 'data'}", "val", training.classes)
    assert (validation.classes, contents(validation)) == (names, [(str(labels[2]), 2)])
    assert validation.labels.tolist() == [2]
    message = refusal(f"hfids/{tmp_path / 'data'}|4", "train")
    assert "the classes in 'Label' of" in message
    assert "are unknown before all is read: read it as hfds/" in message


def test_hugging_face_rows_without_a_label_are_refused(datasets, tmp_path):
    pandas = pytest.importorskip("pandas")
    (tmp_path / "data").mkdir()
    frame = pandas.DataFrame({"image": [b"x"] * 3, "label": ["a", None, "b"]})
    frame.to_parquet(tmp_path / "data" / "train.parquet")
    expected = "1 of 3 rows have no 'label', the first is row 1: add it"
    assert expected in refusal(f"hfds/{tmp_path / 'data'}", "train")


def test_classes_without_training_images_are_counted(datasets, tmp_path):
    kinds = datasets.ClassLabel(names=["ant", "bee", "cow"])
    features = datasets.Features({"image": datasets.Image(), "label": kinds})
    (tmp_path / "data").mkdir()
    for split, labels in (("train", [2, 0]), ("test", [-1, 0])):
        columns = {"image": [plain(1), plain(2)], "label": labels}
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    training = open_labelled_images(f"hfds/{tmp_path / 'data'}", "train")
    assert [finding.summary for finding in training.findings] == [
        "1 of 3 classes has no training image and will not be learned, such as bee"
    ]
    message = refusal(f"hfds/{tmp_path / 'data'}", "test", training.classes)
    assert "has 1 image without a class (number -1): choose another split" in message


def test_hugging_face_data_set_without_pictures_or_classes_is_refused(datasets, tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("name,size\na,1\nb,2\n")
    expected = "has no column of images or none of classes, its columns are"
    assert f"{expected} name, size" in refusal(f"hfds/{tmp_path}/table", "train")
    write(tmp_path / "flat", 1, 2)
    assert f"{expected} image" in refusal(f"hfds/{tmp_path}/flat", "train")


def test_hugging_face_data_set_that_does_not_exist(datasets, tmp_path):
    assert "cannot be opened, check both: " in refusal(f"hfds/{tmp_path}/nowhere", "train")


def test_hugging_face_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("convmae.errors.find_spec", lambda name: None)
    assert "pip install 'convmae[hub]'" in refusal("hfds/any", "train")


def test_streamed_hugging_face_data_set(datasets, folder):
    for path in (folder / "train" / "cow" / "young" / "brown").iterdir():
        path.rename(folder / "train" / "cow" / path.name)
    with pytest.raises(UserError, match=r"the length of .* is unknown: append it, hfids/.*\|N"):
        open_labelled_images(f"hfids/{folder}", "train", shuffled=True)
    training = open_labelled_images(f"hfids/{folder}|6", "train", shuffled=True)
    assert (training.name, training.classes) == (f"hfids/{folder}|6 (train)", ["ant", "bee", "cow"])
    training.configure(batch_size=3, num_workers=0, num_replicas=1, rank=0, seed=0)
    assert (len(training), streamed_contents(training)) == (6, OF_TRAINING)
    assert streamed_contents(open_labelled_images(f"hfids/{folder}", "train")) == OF_TRAINING
    validation = open_labelled_images(f"hfids/{folder}|6", "val", training.classes)
    assert streamed_contents(validation) == [("bee", 12), ("cow", 24), ("cow", 25)]
    assert "not 'many'" in refusal(f"hfids/{folder}|many", "train")
    assert "cannot be opened, check both: " in refusal(f"hfids/{folder}", "nowhere")
    assert "a local folder needs SPLIT/CLASS/images" in refusal(f"hfids/{folder / 'train' / 'ant'}", "train")
    for prefix in ("hfds", "hfids"):
        assert refusal(f"{prefix}/", "train").startswith(f"{prefix}/ names no data")


def test_a_stream_too_long_for_its_buffer_is_warned_of(datasets, folder, monkeypatch, caplog):
    for path in (folder / "train" / "cow" / "young" / "brown").iterdir():
        path.rename(folder / "train" / "cow" / path.name)
    monkeypatch.setattr("timm.data.readers.reader_hfids.SHUFFLE_SIZE", 4)
    open_labelled_images(f"hfids/{folder}|4", "train", shuffled=True)
    open_labelled_images(f"hfids/{folder}|5", "train")
    assert not caplog.text
    open_labelled_images(f"hfids/{folder}|5", "train", shuffled=True)
    assert "is one shard of 5 images, shuffled 4 at a time: if they are sorted by class, read" in caplog.text


# TensorFlow data sets


@pytest.fixture
def tensorflow_data_set(tmp_path, monkeypatch):
    """The folder of a data set with the columns photo and kind; written by the library itself, without TensorFlow."""
    pytest.importorskip("array_record")
    tfds = pytest.importorskip("tensorflow_datasets")

    class Animals(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            kinds = {"photo": tfds.features.Image(), "kind": tfds.features.ClassLabel(names=["dull", "bright"])}
            features = tfds.features.FeaturesDict({"number": tfds.features.Scalar(numpy.int64), **kinds})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples(5, 6, 7), "validation": self._generate_examples(9)}

        def _generate_examples(self, *values):
            for value in values:
                file = io.BytesIO()
                plain(value).save(file, "PNG")
                file.seek(0)
                yield value, {"number": value, "photo": file, "kind": value % 2}

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    builder = Animals(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


@pytest.mark.parametrize("by_folder", [True, False])
def test_tensorflow_data_set(tensorflow_data_set, by_folder):
    data = f"tfds/{tensorflow_data_set}" if by_folder else "tfds/animals"
    training = open_labelled_images(data, "training")
    assert training.classes == ["dull", "bright"]
    assert contents(training) == [("bright", 5), ("bright", 7), ("dull", 6)]
    assert training.image_name(2) == f"{data} (train), example 2"
    validation = open_labelled_images(data, "val", training.classes)
    assert validation.name == f"{data} (validation)"
    assert contents(validation) == [("bright", 9)]


def test_tensorflow_data_set_in_loading_processes(tensorflow_data_set):
    source = open_labelled_images(f"tfds/{tensorflow_data_set}", "train")
    contents(source)  # the parent has read before it forks
    batches = build_evaluation_loader(source, CenterCrop((4, 4)), Loading(2, num_workers=2))
    values = torch.cat([batch["images"][:, 0, 2, 2] for batch in batches])
    assert sorted(values.tolist()) == [5, 6, 7]


def test_several_processes_prepare_a_tensorflow_data_set_once(tensorflow_data_set, tmp_path):
    """Each waits for the one that prepares; all then read."""
    data = f"tfds/{tensorflow_data_set}"
    with ThreadPoolExecutor() as pool, FileLock(Path(tempfile.gettempdir()) / f"convmae-{data.replace('/', '-')}.lock"):
        waiting = [pool.submit(open_labelled_images, data, "train") for _ in range(2)]
        assert not wait(waiting, timeout=1).done
    pool.shutdown()
    assert [len(one.result()) for one in waiting] == [3, 3]


def test_tensorflow_data_sets_that_cannot_be_used(tensorflow_data_set, monkeypatch):
    message = refusal(f"tfds/{tensorflow_data_set}", "nowhere")
    assert "split nowhere, cannot be opened, check both: " in message
    assert "tfds/unheard_of, split train, cannot be opened" in refusal("tfds/unheard_of", "train")
    facts = tensorflow_data_set / "dataset_info.json"
    facts.write_text(facts.read_text().replace("array_record", "tfrecord"))
    for data in (f"tfds/{tensorflow_data_set}", "tfds/animals"):
        assert refusal(data, "train") == f"{data} is not written as array_record: convert it, tfds convert_format"
    assert "cannot be opened" in refusal(f"tfds/{tensorflow_data_set.parent.parent}", "train")
    monkeypatch.setattr("convmae.errors.find_spec", lambda name: None)
    assert "pip install 'convmae[tfds]'" in refusal("tfds/animals", "train")


# torchvision's


@pytest.fixture
def fake_data(monkeypatch):
    """Five random pictures of two classes in place of a download; also what was asked for."""
    data, asked = FakeData(5, (3, 8, 7), num_classes=2), []
    data.classes = ["no", "yes"]
    monkeypatch.setattr(labelled, "create_dataset", lambda *names, **options: asked.append((names, options)) or data)
    return data, asked


def test_torchvision_data_set(fake_data):
    data, asked = fake_data
    collection = open_labelled_images("torch/cifar10", "val", ["no", "yes"])
    (names, options), *_ = asked
    assert names == ("torch/cifar10",)
    assert (options["split"], options["download"]) == ("val", True)
    assert (len(collection), collection.classes) == (5, ["no", "yes"])
    assert {label for _, label in data} == {0, 1}
    for index, (image, label) in enumerate(data):
        file, number = collection.open_annotated(index)
        with Image.open(file) as read:
            assert (read.mode, read.size, read.tobytes()) == ("RGB", (7, 8), image.tobytes())
        assert number == label


def test_classes_of_torchvision_data_sets_that_name_them_otherwise(fake_data):
    data, _ = fake_data
    data.classes = [("tench", "Tinca tinca"), ("goldfish",)]  # ImageNet's
    assert open_labelled_images("torch/imagenet", "train").classes == ["tench, Tinca tinca", "goldfish"]
    del data.classes
    data.all_categories = ["fly", "bee"]  # iNaturalist's
    assert open_labelled_images("torch/inaturalist", "train").classes == ["fly", "bee"]


def test_torchvision_data_set_with_other_classes_is_refused(fake_data):
    data, _ = fake_data
    assert "has the class 'yes', which the training split lacks" in refusal("torch/mnist", "val", ["no", "maybe"])
    assert "in another order than the training split" in refusal("torch/mnist", "val", ["yes", "no"])
    del data.classes
    assert "has no classes" in refusal("torch/mnist", "train")


@pytest.mark.parametrize("kind", [RuntimeError, OSError, AssertionError])
@pytest.mark.parametrize(("said", "shown"), [("File not found\nor corrupted.", "File not found"), ("", "")])
def test_torchvision_data_set_that_cannot_be_opened(monkeypatch, kind, said, shown):
    def fail(*_, **__):
        raise kind(said)

    monkeypatch.setattr(labelled, "create_dataset", fail)
    message = refusal("torch/mnist", "train")
    assert message == f"torch/mnist, split train, cannot be opened, check both: {shown or kind.__name__}"


def test_unknown_torchvision_data_set(monkeypatch, tmp_path):
    monkeypatch.setattr(labelled.torch.hub, "get_dir", lambda: str(tmp_path))
    assert "Unknown torchvision dataset nonsense" in refusal("torch/nonsense", "train")


# Shards


def write_shard(path, *samples):
    """WebDataset's own writer: (value of the picture, number of its class) each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), compress=False) as shard:
        for value, label in samples:
            file = io.BytesIO()
            plain(value).save(file, "PNG")
            fields = {"png": file.getvalue(), "json": {"value": value}, **({} if label is None else {"cls": label})}
            shard.write({"__key__": f"some/{value:03d}", **fields})


@pytest.fixture
def shards(tmp_path):
    write_shard(tmp_path / "set-train-0000.tar", (1, 0), (11, 1))
    write_shard(tmp_path / "set-train-0001.tar", (21, 2), (2, 0), (99, None))
    write_shard(tmp_path / "set-validation-0000.tar", (12, 1))
    return tmp_path


def test_shards_are_found_by_the_split_in_their_names(shards):
    collection = open_labelled_images(f"wds/{shards}", "train")
    assert collection.classes == ["0", "1", "2"]
    assert contents(collection) == [("0", 1), ("0", 2), ("1", 11), ("2", 21)]  # what has no class is left out
    assert [collection.image_name(index) for index in (0, 3)] == [
        f"{shards}/set-train-0000.tar/some/001.png",
        f"{shards}/set-train-0001.tar/some/002.png",
    ]
    (shards / "classes.txt").write_text("ant\nbee\ncow\n")
    collection = open_labelled_images(f"wds/{shards}", "val", ["ant", "bee", "cow"])
    assert contents(collection) == [("bee", 12)]


def test_a_split_of_shards_with_fewer_classes_is_compared(shards):
    training = open_labelled_images(f"wds/{shards}", "train")
    validation = open_labelled_images(f"wds/{shards}", "val", training.classes)
    assert validation.classes == ["0", "1"]
    labelled.compare_splits(training, validation)
    assert [finding.summary for finding in validation.findings] == [
        "2 of 3 classes have no validation image and no figure, such as 0"
    ]
    assert validation.findings[0].items == ["0", "2"]


def test_shards_may_lie_in_folders_of_their_split(tmp_path):
    write_shard(tmp_path / "train" / "0.tar", (1, 0), (11, 1))
    assert contents(open_labelled_images(f"wds/{tmp_path}", "train")) == [("0", 1), ("1", 11)]


def test_shards_that_cannot_be_used(shards, tmp_path):
    assert "is no folder: write wds/FOLDER" in refusal(f"wds/{tmp_path}/set-train-{{0000..0001}}.tar", "train")
    assert "has no shards called extra: name them like extra-0000.tar" in refusal(f"wds/{shards}", "extra")
    (shards / "classes.txt").write_text("ant\nbee\n")
    assert "names 2 classes" in refusal(f"wds/{shards}", "train")
    write_shard(shards / "bare-0.tar", (1, None))
    assert "no images with a class" in refusal(f"wds/{shards}", "bare")
    (shards / "damaged-0.tar").write_bytes(b"no tar file" * 100)
    assert f"the shard {shards}/damaged-0.tar cannot be read" in refusal(f"wds/{shards}", "damaged")
