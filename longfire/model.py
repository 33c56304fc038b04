"""ids -> hidden states -> logits: embedding, blocks of mixer and MLP, norm, head."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from longfire.block_execution import Execution, TensorRegions
from longfire.config.model_config import ModelConfig, mixer_of
from longfire.config.own_settings import own_settings
from longfire.mixers import MIXERS
from longfire.mixers.cache import IDS, Cache
from longfire.mixers.mixer import Observed, Sequence
from longfire.mlps import make_mlp
from longfire.ops.dropout import dropout, dropout_add, of_place
from longfire.ops.forms import LazyFunction
from longfire.ops.linear import Linear
from longfire.ops.norm import LayerNorm, RMSNorm
from longfire.ops.sequence_ops import UNDECIDED, LocalSequence
from longfire.ops.vocabulary import softcapped

if TYPE_CHECKING:
    from longfire.ops.patches import PatchEmbedding
    from longfire.ops.sequence_sharding import SequenceSharding
    from longfire.parallel.stages import Pipelined

# Where noise is used: in a block, and from block to block.
MIXER_PLACE = 1
MLP_PLACE = 2
BLOCK_PLACE = 4

# Of models that a config must ask for
PATCHES = LazyFunction["Callable[[ModelConfig], PatchEmbedding]"](
    "longfire.ops.patches:patch_embedding"
)
BOTH_DIRECTIONS = LazyFunction[Callable[[], LocalSequence]](
    "longfire.ops.both_directions:BothDirections"
)

# What an MLP gives, and a block: hidden states; with an auxiliary loss, what was observed too.
Fed = Tensor | tuple[Tensor, Observed]


def make_norm(config: ModelConfig) -> nn.Module:
    """A norm of the residual stream."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_eps, config.norm_affine)
    return LayerNorm(config.hidden_size, config.norm_eps, config.norm_affine, config.norm_bias)


