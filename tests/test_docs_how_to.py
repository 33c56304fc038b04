"""docs/how-to/: the reader of its page on data formats reads; the commands on own data run."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from test_docs_data import SMALLER

from longfire.cli import main
from longfire.data import formats
from longfire.data.formats import FORMATS
from longfire.data.record_format import RecordFormat
from longfire.data.records import TEXTS, Record
from longfire.data.tokenizer import bytes_tokenizer

PAGES = Path(__file__).parents[1] / "docs/how-to"


def block(page: str, kind: str) -> list[str]:
    """The blocks of code of a page, without their indentation."""
    found = re.findall(rf"^ *```{kind}\n(.+?)^ *```", (PAGES / page).read_text(), re.M | re.S)
    return ["\n".join(line.removeprefix("    ") for line in text.splitlines()) for text in found]


def test_the_reader_of_the_page_on_data_formats_reads_and_goes_on(tmp_path, monkeypatch):
    program = re.findall(
        r"^```python\n(.+?)^```", (PAGES / "add-a-data-format.md").read_text(), re.M | re.S
    )
    names = {"Path": Path, "Iterator": Iterator, "Record": Record, "FORMATS": dict(FORMATS)}
    names["RecordFormat"] = RecordFormat
    exec(program[0], names)
    monkeypatch.setattr(formats, "FORMATS", names["FORMATS"])
    file = tmp_path / "a.lines"
    file.write_text("one\ntwo\nthree\n")
    read = [(record.row, record.text) for record in formats.read(file, TEXTS)]
    assert read == [(1, "one"), (2, "two"), (3, "three")]
    assert [record.text for record in formats.read(file, TEXTS, row=2)] == ["three"]
    assert [record.done for record in formats.read(file, TEXTS)][-1] == 1


def test_the_commands_on_loss_masks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (PAGES / "loss-masks.md").read_text()
    exec(re.findall(r"^```python\n(.+?)^```", page, re.M | re.S)[0], {})
    bytes_tokenizer().save(tmp_path / "tokenizer")
    template = "{% for m in messages %}{{ bos_token + m.role + m.content + eos_token }}{% endfor %}"
    asks = "{% if add_generation_prompt %}{{ bos_token + 'assistant' }}{% endif %}"
    (tmp_path / "tokenizer/chat_template.jinja").write_text(template + asks)
    commands = block("loss-masks.md", "bash")
    shares = ["75.0%", "20.0%", "9.1%"]
    assert len(commands) == len(shares)
    for command, share in zip(commands, shares):
        words = [*shlex.split(command)[1:], "--data.num_workers", "1"]
        assert main(words) == 0
        assert f"{share} of the tokens count in the loss" in capsys.readouterr().out


CHAT_TEMPLATE = """{% for message in messages %}{{ bos_token + message.role + '\\n' }}
{{- message.content + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"""


@pytest.fixture
def small_instruct(tmp_path, monkeypatch) -> Path:
    """A working folder in which a small model with a chat template stands for the hub's."""
    monkeypatch.chdir(tmp_path)
    folder = Path("HuggingFaceTB/SmolLM2-135M-Instruct")
    folder.mkdir(parents=True)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=258,
        max_position_embeddings=4096,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    bytes_tokenizer().save(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def test_the_page_on_chats_trains_and_exports_a_model_that_answers(small_instruct, capsys):
    made_chats, asks_the_export = block("chats.md", "python")
    exec(made_chats, {})
    smaller = [
        f"--model.config={small_instruct}",
        "--training.seq_len=64",
        "--training.batch_size=2",
        "--training.global_batch_size=4",
        "--training.compile=off",
        "--training.threads=1",
        "--eval.interval=0",
        "--metrics.report=false",
    ]
    prepare, train, export = map(shlex.split, block("chats.md", "bash"))
    assert main(prepare[1:]) == 0
    learned = b"It is 5."
    turns = ["user\nWhat is 2+3?", "assistant\nIt is 5."]
    tokens = sum(len(turn.encode()) + 2 for turn in turns)
    share = f"{(len(learned) + 1) / tokens:.1%}"  # EOS ends the answer
    assert f"{share} of the tokens count in the loss" in capsys.readouterr().out
    assert main([*train[1:], *smaller, "--training.steps=3"]) == 0
    assert main(export[1:]) == 0
    assert Path("exported/chat_template.jinja").read_text() == CHAT_TEMPLATE
    exec(asks_the_export, {})
    assert "user\nWhat is 2+3?<eos><bos>assistant\n" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_on_own_data_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("to be or not to be\n" * 2000)
    (tmp_path / "more.jsonl").write_text('{"text": "that is the question"}\n' * 200)
    commands = block("own-data.md", "bash")
    assert len(commands) == 2
    for command in commands:
        words = [*shlex.split(command)[1:], "--data.num_workers", "1"]
        if words[0] == "train":
            small = SMALLER.replace("--tokenizer.path bytes", "--training.max_seconds 0").split()
            words += [*small, "--job.dump_folder", "run", "--tokenizer.train_vocab_size", "300"]
        assert main(words) == 0
    assert (tmp_path / "run/checkpoints/step-2").is_dir()


def test_the_runs_of_the_page_on_images_and_texts_train(tmp_path, monkeypatch):
    """Its folders, recipe and commands; two steps each."""
    pytest.importorskip("PIL")
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification

    monkeypatch.chdir(tmp_path)
    (tree,) = block("images.md", "text")
    for number, line in enumerate(tree.split()):
        for copy in range(4):
            file = tmp_path / line.replace(".jpg", f"{copy or ''}.jpg")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 50), (60 * number, 100, 60 * copy)).save(file)
    (recipe,) = block("images.md", "toml")
    (tmp_path / "photos.toml").write_text(recipe)
    (records,) = block("images.md", "json")
    (tmp_path / "reviews.jsonl").write_text(f"{records}\n" * 20)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**shape, intermediate_size=16, image_size=32, patch_size=8, num_labels=2)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit-folder")
    small = ["--training.steps", "2", "--training.batch_size", "4", "--data.num_workers", "1"]
    first, evaluations, *others = block("images.md", "bash")
    assert main([*shlex.split(first)[1:], *small]) == 0
    assert len(evaluations.splitlines()) == 3
    for command in evaluations.splitlines():
        assert main(shlex.split(command)[1:]) == 0
    assert "accuracy" in (tmp_path / "scores.json").read_text()
    assert len(others) == 2
    for number, command in enumerate(others):
        words = shlex.split(command.replace("\\\n", " "))[1:]
        run = tmp_path / f"run{number}"
        assert main([*words, *small, "--job.dump_folder", str(run)]) == 0
        assert "accuracy" in (run / "metrics.jsonl").read_text()
        assert (run / "classes.json").is_file()
