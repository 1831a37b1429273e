"""What of a folder is an image, in which order, and what is left out, counted."""

import numpy
import pytest
from PIL import Image, features
from timm.data.readers import create_reader
from torchvision.datasets.folder import find_classes, make_dataset

from convmae.data.folders import EXTENSIONS, image_files, is_run, subfolders
from convmae.data.labelled import open_labelled_images
from convmae.data.sources import open_images
from convmae.errors import UserError


@pytest.fixture
def fill(tmp_path):
    """fill("a/1.png", ...): write pictures of one pixel, or something else where the name says so."""

    def write(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"whatever")
        return tmp_path

    return write


def summaries(found):
    return [finding.summary for finding in found.findings]


NAMES = [
    "b/10.png",
    "b/9.JPG",
    "B2/1.png",
    "a/x.gif",
    "7.webp",
    "a.d/y.tiff",
    "ä.bmp",
    "b/c/2.jpeg",
    "b-1.png",
    "10.png",
]


def test_the_order_is_that_of_timm(fill):
    """An unfinished run goes on with the same images under the same numbers."""
    folder = fill(*NAMES)
    reader = create_reader("", root=str(folder), input_key=".png;.jpg;.jpeg;.webp;.bmp;.tif;.tiff;.gif")
    assert image_files(folder).paths == [reader.filename(index) for index in range(len(reader))]
    assert image_files(folder).findings == []


def test_the_order_of_class_folders_is_that_of_torchvision(fill):
    folder = fill(*(f"train/{name}" for name in NAMES if "/" in name), "train/b/a.png", "train/b-1/z.png")
    expected = make_dataset(str(folder / "train"), find_classes(folder / "train")[1], EXTENSIONS)
    source = open_labelled_images(folder, "train")
    assert [(source.image_name(index), source.labels[index]) for index in range(len(source))] == expected
    assert source.findings == []


def test_what_systems_and_tools_leave_is_no_image(fill):
    folder = fill(
        *("a.png", "._a.png", ".thumbnails/a.png", "@eaDir/a.jpg", "x/__MACOSX/deep/a.png", "Thumbs.db", ".DS_Store"),
        *(".ipynb_checkpoints/a-checkpoint.png", "x/desktop.ini"),
    )
    found = image_files(folder)
    assert found.paths == ["a.png"]
    assert summaries(found) == [
        "5 images in hidden files and folders, as systems and tools leave them, are left out, such as ._a.png"
    ]
    assert len(found.findings[0].items) == 5
    assert found.others == ""


def test_other_files_are_counted_by_their_extensions(fill):
    folder = fill("a.png", "b.JPG", "c.TXT", "d.txt", "e.psd", "f", "g/h.txt")
    found = image_files(folder)
    assert summaries(found) == ["2 images (5 other files ignored: .txt 3, .psd 1, without extension 1)"]
    assert found.findings[0].items == ["c.TXT", "d.txt", "e.psd", "f", "g/h.txt"]
    assert open_images(folder).findings == found.findings
    for name in ("a.png", "b.JPG"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"holds no images: accepted are .*; it holds 5 other files: \.txt 3, \.psd"):
        open_images(folder)


def test_extensions_are_those_that_pillow_decodes(tmp_path):
    """Each listed extension is written and read by Pillow itself, but for NumPy's."""
    Image.init()
    numpy.save(tmp_path / "x.npy", numpy.zeros((20, 16)))
    for extension in set(EXTENSIONS) - {".npy"}:
        path = tmp_path / f"x{extension}"
        kind = {".pbm": "1", ".pgm": "L"}.get(extension, "RGB")
        Image.new(kind, (20, 16)).save(path, Image.registered_extensions()[extension])
        with Image.open(path) as image:
            assert image.size == (20, 16)
    assert image_files(tmp_path).paths == sorted(f"x{extension}" for extension in EXTENSIONS)
    assert {".jfif", ".ppm"} <= set(EXTENSIONS)
    assert (".jp2" in EXTENSIONS) == features.check("jpg_2000")


RUN = ("config.yaml", "metrics.jsonl", "loss.png", "reconstructions/latest.png", "checkpoints/step-1/model.safetensors")


def test_a_run_inside_its_data_is_left_out(fill):
    folder = fill("a.png", "x/b.png", *(f"runs/first/{name}" for name in RUN))
    found = image_files(folder)
    assert found.paths == ["a.png", "x/b.png"]
    expected = "2 images drawn by training runs in this folder are left out, such as runs/first/loss.png"
    assert summaries(found) == [expected]
    assert image_files(folder / "runs" / "first" / "reconstructions").paths == ["latest.png"]
    fill(*RUN)  # the data's own folder was given for the run
    assert image_files(folder).paths == ["a.png", "x/b.png"]
    fill("x/config.yaml")  # no run yet
    assert image_files(folder).paths == ["a.png", "x/b.png"]


def test_neither_runs_nor_leftovers_are_classes(fill):
    folder = fill("train/ant/1.png", "train/bee/1.png", "train/@eaDir/1.png", "train/.git/1.png", "train/bee/._1.png")
    fill("train/2.png", *(f"train/run/{name}" for name in RUN))
    assert subfolders(folder / "train") == ["ant", "bee"]
    source = open_labelled_images(folder, "train")
    assert source.classes == ["ant", "bee"]
    assert [source.image_name(index) for index in range(2)] == [
        f"{folder}/train/{name}/1.png" for name in source.classes
    ]
    assert len(source) == 2
    assert summaries(source) == [
        "3 images in hidden files and folders, as systems and tools leave them, are left out, such as .git/1.png",
        "2 images drawn by training runs in this folder are left out, such as run/loss.png",
        "1 image outside the class folders is left out, such as 2.png",
    ]


def test_a_run_in_the_folder_of_classes_adds_none(fill):
    folder = fill("train/ant/1.png", "train/bee/1.png", *(f"train/{name}" for name in RUN))
    source = open_labelled_images(folder, "train")
    assert (source.classes, len(source)) == (["ant", "bee"], 2)
    assert summaries(source)[0].startswith("2 images drawn by training runs in this folder are left out")


def test_classes_that_differ_in_case_alone(fill):
    folder = fill("train/Ant/1.png", "train/ant/1.png", "train/bee/1.png", "val/Bee/1.png")
    source = open_labelled_images(folder, "train")
    assert source.classes == ["Ant", "ant", "bee"]
    assert summaries(source) == [
        "names of classes differ in case alone and stay classes of their own, such as Ant, ant"
    ]
    with pytest.raises(UserError, match="has the class 'Bee', which the training split lacks: name it 'bee', as"):
        open_labelled_images(folder, "val", source.classes)


def test_links_are_followed_but_not_in_circles(fill, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "c.png").write_bytes(b"")
    folder = fill("a/b.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "a" / "again").symlink_to(folder)
    (folder / "a" / "itself").symlink_to(folder / "a")
    found = image_files(folder)
    assert found.paths == ["a/b.png", "linked/c.png"]
    assert summaries(found) == ["2 links to a folder above are not followed"]
    assert found.findings[0].items == ["a/again", "a/itself"]


@pytest.mark.parametrize(
    ("files", "folders", "expected"),
    [
        (["config.yaml", "metrics.jsonl"], [], True),
        (["config.yaml"], ["checkpoints"], True),
        (["config.yaml"], ["images"], False),
        (["metrics.jsonl"], ["checkpoints"], False),
    ],
)
def test_a_run_is_known_by_two_of_its_files(files, folders, expected):
    assert is_run(files, folders) == expected
