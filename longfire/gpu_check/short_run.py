"""The quickstart in runs of some steps: eager and compiled, fla's kernels and torch's; and one that
is killed and resumed. All have the same curve."""

import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from longfire.gpu_check.findings import noted
from longfire.gpu_check.stage import Outcome, Stage, Work
from longfire.json_types import JsonObject
from longfire.listing import paths_in
from longfire.training.records import METRICS, last_records

RECIPE = "quickstart"
STEPS = {True: 20, False: 60}  # True: small
TEXT_BYTES = {True: 100_000, False: 1_000_000}
WORDS = {True: 300, False: 2048}
# u of bf16 (2^-9) a few times: what rounding makes of the loss before the first update
FIRST_LOSS = 4 * 2**-9
# After many updates rounding has moved the curves apart, but what is learned is the same; a resumed
# run has the same roundings, up to sums in another order on a GPU.
LAST_LOSSES = 0.05
RESUMED = 0.02
LAST_STEPS = 10
POLL_SECONDS = 0.005
END_SECONDS = 20  # that a process may take to end after a signal

Curve = dict[int, float]


def text_of_python(size: int) -> str:
    """So many characters of the source of Python's own library, which lies on every machine."""
    texts: list[str] = []
    length = 0
    for file in paths_in(Path(sysconfig.get_paths()["stdlib"]), "*.py"):
        texts.append(file.read_text(encoding="utf-8", errors="replace"))
        length += len(texts[-1])
        if length >= size:
            break
    return "\n".join(texts)[:size]


def command_of(work: Work, name: str, changes: dict[str, str]) -> list[str]:
    """The command line of one of the runs: `longfire train quickstart` with fewer steps, layers of
    both kinds, and a text that is there."""
    steps = STEPS[work.is_small]
    settings = {
        "job.dump_folder": str(work.folder / name),
        "model.layer_types": "gla,attention",
        "model.gla.num_heads": "2",
        "data.dataset": str(work.folder / "text.txt"),
        "data.folder": str(work.folder / "data"),
        "tokenizer.train_vocab_size": str(WORDS[work.is_small]),
        "training.max_seconds": "0",
        "training.steps": str(steps),
        "checkpoint.interval": str(steps // 4),
        "checkpoint.export": "false",
        "eval.tokens": "2048",
        "eval.compare_xz": "false",
        "eval.sample_prompt": "",
        "metrics.log_freq": "1",
        **changes,
    }
    words = [sys.executable, "-m", "longfire", "train", RECIPE]
    for key, value in settings.items():
        words += [f"--{key}", value]
    return words


def train(work: Work, name: str, changes: dict[str, str]) -> Curve:
    """Its curve. Raises RuntimeError with the last lines of a run that fails."""
    messages = work.folder / f"{name}.txt"  # a pipe would be held by what a killed run has started
    with messages.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command_of(work, name, changes),
            stdout=subprocess.DEVNULL,
            stderr=file,
            timeout=max(1.0, work.seconds_left),
        )
    if done.returncode:
        lines = messages.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"exit code {done.returncode}: {' / '.join(lines)}")
    return curve_of(work.folder / name)


