"""parallel/remat.py: no way to keep less for the backward changes a number; what each keeps; what is refused, and why."""

import json
from functools import cache

import pytest
import torch
from conftest import tiny_config, tiny_model
from plans import Plan, parts, state_of, steps, whole
from sets import slow_unless
from torch import Tensor
from worlds import in_processes

from longfire.config.run import Run
from longfire.config.settings import ActivationCheckpoint, Attention, Parallelism
from longfire.errors import SettingsError
from longfire.launch import World
from longfire.loss import loss_sum
from longfire.mixers import MIXERS
from longfire.model import Model, on_meta
from longfire.ops.sequence_noise import row_noise
from longfire.parallel.apply import parallelize
from longfire.parallel.cost import device_of
from longfire.parallel.mesh import ALONE, Mesh
from longfire.parallel.remat import unknown_operations
from longfire.planner.memory import Keeping, Meter
from longfire.planner.planner import Planner
from longfire.planner.step_time import flops_on
from longfire.training.setup import make_state

NOTHING = ActivationCheckpoint()
WAYS = {
    "both parts": {"keeping": ActivationCheckpoint("attention+mlp")},
    "block, matmuls kept": {"keeping": ActivationCheckpoint("block", ("matmuls",))},
    "both parts, named kept": {
        "keeping": ActivationCheckpoint("attention+mlp", ("mm", "longfire.scan"))
    },
    "second block": {"keeping": ActivationCheckpoint("block", layer_interval=2)},
    "first block, mlp in chunks": {
        "keeping": ActivationCheckpoint("block", layers=(0,)),
        "mlp_chunk_size": 16,
    },
    "mlp in chunks": {"keeping": NOTHING, "mlp_chunk_size": 7},
    "mlp in one chunk": {"keeping": NOTHING, "mlp_chunk_size": 1000},
    "block, mlp in chunks": {"keeping": ActivationCheckpoint("block"), "mlp_chunk_size": 16},
    "mlp again, in chunks": {"keeping": ActivationCheckpoint("mlp"), "mlp_chunk_size": 9},
    "offloaded": {"keeping": ActivationCheckpoint(offload=True)},
    "block, offloaded": {
        "keeping": ActivationCheckpoint("block", offload=True),
        "mlp_chunk_size": 11,
    },
    "vanilla": {"keeping": NOTHING, "attention": Attention("vanilla")},
    "blockwise": {"keeping": NOTHING, "attention": Attention("blockwise", 8, 5)},
    "blockwise transformer": {
        "keeping": ActivationCheckpoint("block"),
        "attention": Attention("blockwise", 5, 8),
        "mlp_chunk_size": 6,
    },
}


def loss_and_gradients(model: Model) -> tuple[float, dict[str, Tensor]]:
    from contracts.test_every_mixer import a_batch

    batch = a_batch(2)
    loss = loss_sum(model, batch, 64, noise_BT=row_noise(0, 0, *batch.ids_BT.shape, "cpu"))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def of_doubles(mixer: str, **changes: object) -> Model:
    model = tiny_model(mixer, "attention", **{"dropout": 0.1, **changes}).double()
    model.compute_dtype = torch.float64
    for block in model.layers:
        block.inner = torch.float64
    return model


@cache
def plain(mixer: str, **changes: object) -> tuple[float, dict[str, Tensor]]:
    return loss_and_gradients(of_doubles(mixer, **changes))


def assert_changes_nothing(way: dict, mixer: str, **changes: object) -> None:
    true, gradients = plain(mixer, **changes)
    got, mine = loss_and_gradients(parallelize(of_doubles(mixer, **changes), compiled=False, **way))
    assert got == pytest.approx(true, rel=1e-9)
    for name, gradient in gradients.items():
        assert (mine[name] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), name


