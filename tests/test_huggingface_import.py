"""huggingface/import_.py: Hugging Face weights become a run that trains, evaluates, generates and exports; or nothing at all."""

import json
import resource
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from golden import read
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from logged import logged_to
from safetensors.torch import load_file, save_file
from test_huggingface_load import BIN, Payload, as_bin
from tokenizers import Tokenizer as Backend
from tokenizers import models

from longfire import work_progress
from longfire.checkpoint.restoring import load_model_weights
from longfire.checkpoint.weights import open_model
from longfire.cli import main
from longfire.data.tokenizer import Tokenizer, bytes_tokenizer, from_folder, train_tokenizer
from longfire.data.tokenizer_files import CHAT, CarriedFiles
from longfire.errors import CheckpointError, DataError, SettingsError
from longfire.huggingface import import_ as adopting
from longfire.huggingface.check import KL_NATS, kl
from longfire.huggingface.families import config_from_hf
from longfire.huggingface.import_ import import_hf
from longfire.huggingface.weight_files import INDEX, SINGLE

pytestmark = pytest.mark.dtype

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260}
CASES = {
    "llama": (
        "llama",
        {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64},
        5_000,
        0,
    ),
    "qwen3, tied": (
        "qwen3",
        {
            "intermediate_size": 48,
            "head_dim": 8,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
        0,
        3,
    ),
    "gpt2": ("gpt2", {"n_positions": 48}, 0, 1),
    "nanochat": (
        "nanochat",
        {"intermediate_size": 96, "num_key_value_heads": 2, "final_logit_softcapping": 4.0},
        5_000,
        0,
    ),
    "mistral": (
        "mistral",
        {"intermediate_size": 48, "num_key_value_heads": 4, "sliding_window": 9},
        0,
        0,
    ),
}


def saved(folder: Path, case: str) -> transformers.PreTrainedModel:
    """Their model of a case, saved in shards of so many bytes, or as so many files of PyTorch's own."""
    model_type, changes, shard_bytes, bins = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type, **SIZES, **changes, bos_token_id=256, eos_token_id=257
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(folder, max_shard_size=shard_bytes or "5GB")
    bytes_tokenizer().save(folder)
    if bins:
        as_bin(folder, bins)
    return theirs


@pytest.fixture
def source(tmp_path) -> Path:
    saved(tmp_path / "source", "llama")
    return tmp_path / "source"


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_folder_becomes_a_run_with_their_logits(case, tmp_path, in_fp32):
    theirs = saved(tmp_path / "source", case)
    reported = []
    with logged_to(reported):
        check = import_hf(str(tmp_path / "source"), tmp_path / "run")
    assert check.peer_kl is not None and check.peer_kl < KL_NATS and check.own_kl == 0
    assert "258 tokens, the embedding 260 rows" in reported[0]
    opened = open_model(tmp_path / "run")
    assert opened.step == 0 and opened.run.tokenizer.add_eos and not opened.run.tokenizer.add_bos
    ids_BT = torch.randint(260, (2, 40))
    with torch.no_grad():
        assert kl(theirs(ids_BT).logits, opened.model.logits(opened.model(ids_BT))) < KL_NATS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]


