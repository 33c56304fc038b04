"""The summary of a check: what is wrong, and the measured speeds beside the goals."""

from collections.abc import Sequence
from dataclasses import dataclass

from longfire.gpu_check.processes import Ended
from longfire.gpu_check.stage import Outcome
from longfire.json_types import JsonObject


@dataclass(frozen=True)
class Goal:
    """A number of a stage that should be at least so high."""

    what: str
    stage: str
    number: str
    least: float
    unit: str = ""

    def reached(self, value: float) -> str:
        shown = f"{value:.1%}" if self.unit == "%" else f"{value:.2f}x"
        least = f"{self.least:.0%}" if self.unit == "%" else f"{self.least}x"
        verb = "reached" if value >= self.least else "MISSED"
        return f"{self.what}: {verb}, {shown} (goal: at least {least})"


GOALS = (
    Goal("MFU at 1.3B in bf16", "speed transformer-1b", "mfu", 0.55, "%"),
    Goal("MFU at the width of 7B in bf16", "speed transformer-7b", "mfu", 0.60, "%"),
    Goal("GLA 1.3B beside fla's model in a plain loop", "speed gla-1b", "ratio", 1.2),
)


def summary(lines: Sequence[JsonObject]) -> Ended:
    """How many stages are in which state, and each goal: reached, missed or not measured. A missed
    goal is no fault: it does not decide the exit code."""
    states: dict[str, list[str]] = {}
    for line in lines:
        states.setdefault(str(line["state"]), []).append(str(line["stage"]))
    counts: list[str] = []
    for state, names in states.items():
        shown = "" if state == "ok" else f" ({', '.join(names)})"
        counts.append(f"{len(names)} {state}{shown}")
    found: JsonObject = {}
    missing: list[str] = []
    shown_goals: list[str] = []
    means_something = all(line["computes"] and not line["small"] for line in lines)
    for goal in GOALS:
        value = value_of(goal, lines) if means_something else None
        found[goal.what] = value
        if value is None:
            missing.append(f"{goal.what}: not measured")
        else:
            shown_goals.append(goal.reached(value))
    row = "; ".join([", ".join(counts), *shown_goals])
    return Ended("ok", Outcome(row, {"goals": found}, (), tuple(missing)), 0.0)


def value_of(goal: Goal, lines: Sequence[JsonObject]) -> float | None:
    """What the goal's stage measured; None where it did not."""
    for line in lines:
        numbers = line["numbers"]
        if line["stage"] == goal.stage and isinstance(numbers, dict):
            value = numbers.get(goal.number)
            if isinstance(value, int | float):
                return float(value)
    return None
