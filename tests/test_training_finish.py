"""finish.py through a whole small run: what is asked for is done, and the last lines say where everything lies."""

import json
from pathlib import Path

import pytest
from logged import logged_to

from longfire.cli import main
from longfire.config.run import Run
from longfire.errors import SettingsError
from longfire.training import finish as room
from longfire.training.loop import train

pytestmark = pytest.mark.dtype

SHAPE = {
    "model_type": "longfire",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "layer_types": ["gla", "attention"],
    "intermediate_size": 16,
    "gla": {"num_heads": 2},
    "attention": {"num_heads": 2},
}


@pytest.fixture
def overrides(tmp_path) -> dict[str, str]:
    texts = [{"text": f"document {i}: " + "fire " * (i % 7 + 1)} for i in range(200)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    values = {
        "job.dump_folder": tmp_path / "run",
        "job.description": "a small fire",
        "model.config": tmp_path / "shape.json",
        "data.dataset": tmp_path / "texts.jsonl",
        "data.folder": tmp_path / "stores",
        "data.validation_fraction": 0.1,
        "data.num_workers": 1,
        "training.seq_len": 16,
        "training.batch_size": 2,
        "training.steps": 3,
        "training.compile": "off",
        "lr_scheduler.warmup_steps": 1,
        "eval.tokens": 64,
        "eval.compare_xz": "true",
        "eval.sample_prompt": "fire ",
        "eval.sample_tokens": 8,
        "checkpoint.export": "true",
    }
    return {key: str(value) for key, value in values.items()}


def trained(overrides: dict[str, str], **changes: str) -> list[str]:
    notes: list[str] = []
    with logged_to(notes):
        run = Run.compose(
            None, overrides | {key.replace("__", "."): value for key, value in changes.items()}
        )
        assert train(run) == 0
    return notes


def places(note: str) -> dict[str, Path]:
    lines = note.split("Outputs:\n")[1].splitlines()
    return {
        what.strip(): Path(path) for what, path in (line.strip().rsplit("  ", 1) for line in lines)
    }


def test_all_that_is_asked_for_is_done_and_found(overrides):
    notes = trained(overrides)
    found = places(notes[-1])
    assert found.keys() == {"settings", "metrics", "checkpoint", "Hugging Face weights", "report"}
    assert all(path.exists() for path in found.values()), found
    assert found["checkpoint"].name == "step-3"
    (held_out,) = (note for note in notes if note.startswith("validation of texts.jsonl: loss "))
    assert "bits a byte (xz -9e on the same bytes: " in held_out
    assert any(note.startswith("export: reloaded and compared") for note in notes)
    assert any(note.startswith("sample, after 'fire ':\n") for note in notes)
    card = (found["Hugging Face weights"] / "README.md").read_text()
    assert (
        "| description | a small fire |" in card
        and "| steps | 3 |" in card
        and "| tokens | 96 |" in card
    )
    assert (
        main(
            [
                "generate",
                str(found["Hugging Face weights"]),
                "--prompt",
                "fire",
                "--max_new_tokens",
                "2",
            ]
        )
        == 0
    )


def test_what_is_not_asked_for_is_not_done(overrides):
    off = {
        "checkpoint__export": "false",
        "eval__sample_prompt": "",
        "metrics__report": "false",
        "eval__at_end": "false",
        "eval__compare_xz": "false",
    }
    notes = trained(overrides, checkpoint__enable_checkpoint="false", **off)
    found = places(notes[-1])
    assert found.keys() == {"settings", "metrics"}
    folder = found["settings"].parent
    assert (
        not (folder / "hf").exists()
        and not (folder / "report.html").exists()
        and not (folder / "checkpoints").exists()
    )
    assert not any(note.startswith(("held out", "export", "sample")) for note in notes)


def test_a_report_that_cannot_be_drawn_is_no_failure(overrides, monkeypatch):
    def no_matplotlib(*_):
        raise SettingsError("curves are drawn by matplotlib, which is not installed")

    monkeypatch.setattr(room, "html", no_matplotlib)
    notes = trained(overrides, checkpoint__export="false", eval__sample_prompt="")
    assert any("no report.html: curves are drawn by matplotlib" in note for note in notes)
    assert "report" not in places(notes[-1])
