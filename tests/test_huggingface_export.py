"""Export and load at their edges: shards, types, what is refused and by which message; a run's checkpoint exported."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file

from longfire.checkpoint.saving import Checkpoints
from longfire.checkpoint.state import State
from longfire.checkpoint.weights import open_model
from longfire.config.run import Run
from longfire.config.run_folder import save
from longfire.data.tokenizer import bytes_tokenizer
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.export import cut, export, export_run
from longfire.huggingface.families import config_from_hf
from longfire.huggingface.load import load_model, load_weights
from longfire.huggingface.weight_files import INDEX, SINGLE
from longfire.initialise import build


@pytest.fixture(scope="module")
def model():
    from conftest import tiny_model

    return tiny_model("attention", vocab_size=258)


@pytest.fixture
def folder(model, tmp_path) -> Path:
    export(model, bytes_tokenizer(), tmp_path / "hf")
    return tmp_path / "hf"


def rewritten(folder: Path, change) -> Path:
    """The folder with its tensors changed by `change(tensors)`."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)
    return folder


@given(some.lists(some.integers(0, 50)), some.integers(1, 100))
def test_shards_hold_every_name_once_and_are_cut_late(sizes, limit):
    named = {f"p{i}": size for i, size in enumerate(sizes)}
    shards = list(cut(named, limit))
    assert [name for shard in shards for name in shard] == list(named)
    weighed = [sum(named[name] for name in shard) for shard in shards]
    assert all(total <= limit or len(shard) == 1 for shard, total in zip(shards, weighed))
    assert all(total + named[after[0]] > limit for total, after in zip(weighed, shards[1:]))


def test_sharded_equals_whole(model, folder, tmp_path):
    export(model, bytes_tokenizer(), tmp_path / "cut", shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(
        path.stat().st_size < 45_000 for path in (tmp_path / "cut").glob("*.safetensors")
    )  # one is larger alone
    whole, parts = load_weights(folder, model.config), load_weights(tmp_path / "cut", model.config)
    assert whole.keys() == parts.keys() and all(whole[name].equal(parts[name]) for name in whole)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "missing: model.layers.1.mlp.up_proj.weight",
        ),
        (
            lambda t: t.update({"model.extra.weight": torch.ones(2)}),
            "not known: model.extra.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(33)}),
            r"model.norm.weight \(33,\) where \(32,\) is needed",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            "int8 where a floating-point type",
        ),
        (lambda t: [t.pop(name) for name in list(t)[:9]], "missing: .* and 5 more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(model, folder, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_weights(rewritten(folder, change), model.config)


def test_buffers_of_old_files_are_passed_over_and_any_float_is_read(model, folder):
    def age(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.double() if "norm" in name else tensor.bfloat16()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    loaded = load_weights(rewritten(folder, age), model.config)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert loaded[name].equal(tensor if "norm" in name else tensor.bfloat16().float())


def test_a_tied_head_may_be_written_twice_but_not_differ(tmp_path, tiny_model):
    model = tiny_model("attention", vocab_size=258, tie_word_embeddings=True)
    export(model, bytes_tokenizer(), tmp_path / "hf")
    twice = rewritten(
        tmp_path / "hf",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    loaded, _ = load_model(twice)
    assert loaded.head.weight is loaded.embed.weight
    differs = rewritten(
        tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1})
    )
    with pytest.raises(CheckpointError, match="ties the head"):
        load_model(differs)


def write_index(folder: Path, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "model.bin", 7]
)
def test_an_index_cannot_lead_out_of_its_folder(model, folder, name):
    write_index(folder, {"model.norm.weight": name})
    message = "not the name of a .safetensors file in the same folder|must be text, not 7"
    with pytest.raises(CheckpointError, match=message):
        load_weights(folder, model.config)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_named(model, folder, content):
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        load_weights(folder, model.config)


