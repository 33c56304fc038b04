"""Memory of long rows: what a layer keeps, a step's peak against the length on 1 to 4 processes, the longest row of a 100M hybrid.

Goals: ours keeps at most 2 b h s bytes a layer, as the Blockwise Parallel Transformer in bf16 (Liu 2023, RingAttention,
table 1, which counts the largest activation of a layer that is recomputed); at equal memory its rows are at least 4x as long as
those of attention with all scores in memory beside an MLP in chunks. Peaks are those of a process that trains one step in fp32, less
those of the same step on a row of 64 tokens; of processes that share a row (ring attention) those of the largest. The hybrid's rows
are computed whole, and in segments of time with exact gradients (training.tbptt_exact), where only states wait at the seams.

    python bench/context_memory.py                    all parts
    python bench/context_memory.py --part PART        one of them, the others' results stay: kept, lengths, processes, hybrid, in-time
    python bench/context_memory.py --part in-time --in-time 524288      a row of half a million tokens: hours
"""

import datetime
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from measure import RESULTS, arguments, peak_rss_bytes, print_table, write_result

from longfire.checkpoint.state import State
from longfire.config import settings
from longfire.config.model_config import ModelConfig
from longfire.data.batch import Batch
from longfire.device import Clock
from longfire.initialise import materialise
from longfire.loss import loss_sum
from longfire.model import Model, on_meta
from longfire.optim import make_optimizer
from longfire.parallel.apply import parallelize
from longfire.parallel.mesh import ALONE, Mesh
from longfire.planner.live_bytes import LiveBytes
from longfire.training.step import train_step

CPU, SHORT, GIB = torch.device("cpu"), 64, 2**30
SEGMENT = 2048  # tokens of a segment of time
BUDGET_GIB = 20


@dataclass(frozen=True)
class Side:
    kind: str
    remat: str
    mlp_chunk: int
    formula: str  # bytes a layer, of b rows of s tokens, h hidden size, n heads; the published table is in bf16
    bytes_of: Any  # (tokens, hidden size, heads) -> of one row

    def parallelized(self, model: Model, mesh: Mesh) -> Model:
        attention, keeping = (
            settings.Attention(self.kind, 512, 512),
            settings.ActivationCheckpoint(self.remat),
        )
        ring = settings.Parallelism(context_parallel_strategy="ring")
        return parallelize(
            model, keeping, False, mesh, ring, attention=attention, mlp_chunk_size=self.mlp_chunk
        )


def of_row(s: int, h: int, n: int) -> int:
    return 2 * s * h


SIDES = {
    "vanilla": Side("vanilla", "none", 0, "2 b n s^2", lambda s, h, n: 2 * n * s * s),
    "vanilla, lean MLP": Side("vanilla", "block", 512, "", None),
    "memory-efficient": Side("auto", "none", 0, "8 b s h", lambda s, h, n: 8 * s * h),
    "blockwise": Side("blockwise", "block", 512, "2 b s h", of_row),
    "ours": Side("auto", "block", 512, "2 b s h", of_row),
    "ours, in time": Side(
        "auto", "none", 0, "", None
    ),  # of a segment all is kept: it is computed twice as it is
}
WHOLE = [name for name in SIDES if name != "ours, in time"]


def small(layers: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=128,
        num_hidden_layers=layers,
        layer_types=("attention",),
        intermediate_size=512,
        vocab_size=512,
        mixers={"attention": {"num_heads": 4}},
    )


