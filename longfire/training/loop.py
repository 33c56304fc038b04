"""Training: a loop that reads like prose and a step that a test can call."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from longfire import ops
from longfire.checkpoint.checkpoint import Checkpoints, State
from longfire.config.run import Run, summary
from longfire.config.settings import Training
from longfire.data.batch import Batch
from longfire.data.batches import Batches, WaitStopped
from longfire.data.prepare import Prepared, prepare
from longfire.device import (
    Clock,
    choose_device,
    choose_dtype,
    fastest_matmul_peak,
    peak_memory_bytes,
)
from longfire.errors import DataError, SettingsError, TrainingError
from longfire.evaluation.evaluate import ROWS, EvaluationStopped, evaluate
from longfire.huggingface import transformers_model
from longfire.huggingface.transformers_documents import check_documents_separate
from longfire.initialise import materialise
from longfire.launch import StopRequest, Watchdog, attempt, signal_name
from longfire.loss import loss_of, loss_sum
from longfire.mixers.attention import Attention
from longfire.model import Model, on_meta
from longfire.ops.bf16 import assume, native_bf16
from longfire.ops.dropout import row_noise
from longfire.optim import (
    clip_gradients,
    make_optimizer,
    rule_of,
    set_learning_rate,
    updates_of,
)
from longfire.parallel import cost, strategy
from longfire.parallel.apply import (
    device_of,
    gradients,
    parallelize,
    recompilations,
    sync_gradients,
)
from longfire.parallel.axes import AXES, DATA
from longfire.parallel.mesh import ALONE, Mesh, joined
from longfire.parallel.pipeline import Pipeline, pipeline_of
from longfire.parallel.sharding import local
from longfire.parallel.tensor import add_up_partial_gradients
from longfire.planner import tables
from longfire.planner.planner import Planner
from longfire.training import lengths
from longfire.training.compiling import compile_decision, eager_rate, sample_of
from longfire.training.distillation import Distillation
from longfire.training.finish import Results, finish
from longfire.training.reporting import QuietReport, Report
from longfire.training.schedule import until
from longfire.training.start import (
    begin,
    fresh_weights,
    refuse_another_batch,
    take_weights,
    warn_of_nothing_unseen,
)
from longfire.training.tbptt import by_segments
from longfire.training.timing import Timing, last_step, learning_rate
from longfire.training.traces import profiler


def train(
    run: Run, note: Callable[[str], None] = print, now: Callable[[], float] = time.perf_counter
) -> int:
    """Train to the last step and return the exit code. Read it downwards: that is the order in
    which things happen.

    Every process of the run goes through all of it; process 0 alone writes to the run folder and
    tells how it goes.
    now: the clock of the training, in seconds; training.max_seconds goes by that of process 0.
    """
    if run.training.max_seconds and run.training.step_plan:
        if not run.has_checkpoints and run.world.is_first:
            note(
                "training.step_plan is not followed: training.max_seconds plans anew; set that to 0 to repeat the run of this plan"
            )
        run = run.with_plan(())  # a run that goes on has it in its checkpoint
    device = choose_device(run.training, run.world.local_rank)
    note = run.world.by_first(note)
    stop = StopRequest()
    with (
        joined(run.world, run.degrees, run.comm, device) as mesh,
        first_process(mesh, run.begun(note)),
        mesh.rank_0_first(lambda: prepared_data(run, mesh, note)) as prepared,
        batches_of(run, prepared, stop, note) as batches,
    ):
        with mesh.raise_on_all_ranks():
            if mesh.rank() == 0:
                begin(run, prepared, note)
            teacher = Distillation.of_settings(run.distillation, run.training.loss_chunk_tokens)
        checkpoints = Checkpoints(
            run.folder / run.checkpoint.folder,
            run.checkpoint,
            note,
            mesh,
            run.comm.train_timeout_seconds / 2,
            prepared.tokenizer.vocabulary,
            attempt(),
        )
        with Watchdog(run.comm, "to set up the model"):
            state = make_state(run, prepared.tokenizer.vocab_size, device, note, teacher, mesh)
            if not checkpoints.restore(state):
                note(
                    f"weights: {take_weights(run, state) if run.model.weights else fresh_weights(run)}"
                )
            refuse_another_batch(run, state)
            set_base(run, state.model, lengths.stage_of_model(run.training, state.step).rope_theta)
        if run.model.backend == "transformers" and run.data.varlen:
            check_documents_separate(state.model)
        if run.checkpoint.create_seed_checkpoint:
            checkpoints.save(state)
            checkpoints.wait()
            note(
                f"step {state.step} saved to {checkpoints.folder}; stopping, as checkpoint.create_seed_checkpoint asks"
            )
            return 0
        with report_of(run, state) as report, stop:
            results = steps_to_the_end(run, state, batches, checkpoints, report, stop, teacher, now)
            is_stopped = mesh.any(stop.requested)  # a signal may reach one process only
            if run.eval.at_end and results is None and not is_stopped:
                results = evaluated(state, batches, run, report)
            exit_code = max(mesh.all_gather_object(stop.exit_code))
        if exit_code:
            saved = (
                ", saved; the same command resumes from there"
                if run.checkpoint.enable_checkpoint
                else ""
            )
            note(f"{signal_name(exit_code)}: stopped after step {state.step}{saved}")
            return exit_code
        if mesh.rank() == 0:
            finish(run, state, batches, (run.eval.at_end and results) or {}, note)
    return 0


@contextmanager
def first_process(mesh: Mesh, inside: AbstractContextManager) -> Iterator[None]:
    """Process 0 goes inside, and its UserError is every process's. Collective over the mesh."""
    with ExitStack() as stack:
        with mesh.raise_on_all_ranks():
            if mesh.rank() == 0:
                stack.enter_context(inside)
        yield


