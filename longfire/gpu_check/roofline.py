"""What a step of a model must at least do: its kernels, FLOPs and bytes, counted on fake tensors,
and the seconds that a device needs for them (the roofline of Williams 2009).

Softmax attention, recurrences and short convolutions count as the one kernel that a GPU has for
each, by the formulas below. Everything else is counted operator by operator. Compiled: all
operators between two of those kernels or matrix products are one kernel, which reads what it does
not make and writes what is used outside of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self, Unpack

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from longfire.config.model_config import ModelConfig
from longfire.data.pack import NO_LABEL
from longfire.mixers.mixer import Sequence
from longfire.model import Model, on_meta
from longfire.ops.bf16 import native_bf16
from longfire.ops.cross_entropy import LossRules, fused
from longfire.ops.documents import Documents
from longfire.ops.pretending import pretending_cuda
from longfire.ops.recurrence import RecurrenceOp
from longfire.ops.sequence_ops import LocalSequence
from longfire.parallel.cost import OPTIMIZER_BYTES, Device
from longfire.planner.listener import AttentionOptions, ConvolutionOptions, TokenShiftOptions
from longfire.planner.live_bytes import LiveBytes, Operator
from longfire.planner.memory import make_fake

CHUNK = 64  # tokens, of the chunked forms of recurrences
# FLOPs and bytes of a kernel's backward, of those of its forward: flash attention multiplies five
# times where the forward multiplies twice (Dao 2023); recurrences are taken to be alike.
BACKWARD_FLOPS = {"attention": 2.5, "recurrence": 2.5}
BACKWARD_BYTES = 2.0
DELTA_RULES = ("delta_rule", "dplr")  # which solve a system in each chunk: twice the FLOPs
# Assumptions, not measurements: the share of the peak that large kernels of a kind reach, and of
# the memory's bandwidth.
EFFICIENCY = {"GEMM": 0.75, "attention": 0.55, "recurrence": 0.3, "elementwise": 0.0}
BANDWIDTH_SHARE = 0.85
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
# What makes no kernel: memory that is taken, questions about a tensor
WITHOUT_KERNEL = ("empty", "detach", "alias", "sym_", "set_data", "lift_fresh")


@dataclass(frozen=True)
class Kernel:
    """A kernel by its kind, FLOPs, and the bytes of each storage that it reads and writes."""

    kind: str
    flops: float
    reads: Mapping[int, int]
    writes: Mapping[int, int]
    further_bytes: float = 0.0

    @property
    def bytes(self) -> float:
        return sum(self.reads.values()) + sum(self.writes.values()) + self.further_bytes


class KernelCounter(LiveBytes):
    """Counts the kernels that torch's operators start, and those that `CountedSequence` adds."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.kept: list[object] = []  # storages, so that no number of one is given to another
        self.is_paused = False

    def __torch_dispatch__(
        self,
        operation: Operator,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = super().__torch_dispatch__(operation, types, args, kwargs)
        name = operation.name()
        starts_none = any(word in name for word in WITHOUT_KERNEL)
        if not self.is_paused and operation.namespace == "aten" and not starts_none:
            reads = self.storages((args, kwargs))
            writes = self.storages(out)
            is_in_place = name.split(".")[0].endswith("_")
            if is_in_place or not writes.keys() <= reads.keys():  # else a view
                flops = flops_of_product(name, args, out)
                self.kernels.append(
                    Kernel("GEMM" if flops else "elementwise", flops, reads, writes)
                )
        return out

    def storages(self, tensors: object) -> dict[int, int]:
        """The bytes of each storage that these tensors (any nesting) show a part of."""
        found: dict[int, int] = {}
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.kept.append(storage)
                key = storage._cdata
                found[key] = max(found.get(key, 0), min(tensor.nbytes, storage.nbytes()))
        return found

    def add(self, kind: str, flops: float, reads: object, writes: object, more: float) -> None:
        """Count a kernel that is none of torch's."""
        found = Kernel(kind, flops, self.storages(reads), self.storages(writes), more)
        self.kernels.append(found)


def flops_of_product(name: str, args: tuple[object, ...], out: object) -> float:
    """Those of a matrix product: two for each number that is multiplied; 0 of other operators."""
    short = name.split(".")[0]
    if short not in MATRIX_PRODUCTS or not isinstance(out, Tensor):
        return 0.0
    left = args[1] if short in ("aten::addmm", "aten::baddbmm") else args[0]
    assert isinstance(left, Tensor)
    return 2.0 * out.numel() * left.shape[-1]


@dataclass(frozen=True)
class Call:
    """A kernel with a backward: its kind, FLOPs, and bytes beside those of its tensors."""

    counter: KernelCounter
    kind: str
    flops: float
    more_bytes: float


class KernelContext(Protocol):
    """What the forward of CountedKernel leaves for its backward."""

    call: Call
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class CountedKernel(torch.autograd.Function):
    """Stands for a kernel: results of the right shapes, and one kernel in each direction."""

    @staticmethod
    def forward(
        ctx: KernelContext,
        call: Call,
        shapes: tuple[tuple[torch.Size, torch.dtype], ...],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs = tuple(inputs[0].new_empty(size, dtype=dtype) for size, dtype in shapes)
        call.counter.add(call.kind, call.flops, inputs, outputs, call.more_bytes)
        ctx.call = call
        ctx.save_for_backward(*inputs)
        return outputs

    @staticmethod
    def backward(ctx: KernelContext, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        inputs = ctx.saved_tensors
        found = tuple(x.new_empty(x.shape) for x in inputs)
        flops = BACKWARD_FLOPS.get(call.kind, 2.0) * call.flops
        more = BACKWARD_BYTES * call.more_bytes
        call.counter.add(call.kind, flops, (inputs, gradients), found, more)
        return None, None, *found


class CountedSequence:
    """SequenceOps whose kernels are counted as one each; shapes are those of our own forms."""

    def __init__(self, counter: KernelCounter) -> None:
        self.local = LocalSequence()
        self.counter = counter

    def counted(
        self, kind: str, flops: float, more: float, outputs: tuple[Tensor, ...], inputs: object
    ) -> tuple[Tensor, ...]:
        """One kernel with these outputs, whose numbers nobody needs."""
        shapes = tuple((x.shape, x.dtype) for x in outputs)
        tensors: list[Tensor] = []
        for x in tree_leaves(inputs):
            if isinstance(x, Tensor) and x.is_floating_point():
                tensors.append(x)
        call = Call(self.counter, kind, flops, more)
        made: tuple[Tensor, ...] = CountedKernel.apply(call, shapes, *tensors)
        return made

    def attention(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGV: Tensor,
        *,
        window: int | None = None,
        **options: Unpack[AttentionOptions],
    ) -> Tensor:
        """Causal softmax attention: half of all scores, or a window's. Dropout counts as a part of
        the kernel."""
        B, T, H, K = q_BTHK.shape
        V = v_BSGV.shape[-1]
        most = min(window or T, T)
        keys = most - most**2 / (2 * T)  # on average: the first queries see fewer
        flops = 2.0 * B * T * keys * H * (K + V)
        output = q_BTHK.detach().new_empty(B, T, H, V)
        sums = 4.0 * B * T * H  # the logarithm of each query's sum, fp32
        inputs = (q_BTHK, k_BSGK, v_BSGV)
        return self.counted("attention", flops, sums, (output,), inputs)[0]

    def recurrence(
        self,
        op: RecurrenceOp,
        *inputs: Tensor | None,
        documents: Documents | None = None,
        **options: Tensor | float | None,
    ) -> tuple[Tensor, Tensor]:
        """A recurrence in chunks: states are read and updated by 4 K V FLOPs a token and head, and
        a chunk's own tokens by 2 C (K + V); one fp32 state a chunk is written and read."""
        self.counter.is_paused = True
        with torch.no_grad():
            outputs = self.local.recurrence(op, *inputs, documents=documents, **options)
        self.counter.is_paused = False
        state = outputs[1]
        tokens = outputs[0].shape[1]
        rows, columns = state.shape[-2:]
        heads = state.numel() / (rows * columns)
        flops = tokens * heads * (4.0 * rows * columns + 2.0 * CHUNK * (rows + columns))
        if getattr(op, "__name__", "") in DELTA_RULES:
            flops *= 2
        states = 2 * 4.0 * state.numel() * tokens / CHUNK
        made = self.counted("recurrence", flops, states, outputs, (inputs, options))
        return made[0], made[1]

    def convolution(
        self,
        x_BTD: Tensor,
        weight_DW: Tensor,
        bias_D: Tensor | None = None,
        **options: Unpack[ConvolutionOptions],
    ) -> tuple[Tensor, Tensor]:
        """A short convolution, with its nonlinearity; it does too little to count FLOPs."""
        self.counter.is_paused = True
        with torch.no_grad():
            outputs = self.local.convolution(x_BTD, weight_DW, bias_D, **options)
        self.counter.is_paused = False
        made = self.counted("recurrence", 0.0, 0.0, outputs, (x_BTD, weight_DW, bias_D))
        return made[0], made[1]

    def token_shift(
        self, x_BTD: Tensor, **options: Unpack[TokenShiftOptions]
    ) -> tuple[Tensor, Tensor]:
        return self.local.token_shift(x_BTD, **options)

    def document_lengths(self, positions_BT: Tensor, documents: Documents | None) -> Tensor:
        return self.local.document_lengths(positions_BT, documents)

    def cut(self, x_BT: Tensor, fill: float = 0) -> Tensor:
        return x_BT

    def to(self, device: torch.device | str) -> Self:
        return self

    def of(self, rows: slice | Tensor) -> Self:
        return self


def joined_elementwise(kernels: Iterable[Kernel]) -> list[Kernel]:
    """The kernels after torch.compile, at best: elementwise operators in a row are one."""
    runs: list[list[Kernel]] = []
    for kernel in kernels:
        if runs and kernel.kind == "elementwise" and runs[-1][0].kind == "elementwise":
            runs[-1].append(kernel)
        else:
            runs.append([kernel])
    last_read: dict[int, int] = {}
    for place, run in enumerate(runs):
        for kernel in run:
            for key in kernel.reads:
                last_read[key] = place
    found: list[Kernel] = []
    for place, run in enumerate(runs):
        reads: dict[int, int] = {}
        written: dict[int, int] = {}
        for kernel in run:
            for key, size in kernel.reads.items():
                if key not in written:
                    reads[key] = max(size, reads.get(key, 0))
            written |= kernel.writes
        # what nobody reads later leaves the graph, as gradients do, if it is the run's last
        kept: dict[int, int] = {}
        for key, size in written.items():
            if last_read.get(key, place) > place or key in run[-1].writes:
                kept[key] = size
        further = sum(kernel.further_bytes for kernel in run)
        flops = sum(kernel.flops for kernel in run)
        found.append(Kernel(run[0].kind, flops, reads, kept, further))
    return found


@dataclass(frozen=True)
class Totals:
    """Kernels, FLOPs and bytes of a step, by kind."""

    launches: Mapping[str, float]
    flops: Mapping[str, float]
    bytes: Mapping[str, float]

    @classmethod
    def of(cls, kernels: Iterable[Kernel]) -> Self:
        launches = dict.fromkeys(EFFICIENCY, 0.0)
        flops = dict.fromkeys(EFFICIENCY, 0.0)
        sizes = dict.fromkeys(EFFICIENCY, 0.0)
        for kernel in kernels:
            launches[kernel.kind] += 1
            flops[kernel.kind] += kernel.flops
            sizes[kernel.kind] += kernel.bytes
        return cls(launches, flops, sizes)

    def on_line(self, other: Self, count: float) -> Self:
        """The totals at `count` layers of the straight line through these of one layer and others
        of two."""

        def at(one: Mapping[str, float], two: Mapping[str, float]) -> dict[str, float]:
            return {kind: one[kind] + (two[kind] - one[kind]) * (count - 1) for kind in one}

        return replace(
            self,
            launches=at(self.launches, other.launches),
            flops=at(self.flops, other.flops),
            bytes=at(self.bytes, other.bytes),
        )

    def seconds(self, device: Device, at_best: bool = False) -> dict[str, float]:
        """What each kind takes at least on a device: the longer of computing and of moving bytes;
        with the assumed efficiencies, or at_best: at the peaks of the data sheet."""
        peak = device.flops["bfloat16"]
        bandwidth = device.memory_bandwidth
        found: dict[str, float] = {}
        for kind, share in EFFICIENCY.items():
            if at_best:
                share = 1.0
            computing = self.flops[kind] / (peak * share) if share else 0.0
            moving = self.bytes[kind] / (bandwidth * (1.0 if at_best else BANDWIDTH_SHARE))
            found[kind] = max(computing, moving)
        return found


@dataclass(frozen=True)
class Step:
    """A step of a model by the roofline. optimizer_bytes: of clipping and AdamW."""

    model_flops: float
    eager: Totals
    compiled: Totals
    optimizer_bytes: float

    def seconds(self, totals: Totals, device: Device, at_best: bool = False) -> dict[str, float]:
        """Seconds by kind, the optimizer among them."""
        found = totals.seconds(device, at_best)
        share = 1.0 if at_best else BANDWIDTH_SHARE
        found["optimizer"] = self.optimizer_bytes / (device.memory_bandwidth * share)
        return found

    def mfu(self, totals: Totals, device: Device, at_best: bool = False) -> float:
        """The model's FLOPs of the peak, if kernels run one after another and nothing else takes
        time."""
        seconds = sum(self.seconds(totals, device, at_best).values())
        return self.model_flops / seconds / device.flops["bfloat16"]


def counted_step(
    config: ModelConfig, sequences: int, seq_len: int, chunk_tokens: int = 1024
) -> Step:
    """A step of a model with an open or known vocabulary on so many sequences, in bf16, without
    documents and recomputation.

    Layers are taken to be alike: one and two are counted."""
    one = kernels_of(with_layers(config, 1), sequences, seq_len, chunk_tokens)
    two = kernels_of(with_layers(config, 2), sequences, seq_len, chunk_tokens)
    count = config.num_hidden_layers
    whole = on_meta(config, torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in whole.parameters())
    eager = Totals.of(one).on_line(Totals.of(two), count)
    compiled = Totals.of(joined_elementwise(one)).on_line(Totals.of(joined_elementwise(two)), count)
    tokens = sequences * seq_len
    return Step(
        3 * tokens * whole.flops_per_token(seq_len),
        eager,
        compiled,
        OPTIMIZER_BYTES * parameters,
    )


def with_layers(config: ModelConfig, count: int) -> ModelConfig:
    """The same model with so many layers."""
    return replace(config, num_hidden_layers=count, layer_types=config.layer_types[:count])


def kernels_of(
    config: ModelConfig, sequences: int, seq_len: int, chunk_tokens: int
) -> list[Kernel]:
    """The kernels of forward and backward, head and loss among them, in their order."""
    native_bf16(torch.device("cpu"))  # may be measured, which fake tensors cannot do
    model: Model = on_meta(config, torch.bfloat16)
    with (
        pretending_cuda(),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.device("cpu"),
    ):
        make_fake(nn.ModuleList([model]))
        counter = KernelCounter()
        ids_BT = torch.zeros(sequences, seq_len, dtype=torch.int64)
        noise_BT = None
        if config.drops:
            noise_BT = torch.zeros(sequences, seq_len, dtype=torch.int32)
        rules = LossRules(NO_LABEL, None, config.final_logit_softcapping, False, correct=None)
        with counter:
            seq = Sequence(ids_BT, noise_BT=noise_BT, ops=CountedSequence(counter))
            hidden_ND = model(ids_BT, seq).flatten(0, 1)
            head_WD = model.head.weight
            fused(hidden_ND, head_WD, ids_BT.flatten(), chunk_tokens, rules).backward()
    return counter.kernels
