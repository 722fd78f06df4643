"""The families of the tour in the order of their story: what each is, and how its configuration differs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "Family", "document_of", "merged"]


@dataclass(frozen=True)
class Family:
    """One station of the tour."""

    title: str
    what: str
    """In one sentence."""
    equation: str
    """In plain text."""
    change: str
    """Against the one before, or ``parent``."""
    file: str
    """Where it is implemented."""
    parent: str | None
    """The family whose configuration it starts from."""
    document: Mapping[str, Any] = field(default_factory=dict)
    """What it changes of that."""
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


def one_type(there: Mapping[str, Any], changes: Mapping[str, Any]) -> bool:
    """Whether a group stays of its type."""
    return there.get("type") == changes.get("type", there.get("type"))


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, group by group; a group of another `type` is taken whole."""
    document = dict(base)
    for key, value in changes.items():
        there = document.get(key)
        if isinstance(there, Mapping) and isinstance(value, Mapping) and one_type(there, value):
            document[key] = merged(there, value)
        else:
            document[key] = value
    return document


FAMILIES = {
    "ae": Family(
        "Autoencoder (AE)",
        "An encoder squeezes an image into a short vector z, a decoder makes the image of it again.",
        "z = E(x);  minimise |x - D(z)|^2",
        "It is where the story begins: 32 numbers for an image, and nothing is asked of them but that they suffice.",
        "stage1_tokenizer/autoencoder.py",
        None,
        TOKENIZER,
    ),
    "dae": Family(
        "Denoising autoencoder (DAE)",
        "It sees a damaged image and has to give back the clean one, so it must learn what images look like.",
        "z = E(damaged x);  minimise |x - D(z)|^2",
        "Against the AE: its inputs are noisy and a third of their values is missing; the target stays clean.",
        "stage1_tokenizer/losses.py",
        "ae",
        {"loss": {"corruption": {"masked_share": 0.3, "noise_std": 0.2}}},
    ),
    "vae": Family(
        "Variational autoencoder (VAE)",
        "The encoder gives a distribution instead of a point, and all of them together are pressed towards N(0, 1), so "
        "that a draw from N(0, 1) is something that the decoder knows.",
        "minimise E_q[-log p(x | z)] + KL(q(z | x) || N(0, 1)),  q(z | x) = N(mean(x), std(x)^2)",
        "Against the AE: noise in z and the KL term. It is the first that makes new images; they are blurry, since one "
        "z stands for many images and the best answer to all of them is their mean.",
        "stage1_tokenizer/continuous.py",
        "ae",
        {"model": {"bottleneck": {"type": "gaussian"}}, "train": {"max_grad_norm": 1000.0}},
    ),
    "cvae": Family(
        "Class-conditional VAE (CVAE)",
        "A VAE whose z of a class is pressed towards a learned mean of that class: one can ask for a class.",
        "minimise E_q[-log p(x | z)] + KL(q(z | x) || N(m_class, 1))",
        "Against the VAE: the prior's mean belongs to the class. Its samples are of the class; they are as blurry.",
        "stage1_tokenizer/continuous.py",
        "vae",
        {"model": {"bottleneck": {"type": "class_gaussian"}}},
    ),
    "vqvae": Family(
        "VQ-VAE",
        "An image becomes a grid of codes: each vector of the encoder is replaced by the nearest one of a codebook.",
        "k = argmin_j |E(x) - e_j|;  minimise |x - D(e_k)|^2 + beta |E(x) - sg(e_k)|^2",
        "Against the AE: a convolutional network that keeps a grid of cells, and 256 codes instead of numbers. Nothing "
        "presses the codes towards a distribution, so nothing blurs them; but which grids are images it cannot say: "
        "that is the second stage's part.",
        "stage1_tokenizer/vector_quantizer.py",
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
        "A VQ-VAE that is judged by how images look: by the features of a network, and by a discriminator.",
        "minimise |x - D(e_k)| + w1 |F(x) - F(D(e_k))|^2 - w2 C(D(e_k)) + the codebook's terms;  C learns to tell x "
        "from D(e_k)",
        "Against the VQ-VAE: L1, a perceptual and an adversarial term. A mean of several sharp edges is a grey one, "
        "which the squared error likes and a discriminator recognises. Its steps cost more, so it gets fewer of them.",
        "stage1_tokenizer/discriminator.py, stage1_tokenizer/perceptual.py",
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
        "Stage two: a convolutional network writes the grid of codes, one after another, each given those before.",
        "p(k | class) = product over i of p(k_i | k_1 ... k_(i-1), class)",
        "Against the VAEs: the distribution of z is learned after the codes and not pressed upon them.",
        "stage2_prior/pixelcnn.py",
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
        "The same, written by a transformer: each code sees all those before it and not its neighbours alone.",
        "p(k | class) = product over i of p(k_i | k_1 ... k_(i-1), class), by attention",
        "Against the PixelCNN: attention instead of convolutions. It must learn what a neighbour is, which takes time.",
        "stage2_prior/causal_transformer.py",
        "pixelcnn",
        {
            "model": {"type": "causal_transformer", **TRANSFORMER},
            "loss": {"replace_prob": 0.05},
            "train": {"lr": 3e-3},
        },
        is_prior=True,
    ),
    "maskgit": Family(
        "Masked transformer (MaskGIT)",
        "A transformer that sees all cells fills in masked codes, in a few parallel steps, the surest ones first.",
        "minimise the sum over masked i of -log p(k_i | the codes not masked, class)",
        "Against the GPT: no order, a whole image in 8 steps instead of one for each code, and any part can be given. "
        "Its nats are an upper bound.",
        "stage2_prior/masked_transformer.py",
        "gpt",
        {"model": {"type": "masked_transformer", **TRANSFORMER}, "loss": {"replace_prob": 0.0}},
        is_prior=True,
    ),
}
"""By the name of their run folder."""


def document_of(name: str) -> dict[str, Any]:
    """The configuration of a family: what its parents say, changed by what it says itself."""
    family = FAMILIES[name]
    return merged(document_of(family.parent) if family.parent else {}, family.document)
