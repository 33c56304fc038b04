"""The config of a model: what its config.json says, checked; free of torch, so that a wrong shape
fails in an instant."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from longfire.errors import SettingsError

NO_MLP = "none"
DEFAULT_MLP = "swiglu"
TABLES = ("mixers", "mlps")  # fields of ModelConfig that stand in a config.json as tables by name
NORMS = ("rmsnorm", "layernorm")
BLOCKS = ("pre", "post", "parallel", "parallel_tied")

PUBLISHED = "published"


def key(default: Any, help: str) -> Any:
    """A field of a shape: a key of a model config with its default. The help is its only
    documentation (docs/model_config.md)."""
    return field(default=default, metadata={"help": help})


def required(help: str, example: object) -> Any:
    """A field of a shape that every config must give; the example is what an error proposes to
    write."""
    return field(metadata={"help": help, "example": example})


def mixer_of(layer_type: str) -> str:
    """The mixer of an entry of layer_types: attention:local -> attention."""
    return layer_type.partition(":")[0]


def mlp_of(mlp_layer_type: str) -> str:
    """The MLP of an entry of mlp_layer_types: swiglu:wide -> swiglu."""
    return mlp_layer_type.partition(":")[0]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: embedding, blocks of mixer + MLP, norm, head.

    `layer_types` names each layer's mixer (a key of `mixers.MIXERS`); a shorter list repeats.
    `mixer:variant` is the same mixer with settings of its own: `["attention:local", "attention"]`.
    `mixers` holds the settings of each name that `layer_types` uses; the mixer's `Config` dataclass
    checks them. `mlps` is the same of `mlp` and `mlp_layer_types` (keys of `mlps.MLPS`, or none).
    """

    hidden_size: int = required("channels of the residual stream", example=512)
    num_hidden_layers: int = required("blocks, each a mixer and an MLP", example=8)
    layer_types: tuple[str, ...] = required(
        "the mixer of each layer, by name; a shorter list repeats. `mixer:variant` is the same "
        "mixer with a table of its own",
        example=["attention"],
    )
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    vocab_size: int = key(0, "entries of the vocabulary; 0: as many as the tokenizer has")
    intermediate_size: int = key(
        0,
        "inner channels of the MLP; 0: 8/3 hidden_size rounded up to a multiple of 256 (fla's "
        "rule); with channel_mix 4 hidden_size, of 32",
    )
    mlp: str = key(
        DEFAULT_MLP,
        "the part of a block after the mixer: swiglu, geglu, geglu_exact or reglu (gated); "
        "gelu, gelu_exact, relu, relu2 (squared ReLU) or silu; channel_mix (RWKV-7's) or none",
    )
    mlp_bias: bool = key(False, "whether the MLP's matrices have biases")
    mlp_layer_types: tuple[str, ...] = key(
        (),
        "the MLP of each layer, where they differ: names as those of mlp, or of an MLP of a "
        "plugin; a shorter list repeats. `mlp:variant` is the same MLP with a table of its own",
    )
    norm: str = key("rmsnorm", "rmsnorm or layernorm")
    norm_eps: float = key(1e-6, "added to the variance under the root of a norm")
    norm_affine: bool = key(
        True, "false: norms of the residual stream and of queries and keys have no parameters"
    )
    norm_bias: bool = key(True, "whether a layernorm has a bias")
    block: str = key(
        "pre",
        "pre: a norm before mixer and MLP; post: norms after the sums; parallel: mixer and MLP "
        "side by side; parallel_tied: the same with one norm for both",
    )
    residual_in_fp32: bool = key(
        False, "the sum that blocks add to stays float32, whatever the compute type is"
    )
    dropout: float = key(0.0, "probability of dropout on what mixers and MLPs add")
    embed_dropout: float = key(0.0, "probability of dropout on the embedding")
    embed_norm: bool = key(False, "a norm right after the embedding, before its dropout")
    learned_positions: bool = key(
        False,
        "a learned vector for each of max_position_embeddings positions is added to the embedding",
    )
    tie_word_embeddings: bool = key(False, "embedding and head share one matrix")
    pad_vocab_multiple: int = key(1, "vocab_size is rounded up to a multiple of this")
    initializer_range: float = key(
        0.02, "standard deviation of the normal distribution that matrices begin with"
    )
    max_position_embeddings: int = key(
        0,
        "longest sequence in tokens; 0: no limit (rotary positions extrapolate, learned ones "
        "cannot)",
    )
    init_matrices: float | str = key(
        PUBLISHED,
        "how the matrices of mixers and MLPs begin, short convolutions too: published: as the "
        "mixer was published (docs/mixers.md), where it says nothing as initializer_range; "
        "initializer_range: N(0, initializer_range); initializer_range_by_depth: N(0, "
        "initializer_range / sqrt(2 num_hidden_layers)); a number: N(0, number); fan_in: N(0, "
        "1/fan_in); fan_in_uniform: uniform with that standard deviation. Matrices that a mixer "
        "cannot do without in its own way (RWKV-7's) begin as published whatever this says",
    )
    init_outputs: float | str = key(
        PUBLISHED,
        "the same of the matrix that ends a mixer or an MLP: o_proj, down_proj and their like; "
        "or zeros; or initializer_range_by_depth_in_mixers: an MLP's begin as init_matrices",
    )
    init_embedding: float | str = key(
        PUBLISHED,
        "the same of the embedding and of learned positions; its fan_in is hidden_size; or zeros",
    )
    init_head: float | str = key(
        PUBLISHED, "the same of the head; or zeros. A tied head begins as the embedding"
    )
    use_l2warp: bool = key(
        False,
        "in training the gradient of each token's highest logit grows by 1e-4 times that logit, "
        "which keeps logits small (fla's use_l2warp, on for its RWKV-7)",
    )
    final_logit_softcapping: float = key(
        0.0, "logits become cap * tanh(logits / cap) with this cap; 0: as they are"
    )
    mlps: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = self.num_hidden_layers
        if self.hidden_size < 1 or layers < 1 or not self.layer_types:
            raise SettingsError(
                f"model config: hidden_size {self.hidden_size}, num_hidden_layers {layers} and "
                f"layer_types {list(self.layer_types)} must all be positive"
            )
        for types, part in (("layer_types", "mixer"), ("mlp_layer_types", "MLP")):
            object.__setattr__(self, types, self.of_each_layer(types, part))
        for tables in TABLES:
            given = getattr(self, tables)
            object.__setattr__(self, tables, {name: with_tuples(of) for name, of in given.items()})
        if not self.intermediate_size:
            least = self.hidden_size * 8 // 3
            multiple = 256
            if self.mlp == "channel_mix":
                least = self.hidden_size * 4
                multiple = 32
            object.__setattr__(self, "intermediate_size", multiple * -(-least // multiple))
        self.require("norm", self.norm in NORMS, f"is not one of {', '.join(NORMS)}")
        self.require("block", self.block in BLOCKS, f"is not one of {', '.join(BLOCKS)}")
        self.require("dropout", 0 <= self.dropout < 1, "must lie in [0, 1)")
        self.require("embed_dropout", 0 <= self.embed_dropout < 1, "must lie in [0, 1)")
        deviation = "must be a standard deviation above 0"
        self.require("initializer_range", self.initializer_range > 0, deviation)
        self.require("norm_eps", self.norm_eps >= 0, "must be at least 0")
        self.require("pad_vocab_multiple", self.pad_vocab_multiple >= 1, "must be at least 1")
        self.require(
            "final_logit_softcapping",
            0 <= self.final_logit_softcapping < float("inf"),
            "must be a cap above 0, as 15 or 30, or 0 for none",
        )
        if self.learned_positions and not self.max_position_embeddings:
            raise SettingsError(
                "model config: learned_positions needs max_position_embeddings, the number of "
                "positions that are learned"
            )
        if self.mlp_bias and "channel_mix" in map(mlp_of, self.mlp_types):
            raise SettingsError(
                "model config: mlp_bias = true, but mlp = 'channel_mix' has no biases; set it to "
                "false"
            )
        if self.block.startswith("parallel") and NO_MLP in self.mlp_types:
            where = "mlp_layer_types has" if self.mlp_layer_types else "mlp ="
            raise SettingsError(
                f"model config: block = {self.block!r} puts an MLP beside the mixer, but {where} "
                "'none'"
            )

    def require(self, key: str, holds: bool, rule: str) -> None:
        """Raises SettingsError naming the key and its value where the rule does not hold."""
        if not holds:
            raise SettingsError(f"model config: {key} = {getattr(self, key)!r} {rule}")

    def of_each_layer(self, key: str, part: str) -> tuple[str, ...]:
        """The names of a list that repeats, one for each layer. Raises SettingsError where it
        cannot repeat."""
        types = tuple(getattr(self, key))
        layers = self.num_hidden_layers
        if types and layers % len(types):
            raise SettingsError(
                f"model config: {key} has {len(types)} entries, which do not divide "
                f"num_hidden_layers = {layers}; list one {part} for each layer, or a pattern that "
                "divides"
            )
        return types * (layers // max(len(types), 1))

    @property
    def mlp_types(self) -> tuple[str, ...]:
        """The MLP of each layer, by name; NO_MLP where there is none."""
        return self.mlp_layer_types or (self.mlp,) * self.num_hidden_layers

    @property
    def residual_sums(self) -> int:
        """How often something is added to the residual stream: by each mixer and each MLP."""
        return 2 * self.num_hidden_layers - self.mlp_types.count(NO_MLP)

    @property
    def has_mlps(self) -> bool:
        """Whether any layer has an MLP."""
        return set(self.mlp_types) != {NO_MLP}

    def with_vocabulary(self, vocab_size: int) -> "ModelConfig":
        """The same shape with the tokenizer's number of words where the config leaves it open,
        padded as it asks.

        Raises SettingsError when the config has fewer words than the tokenizer.
        """
        if self.vocab_size and self.vocab_size < vocab_size:
            raise SettingsError(
                f"vocab_size = {self.vocab_size} of the model's config is smaller than the "
                f"tokenizer's {vocab_size} words; set vocab_size to 0 (take the tokenizer's) or "
                f"to at least {vocab_size}"
            )
        multiple = self.pad_vocab_multiple
        return replace(self, vocab_size=multiple * -(-(self.vocab_size or vocab_size) // multiple))

    @property
    def drops(self) -> bool:
        """Whether training needs noise for dropout."""
        return (
            self.dropout > 0
            or self.embed_dropout > 0
            or any(m.get("dropout", 0) > 0 for m in self.mixers.values())
        )

    def to_dict(self) -> dict[str, Any]:
        """Our own config.json: the fields, the settings of each mixer and MLP under its name."""
        fields_ = asdict(self)
        mixers, mlps = (fields_.pop(tables) for tables in TABLES)
        mlp_layer_types = fields_.pop("mlp_layer_types")
        if mlp_layer_types:  # few models have it
            fields_["mlp_layer_types"] = list(mlp_layer_types)
        return {
            "model_type": "longfire",
            **fields_,
            "layer_types": list(self.layer_types),
            **mixers,
            **mlps,
        }


def with_tuples(given: Any) -> Any:
    """A mixer's table with tuples for the lists of JSON and TOML, so that equal settings are
    equal."""
    if not isinstance(given, dict):
        return given  # named where it is read
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
