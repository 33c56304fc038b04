"""Tensor parallelism changes no loss and no gradient: every mixer, with and without sequence parallel, against one process."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from sets import slow_unless
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from worlds import in_processes

from longfire.config.model_config import ModelConfig
from longfire.config.settings import ActivationCheckpoint
from longfire.data.batch import Batch
from longfire.initialise import build, initialise, keyed_generator
from longfire.loss import loss_sum, losses
from longfire.mixers import MIXERS
from longfire.mixers.attention import Attention
from longfire.model import Model
from longfire.ops.documents import Documents
from longfire.ops.sequence_noise import row_noise
from longfire.parallel.apply import recompilations
from longfire.parallel.mesh import Mesh
from longfire.parallel.remat import save_memory
from longfire.parallel.sharding import local, sharding_of, slices_of
from longfire.parallel.tensor import add_up_partial_gradients, split
from longfire.parallel.tensor_modules import OneHeadLinear
from longfire.parallel.tensor_refusals import refusals

LENGTHS = (
    5,
    37,
    1,
    35,
    2,
)  # documents shorter and longer than a convolution and a chunk; 80 tokens
TOKENS, WORDS = sum(LENGTHS), 97  # no number of processes divides the words
FP64 = {
    "rtol": 1e-9,
    "atol": 1e-9,
}  # relative to each parameter's largest gradient: sums in another order

# with four heads of everything, so that two and four processes can share them
FOUR_HEADS = {
    "attention": {
        "num_heads": 8,
        "num_kv_heads": 4,
        "qk_norm": True,
        "qkv_bias": True,
        "o_bias": True,
    },
    "linear_attention": {"num_heads": 4},
    "retention": {"num_heads": 4},
    "gla": {"num_heads": 4, "use_short_conv": True},
    "gsa": {
        "num_heads": 8,
        "num_kv_heads": 4,
        "num_slots": 6,
        "feature_map": "t2r",
        "use_short_conv": True,
    },
    "hgrn2": {"expand_ratio": 8, "use_short_conv": True},
    "mamba": {"state_size": 6, "dt_rank": 3, "use_bias": True},
    "mamba2": {"head_dim": 16, "state_size": 12, "n_groups": 1},
    "delta_net": {"num_heads": 4, "use_gate": True},
    "gated_delta_net": {"num_heads": 4, "num_v_heads": 8, "head_dim": 4},
    "kda": {"num_heads": 4, "num_v_heads": 8, "head_dim": 4},
    "rwkv7": {
        "head_dim": 8,
        "decay_low_rank_dim": 6,
        "a_low_rank_dim": 5,
        "v_low_rank_dim": 4,
        "gate_low_rank_dim": 7,
    },
}


def model_config_of(*mixers: str, **changes) -> ModelConfig:
    settings = {name: FOUR_HEADS[name] for name in mixers}
    return tiny_config(*mixers, **{"mixers": settings, "initializer_range": 0.2, **changes})


def a_batch(rows: int = 2) -> Batch:
    ids_BT = torch.randint(WORDS, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
    labels_BT = torch.randint(WORDS, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    labels_BT[0, :20] = -100
    of_documents = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)]).expand(rows, -1)
    positions_BT = torch.cat([torch.arange(n) for n in LENGTHS]).expand(rows, -1)
    return Batch(ids_BT, labels_BT, positions_BT, Documents.from_ids(of_documents))


def never_zero(model: Model) -> None:
    """Parameters that begin as zeros hide what lies behind them: they get values, by name and whole shape, as in conftest."""
    for name, parameter in model.named_parameters():
        whole = torch.zeros(shapes_of(model)[name])
        noise = 0.2 * torch.randn(whole.shape, generator=keyed_generator(0, name))
        for box in slices_of(parameter, sharding_of(model, name)):
            here = box.of_local(local(parameter.data))
            here.copy_(here + box.of_whole(noise))


def shapes_of(model: Model) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in Model(model.config).named_parameters()}


def one_process(shape: ModelConfig) -> Model:
    model = build(shape, 0, compute_dtype=torch.float64).double()
    never_zero(model)
    return model


def split_model(
    shape: ModelConfig,
    mesh: Mesh,
    sequence_parallel: bool,
    prepare: Callable[[Model, Mesh], None] | None = None,
) -> Model:
    """As parallel/apply.py makes it: split and prepared on meta, then initialised piece by piece."""
    with torch.device("meta"):
        model = Model(shape, torch.float64).double()
    split(model, mesh, sequence_parallel)
    if prepare is not None:
        prepare(model, mesh)
    model.to_empty(device="cpu")
    if shape.tie_word_embeddings:
        model.head.weight = model.embed.weight
    initialise(model, 0)
    never_zero(model)
    return model


def loss_of(model: Model, batch: Batch, tokens: int | None = None) -> Tensor:
    """Logits of 50 tokens at a time, and dropout where the shape has it."""
    noise_BT = row_noise(0, 0, *batch.ids_BT.shape, "cpu") if model.config.drops else None
    return loss_sum(model, batch, 50, noise_BT) / (tokens or batch.real_tokens())


def compare_gradients(model: Model, true: Model, mesh: Mesh) -> None:
    """Unclipped gradients of the local part against the boxes of the whole model's."""
    parameters, wholes = dict(model.named_parameters()), dict(true.named_parameters())
    assert parameters.keys() == wholes.keys()
    specs = [sharding_of(model, name) for name in parameters]
    assert not any(spec.split and spec.gradient_is_partial for spec in specs)
    add_up_partial_gradients(model, mesh)
    for name, parameter in parameters.items():
        whole, seen = wholes[name].grad, 0
        assert whole.abs().max() > 1e-6, f"{name} has no gradient that could be compared"
        for box in slices_of(parameter, sharding_of(model, name)):
            got, wanted = box.of_local(local(parameter.grad)), box.of_whole(whole)
            torch.testing.assert_close(
                got / whole.abs().max(), wanted / whole.abs().max(), **FP64, msg=name
            )
            seen += got.numel()
        assert seen == local(parameter).numel(), f"the boxes of {name} are all of the local part"


