"""Exports are read by the transformers versions that people have: the same logits, the same tokens, a BOS where training had one.

Each version is installed into a folder of its own, so these tests are slow; they are skipped where no package can be fetched.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longfire.config.model_config import ModelConfig
from longfire.data.tokenizer import train_tokenizer
from longfire.huggingface.check import KL_NATS, kl
from longfire.huggingface.export import export
from longfire.initialise import build

pytestmark = pytest.mark.slow

VERSIONS = {"4.46.3": (4, 46), "4.57.1": (4, 57)}
ROPE = {"num_heads": 4, "rope_theta": 5e5}
LLAMA3 = {
    **ROPE,
    "rope": "llama3",
    "rope_factor": 8.0,
    "rope_original_length": 16,
    "rope_low_freq_factor": 1.0,
}
YARN = {**ROPE, "rope": "yarn", "rope_factor": 4.0, "rope_original_length": 16}
# name -> (changes of the shape, the version that has its class)
CASES = {
    "llama, another theta": ({"mixers": {"attention": {**ROPE, "num_kv_heads": 2}}}, (4, 46)),
    "llama, llama3": ({"mixers": {"attention": LLAMA3}}, (4, 46)),
    "llama, yarn, tied": ({"mixers": {"attention": YARN}, "tie_word_embeddings": True}, (4, 46)),
    "llama, linear": (
        {"mixers": {"attention": {**ROPE, "rope": "linear", "rope_factor": 4.0}}},
        (4, 46),
    ),
    "mistral, a window": ({"mixers": {"attention": {**ROPE, "window_size": 9}}}, (4, 46)),
    "qwen2": ({"mixers": {"attention": {**ROPE, "qkv_bias": True}}}, (4, 46)),
    "qwen3": ({"mixers": {"attention": {**ROPE, "qk_norm": True}}}, (4, 57)),
    "gpt2": (
        {
            "mixers": {
                "attention": {"num_heads": 4, "rope": "none", "qkv_bias": True, "o_bias": True}
            },
            "norm": "layernorm",
            "mlp": "gelu",
            "mlp_bias": True,
            "learned_positions": True,
        },
        (4, 46),
    ),
}
TEXT = "some words, and some more"
SCRIPT = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(load_file(f"{folder}/../ids.safetensors")["ids"]).logits
    save_file({"logits": logits.contiguous()}, f"{folder}/theirs.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = {"ids": tokenizer(%r)["input_ids"], "eos": model.generation_config.eos_token_id}
    open(f"{folder}/said.json", "w").write(json.dumps(said))
"""


@pytest.fixture(scope="module", params=VERSIONS)
def version(request, tmp_path_factory) -> tuple[tuple[int, int], Path]:
    folder = tmp_path_factory.mktemp("transformers")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        folder,
        f"transformers=={request.param}",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"transformers {request.param} cannot be fetched: {done.stderr.strip()[-200:]}")
    return VERSIONS[request.param], folder


def test_exports_give_the_same_logits_and_tokens(version, tmp_path):
    known, packages = version
    tokenizer = train_tokenizer([TEXT], 300)
    ids_BT = torch.randint(
        tokenizer.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0)
    )
    save_file({"ids": ids_BT}, tmp_path / "ids.safetensors")
    ours = {}
    for name, (changes, since) in CASES.items():
        if since <= known:
            model = build(model_config_of(tokenizer.vocab_size, changes), seed=1)
            export(model, tokenizer, tmp_path / name, adds_bos=True)
            with torch.no_grad():
                ours[name] = model.logits(model(ids_BT))
    command = [sys.executable, "-c", SCRIPT % TEXT, *(str(tmp_path / name) for name in ours)]
    environment = {**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, logits_BTW in ours.items():
        theirs_BTW = load_file(tmp_path / name / "theirs.safetensors")["logits"]
        assert kl(logits_BTW, theirs_BTW) < KL_NATS, name
        said = json.loads((tmp_path / name / "said.json").read_text())
        assert said == {
            "ids": [tokenizer.bos_id, *tokenizer.encode(TEXT)],
            "eos": tokenizer.eos_id,
        }, name


def model_config_of(vocab_size: int, changes: dict) -> ModelConfig:
    return ModelConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "layer_types": ("attention",),
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "vocab_size": vocab_size,
            **changes,
        }
    )
