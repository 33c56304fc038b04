"""Training steps of a Llama-shaped model: ours against a plain PyTorch loop around transformers' LlamaForCausalLM (sdpa).

30M parameters, 50,257 words, rows of 512 tokens; both sides have fp32 master weights, clipping and torch's fused AdamW, in bf16 the
peer runs under autocast. Eager against eager, compiled against compiled. Goals: tokens/s at least 1.5x eager and
1.2x compiled, peak memory at most 0.6x. Every side runs in processes of its own, in turn with its peer; the first steps
(compiling, optimizer state) are not timed, and the matmul peak is taken in the same process.

Where the CPU has no bf16 units, torch's bf16 matmul takes minutes a step: both sides then take one row in bf16, and the peer a
single step, eager without warm-up. The ratio there tells of the units, not of the loops.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import RESULTS, arguments, peak_rss_bytes, print_table, seconds, write_result
from torch import Tensor

from longfire.checkpoint.state import State
from longfire.config import settings
from longfire.config.model_config import ModelConfig
from longfire.data.batch import Batch
from longfire.device import Clock, matmul_peak
from longfire.initialise import build
from longfire.ops.bf16 import native_bf16
from longfire.optim import make_optimizer
from longfire.parallel.apply import parallelize
from longfire.training.step import train_step

CPU = torch.device("cpu")
FULL = {
    "hidden": 384,
    "layers": 6,
    "heads": 6,
    "intermediate": 1024,
    "words": 50257,
    "rows": 8,
    "tokens": 512,
}
QUICK = {
    "hidden": 64,
    "layers": 2,
    "heads": 2,
    "intermediate": 128,
    "words": 1000,
    "rows": 2,
    "tokens": 64,
}
LR, WARMUP_STEPS, MEMORY = 3e-4, 2, 0.6
Step = Callable[[Tensor], None]


def ours(size: dict[str, int], dtype: torch.dtype, compiled: bool) -> tuple[Step, float]:
    """A step on ids (rows, tokens + 1), and the FLOPs of a token's forward and backward."""
    shape = ModelConfig(
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        layer_types=("attention",),
        mixers={"attention": {"num_heads": size["heads"]}},
        intermediate_size=size["intermediate"],
        vocab_size=size["words"],
        tie_word_embeddings=True,
    )
    model = build(shape, 0, CPU, dtype)
    flops = 3 * model.flops_per_token(size["tokens"])
    model = parallelize(model, settings.ActivationCheckpoint(), compiled)
    state, training = (
        State(model, make_optimizer(model, settings.Optimizer(), CPU)),
        settings.Training(),
    )
    positions_BT = torch.arange(size["tokens"]).expand(size["rows"], -1)

    def step(ids: Tensor) -> None:
        train_step(state, [Batch(ids[:, :-1], ids[:, 1:], positions_BT)], LR, training, Clock(CPU))

    return step, flops


