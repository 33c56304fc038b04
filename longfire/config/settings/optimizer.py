"""The optimizer and its learning rate."""

from dataclasses import dataclass
from typing import Literal

from longfire.config.settings.declaration import NATURAL, SHARE, setting


@dataclass(frozen=True)
class Optimizer:
    """Learning rate, betas, weight decay."""

    name: str = setting(
        "AdamW", "AdamW, Adam (no weight decay), or one that a file of model.plugins brings"
    )
    lr: float = setting(3e-4, "peak learning rate", "(0, inf)")
    eps: float = setting(1e-8, "added to the denominator", "(0, inf)")
    beta1: float = setting(0.9, "decay of the mean of gradients", "[0, 1)")
    beta2: float = setting(0.95, "decay of the mean of squared gradients", "[0, 1)")
    weight_decay: float = setting(
        0.1, "decoupled weight decay; never on norms, biases, embeddings", NATURAL
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
    options: tuple[str, ...] = setting(
        (), "settings that the optimizer has for itself, as name=value (AdamW and Adam have none)"
    )


@dataclass(frozen=True)
class LRScheduler:
    """Warm-up and decay of the learning rate."""

    name: Literal["cosine", "linear", "wsd", "constant"] = setting("cosine", "shape after warm-up")
    warmup_steps: int = setting(
        200,
        "linear warm-up from 0, in steps; a fifth of the run where that is longer than the run, "
        "and with training.max_seconds at most a fifth of the planned steps",
        NATURAL,
    )
    warmup_tokens: int = setting(
        0, "the same in tokens; wins over warmup_steps when not 0", NATURAL
    )
    min_lr_ratio: float = setting(0.1, "floor as a share of the peak", SHARE)
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
