"""Ways to call ops/cross_entropy.py."""

from collections.abc import Iterator
from functools import partial

from longfire.doctor.op_cases import Case, Draw, Inputs, Sizes
from longfire.ops import cross_entropy


def cross_entropy_inputs(
    draw: Draw,
    n: Sizes,
    *,
    chunk_tokens: int,
    softcap: float = 0.0,
    l2_warp: bool = False,
) -> Inputs:
    """A third of the tokens has no label, and of several chunks the first none at all."""
    N = n.B * n.T
    D = n.H * n.K
    labels_N = (draw.uniform(N) * n.W).long()
    labels_N[draw.uniform(N) < 1 / 3] = -100
    if chunk_tokens < N:
        labels_N[:chunk_tokens] = -100
    weight_WD = draw.normal(n.W, D) / D**0.5
    given = {"hidden_ND": draw.normal(N, D), "weight_WD": weight_WD, "labels_N": labels_N}
    return given | {"chunk_tokens": chunk_tokens, "softcap": softcap, "l2_warp": l2_warp}


def cases() -> Iterator[Case]:
    """Those of `linear_cross_entropy`."""
    ways: dict[str, Inputs] = {
        "in chunks": {"chunk_tokens": 32},
        "in one": {"chunk_tokens": 4096},
        "soft cap": {"chunk_tokens": 4096, "softcap": 2.0},
        "l2 warp": {"chunk_tokens": 32, "l2_warp": True},
    }
    for name, options in ways.items():
        inputs = partial(cross_entropy_inputs, **options)
        yield Case(cross_entropy, "linear_cross_entropy", name, inputs)
