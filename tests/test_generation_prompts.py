"""prompts.py: prompts from words, files and a person; the state stays between turns; figures for who asks."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from test_generation_reader import pushed

from longfire.checkpoint.weights import Opened
from longfire.config.options import Sampling
from longfire.data.tokenizer import bytes_tokenizer
from longfire.errors import DataError, SettingsError
from longfire.generation.generate import generate, stream_text
from longfire.generation.prompts import Conversation, main, read_prompts
from longfire.generation.reader import Reader
from longfire.generation.steps import Pace
from longfire.huggingface.export import export

pytestmark = pytest.mark.dtype

SAMPLING = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def model():
    from conftest import tiny_model

    return tiny_model("gla", "attention", vocab_size=258)


@pytest.fixture
def folder(model, tmp_path):
    export(model, bytes_tokenizer(), tmp_path / "hf")
    return tmp_path / "hf"


def test_from_a_folder_of_hugging_face_weights(model, folder, capsys, in_fp32):
    assert main(folder, SAMPLING, ["the ", "end"]) == 0
    alone = [
        p + "".join(stream_text(model, bytes_tokenizer(), p, SAMPLING, index=i))
        for i, p in enumerate(["the ", "end"])
    ]
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in alone)
    assert main(folder, SAMPLING, ["the ", "end"], batch_size=2, stats=True) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{text}\n" for text in alone)
    assert (
        captured.err.startswith("stats: prompts: 7 tokens in ")
        and "ms a token; cache: " in captured.err
    )


def test_prompts_of_a_file(tmp_path, folder, capsys):
    (tmp_path / "a.txt").write_text("the \n\n  end\n")
    assert read_prompts(tmp_path / "a.txt") == ["the ", "  end"]
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"prompt": "two\nlines"}) + "\n" + json.dumps({"prompt": "x", "id": 3})
    )
    assert read_prompts(tmp_path / "a.jsonl") == ["two\nlines", "x"]
    assert main(folder, SAMPLING, [], tmp_path / "a.jsonl", batch_size=4) == 0
    assert capsys.readouterr().out.startswith("two\nlines")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt: prompts cannot be read"),
        ("empty.txt", "\n\n", "empty.txt: no prompt in it"),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"text": "y"}',
            "a.jsonl:2: not a JSON object with a `prompt`",
        ),
        ("b.jsonl", "[1]", "b.jsonl:1: not a JSON object with a `prompt`"),
        ("c.jsonl", '{"prompt": 3}', "c.jsonl:1: .*prompt must be text, not 3"),
    ],
)
def test_files_that_hold_no_prompts_are_named(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name)


def test_the_state_is_kept_between_turns(model):
    """Each turn's reply is that to the whole text so far, and no token passes through the model twice."""
    pace, tokenizer = Pace(), bytes_tokenizer()
    conversation = Conversation(
        Opened(model, tokenizer), Sampling(max_new_tokens=6, temperature=0), pace
    )
    for number, line in enumerate(["the ", "and", ""]):
        before = [*conversation.ids, *tokenizer.encode(f"\n{line}" if number else line)]
        reply = "".join(conversation.reply(line))
        drawn = generate(model, before, conversation.sampling, [tokenizer.eos_id])
        assert conversation.ids == before + drawn
        assert reply == "".join(pushed(Reader(tokenizer, before), drawn))
    assert (
        conversation.cache.length == len(conversation.ids) - 1
    )  # the last drawn one will be seen in the next turn
    assert pace.prompt_tokens + pace.steps == conversation.cache.length


def test_lines_that_are_asked_for(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the \nend\n"))
    assert main(folder, SAMPLING, [], interactive=True, stats=True) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") >= 2 and captured.err.startswith("stats: ")


def test_a_terminal_is_asked_when_there_is_no_prompt(folder, monkeypatch, capsys):
    answers = iter(["the "])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))

    def answer(shown: str) -> str:
        assert shown == "> "
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    assert main(folder, SAMPLING, []) == 0
    captured = capsys.readouterr()
    assert "Ctrl-D ends" in captured.err and captured.out


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "no prompt: give --prompt"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 2, "interactive": True}, "leave out"),
    ],
)
def test_what_cannot_be_done_is_refused(how, message, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    prompts = [] if not how else ["x"]
    with pytest.raises(SettingsError, match=message):
        main(folder, SAMPLING, prompts, **how)
