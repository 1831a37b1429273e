"""Sources, decoding and batches of unlabelled images, on small files written for the purpose."""

import io
import tarfile

import numpy
import pytest
import torch
from PIL import Image
from timm.data.readers import img_extensions
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from convmae.data import sources
from convmae.data.images import PretrainingImages, RandomCrop, build_loader
from convmae.data.sources import open_images
from convmae.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image, image_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def plain(value, size=(20, 16)):
    """A grey RGB image that its value tells from others."""
    return Image.new("RGB", size, (value, value, value))


def photograph(width, height):
    """A smooth coloured image with no symmetry."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Twelve images whose pixels all hold ten times the image's number, in nested folders."""
    for number in range(12):
        place = tmp_path / "pictures" / ("a", "b/c")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02d}.png").write_bytes(encoded(plain(10 * number)))
    return tmp_path / "pictures"


def loader(source, **options):
    return build_loader(source, **{"image_size": (8, 8), "batch_size": 4, **options})


def epoch_of(batches, epoch=0, batch=0):
    batches.set_position(epoch, batch)
    result = list(batches)
    assert len(result) == len(batches)
    return result


def values(batches):
    """The images' grey values, sorted within each batch."""
    return [sorted(batch["images"][:, 0, 0, 0].tolist()) for batch in batches]


def crop_of(data, image_size=(8, 8), in_channels=3, scale=(1.0, 1.0)):
    torch.manual_seed(0)
    return RandomCrop(image_size, in_channels, scale)(io.BytesIO(data))


# Sources


