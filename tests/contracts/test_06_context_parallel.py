"""Promise 6: context parallel equals one device, forward and backward: every mixer, any degree, documents crossing segments, grouped
heads, windows, lengths that divide nothing.

A tiny model in float64 (then fp32) on whole rows in one process is the reference; processes that share the rows must find its loss and
every parameter's gradient. Under FSDP, tensor and pipeline parallel: test_03_plans.py.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import in_processes

from longfire.config.settings import Parallelism
from longfire.data.batch import Batch
from longfire.data.pack import NO_LABEL
from longfire.loss import loss_sum
from longfire.mixers import MIXERS
from longfire.ops.documents import Documents
from longfire.parallel.context import make_context
from longfire.parallel.mesh import Mesh

HYBRIDS = {
    "gla and attention": ("gla", "attention"),
    "windows": ("attention:local", "mamba2"),
    "rwkv7 and attention": ("rwkv7", "attention"),
}
CHANGES = {
    "windows": {
        "mixers": {
            "attention:local": {"num_heads": 4, "num_kv_heads": 2, "window_size": 9},
            "mamba2": {"head_dim": 16, "state_size": 12, "n_groups": 2},
        }
    }
}
LAYOUTS = ("contiguous", "zigzag", "balanced")


@dataclass(frozen=True)
class Case:
    model: str
    tokens: int
    layout: str = "zigzag"
    strategy: str = "ring"
    documents: tuple[int, ...] = ()  # their lengths, repeated along the rows; none: they flow on
    rows: int = 2
    dtype: torch.dtype = torch.float64
    changes: tuple[tuple[str, Any], ...] = field(default=())

    def made(self) -> torch.nn.Module:
        changes = {**CHANGES.get(self.model, {}), **dict(self.changes)}
        model = tiny_model(*HYBRIDS.get(self.model, (self.model, self.model)), **changes)
        model.compute_dtype = self.dtype
        for block in model.layers:
            block.inner = self.dtype
        return model.to(self.dtype)

    def batch(self) -> Batch:
        chance = torch.Generator().manual_seed(1)
        ids_BT = torch.randint(97, (self.rows, self.tokens + 1), generator=chance)
        labels_BT = torch.where(
            torch.rand(self.rows, self.tokens, generator=chance) < 0.2, NO_LABEL, ids_BT[:, 1:]
        )
        positions_BT = torch.arange(self.tokens).expand(self.rows, -1)
        if not self.documents:
            return Batch(ids_BT[:, :-1], labels_BT, positions_BT)
        lengths, starts_BT = (
            list(self.documents),
            torch.zeros(self.rows, self.tokens, dtype=torch.bool),
        )
        for row, starts_T in enumerate(starts_BT):  # other ends in each row
            ends = torch.tensor((lengths[row:] + lengths) * self.tokens).cumsum(0)
            starts_T[ends[ends < self.tokens]] = True
        first_BT = torch.where(starts_BT, positions_BT, 0).cummax(1).values
        documents = Documents.from_ids(starts_BT.long().cumsum(1))
        return Batch(ids_BT[:, :-1], labels_BT, positions_BT - first_BT, documents)


@cache
def truth(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    return loss_and_gradients(case.made(), case.batch())


def loss_and_gradients(
    model: torch.nn.Module, batch: Batch
) -> tuple[float, dict[str, torch.Tensor]]:
    loss = loss_sum(model, batch, 16) / batch.ids_BT.numel()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def shared(rank: int, count: int, cases: list[Case]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Loss and gradients of each case, added up over the processes; divided by the tokens of whole rows."""
    mesh, found = Mesh.of_degrees({"cp": count}, "cpu"), []
    for case in cases:
        model, batch = case.made(), case.batch()
        parallelism = Parallelism(
            context_parallel_layout=case.layout, context_parallel_strategy=case.strategy
        )
        context = make_context(model, mesh, parallelism)
        loss = loss_sum(model, batch.context_part(context), 16) / batch.ids_BT.numel()
        loss.backward()
        gradients = {name: mesh.sum(p.grad, "cp") for name, p in model.named_parameters()}
        found.append((mesh.sum(loss.detach(), "cp").item(), gradients if rank == 0 else {}))
    return found


