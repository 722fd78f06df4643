"""The sample sheets of a training: images of every class from the same random numbers each time."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from stage2_prior.prior import Prior
from stage2_prior.sampling import image_seeds
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.data.spread import spread
from twostage.core.images.sheets import class_sheet, prompt_sheet

__all__ = ["Decoder", "draw_samples"]

ABOUT, MAX_CLASSES = 12, 40
"""Images to draw if there are few classes; classes to draw if there are many."""

Decoder = Callable[[Tensor], Tensor]
"""Turns codes (B, h, w) into images (B, C, H, W) uint8 on the CPU. Stage two knows no tokenizer: the caller has one."""


@torch.no_grad()
def draw_samples(prior: Prior, decode: Decoder, seed: int) -> Image.Image:
    """A sheet of samples with the default sampling settings, as `twostage generate --seed SEED` draws them.

    One image for each class that has training images, or for some held-out captions. Of many classes, evenly spaced
    ones are drawn; of few classes, several images each.
    """
    prior.eval()
    names = prior.config.class_names or []
    trained = [label for label, name in enumerate(names) if name not in prior.config.untrained_classes]
    shown = [trained[row] for row in spread(len(trained), MAX_CLASSES).tolist()] if trained else []
    prompts = prior.example_prompts()[:ABOUT]
    shown = shown if not prompts or prior.needs("class") else []
    count = len(shown) * max(1, round(ABOUT / len(shown))) if shown else ABOUT
    given: dict[str, Tensor] = {}
    if shown:
        given["class"] = torch.tensor([shown[i % len(shown)] for i in range(count)])
    if prompts:
        given["text"] = prior.parse("text", [prompts[i % len(prompts)] for i in range(count)])
    images = decode(prior.sample(given, SamplingConfig(), image_seeds(seed, 0, count)))
    return prompt_sheet(images, prompts) if prompts else class_sheet(images, [names[label] for label in shown], shown)
