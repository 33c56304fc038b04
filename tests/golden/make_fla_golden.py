"""Golden files of fla's own model classes, made on a CPU: weights, ids, logits, loss and gradients in fp32.

    python tests/golden/make_fla_golden.py                    # writes tests/golden/*.safetensors anew
    python tests/golden/make_fla_golden.py --out DIR gla      # one case, somewhere else
    python tests/golden/make_fla_golden.py --logits-of DIR IDS.safetensors OUT.safetensors

The last form loads an export with AutoModelForCausalLM and writes its logits. All run fla's Triton kernels in Triton's
interpreter (numpy), which needs `interpreted()` first. Made with torch 2.13.0, triton 3.9.0, fla-core and
flash-linear-attention 0.6.0, transformers 5.23.0; each file's metadata says with what. They are the reference that
tests/test_huggingface_families.py and tests/contracts/test_same_loss_curve.py compare with: if a new version moves them by more
than rounding, look for the reason there before committing new ones.
"""

import argparse
import importlib.machinery
import json
import os
import sys
import types
import warnings
from importlib.metadata import version
from pathlib import Path
from zlib import crc32

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 97,
    "fuse_cross_entropy": False,
}
RWKV7_RANKS = {
    "decay_low_rank_dim": 6,
    "gate_low_rank_dim": 7,
    "a_low_rank_dim": 5,
    "v_low_rank_dim": 4,
}
ROWS, TOKENS = 2, 70  # more than the 64 tokens of fla's chunks, and no multiple of anything
# name -> (model_type, what its config says beside TINY; ... where TINY is not said)
CASES = {
    "gla": ("gla", {"num_heads": 2}),
    "gla_conv_gqa": (
        "gla",
        {
            "num_heads": 2,
            "num_kv_heads": 1,
            "use_short_conv": True,
            "feature_map": "swish",
            "expand_k": 1.0,
        },
    ),
    "gla_hybrid": (
        "gla",
        {
            "num_heads": 2,
            "num_hidden_layers": 3,
            "clamp_min": -0.05,
            "use_output_gate": False,
            "tie_word_embeddings": True,
            "attn": {
                "layers": [1],
                "num_heads": 4,
                "num_kv_heads": 2,
                "qkv_bias": True,
                "window_size": 16,
                "rope_theta": 5000.0,
            },
        },
    ),
    "gated_deltanet": ("gated_deltanet", {"num_heads": 2, "head_dim": 16}),
    "gated_deltanet_bare": (
        "gated_deltanet",
        {
            "num_heads": 1,
            "num_v_heads": 2,
            "head_dim": 16,
            "expand_v": 1.0,
            "use_gate": False,
            "use_short_conv": False,
            "allow_neg_eigval": True,
        },
    ),
    "transformer": (
        "transformer",
        {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 20},
    ),
    "transformer_qk_norm": ("transformer", {"num_heads": 2, "qk_norm": True}),
    "gla_7b": (  # the switches of fla-hub/gla-7B, and an output norm without a weight
        "gla",
        {
            "num_heads": 4,
            "num_kv_heads": 1,
            "expand_k": 1.0,
            "feature_map": "relu",
            "use_output_gate": False,
            "elementwise_affine": False,
        },
    ),
    "gated_deltanet_sigmoid": (
        "gated_deltanet",
        {"num_heads": 1, "head_dim": 16, "output_gate_activation": "sigmoid"},
    ),
    "delta_net": ("delta_net", {"num_heads": 2}),
    "delta_net_bare": (
        "delta_net",
        {
            "num_heads": 2,
            "expand_k": 0.5,
            "expand_v": 2.0,
            "use_beta": False,
            "use_gate": True,
            "use_short_conv": False,
            "qk_activation": "elu",
            "qk_norm": "sum",
            "allow_neg_eigval": True,
        },
    ),
    "delta_net_hybrid": (
        "delta_net",
        {
            "num_heads": 2,
            "conv_size": 3,
            "qk_activation": "relu",
            "attn": {"layers": [1], "num_heads": 2, "window_size": 30},
        },
    ),
    "retnet": ("retnet", {"num_heads": 2, "num_hidden_layers": 1}),
    "retnet_gqa": (
        "retnet",
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "expand_k": 0.5,
            "expand_v": 1.0,
            "feature_map": "relu",
            "use_output_gate": False,
            "elementwise_affine": False,
            "attn": {"layers": [0], "num_heads": 2},
        },
    ),
    "linear_attn": (
        "linear_attn",
        {"num_heads": 2, "attn": {"layers": [0], "num_heads": 4, "num_kv_heads": 1}},
    ),
    "linear_attn_hedgehog": (
        "linear_attn",
        {
            "num_heads": 2,
            "num_kv_heads": 1,
            "feature_map": "hedgehog",
            "norm_feature_map": True,
            "elementwise_affine": False,
        },
    ),
    "linear_attn_tied": (
        "linear_attn",
        {
            "num_heads": 2,
            "feature_map": "t2r",
            "tie_feature_map_qk": True,
            "norm_q": True,
            "norm_k": True,
            "expand_v": 2.0,
        },
    ),
    "linear_attn_dpfp": (
        "linear_attn",
        {"num_heads": 2, "num_hidden_layers": 1, "feature_map": "dpfp", "expand_k": 0.5},
    ),
    "kda": ("kda", {"num_heads": 2, "head_dim": 8, "attn": {"layers": [1], "num_heads": 2}}),
    "kda_bounded": (
        "kda",
        {
            "num_heads": 1,
            "num_v_heads": 2,
            "head_dim": 16,
            "expand_v": 0.5,
            "use_short_conv": False,
            "allow_neg_eigval": True,
            "safe_gate": True,
            "lower_bound": -5.0,
        },
    ),
    "hgrn2": ("hgrn2", {"expand_ratio": 16, "num_hidden_layers": 3}),
    "hgrn2_conv_hybrid": (
        "hgrn2",
        {
            "expand_ratio": 8,
            "use_short_conv": True,
            "conv_size": 3,
            "tie_word_embeddings": True,
            "attn": {"layers": [0], "num_heads": 2},
        },
    ),
    "hgrn2_unbounded": (
        "hgrn2",
        {
            "expand_ratio": None,
            "num_heads": 2,
            "use_lower_bound": False,
            "elementwise_affine": False,
        },
    ),
    "mamba2": ("mamba2", {"intermediate_size": ..., "head_dim": 16, "state_size": 12}),
    "mamba2_other": (
        "mamba2",
        {
            "intermediate_size": ...,
            "head_dim": 8,
            "state_size": 16,
            "expand": 1,
            "conv_kernel": 3,
            "use_bias": True,
            "use_conv_bias": False,
            "D_has_hdim": True,
            "norm_before_gate": True,
            "dt_limit": [0.01, 0.2],
            "residual_in_fp32": False,
            "tie_word_embeddings": True,
        },
    ),
    "mamba2_unnormed": (
        "mamba2",
        {"intermediate_size": ..., "head_dim": 32, "state_size": 8, "rmsnorm": False},
    ),
    "gsa": ("gsa", {"num_heads": 2, "num_slots": 12}),
    "gsa_t2r_gqa": (
        "gsa",
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "num_slots": None,
            "exapnd_k": 0.5,
            "use_short_conv": True,
            "conv_size": 3,
            "feature_map": "t2r",
            "gate_logit_normalizer": 4,
        },
    ),
    "gsa_relu_hybrid": (
        "gsa",
        {
            "num_heads": 2,
            "num_slots": 8,
            "feature_map": "relu",
            "tie_word_embeddings": True,
            "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 16},
        },
    ),
    "rwkv7": ("rwkv7", {"head_dim": 16, **RWKV7_RANKS, "use_l2warp": False}),
    "rwkv7_other": (
        "rwkv7",
        {
            "head_dim": None,
            "num_heads": 4,
            **RWKV7_RANKS,
            "norm_first": False,
            "norm_bias": False,
            "fuse_norm": False,
            "tie_word_embeddings": True,
            "use_l2warp": False,
        },
    ),
    "mamba": ("mamba", {"intermediate_size": ..., "state_size": 8}),
    "mamba_other": (
        "mamba",
        {
            "state_size": 5,  # TINY's intermediate_size overrules expand
            "conv_kernel": 3,
            "dt_rank": 3,
            "use_bias": True,
            "use_conv_bias": False,
            "residual_in_fp32": True,
            "tie_word_embeddings": True,
        },
    ),
    "samba": (
        "samba",
        {
            "hidden_size": 16,
            "intermediate_size": ...,
            "state_size": 8,
            "time_step_rank": 2,
            "use_bias": True,
            "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 16},
        },
    ),
}


