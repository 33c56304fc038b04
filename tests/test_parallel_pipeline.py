"""parallel/pipeline.py, stages.py: losses and unclipped gradients of every parameter equal those of one process, whatever the order."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from worlds import in_processes

from longfire.data.batches import Batch
from longfire.data.pack import NO_LABEL
from longfire.loss import loss_of, loss_sum
from longfire.model import Model
from longfire.ops.documents import Documents
from longfire.ops.dropout import row_noise
from longfire.parallel.mesh import Mesh
from longfire.parallel.pipeline import cut
from longfire.settings import Parallelism

SCHEDULES = ["GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
HYBRID = ("gla", "attention", "gla", "attention")
MODELS = {
    "hybrid": (HYBRID, {}),
    "rwkv7": (("rwkv7",) * 4, {}),
    "hgrn2": (("hgrn2",) * 4, {}),
    "tied": (HYBRID, {"tie_word_embeddings": True}),
    "all at once": (
        ("rwkv7", "gla", "hgrn2", "rwkv7"),
        {"mlp": "gelu", "norm": "layernorm", "block": "post", "embed_norm": True, "learned_positions": True, "dropout": 0.2,
         "max_position_embeddings": 16, "embed_dropout": 0.1, "tie_word_embeddings": True},
    ),
}  # fmt: skip
CHUNK_TOKENS, ROWS, TOKENS = 7, 1, 12


def microbatches(count: int, seed: int = 0, rows: int = ROWS) -> tuple[Batch, ...]:
    """Two documents a row, and some labels that do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 97, (count * rows, TOKENS + 1), generator=generator)
    ends = torch.randint(3, TOKENS - 2, (count * rows, 1), generator=generator)
    tokens = torch.arange(TOKENS)[None]
    second = tokens >= ends
    labels = torch.where(tokens == ends - 1, NO_LABEL, ids[:, 1:])
    documents = Documents.from_ids(second.long() + 2 * torch.arange(count * rows)[:, None])
    return Batch(ids[:, :-1], labels, torch.where(second, tokens - ends, tokens), documents).split(count)


def noises_of(shape, batches):
    return [row_noise(3, number * ROWS, ROWS, TOKENS, "cpu") if shape.drops else None for number in range(len(batches))]


def real_tokens(batches):
    return sum(batch.real_tokens() for batch in batches)


def truth(model, batches):
    """Loss and gradients of one process."""
    total = 0.0
    for batch, noise in zip(batches, noises_of(model.shape, batches)):
        loss = loss_sum(model, batch, CHUNK_TOKENS, noise) / real_tokens(batches)
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad for name, p in model.named_parameters()}


def cut_of(model: Model, mesh: Mesh, parallelism: Parallelism, **more):
    """The model's part on this process with the same values, and its pipeline."""
    with torch.device("meta"):
        part = Model(model.shape, model.compute_dtype).to(model.compute_dtype)
    pipeline = cut(part, mesh, parallelism, TOKENS, **more)
    return part, pipeline


def fill(part: Model, model: Model) -> None:
    """Memory and the whole model's values, sharded or not."""
    part.to_empty(device="cpu")
    if part.shape.tie_word_embeddings and part.head is not None:
        part.head.weight = part.embed.weight
    values = dict(model.named_parameters())
    for name, parameter in part.named_parameters():
        value = values[name].data
        if isinstance(parameter, DTensor):
            rows = parameter.device_mesh.size()
            chunks = value.chunk(rows)
            here = parameter.device_mesh.get_local_rank()
            value = chunks[here] if here < len(chunks) else value[:0]
            parameter.to_local().data.copy_(value)
        else:
            parameter.data.copy_(value)


def close(got, expected, name):
    scale = float(expected.abs().max())
    rounding = 1e-10 if expected.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got, expected, rtol=0, atol=rounding * (scale + 1e-3), msg=lambda m: f"{name}: {m}")


def check(part, pipeline, model, batches, data=1, mine=None):
    """One step of the pipeline against one process; gradients that lie on several stages are compared on each."""
    loss, gradients = truth(model, batches)
    mine = batches if mine is None else mine
    noises = [noise for batch, noise in zip(batches, noises_of(model.shape, batches)) if any(batch is m for m in mine)]
    words = real_tokens(batches)
    got = pipeline.step(mine, noises, lambda m, h, b: loss_of(m, h, b, CHUNK_TOKENS) / words)
    got = pipeline.mesh.sum(got, "dp_shard")
    close(got, loss, "loss")
    for name, parameter in part.named_parameters():
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        close(gradient, gradients[name], name)


def double(model: Model) -> Model:
    model.compute_dtype = torch.float64
    for block in model.layers:
        block.inner = torch.float64
    return model.double()


def one_case(rank, model, schedule, count, points=(), file=""):
    mesh = Mesh.of_degrees({"pp": torch.distributed.get_world_size()}, "cpu")
    parallelism = Parallelism(
        pipeline_parallel_schedule=schedule, pipeline_parallel_split_points=points, pipeline_parallel_schedule_csv=file
    )
    part, pipeline = cut_of(model, mesh, parallelism)
    fill(part, model)
    check(part, pipeline, model, microbatches(count))
    return sorted(name for name, _ in part.named_parameters()), sorted(part.copied)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_one_process(kind, schedule, tiny_model):
    types, changes = MODELS[kind]
    model = double(tiny_model(*types, **changes))
    found = in_processes(2, one_case, model, schedule, 4)
    names = {name for name, _ in model.named_parameters()}
    assert set(found[0][0]) | set(found[1][0]) == names
    assert sorted([*found[0][0], *found[1][0]]) == sorted([*names, *found[0][1], *found[1][1]]), "a copy has one owner"
