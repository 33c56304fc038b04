"""The optimizer and its learning rate."""

from dataclasses import dataclass
from typing import Literal

from longfire.config.settings.declaration import NATURAL, POSITIVE, SHARE, setting

# The shapes of a schedule (training/schedule.py)
ScheduleName = Literal[
    "cosine",
    "linear",
    "wsd",
    "constant",
    "inverse_sqrt",
    "polynomial",
    "step",
    "multistep",
    "plateau",
]


@dataclass(frozen=True)
class Optimizer:
    """Learning rate, betas, weight decay."""

    name: str = setting(
        "AdamW",
        "AdamW, Adam (no weight decay), SGD, LAMB, Adafactor, or one that a file of model.plugins "
        "brings",
    )
    lr: float = setting(3e-4, "peak learning rate", "(0, inf)")
    eps: float = setting(1e-8, "added to the denominator", "(0, inf)")
    beta1: float = setting(0.9, "decay of the mean of gradients", "[0, 1)")
    beta2: float = setting(0.95, "decay of the mean of squared gradients", "[0, 1)")
    weight_decay: float = setting(
        0.1,
        "decoupled weight decay (of SGD: added to the gradient); never on norms, biases, "
        "embeddings",
        NATURAL,
    )
    embedding_lr_scale: float = setting(
        1.0,
        "learning rate of embedding and learned positions as a multiple of lr (of a tied head "
        "too); 0: they do not learn",
        NATURAL,
    )
    head_lr_scale: float = setting(1.0, "the same of a head of its own", NATURAL)
    matrix_lr_scale: float = setting(
        1.0, "the same of the weights of mixers and MLPs: matrices and short convolutions", NATURAL
    )
    other_lr_scale: float = setting(
        1.0, "the same of the rest: norms, biases, decay rates", NATURAL
    )
    fused: bool = setting(True, "torch's fused kernel")
    momentum_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "in which the mean of gradients is kept (beta1; Adafactor's momentum); bfloat16: rounded "
        "to the nearest, 2 bytes of a parameter less, and no fused kernel",
    )
    ema_decay: float = setting(
        0.0,
        "keep a moving average of the weights that decays by this each step, sharded as they are; "
        "0: none (eval.ema decides what it is used for)",
        "[0, 1)",
    )
    options: tuple[str, ...] = setting(
        (),
        "settings that the optimizer has for itself, as name=value: SGD and Adafactor have some "
        "(docs/optimization.md)",
    )


@dataclass(frozen=True)
class LRScheduler:
    """Warm-up and decay of the learning rate."""

    name: ScheduleName = setting(  # noqa: RUF009 (setting makes a field)
        "cosine", "shape after warm-up"
    )
    warmup_steps: int = setting(
        200,
        "warm-up from 0, in steps; a fifth of the run where that is longer than the run, "
        "and with training.max_seconds at most a fifth of the planned steps",
        NATURAL,
    )
    warmup_tokens: int = setting(
        0, "the same in tokens; wins over warmup_steps when not 0", NATURAL
    )
    warmup_shape: Literal["linear", "constant"] = setting(
        "linear", "constant: the peak from the first step on; the shape of `name` begins after it"
    )
    min_lr_ratio: float = setting(
        0.1, "floor as a share of the peak, which no shape goes below", SHARE
    )
    decay_end_step: int = setting(
        0,
        "step at which the decay has come down to the floor, where the rate then stays; 0: the "
        "last step of the run",
        NATURAL,
    )
    decay_shape: Literal["linear", "cosine", "sqrt"] = setting(
        "linear", "wsd: how the decay comes down to the floor; sqrt: by 1 - sqrt(x)"
    )
    decay_ratio: float = setting(0.1, "wsd: share of the whole run that the decay takes", SHARE)
    power: float = setting(
        1.0, "polynomial: the decay comes down by (1 - x) to this power", "(0, inf)"
    )
    timescale_steps: int = setting(
        0,
        "inverse_sqrt: so many steps after the warm-up the rate is the peak / sqrt(2); 0: as many "
        "as the warm-up has, 10000 without one",
        NATURAL,
    )
    gamma: float = setting(
        0.1, "step, multistep, plateau: what the rate is multiplied by each time", "(0, 1)"
    )
    step_size: int = setting(
        10000, "step: the rate is multiplied by gamma every so many steps of the run", POSITIVE
    )
    milestones: tuple[int, ...] = setting(
        (), "multistep: the steps of the run at which the rate is multiplied by gamma"
    )
    patience: int = setting(
        10,
        "plateau: the rate is multiplied by gamma after more validations in a row than this "
        "(eval.interval) without an improvement of the loss",
        NATURAL,
    )
    threshold: float = setting(
        1e-4, "plateau: an improvement is below the lowest loss by this share of it", SHARE
    )
