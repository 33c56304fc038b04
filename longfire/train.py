"""Training: a loop that reads like prose and a step that a test can call."""

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longfire import lengths, ops
from longfire.checkpoint import Checkpoints, State
from longfire.compiling import compile_decision, eager_rate, sample_of
from longfire.data.batches import Batch, Batches
from longfire.data.prepare import Prepared, prepare
from longfire.data.tokenizer import Tokenizer, from_folder
from longfire.device import Clock, choose_device, choose_dtype, fastest_matmul_peak, peak_memory_bytes
from longfire.distill import Distillation
from longfire.errors import SettingsError, TrainingError
from longfire.evaluate import evaluate
from longfire.finish import finish
from longfire.hub import foreign
from longfire.hub.checksums import check_checksums
from longfire.hub.load import read_weights
from longfire.initialise import materialise
from longfire.launch import StopRequest, Watchdog, signal_name
from longfire.loss import loss_of, loss_sum
from longfire.mixers.attention import Attention
from longfire.model import Model, on_meta
from longfire.ops.bf16 import assume, native_bf16
from longfire.ops.dropout import row_noise
from longfire.optim import clip_gradients, make_optimizer, set_learning_rate
from longfire.parallel import cost, strategy, tables
from longfire.parallel.apply import device_of, gradients, parallelize, recompilations, sync_gradients
from longfire.parallel.axes import AXES, DATA
from longfire.parallel.mesh import ALONE, Mesh, joined
from longfire.parallel.pieces import local, take
from longfire.parallel.planner import Planner
from longfire.parallel.tensor import add_up_partial_gradients
from longfire.passing import by_segments
from longfire.report import QuietReport, Report
from longfire.run import DATA_JSON, RUN_TOML, Run, keep, summary
from longfire.schedule import until
from longfire.settings import Training
from longfire.timing import Timing, last_step, learning_rate
from longfire.traces import profiler
from longfire.weights import weights_of_run


def train(run: Run, note: Callable[[str], None] = print, now: Callable[[], float] = time.perf_counter) -> int:
    """Train to the last step and return the exit code. Read it downwards: that is the order in which things happen.

    Every process of the run goes through all of it; process 0 alone writes to the run folder and tells how it goes.
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
    with (
        joined(run.world, run.degrees, run.comm, device) as mesh,
        first_process(mesh, run.begun(note)),
        mesh.first_then_all(lambda: prepared_data(run, mesh, note)) as prepared,
        Batches(prepared, run.data, run.training.seq_len, run.training.seed, note, stages_in_rows(run)) as batches,
    ):
        with mesh.agreed():
            if mesh.rank() == 0:
                keep_tokenizer(run, prepared.tokenizer)
                keep_sources(run, prepared, note)
                warn_of_nothing_unseen(run, prepared, note)
            teacher = Distillation.of_settings(run.distillation, run.training.loss_chunk_tokens)
        checkpoints = Checkpoints(
            run.folder / run.checkpoint.folder, run.checkpoint, note, mesh, run.comm.train_timeout_seconds / 2
        )
        with Watchdog(run.comm, "to set up the model"):
            state = make_state(run, prepared.tokenizer.vocab_size, device, note, teacher, mesh)
            if not checkpoints.restore(state) and run.model.weights:  # the newest whole one, or the start
                take_weights(run, state)
            refuse_another_batch(run, state)
            set_base(run, state.model, lengths.stage_of_model(run.training, state.step).rope_theta)
        if run.model.backend == "transformers" and run.data.varlen:
            foreign.refuse_unless_documents_are_kept_apart(state.model)
        if run.checkpoint.create_seed_checkpoint:
            checkpoints.save(state)
            checkpoints.wait()
            note(
                f"step {state.step} saved to {checkpoints.folder}; stopping, as checkpoint.create_seed_checkpoint asks"
            )
            return 0
        with report_of(run, state) as report, StopRequest() as stop:
            steps_to_the_end(run, state, batches, checkpoints, report, stop, teacher, now)
            exit_code = max(mesh.all_say(stop.exit_code))  # a signal may reach one process only
            results = evaluated(state, batches, run, report) if run.eval.at_end and not exit_code else {}
        if exit_code:
            note(
                f"{signal_name(exit_code)}: stopped after step {state.step}, saved; the same command goes on from there"
            )
            return exit_code
        if mesh.rank() == 0:
            finish(run, state, batches, results, note)
    return 0


@contextmanager
def first_process(mesh: Mesh, inside: AbstractContextManager) -> Iterator[None]:
    """Process 0 goes inside, and its UserError is every process's. Collective over the mesh."""
    with ExitStack() as stack:
        with mesh.agreed():
            if mesh.rank() == 0:
                stack.enter_context(inside)
        yield


