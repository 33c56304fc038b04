"""Memory of long rows on one device: what a layer keeps, a step's peak against the length, the longest row of a 100M hybrid.

Goals (issue 5): ours keeps at most 2 b h s bytes a layer, as the Blockwise Parallel Transformer in bf16 (Liu 2023, RingAttention,
table 1, which counts the largest activation of a layer that is computed again); at equal memory its rows are at least 4x as long as
those of attention with all scores in memory beside an MLP in chunks. Peaks are those of a process that trains one step in fp32, less
those of the same step on a row of 64 tokens. The hybrid's rows are computed whole, and in segments of time with exact gradients
(training.tbptt_exact), where only states wait at the seams.

    python bench/context_memory.py                    all parts; --part kept|lengths|hybrid: one, the others' results stay
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from measure import RESULTS, arguments, peak_rss_bytes, print_table, seconds, write_result

from longfire import settings
from longfire.checkpoint import State
from longfire.data.batches import Batch
from longfire.device import Clock
from longfire.loss import loss_sum
from longfire.model import Model, materialise, on_meta
from longfire.optim import make_optimizer
from longfire.parallel.apply import parallelize
from longfire.parallel.memory import LiveBytes
from longfire.shape import ModelShape
from longfire.train import train_step

CPU, SHORT, GIB = torch.device("cpu"), 64, 2**30
SEGMENT = 2048  # tokens of a segment of time


@dataclass(frozen=True)
class Side:
    kind: str
    remat: str
    mlp_chunk: int
    formula: str  # bytes a layer, of b rows of s tokens, h hidden size, n heads; the published table is in bf16
    bytes_of: Any  # (tokens, hidden size, heads) -> of one row

    def parallelized(self, model: Model) -> Model:
        attention = settings.Attention(self.kind, 512, 512)
        keeping = settings.ActivationCheckpoint(self.remat)
        return parallelize(model, keeping, False, attention=attention, mlp_chunk_size=self.mlp_chunk)


def of_row(s: int, h: int, n: int) -> int:
    return 2 * s * h


SIDES = {
    "vanilla": Side("vanilla", "none", 0, "2 b n s^2", lambda s, h, n: 2 * n * s * s),
    "vanilla, lean MLP": Side("vanilla", "block", 512, "", None),
    "memory-efficient": Side("auto", "none", 0, "8 b s h", lambda s, h, n: 8 * s * h),
    "blockwise": Side("blockwise", "block", 512, "2 b s h", of_row),
    "ours": Side("auto", "block", 512, "2 b s h", of_row),
}


def small(layers: int) -> ModelShape:
    return ModelShape(
        hidden_size=128, num_hidden_layers=layers, layer_types=("attention",), intermediate_size=512, vocab_size=512,
        mixers={"attention": {"num_heads": 4}},
    )  # fmt: skip


def hybrid(quick: bool) -> ModelShape:
    """Three recurrent layers to one of windowed attention; 100M parameters."""
    size, layers, wide = (64, 4, 192) if quick else (640, 16, 2432)
    return ModelShape(
        hidden_size=size, num_hidden_layers=layers, layer_types=("gla", "gla", "gla", "attention"), vocab_size=2048,
        intermediate_size=wide, mixers={"gla": {"num_heads": 5 if size == 640 else 2},
                                        "attention": {"num_heads": size // 64, "window_size": 1024}},
    )  # fmt: skip


def batch_of(tokens: int, words: int) -> Batch:
    ids_BT = torch.randint(words, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids_BT[:, :-1], ids_BT[:, 1:], torch.arange(tokens)[None])


def made(shape: ModelShape, side: Side, dtype: torch.dtype = torch.float32) -> Model:
    return materialise(side.parallelized(on_meta(shape, dtype)), 0, CPU)


def one_step(shape: ModelShape, side: Side, tokens: int, segments: int = 1) -> None:
    model = made(shape, side)
    state = State(model, make_optimizer(model, settings.Optimizer(), CPU))
    training = settings.Training(tbptt_segments=segments, tbptt_exact=segments > 1)
    train_step(state, [batch_of(tokens, shape.vocab_size)], 1e-3, training, Clock(CPU))


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
    for name, side in SIDES.items():
        each = (kept_bytes(side, 6, tokens) - kept_bytes(side, 2, tokens)) / 4
        row = {"side": name, "tokens": tokens, "bytes a token and layer": each / tokens, "formula": side.formula}
        if side.bytes_of:
            formula = side.bytes_of(tokens, 128, 4)
            row |= {"by the formula": formula / tokens, "ratio": each / formula}
        rows.append(row)
    return rows


def peak_bytes(options: Any, side: str, tokens: int, segments: int = 1) -> int:
    given = ["--child", options.child, "--side", side, "--tokens", tokens, "--segments", segments]
    return peak_rss_bytes([__file__, *given, *(["--quick"] if options.quick else [])])


def lengths(options: Any, budget: int, longest: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Peaks of doubling lengths (and those half-way), until a side holds more than the budget."""
    options.child, rows, reached = "small", [], {}
    for name in ("vanilla, lean MLP", "ours") if options.quick else SIDES:
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
        {"side": name, "longest row within the budget": tokens, "budget MB": budget / 1e6,
         "at least": tokens * 4 // 3 > longest, "times vanilla with lean MLP (goal 4)": tokens / max(1, baseline)}
        for name, tokens in reached.items()
    ]  # fmt: skip
    return rows, best


