"""Warnings about a training that goes wrong: each once, after the problem has lasted for a while."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Diagnosis"]

Metrics = dict[str, float]


@dataclass(frozen=True)
class Rule:
    """A problem, how to detect it, and what to try."""

    name: str
    needs: str
    """The metric that it checks."""
    patience: int
    """Consecutive lines of metrics before the warning."""
    holds: Callable[[Metrics], bool]
    advice: str
    """A format string for the metrics and the ``remedy``."""


RULES = [
    Rule(
        "codebook",
        "codebook_usage",
        5,
        lambda m: m["codebook_usage"] < 0.5,
        "the codebook is collapsing: {codebook_usage:.0%} of the codes are in use (perplexity {perplexity:.1f}). Try "
        "{remedy}",
    ),
    Rule(
        "discriminator at chance",
        "discriminator_accuracy",
        10,
        lambda m: abs(m["discriminator_accuracy"] - 0.5) < 0.02,
        "the discriminator is at chance ({discriminator_accuracy:.0%} accuracy), so its term is noise. Try a "
        "higher loss.adversarial.lr, more loss.adversarial.channels, or a lower loss.adversarial.weight",
    ),
    Rule(
        "discriminator winning",
        "discriminator_accuracy",
        10,
        lambda m: m["discriminator_accuracy"] > 0.99,
        "the discriminator wins ({discriminator_accuracy:.1%} accuracy), so its gradient carries little. "
        "Try loss.adversarial.lecam_weight=0.001, loss.adversarial.r1_weight=1, or a lower loss.adversarial.lr",
    ),
    Rule(
        "posterior collapse",
        "kl",
        5,
        lambda m: m["kl"] < 0.1,
        "posterior collapse: the latent carries {kl:.3f} nats per image, so the decoder ignores it. Try a lower "
        "loss.kl_weight, train.warmup_steps, or a weaker decoder",
    ),
    Rule(
        "inactive units",
        "active_share",
        3,
        lambda m: m["active_share"] < 0.1,
        "posterior collapse: only {active_share:.0%} of the latent units vary with the image. Try a lower "
        "loss.kl_weight or fewer model.latent_channels",
    ),
]


class Diagnosis:
    """Watches the metrics of a run.

    Args:
        remedy: what to try if the codebook collapses: settings of this run's quantizer.
        facts: what a resumed run must know; plain JSON, updated here.
        report: prints a warning.
    """

    def __init__(self, remedy: str, facts: dict[str, Any], report: Callable[[str], None]) -> None:
        self.seen: dict[str, int] = facts.setdefault("diagnosis", {})
        self.remedy, self.report = remedy, report

    def observe(self, step: int, metrics: Metrics) -> None:
        """Checks one line of metrics, and reports a problem the moment its patience is reached."""
        for rule in RULES:
            if rule.needs not in metrics or self.seen.get(rule.name, 0) >= rule.patience:
                continue
            self.seen[rule.name] = self.seen.get(rule.name, 0) + 1 if rule.holds(metrics) else 0
            if self.seen[rule.name] == rule.patience:
                self.report(f"step {step}: {rule.advice.format(**metrics, remedy=self.remedy)}")