def prepared_data(run: Run, mesh: Mesh, note: Callable[[str], None]) -> Prepared:
    """The token stores; of a streaming run they grow behind process 0, and the others watch them grow."""
    behind = run.data.streaming and mesh.rank() == 0
    return prepare(run.data, run.tokenizer, note=note, background=behind, watch=run.data.streaming and not behind)


def stages_in_rows(run: Run) -> tuple[tuple[int, int], ...]:
    """The stages of training.seq_len_schedule as the batches take them."""
    return tuple((stage.step * run.rows_per_step, stage.seq_len) for stage in lengths.stages(run.training))


def refuse_another_batch(run: Run, state: State) -> None:
    """With a schedule steps and rows go together: stages begin at steps, and the data in them at rows. Raises SettingsError."""
    if run.training.seq_len_schedule and state.rows_consumed != state.step * run.rows_per_step:
        raise SettingsError(
            f"training.seq_len_schedule counts {run.rows_per_step} rows a step, but the run's {state.step} steps took "
            f"{state.rows_consumed} rows: go on with the batch that it was begun with"
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
    """Let the model's attention layers turn positions by this base (0: as they do), and its shape say so."""
    if not theta:
        return
    model.shape = run.shape_with_base(theta).with_vocabulary(model.shape.vocab_size)
    for block in model.layers:
        if block is not None and isinstance(block.mixer, Attention):
            block.mixer.turn_by(theta)


def take_weights(run: Run, state: State) -> None:
    """Start from the weights of model.weights, one tensor in memory at a time: each process takes what lies with it. Raises
    CheckpointError or SettingsError."""
    theirs = run.model.backend == "transformers"
    left = dict(state.model.named_parameters())
    with state.mesh.agreed():
        if state.mesh.rank() == 0:
            check_checksums(Path(run.model.weights), print)
        if theirs:
            read = foreign.load_weights(run.model.weights, state.model.shape).items()
        elif (Path(run.model.weights) / RUN_TOML).exists():
            read = weights_of_run(Path(run.model.weights), state.model.shape)
        else:
            read = read_weights(run.model.weights, state.model.shape)
        for name, whole in read:
            if name in left:
                take(left.pop(name).detach(), state.model.splits.get(name), whole)
    assert not left, f"{run.model.weights} gave no {sorted(left)}"


def report_of(run: Run, state: State) -> Report | QuietReport:
    if state.mesh.rank():
        return QuietReport()
    unknown = run.training.max_seconds and not state.plan
    return Report(run.folder, run.metrics, 0 if unknown else last_step(run, state), state.step)


def steps_to_the_end(
    run: Run, state: State, batches: Batches, checkpoints: Checkpoints, report: Report | QuietReport, stop: StopRequest,
    teacher: Distillation | None = None, now: Callable[[], float] = time.perf_counter,
) -> None:  # fmt: skip
    """The loop: take a batch, step, tell, evaluate, save; until the last step or until someone asks to stop."""
    device, mesh = device_of(state.model), state.mesh
    tell = teller(run, state, device, report.note)
    clock = Clock(device, now)
    timing = Timing(run, state, report, clock)
    timing.begin()
    rows, skips = run.training.batch_size * run.accumulation, 0
    with (
        Watchdog(run.comm) as watchdog,
        profiler(run.profiling, run.folder, mesh.rank()) as trace_step,
        collected_garbage(run.training) as collect_garbage,
    ):
        while not timing.is_over() and not mesh.any(stop.requested):
            if enter_stage(run, state, report.note):
                timing.pace.begin_stage()
            with clock("data"):
                row = state.rows_consumed
                mine = batches.at(row + mesh.rank(*DATA) * rows, rows, run.rows_per_step)
            numbers = train_step(
                state, mine.split(run.microbatches), learning_rate(run, state), run.training, clock, teacher
            )
            parts = clock.read()
            report.record(state.step, tell(numbers, parts))
            timing.step_is_done(parts["seconds"])
            skips = check_skips(skips, numbers, batches, row, run, mesh)
            if is_due(run.eval.interval, state.step) and not timing.is_over():
                evaluated(state, batches, run, report)
                timing.evaluation_is_done()
            if checkpoints.due(state):
                checkpoints.save(state)
                timing.save_is_done()
            collect_garbage(state.step)
            trace_step()
            watchdog.step_done()
            timing.pause_is_over()
        checkpoints.save(state, last=state.step >= last_step(run, state))
        checkpoints.wait()


def train_step(
    state: State, microbatches: Sequence[Batch], lr: float, training: Training, clock: Clock,
    teacher: Distillation | None = None,
) -> dict[str, float]:  # fmt: skip
    """One optimizer update on the microbatches, and on those of the other processes: gradients of the mean loss per real token of
    all of them. The loss is that of the text, or what a teacher makes it.

    The real tokens of the world are counted before any backward, so each microbatch's sum is divided by the same number
    (promise 7). Non-finite gradients leave parameters and optimizer untouched, everywhere: `skipped` is 1. Moves `state` on in
    either case.
    """
    mesh, mine = state.mesh, sum(batch.rows for batch in microbatches)
    counts = torch.tensor([sum(batch.real_tokens() for batch in microbatches), mine])
    real_tokens, rows = mesh.sum(counts, *DATA).tolist()
    pieces = microbatches[0].pieces
    ready = list(with_noise(state, microbatches, state.rows_consumed * pieces + mesh.rank(*DATA) * mine, training.seed))
    if state.model.pipeline:
        loss = pipelined(state, ready, max(1, real_tokens), training, clock)
    else:
        learn = teacher.loss_sum if teacher else partial(loss_sum, chunk_tokens=training.loss_chunk_tokens)
        loss = one_by_one(state, ready, max(1, real_tokens), learn, training, clock)
    with clock("optimizer"):
        add_up_partial_gradients(state.model, mesh)
        grads, copies = gradients(state.model, mesh)
        grad_norm = clip_gradients(grads, training.max_norm, copies, lambda total: mesh.sum(total, *AXES))
        loss = mesh.sum(loss, *DATA, "cp")
        finite = bool(torch.isfinite(grad_norm)) and bool(torch.isfinite(loss))
        if finite:
            state.may_change()
            set_learning_rate(state.optimizer, lr)
            state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.rows_consumed += rows // pieces
    state.tokens += rows * microbatches[0].ids_BT.shape[1]
    state.skipped_steps += not finite
    return {"loss": loss.item(), "grad_norm": grad_norm.item(), "lr": lr, "skipped": float(not finite)}


def with_noise(
    state: State, microbatches: Sequence[Batch], row: int, seed: int
) -> Iterator[tuple[Batch, Tensor | None]]:
    """The microbatches on the device, each with the noise of its dropout; `row`: the first one's number in the run. Of rows that
    processes share: what of them lies here."""
    device, context = device_of(state.model), state.model.context
    for batch in microbatches:
        noise_BT = row_noise(seed, row, *batch.ids_BT.shape, device) if state.model.shape.drops else None
        row += batch.rows
        if context:
            batch = batch.cut(context)
            noise_BT = None if noise_BT is None else context.cut(batch.documents, noise_BT)
        yield batch.to(device), noise_BT


def one_by_one(
    state: State, ready: Sequence[tuple[Batch, Tensor | None]], real_tokens: int, learn: Callable[..., Tensor], training: Training,
    clock: Clock,
) -> Tensor:  # fmt: skip
    """Forward and backward of each microbatch, whole or segment by segment of its rows; the sum of their losses."""

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
    state: State, ready: Sequence[tuple[Batch, Tensor | None]], real_tokens: int, training: Training, clock: Clock
) -> Tensor:
    """The same through the stages of a pipeline, where forwards and backwards of several microbatches take turns."""

    def loss_part(stage: Model, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        return loss_of(stage, hidden_BTD, batch, training.loss_chunk_tokens) / real_tokens

    with clock("pipeline"):
        return state.model.pipeline.step(*zip(*ready), loss_part)


def keep_tokenizer(run: Run, tokenizer: Tokenizer) -> None:
    """The tokenizer lies in the run folder from the start. Raises SettingsError if the run was trained with another one."""
    folder = run.tokenizer_folder
    if run.has_checkpoints and folder.exists() and from_folder(folder).fingerprint != tokenizer.fingerprint:
        raise SettingsError(
            f"tokenizer.path = {run.tokenizer.path!r} is not the tokenizer that the run in {run.folder} was trained with: the same "
            f"ids would mean other words. Set it to {folder}, or name another job.dump_folder"
        )
    tokenizer.save(folder)


def keep_sources(run: Run, prepared: Prepared, note: Callable[[str], None]) -> None:
    """data.json: the token stores that rows come from. A run that goes on with others says so: its rows are then not those that
    it would have seen, and those that it saw may come again."""
    file, here = run.folder / DATA_JSON, {n: s.folder.name for n, s in zip(prepared.names, prepared.stores)}
    there = json.loads(file.read_text(encoding="utf-8")) if run.has_checkpoints and file.exists() else here
    for name in [name for name in {**there, **here} if there.get(name) != here.get(name)]:
        note(
            f"changed since this run was last started: data of {name}: {here.get(name, 'none')}, was {there.get(name, 'none')}; "
            "the order of rows is another one from here on, and what is held out now may have been trained on"
        )
    keep(file, json.dumps(here, indent=1) + "\n")


def warn_of_nothing_unseen(run: Run, prepared: Prepared, note: Callable[[str], None]) -> None:
    """Say where an evaluation will have no text to read: before the first step, where that is known by then."""
    if not (run.eval.at_end or run.eval.interval):
        return
    for name, store, stream in prepared.validation:
        if store.complete and stream.length < 2:
            note(
                f"warning: nothing is held out of {name}, so the loss on text that was not trained on will not be measured: name "
                f"such text in data.validation, raise data.heldout_fraction = {run.data.heldout_fraction:g}, or, if a text file "
                "holds many documents, set data.split_documents (lines, blank_lines, or the text between them)"
            )


def make_state(
    run: Run, words: int, device: torch.device, note: Callable[[str], None], teacher: Distillation | None = None,
    mesh: Mesh = ALONE,
) -> State:  # fmt: skip
    """Model and optimizer at step 0 on the device, with every decision of the machine told once; `words` the tokenizer has."""
    if run.activation_checkpoint.offload and device.type == "cpu":
        raise SettingsError(
            "activation_checkpoint.offload = true moves to the host's memory what a CPU has there already: set it to false"
        )
    assume(mesh.from_first(native_bf16(device)), device.type)  # it may be measured: one process decides for all
    dtype, precision = choose_dtype(run.model, device)
    shape = run.shape.with_vocabulary(words)
    theirs = run.model.backend == "transformers"
    model = foreign.build(shape, run.training.seed, device, dtype) if theirs else on_meta(shape, dtype)
    if teacher:
        teacher.prepare(model)
    parameters = sum(p.numel() for p in model.parameters())
    flops = model.flops_per_token(run.training.seq_len)
    choices = ops.choose(device, run.model.kernels)

    def rate() -> float:
        return eager_rate(run, model if theirs else sample_of(shape, run.training.seed, dtype, device))

    compiled, why = mesh.from_first(
        compile_decision(run, flops, device, rate)
    )  # it measures: one process decides for all
    run = with_strategy(run, dtype, device, mesh, note)
    model = parallelize(
        model, run.activation_checkpoint, compiled, mesh, run.parallelism, run.training.seq_len, run.attention,
        run.training.mlp_chunk_size,
    )  # fmt: skip
    kept_on = torch.device("cpu") if run.parallelism.cpu_offload else device
    if not theirs:
        materialise(model, run.training.seed, kept_on)
    model.computes_on = device
    for line in summary(run):
        note(line)
    note(f"model: {parameters:,} parameters on {device.type}, {torch.get_num_threads()} threads")
    note(f"precision: {precision}")
    note(f"kernels: {'; '.join(ops.told(choices))}")
    note(f"compile: {'on' if compiled else 'off'} ({why})")
    if mesh.size() > 1 and not theirs:
        tell_plan(run, model, dtype, mesh, note)
    return State(model, make_optimizer(model, run.optimizer, kept_on), mesh=mesh)


def with_strategy(run: Run, dtype: torch.dtype, device: torch.device, mesh: Mesh, note: Callable[[str], None]) -> Run:
    """The same run with the way that softmax attention goes over processes that share rows: where `auto` leaves it open, the one
    that the planner says is fastest, told with the runner-up. Collective over the mesh."""
    if mesh.size("cp") == 1 or run.parallelism.context_parallel_strategy != "auto":
        return run
    chosen = "ring"
    with mesh.agreed():
        if mesh.rank() == 0:
            on_cuda = device.type == "cuda"
            facts = torch.cuda.get_device_properties(device) if on_cuda else None
            here = cost.device_here(facts.name if facts else "", facts.total_memory if facts else 0)
            planner = Planner(run, here, str(dtype).removeprefix("torch."), as_cuda=on_cuda)
            plan = planner.of_recipe()
            if ranked := planner.strategies(plan):
                chosen = ranked[0].strategy
                note(f"context: {strategy.told(ranked, planner.cut(plan))}")
    chosen = mesh.from_first(chosen)
    return replace(run, parallelism=replace(run.parallelism, context_parallel_strategy=chosen))


def tell_plan(run: Run, model: Model, dtype: torch.dtype, mesh: Mesh, note: Callable[[str], None]) -> None:
    """Who shares what, as a table. Adam keeps two numbers for each parameter. Collective over the mesh."""
    here = sum(local(p).nbytes for p in model.parameters())
    held = mesh.all_say({"parameters": here, "gradients": here, "optimizer": 2 * here})
    if mesh.rank() == 0:
        bytes_only = cost.device_of(cost.DEFAULT_DEVICE)  # of a device the table says nothing
        note(tables.plan_told(Planner(run, bytes_only, str(dtype).removeprefix("torch."), as_cuda=False), mesh, held))


def teller(
    run: Run, state: State, device: torch.device, note: Callable[[str], None]
) -> Callable[..., dict[str, float]]:
    """A function that makes the step's record of its numbers and its clock. The peak that MFU refers to is told once."""
    peak, source = fastest_matmul_peak(device)
    flops_of = cache(lambda seq_len: 3 * state.model.flops_per_token(seq_len))
    flops = flops_of(lengths.stage_at(run.training, state.step).seq_len)
    note(f"mfu: of {peak / 1e12:.3g} TFLOP/s ({source}); {flops / 1e6:,.0f} MFLOP a token, forward and backward")

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
            **(state.model.context.told() if state.model.context else {}),
            "elapsed_seconds": state.elapsed_seconds,
            **planned_steps(state),
            **{(key if key == "seconds" else f"{key}_seconds"): value for key, value in parts.items()},
        }

    return tell


