"""A fresh model begins as its mixer was published: every parameter of every mixer has the distribution that
docs/mixers.md states, that transformers' classes have, and, where fla is installed, that fla's classes have."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from longfire.config.model_config import ModelConfig
from longfire.huggingface.families import config_from_hf, config_to_hf, family_of
from longfire.huggingface.tensors import to_theirs
from longfire.initialise import build
from longfire.mixers import MIXERS

D, LAYERS, VOCABULARY = 128, 2, 512
STEPS = (math.log(0.001), math.log(0.1))


@dataclass(frozen=True)
class Normal:
    std: float = 0.02

    def check(self, x: Tensor) -> None:
        n = x.numel()
        assert abs(x.mean()) < 5 * self.std / n**0.5
        assert x.std() == pytest.approx(self.std, rel=5 / (2 * n) ** 0.5)
        if n > 1000:  # the fourth moment of n numbers is known to sqrt(96 / n)
            assert (x**4).mean() / x.var() ** 2 == pytest.approx(3, abs=5 * (96 / n) ** 0.5)


@dataclass(frozen=True)
class Uniform:
    low: float
    high: float

    def check(self, x: Tensor) -> None:
        width, slack, n = self.high - self.low, 1e-5 * max(abs(self.low), abs(self.high)), x.numel()
        assert self.low - slack <= x.min() and x.max() <= self.high + slack
        assert x.mean() == pytest.approx(
            (self.low + self.high) / 2, abs=5 * width / (12 * n) ** 0.5
        )
        if n > 100:
            assert x.std() == pytest.approx(width / 12**0.5, rel=5 / n**0.5)


@dataclass(frozen=True)
class UniformOf:
    """Uniform once it went through a function, by name."""

    function: str
    low: float
    high: float

    def check(self, x: Tensor) -> None:
        functions = {
            "exp": torch.exp,
            "log softplus": lambda x: torch.nn.functional.softplus(x).log(),
        }
        Uniform(self.low, self.high).check(functions[self.function](x.double()))


@dataclass(frozen=True)
class Constant:
    value: float

    def check(self, x: Tensor) -> None:
        assert (x == self.value).all()


@dataclass(frozen=True)
class Orthogonal:
    gain: float

    def check(self, x: Tensor) -> None:
        singular = torch.linalg.svdvals(x.double())
        torch.testing.assert_close(
            singular, torch.full_like(singular, self.gain), rtol=1e-5, atol=0
        )


@dataclass(frozen=True)
class Formula:
    """What is computed of channel and depth: compared with fla's class, and with its range here."""

    low: float
    high: float

    def check(self, x: Tensor) -> None:
        assert self.low <= x.min() and x.max() <= self.high


