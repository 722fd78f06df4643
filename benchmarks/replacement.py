"""How does replacing input codes by random ones affect a GPT's held-out likelihood and its samples?

python -m benchmarks.replacement [--replace-prob 0 0.1 0.3 0.5] [--steps 800] [--results docs/results.md] [--json FILE]

Trains `configs/prior/gpt_mnist.yaml` once for each fraction, on the codes of `vqvae_mnist`, and judges 1,000 samples
of each as `benchmarks.family` does. Anything that already exists is reused.
"""

import json
from pathlib import Path

from benchmarks.family import BASE, CONFIGS, Runs
from benchmarks.reporting import markdown_table, parser, report, write_section
from pipelines.evaluation.evaluate_prior import evaluate_prior
from stage2_prior.prior_training import PriorTrainingConfig, train
from twostage.core.config.sections import load_config
from twostage.core.runs.run_folder import read_metrics

COLUMNS = {
    "name": "replace_prob",
    "train": "training loss",
    "nats": "nats per code, held out",
    "accuracy": "class accuracy",
    "distance": "Frechet distance",
}

TEXT = """## Replacing codes in a GPT's training (`loss.replace_prob`)

Written by `python -m benchmarks.replacement`: `gpt_mnist.yaml` for {steps:,} steps, each time with a different
fraction of random codes in its input. Nothing else differs. Samples are drawn without guidance and judged as
above; one run each.
"""


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--replace-prob", type=float, nargs="+", default=[0.0, 0.1, 0.3, 0.5])
    arguments.add_argument("--steps", type=int, default=800)
    arguments.add_argument("--minutes", type=float, default=2.0, help="processor time of the tokenizer's training")
    arguments.add_argument("--dir", type=Path, default=Path("runs/replacement"))
    arguments.add_argument("--results", type=Path, default=Path("docs/results.md"))
    options = arguments.parse_args()
    there = Runs("mnist", 0, [options.minutes, 0.0], options.dir)
    codes = there.tokenizer(BASE) / "codes"
    rows = []
    for share in options.replace_prob:
        run = options.dir / f"{share:g}"
        settings = [f"codes={codes}", f"run.dir={run}", "run.trackers=[]", f"loss.replace_prob={share}"]
        settings += [f"train.max_steps={options.steps}"]
        settings += [f"train.{what}_every={max(1, options.steps // 2)}" for what in ("validate", "checkpoint")]
        train(load_config(PriorTrainingConfig, CONFIGS / "prior" / "gpt_mnist.yaml", settings))
        file = run / "evaluation" / "evaluation.json"
        if not file.is_file():
            evaluate_prior(run, codes=codes, features=there.judge).write(file.parent)
        figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
        training = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["split"] == "train"]
        rows.append(
            {"name": f"{share:g}", "train": f"{training[-1]:.3f}", "nats": f"{figures['nats_per_code']:.3f}",
             "accuracy": f"{figures['class_accuracy']:.1%}", "distance": figures["frechet_distance"]}
        )  # fmt: skip
    text = TEXT.format(steps=options.steps) + "\n" + markdown_table(COLUMNS, rows)
    write_section(options.results, "replacement", text)
    report({"steps": options.steps}, rows, options.json)


if __name__ == "__main__":
    main()
