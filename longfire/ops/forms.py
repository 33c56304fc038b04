"""The forms of an op, and which of them runs.

The file of an op has what it computes: its signature, the reference, and the places of its forms.
A fast form is in a file of its own (ops/fast/), which is imported when the form is first chosen.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

OPS = (
    "attention",
    "attention_with_dropout",
    "linear_cross_entropy",
    "linear_attention",
    "delta_rule",
    "dplr",
    "slot_attention",
    "short_conv",
    "selective_scan",
    "previous_token",
)

TensorFunction = Callable[..., Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])


class Choice(NamedTuple):
    name: str  # torch or triton (our own forms), fla (its kernels), or reference
    why: str


# Op -> what `choice.choose` decided for this process.
decided: dict[str, Choice] = {}


def chosen(op: str) -> str:
    """The form of this op that runs: "torch" until `choice.choose` was called."""
    assert op in OPS, f"{op} has no choice of forms"
    if op in decided:
        return decided[op].name
    return "torch"


class LazyFunction(Generic[Function]):
    """A function "module:name", whose module is imported when it is first asked for: by compiled
    code too, whose graph does not break."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.function: Function | None = None

    def get(self) -> Function:
        find(self)
        assert self.function is not None, "it was found"
        return self.function


# To torch.compile a constant, so that it is called while a graph is made; what it found is read
# from the object, since a graph takes no functions for constants.
@torch.compiler.assume_constant_result
def find(lazy: LazyFunction[Any]) -> bool:
    """Let the function be there."""
    if lazy.function is None:
        module, _, name = lazy.place.partition(":")
        lazy.function = getattr(import_module(module), name)
    return True


class Forms(Generic[Function]):
    """The forms of one op, all of its signature; places: the name of each = "module:function"."""

    def __init__(self, op: str, **places: str) -> None:
        self.op = op
        self.forms: dict[str, LazyFunction[Function]] = {}
        for name, place in places.items():
            self.forms[name] = LazyFunction(place)

    def chosen(self) -> Function:
        """The form that runs."""
        return self.forms[chosen(self.op)].get()
