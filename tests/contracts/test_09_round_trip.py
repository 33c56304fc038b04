"""Promise 9: the Hugging Face round trip is byte-equal, logits agree (fp32, KL < 1e-10), tokenizer and generation config
included, reloaded and compared before an export is called done."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from golden import read
from safetensors.torch import load_file

from longfire.data.tokenizer import bytes_tokenizer, train_tokenizer
from longfire.errors import CheckpointError
from longfire.huggingface import check as checks
from longfire.huggingface import export as exporting
from longfire.huggingface.check import KL_NATS, kl
from longfire.huggingface.export import export
from longfire.huggingface.families import FAMILIES, choose_family, config_from_hf
from longfire.huggingface.family_writing import normalised
from longfire.huggingface.load import load_model, load_weights, model_of
from longfire.huggingface.tensors import layout, to_ours
from longfire.initialise import build

FAMILY_LAYERS = {
    "llama": ("attention",),
    "gla": ("gla",),
    "gated_deltanet": ("gated_delta_net",),
    "delta_net": ("delta_net",),
    "retnet": ("retention",),
    "linear_attn": ("linear_attention",),
    "kda": ("kda",),
    "hybrid of gla": ("gla", "attention"),
    "hybrid of gated_deltanet": ("gated_delta_net", "attention"),
    "hgrn2": ("hgrn2",),
    "gsa": ("gsa",),
    "mamba2": ("mamba2",),
    "mamba": ("mamba",),
    "samba": ("mamba", "attention"),
    "rwkv7": ("rwkv7",),
    "hybrid of hgrn2": ("hgrn2", "attention"),
}
TEXT = "def f(x):\n    return 'naïve 漢字'  # <eos>"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 20], 280)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILY_LAYERS)
def test_what_is_exported_comes_back_byte_for_byte(family, tied, tokenizer, tiny_model, tmp_path):
    more = {"intermediate_size": 256} if family == "samba" else {}  # what its hidden_ratio can say
    model = tiny_model(
        *FAMILY_LAYERS[family], tie_word_embeddings=tied, vocab_size=tokenizer.vocab_size, **more
    )
    check = export(model, tokenizer, tmp_path / "hf", shard_bytes=30_000)
    assert check.own_kl == 0
    again, words = load_model(tmp_path / "hf")
    assert normalised(again.config) == replace(
        normalised(model.config), max_position_embeddings=2048
    )  # a number where we set no limit
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].view(torch.uint8).equal(theirs[name].view(torch.uint8)) for name in ours)
    assert (again.head.weight is again.embed.weight) == tied
    assert words.encode(TEXT) == tokenizer.encode(TEXT)
    names = {name for file in (tmp_path / "hf").glob("*.safetensors") for name in load_file(file)}
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert (
        names
        == index["weight_map"].keys()
        == layout(FAMILIES[choose_family(model.config)], model.config).keys()
    )
    assert ("lm_head.weight" in names) != tied


@pytest.mark.parametrize(
    "changes",
    [{}, {"window_size": 5}, {"head_dim": 12, "num_kv_heads": 1}],
    ids=["llama", "mistral", "llama, own head size"],
)
def test_transformers_alone_loads_it_and_gives_the_same_logits(
    changes, tokenizer, tiny_model, tmp_path
):
    model = tiny_model(
        "attention",
        vocab_size=tokenizer.vocab_size,
        mixers={"attention": {"num_heads": 4, **changes}},
    )
    check = export(model, tokenizer, tmp_path / "hf")
    assert check.peer_kl is not None and check.peer_kl < KL_NATS
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids_BT = torch.randint(tokenizer.vocab_size, (2, 130))
    with torch.no_grad():
        assert kl(model.logits(model(ids_BT)), theirs(ids_BT).logits) < KL_NATS
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert words(TEXT, split_special_tokens=True)["input_ids"] == tokenizer.encode(TEXT)
    assert (words.bos_token, words.eos_token) == (tokenizer.bos, tokenizer.eos)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    assert generation.pad_token_id == tokenizer.eos_id, (
        "rows of several lengths can be generated together"
    )
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (
        normalised(config_from_hf(json.loads(config.to_json_string()), "")).mixers
        == normalised(model.config).mixers
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_without_norm_parameters_leaves_as_nanochat(tied, tokenizer, tiny_model, tmp_path):
    """With soft cap, squared ReLU, a norm behind the embedding and norms of q and k; its heads turn the other way."""
    model = tiny_model(
        "attention",
        vocab_size=tokenizer.vocab_size,
        mixers={"attention": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True}},
        tie_word_embeddings=tied,
        norm_affine=False,
        embed_norm=True,
        mlp="relu2",
        final_logit_softcapping=3.0,
    )
    check = export(model, tokenizer, tmp_path / "hf")
    assert check.peer_kl is not None and check.peer_kl < KL_NATS and check.own_kl == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert type(theirs) is transformers.NanoChatForCausalLM
    ids_BT = torch.randint(tokenizer.vocab_size, (2, 60))
    with torch.no_grad():
        assert kl(model.logits(model(ids_BT)), theirs(ids_BT).logits) < KL_NATS
    again, _ = load_model(tmp_path / "hf")
    ours, back = model.state_dict(), again.state_dict()
    assert ours.keys() == back.keys() and all(ours[name].equal(back[name]) for name in ours)


def test_their_class_trains_every_word_that_ours_trained(tokenizer, tiny_model, tmp_path):
    """A padding word in config.json would get no gradient in their embedding; with pad = EOS that word would stand still."""
    model = tiny_model("attention", vocab_size=tokenizer.vocab_size)
    export(model, tokenizer, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids_BT = torch.tensor([[5, tokenizer.eos_id, 7, tokenizer.bos_id, 9]])
    theirs(ids_BT, labels=ids_BT).loss.backward()
    moved = theirs.model.embed_tokens.weight.grad.abs().sum(-1) > 0
    assert moved[ids_BT[0, :-1]].all()


def test_what_transformers_saves_comes_back_byte_for_byte(tmp_path):
    """Theirs -> ours -> theirs: the same names, bytes and meaning of the config."""
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        vocab_size=258,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "theirs")
    shape = config_from_hf(json.loads((tmp_path / "theirs" / "config.json").read_text()), "")
    export(
        model_of(shape, load_weights(tmp_path / "theirs", shape)),
        bytes_tokenizer(),
        tmp_path / "ours",
    )
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours")
    )
    assert first.keys() == second.keys()
    assert all(
        first[name].view(torch.uint8).equal(second[name].view(torch.uint8)) for name in first
    )


@pytest.mark.parametrize(
    "case",
    [
        "gla_conv_gqa",
        "gla_hybrid",
        "gated_deltanet",
        "delta_net_bare",
        "retnet_gqa",
        "linear_attn_tied",
        "kda",
    ],
)
def test_weights_of_fla_go_out_as_they_came(case, tmp_path):
    golden = read(case)
    family, shape = FAMILIES[golden.config["model_type"]], config_from_hf(golden.config, case)
    model = model_of(shape, to_ours(family, shape, golden.weights))
    words = bytes_tokenizer()  # of 258 words: the ids of its text do not matter here
    export(model, words, tmp_path / "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == golden.weights.keys()
    assert all(written[name].equal(golden.weights[name]) for name in written)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_exports_say_what_rounding_costs(dtype, tokenizer, tiny_model, tmp_path):
    model = tiny_model("gated_delta_net", "attention", vocab_size=tokenizer.vocab_size)
    check = export(model, tokenizer, tmp_path / "hf", dtype=dtype)
    assert check.own_kl > 0 and "by rounding" in str(check)
    again, _ = load_model(tmp_path / "hf")
    for name, tensor in model.state_dict().items():
        exact = name.endswith(("A_log", "dt_bias"))  # no type may round them
        assert again.state_dict()[name].equal(tensor if exact else tensor.to(dtype).float()), name


def broken_weight(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_logits(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))


def other_tokenizer(folder):
    bytes_tokenizer().save(folder)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (broken_weight, "other bytes"),
        (other_logits, "gives other logits"),
        (other_tokenizer, "AutoTokenizer gives other ids"),
    ],
)
def test_an_export_that_does_not_compare_does_not_appear(
    spoil, message, tokenizer, tiny_model, tmp_path, monkeypatch
):
    """What an earlier export left under the name stays, and nothing else is left behind."""
    model = tiny_model("attention", vocab_size=tokenizer.vocab_size)
    export(model, tokenizer, tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    whole_compare = checks.compare

    def spoiled(model, tokenizer, folder, written):
        spoil(folder)
        return whole_compare(model, tokenizer, folder, written)

    monkeypatch.setattr(exporting, "compare", spoiled)
    with pytest.raises(CheckpointError, match=message):
        export(build(model.config, 1), tokenizer, tmp_path / "hf")
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
