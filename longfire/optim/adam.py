"""Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019), which are torch's own."""

from typing import ClassVar

import torch

from longfire.optim.adam_bfloat16 import AdamBFloat16
from longfire.optim.contract import Group, Needs, OptimizerRule, Role, StateTensor, Update
from longfire.optim.moments import moments

# Where torch's fused Adam(W) kernel exists; elsewhere its foreach form is used.
FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")
MASTER_BYTES = 4  # of an update, which the foreach form makes for all parameters before it adds it
STATE = (
    StateTensor("step", like_parameter=False),
    StateTensor("exp_avg"),
    StateTensor("exp_avg_sq"),
)


class Adam(OptimizerRule):
    """Adam without weight decay. Every number is updated by itself, so parameters may be sharded in
    any way."""

    proven_axes: ClassVar[frozenset[str]] = frozenset(
        {"dp_replicate", "dp_shard", "cp", "tp", "pp"}
    )
    kind: ClassVar[type[torch.optim.Adam]] = torch.optim.Adam

    @property
    def updates(self) -> tuple[Update, ...]:
        if self.settings.momentum_dtype == "bfloat16":
            return (Update("adam", Needs.NUMBERS, moments(self.settings)),)
        temporary = 0.0 if self.settings.fused else MASTER_BYTES
        return (Update("adam", Needs.NUMBERS, STATE, temporary_bytes=temporary),)

    def make(
        self,
        groups: list[Group],
        device: torch.device,
    ) -> torch.optim.Optimizer:
        """Fused where the device can; a loop where the mean of gradients is kept in bfloat16."""
        betas = (self.settings.beta1, self.settings.beta2)
        if self.settings.momentum_dtype == "bfloat16":
            return AdamBFloat16(groups, betas, self.settings.eps)
        return self.kind(
            [dict(group) for group in groups],
            lr=self.settings.lr,
            betas=betas,
            eps=self.settings.eps,
            fused=self.settings.fused and device.type in FUSED_DEVICES,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay.

    Matrices (and an untied head) decay, the rest does not. Weight decay keeps matrices from
    growing; a norm's scale, a bias, a decay rate (`A_log`) or a word's vector has no reason to
    shrink because it was not used.
    """

    decaying: ClassVar[frozenset[Role]] = frozenset({"head", "matrix"})
    kind: ClassVar[type[torch.optim.Adam]] = torch.optim.AdamW
