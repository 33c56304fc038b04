"""scores.py: what `longfire eval` prints, keeps and draws, for runs and for weights alone; mistakes named before a model is read."""

import json
from types import SimpleNamespace

import pytest
import torch.nn.functional as F

from longfire.cli import main as longfire
from longfire.config import settings as all_settings
from longfire.config.options import Scoring
from longfire.data.tokenizer import bytes_tokenizer
from longfire.errors import CheckpointError, DataError, SettingsError
from longfire.evaluation.scores import main, trained_with
from longfire.huggingface.export import export

pytestmark = pytest.mark.dtype

TEXT = "The fire of the firemen, naïve and far. " * 12


@pytest.fixture(scope="module")
def model():
    from conftest import tiny_model

    return tiny_model("gla", "attention", vocab_size=258)


@pytest.fixture
def folder(model, tmp_path, monkeypatch):
    """Weights alone, and texts beside them."""
    monkeypatch.chdir(tmp_path)
    export(model, bytes_tokenizer(), tmp_path / "hf")
    (tmp_path / "a.txt").write_text(TEXT)
    lines = [json.dumps({"text": TEXT[:60], "body": "b" * (5 + i)}) for i in range(3)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    return tmp_path / "hf"


def test_all_documents_of_texts_count(model, folder, capsys, in_fp32):
    """By hand: bytes, then EOS, in rows of 100; whatever is longer than a row goes on in the next one."""
    scoring = Scoring(
        data=("a.txt", "b.jsonl"), seq_len=100, json="out/numbers.json", plot="out/by-position.svg"
    )
    assert main(folder, scoring) == 0
    found = json.loads((folder.parent / "out/numbers.json").read_text())
    ids = [*TEXT.encode(), 257]
    nats, count, correct = 0.0, 0, 0
    for first in range(0, len(ids) - 1, 100):
        row = bytes_of(ids[first : first + 101])
        logits = model.logits(model(row[:, :-1]))[0].detach()
        correct += int((logits.argmax(1) == row[0, 1:]).sum())
        nats, count = (
            nats + F.cross_entropy(logits, row[0, 1:], reduction="sum").item(),
            count + len(logits),
        )
    numbers = found["sources"]["a.txt"]
    assert (numbers["tokens"], numbers["bytes"]) == (count, len(TEXT.encode()) - 1)
    assert numbers["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert numbers["accuracy"] == correct / count
    assert numbers["by_position"][0]["from"] == 1 and numbers["by_position"][-1]["to"] == 100
    assert found["sources"]["b.jsonl"]["tokens"] == 3 * (len(TEXT[:60].encode()) + 1) - 1
    assert len(found["weights"]) == 32 and found["step"] == -1
    message = capsys.readouterr().out
    for part in (
        found["weights"],
        "Hugging Face weights, all documents",
        f"{numbers['loss']:.4f}",
        "64 to 100",
        "b.jsonl",
    ):
        assert part in message
    assert "<svg" in (folder.parent / "out/by-position.svg").read_text()


def bytes_of(ids):
    import torch

    return torch.tensor([ids])


def test_another_field_and_fewer_tokens(folder):
    scoring = Scoring(data=("b.jsonl",), text_field="body", tokens=10, json="n.json", plot="p.html")
    assert main(folder, scoring) == 0
    numbers = json.loads((folder.parent / "n.json").read_text())["sources"]["b.jsonl"]
    assert (numbers["tokens"], numbers["bytes"]) == (
        9,
        8,
    )  # "bbbbb" EOS "bbbb": of 10 the first has nothing before it
    assert "<!doctype html>" in (folder.parent / "p.html").read_text()


def test_needles(folder, capsys):
    scoring = Scoring(
        needle=True,
        data=("a.txt",),
        lengths=(220, 300),
        depths=(0.0, 1.0),
        needles=2,
        json="n.json",
        plot="n.png",
    )
    assert main(folder, scoring) == 0
    cells = json.loads((folder.parent / "n.json").read_text())["needle"]
    assert [(c["length"], c["depth"], c["needles"]) for c in cells] == [
        (220, 0.0, 2),
        (220, 1.0, 2),
        (300, 0.0, 2),
        (300, 1.0, 2),
    ]
    assert (folder.parent / "n.png").read_bytes().startswith(b"\x89PNG")
    assert "needles in a.txt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scoring", "error", "message"),
    [
        (Scoring(), SettingsError, "name texts with --data"),
        (Scoring(data=("a.txt",), plot="p.gif"), SettingsError, "p.gif: pictures are written as"),
        (Scoring(data=("none.txt",)), DataError, "no such file or folder: 'none.txt'"),
        (Scoring(data=("short.txt",)), DataError, "short.txt: too little text"),
        (Scoring(data=("a.txt",), json="a.txt/x.json"), CheckpointError, "cannot be written"),
        (
            Scoring(needle=True, data=("a.txt",), lengths=(20,)),
            SettingsError,
            "--lengths 20: a needle of",
        ),
        (
            Scoring(needle=True, data=("a.txt",), lengths=(2000,)),
            DataError,
            "cannot hide a needle in 2,000",
        ),
    ],
)
def test_mistakes_are_named(scoring, error, message, folder):
    (folder.parent / "short.txt").write_text("")
    if scoring.data == ("short.txt",):
        message = "no document with text is left"
    with pytest.raises(error, match=message):
        main(folder, scoring)


