"""The labelled images of a training and of its validation, opened before anything is learned."""

from pathlib import Path

from convmae.commands.segment.label_maps import LabelMapOptions, training_encoding
from convmae.data.ade20k import (
    SegmentationImages,
    find_ade20k,
    is_ade20k,
    names_classes,
    open_segmentation,
    read_classes,
)
from convmae.data.class_lists import ClassList
from convmae.data.label_maps import read_colours


def open_splits(
    data: Path | None,
    train_images: Path | None,
    train_annotations: Path | None,
    val_images: Path | None,
    val_annotations: Path | None,
    *,
    classes: Path | None,
    reduce_zero_label: bool | None,
    label_maps: LabelMapOptions,
    skip_damaged: bool,
) -> tuple[SegmentationImages, SegmentationImages]:
    """Open the images to learn from and those to judge by; the arguments are those of `segment train`.

    Raises UserError for what cannot be read.
    """
    training_folders = find_ade20k(
        data, "train", train_images, train_annotations, ("--train-images", "--train-annotations")
    )
    validation_folders = find_ade20k(data, "val", val_images, val_annotations, ("--val-images", "--val-annotations"))
    if reduce_zero_label is None:
        reduce_zero_label = is_ade20k(data, classes)
    listed = _classes(data, classes, label_maps)
    encoding = training_encoding(listed, reduce_zero_label, label_maps)
    training, validation = (
        open_segmentation(
            *folders, listed.names, encoding, skip_damaged, label_maps.image_suffix, label_maps.label_suffix
        )
        for folders in (training_folders, validation_folders)
    )
    training.findings += listed.findings
    return training, validation


def _classes(data: Path | None, file: Path | None, options: LabelMapOptions) -> ClassList:
    """The classes of the data, of their file, or of the list of colours where nothing else names them."""
    if file is None and options.label_colours is not None and not names_classes(data):
        listed = read_colours(options.label_colours)
        return ClassList(listed.names, None, listed.colours, listed.findings)
    return read_classes(data, file)
