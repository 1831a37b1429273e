"""Images with label maps looked at before they are used: faults, classes that lack pixels, images used twice."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from lightning.fabric import Fabric

from convmae.data.ade20k import SegmentationImages
from convmae.data.duplicates import repeated_images
from convmae.data.label_survey import (
    LabelSurvey,
    absent_classes,
    findings_of,
    likely_cure,
    named,
    survey,
    too_few_classes,
)
from convmae.data.loading import Loading, failure_line
from convmae.errors import UserError
from convmae.findings import Finding
from convmae.tasks.processes import from_first, tracked


def check_training(
    fabric: Fabric, training: SegmentationImages, validation: SegmentationImages, loading: Loading
) -> None:
    """Look at the label maps of a training before it begins, and add what is found to the findings of both.

    Images that cannot be used are listed there if loading leaves them out. Raises UserError for the first of them if it
    does not, where fewer than two classes have pixels in training, and where no pixel can be judged.
    """
    learned, judged = (_surveyed(fabric, source, loading) for source in (training, validation))
    if len(learned.present) < 2:
        raise too_few_classes(training, learned)
    _refuse_unlabelled(validation, judged)
    classes = training.classes
    for source, found in ((training, learned), (validation, judged)):
        source.findings += _faults(found) + findings_of(source, found)
    absent = [label for label in range(len(classes)) if label not in learned.present]
    if absent:
        what = f"so {'it' if len(absent) == 1 else 'they'} cannot be learned"
        training.findings.append(Finding(absent_classes(classes, absent, what), learned.counts(classes)))
    _add_absent(validation, judged)
    if unlearned := [label for label in absent if label in judged.present]:
        one = len(unlearned) == 1
        validation.findings.append(
            Finding(
                f"{len(unlearned)} class{' has' if one else 'es have'} pixels here and none in training: "
                + named(classes, unlearned)
            )
        )
    validation.findings += from_first(fabric, partial(repeated_images, training, validation))


def check_evaluation(fabric: Fabric, source: SegmentationImages, loading: Loading) -> None:
    """Look at the label maps of an evaluation before it begins, and add what is found to its findings.

    Raises UserError for the first image that cannot be used, unless loading leaves such images out, and where no pixel
    can be judged.
    """
    found = _surveyed(fabric, source, loading)
    _refuse_unlabelled(source, found)
    source.findings += findings_of(source, found)
    _add_absent(source, found)


def _surveyed(fabric: Fabric, source: SegmentationImages, loading: Loading) -> LabelSurvey:
    """The survey of the first process, in all; raises UserError for faults, unless loading leaves such images out."""

    def look() -> LabelSurvey:
        return survey(source, loading.num_workers, progress)

    def progress(pairs: Iterator[Any]) -> Iterable[Any]:
        return tracked(fabric, pairs, len(source) * fabric.world_size, "checking label maps")

    found = from_first(fabric, look)
    if found.faults and not loading.skip_damaged:
        (name, error), more = found.faults[0], len(found.faults) - 1
        try:
            failure_line(name, error, skip_damaged=False)
        except UserError as first:
            also = f"; {more} more cannot be used either" if more else ""
            raise UserError(f"{first}{also}") from error
    return found


def _refuse_unlabelled(source: SegmentationImages, found: LabelSurvey) -> None:
    if not found.present:
        raise UserError(f"no pixel of {source.name} can be judged: check the images and their label maps")


def _faults(found: LabelSurvey) -> list[Finding]:
    if not found.faults:
        return []
    images = (
        "1 image that cannot be used" if len(found.faults) == 1 else f"{len(found.faults)} images that cannot be used"
    )
    return [Finding(f"left out {images}", [f"{name}: {error}" for name, error in found.faults])]


def _add_absent(source: SegmentationImages, found: LabelSurvey) -> None:
    if absent := [label for label in range(len(source.classes)) if label not in found.present]:
        what = f"so {'it is' if len(absent) == 1 else 'they are'} not judged"
        summary = absent_classes(source.classes, absent, what)
        if len(found.present) < 2:
            summary += f" ({likely_cure(source, found)})"
        source.findings.append(Finding(summary, found.counts(source.classes)))
