"""The MLPs against transformers' own classes."""

import torch
import torch.nn.functional as F
from transformers import GPT2Config, LlamaConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from longfire.ops.mlp import GELUMLP, SwiGLU, swiglu


def assert_same(ours, theirs, size: int) -> None:
    x = torch.randn(2, 7, size, dtype=torch.float64, requires_grad=True)
    got, true, seed = ours(x), theirs(x), torch.randn(2, 7, size, dtype=torch.float64)
    torch.testing.assert_close(got, true)
    torch.testing.assert_close(torch.autograd.grad(got, x, seed), torch.autograd.grad(true, x, seed))


def test_swiglu_is_llamas():
    theirs = LlamaMLP(LlamaConfig(hidden_size=6, intermediate_size=11, num_attention_heads=1)).double()
    ours = SwiGLU(6, 11).double()
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, 6)


def test_gelu_mlp_is_gpt2s():
    theirs = GPT2MLP(11, GPT2Config(n_embd=6)).double().eval()
    ours = GELUMLP(6, 11, bias=True).double()
    pairs = ((ours.up_proj, theirs.c_fc), (ours.down_proj, theirs.c_proj))
    for linear, conv1d in pairs:  # GPT-2 stores its matrices turned
        linear.weight.data, linear.bias.data = conv1d.weight.data.T.clone(), conv1d.bias.data.clone()
    assert_same(ours, theirs, 6)


def test_swiglu_of_tensors():
    gate, up = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_().unbind()
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
