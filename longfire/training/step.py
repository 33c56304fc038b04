"""The training step: forward and backward of every micro-batch, and one optimizer update."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from longfire.checkpoint.state import State
from longfire.config.settings import Metrics, Training
from longfire.data.batch import Batch
from longfire.data.step_batch import StepBatch
from longfire.device import Clock
from longfire.errors import SettingsError
from longfire.loss import loss_of, loss_sum
from longfire.mlps.auxiliary import update_buffers
from longfire.model import Model
from longfire.ops.cross_entropy import CorrectLabels
from longfire.ops.linear import Linear
from longfire.ops.rounded_weights import matrices_rounded, pays, rounded_once
from longfire.ops.sequence_noise import row_noise
from longfire.optim import clip_gradients, set_learning_rate, update_averages
from longfire.parallel.apply import device_of, gradients, sharded, sync_gradients
from longfire.parallel.axes import AXES, DATA
from longfire.parallel.mesh import Mesh
from longfire.parallel.pipeline import Pipeline, pipeline_of
from longfire.parallel.tensor import add_up_partial_gradients
from longfire.training.norms import Norms
from longfire.training.tbptt import by_segments

NO_METRICS = Metrics()
# loss(model, batch, noise_BT=..., cache=...) -> the sum over the batch's labels, a scalar
# (tasks/contract.Task.loss_sum)
LossSum = Callable[..., Tensor]
# A micro-batch on the device, and the noise (B, T) of its dropout; None: nothing is dropped
MicroBatch = tuple[StepBatch, Tensor | None]


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

    lr: the learning rate of this step, times `lr_scale` of a parameter group that has one; None:
    as the groups say. microbatches: equal parts of the batch that go through the model one after
    another; the gradient is the same for any number. max_norm: gradients are clipped to this
    2-norm; 0: never. seed, first_sequence: dropout depends on the seed and on the number of each
    sequence in the run, of which the batch's first is `first_sequence`.

    Returns `loss` (nats, mean over the labels of the batch, before the update), `grad_norm`
    (before clipping), `lr`, and `skipped`: 1 where loss or gradients were not finite and nothing
    changed. Raises SettingsError where the batch does not divide into the micro-batches, or has
    ids that the model's vocabulary lacks.
    """
    if microbatches < 1 or batch.sequences % microbatches:
        raise SettingsError(
            f"microbatches = {microbatches} must divide the {batch.sequences} sequences of the "
            "batch"
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
    microbatches: Sequence[StepBatch],
    lr: float | None,
    training: Training,
    clock: Clock,
    loss_function: LossSum | None = None,
    metrics: Metrics = NO_METRICS,
) -> dict[str, float]:
    """One optimizer update on the micro-batches of all processes, with the gradients of the mean
    loss per label. loss_function: the task's; None: that of text. metrics: what is measured beside
    it.

    microbatches: those of this process. lr: None leaves the optimizer's rates as they are.

    The labels of all processes are counted before any backward, so that the sum of each
    micro-batch is divided by the same number (promise 7). Where the loss or a gradient is not
    finite on any process, parameters and optimizer stay as they were on all of them, and `skipped`
    is 1. `state` counts the step in either case.
    """
    mesh = state.mesh
    sequences_here = sum(batch.sequences for batch in microbatches)
    labels_here = sum(batch.real_tokens() for batch in microbatches)
    labels, sequences = mesh.sum(torch.tensor([labels_here, sequences_here]), *DATA).tolist()
    # in a stage of shorter sequences each long sequence of the run is several in the batch
    pieces = microbatches[0].pieces
    first_sequence = state.rows_consumed * pieces + mesh.rank(*DATA) * sequences_here

    on_device = list(with_noise(state, microbatches, first_sequence, training.seed))
    pipeline = pipeline_of(state.model)
    correct = CorrectLabels() if metrics.accuracy else None
    matrices = matrices_kept_rounded(state.model, training, len(microbatches))
    with rounded_once(matrices, state.model.compute_dtype):
        if pipeline:
            loss = pipelined_forward_backward(
                pipeline, on_device, max(1, labels), training, clock, correct
            )
        else:
            loss_function = loss_function or loss_of_text(training)
            if correct is not None:
                loss_function = partial(loss_function, correct=correct)
            loss = forward_backward(
                state, on_device, max(1, labels), loss_function, training, clock
            )
    highest = highest_loss(mesh, loss * (max(1, labels) / max(1, labels_here)))
    measures_norms = metrics.norms_freq > 0 and (state.step + 1) % metrics.norms_freq == 0
    numbers = update(state, loss, lr, training.max_norm, clock, measures_norms)
    if highest is not None:
        numbers["loss_max"] = highest.item()
    if metrics.accuracy:
        numbers["accuracy"] = correct_of_all(mesh, correct, loss.device) / max(1, labels)

    state.step += 1
    state.rows_consumed += sequences // pieces
    state.tokens += sequences * microbatches[0].tokens
    state.skipped_steps += int(numbers["skipped"])
    return numbers


def matrices_kept_rounded(model: Model, training: Training, microbatches: int) -> list[Linear]:
    """The matrices whose weights this step rounds once for all its micro-batches; none where
    parameters are gathered (FSDP2), which makes new ones for each forward and backward."""
    on_cuda = device_of(model).type == "cuda"
    if sharded(model) or not pays(training.keep_rounded_weights, on_cuda, microbatches):
        return []
    return matrices_rounded(model, model.compute_dtype, without=[model.head])


