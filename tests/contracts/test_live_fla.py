"""Promise 9, live: exports load through AutoModelForCausalLM with flash-linear-attention installed, and its own Triton kernels
give our logits. On a CPU they run in Triton's interpreter, some 10 s a model, so this is a slow test; it is skipped where fla
or triton is not installed (`.ci/run` installs both).

fla is never imported here: its kernels are decorated on import, and the interpreter must be on by then. A process of its own,
tests/golden/make_fla_golden.py, loads the export as a user would.
"""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BLOCK_SETTINGS
from golden import read
from safetensors.torch import load_file, save_file

from longfire.config.model_config import ModelConfig
from longfire.data.tokenizer import bytes_tokenizer
from longfire.huggingface.check import KL_NATS, kl
from longfire.huggingface.export import export
from longfire.initialise import build

SCRIPT = Path(__file__).parents[1] / "golden" / "make_fla_golden.py"
MISSING = [name for name in ("triton", "fla", "einops") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

# Every setting that changes what a layer computes is somewhere away from its default.
MIXERS = {
    "gla": {"num_heads": 2},
    "gla, convolutions, grouped heads": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "use_short_conv": True,
        "conv_size": 3,
        "feature_map": "relu",
        "expand_k": 1.0,
        "expand_v": 2.0,
        "clamp_min": -0.3,
    },
    "gated_delta_net": {"num_heads": 2, "head_dim": 16},
    "gated_delta_net, more value heads": {
        "num_heads": 1,
        "num_v_heads": 2,
        "head_dim": 32,
        "expand_v": 1.0,
        "use_gate": False,
        "allow_neg_eigval": True,
    },
    "gated_delta_net, sigmoid": {
        "num_heads": 2,
        "head_dim": 16,
        "output_gate_activation": "sigmoid",
    },
    "delta_net": {"num_heads": 2, "use_gate": True, "qk_activation": "none"},
    "delta_net, no convolutions": {
        "num_heads": 2,
        "use_short_conv": False,
        "use_beta": False,
        "qk_norm": "sum",
        "qk_activation": "elu",
    },
    "retention": {"num_heads": 2},
    "retention, grouped heads": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "feature_map": "gelu",
        "elementwise_affine": False,
    },
    "linear_attention": {"num_heads": 2, "norm_feature_map": True, "feature_map": "elu"},
    "linear_attention, one map for both": {
        "num_heads": 2,
        "feature_map": "hedgehog",
        "tie_feature_map_qk": True,
    },
    "kda": {"num_heads": 2, "head_dim": 8},
    "hgrn2": {"expand_ratio": 16, "use_short_conv": True, "use_lower_bound": False},
    "gsa": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_slots": 12,
        "expand_k": 0.5,
        "feature_map": "t2r",
    },
    "mamba2": {
        "head_dim": 8,
        "state_size": 12,
        "dt_high": 0.3,
        "norm_before_gate": True,
        "D_has_hdim": True,
    },
    "mamba": {"state_size": 5, "intermediate_size": 48, "dt_rank": 3, "use_bias": True},
    "rwkv7": {
        "head_dim": 8,
        "key_norm_eps": 1e-24,
        "decay_low_rank_dim": 6,
        "gate_low_rank_dim": 40,
    },
    "kda, bounded": {
        "num_heads": 1,
        "num_v_heads": 2,
        "head_dim": 16,
        "lower_bound": -5.0,
        "safe_gate": True,
    },
}
HYBRIDS = ("gla", "gated_delta_net", "kda", "hgrn2", "mamba")  # the last is Samba
SOFTMAX = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "qkv_bias": True,
    "window_size": 16,
    "rope_theta": 5000.0,
}


def run(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def model_config_of(case: str, hybrid: bool) -> ModelConfig:
    mixer = case.split(",")[0]
    blocks = (
        {"intermediate_size": 256}
        if (mixer, hybrid) == ("mamba", True)
        else BLOCK_SETTINGS.get(mixer, {})
    )
    shape = ModelConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "layer_types": (mixer,),
            "mixers": {mixer: MIXERS[case]},
            "intermediate_size": 48,
            "vocab_size": 258,
            "initializer_range": 0.2,
            **blocks,
        }
    )
    if not hybrid:
        return shape
    mixers = {**shape.mixers, "attention": SOFTMAX}
    return replace(
        shape,
        num_hidden_layers=3,
        layer_types=(mixer, "attention", mixer),
        mixers=mixers,
        tie_word_embeddings=True,
    )


def in_matrix(case: str, hybrid: bool) -> bool:
    """By default each mixer once, and one hybrid: some 10 s each."""
    return "," in case or (hybrid and case != "gla")


@pytest.mark.parametrize(
    "case, hybrid",
    [
        pytest.param(*pair, marks=[pytest.mark.matrix] * in_matrix(*pair))
        for pair in [*((case, False) for case in MIXERS), *((case, True) for case in HYBRIDS)]
    ],
    ids=lambda value: "hybrid" * value if isinstance(value, bool) else value,
)
def test_an_export_gives_our_logits_in_fla(case, hybrid, tmp_path):
    model = build(model_config_of(case, hybrid), seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                "norm" in name or name.endswith("bias") or not parameter.any()
            ):  # ones and zeros would hide mistakes
                parameter += 0.3 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(name))
                )
    check = export(model, bytes_tokenizer(), tmp_path / "hf")
    assert (check.peer_kl is None and "need CUDA" in check.peer_absent) or torch.cuda.is_available()
    ids_BT = torch.randint(
        258, (2, 70), generator=torch.Generator().manual_seed(0)
    )  # more than a chunk of theirs
    save_file({"ids": ids_BT}, tmp_path / "ids.safetensors")
    run(
        "--logits-of",
        tmp_path / "hf",
        tmp_path / "ids.safetensors",
        tmp_path / "logits.safetensors",
    )
    theirs_BTW = load_file(tmp_path / "logits.safetensors")["logits"]
    with torch.no_grad():
        ours_BTW = model.logits(model(ids_BT))
    assert (
        ours_BTW - theirs_BTW
    ).abs().max() <= 1e-4 * ours_BTW.abs().max()  # some 20 roundings of fp32 in a row
    assert kl(ours_BTW, theirs_BTW) < KL_NATS


def test_the_golden_files_are_still_what_fla_computes(tmp_path):
    """The everyday tests compare with files; here is the class that they were made of, today."""
    run("--out", tmp_path, "gla_conv_gqa", "gated_deltanet")
    for case in ("gla_conv_gqa", "gated_deltanet"):
        kept, today = read(case), read(case, tmp_path)
        assert kept.ids_BT.equal(today.ids_BT)
        assert all(
            today.weights[name].allclose(weight, atol=1e-6) for name, weight in kept.weights.items()
        )
        assert (
            kept.logits_BTW - today.logits_BTW
        ).abs().max() <= 1e-4 * kept.logits_BTW.abs().max()
        for name, gradient in kept.grads.items():
            assert (gradient - today.grads[name]).abs().max() <= 1e-3 * gradient.abs().max(), name
