"""fla's autograd functions as two operators of torch: one for the forward, one for the backward.

torch.compile cannot trace fla's functions, and breaks the graph around them. It need not trace an
operator of torch.library: the operator is a node of the graph, whose shapes are known (`shapes`)
and whose backward is another operator. What a function of fla would save for its backward, and is
neither an input nor a table of documents, is an output of the forward operator. No forward is
computed twice.

`KERNELS` has what has to be known of each function. The versions of fla: constraints.txt.
"""

import inspect
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import triton
from fla.modules.causal_conv1d.ops import CausalConv1dFunction
from fla.ops.common.fused_recurrent import FusedRecurrentFunction
from fla.ops.gated_delta_rule.chunk import ChunkGatedDeltaRuleFunction
from fla.ops.generalized_delta_rule.dplr.chunk import ChunkDPLRDeltaRuleFunction
from fla.ops.gla.chunk import ChunkGLAFunction
from fla.ops.kda.chunk import ChunkKDAFunction
from fla.ops.simple_gla.chunk import ChunkSimpleGLAFunction
from fla.ops.utils.index import prepare_chunk_indices
from torch import Tensor

from longfire.ops.fast.slot_kernels import SlotAttentionFunction

CHUNK = 64  # tokens, in all functions that do not say otherwise

# What the functions can do besides, and we do not ask for. They are arguments of the forward, and
# attributes of the context of the backward.
UNUSED: dict[str, Any] = {
    "A_log": None,
    "activation": None,
    "allow_neg_eigval": False,
    "bias": None,
    "cp_context": None,
    "disable_recompute": False,
    "dt_bias": None,
    "g": None,
    "g_gamma": None,
    "gk": None,
    "gv": None,
    "layout_fallback": False,
    "lower_bound": None,
    "residual": None,
    "reverse": False,
    "safe_gate": False,
    "state_v_first": False,
    "use_beta_sigmoid_in_kernel": False,
    "use_gate_in_kernel": False,
    "use_graph": False,
    "use_qk_l2norm_in_kernel": False,
    "_dtype": None,  # of autocast, whose state torch.amp.custom_fwd would have noted
    "_fwd_used_autocast": False,
}


@dataclass(frozen=True)
class Kept:
    """A tensor that the forward makes for the backward: like the input `like`, or with `width`
    numbers for each head and token."""

    like: str
    dtype: torch.dtype | None = None  # that of `like` if None
    of_chunk: bool = False  # (B, T, heads, tokens of a chunk)


@dataclass(frozen=True)
class Kernel:
    """What has to be known of an autograd function of fla.

    inputs: its differentiable arguments, but for the initial state, in the order of our operator.
    saved: the names of what it saves for the backward, in its order: inputs, initial_state,
    cu_seqlens, chunk_indices, those of `kept`, or "" for None. options: see UNUSED.
    """

    function: type[torch.autograd.Function]
    inputs: tuple[str, ...]
    saved: tuple[str, ...]
    kept: dict[str, Kept] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    chunk: int | None = CHUNK  # None: for GLA, as long as a short row

    @property
    def needed(self) -> tuple[str, ...]:
        """The inputs that the backward needs."""
        return tuple(name for name in self.inputs if name in self.saved)

    def chunk_size(self, tokens: int) -> int:
        """Tokens of a chunk; tokens: of a row, or of all rows where there are documents."""
        if self.chunk is not None:
            return self.chunk
        return int(min(CHUNK, max(16, triton.next_power_of_2(tokens))))


QKV = ("q", "k", "v")
GATE_SUM = Kept("g", torch.float32)


def recurrent(inputs: tuple[str, ...]) -> Kernel:
    """fla's recurrence token by token. It keeps its output as it is before it is rounded."""
    decays = tuple(name if name in inputs else "" for name in ("gk", "gv"))
    saved = (*QKV, "", "", *decays, "initial_state", "o")
    return Kernel(FusedRecurrentFunction, inputs, saved, {"o": Kept("v", torch.float32)})


def convolution(inputs: tuple[str, ...], activation: str | None) -> Kernel:
    """fla's short convolution."""
    bias = "bias" if "bias" in inputs else ""
    saved = ("x", "weight", bias, "", "initial_state")
    return Kernel(CausalConv1dFunction, inputs, saved, options={"activation": activation})


