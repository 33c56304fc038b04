"""Mamba-2's norm: of groups of channels, with a gate."""

import torch.nn.functional as F
from torch import Tensor

from longfire.ops.linear import in_fp32
from longfire.ops.norm import RMSNorm, in_fp32_rms


class GroupedGatedRMSNorm(RMSNorm):
    """Mamba-2's: rms_norm(x * silu(gate)) with statistics of each group of channels, or the norm
    first and the gate after it."""

    def __init__(self, size: int, eps: float, groups: int, norm_before_gate: bool) -> None:
        super().__init__(size, eps)
        self.groups = groups
        self.norm_before_gate = norm_before_gate

    # with a gate, which no caller of a plain norm has
    def forward(self, x_BTD: Tensor, gate_BTD: Tensor) -> Tensor:  # type: ignore[override]
        y_BTD = in_fp32(x_BTD)
        gate_BTD = F.silu(in_fp32(gate_BTD))
        y_BTD = y_BTD if self.norm_before_gate else y_BTD * gate_BTD
        y_BTD = self.normalised(y_BTD)
        return (y_BTD * gate_BTD if self.norm_before_gate else y_BTD).to(x_BTD.dtype)

    def normalised(self, y_BTD: Tensor) -> Tensor:
        """y with the statistics of each group, times the weight."""
        if self.groups == 1:
            return in_fp32_rms(y_BTD, self.weight, self.eps)
        y_BTGD = y_BTD.unflatten(-1, (self.groups, -1))
        y_BTD = in_fp32_rms(y_BTGD, None, self.eps).flatten(-2)
        if self.weight is None:
            return y_BTD
        return y_BTD * self.weight
