"""Rows cut in time: the exact form is the whole row, the truncated one what a loop by hand makes, and memory is of one segment."""

from dataclasses import replace
from functools import partial

import plans
import pytest
import torch
from conftest import MIXER_SETTINGS, tiny_model
from sets import slow_unless
from torch import Tensor
from worlds import in_processes

from longfire.config.settings import ActivationCheckpoint, Training
from longfire.data.batch import Batch
from longfire.data.pack import NO_LABEL
from longfire.device import Clock
from longfire.loss import loss_of, loss_sum
from longfire.mixers.cache import Cache
from longfire.mixers.mixer import Sequence
from longfire.model import Model
from longfire.ops.documents import Documents
from longfire.ops.sequence_noise import row_noise
from longfire.parallel.activation_offload import ActivationOffload
from longfire.parallel.apply import parallelize, recompilations
from longfire.parallel.axes import DATA
from longfire.parallel.mesh import ALONE, Mesh
from longfire.planner.live_bytes import LiveBytes
from longfire.training.step import train_step
from longfire.training.tbptt import CarriedState, alone, by_segments, cut, each

CPU = torch.device("cpu")
T, ROWS = 23, 3
WINDOWED = {"attention:local": {"num_heads": 4, "num_kv_heads": 2, "window_size": 5}}
MODELS = {
    **{name: ((name,), {}) for name in MIXER_SETTINGS},
    "hybrid": (("gla", "attention"), {}),
    "windowed": (("kda", "attention:local"), {}),
    "drops": (("gla", "mamba2"), {"dropout": 0.3, "embed_dropout": 0.2}),
    "positions": (
        ("delta_net", "attention"),
        {"learned_positions": True, "max_position_embeddings": T},
    ),
}


def model_of(name: str) -> Model:
    types, changes = MODELS[name]
    if name == "windowed":
        changes = {"mixers": {"kda": MIXER_SETTINGS["kda"], **WINDOWED}}
    return in_fp64(tiny_model(*types, **changes))


def in_fp64(model: Model) -> Model:
    model.compute_dtype = torch.float64
    for block in model.layers:
        block.inner = torch.float64
    return model.double()


def batch_of(documents: str) -> Batch:
    """Rows whose documents cross seams, begin on them, and lie between them; some labels are missing."""
    chance = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(97, (ROWS, T), generator=chance)
    labels_BT = torch.randint(97, (ROWS, T), generator=chance)
    labels_BT[torch.rand(ROWS, T, generator=chance) < 0.2] = NO_LABEL
    if documents == "none":
        return Batch(ids_BT, labels_BT, torch.arange(T).expand(ROWS, T))
    starts_BT = torch.zeros(ROWS, T, dtype=torch.bool)
    starts_BT[0, [6, 7, 12]] = True
    starts_BT[1, [3, 18, 20]] = True
    first_BT = torch.where(starts_BT, torch.arange(T), 0).cummax(1).values
    return Batch(
        ids_BT,
        labels_BT,
        torch.arange(T) - first_BT,
        Documents.from_ids(starts_BT.long().cumsum(1)),
    )


def learned(
    model: Model, batch: Batch, noise_BT: Tensor | None, **training
) -> tuple[float, dict[str, Tensor]]:
    """The loss and every parameter's gradient, of the rows whole (segments 1) or by segments."""
    model.zero_grad(set_to_none=True)
    learn, syncs = partial(loss_sum, chunk_tokens=8), []
    if training.get("tbptt_segments", 1) == 1:
        loss = learn(model, batch, noise_BT=noise_BT)
        loss.backward()
    else:
        loss = by_segments(
            model, batch, noise_BT, Training(**training), learn, syncs.append, Clock(CPU)
        )
        assert syncs == [False] * (len(syncs) - 1) + [True], "only the last backward is synced"
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def same(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-9)
    for name, gradient in wanted[1].items():
        assert gradient.any(), f"{name} learns"
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-9, atol=1e-9 * gradient.abs().max().item()
        )


def noise_of(model: Model) -> Tensor | None:
    return row_noise(7, 0, ROWS, T, CPU) if model.config.drops else None


