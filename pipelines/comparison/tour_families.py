"""The families of the tour in order, each with a description and its changes to an earlier configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FAMILIES", "Family", "document_of", "merged"]


@dataclass(frozen=True)
class Family:
    """One stop of the tour."""

    title: str
    summary: str
    equation: str
    change: str
    """The difference from an earlier family."""
    file: str
    """The file that implements it."""
    parent: str | None
    """The family whose configuration this one changes; None: it starts from nothing."""
    document: Mapping[str, Any]
    """The changes."""
    is_prior: bool = False


TOKENIZER = {
    "model": {
        "latent_channels": 32,
        "backbone": {"type": "mlp", "hidden_sizes": [512, 256]},
        "bottleneck": {"type": "identity"},
    },
    "loss": {"reconstruction": "l2", "likelihood_scale": 0.5},
    "train": {"batch_size": 64, "lr": 2e-3, "lr_schedule": "cosine", "ema_decay": 0.995, "mixed_precision": "auto"},
}
PRIOR = {
    "loss": {"replace_prob": 0.0, "class_dropout_prob": 0.1},
    "train": {
        "batch_size": 32,
        "lr_schedule": "cosine",
        "weight_decay": 0.05,
        "betas": [0.9, 0.95],
        "max_grad_norm": 1.0,
        "ema_decay": 0.995,
        "mixed_precision": "auto",
    },
}
TRANSFORMER = {"hidden_size": 128, "depth": 4, "num_heads": 4, "dropout": 0.0}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, group by group; a group whose `type` changes is replaced as a whole."""
    document = dict(base)
    for key, value in changes.items():
        there = document.get(key)
        if isinstance(there, Mapping) and isinstance(value, Mapping):
            same_type = value.get("type", there.get("type")) == there.get("type")
            value = merged(there, value) if same_type else value
        document[key] = value
    return document


