"""The `semantic` term: the encoder's output must tell what an ImageNet network sees at the same place.

As in GigaTok, Xiong et al. 2025 (arXiv 2504.08736), which compares features of the decoder with those of DINOv2; here
the encoder's output with those of EfficientNet-lite0 (the extra `imagenet`). Axes: B images, C channels, h and w cells,
H and W pixels, F features.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from stage1_tokenizer.features.imagenet_network import LOSS_WEIGHTS, ImageNetNetwork, enlarge_small, to_rgb
from stage1_tokenizer.losses.latent_term import LatentTermConfig
from twostage.core.config.sections import Number, Width
from twostage.core.errors import InputError

__all__ = ["SemanticTerm", "SemanticTermConfig"]

STAGES = 5  # of the network; the last one's cells are 16 pixels wide
FEATURES = 112  # channels of that stage
MIN_SIDE = 64  # pixels: smaller images are enlarged to it


@LatentTermConfig.register
class SemanticTermConfig(LatentTermConfig):
    """How well a small network finds ImageNet features in the encoder's output."""

    type: Literal["semantic"] = "semantic"
    weight: Annotated[Number, Field(ge=0)] = 0.5
    width: Width = 256
    """Hidden features of the network between the encoder's output and the ImageNet features."""

    def build(self, encoded_shape: tuple[int, int, int], image_shape: tuple[int, int, int]) -> "SemanticTerm":
        if image_shape[0] not in (1, 3, 4):
            raise InputError(f"loss.latents semantic: expected data.channels 1, 3 or 4, got {image_shape[0]}")
        return SemanticTerm(self, encoded_shape[0], _imagenet_network())


class SemanticTerm(nn.Module):
    """1 - mean cos(MLP(x), f): x is a cell of the encoder's output, f the ImageNet features at its place.

    The ImageNet network is fixed, and not among the module's parameters and state.
    """

    def __init__(self, config: SemanticTermConfig, channels: int, network: nn.Module) -> None:
        super().__init__()
        self._hidden = (network.eval().requires_grad_(False),)  # nn.Module does not register modules inside a tuple
        self.project = nn.Sequential(
            nn.Linear(channels, config.width), nn.SiLU(), nn.Linear(config.width, config.width), nn.SiLU(),
            nn.Linear(config.width, FEATURES),
        )  # fmt: skip

    def forward(self, encoded: Tensor, images: Tensor) -> Tensor:
        """The mean over cells of 1 - cosine, in [0, 2], for the encoder's output (B, C, h, w) of (B, C, H, W)."""
        wanted = rearrange(self.features(images, (encoded.shape[2], encoded.shape[3])), "b f h w -> b h w f")
        found = self.project(rearrange(encoded, "b c h w -> b h w c"))
        return 1 - F.cosine_similarity(found.float(), wanted, dim=3).mean()

    @torch.no_grad()
    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The ImageNet features of images (B, C, H, W) at each cell of ``grid`` (h, w), (B, F, h, w)."""
        network = self._hidden[0].to(images.device, non_blocking=True)
        assert isinstance(network, ImageNetNetwork)
        with torch.autocast(images.device.type, enabled=False):
            seen = enlarge_small(to_rgb(images.float(), 1.0), MIN_SIDE)
            return F.interpolate(network.stages(seen, STAGES)[-1], grid, mode="bilinear", align_corners=False)


def _imagenet_network() -> ImageNetNetwork:
    try:
        with torch.random.fork_rng(devices=[]):  # new layers draw weights before the stored ones are loaded
            return ImageNetNetwork(LOSS_WEIGHTS)
    except InputError as error:
        raise InputError(f"loss.latents semantic: {error}") from None