def test_folder_at_any_depth_and_with_more_extensions(folder):
    for name in ("x.webp", "x.bmp", "x.TIF", "x.tiff", "x.gif", "x.JPG"):
        Image.new("RGB", (9, 9)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    known = img_extensions.get_img_extensions()
    source = open_images(folder)
    assert len(source) == 12 + 6
    assert source.picture_name(0) == "a/00.png"
    assert img_extensions.get_img_extensions() == known


def test_folder_mistakes_name_the_cure(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is empty"):
        open_images(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"holds no images: accepted are .*\.webp"):
        open_images(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        open_images(tmp_path / "notes.txt")


def test_demo_photographs():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    source = open_images("demo")
    assert len(source) == 256
    assert len({source.picture_name(index) for index in range(256)}) == 16
    dataset = PretrainingImages(source, RandomCrop((32, 32)))
    samples = [dataset[0, index] for index in range(16)]
    assert all(not sample["failed"] and sample["image"].float().std() > 5 for sample in samples)


@pytest.mark.parametrize("data", ["demo", "wds/x-{0..1}.tar", "hfds/x", "hfids/x"])
def test_a_missing_package_names_its_extra(data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'convmae\[(demo|shards|hub)\]'"):
        open_images(data)


@pytest.fixture
def shards(tmp_path):
    """Four unlabelled shards of five images, the image number 7 damaged."""
    pytest.importorskip("webdataset")
    for shard in range(4):
        with tarfile.open(tmp_path / f"shard-{shard:04d}.tar", "w") as archive:
            for number in range(shard * 5, shard * 5 + 5):
                data = b"damaged" if number == 7 else encoded(plain(10 * number))
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
    batches = loader(open_images(shards), batch_size=5, num_workers=9, num_replicas=2)
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
    with pytest.raises(UserError, match=r"append the number of pictures, .*\|N"):
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


# Decoding


@pytest.mark.parametrize(("size", "tolerance"), [((500, 375), 0.3), ((300, 900), 0.3), ((2000, 1500), 1.0)])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_crops_agree_with_the_plain_bicubic_path(size, tolerance, image_format):
    data = encoded(photograph(*size), image_format)
    plain_crop = v2.RandomResizedCrop((224, 192), (0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
    crop = RandomCrop((224, 192))
    for seed in range(3):
        torch.manual_seed(seed)
        expected = v2.RandomHorizontalFlip()(plain_crop(Image.open(io.BytesIO(data))))
        expected = functional.pil_to_tensor(expected)
        torch.manual_seed(seed)
        result = crop(io.BytesIO(data))
        assert result.shape == (3, 224, 192)
        assert result.dtype == torch.uint8
        assert (result.float() - expected).abs().mean() < tolerance


def _grey16(image_format):
    pixels = numpy.full((20, 20), 0x8012, numpy.uint16)
    return encoded(Image.fromarray(pixels), image_format)


def _palette():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, *RED])
    return encoded(image, transparency=bytes([0, 100]))


def _animation(image_format, **options):
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, BLUE)]
    return encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(_grey16("PNG"), (128, 128, 128, 255), id="16-bit PNG"),
        pytest.param(_grey16("TIFF"), (128, 128, 128, 255), id="16-bit TIFF"),
        pytest.param(encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG"), (*RED, 255), id="CMYK JPEG"),
        pytest.param(_palette(), (*RED, 100), id="palette with transparency"),
        pytest.param(encoded(Image.new("L", (20, 20), 77), "JPEG"), (77, 77, 77, 255), id="grey JPEG"),
        pytest.param(encoded(Image.new("LA", (20, 20), (77, 9))), (77, 77, 77, 9), id="grey with alpha"),
        pytest.param(encoded(Image.new("RGBA", (20, 20), (*RED, 9))), (*RED, 9), id="RGBA"),
        pytest.param(encoded(Image.new("1", (20, 20), 1)), (255, 255, 255, 255), id="bilevel"),
        pytest.param(_animation("GIF"), (*RED, 255), id="animated GIF"),
        pytest.param(_animation("WEBP", lossless=True), (*RED, 255), id="animated WebP"),
        pytest.param(encoded(Image.new("RGB", (20, 20), RED), "BMP"), (*RED, 255), id="BMP"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_common_kind_of_file(data, expected):
    colours = torch.tensor(expected, dtype=torch.float)
    grey = (colours[:3] * torch.tensor([0.299, 0.587, 0.114])).sum()  # ITU-R BT.601 luma
    for in_channels, wanted in ((1, grey[None]), (3, colours[:3]), (4, colours)):
        pixels = crop_of(data, in_channels=in_channels).float()
        assert pixels.shape == (in_channels, 8, 8)
        torch.testing.assert_close(pixels.mean((1, 2)), wanted, atol=2, rtol=0)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("orientation", "red_side"), [(1, "top"), (3, "bottom"), (6, "left"), (8, "right")])
@pytest.mark.parametrize("size", [40, 640])  # the larger JPEG is decoded at a reduced size
def test_exif_orientation_is_applied_once(image_format, orientation, red_side, size):
    # As stored, the red side is where the camera's rotation put it; upright, red is on top.
    image = Image.new("RGB", (size, size), BLUE)
    half = size // 2
    box = {
        "top": (0, 0, size, half),
        "bottom": (0, half, size, size),
        "left": (0, 0, half, size),
        "right": (half, 0, size, size),
    }
    image.paste(RED, box[red_side])
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = crop_of(encoded(image, image_format, exif=exif)).float()
    assert pixels[0, :3].min() > 200 > 50 > pixels[0, 5:].max()
    assert pixels[2, 5:].min() > 200 > 50 > pixels[2, :3].max()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_metadata_do_no_harm():
    data = encoded(plain(50), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffgarbage")
    assert (crop_of(data).float() - 50).abs().max() < 2


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode):
    with pytest.raises(ValueError, match="convert the file"):
        crop_of(encoded(Image.new(mode, (20, 20)), "TIFF"))


def test_impossible_crops_are_refused():
    with pytest.raises(UserError, match="in_channels cannot be 2"):
        RandomCrop((8, 8), in_channels=2)
    with pytest.raises(UserError, match="0 < scale <= 1"):
        RandomCrop((8, 8), scale=(0.5, 2.0))
    with pytest.raises(UserError, match="positive size"):
        RandomCrop((0, 8))


# Damaged files


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files_count_as_undecodable(image_format, tmp_path):
    data = encoded(photograph(600, 600), image_format)
    (tmp_path / "0.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "1.png").write_bytes(encoded(plain(50)))
    sample = PretrainingImages(open_images(tmp_path), RandomCrop((8, 8)))[0, 0]
    assert [failure.partition(": ")[0] for failure in sample["failed"]] == ["0.png"]
    assert (sample["image"] == 50).all()


def test_undecodable_images_are_replaced_by_the_next(folder):
    for name in ("a/10.png", "b/c/11.png"):
        (folder / name).write_bytes(b"damaged")
    (folder / "b/c/01.png").write_bytes(b"")
    source = open_images(folder)
    names = [source.picture_name(index) for index in range(12)]
    dataset = PretrainingImages(source, RandomCrop((8, 8)))
    sample = dataset[0, names.index("b/c/11.png")]  # the last: the next are 00, 02, ...
    assert sample["failed"] == ["b/c/11.png: not an image, or of an unknown format"]
    assert (sample["image"] == 0).all()
    batches = epoch_of(loader(source))
    assert [len(batch["images"]) for batch in batches] == [4, 4, 4]
    failed = {failure.partition(": ")[0] for batch in batches for failure in batch["failed"]}
    assert failed == {"a/10.png", "b/c/01.png", "b/c/11.png"}


@pytest.mark.parametrize(("number", "in_a_row", "num_workers"), [(3, 3, 0), (60, 50, 0), (3, 3, 1)])
def test_nothing_but_damaged_files_is_an_error_of_one_line(tmp_path, number, in_a_row, num_workers):
    for index in range(number):
        (tmp_path / f"{index}.jpg").write_bytes(b"damaged")
    with pytest.raises(UserError) as error:
        list(loader(open_images(tmp_path), num_workers=num_workers))
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: {in_a_row} images in a row cannot be decoded, check the files: ")
    assert "\n" not in message


# Batches


@pytest.fixture
def photographs(tmp_path):
    for index in range(10):
        photograph(40 + index, 30).save(tmp_path / f"{index}.png")
    return tmp_path


def test_a_sample_depends_on_its_key_and_seed_only(photographs):
    source = open_images(photographs)
    dataset = PretrainingImages(source, RandomCrop((8, 8)), seed=1)
    state = torch.get_rng_state()
    image = dataset[2, 3]["image"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    dataset[0, 0]
    assert torch.equal(dataset[2, 3]["image"], image)
    others = [dataset[1, 3], dataset[2, 13], PretrainingImages(source, RandomCrop((8, 8)), seed=2)[2, 3]]
    assert not any(torch.equal(other["image"], image) for other in others)


def test_workers_do_not_change_the_batches_and_a_position_continues_them(photographs):
    source = open_images(photographs)
    with_workers = loader(source, num_workers=2)
    without = loader(source, num_workers=0)
    for epoch in (0, 1):
        expected = [batch["images"] for batch in epoch_of(without, epoch)]
        assert [tuple(images.shape) for images in expected] == [(4, 3, 8, 8)] * 2
        assert all(images.is_contiguous() and images.dtype == torch.uint8 for images in expected)
        result = [batch["images"] for batch in epoch_of(with_workers, epoch)]
        assert torch.equal(torch.stack(result), torch.stack(expected))
    assert torch.equal(epoch_of(with_workers, 1, batch=1)[0]["images"], expected[1])


def test_a_folder_smaller_than_a_batch_fills_one(photographs):
    (batch,) = epoch_of(loader(open_images(photographs), batch_size=16))
    assert len(batch["images"]) == 16
    assert len(torch.unique(batch["images"], dim=0)) == 16
