"""budget.py: what fits into a time, when the clock is looked at, what a run does on machines of any speed. No real clock."""

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from longfire.training.budget import MEASURED_STEPS, Budget, Pace, Pause, seconds_of, steps_that_fit
from longfire.training.schedule import Plan, Planned, progress, read_plan, written


def by_hand(steps: int, step: int, seconds_per_step: float, pauses: tuple[Pause, ...]) -> float:
    total = 0.0
    for number in range(step + 1, step + steps + 1):
        total += seconds_per_step
        if number < step + steps:
            total += sum(pause.seconds for pause in pauses if number % pause.interval_steps == 0)
    return total


@given(
    some.integers(1, 60),
    some.integers(0, 50),
    some.floats(0.01, 3),
    some.lists(some.builds(Pause, some.integers(1, 20), some.floats(0, 9)), max_size=2).map(tuple),
)
def test_seconds_of_steps_are_those_counted_one_by_one(steps, step, seconds_per_step, pauses):
    assert seconds_of(steps, step, seconds_per_step, pauses) == pytest.approx(
        by_hand(steps, step, seconds_per_step, pauses)
    )


@given(
    some.floats(0, 300),
    some.integers(0, 50),
    some.floats(0.05, 5),
    some.integers(1, 9),
    some.floats(0, 9),
)
def test_the_steps_that_fit_are_the_most(seconds, step, seconds_per_step, interval, pause):
    pauses = (Pause(interval, pause),)
    fit = steps_that_fit(seconds, step, seconds_per_step, pauses)
    assert fit >= 0
    if fit:
        assert seconds_of(fit, step, seconds_per_step, pauses) <= seconds * (1 + 1e-9)
    assert seconds_of(fit + 1, step, seconds_per_step, pauses) > seconds * (1 - 1e-9)


def test_the_pace_leaves_out_the_first_step_and_one_slow_step_of_three():
    pace = Pace()
    for seconds in (60.0, 1.0, 5.0, 1.0):
        pace.add_step(seconds)
    assert pace.is_measured and pace.seconds_per_step == 1.0
    pace.begin_stage()
    assert not pace.is_measured
    pace.add_step(9.0)
    assert pace.seconds_per_step == 9.0


Speed = Callable[[int, float], float]  # seconds of a step, by its number and the time


def simulated(
    max_seconds: float,
    speed: Speed,
    most_steps: int = 10**9,
    pace: Pace | None = None,
    plan: Plan = (),
    step: int = 0,
    used: float = 0.0,
) -> tuple[Plan, int, float]:
    """A run on a machine of this speed: its plan, steps and seconds."""
    pace = pace or Pace()
    budget = Budget(max_seconds, most_steps, pace)
    plan = budget.resumed(plan, step, used)
    while True:
        if budget.due(plan, step, used):
            plan = budget.replanned(plan, step, used)
        if step >= (plan[-1].total_steps if plan else most_steps):
            return plan, step, used
        seconds = speed(step, used)
        step, used = step + 1, used + seconds
        pace.add_step(seconds)
        if (
            pace.eval_interval
            and step % pace.eval_interval == 0
            and step < (plan[-1].total_steps if plan else most_steps)
        ):
            used += pace.eval_seconds


@given(some.floats(0.01, 2), some.floats(1, 500))
@settings(max_examples=60, deadline=None)
def test_a_steady_machine_fills_its_budget_to_the_step(seconds, max_seconds):
    plan, steps, used = simulated(max_seconds, lambda step, now: seconds)
    assert steps == plan[-1].total_steps >= 1 and progress(plan, steps) == 1.0
    assert used <= max(max_seconds, seconds) * (1 + 1e-9)
    assert used > max_seconds - 2 * seconds, "no more than a step is given away"
    assert len(plan) <= 3, "nothing changes, so nothing is planned anew"


