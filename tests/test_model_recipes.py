"""recipes/models/: each shape builds, has the published number of parameters, and can leave as Hugging Face weights."""

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from longfire.config.config_file import read_config
from longfire.config.init_rules import INIT_KEYS
from longfire.config.model_config import ModelConfig, mixer_of
from longfire.config.read_model import read_model_config
from longfire.data.batch import Batch
from longfire.huggingface.families import (
    FAMILIES,
    TRANSFORMERS,
    choose_family,
    config_from_hf,
    config_to_hf,
)
from longfire.huggingface.family_writing import normalised
from longfire.initialise import build
from longfire.loss import loss_sum
from longfire.model import Model

FOLDER = Path(__file__).parents[1] / "recipes/models"
WORDS = 4096  # of the tokenizer where a shape leaves its vocabulary open

# What a name's number does not count of the model that bears it (negative: counts though the model has none): reason, parameters.
UNTIED = "counts one table for input and head: flame untied them in March 2025 and kept the names"
GPT3_POSITIONS = "is GPT-3's, with learned positions for 2048 tokens"
GPT2_POSITIONS = "is GPT-2's, with learned positions for 1024 tokens"
OTHERS, NOTHING_FITS = "is that of other mixers' models of this width", None

# name: parameters, the published number, and where the model does not round to it: why, and by how much.
TABLE = {
    "hybrid-10m": (10_538_624, "10M"),
    "quick-1m": (1_835_008, "1M", "counts a vocabulary of 2,048", 2 * 2048 * 128),
    "quick-2m": (
        3_342_336,
        "2M",
        "counts no embedding, and a head of 2,048 words",
        (4096 + 2048) * 192,
    ),
    "transformer-340m": (373_867_520, "340M", UNTIED, 32000 * 1024),
    "transformer-1b": (1_364_297_728, "1B"),
    "transformer-7b": (7_241_732_096, "7.24B"),  # Mistral-7B's
    "gla-340m": (374_475_776, "340M", UNTIED, 32000 * 1024),
    "gla-1b": (1_365_514_240, "1B"),
    "gla-7b": (6_741_635_072, "7B"),
    "gla-7b-mistral": (7_244_390_400, "7B"),
    "gated-deltanet-340m": (512_272_124, "340M", OTHERS, NOTHING_FITS),
    "gated-deltanet-1b": (1_387_348_732, "1B"),
    "delta-net-340m": (374_362_112, "340M", UNTIED, 32000 * 1024),
    "delta-net-1b": (1_365_677_056, "1B"),
    "hgrn2-340m": (373_916_672, "340M", UNTIED, 32000 * 1024),
    "gsa-340m": (380_158_976, "340M", OTHERS, NOTHING_FITS),
    "gsa-1b": (1_376_880_640, "1B"),
    "mamba-340m": (398_148_608, "340M", OTHERS, NOTHING_FITS),
    "mamba-1b": (1_400_276_992, "1B"),
    "mamba2-340m": (382_387_712, "340M", OTHERS, NOTHING_FITS),
    "mamba2-1b": (1_371_839_488, "1B"),
    "gla-1b-hybrid": (1_327_461_376, "1B"),
    "samba-1b": (1_403_935_488, "1B"),
    "gpt2-s": (124_445_184, "125M", GPT3_POSITIONS, -1024 * 768),
    "gpt2-m": (354_830_336, "355M"),
    "gpt2-l": (774_039_040, "760M", "is that of GPT-3 large: fewer and wider layers", NOTHING_FITS),
    "gpt2-xl": (1_557_622_400, "1.6B"),
    "gpt3-s": (125_231_616, "125M"),
    "gpt3-s-8k": (129_950_208, "125M", GPT3_POSITIONS, 6144 * 768),
    "gpt3-s-rotary": (123_658_752, "125M", GPT3_POSITIONS, -2048 * 768),
    "gpt3-s-rotary-8k": (123_658_752, "125M", GPT3_POSITIONS, -2048 * 768),
    "gpt3-m": (355_878_912, "355M", GPT2_POSITIONS, 1024 * 1024),
    "gpt3-m-8k": (362_170_368, "355M", GPT2_POSITIONS, 7168 * 1024),
    "gpt3-m-rotary": (353_781_760, "355M", GPT2_POSITIONS, -1024 * 1024),
    "gpt3-m-rotary-8k": (353_781_760, "355M", GPT2_POSITIONS, -1024 * 1024),
    "gpt3-l": (760_310_784, "760M"),
    "gpt3-l-8k": (769_747_968, "760M", GPT3_POSITIONS, 6144 * 1536),
    "gpt3-l-rotary": (757_165_056, "760M"),
    "gpt3-l-rotary-8k": (757_165_056, "760M"),
    "gpt3-xl": (1_315_737_600, "1.3B"),
    "gpt3-xl-8k": (1_328_320_512, "1.3B"),
    "gpt3-xl-rotary": (1_311_543_296, "1.3B"),
    "gpt3-xl-rotary-8k": (1_311_543_296, "1.3B"),
    "gpt3-2.7b": (2_651_571_200, "2.7B"),
    "gpt3-2.7b-8k": (2_667_299_840, "2.7B"),
    "gpt3-2.7b-rotary": (2_646_328_320, "2.7B", GPT3_POSITIONS, -2048 * 2560),
    "gpt3-2.7b-rotary-8k": (2_646_328_320, "2.7B", GPT3_POSITIONS, -2048 * 2560),
    "gpt3-2.7b-hdim128": (2_651_571_200, "2.7B"),
    "gpt3-2.7b-hdim128-rotary": (2_646_328_320, "2.7B", GPT3_POSITIONS, -2048 * 2560),
    "gpt3-2.7b-hdim128-rotary-8k": (2_646_328_320, "2.7B", GPT3_POSITIONS, -2048 * 2560),
    "llama-debug": (17_302_784, ""),
    "smollm2-135m": (134_515_008, "135M"),
    "llama-200m": (212_366_336, "200M"),
    "llama-1b": (1_244_227_584, "1B"),
    "llama-3b": (3_426_473_600, "3B"),
    "llama-7b": (6_738_415_616, "6.7B"),
    "llama-7b-2m": (6_738_415_616, "6.7B"),
    "llama-13b": (13_015_864_320, "13.0B"),
    "llama-30b": (32_528_943_616, "32.5B"),
    "llama-65b": (65_285_660_672, "65B"),
}

