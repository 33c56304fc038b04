"""The roofline of a training step on devices that are not here: what the published models must at least do, counted on fake tensors.

    python bench/roofline.py --page docs/gpu.md

The tables go between the marks of the page. Nothing is measured: kernels, FLOPs and bytes are counted by
longfire/gpu_check/roofline.py, rates are those of the makers' data sheets, and how much of them a kernel reaches is assumed there.
"""

import argparse
import tempfile
from pathlib import Path

from longfire.gpu_check.model_runs import MODELS, config_of, run_of
from longfire.gpu_check.roofline import BANDWIDTH_SHARE, EFFICIENCY, Step, counted_step
from longfire.gpu_check.stage import Work
from longfire.parallel.cost import DEFAULT_DEVICE, DEVICES, Device

SEQUENCES, TOKENS = 8, 2048
ALL_MODELS = (*MODELS, "transformer-7b")
MARKS = "<!-- roofline -->", "<!-- end -->"
TIMED = (*EFFICIENCY, "optimizer")


def counted(name: str, sequences: int) -> Step:
    """The step of one of the models at full size."""
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), is_small=False, seconds=600)
        return counted_step(config_of(run_of(name, work)), sequences, TOKENS)


def of_one_device(steps: dict[str, Step], device: Device) -> list[str]:
    """What each kind of kernel takes on one device."""
    rows = [
        f"| model | kernels, eager / compiled | GB, eager / compiled | TFLOP | ms: {', '.join(TIMED)} | "
        "MFU at the peaks | MFU, eager / compiled |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, step in steps.items():
        kernels = [sum(totals.launches.values()) for totals in (step.eager, step.compiled)]
        gigabytes = [sum(totals.bytes.values()) / 1e9 for totals in (step.eager, step.compiled)]
        shares = [step.mfu(totals, device) for totals in (step.eager, step.compiled)]
        seconds = step.seconds(step.compiled, device)
        milliseconds = ", ".join(f"{1000 * seconds[kind]:.0f}" for kind in TIMED)
        rows.append(
            f"| {name} | {kernels[0]:,.0f} / {kernels[1]:,.0f} | {gigabytes[0]:,.0f} / {gigabytes[1]:,.0f} | "
            f"{step.model_flops / 1e12:.0f} | {milliseconds} | {step.mfu(step.compiled, device, at_best=True):.0%} | "
            f"{shares[0]:.0%} / {shares[1]:.0%} |"
        )
    return rows


def of_all_devices(steps: dict[str, Step]) -> list[str]:
    """The MFU of compiled steps on each device of the planner's table."""
    rows = [f"| model | {' | '.join(DEVICES)} |", "|---" * (len(DEVICES) + 1) + "|"]
    for name, step in steps.items():
        shares = [f"{step.mfu(step.compiled, device):.0%}" for device in DEVICES.values()]
        rows.append(f"| {name} | {' | '.join(shares)} |")
    return rows


def tables(steps: dict[str, Step], sequences: int) -> str:
    """Both tables, with what they assume."""
    reached = []
    for kind, share in EFFICIENCY.items():
        if share:
            reached.append(f"{kind} {share:.0%}")
    lines = [
        f"Estimated, not measured. A step of {sequences} x {TOKENS:,} tokens on one {DEFAULT_DEVICE}, in bf16, nothing "
        f"recomputed. Assumed: of the peak, {', '.join(reached)}; of the memory's bandwidth, {BANDWIDTH_SHARE:.0%}.",
        "",
        *of_one_device(steps, DEVICES[DEFAULT_DEVICE]),
        "",
        "Estimated MFU, not measured, of the compiled step on every device of `longfire plan`:",
        "",
        *of_all_devices(steps),
    ]
    return "\n".join(lines)


def with_tables(page: str, made: str) -> str:
    """The page with the tables between its marks."""
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1], 1)[1]
    return f"{before}{MARKS[0]}\n\n{made}\n\n{MARKS[1]}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="the page that has the marks")
    parser.add_argument("--quick", action="store_true", help="one model, printed only")
    options = parser.parse_args()
    steps = {
        name: counted(name, SEQUENCES) for name in (MODELS[:1] if options.quick else ALL_MODELS)
    }
    made = tables(steps, SEQUENCES)
    print(made)
    if options.page and not options.quick:
        page = options.page.read_text(encoding="utf-8")
        options.page.write_text(with_tables(page, made), encoding="utf-8")


if __name__ == "__main__":
    main()
