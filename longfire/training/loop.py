"""Training: `train` does a run from its start to its last step, and `train_to_the_end` is the loop
over its steps."""

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from longfire.checkpoint.saving import Checkpoints
from longfire.checkpoint.state import State
from longfire.config.run import Run
from longfire.config.run_folder import begun
from longfire.config.settings import Training
from longfire.device import Clock, check_float8, choose_device
from longfire.errors import TrainingError
from longfire.launch import StopRequest, Watchdog, signal_name
from longfire.messages import log_in_first_process
from longfire.parallel.apply import device_of
from longfire.parallel.mesh import ALONE, Mesh, joined
from longfire.tasks.contract import Results, Task
from longfire.tasks.table import task_named
from longfire.training.code_snapshot import save_code
from longfire.training.finish import finish
from longfire.training.reporting import QuietReport, Report
from longfire.training.setup import checkpoints_of, state_at_start
from longfire.training.stages import enter_stage
from longfire.training.step import train_step
from longfire.training.step_record import StepRecords
from longfire.training.timing import Timing, last_step, learning_rate
from longfire.training.traces import profiler
from longfire.training.validation import is_due, is_missing, validate

logger = logging.getLogger(__name__)


def train(run: Run, now: Callable[[], float] = time.perf_counter) -> int:
    """Train to the last step and return the exit code. The lines stand in the order in which things
    happen.

    Every process of the run executes all of it; process 0 alone writes to the run folder and to the
    console.
    now: the clock of the training, in seconds; training.max_seconds is measured by that of
    process 0.
    """
    run = planned_anew(run)
    log_in_first_process(run.world.is_first)
    device = choose_device(run.training, run.world.local_rank)
    check_float8(run.float8, device)
    stop = StopRequest()
    with (
        joined(
            run.world,
            run.degrees,
            run.comm,
            device,
            run.parallelism.cpu_offload,
        ) as mesh,
        entered_by_rank_0(mesh, begun(run)),
        opened(task_named(run.job.task)(run, mesh, stop)) as task,
    ):
        with mesh.raise_on_all_ranks():
            task.begin()
        checkpoints = checkpoints_of(run, task, mesh)
        state = state_at_start(run, task, checkpoints, device, mesh)
        if run.checkpoint.create_seed_checkpoint:
            save_seed_checkpoint(state, checkpoints)
            return 0
        with report_of(run, state) as report, stop:
            results = train_to_the_end(run, state, task, checkpoints, report, stop, now)
            is_stopped = mesh.any(stop.requested)  # a signal may reach one process only
            if run.eval.at_end and results is None and not is_stopped:
                results = validate(state, run, task, report, checkpoints)
            exit_code = max(mesh.all_gather_object(stop.exit_code))
        if exit_code:
            note_stop(run, state, exit_code)
            return exit_code
        if mesh.rank() == 0:
            last_results = results if run.eval.at_end and results else {}
            finish(run, state, task, last_results)
    return 0


def train_to_the_end(
    run: Run,
    state: State,
    task: Task,
    checkpoints: Checkpoints,
    report: Report | QuietReport,
    stop: StopRequest,
    now: Callable[[], float] = time.perf_counter,
) -> Results | None:
    """The loop: take a batch, do a step, record it, save, evaluate; until the last step or until a
    stop is requested. Returns the evaluation after the last step, None where there was none."""
    mesh = state.mesh
    device = device_of(state.model)
    records = StepRecords(run, state, device)
    clock = Clock(device, now)
    timing = Timing(run, state, report, clock)
    timing.begin()
    first_step = state.step
    skips_in_a_row = 0
    results: Results | None = None
    with (
        Watchdog(run.comm) as watchdog,
        profiler(run.profiling, run.folder, mesh.rank()) as trace_step,
        scheduled_garbage_collection(run.training) as collect_garbage,
    ):
        if is_missing(run, state, report) and not timing.is_over():
            results = validate(state, run, task, report, checkpoints)
            timing.evaluation_is_done()
        while not timing.is_over():
            if enter_stage(run, state):
                timing.pace.begin_stage()
            first_sequence = state.rows_consumed
            with clock("data"):
                batch = task.batch(state)
            if mesh.any(stop.requested) or batch is None:
                break
            if state.step == first_step:
                task.check_first_batch(batch)
            results = None
            lr = learning_rate(run, state)
            microbatches = batch.split(run.microbatches)
            numbers = train_step(
                state, microbatches, lr, run.training, clock, task.loss_sum, run.metrics
            )
            seconds = clock.read()
            state.elapsed_seconds += seconds["seconds"]
            report.record(state.step, records.record(numbers, seconds))
            timing.step_is_done(seconds["seconds"])
            skips_in_a_row = check_skips(skips_in_a_row, numbers, task, first_sequence, run, mesh)
            if checkpoints.due(state):
                checkpoints.save(state)
                timing.save_is_done()
            if is_due(run.eval.interval, state.step) and not timing.is_over():
                results = validate(state, run, task, report, checkpoints)
                timing.evaluation_is_done()
            collect_garbage(state.step)
            trace_step()
            watchdog.step_done()
            timing.pause_is_over()
        checkpoints.save(state, last=state.step >= last_step(run, state))
        checkpoints.wait()
    return results


