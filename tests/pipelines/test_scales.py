"""Every verb on codes of several scales."""

import json

import pytest
import torch
from messages import assert_names

from pipelines.drawing.redraw import cells_to_redraw
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.encoding.new_prior import new_prior
from pipelines.page.app_handlers import draw_all_codes
from pipelines.page.app_page import describe
from stage2_prior.codes import CodeCache
from stage2_prior.networks.scale_transformer import ScaleTransformerConfig

FEW = ["train.max_steps=4", "train.validate_every=4", "train.checkpoint_every=4"]
SMALL = "hidden_size: 16, depth: 1, num_heads: 2, dropout: 0"
TOKENIZERS = {
    "multi_scale": "{type: multi_scale, scales: [1, 2, 4], codes: {type: vector, codebook_size: 16}}",
    "two_level": "{type: two_level, codebook_size: 16}",
}
PRIORS = {
    "multi_scale": f"model={{type: scale_transformer, {SMALL}}}",
    "two_level": f"model={{type: scale_by_scale, networks: [{{type: masked_transformer, {SMALL}}}, "
    f"{{type: masked_transformer, {SMALL}}}]}}",
}
GRIDS = {"multi_scale": "1x1 + 2x2 + 4x4", "two_level": "2x2 + 4x4"}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_verbs(kind, configs, works, twostage, tmp_path):
    tokenizer, codes, prior = (tmp_path / name for name in ("tokenizer", "codes", "prior"))
    bottleneck = f"model.bottleneck={TOKENIZERS[kind]}"
    works("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={tokenizer}", bottleneck, *FEW)
    assert f"grid {GRIDS[kind]}," in works("encode", tokenizer, "--out", codes)
    manifest = json.loads((codes / "manifest.json").read_text(encoding="utf-8"))
    assert "x".join(map(str, manifest["scales"][-1])) == "4x4"
    assert CodeCache(codes).manifest.grid == (1, 21 if kind == "multi_scale" else 20)
    words = ["train-prior", configs / "prior.yaml", f"codes={codes}", f"run.dir={prior}"]
    ended = twostage(*words, "model={type: pixelcnn, channels: 8, depth: 1}", *FEW)
    assert ended.code == 2
    assert_names(ended.err, "model.type 'pixelcnn'", GRIDS[kind], "scale_transformer")
    works(*words, PRIORS[kind], *FEW)
    works("generate", prior, "--num-images", 3, "--out", tmp_path / "images")
    works("reconstruct", tokenizer, "--out", tmp_path / "rebuilt.png")
    figures = tmp_path / "figures.json"
    works("evaluate", prior, "--json", figures)
    works("evaluate", tokenizer)
    assert figures.exists()

    pipeline = TwoStagePipeline.from_pretrained(prior)
    assert GRIDS[kind].replace("x", " x ") in describe(pipeline)
    drawn = pipeline(2, seed=3, output_type="pt")
    assert torch.equal(drawn.images[1:], torch.cat([pipeline(2, seed=3, output_type="pt").images[1:]]))
    assert (
        draw_all_codes(drawn.codes[0], pipeline.tokenizer).width
        > draw_all_codes(drawn.codes[0], pipeline.tokenizer).height
    )
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[9:, 9:] = True
    redrawn = cells_to_redraw(pipeline.tokenizer, mask)
    assert redrawn.shape == (1, CodeCache(codes).manifest.grid[1])
    assert int(redrawn.sum()) == {"multi_scale": 1 + 1 + 4, "two_level": 1 + 4}[kind]
    image = drawn.images[0]
    found = pipeline.inpaint(image, mask, num_images=3, class_name=pipeline.class_names[0], seed=1).images
    assert (found[:, :, ~mask] == image[:, ~mask]).all()
    if kind == "multi_scale":
        own = new_prior(pipeline.tokenizer, ScaleTransformerConfig(hidden_size=16, depth=1, num_heads=2))
        assert TwoStagePipeline(pipeline.tokenizer, own)(1).codes.shape == (1, 1, 21)
