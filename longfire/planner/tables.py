"""Forecasts as tables, and as JSON: what `longfire plan` says."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from longfire.disk import write_whole
from longfire.errors import SettingsError
from longfire.parallel.axes import AXES
from longfire.parallel.cost import GIB, USABLE_MEMORY, Device
from longfire.parallel.mesh import Mesh
from longfire.parallel.strategy import Ranked
from longfire.plain_console import plain_console
from longfire.planner.forecast import Forecast, Plan
from longfire.planner.planner import Planner
from longfire.plural import counted

FILE_WIDTH = 130  # of tables that go to a file or a pipe
SHOWN = 8  # groups of ranks
# parts of a step that are shown only where they take time
RARE = ("uneven rows", "activations to the host and back", "parameters from the host")
HELD = ("parameters", "gradients", "optimizer", "activations", "gathered", "logits")


def plan_run(
    planner: Planner,
    alternatives: int,
    out: Path | None,
) -> None:
    """Tell the recipe's own plan and the best others. Raises SettingsError for a plan that cannot
    be."""
    console = plain_console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    own = planner.with_largest(planner.forecast(planner.of_recipe()))
    for line in heading(planner, own):
        console.print(line, markup=False)
    console.print(memory_table(planner.device, own))
    console.print(time_table(own))
    if own.collectives:
        console.print(collectives_table(own))
    if ranked := planner.strategies(own.plan):
        console.print(strategies_table(planner, ranked, own.plan.strategy))
    for line in findings(planner, own):
        console.print(line, markup=False)
    others = planner.alternatives(alternatives) if alternatives else []
    if others:
        console.print(alternatives_table(own, others))
    elif alternatives:
        console.print(
            "no other plan fits either: more devices, a shorter training.seq_len, or a smaller "
            "model"
        )
    if out:
        keep(out, planner, own, others)


def describe_plan(
    planner: Planner,
    mesh: Mesh,
    held: Sequence[dict[str, int]],
) -> str:
    """The plan of a run that begins: who shares what with whom, what a step sends, what each
    process holds (bytes, by rank)."""
    table = Table(
        "axis",
        "ranks of each group",
        "what a process sends in a step",
        title="plan",
        title_justify="left",
    )
    sent = list(planner.collectives(planner.of_recipe()))
    for axis in (axis for axis in AXES if mesh.size(axis) > 1):
        groups = mesh.groups(axis)
        parts = [
            f"{one.what}, {one.bytes / 1e6:,.1f} MB" for one in sent if axis in one.axis.split()
        ]
        ranks = "  ".join(",".join(map(str, ranks)) for ranks in groups[:SHOWN]) + (
            "  ..." if len(groups) > SHOWN else ""
        )
        table.add_row(axis, ranks, "\n".join(parts))
    for what in held[0]:
        sizes = [one[what] / 1e6 for one in held]
        table.add_row("", f"{what} in a process", f"{min(sizes):,.1f} to {max(sizes):,.1f} MB")
    console = plain_console(width=FILE_WIDTH)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def heading(planner: Planner, own: Forecast) -> list[str]:
    """The lines above the tables: model, devices, step and plan."""
    device = planner.device
    config = planner.model_config
    numbers = sum(p.numel() for p in planner.model.parameters())
    tflops = device.flops[planner.dtype] / 1e12
    sequences = counted(planner.sequences, "sequence")
    steps = planner.run.steps
    return [
        f"model: {numbers:,} parameters, {config.num_hidden_layers} layers, sequences of "
        f"{planner.seq_len:,} tokens, {planner.dtype}",
        f"devices: {planner.processes:,} x {device.name}, {device.memory_bytes / 1e9:g} GB each "
        f"({USABLE_MEMORY:.0%} for tensors), {tflops:g} TFLOP/s at an "
        f"efficiency of {device.efficiency:g}, {device.node} a node",
        f"step: {planner.tokens:,} tokens = {sequences}; run: "
        f"{counted(steps, 'step')} = {steps * planner.tokens:,} tokens",
        f"the recipe's plan: {describe(own.plan)}",
    ]


def describe(plan: Plan) -> str:
    """A plan in one line."""
    axes: list[str] = []
    for axis in AXES:
        degree = getattr(plan, axis)
        if degree > 1:
            axes.append(f"{degree} {axis}")
    mesh = " x ".join(axes) or "one process"
    pieces = ""
    if plan.cp > 1:
        pieces = f"; pieces of sequences {plan.layout}"
    return (
        f"{mesh}; recompute {plan.remat}; {plan.microbatches} micro-batch(es) of "
        f"{plan.batch_size}{pieces}"
    )


def memory_table(device: Device, own: Forecast) -> Table:
    """Of one process, at its fullest moment."""
    table = Table(
        "bytes of the fullest process",
        "GiB",
        title=f"fullest moment: {own.peak.where}",
        title_justify="left",
    )
    for name in HELD:
        table.add_row(name, f"{getattr(own.peak, name) / GIB:.2f}")
    table.add_row("peak", f"{own.peak.total / GIB:.2f}", style="bold")
    table.add_row(
        "fits into",
        f"{device.usable_bytes / GIB:.2f}",
        style="green" if own.peak.total <= device.usable_bytes else "red",
    )
    if own.host_bytes:
        table.add_row("in the host's memory", f"{own.host_bytes / GIB:.2f}", style="bold")
        table.add_row(
            "fits into a device's share",
            f"{device.host_bytes / GIB:.2f}",
            style="green" if own.host_bytes <= device.host_bytes else "red",
        )
    return table


def time_table(own: Forecast) -> Table:
    """Where the seconds of a step go."""
    table = Table("a step", "", title_justify="left")
    for name, seconds in own.parts.items():
        if name in RARE and not seconds:
            continue
        table.add_row(name, f"{seconds:.3g} s ({seconds / own.seconds:.0%})")
    table.add_row("seconds", f"{own.seconds:.4g}", style="bold")
    table.add_row("tokens/s", f"{own.tokens_per_second:,.0f}")
    table.add_row("MFU", f"{own.mfu:.1%}")
    table.add_row("FLOPs", f"{own.flops:.3g}, and {own.flops_again:.3g} recomputed")
    table.add_row("the run", f"{own.days:,.3g} days, {own.device_hours:,.0f} GPU-hours")
    return table


def collectives_table(own: Forecast) -> Table:
    """What a process sends."""
    table = Table(
        "axis",
        "processes",
        "what",
        "GiB a step",
        "seconds",
        "hidden behind",
        title_justify="left",
    )
    for c in own.collectives:
        table.add_row(
            c.axis,
            str(c.processes),
            c.what,
            f"{c.bytes / GIB:.3g}",
            f"{c.seconds:.3g}",
            c.hidden or "nothing",
        )
    return table


def strategies_table(
    planner: Planner,
    ranked: Sequence[Ranked],
    chosen: str,
) -> Table:
    """The ways that softmax may see a whole sequence, of a micro-batch: what `auto` chooses
    from."""
    table = Table(
        "softmax over cp",
        "GiB sent",
        "seconds waited",
        "GiB held more",
        "",
        title_justify="left",
        title="ways of the softmax layers in a micro-batch, best first",
    )
    for one in ranked:
        what = ""
        if one.strategy == chosen:
            what = "taken"
        elif not one.fits:
            what = "does not fit"
        table.add_row(
            one.strategy,
            f"{one.bytes / GIB:.3g}",
            f"{one.seconds:.3g}",
            f"{one.held / GIB:.3g}",
            what,
        )
    return table


def findings(planner: Planner, own: Forecast) -> list[str]:
    """What bounds the plan, and the largest sizes that fit."""
    batch_size = own.largest["batch_size"]
    length = own.largest["seq_len"]
    most = (
        f"largest that fit: training.batch_size = {batch_size:,} at this length, "
        f"training.seq_len = {length:,} at this batch"
    )
    binds = f"what binds: {own.binds}"
    if own.binds == "memory":
        lacks = (own.peak.total - planner.device.usable_bytes) / GIB
        binds = f"what binds: memory; {lacks:.2f} GiB are missing: this plan does not fit"
    elif own.binds == "host memory":
        lacks = (own.host_bytes - planner.device.host_bytes) / GIB
        binds = (
            f"what binds: the host's memory; {lacks:.2f} GiB are missing of a device's share: this "
            "plan does not fit (--host-memory says how much there is)"
        )
    lines = [binds, most]
    if planner.run.float8.enable_float8_linear:
        lines.append(
            "float8: what parameters send is counted as it travels; all other bytes and times are "
            "those of bfloat16; what 8-bit products gain, and what rounding takes, has not been "
            "measured"
        )
    return lines


def alternatives_table(own: Forecast, others: Sequence[Forecast]) -> Table:
    """The recipe's plan and the best others."""
    columns = (
        "",
        "pp",
        "dp_replicate",
        "dp_shard",
        "cp",
        "tp",
        "recompute",
        "sequences",
        "peak GiB",
        "s/step",
        "tokens/s",
        "MFU",
        "days",
        "binds",
    )
    table = Table(
        *columns,
        title="the best plans with the same sequences a step: micro-batches x batch_size",
        title_justify="left",
    )
    for place, forecast in enumerate([own, *others]):
        plan = forecast.plan
        table.add_row(
            str(place) if place else "own",
            *map(str, plan.mesh),
            plan.remat,
            f"{plan.microbatches} x {plan.batch_size}",
            f"{forecast.peak.total / GIB:.1f}",
            f"{forecast.seconds:.3g}",
            f"{forecast.tokens_per_second:,.0f}",
            f"{forecast.mfu:.1%}",
            f"{forecast.days:.3g}",
            forecast.binds,
        )
    return table


def keep(
    out: Path,
    planner: Planner,
    own: Forecast,
    others: Sequence[Forecast],
) -> None:
    """All of it as JSON. Raises SettingsError where the file cannot be written."""
    result = {
        "device": asdict(planner.device),
        "processes": planner.processes,
        "tokens_per_step": planner.tokens,
        "steps": planner.run.steps,
        "recipe": as_data(own),
        "alternatives": [as_data(forecast) for forecast in others],
    }
    try:
        write_whole(out, json.dumps(result, indent=1) + "\n")
    except OSError as e:
        raise SettingsError(
            f"--json {out} cannot be written: {e.strerror}; name another file"
        ) from e


def as_data(forecast: Forecast) -> dict[str, object]:
    """All of its numbers, with the total of the fullest moment."""
    peak = {**asdict(forecast.peak), "total": forecast.peak.total}
    return {**asdict(forecast), "peak": peak}