# No table of huggingface/families*.py has them: GPT-2's blocks with rotary positions on a part of each head.
NO_FAMILY = {name for name in TABLE if name.startswith("gpt3") and "rotary" in name}
SOFTMAX = [
    name
    for name in TABLE
    if name.startswith(("transformer", "gpt", "llama", "quick")) and name not in NO_FAMILY
]
MISSING = [name for name in ("triton", "fla", "einops") if importlib.util.find_spec(name) is None]


@cache
def model_config_of(name: str) -> ModelConfig:
    return read_model_config(FOLDER / f"{name}.json").with_vocabulary(WORDS)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def their_counts(configs: list[dict]) -> list[int]:
    """Parameters of the classes that transformers knows for these configs."""
    counts = []
    for config in configs:
        given = {
            key: value
            for key, value in config.items()
            if key not in ("model_type", "architectures", "dtype")
        }
        with torch.device("meta"):
            of_type = transformers.AutoConfig.for_model(config["model_type"], **given)
            counts.append(count(transformers.AutoModelForCausalLM.from_config(of_type)))
    return counts


def rounds_to(parameters: int, published: str) -> bool:
    """Whether a count is the published one to the digits that this has: 340M is 335M to 345M, 13.0B is 12.95B to 13.05B."""
    number, unit = float(published[:-1]), {"M": 1e6, "B": 1e9}[published[-1]]
    digits = published[:-1]
    last = (
        0.1 ** len(digits.partition(".")[2])
        if "." in digits
        else 10.0 ** (len(digits) - len(digits.rstrip("0")))
    )
    return abs(parameters / unit - number) <= last / 2


