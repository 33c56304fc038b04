"""The config of a model: what its config.json says, checked; free of torch, so that a wrong shape
fails in an instant."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from longfire.config.model_rules import NO_MLP, check_layers, check_model
from longfire.errors import SettingsError

DEFAULT_MLP = "swiglu"
TABLES = ("mixers", "mlps")  # fields of ModelConfig that stand in a config.json as tables by name
# Keys that few models have: a config.json has them only where they are not the default.
RARE_KEYS = (
    "mlp_layer_types",
    "direction",
    "num_classes",
    "pool",
    "image_size",
    "patch_size",
    "image_channels",
)

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
    direction: str = key(
        "causal",
        "causal: a token sees itself and those before it; both: all tokens of its document, where "
        "recurrences and convolutions run from either end and are summed (not for language models)",
    )
    num_classes: int = key(
        0,
        "classes of a classifier, which has a head over them in the place of one over the "
        "vocabulary; 0: as many as its data has",
    )
    pool: str = key(
        "last",
        "of a classifier, what its head sees: last (the last token of a text), first (the class "
        "token of an image), mean (of the tokens of a text, of the patches of an image)",
    )
    image_size: int = key(
        0,
        "height and width of an image in pixels, for a model of images: a class token, the one "
        "entry of its vocabulary, and the patches are its tokens; 0: a model of text",
    )
    patch_size: int = key(16, "of a model of images: height and width of a patch in pixels")
    image_channels: int = key(3, "of a model of images: channels of an image, 3 (RGB) or 1 (grey)")
    mlps: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = self.num_hidden_layers
        if self.hidden_size < 1 or layers < 1 or not self.layer_types:
            raise SettingsError(
                f"model config: hidden_size {self.hidden_size}, num_hidden_layers {layers} and "
                f"layer_types {list(self.layer_types)} must all be positive"
            )
        check_layers(layers)
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
        check_model(self)

    @property
    def image_tokens(self) -> int:
        """The tokens of an image: the class token and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @property
    def outputs(self) -> int:
        """Outputs of the head: classes, or entries of the vocabulary."""
        return self.num_classes or self.vocab_size

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

    def with_classes(self, num_classes: int) -> "ModelConfig":
        """The same shape with the number of classes that the data has, where the config leaves it
        open; its head is then no longer tied to the embedding. Raises SettingsError when the
        config has fewer."""
        if self.num_classes and self.num_classes < num_classes:
            raise SettingsError(
                f"num_classes = {self.num_classes} of the model's config is smaller than the "
                f"{num_classes} classes of the data; set it to 0 (as many as the data has) or to "
                f"at least {num_classes}"
            )
        return replace(self, num_classes=self.num_classes or num_classes, tie_word_embeddings=False)

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
        leave_out_rare(fields_)
        if "mlp_layer_types" in fields_:
            fields_["mlp_layer_types"] = list(self.mlp_layer_types)
        return {
            "model_type": "longfire",
            **fields_,
            "layer_types": list(self.layer_types),
            **mixers,
            **mlps,
        }


def leave_out_rare(keys: dict[str, Any]) -> None:
    """Remove keys that few models have where they are the default."""
    for known in fields(ModelConfig):
        if known.name in RARE_KEYS and keys[known.name] == known.default:
            del keys[known.name]


def with_tuples(given: Any) -> Any:
    """A mixer's table with tuples for the lists of JSON and TOML, so that equal settings are
    equal."""
    if not isinstance(given, dict):
        return given  # named where it is read
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