def test_a_config_without_words_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 0}))
    with pytest.raises(SettingsError, match=r"config\.json: vocab_size = 0"):
        load_model(folder)


def test_files_that_are_missing_cut_off_or_of_another_kind(model, folder):
    write_index(folder, {"model.norm.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(
        CheckpointError, match="model-00001-of-00002.safetensors: the index names it"
    ):
        load_weights(folder, model.config)
    (folder / INDEX).unlink()
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{SINGLE}: cannot be read"):
        load_weights(folder, model.config)
    (folder / SINGLE).rename(folder / "model.pt")
    with pytest.raises(CheckpointError, match=r"model.pt could run code when read"):
        load_weights(folder, model.config)


def test_whoever_reads_the_config_reads_the_weights(folder):
    """safetensors makes files that only their owner can read; an export is often for a group."""
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_a_folder_that_is_no_export_is_left_alone(model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("words")
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(SettingsError, match="no export of longfire"):
            export(model, bytes_tokenizer(), path)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_full_disk_leaves_what_was_there(model, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (50_000, limits[1])
    )  # no file can grow beyond: as a full disk says no
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            export(model, bytes_tokenizer(), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def test_values_that_a_type_cannot_hold_are_named(tmp_path, tiny_model):
    model = tiny_model("attention", vocab_size=258)
    model.state_dict()["layers.1.mlp.down_proj.weight"][0, 0] = 1e6
    with pytest.raises(
        CheckpointError, match="layers.1.mlp.down_proj.weight has values that float16 cannot hold"
    ):
        export(model, bytes_tokenizer(), tmp_path / "hf", dtype=torch.float16)


def test_a_model_that_diverged_is_not_exported(tmp_path, tiny_model):
    model = tiny_model("attention", vocab_size=258)
    model.state_dict()["norm.weight"][0] = torch.nan
    with pytest.raises(CheckpointError, match="logits .* KL nan"):
        export(model, bytes_tokenizer(), tmp_path / "hf")


def test_a_shape_that_no_family_has_is_written_for_our_own_class(tmp_path, tiny_model):
    model = tiny_model("gla", "gated_delta_net", vocab_size=258)
    check = export(model, bytes_tokenizer(), tmp_path / "hf")
    assert check.peer == "LongfireForCausalLM of longfire" and check.peer_kl == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [
        "LongfireForCausalLM"
    ]
    again = load_weights(tmp_path / "hf", model.config)
    assert all(tensor.equal(again[name]) for name, tensor in model.state_dict().items())


def test_the_card_says_what_it_is_and_how_it_came_to_be(model, tmp_path):
    facts = {"data": "a | b", "steps": 12_000, "seq_len": 77, "description": ""}
    check = export(model, bytes_tokenizer(), tmp_path / "hf", facts=facts)
    card = (tmp_path / "hf" / "README.md").read_text()
    for part in (
        "library_name: transformers",
        "# hf",
        "LlamaForCausalLM",
        "| data | a \\| b |",
        "| steps | 12,000 |",
        str(check)[1:],
    ):
        assert part in card
    assert "description" not in card
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 77
    assert config_from_hf(config, "").vocab_size == 258


RECIPE = """
[job]
dump_folder = "{folder}/run"
[model]
config = "{folder}/shape.json"
[data]
dataset = ["{folder}/texts.jsonl"]
folder = "{folder}/stores"
validation_fraction = 0.2
[training]
seq_len = 32
batch_size = 2
steps = 4
compile = "off"
threads = 1
[lr_scheduler]
warmup_steps = 1
[checkpoint]
interval = 2
[metrics]
report = false
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run folder with checkpoints of steps 2 and 4."""
    from conftest import tiny_config

    folder = tmp_path_factory.mktemp("run")
    shape = replace(tiny_config("gla", "attention"), vocab_size=0, tie_word_embeddings=True)
    (folder / "shape.json").write_text(json.dumps(shape.to_dict()))
    lines = [
        json.dumps({"text": f"number {i} of many documents, each a line long"}) for i in range(60)
    ]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
    run = Run.compose(folder / "recipe.toml", {})
    save(run)
    bytes_tokenizer().save(run.folder / "tokenizer")
    model = build(run.model_config.with_vocabulary(258), 0)
    checkpoints = Checkpoints(run.folder / run.checkpoint.folder, run.checkpoint)
    for step in (2, 4):
        torch.nn.init.normal_(model.norm.weight, generator=torch.Generator().manual_seed(step))
        checkpoints.save(State(model, torch.optim.AdamW(model.parameters()), step=step))
        checkpoints.wait()
    records = [
        {"step": 2, "loss": 5.5},
        {"step": 4, "loss": 5.25, "tokens": 256},
        {"step": 4, "eval/texts/loss": 5.125},
    ]
    (run.folder / "metrics.jsonl").write_text(
        "\n".join(map(json.dumps, records)) + '\n{"step": 4, "lo'
    )  # being written
    return run


def test_any_checkpoint_of_a_run_can_be_exported(run, tmp_path):
    exported = {}
    for step in (2, 4, -1):
        export_run(run.folder, step, tmp_path / f"hf{step}")
        exported[step], _ = load_model(tmp_path / f"hf{step}")
        opened = open_model(run.folder, step)
        assert opened.step == (4 if step < 0 else step)
        ours = opened.model.state_dict()
        assert all(tensor.equal(ours[name]) for name, tensor in exported[step].state_dict().items())
    assert exported[4].norm.weight.equal(exported[-1].norm.weight)
    assert not exported[4].norm.weight.equal(exported[2].norm.weight)
    card = (tmp_path / "hf4" / "README.md").read_text()
    for row in (
        "| steps | 4 |",
        "texts.jsonl |",
        "| loss | 5.2500 |",
        "| validation texts/loss | 5.1250 |",
        "| tokens | 256 |",
    ):
        assert row in card
    config = json.loads((tmp_path / "hf4" / "config.json").read_text())
    assert config["max_position_embeddings"] == 32 and config["vocab_size"] == 258


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_by_bytes_is_the_same_folder(run, tmp_path, dtype):
    """Tensor by tensor from the checkpoint, without the model."""
    whole = export_run(run.folder, 4, tmp_path / "whole", dtype)
    again = export_run(run.folder, -1, tmp_path / "again", dtype, logits=False)
    assert (again.tensors, again.memory_bytes, again.tokens) == (
        whole.tensors,
        whole.memory_bytes,
        0,
    )
    assert "logits not, as asked for" in str(again)
    for path in (tmp_path / "whole").iterdir():
        if path.name not in ("README.md", "SHA256SUMS"):
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_opened(run, tmp_path, capsys):
    (whole,) = (run.folder / "checkpoints" / "step-2").glob("shard-*-model.safetensors")
    copy = tmp_path / "run"
    copy.mkdir()
    for path in sorted(run.folder.rglob("*")):
        if path.is_file():
            (copy / path.relative_to(run.folder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(run.folder)).write_bytes(path.read_bytes())
    newest = copy / "checkpoints" / "step-4" / whole.name
    newest.write_bytes(newest.read_bytes()[:-1])
    assert open_model(copy).step == 2
    assert "step-4 is damaged" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="step-4 is damaged"):
        open_model(copy, 4)
    with pytest.raises(
        CheckpointError, match="step-3: no such checkpoint; the folder has steps 2, 4"
    ):
        open_model(copy, 3)
    whole = copy / "checkpoints" / "step-2" / "manifest.json"
    whole.unlink()
    with pytest.raises(CheckpointError, match="there is no complete checkpoint"):
        open_model(copy)


def test_hugging_face_weights_are_no_run(folder, tmp_path):
    with pytest.raises(SettingsError, match="is no run folder"):
        export_run(folder, -1, tmp_path / "out")
