"""weights.py: which tokenizer, device, type and kernels a model is opened with; its folders are in test_huggingface_export.py."""

import json

import pytest
import torch

from longfire.checkpoint.weights import choose_place, newest_weights, open_model, tokenizer_of
from longfire.config import settings
from longfire.config.run import Run
from longfire.config.run_folder import save
from longfire.data.tokenizer import bytes_tokenizer, train_tokenizer
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.export import export
from longfire.ops.forms import OPS, chosen

pytestmark = pytest.mark.dtype


@pytest.fixture
def run(tmp_path, tiny_config) -> Run:
    (tmp_path / "shape.json").write_text(json.dumps(tiny_config("gla", vocab_size=0).to_dict()))
    (tmp_path / "texts.jsonl").write_text('{"text": "fire"}\n' * 9)
    overrides = {
        "job.dump_folder": tmp_path / "run",
        "model.config": tmp_path / "shape.json",
        "data.dataset": tmp_path / "texts.jsonl",
        "data.folder": tmp_path / "stores",
        "training.seq_len": 8,
        "model.compute_dtype": "bfloat16",
        "model.kernels": "reference",
    }
    run = Run.compose(None, {key: str(value) for key, value in overrides.items()})
    save(run)
    return run


def test_the_tokenizer_is_the_copy_in_the_run_folder_else_that_of_the_settings(run):
    assert tokenizer_of(run).fingerprint == bytes_tokenizer().fingerprint
    trained = train_tokenizer(["fire and more fire"], 260)
    trained.save(run.folder / "tokenizer")
    assert tokenizer_of(run).fingerprint == trained.fingerprint


def test_place_decides_type_and_kernels():
    training = settings.Training(device="cpu")
    device, dtype = choose_place(
        training, settings.Model(compute_dtype="bfloat16", kernels="reference")
    )
    assert (device.type, dtype) == ("cpu", torch.bfloat16)
    assert {chosen(op) for op in OPS} == {"reference"}
    assert choose_place(training, settings.Model(compute_dtype="float32"))[1] == torch.float32
    assert chosen("delta_rule") == "torch"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingsError, match="nowhere: no such folder"):
        open_model(tmp_path / "nowhere")


def test_a_run_without_a_checkpoint_says_what_to_do(run):
    for step in (-1, 5):
        with pytest.raises(CheckpointError, match="checkpoint"):
            open_model(run.folder, step)
    with pytest.raises(CheckpointError, match="there is no complete checkpoint; train first"):
        newest_weights(run.folder / "checkpoints")


def test_hugging_face_weights_are_opened_as_a_model_without_a_run(tmp_path, tiny_model):
    model = tiny_model("gla", "attention", vocab_size=258)
    export(model, bytes_tokenizer(), tmp_path / "hf")
    opened = open_model(tmp_path / "hf")
    assert (opened.run, opened.step) == (None, -1)
    assert all(p.equal(opened.model.state_dict()[name]) for name, p in model.state_dict().items())
    assert opened.tokenizer.encode("fire") == [102, 105, 114, 101]
    with pytest.raises(SettingsError, match="--step 3 chooses a checkpoint of a run"):
        open_model(tmp_path / "hf", 3)


def test_a_folder_of_neither_kind_names_what_is_missing(tmp_path):
    with pytest.raises(SettingsError, match="config.json"):
        open_model(tmp_path)
