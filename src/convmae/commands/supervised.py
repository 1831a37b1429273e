"""Training with labels and judging on other data as it goes: what all the commands that do so share."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from timm.scheduler.scheduler import Scheduler
from torch import Tensor

from convmae.data.failures import DecodingFailures
from convmae.training.checkpoint import CheckpointFolder
from convmae.training.logging import RunLog, read_metrics
from convmae.training.loop import Plan, Position, train


class Supervision(NamedTuple):
    """What a training step works on: the loss."""

    loss: Tensor


class Judgement(Protocol):
    """How good a model is."""

    @property
    def score(self) -> float:
        """Which of two models is better, in [0, 1]."""

    @property
    def figures(self) -> dict[str, float]:
        """What the run's log keeps of it."""


J = TypeVar("J", bound=Judgement)


class Trained(NamedTuple, Generic[J]):
    """Where a run ended, how good the model was then, and at its best where this run and not an earlier part was."""

    position: Position
    last: J
    best: J | None


def train_and_judge(
    fabric: Fabric,
    wrapped: _FabricModule,
    optimizer: _FabricOptimizer,
    schedule: Scheduler,
    batches: Callable[[int, int], Iterable[Any]],
    plan: Plan,
    checkpoints: CheckpointFolder,
    write_model: Callable[[Path], None],
    log: RunLog,
    restored: dict[str, Any] | None,
    judge: Callable[[], J],
    failures: DecodingFailures,
    save_best: Callable[[], None] = lambda: None,
    best_score: float = -1.0,
    evaluate_every_epochs: int = 1,
    after_step: Callable[[int], None] = lambda step: None,
) -> Trained[J]:
    """Train to the end of the plan, see `convmae.training.loop.train`, and judge after epochs.

    judge: called in every process. save_best: called in one whenever the score is the highest yet, of a resumed run
    higher than best_score.
    """
    last: J | None = None
    best: J | None = None

    def after_epoch(epoch: int) -> None:
        nonlocal best_score, last, best
        if message := failures.warning():
            log.say(message, style="bold red")
        if (epoch + 1) % evaluate_every_epochs and epoch + 1 < plan.epochs:
            return
        last = judge()
        if last.score > best_score:
            best_score, best = last.score, last
            if fabric.is_global_zero:
                save_best()
        log.evaluation((epoch + 1) * plan.steps_per_epoch, epoch, last.figures)
        fabric.barrier()

    position = train(
        fabric, wrapped, optimizer, schedule, batches, plan, checkpoints, write_model, log, restored,
        after_epoch, after_step,
    )  # fmt: skip
    if last is None:  # resumed after its last step
        after_epoch(plan.epochs - 1)
    assert last is not None
    return Trained(position, last, best)


def best_score_before(output: Path, best: Path, restored: dict[str, Any] | None, figure: str) -> float:
    """What a resumed run must exceed to replace its best model, a `figure` of its log; below 0 where it has none."""
    if restored is None or not best.exists():
        return -1.0
    before = [record for record in read_metrics(output) if record["step"] <= restored["step"]]
    return max((record[figure] for record in before if figure in record), default=-1.0)
