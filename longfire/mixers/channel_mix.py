"""RWKV-7's MLP, the one MLP that looks back: at the token before."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig
from longfire.mixers.mixer import Sequence
from longfire.ops.linear import Linear
from longfire.ops.mlp import squared_relu

Initialiser = Callable[[Tensor, torch.Generator], object]


class ChannelMix(nn.Module):
    """W_v relu(W_k m_t)^2 with m_t between x_t and x_{t-1}, channel by channel as x_k says (Peng
    2025, eq. 22 and 23); names of fla.

    It begins as RWKV-LM's: W_v zero, W_k orthogonal, the first channels and the last layers nearer
    to x_{t-1}.
    """

    roles = {"x_k": "replicate", "key": "column", "value": "row"}
    context = ("halo",)
    tokens_from = 1  # processes whose tokens, one's after another's, a row inside is made of (sequence parallel)

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.x_k = nn.Parameter(torch.empty(model.hidden_size))
        self.key = Linear(model.hidden_size, model.intermediate_size, bias=False)
        self.value = Linear(model.intermediate_size, model.hidden_size, bias=False)
        self.left = 1 - layer / model.num_hidden_layers

    @property
    def own_init(self) -> dict[str, Initialiser]:
        return {
            "x_k": lambda x_k, generator: x_k.copy_(share_of_previous(len(x_k), self.left**4)),
            "key.weight": orthogonal(1.0),
            "value.weight": lambda weight, generator: weight.zero_(),
        }

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        return self.feed(x_BTD, self.previous(x_BTD, seq))

    def previous(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        """The token before each."""
        kept = {} if seq.cache is None else seq.cache.kept(self.layer)
        previous_BTD, kept["mlp_previous"] = seq.ops.token_shift(
            x_BTD, before_BD=kept.get("mlp_previous"), documents=seq.documents
        )
        return previous_BTD

    def feed(self, x_BTD: Tensor, previous_BTD: Tensor) -> Tensor:
        """What sees tokens one by one, each beside the one before it."""
        return self.value(squared_relu(self.key(towards(x_BTD, previous_BTD - x_BTD, self.x_k))))


def towards(x_BTD: Tensor, change_BTD: Tensor, share: Tensor) -> Tensor:
    """x and a share of the change, for each channel."""
    return torch.addcmul(x_BTD, change_BTD, share.to(x_BTD.dtype))


def share_of_previous(size: int, power: float) -> Tensor:
    """1 - (i / size)^power for each channel i."""
    return 1 - (torch.arange(size, device="cpu") / size) ** power


def orthogonal(gain: float) -> Initialiser:
    """The initialiser of a matrix with orthogonal rows or columns of length `gain`."""
    return lambda weight, generator: nn.init.orthogonal_(weight, gain, generator)
