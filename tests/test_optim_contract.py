"""The contract of an optimizer: one from a plugin trains, is planned, resumed, and refused where no test proves it."""

from pathlib import Path

import muon
import pytest
import torch
from conftest import tiny_config
from muon import Muon, orthogonal
from plans import CPU, PLANS, state_of, steps
from safetensors.torch import load_file
from worlds import in_processes

from longfire import plugins
from longfire.checkpoint.saving import Checkpoints
from longfire.cli import main
from longfire.config import settings
from longfire.config.run import Run
from longfire.errors import CheckpointError, SettingsError
from longfire.initialise import build
from longfire.launch import World
from longfire.optim import OPTIMIZERS, make_optimizer, roles, rule_of, update_averages
from longfire.optim.contract import Needs, OptimizerRule, StateTensor, Update
from longfire.optim.refusals import refusals
from longfire.parallel.cost import device_of
from longfire.parallel.mesh import ALONE, Mesh
from longfire.planner.planner import Planner

RECIPE = """
[model]
hidden_size = 32
num_hidden_layers = 2
layer_types = ["gla", "attention"]
intermediate_size = 48
vocab_size = 300
compute_dtype = "float32"
[model.gla]
num_heads = 2
[model.attention]
num_heads = 2
[data]
dataset = ["text.txt"]
folder = "stores"
validation_fraction = 0.0
[tokenizer]
path = "bytes"
[training]
seq_len = 32
batch_size = 2
steps = 4
compile = "off"
threads = 1
[optimizer]
lr = 1e-2
[checkpoint]
interval = 2
[eval]
at_end = false
[metrics]
report = false
"""
PLUGIN = ("--model.plugins", muon.__file__, "--optimizer.name", "Muon")


@pytest.fixture(autouse=True)
def known_optimizers(monkeypatch):
    """Each test begins with the optimizers of longfire, and with no plugin."""
    monkeypatch.setattr(plugins, "_loaded", {})
    ours = dict(OPTIMIZERS)
    yield
    OPTIMIZERS.clear()
    OPTIMIZERS.update(ours)


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("".join(f"number {i} is {i * i}. " for i in range(500)))
    return tmp_path / "recipe.toml"


def compose(recipe: Path, *words: str, processes: int = 1) -> Run:
    given = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2])}
    return Run.compose(recipe, given, world=World(processes))


