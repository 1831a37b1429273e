"""Which columns are images and classes; whole data sets are read in test_sources and test_labelled."""

import pytest

from convmae.data.hugging_face import HuggingFaceReader, classes_and_labels, image_column, label_column
from convmae.errors import UserError

datasets = pytest.importorskip("datasets")

BYTES, TEXT, NUMBER = (datasets.Value(kind) for kind in ("binary", "string", "int64"))
FILES = {"bytes": BYTES, "path": TEXT}
CLASSES = datasets.ClassLabel(names=["a", "b"])


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"mask": BYTES, "photo": datasets.Image()}, "photo"),
        ({"id": NUMBER, "scan": FILES}, "scan"),
        ({"id": NUMBER, "scan": datasets.Value("large_binary")}, "scan"),
        ({"mask": BYTES, "Img": FILES}, "Img"),
    ],
)
def test_the_column_of_images(features, expected):
    assert image_column("data", features) == expected


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"label": TEXT, "kind": CLASSES}, "kind"),
        ({"caption": TEXT, "Category": TEXT}, "Category"),
        ({"id": NUMBER, "target": NUMBER}, "target"),
    ],
)
def test_the_column_of_classes(features, expected):
    assert label_column("data", features) == expected


@pytest.mark.parametrize("features", [{"caption": TEXT}, {"label": datasets.Value("float32")}, {}])
def test_no_column_of_classes(features):
    with pytest.raises(UserError, match="data has no column of classes: name that of the classes 'label'"):
        label_column("data", features)


def test_several_columns_of_classes():
    with pytest.raises(UserError, match="data has several columns of classes, label, class"):
        label_column("data", {"label": TEXT, "class": NUMBER})


def test_classes_are_the_values_in_the_order_of_training():
    table = datasets.Dataset.from_dict({"label": ["b", "a", "b"]})
    names, labels = classes_and_labels("data", table, "label", None)
    assert (names, labels.tolist()) == (["a", "b"], [1, 0, 1])
    names, labels = classes_and_labels("data", table, "label", ["a", "aa", "b"])
    assert (names, labels.tolist()) == (["a", "aa", "b"], [2, 0, 2])
    names, _ = classes_and_labels("data", table, "label", ["a"])
    assert names == ["a", "b"]  # the caller names the one that training lacks


def test_rows_are_bytes_or_files_or_nothing(tmp_path):
    (tmp_path / "x.png").write_bytes(b"from a file")
    rows = [{"bytes": b"inside", "path": None}, {"bytes": None, "path": str(tmp_path / "x.png")}, None]
    reader = HuggingFaceReader(datasets.Dataset.from_dict({"photo": rows, "id": [1, 2, 3]}), "photo")
    assert len(reader) == 3
    assert [reader[index][0].read() for index in (0, 1)] == [b"inside", b"from a file"]
    with pytest.raises(ValueError, match="the row has no image"):
        reader[2]
