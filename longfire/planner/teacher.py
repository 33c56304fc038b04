"""What a teacher (distillation.teacher) adds to what a process of a plan holds, sends and computes.

Its blocks are gathered one after the other in a forward without a backward; its embedding and head
stay whole from the first forward on. What it gives is kept while the student learns from it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longfire.checkpoint.provenance import RUN_TOML
from longfire.config.model_config import ModelConfig
from longfire.config.run import Run
from longfire.config.taught_layers import layers_of_other_mixers
from longfire.huggingface.load import model_config_in
from longfire.model import Model, on_meta
from longfire.parallel.context_cost import BYTES
from longfire.planner.forecast import Plan
from longfire.planner.holding import Group
from longfire.planner.memory import ends_of
from longfire.planner.part import MASTER_BYTES

if TYPE_CHECKING:
    from longfire.planner.measured_run import MeasuredRun

MEASURED_TOKENS = 4096  # a forward of longer sequences is scaled from one of these
# fp32 logits of a chunk that the divergence holds at one time: both models' log-probabilities, the
# teacher's probabilities, their difference, and gradients
CHUNKS_OF_LOGITS = 6


@dataclass(frozen=True)
class TeacherCost:
    """Of one process. Bytes, but for flops: of a token's forward, on all that share its matrices.

    parameters: its shards. ends: embedding and head, gathered. blocks: of all, gathered. block: the
    largest, while it runs. activations: at the fullest instant of its forward. kept: what the
    student is compared with. logits: beside those that the student's loss on text would hold.
    """

    parameters: float = 0.0
    ends: float = 0.0
    blocks: float = 0.0
    block: float = 0.0
    activations: float = 0.0
    kept: float = 0.0
    logits: float = 0.0
    flops: float = 0.0


NO_TEACHER = TeacherCost()


def teacher_model(run: Run, dtype: torch.dtype) -> Model | None:
    """The run's teacher on meta; None where there is none, or it is no model of ours."""
    folder = Path(run.distillation.teacher)
    if not run.distillation.teacher or not folder.is_dir():  # a model of the hub is not fetched
        return None
    if (folder / RUN_TOML).exists():
        of_teacher = Run.of_folder(folder)
        config = of_teacher.known_model_config.with_vocabulary(of_teacher.vocab_size)
    else:
        config = model_config_in(folder)
    if not isinstance(config, ModelConfig):
        return None
    return on_meta(config, dtype)


def teacher_cost(measured: "MeasuredRun", plan: Plan, here: int) -> TeacherCost:
    """here: tokens of each sequence on a process."""
    teacher = measured.teacher
    if teacher is None:
        return NO_TEACHER
    measured_tokens = min(here, MEASURED_TOKENS)
    meter = measured.teacher_meter(plan.tp, measured_tokens)
    share = meter.model
    blocks = [Group.of(block, plan.shards, {}) for block in share.layers]
    ends = [Group.of(end, plan.shards, {}) for end in ends_of(share).values()]
    if share.config.tie_word_embeddings:
        ends = ends[:1]
    each = 2 if measured.run.parallelism.param_gather_dtype == "bfloat16" else MASTER_BYTES
    wrapped = plan.data * plan.cp > 1 or measured.run.parallelism.cpu_offload
    gathered = each if wrapped else 0
    layers = range(len(teacher.layers))
    rows = plan.batch_size * here
    # what a forward holds grows with its tokens
    peaks = [meter.part(layer, "block", 1).forward_peak for layer in layers]
    activations = max(peaks) * rows / measured_tokens
    states = rows * teacher.config.hidden_size * BYTES[measured.dtype]
    logits = 0.0
    kept = float(states)
    if measured.run.distillation.kind == "hidden":
        of_student = measured.model.config.layer_types
        learning = layers_of_other_mixers(of_student, teacher.config.layer_types)
        kept *= 2 * len(learning)
    else:
        words = -(-teacher.config.vocab_size // plan.tp)
        chunk = min(rows, measured.chunk_tokens)
        logits = float((CHUNKS_OF_LOGITS - 1) * 4 * chunk * words)
    return TeacherCost(
        parameters=float(MASTER_BYTES * sum(group.shard for group in blocks + ends)),
        ends=float(gathered * sum(group.whole for group in ends)),
        blocks=float(gathered * sum(group.whole for group in blocks)),
        block=2.0 * gathered * max(group.whole for group in blocks),
        activations=activations,
        kept=kept,
        logits=logits,
        flops=teacher.flops_per_token(measured.seq_len),
    )