class Block(nn.Module):
    """Mixer and MLP, each added to the residual stream x:

    pre            x + mixer(norm(x)), then x + mlp(norm(x))       (GPT-2, Llama, fla)
    post           norm(x + mixer(x)), then norm(x + mlp(x))       (Vaswani 2017)
    parallel       x + mixer(norm(x)) + mlp(norm'(x))              (GPT-NeoX)
    parallel_tied  the same, where norm' is norm                   (GPT-J, PaLM)

    What is added passes dropout; adding and dropping are one step. `inner` is the type that mixer
    and MLP compute in, which the stream itself has too unless residual_in_fp32. `execution` and
    `regions` say how the devices of the model compute it. With an MLP that has an auxiliary loss
    the block returns the new stream and what the MLP observed.
    """

    def __init__(self, config: ModelConfig, layer: int, inner: torch.dtype) -> None:
        super().__init__()
        name = config.layer_types[layer]
        mixer_class = MIXERS[mixer_of(name)]
        given = config.mixers.get(name, {})
        mixer_config = own_settings(mixer_class, name, given, config.hidden_size)
        self.kind = config.block
        self.dropout = config.dropout
        self.inner = inner
        self.execution = Execution()
        self.regions = TensorRegions()
        self.mixer_norm = make_norm(config)
        self.mixer = mixer_class(config, mixer_config, layer)
        self.mlp = make_mlp(config, layer)
        self.mlp_norm: nn.Module | None = None
        if self.mlp is not None and self.kind != "parallel_tied":
            self.mlp_norm = make_norm(config)

    def forward(self, x_BTD: Tensor, seq: Sequence, is_called: bool = False) -> Fed:
        """is_called: by `execution.block`, which says how the block as a whole is computed."""
        if self.execution.block is not None and not is_called:
            return self.execution.block(self.forward, x_BTD, seq, True)
        h_BTD = x_BTD if self.kind == "post" else self.mixer_norm(x_BTD)
        h_BTD = h_BTD.to(self.inner)
        if self.execution.mixer is None:
            mixed_BTD = self.mixer(self.regions.enter(h_BTD), seq)
        else:
            mixed_BTD = self.execution.mixer(self.mix, h_BTD, seq)
        mixed_BTD = self.add_residual(mixed_BTD, x_BTD, seq, MIXER_PLACE)
        if self.kind == "post":
            h_BTD = mixed_BTD = self.mixer_norm(mixed_BTD)
        if self.mlp is None:
            return mixed_BTD
        if self.mlp_norm is not None and self.kind != "post":
            h_BTD = self.mlp_norm(mixed_BTD if self.kind == "pre" else x_BTD)
        fed_BTD = self.apply_mlp(h_BTD.to(self.inner), seq)
        observed = None
        if isinstance(fed_BTD, tuple):
            fed_BTD, observed = fed_BTD
        y_BTD = self.add_residual(fed_BTD, mixed_BTD, seq, MLP_PLACE)
        if self.kind == "post":
            assert self.mlp_norm is not None
            y_BTD = self.mlp_norm(y_BTD)
        if observed is None:
            return y_BTD
        return (y_BTD, observed)

    def mix(self, h_BTD: Tensor, seq: Sequence) -> Tensor:
        """The mixer's output for h."""
        return self.mixer(self.regions.enter(h_BTD), seq)

    def mix_alone(self, h_BTD: Tensor, seq: Sequence) -> Tensor:
        """The same, computed as the block computes it (activation checkpointing)."""
        if self.execution.mixer is None:
            return self.mix(h_BTD, seq)
        return self.execution.mixer(self.mix, h_BTD, seq)

    def apply_mlp(self, h_BTD: Tensor, seq: Sequence) -> Fed:
        """The MLP's output for h."""
        if self.execution.mlp is None:
            return self.feed(h_BTD, seq)
        return self.execution.mlp(self.feed, h_BTD, seq)

    def feed(self, h_BTD: Tensor, seq: Sequence) -> Fed:
        assert self.mlp is not None
        rows_BTD: tuple[Tensor, ...] = (h_BTD,)
        if not self.mlp.context:
            part: Callable[..., Fed] = self.feed_tokens
        else:
            h_BTD = self.regions.enter(h_BTD)
            part = self.mlp
            rows_BTD = (h_BTD, *self.mlp.others(h_BTD, seq))
        if self.execution.mlp_tokens is None:
            return part(*rows_BTD)
        # Chunks of tokens are refused where an auxiliary loss makes a tuple of what `part` gives.
        return self.execution.mlp_tokens(part, *rows_BTD)  # type: ignore[arg-type]  # see above

    def feed_tokens(self, h_BTD: Tensor) -> Fed:
        """The MLP, where it sees one token at a time."""
        assert self.mlp is not None
        return self.mlp(self.regions.enter(h_BTD))

    def add_residual(self, y_BTD: Tensor, x_BTD: Tensor, seq: Sequence, place: int) -> Tensor:
        if seq.noise_BT is None or self.dropout == 0:
            return x_BTD + y_BTD
        noise_BT = self.regions.own_tokens(seq.noise_BT)
        return dropout_add(y_BTD, x_BTD, self.dropout, of_place(noise_BT, place))

    def flops_per_token(self, seq_len: int) -> float:
        """Of the forward, by the convention of Model.flops_per_token."""
        mlp = 0.0 if self.mlp is None else self.mlp.flops_per_token()
        return self.mixer.flops_per_token(seq_len) + mlp


class Layers(nn.Module):
    """Blocks under their numbers in the whole model, of which a pipeline's process has some: so the
    names of parameters are the same everywhere."""

    def __init__(self, blocks: Mapping[int, Block]) -> None:
        super().__init__()
        for number, block in sorted(blocks.items()):
            self.add_module(str(number), block)

    def __iter__(self) -> Iterator[Block]:
        return cast("Iterator[Block]", self.children())

    def numbered(self) -> Iterator[tuple[int, Block]]:
        """Each block with its number in the whole model."""
        for name, block in self.named_children():
            yield int(name), cast(Block, block)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, number: int) -> Block:
        """A block by its number; negative numbers count from the last one."""
        if number < 0:
            return list(self)[number]
        return cast(Block, self.get_submodule(str(number)))


