"""Starts a prior from the weights of another one over the same tokenizer's codes. Classes and words that the other one
does not have get new rows."""

from typing import Any

from stage2_prior.prior import Prior, PriorConfig
from twostage.core.config.sections import describe_differences
from twostage.core.errors import InputError
from twostage.core.machine.sharding import share_like
from twostage.core.runs.model_folder import load_model_folder
from twostage.core.wording import some_of

__all__ = ["network_of", "start_from"]

CLASS_ROWS = "class_embedding.weight"
"""The end of the names of a network's tensors with a row for each class, and a last one for "no class"."""
OF_TRAINING = {"dropout", "code_dropout"}
"""Settings of a network that its weights do not depend on."""
MAX_NAMES = 12


def network_of(source: str) -> dict[str, Any]:
    """The `model` group of the prior at `init_from`.

    Raises:
        InputError: there is no prior.
    """
    try:
        return load_model_folder(source, "prior")[0]["model"]
    except InputError as error:
        raise InputError(f"init_from: {error}") from None


def start_from(prior: Prior, source: str) -> str:
    """Loads the weights of the prior at ``source`` into a new one; returns a sentence on what is taken over and new.

    A new class starts as "no class", a new word as the mean of all words.

    Raises:
        InputError: no prior, or one of another architecture or tokenizer.
    """
    try:
        earlier = Prior.from_pretrained(source)
    except InputError as error:
        raise InputError(f"init_from: {error}") from None
    check_same_form(prior.config, earlier.config, source)
    own, weights = prior.state_dict(), {}
    rows = class_rows(prior.config.class_names or [], earlier.config.class_names or [])
    for name, tensor in earlier.network.state_dict().items():  # type: ignore[operator]
        if f"network.{name}" in own:
            weights[f"network.{name}"] = tensor[rows] if name.endswith(CLASS_ROWS) else tensor
    of_conditions, notes = prior.conditions.taken_over(earlier.conditions)
    weights |= {f"conditions.{name}": tensor for name, tensor in of_conditions.items()}
    shared = tuple(f"conditions.{kind}." for kind in prior.conditions if kind in earlier.conditions)
    expected = weights.keys() | {name for name in own if name.startswith(shared)}
    fits = {name for name in weights.keys() & own.keys() if weights[name].shape == own[name].shape}
    if wrong := sorted(expected - fits):
        raise InputError(
            f"init_from {source}: weights of another shape: {some_of(wrong, 3)}. Give `condition` the same settings as "
            "there, or choose another init_from="
        )
    prior.load_state_dict({name: share_like(tensor, own[name]) for name, tensor in weights.items()}, strict=False)
    taken, total = (sum(own[name].numel() for name in names) for names in (weights, own))
    parts = [f"init_from {source}: {taken:,} of {total:,} weights come from there", *notes]
    return "; ".join(parts + describe_names(prior.config, earlier.config))


def check_same_form(own: PriorConfig, earlier: PriorConfig, source: str) -> None:
    """Refuses a prior of another tokenizer or architecture.

    Raises:
        InputError: shows the differences.
    """
    if own.tokenizer.hash != earlier.tokenizer.hash:
        raise InputError(
            f"init_from {source}: was trained on codes of the tokenizer {earlier.tokenizer.hash[:12]}, but these codes "
            f"are from {own.tokenizer.hash[:12]}. Encode the images with the same tokenizer "
            f"({earlier.tokenizer.path}), or choose another init_from="
        )
    before, now = (config.model.model_dump(mode="json", exclude=OF_TRAINING) for config in (earlier, own))
    if differences := describe_differences({"model": before}, {"model": now}):
        raise InputError(
            f"init_from {source}: is a different model:\n  "
            + "\n  ".join(differences)
            + "\nSet the same values, or choose another init_from="
        )


def class_rows(names: list[str], earlier: list[str]) -> list[int]:
    """The earlier row for each class and for "no class"."""
    no_class = len(earlier)
    return [earlier.index(name) if name in earlier else no_class for name in names] + [no_class]


def describe_names(own: PriorConfig, earlier: PriorConfig) -> list[str]:
    """The classes and conditions that are taken over, new or dropped."""
    found = []
    for what, now, before in [
        ("classes", own.class_names or [], earlier.class_names or []),
        ("conditions", [each.type for each in own.conditions], [each.type for each in earlier.conditions]),
    ]:
        groups = {
            f"the same {what}": [name for name in now if name in before],
            f"new {what}": [name for name in now if name not in before],
            f"dropped {what}": [name for name in before if name not in now],
        }
        found += [f"{group}: {some_of(names, MAX_NAMES)}" for group, names in groups.items() if names]
    return found
