"""What a run is, in lines for the console: its model, its steps, its learning rate."""

from longfire.config import settings
from longfire.config.model_config import ModelConfig
from longfire.config.run import Run
from longfire.config.transformers_config import TransformersConfig
from longfire.huggingface.families import class_of_export
from longfire.parallel.axes import AXES
from longfire.plural import counted
from longfire.training import lengths

# Of a tokenizer: bytes, BOS and EOS; where the data will decide the size
SMALLEST_VOCAB_SIZE = 258


def summary(run: Run) -> list[str]:
    """The model, and a step, the warm-up and the run in steps and in tokens (compare them
    when a setting changes)."""
    sequences = run.sequences_per_step
    config = run.known_model_config
    counts = [f"{config.layer_types.count(n)} {n}" for n in dict.fromkeys(config.layer_types)]
    if run.lr_scheduler.name == "wsd":
        decay = f", decay in the last {run.lr_scheduler.decay_ratio:.0%}"
    else:
        decay = ""
    return [
        f"shape: {counted(config.num_hidden_layers, 'layer')} ({', '.join(counts)}), hidden size "
        f"{config.hidden_size}, {run.model_config_source}",
        f"step: {counted(run.tokens_per_step, 'token')} = {counted(sequences, 'sequence')} of "
        f"{run.training.seq_len:,}: {run.microbatches} micro-batch(es) of "
        f"{run.training.batch_size * run.accumulation // run.microbatches} on "
        f"{describe_plan(run)}",
        length_line(run),
        *lengths.describe(run.training, sequences, run.steps),
        f"learning rate: {run.optimizer.lr:g}, {run.lr_scheduler.name}{decay}, {warmup_line(run)}"
        f"{describe_lr_scales(run.optimizer)}",
        *([f"export: {export_line(config)}"] if run.checkpoint.export else []),
    ]


def export_line(config: ModelConfig | TransformersConfig) -> str:
    """Which class an export is loaded with."""
    if isinstance(config, TransformersConfig):
        return f"as it is, with the class of transformers that it has ({config.model_type})"
    return f"as {class_of_export(config.with_vocabulary(config.vocab_size or SMALLEST_VOCAB_SIZE))}"


def length_line(run: Run) -> str:
    """How long the run is, in steps and tokens, or in seconds and at most so many steps."""
    steps = f"{counted(run.steps, 'step')} = {counted(run.steps * run.tokens_per_step, 'token')}"
    if run.training.max_seconds:
        return (
            f"run: as many steps as {run.training.max_seconds:g} s of training allow, at most "
            f"{steps}"
        )
    return f"run: {steps}" + (", as training.step_plan says" if run.training.step_plan else "")


def warmup_line(run: Run) -> str:
    """The warm-up in steps and tokens, and why it is not the one that was asked for where it is too
    long for the run."""
    warmup = run.warmup_steps
    asked = run.asked_warmup_steps
    text = f"warm-up {steps_text(warmup)} = {counted(round(warmup * run.tokens_per_step), 'token')}"
    if run.is_planned:
        return f"{text}, at most a fifth of the run"
    if warmup < asked:
        return (
            f"{text} (a fifth of the run, which is no longer than the {steps_text(asked)} asked "
            "for)"
        )
    return text


def steps_text(steps: float) -> str:
    """Steps of a warm-up, which may be a fraction."""
    if steps == int(steps):
        return counted(int(steps), "step")
    return f"{steps:,.10g} steps"


def describe_lr_scales(optimizer: settings.Optimizer) -> str:
    """The roles whose learning rate is another multiple of optimizer.lr."""
    scales = {
        "embedding": optimizer.embedding_lr_scale,
        "head": optimizer.head_lr_scale,
        "matrices": optimizer.matrix_lr_scale,
        "other": optimizer.other_lr_scale,
    }
    different = [f"{role} x {scale:g}" for role, scale in scales.items() if scale != 1]
    if different:
        return f"; {', '.join(different)}"
    return ""


def describe_plan(run: Run) -> str:
    """Processes, and along which axes they lie."""
    axes = " x ".join(f"{run.degrees[axis]} {axis}" for axis in AXES if run.degrees[axis] > 1)
    if axes:
        return f"{run.world.size} processes ({axes})"
    return "1 process"
