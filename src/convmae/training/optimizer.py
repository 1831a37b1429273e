"""The recipes' optimisers with their parameter groups, and schedules with warm-up, stepped each iteration."""

from dataclasses import dataclass
from typing import Literal

import torch
from timm.optim import Lars, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from convmae.errors import UserError


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and its schedule; the defaults are those of the paper's pretraining."""

    base_lr: float = 1.5e-4
    """Learning rate for a batch of 256 images; it grows linearly with the batch."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up from 0; by default 40, or a fifth of a run shorter than 200 epochs."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.05
    """Of all weights but biases and norms."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    clip_grad: float | None = None
    """Largest norm of the gradient; none by default, as published."""


@dataclass(frozen=True)
class LayerDecayOptions(OptimizerOptions):
    """AdamW and its schedule; the defaults are those of the paper's fine-tuning."""

    base_lr: float = 5e-4
    """Learning rate of the head for a batch of 256 images; it grows linearly with the batch."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up from 0; by default 5, or a fifth of a run shorter than 25 epochs."""
    min_lr: float = 1e-6
    """Learning rate of the head at the end of the cosine."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    layer_decay: float = 0.65
    """Each layer learns at this times the rate of the layer above it; 1 for the same rate everywhere."""


@dataclass(frozen=True)
class DetectionOptimizerOptions(LayerDecayOptions):
    """AdamW and its schedule; the defaults are those of the paper's detector."""

    base_lr: float = 6.4e-4
    """Learning rate for a batch of 256 images; it grows linearly with the batch: 8e-5 for the paper's 32."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up from 0; by default an eighth of an epoch, as published for COCO."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.1
    """Of all weights but biases, norms and positions."""
    layer_decay: float = 1.0
    """Each layer of the encoder learns at this times the rate of the layer above it; 1 for the same rate everywhere."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """A cosine, or a tenth of the rate from each of two points on."""
    steps_at: tuple[float, float] = (163_889 / 184_375, 177_546 / 184_375)
    """These two points, as shares of the run."""


@dataclass(frozen=True)
class SegmentationOptimizerOptions(LayerDecayOptions):
    """AdamW and its schedule; the defaults are those of the paper's segmentation."""

    base_lr: float = 1.6e-3
    """Learning rate for a batch of 256 images; it grows linearly with the batch: 1e-4 for the paper's 16."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up from 0; by default 1500 steps of ADE20K's 1263, or a fifth of a run under 6 epochs."""
    min_lr: float = 0.0
    """Learning rate at the end of the run."""
    layer_decay: float = 0.75
    """Each layer of the encoder learns at this times the rate of the layer above it; 1 for the same rate everywhere."""
    power: float = 1.0
    """Of the share of the run that remains, with which the learning rate falls; 1 for a straight line."""


@dataclass(frozen=True)
class LarsOptions:
    """LARS and its schedule; the defaults are those of the paper's linear probe."""

    base_lr: float = 0.1
    """Learning rate for a batch of 256 images; it grows linearly with the batch."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up from 0; by default 10, or a fifth of a run shorter than 50 epochs."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    momentum: float = 0.9
    """Momentum."""


def build_optimizer(
    model: nn.Module, options: OptimizerOptions | LarsOptions, batch_size: int
) -> torch.optim.Optimizer:
    """AdamW or LARS, as the options are, over the trainable parameters of `model`, at base_lr * batch_size / 256.

    AdamW decays no biases and norms; with LayerDecayOptions the model tells its layers by timm's contract,
    `group_matcher` and `no_weight_decay`. LARS decays nothing, and biases take plain steps.
    """
    learning_rate = options.base_lr * batch_size / 256
    if isinstance(options, LarsOptions):
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices, others = ([p for p in trainable if (p.ndim > 1) is matrix] for matrix in (True, False))
        return Lars(
            [{"params": matrices, "always_adapt": True}, {"params": others}],
            lr=learning_rate,
            momentum=options.momentum,
        )
    if isinstance(options, LayerDecayOptions):
        if not 0 < options.layer_decay <= 1:
            raise UserError(f"a layer decay of {options.layer_decay} is out of range: choose one in (0, 1]")
        without_decay = model.no_weight_decay()  # type: ignore[operator]
        groups = param_groups_layer_decay(model, options.weight_decay, without_decay, layer_decay=options.layer_decay)
    else:
        groups = param_groups_weight_decay(model, options.weight_decay)
    # Fused AdamW can skip a step on the device, which the loop needs for losses that are not finite.
    return torch.optim.AdamW(groups, lr=learning_rate, betas=options.betas, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, options: OptimizerOptions | LarsOptions, epochs: int, steps_per_epoch: int
) -> Scheduler:
    """Linear warm-up from 0, then a cosine, two steps or a power; `step_update(step)` before each step.

    Raises UserError if the warm-up is not shorter than the run, the steps are not in it, or the power is not above 0.
    """
    warmup_epochs = min(_usual_warmup(options), epochs / 5) if options.warmup_epochs is None else options.warmup_epochs
    warmup, total = round(warmup_epochs * steps_per_epoch), epochs * steps_per_epoch
    if not 0 <= warmup < total:
        raise UserError(
            f"a warm-up of {warmup_epochs:g} epochs does not fit a run of {epochs}: lower --optimizer.warmup_epochs"
        )
    if isinstance(options, SegmentationOptimizerOptions):
        return _polynomial(optimizer, options, warmup, total)
    if isinstance(options, DetectionOptimizerOptions) and options.schedule not in ("cosine", "steps"):
        raise UserError(f"schedule cannot be '{options.schedule}': choose cosine or steps")
    if isinstance(options, DetectionOptimizerOptions) and options.schedule == "steps":
        return _two_steps(optimizer, options.steps_at, warmup, total)
    return CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=options.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def _two_steps(optimizer: torch.optim.Optimizer, steps_at: tuple[float, float], warmup: int, total: int) -> Scheduler:
    first, second = steps_at
    if not 0 < first <= second < 1:
        raise UserError(f"steps_at {steps_at} are no shares of the run: choose 0 < first <= second < 1")
    return MultiStepLRScheduler(
        optimizer,
        decay_t=[round(share * total) + 1 for share in (first, second)],  # timm steps one iteration before
        decay_rate=0.1,
        warmup_t=warmup,
        warmup_prefix=False,
        t_in_epochs=False,
    )


def _polynomial(
    optimizer: torch.optim.Optimizer, options: SegmentationOptimizerOptions, warmup: int, total: int
) -> Scheduler:
    if not options.power > 0:
        raise UserError(f"a power of {options.power:g} is out of range: choose one above 0")
    return PolyLRScheduler(
        optimizer,
        t_initial=total,
        power=options.power,
        lr_min=options.min_lr,
        warmup_t=warmup,
        warmup_prefix=False,  # as published: what remains after the warm-up is a share of the whole run
        t_in_epochs=False,
    )


def _usual_warmup(options: OptimizerOptions | LarsOptions) -> float:
    """Epochs of warm-up of a long run, as published."""
    if isinstance(options, DetectionOptimizerOptions):
        return 0.125
    if isinstance(options, SegmentationOptimizerOptions):
        return 1500 / 1263  # iterations of the warm-up, and of an epoch of 20,210 images at a batch of 16
    return 5 if isinstance(options, LayerDecayOptions) else 10 if isinstance(options, LarsOptions) else 40
