"""Sequence classification: causal and bidirectional models learn the class of texts; padding changes nothing; a run resumes."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config
from plans import PLANS, parts, state_of, steps, whole
from safetensors.torch import load_file
from small_runs import command_line, recorded
from worlds import in_processes

from longfire.cli import main
from longfire.config.run import Run
from longfire.data.batch import Batch
from longfire.data.labelled_texts import classes_of, read_labelled
from longfire.data.pack import NO_LABEL
from longfire.errors import DataError, SettingsError
from longfire.initialise import build
from longfire.ops.documents import Documents
from longfire.parallel.mesh import ALONE, Mesh
from longfire.tasks.class_losses import class_logits, class_losses, text_hidden, text_pooled

GOOD = ["fine", "bright", "warm", "kind"]
BAD = ["grim", "cold", "dull", "sour"]
OTHER = ["fire", "long", "stone", "river", "cloud"]


def records(count: int, seed: int) -> list[dict[str, str]]:
    """The class of a text is that of one word in it, anywhere."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        label = draw.choice(["good", "bad"])
        words = draw.choices(OTHER, k=draw.randint(1, 5))
        words.insert(draw.randint(0, len(words)), draw.choice(GOOD if label == "good" else BAD))
        found.append({"review": " ".join(words), "kind": label})
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("reviews")
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, records(400, 0))))
    pq.write_table(pa.Table.from_pylist(records(100, 1)), root / "val.parquet")
    return root


