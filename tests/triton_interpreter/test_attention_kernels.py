"""The kernels of attention with dropout beside the reference of their op, in Triton's interpreter,
which computes on the CPU. Started by `make triton`."""

import pytest
import torch
import triton
import triton.language as tl

from longfire.doctor.cases.attention_with_dropout import cases, dropout_inputs
from longfire.doctor.op_cases import Draw, Sizes, errors, results, tolerance
from longfire.errors import SettingsError
from longfire.ops import forms
from longfire.ops.attention import weight_mask
from longfire.ops.attention_with_dropout import attention_with_dropout
from longfire.ops.fast import attention_kernels
from longfire.ops.fast.attention_kernels import attention_by_kernels, places_of, visible_range
from longfire.ops.forms import Choice

CPU = torch.device("cpu")
# No multiple of a block; heads that are no power of 2.
SIZES = Sizes(B=2, T=45, H=4, K=12, V=20, W=1)


@pytest.fixture(autouse=True)
def kernels_run():
    forms.decided["attention_with_dropout"] = Choice("triton", "the interpreter")
    yield
    forms.decided.clear()


@pytest.mark.parametrize("case", list(cases()), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("block", [16, 64])
def test_every_case_of_the_doctor(case, dtype, block, monkeypatch):
    """Output and every gradient, as the doctor compares them on a GPU. fp16 stands for bf16, whose
    products the interpreter does not know: both are rounded to the narrow type between products."""
    monkeypatch.setattr(attention_kernels, "BLOCK", block)
    limit = tolerance(case, CPU, dtype, tokens=SIZES.T)
    if dtype == torch.float16:
        limit = tolerance(case, torch.device("cuda"), dtype, tokens=SIZES.T)
    for name, error in errors(case, CPU, dtype, SIZES).items():
        assert error <= limit, name


def test_the_mask_is_the_hash_of_query_head_and_key():
    """With values that number the keys, the output shows which weights stayed."""
    T = 40
    inputs = dropout_inputs(Draw(), Sizes(B=1, T=T, H=2, K=16, V=T, W=1), heads=2)
    inputs["q_BTHK"] = torch.zeros(1, T, 2, 16)
    inputs["k_BTGK"] = torch.zeros(1, T, 2, 16)
    inputs["v_BTGV"] = torch.eye(T)[None, :, None].repeat(1, 1, 2, 1)
    o_BTHS = attention_with_dropout(**inputs)
    mask_BHTS = weight_mask(inputs["noise_BT"], 2, 0, T, inputs["dropout"], first_head=0)
    expected_BTHS = mask_BHTS.tril().transpose(1, 2)
    assert torch.equal(o_BTHS != 0, expected_BTHS)


def test_the_range_that_is_visible():
    """As the mask of the reference, by its first key and last query."""
    draw = Draw()
    documents = draw.documents(2, 30)
    noise_BT = torch.zeros(2, 30, dtype=torch.int32)
    place_T = torch.arange(30)
    for window in (None, 1, 7):
        first_key_BT, query_end_BT = visible_range(noise_BT, window, documents)
        seen_BTS = documents.ids_BT[:, :, None] == documents.ids_BT[:, None, :]
        seen_BTS = seen_BTS & (place_T[:, None] >= place_T)
        if window is not None:
            seen_BTS = seen_BTS & (place_T[:, None] < place_T + window)
        assert torch.equal(first_key_BT, seen_BTS.int().argmax(2).int())
        last_BT = 30 - seen_BTS.flip(1).int().argmax(1).int()
        assert torch.equal(query_end_BT, last_BT)


def test_wide_heads_are_refused_with_the_way_out():
    inputs = dropout_inputs(Draw(), Sizes(B=1, T=4, H=4, K=264, V=8, W=1))
    with pytest.raises(SettingsError, match="at most 256.*model.kernels = torch"):
        attention_by_kernels(**inputs)


def test_the_same_mask_on_heads_of_another_process():
    """Two processes with half of the heads each have what one with all has."""
    inputs = dropout_inputs(Draw(), SIZES)
    names = ("q_BTHK", "k_BTGK", "v_BTGV")
    inputs |= {name: inputs[name].float() for name in names}
    whole = results(attention_with_dropout, inputs)
    for rank, heads in enumerate((slice(0, 2), slice(2, 4))):
        mine = inputs | {name: inputs[name][:, :, heads] for name in names}
        o_BTHV = attention_with_dropout(**mine, first_head=2 * rank)
        assert torch.equal(o_BTHV, whole["output"][:, :, heads])


def test_noise_with_gaps_between_its_rows():
    """As a process has it that has a part of each sequence."""
    inputs = dropout_inputs(Draw(), SIZES)
    expected = results(attention_with_dropout, inputs)
    around_BT = torch.nn.functional.pad(inputs["noise_BT"], (3, 5))
    inputs["noise_BT"] = around_BT[:, 3:-5]
    assert torch.equal(results(attention_with_dropout, inputs)["output"], expected["output"])


def test_a_window_of_all_that_an_int32_holds():
    """It sees as much as none, and its end is no number below zero."""
    noise_BT = torch.zeros(2, 30, dtype=torch.int32)
    expected = visible_range(noise_BT, None, None)
    for found, without in zip(visible_range(noise_BT, 2**31 - 1, None), expected):
        assert torch.equal(found, without)


@triton.jit
def places_kernel(tokens_ptr, out_ptr, heads, size, BLOCK: tl.constexpr):
    tokens = tl.load(tokens_ptr + tl.arange(0, BLOCK))
    columns = tl.arange(0, BLOCK)
    places = places_of(tokens, heads, size, BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK)[:, None] * BLOCK + columns[None, :], places)


def test_places_of_more_numbers_than_an_int32_counts():
    """2^20 tokens of 32 heads of 128 are 2^32 numbers."""
    tokens = torch.tensor([0, 1, 2**19, 2**20 - 1], dtype=torch.int32)
    out = torch.empty(4, 4, dtype=torch.int64)
    places_kernel[(1,)](tokens, out, 32, 128, BLOCK=4)
    assert torch.equal(out, tokens.long()[:, None] * 32 * 128 + torch.arange(4))
