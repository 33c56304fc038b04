"""What computes along sequences in which each token sees those after it, too: the operations of
ops/sequence_ops.py in both directions. A mixer calls them as the causal ones."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.forms import LazyFunction
from longfire.ops.recurrence import RecurrenceOp
from longfire.ops.sequence_ops import CONVOLUTION, TOKEN_SHIFT, AttentionOp, LocalSequence

FULL_ATTENTION = LazyFunction[Callable[[], AttentionOp]](
    "longfire.ops.full_attention:chosen_full_attention"
)


@dataclass(frozen=True)
class BothDirections(LocalSequence):
    """Whole sequences, from either end.

    Softmax attention sees all tokens of a document. A recurrence and a convolution run over the
    sequence and over the reversed sequence, with the same parameters, and the outputs are summed:
    the token itself counts in both (Zhu 2024, "Vision Mamba"). No state is carried between calls.
    """

    @property
    def attention(self) -> AttentionOp:
        return FULL_ATTENTION.get()()

    def recurrence(
        self,
        op: RecurrenceOp,
        *inputs: Tensor | None,
        documents: Documents | None = None,
        **options: Tensor | float | None,
    ) -> tuple[Tensor, Tensor]:
        for name in options:
            is_state = name.startswith("initial_state")
            assert not is_state or options[name] is None, "sequences begin at their beginning"
        forwards, _ = op(*inputs, documents=documents, **options)
        reversed_inputs = tuple(reversed_tokens(x) for x in inputs)
        reversed_options = {name: reversed_tokens(x) for name, x in options.items()}
        backwards, _ = op(
            *reversed_inputs, documents=reversed_documents(documents), **reversed_options
        )
        return forwards + backwards.flip(1), forwards.new_empty(0)

    def convolution(  # type: ignore[override]  # a property there, with these arguments
        self,
        x_BTD: Tensor,
        weight_DW: Tensor,
        bias_D: Tensor | None = None,
        *,
        silu: bool = True,
        state_BDW: Tensor | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The bias counts once, and silu is of the sum."""
        assert state_BDW is None, "sequences begin at their beginning"
        convolve = CONVOLUTION.get()
        forwards, _ = convolve(x_BTD, weight_DW, bias_D, silu=False, documents=documents)
        backwards, _ = convolve(
            x_BTD.flip(1), weight_DW, silu=False, documents=reversed_documents(documents)
        )
        y_BTD = forwards + backwards.flip(1)
        if silu:
            y_BTD = F.silu(y_BTD)
        return y_BTD, y_BTD.new_empty(0)

    def token_shift(  # type: ignore[override]  # a property there, with these arguments
        self, x_BTD: Tensor, *, before_BD: Tensor | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mean of the token before and the token after."""
        assert before_BD is None, "sequences begin at their beginning"
        previous_token = TOKEN_SHIFT.get()
        before_BTD, _ = previous_token(x_BTD, documents=documents)
        after_BTD, _ = previous_token(x_BTD.flip(1), documents=reversed_documents(documents))
        return (before_BTD + after_BTD.flip(1)) / 2, x_BTD.new_empty(0)


def reversed_tokens(x: Tensor | float | None) -> Tensor | float | None:
    """Whatever has tokens, (B, T, ...), from its end; numbers and rates, (H,) or (D, N), as they
    are."""
    if isinstance(x, Tensor) and x.dim() > 2:
        return x.flip(1)
    return x


def reversed_documents(documents: Documents | None) -> Documents | None:
    """The documents of the reversed sequences."""
    if documents is None:
        return None
    ids_BT = documents.ids_BT
    return Documents.from_ids(ids_BT.amax(1, keepdim=True) - ids_BT.flip(1))