class Model(nn.Module):
    """A decoder of any mixers; with `direction = "both"` an encoder. Parameters are fp32 masters;
    activations have `compute_dtype` from the embedding on.

    The head is apart from `forward`, so that the loss can be fused with it and the logits of a
    sequence need never be whole: the loss takes `regions.enter(hidden)` and `head.weight`, which
    has the rows of `regions.vocabulary`.

    What its devices decide (parallel/apply.py) is plain data, the same names with and without them:
    local_ops: what computes along sequences that are whole in this process.
    context: what cuts batches of sequences that several processes share.
    regions: what tensor parallelism does between blocks and the head.
    pipeline: its stages here, which then compute instead of `forward`: some `layers`, under their
    numbers, and None for those of other processes.
    computes_on: the device, where that is not where its parameters are kept.
    saved_activations: where what blocks keep for the backward waits.
    Where a parameter is split or copied, `sharding_of(model, name)` says (parallel/sharding.py).
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        assert config.vocab_size > 0, (
            "the tokenizer decides an open vocabulary: config.with_vocabulary(vocab_size)"
        )
        self.config = config
        self.compute_dtype = compute_dtype
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions: nn.Embedding | None = None
        if config.learned_positions:
            self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.patches: PatchEmbedding | None = None
        if config.image_size:
            self.patches = PATCHES.get()(config)
        self.embed_norm = make_norm(config) if config.embed_norm else None
        blocks: dict[int, Block] = {}
        for layer in range(config.num_hidden_layers):
            blocks[layer] = Block(config, layer, compute_dtype)
        self.layers = Layers(blocks)
        self.shared = nn.ModuleDict(modules_of_all_layers(config, self.layers))
        self.norm = nn.Identity() if config.block == "post" else make_norm(config)
        self.head = Linear(config.hidden_size, config.outputs, bias=config.num_classes > 0)
        self.tie()
        self.local_ops = LocalSequence()
        if config.direction == "both":
            self.local_ops = BOTH_DIRECTIONS.get()()
        self.context: SequenceSharding | None = None
        self.regions = TensorRegions()
        self.pipeline: Pipelined | None = None
        self.computes_on: torch.device | None = None
        self.saved_activations: Callable[[], AbstractContextManager[None]] = nullcontext

    def tie(self) -> None:
        """Let the head share the embedding's parameter, if the shape says so: again after to_empty,
        which gives each its own."""
        if self.config.tie_word_embeddings and self.head is not None:
            self.head.weight = self.embed.weight

    @property
    def head_weight(self) -> Tensor | None:
        """None where another stage of a pipeline has the head."""
        return None if self.head is None else self.head.weight

    def forward(self, ids_BT: Tensor, seq: Sequence | None = None) -> Tensor:
        """Token ids (B, T) -> hidden states (B, T, D) after the last norm; logits are
        `model.logits(hidden)`."""
        if seq is None:
            seq = Sequence(torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT))
        if seq.cache is not None and self.outgrown(ids_BT, seq.cache):
            return self.recomputed(ids_BT, seq)
        self.prepare(seq)
        x_BTD = self.blocks(self.embed_tokens(ids_BT, seq), seq)
        if seq.cache is not None:
            seq.cache.length += ids_BT.shape[1]
        return self.final_norm(x_BTD)

    def outgrown(self, ids_BT: Tensor, cache: Cache) -> bool:
        """Whether new ids make what the layers kept of earlier ones wrong (Mixer.cached_up_to);
        such a model keeps all ids."""
        limits = []
        for block in self.layers:
            if block.mixer.cached_up_to is not None:
                limits.append(block.mixer.cached_up_to)
        if not limits:
            return False
        kept = cache.kept(IDS)
        new_BT11 = ids_BT[..., None, None]
        kept["k"] = torch.cat([kept["k"], new_BT11], 1) if "k" in kept else new_BT11
        were_kept = cache.length == 0 or len(cache.layers) > 1
        return not were_kept or cache.length + ids_BT.shape[1] > min(limits)

    def recomputed(self, ids_BT: Tensor, seq: Sequence) -> Tensor:
        """Hidden states of new tokens, from the ids of the whole text: each sequence is a forward
        of its own."""
        cache = seq.cache
        assert cache is not None, "only a cache is outgrown"
        tokens = ids_BT.shape[1]
        ids_BS = cache.kept(IDS)["k"][..., 0, 0]
        cache.drop_all_but(IDS)
        if cache.length == 0:
            hidden_BTD = self(ids_BT, replace(seq, cache=None))
        else:
            padding = [0] * len(ids_BS) if cache.padding_B is None else cache.padding_B.tolist()
            rows = []
            for ids_S, start in zip(ids_BS, padding):
                rows.append(self(ids_S[None, start:])[:, -tokens:])
            hidden_BTD = torch.cat(rows)
        cache.length += tokens
        return hidden_BTD

    def prepare(self, seq: Sequence) -> None:
        """Give `seq` what computes along it, unless it has that already, and put into `seq.shared`
        what several layers use."""
        if seq.ops is UNDECIDED:
            seq.ops = self.local_ops
        for module in self.shared.values():
            seq.shared |= module()
        for block in self.layers:
            block.mixer.prepare(seq)

    def embed_tokens(self, ids_BT: Tensor, seq: Sequence) -> Tensor:
        """What the first block sees."""
        x_BTD = self.embed(ids_BT)
        if self.patches is not None:
            assert seq.pixels_BCHW is not None, "a model of images is given images"
            patches_BPD = self.patches(seq.pixels_BCHW, self.compute_dtype)
            x_BTD = torch.cat([x_BTD, patches_BPD.to(x_BTD.dtype)], 1)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(self.regions.own_tokens(seq.positions_BT))
        x_BTD = x_BTD.to(self.stream_dtype)
        if self.embed_norm is not None:
            x_BTD = self.embed_norm(x_BTD)
        noise_BT = None if seq.noise_BT is None else self.regions.own_tokens(seq.noise_BT)
        return dropout(x_BTD, self.config.embed_dropout, noise_BT)  # last: a norm undoes its scale

    def blocks(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        """What the last block says; each has noise of its own, by its number in the whole model."""
        with self.saved_activations():
            for block in self.layers:
                place = BLOCK_PLACE * (block.mixer.layer + 1)
                noise_BT = None if seq.noise_BT is None else of_place(seq.noise_BT, place)
                cache = None if seq.cache is None else seq.cache.of(block.mixer.layer)
                mine = replace(seq, noise_BT=noise_BT, cache=cache)
                outputs = self.run_block(block, x_BTD, mine)
                if isinstance(outputs, tuple):
                    outputs, seq.observed[block.mixer.layer] = outputs
                x_BTD = outputs
        return x_BTD

    def mix_layers(self, inputs: Mapping[int, Tensor], seq: Sequence) -> list[Tensor]:
        """What the mixers of these layers alone give, each for its own input (B, T, D)."""
        self.prepare(seq)
        return [self.layers[layer].mix_alone(h_BTD, seq) for layer, h_BTD in inputs.items()]

    def run_block(self, block: Block, x_BTD: Tensor, seq: Sequence) -> Fed:
        """One block; huggingface/own_class/model.py has it recomputed in the backward."""
        return block(x_BTD, seq)

    def final_norm(self, x_BTD: Tensor) -> Tensor:
        """What the head sees."""
        return self.norm(x_BTD).to(self.compute_dtype)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Let activations have this type from here on."""
        self.compute_dtype = dtype
        for block in self.layers:
            block.inner = dtype

    @property
    def stream_dtype(self) -> torch.dtype:
        """The type of what goes from block to block."""
        return torch.float32 if self.config.residual_in_fp32 else self.compute_dtype

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, W) in fp32: for evaluation by eye and generation; training uses
        loss.py."""
        logits_BTW = self.head(self.regions.enter(hidden_BTD)).float()
        return softcapped(logits_BTW, self.config.final_logit_softcapping)

    def length_of_flops(self, seq_len: int) -> int:
        """The length of a causal sequence whose tokens see as many keys on average: in both
        directions each sees all. (Of recurrences one direction is counted.)"""
        return 2 * seq_len - 1 if self.config.direction == "both" else seq_len

    def flops_per_token(self, seq_len: int) -> float:
        """Forward floating-point operations per token of a sequence of `seq_len`, head included; a
        training step does 3x.

        Convention: a multiply-add is 2, the masked half of causal attention is not counted,
        recurrences count as their recurrent form (what the mathematics needs, not what a chunked
        kernel spends); norms and activations count nothing. Of the whole model, whatever of it lies
        here.
        """
        config = self.config
        seq_len = self.length_of_flops(seq_len)
        with torch.device("meta"):
            blocks = sum(block.flops_per_token(seq_len) for block in Model(config).layers)
        if config.num_classes:  # one output of the head a record, which counts nothing beside it
            return blocks
        return blocks + 2 * config.hidden_size * config.vocab_size


def modules_of_all_layers(config: ModelConfig, layers: Iterable[Block]) -> dict[str, nn.Module]:
    """What the model holds once for all layers of a mixer, by the mixer's name: made by the first
    of them whose own settings need it (a variant may go without)."""
    modules: dict[str, nn.Module] = {}
    for block, name in zip(layers, map(mixer_of, config.layer_types)):
        if block.mixer.whole_model is None or name in modules:
            continue
        module = block.mixer.whole_model(config, block.mixer.config)
        if list(module.parameters()):
            modules[name] = module
    return modules


def on_meta(config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> Model:
    """A model without memory, for parallel/apply.py to take apart before it gets any."""
    with torch.device("meta"):
        return Model(config, compute_dtype)
