"""The families of fla whose blocks are not Llama's, Mamba, Mamba-2, Samba and RWKV-7: their names
<-> our names; free of torch. families.py says how to read it."""

from collections.abc import Callable
from dataclasses import replace

from longfire.config.init_rules import INITIALIZER_RANGE
from longfire.config.model_config import PUBLISHED
from longfire.config.own_settings import is_finite
from longfire.huggingface.families_fla import (
    BUFFERS,
    FIXED,
    HYBRID,
    INERT,
    KEYS,
    NAMES,
    PLAIN,
    RATIO,
)
from longfire.huggingface.family import Config, Family, Key, Name, Settings, without

RWKV7_CHANGES: dict[str, Settings] = {
    "norm_eps": {"default": 1e-5},
    "hidden_act": {"default": "sqrelu", "choices": {"sqrelu": "channel_mix"}},
    "use_l2warp": {"default": True},
}


def rank(share: float, grows: int) -> Callable[[Settings], int]:
    """The rank that their layer takes where the config has null: it grows with the width, and with
    the power `grows` of the heads' size."""

    def rank_of(settings: Settings) -> int:
        heads = (settings["rwkv7.head_dim"] / 64) ** grows
        size = share * settings["hidden_size"] ** 0.5 * heads
        return max(32, round(size / 32) * 32)

    return rank_of


def head_size(heads: object, settings: Settings) -> int | None:
    """The size by num_heads, where the config does not have it; None if that is no number of
    heads."""
    if settings["rwkv7.head_dim"]:
        return settings["rwkv7.head_dim"]
    if type(heads) is int and heads > 0:
        return settings["hidden_size"] // heads
    return None


MAMBA_NAMES = (
    Name("backbone.embeddings.", "embed."),
    Name("backbone.layers.{i}.norm.", "layers.{i}.mixer_norm."),
    Name("backbone.layers.{i}.mixer.", "layers.{i}.mixer."),
    Name("backbone.norm_f.", "norm."),
    Name("lm_head.", "head."),
)
MAMBA_KEYS = (
    Key("vocab_size", "vocab_size", 32000),
    Key("initializer_range", "initializer_range", 0.02),
    Key("tie_word_embeddings", "tie_word_embeddings", False),
    Key("hidden_size", "hidden_size", 2048),
    Key("num_hidden_layers", "num_hidden_layers", 48),
    Key("norm_eps", "norm_eps", 1e-5),
    Key(
        "max_position_embeddings",
        "max_position_embeddings",
        None,
        null=0,
    ),  # they let it stand, and do not read it
    Key("use_l2warp", "use_l2warp", False),
)
# How a fresh model begins: longfire begins with what these are by default, and a trained model has
# no use for them.
MAMBA_INERT = (
    "dt_min",
    "dt_max",
    "dt_init_floor",
    "dt_scale",
    "dt_init_scheme",
    "rescale_prenorm_residual",
)
MAMBA_OLDER = {  # of transformers, whose own classes have tensors of the same names
    "layer_norm_epsilon": "norm_eps",
    "time_step_limit": "dt_limit",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
    "time_step_scale": "dt_scale",
    "time_step_init_scheme": "dt_init_scheme",
    "time_step_rank": "dt_rank",
}
INFINITE = {"__float__": "Infinity"}  # as transformers writes it: JSON has none


def channels(settings: Settings) -> int:
    return settings["mamba.intermediate_size"] or 2 * settings["hidden_size"]


def own_channels(size: object, settings: Settings) -> int | None:
    """0 where it is what we take when none is given; None if it is no size."""
    if not is_finite(size):
        return None
    if size == 2 * settings["hidden_size"]:
        return 0
    return int(size)


def expanded_channels(expand: object, settings: Settings) -> int | None:
    """The channels as a multiple of hidden_size."""
    if not is_finite(expand):
        return None
    return own_channels(expand * settings["hidden_size"], settings)


