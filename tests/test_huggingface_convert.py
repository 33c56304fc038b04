"""Another architecture from pretrained weights: what is copied, what is reshaped, what stays fresh, and that it is said."""

import json
from dataclasses import replace

import pytest
import torch
from logged import logged_to

from longfire.cli import main
from longfire.config.own_keys import read_own_keys
from longfire.config.settings import Distillation as Wanted
from longfire.data.tokenizer import train_tokenizer
from longfire.errors import SettingsError
from longfire.huggingface.convert import convert, convert_weights, target_config
from longfire.huggingface.convert_report import TABLE, ranges
from longfire.huggingface.export import export
from longfire.huggingface.load import load_model
from longfire.initialise import build
from longfire.mixers.mixer import Sequence
from longfire.training.distillation import Distillation

SOURCE = {"num_heads": 4, "num_kv_heads": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n" * 20], 270)


@pytest.fixture
def source(tiny_model, tokenizer):
    return tiny_model(
        "attention",
        num_hidden_layers=3,
        vocab_size=tokenizer.vocab_size,
        mixers={"attention": SOURCE},
    )


# Of each family what Llama has otherwise; all with scalars that are no default.
FAMILIES = {
    "llama": {
        "norm_eps": 1e-5,
        "mixers": {"attention": {**SOURCE, "rope_theta": 5e5}},
    },
    "qwen2": {
        "norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "mixers": {"attention": {**SOURCE, "qkv_bias": True, "rope_theta": 1e6, "window_size": 7}},
    },
    "qwen3": {
        "norm_eps": 1e-5,
        "final_logit_softcapping": 5.0,
        "mixers": {
            "attention": {
                **SOURCE,
                "qk_norm": True,
                "head_dim": 16,
                "rope": "yarn",
                "rope_factor": 4.0,
                "rope_original_length": 16,
            }
        },
    },
    "gpt2": {
        "norm_eps": 1e-5,
        "norm": "layernorm",
        "mlp": "gelu",
        "mlp_bias": True,
        "learned_positions": True,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "mixers": {
            "attention": {
                "num_heads": 4,
                "rope": "none",
                "qkv_bias": True,
                "o_bias": True,
                "scale_by_inverse_layer": True,
            }
        },
    },
}
GLA = {"num_heads": 4, "num_kv_heads": 2, "expand_k": 1.0}
SHORT = {"hidden_size": 32, "num_hidden_layers": 3, "layer_types": ["gla"], "gla": GLA}
OF_FLA = {
    "model_type": "gla",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "expand_k": 1.0,
}
HYBRID = {**SHORT, "layer_types": ["gla", "attention", "gla"], "attention": {"num_heads": 4}}
OTHER_PARTS = {
    **SHORT,
    "mlp": "reglu",
    "mlp_bias": False,
    "norm": "layernorm",
    "norm_bias": False,
    "block": "parallel",
    "learned_positions": False,
    "tie_word_embeddings": True,
}


@pytest.fixture(params=FAMILIES)
def of_family(request, tiny_model):
    return tiny_model("attention", num_hidden_layers=3, **FAMILIES[request.param])


def converted(source, config, tmp_path, kept=()):
    """The new model, what became of each tensor, and of the source's that are left."""
    path = tmp_path / "target.json"
    path.write_text(json.dumps(config))
    _, shape = target_config(path, source.config, kept)
    return convert_weights(source, shape, 0)


def target(shape_of_source, **gla):
    config = shape_of_source.to_dict()
    gla = {"num_heads": 4, "num_kv_heads": 2, "expand_k": 1.0, "expand_v": 1.0, **gla}
    return {
        **{k: v for k, v in config.items() if k != "attention"},
        "layer_types": ["gla"],
        "gla": gla,
        "vocab_size": 0,
    }


@pytest.fixture
def folder(source, tokenizer, tmp_path):
    export(source, tokenizer, tmp_path / "source")
    (tmp_path / "gla.json").write_text(json.dumps(target(source.config)))
    return tmp_path


def test_every_matching_weight_is_copied_and_the_rest_is_fresh(source, folder):
    convert(folder / "source", folder / "gla.json", folder / "gla", seed=5)
    made, _ = load_model(folder / "gla")
    fresh = build(made.config, 5).state_dict()
    ours, theirs = made.state_dict(), source.state_dict()
    for name, tensor in ours.items():
        is_new = name.rpartition("mixer.")[2].startswith(("gk_proj", "g_proj", "g_norm"))
        assert tensor.equal(fresh[name] if is_new else theirs[name]), name
    table = json.loads((folder / "gla" / TABLE).read_text())
    assert {row["name"] for row in table["parameters"]} == ours.keys()
    assert {row["how"] for row in table["parameters"]} == {"copied", "fresh: the source has none"}
    assert not table["left behind"]


def test_key_and_value_heads_are_repeated_or_averaged(source):
    k = source.state_dict()["layers.1.mixer.k_proj.weight"].unflatten(0, (2, 8))
    for kv_heads, expected, how in (
        (4, k[[0, 0, 1, 1]], "reshaped: each head 2 times"),
        (1, k.mean(0, keepdim=True), "reshaped: means of 2 heads"),
    ):
        config = {
            **target(source.config, num_kv_heads=kv_heads),
            "vocab_size": source.config.vocab_size,
        }
        shape = read_own_keys(config, "", ("gla",), ("swiglu",))
        model, moved, _ = convert_weights(source, shape, 0)
        torch.testing.assert_close(model.layers[1].mixer.k_proj.weight, expected.flatten(0, 1))
        assert {m.how for m in moved if m.name.endswith("k_proj.weight")} == {how}


def test_what_cannot_be_reshaped_stays_fresh_and_says_why(source):
    config = {**target(source.config, expand_k=0.5), "vocab_size": source.config.vocab_size + 30}
    model, moved, _ = convert_weights(source, read_own_keys(config, "", ("gla",), ("swiglu",)), 0)
    how = {m.name: m.how for m in moved}
    assert (
        how["layers.0.mixer.q_proj.weight"] == "fresh: the source's is (32, 32), this one (16, 32)"
    )
    assert how["embed.weight"].startswith(f"copied: rows 0 to {source.config.vocab_size - 1} of")
    assert model.embed.weight[: source.config.vocab_size].equal(source.embed.weight)


def test_kept_layers_stay_what_they_were(source, folder):
    everything = ",".join(map(str, range(3)))
    words = [
        "convert",
        "--model",
        str(folder / "source"),
        "--config",
        str(folder / "gla.json"),
        "--output",
    ]
    assert main([*words, str(folder / "hybrid"), "--keep-attention", "0,2"]) == 0
    assert main([*words, str(folder / "all"), "--keep-attention", everything]) == 0
    hybrid, _ = load_model(folder / "hybrid")
    assert hybrid.config.layer_types == ("attention", "gla", "attention")
    same, _ = load_model(folder / "all")
    ids_BT = torch.randint(97, (2, 40))
    assert same.logits(same(ids_BT)).equal(source.logits(source(ids_BT)))


@pytest.mark.parametrize(
    "changes, kept, message",
    [
        ({"hidden_size": 64}, (), "hidden_size = 64, but the source's is 32"),
        ({"num_hidden_layers": 4}, (), "num_hidden_layers = 4, but the source's is 3"),
        ({}, (3,), "--keep-attention 3: the layers are 0 to 2"),
        ({"vocab_size": 7}, (), "vocab_size = 7"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(source, folder, changes, kept, message):
    (folder / "wrong.json").write_text(json.dumps({**target(source.config), **changes}))
    with pytest.raises(SettingsError, match=message):
        convert(folder / "source", folder / "wrong.json", folder / "out", kept)
    assert not (folder / "out").exists()


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and ranges([]) == ""


@pytest.mark.parametrize(
    "config", [SHORT, OF_FLA, HYBRID, OTHER_PARTS], ids=["short", "fla", "hybrid", "other parts"]
)
def test_every_tensor_of_the_source_is_used_or_named(of_family, config, tmp_path):
    model, moved, left = converted(of_family, config, tmp_path, kept=(2,))
    theirs, ours = of_family.state_dict(), model.state_dict()
    tied = of_family.config.tie_word_embeddings
    names = theirs.keys() - ({"head.weight"} if tied else set())
    used = {one.source for one in moved if one.source}
    assert used | {one.name for one in left} == names and not used & {one.name for one in left}
    assert {one.name for one in moved} | {"head.weight"} == ours.keys() | {"head.weight"}
    assert all(one.why for one in left)
    for one in moved:
        if one.how == "copied":
            assert ours[one.name].equal(theirs[one.source]), one.name


def test_no_part_of_an_mlp_or_a_norm_of_another_kind_is_copied(tiny_model, tmp_path):
    source = tiny_model("attention", num_hidden_layers=3, **FAMILIES["gpt2"])
    config = {**SHORT, "mlp": "swiglu", "intermediate_size": 48, "norm": "rmsnorm"}
    _, moved, left = converted(source, config, tmp_path)
    how = {one.name: one.how for one in moved}
    assert how["layers.1.mlp.up_proj.weight"] == "fresh: the source's MLP is gelu, this one swiglu"
    assert (
        how["layers.1.mlp_norm.weight"]
        == how["norm.weight"]
        == "fresh: norms of the source are layernorm, these rmsnorm"
    )
    why = {one.name: one.why for one in left}
    assert {
        f"layers.2.mlp.{x}_proj.{y}" for x in ("up", "down") for y in ("weight", "bias")
    } <= why.keys()
    assert why["layers.0.mixer.q_proj.bias"] == "gla has no such bias"


def test_what_the_config_does_not_say_is_as_in_the_source(of_family, tmp_path):
    """All of the model but its replaced mixers: with all mixers kept the logits are the source's."""
    everything, _, left = converted(of_family, SHORT, tmp_path, kept=(0, 1, 2))
    ids_BT = torch.randint(97, (2, 40))
    assert not left
    assert everything.logits(everything(ids_BT)).equal(of_family.logits(of_family(ids_BT)))


@pytest.mark.parametrize(
    "config", [{**SHORT, "norm_eps": 1e-3}, {**OF_FLA, "norm_eps": 1e-3}, HYBRID]
)
def test_attention_that_is_kept_computes_what_it_did(of_family, config, tmp_path):
    """Also where norm_eps is another one, and where the config itself has attention and names its heads only."""
    model, _, _ = converted(of_family, config, tmp_path, kept=() if config is HYBRID else (1,))
    x_BTD = torch.randn(2, 40, 32)
    said = []
    for one in (of_family, model):
        seq = Sequence(torch.arange(40).expand(2, -1))
        one.prepare(seq)
        said.append(one.layers[1].mixer(x_BTD, seq))
    assert said[1].equal(said[0])


@pytest.mark.parametrize(
    "config, eps",
    [
        (SHORT, 1e-5),
        (OF_FLA, 1e-5),
        ({**SHORT, "norm_eps": 1e-6}, 1e-6),
        ({**OF_FLA, "norm_eps": 1e-6}, 1e-6),
    ],
)
def test_a_value_of_the_config_holds_and_a_default_does_not(of_family, config, eps, tmp_path):
    model, _, _ = converted(of_family, config, tmp_path)
    assert model.config.norm_eps == model.norm.eps == eps


def test_settings_that_are_inherited_differ_or_are_left_behind_are_said(
    tiny_model, tokenizer, tmp_path, capsys
):
    source = tiny_model(
        "attention",
        num_hidden_layers=3,
        vocab_size=tokenizer.vocab_size,
        dropout=0.1,
        **FAMILIES["qwen2"],
    )
    export(source, tokenizer, tmp_path / "source")
    config = {**SHORT, "norm_eps": 1e-6, "vocab_size": tokenizer.vocab_size + 2}
    (tmp_path / "target.json").write_text(json.dumps(config))
    lines = []
    with logged_to(lines):
        convert(tmp_path / "source", tmp_path / "target.json", tmp_path / "out", (1,))
    assert "model.layers.*.self_attn.q_proj.bias" in capsys.readouterr().out
    text = "\n".join(lines)
    assert f"norm_eps = 1e-06 by {tmp_path / 'target.json'}; in the source 1e-05" in text
    assert "tie_word_embeddings = True, as in the source" in text
    assert (
        "layers 0, 2: gla in place of attention, without its rope = 'default', rope_theta = 1000000.0"
        in text
    )
    assert "distillation.kind = 'logits' needs the same" in text
    table = json.loads((tmp_path / "out" / TABLE).read_text())
    biases = {f"layers.{i}.mixer.{x}_proj.bias" for i in (0, 2) for x in "qkv"}
    assert {row["name"] for row in table["left behind"]} == biases
    assert {row["why"] for row in table["left behind"]} == {"gla has no such bias"}
    in_files = {f"model.layers.{i}.self_attn.{x}_proj.bias" for i in (0, 2) for x in "qkv"}
    assert {row["in its files"] for row in table["left behind"]} == in_files
    of = {row["name"]: row for row in table["settings"]}
    assert of["norm_eps"]["how"] == "differs" and of["norm_eps"]["source"] == 1e-5
    assert of["attention.qkv_bias"] == {
        "name": "attention.qkv_bias",
        "how": "left behind",
        "value": "gla",
        "source": True,
        "layers": [0, 2],
    }


def test_settings_of_training_that_the_new_class_has_no_key_for_are_said(
    tiny_model, tokenizer, tmp_path
):
    source = tiny_model(
        "gsa", "attention", vocab_size=tokenizer.vocab_size, dropout=0.1
    )  # of our own class: fla has no such
    source = build(replace(source.config, norm="layernorm"), 0)
    export(source, tokenizer, tmp_path / "source")
    config = {**OF_FLA, "num_hidden_layers": 2, "max_position_embeddings": 64}
    (tmp_path / "target.json").write_text(json.dumps(config))
    lines = []
    with logged_to(lines):
        convert(tmp_path / "source", tmp_path / "target.json", tmp_path / "out")
    assert any(line.startswith("dropout = 0.1: GLAForCausalLM has no key for it") for line in lines)


def test_softmax_layers_of_flas_attn_take_what_their_entry_does_not_say(tiny_model, tmp_path):
    source = tiny_model("attention", num_hidden_layers=3, **FAMILIES["qwen2"])
    entries = [
        {"layers": [0], "num_heads": 4},
        {"layers": [2], "num_heads": 4, "rope_theta": 10.0, "qkv_bias": False},
    ]
    model, _, left = converted(source, {**OF_FLA, "attn": entries}, tmp_path)
    first, last = (model.layers[i].mixer.config for i in (0, 2))
    assert first.rope_theta == 1e6 and first.qkv_bias and first.window_size == 7
    assert last.rope_theta == 10.0 and not last.qkv_bias and last.window_size == 7
    why = {one.name: one.why for one in left}
    assert (
        "no such bias" in why["layers.2.mixer.k_proj.bias"]
        and "layers.0.mixer.k_proj.bias" not in why
    )


def test_a_target_of_transformers_takes_biases_and_rotary_scaling(tiny_model, tmp_path):
    """Llama's one key of two settings, and a length that is rotary positions' only where they are scaled by it."""
    attention = {**FAMILIES["qwen3"]["mixers"]["attention"], "qk_norm": False, "qkv_bias": True}
    source = tiny_model(
        "attention", num_hidden_layers=3, norm_eps=1e-5, mixers={"attention": attention}
    )
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 97,
    }
    model, _, left = converted(
        source, {**config, "max_position_embeddings": 999, "head_dim": None}, tmp_path
    )
    ids_BT = torch.randint(97, (2, 40))
    assert not left and model.config.max_position_embeddings == 999
    assert model.logits(model(ids_BT)).equal(source.logits(source(ids_BT)))
    model, _, left = converted(
        source, {**config, "attention_bias": False, "rope_theta": 10.0}, tmp_path
    )
    assert (
        model.layers[0].mixer.config.rope_theta == 10.0
        and model.layers[0].mixer.config.rope == "yarn"
    )
    assert {one.name for one in left} == {
        f"layers.{i}.mixer.{x}_proj.bias" for i in range(3) for x in "qkv"
    }
    assert {one.why for one in left} == {"attention has no such bias"}


def test_keys_that_no_class_reads_are_said(tiny_model, tokenizer, tmp_path):
    source = tiny_model(
        "attention", num_hidden_layers=3, vocab_size=tokenizer.vocab_size, **FAMILIES["llama"]
    )
    export(source, tokenizer, tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "target.json").write_text(json.dumps({**config, "use_flash_attn": True}))
    lines = []
    with logged_to(lines):
        convert(tmp_path / "source", tmp_path / "target.json", tmp_path / "out")
    said = f"{tmp_path / 'target.json'}: transformers' class does not use use_flash_attn: left out"
    assert lines[0] == said and len(lines) == 1


def test_biases_of_grouped_heads_go_with_their_heads(tiny_model, tmp_path):
    source = tiny_model("attention", num_hidden_layers=3, **FAMILIES["qwen2"])
    config = {**HYBRID, "attention": {"num_heads": 4, "num_kv_heads": 4}}
    model, _, _ = converted(source, config, tmp_path)
    bias = source.layers[1].mixer.k_proj.bias.unflatten(0, (2, 8))
    assert model.layers[1].mixer.k_proj.bias.equal(bias[[0, 0, 1, 1]].flatten())


def test_a_mixer_keeps_its_own_matrices_and_takes_nothing_of_another_kind(tiny_model, tmp_path):
    """rwkv7 calls its queries r_proj, also where the source is rwkv7; its g_norm is another norm than that of gsa."""
    source = tiny_model("rwkv7", num_hidden_layers=3)
    gsa = {"num_heads": 4, "num_slots": 12}
    rwkv7 = source.config.mixers["rwkv7"]
    config = {**SHORT, "layer_types": ["rwkv7", "gsa", "rwkv7"], "gsa": gsa, "rwkv7": rwkv7}
    _, moved, left = converted(source, {k: v for k, v in config.items() if k != "gla"}, tmp_path)
    of = {one.name: one.source for one in moved}
    assert of["layers.0.mixer.r_proj.weight"] == "layers.0.mixer.r_proj.weight"
    assert of["layers.1.mixer.q_proj.weight"] == "layers.1.mixer.r_proj.weight"
    assert of["layers.1.mixer.g_norm.weight"] == ""
    assert "layers.1.mixer.g_norm.weight" in {one.name for one in left}
    assert not [name for name in of if name.startswith("layers.2.") and not of[name]]


def test_heads_of_keys_of_another_size_are_not_joined_in_silence(tiny_model, tmp_path):
    source = tiny_model(
        "attention", num_hidden_layers=3, mixers={"attention": {"num_heads": 4, "num_kv_heads": 4}}
    )
    mamba2 = {"head_dim": 8, "state_size": 16}
    config = {**SHORT, "layer_types": ["mamba2"], "mamba2": mamba2, "mlp": "swiglu"}
    _, moved, _ = converted(source, {k: v for k, v in config.items() if k != "gla"}, tmp_path)
    how = {one.name: one.how for one in moved}
    assert (
        how["layers.0.mixer.B_proj.weight"] == "fresh: the source's is (32, 32), this one (16, 32)"
    )
    _, moved, _ = converted(source, {**SHORT, "gla": {"num_heads": 2, "expand_k": 1.0}}, tmp_path)
    how = {one.name: one.how for one in moved}
    assert how["layers.0.mixer.q_proj.weight"] == "copied: as heads of 16 channels, 8 in the source"


def test_a_bias_or_a_norm_goes_with_its_matrix_or_not_at_all(tiny_model, tmp_path):
    source = tiny_model("attention", num_hidden_layers=3, **FAMILIES["qwen3"])
    attention = {**source.config.mixers["attention"], "qkv_bias": True, "o_bias": True}
    source = tiny_model("attention", num_hidden_layers=3, mixers={"attention": attention})
    config = {**HYBRID, "attention": {"num_heads": 2, "num_kv_heads": 2}}
    model, moved, left = converted(source, config, tmp_path)
    how = {
        one.name.removeprefix("layers.1.mixer."): one.how
        for one in moved
        if one.name.startswith("layers.1.mixer.")
    }
    fresh = "fresh: the matrix before it is fresh"
    assert how["k_proj.weight"] == how["k_norm.weight"] == how["k_proj.bias"] == "copied"
    assert how["q_proj.weight"].startswith("fresh: the source's is (64, 32)")
    assert how["q_proj.bias"] == how["q_norm.weight"] == how["o_proj.bias"] == fresh
    assert not model.layers[1].mixer.o_proj.bias.any()
    assert {"layers.1.mixer.o_proj.bias", "layers.1.mixer.q_norm.weight"} <= {
        one.name for one in left
    }


def test_rows_of_the_embedding_that_do_not_fit_are_named(source, tmp_path):
    words = source.config.vocab_size
    _, moved, _ = converted(source, {**SHORT, "vocab_size": words - 3}, tmp_path)
    assert {m.name: m.how for m in moved}[
        "embed.weight"
    ] == f"copied: rows 0 to {words - 4} of the source's {words}"


def test_attention_whose_norms_have_weights_is_not_kept_without_them(tiny_model, tmp_path):
    source = tiny_model("attention", num_hidden_layers=3, **FAMILIES["qwen3"])
    with pytest.raises(
        SettingsError, match="norm_affine = false, but the attention that is kept in layer 1"
    ):
        converted(source, {**SHORT, "norm_affine": False}, tmp_path, kept=(1,))


def test_settings_that_do_not_go_together_name_the_config(tiny_model, tmp_path):
    source = tiny_model("attention", num_hidden_layers=3, **FAMILIES["gpt2"])
    with pytest.raises(
        SettingsError,
        match=r"target\.json: init_head = 'zeros', but with tie_word.* does not name are the source's",
    ):
        converted(source, {**SHORT, "init_head": "zeros"}, tmp_path)


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_the_source_can_teach_what_was_made_of_it(of_family, kind, tmp_path):
    model, _, _ = converted(of_family, SHORT, tmp_path, kept=(0,))
    Distillation(of_family, Wanted(teacher="there", kind=kind), 16).prepare(model)
