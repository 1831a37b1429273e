import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

from convmae import UserError
from convmae.training.checkpoint import CheckpointFolder, read_state
from convmae.training.logging import LoggingOptions, RunLog
from convmae.training.loop import Plan, SkipNotFinite, train
from convmae.training.optimizer import OptimizerOptions, build_optimizer, build_schedule

Output = namedtuple("Output", "loss")


class Regression(torch.nn.Module):
    """Fits y = 3 x; a batch that holds nan makes a loss that is nan."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return Output((self.slope * batch - 3 * batch).square().mean())


def run(tmp_path, batches, plan, lr=0.05, restored=None):
    fabric = Fabric(accelerator="cpu", devices=1)
    model = Regression()
    options = OptimizerOptions(base_lr=lr, warmup_epochs=0, weight_decay=0.0)
    optimizer = build_optimizer(model, options, batch_size=256)
    schedule = build_schedule(optimizer, options, plan.epochs, plan.steps_per_epoch)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    log = RunLog(tmp_path, LoggingOptions())
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    try:
        position = train(
            fabric,
            wrapped,
            wrapped_optimizer,
            schedule,
            plan,
            batches=batches,
            checkpoints=checkpoints,
            write_model=lambda folder: None,
            log=log,
            restored=restored,
        )
    finally:
        log.finish()
    return model, position, checkpoints


def steady(epoch, first):
    return (torch.ones(4) for _ in range(1000))


def test_it_learns_and_logs(tmp_path):
    model, position, checkpoints = run(
        tmp_path, steady, Plan(epochs=40, steps_per_epoch=5, batch_size=4, log_every_steps=10)
    )
    assert model.slope.item() == pytest.approx(3, abs=0.3)
    assert position.step == 200
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 201, 10))
    assert lines[0]["loss"] > 1 > lines[-1]["loss"]
    assert read_state(checkpoints.newest())["step"] == 200


def test_accumulated_passes_give_the_gradient_of_one_large_batch(tmp_path):
    data = torch.randn(2, 12)
    plan = Plan(epochs=1, steps_per_epoch=2, batch_size=12)
    whole, _, _ = run(tmp_path / "a", lambda epoch, first: iter(data), plan)
    parts = data.view(2, 3, 4).flatten(0, 1)
    plan = Plan(epochs=1, steps_per_epoch=2, batch_size=12, accumulate=3)
    split, _, _ = run(tmp_path / "b", lambda epoch, first: iter(parts), plan)
    torch.testing.assert_close(whole.slope, split.slope)


def test_steps_that_are_not_finite_change_nothing_and_are_counted(tmp_path):
    bad, good = torch.full((4,), torch.nan), torch.ones(4)
    plan = Plan(epochs=1, steps_per_epoch=3, batch_size=4, log_every_steps=1)
    with_bad, position, _ = run(tmp_path / "a", lambda epoch, first: iter([good, bad, good]), plan)
    assert position.skipped == 1
    # The schedule goes on over the skipped step: compare with two steps at the rates of steps 0 and 2.
    reference = Regression()
    optimizer = build_optimizer(reference, OptimizerOptions(base_lr=0.05, weight_decay=0.0), batch_size=256)
    schedule = build_schedule(optimizer, OptimizerOptions(base_lr=0.05, warmup_epochs=0), 1, 3)
    for step in (0, 2):
        schedule.step_update(step)
        optimizer.zero_grad()
        reference(good).loss.backward()
        optimizer.step()
    assert torch.equal(with_bad.slope, reference.slope)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]


def test_many_bad_steps_in_a_row_stop_the_run_and_name_step_and_checkpoint(tmp_path):
    def batches(epoch, first):
        return iter([torch.ones(4)] * 4 if epoch == 0 else [torch.full((4,), torch.inf)] * 4)

    plan = Plan(epochs=2, steps_per_epoch=4, batch_size=4, checkpoint_every_epochs=1, max_skipped=3)
    with pytest.raises(
        UserError, match=r"not finite 3 steps in a row, up to step 7: last good checkpoint .*step-00000004"
    ):
        run(tmp_path, batches, plan)


def test_a_resume_with_more_images_begins_the_same_epoch_again(tmp_path):
    plan = Plan(epochs=2, steps_per_epoch=4, batch_size=4, checkpoint_every_epochs=1)
    _, _, checkpoints = run(tmp_path / "a", steady, plan)
    state = read_state(checkpoints.newest()) | {"step": 6}  # as if it had been stopped in the midst of epoch 1
    asked = []

    def batches(epoch, first):
        asked.append((epoch, first))
        return steady(epoch, first)

    plan = Plan(epochs=3, steps_per_epoch=10, batch_size=4)
    _, position, _ = run(tmp_path / "b", batches, plan, restored=state)
    assert asked == [(1, 0), (2, 0)]
    assert position.step == 30


def test_skipping_counts_in_a_row():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = Fabric(accelerator="cpu").setup_optimizers(torch.optim.AdamW([parameter], fused=True))
    skipping = SkipNotFinite(optimizer, torch.device("cpu"))
    for norm in (torch.nan, torch.inf, 1.0, torch.nan):
        parameter.grad = torch.tensor([norm])
        skipping.step(torch.tensor(norm))
    assert skipping.total(None) == 3
    assert skipping.total({"skipped": 4}) == 7
    assert skipping.in_a_row() == 1
    assert parameter.isfinite().all()
    assert parameter.item() != 0


def test_gradient_clipping(tmp_path):
    plan = Plan(epochs=1, steps_per_epoch=1, batch_size=4, clip_grad=1e-12, log_every_steps=1)
    model, _, _ = run(tmp_path, lambda epoch, first: iter([torch.ones(4)]), plan)
    # AdamW divides by the gradient's own size plus 1e-8: a gradient far below that moves next to nothing.
    assert 0 < model.slope.item() < 1e-4
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["grad_norm"] == pytest.approx(6)  # d/ds mean((s - 3)^2) at 0; logged before clipping


_ONE_BAD_PROCESS = """
import sys
from pathlib import Path
import torch
from lightning.fabric import Fabric
sys.path.insert(0, str(Path(sys.argv[1])))
from test_loop import Regression
from convmae.training.checkpoint import CheckpointFolder
from convmae.training.logging import LoggingOptions, RunLog
from convmae.training.loop import Plan, train
from convmae.training.optimizer import OptimizerOptions, build_optimizer, build_schedule

