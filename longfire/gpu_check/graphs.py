"""A block of each mixer under torch.compile: its graphs and breaks, recompilations over lengths and
documents, the kernels of a step, and how often the host waits for the device."""

import gc
import warnings
from functools import partial

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from longfire.config.model_config import ModelConfig
from longfire.data.batch import Batch
from longfire.gpu_check.findings import noted
from longfire.gpu_check.kernel_kinds import kernels_of
from longfire.gpu_check.stage import Outcome, Stage, Work
from longfire.initialise import build
from longfire.json_types import JsonObject
from longfire.loss import loss_sum
from longfire.mixers import MIXERS
from longfire.model import Model
from longfire.ops.bf16 import native_bf16
from longfire.ops.choice import choose
from longfire.ops.documents import Documents

# Settings of two equal blocks of hidden size 256, with heads that kernels take
SETTINGS: dict[str, JsonObject] = {
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "gla": {"num_heads": 2, "use_short_conv": True},
    "gated_delta_net": {"num_heads": 2, "head_dim": 64},
    "mamba2": {"head_dim": 64, "state_size": 64},
    "linear_attention": {"num_heads": 2},
    "retention": {"num_heads": 2},
    "gsa": {"num_heads": 4, "num_slots": 32},
    "hgrn2": {"expand_ratio": 64},
    "delta_net": {"num_heads": 2},
    "kda": {"num_heads": 2, "head_dim": 64},
    "rwkv7": {"head_dim": 64},
    "mamba": {"state_size": 16},
}
# Blocks that are not Llama's
MLPS = {"mamba": "none", "mamba2": "none", "rwkv7": "channel_mix"}
WITH_LAYERNORM = ("rwkv7",)
FIRST = ("attention", "gla", "gated_delta_net", "mamba2")  # those of the models that are timed
LENGTHS = {True: (48, 64), False: (512, 768)}  # True: small
HIDDEN = {True: 128, False: 256}
SEQUENCES, WORDS = 2, 512
# By whether kernels are made: at small sizes, and without a GPU, they say nothing
COMPILER = {True: "inductor", False: "aot_eager_decomp_partition"}
WAITED = "synchronizing CUDA operation"


class Block:
    """Two equal blocks of a mixer, compiled as training compiles them, and the counter of their
    graphs."""

    def __init__(self, mixer: str, work: Work) -> None:
        torch._dynamo.reset()
        counters.clear()
        self.work = work
        device = work.device
        choose(device, "auto")
        dtype = torch.bfloat16 if native_bf16(device) else torch.float32
        config = ModelConfig(
            hidden_size=HIDDEN[work.is_small],
            num_hidden_layers=2,
            layer_types=(mixer,),
            mixers={mixer: dict(SETTINGS[mixer])},
            intermediate_size=2 * HIDDEN[work.is_small],
            vocab_size=WORDS,
            mlp=MLPS.get(mixer, "swiglu"),
            norm="layernorm" if mixer in WITH_LAYERNORM else "rmsnorm",
            embed_norm=mixer in WITH_LAYERNORM,
        )
        self.model: Model = build(config, 0, device, dtype)
        self.makes_kernels = work.is_cuda and not work.is_small
        self.counter = CompileCounterWithBackend(COMPILER[self.makes_kernels])
        for block in self.model.layers:
            block.compile(dynamic=False, backend=self.counter)

    def step(self, tokens: int, number: int, has_documents: bool) -> int:
        """Forward and backward of a batch; the graphs that it made."""
        before = self.counter.frame_count
        rows = batch(tokens, number, has_documents).to(self.work.device)
        loss_sum(self.model, rows, tokens).backward()
        self.model.zero_grad(set_to_none=True)
        return self.counter.frame_count - before

    def waits(self, tokens: int, has_documents: bool) -> int:
        """How often the host waits for the device between forward and backward of a batch that is
        there."""
        rows = batch(tokens, 1, has_documents).to(self.work.device)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                loss_sum(self.model, rows, tokens).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.model.zero_grad(set_to_none=True)
        return sum(WAITED in str(one.message) for one in caught)

    def launches(self, tokens: int) -> int:
        """Kernels and copies of a forward and a backward of the model."""
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            self.step(tokens, 0, False)
            torch.cuda.synchronize()
        return len(kernels_of(profiled))


