"""The time of a run: what its steps take on this machine, how long the rest will take, how many
steps a budget allows.

    pace = Pace()                        is given the seconds of each step, evaluation and save
    budget = Budget(300, 10_000, pace)   training.max_seconds, and the most steps allowed
    if budget.due(plan, step, used):     whether to plan anew after this step
        plan = budget.replanned(plan, step, used)

Nothing here reads a clock: seconds are arguments. The learning rate that follows from a plan is in
training/schedule.py. Steps, and the evaluations and saves between them, count as used time; the
preparation of data and model, the last save, the last evaluation and export do not.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from longfire.training.schedule import Plan, Planned

WINDOW_STEPS = 50  # over which the seconds of a step are averaged
RECENT_STEPS = 5  # unless the median of so many, the last ones, differs from that mean
CHANGED_SHARE = 0.15  # by more than this share of it: the machine has changed its speed
# Measured before anything is logged or planned, if the budget has room for it. The first step of a
# process, which allocates and compiles, is not one of them.
MEASURED_STEPS = 3
# Looks at the clock are so far apart, as a share of the steps that remain: close together at the
# end.
LOOK_SHARE = 0.1
# Of the seconds expected until the next look: then the clock is looked at before that step comes.
LATE_SHARE = 1.3
# Of the steps that remain: the plan changes when the estimate differs by more.
NOTEWORTHY_SHARE = 0.02
NOTED_SHARE = 0.1  # of the whole run: a change of the plan that is worth a line on the console
STALL_FACTOR = 4  # of the median: a step that took longer stood still, and counts as long as this
SAFE_DEVIATIONS = 2  # of what remains: so much longer it may take, and the decay still ends in time
LEFT_OVER_SHARE = 0.01  # of the steps made: a run that has room for fewer more is over


class Pause(NamedTuple):
    """What happens between steps, every `interval_steps`: an evaluation or a save, and its
    seconds."""

    interval_steps: float
    seconds: float


@dataclass
class Pace:
    """What the steps of this process take, and the pauses between them. All in seconds of wall
    clock.

    eval_interval, save_interval: steps between two evaluations and two saves; 0: there are none.
    """

    eval_interval: int = 0
    save_interval: int = 0
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))
    first_step: float | None = None
    eval_seconds: float = 0.0
    save_seconds: float = 0.0

    def add_step(self, seconds: float) -> None:
        if self.first_step is None:
            self.first_step = seconds
            return
        self.steps.append(seconds)
        recent = list(self.steps)[-RECENT_STEPS:]
        mean = statistics.fmean(self.without_stalls)
        if abs(statistics.median(recent) - mean) > CHANGED_SHARE * mean:
            self.steps = deque(recent, maxlen=WINDOW_STEPS)

    @property
    def without_stalls(self) -> list[float]:
        """The seconds of the steps in the window; a step that stood still counts as STALL_FACTOR of
        the median."""
        longest = STALL_FACTOR * statistics.median(self.steps)
        return [min(seconds, longest) for seconds in self.steps]

    def begin_stage(self) -> None:
        """Steps are of another kind from here on (training.seq_len_schedule): those before say
        nothing of them."""
        self.steps.clear()
        self.first_step = None

    @property
    def is_measured(self) -> bool:
        return len(self.steps) >= MEASURED_STEPS

    @property
    def seconds_per_step(self) -> float:
        """The mean of the last WINDOW_STEPS; of very few the median, since one slow step would
        decide."""
        if len(self.steps) > RECENT_STEPS:
            return statistics.fmean(self.without_stalls)
        if self.steps:
            return statistics.median(self.steps)
        assert self.first_step is not None, "no step was measured"
        return self.first_step

    @property
    def spread(self) -> float:
        """The standard deviation of a step, in seconds."""
        if len(self.steps) > MEASURED_STEPS:
            return statistics.pstdev(self.without_stalls)
        return 0.0

    @property
    def pauses(self) -> tuple[Pause, ...]:
        found = (
            Pause(self.eval_interval, self.eval_seconds),
            Pause(self.save_interval, self.save_seconds),
        )
        return tuple(pause for pause in found if pause.interval_steps)


def seconds_of(
    steps: int,
    step: int,
    seconds_per_step: float,
    pauses: tuple[Pause, ...] = (),
    spread: float = 0.0,
) -> float:
    """What so many steps take from `step` on, with the pauses between them (none after the last).

    spread: the standard deviation of a step. Many steps are as likely as not to take longer than
    their mean says; SAFE_DEVIATIONS of their sum are added.
    """
    total = steps * seconds_per_step + SAFE_DEVIATIONS * spread * math.sqrt(steps)
    for interval_steps, seconds in pauses:
        count = (step + max(steps, 1) - 1) // interval_steps - step // interval_steps
        total += count * seconds
    return total


def steps_that_fit(
    seconds: float,
    step: int,
    seconds_per_step: float,
    pauses: tuple[Pause, ...] = (),
    spread: float = 0.0,
) -> int:
    """The most steps from `step` on that take at most so many seconds; 0 where not one fits."""
    low = 0
    high = max(1, math.floor(seconds / max(seconds_per_step, 1e-9)))
    while low < high:
        middle = (low + high + 1) // 2
        if seconds_of(middle, step, seconds_per_step, pauses, spread) <= seconds:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass
class Budget:
    """The seconds that a run may use, and at most so many steps. Decides when its plan is looked
    at, and what it becomes."""

    max_seconds: float
    most_steps: int
    pace: Pace
    next_step: int = 0  # at which the clock is looked at again
    next_seconds: float = 0.0  # or when so many are used, whatever comes first

    def due(self, plan: Plan, step: int, used_seconds: float) -> bool:
        """Whether the plan is to be looked at before this step. Steps that were never measured
        cannot be planned, and a plan that is over stays so: its decay has ended."""
        if self.pace.first_step is None or (plan and step >= plan[-1].total_steps):
            return False
        if used_seconds >= self.max_seconds:
            return True
        if not self.pace.is_measured:
            missing = MEASURED_STEPS - len(self.pace.steps)
            return (
                not plan and self.max_seconds - used_seconds < missing * self.pace.seconds_per_step
            )
        return step >= self.next_step or used_seconds >= self.next_seconds

    def replanned(self, plan: Plan, step: int, used_seconds: float) -> Plan:
        """The plan as it is best from this step on: with one more entry, or as it was where that
        makes little difference."""
        left = self.max_seconds - used_seconds
        pace = self.pace
        fit = steps_that_fit(left, step, pace.seconds_per_step, pace.pauses, pace.spread)
        total = min(step + fit, max(self.most_steps, step))
        before = plan[-1].total_steps if plan else None
        if before is None or abs(total - before) > NOTEWORTHY_SHARE * max(0, before - step):
            plan = with_entry(plan, step, total)
        remaining = plan[-1].total_steps - step
        ahead = max(1, math.ceil(LOOK_SHARE * remaining))
        self.next_step = step + ahead
        expected = seconds_of(ahead, step, pace.seconds_per_step, pace.pauses)
        self.next_seconds = used_seconds + LATE_SHARE * expected
        return plan

    def resumed(self, plan: Plan, step: int, used_seconds: float) -> Plan:
        """The plan of a run that resumes from `step`, by its mean speed so far, until this process
        has measured its own. A plan that is over gets more steps where the budget has room for them
        (a remainder that is not worth it is left); one that is not over ends where not even one
        step fits."""
        if not step:
            return plan
        fit = steps_that_fit(self.max_seconds - used_seconds, step, used_seconds / step)
        if plan and step < plan[-1].total_steps:
            if fit:
                return plan
            return with_entry(plan, step, step)
        if fit < max(1, LEFT_OVER_SHARE * step) or step >= self.most_steps:
            return plan or (Planned(step, step),)
        return with_entry(plan, step, min(step + fit, self.most_steps))


def with_entry(plan: Plan, step: int, total_steps: int) -> Plan:
    """The plan with what is known now; one entry a step."""
    kept = tuple(entry for entry in plan if entry.step < step)
    return (*kept, Planned(step, total_steps))
