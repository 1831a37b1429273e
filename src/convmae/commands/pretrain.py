"""`convmae pretrain`: a folder of images in, a pretrained encoder out."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from convmae import weights as weights_files
from convmae.data.device_decoding import DeferredCrop, DeviceDecoder, collate_encoded
from convmae.data.failures import DecodingFailures
from convmae.data.images import RandomCrop
from convmae.data.loading import Loading, TrainingImages, build_training_loader
from convmae.data.sampler import mixed_seed
from convmae.data.sources import ImageCollection, ImageStream, open_images
from convmae.errors import UserError
from convmae.models.autoencoder import ConvMAE
from convmae.models.registry import create_autoencoder, fill
from convmae.training.checkpoint import CheckpointFolder, CheckpointOptions, read_state
from convmae.training.engine import EngineOptions, loader_workers, start_engine
from convmae.training.logging import PictureLoggingOptions, RunLog, read_metrics
from convmae.training.loop import Plan, Position, describe_run, train
from convmae.training.optimizer import OptimizerOptions, build_optimizer, build_schedule
from convmae.training.run import (
    check_choice,
    check_positive,
    checkpoint_to_resume,
    divide_batch,
    keep_config,
    plain_settings,
)
from convmae.visualize import loss_curve, reconstruction_picture

_EXAMPLES = 6  # images in a reconstruction picture


@dataclass(frozen=True)
class PretrainingResult:
    """Where a finished run left what it made."""

    folder: Path
    checkpoint: Path
    """Folder with the model's file; pass it to convmae.load or any --weights."""
    picture: Path
    loss_curve: Path
    loss: float
    """Mean over the last log line's steps."""
    steps: int


