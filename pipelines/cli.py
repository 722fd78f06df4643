"""The `twostage` command. It only imports the verb that was called, so that help is instant."""

import importlib
import sys
from difflib import get_close_matches
from importlib.metadata import version

from twostage.core.machine.command import as_command, new_app, prepare_process

__all__ = ["main"]

VERBS = {
    "inspect": ("pipelines.inspect_data", "Show what a data source holds: splits, classes, sizes, unreadable files."),
    "train-tokenizer": (
        "pipelines.train_tokenizer",
        "Train a tokenizer or another autoencoder, by a config file or one that fits your images.",
    ),
    "train-features": (
        "stage1_tokenizer.train_features",
        "Train a feature network for perceptual losses, Frechet distances and class accuracy.",
    ),
    "embed": ("pipelines.embed", "Write what a network makes of each image: features, latents or codes."),
    "import": (
        "pipelines.import_tokenizer",
        "Import a pretrained VQ tokenizer from taming-transformers, diffusers or LlamaGen.",
    ),
    "encode": ("pipelines.encode_dataset", "Encode a dataset with a trained tokenizer."),
    "train-prior": ("pipelines.train_prior", "Train a prior over a tokenizer's codes."),
    "generate": ("pipelines.generate", "Generate images with a trained prior and its tokenizer."),
    "evaluate": (
        "pipelines.evaluate",
        "Measure a tokenizer and judge whether it is ready for stage two, or measure a prior.",
    ),
    "reconstruct": ("pipelines.reconstruct", "Show images above their reconstructions."),
    "interpolate": ("pipelines.interpolate", "Blend between two images."),
    "inpaint": ("pipelines.inpaint", "Redraw the masked part of an image."),
    "outpaint": ("pipelines.outpaint", "Extend an image beyond its borders."),
    "sweep": ("pipelines.sweep", "Train every combination of some settings, and show one table."),
    "compare": ("pipelines.compare", "Compare trained models side by side, or train all families and compare them."),
    "export": ("pipelines.export", "Export a model as a folder to share, and as ONNX and torch.export programs."),
    "app": ("pipelines.app", "Open a page in the browser to try a trained model."),
    "doctor": ("pipelines.doctor", "Check this machine: versions, devices, processes, disk, weights."),
}
"""The module and the summary of each verb."""


def main() -> None:
    """Run `twostage VERB ...`, or print the version."""
    prepare_process()
    if sys.argv[1:] == ["--version"]:
        print(f"twostage {version('twostage')}")
        sys.exit()
    app = new_app("Train an image generator on your own images in two stages: first a tokenizer, then a prior.")
    called = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    for verb, (module, summary) in VERBS.items():
        if verb == called:
            app.command(verb)(as_command(importlib.import_module(module).command))
        else:
            app.command(verb, help=summary)(lambda: None)
    if called is not None and called not in VERBS:
        words = {verb: [verb, *verb.split("-")] for verb in VERBS}
        near = [verb for verb in VERBS if verb.startswith(called) or get_close_matches(called, words[verb])]
        hint = f"Did you mean {' or '.join(near)}?" if near else "twostage --help lists all commands"
        print(f"error: No such command {called!r}. {hint}", file=sys.stderr)
        sys.exit(2)
    app(prog_name="twostage")


if __name__ == "__main__":
    main()
