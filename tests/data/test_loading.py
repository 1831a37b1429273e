"""Batches for training and for judging: order, shares, resuming, damaged pictures, of collections and of streams."""

import multiprocessing
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from convmae.data.augmentation import NO_AUGMENTATION, Augmentation, AugmentationOptions, CenterCrop
from convmae.data.images import RandomCrop
from convmae.data.labelled import open_labelled_images
from convmae.data.loading import (
    EvaluationImages,
    Loading,
    TrainingImages,
    build_evaluation_loader,
    build_training_loader,
)
from convmae.data.sources import open_images
from convmae.errors import UserError

CROP = RandomCrop((8, 8))
VARIED = Augmentation((8, 8), 3, AugmentationOptions())
WHOLE = Augmentation((8, 8), 3, replace(NO_AUGMENTATION, crop_scale=(1.0, 1.0), flip=0.0))
CENTRE = CenterCrop((8, 8))


def photograph(width, height):
    """A smooth coloured picture with no symmetry."""
    pixels = numpy.random.default_rng(width).integers(0, 256, (6, 8, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def source_of(tmp_path, encoded):
    """source_of(pictures): the pictures (or bytes) in order, number i in the class i // 5."""

    def write(pictures):
        for number, picture in enumerate(pictures):
            path = tmp_path / "train" / "abcd"[number // 5] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture if isinstance(picture, bytes) else encoded(picture).getvalue())
        return open_labelled_images(tmp_path, "train")

    return write


def training_loader(source, transform=WHOLE, batch_size=4, seed=0, aug_repeats=1, **options):
    return build_training_loader(source, transform, Loading(batch_size, **options), seed=seed, aug_repeats=aug_repeats)


def evaluation_loader(source, batch_size=4, first=0, **options):
    return build_evaluation_loader(source, CENTRE, Loading(batch_size, **options), first=first)


def epoch_of(batches, epoch=0, batch=0):
    batches.set_position(epoch, batch)
    result = list(batches)
    assert len(result) == len(batches)
    return result


def values(batch):
    """The batch's grey values, each of a plain picture."""
    assert (batch["images"] == batch["images"][:, :1, :1, :1]).all()
    return batch["images"][:, 0, 0, 0].tolist()


def seen_in(batches):
    """(value, label) of every picture, in order."""
    return [pair for batch in batches for pair in zip(values(batch), batch["labels"].tolist(), strict=True)]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a["images"], b["images"]) and torch.equal(a["labels"], b["labels"])
        for a, b in zip(first, second, strict=True)
    )


def names(failed):
    return [failure.partition(".png: ")[0][-2:] for failure in failed]


@pytest.fixture
def photographs(tmp_path, source_of):
    return source_of([photograph(24 + number, 20) for number in range(8)])


@pytest.fixture
def numbered(tmp_path, plain, source_of):
    """Fourteen plain pictures, number i of the value 10 i in the class i // 5."""
    return source_of([plain(10 * number) for number in range(14)])


# Training


@pytest.mark.parametrize("transform", [CROP, VARIED])
def test_a_sample_depends_on_its_key_and_seed_only(photographs, transform):
    dataset = TrainingImages(photographs, transform, seed=1)
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    image = dataset[2, 3][0]["image"]
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    torch.rand(7)
    dataset[0, 0]
    assert torch.equal(dataset[2, 3][0]["image"], image)
    others = [dataset[1, 3], dataset[2, 11], TrainingImages(photographs, transform, seed=2)[2, 3]]
    assert not any(torch.equal(other[0]["image"], image) for other in others)


@pytest.mark.parametrize("transform", [CROP, VARIED])
def test_workers_do_not_change_the_batches_and_a_position_continues_them(photographs, transform):
    without, with_workers = (training_loader(photographs, transform, 2, num_workers=number) for number in (0, 2))
    epochs = [epoch_of(without, epoch) for epoch in (0, 1)]
    assert not same(*epochs)
    for batch in epochs[0]:
        assert (batch["images"].dtype, batch["images"].shape) == (torch.uint8, (2, 3, 8, 8))
        assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    for epoch in (1, 0):
        assert same(epoch_of(with_workers, epoch), epochs[epoch])
    fresh = training_loader(photographs, transform, 2)
    assert same(epoch_of(fresh, epoch=1, batch=3), epochs[1][3:])
    assert same(epoch_of(with_workers, epoch=1, batch=1), epochs[1][1:])


def test_training_batches_hold_each_image_once_with_its_label(numbered):
    batches = training_loader(numbered, batch_size=2)
    orders = []
    for epoch in (0, 1):
        orders.append(seen_in(epoch_of(batches, epoch)))
        assert sorted(orders[-1]) == [(10 * number, number // 5) for number in range(14)]
    assert orders[0] != orders[1]
    whole = epoch_of(training_loader(numbered))
    assert [len(set(values(batch))) for batch in whole] == [4, 4, 4]
    assert len(set(seen_in(whole))) == 12


def test_ranks_share_the_training_images(numbered):
    seen = []
    for rank in (0, 1, 2):
        seen += seen_in(epoch_of(training_loader(numbered, batch_size=2, num_replicas=3, rank=rank)))
    assert len(seen) == len(set(seen)) == 12


def test_a_source_smaller_than_a_batch_fills_one(photographs):
    (batch,) = epoch_of(training_loader(photographs, CROP, 16))
    assert len(batch["images"]) == 16
    assert len(torch.unique(batch["images"], dim=0)) == 16


# Repeated augmentation


@pytest.mark.parametrize("aug_repeats", [2, 3])
@pytest.mark.parametrize("transform", [CROP, VARIED])
def test_a_batch_holds_several_views_of_each_of_fewer_images(photographs, transform, aug_repeats):
    batches = epoch_of(training_loader(photographs, transform, 6, aug_repeats=aug_repeats, seed=1), epoch=4)
    assert len(batches) == 8 // 6  # as many as without
    dataset = TrainingImages(photographs, transform, seed=1, aug_repeats=aug_repeats)
    samples = [dataset[4, index] for index in range(8)]
    for batch in batches:
        assert batch["images"].shape == (6, 3, 8, 8)
        assert len(torch.unique(batch["images"], dim=0)) == 6
        groups = batch["images"].split(aug_repeats)
        found = [
            [
                index
                for index, views in enumerate(samples)
                if torch.equal(torch.stack([view["image"] for view in views]), group)
            ]
            for group in groups
        ]
        assert [len(indices) for indices in found] == [1] * (6 // aug_repeats)
        labels = [view["label"] for (index,) in found for view in samples[index]]
        assert batch["labels"].tolist() == labels


@pytest.mark.parametrize(("aug_repeats", "num_replicas"), [(2, 1), (3, 1), (2, 2), (3, 2)])
def test_as_many_epochs_as_repeats_see_each_image_once(numbered, aug_repeats, num_replicas):
    loaders = [
        training_loader(
            numbered, batch_size=aug_repeats, aug_repeats=aug_repeats, num_replicas=num_replicas, rank=rank, seed=3
        )
        for rank in range(num_replicas)
    ]
    for shuffle in (0, 1):
        seen = []
        for epoch in range(shuffle * aug_repeats, (shuffle + 1) * aug_repeats):
            share = [pair for loader in loaders for batch in epoch_of(loader, epoch) for pair in seen_in([batch])]
            assert len(share) == 14 // (aug_repeats * num_replicas) * aug_repeats * num_replicas
            assert all(share.count(pair) == aug_repeats for pair in share)
            seen += share
        assert all(seen.count(pair) == aug_repeats for pair in seen)
        assert 14 - len(set(seen)) < aug_repeats * num_replicas


@pytest.mark.parametrize("aug_repeats", [2, 3])
def test_repeated_views_do_not_depend_on_workers_and_a_position_continues_them(photographs, aug_repeats):
    def fresh(num_workers=0):
        return training_loader(photographs, VARIED, aug_repeats, aug_repeats=aug_repeats, num_workers=num_workers)

    loader, with_workers = fresh(), fresh(2)
    epochs = [epoch_of(loader, epoch) for epoch in range(4)]
    for epoch in (3, 1, 0):
        assert same(epoch_of(with_workers, epoch), epochs[epoch])
        assert same(epoch_of(fresh(), epoch, batch=1), epochs[epoch][1:])


def test_damaged_files_are_replaced_as_groups(partly_damaged):
    loader = training_loader(partly_damaged, aug_repeats=2, skip_damaged=True)
    batches = [batch for epoch in (0, 1) for batch in epoch_of(loader, epoch)]
    assert [len(batch["images"]) for batch in batches] == [4] * 6
    assert sorted(names(failure for batch in batches for failure in batch["failed"])) == ["03", "04", "04", "11"]
    for batch in batches:
        assert seen_in([batch])[::2] == seen_in([batch])[1::2]


def test_repeats_that_do_not_divide_the_batch_are_refused(numbered):
    with pytest.raises(UserError, match="4 images a pass and process are no multiple of aug_repeats 3: change"):
        training_loader(numbered, batch_size=4, aug_repeats=3)
    with pytest.raises(UserError, match="aug_repeats is 0: it must be at least 1"):
        training_loader(numbered, batch_size=4, aug_repeats=0)


# Evaluation


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_batches_are_in_order(numbered, num_workers):
    batches = list(evaluation_loader(numbered, num_workers=num_workers))
    assert [batch["indices"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13]]
    for batch in batches:
        assert values(batch) == (10 * batch["indices"]).tolist()
        assert torch.equal(batch["labels"], batch["indices"] // 5)
        assert batch["failed"] == []


def test_evaluation_from_any_image_on_and_over_ranks(numbered):
    shares = []
    for rank in (0, 1, 2):
        loader = evaluation_loader(numbered, 2, num_replicas=3, rank=rank, first=5)
        shares.append([index for batch in loader for index in batch["indices"].tolist()])
        assert len(list(loader)) == len(loader)
    assert shares == [[5, 8, 11], [6, 9, 12], [7, 10, 13]]
    assert list(evaluation_loader(numbered, first=14)) == []


# Damaged files


@pytest.fixture
def partly_damaged(tmp_path, encoded, plain, source_of):
    """Twelve plain pictures, the numbers 3, 4 and 11 damaged: 4 is truncated."""
    pictures = [plain(10 * number) for number in range(12)]
    pictures[3] = pictures[11] = b"damaged"
    pictures[4] = encoded(photograph(200, 200)).getvalue()[:5000]
    return source_of(pictures)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("transform", [CROP, WHOLE, CENTRE])
def test_truncated_files_count_as_damaged(image_format, transform, tmp_path, encoded, plain):
    data = encoded(photograph(600, 600), image_format).getvalue()
    (tmp_path / "0.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "1.png").write_bytes(encoded(plain(50)).getvalue())
    source = open_images(tmp_path)
    if transform is CENTRE:
        sample = EvaluationImages(source, transform, skip_damaged=True)[0]
        assert sample.keys() == {"index", "failed"}
    else:
        (sample,) = TrainingImages(source, transform)[0, 0]
        assert (sample["image"] == 50).all()
    assert [failure.partition(": ")[0] for failure in sample["failed"]] == ["0.png"]


def test_a_damaged_file_is_refused_by_its_name(partly_damaged):
    training = training_loader(partly_damaged, batch_size=6)
    for batches, expected in ((training, ("03", "04", "11")), (evaluation_loader(partly_damaged), ("03",))):
        with pytest.raises(UserError) as error:
            list(batches)
        message = str(error.value)
        assert any(f"/{name}.png cannot be decoded, replace or delete it" in message for name in expected)
        assert "--skip-damaged: " in message
        assert "\n" not in message


def test_damaged_files_are_replaced_in_training(partly_damaged):
    dataset = TrainingImages(partly_damaged, WHOLE)
    (sample,) = dataset[0, 3]
    assert names(sample["failed"]) == ["03", "04"]
    assert sample["failed"][0].endswith("/03.png: not an image, or of an unknown format")
    assert "truncated" in sample["failed"][1]
    assert (sample["image"] == 50).all()
    assert sample["label"] == 1
    assert (dataset[0, 11][0]["image"] == 0).all()  # after the last comes the first
    whole = epoch_of(training_loader(partly_damaged, skip_damaged=True))
    assert [len(batch["images"]) for batch in whole] == [4, 4, 4]
    assert sorted(names(failure for batch in whole for failure in batch["failed"])) == ["03", "04", "04", "11"]
    assert all(label == value // 50 for value, label in seen_in(whole))


def test_damaged_files_are_left_out_of_evaluation(partly_damaged):
    for num_workers in (0, 1):
        batches = list(evaluation_loader(partly_damaged, 3, skip_damaged=True, num_workers=num_workers))
        assert [batch["indices"].tolist() for batch in batches] == [[0, 1, 2], [5], [6, 7, 8], [9, 10]]
        assert [names(batch["failed"]) for batch in batches] == [[], ["03", "04"], [], ["11"]]
        for batch in batches:
            assert values(batch) == (10 * batch["indices"]).tolist()
            assert torch.equal(batch["labels"], batch["indices"] // 5)
    empty = list(evaluation_loader(partly_damaged, 1, skip_damaged=True))[3]
    assert empty.keys() == {"images", "indices", "failed"}
    assert (len(empty["images"]), len(empty["indices"])) == (0, 0)
    assert names(empty["failed"]) == ["03"]


@pytest.mark.parametrize(("number", "in_a_row", "num_workers"), [(3, 3, 0), (60, 50, 0), (3, 3, 1)])
def test_nothing_but_damaged_files_is_an_error_of_one_line(tmp_path, number, in_a_row, num_workers):
    for index in range(number):
        (tmp_path / f"{index}.jpg").write_bytes(b"damaged")
    with pytest.raises(UserError) as error:
        list(training_loader(open_images(tmp_path), CROP, skip_damaged=True, num_workers=num_workers))
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: {in_a_row} images in a row cannot be decoded, check the files: ")
    assert "\n" not in message


def test_all_labelled_images_in_a_row_may_be_damaged_but_one(tmp_path, plain):
    for index in range(60):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "a" / f"{index}.png").write_bytes(b"damaged")
    (tmp_path / "train" / "b").mkdir()
    plain(7).save(tmp_path / "train" / "b" / "0.png")
    (sample,) = TrainingImages(open_labelled_images(tmp_path, "train"), WHOLE)[0, 0]
    assert (len(sample["failed"]), sample["label"]) == (60, 1)


def test_only_the_files_are_blamed_for_damage(photographs):
    def broken(file, annotation, seeds=()):
        raise ValueError("a mistake of our own")

    with pytest.raises(ValueError, match="a mistake of our own"):
        EvaluationImages(photographs, broken, skip_damaged=True)[0]
    with pytest.raises(ValueError, match="a mistake of our own"):
        TrainingImages(photographs, broken)[0, 0]


# Streams of labelled pictures


@pytest.fixture
def columns(tmp_path, monkeypatch, encoded, plain):
    """Write four Parquet shards of five pictures each, number i of the value 10 i in the class i % 3; the folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # After each pass over Parquet files it waits for Arrow's threads, five seconds long.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)

    def write(damaged=(), missing=(), labels=None, named=True, picture=lambda number: plain(10 * number)):
        features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y", "z"])})
        (tmp_path / "set").mkdir()
        for shard in range(4):
            images, kinds = [], []
            for number in range(5 * shard, 5 * shard + 5):
                file = b"damaged %d" % number if number in damaged else encoded(picture(number)).getvalue()
                image = {"bytes": file, "path": f"{number:02d}.png" if named else None}
                images.append(None if number in missing else image)
                kinds.append((labels or {}).get(number, number % 3))
            path = tmp_path / "set" / f"train-{shard:05d}-of-00004.parquet"
            datasets.Dataset.from_dict({"image": images, "kind": kinds}, features).to_parquet(path)
        return f"{tmp_path}/set"

    return write


EVERY = [(10 * number, number % 3) for number in range(20)]


def stream(folder):
    return open_labelled_images(f"hfids/{folder}|20", "train", shuffled=True)


def ordered(folder):
    return open_labelled_images(f"hfids/{folder}", "train")  # whose number nobody needs to know


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_is_shuffled_anew_each_epoch_and_keeps_its_labels(columns, num_workers):
    folder = columns()
    batches = training_loader(stream(folder), batch_size=5, num_workers=num_workers, seed=1)
    epochs = [epoch_of(batches, epoch) for epoch in (0, 1)]
    for epoch in epochs:
        assert [len(batch["images"]) for batch in epoch] == [5] * 4
        assert sorted(seen_in(epoch)) == EVERY
        assert seen_in(epoch) != EVERY
    assert seen_in(epochs[0]) != seen_in(epochs[1])
    fresh = training_loader(stream(folder), batch_size=5, num_workers=num_workers, seed=1)
    assert same(epoch_of(fresh, epoch=1), epochs[1])
    assert same(epoch_of(fresh, epoch=1, batch=2), epochs[1][2:])
    rest = epoch_of(fresh, epoch=1, batch=1)
    assert sorted(seen_in(rest)) == sorted(seen_in(epochs[1][1:]))
    other = training_loader(stream(folder), batch_size=5, num_workers=num_workers, seed=2)
    assert seen_in(epoch_of(other, epoch=1)) != seen_in(epochs[1])


@pytest.mark.parametrize(("aug_repeats", "num_workers"), [(2, 0), (2, 2), (5, 0)])
def test_a_stream_with_repeats_takes_its_shares_one_after_the_other(columns, aug_repeats, num_workers):
    folder = columns()

    def fresh():
        return training_loader(
            stream(folder), batch_size=aug_repeats, num_workers=num_workers, aug_repeats=aug_repeats, seed=1
        )

    loader = fresh()
    epochs = [epoch_of(loader, epoch) for epoch in range(2 * aug_repeats)]
    for first in (0, aug_repeats):
        seen = [pair for batches in epochs[first : first + aug_repeats] for pair in seen_in(batches)]
        assert sorted(seen) == sorted(EVERY * aug_repeats)
        assert [len(batches) for batches in epochs] == [20 // aug_repeats] * (2 * aug_repeats)
    assert seen_in(epochs[0]) != seen_in(epochs[aug_repeats])
    epoch = aug_repeats + 1
    assert same(epoch_of(fresh(), epoch, batch=2), epochs[epoch][2:])


def test_each_image_of_a_stream_is_varied_by_seed_epoch_worker_and_place(columns):
    folder = columns(picture=lambda number: photograph(40, 30))  # twenty times the same picture

    def views(seed=0, epoch=0, **options):
        batches = training_loader(stream(folder), CROP, 5, seed=seed, **options)
        return [image.numpy().tobytes() for batch in epoch_of(batches, epoch) for image in batch["images"]]

    seen = views()
    assert views() == seen
    everything = seen + views(seed=1) + views(epoch=1) + views(num_workers=2)[:10]
    assert len(set(everything)) == len(everything) - 5  # worker 0 makes the same of its first batch as no worker does


def test_ranks_share_a_stream(columns):
    folder = columns()
    for source, build in ((stream, training_loader), (ordered, evaluation_loader)):
        seen = []
        for rank in (0, 1):
            batches = build(source(folder), batch_size=5, num_replicas=2, rank=rank)
            if source is stream:
                batches.set_position(0)
            seen += seen_in(batches)
        assert sorted(seen) == EVERY


@pytest.mark.parametrize("num_workers", [0, 2, 9])
def test_a_stream_is_evaluated_once_in_order(columns, num_workers, caplog):
    batches = evaluation_loader(ordered(columns()), 3, num_workers=num_workers)
    for _ in range(2):
        seen = seen_in(batches)
        assert sorted(seen) == EVERY
        for worker in range(4):  # each shard is in order, whoever reads it
            shard = EVERY[5 * worker : 5 * worker + 5]
            assert [pair for pair in seen if pair in shard] == shard
        assert seen == EVERY or num_workers
    assert ("4 loader workers instead of 9" in caplog.text) == (num_workers == 9)


def test_workers_without_a_whole_batch_would_lengthen_the_epoch(columns):
    folder = columns()
    for num_workers, batch_size, started in ((4, 5, 4), (4, 8, 2), (2, 16, 1), (0, 16, 0)):
        batches = training_loader(stream(folder), batch_size=batch_size, num_workers=num_workers)
        assert batches.num_workers == started
        assert 20 <= len(batches) * batch_size < 2 * 20


def test_damaged_pictures_of_a_stream(columns):
    folder = columns(damaged=(3, 7), missing=(12,))
    bad = [(30, 0), (70, 1), (120, 0)]
    for batches in (training_loader(stream(folder), batch_size=20), evaluation_loader(ordered(folder))):
        with pytest.raises(UserError, match=r"set.* \(train\), .* cannot be decoded, replace or delete it"):
            list(batches)
    (whole,) = epoch_of(training_loader(stream(folder), batch_size=20, skip_damaged=True))
    assert set(seen_in([whole])) <= set(EVERY) - set(bad)
    batches = epoch_of(training_loader(stream(folder), batch_size=5, skip_damaged=True))
    failed = [failure for batch in batches for failure in batch["failed"]]
    assert len(failed) == len(set(failed)) == 3
    batches = list(evaluation_loader(ordered(folder), skip_damaged=True))
    assert seen_in(batches) == [pair for pair in EVERY if pair not in bad]
    assert [names(batch["failed"]) for batch in batches if batch["failed"]][:2] == [["03"], ["07"]]


def test_pictures_of_a_stream_without_names_are_told_apart(columns):
    folder = columns(damaged=(3, 7), named=False)
    batches = training_loader(stream(folder), batch_size=20, skip_damaged=True)
    failed = [{failure for batch in epoch_of(batches, epoch) for failure in batch["failed"]} for epoch in (0, 1)]
    assert failed[0] == failed[1]
    assert len(failed[0]) == 2
    assert all(failure.startswith(f"hfids/{folder}|20 (train), image with the checksum ") for failure in failed[0])


def test_nothing_but_damaged_pictures_in_a_stream(columns):
    folder = columns(damaged=range(20))
    with pytest.raises(UserError, match="20 images in a row cannot be decoded, check the files"):
        list(training_loader(stream(folder), skip_damaged=True))


@pytest.mark.parametrize("prefix", ["hfds", "hfids"])
@pytest.mark.parametrize("label", [None, -1])
def test_pictures_without_a_class_are_refused(columns, prefix, label):
    """By index before any picture is read, of a stream when it comes to the picture."""
    data = f"{prefix}/{columns(labels={6: label})}"
    told = "1 image without a class (number -1)" if prefix == "hfds" else f"images without a class (number {label})"
    with pytest.raises(UserError, match=rf"\(train\) has {re.escape(told)}: choose"):
        list(evaluation_loader(open_labelled_images(data, "train")))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_that_breaks_ends_with_one_line(columns, num_workers):
    folder = columns()
    source = stream(folder)
    for shard in Path(folder).iterdir():
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=r"\(train\) cannot be read any further: .") as error:
        list(training_loader(source, num_workers=num_workers))
    assert "\n" not in str(error.value)


def test_a_process_without_a_shard_says_so(tmp_path, encoded, plain):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "shard-0000.tar")) as shard:
        shard.write({"__key__": "0", "png": encoded(plain(1)).getvalue()})
    source = open_images(f"wds/{tmp_path}/shard-{{0000..0000}}.tar")
    with pytest.raises(UserError, match="use fewer processes or more shards"):
        list(training_loader(source, batch_size=1, num_replicas=2, rank=1))


SCRIPT = """
import multiprocessing
from pathlib import Path

import convmae
from convmae.data.images import RandomCrop
from convmae.data.loading import Loading, build_training_loader
from convmae.data.sources import open_images

print("begun", flush=True)
{guard}
    multiprocessing.set_start_method("spawn", force=True)  # as on macOS and Windows
    loader = build_training_loader(open_images({folder!r}), RandomCrop((8, 8)), Loading(2, num_workers=1))
    loader.set_position(0)
    print(sum(len(batch["images"]) for batch in loader), "images")
"""


@pytest.mark.parametrize("guard", ["if True:", 'if __name__ == "__main__":'])
def test_a_script_without_main_guard_ends_with_one_line(tmp_path, photographs, plain, guard):
    (tmp_path / "images").mkdir()
    for number in range(4):
        plain(number).save(tmp_path / "images" / f"{number}.png")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard=guard, folder=str(tmp_path / "images")))
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=500)
    lines = ended.stderr.splitlines()
    assert ended.stdout.count("begun") == 2  # the loading process reads the script, too
    assert "bootstrapping" not in ended.stderr
    if guard == "if True:":
        assert ended.returncode == 1
        assert lines[-1].startswith("convmae.errors.UserError: a process that loads images has died (")
        assert 'put what it does under `if __name__ == "__main__":`' in lines[-1]
    else:
        assert "4 images" in ended.stdout
        assert ended.returncode == 0
        assert not lines


@pytest.mark.parametrize(
    "death",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
        BrokenPipeError("Broken pipe"),
    ],
)
def test_a_loading_process_that_dies_is_told_in_one_line(numbered, monkeypatch, death):
    """By torch's own words; a process that is killed in truth may bring the test's down."""

    def dying(_):
        raise death

    monkeypatch.setattr(DataLoader, "__iter__", dying)
    with pytest.raises(UserError, match=r"a process that loads images has died \(.*lower --engine\.workers") as error:
        next(iter(training_loader(numbered)))
    assert "\n" not in str(error.value)
    assert ("__main__" in str(error.value)) is (multiprocessing.get_start_method() != "fork")
    death = RuntimeError("Caught RuntimeError in DataLoader worker process 0.")
    with pytest.raises(RuntimeError, match="Caught"):
        next(iter(training_loader(numbered)))
