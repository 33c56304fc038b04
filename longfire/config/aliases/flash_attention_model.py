"""flash-attention's training/: `model.config.KEY=value`, the keys of GPT2Config and its own."""

from collections.abc import Callable, Mapping

from longfire.config.aliases.meaning import OFF, Dropped, Old, Refused, WithOthers
from longfire.errors import SettingsError

CONFIG = "model.config"
KERNELS = Dropped("kernels are chosen by the device; model.kernels names others")


def key_of_model(key: str) -> Callable[[str], dict[str, object]]:
    """A key of [model]."""

    def meaning(value: str) -> dict[str, object]:
        """A key of the model."""
        return {key: value}

    return meaning


def width(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """`hidden_size`, and four times as much in the MLP where n_inner is not given. Raises
    SettingsError."""
    if not value.isdigit():
        raise SettingsError(f"{CONFIG}.n_embd = {value!r} must be a whole number")
    meanings: dict[str, object] = {"model.hidden_size": value}
    if f"{CONFIG}.n_inner" not in others:
        meanings["model.intermediate_size"] = 4 * int(value)
    return meanings


def rotated_share(value: str) -> dict[str, object]:
    """The share of each head that is rotated; learned positions are left out beside it. Raises
    SettingsError."""
    try:
        share = float(value)
    except ValueError:
        raise SettingsError(f"{CONFIG}.rotary_emb_fraction = {value!r} must be a number") from None
    if not share:
        return {}
    return {
        "model.attention.rope": "default",
        "model.attention.rotary_fraction": value,
        "model.learned_positions": "false",
    }


def recomputed_mlp(value: str) -> dict[str, object]:
    """How much of an MLP is computed again: 0 nothing, 1 or 2 the MLP; a list has a level for each
    block. Raises SettingsError."""
    levels = [level.strip() for level in value.strip("[]()").split(",")]
    if not set(levels) <= {"0", "1", "2"}:
        raise SettingsError(f"{CONFIG}.mlp_checkpoint_lvl = {value!r}: levels are 0, 1 and 2")
    blocks = [str(block) for block, level in enumerate(levels) if level != "0"]
    if not blocks:
        return {}
    if len(levels) == 1:
        return {"activation_checkpoint.mode": "mlp"}
    return {"activation_checkpoint.mode": "mlp", "activation_checkpoint.layers": ",".join(blocks)}


MODEL_CONFIG: dict[str, Old] = {
    f"{CONFIG}.n_embd": WithOthers(width),
    f"{CONFIG}.n_inner": key_of_model("model.intermediate_size"),
    f"{CONFIG}.n_head": key_of_model("model.attention.num_heads"),
    f"{CONFIG}.n_layer": key_of_model("model.num_hidden_layers"),
    f"{CONFIG}.n_positions": key_of_model("model.max_position_embeddings"),
    f"{CONFIG}.vocab_size": key_of_model("model.vocab_size"),
    f"{CONFIG}.initializer_range": key_of_model("model.initializer_range"),
    f"{CONFIG}.layer_norm_epsilon": key_of_model("model.norm_eps"),
    f"{CONFIG}.resid_pdrop": key_of_model("model.dropout"),
    f"{CONFIG}.embd_pdrop": key_of_model("model.embed_dropout"),
    f"{CONFIG}.attn_pdrop": key_of_model("model.attention.dropout"),
    f"{CONFIG}.residual_in_fp32": key_of_model("model.residual_in_fp32"),
    f"{CONFIG}.pad_vocab_size_multiple": key_of_model("model.pad_vocab_multiple"),
    f"{CONFIG}.scale_attn_by_inverse_layer_idx": key_of_model(
        "model.attention.scale_by_inverse_layer"
    ),
    f"{CONFIG}.rotary_emb_fraction": rotated_share,
    f"{CONFIG}.mlp_checkpoint_lvl": recomputed_mlp,
    f"{CONFIG}.reorder_and_upcast_attn": Refused(
        "scores of attention are float32 in any case", OFF
    ),
    f"{CONFIG}.use_flash_attn": KERNELS,
    f"{CONFIG}.fused_mlp": KERNELS,
    f"{CONFIG}.fused_bias_fc": KERNELS,
    f"{CONFIG}.fused_dropout_add_ln": KERNELS,
}
