"""MLPs as second mixers: one for each layer, settings of their own, and one of a plugin (mixture.py)
with an auxiliary loss and a buffer, through the command line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mixture
import pytest
import torch
from mixture import Mixture
from plans import Plan, state_of, steps
from safetensors import safe_open
from worlds import in_processes

from longfire import plugins
from longfire.cli import main
from longfire.config.model_config import ModelConfig
from longfire.config.own_keys import read_own_keys
from longfire.config.settings import ActivationCheckpoint
from longfire.data.batches import Batch
from longfire.errors import SettingsError
from longfire.initialise import build
from longfire.loss import loss_sum, losses
from longfire.mixers.mixer import Sequence
from longfire.mlps import MLPS
from longfire.mlps.auxiliary import update_buffers
from longfire.parallel.mesh import ALONE, Mesh
from longfire.parallel.remat import save_memory

CONFIG = ModelConfig(
    16,
    2,
    ("attention",),
    {"attention": {"num_heads": 2}},
    vocab_size=32,
    mlp_layer_types=("mixture", "swiglu"),
    mlps={"mixture": {"experts": 3, "width": 8, "balance": 0.5}},
)


@pytest.fixture(autouse=True)
def mixture_is_there():
    MLPS["mixture"] = Mixture
    yield
    MLPS.pop("mixture", None)


def batch_of(rows: int, tokens: int = 12) -> Batch:
    ids = torch.randint(32, (rows, tokens + 1), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    labels[0, :5] = -100
    return Batch(ids[:, :-1], labels, torch.arange(tokens).expand(rows, -1), None)


def gradients(model, *batches: Batch) -> list[torch.Tensor]:
    model.zero_grad()
    for batch in batches:
        loss_sum(model, batch, 64).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_every_mlp_of_the_table_may_be_named_in_a_config():
    for name in MLPS:
        if name != "mixture":
            keys = {"hidden_size": 16, "num_hidden_layers": 1, "layer_types": ["attention"]}
            keys |= {"attention": {"num_heads": 2}, "vocab_size": 32, "mlp": name}
            config = read_own_keys(keys, "x.json", ("attention",), tuple(MLPS))
            assert type(build(config, 0).layers[0].mlp) is MLPS[name]


def test_each_layer_has_the_mlp_and_the_settings_that_the_config_gives_it():
    config = read_own_keys(
        {
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "layer_types": ["attention"],
            "attention": {"num_heads": 2},
            "vocab_size": 32,
            "intermediate_size": 24,
            "mlp_layer_types": ["swiglu", "relu2:wide"],
            "relu2:wide": {"intermediate_size": 40},
        },
        "x.json",
        ("attention",),
        tuple(MLPS),
    )
    again = read_own_keys(
        json.loads(json.dumps(config.to_dict())), "x", ("attention",), tuple(MLPS)
    )
    assert again == config
    layers = build(config, 0).layers
    assert [type(block.mlp).__name__ for block in layers] == ["GatedMLP", "UngatedMLP"] * 2
    assert [block.mlp.down_proj.in_features for block in layers] == [24, 40] * 2
    assert "mlp_layer_types" not in replace(config, mlp_layer_types=(), mlps={}).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_layer_types": ["swiglu", "elu"]}, "mlp_layer_types names 'elu'"),
        ({"mlp_layer_types": ["swiglu"] * 3}, "has 3 entries, which do not divide"),
        ({"relu": {"intermediate_size": 8}}, "the table 'relu' is not used"),
        ({"mlp": "gelu", "mlp_layer_types": ["swiglu"]}, "mlp = 'gelu' is not used"),
        (
            {"mlp_layer_types": ["none", "swiglu"], "block": "parallel"},
            "mlp_layer_types has 'none'",
        ),
    ],
)
def test_wrong_mlps_are_named(change, message):
    keys = {"hidden_size": 16, "num_hidden_layers": 2, "layer_types": ["attention"], **change}
    with pytest.raises(SettingsError, match=message):
        read_own_keys(keys, "x.json", ("attention",), tuple(MLPS))


def test_a_wrong_setting_of_an_mlp_is_named():
    with pytest.raises(SettingsError, match="swiglu.wide is unknown"):
        build(replace(CONFIG, mlp_layer_types=(), mlps={"swiglu": {"wide": 3}}), 0)


def test_the_auxiliary_loss_is_that_of_its_definition():
    """sum over sequences of weight * E sum_e f_e P_e * labels, from the router's own numbers."""
    model, batch = build(CONFIG, 0), batch_of(3)
    heard = []
    block = model.layers[0]
    block.mlp.register_forward_hook(lambda mlp, given, _: heard.append(given[0]))
    loss = loss_sum(model, batch, 64)
    nats_BT, _ = losses(model, batch, 64)
    expected = 0.0
    for x_TD, labels_T in zip(heard[0].double(), batch.labels_BT):
        p_TE = (x_TD @ block.mlp.router.double().T).softmax(-1)
        shares_E = torch.bincount(p_TE.argmax(-1), minlength=3) / len(x_TD)
        expected += 0.5 * 3 * (shares_E * p_TE.mean(0)).sum() * (labels_T != -100).sum()
    torch.testing.assert_close(loss.double(), nats_BT.sum().double() + expected)
    loss.backward()
    assert block.mlp.router.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["mlp", "block", "attention+mlp"])
