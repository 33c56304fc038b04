"""The training data of a run: its token stores, its batches, and what of a step's batch is for this
process."""

from longfire.checkpoint.state import State
from longfire.config.run import Run
from longfire.data.batch import Batch
from longfire.data.batches import Batches, WaitStopped
from longfire.data.prepare import Prepared, prepare
from longfire.errors import DataError
from longfire.launch import StopRequest
from longfire.parallel.axes import DATA
from longfire.parallel.mesh import Mesh
from longfire.training import lengths


def prepare_data(run: Run, mesh: Mesh) -> Prepared:
    """The token stores of the run. With data.streaming, process 0 tokenizes in the background while
    the run trains, and the other processes read what is there already."""
    is_first = mesh.rank() == 0
    return prepare(
        run.data,
        run.tokenizer,
        background=run.data.streaming and is_first,
        watch=run.data.streaming and not is_first,
    )


def batches_of(run: Run, prepared: Prepared, stop: StopRequest) -> Batches:
    """The batches of the run. A wait for more tokens ends when `stop` is requested."""
    training = run.training
    return Batches(
        prepared,
        run.data,
        training.seq_len,
        training.seed,
        stages_by_sequence(run),
        lambda: stop.requested,
    )


def stages_by_sequence(run: Run) -> tuple[tuple[int, int], ...]:
    """The stages of training.seq_len_schedule: the sequence that each begins with, and its number
    of tokens per sequence."""
    stages: list[tuple[int, int]] = []
    for stage in lengths.stages(run.training):
        stages.append((stage.step * run.sequences_per_step, stage.seq_len))
    return tuple(stages)


def next_batch(run: Run, state: State, batches: Batches) -> Batch | None:
    """The sequences of the next step that this process trains on; None where a stop was requested
    while it waited for them."""
    sequences_here = run.training.batch_size * run.accumulation
    first = state.rows_consumed + state.mesh.rank(*DATA) * sequences_here
    try:
        return batches.at(first, sequences_here, run.sequences_per_step)
    except WaitStopped:
        return None


def refuse_batch_without_labels(run: Run, batch: Batch, mesh: Mesh) -> None:
    """Of the first batch of a streaming run; `start.begin` has refused complete stores without
    labels. Collective over the mesh; raises DataError."""
    if not (run.data.varlen and run.data.streaming):
        return
    if mesh.any(batch.real_tokens() > 0):
        return
    error = DataError(
        "no token of the first step can be predicted: with data.varlen = true the first token of "
        "each document has no label, and the documents have one token each; set data.varlen = "
        "false or tokenizer.add_eos = true, or name other text"
    )
    error.reported_elsewhere = mesh.rank() > 0
    raise error