def interpreted() -> None:
    """Make fla run on a CPU, and import it. Triton's interpreter alone does not do; each shim says what fails without it."""
    assert "triton" not in sys.modules and "fla" not in sys.modules, (
        "kernels are decorated when they are imported"
    )
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.runtime.interpreter as interpreter
    from triton.runtime.autotuner import Autotuner

    # The autotuner times kernels on a GPU driver, and there is none ("0 active drivers"): the first configuration wins.
    Autotuner.do_bench = property(lambda self: lambda kernel, quantiles=None: [0.0, 0.0, 0.0])

    # fla calls `i_t.to(tl.int64)` on loop variables, which are plain ints here. The interpreter copies its module's
    # globals into each kernel's, so its own `range` is the place.
    interpreter.range = lambda *bounds: map(LoopInt, range(*map(int, bounds)))

    # bf16 is kept as uint16 and multiplied as such: garbage without a word. Make it a loud error.
    interpreter.InterpreterBuilder.create_dot = refuses_bf16(
        interpreter.InterpreterBuilder.create_dot
    )

    # KDA's safe gate multiplies with input_precision "bf16x3", which the interpreter refuses to hear of; it would not act on it
    # either, its products are exact.
    options = interpreter.interpreter_builder.options
    known = (*options.allowed_dot_input_precisions, "bf16x3")
    object.__setattr__(options, "allowed_dot_input_precisions", known)

    sys.modules["flash_attn"] = flash_attn_by_torch()  # fla's softmax layer takes nothing else
    os.environ["FLA_USE_COMPILE"] = (
        "0"  # RWKV-7's token mix would go through torch.compile, for a minute and no other result
    )
    warnings.filterwarnings("ignore")
    import fla  # noqa: F401

    late_gather()
    fp32_delta_rule()
    import triton.language as tl

    # RWKV-7's kernels invert a triangle with fp16 products, which costs 2e-4 of the logits: more than a mistake may.
    tl.float16 = tl.float32


