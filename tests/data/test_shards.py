"""Shards as archivers and WebDataset write them: what is counted is what is read, whatever the members are called."""

import gzip
import io
import tarfile
from collections import Counter

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from convmae.data.images import RandomCrop
from convmae.data.labelled import open_labelled_images
from convmae.data.loading import Loading, build_training_loader
from convmae.data.shards import read_shards
from convmae.data.sources import open_images
from convmae.errors import UserError

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def grey(encoded, plain):
    """grey(number) -> a PNG file's bytes, which number is told by its pixels."""
    return lambda number: encoded(plain(number)).getvalue()


def write(path, *members, form=tarfile.PAX_FORMAT):
    """A tar file of (name, bytes); of (name, None) folders, of (name, "target") links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w", format=form) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            else:
                member.type = tarfile.DIRTYPE if data is None else tarfile.LNKTYPE
                member.linkname = data or ""
                archive.addfile(member)


def read(source):
    """The grey values of the images of an epoch, counted."""
    loader = build_training_loader(source, RandomCrop((4, 4)), Loading(1, skip_damaged=True))
    loader.set_position(0)
    batches = list(loader)
    assert not [failure for batch in batches for failure in batch["failed"]]
    return Counter(batch["images"][0, 0, 0, 0].item() for batch in batches)


def summaries(source):
    return [finding.summary for finding in source.findings]


def test_keys_with_dots_are_images_of_their_own(tmp_path, grey):
    write(tmp_path / "a.tar", *((f"img.v2.{number:03d}.png", grey(number)) for number in range(12)))
    source = open_images(f"wds/{tmp_path}/a.tar")
    assert len(source) == 12
    assert read(source) == Counter(range(12))
    assert summaries(source) == ["12 images with a dot in the key are read by the whole name, as no field of a sample"]
    assert "a.tar/img.v2.003.png" in source.findings[0].items


def test_another_image_of_a_sample_is_no_image_of_its_own(tmp_path, grey):
    members = [(f"{number}.{field}", grey(number + extra)) for number in (1, 2) for field, extra in FIELDS.items()]
    write(tmp_path / "together.tar", *members)
    write(tmp_path / "apart.tar", *sorted(members, key=lambda member: member[0].partition(".")[2]))
    for shard in ("together", "apart"):
        source = open_images(f"wds/{tmp_path}/{shard}.tar")
        assert (len(source), read(source)) == (2, Counter([1, 2]))
        assert summaries(source) == ["2 images beside another one of the same sample are not read"]


FIELDS = {"PNG": 0, "seg.png": 100, "json": 50}


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz"])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_is_no_sample_is_neither_counted_nor_read(tmp_path, grey, form, suffix):
    long = "deep/" + "x" * 150 + "/" + "y" * 120
    shard = tmp_path / f"s.{suffix}"
    write(
        shard,
        ("folder.png", None),
        ("./a.JPG", grey(1)),
        ("./._a.JPG", b"resource fork"),
        ("__MACOSX/a.png", b"resource fork"),
        ("@eaDir/a.png", grey(90)),
        ("b.png", "a.JPG"),
        ("notes.txt", b"none"),
        ("v1.0/a.jpeg", grey(2)),
        (f"{long}.png", grey(3)),
        (f"{long}.png", grey(4)),
        form=form,
    )
    source = open_images(f"wds/{shard}")
    assert (len(source), read(source)) == (4, Counter([1, 2, 3, 4]))
    assert summaries(source) == [
        "3 images in hidden members, as systems and tools leave them, are not read",
        "1 image stored as a link to another member is not read",
    ]


names = st.lists(
    st.tuples(
        st.sampled_from(["", "./", "a/", "a.b/", "_/", "@eaDir/", ".hidden/"]),
        st.text("aA.1_ é", min_size=1, max_size=6),
        st.sampled_from([".png", ".PNG", ".jpg", ".webp", ".seg.png", ".cls", ".json", ""]),
    ).map("".join),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=names)
@example(names=["a.png", "a.png", "a.seg.png", "a.1.png"])
@example(names=["a.1.png", "a.2.png", "b.png", "a.2.png"])
@example(names=["a.png", "b.jpg", "a.cls", "a.PNG", "a.webp"])
def test_what_is_counted_is_what_an_epoch_reads(tmp_path, grey, names):
    """Each image that was written is read once, unless a finding tells of it."""
    write(tmp_path / "s.tar", *((name, grey(number)) for number, name in enumerate(names)))
    pictures = [name for name in names if name.lower().endswith((".png", ".jpg", ".webp"))]
    if all(name.startswith((".h", "@")) or name.rpartition("/")[2].startswith(".") for name in pictures):
        with pytest.raises(UserError, match="hold no images"):
            open_images(f"wds/{tmp_path}/s.tar")
        return
    source = open_images(f"wds/{tmp_path}/s.tar")
    seen = read(source)
    assert sum(seen.values()) == len(source)
    assert set(seen.values()) == {1}
    not_read = [item for finding in source.findings if "not read" in finding.summary for item in finding.items]
    accounted = Counter(f"s.tar/{names[number]}" for number in seen) + Counter(not_read)
    assert accounted == Counter(f"s.tar/{name}" for name in pictures)


def test_a_stream_reads_what_a_file_does(tmp_path, grey):
    """The same shard through a command, as from a bucket."""
    members = [
        (f"{number:02d}.{field}", grey(number + extra)) for number in range(5) for field, extra in FIELDS.items()
    ]
    write(tmp_path / "s.tar", *members, ("x.1.png", grey(7)), ("x.2.png", grey(8)), (".y.png", grey(9)))
    file, stream = (
        list(read_shards(iter([{"url": url}]))) for url in (f"{tmp_path}/s.tar", f"pipe:cat {tmp_path}/s.tar")
    )
    assert [entry["image"] for entry in file] == [grey(number) for number in (0, 1, 2, 3, 4, 7, 8)]
    assert stream == file


@pytest.mark.parametrize("form", ["{}", "pipe:cat {}"])
def test_a_shard_that_ends_early_tells_so(tmp_path, grey, form):
    write(tmp_path / "s.tar", *((f"{number}.png", grey(number)) for number in range(4)))
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[: 512 * 7])
    *images, last = read_shards(iter([{"url": form.format(tmp_path / "s.tar")}]))
    assert [entry["image"] for entry in images] == [grey(number) for number in range(3)]
    assert isinstance(last["image"], OSError)
    assert "cannot be read to its end" in str(last["image"])
    with pytest.raises(UserError, match=r"s\.tar cannot be read, write it again"):
        open_images(f"wds/{tmp_path}/s.tar")
    source = open_images(f"wds/{tmp_path}/s.tar|3")
    loader = build_training_loader(source, RandomCrop((4, 4)), Loading(1, skip_damaged=True))
    loader.set_position(0)
    assert len(list(loader)) == 3


# With classes


def values(source):
    found = []
    for index in range(len(source)):
        file, label = source.open_annotated(index)
        with file:
            found.append((source.classes[label], file.read()))
    return found


def test_labelled_keys_with_dots(tmp_path, grey):
    members = []
    for number in range(4):
        members += [(f"img.v2.{number}.png", grey(number)), (f"img.v2.{number}.cls", str(number % 2).encode())]
    write(tmp_path / "train.tar", *members, ("b.left.png", grey(9)), ("b.right.png", grey(8)), ("b.cls", b"1"))
    source = open_labelled_images(f"wds/{tmp_path}", "train")
    found = [("0", 0), ("1", 1), ("0", 2), ("1", 3), ("1", 9), ("1", 8)]
    assert values(source) == [(label, grey(number)) for label, number in found]
    assert source.image_name(3).endswith("/train.tar/img.v2.3.png")


def test_labelled_samples_of_the_same_key_keep_their_own_classes(tmp_path, grey):
    members = [("a.png", grey(1)), ("a.cls", b"0"), ("a.png", grey(2)), ("a.cls", b"1")]
    write(tmp_path / "train.tar", *members)
    source = open_labelled_images(f"wds/{tmp_path}", "train")
    assert values(source) == [("0", grey(1)), ("1", grey(2))]
    write(tmp_path / "train.tar", *members, ("a.cls", b"0"))
    with pytest.raises(UserError, match=r"a names 2 images and 3 classes \(\.cls\): write the shard again"):
        open_labelled_images(f"wds/{tmp_path}", "train")


def test_labelled_images_without_a_class_are_counted(tmp_path, grey):
    write(
        tmp_path / "train.tar",
        *(("a.png", grey(1)), ("a.cls", b"0"), ("b.png", grey(2)), ("b.cls", b"1")),
        *(("c.png", grey(3)), ("d.png", grey(4)), ("d.cls", b"-1"), ("._a.png", b"none"), ("a.seg.png", grey(7))),
    )
    source = open_labelled_images(f"wds/{tmp_path}", "train")
    assert values(source) == [("0", grey(1)), ("1", grey(2))]
    assert sorted(summaries(source)) == [
        "1 image beside another one of the same sample is not read",
        "1 image in hidden members, as systems and tools leave them, is not read",
        "2 images without a class are left out",
    ]
    write(tmp_path / "train.tar", ("a.png", grey(1)), ("a.cls", b"cat"))
    with pytest.raises(UserError, match=r"a\.cls holds b'cat', not the number of a class"):
        open_labelled_images(f"wds/{tmp_path}", "train")


def test_labelled_compressed_shards_are_refused(tmp_path, grey):
    write(tmp_path / "train.tar", ("a.png", grey(1)), ("a.cls", b"0"), ("b.png", grey(1)), ("b.cls", b"1"))
    (tmp_path / "val.tar.gz").write_bytes(gzip.compress((tmp_path / "train.tar").read_bytes()))
    assert len(open_labelled_images(f"wds/{tmp_path}", "train")) == 2
    with pytest.raises(UserError, match=r"val\.tar\.gz is compressed, .*: unpack it to \.tar"):
        open_labelled_images(f"wds/{tmp_path}", "val")
