"""Ring Attention's tables 1 to 3 (Liu 2023, arXiv 2310.01889) from their arithmetic, and what
`longfire` fits into the same devices.

docs/planning.md says which assumptions reproduce the printed numbers, and where none does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from longfire.config.model_config import ModelConfig
from longfire.config.run import Run
from longfire.config.settings import Parallelism
from longfire.parallel.cost import Device
from longfire.planner.longest import PIECE, Longest, longest
from longfire.planner.planner import Planner

STATES = 16  # bytes of a parameter in full precision: itself, its gradient, Adam's two moments


@dataclass(frozen=True)
class Size:
    """A LLaMA of the paper: layers, hidden size, heads, MLP, parameters."""

    layers: int
    hidden: int
    heads: int
    mlp: int
    parameters: float

    def model_config(self) -> ModelConfig:
        attention = {"num_heads": self.heads}
        return ModelConfig(
            self.hidden,
            self.layers,
            ("attention",),
            {"attention": attention},
            32000,
            self.mlp,
        )


SIZES = {
    "3B": Size(26, 3200, 32, 8640, 3.43e9),
    "7B": Size(32, 4096, 32, 11008, 6.74e9),
    "13B": Size(40, 5120, 40, 13824, 13.0e9),
    "30B": Size(60, 6656, 52, 17920, 32.5e9),
    "65B": Size(80, 8192, 64, 22016, 65.3e9),
}

# Table 1: bytes of a layer's activations in bf16, of b sequences of s tokens, hidden size h, n
# heads, blocks of c tokens. (The paper prints 2bhs^2 for vanilla attention in all and 2bns^2 for
# its scores alone: a model with h for n would not reach 1,000 tokens.)
ACTIVATIONS = {
    "vanilla": lambda b, s, h, n, c: 2 * b * n * s**2,
    "memory-efficient": lambda b, s, h, n, c: 8 * b * s * h,
    "blockwise": lambda b, s, h, n, c: 2 * b * s * h,
    "ring": lambda b, s, h, n, c: 6 * b * c * h,
}

# Table 2: FLOP/s in bf16, bytes, bytes/s of the link to the next device; printed block and row, in
# 1000 tokens.
HOSTS = {
    "A100 NVLink": (312e12, 80e9, 300e9, 1.0, 6.2),
    "A100 InfiniBand": (312e12, 80e9, 12.5e9, 24.5, 149.5),
    "TPUv3": (123e12, 16e9, 112e9, 1.1, 6.6),
    "TPUv4": (275e12, 32e9, 268e9, 1.0, 6.2),
    "TPUv5e": (196e12, 16e9, 186e9, 1.1, 6.3),
}

# Full precision doubles what a layer keeps for its backward, the blockwise 2bsh; the
# memory-efficient column comes out with the 8bsh of table 1 as it stands.
KEPT = {"vanilla": 1, "memory-efficient": 1, "blockwise": 2}


@dataclass(frozen=True)
class Row:
    """Of table 3: a model on devices, and the printed longest contexts in 1000 tokens (vanilla,
    memory-efficient, blockwise, ring).

    memory: bytes of a device with which the arithmetic gives the printed ones. ring: processes of a
    ring, as the last column has it.
    """

    compute: str
    host: str
    devices: int
    memory: float
    model: str
    printed: tuple[int, int, int, int] | None
    ring: int


ROWS = tuple(
    Row(compute, host, devices, memory, model, printed, ring)
    for compute, host, devices, memory, models in (
        (
            "8x A100 NVLink",
            "A100 NVLink",
            8,
            40e9,
            {"3B": ((4, 32, 64, 512), 8), "7B": ((2, 16, 32, 256), 8), "13B": ((2, 4, 16, 128), 8)},
        ),
        (
            "32x A100 InfiniBand",
            "A100 InfiniBand",
            32,
            80e9,
            {
                "7B": ((4, 64, 128, 4096), 32),
                "13B": ((4, 32, 64, 2048), 32),
                "30B": (None, 32),
                "65B": (None, 32),
            },
        ),
        (
            "TPUv3-512",
            "TPUv3",
            512,
            8e9,
            {"7B": ((1, 4, 8, 2048), 256), "13B": ((1, 2, 8, 1024), 128)},
        ),
        (
            "TPUv4-1024",
            "TPUv4",
            1024,
            16e9,
            {
                "3B": ((8, 16, 32, 16384), 512),
                "7B": ((4, 8, 16, 8192), 512),
                "13B": ((4, 8, 16, 4096), 256),
                "30B": ((2, 4, 8, 2048), 256),
                "65B": (None, 256),
            },
        ),
        (
            "TPUv5e-256",
            "TPUv5e",
            256,
            16e9,
            {"3B": ((4, 8, 32, 4096), 128), "7B": ((2, 8, 16, 2048), 128)},
        ),
    )
    for model, (printed, ring) in models.items()
)


def minimum_block(flops: float, link: float) -> tuple[float, float]:
    """(c, s) tokens: a block whose attention, 4 c^2 h FLOPs, takes as long as its keys and values,
    4 c h bytes in bf16, to the next device; and the six blocks that a device then holds (section
    3)."""
    return flops / link, 6 * flops / link


def bytes_kept(kind: str, size: Size, tokens: int) -> float:
    """Of all layers' activations, for one sequence of so many tokens."""
    activations = ACTIVATIONS[kind](1, tokens, size.hidden, size.heads, 0)
    return KEPT[kind] * size.layers * activations


def arithmetic(row: Row) -> dict[str, int]:
    """The four columns of table 3 in 1000 tokens, powers of two as they are printed: one row a
    device, parameters in full precision over all devices, activations of all layers in what is
    left; the ring as many times the blockwise column as it has processes."""
    size = SIZES[row.model]
    free = row.memory - STATES * size.parameters / row.devices
    columns: dict[str, int] = {}
    for kind in KEPT:
        columns[kind] = thousands(partial(bytes_kept, kind, size), free)
    return {**columns, "ring": columns["blockwise"] * row.ring}


def thousands(bytes_of: Callable[[int], float], free: float) -> int:
    """The largest power of two of 1000 tokens whose bytes fit; 0 if none."""
    most = 0
    while bytes_of(1000 * max(1, 2 * most)) <= free:
        most = max(1, 2 * most)
    return most


def device_of(row: Row) -> Device:
    """The paper's device, as table 2 has it: a core of TPUv3, two of TPUv4."""
    flops, memory, link, _, _ = HOSTS[row.host]
    link_inside = max(link, 300e9 if "A100" in row.host else link)
    return Device(
        row.host,
        memory,
        {"bfloat16": flops, "float32": flops},
        1e12,
        link_inside,
        link,
        8,
    )


def devices_of(row: Row) -> int:
    """TPUv4's number counts cores, of which a device has two."""
    if row.host == "TPUv4":
        return row.devices // 2
    return row.devices


def ours(
    run: Run,
    dtype: str = "bfloat16",
    rows: tuple[Row, ...] = ROWS,
) -> Iterator[tuple[Row, Longest]]:
    """The longest sequence that fits on the devices of each row of table 3 with our plans,
    activations in `dtype`."""
    planners: dict[str, Planner] = {}
    training = replace(run.training, seq_len=PIECE)
    plain = replace(
        run,
        training=training,
        parallelism=Parallelism(),
        degrees=dict.fromkeys(run.degrees, 1),
    )
    for row in rows:
        if row.model not in planners:
            planners[row.model] = Planner(
                replace(plain, model_config=SIZES[row.model].model_config()),
                device_of(row),
                dtype,
            )
        yield row, longest(planners[row.model].on(device_of(row)), devices_of(row))
