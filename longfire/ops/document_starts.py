"""Where the documents of packed sequences begin, as numbers for what the host plans by them."""

import torch.nn.functional as F
from torch import Tensor


def starts_of(ids_BT: Tensor) -> list[list[int]]:
    """Where the documents of each sequence begin, in its order; waits for the device once."""
    ids_BT = ids_BT.cpu()
    begins_BT = F.pad(ids_BT[:, 1:] != ids_BT[:, :-1], (1, 0), value=True)
    return [begins_T.nonzero().flatten().tolist() for begins_T in begins_BT]
