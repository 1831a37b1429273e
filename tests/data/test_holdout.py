"""Images held out of training: a share of each class, the same again, listed, and none of them trained on."""

import numpy
import pytest

from convmae.data.holdout import HELD_OUT_FILE, hold_out, open_splits, read_held_out, write_held_out
from convmae.data.labelled import open_labelled_images
from convmae.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Classes of 40, 10, 2 and 1 images, each file with bytes of its own."""
    for name, count in (("ant", 40), ("bee", 10), ("cow", 2), ("dog", 1)):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "data" / "train" / name / f"{number}.png").write_text(f"{name} {number}")
    return tmp_path / "data"


def names(source):
    return [source.image_name(index) for index in range(len(source))]


def counts(source):
    return numpy.bincount(source.labels, minlength=4).tolist()


def test_a_share_of_each_class_is_held_out(folder):
    source = open_labelled_images(folder, "train")
    training, validation = hold_out(source, 0.2, seed=0)
    assert counts(validation) == [8, 2, 1, 0]
    assert counts(training) == [32, 8, 1, 1]
    assert sorted(names(training) + names(validation)) == sorted(names(source))
    for part in (training, validation):
        for index in range(len(part)):
            file, label = part.open_annotated(index)
            assert file.read().decode().split()[0] == part.classes[label]
    assert names(hold_out(source, 0.2, seed=0)[1]) == names(validation)
    assert names(hold_out(source, 0.2, seed=1)[1]) != names(validation)
    expected = f"11 of 53 images are held out for validation, listed in {HELD_OUT_FILE} of the run's folder"
    assert validation.findings[0].summary == expected


def test_a_resumed_run_holds_the_same_images_out_of_grown_data(folder, tmp_path):
    training, validation = hold_out(open_labelled_images(folder, "train"), 0.2, seed=0)
    write_held_out(tmp_path / "run", validation)
    for number in range(100, 120):
        (folder / "train" / "ant" / f"{number}.png").write_text(f"ant {number}")
    kept = read_held_out(tmp_path / "run")
    again, same = hold_out(open_labelled_images(folder, "train"), 0.2, seed=0, kept=kept)
    assert names(same) == names(validation)
    assert len(again) == len(training) + 20
    (folder / "train" / "cow" / same.image_name(10).rpartition("/")[2]).unlink()
    with pytest.raises(UserError, match=r"1 of the 11 images that this run held out are no more in"):
        hold_out(open_labelled_images(folder, "train"), 0.2, seed=0, kept=kept)
    assert read_held_out(tmp_path / "nowhere") == []


def test_classes_that_images_share_are_drawn_from_the_rarest_on(tmp_path):
    rows = ["path,common,rare"]
    for number in range(60):
        (tmp_path / f"{number}.png").write_text(str(number))
        rows.append(f"{number}.png,{int(number < 40)},{int(number % 10 == 0)}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    training, validation = hold_out(open_labelled_images(tmp_path / "t.csv", "train"), 0.5, seed=3)
    assert validation.labels[:, 1].sum() == 3
    assert training.labels[:, 1].sum() == 3
    assert abs(int(validation.labels[:, 0].sum()) - 20) <= 2
    assert len(validation) == 30


def test_a_share_or_a_split(folder):
    with pytest.raises(UserError, match=r"has no folder val/.*; or hold a share .* out with --val-fraction 0\.1"):
        open_splits(folder, "train", "val")
    training, validation = open_splits(folder, "train", "val", val_fraction=0.1)
    assert (len(training), len(validation)) == (47, 6)
    assert "1 of 4 classes has no validation image" in " ".join(finding.summary for finding in validation.findings)
    (folder / "val" / "ant").mkdir(parents=True)
    (folder / "val" / "bee").mkdir()
    (folder / "val" / "ant" / "0.png").write_text("ant 0")
    with pytest.raises(UserError, match="is there to judge by: leave out --val-fraction"):
        open_splits(folder, "train", "val", val_fraction=0.1)
    _, validation = open_splits(folder, "train", "val")
    assert [finding.summary.partition(", such as")[0] for finding in validation.findings] == [
        "3 of 4 classes have no validation image and no figure",
        "1 image is in training, too",
    ]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_shares_that_leave_nothing_are_refused(folder, fraction):
    with pytest.raises(UserError, match="choose a share between 0 and 1"):
        hold_out(open_labelled_images(folder, "train"), fraction, seed=0)
