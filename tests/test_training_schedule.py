"""schedule.py: plans are read strictly, progress never jumps or falls, rates by a plan are those of a known number of steps."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from longfire.config.settings import LRScheduler
from longfire.errors import SettingsError
from longfire.training.schedule import (
    WARMUP_SHARE,
    Plan,
    Planned,
    fitting_warmup,
    planned_schedule,
    planned_warmup,
    progress,
    read_plan,
    schedule,
    written,
)

NAMES = ("cosine", "linear", "wsd", "constant")


@some.composite
def plans(draw) -> Plan:
    """Estimates that change by any factor, made at steps before the one that was planned to be the last."""
    plan = [Planned(draw(some.integers(1, 20)), draw(some.integers(21, 400)))]
    for _ in range(draw(some.integers(0, 6))):
        begin, end = plan[-1]
        if end - begin < 2:
            break
        step = draw(some.integers(begin + 1, end - 1))
        plan.append(Planned(step, draw(some.integers(step + 1, 400 + step))))
    return tuple(plan)


@given(plans())
def test_progress_rises_from_0_to_1_without_a_jump(plan):
    begin, end = plan[0].step, plan[-1].total_steps
    values = [progress(plan, step) for step in range(end + 1)]
    assert values[: begin + 1] == [0.0] * (begin + 1) and values[end] == 1.0
    assert all(a <= b for a, b in pairwise(values))
    for step, total in plan[1:]:
        before = tuple(entry for entry in plan if entry.step < step)
        assert progress(plan, step) == progress(before, step), (
            "the new estimate begins where the old one stood"
        )
        assert progress(plan, step + 1) - progress(plan, step) == pytest.approx(
            (1 - progress(plan, step)) / (total - step)
        )


@given(
    plans(), some.integers(0, 60), some.sampled_from(NAMES), some.floats(0, 1), some.floats(0.05, 1)
)
@settings(max_examples=200, deadline=None)
def test_a_repeated_run_has_the_rates_of_the_run_that_made_the_plan(
    plan, warmup, name, floor, decay
):
    """At each step the first run knew the entries up to it, the repeated one knows all."""
    scheduler = LRScheduler(name=name, min_lr_ratio=floor, decay_ratio=decay)
    for step in range(plan[-1].total_steps):
        known = tuple(entry for entry in plan if entry.step <= step)
        assert planned_schedule(plan, step, warmup, scheduler) == planned_schedule(
            known, step, warmup, scheduler
        )


@given(plans(), some.integers(0, 60), some.sampled_from(NAMES[:3]), some.floats(0.05, 1))
@settings(max_examples=200, deadline=None)
def test_rates_rise_in_the_warm_up_then_fall_to_the_floor(plan, warmup, name, decay):
    scheduler = LRScheduler(name=name, min_lr_ratio=0.1, decay_ratio=decay)
    end = plan[-1].total_steps
    rates = [planned_schedule(plan, step, warmup, scheduler) for step in range(end)]
    assert all(0 < rate <= 1 for rate in rates)
    peak = min(end, int(planned_warmup(plan, end, warmup).end))
    assert all(a <= b + 1e-12 for a, b in pairwise(rates[:peak]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[peak + 1 :]))
    assert planned_schedule(plan, end, 0, scheduler) == pytest.approx(0.1)


@given(some.integers(5, 300), some.integers(0, 50), some.sampled_from(NAMES), some.integers(0, 300))
def test_with_one_estimate_at_the_start_the_rates_are_those_of_a_run_of_known_length(
    total, warmup, name, step
):
    """An independent formula: `schedule` counts steps and not progress. It divides by at least one step."""
    scheduler = LRScheduler(name=name, min_lr_ratio=0.1, decay_ratio=0.5)
    warmup = min(warmup, int(WARMUP_SHARE * total))
    step = min(step, total - 1)
    if total * 0.5 < 1:
        return
    assert planned_schedule((Planned(0, total),), step, warmup, scheduler) == pytest.approx(
        schedule(step, total, warmup, scheduler), abs=1e-9
    )


def test_the_example_of_the_docstring():
    plan = read_plan(("4:100", "50:80"))
    assert [progress(plan, step) for step in (0, 4)] == [0.0, 0.0]
    assert progress(plan, 50) == pytest.approx(46 / 96)
    assert progress(plan, 65) == pytest.approx(46 / 96 + (1 - 46 / 96) / 2)
    assert progress(plan, 80) == 1.0


def test_a_warm_up_that_is_too_long_is_cut_where_that_becomes_known():
    """200 steps were asked for; at step 4 there is time for 50, of which a fifth is 10: from 4/200 it rises to 1 at step 10."""
    plan = (Planned(4, 50),)
    scheduler = LRScheduler()
    rates = [planned_schedule(plan, step, 200, scheduler) for step in range(11)]
    assert rates[:4] == [pytest.approx(n / 200) for n in (1, 2, 3, 4)]
    rise = (1 - 4 / 200) / 6
    assert rates[4:10] == [pytest.approx(4 / 200 + n * rise) for n in range(1, 7)]
    assert rates[10] == 1.0


@pytest.mark.parametrize(
    "total, asked, expected", [(12, 200, 2), (1, 200, 1), (3, 200, 1), (200, 200, 200), (100, 0, 0)]
)
def test_a_warm_up_longer_than_a_run_of_known_length_is_a_fifth_of_it(total, asked, expected):
    assert fitting_warmup(total, asked) == expected


def test_a_warm_up_leaves_wsd_a_step_to_decay():
    assert [
        fitting_warmup(total, asked, "wsd") for total, asked in ((2, 2), (200, 200), (200, 199))
    ] == [1, 40, 199]


def test_plans_are_written_as_they_are_read():
    assert written(read_plan(("4:100", "50:80"))) == ("4:100", "50:80")
    assert read_plan(()) == ()


@pytest.mark.parametrize(
    "words, wrong",
    [
        (("4",), "'4' is not STEP:TOTAL_STEPS"),
        (("a:b",), "'a:b' is not STEP:TOTAL_STEPS"),
        (("4:100:3",), "is not STEP:TOTAL_STEPS"),
        (("-1:5",), "STEP must be 0 or more"),
        (("9:5",), "TOTAL_STEPS at least STEP"),
        (("0:0",), "TOTAL_STEPS at least STEP"),
        (("4:100", "4:90"), "a later STEP"),
    ],
)
def test_a_plan_that_cannot_be_is_named(words, wrong):
    with pytest.raises(SettingsError, match=re.escape(wrong)):
        read_plan(words)


def test_a_constant_warm_up_has_the_peak_from_the_first_step():
    scheduler = LRScheduler(name="inverse_sqrt", warmup_shape="constant", min_lr_ratio=0.0)
    shares = [schedule(step, 40, 4, scheduler) for step in range(40)]
    assert shares == pytest.approx([2 / max(step, 4) ** 0.5 for step in range(40)], rel=1e-12)
    plan = (Planned(0, 40),)
    assert [planned_schedule(plan, step, 4, scheduler) for step in range(40)] == shares
