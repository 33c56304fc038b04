"""The public API: README's program runs with nothing but public names; each is documented; the import is light."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import longfire
from longfire import public
from longfire.checkpoint.state import State
from longfire.config.settings import Training
from longfire.device import Clock
from longfire.errors import SettingsError
from longfire.public import PLACES
from longfire.training.step import train_step

ROOT = Path(__file__).parents[1]


def program_of(page: Path) -> str:
    """The first Python program of a page."""
    return re.search(r"```python\n(import torch\n.+?)```", page.read_text(), re.S)[1]


def tiny_config(**changes: object) -> longfire.ModelConfig:
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "layer_types": ("gla", "attention"),
        "mixers": {"gla": {"num_heads": 2}, "attention": {"num_heads": 2}},
        "vocab_size": 258,
    }
    return longfire.ModelConfig(**{**settings, **changes})


def random_batch(rows: int = 4, tokens: int = 16) -> longfire.Batch:
    ids_BT = torch.randint(258, (rows, tokens + 1), generator=torch.Generator().manual_seed(0))
    positions_BT = torch.arange(tokens).expand(rows, tokens)
    return longfire.Batch(ids_BT[:, :-1], ids_BT[:, 1:], positions_BT)


def test_the_program_of_the_readme_trains_exports_loads_and_generates(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    program = program_of(ROOT / "README.md")
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    losses = re.findall(r"^\d+ (\d\.\d+)$", capsys.readouterr().out, re.M)
    assert len(losses) == 20 and float(losses[-1]) < float(losses[0]) - 1
    assert {"config.json", "model.safetensors", "README.md"} <= {
        path.name for path in (tmp_path / "tiny").iterdir()
    }
    assert isinstance(names["model"], longfire.Model)
    assert "longfire." not in re.sub(r"longfire\.(\w+)", known_name, program)


def known_name(found: re.Match[str]) -> str:
    return "" if found[1] in longfire.__all__ else found[0]


def test_the_page_of_the_api_shows_that_program_and_documents_every_name():
    page = ROOT / "docs/reference/api.md"
    assert program_of(page) == program_of(ROOT / "README.md")
    documented = set(re.findall(r"^::: longfire\.public\.(\w+)", page.read_text(), re.M))
    assert documented | {"ops"} == set(longfire.__all__)


def test_every_public_name_is_there_and_documented():
    assert sorted(longfire.__all__) == sorted({*PLACES, "ops"})
    for name in longfire.__all__:
        assert getattr(longfire, name).__doc__, name


def test_the_names_that_a_type_checker_sees_are_those_at_run_time():
    """`if TYPE_CHECKING` and the table PLACES say the same."""
    source = Path(public.__file__).read_text()
    block = source.split("if TYPE_CHECKING:")[1].split("\n\n")[0]
    found = {}
    for module, names in re.findall(r"from (longfire[\w.]*) import (.+)", block):
        for name in names.split(", "):
            original, _, renamed = name.partition(" as ")
            found[renamed or original] = (module, original)
    assert found.pop("ops") == ("longfire", "ops")
    assert found == PLACES


def test_star_imports_and_unknown_names_are_those_of_a_plain_module():
    names = {}
    exec("from longfire import *", names)
    assert set(longfire.__all__) <= set(names)
    with pytest.raises(AttributeError, match="no attribute 'model_config'"):
        longfire.model_config  # noqa: B018


def test_the_import_needs_no_torch_and_no_submodule_hides_a_public_name():
    """A submodule of the name of a function would take its place when it is imported."""
    code = (
        "import sys, longfire; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules);"
        "longfire.Sampling; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    folder = Path(longfire.__file__).parent
    files = {path.stem for path in folder.iterdir()}
    assert files & set(longfire.__all__) == {"ops"}


def test_a_step_is_the_step_of_a_run_whatever_the_microbatches():
    """Bit for bit `train.train_step` with the same optimizer; more microbatches differ by rounding."""
    batch = random_batch()
    models = [longfire.build(tiny_config(), seed=3) for _ in range(3)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    ours = longfire.train_step(models[0], batch, optimizers[0], lr=2e-3)
    for group in optimizers[1].param_groups:
        group["lr_scale"] = 1.0
    state = State(models[1], optimizers[1])
    of_a_run = train_step(state, [batch], 2e-3, Training(), Clock(torch.device("cpu")))
    in_parts = longfire.train_step(models[2], batch, optimizers[2], lr=2e-3, microbatches=4)
    assert ours == of_a_run and ours["lr"] == 2e-3 and ours["skipped"] == 0
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(one, other)
    assert in_parts["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert in_parts["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)


def test_a_rate_that_is_not_given_stays_as_the_optimizer_has_it():
    model = longfire.build(tiny_config(), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    assert longfire.train_step(model, random_batch(), optimizer)["lr"] == 0.5
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_dropout_depends_on_the_number_of_the_sequence_and_on_nothing_else():
    losses = []
    for first in (0, 0, 4):
        model = longfire.build(tiny_config(dropout=0.5), seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        record = longfire.train_step(model, random_batch(), optimizer, first_sequence=first)
        losses.append(record["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_a_step_that_is_not_finite_changes_nothing():
    model = longfire.build(tiny_config(), seed=0)
    with torch.no_grad():
        model.norm.weight.fill_(float("inf"))
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters())
    record = longfire.train_step(model, random_batch(), optimizer)
    assert record["skipped"] == 1
    for parameter, old in zip(model.parameters(), before):
        assert torch.equal(parameter, old)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: longfire.build(tiny_config(vocab_size=0)), "with_vocabulary"),
        (lambda: longfire.build(tiny_config(layer_types=("glaa", "attention"))), "mean 'gla'"),
        (lambda: longfire.build("gla-341m"), "gla-341m"),
        (lambda: longfire.load("gla-340m"), r"longfire.build\('gla-340m'\)"),
        (lambda: longfire.load("nowhere"), "no such folder"),
        (lambda: longfire.Batches.from_text("a.txt", "bytes", 0), "seq_len = 0"),
        (lambda: longfire.Tokenizer.load("train"), "Tokenizer.train"),
        (lambda: longfire.Tokenizer.train(["a"], 100), "at least 258"),
    ],
)
def test_what_cannot_be_says_what_to_do(wrong, message):
    with pytest.raises(SettingsError, match=message):
        wrong()


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"microbatches": 3}, "microbatches = 3 must divide the 4 sequences"),
        ({"vocab_size": 100}, {}, "but vocab_size = 100 of the model"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(changes, arguments, message):
    model = longfire.build(tiny_config(**changes), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SettingsError, match=message):
        longfire.train_step(model, random_batch(), optimizer, **arguments)


def test_batches_come_from_a_path_or_several_and_keep_documents_apart(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 30)
    (tmp_path / "b.jsonl").write_text('{"text": "that is the question"}\n' * 30)
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    how = {"tokenizer": "bytes", "seq_len": 16, "folder": tmp_path / "stores"}
    with longfire.Batches.from_text(files, varlen=True, **how) as batches:
        assert batches.at(0, 8).documents is not None
        assert batches.tokenizer.vocab_size == 258
    with longfire.Batches.from_text(files[0], **how) as batches:
        assert batches.at(0, 2).ids_BT.shape == (2, 16)


def test_a_tokenizer_is_trained_saved_and_loaded(tmp_path):
    trained = longfire.Tokenizer.train(["to be or not to be"] * 9, 300)
    trained.save(tmp_path)
    loaded = longfire.Tokenizer.load(tmp_path)
    assert loaded.decode(loaded.encode("not to be")) == "not to be"
    assert loaded.vocab_size == trained.vocab_size
