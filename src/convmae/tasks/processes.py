"""What the processes of a run share: the images among them, batch statistics, and what each has found."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed
from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import track
from torch import nn

from convmae.data.loading import Loading
from convmae.data.scenes import write_scenes
from convmae.errors import UserError
from convmae.training.engine import DeviceOptions, loader_workers

T = TypeVar("T")


def process_loading(fabric: Fabric, engine: DeviceOptions, batch_size: int, skip_damaged: bool) -> Loading:
    """How this process loads its share of the images, `batch_size` at a time; skip_damaged: leave damaged ones out."""
    return Loading(
        batch_size=batch_size,
        skip_damaged=skip_damaged,
        num_workers=loader_workers(engine, fabric),
        pin_memory=fabric.device.type == "cuda",
        num_replicas=fabric.world_size,
        rank=fabric.global_rank,
    )


def demo_scenes(
    fabric: Fabric, output: Path, layout: Literal["coco", "ade20k"], image_size: tuple[int, int] = (128, 128)
) -> Path:
    """Write generated scenes of (H, W) pixels into `output`, by one process, and return their folder."""
    folder = output / "scenes"
    if fabric.is_global_zero:
        write_scenes(folder, layout, image_size=image_size)
    fabric.barrier()
    return folder


def shares_batch_statistics(fabric: Fabric) -> bool:
    """Whether batch normalisation sees the images of all processes; without GPUs torch's would not run."""
    return fabric.world_size > 1 and fabric.device.type == "cuda"


def check_batch_statistics(images_of_a_pass: int, shared: bool = False) -> None:
    """Raise UserError for passes of one image, whose statistics batch normalisation cannot take.

    shared: whether it sees the images of all processes.
    """
    if images_of_a_pass < 2 and not shared:
        raise UserError(
            "batch normalisation needs two images or more in each pass of a process: raise --batch-size, or lower "
            "--accumulate"
        )


def share_batch_statistics(fabric: Fabric, network: nn.Module) -> None:
    """Let batch normalisation see the images of all processes where it can, before there is an optimiser."""
    if shares_batch_statistics(fabric):
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # in place


def share_buffers(fabric: Fabric, network: nn.Module) -> None:
    """Give all processes the first one's buffers: each has batch statistics of its own where torch does not sync."""
    if fabric.world_size > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


def gathered(fabric: Fabric, found: Sequence[T]) -> list[T]:
    """What all processes found, in the order of their ranks; every process must call this."""
    if fabric.world_size == 1:
        return list(found)
    parts: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(parts, found)
    return [one for part in parts for one in part]


def from_first(fabric: Fabric, find: Callable[[], T]) -> T:
    """What the first process finds, in all; its UserError is raised in all. Every process must call this."""
    found: T | UserError | None = None
    if fabric.is_global_zero:
        try:
            found = find()
        except UserError as error:
            found = error
    shared = fabric.broadcast(found)
    if isinstance(shared, UserError):
        raise shared
    return cast(T, shared)


def tracked(fabric: Fabric, judged: Iterable[T], count: int, description: str) -> Iterator[T]:
    """Yields the items of `judged`, one for an image, with a progress bar on the first process's terminal.

    count: images of all processes together.
    """
    console = Console(stderr=True)
    yield from track(
        judged,
        description=description,
        total=-(-count // fabric.world_size),
        console=console,
        transient=True,
        disable=not (console.is_terminal and fabric.is_global_zero),
    )