def longest_hybrid(options: Any, rows_of: list[int], budget: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measured peaks of rows computed whole and in segments of time, and the straight lines through the last two of each up to the
    budget."""
    options.child, rows, lines = "hybrid", [], []
    parameters = sum(p.numel() for p in on_meta(hybrid(options.quick)).parameters())
    for way, each_segment in (("whole", 0), ("in time, exact", 64 if options.quick else SEGMENT)):
        measured = []
        for tokens in rows_of:
            segments, taken = max(1, tokens // each_segment) if each_segment else 1, []
            spent = seconds(lambda t=tokens, s=segments, to=taken: to.append(peak_bytes(options, "ours", t, s)))
            measured.append((tokens, taken[0]))
            rows.append(
                {"way": way, "tokens": tokens, "segments": segments, "peak GiB": taken[0] / GIB, "seconds": spent}
            )
            print(rows[-1], flush=True)
        (first, low), (last, high) = measured[-2:]
        each = (high - low) / (last - first)
        lines.append({"way": way, "parameters": parameters, "longest measured": last, "KB a token": each / 1e3,
                      "budget GiB": budget / GIB, "longest by the line": int(last + (budget - high) / max(each, 1))})  # fmt: skip
    return rows, lines


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        part="",
        child="",
        side="ours",
        tokens=1024,
        segments=1,
        budget_mb=1500,
        longest=32768,
        up_to=16384,
    )
    if options.child:
        shape = small(2) if options.child == "small" else hybrid(options.quick)
        return one_step(shape, SIDES[options.side], options.tokens, options.segments)
    if options.quick:
        options.longest, options.up_to = 512, 1024
    file, result = RESULTS / "context_memory.json", {}
    if options.part and not options.quick and file.exists():
        result = {name: rows for name, rows in json.loads(file.read_text()).items() if isinstance(rows, list)}
    wanted = [options.part] if options.part else ["kept", "lengths", "hybrid"]
    if "kept" in wanted:
        result["kept"] = kept(256 if options.quick else 2048)
        print_table("kept from forward to backward, bf16", result["kept"])
    if "lengths" in wanted:
        result["peaks"], result["longest"] = lengths(options, options.budget_mb * 10**6, options.longest)
        print_table("longest row at equal memory, fp32", result["longest"])
    if "hybrid" in wanted:
        measured = [options.up_to // 4, options.up_to // 2, options.up_to][options.quick :]
        result["hybrid"], result["longest_hybrid"] = longest_hybrid(options, measured, 20 * GIB)
        print_table("a hybrid's longest row", [*result["longest_hybrid"]])
    write_result("context_memory", result, options.quick)


if __name__ == "__main__":
    main()
