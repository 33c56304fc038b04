"""parallel/strategy.py, longest.py, published.py: what shared rows send, take and hold, against numbers made by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from longfire.config.read_model import read_model_config
from longfire.config.run import Run
from longfire.errors import SettingsError
from longfire.launch import World
from longfire.mixers import MIXERS
from longfire.mixers.cache import Cache
from longfire.mixers.mixer import Sequence
from longfire.model import on_meta
from longfire.parallel import context_cost, cost, strategy
from longfire.parallel.context_cost import AttentionHeads, LayerTraffic, Workload
from longfire.parallel.context_strategies import strategy_named
from longfire.planner import longest, published
from longfire.planner.memory import Meter
from longfire.planner.planner import Planner

RECIPES = Path(__file__).parents[1] / "recipes"
H100 = cost.DEVICES["h100-80gb"]
EIGHT = AttentionHeads(heads=8, kv_heads=2, key_size=64, value_size=32)
CUT = Workload(tokens=4096, sequences=3, processes=4, layout="zigzag", dtype="bfloat16")
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "vocab_size": 512,
    "layer_types": ["gla", "attention"],
    "gla": {"num_heads": 4},
    "attention": {"num_heads": 4, "num_kv_heads": 2},
}


@pytest.fixture
def compose(tmp_path):
    def composed(processes: int, **settings: object) -> Run:
        (tmp_path / "config.json").write_text(json.dumps(SMALL))
        given = {
            "model.config": tmp_path / "config.json",
            "training.seq_len": 256,
            "training.batch_size": 1,
            "training.device": "cpu",
            "training.loss_chunk_tokens": 64,
            **settings,
        }
        return Run.compose(None, {k: str(v) for k, v in given.items()}, world=World(processes))

    return composed


def test_bytes_of_each_way_by_hand():
    """1024 tokens of 3 rows a process; a token has 192 numbers of k and v, 512 of q, 256 of o."""
    kv, q, o = 3 * 1024 * 192, 3 * 1024 * 512, 3 * 1024 * 256
    assert strategy_named("ring").cost(EIGHT, CUT, H100).bytes == 2 * (3 * kv * 2) + 4 * kv * 4
    assert strategy_named("allgather").cost(EIGHT, CUT, H100).bytes == 2 * (3 * kv * 2) + 3 * kv * 4
    two_copies = 2 * kv  # 2 heads of keys for 4 processes
    assert (
        strategy_named("alltoall").cost(EIGHT, CUT, H100).bytes
        == 2 * (q + o + two_copies) * 2 * 3 / 4
    )
    again = replace(CUT, again=1)
    assert strategy_named("ring").cost(EIGHT, again, H100).bytes == 3 * (3 * kv * 2) + 4 * kv * 4
    assert (
        strategy_named("alltoall").cost(EIGHT, again, H100).bytes
        == 3 * (q + o + two_copies) * 2 * 3 / 4
    )
    assert strategy_named("ring").cost(EIGHT, CUT, H100).backward == 2 * kv * (2 + 4) + q * 4
    assert strategy_named("allgather").cost(EIGHT, CUT, H100).backward == 4 * kv * (2 + 4)


def test_states_do_not_grow_with_the_row():
    crossing, long = LayerTraffic(states=((100, 400),), halo=30), replace(CUT, tokens=1 << 20)
    (states, halo), (same, same_halo) = (
        strategy.exchanges(crossing, "ring", cut, H100) for cut in (CUT, long)
    )
    assert states == same and halo == same_halo
    assert states.bytes == 2 * 3 * (3 * 2 * 500 * 4) and halo.bytes == 2 * 3 * (3 * 2 * 30 * 2)
    assert states.forward == 4 * 3 * 2 * 500 * 4 == 4 * states.kept
    assert strategy.exchanges(crossing, "ring", replace(CUT, processes=1), H100) == []


def test_a_ring_is_hidden_where_pieces_are_long_enough():
    """c = FLOP/s over bytes/s with all heads' keys, and twice that where half of a block is masked."""
    heads = AttentionHeads(8, 8, 128, 128)
    rate, link = H100.efficiency * H100.flops["bfloat16"], cost.LINK_EFFICIENCY * H100.network
    c = rate / link
    short, long = (Workload(int(64 * part * c), 1, 64, "zigzag") for part in (1.8, 2.2))
    assert context_cost.attention_seconds(heads, long, H100) / 64 == pytest.approx(
        2.2 * c * (2.2 * c) * 2 * 8 * 128 / rate, rel=0.01
    )
    forward = 63 * (
        cost.LATENCY
        + 4 * short.here * 8 * 128 / link
        - context_cost.attention_seconds(heads, short, H100) / 64
    )
    assert strategy_named("ring").cost(heads, short, H100).waits > forward > 0
    assert (
        strategy_named("ring").cost(heads, replace(long, tokens=2 * long.tokens), H100).waits == 0
    )
    assert (
        strategy_named("allgather").cost(heads, long, H100).waits
        == strategy_named("allgather").cost(heads, long, H100).seconds
        > 0
    )