def words(data: Path, run: Path, **changes: str) -> dict[str, str]:
    return {
        "job.task": "sequence_classification",
        "job.dump_folder": str(run),
        "model.hidden_size": "32",
        "model.num_hidden_layers": "2",
        "model.layer_types": "attention",
        "model.attention.num_heads": "4",
        "model.init_matrices": "fan_in",
        "model.init_embedding": "0.5",
        "model.compute_dtype": "float32",
        "data.dataset": str(data / "train.jsonl"),
        "data.validation": str(data / "val.parquet"),
        "data.text_field": "review",
        "classification.label_field": "kind",
        "training.seq_len": "48",
        "training.batch_size": "32",
        "training.steps": "60",
        "training.compile": "off",
        "training.threads": "1",
        "optimizer.lr": "5e-3",
        "lr_scheduler.warmup_steps": "10",
        "metrics.report": "false",
        **changes,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.direction": "both", "model.pool": "mean"},
        pytest.param(
            {"model.layer_types": "gla", "model.gla.num_heads": "2", "model.direction": "both"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_class_of_a_text_is_learned(data, tmp_path, changes):
    settings = words(data, tmp_path / "run", **changes)
    if "model.gla.num_heads" in changes:
        del settings["model.attention.num_heads"]
    assert main(command_line(settings)) == 0
    assert recorded(tmp_path / "run")[-1]["eval/val.parquet/accuracy"] >= 0.95
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == ["bad", "good"]


def test_a_run_in_two_parts_is_the_run_to_the_bit(data, tmp_path):
    changes = {"training.steps": "6", "lr_scheduler.name": "constant", "eval.at_end": "false"}
    changes |= {"model.dropout": "0.1", "classification.label_smoothing": "0.1"}
    assert main(command_line(words(data, tmp_path / "whole", **changes))) == 0
    for total in ("3", "6"):
        settings = words(data, tmp_path / "parts", **{**changes, "training.steps": total})
        assert main(command_line(settings)) == 0
    assert recorded(tmp_path / "parts") == recorded(tmp_path / "whole")
    ours, theirs = (
        load_file(next((tmp_path / run / "checkpoints" / "step-6").rglob("*.safetensors")))
        for run in ("parts", "whole")
    )
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


TEXTS = {"num_classes": 3, "vocab_size": 97}


def texts_of(first: int, count: int) -> Batch:
    """Texts of the run by their number, of unequal lengths; some without a label."""
    chance = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(97, (96, 16), generator=chance)
    last_B = torch.randint(16, (96,), generator=chance)
    labels_BT = torch.full((96, 16), NO_LABEL)
    labels_BT[torch.arange(96), last_B] = torch.randint(3, (96,), generator=chance)
    labels_BT[::5] = NO_LABEL
    mine = slice(first, first + count)
    documents = Documents.from_ids((torch.arange(16) > last_B[mine, None]).long())
    positions_BT = torch.arange(16).expand(count, 16)
    return Batch(ids_BT[mine], labels_BT[mine], positions_BT, documents)


def loss_sum(model, batch, noise_BT=None, cache=None):
    pooled_BD = text_pooled(text_hidden(model, batch, noise_BT), batch, model.config.pool)
    return class_losses(class_logits(model, pooled_BD), batch.labels_BT.amax(1), 0.1).sum()


def trained_on(mesh, name):
    changes = {**TEXTS, "direction": "both", "pool": "mean", "dropout": 0.1}
    state = state_of(("gla", "attention"), PLANS[name], mesh, torch.float64, **changes)
    return steps(state, 2, rows=texts_of, loss_function=loss_sum), parts(state)


def trained(rank, name):
    return trained_on(Mesh.of_degrees(PLANS[name].degrees, "cpu"), name)


@pytest.mark.parametrize("name", ["fsdp 2", "tp 2"])
def test_no_plan_changes_a_step(name):
    true_numbers, true_parts = trained_on(ALONE, "one")
    answers = in_processes(2, trained, name)
    for numbers, _ in answers:
        for ours, theirs in zip(numbers, true_numbers):
            assert ours == pytest.approx(theirs, rel=1e-9)
    found = whole([held for _, held in answers], true_parts)
    for tensor, numbers in whole([true_parts], true_parts).items():
        torch.testing.assert_close(found[tensor], numbers, rtol=1e-9, atol=1e-12, msg=tensor)


@pytest.mark.parametrize("pool", ["last", "mean", "first"])
@pytest.mark.parametrize("direction", ["causal", "both"])
def test_padding_changes_nothing(pool, direction):
    """A text in a longer batch has the logits that it has alone."""
    changes = {**TEXTS, "pool": pool, "direction": direction, "initializer_range": 0.2}
    model = build(tiny_config("gla", "attention", **changes), 0)
    batch = texts_of(1, 4)
    logits_BN = class_logits(model, text_pooled(text_hidden(model, batch), batch, pool))
    for row, labels_T in enumerate(batch.labels_BT):
        length = int((labels_T != NO_LABEL).nonzero()) + 1
        positions_BT = torch.arange(length)[None]
        alone = Batch(batch.ids_BT[row, None, :length], labels_T[None, :length], positions_BT)
        alone_BN = class_logits(model, text_pooled(text_hidden(model, alone), alone, pool))
        torch.testing.assert_close(alone_BN[0], logits_BN[row], rtol=1e-4, atol=1e-4)


def test_jsonl_and_parquet_give_the_same_records(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 3, "more": None} for i in range(7)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines, table = (
        read_labelled(str(tmp_path / name), "a", "", "label") for name in ("a.jsonl", "a.parquet")
    )
    assert lines.fingerprint() == table.fingerprint() and lines.labels[:4] == ("0", "1", "2", "0")
    assert classes_of({"10", "9", "2"}) == ("2", "9", "10")
    assert classes_of({"b", "10", "a"}) == ("10", "a", "b")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a"}', "a.jsonl:2: the field 'label'"),
        ('{"text": "a", "label": 1.5}', "holds no class: 1.5"),
        ('{"text": " ", "label": 1}', "holds no text"),
        ('{"text": "a", "label": 1', "a.jsonl:2: broken JSON"),
        ("[1]", "a.jsonl:2: no JSON object"),
    ],
)
def test_a_broken_record_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n' + line)
    with pytest.raises(DataError) as error:
        read_labelled(str(tmp_path / "a.jsonl"), "a", "", "label")
    assert message in str(error.value)


def test_a_link_without_its_file_is_an_error(tmp_path):
    """Its records would be missing, and nobody would know."""
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n')
    (tmp_path / "b.jsonl").symlink_to("not-fetched")
    with pytest.raises(DataError, match=r"b\.jsonl: cannot be read"):
        read_labelled(str(tmp_path), "a", "", "label")


def test_a_class_that_only_validation_has_is_named(data, tmp_path, capsys):
    (tmp_path / "more.jsonl").write_text('{"review": "so", "kind": "neither"}\n')
    changes = {"data.validation": str(tmp_path / "more.jsonl")}
    assert main(command_line(words(data, tmp_path / "run", **changes))) != 0
    assert "more.jsonl:1: the class 'neither' is not one of the 2" in capsys.readouterr().err


def test_records_of_one_class_are_refused(data, tmp_path, capsys):
    (tmp_path / "same.jsonl").write_text('{"review": "so", "kind": "good"}\n' * 40)
    changes = {"data.dataset": str(tmp_path / "same.jsonl"), "data.validation": ""}
    assert main(command_line(words(data, tmp_path / "run", **changes))) == DataError.exit_code
    assert "every record has the class 'good'" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images.flip": "true"}, "images.flip = True is not read by job.task"),
        ({"model.pool": "first"}, "takes the first token"),
        ({"tokenizer.path": "train"}, "tokenizer.path = train is not supported"),
        ({"checkpoint.export": "true"}, "checkpoint.export = True is not read"),
    ],
)
def test_what_the_task_cannot_do_is_refused(data, tmp_path, changes, message):
    with pytest.raises(SettingsError, match=message):
        Run.compose(None, words(data, tmp_path / "run", **changes))