def assert_nothing_is_left_whole(model: Model) -> None:
    """Whatever a mixer or an MLP does not declare as replicated, and the vocabulary, is split."""
    expected = {"embed.weight", *([] if model.config.tie_word_embeddings else ["head.weight"])}
    for layer, block in enumerate(model.layers):
        for place, region in (("mixer", block.mixer), ("mlp", block.mlp)):
            for role, kind in ({} if region is None else region.roles).items():
                named = {
                    n for n, _ in region.named_parameters() if n == role or n.startswith(f"{role}.")
                }
                named = {n for n in named if not (kind.endswith("row") and n.endswith(".bias"))}
                if kind == "replicate" or (kind == "kv_head" and one_kv_head(region)):
                    continue
                expected |= {f"layers.{layer}.{place}.{n}" for n in named}
    whole = {name for name in expected if sharding_of(model, name).split is None}
    assert not whole, f"{whole} should have been split"


def one_kv_head(attention: Attention) -> bool:
    return isinstance(attention.k_proj, OneHeadLinear)


def check(
    rank: int,
    shape: ModelConfig,
    degrees: dict[str, int],
    sequence_parallel: bool,
    prepare: Callable[[Model, Mesh], None] | None = None,
) -> None:
    """Loss and gradients of the split model equal those of one process."""
    mesh, batch = Mesh.of_degrees(degrees, "cpu"), a_batch()
    model, true = split_model(shape, mesh, sequence_parallel, prepare), one_process(shape)
    loss, true_loss = loss_of(model, batch), loss_of(true, batch)
    loss.backward()
    true_loss.backward()
    torch.testing.assert_close(loss.detach(), true_loss.detach(), rtol=1e-12, atol=0)
    compare_gradients(model, true, mesh)
    assert_nothing_is_left_whole(model)


