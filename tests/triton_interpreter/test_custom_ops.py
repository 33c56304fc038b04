"""fla's kernels as operators of ours: outputs, states and gradients beside fla's own functions, and
beside our references."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("fla") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("fla in Triton's interpreter only", allow_module_level=True)

import torch.nn.functional as F
import triton.language as tl
import triton.runtime.interpreter as interpreter
from golden.make_fla_golden import LoopInt, late_gather
from torch import Tensor
from triton.runtime.autotuner import Autotuner

from longfire.ops import forms
from longfire.ops.delta_rule import delta_rule_reference
from longfire.ops.documents import Documents
from longfire.ops.dplr import dplr_reference
from longfire.ops.linear_attention import linear_attention_reference
from longfire.ops.maps import RECURRENCES
from longfire.ops.maps.contract import Affine
from longfire.ops.short_conv import short_conv_reference
from longfire.ops.slot_attention import slot_attention_reference

B, T, H, K, V, M = 2, 20, 1, 16, 16, 16
IDS = torch.tensor([[0] * 7 + [1] * 13, [2] * 18 + [3] * 2])


@pytest.fixture(autouse=True, scope="module")
def shims():
    """What Triton's interpreter lacks for fla: tests/golden/make_fla_golden.py says why."""
    import fla.ops  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autotuner, "do_bench", property(lambda _: lambda *_, **__: [0.0, 0.0, 0.0]))
        patch.setattr(
            interpreter,
            "range",
            lambda *bounds: map(LoopInt, range(*map(int, bounds))),
            raising=False,
        )
        late_gather()
        patch.setattr(tl, "float16", tl.float32)
        yield


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape)


def inputs_of(case: str) -> tuple[list[Tensor], tuple[int, ...]]:
    """The inputs of an op, and the shape of its state."""
    torch.manual_seed(0)
    q, k, v = numbers(B, T, H, K), F.normalize(numbers(B, T, H, K), dim=-1), numbers(B, T, H, V)
    state = (B, H, K, V)
    decay_BTHK = F.logsigmoid(numbers(B, T, H, K) + 2)
    beta = numbers(B, T, H).sigmoid()
    if case == "linear attention":
        return [q, k, v], state
    if case == "decay of heads":
        return [q, k, v, F.logsigmoid(numbers(B, T, H) + 2)], state
    if case in ("decay of keys", "decay of keys and values"):
        return [q, k, v, decay_BTHK], state
    if case == "delta rule":
        return [q, k, v, beta], state
    if case == "gated delta rule":
        return [q, k, v, beta, F.logsigmoid(numbers(B, T, H) + 2)], state
    if case == "kda":
        return [q, k, v, beta, decay_BTHK], state
    if case == "slot attention":
        slots = numbers(B, T, H, M).sigmoid()
        return [q, k, v, slots, F.logsigmoid(numbers(B, T, H, M) + 2)], (B, H, M, K + V)
    if case == "dplr":
        return [q, k, v, -k, k * 0.5, decay_BTHK], state
    weight_DW = numbers(K, 4)
    if case == "convolution with bias":
        return [numbers(B, T, K), weight_DW, numbers(K)], (B, K, 3)
    return [numbers(B, T, K), weight_DW], (B, K, 3)


CASES = {
    "linear attention": ("linear_attention", linear_attention_reference),
    "decay of heads": ("linear_attention", linear_attention_reference),
    "decay of keys": ("linear_attention", linear_attention_reference),
    "decay of keys and values": ("linear_attention", linear_attention_reference),
    "delta rule": ("delta_rule", delta_rule_reference),
    "gated delta rule": ("delta_rule", delta_rule_reference),
    "kda": ("delta_rule", delta_rule_reference),
    "dplr": ("dplr", dplr_reference),
    "slot attention": ("slot_attention", slot_attention_reference),
    "convolution": ("short_conv", short_conv_reference),
    "convolution with bias": ("short_conv", short_conv_reference),
}


STATES = {"short_conv": "state_BDW", "slot_attention": "initial_state_BGMX"}


def computed(function, case, has_state, documents) -> list[Tensor]:
    """Output, last state, and the gradients of all inputs."""
    name, _ = CASES[case]
    inputs, state_shape = inputs_of(case)
    options = {}
    if case == "decay of keys and values":
        options["gv"] = F.logsigmoid(numbers(B, T, H, V) + 2).requires_grad_()
    if has_state:
        options[STATES.get(name, "initial_state_BHKV")] = numbers(*state_shape).requires_grad_()
    for x in inputs:
        x.requires_grad_()
    o, last_state = function(*inputs, documents=documents, **options)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    (o * weights).sum().add(last_state.float().square().sum()).backward()
    return [o, last_state, *(x.grad for x in (*inputs, *options.values()))]


@pytest.mark.parametrize("has_state,has_documents", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("case", CASES)
def test_as_the_reference(case, has_state, has_documents):
    from longfire.ops.fast import kernels

    name, reference = CASES[case]
    documents = Documents.from_ids(IDS) if has_documents else None
    found = computed(getattr(kernels, name), case, has_state, documents)
    wanted = computed(reference, case, has_state, documents)
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        assert x.shape == y.shape and x.dtype == y.dtype
        # DPLR's kernels invert a triangle with less precision than fp32
        allowed = 1e-2 if case == "dplr" else 1e-4
        assert (x - y).abs().max() <= allowed * (1 + y.abs().max()), f"number {i}"


SEGMENTS = ("delta rule", "gated delta rule", "kda", "dplr", "slot attention")


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("case", SEGMENTS)
def test_segments_as_the_reference(case, has_documents, monkeypatch):
    """Outputs of segments and the map of each by one call of a kernel, beside the map by torch and
    then the reference: from any state before them, with the gradients of both."""
    name, _ = CASES[case]
    recurrence = RECURRENCES[name]
    documents = Documents.from_ids(IDS) if has_documents else None
    inputs, state_shape = inputs_of(case)
    for x in inputs:
        x.requires_grad_()
    start = numbers(*state_shape)

    def before(mine: Affine) -> Tensor:
        return torch.tanh(mine(start))

    weights = numbers(B, T, H, V)
    found = []
    for form in ("fla", "reference"):
        monkeypatch.setitem(forms.decided, name, forms.Choice(form, "for this test"))
        o_BTHV = recurrence.on_segments(before, *inputs, documents=documents)
        found.append([o_BTHV, *torch.autograd.grad((o_BTHV * weights).sum(), inputs)])
    for i, (x, y) in enumerate(zip(*found, strict=True)):
        allowed = 1e-2 if case == "dplr" else 1e-4
        assert (x - y).abs().max() <= allowed * (1 + y.abs().max()), f"number {i}"