@pytest.mark.parametrize("way", WAYS)
def test_no_way_changes_a_number(way):
    """Rows with documents, dropout, a recurrent layer and one of attention: loss and every gradient, float64."""
    assert_changes_nothing(WAYS[way], "gla")


@pytest.mark.matrix
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "gla"])
def test_no_way_changes_a_number_of_any_mixer(mixer, way):
    assert_changes_nothing(WAYS[way], mixer)


@pytest.mark.parametrize("mixer", MIXERS)
def test_matmuls_of_every_mixer_can_be_kept(mixer):
    """torch refuses what is changed in place after it was kept."""
    assert_changes_nothing(WAYS["block, matmuls kept"], mixer)


@pytest.mark.parametrize(
    "mlp",
    [*(pytest.param(mlp, marks=pytest.mark.matrix) for mlp in ("gelu", "relu2")), "channel_mix"],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_any_mlp_in_any_chunks(mlp, size):
    """channel_mix looks back one token, over the ends of chunks and not over those of documents."""
    assert_changes_nothing({"keeping": NOTHING, "mlp_chunk_size": size}, "rwkv7", mlp=mlp)


OTHERS = ("block, mlp in chunks", "offloaded", "block, matmuls kept")


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    ["blockwise transformer", *(pytest.param(way, marks=pytest.mark.matrix) for way in OTHERS)],
)
def test_compiled(way):
    """fp32, other kernels: what test_compiled_gradients_equal_eager_ones allows."""
    true, gradients = loss_and_gradients(tiny_model("attention"))
    got, mine = loss_and_gradients(parallelize(tiny_model("attention"), compiled=True, **WAYS[way]))
    assert got == pytest.approx(true, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            mine[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name
        )


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_evaluation_is_the_same(way):
    ids_BT = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
    true = of_doubles("gla")(ids_BT)
    torch.testing.assert_close(
        parallelize(of_doubles("gla"), compiled=False, **WAYS[way])(ids_BT), true
    )


PLANS = {
    "fsdp 2": Plan({"dp_shard": 2}, remat="block"),
    "tp 2, sequence": Plan({"tp": 2}, remat="attention+mlp"),
    "pp 2": Plan({"pp": 2}),
    "cp 2": Plan({"cp": 2}, {"context_parallel_strategy": "ring"}, remat="block"),
    "cp 2, alltoall": Plan({"cp": 2}, {"context_parallel_strategy": "alltoall"}),
}
QUICK_PLANS = ("tp 2, sequence", "cp 2")
LEAN = {"attention": Attention("blockwise", 5, 3), "mlp_chunk_size": 3}


@cache
def steps_of_one() -> tuple:
    return two_steps(0, ("gla", "attention"), Plan())


def two_steps(rank: int, mixers: tuple[str, ...], plan: Plan):
    mesh = Mesh.of_degrees(plan.degrees, "cpu") if plan.processes > 1 else ALONE
    state = state_of(mixers, plan, mesh, torch.float64)
    return steps(state, 2), parts(state)


@pytest.mark.parametrize("plan", slow_unless(lambda plan: plan in QUICK_PLANS, PLANS))
def test_chunks_under_plans(plan):
    """Blockwise attention and MLPs in chunks on two processes against the plain model on one."""
    lean = Plan(PLANS[plan].degrees, PLANS[plan].given, PLANS[plan].remat, lean=LEAN)
    true_said, true = steps_of_one()
    answers = in_processes(2, two_steps, ("gla", "attention"), lean)
    for said, _ in answers:
        for got, wanted in zip(said, true_said):
            assert got == pytest.approx(wanted, rel=1e-9)
    for name, numbers in whole([held for _, held in answers], true).items():
        torch.testing.assert_close(numbers, true[name][0][1], rtol=1e-9, atol=1e-9, msg=name)


def test_all_scores_between_processes_that_share_rows():
    vanilla = Plan({"cp": 2}, lean={"attention": Attention("vanilla")})
    true_said, _ = steps_of_one()
    for said, _ in in_processes(2, two_steps, ("gla", "attention"), vanilla):
        for got, wanted in zip(said, true_said):
            assert got == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("size", slow_unless(lambda size: size == 3, [1, 3, 4]))
def test_chunks_of_what_looks_back_under_sequence_parallel(size):
    """The rows inside are those of both processes, and each chunk's outputs are scattered by themselves."""
    true_said, _ = two_steps(0, ("rwkv7",), Plan())
    lean = Plan({"tp": 2}, lean={"mlp_chunk_size": size})
    for said, _ in in_processes(2, two_steps, ("rwkv7",), lean):
        for got, wanted in zip(said, true_said):
            assert got == pytest.approx(wanted, rel=1e-9)


# What is kept


@cache
def kept_bytes(mixer: str, mode: str, T: int = 256, **settings: object) -> float:
    """Of one block, a row and a token, in fp32, on fake tensors."""
    shape = tiny_config(mixer, hidden_size=64, intermediate_size=256)
    meter = Meter(on_meta(shape), T, 64, keeping=Keeping(**settings))
    return meter.part(0, mode, 1).kept / T


@cache
def held_bytes(mode: str, T: int = 256, **settings: object) -> float:
    """The same at its fullest moment, the parameters' gradients included."""
    meter = Meter(
        on_meta(tiny_config("attention", hidden_size=64, intermediate_size=256)),
        T,
        64,
        keeping=Keeping(**settings),
    )
    return meter.part(0, mode, 1).backward_peak(False)


def test_less_is_kept():
    row = 4 * 64  # bytes of a token's hidden state
    assert kept_bytes("attention", "block") == pytest.approx(row, rel=0.01)
    plain, chunked = (
        kept_bytes("attention", "none"),
        kept_bytes("attention", "none", mlp_chunk_size=32),
    )
    assert plain - chunked == pytest.approx(3 * 4 * 256, rel=0.01), "gate, up and their product"
    both = kept_bytes("attention", "attention+mlp")
    assert (
        kept_bytes("attention", "block")
        < both
        < min(kept_bytes("attention", m) for m in ("attention", "mlp"))
    )
    matmuls = kept_bytes("attention", "block", remat=ActivationCheckpoint(policy=("matmuls",)))
    assert kept_bytes("attention", "block") < matmuls < plain
    assert kept_bytes("attention", "none", remat=ActivationCheckpoint(offload=True)) < row
    vanilla, blockwise = (
        kept_bytes("attention", "none", attention=Attention(kind))
        for kind in ("vanilla", "blockwise")
    )
    assert vanilla > plain + 4 * 256 * 4, "T weights of each of 4 heads"
    assert blockwise == plain, "q, k, v, the output and a logsumexp for each head"


def test_less_is_held():
    """Within a block: a chunk's width and a pair's scores instead of the row's."""
    plain = held_bytes("block")
    chunked = held_bytes("block", mlp_chunk_size=32, attention=Attention("blockwise", 32, 32))
    assert chunked < 0.7 * plain
    assert held_bytes("block", attention=Attention("vanilla")) > held_bytes(
        "block", attention=Attention("blockwise", 32, 32)
    )


# What is refused


@pytest.fixture
def compose(tmp_path):
    def composed(shape: dict | None = None, processes: int = 1, **settings: object) -> Run:
        given = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "layer_types": ["attention", "gla"],
            **(shape or {}),
        }
        tables = {"gla": {"num_heads": 2}, "attention": {"num_heads": 4}}
        given |= {name: tables[name] for name in given["layer_types"]}
        (tmp_path / "config.json").write_text(json.dumps(given))
        words = {
            "model.config": tmp_path / "config.json",
            "training.device": "cpu",
            "training.compile": "off",
            **settings,
        }
        return Run.compose(None, {k: str(v) for k, v in words.items()}, world=World(processes))

    return composed


