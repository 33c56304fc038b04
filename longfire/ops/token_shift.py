"""Token shift: each token beside the one before it (RWKV, Peng 2023), the shortest convolution
there is."""

import torch
from torch import Tensor

from longfire.ops.documents import Documents, continues
from longfire.ops.forms import Forms
from longfire.ops.recurrence import RecurrenceOp

FORMS: Forms[RecurrenceOp] = Forms(
    "previous_token",
    reference="longfire.ops.token_shift:previous_token_reference",
    torch="longfire.ops.token_shift:previous_token_shifted",
)


def previous_token(
    x_BTD: Tensor, *, before_BD: Tensor | None = None, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """x_{t-1} at each t, zeros where a document starts; and the last input (B, D), what the next
    call takes as `before_BD`.

    before_BD: the input before the sequence, of its first document; zeros if None. Both results
    are in x's dtype.
    """
    return FORMS.chosen()(x_BTD, before_BD=before_BD, documents=documents)


def previous_token_reference(
    x_BTD: Tensor, *, before_BD: Tensor | None = None, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """The reference, a token at a time. Same arguments and result."""
    before_BD = torch.zeros_like(x_BTD[:, 0]) if before_BD is None else before_BD.to(x_BTD.dtype)
    outputs = []
    for t, x_BD in enumerate(x_BTD.unbind(1)):
        if documents is not None and t > 0:
            same_B = documents.ids_BT[:, t] == documents.ids_BT[:, t - 1]
            before_BD = torch.where(same_B[:, None], before_BD, 0.0)
        outputs.append(before_BD)
        before_BD = x_BD
    return torch.stack(outputs, 1), before_BD


def previous_token_shifted(
    x_BTD: Tensor, *, before_BD: Tensor | None = None, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """The sequence, copied a place later. Same arguments and result."""
    before_BD = torch.zeros_like(x_BTD[:, 0]) if before_BD is None else before_BD.to(x_BTD.dtype)
    previous_BTD = torch.cat([before_BD[:, None], x_BTD[:, :-1]], 1)
    flows_BT = continues(documents)
    if flows_BT is not None:
        previous_BTD = torch.where(flows_BT[..., None], previous_BTD, 0.0)
    return previous_BTD, x_BTD[:, -1]