KERNELS = {
    "gla": Kernel(
        ChunkGLAFunction,
        (*QKV, "g"),
        (*QKV, "", "g_sum", "initial_state", "A", "chunk_indices"),
        {"g_sum": GATE_SUM, "A": Kept("q", torch.float32, of_chunk=True)},
        chunk=None,
    ),
    "simple_gla": Kernel(
        ChunkSimpleGLAFunction, QKV, (*QKV, "", "", "initial_state", "chunk_indices")
    ),
    "simple_gla_decay": Kernel(
        ChunkSimpleGLAFunction,
        (*QKV, "g"),
        (*QKV, "g_sum", "", "initial_state", "chunk_indices"),
        {"g_sum": GATE_SUM},
    ),
    "recurrent_gv": recurrent((*QKV, "gv")),
    "recurrent_gk_gv": recurrent((*QKV, "gk", "gv")),
    "gated_delta_rule": Kernel(
        ChunkGatedDeltaRuleFunction,
        (*QKV, "beta", "g"),
        (
            *("q", "", "k", "", "v", "g_sum", "beta", "beta", "A"),
            *("initial_state", "cu_seqlens", "chunk_indices", "", "", ""),
        ),
        {"g_sum": GATE_SUM, "A": Kept("k", of_chunk=True)},
    ),
    "kda": Kernel(
        ChunkKDAFunction,
        (*QKV, "beta", "g"),
        (
            *("q", "", "k", "", "v", "g_sum", "g", "beta", "beta", "", "", "A_qk", "A_kk"),
            *("", "", "", "", "", "", "initial_state", "cu_seqlens", "chunk_indices", ""),
        ),
        {
            "g_sum": GATE_SUM,
            "A_qk": Kept("k", of_chunk=True),
            "A_kk": Kept("k", of_chunk=True),
        },
    ),
    "dplr": Kernel(
        ChunkDPLRDeltaRuleFunction,
        (*QKV, "a", "b", "gk"),
        (*QKV, "a", "b", "gk", "initial_state"),
        chunk=16,
    ),
    "gsa": Kernel(
        SlotAttentionFunction,
        (*QKV, "s", "g"),
        (*QKV, "s", "g", "scores", "weights", "A", "initial_state"),
        {
            "scores": Kept("s"),
            "weights": Kept("s", torch.float32),
            "A": Kept("q", torch.float32, of_chunk=True),
        },
    ),
    "short_conv": convolution(("x", "weight"), None),
    "short_conv_bias": convolution(("x", "weight", "bias"), None),
    "short_conv_silu": convolution(("x", "weight"), "silu"),
    "short_conv_bias_silu": convolution(("x", "weight", "bias"), "silu"),
}
ROWS = frozenset(
    {*QKV, "s", "g", "gk", "gv", "beta", "a", "b", "x"}
)  # inputs of each row and token