def test_zigzag_is_even_and_contiguous_is_not():
    for n in (2, 4, 64):
        assert context_cost.imbalance(4096, n, "zigzag") == pytest.approx(1, abs=1e-3)
        assert context_cost.imbalance(4096, n, "contiguous") == pytest.approx(2 - 1 / n, abs=1e-2)
    assert context_cost.imbalance(4096, 8, "contiguous", window=64) == pytest.approx(1, abs=0.02)
    uneven = replace(CUT, layout="contiguous")
    assert (
        strategy_named("ring").cost(EIGHT, uneven, H100).uneven
        > 0
        == strategy_named("alltoall").cost(EIGHT, uneven, H100).uneven
    )
    assert (
        context_cost.tokens_here(1001, 4, "zigzag") == 2 * 126
        and context_cost.tokens_here(1001, 4, "contiguous") == 251
    )


def test_the_best_way_is_of_the_link_the_heads_and_the_room():
    many, few = AttentionHeads(32, 32, 128, 128), AttentionHeads(32, 1, 128, 128)
    inside, across = Workload(8192, 1, 8), Workload(1 << 20, 1, 64)
    assert strategy.rank_strategies([many], Workload(1 << 20, 1, 8), H100)[0].strategy == "ring", (
        "long pieces hide the ring"
    )
    assert strategy.rank_strategies([many], inside, H100)[0].strategy == "alltoall", (
        "short ones do not"
    )
    assert {one.strategy for one in strategy.rank_strategies([many], across, H100)} == {
        "ring",
        "allgather",
    }, "32 heads for 64"
    assert (
        len(strategy.rank_strategies([few], inside, H100)) == 3
        and strategy.rank_strategies([], inside, H100) == []
    )
    without = strategy.rank_strategies([many], inside, H100, room_bytes=0)
    assert not any(one.fits for one in without) and [one.held for one in without] == sorted(
        one.held for one in without
    )
    mixed = strategy.rank_strategies([many, few, many], inside, H100)[0]
    assert mixed.bytes > strategy.rank_strategies([many, many], inside, H100)[0].bytes
    message = strategy.describe(strategy.rank_strategies([many], inside, cost.CPU), inside)
    assert "8 processes" in message and "runner-up" in message and "GB held" in message
    assert "but it has 32" in strategy.refusal("alltoall", many, 64)
    assert "key/value heads" in strategy.refusal("alltoall", AttentionHeads(12, 4, 8, 8), 6)


def test_devices_by_their_own_names():
    assert cost.device_here("", 0) is cost.CPU
    assert cost.device_here("NVIDIA H100 PCIe", 79e9).name == "h100-pcie"
    assert cost.device_here("NVIDIA A100-SXM4-40GB", 42e9).name == "a100-40gb"
    stranger = cost.device_here("NVIDIA RTX 9090", 30e9)
    assert stranger.name == cost.DEFAULT_DEVICE and stranger.memory_bytes == 30e9


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_says_what_crosses_its_cuts(name):
    """By the seams that it calls: softmax its heads, recurrences as many numbers as a cache keeps of their states."""
    model, cache = tiny_model(name), Cache()
    (crossing, *_) = Meter(model, 64, 64).crossings
    context = model.layers[0].mixer.context
    assert bool(crossing.attends) == ("attention" in context) and bool(crossing.states) == (
        "state" in context
    )
    if "state" in context:
        model(torch.zeros(1, 3, dtype=torch.int64), Sequence(torch.arange(3)[None], cache=cache))
        states = [
            kept.numel()
            for key, kept in cache.layers[0].items()
            if key in ("state", "keys", "values")
        ]
        assert sorted(write for _, write in crossing.states) == sorted(states)


