"""What a mixer asks of the operations that look along a sequence, noted while they run."""

from typing import Self, TypedDict, Unpack

import torch
from torch import Tensor

from longfire.ops.delta_rule import delta_rule
from longfire.ops.documents import Documents
from longfire.ops.dplr import dplr
from longfire.ops.recurrence import RecurrenceOp
from longfire.ops.selective_scan import selective_scan
from longfire.ops.sequence_ops import LocalSequence
from longfire.parallel.context_cost import AttentionHeads, LayerTraffic


class AttentionOptions(TypedDict, total=False):
    """Those of SequenceOps.attention that do not change what crosses a cut."""

    documents: Documents | None
    scale: float | None
    dropout: float
    noise_BT: Tensor | None
    skip_B: Tensor | None
    first_head: int


class ConvolutionOptions(TypedDict, total=False):
    """Those of SequenceOps.convolution."""

    silu: bool
    state_BDW: Tensor | None
    documents: Documents | None


class TokenShiftOptions(TypedDict, total=False):
    """Those of SequenceOps.token_shift."""

    before_BD: Tensor | None
    documents: Documents | None


class Listener:
    """Local SequenceOps that take note of what is asked of them: so a mixer need not say twice what
    crosses a cut of its sequence."""

    def __init__(self) -> None:
        self.local = LocalSequence()
        self.attends: list[AttentionHeads] = []
        self.states: list[tuple[int, int]] = []  # numbers of an operation's map, and of its state
        self.halos: list[int] = []

    def crossing(self) -> LayerTraffic:
        """What one block asked, of which nothing is kept."""
        asked = LayerTraffic(
            tuple(self.attends),
            tuple(self.states),
            sum(self.halos),
        )
        for notes in (self.attends, self.states, self.halos):
            notes.clear()
        return asked

    def attention(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGV: Tensor,
        *,
        window: int | None = None,
        **options: Unpack[AttentionOptions],
    ) -> Tensor:
        kv_heads, key_size = k_BSGK.shape[2:]
        heads = AttentionHeads(
            q_BTHK.shape[2],
            kv_heads,
            key_size,
            v_BSGV.shape[3],
            window or 0,
        )
        self.attends.append(heads)
        return self.local.attention(
            q_BTHK,
            k_BSGK,
            v_BSGV,
            window=window,
            **options,
        )

    def recurrence(
        self,
        op: RecurrenceOp,
        *inputs: Tensor | None,
        documents: Documents | None = None,
        **options: Tensor | float | None,
    ) -> tuple[Tensor, Tensor]:
        """An operation's map of the state is K x K where it mixes the key's channels, else a
        diagonal."""
        out, state = self.local.recurrence(op, *inputs, documents=documents, **options)
        if op in (delta_rule, dplr):
            transition = state.shape[1] * state.shape[2] ** 2
        elif op is selective_scan:
            transition = state.numel()
        elif options.get("gv") is not None:
            transition = state.shape[1] * state.shape[3]
        else:
            transition = state.shape[1] * state.shape[2]
        self.states.append((transition, state.numel()))
        return out, state

    def convolution(
        self,
        x_BTD: Tensor,
        weight_DW: Tensor,
        bias_D: Tensor | None = None,
        **options: Unpack[ConvolutionOptions],
    ) -> tuple[Tensor, Tensor]:
        self.halos.append(x_BTD.shape[-1] * (weight_DW.shape[1] - 1))
        return self.local.convolution(x_BTD, weight_DW, bias_D, **options)

    def token_shift(
        self,
        x_BTD: Tensor,
        **options: Unpack[TokenShiftOptions],
    ) -> tuple[Tensor, Tensor]:
        self.halos.append(x_BTD.shape[-1])
        return self.local.token_shift(x_BTD, **options)

    def document_lengths(
        self,
        positions_BT: Tensor,
        documents: Documents | None,
    ) -> Tensor:
        return self.local.document_lengths(positions_BT, documents)

    def cut(self, x_BT: Tensor, fill: float = 0) -> Tensor:
        return x_BT

    def to(self, device: torch.device | str) -> Self:
        return self

    def of(self, rows: slice | Tensor) -> Self:
        return self