def test_recomputation_changes_no_gradient_and_counts_each_token_once(mode):
    model, batch = build(CONFIG, 0), batch_of(2)
    plain = gradients(model, batch)
    update_buffers(model.layers, lambda total: total, keep=True)
    for block in model.layers:
        save_memory(block, ActivationCheckpoint(mode=mode))
    torch.testing.assert_close(gradients(model, batch), plain, rtol=0, atol=0)
    assert model.layers[0].mlp.tokens_E.sum() == 24
    update_buffers(model.layers, lambda total: total, keep=True)
    assert model.layers[0].mlp.tokens_E.sum() == 48


def test_micro_batches_change_no_gradient():
    model, batch = build(CONFIG, 0), batch_of(4)
    parts = [
        Batch(batch.ids_BT[rows], batch.labels_BT[rows], batch.positions_BT[rows], None)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    whole = gradients(model, batch)
    torch.testing.assert_close(gradients(model, *parts), whole, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_counts_nothing():
    model = build(CONFIG, 0)
    gradients(model, batch_of(2))
    update_buffers(model.layers, lambda total: total, keep=False)
    assert model.layers[0].mlp.tokens_E.tolist() == [0, 0, 0]
    assert model.layers[0].mlp.statistics_of_step is None


def test_flops_are_those_of_the_experts_that_a_token_meets():
    model = build(CONFIG, 0)
    held = 2 * sum(p.numel() for p in model.layers[0].mlp.parameters())
    assert model.layers[0].mlp.flops_per_token() == 2 * (3 * 16 + 2 * 8 * 16) < held
    more = replace(CONFIG, mlps={"mixture": {"experts": 6, "width": 8}})
    added = build(more, 0).flops_per_token(64) - model.flops_per_token(64)
    assert added == 2 * 3 * 16, "of the router only"


def test_generation_and_evaluation_take_the_outputs_alone():
    model, batch = build(CONFIG, 0), batch_of(2)
    with torch.no_grad():
        seq = Sequence(batch.positions_BT)
        assert model(batch.ids_BT, seq).shape == (2, 12, 16)
    assert list(seq.observed) == [0]
    assert model.layers[0].mlp.statistics_of_step is None


def steps_of_mixture(rank: int, degrees: dict[str, int], compiled: bool = False) -> dict:
    """Losses, gradient norms, parameters and counts after two steps."""
    plan = Plan(degrees, compiled=compiled)
    mesh = Mesh.of_degrees(degrees, "cpu") if degrees else ALONE
    changes = {"mlp": "mixture", "mlps": {"mixture": {"balance": 0.5}}}
    state = state_of(("gla",), plan, mesh, **changes)
    said = steps(state, 2)
    held = {
        name: (local_part.of_local(part.tensor).clone(), local_part.begin)
        for name, part in state.held().items()
        if name.startswith("model/")
        for local_part in part.slices
    }
    written = [name for name in state.written() if name.endswith("tokens_E")]
    return {"said": said, "held": held, "written": written}


@pytest.mark.parametrize("axis", ["dp_replicate", "dp_shard"])
def test_data_parallel_processes_change_neither_gradients_nor_counts(axis):
    """And one process writes the buffer into the checkpoint."""
    one = steps_of_mixture(0, {})
    several = in_processes(2, steps_of_mixture, {axis: 2})
    for process in several:
        for mine, theirs in zip(process["said"], one["said"]):
            assert mine == pytest.approx(theirs, rel=1e-5)
        for name, (part, begin) in process["held"].items():
            whole = one["held"][name][0]
            for dim, first in enumerate(begin):
                whole = whole.narrow(dim, first, part.shape[dim])
            torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-6)
    assert [bool(process["written"]) for process in several] == [True, False]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss():
    compiled, eager = (steps_of_mixture(0, {}, compiled)["said"] for compiled in (True, False))
    for mine, theirs in zip(compiled, eager):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.fixture
def longfire(tmp_path, monkeypatch, capsys):
    """The command line in a folder of its own; each call as a process that has run no plugin yet."""
    monkeypatch.chdir(tmp_path)
    text = (json.dumps({"text": f"number {i} is {i * i}. " * 9}) + "\n" for i in range(60))
    Path("text.jsonl").write_text("".join(text))
    config = CONFIG.to_dict() | {"vocab_size": 0}
    Path("config.json").write_text(json.dumps(config))

    def run(*words: str, fails: bool = False) -> str:
        monkeypatch.setattr(plugins, "_loaded", {})
        MLPS.pop("mixture", None)
        code = main(list(words))
        printed = capsys.readouterr()
        assert bool(code) == fails, printed.err
        return printed.out + printed.err

    return run


def train(*more: str) -> list[str]:
    settings = {
        "model.plugins": mixture.__file__,
        "model.config": "config.json",
        "data.dataset": "text.jsonl",
        "training.seq_len": "32",
        "training.batch_size": "2",
        "training.threads": "1",
        "training.compile": "off",
        "checkpoint.interval": "2",
        "lr_scheduler.warmup_steps": "1",
        "metrics.report": "false",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return ["train", *words, *more]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_it_trains_resumes_to_the_bit_and_generates(longfire):
    longfire(*train("--job.dump_folder", "whole", "--training.steps", "4"))
    longfire(
        *train("--job.dump_folder", "two", "--training.steps", "4", "--checkpoint.interval", "2")
    )
    shutil.rmtree("two/checkpoints/step-4")
    longfire(*train("--job.dump_folder", "two", "--training.steps", "4"))
    whole, two = (tensors_of(Path(name) / "checkpoints/step-4") for name in ("whole", "two"))
    assert whole.keys() == two.keys()
    counted = whole["model/layers.0.mlp.tokens_E"]
    assert counted.sum() == 4 * 2 * 32, "every token of every step, padding too"
    for name, tensor in whole.items():
        assert torch.equal(tensor, two[name]), name
    assert "number" in longfire(
        "generate", "whole", "--prompt", "number", "--plugins", mixture.__file__
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("--training.mlp_chunk_size", "8"), "training.mlp_chunk_size = 8: the MLP mixture"),
        (("--training.tbptt_segments", "2"), "training.tbptt_segments = 2: the MLP mixture"),
    ],
)
def test_what_cuts_its_sequences_is_refused_by_name(longfire, settings, named):
    said = longfire(*train("--job.dump_folder", "no", *settings), fails=True)
    assert named in said and "set it to" in said