NO_MLP, NO_ATTENTION = {"mlp": "none"}, {"layer_types": ["gla", "gla"]}


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        (NO_MLP, {"activation_checkpoint.mode": "attention+mlp"}, "have no MLP: take attention"),
        (NO_MLP, {"training.mlp_chunk_size": 8}, "have no MLP: leave it out"),
        (
            NO_ATTENTION,
            {"attention.kind": "blockwise"},
            "no layer of this model has softmax attention",
        ),
        (
            {},
            {"attention.kind": "blockwise", "model.kernels": "reference"},
            "set one of them to auto",
        ),
        ({}, {"attention.query_chunk_size": 64}, "set attention.kind = 'blockwise'"),
        (
            {},
            {"attention.kind": "vanilla", "attention.key_chunk_size": 64},
            "set attention.kind = 'blockwise'",
        ),
        ({}, {"attention.kind": "blockwise", "attention.key_chunk_size": 0}, "at least 1"),
        ({}, {"attention.kind": "ring"}, "must be one of auto, vanilla, blockwise"),
        ({}, {"activation_checkpoint.policy": "matmuls"}, "set activation_checkpoint.mode too"),
        (
            {},
            {"activation_checkpoint.policy": "mm,mmm", "activation_checkpoint.mode": "block"},
            "no operation 'mmm'",
        ),
        (
            {},
            {"activation_checkpoint.policy": "nothing,mm", "activation_checkpoint.mode": "block"},
            "choose one",
        ),
        (
            {},
            {
                "activation_checkpoint.policy": "mm",
                "activation_checkpoint.mode": "block",
                "activation_checkpoint.offload": "true",
            },
            "offload is to free",
        ),
        (
            {},
            {
                "activation_checkpoint.policy": "matmuls",
                "activation_checkpoint.mode": "block",
                "training.mlp_chunk_size": 8,
            },
            "is to avoid",
        ),
    ],
)
def test_what_undoes_itself_is_refused(compose, shape, settings, message):
    with pytest.raises(SettingsError, match=message):
        compose(shape, **settings)