def test_states_of_a_published_shape():
    """GLA 340M: 4 heads of 128 x 256; Gated DeltaNet 1B: 6 heads of 256 x 512, whose maps are 256 x 256, and 3 inputs of q, k, v."""

    def crossing(name: str) -> LayerTraffic:
        shape = read_model_config(RECIPES / f"models/{name}.json")
        return Meter(on_meta(shape, torch.bfloat16), 64, 64).crossings[0]

    assert crossing("gla-340m").states == ((4 * 128, 4 * 128 * 256),)
    assert crossing("gated-deltanet-1b") == LayerTraffic(
        (), ((6 * 256**2, 6 * 256 * 512),), 3 * 6 * (256 + 256 + 512)
    )


def test_a_plan_of_shared_rows_hangs_together(compose):
    run = compose(
        8,
        **{
            "parallelism.context_parallel_degree": 4,
            "training.seq_len": 1000,
            "parallelism.mesh_dim": "",
        },
    )
    planner = Planner(run, H100)
    plan = planner.of_recipe()
    assert (
        plan.mesh == (1, 1, 2, 4, 1)
        and plan.shards == 8
        and plan.here(1000) == 250
        and plan.layout == "zigzag"
    )
    forecast = planner.forecast(plan)
    assert forecast.seconds == pytest.approx(sum(forecast.parts.values())) and forecast.fits
    said = {(one.axis, one.what.split(":")[0]) for one in forecast.collectives}
    assert {
        ("cp", "states"),
        ("dp_shard x cp", "parameters"),
        ("dp_shard x cp", "gradients"),
    } <= said
    assert (
        sum(one.bytes for one in forecast.collectives if one.what.startswith("states"))
        == 2 * 2 * 3 * 2 * (4 * 8 + 4 * 8 * 16) * 4
    )
    whole = replace(plan, cp=1, dp_shard=8, layout="contiguous")
    assert planner.peak(plan).total < planner.peak(whole).total
    assert planner.groups_of(1, plan.shards) == planner.groups_of(1, whole.shards)


def test_what_cannot_share_rows_so_is_refused(compose):
    with pytest.raises(SettingsError, match=r"alltoall shares the heads.*it has 4"):
        compose(
            8,
            **{
                "parallelism.context_parallel_degree": 8,
                "parallelism.context_parallel_strategy": "alltoall",
            },
        )


@pytest.mark.slow
def test_more_devices_never_shorten_the_longest_row(compose):
    planner = Planner(compose(1), cost.device_of("a100-40gb", "32MB"))
    found = [longest.longest(planner, devices) for devices in (1, 2, 8)]
    tokens = [one.tokens for one in found]
    assert tokens == sorted(tokens) and 0 < tokens[0] < tokens[-1]
    for one in found[:3]:
        usable = planner.device.usable_bytes
        assert (
            planner.peak(one.plan, one.tokens).total
            <= usable
            < planner.peak(one.plan, int(1.1 * one.tokens)).total
        )


def test_every_mixer_can_take_the_shape_of_another(compose):
    shape = compose(1).model_config
    for name in MIXERS:
        assert set(longest.with_mixer(shape, name).layer_types) == {name}
    assert longest.with_mixer(shape, "gla").mixers["gla"] == {"num_heads": 4}, (
        "the recipe's own, where it has it"
    )
    assert longest.heads_for("gated_delta_net", 2048) == {"num_heads": 8, "head_dim": 192}


# Ring Attention


def test_table_1_is_its_formulas():
    b, s, h, n, c = 2, 1024, 64, 4, 128
    expected = (2 * b * n * s * s, 8 * b * s * h, 2 * b * s * h, 6 * b * c * h)
    assert tuple(of(b, s, h, n, c) for of in published.ACTIVATIONS.values()) == expected


