"""Ways to call ops/short_conv.py."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from longfire.doctor.op_cases import Case, Draw, Inputs, Sizes
from longfire.ops import short_conv


def short_conv_inputs(
    draw: Draw,
    n: Sizes,
    *,
    width: int = 4,
    documents: bool = False,
    state: bool = True,
    bias: bool = True,
    **options: Any,
) -> Inputs:
    D = n.H * n.K
    inputs = {"x_BTD": draw.normal(n.B, n.T, D), "weight_DW": draw.normal(D, width)}
    if bias:
        inputs["bias_D"] = draw.normal(D)
    if state:
        inputs["state_BDW"] = draw.normal(n.B, D, width - 1)
    return {**inputs, **options, **({"documents": draw.documents(n.B, n.T)} if documents else {})}


def cases() -> Iterator[Case]:
    ways: dict[str, Inputs] = {
        "width 4": {},
        "width 3, documents": {"width": 3, "documents": True},
        "no activation": {"silu": False},
    }
    for name, options in ways.items():
        yield Case(short_conv, "short_conv", name, partial(short_conv_inputs, **options))
