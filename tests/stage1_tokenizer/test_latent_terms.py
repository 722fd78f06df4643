"""The terms on the encoder's output: their equations, what they teach an encoder, and how training uses them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from messages import refuses
from safetensors.torch import load_file
from torch import Tensor

from stage1_tokenizer.features.imagenet_network import LOSS_WEIGHTS, is_installed
from stage1_tokenizer.losses import semantic_term
from stage1_tokenizer.losses.causal_term import CausalTermConfig
from stage1_tokenizer.losses.latent_term import LatentTermConfig, LatentTerms, latent_gradient
from stage1_tokenizer.losses.semantic_term import FEATURES, SemanticTerm, SemanticTermConfig
from stage1_tokenizer.tokenizer_training import TokenizerConfig, train
from stage1_tokenizer.training_losses import LossConfig
from twostage.core.config.sections import parse_config

TRAINING = (train, TokenizerConfig)
SMALL = CausalTermConfig(width=8, layers=2, heads=2)
IMAGE = (3, 16, 16)


def encodings(count: int = 4, channels: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, 2, 3, generator=torch.Generator().manual_seed(seed))


def causal() -> torch.nn.Module:
    torch.manual_seed(0)
    return SMALL.build((5, 2, 3), IMAGE)


def test_a_prediction_depends_on_earlier_cells_alone():
    term = causal().double()
    cells = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.double, requires_grad=True)
    for place in range(5):
        (gradient,) = torch.autograd.grad(term.predictions(cells)[0, place].sum(), cells)
        seen = gradient[0].abs().sum(1) > 0
        assert seen.tolist() == [earlier <= place for earlier in range(5)]


def test_the_causal_loss_and_its_gradient_by_hand():
    """mean_i |f(x_1 ... x_i) - x_(i+1)|^2 for cells of mean square 1, with a gradient to inputs and targets."""
    term, encoded = causal(), encodings().requires_grad_()
    loss = term(encoded, torch.zeros(4, *IMAGE))
    cells = [encoded[:, :, row, column] for row in range(2) for column in range(3)]
    cells = [cell * (5 / cell.square().sum(1, keepdim=True)).sqrt() for cell in cells]
    predicted = term.predictions(torch.stack(cells[:-1], 1))
    expected = torch.stack([(predicted[:, i] - cells[i + 1]).square().mean() for i in range(5)]).mean()
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, encoded, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(term(1e-3 * encoded, torch.zeros(4, *IMAGE)), loss)  # shrinking does not help


def test_the_causal_term_learns_what_can_be_predicted():
    losses = {}
    for name, data in {"repeated": encodings(64)[:, :, :1, :1].expand(-1, -1, 2, 3), "noise": encodings(64)}.items():
        term = causal()
        optimizer = torch.optim.Adam(term.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            loss = term(data, torch.zeros(64, *IMAGE))
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["repeated"] < 0.3 * losses["noise"]


def test_the_causal_term_makes_an_encoder_predictable():
    term, points = causal(), encodings(64).requires_grad_()
    optimizer = torch.optim.Adam([points, *term.parameters()], lr=1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(term(points, torch.zeros(64, *IMAGE)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


class Seen(torch.nn.Module):
    """Stands in for the ImageNet network: its last stage is given."""

    def __init__(self, stage: Tensor) -> None:
        super().__init__()
        self.stage = stage

    def stages(self, images: Tensor, count: int) -> list[Tensor]:
        assert count == semantic_term.STAGES
        assert min(images.shape[2:]) >= semantic_term.MIN_SIDE
        assert images.shape[1] == 3
        return [self.stage]


@pytest.fixture
def semantic(monkeypatch) -> SemanticTerm:
    """A term whose ImageNet features are given, one for each of 2 x 3 cells."""
    monkeypatch.setattr(semantic_term, "ImageNetNetwork", Seen)
    torch.manual_seed(0)
    features = torch.randn(4, FEATURES, 2, 3, generator=torch.Generator().manual_seed(2))
    return SemanticTerm(SemanticTermConfig(width=16), 5, Seen(features))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_semantic_loss_is_a_mean_cosine(semantic, channels):
    encoded = encodings().requires_grad_()
    loss = semantic(encoded, torch.zeros(4, channels, 16, 16))
    wanted = semantic._hidden[0].stage.double()
    found = semantic.project(encoded.movedim(1, -1)).movedim(-1, 1).double()
    cosines = (found * wanted).sum(1) / (found.norm(dim=1) * wanted.norm(dim=1))
    torch.testing.assert_close(loss.double(), 1 - cosines.mean(), rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, encoded, retain_graph=True)[0] for value in (loss, 1 - cosines.mean())]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_the_imagenet_network_is_neither_trained_nor_stored(semantic):
    assert {name.partition(".")[0] for name in semantic.state_dict()} == {"project"}
    assert all(name.startswith("project") for name, _ in semantic.named_parameters())


@pytest.mark.skipif(not is_installed(), reason="needs the extra imagenet")
def test_features_lie_where_they_are_seen():
    term = SemanticTermConfig(width=16).build((5, 8, 8), (1, 28, 28))
    images = torch.full((2, 1, 28, 28), -1.0)
    images[1, :, :8, :8] = 1.0
    features = term.features(images, (7, 7))
    assert features.shape == (2, FEATURES, 7, 7)
    changed = (features[1] - features[0]).norm(dim=0)
    assert changed[:3, :3].mean() > 1.5 * changed[4:, 4:].mean()


@pytest.mark.parametrize(("progress", "weight"), [(0.0, 0.0), (0.05, 2.0), (0.1, 4.0), (1.0, 4.0)])
def test_the_encoder_gets_the_weighted_gradient_and_the_networks_the_whole(progress, weight):
    torch.manual_seed(0)
    terms, encoded = LatentTerms([SMALL], (5, 2, 3), IMAGE), encodings()
    images = torch.zeros(4, *IMAGE)
    gradient, own, metrics = latent_gradient(SimpleNamespace(wrapped=terms, module=terms), encoded, images, progress)
    point = encoded.clone().requires_grad_()
    expected = weight * terms.terms["causal"](point, images)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, point)[0])
    torch.testing.assert_close(metrics, {"causal": own.detach()})
    own.backward()
    assert all(weights.grad.abs().sum() > 0 for weights in terms.parameters())


def test_weights_without_a_ramp_hold_from_the_start():
    assert LatentTermConfig.registered.keys() >= {"causal", "semantic"}
    assert SemanticTermConfig(weight=0.3).weight_at(0.0) == 0.3


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def document(tmp_path) -> dict:
    return {
        "run": {"dir": str(tmp_path / "run"), "seed": 3, "trackers": []},
        "data": {"source": "shapes", "image_size": 16, "num_images": 64},
        "model": {
            "latent_channels": 4,
            "backbone": {"type": "conv", "channels": 8, "channel_mult": [1, 1], "num_res_blocks": [0, 1]},
            "bottleneck": {"type": "vector", "codebook_size": 8},
        },
        "loss": {"latents": [{"type": "causal", "width": 8, "heads": 2, "ramp": 0.5}], "equivariance": {}},
        "train": {"batch_size": 12, "max_steps": 6, "lr": 1e-3, "validate_every": 6, "checkpoint_every": 2,
                  "log_every": 2, "ema_decay": 0.9, "gradient_accumulation_steps": 2},
    }  # fmt: skip


def test_a_killed_run_with_latent_terms_ends_as_if_uninterrupted(document, start):
    run = start(document)
    paths = sorted(path for path in run.rglob("*.safetensors"))
    assert "step_00000006/latent_terms.safetensors" in {str(p.relative_to(run / "checkpoints")) for p in paths[:-1]}
    kept = {path: path.read_bytes() for path in paths}
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}", ignore_errors=True)
    start(document)
    assert {path: path.read_bytes() for path in kept} == kept
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"causal", "latent_terms_grad_norm"} <= line.keys()
    assert not [name for name in load_file(run / "model" / "model.safetensors") if "causal" in name]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": {"latents": [{"type": "causal"}, {"type": "causal"}]}}, ["loss.latents", "causal, causal", "once"]),
        ({"loss": {"latents": [{"type": "causl"}]}}, ["loss.latents", "'causl'", "causal"]),
        ({"loss": {"latents": [{"type": "causal", "width": 6}]}}, ["heads 4", "width 6", "Change one"]),
        ({"loss": {"equivariance": {"min_scale": 0}}}, ["min_scale", "greater than 0"]),
    ],
)
def test_bad_settings_are_refused(document, changes, said):
    with refuses(*said):
        parse_config(TokenizerConfig, document | changes, "config")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"backbone": {"type": "mlp"}}}, ["loss.equivariance", "model.backbone.type=conv"]),
        (
            {"model": {"backbone": {"type": "mlp"}}, "loss": {"latents": [{"type": "causal"}]}},
            ["loss.latents causal", "1x1", "model.backbone.type=conv"],
        ),
        (
            {"loss": {"equivariance": {}, "adversarial": {"num_layers": 1}}},
            ["loss.adversarial.num_layers 1", "4x4", "Use fewer layers"],
        ),
    ],
)
def test_models_that_do_not_suit_are_refused(document, changes, said, start):
    with refuses(*said):
        start(document | changes)


def test_latent_terms_need_a_trained_encoder(document, start, tmp_path):
    start(document)
    document["run"]["dir"] = str(tmp_path / "second")
    with refuses("loss.latents", "'decoder'", "loss.latents=[]"):
        start(document | {"init_from": str(tmp_path / "run"), "train": document["train"] | {"parts": "decoder"}})


def test_the_model_remembers_the_imagenet_network():
    from accelerate import Accelerator

    from stage1_tokenizer.autoencoder import Autoencoder
    from stage1_tokenizer.autoencoder_config import AutoencoderConfig
    from stage1_tokenizer.training_losses import ImageLosses

    model = Autoencoder(AutoencoderConfig(image_size=16))
    for config, expected in (({"type": "semantic"}, [LOSS_WEIGHTS.sha256]), ({"type": "causal"}, [])):
        losses = ImageLosses(LossConfig.model_validate({"latents": [config]}), model, None, None, Accelerator(cpu=True))
        assert [network.hash for network in losses.networks()] == expected
