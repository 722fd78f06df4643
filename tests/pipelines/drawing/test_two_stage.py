"""A pipeline makes the same images wherever it is loaded from, and refuses tokenizers unknown to its prior."""

import numpy as np
import pytest
import torch
from messages import refuses
from PIL import Image

from pipelines.drawing.two_stage import TwoStagePipeline
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.networks.masked_transformer import MaskedTransformerConfig
from stage2_prior.networks.pixelcnn import PixelCNNConfig
from stage2_prior.prior import Prior
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_uint8


def of_another_model(prior: Prior, model: PixelCNNConfig | MaskedTransformerConfig) -> Prior:
    """A prior over the same codes, untrained but not uniform."""
    torch.manual_seed(0)
    other = Prior(prior.config.model_copy(update={"model": model}))
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return other


def images(pipeline: TwoStagePipeline, num_images: int = 11, **options: object) -> torch.Tensor:
    return pipeline(num_images=num_images, output_type="pt", **options).images


def test_a_saved_pipeline_makes_the_same_images(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert sorted(p.name for p in (tmp_path / "pipeline").iterdir()) == ["pipeline.json", "prior", "tokenizer"]
    with refuses("--tokenizer runs/other", tmp_path / "pipeline", "Omit"):
        TwoStagePipeline.from_pretrained(tmp_path / "pipeline", "runs/other")
    assert torch.equal(images(TwoStagePipeline.from_pretrained(tmp_path / "pipeline")), images(pipeline))


def test_a_run_folder_finds_its_tokenizer(runs, pipeline, tmp_path):
    assert torch.equal(images(TwoStagePipeline.from_pretrained(runs.prior)), images(pipeline))
    moved = Prior.from_pretrained(runs.prior)
    reference = moved.config.tokenizer.model_copy(update={"path": str(tmp_path / "gone")})
    moved.config = moved.config.model_copy(update={"tokenizer": reference})
    moved.save_pretrained(tmp_path / "prior")
    with refuses(tmp_path / "prior", tmp_path / "gone", "--tokenizer runs/TOKENIZER"):
        TwoStagePipeline.from_pretrained(tmp_path / "prior")
    assert torch.equal(images(TwoStagePipeline.from_pretrained(tmp_path / "prior", runs.tokenizer)), images(pipeline))


def test_another_tokenizer_is_refused_with_both_hashes(pipeline, changed_tokenizer):
    other = Autoencoder.from_pretrained(changed_tokenizer("encoder"))
    with pytest.raises(InputError) as raised:
        TwoStagePipeline(other, pipeline.prior)
    assert other.content_hash()[:12] in str(raised.value)
    assert pipeline.tokenizer.content_hash()[:12] in str(raised.value)


def test_another_decoder_is_accepted(pipeline, changed_tokenizer):
    other = TwoStagePipeline(Autoencoder.from_pretrained(changed_tokenizer("decoder")), pipeline.prior)
    assert not torch.equal(images(other), images(pipeline))
    assert torch.equal(other(num_images=4).codes, pipeline(num_images=4).codes)


def test_output_types(pipeline):
    as_pil, as_pt, as_np = (pipeline(num_images=3, output_type=kind).images for kind in ("pil", "pt", "np"))
    assert (as_pt.shape, as_pt.dtype) == ((3, 3, 16, 16), torch.uint8)
    assert (as_np.shape, as_np.dtype) == ((3, 16, 16, 3), np.uint8)
    assert [image.size for image in as_pil] == [(16, 16)] * 3
    assert isinstance(as_pil[0], Image.Image)
    assert np.array_equal(np.stack([np.asarray(image) for image in as_pil]), as_np)
    assert np.array_equal(as_pt.permute(0, 2, 3, 1), as_np)
    with refuses("output_type 'jpeg': expected 'pil', 'pt' or 'np'"):
        pipeline(num_images=1, output_type="jpeg")


def test_images_are_the_decoded_codes(pipeline):
    output = pipeline(num_images=8, output_type="pt")
    assert (output.codes.shape, output.codes.dtype) == ((8, 4, 4), torch.int64)
    assert torch.equal(to_uint8(pipeline.tokenizer.decode_indices(output.codes)), output.images)


def test_images_cycle_through_the_classes(pipeline):
    names = pipeline.class_names
    assert pipeline(num_images=len(names) + 1).labels == [*range(len(names)), 0]
    by_name = pipeline(num_images=5, class_names=[names[2], names[0]], output_type="pt")
    by_number = pipeline(num_images=5, labels=[2, 0], output_type="pt")
    assert by_name.labels == by_number.labels == [2, 0, 2, 0, 2]
    assert torch.equal(by_name.images, by_number.images)
    assert not torch.equal(by_name.codes, pipeline(num_images=5, labels=[5]).codes)


def test_bad_classes_are_refused(pipeline):
    names = pipeline.class_names
    with refuses("labels, class_names"):
        pipeline(class_names=names[:1], labels=[0])
    with refuses(f"expected numbers from 0 to {len(names) - 1}"):
        pipeline(labels=[len(names)])
    with refuses("class name 'strar'", "did you mean 'star'", f"Its classes: {', '.join(names)}"):
        pipeline(class_names=["strar"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("strar", "class name 'strar': not a class of this model; did you mean 'star'? Its classes: "),
        ("Star", "class name 'Star': not a class of this model; did you mean 'star'? Its classes: "),
        ("star ", "class name 'star ': not a class of this model; did you mean 'star'? Its classes: "),
        ("zebra", "class name 'zebra': not a class of this model. Its classes: "),
        ("", "class name '': not a class of this model. Its classes: "),
        (3, "class name 3: not a class of this model. Its classes: "),
        (None, "class name None: not a class of this model. Its classes: "),
    ],
)
def test_an_unknown_class_is_refused_with_the_known_ones(pipeline, name, said):
    with pytest.raises(InputError) as refused:
        pipeline(class_names=[name])
    assert str(refused.value) == said + ", ".join(pipeline.class_names)


def test_a_name_instead_of_a_list_is_refused(pipeline):
    with refuses("class_names 'star': expected a list of names, such as ['star']"):
        pipeline(class_names="star")


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0, "temperature": 0.8, "top_k": 9, "top_p": 0.9}])
def test_an_image_depends_on_the_seed_and_its_number_alone(pipeline, options):
    expected = images(pipeline, 20, batch_size=20, **options)
    for batch_size in (1, 3, 8, 32):
        assert torch.equal(images(pipeline, 20, batch_size=batch_size, **options), expected)
    assert torch.equal(images(pipeline, 5, **options), expected[:5])
    assert not torch.equal(images(pipeline, 20, seed=1, **options), expected)


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0, "top_k": 9}])
@pytest.mark.parametrize(
    "model",
    [
        PixelCNNConfig(channels=8, depth=3, head_channels=16),
        MaskedTransformerConfig(hidden_size=32, depth=2, num_heads=2, dropout=0.0),
    ],
    ids=["pixelcnn", "masked"],
)
def test_images_of_other_priors_depend_on_the_seed_and_their_number_alone(pipeline, model, options):
    prior = of_another_model(pipeline.prior, model)
    other = TwoStagePipeline(pipeline.tokenizer, prior)
    expected = other(16, batch_size=32, **options).codes
    assert len(expected.unique()) > 8, "codes hang on the noise and on each other"
    for batch_size in (3, 8):
        assert torch.equal(other(16, batch_size=batch_size, **options).codes, expected)
    assert torch.equal(other(5, **options).codes, expected[:5])
    assert not torch.equal(other(16, seed=1, **options).codes, expected)


