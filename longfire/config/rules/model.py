"""What is refused of a run about its model: parts that it does not have, settings that do not go
together, an optimizer that is not proven for the plan."""

from collections.abc import Iterator

from longfire.config import settings
from longfire.config.model_config import PUBLISHED, ModelConfig, mixer_of
from longfire.config.run_settings import RunSettings
from longfire.config.transformers_config import TransformersConfig
from longfire.errors import SettingsError
from longfire.parallel.plan import DEGREES, MESH_DIM

LANGUAGE_MODELING = (
    "language_modeling"  # the task of which all rules here are, unless they say more
)


def of_mlp(run: RunSettings) -> Iterator[str]:
    """Settings of MLPs need blocks that have one."""
    if run.model_config is None or run.model_config.has_mlps:
        return
    mode = run.activation_checkpoint.mode
    size = run.training.mlp_chunk_size
    if mode in ("mlp", "attention+mlp"):
        yield (
            f"activation_checkpoint.mode = {mode!r}, but this model's blocks have no MLP: take "
            "attention, block or none"
        )
    if size:
        yield f"training.mlp_chunk_size = {size}, but this model's blocks have no MLP: leave it out"


def of_attention(run: RunSettings) -> Iterator[str]:
    """Settings of softmax attention need layers that have it, and the kernels that they name."""
    attention = run.attention
    if attention.kind != "auto":
        if run.model_config and "attention" not in map(mixer_of, run.model_config.layer_types):
            yield (
                f"attention.kind = {attention.kind!r}, but no layer of this model has softmax "
                "attention: leave it at auto"
            )
        if run.model.kernels == "reference":
            yield (
                f"attention.kind = {attention.kind!r}, but model.kernels = 'reference' computes "
                "with all scores: set one of them to auto"
            )
    if attention.kind != "blockwise":
        for key in ("query_chunk_size", "key_chunk_size"):
            chunk = getattr(attention, key)
            if chunk != getattr(settings.Attention, key):
                yield (
                    f"attention.{key} = {chunk} is about blockwise attention: set attention.kind "
                    "= 'blockwise', or leave it out"
                )


def of_direction(run: RunSettings) -> Iterator[str]:
    """A model that sees later tokens learns no next token, and its sequences are whole. A model of
    classes or of images has a task for them."""
    config = run.model_config
    if not isinstance(config, ModelConfig):
        return
    where = run.model_config_source
    if run.job.task == LANGUAGE_MODELING:
        if config.direction != "causal":
            yield (
                f"direction = {config.direction!r} of {where}: a language model would see the "
                "tokens that it is to predict; set it to causal, or name another job.task"
            )
        for key in ("num_classes", "image_size"):
            if getattr(config, key):
                yield (
                    f"{key} = {getattr(config, key)} of {where} is of a model of classes or of "
                    f"images, but job.task = {LANGUAGE_MODELING!r}: leave it out, or name another "
                    "job.task"
                )
    if config.direction == "causal":
        return
    if run.attention.kind != "auto":
        yield (
            f"attention.kind = {run.attention.kind!r} computes causal attention, but direction = "
            f"{config.direction!r} of {where}: leave it at auto"
        )
    if run.degrees["cp"] > 1:
        yield (
            f"{degree_of(run, 'cp')} cuts sequences, which direction = {config.direction!r} of "
            f"{where} needs whole: set it to 1"
        )


def of_learning_rates(run: RunSettings) -> Iterator[str]:
    """A head that is the embedding has no learning rate of its own, and something learns."""
    optimizer = run.optimizer
    scale = optimizer.head_lr_scale
    if scale != settings.Optimizer.head_lr_scale and ties_head(run.model_config):
        yield (
            f"optimizer.head_lr_scale = {scale:g}, but with tie_word_embeddings = true in "
            f"{run.model_config_source} the head is the embedding: set "
            "optimizer.embedding_lr_scale, and leave head_lr_scale out"
        )
    roles = ("embedding", "head", "matrix", "other")
    if not any(getattr(optimizer, f"{role}_lr_scale") for role in roles):
        yield (
            "optimizer.embedding_lr_scale, head_lr_scale, matrix_lr_scale and other_lr_scale are "
            "all 0, so nothing would learn: set one of them above 0"
        )


