"""Selective scan, its states made for a chunk of tokens at a time (ops/selective_scan.py).

A is (D, N): every one of the D x N numbers has a decay of its own, so no matrix product stands for
the sum inside a chunk, and the tokens are walked one by one. What remains to save is memory: the
D x N numbers of each token are made for a chunk of tokens at a time, and again in the backward,
from the states between chunks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longfire.ops.documents import Documents, continues
from longfire.ops.linear import working_dtype
from longfire.ops.selective_scan import start

# of a chunk: 8 to 64 are as fast within a tenth; the states kept are then half of x where N = 16
TOKENS = 32


def selective_scan_chunks(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    *,
    initial_state_BDN: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in place, keeping a state every TOKENS tokens. Same arguments and result."""
    flows_BT = continues(documents)
    starts_BT = None if flows_BT is None else ~flows_BT
    h_BND = start(initial_state_BDN, x_BTD, A_DN).mT.contiguous()
    y_BTD, last_BND, _ = scan_tokens(x_BTD, dt_BTD, A_DN, B_BTN, C_BTN, h_BND, starts_BT)
    return y_BTD, last_BND.mT


# An operator of its own with a backward written out, for autograd's sake and torch.compile's: see
# chunkwise.py. Inside it the channels are the last dim, contiguous: N is too short for the
# vector units.