each_mixer = pytest.mark.parametrize("mixer", MIXERS)
with_and_without = pytest.mark.parametrize(
    "sequence_parallel", [False, True], ids=["plain", "sequence"]
)


QUICK_MIXERS = {
    "attention",
    "gla",
    "mamba2",
    "rwkv7",
}  # one of each kind of state and of shared channels
MIXERS_SHARED = [
    (mixer, sequence_parallel) for mixer in MIXERS for sequence_parallel in (False, True)
]


@pytest.mark.parametrize(
    ("mixer", "sequence_parallel"),
    slow_unless(
        lambda mixer, sequence_parallel: sequence_parallel and mixer in QUICK_MIXERS, MIXERS_SHARED
    ),
)
def test_two_processes_share_every_mixer(mixer, sequence_parallel):
    in_processes(2, check, model_config_of(mixer), {"tp": 2}, sequence_parallel)


@each_mixer
@pytest.mark.matrix
def test_four_processes_share_every_mixer(mixer):
    in_processes(4, check, model_config_of(mixer), {"tp": 4}, True)


OTHER_SETTINGS = [
    (
        "mamba2",
        {
            "head_dim": 16,
            "state_size": 12,
            "n_groups": 2,
            "norm_before_gate": True,
            "D_has_hdim": True,
        },
    ),
    (
        "mamba2",
        {"head_dim": 16, "state_size": 12, "n_groups": 2, "rmsnorm": False, "use_bias": True},
    ),
    (
        "attention",
        {"num_heads": 4, "window_size": 9, "rope": "none", "scale_by_inverse_layer": True},
    ),
    (
        "linear_attention",
        {"num_heads": 4, "num_kv_heads": 2, "norm_feature_map": True, "feature_map": "hedgehog"},
    ),
    ("retention", {"num_heads": 4, "num_kv_heads": 2, "use_output_gate": False}),
    ("gla", {"num_heads": 4, "num_kv_heads": 2, "elementwise_affine": False}),
    ("gsa", {"num_heads": 4, "feature_map": "relu", "elementwise_affine": False}),
    ("hgrn2", {"expand_ratio": 8, "use_lower_bound": False, "elementwise_affine": False}),
    (
        "delta_net",
        {
            "num_heads": 4,
            "use_beta": False,
            "use_short_conv": False,
            "qk_norm": "sum",
            "qk_activation": "elu",
        },
    ),
    ("gated_delta_net", {"num_heads": 4, "head_dim": 8, "use_gate": False}),
    ("kda", {"num_heads": 4, "head_dim": 4, "lower_bound": -5.0, "safe_gate": True}),
]


@pytest.mark.parametrize(
    ("mixer", "settings"),
    slow_unless(lambda mixer, settings: mixer in ("gsa", "kda"), OTHER_SETTINGS),
)
def test_two_processes_share_what_other_settings_make(mixer, settings):
    in_processes(2, check, model_config_of(mixer, mixers={mixer: settings}), {"tp": 2}, True)


KV_HEADS = [
    # processes, query heads, key/value heads
    (2, 4, 1),
    (4, 8, 2),
    (4, 4, 1),
]


@pytest.mark.parametrize(
    ("tp", "heads", "kv_heads", "sequence_parallel"),
    slow_unless(
        lambda tp, heads, kv_heads, sequence_parallel: tp == 4 and kv_heads == 2,
        [(*counts, sequence) for counts in KV_HEADS for sequence in (False, True)],
    ),
)
def test_several_processes_make_one_key_value_head(tp, heads, kv_heads, sequence_parallel):
    given = {"num_heads": heads, "num_kv_heads": kv_heads, "qk_norm": True, "qkv_bias": True}
    shape = model_config_of("attention", mixers={"attention": given})
    in_processes(tp, check, shape, {"tp": tp}, sequence_parallel)


