"""What torch.compile makes of a block on CUDA: how many graphs, none of them anew for other
documents, and no wait of the host between forward and backward."""

import counts
import pytest
import torch
from conftest import MIXER_SETTINGS, tiny_config
from no_kernels import without_numbers
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from longfire.data.batch import Batch
from longfire.initialise import build
from longfire.loss import loss_sum
from longfire.model import Model
from longfire.ops import forms
from longfire.ops.choice import choose
from longfire.ops.documents import Documents

CUDA = torch.device("cuda")
B, T = 2, 96


@pytest.fixture(autouse=True)
def nothing_is_computed():
    with without_numbers():
        yield


def batch(number: int, has_documents: bool, tokens: int = T) -> Batch:
    """Zeros as text; each number has documents of its own."""
    ids_BT = torch.zeros(B, tokens, dtype=torch.long)
    positions_BT = torch.arange(tokens).expand(B, tokens).contiguous()
    documents = None
    if has_documents:
        starts_BT = torch.zeros(B, tokens, dtype=torch.bool)
        starts_BT[:, 7 + 5 * number :: 11 + number] = True
        documents = Documents.from_ids(starts_BT.long().cumsum(1))
    return Batch(ids_BT, torch.ones_like(ids_BT), positions_BT, documents).to(CUDA)


def compiled(name: str, kernels: str) -> tuple[Model, CompileCounterWithBackend]:
    """A model of two equal blocks, and the counter of their graphs."""
    torch._dynamo.reset()
    counters.clear()
    choose(CUDA, kernels)
    settings = dict(MIXER_SETTINGS[name])
    config = tiny_config(name, hidden_size=64, mixers={name: settings})
    model = build(config, 0, CUDA, torch.bfloat16)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.layers:
        block.compile(dynamic=False, backend=counter)
    return model, counter


@pytest.fixture(autouse=True)
def forms_as_before():
    before = dict(forms.decided)
    yield
    forms.decided.clear()
    forms.decided.update(before)
    torch._dynamo.reset()


def graphs_and_waits(
    model: Model, counter: CompileCounterWithBackend, has_documents: bool
) -> tuple[list[int], list[int]]:
    """After each of three batches: graphs so far, and waits of the host in forward and backward."""
    graphs, waits = [], []
    for number in range(3):
        rows = batch(number, has_documents)
        before = counts.now()
        loss_sum(model, rows, 64).backward()
        graphs.append(counter.frame_count)
        waits.append((counts.now() - before).waits)
    return graphs, waits


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("name", MIXER_SETTINGS)
def test_a_block_is_one_graph(name, has_documents):
    """Of every mixer. Two blocks are compiled: they share a graph, or have one each."""
    graphs, waits = graphs_and_waits(*compiled(name, "auto"), has_documents)
    assert not counters["graph_break"], "nothing in it leaves the graph"
    assert graphs == [graphs[0]] * 3 and graphs[0] <= 2, "other documents make no graph anew"
    assert waits == [0, 0, 0]


def test_our_own_form_of_a_recurrence_is_one_graph():
    graphs, _ = graphs_and_waits(*compiled("gla", "torch"), has_documents=True)
    assert graphs == [1, 1, 1] and not counters["graph_break"]
