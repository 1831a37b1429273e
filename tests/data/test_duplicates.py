"""Files of the same bytes, among such that only look alike."""

from convmae.data import duplicates as module
from convmae.data.duplicates import duplicates


def files(folder, **contents):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in contents]


def test_the_same_bytes_are_found_under_any_name(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BEGINNING", 4)
    contents = {"copy": b"12345678", "begins_alike": b"1234abcd", "other": b"zzzzzzzz", "short": b"1234"}
    validation = files(tmp_path / "val", **contents, longer=b"123456789")
    training = files(tmp_path / "train", a=b"1234ABCD", b=b"12345678", c=b"12345678", d=b"1234567", e=b"4321")
    assert duplicates(validation, training) == [(str(tmp_path / "val" / "copy"), str(tmp_path / "train" / "b"))]


def test_a_file_is_the_same_as_itself_and_as_a_link_to_it(tmp_path):
    (one, _) = files(tmp_path / "train", one=b"1234", two=b"5678")
    (tmp_path / "link").symlink_to(one)
    assert duplicates([one], [one]) == [(one, one)]
    assert duplicates([str(tmp_path / "link")], [one]) == [(str(tmp_path / "link"), one)]


def test_only_files_of_one_size_are_read_and_only_alike_ones_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BEGINNING", 4)
    read = []
    original = module._digest
    monkeypatch.setattr(module, "_digest", lambda path, length: read.append((path, length)) or original(path, length))
    first = files(tmp_path / "val", a=b"12345", b=b"12345678")
    second = files(tmp_path / "train", c=b"123456", d=b"ab345678")
    assert duplicates(first, second) == []
    assert set(read) == {(first[1], 4), (second[1], 4)}


def test_files_that_are_gone_are_none(tmp_path):
    gone = [str(tmp_path / "gone"), str(tmp_path / "gone, too")]
    assert duplicates(gone, gone) == []
