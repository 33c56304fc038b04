"""Promise 12: settings are strict. An unknown or unused key is an error with the nearest name; TOML, then command line; the resolved
settings are saved in the run folder and start the same run again."""

import ast
import json
import random
import string
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import longfire
from longfire.cli import main
from longfire.config import aliases, recipe
from longfire.config.run import ONCE, Run
from longfire.config.run_folder import save
from longfire.errors import SettingsError

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "layer_types": ["attention"],
    "attention": {"num_heads": 2},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    (tmp_path / "x.toml").write_text('[model]\nconfig = "shape.json"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
OF_A_MODEL = [key for key in aliases.ALIASES if key.startswith("model.config.")]


def misspelled(key: str, draw: random.Random) -> str:
    """The key with one letter dropped, doubled, swapped or changed: what fingers do."""
    at = draw.randrange(len(key) - 1)
    before, letter, after = key[:at], key[at], key[at + 1 :]
    return draw.choice(
        [
            before + after,
            before + letter * 2 + after,
            before + after[0] + letter + after[1:],
            before + draw.choice(string.ascii_lowercase) + after,
        ]
    )


@pytest.mark.parametrize("key", [*recipe.SETTINGS, *sorted({*aliases.ALIASES} - {*OF_A_MODEL})])
def test_no_misspelling_is_accepted(key):
    draw = random.Random(key)
    for _ in range(20):
        wrong = misspelled(key, draw)
        if wrong in recipe.SETTINGS or wrong in aliases.ALIASES:
            continue  # beta1 and beta2: two keys that differ by a letter
        with pytest.raises(SettingsError, match="unknown setting"):
            recipe.sections(recipe.read_words({wrong: "1"}))


@pytest.mark.parametrize("key", OF_A_MODEL)
def test_no_misspelling_of_a_key_of_the_model_is_accepted(key):
    """model.NAME.KEY may be a key of a mixer that a plugin brings: it is refused with the model's
    config."""
    draw = random.Random(key)
    for _ in range(5):
        wrong = misspelled(key, draw)
        if wrong in aliases.ALIASES:
            continue
        with pytest.raises(SettingsError, match="unknown|no value"):
            Run.compose(QUICKSTART, {wrong: "1"})


def test_the_nearest_name_is_the_right_one_nearly_always():
    draw, right, tried = random.Random(0), 0, 0
    for key in recipe.SETTINGS:
        wrong = misspelled(key, draw)
        if wrong not in recipe.SETTINGS:
            tried += 1
            right += f"did you mean {key!r}" in recipe.unknown(wrong, "x.toml")
    assert right / tried > 0.9, f"{right} of {tried}"


@pytest.mark.parametrize("where", ["recipe", "command line"])
def test_an_unknown_key_stops_the_command_before_anything_is_touched(folder, where, capsys):
    if where == "recipe":
        (folder / "x.toml").write_text(
            '[model]\nconfig = "shape.json"\n[training]\nbatchsize = 3\n'
        )
        code = main(["train", "x.toml"])
    else:
        code = main(["train", "x.toml", "--training.batchsize", "3"])
    assert code == 2
    message = capsys.readouterr().err
    assert "training.batchsize" in message and "did you mean 'training.batch_size'" in message
    assert ("x.toml" if where == "recipe" else "command line") in message
    assert {path.name for path in folder.iterdir()} == {"x.toml", "shape.json"}, (
        "nothing was written"
    )


def test_an_unknown_key_of_the_models_shape_too(folder, capsys):
    (folder / "shape.json").write_text(json.dumps({**SHAPE, "hiden_size": 32}))
    assert main(["train", "x.toml"]) == 2
    assert (
        "shape.json: unknown key 'hiden_size'; did you mean 'hidden_size'"
        in capsys.readouterr().err
    )


def test_no_setting_is_a_flag_that_nothing_reads():
    """Of each setting, some file besides settings/ takes the value from its section."""
    house = Path(longfire.__file__).parent
    read = set()
    for file in house.rglob("*.py"):
        if file.parent.name in ("settings", "aliases"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(
                node.value, str
            ):  # read by name, from a list of such
                read |= {node.value, node.value.rpartition(".")[2]}
    unread = {key for key in recipe.SETTINGS if key.split(".")[1] not in read}
    assert not unread, (
        f"nothing reads {sorted(unread)}: a setting must do something or not be there"
    )


def other_value(key: str) -> str:
    """A value that is not the default, as text."""
    field = recipe.SETTINGS[key]
    match field.default:
        case bool():
            return str(not field.default).lower()
        case str() if hasattr(field.type, "__args__"):
            return next(word for word in field.type.__args__ if word != field.default)
        case str():
            return "other"
        case tuple():
            return {int: "7", float: "1.5"}.get(field.type.__args__[0], "other")
        case int() | float():
            return (
                str(field.default / 2 or 0.5)
                if isinstance(field.default, float)
                else str(field.default + 1)
            )


@pytest.mark.parametrize("section", recipe.SECTIONS)
def test_each_setting_survives_the_run_folder(folder, section):
    """Written, read again, still what the command line said: key by key, without what `check` says of combinations."""
    run = Run.compose(folder / "x.toml", {"job.dump_folder": "run"})
    for key in recipe.SETTINGS:
        if not key.startswith(f"{section}.") or key in (
            "job.dump_folder",
            "model.config",
            "data.folder",
            *ONCE,
        ):
            continue
        value = recipe.typed(key, other_value(key), recipe.COMMAND_LINE)
        name = key.split(".")[1]
        assert value != recipe.SETTINGS[key].default
        save(replace(run, **{section: replace(getattr(run, section), **{name: value})}))
        read = recipe.sections(recipe.read_toml(run.folder / "run.toml"))
        assert getattr(read[section], name) == value


def test_the_resolved_settings_start_the_same_run_again(folder, monkeypatch):
    overrides = {
        "job.dump_folder": "run",
        "optimizer.lr": "0.001",
        "training.global_batch_size": "32",
        "data.shuffle": "window",
    }
    run = Run.compose(folder / "x.toml", overrides)
    save(run)
    (folder / "x.toml").unlink()
    (folder / "shape.json").unlink()
    monkeypatch.chdir("/")
    again = Run.compose(folder / "run" / "run.toml", {})
    assert (again.optimizer, again.data.shuffle, again.model_config) == (
        run.optimizer,
        "window",
        run.model_config,
    )
    assert (again.steps, again.sequences_per_step, again.tokens_per_step) == (
        run.steps,
        run.sequences_per_step,
        run.tokens_per_step,
    )
    written = tomllib.loads((folder / "run" / "run.toml").read_text())
    assert {f"{section}.{key}" for section, keys in written.items() for key in keys} == set(
        recipe.SETTINGS
    ), "every one, defaults too"
