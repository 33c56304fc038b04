"""Mamba's scan on CUDA: one Triton kernel forward and one backward, compiled for the device, inside
of one graph."""

import counts
import pytest
import torch
from no_kernels import without_numbers

from longfire.ops import forms
from longfire.ops.choice import choose
from longfire.ops.documents import Documents
from longfire.ops.selective_scan import selective_scan

CUDA = torch.device("cuda")
B, T, D, N = 2, 2048, 512, 16


@pytest.fixture(autouse=True)
def nothing_is_computed():
    before = dict(forms.decided)
    with without_numbers():
        yield
    forms.decided.clear()
    forms.decided.update(before)


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [(B, T, D), (B, T, D), (D, N), (B, T, N), (B, T, N)]
    dtypes = [dtype, torch.float32, torch.float32, dtype, dtype]
    found = []
    for shape, kept in zip(shapes, dtypes):
        found.append(torch.zeros(shape, dtype=kept, device=CUDA, requires_grad=True))
    return found


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_kernel_forward_and_one_backward(dtype, has_documents):
    assert choose(CUDA, "auto")["selective_scan"].name == "triton"
    documents = None
    if has_documents:
        starts_BT = torch.zeros(B, T, dtype=torch.bool)
        starts_BT[:, ::100] = True
        documents = Documents.from_ids(starts_BT.long().cumsum(1)).to(CUDA)
    given = inputs(dtype)
    for _ in range(2):
        before = counts.now()
        y_BTD, _ = selective_scan(*given, documents=documents)
        y_BTD.sum().backward()
    done = counts.now() - before
    assert done.triton_launches == 2
    assert done.launches < 30
    assert done.waits == 0


def test_one_graph():
    choose(CUDA, "auto")
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager", dynamic=False)
    y_BTD, last_BDN = compiled(*inputs(torch.bfloat16))
    assert y_BTD.shape == (B, T, D) and last_BDN.shape == (B, D, N)
    y_BTD.sum().backward()
