"""`longfire plan --context` as tables: the longest sequences of every mixer, and Ring Attention's
numbers with ours beside them."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from rich.progress import track
from rich.table import Table

from longfire.config.run import Run
from longfire.config.transformers_config import TransformersConfig
from longfire.disk import write_whole
from longfire.errors import SettingsError
from longfire.mixers import MIXERS
from longfire.parallel.cost import DEVICES, LINK_EFFICIENCY, Device
from longfire.plain_console import plain_console
from longfire.planner import longest, published
from longfire.planner.tables import FILE_WIDTH

T = TypeVar("T")


def plan_context(run: Run, device: Device, out: Path | None) -> None:
    """Show the longest sequence of each mixer on the run's devices and on fewer, then the paper's
    tables. Raises SettingsError."""
    if isinstance(run.model_config, TransformersConfig):
        raise SettingsError(
            "model.backend = 'transformers' has one mixer of its own; `longfire plan --context` "
            "wants longfire's"
        )
    console = plain_console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    counts = tuple(sorted({1, min(device.node, run.world.size), run.world.size}))
    mixers = list(shown(longest.of_mixers(run, device, counts), 1 + len(MIXERS), "mixers"))
    console.print(mixers_table(device, counts, mixers))
    for line in published_formulas():
        console.print(line, markup=False)
    console.print(blocks_table())
    rows = len(published.ROWS)
    narrow = list(shown(published.ours(run), rows, "the paper's devices, bfloat16"))
    full = [
        one
        for _, one in shown(published.ours(run, "float32"), rows, "the paper's devices, float32")
    ]
    console.print(published_table([(row, one, other) for (row, one), other in zip(narrow, full)]))
    if out:
        keep(out, mixers, narrow)


def shown(found: Iterator[T], total: int, what: str) -> Iterable[T]:
    """The same with a bar on a terminal: every mixer takes some seconds, since its blocks are run
    on fake tensors."""
    console = plain_console(stderr=True)
    return track(
        found,
        what,
        total,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def mixers_table(
    device: Device,
    counts: tuple[int, ...],
    mixers: list[tuple[str, list[longest.Longest] | str]],
) -> Table:
    """A sequence's tokens, where all devices share one and the blocks are recomputed."""
    title = (
        f"the longest sequence, with each mixer in all layers, on {device.name} of "
        f"{device.memory_bytes / 1e9:g} GB"
    )
    heads = [f"{count:,} device{'s' * (count > 1)}" for count in counts]
    table = Table(
        "mixer",
        *heads,
        "shared by",
        "softmax",
        "compute of a step",
        title=title,
        title_justify="left",
    )
    for name, found in mixers:
        if isinstance(found, str):
            table.add_row(name, f"refused: {found.splitlines()[0]}")
            continue
        last = found[-1]
        way = last.plan.strategy if last.plan.cp > 1 and name in ("attention", "the recipe") else ""
        table.add_row(
            name,
            *(f"{one.tokens:,}" for one in found),
            f"{last.plan.cp} cp x {last.plan.tp} tp",
            way,
            clock(last.seconds),
        )
    return table


def published_formulas() -> list[str]:
    """Table 1, for 7B at 32K."""
    size = published.SIZES["7B"]
    tokens = 32768
    block = 4096
    texts = (
        f"{kind} {bytes_of(1, tokens, size.hidden, size.heads, block) / 1e9:,.2f} GB"
        for kind, bytes_of in published.ACTIVATIONS.items()
    )
    return [
        "bytes of a layer's activations (Ring Attention, table 1), 7B, a row of 32K, blocks of "
        f"4K: {', '.join(texts)}"
    ]


def blocks_table() -> Table:
    """Table 2, and our devices: c = FLOP/s over bytes/s."""
    table = Table(
        "device",
        "c, 1000 tokens",
        "s = 6c",
        "printed c",
        "printed s",
        title_justify="left",
        title=(
            "the shortest block that hides its own keys and values (Ring Attention, table 2), "
            "theirs and ours"
        ),
    )
    for name, (flops, _, link, c, s) in published.HOSTS.items():
        block, row = published.minimum_block(flops, link)
        table.add_row(
            name,
            f"{block / 1000:.1f}",
            f"{row / 1000:.1f}",
            f"{c}",
            f"{s}",
        )
    for device in DEVICES.values():
        for where, link in (("in a node", device.link), ("network", device.network)):
            rate = device.flops["bfloat16"] * device.efficiency
            block, row = published.minimum_block(rate, LINK_EFFICIENCY * link)
            table.add_row(
                f"{device.name}, {where}",
                f"{block / 1000:.1f}",
                f"{row / 1000:.1f}",
                "",
                "",
            )
    return table


def published_table(rows: list[tuple[published.Row, longest.Longest, longest.Longest]]) -> Table:
    """Table 3: printed / from its arithmetic where that differs, and ours."""
    table = Table(
        "devices",
        "model",
        *published.KEPT,
        "ring",
        "ours, float32",
        "ours, bfloat16",
        title_justify="left",
        title=(
            "longest context in 1000 tokens (Ring Attention, table 3): printed, \\[what its "
            "arithmetic gives], ours"
        ),
    )
    for row, narrow, full in rows:
        printed = row.printed or ("",) * 4
        cells = []
        for value, found in zip(printed, published.arithmetic(row).values()):
            cells.append(cell(value, found))
        table.add_row(
            row.compute,
            row.model,
            *cells,
            f"{full.tokens / 1000:,.0f}",
            f"{narrow.tokens / 1000:,.0f}",
        )
    return table


def cell(printed: object, found: int) -> str:
    """A printed number, and ours where it is another one."""
    if printed == found:
        return str(printed)
    return f"{printed} \\[{found}]".strip()


def clock(seconds: float) -> str:
    """Hours where it is more than one."""
    if seconds > 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds:,.1f} s"


def keep(
    out: Path,
    mixers: list[tuple[str, list[longest.Longest] | str]],
    rows: list[tuple[published.Row, longest.Longest]],
) -> None:
    """All of it as JSON. Raises SettingsError where the file cannot be written."""
    by_mixer: dict[str, object] = {}
    for name, found in mixers:
        if isinstance(found, str):
            by_mixer[name] = found
        else:
            by_mixer[name] = [asdict(one) for one in found]
    by_row: list[dict[str, object]] = []
    for row, one in rows:
        numbers = {
            **asdict(row),
            "arithmetic": published.arithmetic(row),
            "ours": asdict(one),
        }
        by_row.append(numbers)
    result = {"mixers": by_mixer, "published": by_row}
    try:
        write_whole(out, json.dumps(result, indent=1) + "\n")
    except OSError as e:
        raise SettingsError(
            f"--json {out} cannot be written: {e.strerror}; name another file"
        ) from e