def test_what_goes_together_is_taken(compose):
    run = compose(
        **{
            "attention.kind": "blockwise",
            "attention.query_chunk_size": 7,
            "training.mlp_chunk_size": 5,
            "activation_checkpoint.mode": "attention",
            "activation_checkpoint.policy": "matmuls,longfire.attend_blocks",
        }
    )
    state = make_state(run, run.known_model_config.with_vocabulary(258), torch.device("cpu"))
    assert state.model.local_ops.chunks == (7, 1024)
    assert state.model.local_ops.attention.keywords == {"chunks": (7, 1024)}
    assert not unknown_operations(
        ("mm", "aten.mm", "aten::mm", "aten.mm.default", "nothing", "matmuls")
    )


@pytest.mark.parametrize("kind", ["vanilla", "blockwise", "ring_standard", "ring_blockwise"])
def test_each_kind_of_attention_shares_rows(compose, kind):
    """The last number of RingAttention's mesh_dim says ring or not."""
    run = compose(
        processes=4,
        **{"mesh_dim": "1,1,1,4", "attention_type" if "ring" in kind else "attention.kind": kind},
    )
    assert run.degrees["cp"] == 4 and run.attention.kind == kind.removeprefix("ring_").replace(
        "standard", "vanilla"
    )


def test_a_cpu_has_no_other_memory_to_offload_to(compose):
    with pytest.raises(SettingsError, match="where those of a CPU are already: set it to false"):
        run = compose(**{"activation_checkpoint.offload": "true"})
        make_state(
            run,
            run.known_model_config.with_vocabulary(258),
            torch.device("cpu"),
        )