@pytest.mark.parametrize("axis", ["tensor", "context", "pipeline"])
def test_axes_that_cut_it_are_refused_by_name(longfire, axis, monkeypatch):
    alone = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**alone, "MASTER_PORT": 29511}.items():
        monkeypatch.setenv(name, str(value))
    said = longfire(
        *train("--job.dump_folder", "no", f"--parallelism.{axis}_parallel_degree", "2"), fails=True
    )
    assert f"parallelism.{axis}_parallel_degree = 2: the MLP mixture has an auxiliary loss" in said


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("MLPS = 3", "must be a table"),
        ("MLPS = {'mine': 3}", r"MLPS\['mine'\] is no class derived from"),
        ("from longfire.mlps.gated import GatedMLP\nMLPS = {'swiglu': GatedMLP}", "taken"),
        ("from longfire.mlps.gated import GatedMLP\nMLPS = {'gla': GatedMLP}", "taken"),
        ("from longfire.mlps.gated import GatedMLP\nMLPS = {'hidden_size': GatedMLP}", "taken"),
    ],
)
def test_a_wrong_table_of_a_plugin_is_named(tmp_path, monkeypatch, table, message):
    monkeypatch.setattr(plugins, "_loaded", {})
    (tmp_path / "mine.py").write_text(table)
    with pytest.raises(SettingsError, match=message):
        plugins.load_plugins((str(tmp_path / "mine.py"),))