def planned_anew(run: Run) -> Run:
    """The same run without its plan of steps where training.max_seconds makes another one; a run
    that is resumed has its plan in its checkpoint."""
    if not (run.training.max_seconds and run.training.step_plan):
        return run
    if not run.has_checkpoints and run.world.is_first:
        logger.info(
            "training.step_plan is not followed: training.max_seconds plans anew; set that to 0 to "
            "repeat the run of this plan"
        )
    return run.with_plan(())


@contextmanager
def entered_by_rank_0(mesh: Mesh, manager: AbstractContextManager[None]) -> Iterator[None]:
    """Process 0 enters a context manager, and a UserError that it raises is raised on every
    process. Collective over the mesh."""
    with ExitStack() as stack:
        with mesh.raise_on_all_ranks():
            if mesh.rank() == 0:
                stack.enter_context(manager)
        yield


@contextmanager
def opened(task: Task) -> Iterator[Task]:
    """The task, with its data open."""
    with task.opened():
        yield task


def save_seed_checkpoint(state: State, checkpoints: Checkpoints) -> None:
    """Save step 0, from which any number of processes can start. Collective."""
    checkpoints.save(state)
    checkpoints.wait()
    logger.info(
        f"step {state.step} saved to {checkpoints.folder}; stopping, as "
        "checkpoint.create_seed_checkpoint asks"
    )


def note_stop(run: Run, state: State, exit_code: int) -> None:
    """Log the signal that stopped the run, and how to resume it."""
    saved = ""
    if run.checkpoint.enable_checkpoint:
        saved = ", saved; the same command resumes from there"
    logger.info(f"{signal_name(exit_code)}: stopped after step {state.step}{saved}")


def report_of(run: Run, state: State) -> Report | QuietReport:
    """Where this process reports the steps of the run; process 0 keeps the code of this start."""
    if state.mesh.rank():
        return QuietReport()
    save_code(run, state.step)
    is_unknown = run.training.max_seconds and not state.plan
    total_steps = 0 if is_unknown else last_step(run, state)
    return Report(run.folder, run.metrics, total_steps, state.step)


def check_skips(
    skips_in_a_row: int,
    numbers: dict[str, float],
    task: Task,
    first_sequence: int,
    run: Run,
    mesh: Mesh = ALONE,
) -> int:
    """How many steps up to this one were skipped in a row, for numbers that were not finite.

    first_sequence: of the step's batch. Raises TrainingError naming the batch where the settings
    allow no skip, or no more of them.
    """
    if not numbers["skipped"]:
        return 0
    skips_in_a_row += 1
    training = run.training
    allowed = training.max_skips_in_a_row if training.skip_nan_inf else 1
    if skips_in_a_row < allowed:
        return skips_in_a_row
    sources = task.origins(first_sequence, run.sequences_per_step)[:4]
    last_sequence = first_sequence + run.sequences_per_step - 1
    error = TrainingError(
        f"loss {numbers['loss']}, gradient norm {numbers['grad_norm']} in {skips_in_a_row} step(s) "
        f"in a row; the last batch was sequences {first_sequence} to {last_sequence} "
        f"({', '.join(map(str, sources))}, ...). Parameters are as before; the newest checkpoint "
        "is complete. Lower optimizer.lr or lengthen lr_scheduler.warmup_steps; "
        "training.skip_nan_inf = true skips single bad batches"
    )
    error.reported_elsewhere = mesh.rank() > 0  # all processes raise the same
    raise error


@contextmanager
def scheduled_garbage_collection(training: Training) -> Iterator[Callable[[int], None]]:
    """Python's garbage collector pauses a process at a random time, for which the others then wait;
    with training.gc_freq it runs only after the steps that are multiples of it."""

    def collect(step: int) -> None:
        if is_due(training.gc_freq, step):
            gc.collect(1)

    if training.gc_freq:
        gc.disable()
    try:
        yield collect
    finally:
        gc.enable()
