"""RingAttention's optimizers: `--optimizer.type`, the words of adamw_optimizer and palm_optimizer.

Both may be Adafactor with squares that are kept whole (optax.adafactor with factored=False): palm
always is, adamw where multiply_by_parameter_scale says so.
"""

from collections.abc import Mapping

from longfire.config.aliases.meaning import OFF, Old, Refused, WithOthers
from longfire.config.aliases.numbers import fraction, whole_number
from longfire.errors import SettingsError

TYPE = "optimizer.type"
ADAMW = "optimizer.adamw_optimizer"
PALM = "optimizer.palm_optimizer"
SCALED = f"{ADAMW}.multiply_by_parameter_scale"
# The words of palm_optimizer and their defaults
PALM_DEFAULTS = {
    "lr": "0.01",
    "lr_warmup_steps": "10000",
    "b1": "0.9",
    "b2": "0.99",
    "clip_gradient": "1.0",
    "weight_decay": "1e-4",
    "bf16_momentum": "False",
}
PALM_UNIT_RATE = 0.01  # lr and weight_decay are multiples of these there
PALM_UNIT_DECAY = 1e-4


def floor_of_the_rate(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """The last learning rate, which is a share of the peak here. Raises SettingsError."""
    spelling = "optimizer.adamw_optimizer.lr"
    peak = fraction(spelling, others.get(spelling, others.get("optimizer.lr", "0")))
    if not peak > 0:
        raise SettingsError(
            f"optimizer.adamw_optimizer.end_lr = {value} is a share of the peak here: give "
            f"{spelling} beside it, or lr_scheduler.min_lr_ratio = end_lr / lr"
        )
    return {"lr_scheduler.min_lr_ratio": fraction("end_lr", value) / peak}


def scales_by_parameter(others: Mapping[str, str]) -> bool:
    """Whether a line's adamw is Adafactor."""
    return others.get(SCALED, "false").lower() not in (*OFF, "")


def of_adafactor(momentum: str, exponent: str, decay_scale: str) -> dict[str, object]:
    """optax.adafactor(multiply_by_parameter_scale=True, momentum, decay_rate, factored=False,
    clipping_threshold=None), and weight decay that the scale of a parameter does not change."""
    options = [
        "factored=false",
        "clip_threshold=0",
        f"momentum={momentum}",
        f"decay_exponent={exponent}",
        f"decay_scale={decay_scale}",
    ]
    return {"optimizer.name": "Adafactor", "optimizer.options": options}


def scaled_adamw(others: Mapping[str, str]) -> dict[str, object]:
    """adamw with multiply_by_parameter_scale."""
    momentum = others.get(f"{ADAMW}.b1", "0.9")
    exponent = others.get(f"{ADAMW}.b2", "0.95")
    return of_adafactor(momentum, exponent, "rate")


def palm(others: Mapping[str, str]) -> dict[str, object]:
    """palm: the rate is lr / 0.01 / sqrt(step), and that of the last step of the warm-up before;
    weight decay is weight_decay / 1e-4 times its square. Raises SettingsError."""
    words = {}
    for word, default in PALM_DEFAULTS.items():
        words[word] = others.get(f"{PALM}.{word}", default)
    warmup = max(1, whole_number(f"{PALM}.lr_warmup_steps", words["lr_warmup_steps"]))
    peak = fraction(f"{PALM}.lr", words["lr"]) / PALM_UNIT_RATE / warmup**0.5
    decay = fraction(f"{PALM}.weight_decay", words["weight_decay"]) / PALM_UNIT_DECAY
    return {
        **of_adafactor(words["b1"], words["b2"], "rate_squared"),
        **momentum_type(words["bf16_momentum"]),
        "optimizer.lr": peak,
        "optimizer.weight_decay": decay,
        "training.max_norm": words["clip_gradient"],
        "lr_scheduler.name": "inverse_sqrt",
        "lr_scheduler.warmup_steps": warmup,
        "lr_scheduler.warmup_shape": "constant",
        "lr_scheduler.min_lr_ratio": 0.0,
    }


def optimizer_type(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """`adamw`, `adafactor` and `palm`; palm brings its rate, its decay and their schedule, with the
    words of palm_optimizer. Raises SettingsError."""
    if value == "palm":
        return palm(others)
    if value == "adamw" and scales_by_parameter(others):
        return scaled_adamw(others)
    return {"optimizer.name": value}


def parameter_scale(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """Adafactor with squares that are kept whole, b1 as its momentum and b2 as the exponent of
    their decay."""
    if TYPE in others or not scales_by_parameter(others):
        return {}
    return scaled_adamw(others)


def beta(key: str) -> WithOthers:
    """A decay of AdamW, which multiply_by_parameter_scale reads otherwise."""

    def meaning(value: str, others: Mapping[str, str]) -> dict[str, object]:
        """The same decay; beside multiply_by_parameter_scale an option of Adafactor."""
        return {} if scales_by_parameter(others) else {key: value}

    return WithOthers(meaning)


def momentum_type(value: str) -> dict[str, object]:
    """The mean of gradients in bfloat16, which optax's `mu_dtype` rounds to the nearest."""
    return {"optimizer.momentum_dtype": "float32" if value.lower() in OFF else "bfloat16"}


def word_of_palm(word: str) -> WithOthers:
    """A word that only palm reads."""

    def meaning(value: str, others: Mapping[str, str]) -> dict[str, object]:
        """Read with `optimizer.type = palm`. Raises SettingsError without it."""
        if others.get(TYPE) != "palm":
            raise SettingsError(f"{PALM}.{word} = {value!r} has no effect without {TYPE} = palm")
        return {}

    return WithOthers(meaning)


OPTIMIZER: dict[str, Old] = {
    TYPE: WithOthers(optimizer_type),
    f"{ADAMW}.weight_decay": "optimizer.weight_decay",
    f"{ADAMW}.lr": "optimizer.lr",
    f"{ADAMW}.init_lr": Refused("the warm-up begins at 0, as its own default does", ("0", "0.0")),
    f"{ADAMW}.end_lr": WithOthers(floor_of_the_rate),
    f"{ADAMW}.lr_warmup_steps": "lr_scheduler.warmup_steps",
    f"{ADAMW}.lr_decay_steps": "lr_scheduler.decay_end_step",
    f"{ADAMW}.clip_gradient": "training.max_norm",
    f"{ADAMW}.b1": beta("optimizer.beta1"),
    f"{ADAMW}.b2": beta("optimizer.beta2"),
    f"{ADAMW}.bf16_momentum": momentum_type,
    SCALED: WithOthers(parameter_scale),
    **{f"{PALM}.{word}": word_of_palm(word) for word in PALM_DEFAULTS},
}
