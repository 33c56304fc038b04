"""recall.py: MQAR batches are what the paper says, and the scorers know who remembers and who guesses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from longfire.block_execution import TensorRegions
from longfire.config.model_config import ModelConfig
from longfire.data.pack import NO_LABEL
from longfire.data.tokenizer import bytes_tokenizer
from longfire.errors import SettingsError
from longfire.evaluation.recall import Cell, Needle, accuracy, distinct, mqar, needle_table


@given(some.integers(1, 8), some.integers(0, 5), some.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_every_key_comes_again_and_its_label_is_its_value(pairs, more, seed):
    tokens, words = 4 * pairs + 2 * more, 64
    batch = mqar(5, tokens, pairs, words, seed)
    assert batch.ids_BT.shape == batch.labels_BT.shape == (5, tokens)
    for ids, labels in zip(batch.ids_BT.tolist(), batch.labels_BT.tolist()):
        table = dict(zip(ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2]))
        assert len(table) == pairs and all(
            0 < key < words // 2 <= value < words for key, value in table.items()
        )
        asked = [place for place, label in enumerate(labels) if label != NO_LABEL]
        assert (
            len(asked) == pairs
            and min(asked) >= 2 * pairs
            and all(place % 2 == 0 for place in asked)
        )
        assert {ids[place]: labels[place] for place in asked} == table


def test_the_seed_decides_and_distances_follow_the_power_law():
    one, again, other = mqar(8, 64, 4, 128, 1), mqar(8, 64, 4, 128, 1), mqar(8, 64, 4, 128, 2)
    assert torch.equal(one.ids_BT, again.ids_BT) and not torch.equal(one.ids_BT, other.ids_BT)
    places = np.nonzero(mqar(4000, 64, 1, 128, 3).labels_BT.numpy() != NO_LABEL)[1]
    expected = np.arange(1, 32) ** -0.99
    seen = np.bincount((places - 2) // 2, minlength=31) / 4000
    np.testing.assert_allclose(seen, expected / expected.sum(), atol=4 * 0.5 / 4000**0.5)


def test_numbers_are_drawn_without_repetition():
    drawn = distinct(np.random.default_rng(0), 1000, np.array([1.0, 1.0, 1e-9, 1.0]), 3)
    assert all(sorted(row) == [0, 1, 3] for row in drawn.tolist())


@pytest.mark.parametrize(("tokens", "pairs", "words"), [(15, 2, 64), (12, 4, 64), (64, 8, 16)])
def test_impossible_tests_are_refused(tokens, pairs, words):
    with pytest.raises(SettingsError, match="MQAR"):
        mqar(2, tokens, pairs, words, 0)


class Oracle(torch.nn.Module):
    """Knows the answer of each row from the row itself: what followed the last earlier place of the same words."""

    pipeline, regions = None, TensorRegions()  # whole, in one process

    def __init__(self, looks: bool, context: int = 1, words: int = 258) -> None:
        super().__init__()
        self.embed, self.head = (
            torch.nn.Embedding(1, 1),
            SimpleNamespace(weight=20 * torch.eye(words)),
        )
        self.looks, self.context, self.config = (
            looks,
            context,
            ModelConfig(1, 1, ("attention",), vocab_size=words),
        )

    def forward(self, ids_BT, seq=None):
        guess = torch.zeros_like(ids_BT)
        for row, ids in enumerate(ids_BT.tolist()):
            seen: dict[tuple[int, ...], int] = {}
            for place in range(self.context - 1, len(ids)):
                key = tuple(ids[place - self.context + 1 : place + 1])
                guess[row, place] = seen.get(key, 0) if self.looks else 0
                if place + 1 < len(ids):
                    seen[key] = ids[place + 1]
        return torch.nn.functional.one_hot(guess, len(self.head.weight)).float()


def test_the_accuracy_of_who_remembers_and_who_does_not():
    batch = mqar(6, 32, 4, 258, 0)
    assert accuracy(Oracle(looks=True), batch) >= 0.9  # a random word may be a key as well
    assert accuracy(Oracle(looks=False), batch) == 0


def haystack(characters: int) -> SimpleNamespace:
    ids = np.frombuffer((b"fire and forest " * (characters // 16 + 1))[:characters], np.uint8)
    return SimpleNamespace(length=len(ids), tokens=lambda first, stop: ids[first:stop])


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_rows_with_a_needle_and_without(depth):
    needle = Needle(None, bytes_tokenizer(), haystack(900))
    (hidden, answer), (plain, same) = needle.haystacks(300, depth, 3, seed=0)
    assert len(hidden) == len(plain) == 300 and answer == same == 7
    text, number = bytes(hidden).decode(), bytes(hidden[-6:]).decode()
    said = f"\nThe secret number of Quito is {number}"
    assert text.endswith(said) and text.count(said) == 2 and f"{said}.\n" in text
    assert bytes(plain).decode().count(number) == 1 and plain[-len(said) :] == hidden[-len(said) :]
    room = 300 - len(said)
    assert text.index(said) == round(depth * (room - len(said) - 2))


def test_who_finds_the_needle_gains_and_repeats_it():
    finder, blind = (
        Needle(Oracle(looks, context=6), bytes_tokenizer(), haystack(2000))
        for looks in (True, False)
    )
    (cell,) = finder.measure([400], [0.5], 5, batch_size=4)
    assert (cell.length, cell.depth, cell.needles, cell.repeated) == (400, 0.5, 5, 1.0)
    assert cell.nats < 1e-3 and cell.gain > 20
    (cell,) = blind.measure([400], [0.5], 5, batch_size=3)
    assert cell.repeated == 0 and abs(cell.gain) < 1e-3


def test_the_batch_size_changes_nothing(tiny_model):
    needle = Needle(
        tiny_model("gla", "attention", vocab_size=258), bytes_tokenizer(), haystack(900)
    )
    one, many = (needle.measure([200, 260], [0.0, 1.0], 3, batch_size=size) for size in (1, 4))
    for a, b in zip(one, many):
        assert (a.nats, a.nats_without) == pytest.approx((b.nats, b.nats_without), rel=1e-5)


def test_the_table_has_a_line_a_length_and_a_column_a_depth():
    table = needle_table([Cell(n, d, 2, 1.0, 3.5, 0.5) for n in (64, 1024) for d in (0.0, 0.5)])
    assert [column.header for column in table.columns] == ["tokens", "depth 0", "depth 0.5"]
    assert (
        list(table.columns[0].cells) == ["64", "1,024"]
        and list(table.columns[1].cells) == ["+2.50  50%"] * 2
    )
