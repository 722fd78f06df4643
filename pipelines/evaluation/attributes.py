"""Whether images of `captioned_shapes` show what their captions and maps ask for, exactly: no network judges.

Axes: n images, C channels, H and W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.likelihood import HeldOutCodes
from pipelines.evaluation.measurement import Measurement
from pipelines.evaluation.samples import SampleRequest, held_out_cycle
from pipelines.evaluation.shape_attributes import judge_shapes, map_overlap
from pipelines.evaluation.shared_work import SharedWork
from pipelines.saved.evaluation_figures import AttributeAccuracy
from stage2_prior.prior import Prior
from twostage.core.data.captioned_shapes import ATTRIBUTES
from twostage.core.data.drawn_sources import split_attributes
from twostage.core.data.spread import spread

__all__ = ["can_judge_attributes", "measure_attributes"]

SOURCE, UNSEEN = "captioned_shapes", "unseen"


def can_judge_attributes(prior: Prior, codes: HeldOutCodes) -> bool:
    """Whether the codes are of drawn shapes, and the prior draws them from captions or maps."""
    manifest = codes.cache.manifest
    return manifest.source == SOURCE and manifest.channels == 3 and bool({"text", "map"} & set(prior.conditions))


@torch.no_grad()
def measure_attributes(
    pipeline: TwoStagePipeline, codes: HeldOutCodes, request: SampleRequest, work: SharedWork
) -> Measurement[AttributeAccuracy]:
    """Draws images for held-out captions and maps, and for those of combinations that were never trained on."""
    assert pipeline.prior
    conditions, found, protocol = pipeline.prior.conditions, {}, {}
    has_maps = "map" in conditions and not (codes.cache.manifest.maps and codes.cache.manifest.maps.codes)
    splits = [codes.split_name, *([UNSEEN] if UNSEEN in codes.cache.splits and codes.split_name != UNSEEN else [])]
    for split in splits:
        right, overlap = _draw(pipeline, codes, split, request, work)
        ending = "_unseen" if split == UNSEEN else ""
        if "text" in conditions:
            found |= {f"{name}_right{ending}": share for name, share in _shares(right, list(ATTRIBUTES)).items()}
        if has_maps:
            found[f"map_overlap{ending}"] = overlap.mean().item()
        protocol[split] = len(right)
    about = {
        "images": protocol,
        "sampling": request.sampling.model_dump(mode="json"),
        "seed": request.seed,
        "judge": "geometry: ground, colour, size, place and shape of each image; a map by intersection over union",
    }
    return Measurement(AttributeAccuracy(found), {}, {"attributes": about})


def _shares(right: Tensor, names: Sequence[str]) -> dict[str, float]:
    shares = dict(zip(names, right.double().mean(0).tolist(), strict=True))
    pair = right[:, [names.index("colour"), names.index("shape")]].all(1)
    return shares | {"colour_and_shape": pair.double().mean().item(), "all": right.all(1).double().mean().item()}


def _draw(
    pipeline: TwoStagePipeline, codes: HeldOutCodes, name: str, request: SampleRequest, work: SharedWork
) -> tuple[Tensor, Tensor]:
    """Which attributes of each image are right, (n, attributes) bool, and its overlap with its map, (n,)."""
    assert pipeline.prior
    split = codes.cache.splits[name]
    rows = spread(len(split), request.num_samples)
    cycle, maps = held_out_cycle(pipeline.prior, split, rows), split.read_maps(rows)
    wanted = {key: torch.from_numpy(each)[rows] for key, each in split_attributes(name, len(split)).items()}
    right = torch.zeros(len(rows), len(ATTRIBUTES), dtype=torch.int64)
    overlap = torch.zeros(len(rows), dtype=torch.float64)
    for places in work.batches(len(rows), f"{name} samples"):
        numbers = range(int(places[0]), int(places[-1]) + 1)
        drawn = pipeline.draw(numbers, cycle, request.sampling, request.seed, len(places))
        judged = judge_shapes(torch.cat([pixels for pixels, _ in drawn]))
        right[places] = torch.stack([judged[key] == wanted[key][places] for key in ATTRIBUTES], 1).long()
        if maps is not None and maps.shape[1:] == judged["mask"].shape[1:]:  # not codes of maps
            overlap[places] = map_overlap(judged["mask"], maps[places]).double()
    return work.total(right).bool(), work.total(overlap)
