"""The annotated images of a training and of its validation, opened and compared before anything is learned."""

from pathlib import Path

from convmae.data.coco import CocoImages, find_coco, open_coco
from convmae.data.duplicates import repeated_images
from convmae.errors import UserError


def open_splits(
    data: Path | None,
    train_annotations: Path | None,
    train_images: Path | None,
    val_annotations: Path | None,
    val_images: Path | None,
    *,
    skip_damaged: bool,
    masks: bool,
    boxes_from_masks: bool,
    compare: bool = True,
) -> tuple[CocoImages, CocoImages]:
    """Open the images to learn from and those to judge by; the arguments are those of `detect train`.

    compare: look for images that are in both, which one process of several is enough for. Raises UserError for what
    cannot be read, for categories that training does not know, and where there is nothing to learn or to judge by.
    """
    files = (
        find_coco(data, "train", train_annotations, train_images, ("--train-annotations", "--train-images")),
        find_coco(data, "val", val_annotations, val_images, ("--val-annotations", "--val-images")),
    )
    training, validation = (
        open_coco(*found, skip_damaged, masks=masks, boxes_from_masks=boxes_from_masks) for found in files
    )
    validation = validation.with_categories(training.classes, training.category_ids, training.name)
    if compare:
        validation.findings = [*validation.findings, *repeated_images(training, validation)]
    for source in (training, validation):
        if not source.num_objects:
            raise UserError(
                f"{source.name} has no objects, or only crowds: annotate some, write iscrowd 0 where a crowd is a "
                "single object, or give another file"
            )
    return training, validation
