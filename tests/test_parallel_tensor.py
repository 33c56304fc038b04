"""Tensor parallelism changes no loss and no gradient: every mixer, with and without sequence parallel, against one process."""

import pytest
import torch
from conftest import tiny_shape
from torch import Tensor
from worlds import in_processes

from longfire.data.batches import Batch
from longfire.loss import loss_sum
from longfire.mixers import MIXERS
from longfire.model import Model, build, initialise, keyed_generator
from longfire.ops.documents import Documents
from longfire.ops.dropout import row_noise
from longfire.parallel.mesh import Mesh
from longfire.parallel.pieces import boxes, local
from longfire.parallel.tensor import split
from longfire.shape import ModelShape

LENGTHS = (5, 37, 1, 35, 2)  # documents shorter and longer than a convolution and a chunk; 80 tokens
TOKENS, WORDS = sum(LENGTHS), 97  # no number of processes divides the words
FP64 = {"rtol": 1e-9, "atol": 1e-9}  # relative to each parameter's largest gradient: sums in another order

# with four heads of everything, so that two and four processes can share them
FOUR_HEADS = {
    "attention": {"num_heads": 8, "num_kv_heads": 4, "qk_norm": True, "qkv_bias": True, "o_bias": True},
    "linear_attention": {"num_heads": 4},
    "retention": {"num_heads": 4},
    "gla": {"num_heads": 4, "use_short_conv": True},
    "gsa": {"num_heads": 8, "num_kv_heads": 4, "num_slots": 6, "feature_map": "t2r", "use_short_conv": True},
    "hgrn2": {"expand_ratio": 8, "use_short_conv": True},
    "mamba": {"state_size": 6, "dt_rank": 3, "use_bias": True},
    "mamba2": {"head_dim": 16, "state_size": 12, "n_groups": 1},
    "delta_net": {"num_heads": 4, "use_gate": True},
    "gated_delta_net": {"num_heads": 4, "num_v_heads": 8, "head_dim": 4},
    "kda": {"num_heads": 4, "num_v_heads": 8, "head_dim": 4},
    "rwkv7": {"head_dim": 8, "decay_low_rank_dim": 6, "a_low_rank_dim": 5, "v_low_rank_dim": 4, "gate_low_rank_dim": 7},
}  # fmt: skip


def shape_of(*mixers: str, **changes) -> ModelShape:
    return tiny_shape(
        *mixers, **{"mixers": {name: FOUR_HEADS[name] for name in mixers}, "initializer_range": 0.2, **changes}
    )


def a_batch(rows: int = 2) -> Batch:
    ids_BT = torch.randint(WORDS, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
    labels_BT = torch.randint(WORDS, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    labels_BT[0, :20] = -100
    of_documents = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)]).expand(rows, -1)
    positions_BT = torch.cat([torch.arange(n) for n in LENGTHS]).expand(rows, -1)
    return Batch(ids_BT, labels_BT, positions_BT, Documents.from_ids(of_documents))


def never_zero(model: Model) -> None:
    """Parameters that begin as zeros hide what lies behind them: they get values, by name and whole shape, as in conftest."""
    for name, parameter in model.named_parameters():
        whole = torch.zeros(shapes_of(model)[name])
        noise = 0.2 * torch.randn(whole.shape, generator=keyed_generator(0, name))
        for box in boxes(parameter, model.splits.get(name)):
            here = box.of_local(local(parameter.data))
            here.copy_(here + box.of_whole(noise))


def shapes_of(model: Model) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in Model(model.shape).named_parameters()}


def one_process(shape: ModelShape) -> Model:
    model = build(shape, 0, compute_dtype=torch.float64).double()
    never_zero(model)
    return model


def split_model(shape: ModelShape, mesh: Mesh, sequence_parallel: bool) -> Model:
    """As parallel/apply.py makes it: split on meta, then initialised piece by piece."""
    with torch.device("meta"):
        model = Model(shape, torch.float64).double()
    split(model, mesh, sequence_parallel)
    model.to_empty(device="cpu")
    if shape.tie_word_embeddings:
        model.head.weight = model.embed.weight
    initialise(model, 0)
    never_zero(model)
    return model


def loss_of(model: Model, batch: Batch) -> Tensor:
    """Less than all tokens at a time, and dropout where the shape has it."""
    noise_BT = row_noise(0, 0, *batch.ids_BT.shape, "cpu") if model.shape.drops else None
    return loss_sum(model, batch, 50, noise_BT) / batch.real_tokens()


def compare(model: Model, true: Model, mesh: Mesh) -> None:
    """Loss and unclipped gradients of what lies here against the boxes of the whole model's."""
    batch = a_batch()
    loss, true_loss = loss_of(model, batch), loss_of(true, batch)
    loss.backward(), true_loss.backward()
    torch.testing.assert_close(loss.detach(), true_loss.detach(), rtol=1e-12, atol=0)
    parameters, wholes = dict(model.named_parameters()), dict(true.named_parameters())
    assert parameters.keys() == wholes.keys()
    for name, parameter in parameters.items():
        if name in model.partial:
            assert name not in model.splits
            mesh.sum(local(parameter.grad), "tp")
        whole = wholes[name].grad
        assert whole.abs().max() > 1e-6, f"{name} has no gradient that could be compared"
        seen = 0
        for box in boxes(parameter, model.splits.get(name)):
            got, wanted = box.of_local(local(parameter.grad)), box.of_whole(whole)
            torch.testing.assert_close(
                got / whole.abs().max(), wanted / whole.abs().max(), **FP64, msg=lambda m: f"{name}: {m}"
            )
            seen += got.numel()
        assert seen == local(parameter).numel(), f"the boxes of {name} are all of what lies here"


def check(rank: int, shape: ModelShape, degrees: dict[str, int], sequence_parallel: bool, prepare=None) -> set[str]:
    """The names that were split."""
    mesh = Mesh.of_degrees(degrees, "cpu")
    model = split_model(shape, mesh, sequence_parallel)
    if prepare is not None:
        prepare(model, mesh)
    compare(model, one_process(shape), mesh)
    return set(model.splits)


each_mixer = pytest.mark.parametrize("mixer", MIXERS)
with_and_without = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence"])


@each_mixer
@with_and_without
def test_two_processes_share_every_mixer(mixer, sequence_parallel):
    in_processes(2, check, shape_of(mixer), {"tp": 2}, sequence_parallel)