fabric = Fabric(accelerator="cpu", devices=2)
fabric.launch()
model, folder = Regression(), Path(sys.argv[2])
options = OptimizerOptions(base_lr=0.05, warmup_epochs=0)
optimizer = build_optimizer(model, options, batch_size=256)
schedule = build_schedule(optimizer, options, 1, 4)
wrapped, wrapped_optimizer = fabric.setup(model, optimizer)

def batches(epoch, first):
    for step in range(4):
        bad = step == 1 and fabric.global_rank == 1  # one step, in one process only
        yield torch.full((4,), torch.nan if bad else 1.0)

log = RunLog(folder, LoggingOptions(), active=fabric.is_global_zero)
plan = Plan(epochs=1, steps_per_epoch=4, batch_size=8)
checkpoints = CheckpointFolder(folder / "checkpoints")
position = train(fabric, wrapped, wrapped_optimizer, schedule, plan, batches=batches, checkpoints=checkpoints,
                 write_model=lambda path: None, log=log)
(folder / f"rank{fabric.global_rank}").write_text(f"{position.skipped} {model.slope.item()!r}")
"""


def test_all_processes_skip_the_step_that_is_bad_in_one(tmp_path):
    script = tmp_path / "one_bad_process.py"
    script.write_text(_ONE_BAD_PROCESS)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    arguments = [sys.executable, *torchrun, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert first == second
    skipped, slope = first.split()
    assert skipped == "1"
    assert 0 < float(slope) < 3