BLOCKS = {
    "post": {"block": "post", "norm": "layernorm", "mlp": "gelu", "mlp_bias": True},
    "parallel": {"block": "parallel", "mlp": "relu2", "mlp_bias": True, "norm_affine": False},
    "parallel_tied": {"block": "parallel_tied", "mlp_bias": True, "embed_norm": True},
    "no mlp, learned positions": {
        "mlp": "none",
        "learned_positions": True,
        "max_position_embeddings": 40,
    },
    "tied": {"tie_word_embeddings": True, "vocab_size": 98},
    "dropout": {"dropout": 0.2, "embed_dropout": 0.2},
}


BLOCKS_SHARED = [
    (block, sequence_parallel) for block in BLOCKS for sequence_parallel in (False, True)
]


@pytest.mark.parametrize(
    ("block", "sequence_parallel"),
    slow_unless(
        lambda block, sequence_parallel: sequence_parallel and block in ("tied", "dropout"),
        BLOCKS_SHARED,
    ),
)
def test_every_block(block, sequence_parallel):
    shape = model_config_of("gla", "attention", **BLOCKS[block])
    in_processes(2, check, shape, {"tp": 2}, sequence_parallel)


@with_and_without
def test_the_noise_of_attention_weights_is_that_of_the_head(sequence_parallel):
    shape = model_config_of("attention", mixers={"attention": {"num_heads": 4, "dropout": 0.3}})
    in_processes(2, check, shape, {"tp": 2}, sequence_parallel)


@pytest.mark.slow
def test_a_hybrid_in_four_processes():
    """Layers that share what one of them makes (rwkv7's values, hgrn2's bounds) with others between them."""
    shape = model_config_of(
        "rwkv7", "hgrn2", "attention", "rwkv7", mlp="channel_mix", tie_word_embeddings=True
    )
    in_processes(4, check, shape, {"tp": 4}, True)


def recomputing(model: Model, mesh: Mesh, modes: tuple[str, ...]) -> None:
    for block in model.layers:
        for mode in modes:
            save_memory(block, ActivationCheckpoint(mode))


RECOMPUTED = [
    (modes, sequence) for modes in (("block",), ("mlp", "attention")) for sequence in (False, True)
]


@pytest.mark.parametrize(
    ("modes", "sequence_parallel"),
    slow_unless(lambda modes, sequence_parallel: sequence_parallel and len(modes) == 2, RECOMPUTED),
)
def test_what_is_computed_again_crosses_again(modes, sequence_parallel):
    shape = model_config_of("rwkv7", "hgrn2", "mamba")
    in_processes(2, check, shape, {"tp": 2}, sequence_parallel, partial(recomputing, modes=modes))


def compiling(model: Model, mesh: Mesh, backend: str) -> None:
    for block in model.layers:
        block.compile(dynamic=False, backend=backend)


def compiled(rank: int, shape: ModelConfig, sequence_parallel: bool, backend: str) -> int:
    """Graphs that were made here. (A forked process has those of its parent, and goes on counting from them.)"""
    torch.compiler.reset()
    before = recompilations()
    check(rank, shape, {"tp": 2}, sequence_parallel, partial(compiling, backend=backend))
    return recompilations() - before


@pytest.mark.parametrize(
    ("mixer", "backend"),
    [
        pytest.param("gla", "aot_eager", marks=pytest.mark.slow),
        pytest.param("gla", "inductor", marks=pytest.mark.slow),
        pytest.param("hgrn2", "inductor", marks=pytest.mark.matrix),
    ],
)
def test_compiled_blocks(mixer, backend):
    """One graph for all layers, as in one process."""
    assert in_processes(
        2, compiled, model_config_of(mixer), True, backend, timeout_seconds=900
    ) == [1, 1]


