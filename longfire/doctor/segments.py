"""Recurrences of parts of sequences, as processes that share sequences compute them, beside the
references: outputs from a state that is known only after the map of the part, and the state that
the map makes of it (ops/maps)."""

from typing import Any

from torch import Tensor

from longfire.ops.delta_rule import delta_rule_reference as reference_of_delta_rule
from longfire.ops.dplr import dplr_reference as reference_of_dplr
from longfire.ops.maps import RECURRENCES
from longfire.ops.maps.contract import STATE, Affine


def of_segment(op: str, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The outputs of an op, and its last state. inputs: by their names, in their order."""
    tensors = dict(inputs)
    state_BHKV = tensors.pop(STATE)
    documents = tensors.pop("documents", None)
    last: list[Tensor] = []

    def state_before(mine: Affine) -> Tensor:
        last.append(mine(state_BHKV))
        return state_BHKV

    o_BTHV = RECURRENCES[op].on_segments(state_before, *tensors.values(), documents=documents)
    return o_BTHV, last[0]


def delta_rule(**inputs: Any) -> tuple[Tensor, Tensor]:
    """As ops.delta_rule.delta_rule, with an initial state."""
    return of_segment("delta_rule", inputs)


def delta_rule_reference(**inputs: Any) -> tuple[Tensor, Tensor]:
    return reference_of_delta_rule(**inputs)


def dplr(**inputs: Any) -> tuple[Tensor, Tensor]:
    """As ops.dplr.dplr, with an initial state."""
    return of_segment("dplr", inputs)


def dplr_reference(**inputs: Any) -> tuple[Tensor, Tensor]:
    return reference_of_dplr(**inputs)
