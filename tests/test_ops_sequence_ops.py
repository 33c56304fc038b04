"""ops/sequence_ops.py: what mixers ask of it is what they declare; whose operations a model uses."""

from typing import get_args, get_type_hints

import pytest
import torch
from conftest import tiny_model

from longfire.config.settings import Attention, Parallelism
from longfire.mixers import MIXERS
from longfire.mixers.mixer import Sequence
from longfire.ops.attention import attention, attention_reference
from longfire.ops.attention_choice import local_sequence
from longfire.ops.blockwise import blockwise
from longfire.ops.documents import Documents
from longfire.ops.sequence_ops import UNDECIDED, LocalSequence
from longfire.ops.short_conv import short_conv
from longfire.ops.token_shift import previous_token
from longfire.parallel.context_strategies import STRATEGIES, strategy_named

IDS_BT = torch.arange(12).view(2, 6)
POSITIONS_BT = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
DOCUMENTS = Documents.from_ids(torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 2, 2]]))


class Listener:
    """Local operations; takes note of the kinds of context asked for, and of the recurrences."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.recurrences: set = set()

    def attention(self, *inputs, documents, **options):
        self.hear("attention", documents)
        return attention(*inputs, documents=documents, **options)

    def recurrence(self, op, *inputs, documents, **options):
        self.hear("state", documents)
        self.recurrences.add(op)
        return op(*inputs, documents=documents, **options)

    def convolution(self, *inputs, documents, **options):
        self.hear("halo", documents)
        return short_conv(*inputs, documents=documents, **options)

    def token_shift(self, x_BTD, *, documents, **options):
        self.hear("halo", documents)
        return previous_token(x_BTD, documents=documents, **options)

    def hear(self, kind: str, documents: Documents | None) -> None:
        assert documents is DOCUMENTS
        self.kinds.add(kind)


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_asks_for_what_it_declares(name):
    model, listener = tiny_model(name, mlp="swiglu"), Listener()
    model(IDS_BT, Sequence(POSITIONS_BT, DOCUMENTS, ops=listener))
    mixer = model.layers[0].mixer
    assert listener.recurrences == set(mixer.recurrences)
    # A convolution that the settings leave out is a kind of context too many, which is no harm.
    assert listener.kinds <= set(mixer.context) <= listener.kinds | {"halo"}


def test_the_model_gives_its_own_operations_to_a_sequence_without_any():
    model = tiny_model("attention")
    model.local_ops, listener = local_sequence(Attention("vanilla")), Listener()
    seq = Sequence(POSITIONS_BT)
    assert seq.ops is UNDECIDED
    model.prepare(seq)
    assert seq.ops is model.local_ops
    decided = Sequence(POSITIONS_BT, ops=listener)
    model.prepare(decided)
    assert decided.ops is listener


def test_each_kind_of_attention():
    assert local_sequence(Attention()) == LocalSequence()
    assert local_sequence(Attention("vanilla")) == LocalSequence(attention_reference)
    chunked = local_sequence(Attention("blockwise", 7, 5))
    assert chunked.attend.func is blockwise and chunked.attend.keywords == {"chunks": (7, 5)}
    assert chunked.chunks == (7, 5)


def test_lengths_are_those_of_whole_documents():
    ops = LocalSequence()
    assert ops.document_lengths(POSITIONS_BT, DOCUMENTS).tolist() == [[3] * 6, [6] * 6]
    assert ops.document_lengths(POSITIONS_BT, None).tolist() == [[3] * 6, [6] * 6]
    assert ops.document_lengths(torch.arange(4)[None], None).tolist() == [[4] * 4]


def test_every_context_strategy_of_the_settings_is_in_the_table():
    names = get_args(get_type_hints(Parallelism)["context_parallel_strategy"])
    assert set(names) == {"auto", *STRATEGIES}
    assert [strategy_named(name).name for name in STRATEGIES] == list(STRATEGIES)