def late_gather() -> None:
    """fla binds `gather = tl.gather` when it is imported; the interpreter replaces tl's own name at each launch and misses that one
    ("Did you forget to add @triton.jit ?", from KDA's safe gate)."""
    import triton.language as tl

    early = tl.gather
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.") and getattr(module, "gather", None) is early:
            module.gather = lambda *args, **kwargs: tl.gather(*args, **kwargs)


def fp32_delta_rule() -> None:
    """chunk_delta_rule refuses fp32, for what tf32 does on GPUs; products are exact here. DeltaNet's layer gets what it wraps."""
    import fla.layers.delta_net as layer
    from fla.ops.delta_rule.chunk import ChunkDeltaRuleFunction

    def chunk_delta_rule(
        q, k, v, beta, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel
    ):
        settings = (
            q.shape[-1] ** -0.5,
            initial_state,
            output_final_state,
            use_qk_l2norm_in_kernel,
            cu_seqlens,
            None,
            64,
        )
        return ChunkDeltaRuleFunction.apply(q, k, v, beta, *settings)

    layer.chunk_delta_rule = chunk_delta_rule


class LoopInt(int):
    """An int with `.to(dtype)`; sums and products stay so."""

    def to(self, *_):
        return self


def keeps_type(name: str):
    plain = getattr(int, name)

    def operation(self, other):
        result = plain(self, other)
        return LoopInt(result) if type(result) is int else result

    return operation


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod"):
    setattr(LoopInt, f"__{_name}__", keeps_type(f"__{_name}__"))


