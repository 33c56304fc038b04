"""The rules that a model's config must keep, whatever its mixers and MLPs are."""

from typing import TYPE_CHECKING

from longfire.errors import SettingsError

if TYPE_CHECKING:
    from longfire.config.model_config import ModelConfig

NO_MLP = "none"
NORMS = ("rmsnorm", "layernorm")
BLOCKS = ("pre", "post", "parallel", "parallel_tied")
DIRECTIONS = ("causal", "both")
POOLS = ("last", "first", "mean")
# Far above every published model; larger ones take hours and all memory to describe only.
MAX_LAYERS = 10_000
MAX_HIDDEN_SIZE = 2**20


def check_layers(layers: int) -> None:
    """Raises SettingsError for more layers than a list of them can be made for."""
    if layers > MAX_LAYERS:
        raise SettingsError(
            f"model config: num_hidden_layers = {layers} must be at most {MAX_LAYERS}"
        )


def check_model(config: "ModelConfig") -> None:
    """Raises SettingsError naming a key, its value and the fix. (Where there are images, what
    follows from their size is set.)"""
    if config.image_size:
        complete_image(config)
    width = config.hidden_size
    config.require("hidden_size", width <= MAX_HIDDEN_SIZE, f"must be at most {MAX_HIDDEN_SIZE}")
    config.require("norm", config.norm in NORMS, f"is not one of {', '.join(NORMS)}")
    config.require("block", config.block in BLOCKS, f"is not one of {', '.join(BLOCKS)}")
    directions = f"is not one of {', '.join(DIRECTIONS)}"
    config.require("direction", config.direction in DIRECTIONS, directions)
    config.require("pool", config.pool in POOLS, f"is not one of {', '.join(POOLS)}")
    config.require("dropout", 0 <= config.dropout < 1, "must lie in [0, 1)")
    config.require("embed_dropout", 0 <= config.embed_dropout < 1, "must lie in [0, 1)")
    deviation = "must be a standard deviation above 0"
    config.require("initializer_range", config.initializer_range > 0, deviation)
    config.require("norm_eps", config.norm_eps >= 0, "must be at least 0")
    config.require("pad_vocab_multiple", config.pad_vocab_multiple >= 1, "must be at least 1")
    config.require(
        "final_logit_softcapping",
        0 <= config.final_logit_softcapping < float("inf"),
        "must be a cap above 0, as 15 or 30, or 0 for none",
    )
    if config.learned_positions and not config.max_position_embeddings:
        raise SettingsError(
            "model config: learned_positions needs max_position_embeddings, the number of "
            "positions that are learned"
        )
    mlps = {name.partition(":")[0] for name in config.mlp_types}
    if config.mlp_bias and "channel_mix" in mlps:
        raise SettingsError(
            "model config: mlp_bias = true, but mlp = 'channel_mix' has no biases; set it to false"
        )
    config.require(
        "num_classes",
        not (config.num_classes and config.tie_word_embeddings),
        "has a head over classes, but tie_word_embeddings = true shares the one over the "
        "vocabulary: set it to false",
    )
    if config.block.startswith("parallel") and NO_MLP in mlps:
        where = "mlp_layer_types has" if config.mlp_layer_types else "mlp ="
        raise SettingsError(
            f"model config: block = {config.block!r} puts an MLP beside the mixer, but {where} "
            "'none'"
        )


def complete_image(config: "ModelConfig") -> None:
    """The vocabulary and the positions of a model of images follow from the size of its
    images. Raises SettingsError for a size that does not divide into patches, and for other
    values of these keys."""
    divides = min(config.patch_size, config.image_size) >= 1 and (
        config.image_size % config.patch_size == 0
    )
    multiple = f"must be a positive multiple of patch_size = {config.patch_size}"
    config.require("image_size", divides, multiple)
    channels = "must be 3 (RGB) or 1 (grey)"
    config.require("image_channels", config.image_channels in (1, 3), channels)
    derived = {"vocab_size": 1, "max_position_embeddings": config.image_tokens}
    for name, value in derived.items():
        config.require(
            name,
            getattr(config, name) in (0, value),
            f"must be {value} with image_size = {config.image_size} and patch_size = "
            f"{config.patch_size}: leave it out",
        )
        object.__setattr__(config, name, value)
    config.require(
        "pool",
        config.pool != "first" or config.direction == "both",
        "takes the class token, which with direction = 'causal' sees no patch: set direction = "
        "'both', or another pool",
    )
