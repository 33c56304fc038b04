"""Copies to a device for which the host does not wait."""

import torch
from torch import Tensor


def copy_to(x: Tensor, device: torch.device | str) -> Tensor:
    """x on a device; x itself if it is there. From the host to CUDA through pinned memory: from
    other memory the host would wait until all work before the copy has ended."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        # An expanded tensor, as positions without documents are, cannot be pinned as it is.
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)
