"""The `twostage` command: one verb a task. Only the verb that is asked for is imported, so that help is instant."""

import importlib
import sys

from twostage.core.machine.command import as_command, new_app, prepare_process

__all__ = ["main"]

VERBS = {
    "inspect": ("pipelines.inspect_data", "Show what a data source holds: splits, classes, sizes, bad files."),
    "train-tokenizer": ("stage1_tokenizer.train_tokenizer", "Train a tokenizer (or AE, VAE ...) from a config."),
    "train-features": (
        "stage1_tokenizer.train_features",
        "Train a feature network: for perceptual losses, Frechet distances, class accuracy.",
    ),
    "import": (
        "pipelines.import_tokenizer",
        "Import a published VQ tokenizer: taming-transformers, diffusers or LlamaGen.",
    ),
    "encode": ("pipelines.encode_dataset", "Encode a dataset with a trained tokenizer."),
    "train-prior": ("stage2_prior.train_prior", "Train a prior over a tokenizer's codes."),
    "generate": ("pipelines.generate", "Generate images with a trained prior and its tokenizer."),
    "evaluate": (
        "pipelines.evaluate",
        "Measure a tokenizer, and say whether it is ready for stage two; or measure a prior.",
    ),
    "reconstruct": ("pipelines.reconstruct", "Show images over their reconstructions."),
    "interpolate": ("pipelines.interpolate", "Show what lies between two images."),
    "inpaint": ("pipelines.inpaint", "Redraw the masked part of an image."),
    "outpaint": ("pipelines.outpaint", "Go on with an image beyond its borders."),
    "compare": ("pipelines.compare", "Show trained models side by side, or train all families and tell their story."),
    "export": ("pipelines.export", "Write a model as a folder to share, and as ONNX and torch.export programs."),
    "app": ("pipelines.app", "Open a page in the browser to play with a trained model."),
    "doctor": ("pipelines.doctor", "Check this machine: versions, devices, processes, disk, weights."),
}


def main() -> None:
    """Run `twostage VERB ...`."""
    prepare_process()
    app = new_app("Train an image generator in two stages on your own pictures: first a tokenizer, then a prior.")
    app.callback()(lambda: None)  # keeps the verb in the usage line, also while there is only one
    asked = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    for verb, (module, summary) in VERBS.items():
        if verb == asked:
            app.command(verb)(as_command(importlib.import_module(module).command))
        else:
            app.command(verb, help=summary)(lambda: None)
    app(prog_name="twostage")


if __name__ == "__main__":
    main()
