"""Ways to call ops/selective_scan.py."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from longfire.doctor.op_cases import Case, Draw, Inputs, Sizes
from longfire.ops import selective_scan


def selective_scan_inputs(
    draw: Draw,
    n: Sizes,
    *,
    strong: float = 1.0,
    documents: bool = False,
    state: bool = True,
) -> Inputs:
    """A as Mamba begins, -1 ... -N; steps of some 0.01 to 3, `strong` times as long."""
    D = n.H * n.K
    N = 16
    inputs = {
        "x_BTD": draw.normal(n.B, n.T, D),
        "dt_BTD": strong * F.softplus(draw.normal(n.B, n.T, D) - 2),
        "A_DN": -torch.arange(1, N + 1, dtype=torch.float64).repeat(D, 1),
        "B_BTN": draw.normal(n.B, n.T, N),
        "C_BTN": draw.normal(n.B, n.T, N),
    }
    if state:
        inputs["initial_state_BDN"] = draw.normal(n.B, D, N)
    return {**inputs, **({"documents": draw.documents(n.B, n.T)} if documents else {})}


def cases() -> Iterator[Case]:
    """Those of `selective_scan`."""
    ways: dict[str, Inputs] = {
        "Mamba's steps": {},
        "documents": {"documents": True},
        "steps of 20": {"strong": 20.0},
    }
    for name, options in ways.items():
        yield Case(
            selective_scan,
            "selective_scan",
            name,
            partial(selective_scan_inputs, **options),
        )
