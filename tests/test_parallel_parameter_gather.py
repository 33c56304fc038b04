"""parallel/parameter_gather.py: matrices travel in bf16 and no number changes."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_config
from plans import CPU, HYBRID, OPTIMIZER, PLANS, T, parts, steps
from sets import slow_unless
from torch.distributed.fsdp import FSDPModule
from worlds import in_processes

from longfire.checkpoint.state import State
from longfire.config import settings
from longfire.initialise import materialise
from longfire.mixers import MIXERS
from longfire.model import Model, on_meta
from longfire.ops.float8 import RECIPES
from longfire.ops.linear import Linear
from longfire.optim import make_optimizer
from longfire.parallel.apply import parallelize, sharded
from longfire.parallel.mesh import Mesh
from longfire.parallel.parameter_gather import RoundedGather, Segment, float8_bytes
from longfire.parallel.sharding import local

QUICK_MIXERS = {"attention", "gla", "mamba", "rwkv7"}


NO_FLOAT8 = settings.Float8()


def bf16_state(
    mesh: Mesh,
    mixers: tuple[str, ...],
    given: dict[str, Any],
    changes: dict,
    float8: settings.Float8 = NO_FLOAT8,
) -> State:
    """A model with fp32 parameters that computes in bf16."""
    config = tiny_config(*mixers, **{"initializer_range": 0.05, **changes})
    model = on_meta(config, torch.bfloat16)
    keeping = settings.ActivationCheckpoint()
    parallelism = settings.Parallelism(**given)
    model = parallelize(model, keeping, False, mesh, parallelism, T, float8=float8)
    materialise(model, 0, CPU)
    return State(model, make_optimizer(model, OPTIMIZER, CPU), mesh=mesh)


def both_ways(rank: int, mixers: tuple[str, ...], plan: str, changes: dict) -> list[tuple]:
    """Losses, gradient norms, and all parameters and moments after two steps: with `auto`, then with float32."""
    mesh = Mesh.of_degrees(PLANS[plan].degrees, "cpu")
    results = []
    for dtype in ("auto", "float32"):
        given = {**PLANS[plan].given, "param_gather_dtype": dtype}
        state = bf16_state(mesh, mixers, given, changes)
        results.append((steps(state, 2), parts(state)))
    return results


def assert_equal(
    mixers: tuple[str, ...], plan: str = "fsdp 2", changes: dict | None = None
) -> None:
    for auto, float32 in in_processes(
        PLANS[plan].processes, both_ways, mixers, plan, changes or {}
    ):
        assert auto[0] == float32[0]
        for name, boxes in float32[1].items():
            for (_, got), (_, wanted) in zip(auto[1][name], boxes, strict=True):
                assert got.equal(wanted), name


@pytest.mark.parametrize("mixer", slow_unless(lambda mixer: mixer in QUICK_MIXERS, MIXERS))
def test_no_number_of_a_mixer_changes(mixer):
    assert_equal((mixer,))


@pytest.mark.parametrize(
    "plan",
    [
        "hsdp 2x2",
        "fsdp 2, offloaded",
        "fsdp 2, never resharded",
        "fsdp 2 x tp 2",
        "pp 2 x fsdp 2",
        "cp 2",
    ],
)
def test_no_number_of_a_plan_changes(plan):
    assert_equal(HYBRID, plan)


@pytest.mark.dtype
@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"residual_in_fp32": True}], ids=str
)
def test_no_number_of_a_variant_changes(changes):
    assert_equal(HYBRID, changes=changes)


MULTIPLES_OF_16 = {"hidden_size": 64, "intermediate_size": 128}


def float8_of(recipe: str, gathers: bool) -> settings.Float8:
    return settings.Float8(
        enable_float8_linear=True,
        recipe_name=recipe,
        emulate=True,
        enable_fsdp_float8_all_gather=gathers,
    )


def with_float8(rank: int, mixers: tuple[str, ...], plan: str, recipe: str, dtype: str) -> list:
    """Losses, gradient norms, and all parameters and moments after two steps: matrices that multiply 8-bit numbers travel in few
    bytes, then in float32."""
    mesh = Mesh.of_degrees(PLANS[plan].degrees, "cpu")
    given = {**PLANS[plan].given, "param_gather_dtype": dtype}
    results = []
    for gathers in (True, False):
        float8 = float8_of(recipe, gathers)
        state = bf16_state(mesh, mixers, given, MULTIPLES_OF_16, float8)
        results.append((steps(state, 2), parts(state)))
    return results


FLOAT8_PLANS = {
    "fsdp 2": "auto",
    "hsdp 2x2": "auto",
    "fsdp 2, never resharded": "auto",
    "fsdp 2 x tp 2": "float32",
    "cp 2": "auto",
    "pp 2 x fsdp 2": "auto",
}
QUICK_FLOAT8 = {("fsdp 2", recipe) for recipe in RECIPES} | {("fsdp 2 x tp 2", "tensorwise")}


@pytest.mark.parametrize(
    ("plan", "recipe"),
    slow_unless(
        lambda plan, recipe: (plan, recipe) in QUICK_FLOAT8,
        [(plan, recipe) for plan in FLOAT8_PLANS for recipe in RECIPES],
    ),
)
def test_no_number_changes_where_float8_travels(plan, recipe):
    answers = in_processes(
        PLANS[plan].processes, with_float8, HYBRID, plan, recipe, FLOAT8_PLANS[plan]
    )
    for narrow, wide in answers:
        assert narrow[0] == wide[0]
        for name, boxes in wide[1].items():
            for (_, got), (_, wanted) in zip(narrow[1][name], boxes, strict=True):
                assert got.equal(wanted), name


def bytes_sent(rank: int, recipe: str) -> tuple[int, int, int]:
    """Bytes of the all-gathers of a step, with float8 and with float32; numbers of the chosen matrices that a process has."""
    mesh = Mesh.of_degrees({"dp_shard": 2}, "cpu")
    totals = []
    for gathers in (True, False):
        sent: list[int] = []
        float8 = float8_of(recipe, gathers)
        given = {"reshard_after_forward": "never"}  # each is gathered once
        state = bf16_state(mesh, ("attention",), given, MULTIPLES_OF_16, float8)
        numbers = 0
        for module in state.model.modules():
            if isinstance(module, Linear) and module.float8 is not None:
                numbers += local(module.weight).numel()
        gather = dist.all_gather_single

        def watched(output, given, sent=sent, gather=gather, **more):
            sent.append(given.nbytes)
            return gather(output, given, **more)

        with patch.object(dist, "all_gather_single", watched):
            steps(state, 1, microbatches=1)
        totals.append(sum(sent))
    return totals[0], totals[1], numbers


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_travels_in_one_byte_or_two(recipe):
    for narrow, wide, numbers in in_processes(2, bytes_sent, recipe):
        saved = (4 - float8_bytes(recipe)) * numbers
        assert saved > 0 and abs(wide - narrow - saved) < 16 * 8


def what_travels(rank: int) -> tuple[list[tuple[torch.dtype, int]], list[int]]:
    """(type, numbers) of each all-gather in a step; the bytes that are expected of each module."""
    mesh = Mesh.of_degrees({"dp_shard": 2}, "cpu")
    state = bf16_state(mesh, ("attention",), {}, {})
    sent = []
    gather = dist.all_gather_single

    def watched(output, given, **more):
        sent.append((given.dtype, given.numel()))
        return gather(output, given, **more)

    with patch.object(dist, "all_gather_single", watched):
        steps(state, 1, microbatches=1)
    expected = []
    for module in sharded(state.model):
        expected.append(bytes_of(module))
    return sent, expected


def bytes_of(module: FSDPModule) -> int:
    """What one of two processes sends of a module's own parameters: 2 bytes of a number of a Linear's weight, else 4."""
    gathered_by_others = set()
    for other in module.modules():
        if isinstance(other, FSDPModule) and other is not module:
            gathered_by_others.update(other.modules())
    total = 0
    for inner in set(module.modules()) - gathered_by_others:
        for name, parameter in inner.named_parameters(recurse=False):
            each = 2 if isinstance(inner, Linear) and name == "weight" else 4
            rows = -(-len(parameter) // 2)
            total += each * rows * (parameter.numel() // len(parameter))
    return total


def test_matrices_travel_in_bf16_and_all_else_in_fp32():
    for sent, expected in in_processes(2, what_travels):
        assert {dtype for dtype, _ in sent} == {torch.uint8}
        for _, count in sent:
            assert any(0 <= count - bytes_ < 16 for bytes_ in expected)
        assert len({count for _, count in sent}) >= 2, "a block, and what is in no block"


def test_neighbours_of_one_kind_are_one_span():
    norm = torch.nn.LayerNorm(4)
    segments = [
        Segment(norm, "weight", 3, "full"),
        Segment(norm, "weight", 8, "rounded"),
        Segment(norm, "weight", 8, "rounded"),
        Segment(norm, "weight", 4, "8 bits"),
        Segment(norm, "weight", 5, "8 bits"),
        Segment(norm, "weight", 1, "full"),
    ]
    gather = RoundedGather(segments, torch.bfloat16)
    assert [tuple(span) for span in gather.spans] == [
        (0, 3, 0, "full"),
        (3, 19, 16, "rounded"),
        (19, 23, 48, "8 bits"),
        (23, 28, 52, "8 bits"),
        (28, 29, 12, "full"),
    ]
    assert gather.sent_bytes == 64


def test_another_order_of_parameters_is_noticed():
    model: Model = on_meta(tiny_config("attention"), torch.bfloat16)
    materialise(model, 0, CPU)
    projection, norm = model.layers[0].mixer.q_proj, model.norm
    segments = [
        Segment(projection, "weight", projection.weight.numel(), "rounded"),
        Segment(norm, "weight", norm.weight.numel(), "full"),
    ]
    gather = RoundedGather(segments, torch.bfloat16)
    flat = torch.cat([projection.weight.detach().flatten(), norm.weight.detach().flatten()])
    gather.check_order(flat)
    with pytest.raises(AssertionError, match="another order"):
        gather.check_order(flat.flip(0))