@pytest.mark.parametrize(
    "wrong",
    [
        {"needle": True, "tasks": ("x",)},
        {"needle": True, "depths": (2.0,)},
        {"needle": True, "lengths": (0,)},
    ],
)
def test_options_that_contradict_each_other_are_refused(wrong):
    with pytest.raises(SettingsError, match="--"):
        Scoring(**wrong)


def test_learned_positions_bound_the_row(tmp_path, monkeypatch):
    from conftest import tiny_model

    from longfire.checkpoint.weights import Opened
    from longfire.evaluation.scores import sequence_length

    model = tiny_model("attention", learned_positions=True, max_position_embeddings=32)
    assert sequence_length(Opened(model, bytes_tokenizer()), Scoring()) == 32
    with pytest.raises(SettingsError, match="learned 32 positions"):
        sequence_length(Opened(model, bytes_tokenizer()), Scoring(seq_len=33))


def test_a_run_is_evaluated_with_the_tokenizer_it_was_trained_with(tmp_path):
    """`train` would make another one where the data have changed since, whose ids mean other words."""
    wanted = all_settings.Tokenizer(path="train", add_bos=True)
    run = SimpleNamespace(tokenizer_folder=tmp_path / "tokenizer", tokenizer=wanted)
    assert trained_with(run) == wanted, "nothing was trained yet"
    bytes_tokenizer().save(tmp_path / "tokenizer")
    assert trained_with(run) == all_settings.Tokenizer(
        path=str(tmp_path / "tokenizer"), add_bos=True
    )


def test_a_run_and_its_export_have_the_same_weights_and_losses(tmp_path, monkeypatch, capsys):
    """From the command line: a run of two steps, on what it held out, on other texts, its needles."""
    monkeypatch.chdir(tmp_path)
    config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "layer_types": ["gla", "attention"],
        "gla": {"num_heads": 2},
        "attention": {"num_heads": 2},
    }
    (tmp_path / "model.json").write_text(json.dumps(config))
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{i} {TEXT}"}) for i in range(40))
    )
    (tmp_path / "other.txt").write_text(TEXT)
    words = "--model.config model.json --data.dataset text.jsonl --data.validation_fraction 0.2 --data.num_workers 1"
    words += (
        " --job.dump_folder run --training.seq_len 64 --training.batch_size 2 --training.steps 2"
    )
    words += " --lr_scheduler.warmup_steps 1 --checkpoint.export true"
    assert (
        longfire(["train", *words.split(), "--metrics.report", "false", "--eval.tokens", "2000"])
        == 0
    )
    capsys.readouterr()
    assert longfire(["eval", "run", "--json", "held.json", "--plot", "held.png"]) == 0
    held = json.loads((tmp_path / "held.json").read_text())
    assert held["step"] == 2 and held["documents"] == "validation documents"
    assert held["sources"]["text.jsonl"]["tokens"] == 1999
    for place, folder in (("run", "run"), ("hf", "run/hf")):
        assert (
            longfire(f"eval {folder} --data other.txt --seq_len 64 --json {place}.json".split())
            == 0
        )
    ours, exported = (
        json.loads((tmp_path / f"{place}.json").read_text()) for place in ("run", "hf")
    )
    assert ours["weights"] == exported["weights"] == held["weights"]
    assert ours["sources"] == exported["sources"]
    assert (
        longfire(
            ["eval", "run", "--needle", "--lengths", "200", "--depths", "0.5", "--needles", "1"]
        )
        == 0
    )
    assert "step 2, needles in text.jsonl" in capsys.readouterr().out