def assert_equal_one_device(count: int, cases: list[Case], relative: float = 1e-9) -> None:
    """A number may differ by `relative` of itself, or of the largest of its tensor."""
    answers = in_processes(count, shared, count, cases)[0]
    for case, (loss, gradients) in zip(cases, answers):
        true_loss, true = truth(case)
        assert loss == pytest.approx(true_loss, rel=relative), case
        for name, gradient in true.items():
            within = {"rtol": relative, "atol": relative * gradient.abs().max().item()}
            torch.testing.assert_close(
                gradients[name], gradient, **within, msg=lambda m, n=name, c=case: f"{c} {n}: {m}"
            )


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_mixer(count):
    """37 tokens divide nothing; documents end in, before and at the ends of segments."""
    assert_equal_one_device(count, [Case(name, 37, documents=(5, 17, 1, 9)) for name in MIXERS])


@pytest.mark.matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("documents", [(), (5, 17, 1, 9), (40,)], ids=str)
def test_every_mixer_in_every_layout(count, layout, documents):
    cases = [
        Case(name, tokens, layout, documents=documents)
        for name in (*MIXERS, *HYBRIDS)
        for tokens in (37, 64, 66)
    ]
    assert_equal_one_device(count, cases)


@pytest.mark.parametrize(
    "strategy",
    ["ring", *(pytest.param(s, marks=pytest.mark.slow) for s in ("allgather", "alltoall"))],
)
def test_hybrids_in_every_layout(strategy):
    """(All of the cross: the matrix above.)"""
    found = [(), (3, 20)] * 2
    cases = [
        Case(name, tokens, layout, strategy, documents)
        for name, tokens in zip(HYBRIDS, (35, 33, 38))
        for layout, documents in zip(LAYOUTS, found[len(name) % 2 :])
    ]
    assert_equal_one_device(2, cases)


@pytest.mark.slow
def test_eight_processes():
    """More processes than some documents have tokens."""
    assert_equal_one_device(
        8,
        [
            Case(name, 41, documents=(5, 17, 1, 9))
            for name in ("gla and attention", "windows", "kda")
        ],
    )


@pytest.mark.parametrize("name", ["gla and attention", "gated_delta_net"])
def test_the_error_in_fp32_does_not_grow_with_processes(name):
    """Largest error against float64 over all gradients, relative to each tensor's largest number: that of n processes is that of one,
    up to chance. Twice is far below n = 4 of errors that add up."""
    case = Case(name, 256, dtype=torch.float32)
    true = truth(Case(name, 256))[1]

    def error(gradients: dict[str, torch.Tensor]) -> float:
        return max(
            ((gradients[n].double() - g).abs().max() / g.abs().max()).item()
            for n, g in true.items()
        )

    alone = error(truth(case)[1])
    for count in (2, 4):
        assert error(in_processes(count, shared, count, [case])[0][0][1]) < 2 * alone


def with_dropout(rank: int, count: int):
    """Loss of a model that drops, whose noise was made of whole rows."""
    from longfire.ops.sequence_noise import row_noise

    case = Case("gla and attention", 37, changes=(("dropout", 0.2), ("embed_dropout", 0.1)))
    model, batch, noise_BT = case.made(), case.batch(), row_noise(1, 0, 2, 37, torch.device("cpu"))
    mesh = Mesh.of_degrees({"cp": count}, "cpu") if count > 1 else None
    if mesh:
        context = make_context(model, mesh, Parallelism())
        batch = batch.context_part(context)
        noise_BT = batch.ops.cut(noise_BT)
    loss = loss_sum(model, batch, 16, noise_BT).detach()
    return (mesh.sum(loss, "cp") if mesh else loss).item()


