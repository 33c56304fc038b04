"""parallel/cost.py, memory.py, planner.py, tables.py: predicted bytes are those of a real step; formulas; what the command says."""

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sets import slow_unless

from longfire.cli import entry
from longfire.config.run import Run
from longfire.device import Clock
from longfire.errors import SettingsError
from longfire.launch import World
from longfire.model import on_meta
from longfire.parallel import cost
from longfire.planner.forecast import Plan
from longfire.planner.live_bytes import LiveBytes
from longfire.planner.part import HEAD
from longfire.planner.planner import Planner
from longfire.planner.tables import findings
from longfire.training.setup import make_state
from longfire.training.step import train_step
from longfire.training.throughput import random_batch

H100 = cost.DEVICES["h100-80gb"]
LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 512,
    "layer_types": ["gla", "gla", "attention"],
    "gla": {"num_heads": 4},
    "attention": {"num_heads": 4},
}


@pytest.fixture
def compose(tmp_path):
    def composed(shape: dict, processes: int = 1, **settings: object) -> Run:
        (tmp_path / "config.json").write_text(json.dumps(shape))
        given = {
            "model.config": tmp_path / "config.json",
            "training.seq_len": 128,
            "training.batch_size": 2,
            "training.compile": "off",
            "training.device": "cpu",
            "training.loss_chunk_tokens": 64,
            **settings,
        }
        return Run.compose(None, {k: str(v) for k, v in given.items()}, world=World(processes))

    return composed


REMATS = ("none", "mlp", "attention", "block")
HELD = [
    (remat, tied, microbatches)
    for remat in REMATS
    for tied, microbatches in ((False, 1), (True, 2))
]


def quick(remat: str, tied: bool, microbatches: int) -> bool:
    return (remat, tied) in (("none", True), ("block", False))


@pytest.mark.parametrize(("remat", "tied", "microbatches"), slow_unless(quick, HELD))
def test_the_fullest_moment_is_that_of_a_real_step(compose, remat, tied, microbatches):
    run = compose(
        {**SMALL, "tie_word_embeddings": tied},
        **{
            "activation_checkpoint.mode": remat,
            "training.gradient_accumulation_steps": microbatches,
            "model.compute_dtype": "float32",
        },
    )
    config = run.known_model_config.with_vocabulary(run.vocab_size)
    state = make_state(run, config, torch.device("cpu"))
    generator, clock = torch.Generator().manual_seed(0), Clock(torch.device("cpu"))
    for _ in range(2):
        batches = random_batch(run, run.vocab_size, generator).split(run.accumulation)
        moments = [value for of_one in state.optimizer.state.values() for value in of_one.values()]
        live = LiveBytes(
            list(state.model.parameters()),
            moments,
            [(b.ids_BT, b.labels_BT, b.positions_BT) for b in batches],
        )
        with live:
            train_step(state, batches, 0.0, run.training, clock)
    planner = Planner(run, H100, "float32", as_cuda=False)
    assert planner.peak(planner.of_recipe()).total == pytest.approx(live.peak, rel=0.03)


def test_shares_of_matrices_are_those_of_the_split(compose):
    planner = Planner(compose(SMALL), H100)
    whole, half = (planner.groups_of(tp, 1) for tp in (1, 2))
    assert half[0].whole < whole[0].whole < 2.1 * half[0].whole and half[
        HEAD
    ].whole == pytest.approx(whole[HEAD].whole / 2, rel=0.01)
    assert planner.groups_of(1, 4)[0].shard == pytest.approx(whole[0].whole / 4, rel=0.1)
    assert sum(group.whole for group in whole.values()) == sum(
        p.numel() for p in planner.model.parameters()
    )
    assert len(list(planner.model.parameters())) == len(
        list(on_meta(planner.model_config).parameters())
    ), "the whole model stays whole"


