"""What a resumed run does otherwise than before: settings, data, and the learning rate; one line each."""

from collections.abc import Iterator, Mapping
from typing import Any

from timm.scheduler.scheduler import Scheduler

CHANGES_FILE = "changes.txt"
"""In a run's folder: what its resumed parts did otherwise than those before."""

_OF_EACH_PART = ("output", "resume")  # settings that may differ between the parts of one run


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each setting, as YAML has them, that is another; those that only one version knows are passed over."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        f"{name} was {old[name]} before, is {value} now"
        for name, value in new.items()
        if name in old and old[name] != value and name not in _OF_EACH_PART
    ]


def changed_course(
    restored: Mapping[str, Any], steps_per_epoch: int, contents: str, processes: int, schedule: Scheduler
) -> list[str]:
    """A line for each thing that is another than in the part of the run that a checkpoint ends.

    restored: the checkpoint's training state. contents: what the data hold. schedule: the run's, over an optimiser
    whose state is not yet restored.
    """
    lines = []
    if (held := restored.get("contents")) not in (None, contents):  # runs of earlier versions do not tell
        lines.append(f"the data were {held} before, are {contents} now")
    if (steps := restored["steps_per_epoch"]) != steps_per_epoch:
        epoch = restored["step"] // steps
        again = f": epoch {epoch + 1} begins again" if restored["step"] % steps else ""
        lines.append(f"an epoch was of {steps} steps before, is of {steps_per_epoch} now{again}")
    if (number := len(restored["random_states"])) != processes:
        lines.append(f"processes were {number} before, are {processes} now: what is drawn at random begins anew")
    old = _highest(restored["optimizer"]["param_groups"])
    step = resumed_step(restored, steps_per_epoch)
    schedule.step_update(max(step - 1, 0))  # the last step that was done, of which the optimiser holds the rate
    new = _highest(schedule.optimizer.param_groups)
    if abs(new - old) > 1e-6 * max(new, old):
        by = f", {new / old:.3g} times as much" if old else ""
        lines.append(f"the learning rate at step {step} was {old:.3g} by the schedule before, is {new:.3g} now{by}")
    return lines


def resumed_step(restored: Mapping[str, Any], steps_per_epoch: int) -> int:
    """The step at which a run goes on; with more images, or another batch, that where the same epoch begins."""
    step = restored["step"]
    return (
        step
        if restored["steps_per_epoch"] == steps_per_epoch
        else step // restored["steps_per_epoch"] * steps_per_epoch
    )


def _highest(groups: list[dict[str, Any]]) -> float:
    """The learning rate that is logged: of the last layer."""
    return max(float(group["lr"]) for group in groups)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
