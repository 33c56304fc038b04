"""Softmax attention over 1, 2, 4 (matrix: 3, 8) processes against whole rows in float64; what of it is computed, sent and kept."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate, product

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as some
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from worlds import in_processes

from longfire.ops import attention_blocks
from longfire.ops.attention import attention, attention_reference
from longfire.ops.attention_blocks import Manner, Piece
from longfire.ops.attention_choice import in_chunks
from longfire.ops.choice import choose
from longfire.ops.documents import Documents
from longfire.ops.sequence_ops import LocalSequence
from longfire.parallel.collectives import known_as
from longfire.parallel.context import ContextSequence
from longfire.parallel.context_strategies import key_blocks, ring, strategy_named
from longfire.parallel.context_strategies.contract import Processes
from longfire.parallel.layout import KINDS, ContextShard, SequenceLayout, keys_seen
from longfire.parallel.remat import Checkpointed

STRATEGIES = ("ring", "allgather", "alltoall")
B, EXACT = 2, 1e-9
FAST = (
    Phase.explicit,
    Phase.generate,
)  # a failure names its case: no smaller one is looked for, at two seconds a world


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_blocks, "BLOCK", 4)


ALONE = {
    "auto": LocalSequence(),
    "vanilla": LocalSequence(attention_reference),
    "blockwise": in_chunks(3, 5),
}


def attend_over(size: int, rank: int, group: str, strategy: str, alone: str = "auto"):
    """What attends to whole rows in one process, for the segments that `documents` says."""

    @torch.compiler.disable
    def of_shard(shard: ContextShard) -> tuple[ContextSequence, Documents | None]:
        processes = Processes(size, rank, group)
        return (
            ContextSequence(shard, processes, strategy_named(strategy), ALONE[alone]),
            shard.documents(),
        )

    def attend(q, k, v, *, documents: ContextShard, **options) -> Tensor:
        ops, mine = of_shard(documents)
        return ops.attention(q, k, v, documents=mine, **options)

    return attend


@dataclass(frozen=True)
class Case:
    """Rows and options of attention. documents: lengths, of the first row; the second has them the other way round."""

    T: int = 29
    heads: tuple[int, int] = (4, 2)
    sizes: tuple[int, int] = (8, 8)
    documents: tuple[int, ...] = ()
    window: int | None = None
    scale: float | None = None
    dropout: float = 0.0
    first_head: int = 0
    strategy: str = "ring"
    layout: str = "zigzag"
    alone: str = "auto"

    def attend(self, rank: int, size: int, group: str):
        return attend_over(size, rank, group, self.strategy, self.alone)

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        (H, G), (K, V) = self.heads, self.sizes
        chance = torch.Generator().manual_seed(self.T)
        shapes = ((B, self.T, H, K), (B, self.T, G, K), (B, self.T, G, V), (B, self.T, H, V))
        return [
            torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype) for shape in shapes
        ]

    def noise(self) -> Tensor:
        return torch.randint(
            -(2**31), 2**31, (B, self.T), generator=torch.Generator().manual_seed(3)
        ).int()

    def ids(self) -> Documents | None:
        if not self.documents:
            return None
        lengths = [*self.documents, self.T - sum(self.documents)]
        rows = [
            torch.arange(len(lengths)).repeat_interleave(torch.tensor(x))
            for x in (lengths, lengths[::-1])
        ]
        return Documents.from_ids(torch.stack(rows))

    def share(self, rank: int, size: int) -> ContextShard:
        ids, positions_BT = self.ids(), torch.arange(self.T).expand(B, -1)
        if ids is not None:
            ends = [list(accumulate(row.bincount().tolist())) for row in ids.ids_BT]
            starts_BT = torch.stack(
                [torch.tensor([0, *end])[row] for end, row in zip(ends, ids.ids_BT)]
            )
            positions_BT = positions_BT - starts_BT
        layout = SequenceLayout.of_kind(
            self.layout, size, self.T, 1, keys_seen(positions_BT).sum(0)
        )
        return ContextShard.of_rows(layout, rank, ids, B)

    def options(self) -> dict:
        return {
            "window": self.window,
            "scale": self.scale,
            "dropout": self.dropout,
            "first_head": self.first_head,
        }

    def truth(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """o, dq, dk, dv of whole rows by one process, all scores written out."""
        *leaves, d_o = self.inputs(dtype)
        leaves = [leaf(x) for x in leaves]
        o = attention_reference(
            *leaves, **self.options(), documents=self.ids(), noise_BT=self.noise()
        )
        return [o.detach(), *torch.autograd.grad(o, leaves, d_o)]

    def mine(
        self, rank: int, size: int, attend, dtype: torch.dtype = torch.float64
    ) -> list[Tensor]:
        """The same of the segments of a process."""
        share = self.share(rank, size)
        *leaves, d_o = (share.layout.cut(x, rank) for x in self.inputs(dtype))
        leaves = [leaf(x) for x in leaves]
        noise_BT = share.layout.cut(self.noise(), rank)
        o = attend(*leaves, **self.options(), documents=share, noise_BT=noise_BT)
        return [o.detach(), *torch.autograd.grad(o, leaves, d_o)]


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


WHAT = {
    "grouped heads": Case(),
    "a key head a query head": Case(heads=(4, 4), T=17, scale=0.2),
    "window, small values": Case(T=30, window=7, sizes=(8, 5)),
    "documents, large values": Case(documents=(3, 11, 1), sizes=(8, 12)),
    "documents and window": Case(T=31, documents=(2, 16), window=5),
    "dropout": Case(T=27, documents=(20,), window=9, dropout=0.3, first_head=3),
    "shorter than its segments would be": Case(T=9),
}
CASES = [
    replace(case, strategy=s, layout=layout, alone=alone)
    for case, s, layout, alone in product(WHAT.values(), STRATEGIES, KINDS, ALONE)
]
SOME = [
    replace(case, strategy=strategy, layout=KINDS[(i + j) % len(KINDS)])
    for (i, case), (j, strategy) in product(enumerate(WHAT.values()), enumerate(STRATEGIES))
]
SOME += [replace(case, alone=("vanilla", "blockwise")[i % 3 == 0]) for i, case in enumerate(SOME)]


def wrong(case: Case, rank: int, size: int, group: str) -> str | None:
    """What of a case differs from the reference, by more than 1e-9 of its largest number; what fills rows up must be a number."""
    share = case.share(rank, size)
    real = share.layout.cut(torch.ones(1, case.T, 1, 1), rank).bool()
    found = case.mine(rank, size, case.attend(rank, size, group))
    for name, mine, whole in zip(("o", "dq", "dk", "dv"), found, case.truth()):
        error = ((mine - share.layout.cut(whole, rank)) * real).abs().max()
        if not (
            error <= EXACT * max(1.0, whole.abs().max()) and mine.isfinite().all()
        ):  # inputs are of size 1
            return f"{name} of {case} over {size} processes: {error:.1e}"
    return None


def everything(rank: int, size: int) -> dict:
    """All that one world of processes can tell at once: starting one takes longer than most of what it is asked."""
    group = known_as(dist.group.WORLD) if size > 1 else ""  # one process needs none
    return {
        "wrong": [
            said
            for case in (SOME if size == 2 else SOME[::2])
            if (said := wrong(case, rank, size, group))
        ],
        "float32": errors(LONG, rank, size, group, torch.float32),
        "bfloat16": {
            what: errors(case, rank, size, group, torch.bfloat16) for what, case in ROUNDED.items()
        },
        "work": {what: counted(case, rank, size, group) for what, case in COUNTED.items()},
    }


LONG = Case(T=256, heads=(8, 8), sizes=(16, 16))
ROUNDED = {
    "a key head a query head": LONG,
    "2 key heads": replace(LONG, heads=(8, 2)),
}  # fewer than 4 processes


def errors(
    case: Case, rank: int, size: int, group: str, dtype: torch.dtype
) -> dict[str, list[float]]:
    """Of each strategy: the largest error of o, dq, dk, dv, and its sum of squares."""
    inputs = [x.double() for x in case.inputs(dtype)]  # as they are rounded
    leaves = [leaf(x) for x in inputs[:3]]
    o = attention(*leaves)
    whole = [o.detach(), *torch.autograd.grad(o, leaves, inputs[3])]
    said = {}
    for strategy in STRATEGIES:
        found = case.mine(rank, size, attend_over(size, rank, group, strategy), dtype)
        share = case.share(rank, size)
        off = [mine.double() - share.layout.cut(true, rank) for mine, true in zip(found, whole)]
        said[strategy] = [[x.abs().max().item(), x.square().sum().item()] for x in off]
    return said


COUNTED = {
    "zigzag": Case(T=64, heads=(1, 1)),
    "contiguous": Case(T=64, heads=(1, 1), layout="contiguous"),
    "allgather": Case(T=64, heads=(1, 1), strategy="allgather"),
    "window": Case(T=64, heads=(1, 1), window=3, layout="contiguous"),
    "apart": Case(T=64, heads=(1, 1), documents=(16, 16, 16), layout="contiguous"),
    "documents": Case(T=64, heads=(1, 1), documents=(5, 40, 7)),
}


def counted(case: Case, rank: int, size: int, group: str) -> dict[str, int]:
    key_blocks.work.forget()
    case.mine(rank, size, attend_over(size, rank, group, case.strategy))
    return vars(key_blocks.work).copy()


@cache
def world(size: int) -> list[dict]:
    return [everything(0, 1)] if size == 1 else in_processes(size, everything, size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_segments_equal_whole_rows(size):
    """Forward, dq, dk and dv of each strategy, on some layouts, with all that attention can be asked for."""
    assert [said["wrong"] for said in world(size)] == [[]] * size


def wrong_ones(rank: int, size: int, cases: list[Case]) -> list[str]:
    group = known_as(dist.group.WORLD)
    return [said for case in cases if (said := wrong(case, rank, size, group))]


@pytest.mark.matrix
@pytest.mark.parametrize("size", [2, 4, 8])
def test_segments_equal_whole_rows_on_each_layout(size):
    cases = [replace(case, heads=(8, case.heads[1])) for case in CASES] if size == 8 else CASES
    assert in_processes(size, wrong_ones, size, cases) == [[]] * size


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_errors_of_fp32_do_not_grow_with_processes(strategy):
    largest = {size: largest_error(world(size), "float32", strategy) for size in (1, 2, 4)}
    for size in (2, 4):
        for name, more, one in zip(("o", "dq", "dk", "dv"), largest[size], largest[1]):
            assert more <= 2 * one, (
                f"{name} of {strategy} over {size} processes: {more:.1e}, {one:.1e} over one"
            )


def largest_error(said: list[dict], dtype: str, strategy: str) -> list[float]:
    return [max(one[dtype][strategy][i][0] for one in said) for i in range(4)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("what", ROUNDED)
def test_half_precision_is_rounded_once(what, strategy):
    """Against attention on whole rows in bf16, which a CPU computes in fp32 and rounds: partial sums that were rounded on the way
    would add a rounding each, and so would gradients of key heads that several processes have. Measured in all numbers; the largest
    alone is one number's luck. What is kept of o is bf16, too."""
    *leaves, d_o = ROUNDED[what].inputs(torch.bfloat16)
    leaves, exact = [leaf(x) for x in leaves], [leaf(x.double()) for x in leaves]
    o, true = attention(*leaves), attention(*exact)
    rounded = [o.detach(), *torch.autograd.grad(o, leaves, d_o)]
    whole = [true.detach(), *torch.autograd.grad(true, exact, d_o.double())]
    once = [(mine.double() - one).square().sum().item() for mine, one in zip(rounded, whole)]
    for size in (1, 2, 4):
        squares = [
            sum(one["bfloat16"][what][strategy][i][1] for one in world(size)) for i in range(4)
        ]
        for name, mine, one in zip(("o", "dq", "dk", "dv"), squares, once):
            assert mine <= 1.5**2 * one, (
                f"{name} of {strategy} over {size}: {(mine / one) ** 0.5:.2f} times the error"
            )


