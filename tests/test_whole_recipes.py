"""recipes/*.toml: each is a whole, checked run whose size is the documented one."""

from pathlib import Path

import pytest
from logged import logged_to

from longfire.config.run import Run
from longfire.launch import World

FOLDER = Path(__file__).parents[1] / "recipes"

# name: rows a step, tokens a row, steps, warm-up, peak learning rate
DOCUMENTED = {
    "transformer-340m-fineweb": (256, 2048, 20480, 1024, 3e-4),
    "gla-340m-fineweb": (256, 2048, 20480, 1024, 3e-4),
    "gla-7b-from-mistral": (1024, 2048, 10240, 512, 3e-5),
    "gpt2-s-owt": (512, 1024, 400_000, 4000, 6e-4),
    "gpt3-s-pile": (256, 2048, 800_000, 8000, 6e-4),
    "llama7b-ring-2m": (1, 2_097_152, 480_000, 2000, 1.5e-4),
}


PROCESSES = {"llama7b-ring-2m": 512, "gla-1b-hybrid-1m": 512}  # that a recipe's own plan is of


@pytest.fixture
def compose(tmp_path, monkeypatch):
    """Recipes are read in a folder where what they begin with has been made, as they ask."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "converted/gla-7b").mkdir(parents=True)
    (tmp_path / "HuggingFaceTB/SmolLM2-135M-Instruct").mkdir(parents=True)  # else from the hub
    message = []
    with logged_to(message):
        return lambda path: (
            Run.compose(path, {}, world=World(PROCESSES.get(path.stem, 1))),
            message,
        )


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_it_can_be_trained(path, compose):
    run, message = compose(path)
    assert not message, "a recipe of ours uses today's spellings"
    assert Path(run.model.config).parent == FOLDER / "models"
    assert run.job.dump_folder == f"runs/{path.stem}"
    assert run.accumulation * run.training.batch_size * run.data_processes == run.sequences_per_step


SYSTEMS = ("flame", "flash-attention", "RingAttention")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_it_is_the_documented_run_and_says_which_and_what_differs(name, compose):
    run, _ = compose(FOLDER / f"{name}.toml")
    size = (
        run.sequences_per_step,
        run.training.seq_len,
        run.steps,
        run.warmup_steps,
        run.optimizer.lr,
    )
    assert size == DOCUMENTED[name]
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    described = text.partition("[")[0]
    assert any(system in described for system in SYSTEMS) and "# Different here: " in described