def hybrid(quick: bool) -> ModelConfig:
    """Three recurrent layers to one of windowed attention; 100M parameters, 41M of them the embedding and the head."""
    size, layers, wide, words = (64, 4, 192, 512) if quick else (640, 12, 1792, 32000)
    return ModelConfig(
        hidden_size=size,
        num_hidden_layers=layers,
        layer_types=("gla", "gla", "gla", "attention"),
        vocab_size=words,
        intermediate_size=wide,
        mixers={
            "gla": {"num_heads": 2 if quick else 5},
            "attention": {"num_heads": size // 64, "window_size": 1024},
        },
    )


def batch_of(tokens: int, words: int) -> Batch:
    ids_BT = torch.randint(words, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids_BT[:, :-1], ids_BT[:, 1:], torch.arange(tokens)[None])


def made(
    shape: ModelConfig, side: Side, dtype: torch.dtype = torch.float32, mesh: Mesh = ALONE
) -> Model:
    return materialise(side.parallelized(on_meta(shape, dtype), mesh), 0, CPU)


class TellingClock(Clock):
    """Says how far the backward through a row's segments has come; the forward through all of them lies before."""

    def __init__(self, segments: int) -> None:
        super().__init__(CPU)
        self.done, self.segments = 0, segments

    @contextmanager
    def __call__(self, part: str) -> Any:
        with super().__call__(part):
            yield
        self.done += part == "backward"
        if (
            part == "backward"
            and self.segments > 1
            and self.done % max(1, self.segments // 16) == 0
        ):
            spent = time.perf_counter() - self.begun
            print(
                f"{self.done} of {self.segments} segments, {spent:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def one_step(
    shape: ModelConfig, side: Side, tokens: int, segments: int = 1, mesh: Mesh = ALONE
) -> None:
    model = made(shape, side, mesh=mesh)
    state = State(model, make_optimizer(model, settings.Optimizer(), CPU), mesh=mesh)
    training = settings.Training(tbptt_segments=segments, tbptt_exact=segments > 1)
    train_step(state, [batch_of(tokens, shape.vocab_size)], 1e-3, training, TellingClock(segments))


def one_step_of_many(
    shape: ModelConfig, side: Side, tokens: int, rank: int, processes: int, store: str
) -> None:
    """The part of one process of a step whose rows all of them share."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    one_step(shape, side, tokens, mesh=Mesh.of_degrees({"cp": processes}, "cpu"))
    dist.destroy_process_group()


def kept_bytes(side: Side, layers: int, tokens: int) -> int:
    """What lies between forward and backward, in bf16, above the parameters."""
    model, batch = made(small(layers), side, torch.bfloat16), batch_of(tokens, 512)
    live = LiveBytes(list(model.parameters()), batch.ids_BT, batch.labels_BT, batch.positions_BT)
    before = live.now
    with live:
        loss = loss_sum(model, batch, 1024)
    kept = live.now - before
    return kept if loss.requires_grad else 0


def kept(tokens: int) -> list[dict[str, Any]]:
    """Bytes a layer: the difference of six layers and two."""
    rows = []
    for name in WHOLE:
        side = SIDES[name]
        each = (kept_bytes(side, 6, tokens) - kept_bytes(side, 2, tokens)) / 4
        row = {
            "side": name,
            "tokens": tokens,
            "bytes a token and layer": each / tokens,
            "formula": side.formula,
        }
        if side.bytes_of:
            formula = side.bytes_of(tokens, 128, 4)
            row |= {"by the formula": formula / tokens, "ratio": each / formula}
        rows.append(row)
    return rows


def peak_bytes(options: Any, side: str, tokens: int, segments: int = 1) -> int:
    return peak_rss_bytes(given(options, side, tokens, segments=segments))


def given(options: Any, side: str, tokens: int, **more: Any) -> list[Any]:
    """The command of a process that trains one step."""
    words = [__file__, "--child", options.child, "--side", side, "--tokens", tokens]
    words += [word for name, value in more.items() for word in (f"--{name}", value)]
    return words + ["--quick"] * options.quick


def peak_of_many(options: Any, tokens: int, processes: int) -> int:
    """The peak of the largest of so many processes that share a row."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as threads:
        store = {"processes": processes, "store": f"{folder}/store"}
        commands = [given(options, "ours", tokens, rank=rank, **store) for rank in range(processes)]
        return max(threads.map(peak_rss_bytes, commands))


def shared(options: Any, longest: int) -> list[dict[str, Any]]:
    """A row over 1, 2 and 4 processes: what each of them holds for it."""
    options.child, rows = "small", []
    for processes in (1, 2) if options.quick else (1, 2, 4):
        base, tokens = peak_of_many(options, SHORT * processes, processes), longest // 4
        while tokens <= longest:
            peak = peak_of_many(options, tokens, processes) - base
            rows.append(
                {
                    "processes": processes,
                    "tokens of the row": tokens,
                    "of a process": tokens // processes,
                    "peak MB of a process above a short row": peak / 1e6,
                    "KB a token of the row": peak / tokens / 1e3,
                }
            )
            print(rows[-1], flush=True)
            tokens *= 2
    return rows


def lengths(
    options: Any, budget: int, longest: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Peaks of doubling lengths (and those half-way), until a side holds more than the budget."""
    options.child, rows, reached = "small", [], {}
    for name in ("vanilla, lean MLP", "ours") if options.quick else WHOLE:
        base, tokens = peak_bytes(options, name, SHORT), 512 if options.quick else 1024
        while tokens <= longest:
            peak = peak_bytes(options, name, tokens) - base
            rows.append(
                {
                    "side": name,
                    "tokens": tokens,
                    "peak MB above a short row": peak / 1e6,
                    "KB a token": peak / tokens / 1e3,
                }
            )
            print(rows[-1], flush=True)
            if peak > budget:
                break
            reached[name] = tokens
            tokens = tokens * 3 // 2 if tokens & (tokens - 1) == 0 else tokens * 4 // 3
    baseline = reached.get("vanilla, lean MLP", 0)
    best = [
        {
            "side": name,
            "longest row within the budget": tokens,
            "budget MB": budget / 1e6,
            "at least": tokens * 4 // 3 > longest,
            "times vanilla with lean MLP (goal 4)": tokens / max(1, baseline),
        }
        for name, tokens in reached.items()
    ]
    return rows, best


def longest_hybrid(
    options: Any, side: str, rows_of: list[int], segment: int, budget: int
) -> dict[str, list[dict[str, Any]]]:
    """Measured peaks of two rows, computed in segments of so many tokens (0: whole), and the straight line through both up to the
    budget."""
    options.child, rows = "hybrid", []
    parameters = sum(p.numel() for p in on_meta(hybrid(options.quick)).parameters())
    for tokens in rows_of:
        segments = max(1, tokens // segment) if segment else 1
        peak = peak_bytes(options, side, tokens, segments) / GIB
        rows.append({"way": side, "tokens": tokens, "segments": segments, "peak GiB": peak})
        print(rows[-1], flush=True)
    (first, low), (last, high) = ((row["tokens"], row["peak GiB"]) for row in rows[-2:])
    each = max((high - low) / (last - first), 1e-9)
    line = {
        "way": side,
        "parameters": parameters,
        "longest measured": last,
        "KB a token": each * GIB / 1e3,
        "budget GiB": budget,
        "longest by the line": int(last + (budget - high) / each),
    }
    return {"rows": rows, "line": [line]}


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        part="",
        child="",
        side="ours",
        tokens=1024,
        segments=1,
        rank=0,
        processes=1,
        store="",
        budget_mb=1500,
        longest=32768,
        shared=65536,
        whole=16384,
        in_time=65536,
    )
    if options.child:
        shape, side = (
            small(2) if options.child == "small" else hybrid(options.quick),
            SIDES[options.side],
        )
        if options.store:
            return one_step_of_many(
                shape, side, options.tokens, options.rank, options.processes, options.store
            )
        return one_step(shape, side, options.tokens, options.segments)
    if options.quick:
        options.longest, options.shared, options.whole, options.in_time = 512, 512, 1024, 1024
    result: dict[str, list[dict[str, Any]]] = {}
    wanted = (
        [options.part] if options.part else ["kept", "lengths", "processes", "hybrid", "in-time"]
    )
    if "kept" in wanted:
        result["kept"] = kept(256 if options.quick else 2048)
        print_table("kept from forward to backward, bf16", result["kept"])
    if "lengths" in wanted:
        result["peaks"], result["longest"] = lengths(
            options, options.budget_mb * 10**6, options.longest
        )
        print_table("longest row at equal memory, fp32", result["longest"])
    if "processes" in wanted:
        result["processes"] = shared(options, options.shared)
        print_table("a row over several processes, fp32", result["processes"])
    if "hybrid" in wanted:
        found = longest_hybrid(options, "ours", [options.whole // 2, options.whole], 0, BUDGET_GIB)
        result["hybrid"], result["hybrid_line"] = found["rows"], found["line"]
        print_table("a hybrid's longest row, whole", found["line"])
    if "in-time" in wanted:
        segment = 64 if options.quick else SEGMENT
        found = longest_hybrid(
            options, "ours, in time", [options.in_time // 8, options.in_time], segment, BUDGET_GIB
        )
        result["in_time"], result["in_time_line"] = found["rows"], found["line"]
        print_table("a hybrid's longest row, in segments of time", found["line"])
    write_result("context_memory", with_others(result, wanted), options.quick)


def with_others(result: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    """What was measured now, with what is known of the other parts; and by which command each was."""
    file = RESULTS / "context_memory.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    known = {name: rows for name, rows in known.items() if isinstance(rows, list)}
    message = {
        "command": " ".join(["bench/context_memory.py", *sys.argv[1:]]),
        "date": f"{datetime.date.today()}",
    }
    measured = [row for row in known.pop("measured", []) if row["part"] not in parts]
    return {**known, **result, "measured": measured + [{"part": part, **message} for part in parts]}


if __name__ == "__main__":
    main()
