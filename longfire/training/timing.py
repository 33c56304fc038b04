"""The time of a run as it goes: measured, shown, planned anew where the run has a budget; and the
learning rate that follows."""

import logging
from typing import NamedTuple, Protocol

from longfire.checkpoint.state import State
from longfire.config.run import Run
from longfire.config.run_folder import write
from longfire.device import Clock
from longfire.plural import counted, duration
from longfire.training.budget import MEASURED_STEPS, NOTED_SHARE, Budget, Pace, seconds_of
from longfire.training.plateau import Plateau
from longfire.training.records import METRICS, last_records
from longfire.training.reporting import QuietReport, Report
from longfire.training.schedule import (
    BY_STEPS,
    Plan,
    planned_schedule,
    progress,
    read_plan,
    schedule,
)

logger = logging.getLogger(__name__)

# Of a learning rate, and of what it changes by in a step: a larger difference to the recorded rate
# is logged. (After a change of the batch size the step before is not quite where it was.)
SAME_RATE = 0.01
SAME_SLOPE = 4


class Progress(Protocol):
    """How far a run is: what of a State the learning rate depends on."""

    @property
    def step(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def plan(self) -> Plan: ...

    @property
    def plateau(self) -> Plateau: ...


class EarlierProgress(NamedTuple):
    """That of an earlier step."""

    step: int
    tokens: int
    plan: Plan
    plateau: Plateau


def last_step(run: Run, state: State) -> int:
    """The step that ends the run, as far as it is known."""
    if state.plan:
        return state.plan[-1].total_steps
    return most_steps(run, state)


def most_steps(run: Run, state: State) -> int:
    """The most steps that the settings allow. Of a run counted in tokens: the missing ones in steps
    of the present size, since a run may be resumed with another batch size."""
    if not run.training.tokens:
        return run.steps
    return state.step + -(-max(0, run.training.tokens - state.tokens) // run.tokens_per_step)


def learning_rate(run: Run, done: Progress) -> float:
    """The rate of the next step: a pure function of the settings, the plan, how far the run is, in
    steps or in tokens, and, for `plateau`, what its validations found."""
    peak = run.optimizer.lr
    warmup = run.warmup_steps
    drops = done.plateau.drops
    if run.is_planned:
        return peak * planned_schedule(done.plan, done.step, warmup, run.lr_scheduler, drops)
    in_tokens = run.lr_scheduler.warmup_tokens or run.training.tokens
    position = done.tokens / run.tokens_per_step if in_tokens else done.step
    end = run.lr_scheduler.decay_end_step or run.steps
    return peak * schedule(position, end, warmup, run.lr_scheduler, drops)


class Timing:
    """The time of a run while it trains. `begin` and `is_over` are collective over the mesh; the
    clock of process 0 decides for all."""

    def __init__(self, run: Run, state: State, report: Report | QuietReport, clock: Clock) -> None:
        self.run = run
        self.state = state
        self.report = report
        self.clock = clock
        checkpoint = run.checkpoint
        saves = checkpoint.enable_checkpoint and checkpoint.interval_type == "steps"
        self.pace = Pace(run.eval.interval, checkpoint.interval if saves else 0)
        self.budget = Budget(run.training.max_seconds, most_steps(run, state), self.pace)

    def begin(self) -> None:
        """Before the first step of this process: the plan that it continues, and whether any step
        is left."""
        run = self.run
        state = self.state
        if run.training.max_seconds:
            self.take(self.budget.resumed(state.plan, state.step, state.elapsed_seconds))
            self.keep_plan()
            self.note_what_is_left()
        else:
            state.plan = read_plan(run.training.step_plan)
            self.report.expect(last_step(run, state))
        self.note_if_finished()
        self.note_a_jump()

    def note_what_is_left(self) -> None:
        """Of a run that is resumed: its plan is known before the first step of this process."""
        run = self.run
        state = self.state
        if not state.step or state.step >= last_step(run, state):
            return
        left = run.training.max_seconds - state.elapsed_seconds
        steps = last_step(run, state) - state.step
        logger.info(
            f"time: {duration(left)} of training.max_seconds = {run.training.max_seconds:g} are "
            f"left, planned as {counted(steps, 'step')} until this process has measured its own"
        )

    def note_if_finished(self) -> None:
        """Nothing is trained where the run has all steps that its settings ask for, or more."""
        run = self.run
        state = self.state
        if not state.step or state.step < last_step(run, state):
            return
        key = "training.tokens" if run.training.tokens else "training.steps"
        if run.training.step_plan and not run.training.max_seconds:
            key = "training.step_plan"
        if run.training.max_seconds and state.step < most_steps(run, state):
            key = "training.max_seconds"
        used = ""
        if run.training.max_seconds:
            used = f", {duration(state.elapsed_seconds)} of training"
        done = f"{counted(state.step, 'step')} {'is' if state.step == 1 else 'are'} done"
        asked = run.training.tokens if key == "training.tokens" else last_step(run, state)
        has_more = (state.tokens if key == "training.tokens" else state.step) > asked
        more = ""
        if has_more and not run.training.max_seconds:
            more = f", more than {key} = {asked:,} asks for"
        logger.info(
            f"this run is finished: its {done}{more}{used}.{self.cut_short()} "
            f"To go on, raise {key}; to begin anew, name another job.dump_folder"
        )

    def cut_short(self) -> str:
        """A message where the budget of a finished run ended long before its plan was over."""
        plan = self.state.plan
        step = self.state.step
        if len(plan) < 2 or plan[-1] != (step, step):
            return ""
        done = progress(plan[:-1], step)
        if done > 1 - NOTED_SHARE:
            return ""
        return (
            f" Its time was up at {done:.0%} of the plan, so the learning rate has not decayed "
            "to its floor."
        )

    def note_a_jump(self) -> None:
        """Where the settings give the last step another learning rate than it had, the rate jumps,
        which is seldom intended."""
        run = self.run
        state = self.state
        if not state.step or state.step >= last_step(run, state) or state.mesh.rank():
            return
        decays = run.lr_scheduler.name not in BY_STEPS
        if state.plan and decays and progress(state.plan, state.step) == 1:
            rate = learning_rate(run, state)
            logger.info(
                "the decay of the learning rate is over: the run goes on with its floor, "
                f"{rate:.3g}"
            )
        if run.lr_scheduler.name == "plateau" and state.plateau.step == state.step:
            return  # a validation after that step may have lowered the rate, as it should
        had = recorded_rate(run, state.step)
        tokens_before = state.tokens - run.tokens_per_step
        before = EarlierProgress(state.step - 1, tokens_before, state.plan, state.plateau)
        was = learning_rate(run, before)
        follows = learning_rate(run, state)
        if had is None or abs(was - had) <= max(SAME_RATE * had, SAME_SLOPE * abs(follows - was)):
            return
        logger.info(
            f"the learning rate jumps: step {state.step:,} had {had:.3g}, the next one has "
            f"{follows:.3g}, since the schedule has changed (its length, its settings, or "
            "optimizer.lr). checkpoint.load_step goes back to a step before the decay; "
            "lr_scheduler.name = constant with a lower optimizer.lr goes on without a jump"
        )

    def step_is_done(self, seconds: float) -> None:
        """Count a step of so many seconds."""
        self.pace.add_step(seconds)
        if len(self.pace.steps) == MEASURED_STEPS and not self.run.training.max_seconds:
            self.note_duration()

    def evaluation_is_done(self) -> None:
        """Count the time since the last step as that of an evaluation."""
        self.pace.eval_seconds = self.pause_is_over()

    def save_is_done(self) -> None:
        """Count the time since the last step as that of a save."""
        self.pace.save_seconds = self.pause_is_over()

    def pause_is_over(self) -> float:
        """Count the time since the last step or pause as time of training. Returns its seconds."""
        seconds = self.clock.read()["seconds"]
        self.state.elapsed_seconds += seconds
        return seconds

    def note_duration(self) -> None:
        """Log how long the rest of the run takes, by the steps that were measured."""
        state = self.state
        pace = self.pace
        left = last_step(self.run, state) - state.step
        if left < 1:
            return
        seconds = seconds_of(left, state.step, pace.seconds_per_step, pace.pauses)
        unknown: list[str] = []
        if 0 < pace.eval_interval < left and not pace.eval_seconds:
            unknown.append("evaluations")
        if 0 < pace.save_interval < left and not pace.save_seconds:
            unknown.append("saves")
        more = f", and {' and '.join(unknown)} beside them" if unknown else ""
        about = f"about {duration(seconds)}" if seconds >= 1 else "less than a second"
        logger.info(
            f"time: {pace.seconds_per_step:.3g} s a step (measured): the {counted(left, 'step')} "
            f"that {'is' if left == 1 else 'are'} left {'takes' if left == 1 else 'take'} "
            f"{about}{more}"
        )

    def is_over(self) -> bool:
        """Whether all steps are done. Under a budget the run may be planned anew here."""
        state = self.state
        mesh = self.state.mesh
        if self.run.training.max_seconds:
            due = mesh.rank() == 0 and self.budget.due(
                state.plan, state.step, state.elapsed_seconds
            )
            if mesh.any(due):
                plan = state.plan
                if mesh.rank() == 0:
                    plan = self.budget.replanned(state.plan, state.step, state.elapsed_seconds)
                self.take(plan)
        return state.step >= last_step(self.run, state)

    def take(self, plan: Plan) -> None:
        """Take the plan of process 0 on all processes, save it in run.toml, and log it where it
        differs much."""
        run = self.run
        state = self.state
        mesh = self.state.mesh
        before = state.plan
        state.plan = mesh.broadcast_object(plan)
        if state.plan == before:
            return
        self.keep_plan()
        self.report.expect(last_step(run, state))
        total = state.plan[-1].total_steps
        was = before[-1].total_steps if before else 0
        is_measured = self.pace.first_step is not None
        if abs(total - was) < NOTED_SHARE * was or (total == state.step and not is_measured):
            return
        pace = "at the mean speed so far"
        if is_measured:
            pace = f"{self.pace.seconds_per_step:.3g} s a step"
        bound = " (the most that the settings allow)" if total == most_steps(run, state) else ""
        now = f", after {was:,} planned before" if was else ""
        left = max(0.0, run.training.max_seconds - state.elapsed_seconds)
        logger.info(
            f"time: {pace}: {run.training.max_seconds:g} s of training are "
            f"{counted(total, 'step')} = {total * run.tokens_per_step:,} tokens{bound}{now}; "
            f"{duration(left)} left"
        )

    def keep_plan(self) -> None:
        """Save the plan in run.toml, so that the run can be repeated with it. Collective over the
        mesh."""
        run = self.run
        state = self.state
        mesh = self.state.mesh
        with mesh.raise_on_all_ranks():
            if state.plan and mesh.rank() == 0:
                write(run.with_plan(state.plan), run.folder)


def recorded_rate(run: Run, step: int) -> float | None:
    """The learning rate that metrics.jsonl has for a step; None where it has none."""
    metrics = run.folder / METRICS
    if not metrics.exists():
        return None
    for record in last_records(metrics):
        if record["step"] < step:
            return None
        if record["step"] == step and record.get("lr"):
            return record["lr"]
    return None