def peer(size: dict[str, int], dtype: torch.dtype, compiled: bool) -> tuple[Step, float]:
    """The loop that a reader would write."""
    config = transformers.LlamaConfig(
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        intermediate_size=size["intermediate"],
        vocab_size=size["words"],
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    forward = torch.compile(model) if compiled else model

    def step(ids: Tensor) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = forward(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, 0.0


def take_steps(
    side: str, dtype: torch.dtype, compiled: bool, size: dict[str, int], steps: int
) -> dict[str, Any]:
    """What one process does: warm-up, timed steps, the matmul peak."""
    torch.manual_seed(0)
    slow_peer = side == "peer" and is_reference(dtype)
    step, flops = {"ours": ours, "peer": peer}[side](size, dtype, compiled)
    ids = torch.randint(size["words"], (size["rows"], size["tokens"] + 1))
    for _ in range(0 if slow_peer else WARMUP_STEPS):
        step(ids)
    times = [seconds(lambda: step(ids)) for _ in range(1 if slow_peer else steps)]
    peak, source = matmul_peak(CPU, dtype)
    return {"seconds": times, "flops_per_token": flops, "matmul_peak": peak, "peak_source": source}


def is_reference(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and not native_bf16(CPU)


def measure(side: str, kind: tuple[str, bool], size: dict[str, int], steps: int) -> dict[str, Any]:
    """`take_steps` in a fresh process, with that process's peak memory."""
    dtype, compiled = kind
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        task = json.dumps(
            {"side": side, "dtype": dtype, "compiled": compiled, "size": size, "steps": steps}
        )
        peak_bytes = peak_rss_bytes([__file__, "--task", task, "--out", out])
        return {**json.loads(out.read_text()), "peak_memory_bytes": peak_bytes}


def compare(
    kind: tuple[str, bool], size: dict[str, int], steps: int, repeats: int
) -> list[dict[str, Any]]:
    """A row for each side that is measured; `repeats` processes of each, in turn."""
    dtype, compiled = kind
    sides = ("ours",) if compiled and is_reference(getattr(torch, dtype)) else ("ours", "peer")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, taken in runs.items():
            taken.append(measure(side, kind, size, steps))
    flops = runs["ours"][0]["flops_per_token"]
    rows = []
    for side, taken in runs.items():
        rate = (
            size["rows"]
            * size["tokens"]
            / statistics.median(t for run in taken for t in run["seconds"])
        )
        peak = statistics.median(run["matmul_peak"] for run in taken)
        rows.append(
            {
                "type": dtype,
                "mode": "compiled" if compiled else "eager",
                "side": side,
                "rows": size["rows"],
                "steps": sum(len(run["seconds"]) for run in taken),
                "tokens/s": rate,
                "of matmul peak": rate * flops / peak,
                "peak MB": statistics.median(run["peak_memory_bytes"] for run in taken) / 1e6,
            }
        )
    return rows


def ratio(ours_row: dict[str, Any], peer_row: dict[str, Any], goal: float) -> dict[str, Any]:
    """Ours to the peer's."""
    speed, memory = (
        ours_row["tokens/s"] / peer_row["tokens/s"],
        ours_row["peak MB"] / peer_row["peak MB"],
    )
    return {
        "type": ours_row["type"],
        "mode": ours_row["mode"],
        "speed": speed,
        "goal": f">= {goal}",
        "memory": memory,
        "memory goal": f"<= {MEMORY}",
        "reached": speed >= goal and memory <= MEMORY,
    }


def main() -> None:
    options = arguments(__doc__.splitlines()[0], steps=5, repeats=1, task="", out="", only="")
    if options.task:
        task = json.loads(options.task)
        result = take_steps(task.pop("side"), getattr(torch, task.pop("dtype")), **task)
        Path(options.out).write_text(json.dumps(result))
        return
    kinds = [(dtype, compiled) for dtype in ("float32", "bfloat16") for compiled in (False, True)]
    if options.quick:  # compiling takes a minute a side
        kinds, options.steps, options.repeats = [kind for kind in kinds if not kind[1]], 2, 1
    if options.only:  # such as float32-eager
        kinds = [
            kind
            for kind in kinds
            if options.only == f"{kind[0]}-{'compiled' if kind[1] else 'eager'}"
        ]
    size, rows, ratios = QUICK if options.quick else FULL, [], []
    for kind in kinds:
        found = compare(kind, size, options.steps, options.repeats)
        rows += found
        print_table(f"{found[0]['type']} {found[0]['mode']}", found)
        if len(found) == 2:
            ratios.append(ratio(*found, 1.2 if kind[1] else 1.5))
    print_table("ours / peer", ratios)
    rows, ratios = (beside(name, found) for name, found in (("rows", rows), ("ratios", ratios)))
    about = {
        "size": size,
        "bf16_units": native_bf16(CPU),
        "notes": __doc__.split("\n\n")[-1].strip(),
    }
    write_result("train_throughput", {**about, "rows": rows, "ratios": ratios}, options.quick)


def beside(name: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured now, and of the kinds that `--only` left out what was measured before, in the order of the kinds."""
    path = RESULTS / "train_throughput.json"
    before = json.loads(path.read_text())[name] if path.exists() else []
    now = {(row["type"], row["mode"]) for row in found}
    kept = [row for row in before if (row["type"], row["mode"]) not in now]
    return sorted(
        [*kept, *found], key=lambda row: (row["type"] != "float32", row["mode"] != "eager")
    )


if __name__ == "__main__":
    main()