@pytest.mark.parametrize("documents", [pytest.param("none", marks=pytest.mark.matrix), "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_exact_is_the_whole_row(name, documents):
    model, batch = model_of(name), batch_of(documents)
    noise_BT = noise_of(model)
    whole = learned(model, batch, noise_BT)
    for segments in (2, 4):
        same(learned(model, batch, noise_BT, tbptt_segments=segments, tbptt_exact=True), whole)


@pytest.mark.parametrize("documents", ["none", "packed"])
@pytest.mark.parametrize(
    "name",
    slow_unless(
        lambda name: name in ("windowed", "mamba"), ["hybrid", "windowed", "rwkv7", "mamba"]
    ),
)
def test_segments_of_any_length_down_to_a_token(name, documents):
    """Windows then reach over several segments, and convolutions too."""
    model, batch = model_of(name), batch_of(documents)
    whole = learned(model, batch, None)
    for segments in (T, 9):
        same(learned(model, batch, None, tbptt_segments=segments, tbptt_exact=True), whole)


@pytest.mark.parametrize("mode", ["block", "mlp", "attention"])
@pytest.mark.parametrize("name", ["hybrid", "windowed", "rwkv7"])
def test_what_is_computed_again_reads_the_state_that_it_read_before(name, mode):
    batch = batch_of("packed")
    whole = learned(model_of(name), batch, None)
    again = parallelize(model_of(name), ActivationCheckpoint(mode), compiled=False)
    same(learned(again, batch, None, tbptt_segments=3, tbptt_exact=True), whole)


@pytest.mark.parametrize("exact", [False, True], ids=["truncated", "exact"])
def test_what_waits_on_the_host_changes_nothing(exact):
    """The state that a segment is given is on the device, and what its blocks save is not."""
    batch, training = batch_of("packed"), {"tbptt_segments": 3, "tbptt_exact": exact}
    plain = learned(model_of("hybrid"), batch, None, **training)
    model = parallelize(model_of("hybrid"), ActivationCheckpoint(offload=True), compiled=False)
    assert isinstance(model.saved_activations, ActivationOffload)
    model.saved_activations.window_bytes = 2**12  # a few tensors
    loss, gradients = learned(model, batch, None, **training)
    assert loss == plain[0]
    for name, gradient in plain[1].items():
        assert gradients[name].equal(gradient), name


def by_hand(
    model: Model, batch: Batch, noise_BT: Tensor | None, segments: int
) -> tuple[float, dict[str, Tensor]]:
    """Truncated backpropagation as one would write it with the cache of generation: what it keeps is detached on each seam."""
    model.zero_grad(set_to_none=True)
    cache, total, length = Cache(), 0.0, -(-T // segments)
    for start in range(0, T, length):
        of = slice(start, start + length)
        noise = None if noise_BT is None else noise_BT[:, of]
        hidden_BTD = model(
            batch.ids_BT[:, of], Sequence(batch.positions_BT[:, of], None, cache, noise)
        )
        piece = Batch(batch.ids_BT[:, of], batch.labels_BT[:, of], batch.positions_BT[:, of])
        loss = loss_of(model, hidden_BTD, piece, 8)
        loss.backward()
        total += loss.item()
        cache.rooms.clear()  # the keys are put into a new one
        for kept in cache.layers.values():
            kept |= {key: state.detach().clone() for key, state in kept.items()}
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_truncated_is_what_one_writes_by_hand(name):
    model, batch = model_of(name), batch_of("none")
    noise_BT = noise_of(model)
    found = learned(model, batch, noise_BT, tbptt_segments=4)
    same(found, by_hand(model, batch, noise_BT, 4))
    whole = learned(model, batch, noise_BT)
    assert found[0] == pytest.approx(whole[0], rel=1e-9), (
        "the state is carried: the loss is that of the whole row"
    )
    if name not in ("positions",):
        assert any(not torch.allclose(found[1][n], whole[1][n]) for n in whole[1]), (
            "gradients end at the seams"
        )


@pytest.mark.parametrize("name", MODELS)
def test_documents_that_end_on_the_seams_lose_nothing(name):
    """Nothing passes from one to the next, so the truncated form is exact."""
    model, batch = model_of(name), batch_of("none")
    ids_BT = torch.arange(T).expand(ROWS, T) // 6
    batch = Batch(
        batch.ids_BT,
        batch.labels_BT,
        torch.arange(T).expand(ROWS, T) % 6,
        Documents.from_ids(ids_BT),
    )
    noise_BT = noise_of(model)
    same(learned(model, batch, noise_BT, tbptt_segments=4), learned(model, batch, noise_BT))


def test_the_last_segment_is_the_shorter_one_and_knows_how_long_its_documents_are():
    pieces = list(cut(batch_of("packed"), None, 4))
    assert [piece.batch.ids_BT.shape[1] for piece in pieces] == [6, 6, 6, 5]
    assert [piece.continues_B.tolist() for piece in pieces] == [
        [0, 0, 0],
        [0, 3, 6],
        [0, 9, 12],
        [6, 0, 18],
    ]
    assert pieces[1].batch.documents.ids_BT[0].tolist() == [1, 2, 2, 2, 2, 2]


def peak(model: Model, tokens: int, **training) -> int:
    """Bytes above parameters and their gradients that a step on one row holds at most."""
    ids_BT = torch.arange(tokens)[None] % 97
    batch = Batch(ids_BT, ids_BT, torch.arange(tokens)[None])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learn, there = (
        partial(loss_sum, chunk_tokens=64),
        [*model.parameters(), *(p.grad for p in model.parameters())],
    )
    with LiveBytes(there, [batch.ids_BT, batch.positions_BT]) as live:
        before = live.now
        if training:
            by_segments(
                model, batch, None, Training(**training), learn, lambda last: None, Clock(CPU)
            )
        else:
            learn(model, batch).backward()
    return live.peak - before


def test_memory_is_of_one_segment_and_its_states():
    """A row of 8 segments: a state for each seam more, and of truncated ones nothing."""
    model = tiny_model("gla", "mamba2")
    short, long = peak(model, 64), peak(model, 512)
    truncated, exact = (
        peak(model, 512, tbptt_segments=8, tbptt_exact=way) for way in (False, True)
    )
    states = CarriedState({})
    model(torch.zeros(1, 4, dtype=torch.int64), Sequence(torch.arange(4)[None], cache=states))
    state_bytes = sum(state.nbytes for state in each(alone(states.after)))
    assert long > 7 * short
    assert truncated < 1.02 * short, (truncated, short)
    assert exact < 1.15 * short + 8 * state_bytes, (exact, short, state_bytes)


def test_keys_of_softmax_layers_are_kept_once():
    """Exact, without a window: keys and values of the row, and their gradients; not those of each seam again."""
    model = tiny_model("attention")
    exact = peak(model, 1024, tbptt_segments=8, tbptt_exact=True)
    keys_bytes = 2 * 2 * 1024 * 2 * 8 * 4  # layers, k and v, tokens, heads, size, fp32
    assert exact < peak(model, 128) + 5 * keys_bytes


def three_steps(mixers: tuple[str, ...], plan: plans.Plan, mesh: Mesh, **training):
    state = plans.state_of(mixers, plan, mesh, torch.float64)
    each, said = plans.ROWS // mesh.size(*DATA), []
    for _ in range(3):
        batch = plans.rows_of(state.rows_consumed + mesh.rank(*DATA) * each, each)
        settings = Training(max_norm=0.05, **training)
        numbers = train_step(state, batch.split(plans.MICROBATCHES), 1e-3, settings, Clock(CPU))
        numbers.pop("loss_max", None)  # of several processes
        said.append(numbers)
    return said


def in_a_world(rank: int, mixers: tuple[str, ...], plan: plans.Plan, training: dict):
    return three_steps(mixers, plan, Mesh.of_degrees(plan.degrees, "cpu"), **training)


@pytest.mark.parametrize(
    "plan",
    [
        "fsdp 2",
        pytest.param("tp 2, sequence", marks=pytest.mark.slow),
        *(
            pytest.param(name, marks=pytest.mark.matrix)
            for name in ("ddp 2", "hsdp 2x2", "fsdp 2 x tp 2", "fsdp 2, never resharded")
        ),
    ],
)
@pytest.mark.parametrize(
    "mixers", [plans.HYBRID, pytest.param(("rwkv7", "mamba2"), marks=pytest.mark.matrix)]
)
def test_exact_segments_under_plans_are_whole_rows_of_one_process(mixers, plan):
    """Clipped, so that the norm of all gradients counts too; with documents and two microbatches."""
    whole, remat = (
        three_steps(mixers, plans.PLANS["one"], ALONE),
        replace(plans.PLANS[plan], remat="block"),
    )
    for answer in in_processes(
        remat.processes, in_a_world, mixers, remat, {"tbptt_segments": 4, "tbptt_exact": True}
    ):
        for got, wanted in zip(answer, whole, strict=True):
            assert got == pytest.approx(wanted, rel=1e-9)


@pytest.mark.matrix
@pytest.mark.slow
def test_compiled_blocks_are_compiled_once_for_all_segments():
    """One graph for the first segment, which has no state, one for the others, one for the shorter last; for all layers of a kind."""
    model, batch = model_of("gla"), batch_of("packed")
    whole, before = learned(model, batch, None), recompilations()
    compiled = parallelize(model_of("gla"), ActivationCheckpoint(), compiled=True)
    same(learned(compiled, batch, None, tbptt_segments=4, tbptt_exact=True), whole)
    assert recompilations() - before == 3
