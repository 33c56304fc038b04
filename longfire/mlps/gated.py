"""Gated MLPs: swiglu, geglu, geglu_exact and reglu."""

from torch import Tensor

from longfire.config.model_config import ModelConfig, mlp_of
from longfire.mlps.contract import MLP, WidthConfig
from longfire.ops.linear import Linear
from longfire.ops.mlp import gated


class GatedMLP(MLP):
    """down(act(gate(x)) * up(x)) (Shazeer 2020); names of Llama."""

    roles = {"gate_proj": "column", "up_proj": "column", "down_proj": "row"}

    def __init__(self, model: ModelConfig, config: WidthConfig, layer: int) -> None:
        super().__init__(model, config, layer)
        width = config.intermediate_size or model.intermediate_size
        self.kind = mlp_of(self.name)
        self.gate_proj = Linear(model.hidden_size, width, bias=model.mlp_bias)
        self.up_proj = Linear(model.hidden_size, width, bias=model.mlp_bias)
        self.down_proj = Linear(width, model.hidden_size, bias=model.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x_BTD), self.up_proj(x_BTD), self.kind))
