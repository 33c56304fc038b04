"""The same loss curve: models trained here by `train_step` follow, for 20 steps from the same weights, transformers' Llama under
torch's AdamW, and a float64 recurrence of GLA and of the gated delta rule under an AdamW, both written here from the papers.

What is compared is the whole step: embedding to fused loss, counting of real tokens, accumulation, clipping, groups of the
optimizer, learning rate.

Tolerance. fp32 rounds by u = 2^-24 = 6e-8; a loss of about 5 nats that went through some 60 roundings in a row is off by
sqrt(60) u * 5 = 2e-6 in the first step. Adam divides each gradient by its own size, so one that is rounding alone moves its
parameter as far as any other; with clipping and growing curvature this multiplies the difference, by less than 50 in 20
steps: 1e-4 nats (5e-7 to 1e-5 were seen). A wrong epsilon, decay, clip or group shows more: the last test says how much.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from sets import slow_unless
from torch import Tensor

from longfire.checkpoint.state import State
from longfire.config.model_config import ModelConfig
from longfire.config.settings import Optimizer, Training
from longfire.data.batch import Batch
from longfire.device import Clock
from longfire.huggingface.families import FAMILIES, config_to_hf
from longfire.huggingface.tensors import to_theirs
from longfire.initialise import build
from longfire.model import Model
from longfire.optim import make_optimizer
from longfire.training.step import train_step

STEPS, ROWS, T, W = 20, 4, 50, 61
RATES = [1e-2 * min((step + 1) / 5, 1.0) for step in range(STEPS)]
TRAINING = Training(max_norm=1.0, loss_chunk_tokens=32)
OPTIMIZER = Optimizer(weight_decay=0.5, beta1=0.9, beta2=0.95, eps=1e-8)
FIRST, TOLERANCE = 1e-5, 1e-4  # nats: in the first step, and in any
CPU = torch.device("cpu")
EPS = 1e-6  # of norms


def model_config_of(mixer: str, **settings) -> ModelConfig:
    return ModelConfig(
        hidden_size=32,
        num_hidden_layers=2,
        layer_types=(mixer,),
        mixers={mixer: settings},
        intermediate_size=40,
        vocab_size=W,
        norm_eps=EPS,
        initializer_range=0.1,
    )


SHAPES = {
    "llama": model_config_of("attention", num_heads=4, num_kv_heads=2),
    "gla": model_config_of("gla", num_heads=2, use_short_conv=True),
    "gated_delta_net": model_config_of("gated_delta_net", num_heads=2, head_dim=8),
}


def batches() -> list[tuple[Tensor, Tensor]]:
    """ids and labels of every step: text of a random grammar (each word has 3 successors), some labels left out unevenly."""
    generator = torch.Generator().manual_seed(1)
    successors = torch.randint(W, (W, 3), generator=generator)
    made = []
    for _ in range(STEPS):
        words = [torch.randint(W, (ROWS,), generator=generator)]
        for _ in range(T):
            words.append(successors[words[-1], torch.randint(3, (ROWS,), generator=generator)])
        text = torch.stack(words, 1)
        labels = text[:, 1:].clone()
        labels[0, : T // 2] = -100
        made.append((text[:, :-1], labels))
    return made


BATCHES = batches()


def ours(model: Model, optimizer: Optimizer = OPTIMIZER) -> list[float]:
    """Losses of train_step, each step in two microbatches with different numbers of real tokens."""
    state, positions = (
        State(model, make_optimizer(model, optimizer, CPU)),
        torch.arange(T).expand(ROWS, T),
    )
    losses = []
    for (ids, labels), rate in zip(BATCHES, RATES):
        microbatches = Batch(ids, labels, positions).split(2)
        losses.append(train_step(state, microbatches, rate, TRAINING, Clock(CPU))["loss"])
    return losses


def weights_of(model: Model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_llama_follows_transformers():
    model = build(SHAPES["llama"], seed=3)
    config = config_to_hf(model.config, bos_id=1, eos_id=2, length=T)
    theirs = (
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
        .float()
        .train()
    )
    assert type(theirs).__name__ == "LlamaForCausalLM"
    theirs.load_state_dict(to_theirs(FAMILIES["llama"], model.config, weights_of(model)))
    parameters = dict(theirs.named_parameters())
    decayed = [p for name, p in parameters.items() if "norm" not in name and "embed" not in name]
    kept = [p for name, p in parameters.items() if "norm" in name or "embed" in name]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.5}, {"params": kept, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses = []
    for (ids, labels), rate in zip(BATCHES, RATES):
        loss = F.cross_entropy(
            theirs(ids).logits.flatten(0, 1), labels.flatten(), ignore_index=-100
        )
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        losses.append(loss.item())
    compare(ours(model), losses)


@pytest.mark.parametrize("mixer", ["gla", pytest.param("gated_delta_net", marks=pytest.mark.slow)])
def test_recurrent_models_follow_a_float64_recurrence(mixer):
    model = build(SHAPES[mixer], seed=3)
    compare_with = by_hand(
        weights_of(model), {"gla": gla, "gated_delta_net": gated_delta_net}[mixer]
    )
    compare(ours(model), compare_with)


def compare(found: list[float], expected: list[float]) -> None:
    difference = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    assert difference[0] <= FIRST, difference
    assert max(difference) <= TOLERANCE, difference
    assert expected[-1] < expected[0] - 1.0, "something was learned on the way"


@pytest.mark.parametrize(
    "change",
    slow_unless(
        lambda change: "beta2" in change,
        [{"weight_decay": 0.4}, {"beta2": 0.96}, {"beta1": 0.91}, {"eps": 1e-5}],
    ),
)
def test_the_curve_would_show_a_mistake(change):
    """Small differences in the optimizer's settings move the curve by far more than the tolerance."""
    right = ours(build(SHAPES["gla"], seed=3))
    wrong = ours(build(SHAPES["gla"], seed=3), replace(OPTIMIZER, **change))
    assert max(abs(a - b) for a, b in zip(right, wrong)) > 5 * TOLERANCE