def saved(run: str, step: int) -> dict[str, torch.Tensor]:
    files = sorted(Path(run, "checkpoints", f"step-{step}").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_an_optimizer_of_a_plugin_trains_and_resumes_to_the_bit(recipe):
    train = ["train", str(recipe), *PLUGIN, "--optimizer.options", "momentum=0.9,iterations=4"]
    assert main([*train, "--job.dump_folder", "whole"]) == 0
    halves = [*train, "--job.dump_folder", "halves", "--lr_scheduler.name", "constant"]
    whole = [*train, "--job.dump_folder", "constant", "--lr_scheduler.name", "constant"]
    assert main(whole) == main([*halves, "--training.steps", "2"]) == main(halves) == 0
    ours, theirs = saved("halves", 4), saved("constant", 4)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    of_matrix = {name for name in ours if name.endswith("/layers.1.mixer.q_proj.weight")}
    assert {name.split("/")[1] for name in of_matrix} == {
        "momentum_buffer",
        "layers.1.mixer.q_proj.weight",
    }
    assert "optimizer/exp_avg/embed.weight" in ours
    assert not saved("whole", 4)["model/embed.weight"].equal(ours["model/embed.weight"])


def test_its_steps_are_those_of_torchs_own_classes(recipe):
    """torch.optim.Muon (whose Newton-Schulz is in bfloat16) for matrices, torch.optim.AdamW for the rest."""
    OPTIMIZERS["Muon"] = Muon
    chosen = settings.Optimizer(name="Muon", lr=1e-2)
    ours, theirs = (build(tiny_config("gla", "attention"), 0) for _ in range(2))
    optimizer = make_optimizer(ours, chosen, CPU)
    by_role = roles(theirs)
    matrices = [p for p, role in by_role.items() if role == "matrix" and p.dim() == 2]
    decaying = [
        p
        for p, role in by_role.items()
        if role == "head" or (role == "matrix" and p.dim() != 2)  # a short convolution's weight
    ]
    rest = [p for p, role in by_role.items() if role in ("embedding", "other")]
    assert matrices and rest and decaying
    before = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    others = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(decaying, 1e-2, (0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW(rest, 1e-2, (0.9, 0.95), weight_decay=0.0),
    ]
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        for one, two in zip(ours.parameters(), theirs.parameters()):
            one.grad = torch.randn(one.shape, generator=draw)
            two.grad = one.grad.clone()
        for each in (optimizer, *others):
            each.step()
    for (name, one), (_, two) in zip(ours.named_parameters(), theirs.named_parameters()):
        moved = (two - before[name]).norm()
        # bf16 rounds to 2^-8, in each of the three products of five iterations
        within = 15 * 2**-8 if any(two is matrix for matrix in matrices) else 1e-5
        assert (one - two).norm() < within * moved, name


def test_newton_schulz_bends_singular_values_alone():
    """The quintic of a matrix is that of its singular values, in float64."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 4, dtype=torch.float64, generator=draw)
    left, values, right = torch.linalg.svd(matrix / (matrix.norm() + 1e-7), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonal(matrix, 5), left @ values.diag() @ right)
    assert 0.6 < values.min() < values.max() < 1.3


BYTES_OF_A_PARAMETER = {
    ("AdamW",): 8,
    ("Adam",): 8,
    ("AdamW", "--optimizer.momentum_dtype", "bfloat16"): 6,
    ("AdamW", "--optimizer.ema_decay", "0.9"): 12,
    ("SGD", "--optimizer.options", "momentum=0.9"): 4,
    ("LAMB",): 8,
    ("Adafactor", "--optimizer.options", "factored=false,momentum=0.9"): 8,
    ("Muon",): None,
}


@pytest.mark.parametrize("words", BYTES_OF_A_PARAMETER)
def test_the_planner_counts_the_bytes_that_a_real_step_keeps(words, recipe):
    OPTIMIZERS["Muon"] = Muon
    run = compose(recipe, "--optimizer.name", *words)
    planner = Planner(run, device_of("h100-80gb"), "float32", as_cuda=False)
    shape = run.model_config.with_vocabulary(run.vocab_size)
    model = build(shape, 0)
    optimizer = make_optimizer(model, run.optimizer, CPU)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    update_averages(optimizer)
    kept = [value for of_one in optimizer.state.values() for value in of_one.values()]
    counted = planner.peak(planner.of_recipe()).optimizer
    assert counted == sum(tensor.nbytes for tensor in kept if tensor.dim())
    numbers = sum(parameter.numel() for parameter in model.parameters())
    each = BYTES_OF_A_PARAMETER[words]
    assert counted == each * numbers if each else 4 * numbers < counted < 8 * numbers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--parallelism.tensor_parallel_degree", "2"),
            "optimizer.name = 'Muon' needs each matrix whole, but parallelism.tensor_parallel_degree = 2 cuts parameters into "
            "parts: set it to 1, or take optimizer.name = 'AdamW'",
        ),
        (
            ("--parallelism.data_parallel_shard_degree", "2"),
            "optimizer.name = 'Muon' needs each matrix whole, but parallelism.data_parallel_shard_degree = 2 cuts parameters into "
            "parts: replicate the model (parallelism.data_parallel_replicate_degree), or take optimizer.name = 'AdamW'",
        ),
        ((), "parallelism.data_parallel_shard_degree = -1 (2 processes) cuts parameters"),
        (
            ("--parallelism.mesh_dim", "1,2,1,1"),
            "mesh_dim = '1,2,1,1' (data_parallel_shard_degree)",
        ),
        (("--parallelism.context_parallel_degree", "2"), "context_parallel_degree = 2 cuts"),
        (
            ("--parallelism.pipeline_parallel_degree", "2"),
            "optimizer.name = 'Muon' has no test that proves it with parallelism.pipeline_parallel_degree = 2: set it to 1, or",
        ),
    ],
)
def test_a_plan_without_a_test_is_refused(words, message, recipe):
    OPTIMIZERS["Muon"] = Muon
    with pytest.raises(SettingsError) as error:
        compose(recipe, "--optimizer.name", "Muon", *words, processes=2)
    assert message in str(error.value)
    compose(recipe, "--optimizer.name", "AdamW", *words, processes=2)
    with_replicas = ("--parallelism.data_parallel_replicate_degree", "2")
    compose(recipe, "--optimizer.name", "Muon", *with_replicas, processes=2)


def test_what_needs_rows_is_refused_where_rows_are_cut(monkeypatch):
    class ByRows(Muon):
        updates = (Update("rows", Needs.ROWS, ()),)

    monkeypatch.setitem(OPTIMIZERS, "ByRows", ByRows)
    chosen = settings.Optimizer(name="ByRows")
    (tensors,) = refusals(chosen, {"tp": "the degree of tensors"})
    assert "needs each row of a matrix whole, but the degree of tensors cuts" in tensors
    (shards,) = refusals(chosen, {"dp_shard": "the degree of shards"})
    assert "has no test that proves it with the degree of shards" in shards


def test_the_planner_proposes_no_plan_that_training_refuses(recipe):
    OPTIMIZERS["Muon"] = Muon
    replicas = ("--parallelism.data_parallel_replicate_degree", "2")
    run = compose(recipe, "--optimizer.name", "Muon", *replicas, processes=2)
    plans = list(Planner(run, device_of("h100-80gb")).candidates())
    assert plans and all(plan.mesh == (1, 2, 1, 1, 1) for plan in plans)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path, tiny_model):
    OPTIMIZERS["Muon"] = Muon
    checkpoints = Checkpoints(tmp_path, settings.Checkpoint(async_mode="disabled"))
    trained = state_of(("attention",), PLANS["one"], ALONE)
    steps(trained, 1)
    checkpoints.save(trained)
    other = settings.Optimizer(name="Muon", lr=1e-3)
    state = state_of(("attention",), PLANS["one"], ALONE, optimizer=other)
    before = state.model.embed.weight.clone()
    with pytest.raises(
        CheckpointError, match="is of another optimizer: it keeps exp_avg, exp_avg_"
    ):
        checkpoints.restore(state)
    assert state.model.embed.weight.equal(before), "nothing was read"
    adam = state_of(("attention",), PLANS["one"], ALONE, optimizer=settings.Optimizer(name="Adam"))
    assert checkpoints.restore(adam), "Adam keeps what AdamW keeps"


class Counting(torch.optim.Optimizer):
    """SGD that counts the steps of each row, in a tensor that has not the shape of the parameter."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                rows = torch.zeros(3, 5)
                self.state[parameter].setdefault("of_rows", rows).add_(1)
                parameter.sub_(parameter.grad, alpha=group["lr"])


class CountingRule(OptimizerRule):
    updates = (Update("sgd", Needs.NUMBERS, (StateTensor("of_rows", like_parameter=False),)),)

    def make(self, groups, device):
        return Counting(groups, {"lr": 0.1})


def test_state_of_another_shape_is_kept_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "Counting", CountingRule)
    chosen = settings.Optimizer(name="Counting", lr=1e-3)
    checkpoints = Checkpoints(tmp_path, settings.Checkpoint(async_mode="disabled"))
    one, two = (state_of(("attention",), PLANS["one"], ALONE, optimizer=chosen) for _ in range(2))
    steps(one, 2)
    checkpoints.save(one)
    assert checkpoints.restore(two)
    for parameter in two.model.parameters():
        assert two.optimizer.state[parameter]["of_rows"].equal(torch.full((3, 5), 2.0))


def test_state_that_is_not_declared_is_refused(tmp_path, monkeypatch):
    class Forgetful(CountingRule):
        updates = (Update("sgd", Needs.NUMBERS, (StateTensor("momentum"),)),)

    monkeypatch.setitem(OPTIMIZERS, "Forgetful", Forgetful)
    chosen = settings.Optimizer(name="Forgetful", lr=1e-3)
    state = state_of(("attention",), PLANS["one"], ALONE, optimizer=chosen)
    steps(state, 1)
    with pytest.raises(CheckpointError, match=r"keeps 'of_rows'.*declares tensors named momentum"):
        Checkpoints(tmp_path, settings.Checkpoint()).save(state)


def whole_state_written(rank: int) -> set[str]:
    mesh = Mesh.of_degrees({"dp_shard": 2}, "cpu")
    chosen = settings.Optimizer(name="Counting", lr=1e-3)
    state = state_of(("attention",), PLANS["fsdp 2"], mesh, optimizer=chosen)
    steps(state, 1)
    written = state.written()
    assert all(part.shape == (3, 5) for name, part in written.items() if "/of_rows/" in name)
    return {name for name in written if name.startswith("optimizer/")}


@pytest.mark.slow
def test_state_of_another_shape_is_written_by_one_process(monkeypatch, tiny_model):
    monkeypatch.setitem(OPTIMIZERS, "Counting", CountingRule)
    first, second = in_processes(2, whole_state_written)
    names = [name for name, _ in tiny_model("attention").named_parameters()]
    assert first == {f"optimizer/of_rows/{name}" for name in names} and not second


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--optimizer.name", "AdamX"),
            "'AdamX' must be one of AdamW, Adam, SGD, LAMB, Adafactor (did you mean 'Adam",
        ),
        (("--optimizer.name", "Muon"), "or be brought by a file of model.plugins"),
        (
            ("--optimizer.options", "a=1"),
            "'a=1' is no option of optimizer.name = 'AdamW'; its options: none",
        ),
    ],
)
def test_what_is_wrong_with_a_setting_is_said(words, message, recipe):
    with pytest.raises(SettingsError) as error:
        compose(recipe, *words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("momentum",), "'momentum' must be written as name=value"),
        (("momentun=0.9",), "(did you mean 'momentum'?); its options: momentum, iterations"),
        (("momentum=1",), "'momentum=1' must lie in [0, 1)"),
        (("iterations=2.5",), "'iterations=2.5' must be a whole number"),
        (("momentum=0.5", "momentum=0.6"), "is the second value of momentum"),
    ],
)
def test_options_are_strict(options, message):
    OPTIMIZERS["Muon"] = Muon
    with pytest.raises(SettingsError) as error:
        rule_of(settings.Optimizer(name="Muon", options=options))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("OPTIMIZERS = [1]", "OPTIMIZERS must be a table"),
        (
            "OPTIMIZERS = {'mine': 3}",
            "is no class derived from longfire.optim.contract.OptimizerRule",
        ),
        (
            "from longfire.optim.adam import Adam\nOPTIMIZERS = {'Adam': Adam}",
            "there is an optimizer of this name",
        ),
    ],
)
def test_what_is_wrong_with_a_plugin_is_named(code, message, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(SettingsError) as error:
        plugins.load_plugins((str(tmp_path / "mine.py"),))
    assert message in str(error.value) and "mine.py" in str(error.value)