@pytest.mark.parametrize("source", ["run", "export"])
@pytest.mark.parametrize("tied", ["false", "true"])
def test_a_classifier_starts_from_a_language_model_with_a_fresh_head(data, tmp_path, source, tied):
    language_model = {
        "job.dump_folder": str(tmp_path / "lm"),
        "model.tie_word_embeddings": tied,
        "data.dataset": str(data / "train.jsonl"),
        "data.text_field": "review",
        "data.folder": str(tmp_path / "stores"),
        "data.num_workers": "1",
        "checkpoint.export": "true",
        "training.steps": "2",
        "training.batch_size": "2",
    }
    small = words(data, tmp_path / "run")
    for key in ("job.task", "data.validation", "classification.label_field"):
        del small[key]
    assert main(command_line({**small, **language_model})) == 0
    folder = {"run": tmp_path / "lm", "export": tmp_path / "lm" / "hf"}[source]
    changes = {"model.weights": str(folder), "optimizer.lr": "1e-12", "training.steps": "1"}
    if source == "export":
        changes["model.config"] = str(folder)
    settings = words(data, tmp_path / "run", **changes)
    if source == "export":
        settings = {k: v for k, v in settings.items() if k.count(".") == 1 or "model" not in k}
        for key in [k for k in settings if k.startswith("model.") and k not in changes]:
            del settings[key]
    elif tied == "true":
        settings["model.tie_word_embeddings"] = "true"
    assert main(command_line(settings)) == 0
    theirs, ours = (
        load_file(next((tmp_path / name / "checkpoints" / step).rglob("*.safetensors")))
        for name, step in (("lm", "step-2"), ("run", "step-1"))
    )
    assert ours["model/head.weight"].shape == (2, 32) and ours["model/head.bias"].shape == (2,)
    body = [name for name in ours if name.startswith("model/") and "head" not in name]
    assert len(body) > 10
    for name in body:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9)


def test_a_classifier_starts_from_another_one_with_other_classes(data, tmp_path, capsys):
    changes = {"training.steps": "1", "optimizer.lr": "1e-12", "data.validation": ""}
    assert main(command_line(words(data, tmp_path / "two", **changes))) == 0
    lines = [{"review": f"{word} stone", "kind": word} for word in (*GOOD, *BAD) * 4]
    (tmp_path / "eight.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes |= {
        "model.weights": str(tmp_path / "two"),
        "data.dataset": str(tmp_path / "eight.jsonl"),
    }
    capsys.readouterr()
    assert main(command_line(words(data, tmp_path / "run", **changes))) == 0
    assert "fresh head over 8 classes, since theirs has 2" in capsys.readouterr().out
    theirs, ours = (
        load_file(next((tmp_path / run / "checkpoints" / "step-1").rglob("*.safetensors")))
        for run in ("two", "run")
    )
    assert ours["model/head.weight"].shape == (8, 32)
    torch.testing.assert_close(ours["model/embed.weight"], theirs["model/embed.weight"])
