"""docs/data.md is true: its commands and its recipe run, and end well, as they stand on the page."""

import json
import re
import shlex
from pathlib import Path

import pytest

from longfire.cli import main
from longfire.config import settings
from longfire.data import formats

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/data.md").read_text()
COMMANDS = [
    line.removeprefix("longfire ")
    for block in re.findall(r"```bash\n(.+?)```", PAGE, re.S)
    for line in block.splitlines()
]
SMALLER = """--training.steps 2 --training.seq_len 64 --training.batch_size 2 --lr_scheduler.warmup_steps 1 --eval.tokens 256
    --eval.interval 0 --checkpoint.export false --eval.compare_xz false --eval.sample_prompt= --metrics.report false
    --tokenizer.path bytes"""


@pytest.fixture
def own_folders(tmp_path, monkeypatch) -> list[str]:
    """Words after those of the page, so that nothing is written beside the clone; the last of two settings wins."""
    monkeypatch.chdir(ROOT)
    return ["--data.folder", str(tmp_path / "stores"), "--data.num_workers", "1"]


def manifests(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("stores/*/manifest.json"))]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run(command, own_folders, tmp_path):
    words = shlex.split(command) + own_folders
    if words[0] == "train":
        words += [*SMALLER.split(), "--job.dump_folder", str(tmp_path / "run")]
    assert main(words) == 0
    assert manifests(tmp_path) and all(
        manifest["complete"] or "--data.streaming" in words for manifest in manifests(tmp_path)
    )
    if words[0] == "train":
        assert (tmp_path / "run" / "checkpoints" / "step-2").is_dir()


def test_the_recipe_is_one(own_folders, tmp_path, capsys):
    (tmp_path / "mix.toml").write_text(re.search(r"```toml\n(.+?)```", PAGE, re.S)[1])
    assert main(["prepare", str(tmp_path / "mix.toml"), *own_folders]) == 0
    made = {manifest["source"]["name"]: manifest for manifest in manifests(tmp_path)}
    assert set(made) == {"docs", "longfire"}
    assert {manifest["tokenizer"]["vocab_size"] for manifest in made.values()} == {512}
    documents = sum(
        made["longfire"]["streams"][stream]["documents"] for stream in ("train", "heldout")
    )
    assert documents == len(list((ROOT / "longfire/ops").glob("*.py")))


def test_the_page_lists_every_format_and_every_way_to_shuffle():
    assert all(f"`{suffix}`" in PAGE for suffix in formats.FORMATS)
    shuffles = settings.Data.__dataclass_fields__["shuffle"].type.__args__
    assert all(f"| `{name}` |" in PAGE for name in shuffles)
