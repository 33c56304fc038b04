"""Model and optimizer of a run on its devices: fresh, restored from a checkpoint, or with weights
from elsewhere."""

import logging
from typing import cast

import torch

from longfire.checkpoint.saving import Checkpoints
from longfire.checkpoint.state import State
from longfire.config.model_config import ModelConfig
from longfire.config.run import Run
from longfire.config.summary import summary
from longfire.config.transformers_config import TransformersConfig
from longfire.device import choose_dtype
from longfire.errors import SettingsError
from longfire.huggingface import transformers_model
from longfire.huggingface.transformers_documents import check_documents_separate
from longfire.initialise import materialise
from longfire.launch import Watchdog, attempt
from longfire.model import Model, on_meta
from longfire.ops.bf16 import assume, native_bf16
from longfire.ops.choice import choose, describe
from longfire.optim import make_optimizer
from longfire.parallel.apply import parallelize
from longfire.parallel.float8_layers import choose_matrices
from longfire.parallel.mesh import ALONE, Mesh
from longfire.tasks.contract import Task
from longfire.training import lengths
from longfire.training.compiling import compile_decision, eager_rate, sample_of
from longfire.training.environment import multiplies_bf16
from longfire.training.memory_check import check_memory
from longfire.training.run_plan import name_of, note_plan, with_context_strategy
from longfire.training.stages import set_rope_base
from longfire.training.start import fresh_weights, refuse_another_batch, take_weights
from longfire.training.step import matrices_kept_rounded

logger = logging.getLogger(__name__)


def checkpoints_of(run: Run, task: Task, mesh: Mesh) -> Checkpoints:
    """The checkpoints in the run folder."""
    return Checkpoints(
        run.folder / run.checkpoint.folder,
        run.checkpoint,
        mesh,
        patience_seconds=run.comm.train_timeout_seconds / 2,
        vocabulary=task.vocabulary,
        attempt=attempt(),
        evaluated_interval=run.eval.interval,
        uses_average=run.uses_average,
    )


def state_at_start(
    run: Run,
    task: Task,
    checkpoints: Checkpoints,
    device: torch.device,
    mesh: Mesh,
) -> State:
    """The state that this process trains from: of the newest checkpoint, else with the weights of
    model.weights, else initialised. Collective over the mesh; the watchdog of
    comm.init_timeout_seconds ends a process that hangs in it."""
    with Watchdog(run.comm, "to set up the model"):
        state = make_state(run, task.model_config, device, task, mesh)
        if not checkpoints.restore(state):
            logger.info(f"weights: {initial_weights(run, state)}")
        refuse_another_batch(run, state)
        stage = lengths.stage_of_model(run.training, state.step)
        set_rope_base(run, state.model, stage.rope_theta)
    if run.model.backend == "transformers" and run.data.varlen:
        check_documents_separate(state.model)
    return state


def bf16_of_run(run: Run, device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively: a run that is resumed keeps its answer."""
    if run.has_checkpoints:
        return multiplies_bf16(run.folder, device)
    return native_bf16(device)


def initial_weights(run: Run, state: State) -> str:
    """Take the weights of model.weights, if it names any. Returns a line that names their
    origin."""
    if run.model.weights:
        return take_weights(run, state)
    return fresh_weights(run)


def make_state(
    run: Run,
    config: ModelConfig | TransformersConfig,
    device: torch.device,
    task: Task | None = None,
    mesh: Mesh = ALONE,
) -> State:
    """Model and optimizer at step 0 on the device. Every decision that depends on the machine is
    logged once.

    config: of the model, with what the data decides of it (Task.model_config). task: None where
    nothing is to be learned. Raises SettingsError where task or device do not fit the settings.
    Collective over the mesh: what is measured is measured by process 0 for all.
    """
    if run.activation_checkpoint.offload and device.type == "cpu":
        raise SettingsError(
            "activation_checkpoint.offload = true moves activations to the host's memory, where "
            "those of a CPU are already: set it to false"
        )
    is_native = mesh.broadcast_object(bf16_of_run(run, device))
    assume(is_native, device.type)
    dtype, precision = choose_dtype(run.model, device)
    model = whole_model(run, config, dtype, device)
    if task:
        task.prepare_model(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kernels = choose(device, run.model.kernels)
    is_compiled, why = decide_compilation(run, model, device, mesh)
    run = with_context_strategy(run, dtype, device, mesh)
    of_8_bits = choose_matrices(model, run.float8)
    parallelize(
        model,
        run.activation_checkpoint,
        is_compiled,
        mesh,
        run.parallelism,
        run.training.seq_len,
        run.attention,
        run.training.mlp_chunk_size,
        run.float8,
    )
    parameters_on = torch.device("cpu") if run.parallelism.cpu_offload else device
    is_ours = run.model.backend == "longfire"
    if is_ours:
        with mesh.raise_on_all_ranks():
            frozen = task.frozen_models if task else ()
            check_memory(model, run.optimizer, device, run.parallelism.cpu_offload, frozen)
        materialise(model, run.training.seed, parameters_on)
    model.computes_on = device
    for line in summary(run):
        logger.info(line)
    logger.info(
        f"model: {parameters:,} parameters on {device.type}, {torch.get_num_threads()} threads"
    )
    logger.info(f"precision: {precision}")
    if task and matrices_kept_rounded(model, run.training, run.microbatches):
        logger.info(
            f"rounded weights: {name_of(dtype)} once a step (training.keep_rounded_weights)"
        )
    logger.info(f"kernels: {'; '.join(describe(kernels))}")
    if run.float8.enable_float8_linear:
        logger.info(f"float8: {of_8_bits.describe(run.float8)}")
    logger.info(f"compile: {'on' if is_compiled else 'off'} ({why})")
    if mesh.size() > 1 and is_ours:
        note_plan(run, model, dtype, mesh, task.frozen_models if task else ())
    return State(model, make_optimizer(model, run.optimizer, parameters_on), mesh=mesh)


def whole_model(
    run: Run,
    config: ModelConfig | TransformersConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Model:
    """The model of the run, before anything is sharded: ours on the meta device, one of
    transformers initialised on its device."""
    if isinstance(config, TransformersConfig):
        theirs = transformers_model.build(config, run.training.seed, device, dtype)
        return cast(Model, theirs)  # it has the attributes of a Model that training uses
    return on_meta(config, dtype)


def decide_compilation(
    run: Run, model: Model, device: torch.device, mesh: Mesh
) -> tuple[bool, str]:
    """Whether the blocks are compiled, and why. Process 0 decides, since it may measure."""
    flops_per_token = model.flops_per_token(run.training.seq_len)

    def rate() -> float:
        if not isinstance(model.config, ModelConfig):
            return eager_rate(run, model)
        sample = sample_of(model.config, run.training.seed, model.compute_dtype, device)
        return eager_rate(run, sample)

    return mesh.broadcast_object(compile_decision(run, flops_per_token, device, rate))
