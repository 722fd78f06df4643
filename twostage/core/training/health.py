"""The health of a run: losses and weights stay finite, and all processes keep the same weights.

`TrainingRun._log_training` acts on a loss that is not finite; `optimizer.py` checks and clips gradients.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import get_total_norm

from twostage.core.errors import InputError
from twostage.core.machine.sharding import is_sharded
from twostage.core.runs.run_folder import RunFolder
from twostage.core.training.running_means import Means
from twostage.core.wording import some_of

__all__ = ["ADVICE", "GRADIENT_NORMS", "Health"]

ADVICE = "Try a lower train.lr, train.max_grad_norm=1.0, or train.mixed_precision=no"
GRADIENT_NORMS = ("grad_norm", "discriminator_grad_norm")
TOTALS = {"loss", "nats_per_image", "bits_per_dim", *GRADIENT_NORMS}
"""Metrics that combine others: one of those is the cause if a total is not finite."""


class Health:
    """Checks on the numbers of one run. Each names what is wrong, the step, and what to try.

    Args:
        folder: gets `not_finite.txt`.
    """

    def __init__(self, accelerator: Accelerator, folder: RunFolder) -> None:
        self.accelerator, self.folder = accelerator, folder

    def report_not_finite(self, means: Means, name_samples: Callable[[int], list[str]]) -> str:
        """A sentence with the first step whose metrics were not finite, these metrics, and the samples of its batch.

        Args:
            name_samples: the samples of the global batch of a step (counted from 0).
        """
        first = min(means.first_broken.values())
        names = [name for name, step in means.first_broken.items() if step == first]
        causes = [name for name in names if name not in TOTALS] or names
        samples = name_samples(first)
        note = self.folder.path / "not_finite.txt"
        if self.accelerator.is_main_process:
            self.folder.write_note(note.name, [f"step {first + 1}: {', '.join(names)}", *samples])
        batch = some_of(samples, 3) + (f" (all in {note})" if len(samples) > 3 else "")
        return f"step {first + 1}: {', '.join(causes)} is not finite for the batch of {batch}"

    def check_finite(self, metrics: Mapping[str, float], step: int) -> None:
        """Refuses numbers that are not finite.

        Raises:
            InputError: names them.
        """
        broken = [name for name, value in metrics.items() if not np.isfinite(value)]
        if broken:
            raise self.stop(f"step {step}: {', '.join(broken)} is not finite", ADVICE)

    def weights_norm(self, tensors: Mapping[str, Tensor]) -> float:
        """The norms of the floating-point tensors, summed, so every process sees a NaN in any process's share."""
        shares = [t.to_local() if is_sharded(t) else t for t in tensors.values() if t.is_floating_point()]
        norm = self.accelerator.reduce(get_total_norm([share.float() for share in shares]), "sum")
        assert isinstance(norm, Tensor)
        return norm.item()

    def check_equal(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Refuses tensors that differ between the processes; skips those that FSDP shards.

        Raises:
            InputError: names them.
        """
        common = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}
        if self.accelerator.num_processes == 1 or not common:
            return
        hashes = [torch.hash_tensor(t.contiguous()).view(torch.int64) for t in common.values()]
        gathered = self.accelerator.gather(torch.stack(hashes)[None])  # (processes, tensors)
        assert isinstance(gathered, Tensor)
        differs = (gathered != gathered[0]).any(0).tolist()
        if names := [name for name, other in zip(common, differs, strict=True) if other]:
            raise self.stop(
                f"step {step}: the processes no longer have the same {some_of(names, 3)}",
                "Run the same command again to resume; if this happens again, suspect a device or its memory",
            )

    def stop(self, problem: str, remedy: str) -> InputError:
        """The error that stops the run."""
        return InputError(
            f"{problem}; the run stops and keeps its last good checkpoint in {self.folder.checkpoints}. {remedy}"
        )
