"""Promise 11, by properties: each fast op equals its reference, forward and backward, for every combination of its arguments:
kinds of decay, shared heads, sizes of heads, initial states, documents, lengths around the bounds of chunks, types.

The inputs are made by op_cases.py, as those of `longfire doctor`. In float64 nothing but the order of sums differs, so that a
wrong formula cannot hide behind rounding.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from longfire.doctor.cases.attention import attention_inputs
from longfire.doctor.cases.cross_entropy import cross_entropy_inputs
from longfire.doctor.cases.dplr import dplr_inputs
from longfire.doctor.cases.linear_attention import recurrent_inputs
from longfire.doctor.cases.selective_scan import selective_scan_inputs
from longfire.doctor.cases.short_conv import short_conv_inputs
from longfire.doctor.cases.token_shift import previous_token_inputs
from longfire.doctor.op_cases import Case, Sizes, errors, tolerance
from longfire.ops import (
    attention,
    cross_entropy,
    delta_rule,
    dplr,
    linear_attention,
    selective_scan,
    short_conv,
    token_shift,
)

CPU = torch.device("cpu")
FLOAT64 = (
    1e-10  # of the largest value: some 130 sums in another order, and what a solve makes of it
)
LENGTHS = some.sampled_from([1, 2, 3, 33, 63, 64, 65, 127, 128, 129])
TYPES = some.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16])
STRONG = some.sampled_from([0.0, -20.0])
sizes = some.builds(
    Sizes,
    B=some.integers(1, 2),
    T=LENGTHS,
    H=some.just(4),
    K=some.sampled_from([1, 2, 8, 12]),
    V=some.sampled_from([1, 3, 8, 16]),
    W=some.just(11),
)
SHARED = some.sampled_from(
    [{}, {"groups": 2}, {"groups": 4}, {"heads_per_key": 2}, {"heads_per_key": 4}]
)
OPTIONS = {
    "linear_attention": some.fixed_dictionaries(
        {
            "rule": some.just(False),
            "decay": some.sampled_from(["none", "constant", "scalar", "vector"]),
            "value_decay": some.booleans(),
            "state": some.booleans(),
            "documents": some.booleans(),
            "strong": STRONG,
            "shared": SHARED,
        }
    ),
    "delta_rule": some.fixed_dictionaries(
        {
            "rule": some.just(True),
            "decay": some.sampled_from(["none", "scalar", "vector"]),
            "state": some.booleans(),
            "documents": some.booleans(),
            "strong": STRONG,
        }
    ),
    "dplr": some.fixed_dictionaries(
        {"documents": some.booleans(), "state": some.booleans(), "strong": STRONG}
    ),
    "selective_scan": some.fixed_dictionaries(
        {
            "documents": some.booleans(),
            "state": some.booleans(),
            "strong": some.sampled_from([1.0, 20.0]),
        }
    ),
    "previous_token": some.fixed_dictionaries(
        {"documents": some.booleans(), "state": some.booleans()}
    ),
    "short_conv": some.fixed_dictionaries(
        {
            "documents": some.booleans(),
            "state": some.booleans(),
            "bias": some.booleans(),
            "silu": some.booleans(),
            "width": some.integers(1, 5),
        }
    ),
    "attention": some.fixed_dictionaries(
        {
            "heads": some.sampled_from([1, 2, 4]),
            "window": some.sampled_from([None, 1, 9, 64, 200]),
            "documents": some.booleans(),
            "longer": some.sampled_from([0, 5]),
            "queries": some.sampled_from([1.0, 1 / 3]),
            "own_value_size": some.booleans(),
            "skip": some.booleans(),
        }
    ),
    "linear_cross_entropy": some.fixed_dictionaries(
        {
            "chunk_tokens": some.sampled_from([1, 16, 64, 1000]),
            "softcap": some.sampled_from([0.0, 2.0]),
            "l2_warp": some.booleans(),
        }
    ),
}
MODULES = {
    "linear_attention": (linear_attention, recurrent_inputs),
    "delta_rule": (delta_rule, recurrent_inputs),
    "dplr": (dplr, dplr_inputs),
    "selective_scan": (selective_scan, selective_scan_inputs),
    "previous_token": (token_shift, previous_token_inputs),
    "short_conv": (short_conv, short_conv_inputs),
    "attention": (attention, attention_inputs),
    "linear_cross_entropy": (cross_entropy, cross_entropy_inputs),
}


def assert_equal(
    op: str, options: dict[str, Any], size: Sizes, dtype: torch.dtype, seed: int
) -> None:
    module, make = MODULES[op]
    given_options = {**options, **options.get("shared", {})}
    given_options.pop("shared", None)
    case = Case(module, op, "of a property", lambda draw, n: make(draw, n, **given_options))
    # A gradient that is zero on paper is a difference of numbers of the size of the others.
    found = errors(case, CPU, dtype, size, seed, floor=1e-3 if dtype == torch.float64 else 0.3)
    limit = FLOAT64 if dtype == torch.float64 else tolerance(case, CPU, dtype, size.T)
    wrong = {name: error for name, error in found.items() if error > limit}
    assert not wrong, f"{wrong}, at most {limit:.1e}"


@pytest.mark.dtype
@pytest.mark.parametrize("op", OPTIONS)
@settings(deadline=None, max_examples=4)
@given(data=some.data(), size=sizes, dtype=TYPES, seed=some.integers(0, 1000))
def test_fast_equals_reference(op, data, size, dtype, seed):
    assert_equal(op, data.draw(OPTIONS[op]), size, dtype, seed)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPTIONS)
@settings(deadline=None, max_examples=100)
@given(data=some.data(), size=sizes, dtype=TYPES, seed=some.integers(0, 1000))
def test_fast_equals_reference_at_length(op, data, size, dtype, seed):
    assert_equal(op, data.draw(OPTIONS[op]), size, dtype, seed)