# ---- from the papers, in float64, a token at a time; p holds the parameters of one place, by the rest of their names


def by_hand(weights: dict[str, Tensor], mixer: Callable) -> list[float]:
    """Losses of 20 steps of AdamW (Loshchilov and Hutter 2019, algorithm 2, decay times the learning rate) with clipping."""
    p = {name: w.double().requires_grad_() for name, w in weights.items()}
    first, second = ({name: torch.zeros_like(w) for name, w in p.items()} for _ in range(2))
    losses = []
    for t, ((ids, labels), rate) in enumerate(zip(BATCHES, RATES), 1):
        chosen = (
            logits(p, ids, mixer).log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        )
        loss = -chosen[labels != -100].mean()
        gradients = dict(zip(p, torch.autograd.grad(loss, list(p.values()))))
        norm = math.sqrt(sum(float(d.square().sum()) for d in gradients.values()))
        with torch.no_grad():
            for name, w in p.items():
                d = gradients[name] * min(1.0, 1.0 / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * d
                second[name] = 0.95 * second[name] + 0.05 * d * d
                if name.endswith("weight") and "norm" not in name and name != "embed.weight":
                    w *= 1 - rate * 0.5
                w -= (
                    rate
                    * (first[name] / (1 - 0.9**t))
                    / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-8)
                )
        losses.append(loss.item())
    return losses


def inside(p: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    return {name.removeprefix(place): w for name, w in p.items() if name.startswith(place)}


def logits(p: dict[str, Tensor], ids: Tensor, mixer: Callable) -> Tensor:
    x = p["embed.weight"][ids]
    for layer in range(2):
        q = inside(p, f"layers.{layer}.")
        x = x + mixer(inside(q, "mixer."), rms(x) * q["mixer_norm.weight"])
        h = rms(x) * q["mlp_norm.weight"]
        gate, up = h @ q["mlp.gate_proj.weight"].T, h @ q["mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ q["mlp.down_proj.weight"].T
    return rms(x) * p["norm.weight"] @ p["head.weight"].T


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def projected(p: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """silu(causal convolution of 4 taps over W x), by heads: (B, T, heads, size)."""
    y = x @ p[f"{name}_proj.weight"].T
    padded = torch.cat([y.new_zeros(len(y), 3, y.shape[-1]), y], 1)
    taps = p[f"{name}_conv1d.weight"][:, 0]
    return silu(sum(padded[:, w : w + T] * taps[:, w] for w in range(4))).unflatten(-1, (heads, -1))


def gla(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Yang 2023, equation 3 and section 4.4, with fla's short convolutions: S_t = diag(a_t) S_{t-1} + k_t v_t^T."""
    q, k, v = (projected(p, name, x, 2) for name in "qkv")
    gate = x @ p["gk_proj.0.weight"].T @ p["gk_proj.1.weight"].T + p["gk_proj.1.bias"]
    a = (gate.sigmoid() ** (1 / 16)).unflatten(-1, (2, -1))
    S, outputs = x.new_zeros(ROWS, 2, k.shape[-1], v.shape[-1]), []
    for t in range(T):
        S = a[:, t, :, :, None] * S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / q.shape[-1] ** 0.5)
    o = rms(torch.stack(outputs, 1)) * p["g_norm_swish_gate.weight"]
    o = o * silu(x @ p["g_proj.weight"].T).unflatten(-1, (2, -1))
    return o.flatten(-2) @ p["o_proj.weight"].T


def gated_delta_net(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Yang 2024, equation 10: S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T (S here transposed)."""
    q, k, v = (projected(p, name, x, 2) for name in "qkv")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    b = (x @ p["b_proj.weight"].T).sigmoid()
    rate = x @ p["a_proj.weight"].T + p["dt_bias"]
    a = (1 + rate.exp()) ** -p["A_log"].exp()  # exp(-exp(A_log) softplus(rate))
    S, outputs = x.new_zeros(ROWS, 2, k.shape[-1], v.shape[-1]), []
    for t in range(T):
        S = a[:, t, :, None, None] * S
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], b[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / q.shape[-1] ** 0.5)
    o = rms(torch.stack(outputs, 1)) * p["o_norm.weight"]
    o = o * silu(x @ p["g_proj.weight"].T).unflatten(-1, (2, -1))
    return o.flatten(-2) @ p["o_proj.weight"].T