def step_rank(rank: object, settings: Settings) -> int | None:
    if rank == "auto":
        return 0
    if isinstance(rank, bool) or not isinstance(rank, int):
        return None
    if rank == -(-settings["hidden_size"] // 16):
        return 0
    return rank


def written_step_rank(settings: Settings) -> int:
    return settings["mamba.dt_rank"] or -(-settings["hidden_size"] // 16)


def width(times: object, settings: Settings) -> int | None:
    """fla's MLP where the config has its ratio only."""
    if not is_finite(times):
        return None
    size = settings["hidden_size"] * float(times) * 2 / 3
    if not is_finite(size):
        return None
    return 256 * -(-int(size) // 256)


def ratio(settings: Settings) -> float:
    size = settings["intermediate_size"]
    if size == width(4, settings):
        return 4
    return size * 1.5 / settings["hidden_size"]


def odd_layers(layers: int) -> Config:
    """Samba's own."""
    numbers = [i for i in range(1, 18, 2) if i < layers]
    return {"layers": numbers, "num_heads": 18, "num_kv_heads": 18, "window_size": 2048}


def heads_of(settings: Settings) -> int:
    if not settings["mamba2.head_dim"]:
        return 0  # which its own rules refuse
    return settings["hidden_size"] * settings["mamba2.expand"] // settings["mamba2.head_dim"]


def limit(limits: object, place: int) -> float | None:
    """One of their two limits, of which infinity is our 0; None if they are none."""
    if not isinstance(limits, list) or len(limits) != 2:
        return None
    value = 0.0 if limits[place] in (INFINITE, float("inf")) else limits[place]
    if is_finite(value):
        return float(value)
    return None


def dt_limits(settings: Settings) -> list[object]:
    return [settings["mamba2.dt_low"], settings["mamba2.dt_high"] or INFINITE]


SSM_KEYS = (
    Key(
        "expand",
        "mamba.intermediate_size",
        2,
        reads=expanded_channels,
        writes=lambda settings: -(-channels(settings) // settings["hidden_size"]),
    ),
    Key(
        "intermediate_size",
        "mamba.intermediate_size",
        lambda settings: settings["mamba.intermediate_size"],
        reads=own_channels,
        writes=channels,
    ),
    Key("state_size", "mamba.state_size", 16),
    Key("conv_kernel", "mamba.conv_kernel", 4),
    Key("use_bias", "mamba.use_bias", False),
)


OWN_BLOCKS: dict[str, Family] = {
    "mamba": Family(
        architecture="MambaForCausalLM",
        package="fla",
        mixer="mamba",
        keys=(
            *MAMBA_KEYS,
            *SSM_KEYS,
            Key("dt_rank", "mamba.dt_rank", "auto", reads=step_rank, writes=written_step_rank),
            Key("use_conv_bias", "mamba.use_conv_bias", True),
            Key("residual_in_fp32", "residual_in_fp32", False),
        ),
        names=MAMBA_NAMES,
        base="backbone.",
        fixed={"hidden_act": ("silu", "swish")},
        ours={**PLAIN, "mlp": "none"},
        inert=(*INERT, *MAMBA_INERT, "use_associative_scan", "use_mambapy"),
        older=MAMBA_OLDER,
        both_spellings=True,
    ),
    "mamba2": Family(
        architecture="Mamba2ForCausalLM",
        package="fla",
        mixer="mamba2",
        keys=(
            *MAMBA_KEYS,
            Key("expand", "mamba2.expand", 2),
            Key("head_dim", "mamba2.head_dim", 64),
            Key(
                "num_heads",
                "mamba2.head_dim",
                lambda settings: settings["mamba2.head_dim"],
                reads=lambda heads, settings: (
                    settings["mamba2.head_dim"] if heads == heads_of(settings) else None
                ),
                writes=heads_of,
            ),
            Key("state_size", "mamba2.state_size", 128),
            Key("n_groups", "mamba2.n_groups", 1),
            Key("conv_kernel", "mamba2.conv_kernel", 4),
            Key("use_bias", "mamba2.use_bias", False),
            Key("use_conv_bias", "mamba2.use_conv_bias", True),
            Key("rmsnorm", "mamba2.rmsnorm", True),
            Key("norm_before_gate", "mamba2.norm_before_gate", False),
            Key("D_has_hdim", "mamba2.D_has_hdim", False),
            Key(
                "dt_limit",
                "mamba2.dt_low",
                [0.0, INFINITE],
                reads=lambda limits, _: limit(limits, 0),
                writes=dt_limits,
            ),
            Key(
                "dt_limit",
                "mamba2.dt_high",
                [0.0, INFINITE],
                reads=lambda limits, _: limit(limits, 1),
                writes=dt_limits,
            ),
            Key("residual_in_fp32", "residual_in_fp32", True),
            Key(
                "rescale_prenorm_residual",
                "init_outputs",
                True,
                reads=lambda rescaled, _: PUBLISHED if rescaled else INITIALIZER_RANGE,
                writes=lambda settings: settings["init_outputs"] != INITIALIZER_RANGE,
            ),
        ),
        names=(
            Name(
                "backbone.layers.{i}.mixer.in_proj.",
                tuple(f"layers.{{i}}.mixer.{name}_proj." for name in ("z", "x", "B", "C", "dt")),
            ),
            Name(
                "backbone.layers.{i}.mixer.conv1d.",
                tuple(f"layers.{{i}}.mixer.{name}_conv1d." for name in "xBC"),
            ),
            *MAMBA_NAMES,
        ),
        base="backbone.",
        fixed={
            "hidden_act": ("silu", "swish"),
            "rms_norm": (True, None),
        },  # of flame's and transformers' files
        ours={**PLAIN, "mlp": "none"},
        inert=(
            *INERT,
            *(key for key in MAMBA_INERT if key != "rescale_prenorm_residual"),
            "chunk_size",
            "A_init_range",
            "conv_init",
            "dt_rank",
        ),
        older=MAMBA_OLDER,
        both_spellings=True,
    ),
    "samba": Family(
        architecture="SambaForCausalLM",
        package="fla",
        mixer="mamba",
        keys=(
            *(
                key
                for key in KEYS
                if key.theirs not in ("intermediate_size", "norm_eps", "hidden_size")
            ),
            Key("hidden_size", "hidden_size", 2304),
            Key("norm_eps", "norm_eps", 1e-5),
            Key("num_hidden_layers", "num_hidden_layers", 18),
            Key(
                "hidden_ratio",
                "intermediate_size",
                4,
                null=lambda settings: width(4, settings),
                reads=width,
                writes=ratio,
            ),
            *SSM_KEYS,
            Key(
                "time_step_rank",
                "mamba.dt_rank",
                "auto",
                reads=step_rank,
                writes=written_step_rank,
            ),
        ),
        names=(
            Name("backbone.layers.{i}.mixer_norm.", "layers.{i}.mixer_norm."),
            Name("backbone.layers.{i}.mlp_norm.", "layers.{i}.mlp_norm."),
            Name("backbone.layers.{i}.mlp.", "layers.{i}.mlp."),
            *(name for name in MAMBA_NAMES if name.ours != "layers.{i}.mixer_norm."),
        ),
        base="backbone.",
        buffers=BUFFERS,
        layers=replace(HYBRID, default=odd_layers),
        fixed={"attnres_block_size": (None,)},
        ours={**PLAIN, "mamba.use_conv_bias": True},
        inert=(
            *INERT,
            "residual_in_fp32",
            "use_conv_bias",
            "rescale_prenorm_residual",
            "time_step_scale",
            "time_step_min",
            "time_step_max",
            "time_step_init_scheme",
            "time_step_floor",
        ),
    ),
    "rwkv7": Family(
        architecture="RWKV7ForCausalLM",
        package="fla",
        mixer="rwkv7",
        keys=(
            *(replace(key, **RWKV7_CHANGES.get(key.theirs, {})) for key in KEYS),
            Key("num_hidden_layers", "num_hidden_layers", 24),
            Key("norm_first", "embed_norm", True),
            Key("norm_bias", "norm_bias", True),
            Key("head_dim", "rwkv7.head_dim", 64, null=0),
            Key(
                "num_heads",
                "rwkv7.head_dim",
                lambda settings: settings["rwkv7.head_dim"],
                reads=head_size,
                writes=lambda settings: settings["hidden_size"] // settings["rwkv7.head_dim"],
            ),
            Key("decay_low_rank_dim", "rwkv7.decay_low_rank_dim", 64, null=rank(2.5, 1)),
            Key("a_low_rank_dim", "rwkv7.a_low_rank_dim", 64, null=rank(2.5, 1)),
            Key("v_low_rank_dim", "rwkv7.v_low_rank_dim", 16, null=rank(1.7, 1)),
            Key("gate_low_rank_dim", "rwkv7.gate_low_rank_dim", 128, null=rank(5, 0)),
            Key("fuse_norm", "rwkv7.key_norm_eps", True, choices={True: 1e-6, False: 1e-24}),
        ),
        names=(
            Name("model.layers.0.pre_norm.", "embed_norm."),
            Name("model.layers.{i}.ffn_norm.", "layers.{i}.mlp_norm."),
            Name("model.layers.{i}.ffn.", "layers.{i}.mlp."),
            *NAMES,
        ),
        fixed={**FIXED, "attn": (None,)},  # their block cannot hold softmax attention
        ours={
            **without(PLAIN, ["norm_bias", "embed_norm"]),
            "norm": "layernorm",
        },
        inert=(
            *(key for key in INERT if key != "fuse_norm"),
            "value_dim",
        ),  # hidden_size; with another one they cannot be built
        replaced=RATIO,
    ),
}