def test_a_run_goes_on_from_it_and_back_again(source, tmp_path, capsys):
    """import, train, eval, generate, export by the command line; what nothing was trained of goes out as it came."""
    run = tmp_path / "run"
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"text {i} of some words"}) for i in range(99))
    )
    assert main(["import", str(source), str(run)]) == 0
    assert "LlamaForCausalLM of transformers: KL" in capsys.readouterr().out
    assert main(["export", str(run), "--step", "0", str(tmp_path / "back")]) == 0
    before = {
        name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()
    }
    after = load_file(tmp_path / "back" / SINGLE)
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    config = {
        key: value
        for key, value in json.loads((tmp_path / "back" / "config.json").read_text()).items()
    }
    theirs = json.loads((source / "config.json").read_text())
    older = {"rope_theta", "rope_scaling", "torch_dtype"}  # written for older readers
    assert {key for key in config if config[key] != theirs.get(key)} <= {"pad_token_id", *older}
    card = (tmp_path / "back" / "README.md").read_text()
    assert "(llama)" in card and "embedded" not in card, (
        "it says where it comes from, and no data that it never saw"
    )

    small = [
        "--data.dataset",
        str(tmp_path / "texts.jsonl"),
        "--data.folder",
        str(tmp_path / "stores"),
        "--metrics.report",
        "false",
        "--training.batch_size",
        "2",
        "--training.seq_len",
        "16",
        "--data.validation_fraction",
        "0.2",
        "--data.num_workers",
        "1",
        "--lr_scheduler.warmup_steps",
        "0",
    ]
    assert main(["train", str(run / "run.toml"), *small, "--training.steps", "2"]) == 0
    assert (
        "step-0: 0 tokens seen, sequence 0 is next, with a fresh optimizer"
        in capsys.readouterr().out
    )
    assert main(["train", str(run / "run.toml"), "--training.steps", "3"]) == 0
    assert "step-2: 64 tokens seen, sequence 4 is next\n" in capsys.readouterr().out

    # The same as a run that begins with model.weights.
    words = [
        "--job.dump_folder",
        str(tmp_path / "other"),
        "--model.config",
        str(source),
        "--model.weights",
        str(source),
    ]
    words += ["--tokenizer.path", str(source), "--optimizer.lr", "5e-5", "--training.steps", "2"]
    assert main(["train", *small, *words]) == 0
    one, other = (
        load_model_weights(tmp_path / name / "checkpoints" / "step-2") for name in ("run", "other")
    )
    assert all(one[name].equal(other[name]) for name in other)

    assert main(["eval", str(run), "--step", "0"]) == 0
    assert main(["generate", str(run), "--prompt", "text ", "--max_new_tokens", "3"]) == 0
    assert (
        main(["export", str(run), "--dtype", "bfloat16", str(tmp_path / "out"), "--step", "3"]) == 0
    )
    assert "KL" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    for row in (
        "| steps | 3 |",
        "| data | ",
        "texts.jsonl",
        "| validation texts.jsonl/loss | ",
        "| loss | ",
        "adam",
        "cosine",
        "| seq_len | 16 |",
    ):
        assert row.lower() in card.lower(), row


def test_a_moved_run_finds_its_tokenizer(source, tmp_path):
    import_hf(str(source), tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "texts.jsonl").write_text('{"text": "some words to be read"}\n' * 99)
    words = [
        "--data.dataset",
        str(tmp_path / "texts.jsonl"),
        "--data.folder",
        str(tmp_path / "stores"),
        "--training.steps",
        "1",
    ]
    words += [
        "--lr_scheduler.warmup_steps",
        "0",
        "--training.seq_len",
        "16",
        "--data.num_workers",
        "1",
        "--metrics.report",
        "false",
    ]
    assert (
        main(["train", str(tmp_path / "moved" / "run.toml"), *words, "--eval.at_end", "false"]) == 0
    )
    assert (tmp_path / "moved/checkpoints/step-1").is_dir() and not (tmp_path / "run").exists()


def test_a_chat_template_and_a_begin_of_text_are_kept(source, tmp_path):
    words = train_tokenizer(["some words, and some more"], 259)
    words.carried = CarriedFiles(files={CHAT: "{{ messages }}"})
    words.save(source)
    content = json.loads((source / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<bos>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}},
    }
    (source / "tokenizer.json").write_text(json.dumps(content))
    import_hf(str(source), tmp_path / "run")
    opened = open_model(tmp_path / "run")
    assert opened.run.tokenizer.add_bos and opened.tokenizer.carried.files == {
        CHAT: "{{ messages }}"
    }
    main(["export", str(tmp_path / "run"), str(tmp_path / "back")])
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "back").chat_template
        == "{{ messages }}"
    )


def test_weights_of_fla_come_in_and_it_is_said_that_their_class_was_not_asked(tmp_path, in_fp32):
    golden = read("gla_hybrid")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(golden.config))
    save_file(golden.weights, tmp_path / "source" / SINGLE)
    Tokenizer(Backend(models.BPE({chr(97 + i): i for i in range(26)}, []))).save(
        tmp_path / "source"
    )
    check = import_hf(str(tmp_path / "source"), tmp_path / "run")
    assert check.peer_kl is None and "GLAForCausalLM of fla: not compared, " in str(check)
    opened = open_model(tmp_path / "run")
    with torch.no_grad():
        assert kl(golden.logits_BTW, opened.model.logits(opened.model(golden.ids_BT))) < KL_NATS


def config_says(**changes):
    def change(source: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | changes))

    return change


def shard_of(source: Path, name: str) -> Path:
    return source / json.loads((source / INDEX).read_text())["weight_map"][name]


