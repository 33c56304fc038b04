"""Where parameters lie: a ShardSpec outlives whatever replaces the parameter, and slices are the whole, each number once."""

import copy
from itertools import product

import pytest
import torch
from conftest import tiny_config
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from worlds import in_processes

from longfire.initialise import materialise
from longfire.model import on_meta
from longfire.parallel.apply import gradients
from longfire.parallel.mesh import ALONE, Mesh
from longfire.parallel.sharding import (
    WHOLE,
    DimSplit,
    ShardSpec,
    TensorSlice,
    copy_from_whole,
    global_shape,
    local,
    local_rows,
    placed_parameters,
    set_sharding,
    sharding_of,
    slices_of,
)
from longfire.parallel.tensor import split
from longfire.planner.memory import PlannedMesh

HALVES = ShardSpec(DimSplit(0, 12, ((0, 3), (6, 9))))


def split_model(sequence_parallel: bool = True, **changes):
    """What the first of two processes holds, on meta."""
    model = on_meta(tiny_config("gla", "attention", **changes))
    split(model, PlannedMesh({**ALONE.degrees, "tp": 2}), sequence_parallel)
    return model


def specs_of(model: nn.Module) -> dict[str, ShardSpec]:
    return {name: sharding_of(model, name) for name, _ in model.named_parameters()}


def test_a_parameter_of_one_process_is_whole():
    model = on_meta(tiny_config("gla"))
    assert set(specs_of(model).values()) == {WHOLE}
    assert sharding_of(model, "embed.weight") == ShardSpec(None, False, False)


@pytest.mark.parametrize("tied", [False, True])
def test_a_spec_outlives_memory_copies_and_ties(tied):
    model = split_model(tie_word_embeddings=tied)
    before = specs_of(model)
    assert before["layers.0.mlp.up_proj.weight"].split == DimSplit(0, 48, ((0, 24),))
    assert before["layers.0.mlp.down_proj.weight"].split == DimSplit(1, 48, ((0, 24),))
    assert before["layers.1.mixer_norm.weight"] == ShardSpec(gradient_is_partial=True)
    assert specs_of(copy.deepcopy(model)) == before
    materialise(model, 0, "cpu")
    assert specs_of(model) == before
    assert specs_of(copy.deepcopy(model).double()) == before
    assert sharding_of(model, "head.weight").split == DimSplit(0, 97, ((0, 48),))


@pytest.mark.parametrize("tied", [False, True])
def test_all_parameters_are_placed_in_their_order(tied):
    model = split_model(tie_word_embeddings=tied)
    placed = list(placed_parameters(model))
    assert [(name, parameter) for name, parameter, _ in placed] == list(model.named_parameters())
    assert {name: spec for name, _, spec in placed} == specs_of(model)


def test_only_gradients_of_parts_are_partial():
    """Without sequence parallel every process sees all tokens: only what is inside of a mixer or an MLP has a part."""
    partial = {n for n, spec in specs_of(split_model(False)).items() if spec.gradient_is_partial}
    assert partial and all(".mixer." in name or ".mlp." in name for name in partial)
    everywhere = specs_of(split_model(True))
    assert all(spec.gradient_is_partial != bool(spec.split) for spec in everywhere.values())


def sharded(rank: int) -> None:
    mesh = Mesh.of_degrees({"dp_shard": 2}, "cpu")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3, bias=False))
    set_sharding(model, "0.weight", HALVES)
    fully_shard(model, mesh=mesh.device_mesh["dp_shard"])
    assert sharding_of(model, "0.weight") == HALVES and sharding_of(model, "0.bias") == WHOLE
    model.to_empty(device="cpu")
    assert isinstance(model[0].weight, DTensor) and sharding_of(model, "0.weight") == HALVES
    model.unshard()
    assert not isinstance(model[0].weight, DTensor) and sharding_of(model, "0.weight") == HALVES
    model.reshard()
    whole = torch.arange(48.0).view(12, 4)
    assert global_shape(model[0].weight, HALVES) == (12, 4)
    with torch.no_grad():
        copy_from_whole(model[0].weight, HALVES, whole)
    rows = [[0, 1, 2], [6, 7, 8]][rank]
    assert local(model[0].weight).equal(whole[rows])
    first = 3 * rank
    assert local_rows(model[0].weight) == (first, first + 3)
    odd = model[1].weight  # three rows: two here, one there
    assert local_rows(odd) == [(0, 2), (2, 3)][rank]


def test_a_spec_outlives_fully_shard():
    in_processes(2, sharded)


@pytest.mark.parametrize(("dim", "parts"), list(product((0, 1), (1, 2))))
def test_slices_of_all_processes_are_the_whole(dim, parts):
    whole = torch.arange(128).view(8, 16)
    found = torch.zeros_like(whole)
    size = whole.shape[dim]
    each = size // parts
    for process in range(4):
        width = each // 4
        begins = [part * each + process * width for part in range(parts)]
        ranges = tuple((begin, begin + width) for begin in begins)
        spec = ShardSpec(DimSplit(dim, size, ranges))
        here = torch.cat([whole.narrow(dim, begin, width) for begin in begins], dim)
        assert global_shape(here, spec) == whole.shape
        for part in slices_of(here, spec):
            assert part.of_whole(whole).equal(part.of_local(here))
            part.of_whole(found).add_(1)
    assert found.eq(1).all()


def test_a_scalar_is_one_slice_and_nothing_is_none():
    assert slices_of(torch.tensor(3.0), WHOLE) == [TensorSlice((), (), ())]
    assert slices_of(torch.empty(0, 3), WHOLE) == []
    assert local_rows(torch.tensor(3.0)) == (0, 0)


def test_a_parameter_that_is_not_there_has_no_spec():
    model = on_meta(tiny_config("gla"))
    with pytest.raises(AssertionError, match=r"embed\.wait is no parameter"):
        set_sharding(model, "embed.wait", HALVES)
    with pytest.raises(AttributeError):
        sharding_of(model, "layers.9.mixer.weight")


def test_a_copy_counts_nothing_in_the_norm():
    """A parameter that another process of the pipeline owns adds nothing; a whole one is held by all of tp."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    set_sharding(model, "1.weight", ShardSpec(is_copy=True))
    set_sharding(model, "0.weight", ShardSpec(DimSplit(0, 4, ((0, 2),))))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    mesh = PlannedMesh({**ALONE.degrees, "tp": 2})
    _, copies = gradients(model, mesh)
    assert copies == [1, 2, torch.inf]
