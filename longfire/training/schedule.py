"""The learning rate of each step: a pure function of the settings, the plan and the step; free of
torch.

A run of a known number of steps uses `schedule`. A run with a time budget (training.max_seconds)
has a plan: a list of entries STEP:TOTAL_STEPS, one for each time that its number of steps was
estimated (training/budget.py). `planned_schedule` gives the rate for such a plan. It reads only the
entries up to the step that it is asked for, so a run that is repeated with the whole plan has the
same rates as the run that wrote it, entry by entry.

    training.step_plan = ["4:100", "50:80"]

    steps 0 to 3     nothing is known yet: progress is 0
    steps 4 to 49    progress rises from 0 by 1/96 a step; it would be 1 at step 100
    steps 50 to 79   the machine became slower; progress resumes from 46/96 and is 1 at step 80
"""

import math
from bisect import bisect_right
from typing import NamedTuple

from longfire.config.settings import LRScheduler
from longfire.errors import SettingsError

WARMUP_SHARE = 0.2  # of the run: what a warm-up that is too long for it is cut to
STEP_PLAN = "training.step_plan"
# Shapes that follow the steps that are done, and never the length of the run
BY_STEPS = ("constant", "inverse_sqrt", "step", "multistep", "plateau")
# Of inverse_sqrt without a warm-up, as in transformers' get_inverse_sqrt_schedule
TIMESCALE_STEPS = 10_000


class Planned(NamedTuple):
    """From `step` on the run is planned to end after `total_steps` steps."""

    step: int
    total_steps: int


Plan = tuple[Planned, ...]


def read_plan(words: tuple[str, ...]) -> Plan:
    """The plan that training.step_plan gives. Raises SettingsError naming the entry that is
    wrong."""
    plan: list[Planned] = []
    for word in words:
        try:
            step, total_steps = map(int, word.split(":"))
        except ValueError:
            raise SettingsError(
                f"{STEP_PLAN}: {word!r} is not STEP:TOTAL_STEPS, as 40:1000"
            ) from None
        if step < 0 or total_steps < max(1, step):
            raise SettingsError(
                f"{STEP_PLAN}: {word!r}: STEP must be 0 or more, and TOTAL_STEPS at least STEP"
            )
        if plan and step <= plan[-1].step:
            raise SettingsError(
                f"{STEP_PLAN}: {word!r}: each entry must have a later STEP than the one before it"
            )
        plan.append(Planned(step, total_steps))
    return tuple(plan)


def written(plan: Plan) -> tuple[str, ...]:
    """The plan as training.step_plan spells it."""
    return tuple(f"{entry.step}:{entry.total_steps}" for entry in plan)


def until(plan: Plan, step: float) -> Plan:
    """The entries that were made up to this step."""
    return tuple(entry for entry in plan if entry.step <= step)


def progress(plan: Plan, step: float) -> float:
    """The share of a planned run that is over before `step`, from 0 to 1; continuous in `step`,
    never falling."""
    done = 0.0
    begin = 0
    end = math.inf
    for entry in until(plan, step):
        done = along(done, begin, end, entry.step)
        begin, end = entry
    return along(done, begin, end, step)


def along(done: float, begin: int, end: float, step: float) -> float:
    """At `step` on the straight line from (begin, done) to (end, 1); end = inf: `done`, since
    nothing is planned yet."""
    if step >= end:
        return 1.0
    return done + (1 - done) * (step - begin) / (end - begin)


class Warmup(NamedTuple):
    """From step `begin` the rate rises from `level` of the peak in equal parts, until it has the
    peak before step `end`."""

    begin: int
    level: float
    end: float

    def share(self, step: float) -> float:
        """The share of the peak rate that this step of the warm-up has; the first step of a run
        already moves."""
        return min(
            1.0, self.level + (1 - self.level) * (step + 1 - self.begin) / (self.end - self.begin)
        )


def fitting_warmup(total_steps: float, warmup_steps: float, name: str = "cosine") -> float:
    """The warm-up of a run of a known length: as asked for, or, where that is longer than the run,
    WARMUP_SHARE of it. For wsd (`name` of the scheduler) also where it is as long as the run: no
    step would be left for the decay."""
    fits = warmup_steps < total_steps if name == "wsd" else warmup_steps <= total_steps
    if fits:
        return warmup_steps
    return max(1, int(WARMUP_SHARE * total_steps))


def planned_warmup(plan: Plan, step: float, warmup_steps: float) -> Warmup:
    """The warm-up as it is planned at `step`: each entry cuts what remains of it to WARMUP_SHARE of
    the whole run."""
    warmup = Warmup(0, 0.0, warmup_steps)
    for entry in until(plan, step):
        longest = max(entry.step + 1, WARMUP_SHARE * entry.total_steps)
        if entry.step < warmup.end and longest < warmup.end:
            reached = warmup.level + (1 - warmup.level) * (entry.step - warmup.begin) / (
                warmup.end - warmup.begin
            )
            warmup = Warmup(entry.step, reached, longest)
    return warmup


