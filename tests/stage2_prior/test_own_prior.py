"""A prior from outside the package is registered, trained and sampled by the commands like any other."""

import json
from typing import Literal

import pytest
import torch
import yaml
from messages import assert_names, refuses
from torch import Tensor, nn

from stage2_prior.networks.autoregressive import Autoregressive, Step, cell_order
from stage2_prior.networks.causal_transformer import CausalTransformer
from stage2_prior.networks.network import NetworkConfig
from stage2_prior.prior import Prior, PriorConfig
from stage2_prior.sampling import image_seeds
from stage2_prior.sampling_config import SamplingConfig, Weights
from twostage.core.conditions.context import Context, ContextForm, ContextSpace


class UnigramConfig(NetworkConfig):
    """The frequency of each code in images of a class, the same in every cell."""

    type: Literal["unigram"] = "unigram"

    def build(self, codebook_size: int, grid: tuple[int, int], form: ContextForm) -> "Unigram":
        return Unigram(codebook_size, grid, form)

    def context_space(self, grid: tuple[int, int]) -> ContextSpace:
        return ContextSpace(1, 1.0, grid)


class Unigram(Autoregressive):
    """p(codes | class) = prod p(code | class)."""

    def __init__(self, codebook_size: int, grid: tuple[int, int], form: ContextForm) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.register_buffer("order", cell_order("raster", grid), persistent=False)
        self.logits = nn.Embedding(form.num_classes + 1, codebook_size)

    def forward(self, inputs: Tensor, context: Context) -> Tensor:
        return self.logits(context.labels)[:, None].expand(-1, inputs.shape[1], -1)

    def decoder(self, context: Context, weights: Weights) -> Step:
        logits = self.logits(context.labels)
        return lambda codes: logits


@pytest.fixture
def config(monkeypatch, tmp_path, runs):
    """A config file that trains it."""
    monkeypatch.setattr(NetworkConfig, "registered", dict(NetworkConfig.registered))
    NetworkConfig.register(UnigramConfig)
    train = {"batch_size": 16, "max_steps": 60, "lr": 0.1, "validate_every": 30, "checkpoint_every": 30}
    document = {
        "run": {"dir": str(tmp_path / "run"), "trackers": []},
        "codes": str(runs.codes),
        "model": {"type": "unigram"},
        "train": train,
    }
    (tmp_path / "unigram.yaml").write_text(yaml.safe_dump(document))
    return tmp_path / "unigram.yaml"


def test_the_commands_train_and_sample_it(config, works, twostage, tmp_path):
    run, images, refused = tmp_path / "run", tmp_path / "images", tmp_path / "refused"
    works("train-prior", config)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    final = [line for line in lines if line["split"] == "val"][-1]
    assert final["loss"] < final["unigram"] < final["uniform"], "it knows the class, the baseline does not"
    assert "nothing left to do" in works("train-prior", config)

    works("generate", run, "--num-images", 8, "--guidance-scale", 2, "--top-k", 5, "--out", images)
    image = images / "images" / "000000.png"
    works("inpaint", run, image, "bottom", "--out", tmp_path / "lower")
    assert_names(twostage("inpaint", run, image, "left", "--out", refused).err, "unigram", "bottom")
    ended = twostage("generate", run, "--num-steps", 4, "--out", refused)
    assert_names(ended.err, "num_steps 4", "masked_transformer", "unigram")
    assert not refused.exists()


def test_a_network_may_change_a_gpt_without_its_config(tmp_path):
    """Sampling reads the network itself, not the number of blocks in the config."""
    config = {"codebook_size": 5, "grid": (2, 3), "image_size": 8, "channels": 3}
    gpt = {"type": "causal_transformer", "hidden_size": 16, "depth": 2, "num_heads": 2, "dropout": 0.0}
    prior = Prior(PriorConfig.model_validate(config | {"model": gpt})).eval()
    assert isinstance(prior.network, CausalTransformer)
    prior.network.blocks = prior.network.blocks[:1]
    assert prior.sample(seeds=range(3)).shape == (3, 2, 3)
    with refuses("network.blocks.1", "missing", "docs/extending.md"):
        prior.save_pretrained(tmp_path / "prior")


def test_its_samples_have_its_frequencies(config, works, tmp_path):
    works("train-prior", config)
    prior = Prior.from_pretrained(tmp_path / "run")
    codes = prior.sample(torch.zeros(2000, dtype=torch.long), SamplingConfig(), image_seeds(0, 0, 2000))
    shares = prior.network.logits.weight[0].softmax(0).detach()  # type: ignore[attr-defined]
    torch.testing.assert_close(
        codes.flatten().bincount(minlength=len(shares)) / codes.numel(), shares, atol=0.01, rtol=0
    )