def test_what_holds_less_holds_less(compose):
    planner = Planner(compose(SMALL, 8, **{"training.global_batch_size": 64}), H100)

    def bytes_of(**changes: object) -> float:
        plan = {
            "dp_replicate": 1,
            "dp_shard": 8,
            "cp": 1,
            "tp": 1,
            "pp": 1,
            "remat": "none",
            "batch_size": 2,
            "microbatches": 4,
            **changes,
        }
        return planner.peak(Plan(**plan)).total

    assert bytes_of(remat="block") < bytes_of() < bytes_of(batch_size=4)
    assert bytes_of(dp_shard=8) < bytes_of(dp_shard=1, dp_replicate=8)
    assert bytes_of(tp=2, dp_shard=4) < bytes_of(dp_shard=4)


def test_rounded_weights_are_counted_where_a_step_keeps_them(compose):
    """2 bytes of each number of the blocks' matrices, in the forward; none in the optimizer's moment."""
    moments = {}
    for choice in ("auto", "off"):
        settings = {
            "training.gradient_accumulation_steps": 4,
            "training.keep_rounded_weights": choice,
        }
        run = compose(SMALL, 1, **settings)
        planner = Planner(run, H100)
        (memory,) = planner.memories(planner.of_recipe())
        moments[choice] = list(memory.moments())
    model = on_meta(run.known_model_config)
    numbers = sum(
        module.weight.numel()
        for module in model.layers.modules()
        if isinstance(module, torch.nn.Linear)
    )
    for kept, rounded_again in zip(moments["auto"], moments["off"]):
        more = 0 if kept.where == "optimizer" else 2 * numbers
        assert kept.total == pytest.approx(rounded_again.total + more)


def test_parameters_on_the_host_are_counted_there(compose):
    """Masters, gradients and AdamW's two moments, 4 bytes each, of a process's shard."""
    settings = {
        "training.global_batch_size": 16,
        "parallelism.cpu_offload": True,
        "checkpoint.async_mode": "disabled",
    }
    run = compose(SMALL, 8, **settings)
    planner = Planner(run, H100)
    forecast = planner.forecast(planner.of_recipe())
    parameters = sum(p.numel() for p in on_meta(run.known_model_config).parameters())
    # Rows that 8 does not divide leave the last processes with fewer.
    assert 16 * parameters / 8 <= forecast.host_bytes < 1.1 * 16 * parameters / 8
    assert forecast.peak.parameters == 0 and forecast.fits
    little = Planner(run, replace(H100, host_bytes=forecast.host_bytes / 2))
    own = little.forecast(little.of_recipe())
    assert not own.fits and own.binds == "host memory"
    words = "\n".join(findings(little, little.with_largest(own)))
    assert "the host's memory" in words and "--host-memory" in words
    assert little.with_largest(own).largest["batch_size"] == 0


def test_a_gradient_is_on_the_device_before_it_goes_to_the_host(compose):
    """FSDP reduces the gradients of a part into a tensor of the device, which is then copied."""

    def reductions(cpu_offload: bool) -> dict[str, float]:
        settings = {"training.global_batch_size": 16, "parallelism.cpu_offload": cpu_offload}
        planner = Planner(compose(SMALL, 8, **settings), H100)
        moments = planner.memories(planner.of_recipe())[0].moments()
        return {m.where: m.gathered for m in moments if m.where.startswith("gradients of")}

    assert reductions(True) == reductions(False)


def test_copies_of_a_checkpoint_are_counted_on_the_host(compose):
    """Master and AdamW's two moments, 4 bytes each; a pinned copy of each tensor takes the next power of two."""
    held = {}
    for mode in ("disabled", "async", "async_with_pinned_mem"):
        run = compose(SMALL, 1, **{"checkpoint.async_mode": mode})
        planner = Planner(run, H100)
        held[mode] = planner.forecast(planner.of_recipe()).host_bytes
    parameters = list(on_meta(run.known_model_config).parameters())
    assert held["disabled"] == 0
    assert held["async"] == 12 * sum(p.numel() for p in parameters)
    powers = [2 ** math.ceil(math.log2(4 * p.numel())) for p in parameters]
    assert held["async_with_pinned_mem"] == pytest.approx(3 * sum(powers))


