"""The training loop: read it from top to bottom. It takes any module whose forward returns something with a `.loss`."""

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from convmae.errors import UserError
from convmae.training.changes import resumed_step
from convmae.training.checkpoint import CheckpointFolder
from convmae.training.logging import RunLog


@dataclass(frozen=True)
class Plan:
    """How long a run is and what happens along it."""

    epochs: int
    steps_per_epoch: int
    batch_size: int  # of `unit` a step, over all processes and passes
    accumulate: int = 1  # forward and backward passes a step
    clip_grad: float | None = None
    log_every_steps: int = 20
    checkpoint_every_epochs: int = 10
    max_skipped: int = 20  # steps in a row whose gradient is not finite, before the run stops
    unit: str = "images"  # what a batch holds, in the plural
    contents: str = ""  # how much the data hold, which a resumed run compares


@dataclass
class Position:
    """Where a run stands: the next step, and how many steps were skipped so far."""

    step: int = 0
    skipped: int = 0


def describe_run(plan: Plan, fabric: Fabric, restored: dict[str, Any] | None) -> str:
    """How long a run is, on what, and from which step on where it is resumed: the end of its first line."""
    return (
        f"{plan.epochs} epochs of {plan.steps_per_epoch} steps of {plan.batch_size} {plan.unit}; "
        f"{fabric.world_size} x {fabric.device.type}, {fabric._precision.precision}"
        + (f"; resumed at step {restored['step']}" if restored else "")
    )


class Interrupted(Exception):  # noqa: N818 (no error: the user asked for it)
    """SIGTERM or Ctrl-C arrived; a checkpoint was written. `signal` is its number; only one process has a message."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def train(
    fabric: Fabric,
    model: _FabricModule,
    optimizer: _FabricOptimizer,
    schedule: Scheduler,
    plan: Plan,
    *,
    batches: Callable[[int, int], Iterable[Any]],
    checkpoints: CheckpointFolder,
    write_model: Callable[[Path], None],
    log: RunLog,
    restored: dict[str, Any] | None = None,
    after_epoch: Callable[[int], None] = lambda epoch: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> Position:
    """Train to the end of the plan, from the beginning or from a `restored` training state.

    model, optimizer: as Fabric set them up. batches(epoch, first): this process's batches of an epoch from number
    `first` on, one for each pass, in whatever form the model takes. write_model: writes the model's files into a
    checkpoint folder. after_epoch, after_step: called in every process with the number of the epoch that ended, of
    steps done.

    Raises Interrupted after SIGTERM or Ctrl-C, and UserError after `max_skipped` steps in a row without a finite
    gradient, or what `batches` and `after_epoch` raise; a run of one process then writes a checkpoint first.
    """
    position = Position()
    if restored is not None:
        position = _restore(fabric, optimizer, restored, plan.steps_per_epoch)
    skipping = SkipNotFinite(optimizer, fabric.device)
    losses = torch.zeros(2, device=fabric.device)  # sum and number of the finite losses since the last log line
    last_logged, clock = position.step, time.perf_counter()
    total = plan.epochs * plan.steps_per_epoch

    def save() -> Path | None:
        position.skipped = skipping.total(restored)
        state = _state(fabric, optimizer, schedule, position, plan)
        path = checkpoints.save(position.step, state, write_model) if fabric.is_global_zero else None
        fabric.barrier()
        return path

    model.train()
    log.start(plan.epochs, total, position.step, plan.unit)
    with StopSignal() as stop:
        for epoch in range(position.step // plan.steps_per_epoch, plan.epochs):
            done = position.step % plan.steps_per_epoch
            stream = iter(batches(epoch, done * plan.accumulate))
            for _ in range(done, plan.steps_per_epoch):
                schedule.step_update(position.step)
                try:
                    passes = list(itertools.islice(stream, plan.accumulate))
                except UserError:
                    if position.step and fabric.world_size == 1:
                        save()
                    raise
                loss = _accumulate_gradient(fabric, model, passes)
                norm = _gradient_norm(model, plan.clip_grad)
                skipping.step(norm)
                optimizer.zero_grad()
                position.step += 1
                after_step(position.step)

                losses += torch.stack([loss.nan_to_num(0, 0, 0), loss.isfinite()])
                log.advance(position.step, epoch)
                at_log = position.step % plan.log_every_steps == 0 or position.step == total
                # Reading a flag makes the host wait for a GPU, so there it happens on logging steps only.
                if at_log or fabric.device.type == "cpu":
                    position.skipped = skipping.total(restored)
                    _stop_if_hopeless(skipping, plan, position, checkpoints)
                if at_log:
                    mean = fabric.all_reduce(losses, reduce_op="sum")
                    seconds, steps = time.perf_counter() - clock, position.step - last_logged
                    figures = {
                        "loss": (mean[0] / mean[1]).item(),
                        "lr": max(group["lr"] for group in optimizer.param_groups),  # of the last layer
                        "grad_norm": norm.item(),
                        f"{plan.unit}_per_second": steps * plan.batch_size / seconds,
                        "skipped_steps": position.skipped,
                    }
                    log.metrics(position.step, epoch, figures)
                    losses.zero_()
                    last_logged, clock = position.step, time.perf_counter()
                if signal_number := _agreed(fabric, stop, at_log):
                    path = save()
                    message = f"stopped at step {position.step} of {total}: checkpoint {path}; continue with --resume"
                    raise Interrupted(message if fabric.is_global_zero else "", signal_number)
            saved = epoch + 1 == plan.epochs or (epoch + 1) % plan.checkpoint_every_epochs == 0
            if saved:
                save()
            try:
                after_epoch(epoch)
            except UserError:
                if not saved and fabric.world_size == 1:
                    save()
                raise
    return position


def _accumulate_gradient(fabric: Fabric, model: _FabricModule, passes: list[Any]) -> Tensor:
    """Forward and backward over the passes of one step; the mean loss, detached."""
    losses = []
    for number, batch in enumerate(passes, start=1):
        # Processes exchange gradients once a step, in the last pass.
        with fabric.no_backward_sync(model, enabled=number < len(passes)):
            loss = model(batch).loss / len(passes)
            fabric.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def _gradient_norm(model: nn.Module, clip: float | None) -> Tensor:
    """Norm of the gradient that all processes share; the gradient is scaled down to `clip` if that is given."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm


class SkipNotFinite:
    """Steps the optimiser unless the gradient is infinite or not a number, and counts.

    A fused optimiser decides on the device, without the host reading it; any other waits. Processes average their
    gradients before this, so one bad loss anywhere makes the norm bad everywhere: all agree.
    """

    def __init__(self, optimizer: _FabricOptimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._counts = torch.zeros(2, device=device)  # skipped in all, skipped in a row

    def step(self, norm: Tensor) -> None:
        """One optimiser step, or none if `norm` is not finite."""
        bad = (~norm.isfinite()).float()
        if self._optimizer.defaults.get("fused"):
            # The protocol by which torch's gradient scaler tells a fused optimiser to leave everything unchanged.
            self._optimizer.optimizer.found_inf = bad  # type: ignore[attr-defined]
            self._optimizer.step()
        elif not bad.item():
            self._optimizer.step()
        self._counts += bad
        self._counts[1] *= bad

    def total(self, restored: dict[str, Any] | None) -> int:
        """Steps skipped since the beginning of the run, those before a resume included."""
        return int(self._counts[0]) + (restored["skipped"] if restored else 0)

    def in_a_row(self) -> int:
        """Steps skipped without a good one between, up to now."""
        return int(self._counts[1])


def _stop_if_hopeless(skipping: SkipNotFinite, plan: Plan, position: Position, checkpoints: CheckpointFolder) -> None:
    if skipping.in_a_row() >= plan.max_skipped:
        raise UserError(
            f"loss not finite {skipping.in_a_row()} steps in a row, up to step {position.step}: last good checkpoint "
            f"{checkpoints.newest() or 'none'}; lower the learning rate and use --resume, or check the images"
        )


class StopSignal:
    """Remembers SIGTERM and Ctrl-C while inside; a second Ctrl-C ends at once."""

    def __enter__(self) -> "StopSignal":
        self.arrived = 0  # the signal's number
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: object) -> None:
        if self.arrived and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.arrived = number


def _agreed(fabric: Fabric, stop: StopSignal, at_log: bool) -> int:
    """The signal to stop for, or 0. It may reach one process only, so several ask each other, on logging steps."""
    if fabric.world_size == 1:
        return stop.arrived
    if not at_log:
        return 0
    arrived = torch.tensor(stop.arrived, device=fabric.device)
    torch.distributed.all_reduce(arrived, torch.distributed.ReduceOp.MAX)
    return int(arrived)


def _state(
    fabric: Fabric, optimizer: _FabricOptimizer, schedule: Scheduler, position: Position, plan: Plan
) -> dict[str, Any]:
    """The training state of all processes; every process must call this."""
    mine = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(fabric.device)
    states: list[Any] = [mine]
    if fabric.world_size > 1:
        states = [None] * fabric.world_size
        torch.distributed.all_gather_object(states, mine)
    return {
        "step": position.step,
        "steps_per_epoch": plan.steps_per_epoch,
        "contents": plan.contents,
        "skipped": position.skipped,
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "random_states": states,
    }


def _restore(fabric: Fabric, optimizer: _FabricOptimizer, state: dict[str, Any], steps_per_epoch: int) -> Position:
    """Put optimiser, random numbers and position back where `state` has them."""
    optimizer.load_state_dict(state["optimizer"])
    # With another number of processes the random numbers cannot go on as before; the seeds of the start serve.
    if len(state["random_states"]) == fabric.world_size:
        mine = state["random_states"][fabric.global_rank]
        torch.set_rng_state(mine["cpu"])
        if "cuda" in mine and fabric.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"], fabric.device)
    return Position(resumed_step(state, steps_per_epoch), state["skipped"])
