"""What a planner takes kernels to allocate and keep (ops/fast/kernel_memory.py, triton_memory.py), beside what torch's
allocator holds for the kernels themselves, forward and backward."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from no_kernels import without_numbers
from torch import Tensor

from longfire.ops import forms
from longfire.ops.attention_with_dropout import attention_with_dropout
from longfire.ops.choice import OF_FLA, OF_TRITON, choose
from longfire.ops.cross_entropy import linear_cross_entropy
from longfire.ops.delta_rule import delta_rule
from longfire.ops.dplr import dplr
from longfire.ops.linear_attention import linear_attention
from longfire.ops.maps import recurrence_of
from longfire.ops.pretending import pretending_cuda
from longfire.ops.selective_scan import selective_scan
from longfire.ops.short_conv import short_conv
from longfire.ops.slot_attention import slot_attention
from longfire.planner.cut_sequence import state_before

CUDA = torch.device("cuda")
B, T, H, K, V = 2, 1024, 4, 128, 256
BF16, FP32 = torch.bfloat16, torch.float32
BOUND = 0.02  # of the kernels' bytes
Case = tuple[Callable[..., object], dict[str, Tensor], dict[str, object]]


@pytest.fixture(autouse=True)
def nothing_is_computed():
    before = dict(forms.decided)
    with without_numbers():
        choose(CUDA, "auto")
        yield
    forms.decided.clear()
    forms.decided.update(before)


def empty(*size: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(size, dtype=dtype, device=CUDA, requires_grad=True)


def of_heads(*names: str) -> dict[str, Tensor]:
    """Inputs of a recurrence by their names, whose last letter is the size of a head."""
    sizes = {"K": (B, T, H, K), "V": (B, T, H, V)}
    return {name: empty(*sizes[name[-1]]) for name in names}


def attention_recurrence(**decays: Tensor) -> Case:
    return linear_attention, of_heads("q_BTHK", "k_BTHK", "v_BTHV") | decays, {}


def of_delta_rule(**decays: Tensor) -> Case:
    inputs = of_heads("q_BTHK", "k_BTHK", "v_BTHV") | {"beta_BTH": empty(B, T, H)}
    return delta_rule, inputs | decays, {}


def of_dplr() -> Case:
    return dplr, of_heads("q_BTHK", "k_BTHK", "v_BTHV", "c_BTHK", "b_BTHK", "g_BTHK"), {}


def segments_of(op: Callable[..., object], case: Case) -> Case:
    """The same op of segments of sequences that several processes share."""
    _, inputs, others = case

    def of_segments(**named: Tensor) -> Tensor:
        return recurrence_of(op).on_segments(state_before, *named.values())

    return of_segments, inputs, others


def of_slots(groups: int = 1) -> Case:
    heads = (B, T, H // groups)
    inputs = {
        "q_BTHK": empty(B, T, H, K),
        "k_BTGK": empty(*heads, K),
        "v_BTGV": empty(*heads, V),
        "s_BTGM": empty(*heads, 64),
        "g_BTGM": empty(*heads, 64, dtype=FP32),
    }
    return slot_attention, inputs, {}


def of_scan() -> Case:
    D, N = 512, 16
    inputs = {
        "x_BTD": empty(B, T, D),
        "dt_BTD": empty(B, T, D, dtype=FP32),
        "A_DN": empty(D, N, dtype=FP32),
        "B_BTN": empty(B, T, N),
        "C_BTN": empty(B, T, N),
    }
    return selective_scan, inputs, {}


def of_attention() -> Case:
    inputs = {
        "q_BTHK": empty(B, T, H, 64),
        "k_BTGK": empty(B, T, 2, 64),
        "v_BTGV": empty(B, T, 2, 64),
    }
    noise_BT = torch.zeros(B, T, dtype=torch.int32, device=CUDA)
    return attention_with_dropout, inputs, {"noise_BT": noise_BT, "dropout": 0.1}


def of_loss(**rules: float) -> Case:
    inputs = {"hidden_ND": empty(B * T, 256), "weight_WD": empty(32000, 256, dtype=FP32)}
    labels_N = torch.zeros(B * T, dtype=torch.int64, device=CUDA)
    return linear_cross_entropy, inputs, {"labels_N": labels_N, "chunk_tokens": 512, **rules}


CASES: dict[str, Callable[[], Case]] = {
    "linear_attention": attention_recurrence,
    "linear_attention constant": lambda: attention_recurrence(g=empty(H, dtype=FP32)),
    "linear_attention scalar": lambda: attention_recurrence(g=empty(B, T, H, dtype=FP32)),
    "linear_attention vector": lambda: attention_recurrence(g=empty(B, T, H, K)),
    "linear_attention values": lambda: attention_recurrence(gv=empty(B, T, H, V)),
    "linear_attention state": lambda: attention_recurrence(
        g=empty(B, T, H, K), initial_state_BHKV=empty(B, H, K, V, dtype=FP32)
    ),
    "delta_rule": of_delta_rule,
    "delta_rule scalar": lambda: of_delta_rule(g=empty(B, T, H, dtype=FP32)),
    "delta_rule vector": lambda: of_delta_rule(g=empty(B, T, H, K)),
    "dplr": of_dplr,
    "delta_rule segments": lambda: segments_of(delta_rule, of_delta_rule()),
    "delta_rule scalar, segments": lambda: segments_of(
        delta_rule, of_delta_rule(g=empty(B, T, H, dtype=FP32))
    ),
    "delta_rule vector, segments": lambda: segments_of(
        delta_rule, of_delta_rule(g=empty(B, T, H, K))
    ),
    "dplr segments": lambda: segments_of(dplr, of_dplr()),
    "slot_attention": of_slots,
    "slot_attention grouped heads": lambda: of_slots(groups=2),
    "slot_attention segments": lambda: segments_of(slot_attention, of_slots()),
    "short_conv": lambda: (
        short_conv,
        {"x_BTD": empty(B, T, 2048), "weight_DW": empty(2048, 4, dtype=FP32)},
        {},
    ),
    "short_conv bias": lambda: (
        short_conv,
        {"x_BTD": empty(B, T, 2048), "weight_DW": empty(2048, 4), "bias_D": empty(2048)},
        {"silu": False},
    ),
    "selective_scan": of_scan,
    "attention_with_dropout": of_attention,
    "linear_cross_entropy": of_loss,
    "linear_cross_entropy softcap": lambda: of_loss(softcap=30.0),
}


def requested(moment: str) -> int:
    """Bytes of the tensors that the allocator holds, without what it adds to fill its blocks: that
    depends on which blocks were free."""
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{moment}"])


def held(case: Callable[[], Case], as_memory: bool) -> dict[str, int]:
    """Bytes that the allocator holds for an op beside its inputs: kept after its forward, and at most in its forward
    and its backward."""
    op, inputs, others = case()
    with pretending_cuda(kernels=True) if as_memory else nullcontext():
        before = requested("current")
        torch.cuda.reset_peak_memory_stats()
        out = op(**inputs, **others)
        outputs = out if isinstance(out, tuple) else (out,)
        kept = requested("current") - before
        forward = requested("peak") - before
        torch.cuda.reset_peak_memory_stats()
        outputs[0].backward(torch.zeros_like(outputs[0]))
        backward = requested("peak") - before
    for name, x in inputs.items():
        assert x.grad is not None and x.grad.shape == x.shape, name
    return {"kept": kept, "forward": forward, "backward": backward}


@pytest.mark.parametrize("name", CASES)
def test_kernels_hold_what_a_planner_takes_them_to_hold(name):
    held(CASES[name], as_memory=False)  # what a first call leaves, such as tables
    of_kernel = held(CASES[name], as_memory=False)
    planned = held(CASES[name], as_memory=True)
    for moment, size in of_kernel.items():
        assert planned[moment] == pytest.approx(size, rel=BOUND), (moment, size, planned)


def test_every_op_with_kernels_is_compared():
    assert {name.split()[0] for name in CASES} == {*OF_FLA, *OF_TRITON}
