"""Lists and tables of images: what they say is read, what they leave open is refused with the line."""

import numpy
import pytest

from convmae.data.labelled import MissingSplitError, open_labelled_images
from convmae.data.lists import class_names, is_list, read_labels, read_list, read_table
from convmae.data.sources import open_images
from convmae.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder with four files in two folders, of one byte each."""
    for number, name in enumerate(("a.png", "b.png", "sub/c.png", "sub/d, e.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes([number]))
    return tmp_path


@pytest.fixture
def table(folder):
    """table("path,label\\n...", name="t.csv") -> the file."""

    def write(text, name="t.csv", encoding="utf-8"):
        (folder / name).write_text(text, encoding=encoding, newline="")
        return folder / name

    return write


def contents(source):
    return [source.open(index).read()[0] for index in range(len(source))]


def labels_of(source):
    return [(source.open(index).read()[0], source.classes[source.labels[index]]) for index in range(len(source))]


@pytest.mark.parametrize("name", ["list.txt", "t.csv", "t.tsv", "semicolons.csv"])
def test_a_list_is_read_in_its_order(folder, table, name):
    texts = {
        "list.txt": "sub/d, e.png\n\n  a.png  \r\nsub\\c.png\n",
        "t.csv": 'width,File_Name\n3,"sub/d, e.png"\n4,a.png\n5,sub\\c.png\n',
        "t.tsv": "path\twidth\nsub/d, e.png\t3\na.png\t4\n\nsub/c.png\t5\n",
        "semicolons.csv": "path;width\r\nsub/d, e.png;3\r\na.png;4\r\nsub/c.png;5\r\n",
    }
    file = table(texts[name], name, "utf-8-sig")
    assert is_list(file)
    source = open_images(file)
    assert contents(source) == [3, 0, 2]
    assert source.image_name(1) == str(folder / "a.png")
    assert (source.name, source.findings) == (str(file), [])


def test_several_places_in_their_order(folder, table):
    listed = table("a.png\n", "list.txt")
    expected = [2, 3, 0]
    for data in (f"{folder}/sub, {listed}", [f"{folder}/sub", listed]):
        source = open_images(data)
        assert contents(source) == expected
        assert source.image_name(0) == f"{folder}/sub/c.png"
    source = open_images([folder, folder / "sub"])
    assert contents(source) == [0, 1, 2, 3, 2, 3]
    summaries = [finding.summary for finding in source.findings]
    assert summaries[0] == f"{folder}: 4 images (1 other file ignored: .txt 1)"
    assert summaries[1].startswith("2 images are named more than once, and read as often, such as ")
    (folder / "x,y").mkdir()
    (folder / "x,y" / "z.png").write_bytes(b"\x09")
    assert contents(open_images(f"{folder}/x,y")) == [9]  # what exists is one place
    with pytest.raises(UserError, match="demo cannot be joined with other data"):
        open_images(["demo", folder])
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_images(f"{folder},{folder}/nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.png\nnone.png 3\nno.png\n",
            r"2 of the 3 images listed in .* do not exist, the first is 'none\.png 3' in line 2",
        ),
        ("\n\n", "lists no image"),
    ],
)
def test_lists_that_cannot_be_read(table, text, message):
    with pytest.raises(UserError, match=message):
        read_list(table(text, "list.txt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na.png,x\n", "has no column of paths: name one 'path'"),
        ("path,image\na.png,b.png\n", "has the columns path and image, which mean the same"),
        ("path,label\na.png,x\nb.png\n", "has 1 columns in line 3, not 2"),
        ("path,a,a\na.png,1,0\n", "names a column twice"),
        (
            "path,label\nnone.png,x\n",
            "1 of the 1 images listed in .* does not exist, the first is 'none.png' in",
        ),
    ],
)
def test_tables_that_cannot_be_read(table, text, message):
    with pytest.raises(UserError, match=message):
        read_table(table(text))


def test_a_table_in_another_encoding_is_refused(table):
    with pytest.raises(UserError, match="is not in UTF-8"):
        read_table(table("path,label\na.png,é\n", encoding="latin-1"))


def test_a_class_an_image_and_a_split(table, folder):
    file = table("path,Label,split\na.png,bee,train\nsub/c.png,ant,Train\nb.png,bee,test\n")
    training = open_labelled_images(file, "train")
    assert training.classes == ["ant", "bee"]
    assert labels_of(training) == [(0, "bee"), (2, "ant")]
    assert training.open_annotated(0)[1] == 1
    validation = open_labelled_images(file, "val", training.classes)
    assert labels_of(validation) == [(1, "bee")]
    with pytest.raises(MissingSplitError, match="no row of the split 'extra': its column of splits holds test, train"):
        open_labelled_images(file, "extra")
    file = table("path,label,width\na.png,10,5\nb.png,9,5\n")
    source = open_labelled_images(file, "train")
    assert source.classes == ["9", "10"]
    assert [finding.summary for finding in source.findings] == ["columns that are not used: width"]
    with pytest.raises(MissingSplitError, match="has no column 'split', so all its images are for training"):
        open_labelled_images(file, "val", source.classes)


def test_tables_beside_each_other(table, folder):
    table("path,label\na.png,bee\nsub/c.png,ant\n", "train.csv")
    table("path,label\nb.png,bee\n", "valid.csv")
    training = open_labelled_images(folder, "train")
    assert labels_of(training) == [(0, "bee"), (2, "ant")]
    assert labels_of(open_labelled_images(folder, "val", training.classes)) == [(1, "bee")]
    table("path,label\nb.png,cow\n", "valid.csv")
    with pytest.raises(UserError, match="has the class 'cow', which the training split lacks: remove it"):
        open_labelled_images(folder, "val", training.classes)


@pytest.mark.parametrize(
    "text",
    [
        "path,labels\na.png,red|round\nb.png,\nsub/c.png,round\n",
        "path,label\na.png,round; red\nb.png,\nsub/c.png,round\n",
        "path,red,round\na.png,1,1\nb.png,0,0\nsub/c.png,0,1.0\n",
    ],
)
def test_several_classes_an_image(table, text):
    source = open_labelled_images(table(text), "train")
    assert source.multi_label
    assert source.classes == ["red", "round"]
    assert source.labels.tolist() == [[True, True], [False, False], [False, True]]
    file, label = source.open_annotated(2)
    assert (file.read(), label.tolist(), label.dtype.is_floating_point) == (b"\x02", [0.0, 1.0], True)
    assert [finding.summary for finding in source.findings] == ["1 image is of no class, and learned or judged as such"]


def test_the_form_of_labels_is_that_of_all_rows(table, folder):
    file = table("path,label,split\na.png,red|round,train\nb.png,red,val\n")
    training = open_labelled_images(file, "train")
    validation = open_labelled_images(file, "val", training.classes, multi_label=True)
    assert validation.labels.tolist() == [[True, False]]
    table("path,label\na.png,red|round\n", "train.csv")
    table("path,label\nb.png,round\n", "val.csv")
    training = open_labelled_images(folder, "train")
    validation = open_labelled_images(folder, "val", training.classes, multi_label=True)
    assert validation.labels.tolist() == [[False, True]]
    table("path,label\nb.png,round|red\n", "val.csv")
    with pytest.raises(UserError, match="is of several classes an image, and the training split is not"):
        open_labelled_images(folder, "val", ["red", "round"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,x\nb.png,\nsub/c.png,\n", "has no label in 2 of 3 rows, the first is line 3"),
        ("path,label\na.png,x|y\nb.png,x;y\n", r"separates labels by \| and by ;"),
        ("path,red,size\na.png,1,640\n", "holds '640' for 'size' in line 2: without a column 'label', all others"),
        ("path\na.png\n", "has no column of classes: add one called 'label'"),
        ("path,label\na.png,x\na.png,y\n", "lists 1 image more than once, such as .*a.png: write each in one row"),
        ("path,label\na.png,x\nb.png,x\n", "has only one class, 'x'"),
    ],
)
def test_labels_that_cannot_be_used(table, text, message):
    with pytest.raises(UserError, match=message):
        open_labelled_images(table(text), "train")


def test_classes_take_the_numbers_of_training(table):
    read = read_labels(read_table(table("path,label\na.png,c\nb.png,a\n")), ["a", "b", "c"])
    assert (read.classes, read.labels.tolist()) == (["a", "b", "c"], [2, 0])
    read = read_labels(read_table(table("path,b,a\na.png,1,0\n")), ["a", "b"])
    assert (read.classes, read.labels.tolist()) == (["a", "b"], [[False, True]])
    assert read.labels.dtype == numpy.bool_


def test_names_are_sorted_as_numbers_where_all_are():
    assert class_names(["10", "9", "9", "-1"]) == ["-1", "9", "10"]
    assert class_names(["10", "9", "x"]) == ["10", "9", "x"]
