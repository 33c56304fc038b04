"""Which matrices multiply 8-bit numbers, and that plans change the steps of such a model only where docs/parallelism.md says so.

In float64: two sums in another order differ by 1e-16, so that hardly one number of 1e10 is rounded to another 8-bit one.
"""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from plans import HYBRID, PLANS, Plan, parts, state_of, steps, whole
from sets import slow_unless
from worlds import in_processes

from longfire.config.settings import ActivationCheckpoint, Float8
from longfire.mixers import MIXERS
from longfire.model import on_meta
from longfire.ops.float8 import RECIPES
from longfire.ops.linear import Linear
from longfire.parallel.apply import parallelize
from longfire.parallel.float8_layers import choose_matrices, refusals
from longfire.parallel.mesh import ALONE, Mesh

EMULATED = Float8(enable_float8_linear=True, emulate=True)
SHAPE = {"hidden_size": 64, "intermediate_size": 128}
# Whatever the plan, since a token's numbers share scales with no other token's
OF_TOKENS = "rowwise_with_gw_hp"


def trained(
    plan: Plan,
    recipe: str,
    mesh: Mesh = ALONE,
    microbatches: int = 2,
    mixers: tuple[str, ...] = HYBRID,
):
    """Two steps in float64: what they say, and everything on this process."""
    plan = replace(plan, lean={"float8": replace(EMULATED, recipe_name=recipe)})
    state = state_of(mixers, plan, mesh, torch.float64, **SHAPE)
    return steps(state, 2, microbatches=microbatches), parts(state)


def in_a_world(rank: int, plan: Plan, recipe: str, mixers: tuple[str, ...]):
    return trained(plan, recipe, Mesh.of_degrees(plan.degrees, "cpu"), mixers=mixers)


def assert_steps_of_one_process(
    plan: Plan,
    recipe: str,
    microbatches: int = 2,
    mixers: tuple[str, ...] = HYBRID,
) -> None:
    """microbatches: into which the one process cuts a step; each of the others cuts its own into 2."""
    said, held = trained(PLANS["one"], recipe, microbatches=microbatches, mixers=mixers)
    answers = in_processes(plan.processes, in_a_world, plan, recipe, mixers)
    for theirs, _ in answers:
        for got, wanted in zip(theirs, said, strict=True):
            assert got == pytest.approx(wanted, rel=1e-9)
    for name, numbers in whole([here for _, here in answers], held).items():
        wanted = held[name][0][1]
        within = {"rtol": 1e-9, "atol": 1e-9 * wanted.abs().max().item()}
        torch.testing.assert_close(
            numbers, wanted, **within, msg=lambda m, name=name: f"{name}: {m}"
        )


def names_and_roles(*mixers: str, settings: Float8 = EMULATED, **changes) -> dict[str, str]:
    return choose_matrices(on_meta(tiny_config(*mixers, **SHAPE | changes)), settings).chosen


def test_matrices_are_chosen_by_role_and_size():
    model = on_meta(tiny_config("gla", "attention", **SHAPE))
    choice = choose_matrices(model, EMULATED)
    of_gla = {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "g_proj": "column",
        "gk_proj.1": "column",
        "o_proj": "row",
    }
    of_attention = {
        "q_proj": "column",
        "k_proj": "kv_head",
        "v_proj": "kv_head",
        "o_proj": "row",
    }
    of_mlp = {"gate_proj": "column", "up_proj": "column", "down_proj": "row"}
    expected: dict[str, str] = {}
    for layer, mixer in enumerate((of_gla, of_attention)):
        expected |= {f"layers.{layer}.mixer.{name}": role for name, role in mixer.items()}
        expected |= {f"layers.{layer}.mlp.{name}": role for name, role in of_mlp.items()}
    assert choice.chosen == expected
    assert choice.left_out == {"head": "head", "layers.0.mixer.gk_proj.0": "replicate"}
    assert choice.describe(EMULATED) == (
        "16 of 18 matrices (tensorwise, emulated: 8-bit numbers are multiplied in fp32): "
        "10 column, 4 row, 2 kv_head; others: 1 replicate, 1 head"
    )


def test_gates_of_few_heads_and_matrices_that_a_setting_names_are_left_out():
    names = names_and_roles("gated_delta_net")
    assert "layers.0.mixer.q_proj" in names
    assert "layers.0.mixer.b_proj" not in names, "a number for each of 2 heads"
    filtered = replace(EMULATED, filter_fqns=("q_proj", "layers.1."))
    fewer = names_and_roles("gated_delta_net", settings=filtered)
    assert set(fewer) == {
        name for name in names if "q_proj" not in name and not name.startswith("layers.1.")
    }
    assert names_and_roles("gla", settings=Float8()) == {}


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_trains_with_the_chosen_matrices_and_no_others(mixer):
    """One step in which the chosen ones, and only they, are those that multiply 8-bit numbers."""
    plan = Plan(lean={"float8": EMULATED})
    changes = {"hidden_size": 64, "intermediate_size": 64}
    state = state_of((mixer, mixer), plan, ALONE, **changes)
    chosen = names_and_roles(mixer, **changes)
    assert len(chosen) >= 4
    modules = dict(state.model.named_modules())
    using = {n for n, m in modules.items() if isinstance(m, Linear) and m.float8 is not None}
    assert using == set(chosen)
    (numbers,) = steps(state, 1)
    plain = state_of((mixer, mixer), PLANS["one"], ALONE, **changes)
    (without,) = steps(plain, 1)
    assert numbers["grad_norm"] != without["grad_norm"]
    assert numbers["loss"] == pytest.approx(without["loss"], rel=0.02)


