"""Are the samples of a parallel transformer in few passes as good as those of the same weights in raster order?

python -m benchmarks.parallel_orders RUN [--set cifar10] [--dir runs/family] [--repeats 10] [--json FILE]

RUN is a trained parallel transformer over codes of that dataset. It writes 1,000 images in its own groups, and 1,000
one code after another in raster order; the network of `benchmarks.family` judges both. Then both are timed in turns, by
processor time. The guidance is that of `benchmarks.family`.
"""

import statistics
import time
from pathlib import Path
from typing import cast

from benchmarks.family import BATCH, GUIDANCE, SETS, Runs, judge_and_features, judge_samples
from benchmarks.reporting import Row, parser, report
from pipelines.drawing.two_stage import TwoStagePipeline
from stage2_prior.networks.parallel_transformer import ParallelTransformer


def network_of(pipeline: TwoStagePipeline) -> ParallelTransformer:
    assert pipeline.prior
    return cast(ParallelTransformer, pipeline.prior.network)


def seconds(pipeline: TwoStagePipeline, batch: int) -> float:
    """The processor time of all threads that draws a batch, codes and pixels."""
    start = time.process_time()
    pipeline(batch, batch_size=batch, output_type="pt", guidance_scale=GUIDANCE)
    return time.process_time() - start


def speed(ours: TwoStagePipeline, raster: TwoStagePipeline, batch: int, repeats: int) -> Row:
    """Seconds of both, and their ratio."""
    pairs = [(seconds(ours, batch), seconds(raster, batch)) for _ in range(repeats + 1)][1:]
    ratios = [second / first for first, second in pairs]
    return {
        "name": f"batch {batch}",
        "groups_s": statistics.median(first for first, _ in pairs),
        "raster_s": statistics.median(second for _, second in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--set", choices=SETS, default="cifar10")
    arguments.add_argument("--dir", type=Path, default=Path("runs/family"), help="that of benchmarks.family")
    arguments.add_argument("--repeats", type=int, default=10)
    options = arguments.parse_args()
    judge, training = judge_and_features(options.set, Runs(options.set, 0, [], options.dir / options.set).judge)
    ours, raster = (TwoStagePipeline.from_runs(options.run) for _ in range(2))
    cells = network_of(raster).cells
    network_of(raster).config = network_of(raster).config.model_copy(update={"order": "raster", "num_steps": cells})
    rows = []
    for name, pipeline in {"groups": ours, "raster": raster}.items():
        config, found = network_of(pipeline).config, judge_samples(pipeline, judge, training)
        passes = config.default_steps(network_of(pipeline).grid)
        rows.append({"name": name, "passes": passes, "accuracy": found["accuracy"], "distance": found["distance"]})
    rows += [speed(ours, raster, batch, options.repeats) for batch in (1, BATCH)]
    report({"run": str(options.run), "guidance": GUIDANCE, "repeats": options.repeats}, rows, options.json)


if __name__ == "__main__":
    main()