def highest_loss(mesh: Mesh, loss: Tensor) -> Tensor | None:
    """The highest mean loss of the processes that train on sequences of their own; None where there
    is one only. loss: the part of this process. Collective."""
    processes = mesh.size(*DATA)
    if processes == 1:
        return None
    losses = loss.new_zeros(processes)
    losses[mesh.rank(*DATA)] = loss
    return mesh.sum(losses, *DATA, "cp").max()


def correct_of_all(mesh: Mesh, correct: CorrectLabels | None, device: torch.device) -> float:
    """How many labels of all processes were the likeliest word; with a pipeline its last stage has
    counted them. Collective."""
    here = torch.zeros((), dtype=torch.int64, device=device)
    if correct is not None and correct.count is not None:
        here = correct.count.to(torch.int64)
    return float(mesh.sum(here, *DATA, "cp", "pp").item())


def loss_of_text(training: Training) -> LossSum:
    """The sum of -log p(label), whose logits exist for a chunk of tokens at a time."""
    return partial(loss_sum, chunk_tokens=training.loss_chunk_tokens)


def with_noise(
    state: State, microbatches: Sequence[StepBatch], first_sequence: int, seed: int
) -> Iterator[MicroBatch]:
    """The micro-batches on the device, each with the noise of its dropout. Under context
    parallelism: the part of their tokens that is on this process.

    first_sequence: the number of their first sequence in the run, which its noise depends on.
    """
    device = device_of(state.model)
    context = state.model.context
    for batch in microbatches:
        noise_BT = None
        if state.model.config.drops:
            noise_BT = row_noise(seed, first_sequence, batch.sequences, batch.tokens, device)
        first_sequence += batch.sequences
        if context:
            assert isinstance(batch, Batch), "only text is cut along its sequences"
            batch = batch.context_part(context)
            if noise_BT is not None:
                noise_BT = batch.ops.cut(noise_BT)
        yield batch.to(device), noise_BT


def forward_backward(
    state: State,
    microbatches: Sequence[MicroBatch],
    labels: int,
    loss_function: LossSum,
    training: Training,
    clock: Clock,
) -> Tensor:
    """Forward and backward of each micro-batch, whole or in segments of its sequences
    (training/tbptt.py). Returns the sum of their losses, each divided by `labels`."""
    losses: list[Tensor] = []

    def mean_loss(*args: object, **kwargs: object) -> Tensor:
        return loss_function(*args, **kwargs) / labels

    def sync(last: bool) -> None:
        """Before each backward; last: of a micro-batch."""
        is_last_microbatch = len(losses) == len(microbatches) - 1
        sync_gradients(state.model, state.mesh, last=last and is_last_microbatch)

    for batch, noise_BT in microbatches:
        if training.tbptt_segments > 1:
            assert isinstance(batch, Batch), "only text is computed in segments"
            loss = by_segments(state.model, batch, noise_BT, training, mean_loss, sync, clock)
        else:
            sync(True)
            with clock("forward"):
                loss = mean_loss(state.model, batch, noise_BT=noise_BT)
            with clock("backward"):
                loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def pipelined_forward_backward(
    pipeline: Pipeline,
    microbatches: Sequence[MicroBatch],
    labels: int,
    training: Training,
    clock: Clock,
    correct: CorrectLabels | None = None,
) -> Tensor:
    """The same through the stages of a pipeline, whose schedule interleaves the forwards and
    backwards of several micro-batches."""

    def mean_loss(stage: Model, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        return loss_of(stage, hidden_BTD, batch, training.loss_chunk_tokens, correct) / labels

    batches, noises = zip(*microbatches)
    with clock("pipeline"):
        return pipeline.step(batches, noises, mean_loss)


def update(
    state: State,
    loss: Tensor,
    lr: float | None,
    max_norm: float,
    clock: Clock,
    measures_norms: bool = False,
) -> dict[str, float]:
    """Complete the gradients, clip them, and step the optimizer if loss and gradients are finite.

    loss: the part of this process. measures_norms: whether the numbers have those of norms.py.
    Returns the numbers of the step. Collective over the mesh.
    """
    mesh = state.mesh
    optimizer = state.optimizer
    with clock("optimizer"):
        add_up_partial_gradients(state.model, mesh)
        norms = Norms(state.model, mesh) if measures_norms else None
        grads, copies = gradients(state.model, mesh)
        grad_norm = clip_gradients(grads, max_norm, copies, lambda norm: mesh.sum(norm, *AXES))
        loss = mesh.sum(loss, *DATA, "cp")
        is_finite = bool(torch.isfinite(grad_norm)) and bool(torch.isfinite(loss))
        if is_finite:
            state.wait_for_snapshot()
            if lr is not None:
                set_learning_rate(optimizer, lr)
            optimizer.step()
            update_averages(optimizer)
        update_buffers(state.model.layers, lambda total: mesh.sum(total, *DATA), keep=is_finite)
        optimizer.zero_grad(set_to_none=True)
        measured = norms.numbers() if norms else {}
    return {
        **measured,
        "loss": loss.item(),
        "grad_norm": grad_norm.item(),
        "lr": optimizer.param_groups[0]["lr"] if lr is None else lr,
        "skipped": float(not is_finite),
    }