def schedule(
    position: float,
    total: float,
    warmup: float,
    scheduler: LRScheduler,
    drops: int = 0,
) -> float:
    """The share of the peak learning rate that the step starting at `position` uses: a pure
    function.

    One step is the unit; a run that counts in tokens divides all three by its tokens a step, and
    may so get fractions. Warm-up: (position + 1) / warmup, so that the first step already moves and
    the last one of the warm-up has the peak (1 with warmup_shape = constant). Then `by_steps` or
    `decayed`, with x from 0 at the end of the warm-up to 1 at `total`; for wsd from 0 where the
    last `decay_ratio` of the WHOLE run begins (Hu et al. 2024, MiniCPM), or what the warm-up leaves
    of that part. drops: how often `plateau` has lowered the rate (training/plateau.py).
    """
    if position < warmup:
        if scheduler.warmup_shape == "constant":
            return 1.0
        return min(1.0, (position + 1) / warmup)
    if scheduler.name in BY_STEPS:
        return by_steps(position, warmup, scheduler, drops)
    begin = max(warmup, total * (1 - scheduler.decay_ratio)) if scheduler.name == "wsd" else warmup
    return decayed(min(1.0, max(0.0, (position - begin) / max(1.0, total - begin))), scheduler)


def planned_schedule(
    plan: Plan,
    step: int,
    warmup_steps: float,
    scheduler: LRScheduler,
    drops: int = 0,
) -> float:
    """The same for a run with a plan: the decay goes by `progress` instead of steps, so that the
    rate never jumps where the number of steps is estimated anew, and has come down to its floor
    when the planned steps are over."""
    warmup = planned_warmup(plan, step, warmup_steps)
    if step < warmup.end:
        if scheduler.warmup_shape == "constant":
            return 1.0
        return warmup.share(step)
    if scheduler.name in BY_STEPS:
        return by_steps(step, warmup.end, scheduler, drops)
    begin = progress(plan, warmup.end)
    if scheduler.name == "wsd":
        begin = max(begin, 1 - scheduler.decay_ratio)
    done = progress(plan, step)
    x = (done - begin) / (1 - begin) if begin < 1 else done
    return decayed(max(0.0, x), scheduler)


def by_steps(position: float, warmup: float, scheduler: LRScheduler, drops: int) -> float:
    """The share of the peak rate after the warm-up of a shape that does not look at the length of
    the run; never below min_lr_ratio, but for `constant`:

    constant      1
    inverse_sqrt  1 / sqrt(1 + (position - warmup) / timescale)   (Vaswani et al. 2017, section 5.3,
                  with as many steps of timescale as of warm-up)
    step          gamma ** (position // step_size)                (torch's StepLR)
    multistep     gamma ** (milestones that are reached)          (torch's MultiStepLR)
    plateau       gamma ** drops                                  (torch's ReduceLROnPlateau)
    """
    name = scheduler.name
    if name == "constant":
        return 1.0
    if name == "inverse_sqrt":
        timescale = scheduler.timescale_steps or warmup or TIMESCALE_STEPS
        share = 1 / math.sqrt(1 + (position - warmup) / timescale)
    elif name == "step":
        share = scheduler.gamma ** (position // scheduler.step_size)
    elif name == "multistep":
        share = scheduler.gamma ** bisect_right(scheduler.milestones, position)
    else:
        share = scheduler.gamma**drops
    return max(scheduler.min_lr_ratio, share)


def decayed(x: float, scheduler: LRScheduler) -> float:
    """The share of the peak rate at x, from 0 where the decay begins to 1 where it ends; floor =
    min_lr_ratio:

    cosine      floor + (1 - floor) (1 + cos pi x) / 2      (Loshchilov and Hutter 2017)
    linear      floor + (1 - floor) (1 - x)
    polynomial  floor + (1 - floor) (1 - x) ** power
    wsd         cosine or linear, or floor + (1 - floor) (1 - sqrt x)      (Haegele et al. 2024)
    """
    shape = scheduler.decay_shape if scheduler.name == "wsd" else scheduler.name
    if shape == "cosine":
        share = (1 + math.cos(math.pi * x)) / 2
    elif shape == "sqrt":
        share = 1 - math.sqrt(x)
    elif shape == "polynomial":
        share = (1 - x) ** scheduler.power
    else:
        share = 1 - x
    return scheduler.min_lr_ratio + (1 - scheduler.min_lr_ratio) * share
