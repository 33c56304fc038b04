"""provenance.py: the tokenizer beside weights, and in what two tokenizers differ; then through whole small runs."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from longfire.checkpoint.provenance import difference, run_folder_of, step_of, tokenizer_beside
from longfire.cli import main
from longfire.data.tokenizer import bytes_tokenizer, from_folder, train_tokenizer

ENGLISH = [f"the state of the long fire number {i} is kept in the gate" for i in range(120)]
GERMAN = [f"der schnelle braune Fuchs springt {i} mal ins Feuer" for i in range(120)]
SHAPE = {
    "model_type": "llama",
    "vocab_size": 0,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SETTINGS = {
    "data.folder": "stores",
    "data.num_workers": 1,
    "data.prefetch_factor": 0,
    "training.seq_len": 16,
    "training.batch_size": 2,
    "training.steps": 2,
    "training.compile": "off",
    "training.threads": 1,
    "lr_scheduler.warmup_steps": 1,
    "eval.at_end": "false",
    "metrics.report": "false",
}
OWN = {"tokenizer.path": "train", "tokenizer.train_vocab_size": 300}


def more(*values: str):
    """Cases that repeat over sources; CI runs them."""
    return pytest.param(*values, marks=pytest.mark.slow)


def train(folder: str, *plain: str, code: int = 0, **settings: object) -> None:
    """`longfire train` into this folder, with the settings of all runs here."""
    given = {
        **SETTINGS,
        "job.dump_folder": folder,
        **{k.replace("__", "."): v for k, v in settings.items()},
    }
    assert main(["train", *plain, *(f"--{key}={value}" for key, value in given.items())]) == code


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run on English with a tokenizer of its own, exported; an import of the export."""
    folder = tmp_path_factory.mktemp("provenance")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, texts in (("english", ENGLISH), ("german", GERMAN)):
            Path(f"{name}.jsonl").write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in texts)
            )
        Path("shape.json").write_text(json.dumps(SHAPE))
        config = {"model__config": "shape.json", "data__dataset": "english.jsonl"}
        train("first", **config, **OWN, checkpoint__export="true")
        assert main(["import", "first/hf", "imported"]) == 0
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch) -> Path:
    for name in ("first", "imported", "stores"):
        shutil.copytree(made / name, tmp_path / name)
    for name in ("english.jsonl", "german.jsonl", "shape.json"):
        shutil.copy(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def describe(capsys) -> str:
    out, err = capsys.readouterr()
    return out + err


def test_what_makes_two_tokenizers_differ():
    own, same = train_tokenizer(ENGLISH, 300), train_tokenizer(ENGLISH, 300)
    assert difference(own, same) == ""
    assert difference(own, bytes_tokenizer()) == "it has 300 entries, this one 258"
    other = train_tokenizer(GERMAN, 300)
    assert difference(own, other).startswith("id ") and " there and " in difference(own, other)
    assert own.vocabulary == same.vocabulary != other.vocabulary
    rules = json.loads(own.backend.to_str())
    rules["pre_tokenizer"]["add_prefix_space"] = True
    changed = type(own)(own.backend.from_str(json.dumps(rules)), own.bos, own.eos)
    assert "its pre_tokenizer cut texts otherwise" in difference(own, changed)


def test_what_stands_around_a_text_is_no_other_tokenizer():
    own = train_tokenizer(ENGLISH, 300)
    assert difference(own, type(own)(own.backend, "", "")) == ""


def test_where_weights_lie(folder):
    step = folder / "imported/checkpoints/step-0"
    assert run_folder_of(folder / "first") == folder / "first"
    assert run_folder_of(step) == folder / "imported" and step_of(step) == 0
    assert run_folder_of(folder / "first/hf") is None, "an export stands for itself"
    assert tokenizer_beside(folder / "first").path == str(folder / "first/tokenizer")
    assert tokenizer_beside(folder / "first/hf").path == str(folder / "first/hf")
    assert tokenizer_beside(step).path == str(folder / "imported/tokenizer")
    shutil.rmtree(folder / "first/tokenizer")
    assert tokenizer_beside(folder / "first") is None, "`train` alone does not say which one it was"


@pytest.mark.parametrize(
    "source", ["first", more("first/hf"), more("imported"), more("first/checkpoints/step-2")]
)
def test_where_no_tokenizer_is_named_the_one_beside_the_weights_is_taken(folder, capsys, source):
    train(
        "next",
        model__config="first/config.json",
        model__weights=source,
        data__dataset="german.jsonl",
    )
    said = describe(capsys)
    assert "weights: " in said and f"{source}" in said
    assert "300 entries, no BOS, EOS <eos> after each" in said
    assert (
        from_folder(folder / "next/tokenizer").fingerprint
        == from_folder(folder / "first/tokenizer").fingerprint
    )
    train(
        "next",
        model__config="first/config.json",
        model__weights=source,
        data__dataset="german.jsonl",
    )
    assert "changed since" not in describe(capsys), "the same command again changes nothing"
    train("next", model__config="first/config.json", data__dataset="german.jsonl")
    assert "weights: resuming from" in describe(capsys), "nor does it need the weights any more"


@pytest.mark.parametrize(
    ("key", "source"),
    [
        ("model.weights", "first/hf"),
        ("distillation.teacher", "first"),
        more("model.weights", "first"),
        more("model.weights", "first/checkpoints/step-2"),
        more("distillation.teacher", "first/hf"),
    ],
)
def test_another_tokenizer_than_that_of_weights_or_teacher_is_refused(folder, capsys, key, source):
    given = {
        "model__config": "shape.json",
        "data__dataset": "german.jsonl",
        key.replace(".", "__"): source,
    }
    train("next", **given, **OWN, code=2)
    said = describe(capsys)
    assert f"tokenizer.path = 'train' is not the tokenizer of {key} = " in said and "id " in said
    assert "tokenizer.allow_mismatch = true" in said
    train("next", **given, **OWN, tokenizer__allow_mismatch="true")
    assert "warning: tokenizer.path = 'train' is not the tokenizer of" in describe(capsys)


@pytest.mark.parametrize("recipe", [(), ("first/run.toml",)])
def test_a_run_goes_on_with_its_own_tokenizer_on_other_text(folder, capsys, recipe):
    """`train` would make another one of the new text."""
    given = {} if recipe else {"model__config": "shape.json"}
    train("first", *recipe, **given, data__dataset="german.jsonl", training__steps=3)
    said = describe(capsys)
    assert "tokenizer: first/tokenizer, 300 entries" in said and "weights: resuming from" in said
    train(
        "first",
        *recipe,
        **given,
        data__dataset="german.jsonl",
        training__steps=4,
        tokenizer__path="train",
        code=2,
    )
    assert "is not the tokenizer that the run in first was trained with" in describe(capsys)


def test_weights_without_a_tokenizer_are_warned_of(folder, capsys):
    for file in (*(folder / "first/hf").glob("*token*"), folder / "first/hf/SHA256SUMS"):
        file.unlink()
    given = {"model__config": "first/config.json", "data__dataset": "english.jsonl"}
    train("next", **given, model__weights="first/hf", tokenizer__path="first/tokenizer")
    assert "warning: there is no tokenizer beside model.weights = " in describe(capsys)


def test_an_imported_run_begins_with_its_weights_in_any_folder(folder, capsys):
    """It trained random ones, without a word."""
    kept = tomllib.loads(Path("imported/run.toml").read_text())
    assert kept["model"]["weights"] == "checkpoints/step-0"
    given = {"data__dataset": "english.jsonl", "optimizer__lr": 1e-9}
    train("other", "imported/run.toml", **given)
    assert "weights: checkpoint " in describe(capsys)
    train("imported", "imported/run.toml", **given)
    assert "weights: resuming from" in describe(capsys)
    train("third", "imported/run.toml", **given, checkpoint__enable_checkpoint="false")
    assert "weights: checkpoint " in describe(capsys)
    records = [
        Path(name, "metrics.jsonl").read_text().splitlines()[0]
        for name in ("imported", "other", "third")
    ]
    losses = {json.loads(record)["loss"] for record in records}
    assert len(losses) == 1
    train("fresh", "imported/run.toml", **given, model__weights="")
    assert "weights: fresh, initialised with training.seed = 42" in describe(capsys)


def test_an_import_that_was_moved_and_trained_still_begins_at_its_step_0(folder, capsys):
    train("imported", "imported/run.toml", data__dataset="english.jsonl")
    shutil.move("imported", "moved")
    train("other", "moved/run.toml", data__dataset="english.jsonl")
    assert f"weights: checkpoint {folder}/moved/checkpoints/step-0" in describe(capsys)


def test_a_checkpoint_says_which_ids_it_was_trained_with(folder, capsys):
    """Somebody put another tokenizer into the run folder."""
    shutil.rmtree("first/tokenizer")
    train_tokenizer(GERMAN, 300).save(Path("first/tokenizer"))
    for line in (
        ["generate", "first", "--prompt", "a"],
        ["eval", "first"],
        ["export", "first", "out"],
    ):
        assert main(line) == 4
        assert "was trained with another tokenizer than" in describe(capsys)
    assert main(["export", "first", "out", "--compare", "bytes"]) == 4
    train("first", "first/run.toml", tokenizer__path="first/tokenizer", training__steps=3, code=4)
    assert "was trained with another tokenizer than tokenizer.path" in describe(capsys)


def test_broken_weights_are_named(folder, capsys):
    file = folder / "first/hf/model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, file, {"format": "pt"})
    (folder / "first/hf/SHA256SUMS").unlink()
    message = "1 of 16 numbers of norm.weight are NaN or infinite"
    train(
        "next",
        model__config="first/config.json",
        model__weights="first/hf",
        data__dataset="german.jsonl",
        code=4,
    )
    assert message in describe(capsys)
    for line in (
        ["import", "first/hf", "again"],
        ["generate", "first/hf", "--prompt", "a"],
        ["eval", "first/hf"],
    ):
        assert main(line) == 4, line
        assert message in describe(capsys)
    assert not Path("again").exists()


def test_an_export_named_like_a_checkpoint_is_no_checkpoint(folder, capsys):
    assert main(["export", "first", "first/exports/step-2"]) == 0
    assert run_folder_of(Path("first/exports/step-2")) is None
    train(
        "next",
        model__config="first/config.json",
        model__weights="first/exports/step-2",
        data__dataset="german.jsonl",
    )
    assert "weights: Hugging Face weights in" in describe(capsys)


def test_a_run_goes_on_when_its_weights_and_their_tokenizer_are_gone(folder, capsys):
    """Its run.toml records where both were; its own folder has what it needs."""
    config = {
        "model__config": "first/config.json",
        "model__weights": "first",
        "data__dataset": "german.jsonl",
    }
    train("next", **config)
    shutil.rmtree("first")
    assert main(["train", "next/run.toml", "--training.steps=3"]) == 0
    assert "weights: resuming from next/checkpoints/step-2" in describe(capsys)


def test_a_run_goes_on_with_a_config_that_says_otherwise_how_a_model_begins(folder, capsys):
    shape = {**SHAPE, "tie_word_embeddings": False}
    Path("shape.json").write_text(json.dumps(shape))
    train("begun", model__config="shape.json", data__dataset="english.jsonl")
    written = json.loads(Path("begun/config.json").read_text())
    Path("begun/config.json").write_text(json.dumps({**written, "init_head": "initializer_range"}))
    train("begun", model__config="shape.json", data__dataset="english.jsonl", training__steps=3)
    assert "weights: resuming from begun/checkpoints/step-2" in describe(capsys)


@pytest.mark.parametrize("command", [["eval"], ["export"], ["generate", "--prompt=a"]])
def test_a_command_names_the_run_of_a_checkpoint(folder, capsys, command):
    assert main([*command, "first/checkpoints/step-2"]) == 2
    assert "name its run folder, " in describe(capsys)


def test_weights_that_were_trained_with_bos_are_reported_where_there_is_none(folder, capsys):
    config = {"model__config": "first/config.json", "data__dataset": "english.jsonl"}
    train("bos", **config, tokenizer__path="first/tokenizer", tokenizer__add_bos="true")
    train("next", **config, model__weights="bos", tokenizer__path="bos/tokenizer")
    assert "warning: documents began with BOS where model.weights = " in describe(capsys)
    train("taken", **config, model__weights="bos")
    assert "warning: documents began" not in describe(capsys)


def test_the_folder_of_all_checkpoints_is_refused_with_what_to_name(folder, capsys):
    given = {"model__config": "first/config.json", "data__dataset": "english.jsonl"}
    train("next", **given, model__weights="first/checkpoints", code=2)
    assert "first/checkpoints holds all checkpoints of a run: name the run folder, " in describe(
        capsys
    )


@pytest.fixture
def asks_for_bos(folder) -> Path:
    """A folder with a tokenizer whose files ask for BOS before every text."""
    from_folder(folder / "first/tokenizer").save(folder / "llama-like", adds_bos=True)
    return folder


def saved_tokenizer(run: str) -> dict:
    return tomllib.loads(Path(run, "run.toml").read_text())["tokenizer"]


def test_a_tokenizer_that_is_named_decides_about_bos_where_the_settings_do_not(
    asks_for_bos, capsys
):
    config = {"model__config": "shape.json", "data__dataset": "english.jsonl"}
    train("named", **config, tokenizer__path="llama-like")
    assert saved_tokenizer("named")["add_bos"] is True
    out = describe(capsys)
    assert "ask for <bos> before each text" in out
    assert "BOS <bos> before each document" in out
    train("without", **config, tokenizer__path="llama-like", tokenizer__add_bos="false")
    assert saved_tokenizer("without")["add_bos"] is False
    train("no-rule", **config, tokenizer__path="first/tokenizer")
    assert saved_tokenizer("no-rule")["add_bos"] is False


def test_a_run_that_was_begun_without_bos_resumes_without_it(asks_for_bos, capsys):
    config = {"model__config": "shape.json", "data__dataset": "english.jsonl"}
    named = {**config, "tokenizer__path": "llama-like"}
    train("begun", **named, tokenizer__add_bos="false")
    capsys.readouterr()
    train("begun", **named, training__steps=3)
    assert saved_tokenizer("begun")["add_bos"] is False
    out = describe(capsys)
    assert "ask for <bos>" not in out and "resum" in out
    train("begun", "begun/run.toml", training__steps=4)
    assert saved_tokenizer("begun")["add_bos"] is False