FAMILIES = {
    "ae": Family(
        "Autoencoder (AE)",
        "An encoder compresses an image into a short vector z, and a decoder restores the image from it.",
        "z = E(x);  minimise |x - D(z)|^2",
        "The starting point: 32 numbers per image, whose only task is to be enough for the decoder.",
        "stage1_tokenizer/autoencoder.py",
        None,
        TOKENIZER,
    ),
    "dae": Family(
        "Denoising autoencoder (DAE)",
        "It gets a corrupted image and must restore the clean one, so it has to learn what images look like.",
        "z = E(corrupted x);  minimise |x - D(z)|^2",
        "Compared with the AE: its inputs are noisy and a third of their values is missing; the target stays clean.",
        "stage1_tokenizer/losses/objective.py",
        "ae",
        {"loss": {"corruption": {"masked_share": 0.3, "noise_std": 0.2}}},
    ),
    "vae": Family(
        "Variational autoencoder (VAE)",
        "The encoder returns a distribution instead of a point. Training pulls these distributions towards N(0, 1), so "
        "the decoder can decode a draw from N(0, 1).",
        "minimise E_q[-log p(x | z)] + KL(q(z | x) || N(0, 1)),  q(z | x) = N(mean(x), std(x)^2)",
        "Compared with the AE: noise in z, and the KL term. It is the first family that makes new images. They are "
        "blurry, because one z stands for many images and the best guess for all of them is their mean.",
        "stage1_tokenizer/bottlenecks/continuous.py",
        "ae",
        {"model": {"bottleneck": {"type": "gaussian"}}, "train": {"max_grad_norm": 1000.0}},
    ),
    "cvae": Family(
        "Class-conditional VAE (CVAE)",
        "A VAE that pulls z towards a learned mean of the image's class, so you can ask for a class.",
        "minimise E_q[-log p(x | z)] + KL(q(z | x) || N(m_class, 1))",
        "Compared with the VAE: each class has its own mean in the prior. Samples show the class, but are as blurry.",
        "stage1_tokenizer/bottlenecks/continuous.py",
        "vae",
        {"model": {"bottleneck": {"type": "class_gaussian"}}},
    ),
    "vqvae": Family(
        "VQ-VAE",
        "An image becomes a grid of codes: the nearest vector of a codebook replaces each vector of the encoder.",
        "k = argmin_j |E(x) - e_j|;  minimise |x - D(e_k)|^2 + beta |E(x) - sg(e_k)|^2",
        "Compared with the AE: a convolutional network that keeps a grid of cells, and 256 codes instead of numbers. "
        "Nothing pulls the codes towards a distribution, so nothing blurs them. But the model cannot tell which grids "
        "are images: that is the task of stage two.",
        "stage1_tokenizer/bottlenecks/vector_quantizer.py",
        "ae",
        {
            "model": {
                "latent_channels": 32,
                "backbone": {"type": "conv", "channels": 16, "channel_mult": [1, 2, 4], "num_res_blocks": [0, 0, 1]},
                "bottleneck": {"type": "vector", "codebook_size": 256},
            },
            "train": {"batch_size": 32, "warmup_steps": 50},
        },
    ),
    "vqgan": Family(
        "VQ-GAN",
        "A VQ-VAE that is trained by how images look: by the features of a network, and by a discriminator.",
        "minimise |x - D(e_k)| + w1 |F(x) - F(D(e_k))|^2 - w2 C(D(e_k)) + the codebook's terms;  C learns to tell x "
        "from D(e_k)",
        "Compared with the VQ-VAE: L1, a perceptual and an adversarial term. The mean of several sharp edges is a grey "
        "edge. The squared error rewards it, but a discriminator recognises it. Steps take longer, so fewer fit.",
        "stage1_tokenizer/losses/discriminator.py, stage1_tokenizer/losses/perceptual.py",
        "vqvae",
        {
            "loss": {
                "reconstruction": "l1",
                "perceptual": {"type": "features", "weight": 0.3},
                "adversarial": {
                    "loss": "hinge",
                    "weight": 0.02,
                    "start": 0.4,
                    "ramp": 0.2,
                    "channels": 16,
                    "num_layers": 2,
                },
            },
            "train": {"lr": 1e-3},
        },
    ),
    "pixelcnn": Family(
        "Gated PixelCNN",
        "Stage two: a convolutional network samples the codes of the grid one by one, each given the codes before it.",
        "p(k | class) = product over i of p(k_i | k_1 ... k_(i-1), class)",
        "Compared with the VAEs: the distribution of the codes is learned afterwards instead of being imposed on them.",
        "stage2_prior/networks/pixelcnn.py",
        None,
        merged(
            PRIOR,
            {
                "model": {"type": "pixelcnn", "channels": 64, "depth": 8, "head_channels": 128, "dropout": 0.0},
                "train": {"lr": 1.5e-3},
            },
        ),
        is_prior=True,
    ),
    "gpt": Family(
        "GPT (causal transformer)",
        "The same with a transformer: each code depends on all codes before it, not only on its neighbours.",
        "p(k | class) = product over i of p(k_i | k_1 ... k_(i-1), class), by attention",
        "Compared with the PixelCNN: attention instead of convolutions. It has to learn what a neighbour is.",
        "stage2_prior/networks/causal_transformer.py",
        "pixelcnn",
        {"model": {"type": "causal_transformer", **TRANSFORMER}, "loss": {"replace_prob": 0.05}, "train": {"lr": 3e-3}},
        is_prior=True,
    ),
    "maskgit": Family(
        "Masked transformer (MaskGIT)",
        "A transformer that sees all cells fills in masked codes in a few parallel steps, the most certain ones first.",
        "minimise the sum over masked i of -log p(k_i | the codes not masked, class)",
        "Compared with the GPT: no order, a whole image in 8 steps instead of one step per code, and any part of the "
        "image can be given. Its nats are an upper bound.",
        "stage2_prior/networks/masked_transformer.py",
        "gpt",
        {"model": {"type": "masked_transformer", **TRANSFORMER}, "loss": {"replace_prob": 0.0}},
        is_prior=True,
    ),
}
"""The families by the names of their run folders."""


def document_of(name: str) -> dict[str, Any]:
    """The configuration of a family: that of its parent with its own changes."""
    family = FAMILIES[name]
    return merged(document_of(family.parent) if family.parent else {}, family.document)
