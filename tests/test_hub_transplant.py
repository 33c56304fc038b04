"""Another architecture from pretrained weights: what is copied, what is reshaped, what stays fresh, and that it is said."""

import json

import pytest
import torch

from longfire.cli import main
from longfire.data.tokenizer import train_tokenizer
from longfire.errors import SettingsError
from longfire.hub.convert import export
from longfire.hub.load import load_model
from longfire.hub.transplant import TABLE, convert, ranges, transplant
from longfire.initialise import build

SOURCE = {"num_heads": 4, "num_kv_heads": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n" * 20], 270)


@pytest.fixture
def source(tiny_model, tokenizer):
    return tiny_model("attention", num_hidden_layers=3, vocab_size=tokenizer.vocab_size, mixers={"attention": SOURCE})


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
    (tmp_path / "gla.json").write_text(json.dumps(target(source.shape)))
    return tmp_path


def test_every_matching_weight_is_copied_and_the_rest_is_fresh(source, folder):
    convert(folder / "source", folder / "gla.json", folder / "gla", seed=5)
    made, _ = load_model(folder / "gla")
    fresh = build(made.shape, 5).state_dict()
    ours, theirs = made.state_dict(), source.state_dict()
    for name, tensor in ours.items():
        is_new = name.rpartition("mixer.")[2].startswith(("gk_proj", "g_proj", "g_norm"))
        assert tensor.equal(fresh[name] if is_new else theirs[name]), name
    table = json.loads((folder / "gla" / TABLE).read_text())
    assert {row["name"] for row in table} == ours.keys()
    assert {row["how"] for row in table} == {"copied", "fresh: the source has none"}


def test_key_and_value_heads_are_repeated_or_averaged(source):
    k = source.state_dict()["layers.1.mixer.k_proj.weight"].unflatten(0, (2, 8))
    for kv_heads, expected, how in (
        (4, k[[0, 0, 1, 1]], "reshaped: each head 2 times"),
        (1, k.mean(0, keepdim=True), "reshaped: means of 2 heads"),
    ):
        config = {**target(source.shape, num_kv_heads=kv_heads), "vocab_size": source.shape.vocab_size}
        shape = type(source.shape).from_dict(config, "", ("gla",))
        model, moved = transplant(source, shape, 0)
        torch.testing.assert_close(model.layers[1].mixer.k_proj.weight, expected.flatten(0, 1))
        assert {m.how for m in moved if m.name.endswith("k_proj.weight")} == {how}


def test_what_cannot_be_reshaped_stays_fresh_and_says_why(source):
    config = {**target(source.shape, expand_k=0.5), "vocab_size": source.shape.vocab_size + 30}
    model, moved = transplant(source, type(source.shape).from_dict(config, "", ("gla",)), 0)
    how = {m.name: m.how for m in moved}
    assert how["layers.0.mixer.q_proj.weight"] == "fresh: the source's is (32, 32)"
    assert how["embed.weight"].startswith(f"copied: rows 0 to {source.shape.vocab_size - 1} of")
    assert model.embed.weight[: source.shape.vocab_size].equal(source.embed.weight)


def test_kept_layers_stay_what_they_were(source, folder):
    everything = ",".join(map(str, range(3)))
    words = ["convert", "--model", str(folder / "source"), "--config", str(folder / "gla.json"), "--output"]
    assert main([*words, str(folder / "hybrid"), "--keep-attention", "0,2"]) == 0
    assert main([*words, str(folder / "all"), "--keep-attention", everything]) == 0
    hybrid, _ = load_model(folder / "hybrid")
    assert hybrid.shape.layer_types == ("attention", "gla", "attention")
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
    (folder / "wrong.json").write_text(json.dumps({**target(source.shape), **changes}))
    with pytest.raises(SettingsError, match=message):
        convert(folder / "source", folder / "wrong.json", folder / "out", kept)
    assert not (folder / "out").exists()


def test_ranges():
    assert ranges(["0", "1", "2", "5", "7", "8"]) == "0-2, 5, 7-8" and ranges([""]) == ""
