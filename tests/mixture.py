"""A plugin that brings an MLP: a small mixture of experts with top-1 routing (Fedus 2021, Switch
Transformer), a load-balancing loss of each sequence and counts of the tokens of each expert.

    longfire train recipe.toml --model.plugins mixture.py --model.mlp mixture --model.mixture.experts 4

It is written to be read: every expert computes every token, and a mask keeps one.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig, key
from longfire.mixers.mixer import Initialiser, Observed, positive
from longfire.mlps.contract import MLP


@dataclass(frozen=True)
class MixtureConfig:
    experts: int = key(4, "MLPs of which each token meets one")
    width: int = key(16, "inner channels of an expert")
    balance: float = key(0.01, "weight of the load-balancing loss")

    def check(self, hidden_size: int) -> None:
        positive("mixture", experts=self.experts, width=self.width)


def normal(weight: Tensor, generator: torch.Generator) -> None:
    weight.normal_(0.0, 0.02, generator=generator)


class Mixture(MLP):
    """y_t = p_e(x_t) down_e(relu(up_e(x_t))), where e has the largest probability p of the router.

    Its loss for a sequence is E sum_e f_e P_e (eq. 4 there): f_e is the share of tokens that go to
    expert e, P_e its mean probability. It is 1 where the experts share evenly.
    """

    Config: ClassVar[type] = MixtureConfig
    auxiliary_loss_weight = 0.01
    own_init: ClassVar[dict[str, Initialiser]] = {"router": normal, "up": normal, "down": normal}

    def __init__(self, model: ModelConfig, config: Any, layer: int) -> None:
        super().__init__(model, config, layer)
        experts, width = config.experts, config.width
        self.auxiliary_loss_weight = config.balance
        self.router = nn.Parameter(torch.empty(experts, model.hidden_size))
        self.up = nn.Parameter(torch.empty(experts, width, model.hidden_size))
        self.down = nn.Parameter(torch.empty(experts, model.hidden_size, width))
        self.register_buffer("tokens_E", torch.empty(experts, dtype=torch.int64))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Observed]:
        probabilities_BTE = F.linear(x_BTD, self.router.to(x_BTD.dtype)).float().softmax(-1)
        best_BT = probabilities_BTE.argmax(-1)
        chosen_BTE = F.one_hot(best_BT, self.config.experts)
        up, down = self.up.to(x_BTD.dtype), self.down.to(x_BTD.dtype)
        inner_BTEW = torch.einsum("btd,ewd->btew", x_BTD, up).relu()
        weight_BTE = (chosen_BTE * probabilities_BTE).to(x_BTD.dtype)
        y_BTD = torch.einsum("btew,edw,bte->btd", inner_BTEW, down, weight_BTE)
        shares_BE = chosen_BTE.float().mean(1)
        loss_B = self.config.experts * (shares_BE * probabilities_BTE.mean(1)).sum(-1)
        return y_BTD, Observed(loss_B, chosen_BTE.sum((0, 1)))

    def update(self, statistics: Tensor) -> None:
        self.tokens_E += statistics

    def flops_per_token(self) -> float:
        """The router, and one expert of all."""
        return 2 * (self.router.numel() + self.up[0].numel() + self.down[0].numel())


MLPS = {"mixture": Mixture}
