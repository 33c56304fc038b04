"""Copies to a device for which the host does not wait."""

import torch
from torch import Tensor


def copy_to(x: Tensor, device: torch.device | str) -> Tensor:
    """x on a device; x itself if it is there. From the host to CUDA through pinned memory, since
    from other memory the host waits for all work before; what is expanded is made whole for it."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)
