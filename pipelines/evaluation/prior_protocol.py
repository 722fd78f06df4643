"""How the figures of an evaluated prior came about, in plain JSON: what stands beside them."""

from typing import Any

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.evaluation.frechet import InceptionFeatures, OwnFeatures
from pipelines.evaluation.prior_measurements import BOUND_DRAWS, BOUND_SEED, MANY_COPIES, SampleFigures
from pipelines.evaluation.sample_quality import NEIGHBOURS, SUBSETS
from stage1_tokenizer.losses import ObjectiveConfig
from stage2_prior.prior import Prior
from stage2_prior.sampling import SamplingConfig

__all__ = ["about_chain_rule", "about_likelihood", "about_samples"]


def about_likelihood(model: Prior) -> dict[str, Any]:
    """What the figures of the codes mean."""
    config = model.config
    dimensions = " x ".join(map(str, (*config.image_size, config.channels)))
    kind: dict[str, Any] = {"kind": "exact"}
    if not model.exact_likelihood:
        kind = {
            "kind": "upper bound (any-order autoregression), not to be compared with exact figures as if it were one",
            "draws": BOUND_DRAWS,
            "seed": BOUND_SEED,
            "standard_error": "by the draws alone, the code grids being as they are",
        }
    return kind | {
        "of": "the codes given the image's class" if model.num_classes else "the codes",
        "bits_per_dim": f"nats per image / (ln 2 x {dimensions}): what the codes take for each value of the image",
        "unigram": "the training split's code frequencies, add-one smoothing; cost of the whole held-out split",
        "uniform": f"ln {config.codebook_size} nats per code",
    }


def about_chain_rule(
    pipeline: TwoStagePipeline, likelihood: ObjectiveConfig, fitted: int, level_bits: float
) -> dict[str, Any]:
    """What the bound of the whole model is made of."""
    given = " | class" if pipeline.class_names else ""
    tokenizer = pipeline.tokenizer.config
    density = {"bce": "Bernoulli", "l1": "Laplace", "l2": "Gaussian"}[likelihood.reconstruction]
    about: dict[str, Any] = {
        "of": "the images given their class" if given else "the images",
        "bound": f"-log p(x{given}) <= -log p(x | decoder(codes(x))) - log p(codes(x){given}); held-out images encoded "
        "anew, no noise",
        "likelihood": density,
        "level_bits": level_bits,
    }
    if likelihood.reconstruction == "bce":
        about["note"] = "a grey value counts as a probability: comparable with other Bernoulli figures only"
    else:
        about |= {
            "scale": likelihood.likelihood_scale,
            "scale_of": f"maximum likelihood on {fitted} training images, spread evenly, in units of [-1, 1]; the "
            "tokenizer was not trained with one",
            "note": "a density at the grey levels (bits: times a level's width), without dequantisation noise: not "
            "comparable with likelihoods of discrete pixels",
            "level": "the density is over [-1, 1]; level_bits per dimension are a grey level's width of 2/255 there",
        }
    if tokenizer.adversarial or tokenizer.trained_against:
        about["decoder"] = "trained for more than the reconstruction loss: it is not meant to make images likely"
    return about


def about_samples(
    samples: SampleFigures,
    sampling: SamplingConfig,
    seed: int,
    num_samples: int,
    pipeline: TwoStagePipeline,
    network: OwnFeatures | InceptionFeatures,
    split: str,
) -> dict[str, Any]:
    """How they were drawn, and what each of their figures is: a section of the protocol each."""
    about: dict[str, Any] = {
        "samples": {
            "seed": seed,
            "sampling": sampling.model_dump(mode="json"),
            "classes": "all in turn" if pipeline.class_names else None,
            "duplicates": num_samples - round(samples.figures["distinct_samples"]),
            "duplicates_allowed": f"{MANY_COPIES:.0%} of the samples",
            "pixels": "clipped and rounded to 8 bits",
            "class_accuracy": "share that the feature network gives their class; of as many held-out images likewise",
        },
        "frechet_distance": network.protocol,
    }
    if pipeline.prior:
        about["samples"]["codes_per_s"] = (
            "wall time of drawing the codes, all processes together, without decoding; on this machine"
        )
    if samples.refused:
        about["samples"]["refused"] = samples.refused
        return about
    counts, name = samples.counts, network.protocol["network"]
    about["inception_score"] = {
        "network": name,
        "classes": (
            "1008 logits without the bias, as published"
            if network.class_names is None
            else f"the network's own {len(network.class_names)}; not to be compared with scores by other networks"
        ),
        "splits": counts["inception_splits"],
        "chosen": "at random, the same for the same number of images",
    }
    if "training_images" not in counts:
        return about
    real = {"training_images": counts["training_images"], "held_out_images": counts["held_out_images"]}
    about["frechet_distance"] = {
        **network.protocol,
        **real,
        "frechet_distance": "samples against training images (the convention of gFID)",
        "frechet_distance_real": f"images of `{split}`, as many as samples where there are, against the same: a floor",
        **({"warning": samples.warning} if samples.warning else {}),
    }
    about["kernel_distance"] = {
        "network": name,
        **real,
        "kernel": "(x.y / features + 1)^3, unbiased",
        "subsets": SUBSETS,
        "subset_size": counts["kernel_subset_size"],
        "deviation": "of the subsets",
    }
    about["precision_recall"] = {
        "network": name,
        "neighbours": NEIGHBOURS,
        "samples": num_samples,
        "training_images": counts["precision_images"],
        "held_out_images": counts["held_out_images"],
        "chosen": "spread evenly over the training images: as many as samples, for a ball is smaller among more images",
    }
    about["neighbours"] = {
        "network": name,
        **real,
        "distance": "Euclidean, between features",
        "neighbour_distance_ratio": "median distance of samples to their nearest training image over that of images "
        f"of `{split}`: about 1 is new, far below 1 copied",
        "training_copies": "samples whose pixels are all those of a training image",
    }
    return about
