"""The table of docs/mixers.md: every mixer has a row, and its numbers are what the code counts and keeps."""

import json
import re
from dataclasses import fields
from pathlib import Path

import torch

from longfire.config.init_rules import INIT_KEYS, INIT_RULES
from longfire.config.model_config import NO_MLP, ModelConfig
from longfire.config.settings import Optimizer
from longfire.config.strict import read_own_settings
from longfire.mixers import MIXERS
from longfire.mixers.cache import Cache
from longfire.mixers.mixer import Sequence
from longfire.mlps import MLPS

PAGE = Path(__file__).parents[1] / "docs" / "mixers.md"
HIDDEN, TOKENS = 1024, 2048
SETTINGS = {  # of the table: some 4 D^2 numbers a layer where the mixer lets one choose
    "attention": {"num_heads": 16},
    "linear_attention": {"num_heads": 4, "feature_map": "relu"},
    "retention": {"num_heads": 4},
    "gla": {"num_heads": 4},
    "gsa": {"num_heads": 4},
    "hgrn2": {},
    "mamba": {},
    "mamba2": {},
    "delta_net": {"num_heads": 8},
    "gated_delta_net": {"num_heads": 4, "head_dim": 256},
    "kda": {"num_heads": 8, "head_dim": 128},
    "rwkv7": {"head_dim": 64},
}


def counted(name: str) -> dict[str, str]:
    """The columns that the code decides: numbers kept a layer, forward FLOPs a token, which inputs are convolved."""
    model = ModelConfig(HIDDEN, 2, (name,), {name: SETTINGS[name]}, vocab_size=8)
    shape = read_own_settings(MIXERS[name], name, SETTINGS[name], HIDDEN)
    mixer = MIXERS[name](model, shape, 0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    cache, sizes = Cache(), []
    seq = Sequence(torch.arange(2)[None], cache=cache)
    if mixer.whole_model is not None:
        seq.shared |= mixer.whole_model(model, shape).requires_grad_(False)()
    mixer.prepare(seq)
    with torch.no_grad():
        for _ in range(2):
            mixer(torch.randn(1, 2, HIDDEN), seq)
            sizes.append(sum(x.numel() for x in cache.layers[0].values()))
    grows = sizes[1] - sizes[0]
    convolved = [
        n.removesuffix("_conv1d") for n, _ in mixer.named_children() if n.endswith("conv1d")
    ]
    return {
        "state": f"{grows // 2:,} a token" if grows else f"{sizes[0]:,}",
        "MFLOPs": f"{mixer.flops_per_token(TOKENS) / 1e6:.1f}",
        "convolution": ", ".join("x" if n == "conv1d" else n for n in convolved) or "none",
    }


def rows(name: str = "mixers") -> dict[str, list[str]]:
    """First cell -> the cells of each row of a table."""
    table = PAGE.read_text(encoding="utf-8").split(f"<!-- {name} -->")[1].split("<!-- end -->")[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()
    ]
    return {cells[0].strip("`"): cells for cells in lines[2:]}


def test_every_mixer_has_its_row():
    assert list(rows()) == list(MIXERS)


def test_numbers_are_what_the_code_counts():
    wrong = {}
    for name, cells in rows().items():
        true = list(counted(name).values())
        if cells[2:5] != true:
            wrong[name] = (cells[2:5], true)
    assert not wrong


def test_the_page_says_what_the_numbers_are_of():
    text = PAGE.read_text(encoding="utf-8")
    assert re.search(rf"hidden size {HIDDEN:,}", text) and re.search(
        rf"sequences of {TOKENS:,} tokens", text
    )


def test_the_table_of_settings_has_their_defaults():
    defaults = {f.name: f.default for f in fields(ModelConfig)}
    shown = rows("settings")
    assert {name: json.loads(cells[1].strip("`")) for name, cells in shown.items()} == {
        n: defaults[n] for n in shown
    }
    assert {
        *INIT_KEYS,
        "mlp",
        "embed_norm",
        "final_logit_softcapping",
        "use_l2warp",
    } <= shown.keys()


def test_the_tables_of_mlps_and_of_rules_are_whole():
    assert sorted(rows("mlp")) == sorted((*MLPS, NO_MLP))
    assert tuple(rows("init")) == INIT_RULES


def test_every_mixer_says_how_it_begins():
    assert list(rows("fresh")) == list(MIXERS)


def test_every_mixer_says_whether_it_normalises_q_and_k():
    shown = {
        name: text
        for names, (_, text) in rows("qk_norm").items()
        for name in re.findall(r"\w+", names)
    }
    assert sorted(shown) == sorted(MIXERS)
    for name, mixer in MIXERS.items():
        has = "qk_norm" in {f.name for f in fields(mixer.Config)}
        assert ("`qk_norm`" in shown[name]) == has, name


def test_the_roles_of_the_optimizer_are_shown():
    text = PAGE.read_text(encoding="utf-8")
    names = {f.name for f in fields(Optimizer) if f.name.endswith("_lr_scale")}
    assert names == set(re.findall(r"`(\w+_lr_scale)`", text)) and len(names) == 4
