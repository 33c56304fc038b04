"""Ways to call ops/attention_with_dropout.py."""

from collections.abc import Iterator
from functools import partial

from longfire.doctor.op_cases import Case, Draw, Inputs, Sizes
from longfire.ops import attention_with_dropout


def dropout_inputs(
    draw: Draw,
    n: Sizes,
    *,
    heads: int = 4,
    documents: bool = False,
    own_value_size: bool = False,
    **options: object,
) -> Inputs:
    """heads: G. own_value_size: V is not K."""
    inputs: Inputs = {
        "q_BTHK": draw.normal(n.B, n.T, n.H, n.K),
        "k_BTGK": draw.normal(n.B, n.T, heads, n.K),
        "v_BTGV": draw.normal(n.B, n.T, heads, n.V if own_value_size else n.K),
        "noise_BT": (draw.uniform(n.B, n.T) * 2**32 - 2**31).int(),
        "dropout": 0.2,
        **options,
    }
    if documents:
        inputs["documents"] = draw.documents(n.B, n.T)
    return inputs


def cases() -> Iterator[Case]:
    """Those of `attention_with_dropout`."""
    ways: dict[str, Inputs] = {
        "causal": {},
        "grouped heads, later heads": {"heads": 2, "first_head": 3},
        "own value size, own scale": {"own_value_size": True, "scale": 0.3},
        "window": {"window": 9},
        "documents": {"documents": True},
        "window, documents, 1 kv head": {"window": 9, "documents": True, "heads": 1},
    }
    for name, options in ways.items():
        yield Case(
            attention_with_dropout,
            "attention_with_dropout",
            name,
            partial(dropout_inputs, **options),
        )
