"""Ways to call ops/linear_attention.py."""

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch.nn.functional as F

from longfire.doctor.op_cases import STRONG, Case, Draw, Inputs, Sizes
from longfire.ops import linear_attention


def recurrent_inputs(
    draw: Draw,
    n: Sizes,
    *,
    decay: str,
    rule: bool,
    strong: float = 0.0,
    documents: bool = False,
    groups: int = 1,
    heads_per_key: int = 1,
    value_decay: bool = False,
    state: bool = True,
) -> Inputs:
    """Linear attention (rule false) or the delta rule. decay: none, constant, scalar or vector.

    groups: heads of q that share one of all else.  heads_per_key: heads of v, g and the state that
    share one of q and k.
    value_decay: gv too.  state: whether there is an initial one.
    """
    H = n.H // groups
    row = (n.B, n.T, H)
    keys = H // heads_per_key
    shape = {"none": None, "constant": (H,), "scalar": row, "vector": (*row, n.K)}[decay]
    k_BTHK = draw.normal(n.B, n.T, keys, n.K)
    inputs: Inputs = {
        "q_BTHK": draw.normal(n.B, n.T, keys * groups, n.K),
        "k_BTHK": F.normalize(k_BTHK, dim=-1) if rule else k_BTHK,
        "v_BTHV": draw.normal(*row, n.V),
    }
    if rule:
        inputs["beta_BTH"] = 2 * draw.uniform(*row)
    if shape:
        inputs["g"] = F.logsigmoid(2 * draw.normal(*shape)) + strong
    if value_decay:
        inputs["gv"] = F.logsigmoid(2 * draw.normal(*row, n.V)) + strong
    if state:
        inputs["initial_state_BHKV"] = draw.normal(n.B, H, n.K, n.V)
    if documents:
        inputs["documents"] = draw.documents(n.B, n.T)
    return inputs


def decay_cases(
    module: ModuleType,
    op: str,
    decays: tuple[str, ...],
) -> Iterator[Case]:
    """The cases that decayed linear attention and the delta rule share."""
    for decay in decays:
        inputs = partial(recurrent_inputs, decay=decay, rule=op == "delta_rule")
        name = "no decay" if decay == "none" else f"{decay} decay"
        yield Case(module, op, name, inputs)
        yield Case(module, op, f"{name}, documents", partial(inputs, documents=True))
        if decay in ("scalar", "vector"):
            yield Case(module, op, f"{name} of e^{STRONG:.0f}", partial(inputs, strong=STRONG))
        if op == "linear_attention" and decay in ("constant", "vector"):
            yield Case(
                module,
                op,
                f"{name}, grouped heads",
                partial(inputs, groups=2, documents=True),
            )


def cases() -> Iterator[Case]:
    """Those of `linear_attention`."""
    decays = ("none", "constant", "scalar", "vector")
    yield from decay_cases(linear_attention, "linear_attention", decays)
    ways: dict[str, Inputs] = {
        "value decay": {"value_decay": True},
        "value decay, documents": {"value_decay": True, "documents": True},
        f"value decay of e^{STRONG:.0f}": {"value_decay": True, "strong": STRONG},
        "value decay, grouped heads": {"value_decay": True, "groups": 2},
        "value decay, one key for all heads": {"value_decay": True, "heads_per_key": 4},
        "vector and value decay": {"decay": "vector", "value_decay": True},
        "scalar decay, one key for all heads": {"decay": "scalar", "heads_per_key": 4},
        "vector decay, one key for two heads": {
            "decay": "vector",
            "heads_per_key": 2,
            "documents": True,
        },
    }
    for name, options in ways.items():
        inputs = partial(recurrent_inputs, rule=False, **{"decay": "none", **options})
        yield Case(linear_attention, "linear_attention", name, inputs)