def train_killed(work: Work, name: str, changes: dict[str, str]) -> tuple[Curve, int]:
    """The curve of a run that was killed after half of its steps and started again, and the step
    that was the last before."""
    half = STEPS[work.is_small] // 2
    process = subprocess.Popen(
        command_of(work, name, changes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None and len(curve_of(work.folder / name)) < half:
            time.sleep(POLL_SECONDS)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(END_SECONDS)
    reached = max(curve_of(work.folder / name), default=0)
    return train(work, name, changes), reached


def curve_of(folder: Path) -> Curve:
    """The loss of each step that a run has recorded so far."""
    if not (folder / METRICS).exists():
        return {}
    curve: Curve = {}
    for record in last_records(folder / METRICS):
        loss = record.get("loss")
        if isinstance(loss, float):
            curve[int(record["step"])] = loss
    return curve


def variants(work: Work) -> dict[str, dict[str, str]]:
    """The runs that are compared, by name; the first is killed and resumed too. At small sizes
    nothing is compiled, which would take longer than all the rest. Without a GPU there are no
    kernels to choose from, and the reference implementations are compared."""
    eager = {"training.compile": "off"}
    compiled = {"training.compile": "on"}
    torch_kernels = {"model.kernels": "torch"}
    if not work.is_cuda:
        return {"eager": eager, "eager, reference": eager | {"model.kernels": "reference"}}
    if work.is_small:
        return {"eager": eager, "eager, torch kernels": eager | torch_kernels}
    return {
        "eager": eager,
        "compiled": compiled,
        "eager, torch kernels": eager | torch_kernels,
        "compiled, torch kernels": compiled | torch_kernels,
    }


def difference(curve: Curve, other: Curve, steps: list[int]) -> float:
    """How far the means over these steps are apart, relative to them."""
    mean = sum(curve[step] for step in steps) / len(steps)
    other_mean = sum(other[step] for step in steps) / len(steps)
    return relative(other_mean, mean)


def relative(loss: float, expected: float) -> float:
    """How far a loss is off; a device that computes nothing may have losses of 0."""
    if loss == expected:
        return 0.0
    return abs(loss - expected) / max(abs(expected), sys.float_info.min)


def compared(name: str, curve: Curve, first: Curve) -> list[str]:
    """What of a run's curve is not as it is in the first run."""
    if curve.keys() != first.keys():
        return [f"{name}: {len(curve)} steps were recorded, not {len(first)}"]
    steps = sorted(first)
    problems: list[str] = []
    at_start = difference(curve, first, steps[:1])
    if not at_start <= FIRST_LOSS:
        problems.append(f"{name}: the first loss is {at_start:.2%} off")
    at_end = difference(curve, first, steps[-LAST_STEPS:])
    if not at_end <= LAST_LOSSES:
        problems.append(f"{name}: the last losses are {at_end:.2%} off")
    return problems


def measure(work: Work) -> Outcome:
    """Run after run; an error of one is a problem, and the next one runs."""
    text = text_of_python(TEXT_BYTES[work.is_small])
    (work.folder / "text.txt").write_text(text, encoding="utf-8")
    problems: list[str] = []
    curves: dict[str, Curve] = {}
    numbers: JsonObject = {"curves": curves}
    for name, changes in variants(work).items():
        work.note(name)
        with noted(problems, name):
            curves[name] = train(work, name.replace(", ", "-"), changes)
    words = [f"{len(curves)} of {len(variants(work))} runs"]
    if curves:
        first_name, first = next(iter(curves.items()))
        for name, curve in curves.items():
            problems += compared(name, curve, first)
        steps = sorted(first)
        words.append(f"loss {first[steps[0]]:.3f} -> {first[steps[-1]]:.3f}")
        if not first[steps[-1]] < first[steps[0]]:
            problems.append(f"{first_name}: nothing was learned")
        work.note(f"{first_name}, killed and resumed")
        with noted(problems, "killed and resumed"):
            curve, reached = train_killed(work, "killed", variants(work)[first_name])
            numbers |= {"killed_after": reached, "identical": curve == first}
            problems += resumed_problems(curve, first, reached)
            same = "identical" if curve == first else "not to the bit"
            words.append(f"killed after step {reached} and resumed: {same}")
    return Outcome("; ".join(words), numbers, tuple(problems))


def resumed_problems(curve: Curve, first: Curve, reached: int) -> list[str]:
    """What is wrong with a run that was killed and resumed."""
    if reached >= max(first):
        return ["killed and resumed: the run had ended before it could be killed"]
    if curve.keys() != first.keys():
        return [f"killed and resumed: {len(curve)} steps were recorded, not {len(first)}"]
    worst = max(relative(curve[step], first[step]) for step in first)
    if not worst <= RESUMED:
        return [f"killed and resumed: a loss is {worst:.2%} off"]
    return []


STAGE = Stage("quickstart", 150, 30, measure)