def sharding(model: Model, mesh: Mesh) -> None:
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh.device_mesh["dp_shard"])
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded(rank: int, shape: ModelConfig, sequence_parallel: bool) -> None:
    """Each shard of the data has rows of its own; the sums of both are the whole batch's."""
    mesh = Mesh.of_degrees({"dp_shard": 2, "tp": 2}, "cpu")
    model, true, batch = (
        split_model(shape, mesh, sequence_parallel, sharding),
        one_process(shape),
        a_batch(),
    )
    mine = batch.split(2)[mesh.rank("dp_shard")]
    loss = loss_of(model, mine, batch.real_tokens())
    loss.backward()
    true_loss = loss_of(true, batch, batch.real_tokens())
    true_loss.backward()
    torch.testing.assert_close(
        mesh.sum(loss.detach(), "dp_shard"), true_loss.detach(), rtol=1e-12, atol=0
    )
    compare_gradients(model, true, mesh)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for box in slices_of(parameter, sharding_of(model, name)):
                assert torch.equal(
                    box.of_local(local(parameter)), box.of_whole(true.get_parameter(name))
                ), name


SHARDED = [
    (mixers, sequence)
    for mixers in (("attention",), ("mamba", "hgrn2"))
    for sequence in (False, True)
]


@pytest.mark.parametrize(
    ("mixers", "sequence_parallel"),
    slow_unless(lambda mixers, sequence_parallel: sequence_parallel and len(mixers) == 2, SHARDED),
)
def test_sharded_and_shared(mixers, sequence_parallel):
    in_processes(4, sharded, model_config_of(*mixers), sequence_parallel)


def evaluated(rank: int, shape: ModelConfig, sequence_parallel: bool) -> None:
    mesh = Mesh.of_degrees({"tp": 2}, "cpu")
    model, true, batch = split_model(shape, mesh, sequence_parallel), one_process(shape), a_batch()
    (nats, greedy), (true_nats, true_greedy) = (losses(m, batch, 50) for m in (model, true))
    torch.testing.assert_close(nats, true_nats, rtol=1e-10, atol=0)
    assert torch.equal(greedy, true_greedy)
    assert model.flops_per_token(TOKENS) == true.flops_per_token(TOKENS)
    with torch.no_grad():
        logits, true_logits = (m.logits(m(batch.ids_BT)) for m in (model, true))
    torch.testing.assert_close(logits, true_logits)


@pytest.mark.parametrize("sequence_parallel", [pytest.param(False, marks=pytest.mark.slow), True])
def test_losses_of_tokens_and_logits_are_those_of_one_process(sequence_parallel):
    in_processes(2, evaluated, model_config_of("gla", "attention"), sequence_parallel)


def half_precision(rank: int, shape: ModelConfig) -> tuple[float, float]:
    mesh, batch = Mesh.of_degrees({"tp": 2}, "cpu"), a_batch()
    with torch.device("meta"):
        model = Model(shape, torch.bfloat16)
    split(model, mesh, True)
    model.to_empty(device="cpu")
    initialise(model, 0)
    loss = loss_of(model, batch)
    loss.backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )
    return loss.item(), loss_of(build(shape, 0, compute_dtype=torch.bfloat16), batch).item()


def test_bf16_activations_cross_too():
    """8 bits of mantissa: the parts of a sum are rounded before they are added."""
    (loss, true), _ = in_processes(2, half_precision, model_config_of("gla", "attention"))
    assert loss == pytest.approx(true, rel=2**-8)


def refused(shape: ModelConfig, tp: int, seq_len: int = 64) -> str:
    with torch.device("meta"):
        return "\n".join(refusals(Model(shape), tp, True, seq_len))


def check_the_pages_mixer(rank: int) -> None:
    """The mixer of docs/mixers.md, as its reader would write it."""
    page = (Path(__file__).parents[1] / "docs" / "mixers.md").read_text(encoding="utf-8")
    scope: dict = {"__name__": "my_mixer"}
    exec(page.split("```python\n")[1].split("```")[0], scope)
    MIXERS.update(scope["MIXERS"])
    shape = replace(
        model_config_of("gla"),
        layer_types=("decayed_sum",),
        mixers={"decayed_sum": {"num_heads": 4}},
    )
    assert refused(shape, 2) == ""
    check(rank, shape, {"tp": 2}, True)


def test_the_mixer_of_the_page_is_shared_by_what_it_declares():
    in_processes(2, check_the_pages_mixer)
