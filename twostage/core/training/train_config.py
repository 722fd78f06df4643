"""The `train` group of all trainings."""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from twostage.core.config.sections import CHANGES_NO_NUMBER, MAY_CHANGE, Count, Number, Section, Size
from twostage.core.machine.precision import MixedPrecision

__all__ = ["Beta", "TrainConfig"]

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class TrainConfig(Section):
    """Length, optimizer, and how often to log, validate and save. A step is one update of the weights."""

    exclusive_keys: ClassVar[tuple[tuple[str, ...], ...]] = (("max_steps", "epochs"),)

    batch_size: Count = 128
    """Samples per update, in total over all processes and accumulation steps."""
    max_steps: Annotated[Count | None, MAY_CHANGE] = None
    """Number of updates; the alternative is `epochs`."""
    epochs: Annotated[Count | None, MAY_CHANGE] = None
    """Passes over the training split; an incomplete last batch is skipped."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for linear layers and convolutions with at least 8 inputs and outputs, except a prior's head; AdamW
    for all other weights and for discriminators. Muon's best `lr` is high for AdamW, so set `loss.adversarial.lr` too:
    without it, a discriminator uses `lr`."""
    lr: Number = Field(default=3e-4, gt=0)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Size = 0
    """Updates over which the learning rate rises from 0."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: Number = Field(default=0.0, ge=0)
    """Decoupled weight decay of the weights with at least two dimensions, such as matrices and convolution kernels."""
    max_grad_norm: Number | None = Field(default=None, gt=0)
    """Gradients are clipped to this norm; None: never."""
    gradient_accumulation_steps: Count = 1
    """Parts into which the batch of an update is split to save memory."""
    ema_decay: Number | None = Field(default=None, gt=0, lt=1)
    """Decay of the averaged weights, which validation measures and inference loads; None: no averaging."""
    mixed_precision: MixedPrecision = "no"
    """`auto`: bf16 if the GPU has it or the processor is fast with it (AMX, or AMD's AVX512-BF16), else `no`. On a CPU
    it is also `no` for the `mlp` backbone, which does not gain from bf16."""
    on_not_finite: Annotated[Literal["stop", "skip"], MAY_CHANGE] = "stop"
    """What to do if a loss or a gradient is not finite: stop the run and keep its last checkpoint, or skip the update
    and count it. Both name the term, the step and the images."""
    log_every: Annotated[Count, CHANGES_NO_NUMBER] = 50
    """Steps between training lines in metrics.jsonl; each line is the mean since the previous one."""
    validate_every: Annotated[Count | None, MAY_CHANGE] = None
    """Steps between validations and sample sheets; None: once per epoch."""
    checkpoint_every: Annotated[Count | None, CHANGES_NO_NUMBER] = None
    """Steps between checkpoints; None: once per epoch."""
    keep_checkpoints: Annotated[Count, CHANGES_NO_NUMBER] = 2

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(f"give either max_steps or epochs, got max_steps={self.max_steps}, epochs={self.epochs}")
        return self

    def lr_share(self, step: int, max_steps: int) -> float:
        """The share of `lr` after ``step`` finished updates: a linear warm-up, then 1 ("constant") or half a cosine
        from 1 down to 0 at ``max_steps`` ("cosine")."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def reason_to_end(self, step: int, max_steps: int, facts: dict[str, Any]) -> str | None:
        """Why a run ends after ``step`` updates; None: it continues.

        Args:
            facts: the run's facts, see `BaseRun.facts`.
        """
        return "all steps done" if step >= max_steps else None
