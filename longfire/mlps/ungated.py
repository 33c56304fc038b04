"""MLPs without a gate: relu, relu2, silu, gelu and gelu_exact."""

from torch import Tensor

from longfire.config.model_config import ModelConfig, mlp_of
from longfire.mlps.contract import MLP, WidthConfig
from longfire.ops.activations import ACTIVATIONS
from longfire.ops.linear import Linear


class UngatedMLP(MLP):
    """down(act(up(x))): GPT-2's MLP."""

    roles = {"up_proj": "column", "down_proj": "row"}

    def __init__(self, model: ModelConfig, config: WidthConfig, layer: int) -> None:
        super().__init__(model, config, layer)
        width = config.intermediate_size or model.intermediate_size
        self.activation = ACTIVATIONS[mlp_of(self.name)]
        self.up_proj = Linear(model.hidden_size, width, bias=model.mlp_bias)
        self.down_proj = Linear(width, model.hidden_size, bias=model.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x_BTD)))
