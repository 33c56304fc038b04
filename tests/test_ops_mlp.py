"""The MLPs against transformers' own classes, and their activations against their formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GemmaConfig, GPT2Config, LlamaConfig, NanoChatConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.nanochat.modeling_nanochat import NanoChatMLP

from longfire.config.model_config import ModelConfig
from longfire.mlps import MLPS, make_mlp
from longfire.mlps.contract import MLP
from longfire.ops.activations import ACTIVATIONS, squared_relu, squared_relu_reference
from longfire.ops.mlp import GATES, gated, gated_reference


def mlp_of_kind(kind: str, bias: bool = False) -> MLP:
    """The MLP of a model of hidden size 6 and inner size 11."""
    config = ModelConfig(6, 1, ("attention",), intermediate_size=11, mlp=kind, mlp_bias=bias)
    return make_mlp(config, 0)


def assert_same(ours, theirs, size: int) -> None:
    x = torch.randn(2, 7, size, dtype=torch.float64, requires_grad=True)
    got, true, seed = ours(x), theirs(x), torch.randn(2, 7, size, dtype=torch.float64)
    torch.testing.assert_close(got, true)
    torch.testing.assert_close(
        torch.autograd.grad(got, x, seed), torch.autograd.grad(true, x, seed)
    )


def test_the_table_of_mlps_knows_every_activation():
    classes = {name: place.rpartition(":")[2] for name, place in MLPS.places.items()}
    assert [*ACTIVATIONS] == [name for name, of in classes.items() if of == "UngatedMLP"]
    assert [*GATES] == [name for name, of in classes.items() if of == "GatedMLP"]


def llama(act: str) -> LlamaMLP:
    return LlamaMLP(
        LlamaConfig(hidden_size=6, intermediate_size=11, num_attention_heads=1, hidden_act=act)
    )


def gemma() -> GemmaMLP:
    return GemmaMLP(GemmaConfig(hidden_size=6, intermediate_size=11))


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("swiglu", llama("silu")),
        ("geglu_exact", llama("gelu")),
        ("reglu", llama("relu")),
        ("geglu", gemma()),
    ],
)
def test_gated_mlps_are_those_of_llama_and_gemma(kind, theirs):
    ours = mlp_of_kind(kind).double()
    ours.load_state_dict(theirs.double().state_dict())
    assert_same(ours, theirs, 6)


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("gelu", "gelu_new"),
        ("gelu_exact", "gelu"),
        ("relu", "relu"),
        ("silu", "silu"),
        ("relu2", "relu2"),
    ],
)
def test_ungated_mlps_are_gpt2s(kind, theirs):
    theirs = GPT2MLP(11, GPT2Config(n_embd=6, activation_function=theirs)).double().eval()
    ours = mlp_of_kind(kind, bias=True).double()
    pairs = ((ours.up_proj, theirs.c_fc), (ours.down_proj, theirs.c_proj))
    for linear, conv1d in pairs:  # GPT-2 stores its matrices turned
        linear.weight.data, linear.bias.data = (
            conv1d.weight.data.T.clone(),
            conv1d.bias.data.clone(),
        )
    assert_same(ours, theirs, 6)


def test_squared_relu_is_nanochats():
    theirs = NanoChatMLP(NanoChatConfig(hidden_size=6, intermediate_size=11)).double()
    ours = mlp_of_kind("relu2").double()
    ours.load_state_dict(
        {"up_proj.weight": theirs.fc1.weight, "down_proj.weight": theirs.fc2.weight}
    )
    assert_same(ours, theirs, 6)


def by_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def by_erf(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


FORMULAS = {
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": by_tanh,
    "gelu_exact": by_erf,
    "swiglu": lambda x: x / (1 + torch.exp(-x)),
    "geglu": by_tanh,
    "geglu_exact": by_erf,
    "reglu": lambda x: x * (x > 0),
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_activations_are_their_formulas(kind):
    x = torch.linspace(-4, 4, 40, dtype=torch.float64).requires_grad_()
    got, true = {**ACTIVATIONS, **GATES}[kind](x), FORMULAS[kind](x)
    torch.testing.assert_close(got, true)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, true)))


@pytest.mark.parametrize("kind", GATES)
def test_gated_equals_its_reference(kind):
    gate, up, d_y = torch.randn(
        3, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    inputs = (gate.requires_grad_(), up.requires_grad_())
    got, true = gated(*inputs, kind), gated_reference(*inputs, kind)
    torch.testing.assert_close(got, true)
    for a, b in zip(torch.autograd.grad(got, inputs, d_y), torch.autograd.grad(true, inputs, d_y)):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(gated(*inputs, kind), true)
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, kind), inputs)
    assert F.silu is GATES["swiglu"], "the one whose fast form keeps its inputs alone"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_squared_relu_is_its_reference_to_the_bit(dtype):
    """Its gradient too: twice a product rounds as a product with the double."""
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    seed = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    values, gradients = [], []
    for form in (squared_relu, squared_relu_reference):
        y = form(x)
        values.append(y.detach())
        gradients.append(torch.autograd.grad(y, x, seed)[0])
    assert torch.equal(*values) and torch.equal(*gradients)
    assert gradients[0].dtype == dtype and gradients[0].count_nonzero() > 0
