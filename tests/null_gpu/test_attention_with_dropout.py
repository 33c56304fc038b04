"""Attention with dropout on CUDA: one Triton kernel forward and two backward, compiled for the
device, inside of one graph, documents or not."""

import counts
import pytest
import torch
from no_kernels import without_numbers

from longfire.ops import forms
from longfire.ops.attention import attention
from longfire.ops.choice import choose
from longfire.ops.documents import Documents

CUDA = torch.device("cuda")
B, T, H = 2, 1024, 4


@pytest.fixture(autouse=True)
def nothing_is_computed():
    before = dict(forms.decided)
    with without_numbers():
        yield
    forms.decided.clear()
    forms.decided.update(before)


def inputs(dtype: torch.dtype, size: int, heads: int) -> dict[str, torch.Tensor | float]:
    q_BTHK = torch.zeros(B, T, H, size, dtype=dtype, device=CUDA, requires_grad=True)
    k_BTGK = torch.zeros(B, T, heads, size, dtype=dtype, device=CUDA, requires_grad=True)
    noise_BT = torch.zeros(B, T, dtype=torch.int32, device=CUDA)
    return {
        "q_BTHK": q_BTHK,
        "k_BSGK": k_BTGK,
        "v_BSGV": torch.zeros_like(k_BTGK, requires_grad=True),
        "noise_BT": noise_BT,
        "dropout": 0.1,
    }


def documents() -> Documents:
    starts_BT = torch.zeros(B, T, dtype=torch.bool)
    starts_BT[:, ::100] = True
    return Documents.from_ids(starts_BT.long().cumsum(1)).to(CUDA)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_kernel_forward_and_two_backward(dtype, size):
    """Each is compiled, and its blocks fit into the device's shared memory."""
    assert choose(CUDA, "auto")["attention_with_dropout"].name == "triton"
    given = inputs(dtype, size, heads=2)
    of_documents = documents()
    for _ in range(2):
        before = counts.now()
        attention(**given, documents=of_documents, window=300).sum().backward()
    done = counts.now() - before
    assert done.triton_launches == 3
    assert done.waits == 0


@pytest.mark.parametrize("has_documents", [False, True])
def test_one_graph(has_documents):
    choose(CUDA, "auto")
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=False)
    given = inputs(torch.bfloat16, 64, heads=4)
    o_BTHV = compiled(**given, documents=documents() if has_documents else None)
    assert o_BTHV.shape == (B, T, H, 64)
    o_BTHV.sum().backward()


def test_more_rows_than_the_second_dimension_of_a_grid_has():
    """65,536 sequences and heads, in one launch of each kernel."""
    choose(CUDA, "auto")
    q_BTHK = torch.zeros(2**14, 2, H, 16, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
    noise_BT = torch.zeros(2**14, 2, dtype=torch.int32, device=CUDA)
    before = counts.now()
    attention(q_BTHK, q_BTHK, q_BTHK, noise_BT=noise_BT, dropout=0.1).sum().backward()
    assert (counts.now() - before).triton_launches == 3