class Call:
    """The arguments of one call in fla's meaning: with documents one long row, and a state for each
    document."""

    def __init__(
        self,
        kernel: Kernel,
        names: tuple[str, ...],
        inputs: list[Tensor],
        state: Tensor | None,
        cu_lengths: Tensor | None,
        cu_lengths_cpu: Tensor | None,
        scale: float,
    ) -> None:
        """names: of the inputs."""
        self.kernel = kernel
        self.rows, self.tokens = inputs[0].shape[:2]
        self.cu_lengths = cu_lengths
        self.inputs = dict(zip(names, map(self.laid_end_to_end, names, inputs)))
        self.chunk = self.kernel.chunk_size(next(iter(self.inputs.values())).shape[1])
        self.state = state if state is None else self.of_documents(state, self.first_documents())
        self.arguments = {
            **UNUSED,
            **self.kernel.options,
            **self.inputs,
            "scale": scale,
            "initial_state": self.state,
            "output_final_state": True,
            "cu_seqlens": cu_lengths,
            "cu_seqlens_cpu": cu_lengths_cpu,
        }

    def laid_end_to_end(self, name: str, x: Tensor) -> Tensor:
        """One row of all tokens, where there are documents."""
        if self.cu_lengths is None or name not in ROWS:
            return x
        return x.flatten(0, 1)[None]

    def row_starts(self) -> Tensor:
        assert self.cu_lengths is not None, "asked for with documents only"
        stop = self.rows * self.tokens
        return torch.arange(0, stop, self.tokens, device=self.cu_lengths.device)

    def first_documents(self) -> Tensor | None:
        """(rows,): the number of the first document of each row."""
        if self.cu_lengths is None:
            return None
        return torch.searchsorted(self.cu_lengths, self.row_starts())

    def last_documents(self) -> Tensor | None:
        """(rows,): the number of the last document of each row."""
        if self.cu_lengths is None:
            return None
        return torch.searchsorted(self.cu_lengths, self.row_starts() + self.tokens) - 1

    def of_documents(self, state: Tensor, numbers: Tensor | None) -> Tensor:
        """A state for each document: those of rows at `numbers`, elsewhere zeros."""
        if self.cu_lengths is None or numbers is None:
            return state
        empty = state.new_zeros(len(self.cu_lengths) - 1, *state.shape[1:])
        return empty.index_copy(0, numbers, state)

    def chunk_indices(self) -> Tensor | None:
        """fla's table of chunks, which it keeps by the identity of the lengths."""
        if self.cu_lengths is None:
            return None
        lengths_cpu = self.arguments["cu_seqlens_cpu"]
        table: Tensor = prepare_chunk_indices(
            self.cu_lengths, self.chunk, cu_seqlens_cpu=lengths_cpu
        )
        return table


