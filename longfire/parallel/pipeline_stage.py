"""A stage of a pipeline: some layers of a model, what they take from the stages before, and what
they cost."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longfire.config.model_config import mixer_of
from longfire.data.batch import Batch
from longfire.mixers import MIXERS
from longfire.mixers import mixer as mixers
from longfire.model import Layers, Model
from longfire.parallel.stages import StageLayout

# What the last stage makes of hidden states: (model, hidden states, batch) -> a loss, or losses.
End = Callable[[Model, Tensor, Batch], Tensor | tuple[Tensor, ...]]


class Stage(Model):
    """A view of some layers of a model: what the pipeline runs, and what is sharded as one
    (`fully_shard(stage)`).

    The first stage has the embedding, the last one norm and head, and says what `end` makes of a
    micro-batch's hidden states.
    """

    def __init__(
        self,
        model: Model,
        placed: StageLayout,
        number: int,
    ) -> None:
        nn.Module.__init__(self)
        # In a tuple, since it is no submodule: tensor parallelism may have changed its regions.
        self.of = (model,)
        self.config = model.config
        self.compute_dtype = model.compute_dtype
        self.number = number
        self.is_first = number == 0
        self.is_last = number == placed.stages - 1
        self.local_ops = model.local_ops
        self.saved_activations = model.saved_activations
        hold(self, model, {number}, placed)
        self.taken = carried(model, placed, number)
        self.given = carried(model, placed, number + 1)
        self.microbatches: Sequence[tuple[Batch, Tensor | None]] = ()  # with the noise of dropout
        self.microbatch = 0  # the number of the one that comes next
        self.end: End | None = None

    def forward(  # type: ignore[override]  # called by torch's stage, with what travels
        self,
        *passed: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        """(hidden states, then what `taken` names) of the stage before -> the same for the next
        one."""
        (model,) = self.of
        batch, noise_BT = self.microbatches[self.microbatch]
        seq = mixers.Sequence(
            batch.positions_BT,
            batch.documents,
            noise_BT=noise_BT,
            ops=batch.ops,
        )
        self.prepare(seq)
        seq.shared |= zip(self.taken, passed[1:])
        if self.is_first:
            x_BTD = model.embed_tokens(batch.ids_BT, seq)
        else:
            x_BTD = passed[0]
        x_BTD = self.blocks(x_BTD, seq)
        if self.is_last:
            assert self.end is not None, "a step says what becomes of hidden states"
            return self.end(model, model.final_norm(x_BTD), batch)
        given = [seq.shared[key] for key in self.given]
        return tuple(x.contiguous() for x in (x_BTD, *given))


def hold(
    part: Model,
    model: Model,
    stages: set[int],
    placed: StageLayout,
) -> None:
    """Give `part` (it may be the model itself) the modules of these stages, and None for the
    others.

    A head that shares the embedding's parameter is kept beside the embedding, so that the parameter
    has the same name everywhere.
    """
    is_first = 0 in stages
    is_last = placed.stages - 1 in stages
    numbers: list[int] = []
    for stage in stages:
        numbers += placed.layers[stage]
    used = {mixer_of(model.config.layer_types[layer]) for layer in numbers}
    has_embedding = is_first or (is_last and model.config.tie_word_embeddings)
    layers = {layer: model.layers[layer] for layer in numbers}
    shared = {name: module for name, module in model.shared.items() if name in used}
    # in the order of Model, since parameters come in the order in which modules are registered
    modules = {
        "embed": model.embed if has_embedding else None,
        "positions": model.positions if is_first else None,
        "embed_norm": model.embed_norm if is_first else None,
        "layers": Layers(layers),
        "shared": nn.ModuleDict(shared),
        "norm": model.norm if is_last else None,
        "head": model.head if is_last else None,
    }
    for name, module in modules.items():
        setattr(part, name, module)


def carried(
    model: Model,
    placed: StageLayout,
    stage: int,
) -> tuple[str, ...]:
    """What a stage takes from those before it: keys that the first layer of a mixer has left there
    and that a later one reads."""
    if stage >= placed.stages:
        return ()
    names = [mixer_of(name) for name in model.config.layer_types]
    begin = placed.layers[stage].start
    keys: list[str] = []
    for name in dict.fromkeys(names[:begin]):
        if name in names[begin:]:
            keys += MIXERS[name].carried
    return tuple(keys)


def costs(model: Model, seq_len: int) -> list[float]:
    """Floating-point operations of a token in the embedding (which adds its row), each layer, and
    the head; of the whole model."""
    # the run's model may be split already, and not into equal parts
    with torch.device("meta"):
        whole = Model(model.config)
    size = model.config.hidden_size
    found: list[float] = [2 * size]
    for block in whole.layers:
        found.append(block.flops_per_token(seq_len))
    found.append(2 * size * model.config.vocab_size)
    return found
