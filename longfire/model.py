"""ids -> hidden states -> logits: embedding, blocks of mixer and MLP, norm, head; and how every parameter begins."""

from hashlib import blake2b

import torch
from torch import Tensor, nn

from longfire.mixers import MIXERS
from longfire.mixers.mixer import Mixer, Sequence, read_mixer_shape
from longfire.ops.linear import Linear
from longfire.ops.mlp import GELUMLP, SwiGLU
from longfire.ops.norm import GatedRMSNorm, LayerNorm, RMSNorm
from longfire.ops.short_conv import ShortConv
from longfire.shape import ModelShape

NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
MLPS = {"swiglu": SwiGLU, "gelu": GELUMLP}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): the pre-norm block of Llama and fla."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        name = shape.layer_types[layer]
        mixer_shape = read_mixer_shape(MIXERS[name], name, shape.mixers.get(name, {}), shape.hidden_size)
        norm = NORMS[shape.norm]
        self.mixer_norm = norm(shape.hidden_size, shape.norm_eps)
        self.mixer = MIXERS[name](shape.hidden_size, mixer_shape, layer, shape.norm_eps)
        self.mlp_norm = norm(shape.hidden_size, shape.norm_eps)
        self.mlp = MLPS[shape.mlp](shape.hidden_size, shape.intermediate_size)

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        x_BTD = x_BTD + self.mixer(self.mixer_norm(x_BTD), seq)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Model(nn.Module):
    """A decoder of any mixers. Parameters are fp32 masters; activations have `compute_dtype` from the embedding on.

    The head is apart from `forward`, so that the loss can be fused with it and the logits of a row need never be whole.
    """

    def __init__(self, shape: ModelShape, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        assert shape.vocab_size > 0, "the tokenizer decides an open vocabulary: shape.with_vocabulary(words)"
        self.shape, self.compute_dtype = shape, compute_dtype
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape, layer) for layer in range(shape.num_hidden_layers))
        self.norm = NORMS[shape.norm](shape.hidden_size, shape.norm_eps)
        self.head = Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, ids_BT: Tensor, seq: Sequence | None = None) -> Tensor:
        """Token ids (B, T) -> hidden states (B, T, D) after the last norm; logits are `model.logits(hidden)`."""
        if seq is None:
            seq = Sequence(torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT))
        x_BTD = self.embed(ids_BT).to(self.compute_dtype)
        for block in self.layers:
            x_BTD = block(x_BTD, seq)
        if seq.cache is not None:
            seq.cache.length += ids_BT.shape[1]
        return self.norm(x_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, W) in fp32: for evaluation by eye and generation; training uses loss.py."""
        return self.head(hidden_BTD).float()

    def flops_per_token(self, seq_len: int) -> float:
        """Forward floating-point operations per token of a row of `seq_len`, head included; a training step does 3x.

        Convention: a multiply-add is 2, the masked half of causal attention is not counted, recurrences count as their
        recurrent form (what the mathematics needs, not what a chunked kernel spends); norms and activations count nothing.
        """
        blocks = sum(
            b.mixer.flops_per_token(seq_len) + 2 * sum(p.numel() for p in b.mlp.parameters()) for b in self.layers
        )
        return blocks + 2 * self.shape.hidden_size * self.shape.vocab_size


def build(
    shape: ModelShape, seed: int, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32
) -> Model:
    """A model with fp32 master parameters on `device`, initialised by (seed, name, shape): the same on every layout."""
    with torch.device("meta"):
        model = Model(shape, compute_dtype)
    model.to_empty(device=device)
    if shape.tie_word_embeddings:
        model.head.weight = model.embed.weight  # to_empty gives each module a tensor of its own
    initialise(model, seed)
    return model


def initialise(model: Model, seed: int) -> None:
    """Give every parameter its first value, keyed by (seed, name, global shape) and drawn on the CPU.

    Rules: norms 1, biases 0, matrices, embeddings and convolutions N(0, initializer_range) (fla's and Llama's rule), a
    mixer's own parameters by its `own_init`. Raises AssertionError naming a parameter that no rule visits.
    """
    visited = set()
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter in visited:
                continue  # a tied head begins as the embedding
            name = f"{module_name}.{leaf}"
            first = torch.empty(parameter.shape, dtype=torch.float32)
            fill(first, module, leaf, keyed_generator(seed, name), model.shape.initializer_range)
            with torch.no_grad():
                parameter.copy_(first)
            visited.add(parameter)
    unvisited = [name for name, parameter in model.named_parameters() if parameter not in visited]
    assert not unvisited, f"no initialiser visited {unvisited}"


@torch.no_grad()
def fill(tensor: Tensor, module: nn.Module, leaf: str, generator: torch.Generator, std: float) -> None:
    """The rule for one parameter, by the module that owns it."""
    match module, leaf:
        case Mixer(), _ if leaf in module.own_init:
            module.own_init[leaf](tensor, generator)
        case RMSNorm() | LayerNorm() | GatedRMSNorm(), "weight":
            tensor.fill_(1.0)
        case _, "bias":
            tensor.zero_()
        case Linear() | nn.Embedding() | ShortConv(), "weight":
            tensor.normal_(0.0, std, generator=generator)
        case _:
            raise AssertionError(f"no rule begins {type(module).__name__}.{leaf}: add it to own_init of its mixer")


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """A generator that depends on the seed and the parameter's name only."""
    digest = blake2b(f"{seed}|{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