ZERO, ONE, MATRIX = Constant(0.0), Constant(1.0), Normal()
CONVOLUTION = Uniform(-0.5, 0.5)  # 4 taps
COMMON = {
    r".*norm(_swish_gate|\d)?\.weight": ONE,
    r".*norm\.bias": ZERO,
    r".*\.mixer\.\w+_conv1d\.bias": ZERO,
    r"embed\.weight|head\.weight|positions\.weight": MATRIX,
    r".*\.mlp\.(up|gate|down)_proj\.weight": MATRIX,
    r".*\.mixer\.[\w.]*(proj|proj\.\d|conv1d)\.weight": MATRIX,
    r".*\.(mixer|mlp)\.[\w.]*proj(\.\d)?\.bias": ZERO,
}
STATE_SPACE = {r".*\.D": ONE}
OWN = {  # mixer -> pattern of a parameter's name -> how it begins, where that is not COMMON
    "linear_attention": {
        r".*\.feature_map_[qk]\.layer\d?\.weight": MATRIX,
        r".*\.feature_map_[qk]\.layer\d?\.bias": ZERO,
    },
    "hgrn2": {r".*lower_bounds": ZERO},
    "mamba": {
        r".*\.conv1d\.(weight|bias)": CONVOLUTION,
        r".*\.dt_proj\.weight": Uniform(-(8**-0.5), 8**-0.5),  # rank 128 / 16
        r".*\.dt_proj\.bias": UniformOf("log softplus", *STEPS),
        r".*\.A_log": Formula(0.0, math.log(16) + 1e-6),
        **STATE_SPACE,
    },
    "mamba2": {
        r".*\.out_proj\.weight": Uniform(-((2 * D * LAYERS) ** -0.5), (2 * D * LAYERS) ** -0.5),
        r".*\.dt_bias": UniformOf("log softplus", *STEPS),
        r".*\.A_log": UniformOf("exp", 1, 16),
        **STATE_SPACE,
    },
    "gated_delta_net": {
        r".*\.dt_bias": UniformOf("log softplus", *STEPS),
        r".*\.A_log": UniformOf("exp", 0, 16),
    },
    "kda": {
        r".*\.dt_bias": UniformOf("log softplus", *STEPS),
        r".*\.A_log": UniformOf("exp", 1, 16),
    },
    "rwkv7": {
        r"embed\.weight": Uniform(-1e-4, 1e-4),
        r"head\.weight": Orthogonal(0.5 * (VOCABULARY / D) ** 0.5),
        r".*\.[rv]_proj\.weight|.*\.mlp\.key\.weight": Orthogonal(1.0),
        r".*\.k_proj\.weight": Orthogonal(0.1),
        r".*\.o_proj\.weight|.*\.mlp\.value\.weight|.*_lora\.lora\.0\.weight": ZERO,
        r".*_lora\.lora\.2\.weight": Orthogonal(0.1),
        r".*_lora\.lora\.2\.bias": Formula(-8.5, 3.0),
        r".*\.g_norm\.weight": Formula(0.5**0.7 - 1e-6, 1.0),
        r".*\.(mixer|mlp)\.x_\w": Formula(0.0, 1.0),
        r".*\.k_k": Formula(0.65, 0.77),
        r".*\.k_a": Formula(1.0199, 1.0201),
        r".*\.r_k": Constant(torch.tensor(-0.04).item()),
    },
}
TABLES = {
    "attention": {"num_heads": 2, "qkv_bias": True},
    "linear_attention": {"num_heads": 2},
    "retention": {"num_heads": 2},
    "gla": {"num_heads": 2, "use_short_conv": True},
    "gsa": {"num_heads": 2},
    "hgrn2": {"expand_ratio": 64},
    "mamba": {},
    "mamba2": {"head_dim": 16},
    "delta_net": {"num_heads": 2},
    "gated_delta_net": {"num_heads": 2, "head_dim": 32},
    "kda": {"num_heads": 2, "head_dim": 32},
    "rwkv7": {"head_dim": 32, "gate_low_rank_dim": 64},
}
BLOCKS = {
    "mamba": {"mlp": "none"},
    "mamba2": {"mlp": "none"},
    "rwkv7": {"mlp": "channel_mix", "norm": "layernorm", "norm_eps": 1e-5, "embed_norm": True},
}


def model_config_of(mixer: str, **changes) -> ModelConfig:
    sizes = {
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "intermediate_size": 256,
    }
    keys = {
        **sizes,
        "layer_types": (mixer,),
        "mixers": {mixer: TABLES[mixer]},
        **BLOCKS.get(mixer, {}),
        **changes,
    }
    return ModelConfig(**keys)


def expected(mixer: str, name: str):
    """The distribution that a parameter has in a model of this mixer."""
    for table in (OWN.get(mixer, {}), COMMON):
        for pattern, distribution in table.items():
            if re.fullmatch(pattern, name):
                return distribution
    raise AssertionError(f"{name} of {mixer} is in no table")


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_begins_as_published(mixer):
    for name, parameter in build(model_config_of(mixer), seed=3).named_parameters():
        try:
            expected(mixer, name).check(parameter.detach())
        except AssertionError as e:
            raise AssertionError(f"{name}: {expected(mixer, name)}") from e


def test_a_hybrid_of_rwkv7_has_a_common_embedding_and_head():
    shape = model_config_of(
        "rwkv7",
        layer_types=("rwkv7", "attention"),
        mixers={m: TABLES[m] for m in ("rwkv7", "attention")},
    )
    model = build(shape, seed=0)
    MATRIX.check(model.embed.weight.detach())
    MATRIX.check(model.head.weight.detach())


def test_what_the_config_asks_for_comes_before_what_was_published():
    model = build(model_config_of("mamba", init_matrices="initializer_range"), seed=0)
    MATRIX.check(model.layers[0].mixer.conv1d.weight.detach())
    model = build(model_config_of("mamba2", init_outputs="zeros"), seed=0)
    assert not model.layers[0].mixer.out_proj.weight.any()
    model = build(model_config_of("rwkv7", init_embedding=0.5, init_head="zeros"), seed=0)
    Normal(0.5).check(model.embed.weight.detach())
    assert not model.head.weight.any()


