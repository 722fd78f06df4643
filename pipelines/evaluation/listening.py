"""How much a prior listens to each of its conditions: what the right one saves, compared with a wrong one and with
none, and whether the right one among several makes the codes likeliest.

Axes: n rows, B of them in a batch, M choices, D draws.
"""

import torch
from torch import Tensor

from pipelines.evaluation.likelihood import HeldOutCodes, prior_nats
from pipelines.evaluation.measurement import Measurement
from pipelines.evaluation.shared_work import SharedWork
from pipelines.saved.evaluation_figures import Listening
from stage2_prior.prior import Prior
from twostage.core.data.spread import spread

__all__ = ["measure_listening"]

MAX_ROWS, MAX_MATCHED = 512, 128
NUM_CHOICES = 16


@torch.no_grad()
def measure_listening(prior: Prior, codes: HeldOutCodes, work: SharedWork) -> Measurement[Listening]:
    """Measures every condition of ``prior`` on held-out codes."""
    rows = codes.rows[spread(len(codes.rows), MAX_ROWS)]
    given, cells = prior.conditions.read(codes.split, rows), codes.split.codes[0].size
    saved: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in prior.conditions:
        distinct, which = given[name].unique(dim=0, return_inverse=True)
        if len(distinct) < 2:
            continue
        wrong = distinct[(which + len(distinct) // 2) % len(distinct)]
        nothing = prior.conditions.nothing(len(rows))[name].expand_as(given[name])
        nats = _nats(prior, codes, rows, [given, given | {name: wrong}, given | {name: nothing}], work)
        right, of_wrong, without = (nats / cells).mean(0).tolist()
        saved[f"wrong_{name}_costs"] = of_wrong - right
        if prior.needs(name):
            missing[f"{name}_saves"] = "the condition was never hidden in training"
        else:
            saved[f"{name}_saves"] = without - right
        saved |= _matching(prior, codes, rows, given, name, distinct, which, work)
    protocol = {
        "rows": len(rows),
        "right, wrong, none": "nats per code of the same rows with their own condition, that of another row, and none",
        "matching": f"up to {MAX_MATCHED} rows; the right one and up to {NUM_CHOICES - 1} other held-out ones",
    }
    return Measurement(Listening(saved), missing, {"conditions": protocol} if saved else {})


def _matching(
    prior: Prior,
    codes: HeldOutCodes,
    rows: Tensor,
    given: dict[str, Tensor],
    name: str,
    distinct: Tensor,
    which: Tensor,
    work: SharedWork,
) -> dict[str, float]:
    """The share of rows for which the right value is the likeliest of M choices, and the share to expect by chance."""
    places = spread(len(rows), MAX_MATCHED)
    others = min(NUM_CHOICES, len(distinct)) - 1
    steps = torch.arange(others) * (len(distinct) - 1) // others + 1  # from the next value to the one before
    choices = [given | {name: distinct[(which + step) % len(distinct)]} for step in [0, *steps.tolist()]]
    chosen = [{key: value[places] for key, value in choice.items()} for choice in choices]
    nats = _nats(prior, codes, rows[places], chosen, work)
    right = (nats[:, :1] < nats[:, 1:]).all(1).double().mean().item()
    return {f"{name}_matches": right, f"{name}_matches_by_chance": 1 / (others + 1)}


def _nats(
    prior: Prior, codes: HeldOutCodes, rows: Tensor, choices: list[dict[str, Tensor]], work: SharedWork
) -> Tensor:
    """-log p(codes | conditions) of each row with each of M conditions: (n, M). An upper bound uses the same random
    numbers for all of them."""
    table = torch.zeros(len(rows), len(choices), dtype=torch.float64)
    for places in work.batches(len(rows), "conditions"):
        indices = codes.split.read(rows[places]).to(work.device)
        for column, choice in enumerate(choices):
            values = {name: value[places] for name, value in choice.items()}
            table[places, column] = prior_nats(prior, indices, values, int(rows[places[0]])).mean(1)
    return work.total(table)