def test_activations_on_the_host_are_counted_there(compose):
    """What is no longer kept on the device is kept on the host. A third of computing hides its way there, two thirds its way
    back, and what is on its way is on the device too."""
    offloaded = {"activation_checkpoint.offload": True, "training.device": "auto"}
    saved = {"checkpoint.async_mode": "disabled"}
    planners = [Planner(compose(SMALL, **saved, **more), H100) for more in ({}, offloaded)]
    here, there = (planner.forecast(planner.of_recipe()) for planner in planners)
    kept = []
    for planner in planners:
        plan = planner.of_recipe()
        parts = [planner.part(plan, name, planner.seq_len) for name in planner.names_of(plan, 0)]
        kept.append(sum(part.kept for part in parts))
    assert here.host_bytes == 0 < there.host_bytes
    # The device holds again what its own copy leaves behind; whole numbers and masks stay there.
    assert 0 < kept[0] - kept[1] <= there.host_bytes
    seconds = there.parts["activations to the host and back"]
    # A compiled block has all that it keeps on the device at its end, and when its backward begins.
    planner = planners[1]
    part = planner.part(planner.of_recipe(), 0, planner.seq_len)
    (memory, *_) = planner.memories(planner.of_recipe())
    for moment in memory.moments():
        if moment.where.endswith("of layer 0") and not moment.where.startswith("gradients"):
            assert moment.activations > part.kept_on_host > 0
    planned = planners[1].of_recipe()
    parts = [planner.part(planned, name, planner.seq_len) for name in planner.names_of(planned, 0)]
    assert there.host_bytes == sum(part.pinned_on_host for part in parts)
    one_way = sum(part.kept_on_host for part in parts) / cost.HOST_LINK
    compute = there.parts["compute"]
    waited = max(0, one_way - compute / 3) + max(0, one_way - compute * 2 / 3)
    assert seconds == pytest.approx(waited)
    assert seconds > 0, "a small model computes less than it copies"