def test_dropout_drops_the_same():
    assert in_processes(2, with_dropout, 2)[0] == pytest.approx(with_dropout(0, 1), rel=1e-12)


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([*MIXERS, *HYBRIDS]),
    st.integers(9, 70),
    st.sampled_from(LAYOUTS),
    st.lists(st.integers(1, 30), max_size=5).map(tuple),
    st.sampled_from([2, 3]),
)
def test_random_cuts_and_documents(name, tokens, layout, documents, count):
    assert_equal_one_device(count, [Case(name, tokens, layout, documents=documents)])


def sent(rank: int, names: list[str], tokens: int) -> list[int]:
    """Bytes that this process gives to collectives in a forward and its backward of each model; parameters are not among them."""

    given: list[int] = []

    def counted(collective):
        def call(out, mine, group):
            given[-1] += mine.nbytes
            return collective(out, mine, group=group)

        return call

    dist.all_gather_single = counted(dist.all_gather_single)
    dist.reduce_scatter_single = counted(dist.reduce_scatter_single)
    mesh = Mesh.of_degrees({"cp": 2}, "cpu")
    for name in names:
        given.append(0)
        model, batch = Case(name, tokens).made(), Case(name, tokens).batch()
        loss_sum(model, batch.context_part(make_context(model, mesh, Parallelism())), 16).backward()
    return given


def test_what_recurrences_send_does_not_grow_with_the_row():
    recurrent = [name for name in MIXERS if name != "attention"]
    short, long = (in_processes(2, sent, recurrent, tokens)[0] for tokens in (32, 96))
    assert dict(zip(recurrent, short)) == dict(zip(recurrent, long))
    assert min(short) > 0


STEPS = 50  # of a short row: it is the number of steps that errors would add up over


def trained(rank: int, count: int, texts: torch.Tensor) -> list[float]:
    """Losses of the program's own step on rows of the corpus."""
    from longfire.checkpoint.state import State
    from longfire.config.settings import ActivationCheckpoint, Optimizer, Training
    from longfire.device import Clock
    from longfire.optim import make_optimizer
    from longfire.parallel.apply import parallelize
    from longfire.parallel.mesh import ALONE
    from longfire.training.step import train_step

    mesh = Mesh.of_degrees({"cp": count}, "cpu") if count > 1 else ALONE
    model = tiny_model("gla", "attention", vocab_size=256, initializer_range=0.05)
    model = parallelize(
        model, ActivationCheckpoint(), False, mesh, Parallelism(), texts.shape[1] - 1
    )
    state = State(model, make_optimizer(model, Optimizer(lr=3e-3), torch.device("cpu")), mesh=mesh)
    losses = []
    for step in range(STEPS):
        rows_BS = texts[4 * step : 4 * step + 4]
        positions_BT = torch.arange(rows_BS.shape[1] - 1).expand(4, -1)
        batch = Batch(rows_BS[:, :-1], rows_BS[:, 1:], positions_BT)
        losses.append(
            train_step(state, batch.split(2), 3e-3, Training(), Clock(torch.device("cpu")))["loss"]
        )
    return losses


@pytest.mark.slow
def test_fifty_steps_on_the_corpus_follow_one_process():
    """fp32: see test_same_loss_curve.py for what rounding makes of a curve; it grows with the steps."""
    import pathlib

    text = b"".join(
        path.read_bytes() for path in sorted(pathlib.Path(pathlib.__file__).parent.glob("c*.py"))
    )
    texts = (
        torch.frombuffer(bytearray(text[: STEPS * 4 * 66]), dtype=torch.uint8).view(-1, 66).long()
    )
    alone = trained(0, 1, texts)
    assert alone[-1] < 0.7 * alone[0], "it learns"
    for losses in in_processes(2, trained, 2, texts):
        assert losses[0] == pytest.approx(alone[0], rel=1e-6)
        assert losses == pytest.approx(alone, rel=1e-3)
