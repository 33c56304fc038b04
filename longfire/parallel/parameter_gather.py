"""Sharded parameters travel in the type that they are multiplied in.

FSDP2 gathers fp32 shards, and `Linear` rounds its weight to the compute type before each product.
Here the rounding comes before the gathering: the processes send matrices in bf16 and all other
parameters in fp32, and every one of them has the same fp32 numbers as before in its place. One
process rounds the same weights to the same numbers, so no result changes, and gradients stay fp32.
(FSDP2's own `MixedPrecisionPolicy(param_dtype=torch.bfloat16)` rounds norms, decay rates and all
gradients too.)

Matrices that multiply 8-bit numbers (parallel/float8_layers.py) are rounded from fp32, so bf16
would change them: they travel in fp32, or, with float8.enable_fsdp_float8_all_gather, in a form
from which the same 8-bit numbers follow (ops/float8_weights.py): as 8-bit numbers, or in bf16
rounded to odd.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from longfire.config import settings
from longfire.ops.float8 import E4M3, RECIPES, Float8
from longfire.ops.float8_weights import as_8_bits, of_8_bits, rounded_to_odd
from longfire.ops.linear import Linear
from longfire.row_shards import local

ALIGNMENT_BYTES = 16  # of what one process sends: fp32 numbers begin at multiples of 4


# How a parameter travels, the widest first: in fp32; rounded to the compute type; to odd bf16; as
# 8-bit numbers
Form = Literal["full", "rounded", "odd", "8 bits"]


class Segment(NamedTuple):
    """A parameter in the flat tensor that FSDP2 gathers."""

    owner: nn.Module
    leaf: str  # its name there
    numbers: int  # of this process, with the padding to equal shards
    form: Form


class Span(NamedTuple):
    """Neighbouring segments of one form: their place in the flat tensor, and in what is sent. (One
    segment of 8-bit numbers, which has a scale of its own.)"""

    begin: int  # number in the flat tensor
    end: int
    first_byte: int  # in what one process sends
    form: Form


class RoundedGather:
    """The all-gather of one FSDP2 module (`FSDPModule.set_custom_all_gather`): takes fp32 shards,
    sends each parameter in its form, leaves fp32. rounded_dtype: of matrices that are used rounded
    to it."""

    def __init__(self, segments: Sequence[Segment], rounded_dtype: torch.dtype) -> None:
        self.segments = segments
        self.dtypes: dict[Form, torch.dtype] = {
            "full": torch.float32,
            "rounded": rounded_dtype,
            "odd": torch.bfloat16,
            "8 bits": E4M3,
        }
        self.spans, self.sent_bytes = layout(segments, self.dtypes)
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
        highest = self.highest(input_tensor, group)
        received = input_tensor.new_empty(processes, self.sent_bytes, dtype=torch.uint8)
        sent = received[group.rank()]
        for span, place in self.places(sent[None]):
            numbers = input_tensor[None, span.begin : span.end]
            if span.form == "odd":
                numbers = rounded_to_odd(numbers)
            elif span.form == "8 bits":
                numbers = as_8_bits(numbers, highest[span.begin])
            place.copy_(numbers)
        dist.all_gather_single(received.view(-1), sent, group=group)
        output = output_tensor.view(processes, -1)
        for span, place in self.places(received):
            if span.form == "8 bits":
                place = of_8_bits(place, highest[span.begin])
            output[:, span.begin : span.end].copy_(place)

    def highest(self, input_tensor: Tensor, group: dist.ProcessGroup) -> dict[int, Tensor]:
        """The highest magnitude of each whole matrix that travels as 8-bit numbers, by where it
        begins in the flat tensor: one all-reduce for all, and one over the processes that share
        matrices (tp)."""
        found: list[Tensor] = []
        begins: list[int] = []
        for span in self.spans:
            if span.form == "8 bits":
                found.append(input_tensor[span.begin : span.end].abs().amax())
                begins.append(span.begin)
        if not found:
            return {}
        highest_M = torch.stack(found)
        dist.all_reduce(highest_M, dist.ReduceOp.MAX, group=group)
        float8 = next(float8_of(segment.owner) for segment in self.segments if is_8_bits(segment))
        assert float8 is not None, "they travel so"
        for dim in ("outputs", "inputs"):  # all are split over the same processes, or none is
            if dim in float8.highest:
                highest_M = float8.highest[dim](highest_M)
        return dict(zip(begins, highest_M))

    def places(self, sent_PB: Tensor) -> Iterator[tuple[Span, Tensor]]:
        """The spans, and their numbers in the bytes that processes send: (processes, numbers)."""
        for span in self.spans:
            dtype = self.dtypes[span.form]
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


def layout(
    segments: Sequence[Segment], dtypes: Mapping[Form, torch.dtype]
) -> tuple[list[Span], int]:
    """Where each number is sent, the widest first; and the bytes that one process sends."""
    spans: list[Span] = []
    next_byte: dict[Form, int] = {}
    total = 0
    for form in get_args(Form):
        next_byte[form] = total
        numbers = sum(segment.numbers for segment in segments if segment.form == form)
        total += numbers * dtypes[form].itemsize
    begin = 0
    for segment in segments:
        form = segment.form
        end = begin + segment.numbers
        if spans and spans[-1].form == form and not is_8_bits(segment):
            spans[-1] = spans[-1]._replace(end=end)
        else:
            spans.append(Span(begin, end, next_byte[form], form))
        next_byte[form] += segment.numbers * dtypes[form].itemsize
        begin = end
    return spans, -(-total // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def gathers_rounded(
    parallelism: settings.Parallelism, compute_dtype: torch.dtype, shards: int
) -> bool:
    """Whether matrices travel in bf16: where they are multiplied in it, and `shards`
    processes cut them."""
    is_asked = parallelism.param_gather_dtype == "auto"
    return is_asked and compute_dtype == torch.bfloat16 and shards > 1


def gathers_float8(float8: settings.Float8, shards: int) -> bool:
    """Whether matrices that multiply 8-bit numbers travel in fewer bytes than fp32 has."""
    is_asked = float8.enable_float8_linear and float8.enable_fsdp_float8_all_gather
    return is_asked and shards > 1


def float8_bytes(recipe_name: str) -> int:
    """Of a number of such a matrix on its way."""
    return 2 if RECIPES[recipe_name].has_powers_of_two else 1


def gather_rounded(
    module: FSDPModule, processes: int, rounded_dtype: torch.dtype, rounds: bool, float8: bool
) -> None:
    """Let an FSDP2 module gather so. processes: that share its parameters. rounds: matrices travel
    in rounded_dtype. float8: those that multiply 8-bit numbers in fewer bytes."""
    segments = list(segments_of(module, processes, rounds, float8))
    if any(segment.form != "full" for segment in segments):
        gather = RoundedGather(segments, rounded_dtype)
        # torch's base class, which has nothing else, is in a private module.
        module.set_custom_all_gather(gather)  # type: ignore[arg-type]


def segments_of(
    module: FSDPModule, processes: int, rounds: bool, float8: bool
) -> Iterator[Segment]:
    """What an FSDP2 module gathers, in its order: those of inner modules first."""
    assert isinstance(module, nn.Module)
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for inner in inner_modules_first(module):
        for leaf, parameter in inner.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((inner, leaf))
    for parameter, places in owners.items():
        rows = -(-len(parameter) // processes)
        numbers = rows * (parameter.numel() // len(parameter))
        forms = {form_of(inner, leaf, rounds, float8) for inner, leaf in places}
        form = forms.pop() if len(forms) == 1 else "full"
        yield Segment(*places[0], numbers, form)


def inner_modules_first(module: nn.Module) -> Iterator[nn.Module]:
    """A module after its children, without those that are gathered by themselves."""
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from inner_modules_first(child)
    yield module


def form_of(module: nn.Module, leaf: str, rounds: bool, float8: bool) -> Form:
    """How a parameter of this module may travel, so that the module computes the same. (Biases may
    be added in fp32.)"""
    if not isinstance(module, Linear) or leaf != "weight":
        return "full"
    multiplies = float8_of(module)
    if multiplies is None:
        return "rounded" if rounds else "full"
    if not float8:
        return "full"
    return "odd" if multiplies.recipe.has_powers_of_two else "8 bits"


def float8_of(module: nn.Module) -> Float8 | None:
    """How a matrix multiplies 8-bit numbers, if it does."""
    if isinstance(module, Linear) and isinstance(module.float8, Float8):
        return module.float8
    return None


def is_8_bits(segment: Segment) -> bool:
    return segment.form == "8 bits"
