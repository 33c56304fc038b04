"""Images as tokens: their patches, projected (Dosovitskiy 2021, "An image is worth 16x16
words")."""

import torch
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig
from longfire.ops.linear import Linear


def patches_of(pixels_BCHW: Tensor, size: int) -> Tensor:
    """The patches of images, row by row -> (B, patches, C x size x size), in the order of a
    convolution's weight: channels, then rows of a patch, then its columns."""
    patches = pixels_BCHW.unfold(2, size, size).unfold(3, size, size)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


class PatchEmbedding(nn.Module):
    """pixels (B, C, H, W) -> a token for each patch, (B, patches, D)."""

    def __init__(self, channels: int, size: int, hidden_size: int) -> None:
        super().__init__()
        self.size = size
        self.projection = Linear(channels * size * size, hidden_size, bias=True)

    def forward(self, pixels_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
        """dtype: the type that is computed in."""
        return self.projection(patches_of(pixels_BCHW, self.size).to(dtype))


def patch_embedding(config: ModelConfig) -> PatchEmbedding:
    """That of a model of images."""
    return PatchEmbedding(config.image_channels, config.patch_size, config.hidden_size)