@torch.library.custom_op("longfire::scan_tokens", mutates_args=())
def scan_tokens(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    h_BND: Tensor,
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y (B, T, D) in x's dtype, the last state (B, N, D), the state before each chunk (chunks, B,
    N, D))."""
    y_BTD = torch.empty_like(x_BTD)
    before = h_BND.new_empty(-(-x_BTD.shape[1] // TOKENS), *h_BND.shape)
    h_BND = h_BND.clone()
    for chunk, before_BND in zip(chunks(x_BTD, dt_BTD, A_DN, B_BTN, C_BTN, starts_BT), before):
        states_BTND = chunk.states(before_BND.copy_(h_BND))
        h_BND.copy_(states_BTND[:, -1])
        y_BTD[:, chunk.span] = (chunk.C_BTN[..., None, :] @ states_BTND).squeeze(-2)
    return y_BTD, h_BND, before


class Chunk:
    """Some tokens: their inputs in the working dtype, and the decays of their states."""

    def __init__(
        self, span: slice, inputs: list[Tensor], A_ND: Tensor, starts_BT: Tensor | None
    ) -> None:
        self.span = span
        self.x_BTD, self.dt_BTD, self.B_BTN, self.C_BTN = (
            x[:, span].to(A_ND.dtype) for x in inputs
        )
        self.scaled_BTD = self.x_BTD * self.dt_BTD
        self.decay_BTND = torch.exp_(self.dt_BTD[:, :, None, :] * A_ND)
        if starts_BT is not None:
            self.decay_BTND.masked_fill_(starts_BT[:, span, None, None], 0.0)

    def states(self, h_BND: Tensor) -> Tensor:
        """The state after each token, given the one before the first."""
        states_BTND = self.B_BTN[..., None] * self.scaled_BTD[:, :, None, :]
        for decay_BND, state_BND in zip(self.decay_BTND.unbind(1), states_BTND.unbind(1)):
            h_BND = state_BND.addcmul_(decay_BND, h_BND)
        return states_BTND


def chunks(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    starts_BT: Tensor | None,
    step: int = 1,
) -> Iterator[Chunk]:
    """The chunks from the first to the last, or back if step is -1."""
    T = x_BTD.shape[1]
    A_ND = A_DN.to(working_dtype(x_BTD)).T.contiguous()
    for begin in range(0, T, TOKENS)[::step]:
        yield Chunk(
            slice(begin, min(begin + TOKENS, T)), [x_BTD, dt_BTD, B_BTN, C_BTN], A_ND, starts_BT
        )


@scan_tokens.register_fake
def scan_tokens_shapes(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    h_BND: Tensor,
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x_BTD),
        torch.empty_like(h_BND),
        h_BND.new_empty(-(-x_BTD.shape[1] // TOKENS), *h_BND.shape),
    )


@torch.library.custom_op("longfire::scan_tokens_backward", mutates_args=())
def scan_tokens_backward(
    inputs: list[Tensor],
    starts_BT: Tensor | None,
    before: Tensor,
    d_y_BTD: Tensor,
    d_last_BND: Tensor,
) -> list[Tensor]:
    """The gradients of x, dt, A, B, C and the state before the first token; each state's own is
    d_BND on its way back."""
    x_BTD, dt_BTD, A_DN, B_BTN, C_BTN = inputs
    A_ND = A_DN.to(before.dtype).T.contiguous()
    d_x_BTD, d_dt_BTD, _, d_B_BTN, d_C_BTN = (x.new_empty(x.shape) for x in inputs)
    d_A_BND = torch.zeros_like(before[0])
    carried_BND = d_last_BND
    backwards = chunks(x_BTD, dt_BTD, A_DN, B_BTN, C_BTN, starts_BT, step=-1)
    for chunk, h_BND in zip(backwards, before.flip(0)):
        span = chunk.span
        decay_BTND = chunk.decay_BTND
        states_BTND = chunk.states(h_BND)
        d_y = d_y_BTD[:, span].to(before.dtype)
        d_C_BTN[:, span] = (states_BTND @ d_y[..., None]).squeeze(-1)
        d_BTND = chunk.C_BTN[..., None] * d_y[:, :, None, :]
        later_BND = d_BTND[:, -1].add_(carried_BND)
        for decay_BND, d_BND in zip(decay_BTND.unbind(1)[:0:-1], d_BTND.unbind(1)[-2::-1]):
            later_BND = d_BND.addcmul_(decay_BND, later_BND)
        carried_BND = decay_BTND[:, 0] * later_BND
        d_scaled_BTD = (chunk.B_BTN[..., None, :] @ d_BTND).squeeze(-2)
        d_B_BTN[:, span] = (d_BTND @ chunk.scaled_BTD[..., None]).squeeze(-1)
        # d_BTND becomes the gradient of dt A: that of the state, times the decay, times the state
        # before it
        d_BTND.mul_(decay_BTND)
        d_BTND[:, 0].mul_(h_BND)
        d_BTND[:, 1:].mul_(states_BTND[:, :-1])
        for d_BND, dt_BD in zip(d_BTND.unbind(1), chunk.dt_BTD.unbind(1)):
            d_A_BND.addcmul_(d_BND, dt_BD[:, None, :])
        d_dt_BTD[:, span] = d_BTND.mul_(A_ND).sum(2).addcmul_(d_scaled_BTD, chunk.x_BTD)
        d_x_BTD[:, span] = d_scaled_BTD.mul_(chunk.dt_BTD)
    return [
        d_x_BTD,
        d_dt_BTD,
        d_A_BND.sum(0).T.to(A_DN.dtype).contiguous(),
        d_B_BTN,
        d_C_BTN,
        carried_BND.contiguous(),
    ]


@scan_tokens_backward.register_fake
def scan_tokens_backward_shapes(
    inputs: list[Tensor],
    starts_BT: Tensor | None,
    before: Tensor,
    d_y_BTD: Tensor,
    d_last_BND: Tensor,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (*inputs, d_last_BND)]


def keep(
    ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *tensors, _, ctx.starts_BT = inputs
    ctx.save_for_backward(*tensors, output[2])


def gradients(
    ctx: Any, d_y_BTD: Tensor, d_last_BND: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    *inputs, before = ctx.saved_tensors
    return *scan_tokens_backward(inputs, ctx.starts_BT, before, d_y_BTD, d_last_BND), None


scan_tokens.register_autograd(gradients, setup_context=keep)