@given(some.floats(0.2, 5), some.floats(0.05, 0.95), some.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_machine_that_changes_its_speed_stops_in_time(factor, when, seed):
    """From some moment on steps take `factor` times as long; and every step is up to 20 % off."""

    def speed(step: int, now: float) -> float:
        noise = 1 + 0.2 * ((seed + 7919 * step) % 101 / 50 - 1)
        return 0.1 * noise * (factor if now > 100 * when else 1)

    plan, steps, used = simulated(100, speed)
    assert used <= 100 + 0.12 * max(1, factor), "at most the last step is late"
    assert used > 100 * 0.97
    assert progress(plan, steps) == 1.0
    assert all(a.step < b.step for a, b in pairwise(plan)) and read_plan(written(plan)) == plan
    assert len(plan) < 80


def test_a_stall_is_seen_before_the_next_look():
    """A step of 30 s where 0.1 s were planned: the rest shrinks at once."""
    plan, steps, used = simulated(100, lambda step, now: 30.0 if step == 500 else 0.1)
    assert used <= 100.2 and 660 <= steps <= 702
    assert any(entry.step == 501 for entry in plan)


@pytest.mark.parametrize("seed", range(8))
def test_on_a_machine_that_others_use_the_decay_ends_in_time(seed):
    """Loads that come and go, and every step off by a third: the last step made is near the end of the planned decay."""
    draw, load = random.Random(seed), [1.0]

    def speed(step: int, now: float) -> float:
        if draw.random() < 0.05:
            load[0] = draw.choice([1, 1, 1.5, 2])
        return 0.2 * load[0] * draw.lognormvariate(0, 0.3)

    plan, steps, used = simulated(100, speed)
    assert progress(plan, steps - 1) > 0.97 and 97 < used < 101


def test_first_steps_that_compile_do_not_decide():
    plan, steps, used = simulated(300, lambda step, now: 60.0 if step == 0 else 0.5)
    assert plan[0] == Planned(MEASURED_STEPS + 1, 1 + 480) and used <= 300 and steps == 481


@pytest.mark.parametrize(
    "max_seconds, seconds, steps", [(0.5, 3, 1), (3, 3, 1), (6.5, 3, 2), (10, 3, 3), (29, 3, 9)]
)
def test_a_budget_of_few_steps_has_at_least_one(max_seconds, seconds, steps):
    plan, made, _ = simulated(max_seconds, lambda step, now: seconds)
    assert made == steps == plan[-1].total_steps


def test_the_most_steps_of_the_settings_are_a_bound():
    plan, steps, used = simulated(100, lambda step, now: 0.1, most_steps=200)
    assert steps == 200 == plan[-1].total_steps and used < 21
    assert simulated(100, lambda step, now: 0.1, most_steps=2)[1] == 2


def test_evaluations_between_steps_are_planned_for():
    pace = Pace(eval_interval=50, eval_seconds=4.0)
    _, steps, used = simulated(100, lambda step, now: 0.1, pace=pace)
    assert 90 < used <= 100 + 1e-6
    assert steps == steps_that_fit(100, 0, 0.1, pace.pauses)


def test_a_run_that_goes_on_keeps_its_budget():
    plan, steps, used = simulated(100, lambda step, now: 0.1)
    assert simulated(100, lambda step, now: 0.1, plan=plan, step=steps, used=used)[1] == steps, (
        "it is finished"
    )
    half = tuple(entry for entry in plan if entry.step < 400)
    again, more, total = simulated(100, lambda step, now: 0.2, plan=half, step=400, used=40.0)
    assert again[: len(half)] == half and 690 <= more <= 705 and total <= 100.2
    longer, more, total = simulated(200, lambda step, now: 0.1, plan=plan, step=steps, used=used)
    assert 1980 <= more <= 2001 and 195 < total <= 200.1 and longer[: len(plan)] == plan
    assert simulated(30, lambda step, now: 0.1, plan=half, step=400, used=40.0)[1] == 400, (
        "less than it has used already"
    )


def test_a_run_that_was_begun_without_a_budget_gets_one():
    _, steps, used = simulated(100, lambda step, now: 0.1, step=500, used=50.0)
    assert 995 <= steps <= 1001 and used <= 100.1
    assert simulated(40, lambda step, now: 0.1, step=500, used=50.0)[1] == 500