def rows() -> dict[str, list[str]]:
    """The table in README.md: name -> its other columns."""
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| `")
    ]
    return {first.strip("`").removesuffix(".json"): rest for first, *rest in cells}


def short(parameters: int) -> str:
    """Three digits: 374M, 1.37B, 17.3M."""
    unit, size = ("B", 1e9) if parameters >= 1e9 else ("M", 1e6)
    return f"{parameters / size:#.3g}".rstrip(".") + unit


def test_every_file_has_its_row():
    files = {path.stem for path in FOLDER.glob("*.json")}
    of_images = {"vit-s-16", "vit-b-16"}  # tests/test_huggingface_vit.py counts them
    assert files == set(TABLE) | of_images, "a file without a row in TABLE, or a row without a file"
    assert files == set(rows()), (
        "a file without a row in recipes/models/README.md, or a row without a file"
    )


@pytest.mark.parametrize("name", TABLE)
def test_parameters_are_counted_and_published(name):
    parameters, published, *lie = TABLE[name]
    with torch.device("meta"):
        assert count(Model(model_config_of(name))) == parameters
    if not lie:
        assert not published or rounds_to(parameters, published)
        return
    _, uncounted = lie
    assert not rounds_to(parameters, published), "the name is right after all"
    assert uncounted is NOTHING_FITS or rounds_to(parameters - uncounted, published)


@pytest.mark.parametrize("name", TABLE)
def test_the_readme_says_what_the_file_has(name):
    mixers, parameters, context, *_ = rows()[name]
    shape = model_config_of(name)
    assert set(mixers.split(" + ")) == set(map(mixer_of, shape.layer_types))
    assert parameters == short(TABLE[name][0])
    if "attention" in mixers and shape.max_position_embeddings:
        assert int(context) == shape.max_position_embeddings


@pytest.mark.parametrize("name", sorted(TABLE.keys() - NO_FAMILY))
def test_it_can_leave_as_a_family_of_hugging_face(name):
    """And comes back as the same shape; their configs cannot say in what type sums are kept, nor how weights began."""
    shape = model_config_of(name)
    config = config_to_hf(shape, length=shape.max_position_embeddings)
    unsaid = {key: getattr(shape, key) for key in ("residual_in_fp32", *INIT_KEYS)}
    there = replace(config_from_hf(config, name), **unsaid)
    assert normalised(there) == normalised(shape)


@pytest.mark.parametrize("name", SOFTMAX)
def test_the_class_of_transformers_has_as_many_parameters(name):
    """A file of one of its families is read by it as it stands, others as they would leave."""
    said = read_config(FOLDER / f"{name}.json")
    config = said if said["model_type"] in TRANSFORMERS else config_to_hf(model_config_of(name))
    assert their_counts([config]) == [TABLE[name][0]]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_the_classes_of_fla_have_as_many_parameters():
    """In a process of its own: importing fla registers its classes for all that comes after. Its softmax model wants flash-attn."""
    recurrent = [
        name
        for name in TABLE
        if "attention" not in map(mixer_of, model_config_of(name).layer_types)
    ]
    types = {name: read_config(FOLDER / f"{name}.json")["model_type"] for name in recurrent}
    names = [
        name
        for name in recurrent
        if types[name] in FAMILIES and FAMILIES[types[name]].package == "fla"
    ]
    code = "import json, sys, fla, test_model_recipes as t; print(t.their_counts(json.load(sys.stdin)))"
    asked = json.dumps([read_config(FOLDER / f"{name}.json") for name in names])
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=asked,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [TABLE[name][0] for name in names]


@pytest.mark.parametrize("name", sorted(NO_FAMILY))
def test_a_shape_without_a_family_leaves_as_our_own_class(name):
    shape = model_config_of(name)
    assert choose_family(shape) == "longfire" and "own class" in rows()[name][-1]
    assert normalised(config_from_hf(config_to_hf(shape), name)) == normalised(shape)