def prepared_data(run: Run, mesh: Mesh, note: Callable[[str], None]) -> Prepared:
    """The token stores; of a streaming run they grow behind process 0, and the others watch them
    grow."""
    behind = run.data.streaming and mesh.rank() == 0
    return prepare(
        run.data,
        run.tokenizer,
        note=note,
        background=behind,
        watch=run.data.streaming and not behind,
    )


def batches_of(
    run: Run, prepared: Prepared, stop: StopRequest, note: Callable[[str], None]
) -> Batches:
    """The rows of the run; nobody waits for them who is asked to stop."""
    training, stages = run.training, stages_in_rows(run)
    return Batches(
        prepared, run.data, training.seq_len, training.seed, note, stages, lambda: stop.requested
    )


def stages_in_rows(run: Run) -> tuple[tuple[int, int], ...]:
    """The stages of training.seq_len_schedule as the batches take them."""
    return tuple(
        (stage.step * run.sequences_per_step, stage.seq_len)
        for stage in lengths.stages(run.training)
    )


def enter_stage(run: Run, state: State, note: Callable[[str], None]) -> bool:
    """Before a step: what its stage asks for, told where it begins. Whether it begins here."""
    stage = lengths.stage_at(run.training, state.step)
    begins = stage.step == state.step and state.step > 0
    if begins:
        base = f", RoPE base {stage.rope_theta:g}" if stage.rope_theta else ""
        note(f"step {state.step}: rows of {stage.seq_len:,} tokens from here on{base}")
    set_base(run, state.model, stage.rope_theta)
    return begins


def set_base(run: Run, model: Model, theta: float) -> None:
    """Let the model's attention layers turn positions by this base (0: as they do), and its shape
    say so."""
    if not theta:
        return
    model.config = run.model_config_with_base(theta).with_vocabulary(model.config.vocab_size)
    for block in model.layers:
        if block is not None and isinstance(block.mixer, Attention):
            block.mixer.turn_by(theta)


def report_of(run: Run, state: State) -> Report | QuietReport:
    if state.mesh.rank():
        return QuietReport()
    unknown = run.training.max_seconds and not state.plan
    return Report(run.folder, run.metrics, 0 if unknown else last_step(run, state), state.step)


