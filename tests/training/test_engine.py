from types import SimpleNamespace

import pytest
import torch

from convmae import UserError
from convmae.training import engine
from convmae.training.engine import DeviceOptions, EngineOptions, start_engine


@pytest.mark.parametrize(("precision", "expected"), [("bf16", "bf16-mixed"), ("float32", "32-true")])
def test_a_stated_precision_is_taken(precision, expected):
    fabric = start_engine(EngineOptions(accelerator="cpu", precision=precision))
    assert fabric._precision.precision == expected


@pytest.mark.parametrize("capable", [True, False])
def test_auto_takes_bf16_where_the_processor_has_it(monkeypatch, capable):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable})
    assert engine._prefers_bf16(EngineOptions(accelerator="cpu")) is capable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions(accelerator="cuda"), "no CUDA device"),
        (EngineOptions(accelerator="mps"), "no MPS device"),
        (EngineOptions(devices=0), "at least 1"),
        (EngineOptions(workers=-1), "at least 0"),
    ],
)
def test_what_the_machine_lacks_is_refused(monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        start_engine(options)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (3, 2)),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, (4, 2)),
        ({"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train"}, (8, 2)),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"}, (3, 2)),  # an interactive shell, not srun
    ],
)
def test_launchers_say_how_many_processes_there_are(monkeypatch, environment, expected):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_NAME", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert engine._processes(EngineOptions(devices=3, num_nodes=2)) == expected


@pytest.mark.parametrize(("processes", "cores", "expected"), [(1, 2, 2), (1, 64, 8), (4, 16, 4), (8, 4, 1)])
def test_loader_workers_share_the_cores(monkeypatch, processes, cores, expected):
    monkeypatch.setattr(engine.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    fabric = SimpleNamespace(world_size=processes)
    assert engine.loader_workers(EngineOptions(), fabric) == expected
    assert engine.loader_workers(EngineOptions(workers=0), fabric) == 0


def test_commands_of_one_process_stay_one_under_a_launcher(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert engine._processes(DeviceOptions()) == (1, 1)
    assert engine._processes(EngineOptions()) == (4, 2)


@pytest.mark.parametrize(("precision", "expected"), [("bf16", "bf16-mixed"), ("float32", "32-true")])
def test_device_options_start_one_process(precision, expected):
    fabric = start_engine(DeviceOptions("cpu", precision))
    assert (fabric.world_size, fabric.device.type, fabric._precision.precision) == (1, "cpu", expected)
    assert engine.loader_workers(DeviceOptions(workers=3), fabric) == 3


def test_device_options_are_checked_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, message in ((DeviceOptions("cuda"), "no CUDA device"), (DeviceOptions(workers=-1), "at least 0")):
        with pytest.raises(UserError, match=message):
            start_engine(options)
