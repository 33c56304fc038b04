"""What computes along the sequence, as one object that travels with the batch.

A mixer calls it through `seq.ops` (mixers/mixer.Sequence) and never knows where the tokens are:

    o, kept["state"] = seq.ops.recurrence(linear_attention, q, k, v, g, documents=seq.documents)

LocalSequence computes sequences that are whole in this process. parallel/context.ContextSequence
computes sequences that are cut into segments over several processes, and gives the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.forms import LazyFunction, TensorFunction
from longfire.ops.recurrence import RecurrenceOp

AttentionOp = TensorFunction  # with the arguments of ops.attention.attention

# What computes each operation where sequences are whole; imported when a mixer first asks for it.
CHOSEN_ATTENTION = LazyFunction[Callable[[], AttentionOp]](
    "longfire.ops.attention:chosen_attention"
)
CONVOLUTION = LazyFunction[RecurrenceOp]("longfire.ops.short_conv:short_conv")
TOKEN_SHIFT = LazyFunction[RecurrenceOp]("longfire.ops.token_shift:previous_token")


class SequenceOps(Protocol):
    """The operations that look at other tokens of the sequence; all else sees one token at a time.

    B sequences, T tokens of each in this process. `documents` is that of the Sequence: attention,
    states and convolutions start afresh where a document begins. Where sequences are cut over
    processes there is no state from an earlier call, and what is returned as one is empty (0,).
    """

    def attention(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGV: Tensor,
        *,
        window: int | None = None,
        documents: Documents | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        noise_BT: Tensor | None = None,
        skip_B: Tensor | None = None,
        first_head: int = 0,
    ) -> Tensor:
        """Causal softmax attention -> (B, T, H, V), as ops.attention.attention.

        What crosses a cut: keys and values of the tokens before it, or heads in exchange for
        tokens (parallel/context_strategies).
        """
        ...

    def recurrence(
        self,
        op: RecurrenceOp,
        *inputs: Tensor | None,
        documents: Documents | None = None,
        **options: Tensor | float | None,
    ) -> tuple[Tensor, Tensor]:
        """`op(*inputs, documents=documents, **options)`: outputs (B, T, ...), and the state after
        the last token.

        op: one that the mixer declares in `recurrences`. What crosses a cut: the map of the state,
        S -> M S + B, of each segment (ops/maps); its size does not depend on T.
        """
        ...

    def convolution(
        self,
        x_BTD: Tensor,
        weight_DW: Tensor,
        bias_D: Tensor | None = None,
        *,
        silu: bool = True,
        state_BDW: Tensor | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A short causal convolution -> (B, T, D), as ops.short_conv.short_conv, and its last
        inputs.

        What crosses a cut: the last W - 1 inputs of each segment.
        """
        ...

    def token_shift(
        self, x_BTD: Tensor, *, before_BD: Tensor | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        """The input of the token before each -> (B, T, D), as ops.token_shift.previous_token, and
        the last input.

        What crosses a cut: the last input of each segment.
        """
        ...

    def document_lengths(self, positions_BT: Tensor, documents: Documents | None) -> Tensor:
        """(B, T): tokens of the whole document of each token, wherever they are; of the sequence
        where documents are None."""
        ...

    def cut(self, x_BT: Tensor, fill: float = 0) -> Tensor:
        """What of whole sequences (B, all tokens, ...) is in this process; `fill` where it is
        padding."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same for a batch on this device."""
        ...

    def of(self, rows: slice | Tensor) -> Self:
        """The same for some of the batch's sequences."""
        ...


@dataclass(frozen=True)
class LocalSequence:
    """Sequences that are whole in this process.

    attend: the softmax attention: `attention_reference`, or `blockwise`, which computes `chunks`
    (queries, keys) of tokens at a time (ops/attention_choice.py); None: `ops.attention.attention`,
    which chooses by device.
    """

    attend: AttentionOp | None = None
    chunks: tuple[int, int] | None = None

    @property
    def attention(self) -> AttentionOp:
        if self.attend is None:
            return CHOSEN_ATTENTION.get()()
        return self.attend

    def recurrence(
        self,
        op: RecurrenceOp,
        *inputs: Tensor | None,
        documents: Documents | None = None,
        **options: Tensor | float | None,
    ) -> tuple[Tensor, Tensor]:
        return op(*inputs, documents=documents, **options)

    @property
    def convolution(self) -> RecurrenceOp:
        return CONVOLUTION.get()

    @property
    def token_shift(self) -> RecurrenceOp:
        return TOKEN_SHIFT.get()

    def document_lengths(self, positions_BT: Tensor, documents: Documents | None) -> Tensor:
        if documents is not None:
            return documents.lengths()
        return (positions_BT.amax(1, keepdim=True) + 1).expand_as(positions_BT)

    def cut(self, x_BT: Tensor, fill: float = 0) -> Tensor:
        return x_BT

    def to(self, device: torch.device | str) -> Self:
        return self

    def of(self, rows: slice | Tensor) -> Self:
        return self


UNDECIDED = LocalSequence()  # of a Sequence for which nothing was decided: the model's own is used