def quick_loss(weights: dict[str, Tensor], ids_BT: Tensor) -> Tensor:
    """Mean loss of quick-2m's mathematics, written out: 4 layers, 3 heads of 64, RoPE, squared ReLU, soft cap 15."""

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def heads(x_BTD: Tensor, name: str) -> Tensor:
        return (x_BTD @ weights[name].T).view(*x_BTD.shape[:2], 3, 64).transpose(1, 2)

    T = ids_BT.shape[1] - 1
    angles_TK = torch.arange(T, dtype=torch.float64)[:, None] * 10000 ** (
        -torch.arange(0, 64, 2) / 64
    )
    turns_TK = torch.polar(torch.ones_like(angles_TK), angles_TK)

    def turned(x_BHTK: Tensor) -> Tensor:
        """Channels i and i + 32 are a complex number, turned by its angle."""
        first, second = norm(x_BHTK).split(32, -1)
        z = torch.complex(first, second) * turns_TK
        return torch.cat([z.real, z.imag], -1)

    x_BTD = norm(weights["embed.weight"][ids_BT[:, :-1]])
    for layer in range(4):
        mixer, mlp = f"layers.{layer}.mixer", f"layers.{layer}.mlp"
        h_BTD = norm(x_BTD)
        q, k, v = (heads(h_BTD, f"{mixer}.{name}_proj.weight") for name in "qkv")
        scores = turned(q) @ turned(k).mT / 8
        hidden_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
        o_BHTV = scores.masked_fill(hidden_TT, -torch.inf).softmax(-1) @ v
        x_BTD = x_BTD + o_BHTV.transpose(1, 2).flatten(2) @ weights[f"{mixer}.o_proj.weight"].T
        up = (norm(x_BTD) @ weights[f"{mlp}.up_proj.weight"].T).clamp_min(0) ** 2
        x_BTD = x_BTD + up @ weights[f"{mlp}.down_proj.weight"].T
    logits_BTW = 15 * torch.tanh(norm(x_BTD) @ weights["head.weight"].T / 15)
    return F.cross_entropy(logits_BTW.flatten(0, 1), ids_BT[:, 1:].flatten())


def test_quick_2m_is_its_mathematics():
    """Loss and gradients in float64, of a model whose outputs and head are not zero and whose logits reach the cap."""
    shape = replace(
        read_model_config(FOLDER / "quick-2m.json"), init_outputs=0.05, init_head=1.0
    ).with_vocabulary(53)
    model = build(shape, 0, compute_dtype=torch.float64).double()
    ids_BT = torch.randint(53, (2, 31), generator=torch.Generator().manual_seed(0))
    positions_BT = torch.arange(30).expand(2, 30)
    loss = loss_sum(model, Batch(ids_BT[:, :-1], ids_BT[:, 1:], positions_BT), 16) / 60
    loss.backward()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = quick_loss(weights, ids_BT)
    torch.testing.assert_close(loss, expected)
    for name, gradient in zip(weights, torch.autograd.grad(expected, list(weights.values()))):
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)
    assert model.logits(model(ids_BT)).abs().max() > 10


def test_quick_2m_begins_with_the_loss_of_a_guess():
    """Head zero: every entry of the vocabulary is equally likely."""
    shape = read_model_config(FOLDER / "quick-2m.json").with_vocabulary(2048)
    model = build(shape, 0)
    ids_BT = torch.randint(2048, (1, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], torch.arange(32)[None])
    assert loss_sum(model, batch, 64).item() / 32 == pytest.approx(math.log(2048))
    assert model.embed.weight.detach().std() == pytest.approx(1, abs=0.01)
    bound = math.sqrt(3 / 192)
    weight = model.layers[2].mixer.q_proj.weight.detach()
    assert weight.std() == pytest.approx(192**-0.5, rel=0.01) and weight.abs().max() <= bound
    for output in (model.layers[0].mixer.o_proj, model.layers[3].mlp.down_proj):
        fan_in = output.weight.shape[1]
        assert output.weight.detach().std() == pytest.approx(fan_in**-0.5, rel=0.02)
