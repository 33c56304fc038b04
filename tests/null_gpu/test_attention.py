"""Every path of softmax attention on CUDA runs its forward and backward, with arguments that torch
takes and without waits of the host where the documents' lengths are known."""

import counts
import pytest
import torch
from no_kernels import without_numbers

from longfire.ops.attention import attention
from longfire.ops.attention_blocks import attention_in_blocks
from longfire.ops.blockwise import blockwise
from longfire.ops.documents import Documents

B, T = 2, 256
HEADS = {  # query heads, key heads, size of keys, of values
    "equal heads": (8, 8, 64, 64),
    "grouped heads": (8, 2, 64, 64),
    "heads of 80": (8, 8, 80, 80),
    "heads of 30": (8, 8, 30, 30),
    "wider values": (8, 8, 64, 128),
}
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def nothing_is_computed():
    with without_numbers():
        yield


def rows(tokens: int, heads: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(B, tokens, heads, size, device="cuda", dtype=dtype, requires_grad=True)


def of(name: str, dtype: torch.dtype, queries: int = T) -> tuple[torch.Tensor, ...]:
    heads, groups, K, V = HEADS[name]
    return (
        rows(queries, heads, K, dtype),
        rows(T, groups, K, dtype),
        rows(T, groups, V, dtype),
    )


def two_documents_a_row() -> Documents:
    ids_BT = torch.zeros(B, T, dtype=torch.long)
    ids_BT[0, 100:] = 1
    ids_BT[1] = 2
    ids_BT[1, 144:] = 3
    return Documents.from_ids(ids_BT).to("cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("has_documents", [False, True])
def test_whole_rows(heads, window, has_documents, dtype):
    documents = two_documents_a_row() if has_documents else None
    q, k, v = of(heads, dtype)
    o = attention(q, k, v, window=window, documents=documents)
    assert o.shape == (*q.shape[:3], v.shape[-1]) and o.dtype == dtype
    o.sum().backward()
    assert all(x.grad.shape == x.shape for x in (q, k, v))


@pytest.mark.parametrize("heads", ["equal heads", "grouped heads"])
@pytest.mark.parametrize("options", [{}, {"window": 64}, {"documents": True}])
def test_the_host_does_not_wait(heads, options):
    if options.get("documents"):
        options = {"documents": two_documents_a_row()}
    q, k, v = of(heads, torch.bfloat16)
    attention(q, k, v, **options).sum().backward()
    before = counts.now()
    attention(q, k, v, **options).sum().backward()
    assert (counts.now() - before).waits == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_keys_before_the_queries(heads, dtype):
    q, k, v = of(heads, dtype, 111)
    attention(q, k, v).sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 32])
def test_blocks_of_keys(heads, window, dtype):
    attention_in_blocks(*of(heads, dtype), keys=64, window=window).sum().backward()


def test_chunks_and_dropout():
    documents = two_documents_a_row()
    q, k, v = of("grouped heads", torch.bfloat16)
    blockwise(q, k, v, chunks=(64, 64), documents=documents).sum().backward()
    noise_BT = torch.zeros(B, T, dtype=torch.int32, device="cuda")
    attention(q, k, v, dropout=0.1, noise_BT=noise_BT).sum().backward()
