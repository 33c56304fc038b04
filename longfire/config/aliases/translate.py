"""A spelling and its value -> our settings, or the reason why there is none."""

from collections.abc import Mapping
from dataclasses import fields

from longfire import launch
from longfire.config.aliases.earlier_longfire import EARLIER_LONGFIRE
from longfire.config.aliases.flame_accelerate import FLAME_ACCELERATE
from longfire.config.aliases.flame_torchtitan import FLAME_TORCHTITAN
from longfire.config.aliases.flash_attention import FLASH_ATTENTION
from longfire.config.aliases.meaning import (
    FLOAT16,
    Dropped,
    Old,
    Refused,
    Started,
    WithOthers,
    as_text,
)
from longfire.config.aliases.ring_attention import (
    JAX_POLICIES,
    RING_ATTENTION,
    optimizer_state_kept,
)
from longfire.config.settings import SECTIONS
from longfire.errors import SettingsError

ALIASES: dict[str, Old] = {
    **EARLIER_LONGFIRE,
    **FLAME_ACCELERATE,
    **FLAME_TORCHTITAN,
    **FLASH_ATTENTION,
    **RING_ATTENTION,
}


VALUES: dict[str, dict[str, str]] = {  # our key -> the four systems' words -> ours
    "lr_scheduler.name": {
        "cosine_with_min_lr": "cosine",
        "warmup_stable_decay": "wsd",
        "constant_with_warmup": "constant",
        "linear-warmup": "linear",
        "cosine-warmup": "cosine",
        "cosine-warmup-timm": "cosine",
        "invsqrt": "inverse_sqrt",
        "poly-warmup": "polynomial",
        "multi-step": "multistep",
        "reduce_lr_on_plateau": "plateau",
    },
    "model.kernels": {"slow": "reference"},
    "model.compute_dtype": {
        "bf16": "bfloat16",
        "bf16-mixed": "bfloat16",
        "fp32": "float32",
        "32": "float32",
        "32-true": "float32",
    },
    "optimizer.name": {
        "adamw": "AdamW",
        "adamw_torch": "AdamW",
        "adamw_torch_fused": "AdamW",
        "adamw-apex": "AdamW",
        "adamw-zero": "AdamW",
        "adamw-apex-zero": "AdamW",
        "adamw-apex-distributed": "AdamW",
        "adam": "Adam",
        "sgd": "SGD",
        "lamb": "LAMB",
        "fusedlamb": "LAMB",
        "fusedlamb-ds": "LAMB",
        "adafactor": "Adafactor",
    },
    "training.compile": {"true": "on", "false": "off"},
    "activation_checkpoint.mode": {"full": "block", "selective": "block"},
    "activation_checkpoint.policy": JAX_POLICIES,
}


# Our key -> words for a value that is refused, and the reason
REFUSED_VALUES: dict[str, dict[str, str]] = {
    "model.compute_dtype": dict.fromkeys(
        ("float16", "fp16", "16", "16-mixed", "16-true", "half"), FLOAT16
    ),
}


def translate(
    spelling: str, value: object, where: str, others: Mapping[str, str]
) -> tuple[dict[str, object], str]:
    """{our key: our value} of a known spelling, and a sentence to say once ("" where nothing was
    renamed).

    others: all spellings with their values as text. Raises SettingsError with the
    reason where a spelling is refused.
    """
    old = ALIASES.get(spelling, spelling)
    if isinstance(old, Refused):
        is_harmless = as_text(value).lower() in [harmless.lower() for harmless in old.harmless]
        if is_harmless or (old.accepted is not None and old.accepted(others)):
            return {}, f"{spelling} = {as_text(value)!r} changes nothing here: {old.reason}"
        if old.harmless:
            fix = f"; leave it out or set it to {old.harmless[0]!r}"
        else:
            fix = "; leave it out"
        raise SettingsError(f"{where}: {spelling} = {as_text(value)!r}: {old.reason}{fix}")
    if isinstance(old, Started):
        return {}, agreement(spelling, as_text(value), old, where)
    if isinstance(old, Dropped):
        return {}, f"{spelling} = {as_text(value)!r} sets nothing: {old.reason}"
    if isinstance(old, str):
        meaning: Mapping[str, object] = {old: value}
    elif isinstance(old, WithOthers):
        meaning = old.meaning(as_text(value), others)
    else:
        meaning = old(as_text(value))
    for key, given in meaning.items():
        reason = REFUSED_VALUES.get(key, {}).get(as_text(given))
        if reason:
            raise SettingsError(f"{where}: {spelling} = {as_text(value)!r}: {reason}")
    meaning = {key: VALUES.get(key, {}).get(as_text(v), v) for key, v in meaning.items()}
    if meaning == {spelling: value}:
        return meaning, ""
    if not meaning:
        return meaning, ""
    new = " ".join(f"{key} = {as_text(v)!r}" for key, v in meaning.items())
    link_text = old.link_text if isinstance(old, WithOthers) else "is now"
    return meaning, f"{spelling} = {as_text(value)!r} {link_text} {new}"


def agreement(spelling: str, value: str, old: Started, where: str) -> str:
    """A sentence about a word of a launcher that agrees with what was started. Raises
    SettingsError where it does not."""
    if not launch.agrees(old.word, value):
        raise SettingsError(
            f"{where}: {spelling} = {value!r}, but what was started has {old.word}: "
            f"{launch.started(old.word)}. Processes are started by scripts/train.sh, which takes "
            "this word too, or by torchrun"
        )
    return f"{spelling} = {value!r} is what was started"


def bare_value(spelling: str) -> str:
    """What the flag without a value means, "" if it needs one."""
    old = ALIASES.get(spelling, spelling)
    if isinstance(old, Refused):
        if "false" in old.harmless or "true" in old.harmless:
            return "true"
        return ""
    if isinstance(old, Dropped):
        return old.bare
    if not isinstance(old, str):
        if old is optimizer_state_kept:
            return "true"
        return ""
    section, _, name = old.partition(".")
    field = next(field for field in fields(SECTIONS[section]) if field.name == name)
    if field.type is bool:
        return "true"
    return field.metadata["bare"]
