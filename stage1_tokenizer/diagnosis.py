"""Says in words what goes wrong in a training, once, when it has held for a while. The metrics always show it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Diagnosis"]

Metrics = dict[str, float]


@dataclass(frozen=True)
class Rule:
    """What is wrong where ``holds``, and what to try."""

    name: str
    needs: str
    """The metric that it looks at."""
    patience: int
    """Lines of metrics in a row."""
    holds: Callable[[Metrics], bool]
    advice: str
    """Formatted with the metrics."""


CODEBOOK = Rule(
    "codebook",
    "codebook_usage",
    5,
    lambda m: m["codebook_usage"] < 0.5,
    "the codebook is collapsing: {codebook_usage:.0%} of the codes are in use (perplexity {perplexity:.1f}). Try",
)
RULES = [
    Rule(
        "discriminator at chance",
        "discriminator_accuracy",
        10,
        lambda m: abs(m["discriminator_accuracy"] - 0.5) < 0.02,
        "the discriminator is at chance (it tells {discriminator_accuracy:.0%} right), so its term is noise. Try a "
        "higher loss.adversarial.lr, more loss.adversarial.channels, or a lower loss.adversarial.weight",
    ),
    Rule(
        "discriminator winning",
        "discriminator_accuracy",
        10,
        lambda m: m["discriminator_accuracy"] > 0.99,
        "the discriminator wins outright (it tells {discriminator_accuracy:.1%} right), so its gradient says little. "
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
        "posterior collapse: {active_share:.0%} of the latent's units vary with the image. Try a lower loss.kl_weight "
        "or fewer model.latent_channels",
    ),
]


class Diagnosis:
    """Watches the lines of metrics of a run.

    Args:
        remedy: what to try about a collapsing codebook: the settings of this run's quantizer.
        facts: what a restart must know; plain JSON, kept up to date here.
        say: how a sentence reaches the person who watches.
    """

    def __init__(self, remedy: str, facts: dict[str, Any], say: Callable[[str], None]) -> None:
        self.rules = [Rule(**{**vars(CODEBOOK), "advice": f"{CODEBOOK.advice} {remedy}"}), *RULES]
        self.seen: dict[str, int] = facts.setdefault("diagnosis", {})
        self.say = say

    def observe(self, step: int, metrics: Metrics) -> None:
        """Takes in one line of metrics; what has held for its patience is said then and never again."""
        for rule in self.rules:
            if rule.needs not in metrics or self.seen.get(rule.name, 0) >= rule.patience:
                continue
            self.seen[rule.name] = self.seen.get(rule.name, 0) + 1 if rule.holds(metrics) else 0
            if self.seen[rule.name] == rule.patience:
                self.say(f"step {step}: {rule.advice.format(**metrics)}")