def test_no_method_of_a_layer_is_replaced():
    """What is decided for a block is plain data; the names of its parameters stay."""
    remat = ActivationCheckpoint("attention+mlp", ("matmuls",))
    plain, model = (on_meta(tiny_config("gla", "attention")) for _ in range(2))
    parallelize(model, remat, False, attention=Attention("blockwise"), mlp_chunk_size=4)
    for module in model.modules():
        assert not {"forward", "__call__"} & vars(module).keys()
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]


@pytest.mark.parametrize(
    ("chosen", "recomputed"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"layer_interval": 2}, [1, 3]),
        ({"layer_interval": 5}, [4]),
        ({"layers": (0, 3)}, [0, 3]),
    ],
)
def test_blocks_that_are_recomputed(chosen, recomputed):
    """layer_interval counts as torchtitan's selective_ac_option: n = 2 is the second block, the fourth ..."""
    model = tiny_model(*("attention",) * 5)
    parallelize(model, ActivationCheckpoint("block", **chosen), False)
    untouched = tiny_model("attention").layers[0].execution.block
    found = [
        layer
        for layer, block in model.layers.numbered()
        if type(block.execution.block) is not type(untouched)
    ]
    assert found == recomputed


def layers_recomputed(rank: int) -> list[tuple[int, str]]:
    mesh = Mesh.of_degrees({"pp": 2}, "cpu")
    plan = Plan({"pp": 2})
    model = on_meta(tiny_config("attention", "attention", "attention", "attention"))
    remat = ActivationCheckpoint("block", layers=(2,))
    parallelize(model, remat, False, mesh, Parallelism(**plan.given), 16)
    return [
        (layer, type(block.execution.block).__name__) for layer, block in model.layers.numbered()
    ]


def test_numbers_are_those_of_the_whole_model_under_a_pipeline():
    first, second = in_processes(2, layers_recomputed)
    names = dict(first + second)
    assert sorted(names) == [0, 1, 2, 3]
    assert [layer for layer in names if names[layer] == "Checkpointed"] == [2]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"layers": "0,7"}, "names 7, but the model's blocks are 0 to 2"),
        ({"layers": "0", "layer_interval": "2"}, "leave one out"),
        ({"layer_interval": "9"}, "more than the model's 3 blocks"),
    ],
)
def test_blocks_that_are_not_there_are_refused(chosen, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a long fire " * 100)
    given = {f"activation_checkpoint.{key}": value for key, value in chosen.items()}
    words = {
        "model.hidden_size": "32",
        "model.num_hidden_layers": "3",
        "model.layer_types": "attention",
        "model.attention.num_heads": "2",
        "data.dataset": "text.txt",
        "activation_checkpoint.mode": "block",
    }
    with pytest.raises(SettingsError, match=message):
        Run.compose(None, {**words, **given})


def test_the_planner_counts_the_blocks_that_are_recomputed(tmp_path, monkeypatch):
    """Of two equal blocks one is recomputed: as many FLOPs again, and as many bytes kept, as between none and both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a long fire " * 100)
    words = {
        "model.hidden_size": "64",
        "model.num_hidden_layers": "2",
        "model.layer_types": "attention",
        "model.attention.num_heads": "2",
        "data.dataset": "text.txt",
        "training.seq_len": "256",
    }
    kept, flops = [], []
    for chosen in ({"mode": "none"}, {"mode": "block", "layers": "1"}, {"mode": "block"}):
        given = {f"activation_checkpoint.{key}": value for key, value in chosen.items()}
        run = Run.compose(None, {**words, **given})
        planner = Planner(run, device_of("h100-80gb"), "bfloat16", as_cuda=False)
        plan = planner.of_recipe()
        kept.append(sum(planner.part(plan, layer, 256).kept for layer in (0, 1)))
        flops.append(flops_on(planner, plan, 0))
    assert kept[0] > kept[1] > kept[2] and kept[1] == pytest.approx((kept[0] + kept[2]) / 2)
    assert flops[0] < flops[1] < flops[2]
    assert flops[1] == pytest.approx((flops[0] + flops[2]) / 2)