def pretrain(
    data: str,
    model: str = "base",
    output: Path = Path("runs/pretrain"),
    epochs: int = 200,
    batch_size: int = 256,
    accumulate: int = 1,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    kernel_size: int = 5,
    multi_scale: bool = True,
    norm_pix: bool = True,
    mask_ratio: float = 0.75,
    complementary_sets: int = 0,
    mask_stage: int = 3,
    masked_convolution: bool = True,
    dense: bool = False,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    aug_repeats: int = 1,
    decode: Literal["cpu", "gpu"] = "cpu",
    split: str = "train",
    weights: Path | None = None,
    resume: bool = False,
    compile: bool = False,  # the flag's name is torch's
    seed: int = 0,
    max_skipped: int = 20,
    optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008 (frozen)
    engine: EngineOptions = EngineOptions(),  # noqa: B008
    checkpoint: CheckpointOptions = CheckpointOptions(),  # noqa: B008
    logging: PictureLoggingOptions = PictureLoggingOptions(),  # noqa: B008
) -> PretrainingResult:
    """Pretrain a ConvMAE on unlabelled images.

    Args:
        data: a folder with images at any depth; wds/FOLDER/shards-{0000..0099}.tar; hfds/NAME or hfids/NAME; or demo.
        model: size: tiny, small, base, large or huge.
        output: folder of the run: configuration, metrics, pictures, checkpoints.
        epochs: passes over the data.
        batch_size: images a step, over all devices and passes; the paper's is 2048.
        accumulate: forward and backward passes a step; more need less memory.
        image_size: pixels, one number or [height, width], multiples of 16.
        in_channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        kernel_size: of the depthwise convolutions, odd.
        multi_scale: fuse stages 1 and 2 into the latent (multi-scale decoder).
        norm_pix: predict pixels normalised by their patch's mean and variance.
        mask_ratio: fraction of tokens masked, inside (0, 1).
        complementary_sets: 0, or into how many disjoint visible sets each image is cut ("Fast ConvMAE": 4).
        mask_stage: 3 for block-wise masks, 1 for the ablation's masks drawn at stage 1.
        masked_convolution: false for the ablation whose convolutions see masked cells.
        dense: compute masked cells too: slower, the same result.
        crop_scale: smallest and largest share of an image's area in a random crop.
        aug_repeats: crops taken of each image that is decoded, all in one batch (repeated augmentation); an epoch stays
            as many crops as there are images, and so takes one in aug_repeats of them.
        decode: gpu to decode plain JPEG files on a GPU with a JPEG engine (A100 and later), which frees the cores; not
            of shards and streams.
        split: split of a Hugging Face data set.
        weights: start from the weights of this file or run, ours or published.
        resume: go on from the newest checkpoint in output, if there is one.
        compile: compile the model with torch.compile.
        seed: of weights, masks, crops and order.
        max_skipped: stop after this many steps in a row with a loss that is not finite.
        optimizer: AdamW and its schedule.
        engine: devices and precision.
        checkpoint: when to write checkpoints.
        logging: what to write down.

    Raises UserError for settings that cannot work, and Interrupted after SIGTERM or Ctrl-C, a checkpoint being written.
    """
    settings = plain_settings(dict(locals()))
    output = Path(output)  # Python callers may pass a string
    check_positive(
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        aug_repeats=aug_repeats,
        max_skipped=max_skipped,
        logging_every_steps=logging.every_steps,
        checkpoint_every_epochs=checkpoint.every_epochs,
    )
    if logging.pictures_every_epochs < 0:
        raise UserError("pictures_every_epochs must be at least 0: raise it")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    torch.manual_seed(seed)
    network = create_autoencoder(
        model,
        image_size=size,
        in_channels=in_channels,
        kernel_size=kernel_size,
        multi_scale=multi_scale,
        norm_pix=norm_pix,
        mask_ratio=mask_ratio,
        complementary_sets=complementary_sets,
        mask_stage=mask_stage,
        masked_convolution=masked_convolution,
        dense=dense,
    )
    checkpoints = CheckpointFolder(output / "checkpoints", checkpoint.keep)
    restored = _restore(network, checkpoints, output, resume, weights)
    source = open_images(data, split)

    fabric = start_engine(engine)
    on_device = _decodes_on_device(decode, source, in_channels, fabric.device)
    crop = RandomCrop(size, in_channels, crop_scale)
    batch_of_a_pass = divide_batch(batch_size, fabric.world_size, accumulate)
    loader = build_training_loader(
        source,
        DeferredCrop(crop) if on_device else crop,
        Loading(
            batch_of_a_pass,
            skip_damaged=True,
            num_workers=loader_workers(engine, fabric),
            pin_memory=fabric.device.type == "cuda",
            num_replicas=fabric.world_size,
            rank=fabric.global_rank,
        ),
        seed=seed,
        aug_repeats=aug_repeats,
        collate_fn=collate_encoded if on_device else None,
    )
    steps_per_epoch = len(loader) // accumulate
    if steps_per_epoch < 1:
        raise UserError(f"{data} has too few images for a batch of {batch_size}: lower --batch-size")
    adamw = build_optimizer(network, optimizer, batch_size)
    schedule = build_schedule(adamw, optimizer, epochs, steps_per_epoch)
    trained: nn.Module = SelfSupervised(network)
    if compile:
        trained = cast(nn.Module, torch.compile(trained))
    wrapped, wrapped_optimizer = fabric.setup(trained, adamw)
    torch.manual_seed(mixed_seed(seed, fabric.global_rank))  # masks differ between processes

    fabric.barrier()  # all have looked at the run's folder before one writes to it
    log = RunLog(output, logging, active=fabric.is_global_zero)
    if fabric.is_global_zero:
        keep_config(output, settings, restored["step"] if restored else 0)
    failures = DecodingFailures(output)
    examples = _examples(source, crop, seed) if isinstance(source, ImageCollection) else []
    decoder = DeviceDecoder(cast(TrainingImages, loader.dataset), crop, fabric.device) if on_device else None
    picture = output / "reconstructions" / "latest.png"

    def batches(epoch: int, first: int) -> Iterator[Tensor]:
        loader.set_position(epoch, first)
        for found in loader:
            batch = found if decoder is None else decoder(found)
            failures.record(len(batch["images"]) // aug_repeats, batch["failed"])
            if not examples:  # of a stream
                examples.extend(batch["images"][::aug_repeats][:_EXAMPLES].clone())  # the batch itself may go
            yield batch["images"].to(fabric.device, non_blocking=True)

    def after_epoch(epoch: int) -> None:
        if message := failures.warning():
            log.say(message, style="bold red")
        every, last = logging.pictures_every_epochs, epoch + 1 == epochs
        if fabric.is_global_zero and (last or (every and (epoch + 1) % every == 0)):
            path = picture if last else picture.with_name(f"epoch-{epoch + 1:04d}.png")
            _draw(network, torch.stack(examples).to(fabric.device), path)

    def write_model(folder: Path) -> None:
        weights_files.save(folder / weights_files.MODEL_FILE, network.state_dict(), network.settings)

    plan = Plan(
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        batch_size=batch_size,
        accumulate=accumulate,
        clip_grad=optimizer.clip_grad,
        log_every_steps=logging.every_steps,
        checkpoint_every_epochs=checkpoint.every_epochs,
        max_skipped=max_skipped,
    )
    log.say(
        f"convmae {model}, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, on {data}: "
        f"{describe_run(plan, fabric, restored)}"
    )
    began = time.monotonic()
    try:
        position = train(
            fabric, wrapped, wrapped_optimizer, schedule, batches, plan, checkpoints, write_model, log, restored,
            after_epoch,
        )  # fmt: skip
    finally:
        log.finish()
    fabric.barrier()  # all have listed their failures
    return _finish(log, checkpoints, output, picture, position, time.monotonic() - began)


class SelfSupervision(NamedTuple):
    """What a step of self-supervised training returns."""

    loss: Tensor


class SelfSupervised(nn.Module):
    """A ConvMAE that computes what its loss needs, nothing more: images (B, C, H, W) -> loss."""

    def __init__(self, network: ConvMAE) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> SelfSupervision:
        return SelfSupervision(self.network(images, masked_only=True).loss)


def _restore(
    network: ConvMAE, checkpoints: CheckpointFolder, output: Path, resume: bool, weights: Path | None
) -> dict[str, Any] | None:
    """Fill the network from the run's newest checkpoint, whose training state is returned, or from given weights."""
    newest = checkpoint_to_resume(output, checkpoints, resume)
    if newest is not None:
        fill(network, weights_files.read(newest)[0])
        return read_state(newest)
    if weights is not None:
        fill(network, weights_files.read(weights)[0], resize_positions=True)
    return None


def _finish(
    log: RunLog,
    checkpoints: CheckpointFolder,
    output: Path,
    picture: Path,
    position: Position,
    seconds: float,
) -> PretrainingResult:
    """Draw the loss curve, print the summary, and say where everything is."""
    metrics = read_metrics(output)
    curve = output / "loss.png"
    newest = checkpoints.newest()
    assert newest is not None  # the loop writes one at its end
    if log.active:
        loss_curve(curve, metrics)
    log.summary(
        "pretraining finished",
        {
            "folder": str(output),
            "checkpoint": str(newest),
            "loss curve": str(curve),
            "reconstructions": str(picture),
            "loss": " -> ".join(f"{record['loss']:.4f}" for record in metrics[:: max(len(metrics) - 1, 1)]),
            "steps": f"{position.step} ({position.skipped} skipped)",
            "images that could not be decoded": str(DecodingFailures(output).count),
            "time": str(timedelta(seconds=round(seconds))),
        },
    )
    loss = metrics[-1]["loss"] if metrics else math.nan
    return PretrainingResult(output, newest, picture, curve, loss, position.step)


def _draw(network: ConvMAE, images: Tensor, path: Path) -> None:
    """Save the reconstructions of a few images, always under the same masks."""
    network.eval()
    visible = network.draw_visible(images, torch.Generator().manual_seed(0))
    reconstructions = network.reconstruct(images, visible)
    reconstruction_picture(path, list((images / 255).cpu()), list(visible.cpu()), list(reconstructions.cpu()))
    network.train()


def _decodes_on_device(
    decode: str, source: ImageCollection | ImageStream, in_channels: int, device: torch.device
) -> bool:
    """Whether the device decodes; raises UserError where it cannot."""
    check_choice("decode", decode, ("cpu", "gpu"))
    if decode == "gpu" and isinstance(source, ImageStream):
        raise UserError(f"{source.name} is a stream, which only the CPU decodes: leave --decode out")
    if decode == "gpu" and in_channels == 4:
        raise UserError("a GPU decodes no RGBA: leave --decode out, or use --in-channels 3")
    if decode == "gpu" and device.type != "cuda":
        raise UserError(f"--decode gpu needs a CUDA device, this run is on {device.type}: leave it out")
    return decode == "gpu"


def _examples(source: ImageCollection, crop: RandomCrop, seed: int) -> list[Tensor]:
    """The images of every picture of the run."""
    images = TrainingImages(source, crop, seed)
    count = min(_EXAMPLES, len(images))
    return [images[0, number * len(images) // count][0]["image"] for number in range(count)]