def planned_steps(state: State) -> dict[str, int]:
    """How many steps the run was planned to have when this step was made, where they are planned."""
    plan = until(state.plan, state.step - 1)
    return {"planned_steps": plan[-1].total_steps} if plan else {}


def check_skips(
    skips: int, numbers: dict[str, float], batches: Batches, rows_from: int, run: Run, mesh: Mesh = ALONE
) -> int:
    """How many steps in a row were skipped. Raises TrainingError, naming the batch, when a skip is not allowed or one too many."""
    if not numbers["skipped"]:
        return 0
    allowed = run.training.max_skips_in_a_row if run.training.skip_nan_inf else 1
    if skips + 1 < allowed:
        return skips + 1
    rows = ", ".join(str(row) for row in batches.rows(rows_from, run.rows_per_step)[:4])
    error = TrainingError(
        f"loss {numbers['loss']}, gradient norm {numbers['grad_norm']} in {skips + 1} step(s) in a row; the last batch was rows "
        f"{rows_from} to {rows_from + run.rows_per_step - 1} ({rows}, ...). Parameters are as before; the newest checkpoint is whole. "
        "Lower optimizer.lr or lengthen lr_scheduler.warmup_steps; training.skip_nan_inf = true skips single bad batches"
    )
    error.told_elsewhere = mesh.rank() > 0  # all processes come to the same
    raise error


def evaluated(state: State, batches: Batches, run: Run, report: Report | QuietReport) -> dict[str, dict[str, float]]:
    """Held-out loss, perplexity and bits per byte by source, also told to the report as eval/<source>/loss ..."""
    seq_len = lengths.stage_of_model(run.training, state.step).seq_len
    results = evaluate(state.model, batches, run.eval.tokens, run.training.loss_chunk_tokens, state.mesh, seq_len)
    if results:
        fields = {
            f"eval/{source}/{key}": value for source, numbers in results.items() for key, value in numbers.items()
        }
        report.record(state.step, fields)
    if run.data.streaming:  # otherwise it was said at the start
        warn_of_nothing_unseen(run, batches.prepared, report.note)
    return results


def is_due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


@contextmanager
def collected_garbage(training: Training) -> Iterator[Callable[[int], None]]:
    """Python's collector pauses a process at random; with gc_freq it runs only after the steps that divide by it."""
    if training.gc_freq:
        gc.disable()
    try:
        yield lambda step: gc.collect(1) if is_due(training.gc_freq, step) else None
    finally:
        gc.enable()
