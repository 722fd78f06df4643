"""Does a digit keep its class when half of it is redrawn?

python -m benchmarks.inpainting runs/PRIOR runs/JUDGE [--mask bottom] [--num-images 500] [--with-class]
    [--guidance-scale 1] [--num-steps 8] [--temperature 1] [--picture FILE] [--json FILE]

Half of each held-out image (`--mask`) is removed and redrawn by `TwoStagePipeline.inpaint`, one completion per image.
A feature network (`twostage train-features`), trained on none of these images, classifies the results. Each row is the
fraction of images that it assigns to their own class, with the standard error:

- `original`, and `reconstruction` by the tokenizer: the best that can be reached;
- `kept part`: everything else black; what can be recognised without a prior;
- `completion`: without a class, so that the prior has to infer it from the kept part;
- `completion, told its class`, with `--with-class`: how well a known class is drawn, with that guidance.
"""

import math
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.reporting import Row, parser, report
from pipelines.drawing.asked import Cycle
from pipelines.drawing.rebuilt_images import rebuild_images
from pipelines.drawing.redraw import known_codes, paste
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.files.masks import MASK_NAMES, mark_masked, named_mask
from pipelines.saved.saved_model import SavedModel
from stage1_tokenizer.features.feature_network import FeatureNetwork
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.data.spread import spread
from twostage.core.images.conversion import to_float
from twostage.core.images.sheets import contact_sheet, save_image
from twostage.core.machine.processes import share_cores

COLUMNS = 12


def completed(
    pipeline: TwoStagePipeline, images: Tensor, mask: Tensor, labels: list[int] | None, sampling: SamplingConfig
) -> Tensor:
    """`TwoStagePipeline.inpaint` for different images (n, C, H, W): one completion each, seed 0."""
    known = known_codes(pipeline.tokenizer, images, mask)
    parts = pipeline.draw(range(len(images)), Cycle(labels), sampling, seed=0, known=known)
    return paste(images, torch.cat([drawn for drawn, _ in parts]), mask)


@torch.no_grad()
def judged(judge: FeatureNetwork, images: Tensor, labels: Tensor) -> Row:
    """The fraction of images that the feature network assigns to their class."""
    given = torch.cat([judge(to_float(part)).argmax(1) for part in images.split(250)])
    share = (given == labels).double().mean().item()
    return {"keep_class": share, "standard_error": math.sqrt(share * (1 - share) / len(images))}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("prior", help="the run folder of a prior")
    arguments.add_argument("judge", help="the run folder of a feature network")
    arguments.add_argument("--mask", choices=MASK_NAMES, default="bottom")
    arguments.add_argument("--num-images", type=int, default=500)
    arguments.add_argument("--with-class", action="store_true")
    arguments.add_argument("--guidance-scale", type=float, default=1.0, help="guidance for completions with a class")
    arguments.add_argument("--num-steps", type=int)
    arguments.add_argument("--temperature", type=float, default=1.0)
    arguments.add_argument("--picture", type=Path, help="write a PNG of some completions")
    options = arguments.parse_args()
    share_cores()
    pipeline, judge = TwoStagePipeline.from_pretrained(options.prior), FeatureNetwork.from_pretrained(options.judge)
    held_out = SavedModel.find(options.prior).open_tokenizer()[0].held_out_images()
    rows = spread(len(held_out), options.num_images)
    images, labels = held_out.read(rows), held_out.read_labels(rows)
    assert labels is not None
    mask = named_mask(options.mask, pipeline.image_size)
    settings = {"temperature": options.temperature, "num_steps": options.num_steps}
    start = time.perf_counter()
    completions = completed(pipeline, images, mask, None, SamplingConfig(**settings))
    seconds = (time.perf_counter() - start) / len(images)
    shown = {
        "original": images,
        "reconstruction": rebuild_images(pipeline.tokenizer, images),
        "kept part": images.masked_fill(mask, 0),
        "completion": completions,
    }
    if options.with_class:
        sampling = SamplingConfig(**settings, guidance_scale=options.guidance_scale)
        shown["completion, told its class"] = completed(pipeline, images, mask, labels.tolist(), sampling)
    table = [{"images": name, **judged(judge, pictures, labels)} for name, pictures in shown.items()]
    report(
        {
            "prior": options.prior,
            "judge": options.judge,
            "mask": options.mask,
            "num_images": len(images),
            "guidance_scale": options.guidance_scale,
            **settings,
            "seconds_per_completion": f"{seconds:.3f}",
        },
        table,
        options.json,
    )
    if options.picture:
        nothing = torch.zeros_like(mask)
        strips = [
            mark_masked(pictures[:COLUMNS], mask if name == "kept part" else nothing)
            for name, pictures in shown.items()
        ]
        save_image(contact_sheet(torch.cat(strips), COLUMNS, row_titles=list(shown)), options.picture)


if __name__ == "__main__":
    main()