def test_mamba2_without_rescaling_begins_as_fla_then_begins():
    """rescale_prenorm_residual = false of a config.json: out_proj as every matrix."""
    config = config_to_hf(model_config_of("mamba2")) | {"rescale_prenorm_residual": False}
    model = build(config_from_hf(config, "config.json"), seed=0)
    MATRIX.check(model.layers[1].mixer.out_proj.weight.detach())


def fresh_of_transformers(config: dict, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config)
    )
    return {name: parameter.detach() for name, parameter in made.named_parameters()}


def fresh_of_ours(config: dict) -> dict[str, Tensor]:
    """Under the names of the Hugging Face class."""
    shape = config_from_hf(config, "config.json")
    weights = {name: tensor.detach() for name, tensor in build(shape, seed=11).state_dict().items()}
    return to_theirs(family_of(config, "config.json"), shape, weights)


def compare(ours: dict[str, Tensor], first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """first, second: their parameters for two seeds. What no seed changes is compared exactly, else the distribution."""
    assert ours.keys() <= first.keys(), ours.keys() - first.keys()
    differing = []
    for name, mine in ours.items():
        theirs, other = first[name], second[name]
        assert mine.shape == theirs.shape, name
        if torch.equal(theirs, other):
            alike = torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
        elif mine.dim() == 2 and is_orthogonal(theirs):
            alike = is_orthogonal(mine) and mine.norm().item() == pytest.approx(
                theirs.norm().item(), rel=1e-4
            )
        else:
            alike = same_distribution(mine, theirs)
        if not alike:
            differing.append(f"{name}: {summary(mine)}, theirs {summary(theirs)}")
    assert not differing, "\n".join(differing)


def is_orthogonal(x: Tensor) -> bool:
    singular = torch.linalg.svdvals(x.double())
    return bool(singular.max() - singular.min() < 1e-4 * singular.max())


def same_distribution(a: Tensor, b: Tensor) -> bool:
    """Kolmogorov and Smirnov's two-sample test, at a level of 1e-6 each."""
    a, b = a.flatten().double().sort().values, b.flatten().double().sort().values
    both = torch.cat([a, b])
    apart = (
        (
            torch.searchsorted(a, both, right=True) / len(a)
            - torch.searchsorted(b, both, right=True) / len(b)
        )
        .abs()
        .max()
    )
    return bool(
        apart
        < math.sqrt(-math.log(1e-6 / 2) / 2) * math.sqrt((len(a) + len(b)) / (len(a) * len(b)))
    )


def summary(x: Tensor) -> str:
    return f"mean {x.mean():.4f} std {x.std():.4f} from {x.min():.4f} to {x.max():.4f}"


# Their Mamba and Mamba-2 are no yardstick: fla's are, and the two differ in out_proj and in the convolution.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
}
CLASSES = {
    "llama": {**SIZES, "num_attention_heads": 2, "attention_bias": True, "mlp_bias": True},
    "qwen3": {**SIZES, "num_attention_heads": 2, "head_dim": 64, "num_key_value_heads": 2},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": D, "n_layer": 3, "n_head": 2, "n_positions": 64},
    "nanochat": {**SIZES, "num_hidden_layers": 3, "num_attention_heads": 2},
}


@pytest.mark.parametrize("model_type", CLASSES)
def test_as_the_class_of_transformers(model_type):
    config = {"model_type": model_type, **CLASSES[model_type]}
    compare(
        fresh_of_ours(config), fresh_of_transformers(config, 0), fresh_of_transformers(config, 1)
    )


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fla", "triton", "einops")),
    reason="fla is not installed",
)
def test_as_the_class_of_fla(mixer, tmp_path):
    """A Samba begins as a Mamba: its convolution too."""
    script = Path(__file__).parents[1] / "golden/make_fla_golden.py"
    config = config_to_hf(model_config_of(mixer))
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        script,
        "--fresh",
        tmp_path / "config.json",
        tmp_path / "out.safetensors",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made = load_file(tmp_path / "out.safetensors")
    first, second = (
        {k[2:]: v for k, v in made.items() if k.startswith(seed)} for seed in ("0.", "1.")
    )
    compare(fresh_of_ours(config), first, second)