def test_the_formulas_of_time():
    assert cost.gathered_bytes(8.0, 4) == 6 and cost.reduced_bytes(8.0, 4) == 12
    assert cost.bandwidth(H100, 8, 1) == cost.LINK_EFFICIENCY * H100.link
    assert cost.bandwidth(H100, 64, 8) == cost.LINK_EFFICIENCY * H100.network
    assert cost.bandwidth(H100, 64, 1) == cost.LINK_EFFICIENCY * min(H100.link, 8 * H100.network)
    assert cost.bubble(1, 8, "1F1B") == 0 and cost.bubble(4, 5, "1F1B") == 3 / 8
    assert (
        cost.bubble(4, 5, "ZBVZeroBubble")
        < cost.bubble(4, 5, "Interleaved1F1B")
        < cost.bubble(4, 5, "1F1B")
    )
    assert [cost.in_flight(p, 4, 8, "1F1B") for p in range(4)] == [4, 3, 2, 1] and cost.in_flight(
        0, 4, 8, "GPipe"
    ) == 8
    assert (
        cost.bytes_of("80GB", "--memory") == 80e9
        and cost.bytes_of("1.5 GiB", "--memory") == 1.5 * 2**30
        and cost.bytes_of("7", "--memory") == 7
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--device h100", "--device = 'h100' is not one of a100-40gb"),
        ("--memory much", "--memory = 'much' is no size: write it as 80GB"),
        ("--host-memory none", "--host-memory = 'none' is no size: write it as 80GB"),
        ("--gpus 0", "invalid whole number from 1 on value: '0'"),
        ("--gpus 6 --parallelism.tensor_parallel_degree 4", "tensor_parallel_degree = 4"),
        (
            "--gpus 3 --parallelism.tensor_parallel_degree 3 --training.seq_len 129",
            "must divide the 4",
        ),
        (
            "--gpus 4 --training.global_batch_size 6",
            "training.global_batch_size = 6 is no multiple",
        ),
    ],
)
def test_what_cannot_be_planned_names_key_and_mend(tmp_path, words, message, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert (
        entry.main(["plan", "--model.config", str(tmp_path / "config.json"), *words.split()]) == 2
    )
    assert message in capsys.readouterr().err


def test_the_help_names_every_device(capsys):
    with pytest.raises(SystemExit):
        entry.main(["plan", "--help"])
    message = " ".join(capsys.readouterr().out.split())
    for name in cost.DEVICES:
        assert name in message
    page = (Path(__file__).parents[1] / "docs/planning.md").read_text()
    assert re.findall(r"`(\w+-\w+)`", page.split("Devices:")[1].split(";")[0]) == list(cost.DEVICES)


@pytest.mark.slow
def test_a_plan_for_70b_on_512_processes(tmp_path, capsys):
    """In time, on one core, and with numbers that hang together."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    settings = {
        "model.config": tmp_path / "config.json",
        "training.seq_len": 8192,
        "training.batch_size": 1,
        "training.global_batch_size": 512,
        "training.tokens": 15_000_000_000_000,
        "parallelism.tensor_parallel_degree": 8,
        "activation_checkpoint.mode": "block",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    begun = time.process_time()
    assert entry.main(["plan", "--gpus", "512", *words, "--json", str(tmp_path / "plan.json")]) == 0
    assert time.process_time() - begun < 120
    out = capsys.readouterr().out
    for part in (
        "70,553,706,496 parameters",
        "64 dp_shard x 8 tp",
        "what binds",
        "largest that fit",
        "gradients: reduce-scatter",
    ):
        assert part in out
    said = json.loads((tmp_path / "plan.json").read_text())
    own, others = said["recipe"], said["alternatives"]
    assert own["peak"]["total"] == pytest.approx(
        sum(v for k, v in own["peak"].items() if k not in ("where", "total"))
    )
    assert 16 * 70.55e9 / 512 < own["peak"]["total"] < 80e9 and own["fits"]
    assert own["seconds"] == pytest.approx(sum(own["parts"].values()))
    assert own["tokens_per_second"] == pytest.approx(512 * 8192 / own["seconds"])
    assert len(others) == 8 and all(other["fits"] for other in others)
    assert others[0]["seconds"] <= 1.02 * own["seconds"] and all(
        0 < other["mfu"] < 0.6 for other in others
    )
    for other in others:
        plan = other["plan"]
        assert plan["dp_replicate"] * plan["dp_shard"] * plan["tp"] * plan["pp"] == 512
        assert (
            plan["batch_size"] * plan["microbatches"] * plan["dp_replicate"] * plan["dp_shard"]
            == 512
        )


@pytest.mark.slow
def test_the_largest_that_fit_fit(compose):
    run = compose(SMALL, 2)
    device = cost.device_of("a100-40gb", "64MB")
    planner = Planner(run, device)
    plan = planner.of_recipe()
    largest = planner.with_largest(planner.forecast(plan)).largest
    rows = largest["batch_size"]
    peaks = [planner.peak(Plan(**{**vars(plan), "batch_size": n})).total for n in (rows, 2 * rows)]
    assert 0 < peaks[0] <= device.usable_bytes < peaks[1]
    assert planner.peak(plan, largest["seq_len"]).total == pytest.approx(
        device.usable_bytes, rel=0.1
    )


def test_a_plan_that_does_not_fit_says_so(compose):
    planner = Planner(compose(SMALL), cost.device_of("a100-40gb", "1MB"))
    forecast = planner.with_largest(planner.forecast(planner.of_recipe()))
    assert (
        not forecast.fits
        and forecast.binds == "memory"
        and forecast.largest == {"batch_size": 0, "seq_len": 0}
    )
    assert planner.alternatives() == []


def test_models_of_transformers_are_refused(compose):
    run = compose(LLAMA_70B, **{"model.backend": "transformers"})
    with pytest.raises(SettingsError, match=re.escape("set it to longfire")):
        Planner(run, H100)
