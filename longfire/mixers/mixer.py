"""The contract of a mixer: the part of a block that looks along the sequence."""

from collections import UserDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig
from longfire.errors import SettingsError
from longfire.mixers.cache import Cache
from longfire.ops.documents import Documents
from longfire.ops.recurrence import RecurrenceOp
from longfire.ops.sequence_ops import UNDECIDED, SequenceOps

Initialiser = Callable[[Tensor, torch.Generator], object]  # fills a parameter or buffer in place


class Observed(NamedTuple):
    """What an MLP gives beside its outputs, of one micro-batch.

    loss_B: its auxiliary loss of each sequence (B,), which its weight multiplies; a sequence is
    never cut where there is one, so that the loss is the same for any micro-batches and any number
    of data-parallel processes. statistics: a tensor without gradient, which is summed over all
    micro-batches and processes of a step and given to `MLP.update`; None: nothing.
    """

    loss_B: Tensor
    statistics: Tensor | None = None


class Shared(UserDict):
    """A dict that no library takes for one: FSDP would give each block a copy, and what a layer
    leaves there were lost."""


@dataclass
class Sequence:
    """All that varies along the sequence, in one object: a new idea adds a field here, not an
    argument to every layer.

    positions_BT: position of each token in its document (int64). documents: those of the tokens
    that are in this process, (B, T) as positions_BT; None where each sequence is one document.
    Where a sequence is cut over processes, the part of a document in each segment is a document of
    its own here; what is before the segment, `ops` knows.
    cache: None in training of whole sequences. noise_BT: what dropout is made of (ops/dropout.py),
    another one for each block; None: no dropout. shared: what layers share in one forward: made
    before the first block (`Mixer.prepare`, `Mixer.whole_model`), or left by one layer for later
    ones. ops: what computes along the sequence; at its default, the model that is given the
    sequence puts its own there (`Model.local_ops`). pixels_BCHW: the images of a model of images,
    whose patches follow the tokens of ids (ops/patches.py). observed: what the MLPs of layers gave
    beside their outputs, by layer (mlps/auxiliary.py).
    """

    positions_BT: Tensor
    documents: Documents | None = None
    cache: Cache | None = field(default=None)
    noise_BT: Tensor | None = None
    shared: Shared = field(default_factory=Shared)
    observed: Shared = field(default_factory=Shared)
    ops: SequenceOps = UNDECIDED
    pixels_BCHW: Tensor | None = None


class BlockPart(nn.Module):
    """What a mixer and an MLP both declare, as data read by the code that acts on it:

    Config:         frozen dataclass of its own settings (a config's `"gla": {...}`), with
                    `check(hidden_size)`
    roles:          how tensor parallelism splits each submodule or parameter (parallel/tensor.py):
                      column     a matrix's outputs, and its bias; halves: of two side by side
                      head       rows of anything for each head; kv_head: a matrix of key/value ones
                      row        a matrix's inputs, all parts added up: the end (init_outputs);
                                 inner_row: in its middle
                      norm       a norm over channels of all heads; replicate: every process has it
    divided:        what it counts of heads, or groups of heads, that divide the processes:
                    attribute -> key of its settings. The attributes are those of the heads on this
                    process, of which `first_head` is the first
    context:        which kinds of context it needs: "attention", "state", "halo"
                    (parallel/context.py); () where it sees one token only
    recurrences:    the ops that it gives to `seq.ops.recurrence`
    own_init:       parameters and buffers that always begin by a rule of their own: name ->
                    function(tensor, generator), in place; a name may be dotted (a parameter of a
                    submodule), and an instance may have rules of its own, which depend on `layer`
    published_init: the same of matrices that begin so unless the model config's init_* says
                    otherwise
    keep_fp32:      parameters that no compute dtype may round

    It never knows of processes.
    """

    Config: ClassVar[type]
    roles: dict[str, str] = {}
    divided: dict[str, str] = {}
    context: ClassVar[tuple[str, ...]] = ()
    recurrences: ClassVar[tuple[RecurrenceOp, ...]] = ()
    own_init: dict[str, Initialiser] = {}
    published_init: dict[str, Initialiser] = {}
    keep_fp32: ClassVar[tuple[str, ...]] = ()
    has_heads: ClassVar[bool] = False  # so that `divided` must name what counts them
    heads: int  # on this process
    kv_heads: int
    first_head: int = 0

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer


class Mixer(BlockPart):
    """One layer's way to look along the sequence: x_BTD -> y_BTD, causal.

    It looks at other tokens by `seq.ops` alone: attention, recurrence, convolution, token_shift
    (ops/sequence_ops.py). A subclass declares, beside what every part of a block does:
      published_ends: how the embedding and the head begin, by their whole names, in a model that
                      has this mixer in every layer
      whole_model:    the class of a module that the model holds once for all layers of this mixer,
                      made as whole_model(model, shape); what its forward() returns goes into
                      `seq.shared` before the first block. Its split_dims say which dim of a
                      parameter has channels, for tensor parallelism
      carried:        keys of `seq.shared` that its first layer leaves for its later ones: (B, T, D)
                      in the compute type, split as the outputs of a "column" where tensors are.
                      Along a pipeline they travel with the hidden states
    """

    has_heads = True
    whole_model: ClassVar[type[nn.Module] | None] = None
    # Tokens: beyond them what earlier calls kept is no longer right; None: it always is.
    cached_up_to: int | None = None
    carried: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: ModelConfig, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        self.hidden_size = model.hidden_size
        self.layers = model.num_hidden_layers

    @classmethod
    def published_ends(cls, model: ModelConfig) -> dict[str, Initialiser]:
        return {}

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no forward: a mixer must define it")

    def prepare(self, seq: Sequence) -> None:
        """Put into `seq.shared` what several layers use and none has to recompute; called
        before the first block, eagerly."""

    def kept(self, seq: Sequence) -> dict[str, Tensor]:
        """What this layer keeps between calls of a generation; in training a dict that is thrown
        away."""
        if seq.cache is None:
            return {}
        return seq.cache.kept(self.layer)

    def flops_per_token(self, seq_len: int) -> float:
        """Forward floating-point operations per token of a sequence of `seq_len`, causal halves
        counted once; multiply-add = 2."""
        raise TypeError(f"{type(self).__name__} does not count its FLOPs")


def uniform(bound: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    """The rule of a parameter that begins uniform within +-bound."""
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


def divides(mixer: str, divisor_name: str, divisor: int, name: str, value: float) -> None:
    """Raises SettingsError unless value is a positive whole multiple of the divisor."""
    if divisor < 1 or value <= 0 or value % divisor:
        raise SettingsError(
            f"model config: {mixer}: {name} = {value:g} must be a positive multiple of "
            f"{divisor_name} = {divisor}; change one of them"
        )


def positive(mixer: str, **values: float) -> None:
    """Raises SettingsError naming a value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise SettingsError(f"model config: {mixer}.{name} = {value:g} must be above 0")


def one_of(mixer: str, name: str, value: str, known: Iterable[str]) -> None:
    """Raises SettingsError unless value is a known word."""
    if value not in known:
        raise SettingsError(
            f"model config: {mixer}.{name} = {value!r} is not one of {', '.join(known)}"
        )
