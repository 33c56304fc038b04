"""Ways to call ops/token_shift.py."""

from collections.abc import Iterator
from functools import partial

from longfire.doctor.op_cases import Case, Draw, Inputs, Sizes
from longfire.ops import token_shift


def previous_token_inputs(
    draw: Draw,
    n: Sizes,
    *,
    documents: bool = False,
    state: bool = True,
) -> Inputs:
    inputs = {"x_BTD": draw.normal(n.B, n.T, n.H * n.K)}
    if state:
        inputs["before_BD"] = draw.normal(n.B, n.H * n.K)
    return {**inputs, **({"documents": draw.documents(n.B, n.T)} if documents else {})}


def cases() -> Iterator[Case]:
    for name, documents in {"whole rows": False, "documents": True}.items():
        inputs = partial(previous_token_inputs, documents=documents)
        yield Case(token_shift, "previous_token", name, inputs)
