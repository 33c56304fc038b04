"""The noise of the tokens of a step, of which every dropout of the model is made (dropout.py)."""

import torch
from torch import Tensor

from longfire.ops.dropout import mixed, with_index


def row_noise(
    seed: int, first_row: int, rows: int, tokens: int, device: torch.device | str
) -> Tensor:
    """(B, T) int32: the noise of each token of sequences first_row, first_row + 1 ... of a run."""
    row_B = torch.arange(first_row, first_row + rows, device=device)
    noise_B = torch.zeros_like(row_B, dtype=torch.int32)
    for part in (seed >> 32, seed & 0xFFFFFFFF, row_B >> 32, row_B):  # 32 bits at a time
        if isinstance(part, Tensor):
            low = part.to(torch.int32)
        else:
            # filled on the device: a copy of a number would wait for it
            low = torch.full((), part, dtype=torch.int64, device=device).to(torch.int32)
        noise_B = mixed(noise_B + low)
    return with_index(noise_B, torch.arange(tokens, dtype=torch.int32, device=device))
