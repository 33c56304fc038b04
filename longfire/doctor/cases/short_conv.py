"""Ways to call ops/short_conv.py."""

from collections.abc import Iterator
from functools import partial

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
    **options: object,
) -> Inputs:
    """width: inputs that an output sees. state: whether there are inputs before the first."""
    D = n.H * n.K
    inputs: Inputs = {
        "x_BTD": draw.normal(n.B, n.T, D),
        "weight_DW": draw.normal(D, width),
        **options,
    }
    if bias:
        inputs["bias_D"] = draw.normal(D)
    if state:
        inputs["state_BDW"] = draw.normal(n.B, D, width - 1)
    if documents:
        inputs["documents"] = draw.documents(n.B, n.T)
    return inputs


def cases() -> Iterator[Case]:
    """Those of `short_conv`."""
    ways: dict[str, Inputs] = {
        "width 4": {},
        "width 3, documents": {"width": 3, "documents": True},
        "no activation": {"silu": False},
    }
    for name, options in ways.items():
        yield Case(short_conv, "short_conv", name, partial(short_conv_inputs, **options))