def tensors_have(name: str, tensor: torch.Tensor | None):
    def change(source: Path) -> None:
        file = shard_of(source, "model.norm.weight")
        tensors = {
            key: value
            for key, value in {**load_file(file), name: tensor}.items()
            if value is not None
        }
        save_file(tensors, file)

    return change


def cut(source: Path) -> None:
    file = shard_of(source, "model.layers.1.mlp.up_proj.weight")
    file.write_bytes(file.read_bytes()[:-64])


def index_leaves(source: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../outside.safetensors"
    (source / INDEX).write_text(json.dumps(index))


def whole_bin(source: Path) -> dict:
    tensors = {
        name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()
    }
    for file in [*source.glob("*.safetensors"), source / INDEX]:
        file.unlink()
    torch.save(tensors, source / BIN)
    return tensors


def cut_bin(source: Path) -> None:
    whole_bin(source)
    (source / BIN).write_bytes((source / BIN).read_bytes()[:-500])


def payload(source: Path) -> None:
    torch.save({**whole_bin(source), "x": Payload(source.parent / "victim")}, source / BIN)


BAD = {
    "an unknown model": (
        config_says(model_type="bloom"),
        SettingsError,
        "model_type = 'bloom' is none that longfire can read",
    ),
    "a setting that we have not": (
        config_says(final_logit_softcapping=30.0),
        SettingsError,
        "final_logit_softcapping = 30.0",
    ),
    "quantized": (
        config_says(quantization_config={"bits": 4}),
        SettingsError,
        "quantization_config",
    ),
    "shapes of another config": (
        config_says(hidden_size=64, head_dim=8),
        CheckpointError,
        r"where \(64,\) is needed",
    ),
    "more layers than weights": (
        config_says(num_hidden_layers=3),
        CheckpointError,
        "missing: model.layers.2",
    ),
    "fewer layers": (
        config_says(num_hidden_layers=1),
        CheckpointError,
        "not known: model.layers.1",
    ),
    "a missing tensor": (
        tensors_have("model.norm.weight", None),
        CheckpointError,
        "missing: model.norm.weight",
    ),
    "a tensor too many": (
        tensors_have("lm_head.bias", torch.ones(3)),
        CheckpointError,
        "not known: lm_head.bias",
    ),
    "a corrupt shard": (
        cut,
        CheckpointError,
        r"model-0.*safetensors: cannot be read .*download it again",
    ),
    "a corrupt file of PyTorch's": (cut_bin, CheckpointError, f"{BIN}: cut off"),
    "an index that leaves its folder": (
        index_leaves,
        CheckpointError,
        "'../outside.safetensors' is not the name",
    ),
    "a pickle with code": (payload, CheckpointError, "have to run code"),
    "a tokenizer with more words": (
        lambda s: train_tokenizer(["ab abc abcd " * 9], 263).save(s),
        SettingsError,
        "26[123] tokens, its embedding 260 rows",
    ),
    "no tokenizer": (
        lambda s: [file.unlink() for file in s.glob("tok*")],
        DataError,
        "no tokenizer.json and no SentencePiece tokenizer.model in this folder",
    ),
    "no weights": (
        lambda s: [file.unlink() for file in s.glob("model*")],
        CheckpointError,
        "none of model.safetensors",
    ),
    "no config": (lambda s: (s / "config.json").unlink(), SettingsError, "config.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_bad_is_named_and_leaves_nothing(case, source, tmp_path):
    spoil, error, message = BAD[case]
    spoil(source)
    with pytest.raises(error, match=message):
        import_hf(str(source), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert main(["import", str(source), str(tmp_path / "run")]) == error.exit_code


def test_other_logits_than_their_class_gives_are_refused(source, tmp_path, monkeypatch):
    """A family's table with a mistake in it would be found before the run appears."""
    wrong = lambda config, where: config_from_hf({**config, "rms_norm_eps": 0.1}, where)
    monkeypatch.setattr("longfire.huggingface.load.config_from_hf", wrong)
    with pytest.raises(
        CheckpointError, match="LlamaForCausalLM of transformers gives other logits"
    ):
        import_hf(str(source), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_leaves_nothing(source, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (50_000, limits[1])
    )  # no file can grow beyond: as a full disk says no
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            import_hf(str(source), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_holds_something_is_left_alone(source, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("words")
    for place in (tmp_path / "run", tmp_path / "run" / "thesis.tex"):
        with pytest.raises(SettingsError, match="already there"):
            import_hf(str(source), place)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    with pytest.raises(SettingsError, match="no such folder"):
        import_hf(str(tmp_path / "nowhere"), tmp_path / "other")


class Hub:
    """A hub that holds one repository; fetches what the patterns ask for."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache, self.asked = repository, cache, []

    def __call__(self, name: str, allow_patterns: list[str], **rest) -> str:
        self.asked.append(allow_patterns)
        self.cache.mkdir(exist_ok=True)
        for path in self.repository.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, self.cache)
        return str(self.cache)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_name_of_the_hub_is_fetched_without_code(kind, source, tmp_path, monkeypatch):
    for name in ("modeling_evil.py", "training_args.bin", "optimizer.pt", "model.gguf"):
        (source / name).write_bytes(b"import os")
    if kind == "bin":
        whole_bin(source)
    hub = Hub(source, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    import_hf("someone/some-model", tmp_path / "run")
    fetched = {path.name for path in (tmp_path / "cache").iterdir()}
    assert (
        not {name for name in fetched if name.endswith((".py", ".pt", ".gguf"))}
        and "training_args.bin" not in fetched
    )
    assert (BIN in fetched) == (kind == "bin") and len(hub.asked) == (2 if kind == "bin" else 1)
    assert (
        open_model(tmp_path / "run").run.job.description
        == "imported from someone/some-model (llama)"
    )


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("no cached snapshot"), HTTPError("no route to the host")]
)
def test_a_name_of_the_hub_without_a_network_says_what_to_do(error, tmp_path, monkeypatch):
    def offline(*names, **rest):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        SettingsError, match="someone/some-model is no folder here.*check the name and the network"
    ):
        import_hf("someone/some-model", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_errors_of_the_hub_are_imported_from_where_every_version_has_them():
    """huggingface_hub 1 speaks httpx, 2 httpx2; only `huggingface_hub.errors` has the error of both under one name since 1.0
    (`huggingface_hub.utils.httpx` came in between)."""
    assert issubclass(HfHubHTTPError, HTTPError)
    for file in Path(adopting.__file__).parents[1].rglob("*.py"):
        assert "huggingface_hub.utils" not in file.read_text(), file


def test_a_config_that_their_class_no_longer_reads_is_imported_and_said(source, tmp_path):
    """transformers 5 checks the types of a config strictly, which 4 did not."""
    config_says(use_cache=1)(source)
    check = import_hf(str(source), tmp_path / "run")
    assert (
        check.peer_kl is None
        and "it does not read this config.json" in str(check)
        and "use_cache" in str(check)
    )
    assert open_model(tmp_path / "run").step == 0


def test_buffers_of_old_files_are_no_tensors_of_the_model(tmp_path):
    """GPT-2's causal mask, which files of before transformers 4.30 hold under names without a prefix."""
    saved(tmp_path / "source", "gpt2")
    file = tmp_path / "source" / BIN
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in torch.load(file).items()
    }
    tensors |= {
        "h.0.attn.bias": torch.ones(1, 1, 48, 48),
        "h.1.attn.masked_bias": torch.tensor(-1e4),
    }
    torch.save(tensors, file)
    check = import_hf(str(tmp_path / "source"), tmp_path / "run")
    assert check.peer_kl is not None and check.peer_kl < KL_NATS


def test_progress_is_shown(source, tmp_path, monkeypatch):
    monkeypatch.setattr(work_progress, "FIRST_SECONDS", 0)
    monkeypatch.setattr(work_progress, "NOTE_SECONDS", 0)
    reported = []
    with logged_to(reported):
        import_hf(str(source), tmp_path / "run")
    lines = [line for line in reported if line.startswith("import: ")]
    assert len(lines) > 10 and " parameters, " in lines[-1]


def test_a_tokenizer_saved_again_is_the_same(source, tmp_path):
    import_hf(str(source), tmp_path / "run")
    assert (
        from_folder(tmp_path / "run" / "tokenizer").fingerprint == from_folder(source).fingerprint
    )


def test_what_a_kill_has_left_of_an_import_is_removed_where_the_run_is_whole(source, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.toml").touch()
    (tmp_path / ".run.0a1b2c3d.aside.lock").touch()
    with pytest.raises(SettingsError, match="already there"):
        import_hf(str(source), run)
    assert not list(tmp_path.glob(".run.*"))
