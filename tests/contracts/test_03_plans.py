"""Promise 3: a plan never changes the gradients, nor the steps. Every mixer under every plan against one process.

Each pair runs three steps of the program's own step on the same rows: unclipped gradient norms, losses, and every parameter
afterwards are those of one process. What passes is what docs/parallelism.md's table says (test_docs_parallelism.py).
"""

import pytest
import torch
from conftest import MIXER_SETTINGS, tiny_shape
from torch import Tensor
from worlds import in_processes

from longfire import settings
from longfire.checkpoint import State
from longfire.data.batches import Batch
from longfire.data.pack import NO_LABEL
from longfire.device import Clock
from longfire.model import materialise, on_meta
from longfire.ops.documents import Documents
from longfire.optim import make_optimizer
from longfire.parallel.apply import parallelize
from longfire.parallel.mesh import ALONE, Mesh
from longfire.train import train_step

CPU = torch.device("cpu")
T, ROWS, MICROBATCHES = 16, 8, 2
# name -> processes along each axis, and settings
PLANS = {
    "ddp 2": ({"dp_replicate": 2}, {}),
    "fsdp 2": ({"dp_shard": 2}, {}),
    "fsdp 4": ({"dp_shard": 4}, {}),
    "hsdp 2x2": ({"dp_replicate": 2, "dp_shard": 2}, {}),
    "fsdp 2, offloaded": ({"dp_shard": 2}, {"cpu_offload": True}),
    "fsdp 2, never resharded": ({"dp_shard": 2}, {"reshard_after_forward": "never"}),
    "tp 2": ({"tp": 2}, {"sequence_parallel": False}),
    "tp 2, sequence": ({"tp": 2}, {}),
    "fsdp 2 x tp 2": ({"dp_shard": 2, "tp": 2}, {}),
    "pp 2": ({"pp": 2}, {}),
    "pp 2 x fsdp 2": ({"pp": 2, "dp_shard": 2}, {}),
    "pp 2 x tp 2": ({"pp": 2, "tp": 2}, {}),
    "pp 2 x fsdp 2 x tp 2": ({"pp": 2, "dp_shard": 2, "tp": 2}, {}),
}
FEW = ("fsdp 2", "tp 2, sequence", "pp 2")  # of every mixer; the others of two
HYBRID = ("gla", "attention")


def shape_of(mixers: tuple[str, ...]):
    shape = tiny_shape(*mixers, initializer_range=0.05)
    wanted = {"gsa": {"num_heads": 4, "num_kv_heads": 2}}  # heads that two processes share
    return shape if not set(wanted) & set(mixers) else shape


def rows_of(first: int, count: int) -> Batch:
    """Rows of the run by their number, with documents and unequal numbers of labels."""
    chance = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(97, (64, T + 1), generator=chance)
    starts_BT = torch.rand(64, T, generator=chance) < 0.2
    labels_BT = ids_BT[:, 1:].clone()
    labels_BT[torch.rand(64, T, generator=chance) < 0.3] = NO_LABEL
    first_BT = torch.where(starts_BT, torch.arange(T), 0).cummax(1).values
    mine = slice(first, first + count)
    documents = Documents.from_ids(starts_BT[mine].long().cumsum(1))
    return Batch(ids_BT[mine, :-1], labels_BT[mine], (torch.arange(T) - first_BT)[mine], documents)


def three_steps(
    mixers: tuple[str, ...], mesh: Mesh, plan: settings.Parallelism, remat: str = "none", compiled: bool = False
) -> tuple[list[dict[str, float]], dict[str, list[tuple[tuple[int, ...], Tensor]]]]:
    """What each of three steps said, and the parameters that lie here: (where in the whole, the numbers)."""
    model = on_meta(shape_of(mixers))
    model = parallelize(model, settings.ActivationCheckpoint(remat), compiled, mesh, plan, T)
    materialise(model, 0, CPU)
    state = State(model, make_optimizer(model, settings.Optimizer(lr=1e-3, eps=1e-5), CPU), mesh=mesh)
    data, each = ("dp_replicate", "dp_shard"), ROWS // mesh.size("dp_replicate", "dp_shard")
    said = []
    for step in range(3):
        batch = rows_of(step * ROWS + mesh.rank(*data) * each, each)
        numbers = train_step(state, batch.split(MICROBATCHES), 1e-3, settings.Training(max_norm=0), Clock(CPU))
        said.append({name: numbers[name] for name in ("loss", "grad_norm")})
    parts = {name: state.part(name, p.detach()) for name, p in model.named_parameters()}
    return said, {
        name: [(box.begin, box.of_local(part.tensor).clone()) for box in part.boxes] for name, part in parts.items()
    }


def under_plan(rank: int, mixers: tuple[str, ...], degrees: dict[str, int], given: dict, more: dict):
    mesh = Mesh.of_degrees(degrees, "cpu")
    return three_steps(mixers, mesh, settings.Parallelism(**given), **more)


def assert_plan_changes_nothing(mixers: tuple[str, ...], plan: str, **more) -> None:
    degrees, given = PLANS[plan]
    processes = torch.tensor(list(degrees.values())).prod().item()
    true_said, true = three_steps(mixers, ALONE, settings.Parallelism())
    covered = {name: torch.zeros_like(whole[0][1]) for name, whole in true.items()}
    for said, parameters in in_processes(processes, under_plan, mixers, degrees, given, more):
        for got, wanted in zip(said, true_said):
            assert got == pytest.approx(wanted, rel=2e-5), "loss and gradient norm of every process"
        for name, boxes in parameters.items():
            for begin, numbers in boxes:
                where = tuple(slice(b, b + n) for b, n in zip(begin, numbers.shape))
                # Adam moves a number by up to 1e-3 a step, whatever its gradient's rounding
                torch.testing.assert_close(numbers, true[name][0][1][where], rtol=1e-4, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")
                covered[name][where] = 1
    assert all(part.all() for part in covered.values()), "every number lies somewhere"


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_changes_no_step_of_a_hybrid(plan):
    assert_plan_changes_nothing(HYBRID, plan)


@pytest.mark.parametrize("mixer", MIXER_SETTINGS)
def test_no_mixer_is_changed_by_a_plan(mixer):
    assert_plan_changes_nothing((mixer, mixer), "fsdp 2 x tp 2")


@pytest.mark.slow
@pytest.mark.parametrize("plan", FEW)
@pytest.mark.parametrize("mixer", MIXER_SETTINGS)
def test_every_mixer_under_every_kind_of_plan(mixer, plan):
    assert_plan_changes_nothing((mixer, mixer), plan)


@pytest.mark.parametrize("remat", ["block", "mlp", "attention"])
def test_recomputation_under_plans(remat):
    for plan in ("fsdp 2 x tp 2", "pp 2"):
        assert_plan_changes_nothing(HYBRID, plan, remat=remat)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["fsdp 2", "fsdp 2 x tp 2", "pp 2"])
def test_compilation_under_plans(plan):
    assert_plan_changes_nothing(HYBRID, plan, compiled=True)
