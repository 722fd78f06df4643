import json
import math

import pytest
import torch
from messages import assert_names, refuses
from torch import nn

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.autoencoder_config import AutoencoderConfig
from stage1_tokenizer.training_losses import LossConfig
from twostage.core.errors import InputError
from twostage.core.runs.model_folder import save_model_folder

FAMILIES = [
    "identity",
    "gaussian",
    "class_gaussian",
    "vector",
    "learned",
    "simvq",
    "l2",
    "finite_scalar",
    "lookup_free",
    "residual",
    "gumbel_softmax",
    "binary_spherical",
    "index_backpropagation",
    "diveq",
    "projected",
    "product",
]
DISCRETE = FAMILIES[3:]
SHARED_CODES = ("lookup_free", "binary_spherical", "gumbel_softmax", "index_backpropagation")


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("backbone", ["mlp", "conv"])
@pytest.mark.parametrize("family", ["identity", "gaussian", "class_gaussian", "vector"])
def test_shapes(family, backbone, channels, size, tiny_autoencoder, random_images, whole_batch):
    model, images = tiny_autoencoder(family, backbone, size, channels), random_images(2, channels, size)
    grid = (1, 1) if backbone == "mlp" else (size[0] // 2, size[1] // 2)
    output, latent = model(images, torch.tensor([0, 2]), whole_batch(2)), model.encode(images)
    assert model.grid == grid
    assert output.loss.shape == ()
    assert model.to_images(output.decoded).shape == model.reconstruct(images).shape == images.shape
    assert latent.z.shape == (2, 4, *grid)
    assert latent.indices is None if family != "vector" else latent.indices.shape == (2, *grid)


@pytest.mark.parametrize("size", [(9, 8), (7, 13), (1, 1)])
@pytest.mark.parametrize("family", ["identity", "gaussian", "vector", "residual"])
def test_any_size_is_padded_and_cropped_back(family, size, tiny_autoencoder, random_images, whole_batch):
    model, images = tiny_autoencoder(family, size=size), random_images(2, size=size)
    assert model.reconstruct(images).shape == model(images, None, whole_batch(2)).decoded.shape == images.shape
    assert model.grid == (-(-size[0] // 2), -(-size[1] // 2))
    if family == "residual":
        codes = model.encode(images).indices
        assert codes.shape == (2, *model.code_grid) == (2, model.grid[0], 2 * model.grid[1])
        assert torch.equal(model.decode_indices(codes), model.reconstruct(images))


@pytest.mark.parametrize("reconstruction", ["bce", "l1", "l2"])
def test_beta_1_is_exactly_the_bound(reconstruction, tiny_autoencoder, random_images, whole_batch):
    images = random_images(4)
    metrics = tiny_autoencoder("gaussian", reconstruction=reconstruction)(images, None, whole_batch(4)).metrics
    assert metrics["loss"] == metrics["nats_per_image"]
    torch.testing.assert_close(metrics["nats_per_image"], metrics["reconstruction"] + metrics["kl"])
    level = 0 if reconstruction == "bce" else math.log2(255 / 2)
    expected = metrics["nats_per_image"] / (3 * 8 * 8 * math.log(2)) + level
    torch.testing.assert_close(metrics["bits_per_dim"], expected)


def test_beta_scales_only_the_kl(tiny_autoencoder, random_images, whole_batch):
    images = random_images(4)
    metrics = tiny_autoencoder("gaussian", kl_weight=4.0)(images, None, whole_batch(4)).metrics
    plain = tiny_autoencoder("gaussian")(images, None, whole_batch(4)).metrics
    torch.testing.assert_close(metrics["loss"], metrics["reconstruction"] + 4 * metrics["kl"])
    assert metrics["nats_per_image"] == plain["nats_per_image"]


@pytest.mark.parametrize("family", ["identity", *DISCRETE])
def test_the_loss_is_reconstruction_plus_the_bottlenecks(family, tiny_autoencoder, random_images, whole_batch):
    images = random_images(4)
    output = tiny_autoencoder(family)(images, None, whole_batch(4))
    torch.testing.assert_close(
        output.metrics["loss"], output.metrics["reconstruction"] + sum(output.bottleneck.losses.values())
    )
    assert not any(value.requires_grad for value in output.metrics.values())


@pytest.mark.parametrize("reconstruction", ["bce", "l2"])
def test_images_stay_in_range(reconstruction, tiny_autoencoder, random_images, whole_batch):
    model, images = tiny_autoencoder("identity", reconstruction=reconstruction), random_images(4)
    for parameter in model.decoder.parameters():
        nn.init.normal_(parameter, std=3)
    for decoded in (model.reconstruct(images), model.to_images(model(images, None, whole_batch(4)).decoded)):
        assert -1 <= decoded.min() < -0.9
        assert 0.9 < decoded.max() <= 1


def test_bce_refuses_images_outside_of_its_range(tiny_autoencoder, random_images, whole_batch):
    with refuses("loss.reconstruction 'bce'", "[-1, 1]", "-2 to 1.99", "loss.reconstruction=l2"):
        tiny_autoencoder(reconstruction="bce")(random_images(4) * 2, None, whole_batch(4))
    tiny_autoencoder("identity", reconstruction="l2")(random_images(4) * 2, None, whole_batch(4))


def test_bce_pixels_are_the_sigmoid_of_the_logits(tiny_autoencoder, random_images):
    model, images = tiny_autoencoder("identity", reconstruction="bce"), random_images(2)
    with torch.no_grad():
        expected = model.decoder(model.encoder(images)).sigmoid() * 2 - 1
    torch.testing.assert_close(model.reconstruct(images), expected)


@pytest.mark.parametrize("family", DISCRETE)
def test_codes_determine_the_reconstruction(family, tiny_autoencoder, random_images):
    model, images = tiny_autoencoder(family), random_images(4)
    indices = model.encode(images).indices
    assert len(indices.unique()) > 1
    assert torch.equal(model.decode_indices(indices), model.reconstruct(images))


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_does_not_depend_on_the_batch(family, tiny_autoencoder, random_images):
    model, images = tiny_autoencoder(family).eval(), random_images(4)
    torch.testing.assert_close(model.reconstruct(images)[1:2], model.reconstruct(images[1:2]), rtol=1e-5, atol=1e-5)


def test_samples_of_a_vae(tiny_autoencoder):
    model = tiny_autoencoder("gaussian", size=(8, 12))
    first, again = (model.sample(3, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert first.shape == (3, 3, 8, 12)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert first.abs().max() <= 1


@pytest.mark.parametrize("family", ["identity", "gaussian"])
def test_a_continuous_latent_has_no_codes(family, tiny_autoencoder):
    model = tiny_autoencoder(family)
    assert model.codebook_size is None
    with refuses("model.bottleneck.type", f"'{family}'", "no codes", "decode(z)"):
        model.decode_indices(torch.zeros(1, 4, 4, dtype=torch.long))


@pytest.mark.parametrize("family", ["identity", "vector"])
def test_other_bottlenecks_have_no_prior_of_their_own(family, tiny_autoencoder):
    with refuses("model.bottleneck.type", f"'{family}'", "no prior", "twostage train-prior"):
        tiny_autoencoder(family).sample(1)


# Not `mlp` with bits or scores: one code for a whole image, which two images can share for good.
@pytest.mark.parametrize(
    ("backbone", "family"),
    [(b, f) for b in ("mlp", "conv") for f in FAMILIES if b != "mlp" or f not in SHARED_CODES],
)
def test_every_family_can_memorise_one_batch(family, backbone, tiny_autoencoder, random_images, whole_batch):
    model, images = tiny_autoencoder(family, backbone), random_images(2).sign() * 0.5
    labels = torch.tensor([0, 2])
    if model.bottleneck.starts_from_data:
        model.bottleneck.initialize(model.encoder(images), torch.Generator().manual_seed(0))
    first = (model.reconstruct(images) - images).square().mean()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        output = model(images, labels, whole_batch(2, step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.bottleneck.update_codebook(lambda statistics: statistics)
    assert (model.reconstruct(images) - images).square().mean() < 0.1 * first


# --- the content hash -----------------------------------------------------------------------------------------------


def test_the_hash_covers_what_determines_the_codes(tiny_autoencoder):
    model = tiny_autoencoder("vector")
    original = model.content_hash()
    assert len(original) == 64
    assert tiny_autoencoder("vector").content_hash() == original

    def hash_after_changing(tensor: torch.Tensor) -> str:
        with torch.no_grad():
            tensor.view(-1)[-1] += 1e-3
        changed = model.content_hash()
        with torch.no_grad():
            tensor.view(-1)[-1] -= 1e-3
        return changed

    assert hash_after_changing(next(model.decoder.parameters())) == original
    assert hash_after_changing(model.bottleneck.ema_counts) == original
    assert hash_after_changing(next(model.encoder.parameters())) != original
    assert hash_after_changing(list(model.encoder.parameters())[-1]) != original
    assert hash_after_changing(model.bottleneck.codebook) != original


def test_the_hash_covers_the_size_of_the_images(tiny_autoencoder):
    hashes = [tiny_autoencoder("vector", size=size).content_hash() for size in [(8, 8), (8, 12), (12, 8)]]
    assert len(set(hashes)) == 3


# --- on disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_gives_the_same_pixels_and_hash(family, tiny_autoencoder, random_images, tmp_path):
    model, images = tiny_autoencoder(family, size=(8, 12), channels=4).eval(), random_images(2, 4, (8, 12))
    model.save_pretrained(tmp_path / "run" / "model")
    for path in (tmp_path / "run" / "model", tmp_path / "run"):
        loaded = Autoencoder.from_pretrained(path)
        assert not loaded.training
        assert loaded.config == model.config
        assert loaded.content_hash() == model.content_hash()
        assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))


@pytest.fixture
def saved(tiny_autoencoder, tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_folder_holds_config_and_weights_and_names_its_hash(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((saved / "config.json").read_text())["hash"] == Autoencoder.from_pretrained(saved).content_hash()


def test_the_folder_holds_what_inference_needs_of_the_loss(saved, tiny_autoencoder):
    document = json.loads((saved / "config.json").read_text())
    assert document["loss"].keys() == {"reconstruction", "kl_weight", "likelihood_scale", "corruption"}
    assert not {"trained_against", "adversarial"} & document.keys()
    loss = LossConfig.model_validate({"reconstruction": "l1", "perceptual": {"type": "lpips"}, "adversarial": {}})
    assert type(loss.objective()) is type(tiny_autoencoder(reconstruction="l1").config.loss)
    assert loss.objective() == tiny_autoencoder(reconstruction="l1").config.loss


def test_the_loss_of_an_earlier_version_becomes_a_record(saved):
    """Earlier versions stored the settings of LPIPS and of the discriminator in place of a record."""
    document = json.loads((saved / "config.json").read_text())
    document["loss"] |= {"perceptual": {"type": "lpips", "weight": 0.5}, "adversarial": {"channels": 8}}
    (saved / "config.json").write_text(json.dumps(document))
    model = Autoencoder.from_pretrained(saved)
    assert [network.model_dump() for network in model.config.trained_against] == [
        {"type": "lpips", "path": None, "hash": None}
    ]
    assert model.config.adversarial
    assert model.content_hash() == document["hash"]
    model.save_pretrained(saved)
    again = json.loads((saved / "config.json").read_text())
    assert again["trained_against"]
    assert again["adversarial"]
    assert Autoencoder.from_pretrained(saved).config == model.config


def test_a_prior_is_not_taken_for_a_tokenizer(saved):
    save_model_folder(saved, "prior", {}, {"weight": torch.zeros(1)})
    with refuses(saved, "prior", "tokenizer"):
        Autoencoder.from_pretrained(saved)


def test_missing_weights_are_named(saved):
    (saved / "model.safetensors").unlink()
    with refuses(saved, "model.safetensors"):
        Autoencoder.from_pretrained(saved)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_weights_cost_one_sentence(saved, length):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(InputError) as refusal:
        Autoencoder.from_pretrained(saved)
    assert_names(str(refusal.value), saved, "damaged", "model.safetensors")
    assert "\n" not in str(refusal.value)


def test_weights_of_another_architecture_are_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    config["model"]["latent_channels"] = 5
    (saved / "config.json").write_text(json.dumps(config))
    with refuses("weights", "config.json"):
        Autoencoder.from_pretrained(saved)


def test_an_unknown_key_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    config["model"]["latent_chanels"] = 5
    (saved / "config.json").write_text(json.dumps(config))
    with refuses("latent_chanels", "did you mean 'latent_channels'"):
        Autoencoder.from_pretrained(saved)


def test_a_missing_folder_is_named(tmp_path):
    with refuses("nowhere", "no such folder"):
        Autoencoder.from_pretrained(tmp_path / "nowhere")


def test_parts_that_the_config_does_not_make_are_not_saved(tiny_autoencoder, tmp_path):
    """They would train and be written, but could not be loaded."""

    class Own(type(tiny_autoencoder().bottleneck)):
        """A quantizer with the same weights, which computes something else."""

    model = tiny_autoencoder("vector", "mlp")
    model.bottleneck = Own(model.bottleneck.config, 4)
    with refuses("model", "bottleneck is Own", "VectorQuantizer", "register", "docs/extending.md"):
        model.save_pretrained(tmp_path / "model")
    model = tiny_autoencoder("vector", "mlp")
    model.encoder[2][1] = nn.Tanh()
    with refuses("encoder.2.1 is Tanh", "ReLU"):
        model.save_pretrained(tmp_path / "model")
    model = tiny_autoencoder("vector", "mlp")
    model.encoder[2][0] = nn.Linear(192, 15)
    with refuses("encoder.2.0.weight is (15, 192)", "(16, 192)"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("activation", "module"), [("leaky_relu", nn.LeakyReLU), ("tanh", nn.Tanh)])
@pytest.mark.parametrize(
    "backbone",
    [
        {"type": "mlp", "hidden_sizes": [6]},
        {"type": "conv", "channels": 4, "channel_mult": [1, 1], "num_res_blocks": [0, 1]},
        {"type": "vqgan", "channels": 4, "channel_mult": [1, 1], "inner_channels": 4, "norm_groups": 2},
    ],
)
def test_every_backbone_takes_an_activation(backbone, activation, module, random_images, tmp_path):
    def build(**more: str) -> Autoencoder:
        torch.manual_seed(0)
        model = {"latent_channels": 4, "backbone": backbone | more, "bottleneck": {"type": "identity"}}
        return Autoencoder(AutoencoderConfig.model_validate({"image_size": 8, "model": model}))

    before, model, images = build(), build(activation=activation), random_images(2)
    assert before.state_dict().keys() == model.state_dict().keys()
    used = {type(part) for part in model.modules() if type(part).__module__ == "torch.nn.modules.activation"}
    assert used == {module}
    assert not torch.allclose(before.reconstruct(images), model.reconstruct(images))
    model.save_pretrained(tmp_path)
    assert torch.equal(Autoencoder.from_pretrained(tmp_path).reconstruct(images), model.eval().reconstruct(images))