def pairs(what: str, size: int) -> list[int]:
    return [said["work"][what]["pairs"] for said in world(size)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_a_mask_empties_is_not_computed(size):
    """A causal row without window or documents is made of whole and of triangular blocks: what is computed is what is seen. The edges
    of a window are masked in blocks of 4 queries, of which each hides at most two corners."""
    T = COUNTED["zigzag"].T
    for what in ("zigzag", "contiguous", "allgather"):
        assert sum(pairs(what, size)) == B * T * (T + 1) // 2
    assert sum(pairs("apart", size)) == B * 4 * (16 * 17 // 2)
    assert sum(pairs("documents", size)) == B * sum(n * (n + 1) // 2 for n in (5, 40, 7, 12))
    seen = 3 * T - 3
    assert B * seen <= sum(pairs("window", size)) <= 2.5 * B * seen


@pytest.mark.parametrize("size", [2, 4])
def test_zigzag_is_even_and_contiguous_is_not(size):
    even, uneven = (
        max(x) * size / sum(x) for x in (pairs("zigzag", size), pairs("contiguous", size))
    )
    assert even <= 1.05
    assert uneven == pytest.approx(
        (2 * size - 1) / size, rel=0.02
    )  # the last one's share: 2 n - 1 of n^2 triangles


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_sent(size):
    """Keys and values go n - 1 hops forward and n - 1 backward, never the last one; their gradients n, the last one home. Where all
    that is seen lies nearer, they stop earlier; documents that end with a segment send nothing."""
    kv = B * 64 // size * (8 + 8) * 8  # bytes: float64, and so are gradients
    for said in (one["work"] for one in world(size)):
        assert said["zigzag"]["hops"] == 2 * (size - 1)
        assert said["zigzag"]["sent_bytes"] == kv * (2 * (size - 1) + size)
        assert said["allgather"]["sent_bytes"] == kv * 3 * (size - 1)
        assert said["window"]["hops"] == 2, (
            "two keys before the segment: those of the process before"
        )
        assert said["window"]["sent_bytes"] == kv * (1 + 1 + 2)
        assert said["apart"]["hops"] == said["apart"]["sent_bytes"] == 0


@given(
    some.integers(9, 60),
    some.integers(1, 9),
    some.integers(1, 9),
    some.sampled_from(KINDS),
    some.sampled_from([None, 1, 6]),
)
def test_chunks_cut_what_meets_and_lose_nothing(T, of_queries, of_keys, layout, window):
    """attention.kind = "blockwise" among processes: no piece is larger, and all of them together see what the whole segments see."""
    share = Case(T=T, layout=layout).share(0, 2)
    whole = Manner(window, 1.0, 0.0, 0, True)
    cut = whole._replace(chunks=(of_queries, of_keys))
    for source in range(2):
        pieces = key_blocks.met(share, source, cut)
        assert all(
            piece.queries.length <= of_queries and piece.keys.length <= of_keys for piece in pieces
        )
        assert seen_by(pieces, cut) == seen_by(key_blocks.met(share, source, whole), whole)


def seen_by(pieces: list[Piece], manner: Manner) -> Counter:
    """How often each query of the row sees each key."""
    return Counter(
        (piece.queries.start + q, piece.keys.start + k)
        for piece in pieces
        for q, k in product(range(piece.queries.length), range(piece.keys.length))
        if sees(piece, manner, q, k)
    )


def sees(piece: Piece, manner: Manner, q: int, k: int) -> bool:
    seen = attention_blocks.seen_of(piece, manner, torch.device("cpu"))
    return seen is None or bool(seen[q, k])


def lengths_of(T: int) -> some.SearchStrategy:
    cuts = some.lists(some.integers(1, T - 1), unique=True, max_size=6).map(sorted)
    return cuts.map(lambda at: tuple(b - a for a, b in zip([0, *at], at)))


some_cases = some.integers(8, 40).flatmap(
    lambda T: some.builds(
        Case,
        T=some.just(T),
        documents=lengths_of(T),
        window=some.one_of(some.none(), some.integers(1, T + 2)),
        heads=some.sampled_from([(2, 2), (4, 2), (2, 1)]),
        sizes=some.sampled_from([(8, 8), (4, 6)]),
        strategy=some.sampled_from(STRATEGIES),
        layout=some.sampled_from(KINDS),
        alone=some.sampled_from(list(ALONE)),
    )
)


def check_any(cases: list[Case], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_blocks, "BLOCK", 4)
        assert in_processes(size, wrong_ones, size, cases) == [[]] * size


@settings(max_examples=2, deadline=None, phases=FAST)
@given(some.lists(some_cases, min_size=12, max_size=24))
def test_any_documents_and_windows_over_two(cases):
    check_any(cases, 2)


@pytest.mark.matrix
@settings(max_examples=25, deadline=None, phases=FAST)
@given(some.lists(some_cases, min_size=12, max_size=24), some.sampled_from([2, 3, 4]))
def test_any_documents_and_windows_over_more(cases, size):
    check_any([replace(case, heads=(12, {2: 6, 3: 3, 4: 2}[size])) for case in cases], size)


def in_blocks_of_a_model(rank: int) -> dict[str, list[bool]]:
    group, case, said = known_as(dist.group.WORLD), Case(T=24, documents=(9,)), {}
    for strategy in STRATEGIES:
        attend, share = attend_over(2, rank, group, strategy), case.share(rank, 2)
        plain = case.mine(rank, 2, attend)

        def recomputed(*inputs, attend=attend, **options):
            return checkpoint(attend, *inputs, **options, use_reentrant=False)

        said[f"{strategy} recomputed"] = [
            torch.equal(a, b) for a, b in zip(case.mine(rank, 2, recomputed), plain)
        ]
        with torch.no_grad():
            o = attend(
                *(share.layout.cut(x, rank).requires_grad_() for x in case.inputs()[:3]),
                documents=share,
            )
        said[f"{strategy} without gradients"] = [torch.equal(o, plain[0]) and o.grad_fn is None]

    around = attend_over(2, rank, group, "ring")

    @torch.compile(backend="eager")
    def compiled(q, k, v, **options):
        return around(q * 2, k, v, **options) * 4

    plain = case.mine(rank, 2, lambda q, k, v, **options: attend(q * 2, k, v, **options) * 4)
    said["compiled"] = [
        torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        for a, b in zip(case.mine(rank, 2, compiled), plain)
    ]
    choose(torch.device("cpu"), "reference")
    slow = case.mine(rank, 2, lambda q, k, v, **options: around(q * 2, k, v, **options) * 4)
    said["reference"] = [torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(slow, plain)]
    return said


def test_recomputed_compiled_and_without_gradients():
    for said in in_processes(2, in_blocks_of_a_model):
        for what, equal in said.items():
            assert all(equal), what


@pytest.mark.parametrize("given", [{"dropout": 0.3}, {"window": 5}])
def test_recomputed_with_its_products_kept(given):
    """activation_checkpoint.policy = matmuls: what is written out is not changed in place once it is kept."""
    choose(torch.device("cpu"), "reference")  # CUDA writes windows out, too
    case, attend, found = Case(T=24, documents=(9,)), attend_over(1, 0, "", "ring"), []
    noise_BT = torch.arange(B * case.share(0, 1).layout.padded_tokens).view(B, -1) * 2**40
    for policy in ((), ("matmuls",)):
        part = partial(attend, documents=case.share(0, 1), noise_BT=noise_BT, **given)
        if policy:
            part = partial(Checkpointed.of_policy(policy), part)
        *leaves, d_o = case.inputs()
        o = part(*(x.requires_grad_() for x in leaves))
        found.append([o, *torch.autograd.grad(o, leaves, d_o)])
    for got, wanted in zip(*found):
        assert torch.equal(got, wanted)


def order_of_events(rank: int, size: int) -> list[str]:
    """What happens in a forward and its backward, in its order."""
    events, send, arrive = [], ring.Parcel.__init__, ring.Parcel.arrived
    computed = {"forward": attention_blocks.Outputs, "backward": attention_blocks.Gradients}

    def sends(self, x, to, coming_from, of, tag):
        self.tag = "gradients" if tag == ring.GRADIENTS else "keys"
        events.append(f"send {self.tag} to {(to - rank) % size}")
        send(self, x, to, coming_from, of, tag)

    def arrives(self):
        events.append(f"take {self.tag}")
        return arrive(self)

    ring.Parcel.__init__, ring.Parcel.arrived = sends, arrives
    for name, part in computed.items():

        def meets(self, *inputs, name=name, meet=part.meet):
            events.append(name)
            meet(self, *inputs)

        part.meet = meets
    Case(T=24).mine(rank, size, attend_over(size, rank, known_as(dist.group.WORLD), "ring"))
    return events


def test_the_next_keys_are_under_way_while_the_present_ones_are_used():
    for events in in_processes(3, order_of_events, 3):
        assert events == [
            "send keys to 1",
            "forward",
            "take keys",
            "send keys to 1",
            "forward",
            "take keys",
            "forward",
            "send keys to 1",
            "backward",
            "send gradients to 1",
            "take keys",
            "send keys to 1",
            "backward",
            "take gradients",
            "send gradients to 1",
            "take keys",
            "backward",
            "take gradients",
            "send gradients to 1",
            "take gradients",
        ]


def test_what_is_kept_for_the_backward_is_q_k_v_o_and_lse():
    case = Case(T=24)
    q, k, v, _ = (x.requires_grad_() for x in case.inputs())
    o = attend_over(1, 0, "", "ring")(q, k, v, documents=case.share(0, 1))
    kept = [x for x in o.grad_fn.saved_tensors if x is not None]
    assert {x.data_ptr() for x in kept[:4]} == {x.data_ptr() for x in (q, k, v, o)}
    assert [x.shape for x in kept[4:]] == [(B, 4, 24)]


def test_layers_plan_once(monkeypatch):
    """What is met follows from the segments, documents and window: a batch's first layer plans for all, forward and backward."""
    planned, seen_between = [], key_blocks.seen_between
    monkeypatch.setattr(
        key_blocks, "seen_between", lambda *given: planned.append(given) or seen_between(*given)
    )
    case = Case(T=24, documents=(9,), window=5)
    share, attend = case.share(0, 1), attend_over(1, 0, "", "ring")
    for _ in range(2):
        *leaves, d_o = case.inputs()
        o = attend(*(x.requires_grad_() for x in leaves), window=5, documents=share)
        o.backward(d_o)
    assert len(planned) == len(share.mine) ** 2
    attend(*leaves, window=6, documents=share)
    assert len(planned) == 2 * len(share.mine) ** 2, "another window meets others"