def batch(tokens: int, number: int, has_documents: bool) -> Batch:
    """Random text; each number has documents of its own."""
    generator = torch.Generator().manual_seed(number)
    size = SEQUENCES, tokens
    ids_BT = torch.randint(WORDS, size, generator=generator)
    positions_BT = torch.arange(tokens).expand(size).contiguous()
    documents = None
    if has_documents:
        starts_BT = torch.zeros(size, dtype=torch.bool)
        starts_BT[:, 7 + 5 * number :: 11 + number] = True
        documents = Documents.from_ids(starts_BT.long().cumsum(1))
    return Batch(ids_BT, ids_BT, positions_BT, documents)


def look_at(mixer: str, work: Work) -> tuple[JsonObject, list[str]]:
    """The numbers of a mixer's block, and what of them is wrong."""
    short, long = LENGTHS[work.is_small]
    block = Block(mixer, work)
    found: JsonObject = {
        "graphs": block.step(short, 0, False),
        "again": block.step(short, 1, False),
        "longer": block.step(long, 0, False),
        "short_again": block.step(short, 2, False),
    }
    breaks = sum(counters["graph_break"].values())
    found |= {
        "breaks": breaks,
        "with_documents": block.step(short, 0, True),
        "other_documents": block.step(short, 1, True) + block.step(short, 2, True),
    }
    found["breaks_with_documents"] = sum(counters["graph_break"].values()) - breaks
    if work.is_cuda:
        found["waits"] = block.waits(short, False)
        found["waits_with_documents"] = block.waits(short, True)
    if block.makes_kernels:
        found["launches"] = block.launches(short)
    problems: list[str] = []
    for name, what in (
        ("again", "another batch"),
        ("short_again", "a length that was there before"),
        ("other_documents", "other documents"),
    ):
        if found[name]:
            problems.append(f"{mixer}: {what} made {found[name]} graphs anew")
    if found.get("waits"):
        problems.append(f"{mixer}: the host waits {found['waits']} times for the device")
    if breaks:
        problems.append(f"{mixer}: {breaks} breaks, of ops that compile into one graph")
    with_documents = found["breaks_with_documents"]
    # softmax attention of documents is one operator on CUDA and in half precision only
    if with_documents and work.is_cuda and native_bf16(work.device):
        problems.append(f"{mixer}: {with_documents} breaks with documents")
    return found, problems


def measure(work: Work, mixers: tuple[str, ...]) -> Outcome:
    """Mixer after mixer, as long as there is time."""
    numbers: JsonObject = {}
    problems: list[str] = []
    missing: list[str] = []
    shown: list[str] = []
    slowest = 0.0
    for mixer in mixers:
        left = work.seconds_left
        if left < 1.5 * slowest:
            missing.append(f"{mixer}: no time was left")
            continue
        work.note(mixer)
        with noted(problems, mixer):
            found, wrong = look_at(mixer, work)
            numbers[mixer] = found
            problems += wrong
            shown.append(row_of(mixer, found))
        gc.collect()
        slowest = max(slowest, left - work.seconds_left)
    row = "; ".join(shown) or "none could be looked at"
    return Outcome(row, numbers, tuple(problems), tuple(missing))


def row_of(mixer: str, found: JsonObject) -> str:
    """A mixer's part of the line of the table."""
    words = [
        f"{mixer} {found['graphs']} graphs",
        f"{found['breaks']} breaks",
        f"{found['longer']} anew for a longer row",
    ]
    if "waits" in found:
        words.append(f"{found['waits']} waits ({found['waits_with_documents']} with documents)")
    if "launches" in found:
        words.append(f"{found['launches']} launches")
    return ", ".join(words)


def others() -> tuple[str, ...]:
    """The mixers that have no stage of their own."""
    return tuple(name for name in MIXERS if name not in FIRST)


STAGES = tuple(Stage(f"graphs {name}", 30, 8, partial(measure, mixers=(name,))) for name in FIRST)
LAST = Stage("graphs of other mixers", 150, 25, partial(measure, mixers=others()))