def test_sampling_settings_reach_the_prior(pipeline):
    codes = pipeline(num_images=16, labels=[0], top_k=1).codes
    assert (codes == codes[0]).all()
    assert not torch.equal(pipeline(num_images=16, guidance_scale=3.0).codes, pipeline(num_images=16).codes)


def test_a_prior_without_classes_has_no_labels(pipeline):
    torch.manual_seed(0)
    config = pipeline.prior.config.model_copy(update={"class_names": None, "conditions": []})
    free = TwoStagePipeline(pipeline.tokenizer, Prior(config))
    output = free(num_images=3)
    assert (output.labels, len(output.images)) == (None, 3)
    with refuses("class name 'star': this model was trained without classes"):
        free(class_names=["star"])
    with refuses("labels [0]", "without classes"):
        free(labels=[0])


@pytest.mark.parametrize("family", ["gaussian", "class_gaussian", "conditional"])
def test_a_variational_autoencoder_is_a_pipeline_too(variational, family, tmp_path):
    run = variational(family)
    pipeline = TwoStagePipeline.from_pretrained(run)
    names = pipeline.class_names
    assert (names is None) == (family == "gaussian")
    output = pipeline(num_images=5, seed=3, output_type="pt")
    assert output.codes is None
    assert output.labels == (None if names is None else [0, 1, 2, 3, 4])
    # Image i depends on the seed, its class and i alone; a low temperature draws it towards the mean.
    for batch_size in (1, 3):
        assert torch.equal(images(pipeline, 5, seed=3, batch_size=batch_size), output.images)
    assert len({bytes(image.numpy().tobytes()) for image in output.images}) == 5
    calm, wild = (images(pipeline, 8, labels=None, temperature=t).float() for t in (0.01, 1.0))
    if family == "gaussian":
        assert calm.std(0).mean() < 0.1 * wild.std(0).mean()
    pipeline.save_pretrained(tmp_path / "vae")
    assert torch.equal(images(TwoStagePipeline.from_pretrained(tmp_path / "vae"), 5, seed=3), output.images)


def test_a_variational_autoencoder_has_no_codes_to_choose_from(variational):
    pipeline = TwoStagePipeline.from_pretrained(variational("gaussian"))
    with refuses("top_k 3", "variational autoencoder", "Omit top_k"):
        pipeline(num_images=1, top_k=3)
    with refuses("class name 'star': this model was trained without classes"):
        pipeline(num_images=1, class_names=["star"])


def test_a_tokenizer_alone_makes_no_images(runs):
    with refuses("bottleneck 'vector'", "twostage train-prior"):
        TwoStagePipeline.from_pretrained(runs.tokenizer)


def test_progress_is_reported(pipeline):
    shares: list[float] = []
    pipeline(num_images=5, batch_size=2, on_progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert len(shares) > 3, "and not at the end alone"