def of_optimizer(run: RunSettings) -> Iterator[str]:
    """The optimizer is known, and the plan is one that a test proves for it."""
    from longfire import plugins  # they need torch
    from longfire.optim.refusals import refusals

    if not plugins.are_loaded(run.model.plugins):
        return  # who only prepares data runs no plugin, which may bring the optimizer
    asked: dict[str, str] = {}
    for axis, degree in run.degrees.items():
        if degree > 1:
            asked[axis] = degree_of(run, axis)
    try:
        yield from refusals(run.optimizer, asked)
    except SettingsError as error:
        yield str(error)


def degree_of(run: RunSettings, axis: str) -> str:
    """The setting that says how many processes lie along an axis, with its value."""
    if run.parallelism.mesh_dim and axis in MESH_DIM:
        return f"parallelism.mesh_dim = {run.parallelism.mesh_dim!r} ({DEGREES[axis]})"
    asked = getattr(run.parallelism, DEGREES[axis])
    here = f" ({run.degrees[axis]} processes)" if asked == -1 else ""
    return f"parallelism.{DEGREES[axis]} = {asked}{here}"


def ties_head(config: ModelConfig | TransformersConfig | None) -> bool:
    """Whether embedding and head are one matrix."""
    if not isinstance(config, TransformersConfig):
        return config is not None and config.tie_word_embeddings
    from longfire.huggingface.transformers_model import config_of

    return bool(getattr(config_of(config.config), "tie_word_embeddings", False))


def of_outputs(run: RunSettings) -> Iterator[str]:
    """Where the matrices that end a mixer begin by a rule, every mixer says which they are."""
    if not isinstance(run.model_config, ModelConfig) or run.model_config.init_outputs == PUBLISHED:
        return
    from longfire.mixers import MIXERS  # they need torch, and a plugin may have added some

    for name in dict.fromkeys(map(mixer_of, run.model_config.layer_types)):
        if "row" not in MIXERS[name].roles.values():
            yield (
                f"init_outputs = {run.model_config.init_outputs!r} of {run.model_config_source}, "
                f"but the mixer {name} does not say which matrix "
                'ends it: give its `roles` an entry "row", or leave init_outputs out'
            )


def of_auxiliary_losses(run: RunSettings) -> Iterator[str]:
    """An MLP with a loss of its own meets whole sequences, and the training loss is ours."""
    if not isinstance(run.model_config, ModelConfig):
        return
    from longfire.mlps.auxiliary import refusals  # MLPs need torch, and a plugin may add some

    asked: dict[str, str] = {}
    for axis in ("tp", "cp", "pp"):
        if run.degrees[axis] > 1:
            asked[degree_of(run, axis)] = "set it to 1"
    chunk = run.training.mlp_chunk_size
    if chunk:
        asked[f"training.mlp_chunk_size = {chunk}"] = "set it to 0"
    segments = run.training.tbptt_segments
    if segments > 1:
        asked[f"training.tbptt_segments = {segments}"] = "set it to 1"
    teacher = run.distillation.teacher
    if teacher:
        asked[f"distillation.teacher = {teacher!r} takes another loss"] = "leave it out"
    yield from refusals(run.model_config, asked)


def of_accuracy(run: RunSettings) -> Iterator[str]:
    """The loss that counts correct labels is that of the text."""
    teacher = run.distillation.teacher
    if run.metrics.accuracy and teacher:
        yield (
            "metrics.accuracy = true counts labels in the loss of the text, but "
            f"distillation.teacher = {teacher!r} takes another loss: set it to false"
        )


