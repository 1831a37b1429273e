"""`convmae pretrain`: a folder of images in, a pretrained encoder out."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from convmae import weights as weights_files
from convmae.commands.options import PixelOptions, flat_settings, spread
from convmae.commands.pixels import settle_pixels
from convmae.data.failures import DecodingFailures
from convmae.data.images import RandomCrop
from convmae.data.sources import open_images
from convmae.errors import UserError
from convmae.kinds import create_autoencoder
from convmae.models.config import height_and_width
from convmae.models.fitting import fit_objective
from convmae.objectives.masked import ConvMAE
from convmae.pixels import Pixels
from convmae.tasks.pretraining import PretrainingJob
from convmae.tasks.processes import process_loading
from convmae.training.logging import PictureLoggingOptions, read_metrics
from convmae.training.optimizer import OptimizerOptions
from convmae.training.options import EncoderRunOptions
from convmae.training.run import Finished, Run, divide_batch
from convmae.visualize import loss_curve

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainingResult:
    """Where a finished run left what it made."""

    folder: Path
    checkpoint: Path
    """Folder with the model's file; pass it to convmae.load or any --weights."""
    picture: Path
    """File with reconstructions of some images by the last weights."""
    loss_curve: Path
    loss: float
    """Mean over the last log line's steps."""
    steps: int


@spread("options", "pixels")
def pretrain(
    data: str | list[str],
    model: str = "base",
    options: EncoderRunOptions = EncoderRunOptions(
        output=Path("runs/pretrain"),
        epochs=200,
        batch_size=256,
        optimizer=OptimizerOptions(),
        logging=PictureLoggingOptions(),
    ),
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
    pixels: PixelOptions = PixelOptions(),
) -> PretrainingResult:
    """Pretrain a ConvMAE on unlabelled images; the paper's batches are of 2048.

    Args:
        data: a folder with images at any depth; a list of images, .txt, or .csv with a column path; several of these
            with commas between them; wds/FOLDER/shards-{0000..0099}.tar; hfds/NAME or hfids/NAME; or demo.
        model: size: tiny, small, base, large or huge.
        image_size: pixels, one number or [height, width], multiples of 16.
        in_channels: 1 (grey), 3 (RGB), 4 (RGBA), or the number of bands of multi-band TIFF and .npy files.
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
        weights: start from the weights of this run, checkpoint, folder of save_pretrained or file, ours or published;
            of a file without a decoder the encoder is taken and the decoder begins anew; for another number of channels
            the first layer is adapted, and the one that predicts pixels begins anew.

    Nothing judges a pretraining: a moving average of the weights is kept as the best model at the end.

    Raises UserError for settings that cannot work, and Interrupted after SIGTERM or Ctrl-C, a checkpoint being written.
    """
    settings = flat_settings(locals())
    run = Run(options, settings)
    size = height_and_width(image_size)
    begun = run.checkpoint or weights
    state, facts = ({}, {}) if begun is None else weights_files.read(begun)
    # No option says these, so that a derivative of the paper's model can be trained on, too.
    derived = {"mlp_ratio": weights_files.sizes(state)["mlp_ratio"]} if state else {}
    torch.manual_seed(options.seed)
    objective = create_autoencoder(
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
        **derived,
    )
    if weights is not None and run.checkpoint is None:
        _begin(objective, weights, state, facts)
    objective.encoder.set_grad_checkpointing(options.grad_checkpointing)
    source = open_images(data, split)
    decoding = settle_pixels(objective, pixels, [source], run)

    fabric = run.start()
    images_of_a_pass = divide_batch(options.batch_size, fabric.world_size, options.accumulate)
    job = PretrainingJob(
        fabric,
        objective,
        source,
        RandomCrop(size, decoding, crop_scale),
        process_loading(fabric, options.engine, images_of_a_pass, skip_damaged=True),
        origin=f"convmae {model}",
        folder=options.output,
        seed=options.seed,
        aug_repeats=aug_repeats,
        decode=decode,
        pictures_every_epochs=getattr(options.logging, "pictures_every_epochs", 0),
    )
    return _finish(run.train(fabric, job), job)


def _begin(objective: ConvMAE, weights: Path, state: weights_files.StateDict, facts: dict[str, Any]) -> None:
    """Fill the model from what a file holds as far as that goes, and say what begins anew.

    state, facts: what `convmae.weights.read` gave.
    """
    known = weights_files.flat(facts)
    config = objective.encoder.config
    if known.get("num_heads", config.num_heads) != config.num_heads:  # which no tensor's shape would tell
        raise UserError(
            f"{weights} is of a model with {known['num_heads']} attention heads, this one has {config.num_heads}: "
            "choose the --model that it is of"
        )
    if known.get("in_channels") == objective.encoder.in_channels:
        objective.encoder.use_pixels(Pixels.of(known.get("pixels")))
    fitting, anew, left_out = fit_objective(state, objective.state_dict())
    objective.load_state_dict(fitting)
    if anew:
        taken = [part for part, _ in objective.named_children() if part not in anew]
        parts = {"taken from it": taken, "begun anew": anew, "left out": left_out}
        said = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
        _log.warning("%s has no decoder; %s", weights, said)
    if known.get("norm_pix", objective.norm_pix) != objective.norm_pix:
        _log.warning("%s was trained with norm_pix %s, this run has %s", weights, known["norm_pix"], objective.norm_pix)


def _finish(finished: Finished, job: PretrainingJob) -> PretrainingResult:
    """Draw the loss curve, print the summary, and say where everything is."""
    metrics = read_metrics(finished.folder)
    curve = finished.folder / "loss.png"
    if finished.log.active:
        loss_curve(curve, metrics)
    finished.summary(
        "pretraining finished",
        {
            "folder": str(finished.folder),
            "checkpoint": str(finished.checkpoint),
            "loss curve": str(curve),
            "reconstructions": str(job.picture),
            "loss": " -> ".join(f"{record['loss']:.4f}" for record in metrics[:: max(len(metrics) - 1, 1)]),
            "images that could not be decoded": str(DecodingFailures(finished.folder).count),
        },
    )
    loss = metrics[-1]["loss"] if metrics else math.nan
    return PretrainingResult(finished.folder, finished.checkpoint, job.picture, curve, loss, finished.position.step)
