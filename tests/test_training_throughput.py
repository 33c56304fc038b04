"""bench.py: random rows are whole batches; the result adds up."""

import json

import pytest
import torch
from logged import logged_to

from longfire.config.run import Run
from longfire.training.throughput import bench, random_batch

pytestmark = pytest.mark.dtype

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["gla", "attention"],
    "gla": {"num_heads": 2},
    "attention": {"num_heads": 2},
    "intermediate_size": 48,
}


@pytest.fixture
def compose(tmp_path):
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    small = {
        "model.config": str(tmp_path / "shape.json"),
        "training.seq_len": "32",
        "training.batch_size": "2",
    }
    return lambda **overrides: Run.compose(None, {**small, "training.compile": "off", **overrides})


def test_random_rows_lie_in_documents(compose, monkeypatch):
    monkeypatch.setattr("longfire.training.throughput.DOCUMENT_TOKENS", 8)
    run = compose(**{"data.varlen": "true", "training.gradient_accumulation_steps": "2"})
    batch = random_batch(run, 97, torch.Generator().manual_seed(0))
    assert batch.ids_BT.shape == (4, 32) and batch.ids_BT.max() < 97
    same = batch.documents.ids_BT[:, 1:] == batch.documents.ids_BT[:, :-1]
    assert torch.equal(
        batch.positions_BT[:, 1:], torch.where(same, batch.positions_BT[:, :-1] + 1, 0)
    )
    assert not same.all()


def test_the_numbers_add_up(compose):
    message = []
    with logged_to(message):
        result = bench(
            compose(**{"tokenizer.path": "train", "tokenizer.train_vocab_size": "300"}), steps=3
        )
    assert result["tokens_per_second"] == pytest.approx(64 / result["seconds"])
    assert 0 < result["mfu"] < 1
    text = "\n".join(message)
    for part in (
        "tokens/s, the median of 3 steps",
        "forward",
        "backward",
        "optimizer",
        "MiB at most",
        "GFLOP/s",
    ):
        assert part in text
