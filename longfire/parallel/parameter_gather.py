"""Sharded parameters travel in the type that they are multiplied in.

FSDP2 gathers fp32 shards, and `Linear` rounds its weight to the compute type before each product.
Here the rounding comes before the gathering: the processes send matrices in bf16 and all other
parameters in fp32, and every one of them has the same fp32 numbers as before in its place. One
process rounds the same weights to the same numbers, so no result changes, and gradients stay fp32.
(FSDP2's own `MixedPrecisionPolicy(param_dtype=torch.bfloat16)` rounds norms, decay rates and all
gradients too.)
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from longfire.config.settings import Parallelism
from longfire.ops.linear import Linear
from longfire.row_shards import local

ALIGNMENT_BYTES = 16  # of what one process sends: fp32 numbers begin at multiples of 4


class Segment(NamedTuple):
    """A parameter in the flat tensor that FSDP2 gathers."""

    owner: nn.Module
    leaf: str  # its name there
    numbers: int  # of this process, with the padding to equal shards
    is_rounded: bool  # whether it is used rounded to the compute type only


class Span(NamedTuple):
    """Neighbouring segments of one kind: their place in the flat tensor, and in what is sent."""

    begin: int  # number in the flat tensor
    end: int
    first_byte: int  # in what one process sends
    is_rounded: bool


class RoundedGather:
    """The all-gather of one FSDP2 module (`FSDPModule.set_custom_all_gather`): takes fp32 shards,
    sends matrices in `sent_dtype` and the rest in fp32, leaves fp32."""

    def __init__(self, segments: Sequence[Segment], sent_dtype: torch.dtype) -> None:
        self.segments = segments
        self.sent_dtype = sent_dtype
        self.spans, self.sent_bytes = layout(segments, sent_dtype)
        self.order_is_known = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The flat tensor of all processes, as FSDP2 asks for it."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        """input_tensor: (N,) fp32, this process's shards, a part of output_tensor (processes * N,),
        which takes those of all. The caller's stream waits, not the host, so there is nothing else
        to wait for (async_op)."""
        if not self.order_is_known:
            self.check_order(input_tensor)
            self.order_is_known = True
        processes = group.size()
        received = input_tensor.new_empty(processes, self.sent_bytes, dtype=torch.uint8)
        sent = received[group.rank()]
        for span, place in self.places(sent[None]):
            place.copy_(input_tensor[None, span.begin : span.end])
        dist.all_gather_single(received.view(-1), sent, group=group)
        output = output_tensor.view(processes, -1)
        for span, place in self.places(received):
            output[:, span.begin : span.end].copy_(place)

    def places(self, sent_PB: Tensor) -> Iterator[tuple[Span, Tensor]]:
        """The spans, and their numbers in the bytes that processes send: (processes, numbers)."""
        for span in self.spans:
            dtype = self.sent_dtype if span.is_rounded else torch.float32
            last_byte = span.first_byte + (span.end - span.begin) * dtype.itemsize
            yield span, sent_PB[:, span.first_byte : last_byte].view(dtype)

    def check_order(self, input_tensor: Tensor) -> None:
        """That the flat tensor has the parameters in the order of `segments_of`, once: torch does
        not promise it, and other numbers than those of matrices must not be rounded."""
        begin = 0
        for segment in self.segments:
            shard = local(getattr(segment.owner, segment.leaf).detach()).flatten()
            here = input_tensor[begin : begin + len(shard)]
            assert torch.equal(here, shard.to(here)), "this torch gathers in another order"
            begin += segment.numbers
        assert begin == len(input_tensor), "this torch gathers something else too"


def layout(segments: Sequence[Segment], sent_dtype: torch.dtype) -> tuple[list[Span], int]:
    """Where each number is sent, fp32 numbers first; and the bytes that one process sends."""
    spans: list[Span] = []
    wide_bytes = sum(4 * segment.numbers for segment in segments if not segment.is_rounded)
    next_byte = {False: 0, True: wide_bytes}
    begin = 0
    for segment in segments:
        kind = segment.is_rounded
        end = begin + segment.numbers
        if spans and spans[-1].is_rounded == kind:
            spans[-1] = spans[-1]._replace(end=end)
        else:
            spans.append(Span(begin, end, next_byte[kind], kind))
        next_byte[kind] += segment.numbers * (sent_dtype.itemsize if kind else 4)
        begin = end
    sent_bytes = -(-next_byte[True] // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return spans, sent_bytes


def gathers_rounded(parallelism: Parallelism, compute_dtype: torch.dtype, shards: int) -> bool:
    """Whether matrices travel in bf16: where they are multiplied in it, and `shards`
    processes cut them."""
    is_asked = parallelism.param_gather_dtype == "auto"
    return is_asked and compute_dtype == torch.bfloat16 and shards > 1


def gather_rounded(module: FSDPModule, processes: int, sent_dtype: torch.dtype) -> None:
    """Let an FSDP2 module gather so. processes: that share its parameters."""
    segments = list(segments_of(module, processes))
    if any(segment.is_rounded for segment in segments):
        gather = RoundedGather(segments, sent_dtype)
        # torch's base class, which has nothing else, is in a private module.
        module.set_custom_all_gather(gather)  # type: ignore[arg-type]


def segments_of(module: FSDPModule, processes: int) -> Iterator[Segment]:
    """What an FSDP2 module gathers, in its order: those of inner modules first."""
    assert isinstance(module, nn.Module)
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for inner in inner_modules_first(module):
        for leaf, parameter in inner.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((inner, leaf))
    for parameter, places in owners.items():
        rows = -(-len(parameter) // processes)
        numbers = rows * (parameter.numel() // len(parameter))
        is_rounded = all(is_rounded_by(inner, leaf) for inner, leaf in places)
        yield Segment(*places[0], numbers, is_rounded)


def inner_modules_first(module: nn.Module) -> Iterator[nn.Module]:
    """A module after its children, without those that are gathered by themselves."""
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from inner_modules_first(child)
    yield module


def is_rounded_by(module: nn.Module, leaf: str) -> bool:
    """Whether this module uses its parameter rounded to the compute type only. (8-bit products
    round from fp32, and biases may be added in fp32.)"""
    return isinstance(module, Linear) and leaf == "weight" and module.float8 is None
