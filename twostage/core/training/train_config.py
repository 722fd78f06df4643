"""The `train` group that both trainings have."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from twostage.core.config.sections import Count, Number, Section, Size
from twostage.core.machine.precision import MixedPrecision
from twostage.core.training.schedules import Schedule

__all__ = ["Beta", "TrainConfig"]

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class TrainConfig(Section):
    """How long, how fast, and what is written when. Steps are updates of the weights."""

    exclusive_keys: ClassVar[tuple[tuple[str, ...], ...]] = (("max_steps", "epochs"),)

    batch_size: Count = 128
    """Samples an update, over all processes and accumulation steps together."""
    max_steps: Count | None = None
    """Updates; or give `epochs`."""
    epochs: Count | None = None
    """Passes over the training split; a last batch that is not full is left out."""
    lr: Number = Field(default=3e-4, gt=0)
    lr_schedule: Schedule = "constant"
    warmup_steps: Size = 0
    """Updates over which the learning rate rises from 0."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's."""
    weight_decay: Number = Field(default=0.0, ge=0)
    """Decoupled (AdamW), on matrices and convolution kernels."""
    max_grad_norm: Number | None = Field(default=None, gt=0)
    """Gradients are clipped to this norm; None: never."""
    gradient_accumulation_steps: Count = 1
    """Parts that an update's batch is worked on in, one after another."""
    ema_decay: Number | None = Field(default=None, gt=0, lt=1)
    """Of the averaged weights that validation measures and inference loads; None: the weights themselves."""
    mixed_precision: MixedPrecision = "no"
    """`auto` takes bf16 where the GPU has it or the processor is fast in it (AMX; AVX512-BF16 of AMD), else `no`."""
    on_not_finite: Literal["stop", "skip"] = "stop"
    """What to do about a loss or a gradient that is not finite: end the run, whose last checkpoint is kept, or leave
    the update out and count. Either names the term, the step and the images."""
    log_every: Count = 50
    """Steps between training lines in metrics.jsonl (each the mean since the one before)."""
    validate_every: Count | None = None
    """Steps between validations and sample pictures; None: once an epoch."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; None: once an epoch."""
    keep_checkpoints: Count = 2

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(f"give either max_steps or epochs, got max_steps={self.max_steps}, epochs={self.epochs}")
        return self