@pytest.mark.parametrize(
    ("recipe", "plan"),
    slow_unless(
        lambda recipe, plan: (
            (recipe, plan) in {("tensorwise", "tp 2, sequence"), ("rowwise", "tp 2")}
        ),
        [(recipe, plan) for recipe in RECIPES for plan in ("tp 2", "tp 2, sequence")],
    ),
)
def test_tensor_parallelism_changes_no_step(recipe, plan):
    """Scales are those of whole matrices, and of whole rows."""
    assert_steps_of_one_process(PLANS[plan], recipe)


@pytest.mark.parametrize(
    ("recipe", "plan"),
    slow_unless(
        lambda recipe, plan: (recipe, plan) == ("rowwise", "cp 2"),
        [(recipe, plan) for recipe in RECIPES for plan in ("cp 2", "pp 2", "cp 2 x tp 2")],
    ),
)
def test_processes_that_share_sequences_or_layers_change_no_step(recipe, plan):
    """The scales of tokens are those of whole sequences. (In a zigzag, which needs no padding here: what a sequence is padded with
    has a part in scales.)"""
    of_axes = PLANS[plan]
    if "cp" in of_axes.degrees:
        of_axes = replace(of_axes, given={"context_parallel_layout": "zigzag"})
    assert_steps_of_one_process(of_axes, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "rwkv7", "kda", "hgrn2", "gsa"])
def test_tensor_parallelism_of_other_mixers(mixer):
    assert_steps_of_one_process(PLANS["tp 2, sequence"], "tensorwise", mixers=(mixer, mixer))


@pytest.mark.parametrize(
    "plan",
    [
        "fsdp 2",
        pytest.param("fsdp 2 x tp 2", marks=pytest.mark.slow),
        pytest.param("hsdp 2x2", marks=pytest.mark.slow),
    ],
)
def test_no_plan_changes_a_step_where_each_token_has_its_scales(plan):
    """Nor does another number of micro-batches."""
    assert_steps_of_one_process(PLANS[plan], OF_TOKENS, microbatches=4)


@pytest.mark.parametrize("recipe", ["tensorwise", pytest.param("rowwise", marks=pytest.mark.slow)])
def test_other_recipes_have_the_scales_of_a_micro_batch_of_a_process(recipe):
    """2 processes with 2 micro-batches each are one process with these 4, and not one with 2 of twice the size."""
    assert_steps_of_one_process(PLANS["fsdp 2"], recipe, microbatches=4)
    two, _ = trained(PLANS["one"], recipe, microbatches=2)
    four, _ = trained(PLANS["one"], recipe, microbatches=4)
    assert two[0]["grad_norm"] != pytest.approx(four[0]["grad_norm"], rel=1e-9)


@pytest.mark.parametrize("remat", ["block", "attention+mlp"])
def test_recomputation_changes_no_bit(remat):
    said, held = trained(PLANS["one"], "tensorwise")
    again, held_again = trained(Plan(remat=remat), "tensorwise")
    assert again == said
    for name, ((_, numbers),) in held.items():
        assert torch.equal(held_again[name][0][1], numbers), name


@pytest.mark.slow
def test_compiled_blocks_take_the_same_steps():
    said, _ = trained(PLANS["one"], "tensorwise", mixers=("attention",))
    compiled, _ = trained(Plan(compiled=True), "tensorwise", mixers=("attention",))
    for got, wanted in zip(compiled, said, strict=True):
        assert got == pytest.approx(wanted, rel=1e-9)


@pytest.mark.slow
def test_compiled_blocks_of_two_processes_take_the_same_steps():
    plan = replace(PLANS["tp 2, sequence"], compiled=True)
    assert_steps_of_one_process(plan, "tensorwise", mixers=("attention",))


def test_nothing_of_float8_is_in_the_state():
    """Checkpoints and exports hold the names and types of a model without it."""
    model = on_meta(tiny_config(*HYBRID, **SHAPE))
    like = {name: (p.shape, p.dtype) for name, p in model.state_dict().items()}
    parallelize(model, ActivationCheckpoint(), False, float8=EMULATED)
    assert {name: (p.shape, p.dtype) for name, p in model.state_dict().items()} == like


def refused(*mixers: str, tp: int = 1, settings: Float8 = EMULATED, **changes) -> str:
    model = on_meta(tiny_config(*mixers, **SHAPE | changes))
    return "\n".join(refusals(model, settings, tp))


def test_what_cannot_be_done_is_refused_with_the_fix():
    assert refused("attention") == ""
    head = replace(EMULATED, filter_fqns=("output", "lm_head", "head"))
    assert refused("attention", settings=head) == ""
    unknown = replace(EMULATED, filter_fqns=("wq",))
    assert "no matrix has 'wq' in its name" in refused("attention", settings=unknown)
    automatic = replace(EMULATED, filter_fqns=("auto_filter_small_kn",))
    assert "nobody has measured here" in refused("attention", settings=automatic)
    odd = refused("attention", hidden_size=40, intermediate_size=72)
    assert "no matrix of this model can multiply 8-bit numbers" in odd
    split = refused("attention", tp=2, intermediate_size=144)
    assert "leaves 72 of the 144 channels of a column matrix" in split
    filtered = replace(EMULATED, filter_fqns=("mlp", "k_proj", "v_proj"))
    assert refused("attention", tp=2, settings=filtered, intermediate_size=144) == ""