def refuses_bf16(create_dot):
    import triton.language as tl

    def checked(self, a, b, *rest):
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            raise TypeError("bf16 products are wrong in Triton's interpreter; use fp32")
        return create_dot(self, a, b, *rest)

    return checked


def flash_attn_by_torch() -> types.ModuleType:
    """A stand-in for flash_attn's one function that is called here: causal, windowed, grouped heads."""
    import torch

    def flash_attn_func(q, k, v, causal=True, window_size=(-1, -1), **_):
        groups, places = q.shape[2] // k.shape[2], torch.arange(q.shape[1])
        back = places[:, None] - places
        seen = (back >= 0) & (back <= window_size[0] if window_size[0] >= 0 else True)
        k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=seen
        ).transpose(1, 2)

    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_func = module.flash_attn_varlen_func = flash_attn_func
    return module


def golden(case: str, folder: Path) -> None:
    """Write a case's file: weight/<name>, grad/<name>, ids, logits, loss; the config.json as metadata."""
    import torch
    from fla import models
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = CASES[case]
    assert models, "without triton, fla imports but is empty"
    torch.manual_seed(crc32(case.encode()))  # of the name: a new case moves no other
    config = AutoConfig.for_model(
        model_type, **{k: v for k, v in {**TINY, **changes}.items() if v is not ...}
    )
    model = AutoModelForCausalLM.from_config(config).float().train()
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):  # first values of 0 and 1 would hide mistakes
            parameter.data += (0.2 if parameter.dim() > 1 else 0.3) * torch.randn_like(parameter)
    ids = torch.randint(0, config.vocab_size, (ROWS, TOKENS))
    out = model(ids, labels=ids)
    out.loss.backward()
    tensors = {f"weight/{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"grad/{name}": p.grad for name, p in model.named_parameters()}
    tensors |= {"ids": ids, "logits": out.logits.detach(), "loss": out.loss.detach()}
    packages = ("torch", "triton", "fla-core", "flash-linear-attention", "transformers")
    metadata = {
        "config": config.to_json_string(use_diff=False),
        "made_with": json.dumps({p: version(p) for p in packages}),
    }
    save_file(tensors, folder / f"{case}.safetensors", metadata)
    print(
        f"{case}: loss {out.loss.item():.6f}, {sum(p.numel() for p in model.parameters())} parameters"
    )


def logits_of(export: Path, ids_file: Path, out_file: Path) -> None:
    """Load an export with AutoModelForCausalLM, as a user would, and write the logits of the ids in a file."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        export, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    assert not wrong, f"not every tensor found its place: {wrong}"
    with torch.no_grad():
        logits = model.train()(
            load_file(ids_file)["ids"]
        ).logits  # train: the chunked kernels, whatever the length
    save_file({"logits": logits.contiguous()}, out_file)


def fresh(config_file: Path, out: Path) -> None:
    """Write the parameters that fla's class of a config.json begins with, for two seeds: `<seed>.<name>`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**json.loads(config_file.read_text()))
    tensors = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tensors |= {
            f"{seed}.{name}": tensor.detach().clone() for name, tensor in model.named_parameters()
        }
    save_file(tensors, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--logits-of", type=Path, nargs=3, metavar=("EXPORT", "IDS", "OUT"))
    parser.add_argument(
        "--fresh", type=Path, nargs=2, metavar=("CONFIG", "OUT"), help="a model as it begins, twice"
    )
    options = parser.parse_args()
    interpreted()
    if options.logits_of:
        logits_of(*options.logits_of)
    if options.fresh:
        fresh(*options.fresh)
    for case in options.cases or ([] if options.logits_of or options.fresh else CASES):
        golden(case, options.out)
