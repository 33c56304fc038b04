"""What is refused of a run about its batch, its steps, and the length of its sequences."""

from collections.abc import Iterator

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.config.run_settings import RunSettings
from longfire.config.transformers_config import TransformersConfig
from longfire.errors import SettingsError
from longfire.plural import counted
from longfire.training.schedule import read_plan


def of_batch(run: RunSettings) -> Iterator[str]:
    """The global batch has exactly as many sequences as training.global_batch_size asks for; it is
    never rounded."""
    training = run.training
    processes = run.data_processes
    batch_size = training.batch_size
    wanted = training.global_batch_size
    at_once = batch_size * processes
    if not wanted:
        return
    if wanted % at_once:
        below = wanted // at_once * at_once
        above = (wanted // at_once + 1) * at_once
        multiples = f"{below} or {above}" if below else f"{above}"
        other_batch_size = ""
        near = batch_sizes_near(batch_size, wanted, processes)
        if near:
            other_batch_size = f", or a training.batch_size of {' or '.join(map(str, near))}"
        yield (
            f"training.global_batch_size = {wanted} is no multiple of batch_size x processes = "
            f"{batch_size} x {processes} = {at_once}, and it is never rounded: take "
            f"{multiples}{other_batch_size}"
        )
    elif training.gradient_accumulation_steps and run.sequences_per_step != wanted:
        yield (
            f"training.gradient_accumulation_steps = {training.gradient_accumulation_steps} x "
            f"batch_size {batch_size} x processes {processes} = {run.sequences_per_step} "
            f"sequences, but training.global_batch_size = {wanted}: leave one of them out, or "
            f"set gradient_accumulation_steps to {wanted // at_once}"
        )


def of_decay(run: RunSettings) -> Iterator[str]:
    """The decay of the learning rate ends where it is asked to, after the warm-up."""
    end = run.lr_scheduler.decay_end_step
    if not end:
        return
    if run.is_planned:
        yield (
            f"lr_scheduler.decay_end_step = {end}: with training.max_seconds or training.step_plan "
            "the decay ends with the planned steps; set it to 0"
        )
    elif end <= run.asked_warmup_steps:
        yield (
            f"lr_scheduler.decay_end_step = {end} is not after the warm-up of "
            f"{run.asked_warmup_steps:g} steps: raise it, or set it to 0"
        )


def of_drops(run: RunSettings) -> Iterator[str]:
    """A learning rate that falls at certain steps has them named; one that falls by the validation
    loss has such a loss."""
    scheduler = run.lr_scheduler
    milestones = scheduler.milestones
    if scheduler.name == "multistep":
        if not milestones:
            yield (
                "lr_scheduler.name = 'multistep' needs the steps at which the rate falls: set "
                "lr_scheduler.milestones"
            )
        if sorted(set(milestones)) != list(milestones) or (milestones and milestones[0] < 1):
            yield (
                f"lr_scheduler.milestones = {','.join(map(str, milestones))!r} must be steps from "
                "1 on, each later than the one before it"
            )
    if scheduler.name == "plateau":
        if not run.eval.interval:
            yield (
                "lr_scheduler.name = 'plateau' follows the validation loss, and eval.interval = 0 "
                "measures none during training: set eval.interval"
            )
        if not run.data.validation and not run.data.validation_fraction:
            yield (
                "lr_scheduler.name = 'plateau' follows the validation loss, but "
                "data.validation_fraction = 0 keeps no text for it: raise it, or set "
                "data.validation"
            )


def batch_sizes_near(batch_size: int, wanted: int, processes: int) -> list[int]:
    """The next smaller and the next larger batch size that divides the wanted global batch."""
    if wanted % processes:
        return []
    sequences = wanted // processes
    near: list[int] = []
    for candidate in range(1, sequences + 1):
        if sequences % candidate:
            continue
        if candidate < batch_size:
            near = [candidate]
        elif candidate > batch_size:
            return [*near, candidate]
    return near


def of_length(run: RunSettings) -> Iterator[str]:
    """The plan of steps can be read; warm-up and decay fit into the run; sequences fit the model
    and its documents."""
    scheduler = run.lr_scheduler
    seq_len = run.training.seq_len
    try:
        read_plan(run.training.step_plan)
    except SettingsError as error:
        yield str(error)
        return
    if run.steps > run.asked_steps:
        key = "training.tokens" if run.training.tokens else "training.steps"
        yield (
            f"training.step_plan plans {counted(run.steps, 'step')}, more than the "
            f"{run.asked_steps} of {key}: raise {key}, or leave training.step_plan out "
            "(--training.step_plan=)"
        )
    warmup = run.asked_warmup_steps
    decay = scheduler.decay_ratio * run.steps
    if scheduler.name == "wsd" and not run.is_planned and run.steps - decay < warmup < run.steps:
        key = "warmup_tokens" if scheduler.warmup_tokens else "warmup_steps"
        yield (
            f"lr_scheduler.decay_ratio = {scheduler.decay_ratio} takes {decay:g} of "
            f"{counted(run.steps, 'step')}, and lr_scheduler.{key} = {getattr(scheduler, key)} "
            "more than the rest: shorten one of them"
        )
    limit = run.model_config.max_position_embeddings if run.model_config else 0
    if limit and seq_len > limit and has_positions(run.model_config):
        yield (
            f"training.seq_len = {seq_len} is longer than max_position_embeddings = {limit} of "
            f"{run.model_config_source}: shorten it, or raise that number (rotary positions "
            "extrapolate, learned ones cannot)"
        )
    if 0 < run.data.context_len < seq_len and not run.data.varlen:
        yield (
            f"data.context_len = {run.data.context_len} splits documents, which only data.varlen "
            "= true keeps apart: set that too"
        )
    if run.data.context_len == 1:
        yield (
            "data.context_len = 1 cuts documents into single tokens, of which none can be "
            "predicted: raise it, or set it to 0"
        )
    if run.data.context_len > seq_len and run.data.varlen:
        yield (
            f"data.context_len = {run.data.context_len} is longer than training.seq_len = "
            f"{seq_len}: set it to 0 for no limit"
        )


def has_positions(config: ModelConfig | TransformersConfig | None) -> bool:
    """Whether a model has learned positions, or layers of softmax attention, which may rotate."""
    if config is None:
        return False
    mixers = {mixer_of(name) for name in config.layer_types}
    return config.learned_positions or "attention" in mixers
