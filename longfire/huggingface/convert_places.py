"""Where a tensor is in a model, and whether a tensor of another model has the same use there."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.huggingface.convert_settings import full_table

# Names of other mixers -> the name in softmax attention: queries read the state, keys and values
# write it.
ATTENTION_NAMES: dict[str, dict[str, str]] = {
    "rwkv7": {"r_proj": "q_proj"},
    "hgrn2": {"i_proj": "v_proj", "i_conv1d": "v_conv1d"},
    "mamba2": {
        "C_proj": "q_proj",
        "B_proj": "k_proj",
        "x_proj": "v_proj",
        "out_proj": "o_proj",
        "C_conv1d": "q_conv1d",
        "B_conv1d": "k_conv1d",
        "x_conv1d": "v_conv1d",
    },
}
# Parts with one meaning in every mixer that has them, by the names of attention: g_proj makes the
# output's gate, b_proj the delta rule's beta. Other parts with the same name in two mixers (a norm,
# a decay) are not the same.
SHARED = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "q_norm",
    "k_norm",
    "q_conv1d",
    "k_conv1d",
    "v_conv1d",
    "g_proj",
    "b_proj",
)
RESIDUAL_NORMS = ("mixer_norm", "mlp_norm", "norm", "embed_norm")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a model.

    layer: None outside the layers. part: mixer, mlp, mixer_norm ...; outside the layers embed,
    norm ... role: of a mixer's part, by attention's names. rest: weight, bias ...
    """

    layer: int | None
    part: str
    role: str = ""
    rest: str = ""

    @classmethod
    def of(cls, name: str, model_config: ModelConfig) -> "Place":
        """The place of a parameter."""
        parts = name.split(".")
        if parts[0] != "layers":
            return cls(None, parts[0], "", ".".join(parts[1:]))
        layer = int(parts[1])
        part = parts[2]
        if part != "mixer":
            return cls(layer, part, "", ".".join(parts[3:]))
        names = ATTENTION_NAMES.get(mixer_of(model_config.layer_types[layer]), {})
        return cls(layer, part, names.get(parts[3], parts[3]), ".".join(parts[4:]))

    def matrix(self) -> "Place":
        """The matrix whose outputs this tensor acts on: a bias, QK-norm or convolution is of no use
        with another one."""
        role, _, kind = self.role.partition("_")
        if kind in ("norm", "conv1d") and role in ("q", "k", "v"):
            return replace(self, role=f"{role}_proj", rest="weight")
        if self.rest == "bias":
            return replace(self, rest="weight")
        return self


def difference(
    place: Place,
    source: ModelConfig,
    target: ModelConfig,
) -> str:
    """Why a tensor of the source would have another use at this place of the target; "" if it would
    have the same."""
    if place.part == "mlp":
        return mlp_difference(source, target)
    if place.part in RESIDUAL_NORMS:
        return norm_difference(place, source, target)
    if place.part == "mixer" and place.layer is not None:
        mixer = mixer_of(target.layer_types[place.layer])
        theirs = mixer_of(source.layer_types[place.layer])
        if mixer != theirs and place.role not in SHARED:
            return f"{theirs}, the source's mixer, means another thing by it"
    if place.part == "shared":
        mixer = place.rest.partition(".")[0]
        if mixer not in map(mixer_of, target.layer_types):
            return f"no layer has {mixer}"
    return ""


def mlp_difference(source: ModelConfig, target: ModelConfig) -> str:
    """Why the matrices of the source's MLPs have no use in the target."""
    if source.mlp != target.mlp:
        return f"the source's MLP is {source.mlp}, this one {target.mlp}"
    if source.intermediate_size != target.intermediate_size:
        return (
            f"the source's MLP has {source.intermediate_size} channels, this one "
            f"{target.intermediate_size}"
        )
    return ""


def norm_difference(
    place: Place,
    source: ModelConfig,
    target: ModelConfig,
) -> str:
    """Why a norm of the source would have another use in the target."""
    if source.norm != target.norm:
        return f"norms of the source are {source.norm}, these {target.norm}"
    is_post_in_one = "post" in (source.block, target.block) and source.block != target.block
    if is_post_in_one and place.part != "embed_norm":
        return f"blocks of the source are {source.block!r}, these {target.block!r}"
    return ""


def absence(
    place: Place,
    source: ModelConfig,
    target: ModelConfig,
) -> str:
    """Why the target has no such tensor as the source has at this place."""
    why = difference(place, source, target)
    if place.part == "mixer" and place.layer is not None:
        name = target.layer_types[place.layer]
        return f"{mixer_of(name)} has none" if why else absence_in_mixer(place, name, target)
    if why:
        return why
    reasons: Mapping[str, str] = {
        "mlp": "mlp_bias = false",
        "head": "the head is the embedding: tie_word_embeddings = true",
        "positions": "learned_positions = false",
    }
    if place.part in reasons:
        return reasons[place.part]
    if place.part in RESIDUAL_NORMS:
        return absence_of_norm(place, target)
    return "the new model has none"


def absence_in_mixer(
    place: Place,
    name: str,
    target: ModelConfig,
) -> str:
    """The same of a part of a mixer. name: of the layer in layer_types."""
    if place.role in ("q_norm", "k_norm") and full_table(target, name).get("qk_norm") is False:
        return f"{name}.qk_norm = false"
    if place.rest == "bias" and place.role in PROJECTIONS:
        return f"{name} has no such bias"
    return f"{name} has none"


def absence_of_norm(place: Place, target: ModelConfig) -> str:
    """The same of a norm of the residual stream."""
    if place.part == "embed_norm" and not target.embed_norm:
        return "embed_norm = false"
    has_mlp_norm = target.mlp != "none" and target.block != "parallel_tied"
    if place.part == "mlp_norm" and not has_mlp_norm:
        return f"mlp = {target.mlp!r} and block = {target.block!r} have no norm before an MLP"
    affine = str(target.norm_affine).lower()
    bias = str(target.norm_bias).lower()
    return f"norm_affine = {affine}, norm_bias = {bias}"
