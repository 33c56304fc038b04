"""A batch of images as tensors."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longfire.data.pack import NO_LABEL
from longfire.ops.device_copy import copy_to


@dataclass(frozen=True)
class ImageBatch:
    """B images on one device.

    pixels_BCHW: float32. labels_B: int64, the class of each; -100 for padding. tokens: of the
    model, for each image. partner_labels_B, share_B: of mixed images, the class of the other image
    and the share of the first one, float32; None: images are not mixed.
    """

    pixels_BCHW: Tensor
    labels_B: Tensor
    tokens: int
    partner_labels_B: Tensor | None = None
    share_B: Tensor | None = None
    pieces: int = 1

    @property
    def sequences(self) -> int:
        """B, the number of images."""
        return len(self.labels_B)

    def real_tokens(self) -> int:
        """Labels to be learned, one of each image; waits for the device."""
        return int((self.labels_B != NO_LABEL).sum())

    def to(self, device: torch.device | str) -> "ImageBatch":
        """A copy on a device."""
        partner_labels_B = self.partner_labels_B
        share_B = self.share_B
        if partner_labels_B is not None:
            partner_labels_B = copy_to(partner_labels_B, device)
        if share_B is not None:
            share_B = copy_to(share_B, device)
        return replace(
            self,
            pixels_BCHW=copy_to(self.pixels_BCHW, device),
            labels_B=copy_to(self.labels_B, device),
            partner_labels_B=partner_labels_B,
            share_B=share_B,
        )

    def select(self, numbers: slice | Tensor) -> "ImageBatch":
        """Some of the images: a slice, or their numbers."""
        partner_labels_B = self.partner_labels_B
        share_B = self.share_B
        return replace(
            self,
            pixels_BCHW=self.pixels_BCHW[numbers],
            labels_B=self.labels_B[numbers],
            partner_labels_B=None if partner_labels_B is None else partner_labels_B[numbers],
            share_B=None if share_B is None else share_B[numbers],
        )

    def split(self, microbatches: int) -> tuple["ImageBatch", ...]:
        """The same images in `microbatches` equal parts, in order."""
        assert self.sequences % microbatches == 0, (
            f"{self.sequences} images do not divide into {microbatches} micro-batches"
        )
        size = self.sequences // microbatches
        parts: list[ImageBatch] = []
        for first in range(0, self.sequences, size):
            parts.append(self.select(slice(first, first + size)))
        return tuple(parts)
