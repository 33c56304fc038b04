"""ops/rounded_weights.py: a step that rounds each weight once gives the same numbers to the bit as one that rounds it in each
forward and backward, and no copy is left after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from plans import CPU, HYBRID, OPTIMIZER, PLANS, T, parts, rows_of
from sets import slow_unless
from torch import Tensor
from worlds import in_processes

from longfire.checkpoint.saving import Checkpoints
from longfire.checkpoint.state import State
from longfire.config import settings
from longfire.config.settings import ActivationCheckpoint, Training
from longfire.device import Clock
from longfire.initialise import materialise
from longfire.mixers import MIXERS
from longfire.model import Model, on_meta
from longfire.ops import bf16
from longfire.ops.linear import Linear
from longfire.ops.rounded_weights import matrices_rounded, pays, rounded_once
from longfire.optim import make_optimizer
from longfire.optim.average import averages_in_place
from longfire.parallel.apply import parallelize, recompilations
from longfire.parallel.axes import DATA
from longfire.parallel.mesh import ALONE, Mesh
from longfire.training.step import matrices_kept_rounded, train_step

NOTHING = ActivationCheckpoint()
QUICK_MIXERS = {"attention", "mamba", "rwkv7"}
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "tied": {"changes": {"tie_word_embeddings": True}},
    "block recomputed": {"keeping": ActivationCheckpoint("block")},
    "matrix products kept": {"keeping": ActivationCheckpoint("block", ("matmuls",))},
    "both parts recomputed, MLP in chunks": {
        "keeping": ActivationCheckpoint("attention+mlp"),
        "mlp_chunk_size": 7,
    },
    "offloaded": {"keeping": ActivationCheckpoint("block", offload=True)},
    "compiled": {"compiled": True},
    "compiled, recomputed": {"compiled": True, "keeping": ActivationCheckpoint("block")},
    "in segments": {"training": {"tbptt_segments": 2}},
    "with averages": {"optimizer": settings.Optimizer(lr=1e-3, ema_decay=0.9)},
}


def state_of(
    mixers: tuple[str, ...],
    mesh: Mesh = ALONE,
    given: dict[str, Any] | None = None,
    keeping: ActivationCheckpoint = NOTHING,
    compiled: bool = False,
    mlp_chunk_size: int = 0,
    optimizer: settings.Optimizer = OPTIMIZER,
    changes: dict[str, Any] | None = None,
) -> State:
    """A model with fp32 parameters that computes in bf16."""
    config = tiny_config(*mixers, **{"initializer_range": 0.05, **(changes or {})})
    model = on_meta(config, torch.bfloat16)
    parallelism = settings.Parallelism(**(given or {}))
    parallelize(model, keeping, False, mesh, parallelism, T, mlp_chunk_size=mlp_chunk_size)
    if compiled:
        for block in model.layers:
            block.compile(dynamic=False, backend="aot_eager_decomp_partition")
    materialise(model, 0, CPU)
    return State(model, make_optimizer(model, optimizer, CPU), mesh=mesh)


def trained(state: State, choice: str, steps: int = 2, **training: Any) -> list[dict]:
    """The numbers of so many steps of two micro-batches."""
    numbers = []
    asked = Training(keep_rounded_weights=choice, **training)
    for _ in range(steps):
        first = state.rows_consumed + 4 * state.mesh.rank(*DATA)
        batch = rows_of(first, 4)
        numbers.append(train_step(state, batch.split(2), 1e-3, asked, Clock(CPU)))
        assert not copies(state.model), "no copy is left after a step"
    return numbers


def copies(model: Model) -> list[Tensor]:
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Linear) and module.rounded_WD is not None:
            found.append(module.rounded_WD)
    return found


def assert_same(one: tuple[list, dict], other: tuple[list, dict]) -> None:
    assert one[0] == other[0]
    for name, boxes in one[1].items():
        for (_, got), (_, wanted) in zip(boxes, other[1][name], strict=True):
            assert got.equal(wanted), name


def both_ways(
    rank: int, mixers: tuple[str, ...], plan: str, way: dict[str, Any]
) -> list[tuple[list, dict]]:
    """Numbers, parameters and moments after two steps, with copies and without."""
    mesh = Mesh.of_degrees(PLANS[plan].degrees, "cpu") if PLANS[plan].processes > 1 else ALONE
    of_state = {key: value for key, value in way.items() if key != "training"}
    found = []
    for choice in ("on", "off"):
        state = state_of(mixers, mesh, PLANS[plan].given, **of_state)
        found.append((trained(state, choice, **way.get("training", {})), parts(state)))
    return found


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("mixer", slow_unless(lambda mixer: mixer in QUICK_MIXERS, MIXERS))
def test_no_number_of_a_mixer_changes(mixer, native):
    with bf16.assumed(native):
        assert_same(*both_ways(0, (mixer,), "one", {}))


@pytest.mark.parametrize("way", WAYS)
def test_no_number_changes_however_blocks_are_computed(way):
    mixers = HYBRID
    if way == "in segments":
        mixers = ("gla",)
    elif way.startswith("compiled"):
        mixers = ("attention",)
    assert_same(*both_ways(0, mixers, "one", WAYS[way]))


@pytest.mark.parametrize("plan", ["tp 2, sequence", "pp 2", "pp 2 x tp 2"])
def test_no_number_of_a_plan_changes(plan):
    for with_copies, without in in_processes(PLANS[plan].processes, both_ways, HYBRID, plan, {}):
        assert_same(with_copies, without)


def kept(rank: int, plan: str) -> int:
    state = state_of(HYBRID, Mesh.of_degrees(PLANS[plan].degrees, "cpu"), PLANS[plan].given)
    return len(matrices_kept_rounded(state.model, Training(keep_rounded_weights="on"), 2))


@pytest.mark.parametrize(
    ("plan", "has_copies"),
    [("tp 2, sequence", True), ("pp 2", True), ("fsdp 2", False), ("ddp 2", False)],
)
def test_gathered_parameters_have_no_copies(plan, has_copies):
    assert all(bool(count) == has_copies for count in in_processes(2, kept, plan))


def test_every_product_of_a_step_reads_the_copy():
    """With copies of zeros the blocks add nothing, so the copies are what is multiplied."""
    state = state_of(HYBRID)
    model = state.model
    matrices = matrices_rounded(model, torch.bfloat16, without=[model.head])
    assert len(matrices) == sum(isinstance(x, Linear) for x in model.modules()) - 1
    ids_BT = torch.arange(8)[None]
    with rounded_once(matrices, torch.bfloat16):
        for matrix in matrices:
            matrix.rounded_WD.zero_()
        hidden_BTD = model(ids_BT)
    embedded_BTD = model.embed(ids_BT).to(torch.bfloat16)
    assert torch.equal(hidden_BTD, model.final_norm(embedded_BTD))


def test_a_weight_that_changes_within_a_step_is_an_error():
    state = state_of(HYBRID)
    matrices = matrices_rounded(state.model, torch.bfloat16)
    with (
        pytest.raises(AssertionError, match="changed within a step"),
        rounded_once(matrices, torch.bfloat16),
        torch.no_grad(),
    ):
        matrices[0].weight.mul_(2)


def test_no_copy_is_left_after_an_error():
    state = state_of(HYBRID)
    matrices = matrices_rounded(state.model, torch.bfloat16)
    with pytest.raises(RuntimeError, match="out of memory"), rounded_once(matrices, torch.bfloat16):
        assert len(copies(state.model)) == len(matrices)
        raise RuntimeError("out of memory")
    assert not copies(state.model)


def test_a_checkpoint_has_no_copies_and_resumes_to_the_bit(tmp_path: Path):
    folder = settings.Checkpoint(interval=1)
    state = state_of(HYBRID)
    trained(state, "on", steps=1)
    saving = Checkpoints(tmp_path, folder)
    saving.save(state)
    saving.wait()
    assert not [name for name in state.held() if "rounded" in name]
    resumed = state_of(HYBRID)
    assert Checkpoints(tmp_path, folder).restore(resumed)
    assert trained(state, "on") == trained(resumed, "off")
    assert_same(([], parts(state)), ([], parts(resumed)))


def test_what_is_evaluated_after_a_step_are_the_weights_as_they_are():
    """Weights, and their averages in their place: both as in a run without copies."""
    optimizer = settings.Optimizer(lr=1e-2, ema_decay=0.5)
    logits = []
    for choice in ("on", "off"):
        state = state_of(HYBRID, optimizer=optimizer)
        trained(state, choice)
        ids_BT = torch.arange(8)[None]
        with torch.no_grad():
            logits.append(state.model.logits(state.model(ids_BT)))
            with averages_in_place(state.optimizer):
                logits.append(state.model.logits(state.model(ids_BT)))
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[3])
    assert not torch.equal(logits[0], logits[1])


def test_when_it_pays():
    assert pays("auto", on_cuda=True, microbatches=2)
    assert not pays("auto", on_cuda=True, microbatches=1)
    assert not pays("auto", on_cuda=False, microbatches=8)
    assert pays("on", on_cuda=False, microbatches=1)
    assert not pays("off", on_cuda=True, microbatches=8)


def test_compiled_code_multiplies_by_the_copy():
    """What inductor makes of a product, with a copy and without: the same to the bit forward and backward, and no graph more
    when the next step has new copies.

    As on devices with bf16 units. Without them inductor takes fp32 -> bf16 -> fp32 of the weight for nothing, so that compiled
    code multiplies weights that were not rounded; copies are.
    """
    torch._dynamo.reset()
    matrix = Linear(16, 24)
    compiled = torch.compile(matrix, dynamic=False)
    found = []
    graphs = []
    for matrices in ([], [matrix], [matrix]):
        with bf16.assumed(True), rounded_once(matrices, torch.bfloat16):
            x = torch.linspace(-1, 1, 64).reshape(4, 16).bfloat16().requires_grad_()
            y = compiled(x)
            d_y = torch.linspace(-2, 1, y.numel()).reshape(y.shape).bfloat16()
            found.append((y, *torch.autograd.grad(y, (x, matrix.weight), d_y)))
        graphs.append(recompilations())
    for one in found[1:]:
        assert [a.equal(b) for a, b in zip(one, found[0], strict=True)] == [True] * 3
    assert graphs[2] == graphs[1]
