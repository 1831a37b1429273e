"""Folders, shards and Hugging Face data sets of unlabelled images: what was written is read, in its shares."""

import io
import tarfile

import pytest
import torch
from PIL import Image
from timm.data.readers import img_extensions

from convmae.data.images import RandomCrop
from convmae.data.loading import Loading, build_training_loader
from convmae.data.sources import open_images
from convmae.errors import UserError


@pytest.fixture
def folder(tmp_path, encoded, plain):
    """Twelve images whose pixels all hold ten times the image's number, in nested folders."""
    for number in range(12):
        place = tmp_path / "pictures" / ("a", "b/c")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02d}.png").write_bytes(encoded(plain(10 * number)).getvalue())
    return tmp_path / "pictures"


def loader(source, batch_size=4, seed=0, **options):
    loading = Loading(batch_size, skip_damaged=True, **options)
    return build_training_loader(source, RandomCrop((8, 8)), loading, seed=seed)


def epoch_of(batches, epoch=0, batch=0):
    batches.set_position(epoch, batch)
    result = list(batches)
    assert len(result) == len(batches)
    return result


def values(batches):
    """The images' grey values, sorted within each batch."""
    return [sorted(batch["images"][:, 0, 0, 0].tolist()) for batch in batches]


def test_folder_at_any_depth_and_with_more_extensions(folder):
    for name in ("x.webp", "x.bmp", "x.TIF", "x.tiff", "x.gif", "x.JPG"):
        Image.new("RGB", (9, 9)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    known = img_extensions.get_img_extensions()
    source = open_images(folder)
    assert len(source) == 12 + 6
    assert source.image_name(0) == "a/00.png"
    assert img_extensions.get_img_extensions() == known


def test_some_images_are_taken_evenly_spread(folder):
    source = open_images(folder)
    assert source.evenly_spread(5) == [0, 2, 4, 7, 9]
    assert source.evenly_spread(100) == list(range(12))


def test_folder_mistakes_name_the_cure(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is empty"):
        open_images(tmp_path)
    (tmp_path / "notes.md").write_text("no image")
    with pytest.raises(UserError, match=r"holds no images: accepted are .*\.webp"):
        open_images(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        open_images(tmp_path / "notes.md")


@pytest.mark.parametrize("data", ["demo", "wds/x-{0..1}.tar", "hfds/x", "hfids/x"])
def test_a_missing_package_names_its_extra(data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("convmae.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'convmae\[(demo|shards|hub)\]'"):
        open_images(data)


@pytest.fixture
def shards(tmp_path, encoded, plain):
    """Four unlabelled shards of five images, the image number 7 damaged."""
    pytest.importorskip("webdataset")
    for shard in range(4):
        with tarfile.open(tmp_path / f"shard-{shard:04d}.tar", "w") as archive:
            for number in range(shard * 5, shard * 5 + 5):
                data = b"damaged" if number == 7 else encoded(plain(10 * number)).getvalue()
                member = tarfile.TarInfo(f"{number:02d}.png")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return f"wds/{tmp_path}/shard-{{0000..0003}}.tar"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards(shards, num_workers):
    def fresh():
        return loader(open_images(shards), batch_size=5, num_workers=num_workers)

    batches = fresh()
    first = epoch_of(batches, epoch=0)
    assert len(first) == 4
    failed = [failure for batch in first for failure in batch["failed"]]
    assert all(failure.startswith("shard-0001.tar/07: ") for failure in failed)
    seen = {value for batch in values(first) for value in batch}
    assert len(seen) >= 15
    assert seen <= {10 * number for number in range(20) if number != 7}
    assert values(epoch_of(batches, epoch=1)) != values(first)
    again = epoch_of(fresh(), epoch=0)
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(first, again, strict=True))


def test_shards_are_split_among_ranks_and_resume(shards):
    seen = []
    for rank in (0, 1):
        source = open_images(f"{shards}|20")
        batches = loader(source, batch_size=5, num_replicas=2, rank=rank, seed=1)
        whole = epoch_of(batches)
        seen.append({value for batch in values(whole) for value in batch})
        resumed = epoch_of(batches, batch=1)
        if not whole[0]["failed"]:  # a damaged image before the position shifts it
            assert torch.equal(resumed[0]["images"], whole[1]["images"])
    assert not seen[0] & seen[1]


def test_more_workers_than_shards_are_cut_down(shards, caplog):
    batches = loader(open_images(shards), batch_size=1, num_workers=9, num_replicas=2)
    assert batches.num_workers == 2
    assert "2 loader workers instead of 9" in caplog.text


def test_shard_mistakes_name_the_cure(shards, tmp_path):
    with pytest.raises(UserError, match="matches no shard"):
        open_images(f"wds/{tmp_path}/other-{{0000..0003}}.tar")
    with pytest.raises(UserError, match=r"shard-0004\.tar does not exist"):
        open_images(f"wds/{tmp_path}/shard-{{0000..0004}}.tar")
    with pytest.raises(UserError, match="names no shards"):
        open_images(f"wds/{tmp_path}")
    with pytest.raises(UserError, match="not 'many'"):
        open_images(f"{shards}|many")
    with pytest.raises(UserError, match=r"append the number of images, .*\|N"):
        open_images("wds/https://example.org/shard-{0000..0003}.tar")
    (tmp_path / "broken-0.tar").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read"):
        open_images(f"wds/{tmp_path}/broken-{{0..0}}.tar")


@pytest.mark.parametrize("prefix", ["hfds", "hfids"])
def test_hugging_face_data_set_without_labels(prefix, folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (folder / "a" / "04.png").write_bytes(b"damaged")
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in folder.rglob("*.png"):
        path.rename(flat / path.name)
    data = f"{prefix}/{flat}"
    if prefix == "hfids":
        with pytest.raises(UserError, match=r"length of .* is unknown: append it, .*\|N"):
            open_images(data)
        data += "|12"
    source = open_images(data)
    assert len(source) == 12
    batches = epoch_of(loader(source))
    failed = [failure for batch in batches for failure in batch["failed"]]
    assert failed
    assert all(("row 4" if prefix == "hfds" else "04.png") in failure for failure in failed)
    assert {value for batch in values(batches) for value in batch} <= {10 * n for n in range(12) if n != 4}
    assert all(len(batch["images"]) == 4 for batch in batches)
    with pytest.raises(UserError, match="split nowhere, cannot be opened"):
        open_images(data, split="nowhere")


def parquet(folder, form, encoded, plain):
    """Three rows as pandas or `datasets` write them, the second without an image."""
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    folder.mkdir()
    files = [encoded(plain(number)).getvalue() if number != 2 else None for number in (1, 2, 3)]
    if form == "struct":
        files = [data and {"bytes": data, "path": "x.png"} for data in files]
    if form == "typed":
        images = [data and Image.open(io.BytesIO(data)) for data in files]
        features = datasets.Features({"number": datasets.Value("int64"), "scan": datasets.Image()})
        datasets.Dataset.from_dict({"number": [5, 6, 7], "scan": images}, features).to_parquet(folder / "t.parquet")
    else:
        pandas.DataFrame({"number": [5, 6, 7], "scan": files}).to_parquet(folder / "t.parquet")


@pytest.mark.parametrize("form", ["bytes", "struct", "typed"])
@pytest.mark.parametrize("prefix", ["hfds", "hfids"])
def test_hugging_face_images_in_a_column_of_any_name(form, prefix, tmp_path, monkeypatch, encoded, plain, capfd):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parquet(tmp_path / "data", form, encoded, plain)
    capfd.readouterr()
    source = open_images(f"{prefix}/{tmp_path / 'data'}{'|3' if prefix == 'hfids' else ''}")
    batches = epoch_of(loader(source, batch_size=1))
    assert {value for batch in values(batches) for value in batch} == {1, 3}
    failed = {failure for batch in batches for failure in batch["failed"]}
    assert failed
    assert all(failure.endswith(": the row has no image") for failure in failed)
    assert capfd.readouterr() == ("", "")  # no progress bars of the library


def test_hugging_face_columns_that_may_be_the_images(tmp_path, monkeypatch):
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, columns in (("two", ["left", "right"]), ("named", ["mask", "Image"]), ("none", [])):
        (tmp_path / name).mkdir()
        frame = pandas.DataFrame({"number": [1], **{column: [b"x"] for column in columns}})
        frame.to_parquet(tmp_path / name / "t.parquet")
    with pytest.raises(UserError, match="several columns of files, left, right: name that of the images 'image'"):
        open_images(f"hfds/{tmp_path / 'two'}")
    with pytest.raises(UserError, match="has no column of images: its columns are number"):
        open_images(f"hfds/{tmp_path / 'none'}")
    source = open_images(f"hfds/{tmp_path / 'named'}")
    assert source.open(0).read() == b"x"
