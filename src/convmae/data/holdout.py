"""Images held out of training for validation where a data set has no split for that."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy
from numpy import ndarray

from convmae.data.folders import counted
from convmae.data.labelled import MissingSplitError, compare_splits, open_labelled_images
from convmae.data.sources import ImageCollection, ImageStream
from convmae.errors import UserError
from convmae.findings import Finding
from convmae.seeds import mixed_seed

HELD_OUT_FILE = "validation-images.txt"
"""In a run's folder: the images that are held out, a name a line."""


def hold_out(
    source: ImageCollection | ImageStream, fraction: float, seed: int, kept: Sequence[str] = ()
) -> tuple[ImageCollection, ImageCollection]:
    """The images to train on, and the share of each class that is held out, in (0, 1).

    At least one image of each class with two or more is held out, and one stays. Where images are of several classes
    they are drawn class by class, from the rarest on. seed: of what is drawn. kept: names of the images that an earlier
    part of the run held out, which are taken instead. Raises UserError where the classes of the images are unknown
    before these are read, and where one that was held out is there no more.
    """
    if not 0 < fraction < 1:
        raise UserError(f"val_fraction is {fraction}: choose a share between 0 and 1")
    if isinstance(source, ImageStream) or source.labels is None:
        raise UserError(f"{source.name} is not read by class, so no share of each can be held out: give a val split")
    if kept:
        numbers = {source.image_name(index): index for index in range(len(source))}
        gone = [name for name in kept if name not in numbers]
        if gone:
            raise UserError(
                f"{len(gone)} of the {len(kept)} images that this run held out are no more in {source.name}, the first "
                f"is {gone[0]}: put them back, or choose another --output"
            )
        held_out = sorted(numbers[name] for name in kept)
    else:
        held_out = _drawn(_memberships(source), fraction, seed)
    if not held_out:
        raise UserError(f"{source.name} has a single image in each class: add images, or give a val split")
    chosen = set(held_out)
    rest = [index for index in range(len(source)) if index not in chosen]
    training, validation = source.select(source.name, rest), source.select(f"{source.name}, held out", held_out)
    training.findings = list(source.findings)
    shares = f"{len(held_out)} of {counted(len(source), 'image')} {'is' if len(held_out) == 1 else 'are'} held out"
    text = f"{shares} for validation, listed in {HELD_OUT_FILE} of the run's folder"
    validation.findings.append(Finding(text))
    return training, validation


def open_splits(
    data: str | Path,
    train_split: str,
    val_split: str,
    *,
    val_fraction: float | None = None,
    seed: int = 0,
    kept: Sequence[str] = (),
    shuffled: bool = False,
) -> tuple[ImageCollection | ImageStream, ImageCollection | ImageStream]:
    """The labelled images to train on and those to judge by, compared with each other.

    val_fraction: the share that is held out of training where there is no validation split; seed, kept: see `hold_out`.
    shuffled: see `open_labelled_images`. Raises UserError where there is no validation split and no share, or both.
    """
    training = open_labelled_images(data, train_split, shuffled=shuffled)
    validation: ImageCollection | ImageStream
    try:
        validation = open_labelled_images(data, val_split, training.classes, multi_label=training.multi_label)
    except MissingSplitError as error:
        if val_fraction is None:
            raise UserError(f"{error}; or hold a share of the training images out with --val-fraction 0.1") from error
        training, validation = hold_out(training, val_fraction, seed, kept)
    else:
        if val_fraction is not None:
            raise UserError(f"{validation.name} is there to judge by: leave out --val-fraction")
    compare_splits(training, validation)
    return training, validation


def write_held_out(folder: Path, validation: ImageCollection | ImageStream) -> None:
    """List the images that are held out in a run's folder."""
    assert isinstance(validation, ImageCollection)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{HELD_OUT_FILE}.incomplete"
    names = [validation.image_name(index) for index in range(len(validation))]
    temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8", errors="surrogateescape")
    os.replace(temporary, folder / HELD_OUT_FILE)  # noqa: PTH105


def read_held_out(folder: Path) -> list[str]:
    """The images that a run has listed; none where it has not."""
    path = folder / HELD_OUT_FILE
    return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if path.exists() else []


def _memberships(source: ImageCollection) -> list[ndarray]:
    """The images of each class, (n,) each, and those of none."""
    labels = source.labels
    assert labels is not None
    if labels.ndim == 1:
        return [numpy.flatnonzero(labels == number) for number in range(len(source.classes))]
    return [*map(numpy.flatnonzero, labels.T), numpy.flatnonzero(~labels.any(axis=1))]


def _drawn(members: list[ndarray], fraction: float, seed: int) -> list[int]:
    settled: set[int] = set()  # whether held out or not
    held_out: list[int] = []
    for number in sorted(range(len(members)), key=lambda number: len(members[number])):
        free = [index for index in members[number].tolist() if index not in settled]
        settled.update(free)
        if len(free) < 2:
            continue
        count = min(max(1, round(fraction * len(free))), len(free) - 1)
        held_out += numpy.random.default_rng(mixed_seed(seed, number)).permutation(free)[:count].tolist()
    return sorted(held_out)
