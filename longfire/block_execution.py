"""How the devices of a model compute its blocks: plain data that parallel/ decides and a forward
reads.

A block says in which parts it is computed (model.Block); an Execution says how each part is called:
at once, again in the backward, in chunks of tokens (parallel/remat.py). TensorRegions say what
happens to hidden states on their way into a part whose matrices several processes share
(parallel/tensor.py). Neither has parameters, so that names of parameters stay what they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from longfire.ops.vocabulary import VocabularyShard

# What a part gives: hidden states, or those and what an MLP observed.
Result = TypeVar("Result")


class Call(Protocol):
    """A way to compute a part: the result of `part(*inputs)`."""

    def __call__(self, part: Callable[..., Result], *inputs: object) -> Result: ...


class TokenCall(Protocol):
    """The same of a part that sees one token at a time: its inputs are (B, T, D) all."""

    def __call__(self, part: Callable[..., Tensor], *rows_BTD: Tensor) -> Tensor: ...


def as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass
class Execution:
    """How a block's parts are called; None: `part(*inputs)`. mlp_tokens: what of the MLP sees one
    token at a time.

    (None and no function that calls them: where a part breaks a compiled graph, each call around it
    is one more frame that dynamo compiles for itself.)
    """

    block: Call | None = None
    mixer: Call | None = None
    mlp: Call | None = None
    mlp_tokens: TokenCall | None = None


@dataclass(frozen=True)
class TensorRegions:
    """Mixers, MLPs and the head are regions: inside, a process has its own heads, channels or rows
    of the vocabulary.

    enter: hidden states of the residual stream (B, T, D) on their way into a region. own_tokens:
    what of (B, T, ...) belongs to the tokens of the residual stream in this process. sum_of_tokens:
    a sum over these tokens -> the sum over all tokens of the sequences, with its gradient.
    vocabulary: the vocabulary's rows here; None: all.
    """

    enter: Callable[[Tensor], Tensor] = as_it_is
    own_tokens: Callable[[Tensor], Tensor] = as_it_is
    sum_of_tokens: Callable[[Tensor], Tensor] = as_it_is
    vocabulary: VocabularyShard | None = None
