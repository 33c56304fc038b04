"""Pipeline and tensor parallel together, with FSDP inside: gradients of the local part equal those of one process."""

import pytest
import torch
from test_parallel_pipeline import (
    CHUNK_TOKENS,
    TOKENS,
    agrees,
    close,
    microbatches,
    noises_of,
    real_tokens,
    shared_out,
    truth,
)
from test_parallel_tensor import FOUR_HEADS
from torch.distributed.tensor import DTensor
from worlds import in_processes

from longfire.config.settings import ActivationCheckpoint, Parallelism
from longfire.loss import loss_of, losses
from longfire.model import Model
from longfire.parallel.apply import reshard
from longfire.parallel.mesh import Mesh
from longfire.parallel.pipeline import cut
from longfire.parallel.remat import save_memory
from longfire.parallel.sharding import local, sharding_of, slices_of
from longfire.parallel.tensor import add_up_partial_gradients, split

MODELS = {
    "hybrid": (("gla", "attention", "gla", "attention"), {}),
    "everything": (
        ("rwkv7", "hgrn2", "hgrn2", "rwkv7"),
        {
            "norm": "layernorm",
            "embed_norm": True,
            "learned_positions": True,
            "dropout": 0.2,
            "max_position_embeddings": 16,
            "embed_dropout": 0.1,
            "tie_word_embeddings": True,
        },
    ),
}


def case(rank, model, schedule, degrees, sequence_parallel, remat):
    mesh = Mesh.of_degrees(degrees, "cpu")
    parallelism = Parallelism(
        pipeline_parallel_schedule=schedule, sequence_parallel=sequence_parallel
    )
    with torch.device("meta"):
        part = Model(model.config, torch.float64).double()
    split(part, mesh, sequence_parallel)
    pipeline = part.pipeline = cut(part, mesh, parallelism, TOKENS, halves=not remat)
    for block in part.layers if remat else ():
        save_memory(block, ActivationCheckpoint(remat))
    if mesh.size("dp_shard") > 1:
        shared_out(pipeline, mesh)
    part.to_empty(device="cpu")
    part.tie()
    wholes = dict(model.named_parameters())
    for name, parameter in part.named_parameters():
        for box in slices_of(parameter, sharding_of(part, name)):
            box.of_local(local(parameter.data)).copy_(box.of_whole(wholes[name].data))
    batches, here, each = microbatches(4 * mesh.size("dp_shard")), 4 * mesh.rank("dp_shard"), 4
    loss, gradients = truth(model, batches)
    words, mine = real_tokens(batches), slice(here, here + each)
    noises = noises_of(model.config, batches)
    got = pipeline.step(
        batches[mine], noises[mine], lambda m, h, b: loss_of(m, h, b, CHUNK_TOKENS) / words
    )
    close(mesh.sum(got, "dp_shard"), loss, "loss")
    add_up_partial_gradients(part, mesh)
    for name, parameter in part.named_parameters():
        for box in slices_of(parameter, sharding_of(part, name)):
            close(box.of_local(local(parameter.grad)), box.of_whole(gradients[name]), name)
    batch = microbatches(1, seed=5, rows=4)[0]
    agrees(pipeline.losses(batch, CHUNK_TOKENS), losses(model, batch, CHUNK_TOKENS))
    reshard(part)
    assert all(isinstance(p, DTensor) for p in part.parameters()) == (mesh.size("dp_shard") > 1)


PP_TP = {"pp": 2, "tp": 2}


@pytest.mark.parametrize("sequence_parallel", [pytest.param(False, marks=pytest.mark.matrix), True])
@pytest.mark.parametrize(
    ("kind", "schedule", "degrees", "remat"),
    [
        pytest.param("hybrid", "1F1B", PP_TP, "", marks=pytest.mark.matrix),
        ("everything", "1F1B", PP_TP, "block"),
        pytest.param("everything", "ZBVZeroBubble", PP_TP, "", marks=pytest.mark.matrix),
        pytest.param("everything", "1F1B", {**PP_TP, "dp_shard": 2}, "", marks=pytest.mark.matrix),
        pytest.param(
            "hybrid",
            "InterleavedZeroBubble",
            {**PP_TP, "dp_shard": 2},
            "",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_gradients_are_those_of_one_process(
    kind, schedule, degrees, remat, sequence_parallel, tiny_model
):
    types, changes = MODELS[kind]
    model = tiny_model(*types, mixers={name: FOUR_HEADS[name] for name in types}, **changes)
    model.compute_dtype = torch.float64
    for block in model.layers:
        block.inner = torch.float64
    processes = torch.tensor(list(degrees.values())).prod().item()
    in_processes(processes, case, model.double(), schedule, degrees, sequence_parallel, remat)
