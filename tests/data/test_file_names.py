"""Names of files as other systems and tools spell them, and the files that they mean."""

import unicodedata

import pytest

from convmae.data.file_names import agreeing_parts, find_files, name_parts
from convmae.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A function that writes files and returns their folder."""

    def write(*names):
        for name in names:
            path = tmp_path / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "files"

    return write


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a\\b\\1.png", "a/b/1.png"),
        ("a/b/1.png", "a\\b\\1.png"),  # as unpacked from an archive of Windows
        ("C:\\data\\photos\\1.png", "1.png"),
        ("/home/somebody/photos/a/1.png", "a/1.png"),
        ("https://host.example/media/a/1.png?width=3", "a/1.png"),
        ("s3://bucket/media/1.png", "1.png"),
        ("./a/1.png", "a/1.png"),
        ("../images/1.png", "1.png"),
        ("A/1.PNG", "a/1.png"),
        ("1.png", "a/1.png"),
        ("my%20dog.png", "my dog.png"),
        ("my dog.png", "my%20dog.png"),
        (COMPOSED, DECOMPOSED),
        (DECOMPOSED, COMPOSED),
        ("STRASSE.png", "stra\u00dfe.png"),
    ],
)
def test_the_one_file_that_a_name_fits_is_found(folder, name, file):
    root = folder(file, "other.png")
    found = find_files(root, [name, "other.png"])
    assert found.paths[1] == str(root / "other.png")
    assert found.ambiguous == {}
    if found.paths[0] != str(root / name):  # a file system may take one spelling for the other
        assert found.paths[0] == str(root / file)
        assert found.respelled == [0]


@pytest.mark.parametrize("name", ["b/1.png", "2.png", "1.jpg", "", "/", "a", "x" * 5000, "a\0b"])
def test_names_that_no_file_has(folder, name):
    root = folder("a/1.png", "c/3.png")
    found = find_files(root, [name])
    assert (found.paths, found.respelled, found.ambiguous) == ([None], [], {})


def test_a_name_as_it_lies_on_the_disk_comes_first(folder):
    root = folder("my dog.png", "my%20dog.png", "a/my dog.png")
    found = find_files(root, ["my%20dog.png", "my dog.png"])
    assert found.paths == [str(root / "my%20dog.png"), str(root / "my dog.png")]
    assert found.respelled == []


def test_the_longest_fit_is_meant_and_of_equal_ones_none(folder):
    root = folder("1.png", "a/1.png", "b/a/1.png", "b/2.png", "c/2.png")
    found = find_files(root, ["/x/b/a/1.png", "/x/c/2.png", "2.png", "/x/y/1.png"])
    assert found.paths == [str(root / "b/a/1.png"), str(root / "c/2.png"), None, str(root / "1.png")]
    assert found.respelled == [0, 1, 3]
    assert found.ambiguous == {2: [str(root / "b/2.png"), str(root / "c/2.png")]}


def test_a_file_is_not_taken_for_two_names(folder):
    root = folder("1.png", "a/2.png")
    assert find_files(root, ["1.png", "x/1.png"]).paths == [str(root / "1.png"), None]
    two = find_files(root, ["x/a/2.png", "y/a/2.png"])
    assert two.paths == [None, None]
    assert set(two.ambiguous) == {0, 1}
    same = find_files(root, ["x/a/2.png", "x\\A\\2.png"])
    assert same.paths == [str(root / "a/2.png")] * 2


def test_the_folder_must_be_one(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder: give the one with the images"):
        find_files(tmp_path / "nowhere", [])


def test_parts_agree_from_the_end_on():
    assert name_parts("C:\\A\\b%20c.PNG") == ("c:", "a", "b c.png")
    assert agreeing_parts(("a", "b"), ("x", "a", "b")) == 2
    assert agreeing_parts(("y", "b"), ("x", "a", "b")) == 0
    assert agreeing_parts((), ("b",)) == 0