def steps_to_the_end(
    run: Run,
    state: State,
    batches: Batches,
    checkpoints: Checkpoints,
    report: Report | QuietReport,
    stop: StopRequest,
    teacher: Distillation | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Results | None:
    """The loop: take a batch, step, tell, save, evaluate; until the last step or until someone asks
    to stop. Returns the evaluation of the step that it ends with, None where there was none."""
    device, mesh = device_of(state.model), state.mesh
    tell = teller(run, state, device, report.note)
    clock = Clock(device, now)
    timing = Timing(run, state, report, clock)
    timing.begin()
    skips, first_step = 0, state.step
    results: Results | None = None
    with (
        Watchdog(run.comm) as watchdog,
        profiler(run.profiling, run.folder, mesh.rank()) as trace_step,
        collected_garbage(run.training) as collect_garbage,
    ):
        if lacks_evaluation(run, state, report) and not timing.is_over():
            results = evaluated(state, batches, run, report)
            timing.evaluation_is_done()
        while not timing.is_over():
            if enter_stage(run, state, report.note):
                timing.pace.begin_stage()
            row = state.rows_consumed
            with clock("data"):
                mine = rows_of_step(run, state, batches)
            if mesh.any(stop.requested):
                break
            if state.step == first_step:
                refuse_rows_without_labels(run, mine, mesh)
            results = None
            numbers = train_step(
                state,
                mine.split(run.microbatches),
                learning_rate(run, state),
                run.training,
                clock,
                teacher,
            )
            parts = clock.read()
            report.record(state.step, tell(numbers, parts))
            timing.step_is_done(parts["seconds"])
            skips = check_skips(skips, numbers, batches, row, run, mesh)
            if checkpoints.due(state):
                checkpoints.save(state)
                timing.save_is_done()
            if is_due(run.eval.interval, state.step) and not timing.is_over():
                results = evaluated(state, batches, run, report)
                timing.evaluation_is_done()
            collect_garbage(state.step)
            trace_step()
            watchdog.step_done()
            timing.pause_is_over()
        checkpoints.save(state, last=state.step >= last_step(run, state))
        checkpoints.wait()
    return results


def rows_of_step(run: Run, state: State, batches: Batches) -> Batch | None:
    """This process's rows of the next step; None where someone asked to stop while they were waited
    for."""
    rows = run.training.batch_size * run.accumulation
    try:
        return batches.at(
            state.rows_consumed + state.mesh.rank(*DATA) * rows, rows, run.sequences_per_step
        )
    except WaitStopped:
        return None


def refuse_rows_without_labels(run: Run, mine: Batch, mesh: Mesh) -> None:
    """Of a store that is whole `start.begin` has said it already. Collective over the mesh; raises
    DataError."""
    if run.data.varlen and run.data.streaming and not mesh.any(mine.real_tokens() > 0):
        error = DataError(
            "no token of the first step can be predicted: with data.varlen = true the first token of each document has no label, and "
            "the documents have one token each; set data.varlen = false or tokenizer.add_eos = true, or name other text"
        )
        error.reported_elsewhere = mesh.rank() > 0
        raise error


def lacks_evaluation(run: Run, state: State, report: Report | QuietReport) -> bool:
    """Whether the run resumes from a step whose evaluation was due and was not finished: the run
    saves first. Collective."""
    is_missing = (
        state.step > 0 and is_due(run.eval.interval, state.step) and not report.has_evaluation
    )
    return state.mesh.broadcast_object(is_missing)


def train_on(
    model: Model,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    lr: float | None = None,
    microbatches: int = 1,
    max_norm: float = Training.max_norm,
    seed: int = 0,
    first_sequence: int = 0,
) -> dict[str, float]:
    """One optimizer update of a model on one device, as `longfire.train_step`: the step of
    `train`, without a run around it.

    lr: the learning rate of this step, times `lr_scale` of a parameter group that has one; None: as
    the groups say. microbatches: equal parts of the batch that go through the model one after
    another; the gradient is the same for any number. max_norm: gradients are clipped to this
    2-norm; 0: never. seed, first_sequence: dropout depends on the seed and on the number of each
    sequence in the run, of which the batch's first is `first_sequence`.

    Returns `loss` (nats, mean over the labels of the batch, before the update), `grad_norm` (before
    clipping), `lr`, and `skipped`: 1 where loss or gradients were not finite and nothing changed.
    Raises SettingsError where the batch does not divide into the microbatches, or has ids that the
    model's vocabulary lacks.
    """
    if microbatches < 1 or batch.rows % microbatches:
        raise SettingsError(
            f"microbatches = {microbatches} must divide the {batch.rows} sequences of the batch"
        )
    largest = int(batch.ids_BT.max())
    if largest >= model.config.vocab_size:
        raise SettingsError(
            f"the batch has the id {largest}, but vocab_size = {model.config.vocab_size} of the "
            "model: give build config.with_vocabulary(tokenizer.vocab_size)"
        )
    for group in optimizer.param_groups:
        group.setdefault("lr_scale", 1.0)
    state = State(model, optimizer, rows_consumed=first_sequence)
    training = Training(max_norm=max_norm, seed=seed)
    return train_step(state, batch.split(microbatches), lr, training, Clock(device_of(model)))


def train_step(
    state: State,
    microbatches: Sequence[Batch],
    lr: float | None,
    training: Training,
    clock: Clock,
    teacher: Distillation | None = None,
) -> dict[str, float]:
    """One optimizer update on the microbatches, and on those of the other processes: gradients of
    the mean loss per real token of all of them. The loss is that of the text, or what a teacher
    makes it.

    The real tokens of the world are counted before any backward, so each microbatch's sum is
    divided by the same number (promise 7). Non-finite gradients leave parameters and optimizer
    untouched, everywhere: `skipped` is 1. Moves `state` on in either case. lr: None leaves the
    optimizer's rates as they are.
    """
    mesh, mine = state.mesh, sum(batch.rows for batch in microbatches)
    counts = torch.tensor([sum(batch.real_tokens() for batch in microbatches), mine])
    real_tokens, rows = mesh.sum(counts, *DATA).tolist()
    pieces = microbatches[0].pieces
    ready = list(
        with_noise(
            state,
            microbatches,
            state.rows_consumed * pieces + mesh.rank(*DATA) * mine,
            training.seed,
        )
    )
    if pipeline := pipeline_of(state.model):
        loss = pipelined(pipeline, ready, max(1, real_tokens), training, clock)
    else:
        learn = (
            teacher.loss_sum
            if teacher
            else partial(loss_sum, chunk_tokens=training.loss_chunk_tokens)
        )
        loss = one_by_one(state, ready, max(1, real_tokens), learn, training, clock)
    with clock("optimizer"):
        add_up_partial_gradients(state.model, mesh)
        grads, copies = gradients(state.model, mesh)
        grad_norm = clip_gradients(
            grads, training.max_norm, copies, lambda total: mesh.sum(total, *AXES)
        )
        loss = mesh.sum(loss, *DATA, "cp")
        finite = bool(torch.isfinite(grad_norm)) and bool(torch.isfinite(loss))
        if finite:
            state.wait_for_snapshot()
            if lr is not None:
                set_learning_rate(state.optimizer, lr)
            state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.rows_consumed += rows // pieces
    state.tokens += rows * microbatches[0].ids_BT.shape[1]
    state.skipped_steps += not finite
    return {
        "loss": loss.item(),
        "grad_norm": grad_norm.item(),
        "lr": state.optimizer.param_groups[0]["lr"] if lr is None else lr,
        "skipped": float(not finite),
    }


def with_noise(
    state: State, microbatches: Sequence[Batch], row: int, seed: int
) -> Iterator[tuple[Batch, Tensor | None]]:
    """The microbatches on the device, each with the noise of its dropout; `row`: the first one's
    number in the run. Of rows that processes share: what of them is on this process."""
    device, context = device_of(state.model), state.model.context
    for batch in microbatches:
        noise_BT = (
            row_noise(seed, row, *batch.ids_BT.shape, device) if state.model.config.drops else None
        )
        row += batch.rows
        if context:
            batch = batch.context_part(context)
            noise_BT = None if noise_BT is None else batch.ops.cut(noise_BT)
        yield batch.to(device), noise_BT


def one_by_one(
    state: State,
    ready: Sequence[tuple[Batch, Tensor | None]],
    real_tokens: int,
    learn: Callable[..., Tensor],
    training: Training,
    clock: Clock,
) -> Tensor:
    """Forward and backward of each microbatch, whole or segment by segment of its rows; the sum of
    their losses."""

    def part(*args: Any, **kwargs: Any) -> Tensor:
        return learn(*args, **kwargs) / real_tokens

    def sync(last: bool) -> None:  # of a microbatch's backwards
        sync_gradients(state.model, state.mesh, last=last and len(losses) == len(ready) - 1)

    losses: list[Tensor] = []
    for batch, noise_BT in ready:
        if training.tbptt_segments > 1:
            losses.append(by_segments(state.model, batch, noise_BT, training, part, sync, clock))
            continue
        sync(True)
        with clock("forward"):
            loss = part(state.model, batch, noise_BT=noise_BT)
        with clock("backward"):
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def pipelined(
    pipeline: Pipeline,
    ready: Sequence[tuple[Batch, Tensor | None]],
    real_tokens: int,
    training: Training,
    clock: Clock,
) -> Tensor:
    """The same through the stages of a pipeline, where forwards and backwards of several
    microbatches take turns."""

    def loss_part(stage: Model, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        return loss_of(stage, hidden_BTD, batch, training.loss_chunk_tokens) / real_tokens

    with clock("pipeline"):
        return pipeline.step(*zip(*ready), loss_part)


def make_state(
    run: Run,
    words: int,
    device: torch.device,
    note: Callable[[str], None],
    teacher: Distillation | None = None,
    mesh: Mesh = ALONE,
) -> State:
    """Model and optimizer at step 0 on the device, with every decision of the machine told once;
    `words` the tokenizer has."""
    if run.activation_checkpoint.offload and device.type == "cpu":
        raise SettingsError(
            "activation_checkpoint.offload = true moves to the host's memory what a CPU has there already: set it to false"
        )
    assume(
        mesh.broadcast_object(native_bf16(device)), device.type
    )  # it may be measured: one process decides for all
    dtype, precision = choose_dtype(run.model, device)
    config = run.model_config.with_vocabulary(words)
    theirs = run.model.backend == "transformers"
    model = (
        transformers_model.build(config, run.training.seed, device, dtype)
        if theirs
        else on_meta(config, dtype)
    )
    if teacher:
        teacher.prepare(model)
    parameters = sum(p.numel() for p in model.parameters())
    flops = model.flops_per_token(run.training.seq_len)
    choices = ops.choose(device, run.model.kernels)

    def rate() -> float:
        return eager_rate(
            run, model if theirs else sample_of(config, run.training.seed, dtype, device)
        )

    compiled, why = mesh.broadcast_object(
        compile_decision(run, flops, device, rate)
    )  # it measures: one process decides for all
    run = with_strategy(run, dtype, device, mesh, note)
    model = parallelize(
        model,
        run.activation_checkpoint,
        compiled,
        mesh,
        run.parallelism,
        run.training.seq_len,
        run.attention,
        run.training.mlp_chunk_size,
    )
    kept_on = torch.device("cpu") if run.parallelism.cpu_offload else device
    if not theirs:
        materialise(model, run.training.seed, kept_on)
    model.computes_on = device
    for line in summary(run):
        note(line)
    note(f"model: {parameters:,} parameters on {device.type}, {torch.get_num_threads()} threads")
    note(f"precision: {precision}")
    note(f"kernels: {'; '.join(ops.describe(choices))}")
    note(f"compile: {'on' if compiled else 'off'} ({why})")
    if mesh.size() > 1 and not theirs:
        log_plan(run, model, dtype, mesh, note)
    return State(model, make_optimizer(model, run.optimizer, kept_on), mesh=mesh)


def with_strategy(
    run: Run, dtype: torch.dtype, device: torch.device, mesh: Mesh, note: Callable[[str], None]
) -> Run:
    """The same run with the way that softmax attention goes over processes that share rows: where
    `auto` leaves it open, the one that the planner says is fastest, told with the runner-up.
    Collective over the mesh."""
    if mesh.size("cp") == 1 or run.parallelism.context_parallel_strategy != "auto":
        return run
    chosen = "ring"
    with mesh.raise_on_all_ranks():
        if mesh.rank() == 0:
            on_cuda = device.type == "cuda"
            facts = torch.cuda.get_device_properties(device) if on_cuda else None
            here = cost.device_here(facts.name if facts else "", facts.total_memory if facts else 0)
            planner = Planner(run, here, str(dtype).removeprefix("torch."), as_cuda=on_cuda)
            plan = planner.of_recipe()
            if ranked := planner.strategies(plan):
                chosen = ranked[0].strategy
                note(f"context: {strategy.describe(ranked, planner.cut(plan))}")
    chosen = mesh.broadcast_object(chosen)
    return replace(run, parallelism=replace(run.parallelism, context_parallel_strategy=chosen))


def log_plan(
    run: Run, model: Model, dtype: torch.dtype, mesh: Mesh, note: Callable[[str], None]
) -> None:
    """Who shares what, as a table. Collective over the mesh."""
    here = sum(local(p).nbytes for p in model.parameters())
    updates = updates_of(model, rule_of(run.optimizer))
    state = sum(local(p).numel() * update.state_bytes(p.dtype) for p, update in updates.items())
    held = mesh.all_gather_object({"parameters": here, "gradients": here, "optimizer": int(state)})
    if mesh.rank() == 0:
        bytes_only = cost.device_of(cost.DEFAULT_DEVICE)  # of a device the table says nothing
        note(
            tables.describe_plan(
                Planner(run, bytes_only, str(dtype).removeprefix("torch."), as_cuda=False),
                mesh,
                held,
            )
        )


def teller(
    run: Run, state: State, device: torch.device, note: Callable[[str], None]
) -> Callable[..., dict[str, float]]:
    """A function that makes the step's record of its numbers and its clock. The peak that MFU
    refers to is told once."""
    peak, source = fastest_matmul_peak(device)
    flops_of = cache(lambda seq_len: 3 * state.model.flops_per_token(seq_len))
    flops = flops_of(lengths.stage_at(run.training, state.step).seq_len)
    note(
        f"mfu: of {peak / 1e12:.3g} TFLOP/s ({source}); {flops / 1e6:,.0f} MFLOP a token, forward and backward"
    )

    def tell(numbers: dict[str, float], parts: dict[str, float]) -> dict[str, float]:
        state.elapsed_seconds += parts["seconds"]
        tokens_per_second = run.tokens_per_step / parts["seconds"]
        flops = flops_of(lengths.stage_of_model(run.training, state.step).seq_len)
        return {
            **{key: value for key, value in numbers.items() if key != "skipped"},
            "tokens": state.tokens,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * flops / (peak * state.mesh.size()),
            "data_wait_fraction": parts.get("data", 0.0) / parts["seconds"],
            "memory_bytes": peak_memory_bytes(device),
            "skipped_steps": state.skipped_steps,
            "recompiles": recompilations(),
            **(state.model.context.describe() if state.model.context else {}),
            "elapsed_seconds": state.elapsed_seconds,
            **planned_steps(state),
            **{
                (key if key == "seconds" else f"{key}_seconds"): value
                for key, value in parts.items()
            },
        }

    return tell


def planned_steps(state: State) -> dict[str, int]:
    """How many steps the run was planned to have when this step was made, where they are
    planned."""
    plan = until(state.plan, state.step - 1)
    return {"planned_steps": plan[-1].total_steps} if plan else {}


def check_skips(
    skips: int,
    numbers: dict[str, float],
    batches: Batches,
    rows_from: int,
    run: Run,
    mesh: Mesh = ALONE,
) -> int:
    """How many steps in a row were skipped. Raises TrainingError, naming the batch, when a skip is
    not allowed or one too many."""
    if not numbers["skipped"]:
        return 0
    allowed = run.training.max_skips_in_a_row if run.training.skip_nan_inf else 1
    if skips + 1 < allowed:
        return skips + 1
    rows = ", ".join(str(row) for row in batches.origins(rows_from, run.sequences_per_step)[:4])
    error = TrainingError(
        f"loss {numbers['loss']}, gradient norm {numbers['grad_norm']} in {skips + 1} step(s) in a row; the last batch was rows "
        f"{rows_from} to {rows_from + run.sequences_per_step - 1} ({rows}, ...). Parameters are as before; the newest checkpoint is whole. "
        "Lower optimizer.lr or lengthen lr_scheduler.warmup_steps; training.skip_nan_inf = true skips single bad batches"
    )
    error.reported_elsewhere = mesh.rank() > 0  # all processes come to the same
    raise error


def evaluated(
    state: State, batches: Batches, run: Run, report: Report | QuietReport
) -> Results | None:
    """Validation loss, perplexity and bits per byte by source, also told to the report as
    eval/<source>/loss ...; None where someone asked to stop before it was finished."""
    seq_len = lengths.stage_of_model(run.training, state.step).seq_len
    # no more rows at a time than a step takes: who asks to stop waits for one batch
    rows = min(ROWS, run.training.batch_size)
    chunk_tokens = run.training.loss_chunk_tokens
    try:
        results = evaluate(
            state.model, batches, run.eval.tokens, chunk_tokens, state.mesh, seq_len, rows
        )
    except EvaluationStopped:
        report.note(
            f"the evaluation of step {state.step} was stopped; it is done again when the run goes on"
        )
        return None
    if results:
        fields = {
            f"eval/{source}/{key}": value
            for source, numbers in results.items()
            for key, value in numbers.items()
        }
        report.record(state.step, fields)
    if run.data.streaming:  # otherwise it was said at the start
        warn_of_nothing_unseen(run, batches.prepared, report.note)
    return results


def is_due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


@contextmanager
def collected_garbage(training: Training) -> Iterator[Callable[[int], None]]:
    """Python's collector pauses a process at random; with gc_freq it runs only after the steps that
    divide by it."""
    if training.gc_freq:
        gc.disable()
    try:
        yield lambda step: gc.collect(1) if is_due(training.gc_freq, step) else None
    finally:
        gc.enable()
