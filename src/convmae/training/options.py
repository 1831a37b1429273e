"""What training commands take alike, said and checked once; `convmae.commands.options` shows it in each of them."""

from dataclasses import dataclass
from pathlib import Path

from convmae.errors import check_local, check_positive, check_rate
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.engine import EngineOptions
from convmae.training.logging import LoggingOptions
from convmae.training.optimizer import LarsOptions, OptimizerOptions


@dataclass(frozen=True)
class RunOptions:
    """How long a run is, where it leaves what it makes, and how it is computed.

    Raises UserError that names the first option that cannot be.
    """

    output: Path
    """Folder of the run: configuration, metrics, pictures, checkpoints, and the best model where one is chosen."""
    epochs: int
    """Passes over the training data."""
    batch_size: int
    """Images a step, over all devices and passes."""
    accumulate: int = 1
    """Forward and backward passes a step; more need less memory."""
    ema_decay: float | None = None
    """Keep a moving average of the weights with this decay, and judge it in their place; 0.9999 for long runs."""
    resume: bool = False
    """Go on from the newest checkpoint in output, if there is one."""
    compile: bool = False
    """Compile the model with torch.compile."""
    seed: int = 0
    """Of weights, order, and all that is drawn at random."""
    max_skipped: int = 20
    """Stop after this many steps in a row with a loss that is not finite."""
    optimizer: OptimizerOptions | LarsOptions = OptimizerOptions()
    """The optimiser and its schedule."""
    engine: EngineOptions = EngineOptions()
    """Devices and precision."""
    checkpoint: CheckpointOptions = CheckpointOptions()
    """When to write checkpoints to resume from."""
    logging: LoggingOptions = LoggingOptions()
    """What to write down."""

    # Fields of the classes below; these are no options of a run of this class, and it behaves so.
    grad_checkpointing = False
    evaluate_every_epochs = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))  # Python callers may pass a string
        check_local("output", self.output)
        check_positive(
            epochs=self.epochs,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            max_skipped=self.max_skipped,
            evaluate_every_epochs=self.evaluate_every_epochs,
            logging_every_steps=self.logging.every_steps,
            checkpoint_every_epochs=self.checkpoint.every_epochs,
        )
        check_rate(ema_decay=self.ema_decay or 0)


@dataclass(frozen=True)
class EncoderRunOptions(RunOptions):
    """The options of runs that train an encoder, not only a layer on one that is frozen."""

    grad_checkpointing: bool = False
    """Compute the encoder's blocks twice, for less memory."""


@dataclass(frozen=True)
class SupervisedRunOptions(EncoderRunOptions):
    """The options of runs that train an encoder with labels, and judge it as they go."""

    evaluate_every_epochs: int = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
