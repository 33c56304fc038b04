"""The teacher of a distillation, frozen, on the processes of a run.

One process has it whole. Several share it as they share the student: matrices, heads and vocabulary
over tp, rows over dp_shard and cp, which a forward gathers block by block. Each process reads its
own part of the files, one tensor at a time.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from longfire.checkpoint.provenance import RUN_TOML
from longfire.checkpoint.restoring import refuse_another_vocabulary
from longfire.checkpoint.weights import (
    check_weights_folder,
    finite,
    open_model,
    run_of,
    tokenizer_of,
    weights_on_disk,
)
from longfire.config import settings
from longfire.config.model_config import ModelConfig
from longfire.config.run import Run
from longfire.device import choose_device, choose_dtype
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.checksums import check_checksums
from longfire.huggingface.load import model_config_in, read_weights
from longfire.model import Model, on_meta
from longfire.parallel import context_refusals, tensor_refusals
from longfire.parallel.apply import parallelize
from longfire.parallel.mesh import Mesh
from longfire.parallel.sharding import copy_from_whole, sharding_of
from longfire.training import lengths
from longfire.training.memory_check import check_memory

KEEPING = settings.ActivationCheckpoint("none")  # nothing is kept for a backward


class StoredTeacher(NamedTuple):
    """A model in files. settings: what its compute type follows from. weights: name and whole fp32
    tensor of each parameter and buffer, each read when it is asked for."""

    config: ModelConfig
    settings: settings.Model
    weights: Iterator[tuple[str, Tensor]]


def open_teacher(run: Run, mesh: Mesh) -> Model:
    """The model of distillation.teacher, or the part of it that this process holds. Raises
    SettingsError or CheckpointError naming what is wrong with its folder, or why the processes
    cannot share it."""
    folder = Path(run.distillation.teacher)
    if mesh.has_whole_parameters:
        opened = open_model(folder, training=run.training)
        return opened.model.requires_grad_(False)
    if mesh.rank() == 0 and not (folder / RUN_TOML).exists():
        check_checksums(folder)
    stored = stored_teacher(folder)
    device = choose_device(run.training, run.world.local_rank)
    dtype, _ = choose_dtype(stored.settings, device)
    teacher = on_meta(stored.config, dtype)
    refuse_unshared(teacher, run)
    share(teacher, run, mesh)
    check_memory(teacher, run.optimizer, device, run.parallelism.cpu_offload)
    parameters_on = torch.device("cpu") if run.parallelism.cpu_offload else device
    take(teacher, stored.weights, parameters_on, str(folder))
    teacher.computes_on = device
    return teacher


def share(teacher: Model, run: Run, mesh: Mesh) -> None:
    """Leave of a whole teacher, on meta or with values, what this process holds, frozen."""
    teacher.requires_grad_(False)
    parallelize(teacher, KEEPING, False, mesh, run.parallelism, run.training.seq_len)


def refuse_unshared(teacher: Model, run: Run) -> None:
    """Raises SettingsError with every reason why the processes of the run cannot share the
    teacher."""
    degrees = run.degrees
    problems = tensor_refusals.refusals(
        teacher,
        degrees["tp"],
        run.parallelism.sequence_parallel,
        run.training.seq_len,
        degrees["cp"],
    )
    of_context = context_refusals.refusals(
        teacher,
        degrees["cp"],
        degrees["tp"],
        lengths.shortest(run.training),
        run.parallelism,
    )
    reasons = [*problems, *of_context]
    if reasons:
        where = f"distillation.teacher = {run.distillation.teacher!r}"
        raise SettingsError("\n".join(f"{where}: {reason}" for reason in reasons))


def stored_teacher(folder: Path) -> StoredTeacher:
    """The model in a run folder (its newest whole checkpoint) or a folder of Hugging Face weights.
    Raises as `checkpoint.weights.open_model`."""
    if not folder.is_dir():
        raise SettingsError(f"distillation.teacher = {str(folder)!r}: no such folder")
    if not (folder / RUN_TOML).exists():
        check_weights_folder(folder)
        config = model_config_in(folder)
        return StoredTeacher(config, settings.Model(), read_weights(folder, config))
    run = run_of(folder, ())
    checkpoints = run.folder / run.checkpoint.folder
    step, weights = weights_on_disk(checkpoints, -1)
    tokenizer = tokenizer_of(run)
    refuse_another_vocabulary(checkpoints / f"step-{step}", tokenizer.vocabulary, tokenizer.where)
    of_run = run.model_config_after(step).with_vocabulary(tokenizer.vocab_size)
    if not isinstance(of_run, ModelConfig):
        raise SettingsError(
            f"distillation.teacher = {str(folder)!r} has model.backend = 'transformers', whose "
            "layers several processes cannot share: start one process, or name a model of ours"
        )
    return StoredTeacher(of_run, run.model, iter(weights.items()))


def take(
    teacher: Model, weights: Iterator[tuple[str, Tensor]], device: torch.device, where: str
) -> None:
    """Give a teacher on meta its memory, and its part of each tensor. Raises CheckpointError naming
    a tensor that is missing, or not finite."""
    teacher.to_empty(device=device)
    teacher.tie()
    missing = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
    for name, whole in finite(weights, where):
        if name in missing:
            here = missing.pop(name).detach()
            copy_from_whole(here, sharding_of(teacher, name), whole)
    if missing:
        names = ", ".join(sorted(missing)[:4])
        raise CheckpointError(f"{where} has no {names}: name a folder with the whole model")