@torch.library.custom_op("longfire::fla", mutates_args=())
def fla(
    kernel: str,
    inputs: list[Tensor],
    state: Tensor | None,
    cu_lengths: Tensor | None,
    cu_lengths_cpu: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """[output, last state of each row, what the backward needs]. inputs: as KERNELS[kernel] names
    them, contiguous, (B, T, ...); state: of each row. cu_lengths: int64, of documents."""
    spec = KERNELS[kernel]
    call = Call(spec, spec.inputs, inputs, state, cu_lengths, cu_lengths_cpu, scale)
    saved: list[Tensor | None] = []
    context = SimpleNamespace(save_for_backward=lambda *tensors: saved.extend(tensors))
    function = spec.function
    names = parameters_of(function)
    arguments = {name: x for name, x in call.arguments.items() if name in names}
    with torch.cuda.device_of(inputs[0]):
        o, last_state = function.forward(context, **arguments)
    numbers = call.last_documents()
    if numbers is not None:
        o = o.unflatten(1, (call.rows, call.tokens))[0]
        last_state = last_state[numbers]
    kept = []
    for name, x in zip(spec.saved, saved, strict=True):
        if name in spec.kept:
            assert x is not None, f"fla did not keep {name}"
            kept.append(x.clone() if x.data_ptr() == o.data_ptr() else x)
    return [o.contiguous(), last_state.contiguous(), *kept]


@fla.register_fake
def shapes(
    kernel: str,
    inputs: list[Tensor],
    state: Tensor | None,
    cu_lengths: Tensor | None,
    cu_lengths_cpu: Tensor | None,
    scale: float,
) -> list[Tensor]:
    spec = KERNELS[kernel]
    given = dict(zip(spec.inputs, inputs))
    first = inputs[0]
    B, T = first.shape[:2]
    if "x" in given:
        outputs = [torch.empty_like(first), first.new_empty(B, *given["weight"].shape)]
    else:
        v = given["v"]
        states = (B, v.shape[2], first.shape[-1], v.shape[-1])
        if "s" in given:
            states = (*states[:2], given["s"].shape[-1], states[2] + states[3])
        outputs = [
            v.new_empty(v.shape, dtype=first.dtype),
            v.new_empty(states, dtype=torch.float32),
        ]
    rows = (B, T) if cu_lengths is None else (1, B * T)
    for kept in spec.kept.values():
        like = given[kept.like]
        shape = [*rows, *like.shape[2:]]
        if kept.of_chunk:
            heads = given["v"].shape[2]
            shape = [*rows, heads, spec.chunk_size(rows[1])]
        outputs.append(like.new_empty(shape, dtype=kept.dtype or like.dtype))
    return outputs


@torch.library.custom_op("longfire::fla_backward", mutates_args=())
def fla_backward(
    kernel: str,
    inputs: list[Tensor],
    kept: list[Tensor],
    state: Tensor | None,
    cu_lengths: Tensor | None,
    cu_lengths_cpu: Tensor | None,
    scale: float,
    d_o: Tensor,
    d_last_state: Tensor | None,
) -> list[Tensor]:
    """The gradients of all inputs, and of the state if there is one. inputs: those that the
    backward needs."""
    spec = KERNELS[kernel]
    call = Call(spec, spec.needed, inputs, state, cu_lengths, cu_lengths_cpu, scale)
    tables = {"chunk_indices": call.chunk_indices(), "chunk_size": call.chunk}
    known = {**call.arguments, **tables, **dict(zip(spec.kept, kept)), "": None}
    context = SimpleNamespace(**{**call.arguments, **tables})
    context.saved_tensors = tuple(known[name] for name in spec.saved)
    d_o = call.laid_end_to_end("v", d_o.contiguous())
    if d_last_state is not None:
        d_last_state = call.of_documents(d_last_state.contiguous(), call.last_documents())
    with torch.cuda.device_of(inputs[0]):
        found = dict(
            zip(parameters_of(spec.function), spec.function.backward(context, d_o, d_last_state))
        )
    gradients = []
    for name, like in likes_of_gradients(spec, inputs, kept).items():
        gradients.append(found[name].view(like.shape).to(like.dtype).contiguous())
    if state is not None:
        d_state = found["initial_state"]
        numbers = call.first_documents()
        gradients.append((d_state if numbers is None else d_state[numbers]).to(state.dtype))
    return gradients


@fla_backward.register_fake
def shapes_of_gradients(
    kernel: str,
    inputs: list[Tensor],
    kept: list[Tensor],
    state: Tensor | None,
    cu_lengths: Tensor | None,
    cu_lengths_cpu: Tensor | None,
    scale: float,
    d_o: Tensor,
    d_last_state: Tensor | None,
) -> list[Tensor]:
    likes = list(likes_of_gradients(KERNELS[kernel], inputs, kept).values())
    if state is not None:
        likes.append(state)
    return [torch.empty_like(x) for x in likes]


def likes_of_gradients(spec: Kernel, inputs: list[Tensor], kept: list[Tensor]) -> dict[str, Tensor]:
    """For each input a tensor of its size and type. Of a decay that the backward does not need,
    that is its sum over a chunk."""
    given = dict(zip(spec.needed, inputs))
    sums = dict(zip(spec.kept, kept))
    likes: dict[str, Tensor] = {}
    for name in spec.inputs:
        if name in given:
            likes[name] = given[name]
        else:
            rows = given["q"].shape[:2]
            likes[name] = sums[f"{name}_sum"].view(*rows, *sums[f"{name}_sum"].shape[2:])
    return likes


def keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.kernel, tensors, state, *lengths, ctx.scale = inputs
    spec = KERNELS[ctx.kernel]
    given = dict(zip(spec.inputs, tensors))
    ctx.save_for_backward(state, *lengths, *[given[name] for name in spec.needed], *output[2:])
    ctx.set_materialize_grads(False)


def gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    spec = KERNELS[ctx.kernel]
    state, cu_lengths, cu_lengths_cpu, *tensors = ctx.saved_tensors
    inputs = tensors[: len(spec.needed)]
    kept = tensors[len(spec.needed) :]
    d_o, d_last_state = grads[:2]
    if d_o is None:
        assert d_last_state is not None, "one of the two has a gradient"
        like = inputs[spec.needed.index("v" if "v" in spec.needed else "x")]
        d_o = torch.zeros_like(like, dtype=inputs[0].dtype)
    found = fla_backward(
        ctx.kernel, inputs, kept, state, cu_lengths, cu_lengths_cpu, ctx.scale, d_o, d_last_state
    )
    d_state = None if state is None else found[-1]
    return None, found[: len(spec.inputs)], d_state, None, None, None


fla.register_autograd(gradients, setup_context=keep)


def parameters_of(function: type[torch.autograd.Function]) -> list[str]:
    """The names of the arguments of its forward but for the context, in their order."""
    return list(inspect.signature(function.forward).parameters)[1:]