@pytest.mark.parametrize("host", published.HOSTS)
def test_table_2_is_a_quotient(host):
    """All but the first number of InfiniBand: 312 TFLOP/s over 12.5 GB/s is 25.0, a sixth of the printed 149.5."""
    flops, _, link, c, s = published.HOSTS[host]
    block, row = (tokens / 1000 for tokens in published.minimum_block(flops, link))
    assert row == pytest.approx(s, rel=0.01)
    assert block == pytest.approx(c, abs=0.05) or (
        host == "A100 InfiniBand" and block == pytest.approx(24.96)
    )


def test_table_3_is_reproduced_but_for_what_the_page_says():
    """The blockwise and the ring column wholly; of the others docs/planning.md tells which are not."""
    differs = {
        (row.compute, row.model, kind): (said, found)
        for row in published.ROWS
        if row.printed
        for (kind, found), said in zip(published.arithmetic(row).items(), row.printed)
        if said != found
    }
    assert {kind for *_, kind in differs} == {"vanilla", "memory-efficient"}
    assert {row[:2] for row in differs if row[2] == "vanilla"} == {
        *(("TPUv4-1024", model) for model in ("3B", "7B", "13B", "30B")),
        ("TPUv5e-256", "3B"),
    }
    assert differs["8x A100 NVLink", "13B", "memory-efficient"] == (4, 8) and len(differs) == 8
    page = (RECIPES.parent / "docs/planning.md").read_text()
    assert "8 of the 52 numbers" in page


@pytest.mark.parametrize("model", published.SIZES)
def test_the_papers_models_are_those_of_the_recipes(model):
    shape = read_model_config(RECIPES / f"models/llama-{model.lower()}.json")
    size = published.SIZES[model]
    own = size.model_config()
    assert (own.hidden_size, own.num_hidden_layers, own.intermediate_size, own.vocab_size) == (
        shape.hidden_size,
        shape.num_hidden_layers,
        shape.intermediate_size,
        shape.vocab_size,
    )
    assert sum(p.numel() for p in on_meta(own).parameters()) == pytest.approx(
        size.parameters, rel=0.005
    )


@pytest.mark.slow
def test_ours_fits_more_than_the_paper(compose):
    """In bf16, on the devices of its smallest row."""
    row = published.ROWS[0]
    ((_, found),) = published.ours(compose(1), rows=(row,))
    assert found.tokens > 1000 * row.printed[-1] and found.plan.cp == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh", "strategies"),
    [
        ("llama7b-ring-2m", (1, 1, 1, 64, 8), {"ring", "allgather"}),
        ("gla-1b-hybrid-1m", (1, 1, 8, 64, 1), {"ring", "allgather"}),
    ],
)
def test_long_recipes_are_planned_for_512_devices(name, mesh, strategies):
    """They fit, softmax goes around as a ring, and the ring is hidden but for a tenth of the step."""
    run = Run.compose(RECIPES / f"{name}.toml", {}, world=World(512))
    planner = Planner(run, H100)
    plan = planner.of_recipe()
    forecast = planner.forecast(plan)
    assert plan.mesh == mesh and plan.strategy == "ring" and plan.layout == "zigzag"
    assert {one.strategy for one in planner.strategies(plan)} == strategies
    assert forecast.fits and forecast.parts["uneven rows"] < 1e-3 * forecast.seconds
    assert forecast.parts["network"] < 0.1 * forecast.seconds and forecast.binds == "compute"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "said"),
    [
        (4, 4, 2, None),
        (8, 2, 8, None),
        (4, 2, 8, "but it has 4"),
        (6, 6, 4, "does not divide its 6"),
        (12, 3, 2, "its 3 key/value heads"),
    ],
)
def test_heads_that_alltoall_cannot_share_are_refused(heads, kv_heads, size, said):
    assert not any(
        strategy_named(way).refusal("attention", heads, kv_heads, (size,))
        for way in ("ring", "allgather", "auto")
    )
    found = strategy_named("alltoall").refusal("attention", heads, kv_heads, (size,))
    assert bool(found) == (said is not None)
    if found:
        assert said in found
        assert "set parallelism.context_parallel_strategy to ring or allgather" in found
        assert "parallelism.context_parallel_degree" in found
