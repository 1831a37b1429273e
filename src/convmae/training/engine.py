"""Starts Lightning Fabric: devices, precision, one process or many, under torchrun and SLURM alike."""

import logging
import os
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment

from convmae.errors import UserError, check_choice, leave_if_started_again


@dataclass(frozen=True)
class DeviceOptions:
    """Where and in which precision to compute, in one process."""

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """auto: bf16 autocast where the device computes it in hardware, else float32."""
    workers: int | None = None
    """Processes that load images for each computing process, or 0; by default its share of the cores, at most 8."""


@dataclass(frozen=True)
class EngineOptions(DeviceOptions):
    """Where and in which precision to train."""

    devices: int | Literal["auto"] = "auto"
    """Processes on this machine, one a device; auto: all GPUs, or one CPU process. torchrun and SLURM decide it."""
    num_nodes: int = 1
    """Machines; torchrun and SLURM decide it."""


def start_engine(options: DeviceOptions) -> Fabric:
    """Make and launch a Fabric. Raises UserError if the machine lacks the asked devices."""
    leave_if_started_again()
    check_choice("precision", options.precision, ("auto", "bf16", "float32"))
    devices, num_nodes = _processes(options)
    if options.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device on this machine: use --engine.accelerator auto or cpu")
    if options.accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError("no MPS device on this machine: use --engine.accelerator auto or cpu")
    on_gpu = options.accelerator in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu and devices != "auto" and devices > torch.cuda.device_count():
        raise UserError(
            f"{devices} devices asked, this machine has {torch.cuda.device_count()}: lower --engine.devices"
        )
    if (options.workers or 0) < 0 or (devices != "auto" and devices < 1) or num_nodes < 1:
        raise UserError("devices and num_nodes must be at least 1 and workers at least 0: check --engine")
    # Lightning announces the precision, which our own first line says.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=options.accelerator,
        devices=devices,
        num_nodes=num_nodes,
        precision="bf16-mixed" if options.precision == "bf16" or _prefers_bf16(options) else "32-true",
    )
    fabric.launch()
    if fabric.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return fabric


def loader_workers(options: DeviceOptions, fabric: Fabric) -> int:
    """How many processes load images for this training process: as stated, else its share of the cores, 1 to 8."""
    if options.workers is not None:
        return options.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores * _processes(options)[1] // fabric.world_size, 1), 8)


def _processes(options: DeviceOptions) -> tuple[int | Literal["auto"], int]:
    """Processes a machine, and machines: as torchrun or SLURM has started them, else as the options say."""
    if not isinstance(options, EngineOptions):
        return 1, 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        on_each = int(os.environ["LOCAL_WORLD_SIZE"])
        return on_each, int(os.environ["WORLD_SIZE"]) // on_each
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return options.devices, options.num_nodes


def _prefers_bf16(options: DeviceOptions) -> bool:
    """Whether `auto` means bf16: the device multiplies it in hardware."""
    if options.precision != "auto":
        return False
    if options.accelerator in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if options.accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
