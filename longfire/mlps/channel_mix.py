"""RWKV-7's MLP, the one MLP that looks back: at the token before."""

import torch
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig
from longfire.mixers.mixer import Initialiser, Sequence
from longfire.mixers.token_lerp import orthogonal, share_of_previous, towards
from longfire.mlps.contract import MLP, WidthConfig
from longfire.ops.activations import squared_relu
from longfire.ops.linear import Linear


class ChannelMix(MLP):
    """W_v relu(W_k m_t)^2 with m_t between x_t and x_{t-1}, channel by channel as x_k says (Peng
    2025, eq. 22 and 23); names of fla.

    It begins as RWKV-LM's: W_v zero, W_k orthogonal, the first channels and the last layers nearer
    to x_{t-1}.
    """

    roles = {"x_k": "replicate", "key": "column", "value": "row"}
    context = ("halo",)

    def __init__(self, model: ModelConfig, config: WidthConfig, layer: int) -> None:
        super().__init__(model, config, layer)
        width = config.intermediate_size or model.intermediate_size
        self.x_k = nn.Parameter(torch.empty(model.hidden_size))
        self.key = Linear(model.hidden_size, width, bias=False)
        self.value = Linear(width, model.hidden_size, bias=False)
        self.left = 1 - layer / model.num_hidden_layers

    @property
    def own_init(self) -> dict[str, Initialiser]:  # type: ignore[override]  # computed, never set
        return {
            "x_k": lambda x_k, generator: x_k.copy_(share_of_previous(len(x_k), self.left**4)),
            "key.weight": orthogonal(1.0),
            "value.weight": lambda weight, generator: weight.zero_(),
        }

    def others(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor]:
        """The token before each."""
        kept = {} if seq.cache is None else seq.cache.kept(self.layer)
        previous_BTD, kept["mlp_previous"] = seq.ops.token_shift(
            x_BTD, before_BD=kept.get("mlp_previous"), documents=seq.documents
        )
        return (previous_BTD,)

    def forward(self, x_BTD: Tensor, previous_BTD: Tensor) -> Tensor:
        return self.value(squared_relu(self.key(towards(x_BTD, previous_BTD - x_BTD, self.x_k))))
