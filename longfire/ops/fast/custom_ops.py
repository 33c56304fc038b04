"""fla's autograd functions as two operators of torch: one for the forward, one for the backward.

torch.compile cannot trace fla's functions, and breaks the graph around them. It need not trace an
operator of torch.library: the operator is a node of the graph, whose shapes are known (`shapes`)
and whose backward is another operator. What a function of fla would save for its backward, and is
neither an input nor a table of documents, is an output of the forward operator. No forward is
computed twice.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from fla.ops.utils.index import prepare_chunk_indices
from torch import Tensor

from longfire.ops.fast.fla_functions import KERNELS, ROWS, UNUSED, Kernel
from longfire.ops.fast.known_lengths import known_lengths


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
        lengths = cu_lengths
        if cu_lengths is not None and cu_lengths_cpu is not None:
            lengths = known_lengths(cu_lengths, cu_lengths_cpu)
        self.arguments = {
            **UNUSED,
            **self.kernel.options,
            **self.inputs,
            "scale": scale,
            "initial_state": self.state,
            "output_final_state": True,
            "cu_seqlens": lengths,
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
        lengths = self.arguments["cu_seqlens"]
        lengths_cpu = self.arguments["cu_seqlens_cpu"]
        table: Tensor = prepare_chunk_indices(lengths, self.chunk, cu_seqlens_cpu=lengths_cpu)
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