def of_recomputed_layers(run: RunSettings) -> Iterator[str]:
    """Blocks that are named are there, and one way of naming them is chosen."""
    remat = run.activation_checkpoint
    named = ",".join(map(str, remat.layers))
    if remat.layers and remat.layer_interval > 1:
        yield (
            f"activation_checkpoint.layers = {named!r} and layer_interval = "
            f"{remat.layer_interval} both say which blocks are recomputed: leave one out"
        )
    if run.model_config is None or remat.mode == "none":
        return
    layers = run.model_config.num_hidden_layers
    wrong = [str(layer) for layer in remat.layers if not 0 <= layer < layers]
    if wrong:
        yield (
            f"activation_checkpoint.layers = {named!r} names {', '.join(wrong)}, but the model's "
            f"blocks are 0 to {layers - 1}"
        )
    if not remat.layers and remat.layer_interval > layers:
        yield (
            f"activation_checkpoint.layer_interval = {remat.layer_interval} is more than the "
            f"model's {layers} blocks, so nothing would be recomputed: lower it, or set "
            "activation_checkpoint.mode = 'none'"
        )


def of_policy(run: RunSettings) -> Iterator[str]:
    """What a recomputed part keeps is something, and does not undo what another setting is for."""
    remat = run.activation_checkpoint
    policy = ",".join(remat.policy)
    setting = f"activation_checkpoint.policy = {','.join(remat.policy)!r}"
    if policy in ("", "nothing"):
        return
    if "nothing" in remat.policy:
        yield f"{setting} keeps nothing and something: choose one"
    if remat.mode == "none":
        yield f"{setting} is about parts that are recomputed: set activation_checkpoint.mode too"
    if remat.offload:
        yield (
            f"{setting} keeps outputs on the device, which activation_checkpoint.offload is to "
            "free: choose one"
        )
    if run.training.mlp_chunk_size and remat.mode == "block":
        yield (
            f"{setting} keeps the wide rows of the MLP that training.mlp_chunk_size = "
            f"{run.training.mlp_chunk_size} is to avoid: set activation_checkpoint.mode = "
            "'attention', or one of them to its default"
        )
    if remat.policy != ("matmuls",):
        from longfire.parallel.remat import unknown_operations  # torch knows their names

        for name in unknown_operations(remat.policy):
            yield (
                f"{setting}: torch has no operation {name!r}: write nothing, matmuls, or names "
                "as mm, bmm or longfire.attend_blocks"
            )


def of_backend(run: RunSettings) -> Iterator[str]:
    """A model of transformers is one piece: what asks for parts of it, or for parts of ours, is
    refused."""
    if run.model.backend == "longfire":
        return
    setting = "model.backend = 'transformers' knows nothing of the model's inside"
    if run.activation_checkpoint.mode != "none":
        yield (
            f"activation_checkpoint.mode = {run.activation_checkpoint.mode!r} computes parts "
            f"again, but {setting}: set it to none"
        )
    if run.activation_checkpoint.offload:
        yield (
            f"activation_checkpoint.offload = true moves what blocks keep, but {setting}: set it "
            "to false"
        )
    if run.attention.kind != "auto":
        yield (
            f"attention.kind = {run.attention.kind!r} is about our attention, but {setting}: "
            "leave it at auto"
        )
    if run.training.mlp_chunk_size:
        yield (
            f"training.mlp_chunk_size = {run.training.mlp_chunk_size} is about our MLPs, but "
            f"{setting}: set it to 0"
        )
    if run.model.kernels != "auto":
        yield (
            f"model.kernels = {run.model.kernels!r} chooses among kernels of ours, but "
            f"{setting}: leave it at auto"
        )
    if run.distillation.teacher:
        yield (
            f"distillation.teacher = {run.distillation.teacher!r} compares mixers and hidden "
            f"states, but {setting}: leave it out"
        )
