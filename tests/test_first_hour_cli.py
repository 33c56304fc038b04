"""The first hour of a newcomer, at the command line: each line is typed in a new folder with one text file and nothing else."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from logged import logged_to, nothing_logged

from longfire.cli import main
from longfire.cli.model_keys import page, without_help
from longfire.cli.starter import KINDS, OTHER_NAMES, SIZES
from longfire.config import recipe, shipped
from longfire.config.model_config import mixer_of
from longfire.config.settings import SECTIONS
from longfire.mixers import MIXERS

ROOT = Path(__file__).parents[1]
TEXT = "The fire of the firemen burns long and slow.\n\nIt was a cold night, and the fire was warm.\n\n"
TINY = (
    "--model.hidden_size 64 --model.num_hidden_layers 4 --model.vocab_size 0 --tokenizer.path bytes --data.num_workers 1 "
    "--training.seq_len 32 --training.batch_size 2 --training.steps 2 --lr_scheduler.warmup_steps 0 --training.compile off "
    "--eval.at_end false --eval.interval 0 --eval.sample_prompt '' --metrics.report false"
)
KINDS_TRAINED = (
    "transformer",
    "gated_delta_net",
)  # the others are composed, and exported by name: test_every_kind


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "input.txt").write_text(TEXT * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(line: str, capsys, code: int = 0) -> str:
    """Type a line; what was printed, errors too. A help ends with an exit of its own."""
    try:
        returned = main(shlex.split(line))
    except SystemExit as end:
        returned = end.code
    captured = capsys.readouterr()
    assert returned == code, captured.err
    return captured.out + captured.err


# -- init ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS_TRAINED)
def test_init_then_train_then_all_that_reads_the_run(folder, kind, capsys):
    message = typed(f"init --data input.txt --model {kind} --size 1m", capsys)
    assert message.splitlines()[-1] == "next: longfire train recipe.toml"
    message = typed(f"train recipe.toml {TINY}", capsys)
    run = folder / f"runs/input-{kind}-1m"
    assert "recipe.toml, [model]" in message and (run / "hf/model.safetensors").exists()
    config = json.loads((run / "config.json").read_text())
    assert config["hidden_size"] == 64 and config["num_hidden_layers"] == 4
    assert tomllib.loads((run / "run.toml").read_text())["model"]["config"] == "config.json"
    (folder / "recipe.toml").unlink()
    message = typed(f"train {run}/run.toml --training.steps 3", capsys)
    assert "step 3/3" in message and (run / "checkpoints/step-3").is_dir()
    typed(f"eval {run} --data input.txt --seq_len 32 --tokens 64", capsys)
    assert "fire" in typed(f"generate {run} --prompt fire --max_new_tokens 2", capsys)
    typed(f"export {run} out", capsys)


def test_the_starter_trains_as_it_is(folder, capsys):
    """Every setting as written, but for one step."""
    typed("init --data input.txt --size 1m", capsys)
    message = typed(
        "train recipe.toml --training.steps 1 --lr_scheduler.warmup_steps 0 --eval.sample_tokens 8",
        capsys,
    )
    assert "step 1/1" in message and "sample, after" in message


@pytest.mark.slow
def test_the_starter_without_a_text_trains_on_the_embedded_corpus(folder, capsys):
    typed("init --size 1m", capsys)
    message = typed(
        "train recipe.toml --training.steps 2 --lr_scheduler.warmup_steps 0 --eval.tokens 512",
        capsys,
    )
    assert (
        "step 2/2" in message
        and "validation of embedded" in message
        and "sample, after 'def '" in message
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_size_is_a_whole_run_that_can_be_exported(folder, kind, size, capsys):
    from longfire.config.run import Run
    from longfire.huggingface.families import config_to_hf

    typed(f"init --data input.txt --model {kind} --size {size}", capsys)
    with nothing_logged():
        run = Run.compose(folder / "recipe.toml", {})
    assert config_to_hf(run.model_config.with_vocabulary(300))
    assert run.data.dataset == (str(folder / "input.txt"),)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_size_means_what_it_says(folder, kind, size, capsys):
    """Parameters, with the vocabulary of the recipe, within a third of the name."""
    from longfire.config.run import Run
    from longfire.model import on_meta

    typed(f"init --data input.txt --model {kind} --size {size}", capsys)
    with nothing_logged():
        run = Run.compose(folder / "recipe.toml", {})
    count = sum(
        p.numel()
        for p in on_meta(
            run.model_config.with_vocabulary(run.tokenizer.train_vocab_size)
        ).parameters()
    )
    named = int(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert 0.67 < count / named < 1.5, f"{count:,}"


def test_every_mixer_has_a_starter():
    assert {mixer_of(name) for kind in KINDS.values() for name in kind.layer_types} == set(MIXERS)
    assert set(MIXERS) <= {*KINDS, *OTHER_NAMES}, "a mixer is named as layer_types names it"


@pytest.mark.parametrize("kind", KINDS)
def test_every_line_of_the_starter_is_explained(folder, kind, capsys):
    typed(f"init --model {kind}", capsys)
    lines = (folder / "recipe.toml").read_text().splitlines()
    assert all("# " in line for line in lines if line), "each line has a comment"


def test_init_replaces_nothing_unasked(folder, capsys):
    (folder / "recipe.toml").write_text("# mine\n")
    message = typed("init --data input.txt", capsys, 2)
    assert "recipe.toml is already there" in message and "--force" in message
    assert (folder / "recipe.toml").read_text() == "# mine\n"
    typed("init --data input.txt --force", capsys)
    assert "input.txt" in (folder / "recipe.toml").read_text()


@pytest.mark.parametrize(
    ("named", "written"),
    [
        ("", "recipe.toml"),
        (".", "recipe.toml"),
        ("sub", "sub/recipe.toml"),
        ("new/", "new/recipe.toml"),
        ("mine", "mine.toml"),
        ("v1.2", "v1.2.toml"),
        ("'my run.toml'", "my run.toml"),
    ],
)
def test_the_name_of_a_recipe_is_a_file_or_a_folder(folder, named, written, capsys):
    (folder / "sub").mkdir()
    message = typed(f"init {named} --data input.txt", capsys)
    assert (folder / written).is_file()
    assert shlex.split(message.splitlines()[-1]) == ["next:", "longfire", "train", written]


def test_a_file_that_no_reader_is_for_is_refused_at_once(folder, capsys):
    (folder / "table.csv").write_text("text\nfire\n")
    message = typed("init --data table.csv", capsys, 2)
    assert "--data table.csv: not a kind of file that is read (.jsonl" in message
    (folder / b"\xff.txt".decode(errors="surrogateescape")).write_text(TEXT)
    assert main(["init", "--data", b"\xff.txt".decode(errors="surrogateescape")]) == 2
    assert "is not UTF-8" in capsys.readouterr().err
    assert not (folder / "recipe.toml").exists()


def test_a_glob_is_found_from_the_recipes_folder(folder, monkeypatch, capsys):
    from longfire.config.run import Run

    typed("init sub/mine --data '*.txt'", capsys)
    assert tomllib.loads((folder / "sub/mine.toml").read_text())["data"]["dataset"] == ["../*.txt"]
    monkeypatch.chdir("/")
    assert Run.compose(folder / "sub/mine.toml", {}).data.dataset == (f"{folder}/sub/../*.txt",)


def test_a_recipe_in_another_folder_finds_the_text(folder, monkeypatch, capsys):
    typed("init sub/mine --data input.txt --size 1m", capsys)
    monkeypatch.chdir(folder / "sub")
    message = typed("prepare mine --tokenizer.path bytes --data.num_workers 1", capsys)
    assert "recipe mine: mine.toml" in message and "input.txt" in message


@pytest.mark.parametrize(
    ("data", "dataset", "name"),
    [
        ("input.txt", ["input.txt"], "input"),
        ("input.txt,owner/set", ["input.txt", "owner/set"], "input"),
        ("'two, words.txt'", ["two, words.txt"], "two-words"),
        ("'*.txt'", ["*.txt"], "data"),
        ("texts/", ["texts"], "texts"),
        ("owner/Tiny-Set", ["owner/Tiny-Set"], "Tiny-Set"),
        ("'a\"b\\.txt'", ['a"b\\.txt'], "a-b"),
    ],
)
def test_any_name_of_a_text_stands_in_the_recipe_as_it_is(folder, data, dataset, name, capsys):
    (folder / "texts").mkdir()
    for file in ("two, words.txt", 'a"b\\.txt'):
        (folder / file).write_text(TEXT)
    typed(f"init --data {data}", capsys)
    written = tomllib.loads((folder / "recipe.toml").read_text())
    assert written["data"]["dataset"] == dataset
    assert written["job"]["dump_folder"] == f"runs/{name}-transformer-10m"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("init --model glaa", "did you mean 'gla'?"),
        ("init --size 11m", "--size 11m: unknown (did you mean '1m'?); there are 1m, 4m, 10m"),
        ("init --data inpt.txt", "no such file; did you mean 'input.txt'?"),
        ("init --modle gla", "unknown option --modle (did you mean '--model'?)"),
        ("init input.txt/x.toml", "cannot be written"),
        (
            "init input.txt",
            "input.txt: a recipe is a .toml file, so this is no name for one; `longfire init --data input.txt`",
        ),
        ("init input.txt --force", "a recipe is a .toml file"),
        ("init run.json", "a recipe is a .toml file"),
        ("init --data ''", "--data has an empty name"),
        ("init --data input.txt,", "--data has an empty name"),
        ("init --data texts/", "--data texts/: no such file"),
        ("init --data '*.jsonl'", "--data *.jsonl: no such file"),
        (f"init --data {'a' * 200}/{'b' * 300}.txt", "no such file"),
    ],
)
def test_a_slip_at_init(folder, line, message, capsys):
    assert message in typed(line, capsys, 2)
    assert {path.name for path in folder.iterdir()} == {"input.txt"}


# -- the model in the recipe -----------------------------------------------------------------------

MODEL = """
[model]
hidden_size = 64
num_hidden_layers = 2
layer_types = ["gla"]
[model.gla]
num_heads = 2
"""


def test_the_command_line_lies_over_the_recipe_and_both_over_a_named_config(folder, capsys):
    from longfire.config.run import Run

    file = folder / "x.toml"
    file.write_text(MODEL)
    run = Run.compose(file, {"model.gla.expand_k": "1.0", "model.hidden_size": "128"})
    assert (run.model_config.hidden_size, run.model_config.mixers) == (
        128,
        {"gla": {"num_heads": 2, "expand_k": 1.0}},
    )
    run = Run.compose(None, {"model.config": "gla-340m", "model.num_hidden_layers": "3"})
    assert (
        run.model_config.num_hidden_layers,
        run.model_config.hidden_size,
        run.model_config.layer_types,
    ) == (
        3,
        1024,
        ("gla",) * 3,
    )
    message = []
    with logged_to(message):
        run = Run.compose(file, {"model.config": "gla-340m"})
    assert run.model_config.hidden_size == 1024, (
        "a config that the command line names takes the place of the recipe's keys"
    )
    assert "gla-340m" in message[0] and "comes with longfire" in message[0]
    (folder / "gla-340m").mkdir()
    (folder / "gla-340m/config.json").write_text(
        json.dumps(run.model_config.to_dict() | {"hidden_size": 512})
    )
    assert Run.compose(None, {"model.config": "gla-340m"}).model_config.hidden_size == 512, (
        "one in the folder wins"
    )


def test_a_hybrid_keeps_its_pattern_at_another_depth(folder):
    from longfire.config.run import Run

    run = Run.compose(shipped.recipe("quickstart"), {"model.num_hidden_layers": "12"})
    types = run.model_config.layer_types
    assert len(types) == 12 and types == types[: len(set(types)) and 4] * 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--model.hiden_size 3",
            "unknown setting 'model.hiden_size' (did you mean 'model.hidden_size'?)",
        ),
        ("--hidden_size 3", "did you mean 'model.hidden_size'?"),
        ("--n_layer 3", "unknown setting 'n_layer' (did you mean 'model.num_hidden_layers'?)"),
        (
            "model.n_embd=64",
            "command line: unknown setting 'model.n_embd' (did you mean 'model.hidden_size'?)",
        ),
        (
            "learning_rate=1e-3",
            "command line: unknown setting 'learning_rate' (did you mean 'optimizer.lr'?)",
        ),
        (
            "--model.num_heads 3",
            "(did you mean 'model.MIXER.num_heads'?; MIXER is a name in layer_types, as in model.attention",
        ),
        (
            "--model.gla.deep.num_heads 3",
            "'model.gla.deep.num_heads': the table of a mixer, as [model.attention], has no table",
        ),
        ("--model.gla.num_heads '2\nx = 3'", "gla.num_heads = '2\\nx = 3' must be a whole number"),
        ("--model.gla.num_heads --training.steps 3", "gla.num_heads = True must be a whole number"),
        (
            "--job.dump_folder --training.steps 3",
            "--job.dump_folder needs a value: --job.dump_folder VALUE",
        ),
        (
            "--model.hidden_size many",
            "command line: model.hidden_size = 'many' must be a whole number",
        ),
        ("--model.hidden_size -64", "hidden_size = -64 must be 0 or more"),
        (
            "--model.gla.num_head 3",
            "x.toml, [model] and command line: gla.num_head is unknown; did you mean 'num_heads'?",
        ),
        ("--model.gla.num_heads many", "gla.num_heads = 'many' must be a whole number"),
        (
            "--model.gla.num_heads 3",
            "hidden_size * expand_k = 32 must be a positive multiple of num_heads = 3",
        ),
        ("--model.glaa.num_heads 3", "unknown key 'glaa'; did you mean 'gla'?"),
        ("--model.attention.num_heads 3", "[model.attention] is not used: layer_types has gla"),
        ("--model.layer_types gla,kda", "kda.num_heads, kda.head_dim missing"),
        ("--model.layer_types gla,gal", "layer_types names 'gal', which is no mixer of longfire"),
        ("--model.layer_types gla,attention:near", 'num_heads = 8 in [model."attention:near"]'),
        ("--model.config.n_layers 3", "unknown setting 'model.config.n_layers'"),
        ("--model.backend transformers", "is a key of longfire's own models"),
        (
            "--model.tie_word_embeddings true --optimizer.head_lr_scale 2",
            "true in x.toml, [model] and command line the",
        ),
        ("--model.config gla-304m", "no such file; name a config.json"),
        ("--model.config gla-304m", "did you mean 'gla-340m'?"),
    ],
)
def test_a_slip_in_the_model_is_named_with_place_key_and_fix(folder, line, message, capsys):
    (folder / "x.toml").write_text(MODEL)
    assert message in typed(f"train x.toml {line}", capsys, 2)
    assert {path.name for path in folder.iterdir()} == {"input.txt", "x.toml"}


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_a_number_of_a_mixer_is_finite(folder, number, capsys):
    """TOML can write them, and JSON cannot."""
    (folder / "x.toml").write_text(f"{MODEL}clamp_min = {number}\n")
    message = typed("train x.toml", capsys, 2)
    assert f"x.toml, [model]: gla.clamp_min = {float(number)} must be a finite number" in message


def test_no_key_of_the_model_is_a_setting_too():
    assert not set(recipe.SHAPE_KEYS) & set(recipe.SETTINGS)
    assert not {f"model.{name}" for name in MIXERS} & set(recipe.SETTINGS)


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_without_its_keys_says_which_and_what_to_write(folder, name, capsys):
    """Of each required key, in a file of JSON and in a recipe; what is proposed is taken."""
    from dataclasses import MISSING, fields

    wanted = [field.name for field in fields(MIXERS[name].Config) if field.default is MISSING]
    config = {"hidden_size": 64, "num_hidden_layers": 2, "layer_types": [name]}
    (folder / "m.json").write_text(json.dumps(config))
    (folder / "x.toml").write_text(
        "[model]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in config.items())
    )
    if not wanted:
        return
    message = typed("train --model.config m.json", capsys, 2)
    assert "m.json: " in message and "__init__" not in message
    for key in wanted:
        assert f"{name}.{key}" in message
    proposed = json.loads("{" + message.partition("for example, ")[2].strip() + "}")
    assert set(proposed[name]) == set(wanted)
    message = typed("train x.toml", capsys, 2)
    assert f"x.toml, [model]: {name}." in message and f"in [model.{name}]" in message
    lines = message.partition("for example, ")[2].partition(" in [model")[0].split(", ")
    with (folder / "x.toml").open("a") as file:
        file.write(f"[model.{name}]\n" + "\n".join(lines))
    assert recipe.model_tables(recipe.read_toml(folder / "x.toml"))[name] == proposed[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "m.json: hidden_size, num_hidden_layers, layer_types missing"),
        (
            '{"hidden_size": 64, "num_hidden_layers": 2}',
            'write, for example, "layer_types": ["attention"]',
        ),
        (
            '{\n "hidden_size": 64\n "num_hidden_layers": 2}',
            "m.json: not valid JSON: line 3, column 2",
        ),
        ('{"hidden_size": 64, "hidden_size": 32}', "'hidden_size' stands twice"),
        ("", "m.json: not valid JSON: line 1, column 1: Expecting value: an empty file"),
        ('{"hidden_size": NaN}', "m.json: not valid JSON: NaN is no number of JSON"),
        ("[1]", "m.json: it must be an object, not a list"),
        ('{"model_type": "gla", "hidden_size": "64"}', "m.json: hidden_size = '64'"),
        ('{"model_type": "glaa", "hidden_size": 64}', "m.json"),
        (
            '{"hidden_size": 64.5, "num_hidden_layers": 2, "layer_types": ["gla"]}',
            "m.json: hidden_size = 64.5 must be a whole",
        ),
        (
            '{"hidden_size": 64, "num_hidden_layers": 3, "layer_types": ["gla", "gla"]}',
            "m.json: layer_types has 2 entries",
        ),
        (
            '{"hidden_size": 64, "num_hidden_layers": 2, "layer_types": ["gla"], "gla": 3}',
            "m.json: gla = 3 must be a table",
        ),
        (
            '{"hidden_size": 64, "num_hidden_layers": 2, "layer_types": ["gla"], "gla": {"num_heads": 5}}',
            "m.json: gla: hidden",
        ),
    ],
)
def test_a_wrong_config_names_its_file_and_key(folder, text, message, capsys):
    (folder / "m.json").write_text(text)
    assert message in typed("train --model.config m.json", capsys, 2)


# -- recipes that come with longfire ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["quickstart", "quickstart.toml", "recipes/quickstart.toml", "recipes/quickstart"]
)
def test_a_shipped_recipe_is_found_from_anywhere_unless_one_is_here(folder, name, capsys):
    path = shipped.recipe(name)
    assert path == shipped.recipes()["quickstart"] and shipped.is_shipped(path)
    own = folder / (name if name.endswith(".toml") else f"{name}.toml")
    own.parent.mkdir(exist_ok=True)
    own.write_text(MODEL)
    assert shipped.recipe(name).absolute() == own


def test_what_was_taken_is_printed(folder, capsys):
    message = typed(
        "prepare quickstart --data.dataset input.txt --tokenizer.path bytes --data.num_workers 1",
        capsys,
    )
    assert message.startswith(
        f"recipe quickstart: {shipped.recipes()['quickstart']}, which comes with longfire\n"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train", "longfire init --data input.txt"),
        ("train", ", ".join(shipped.recipes())),
        ("plan", "longfire plan recipe.toml"),
        ("bench", "quickstart"),
        ("train quickstrat", "quickstrat: no such recipe; did you mean `quickstart`?"),
        ("train inptu.toml", "no such recipe; `longfire init` writes one"),
        ("train runs", "runs: no such recipe"),
        ("train max_iters=3", "unknown setting 'max_iters' (did you mean 'training.steps'?)"),
        ("train gla-340m", "gla-340m is a model config, not a recipe"),
        ("bench quickstart --steps 0", "argument --steps"),
        ("train --model.config here.toml", "here.toml is a recipe, and a model's config is JSON"),
        (
            "train input.txt",
            "input.txt is a text, not a recipe: `longfire init --data input.txt` writes",
        ),
        ("train training.steps 3", "training.steps: a setting is written --training.steps VALUE"),
        ("train -training.steps 3", "-training.steps: a setting is written --training.steps VALUE"),
        ("recipe.toml", "recipe.toml is a recipe; `longfire train recipe.toml` trains it"),
        ("trian", "unknown command 'trian' (did you mean 'train'?)"),
    ],
)
def test_what_to_type_instead(folder, line, message, capsys):
    (folder / "here.toml").write_text(MODEL)
    assert message in typed(line, capsys, 2)


def test_longfire_alone_lists_the_commands_and_is_no_success(folder, capsys):
    message = typed("", capsys, 2)
    assert "train a model:" in message and "longfire init --data input.txt" in message
    assert typed("--help", capsys) == message and typed("help", capsys) == message


def test_a_recipe_that_lies_here_is_named(folder, capsys):
    typed("init --data input.txt", capsys)
    assert re.search(
        r"longfire train recipe.toml +which is in this folder", typed("train", capsys, 2)
    )


def test_a_run_folder_is_no_recipe(folder, capsys):
    (folder / "run").mkdir()
    (folder / "run/run.toml").write_text(MODEL)
    assert "`longfire train run/run.toml` resumes its run" in typed("train run", capsys, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[training]\nsteps = ten",
            "x.toml: not readable as TOML: Invalid value (at line 2, column 9) (text needs quotes",
        ),
        (
            "[training]\nsteps = 1\nsteps = 2",
            "x.toml: not readable as TOML: Cannot overwrite a value (at end",
        ),
        (
            "[trainin]\nsteps = 1",
            "x.toml: unknown setting 'trainin.steps' (did you mean 'training.steps'?)",
        ),
        (
            "[model]\nconfg = 'a'",
            "x.toml: unknown setting 'model.confg' (did you mean 'model.config'?)",
        ),
        (
            "[[training]]\nsteps = 1",
            "x.toml: [[training]] is a list of tables: write [training], once",
        ),
        (
            MODEL.replace("[model.gla]", "[[model.gla]]"),
            "x.toml, [model]: gla = [{'num_heads': 2}] must be a table",
        ),
        (
            "[data]\ndataset = ['input.txt']",
            "x.toml: model.config is empty, and [model] has no keys of a model",
        ),
    ],
)
def test_a_slip_in_the_recipe(folder, text, message, capsys):
    (folder / "x.toml").write_text(text)
    assert message in typed("train x.toml", capsys, 2)


@pytest.mark.slow
def test_an_installed_longfire_has_its_recipes(tmp_path):
    """A wheel of this source, installed where no clone is near. setuptools is there where pip is."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"
    pytest.importorskip("setuptools", minversion="77")
    copied = ["pyproject.toml", "README.md", "longfire", "recipes"]
    source.mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in copied), str(source)], check=True)
    wheel = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(wheel, check=True, timeout=240)
    (built,) = tmp_path.glob("longfire-*.whl")
    target = tmp_path / "installed"
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(target), str(built)], check=True, timeout=240
    )
    code = (
        "from longfire import cli; from longfire.config import shipped; from pathlib import Path; import sys;"
        f"assert Path(cli.__file__).is_relative_to({str(target)!r});"
        "print(len(shipped.recipes()), len(shipped.models()));"
        "sys.exit(cli.main(['prepare', 'quickstart', '--data.dataset', 'input.txt', '--tokenizer.path', 'bytes']))"
    )
    (tmp_path / "input.txt").write_text(TEXT)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(target)},
    )
    assert done.returncode == 0, done.stderr
    counts = f"{len(shipped.recipes())} {len(shipped.models())}\n"
    assert (
        done.stdout.startswith(counts)
        and f"{target}/longfire/recipes/quickstart.toml" in done.stdout
    )


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "most"), [("prepare", 60), ("plan", 60), ("bench", 60), ("train", 80)]
)
def test_help_fits_a_screen_or_two_and_lists_every_section(folder, command, most, capsys):
    message = typed(f"{command} --help", capsys)
    assert len(message.splitlines()) <= most
    for section in SECTIONS:
        assert re.search(rf"^ [ *]{section} +\S", message, re.M)


def test_train_help_begins_with_what_people_use(folder, capsys):
    message = typed("train --help", capsys)
    shown = re.findall(r"^  --(\w+\.\w+) ", message, re.M)
    shown.remove("job.config_file")
    assert len(shown) == 12 and {"data.dataset", "training.steps", "optimizer.lr"} <= set(shown)
    assert message.index("--training.steps") < message.index("settings, by section")


@pytest.mark.parametrize("command", ["train", "prepare", "plan", "bench"])
def test_help_of_a_section_and_of_all(folder, command, capsys):
    for section in SECTIONS:
        message = typed(f"{command} --help {section}", capsys)
        listed = (
            set(re.findall(r"^  --(\w+\.\w+)", message, re.M))
            - set(recipe.SHAPE_KEYS)
            - {"model.MIXER"}
        )
        assert listed == {key for key in recipe.SETTINGS if key.startswith(f"{section}.")}
    message = typed(f"{command} --help=all", capsys)
    assert set(recipe.SETTINGS) <= set(re.findall(r"^  --(\w+\.\w+)", message, re.M))


def test_help_of_an_unknown_section_names_the_nearest(folder, capsys):
    assert "--help dta: no section of settings (did you mean 'data'?)" in typed(
        "train --help dta", capsys, 2
    )


def test_a_value_may_look_like_a_call_for_help(folder):
    from longfire.cli.arguments import take_settings, topic_of

    rest, overrides = take_settings(["--eval.sample_prompt", "--help", "x.toml"], set())
    assert topic_of(rest) is None and overrides == {"eval.sample_prompt": "--help"}


# -- the page of keys ------------------------------------------------------------------------------


def test_every_key_of_a_model_config_says_what_it_means():
    assert not without_help(), (
        f"declare these fields with shape.key or shape.required: {without_help()}"
    )


def test_the_page_of_keys_is_up_to_date(capsys):
    assert (ROOT / "docs/model_config.md").read_text() == page(), (
        "run: longfire init --model-keys > docs/model_config.md"
    )
    assert typed("init --model-keys", capsys) == page()
    table = [line for line in page().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}, (
        "four columns in each line"
    )


# -- the shipped recipes fit the devices that they name ----------------------------------------------


def test_every_recipe_names_the_devices_that_it_is_planned_for():
    for path in shipped.recipes().values():
        assert len(planned(path)) == 1, (
            f"{path.name}: a comment with `longfire plan {path.stem} --gpus N`"
        )


def planned(path: Path) -> list[tuple[str, str]]:
    """(command line, GiB that are stated) of the plans in a recipe's comments."""
    return re.findall(
        rf"^# +longfire plan {path.stem} (.+?)(?: +# ([\d.]+) GiB)?$", path.read_text(), re.M
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped.recipes())
def test_a_shipped_recipe_fits_the_devices_that_it_names(folder, name):
    """What `longfire plan` says of the recipe's own plan, without its search for others."""
    from longfire.config.run import Run
    from longfire.launch import World
    from longfire.parallel.cost import device_of
    from longfire.planner.planner import Planner

    ((options, stated),) = planned(shipped.recipes()[name])
    words = shlex.split(options)
    said = dict(zip(words[::2], words[1::2]))
    assert said.keys() <= {"--gpus", "--device", "--memory"}
    world = World(int(said.get("--gpus", 1)))
    with nothing_logged():
        run = Run.compose(shipped.recipe(name), {}, planned=True, world=world)
    planner = Planner(run, device_of(said.get("--device", "h100-80gb"), said.get("--memory", "")))
    held = planner.peak(planner.of_recipe()).total
    assert held <= planner.device.usable_bytes
    if stated:
        assert held / 2**30 == pytest.approx(float(stated), rel=0.02), (
            "the number in the recipe's comment"
        )


@pytest.mark.slow
def test_plan_of_a_shipped_recipe_as_it_stands_in_its_comment(folder, capsys):
    """Its weights are not here yet: what is only planned may start from them all the same."""
    message = typed("plan gla-7b-from-mistral --gpus 8 --device h100-80gb --alternatives 0", capsys)
    assert "64 micro-batch(es) of 2" in message and "does not fit" not in message


# -- generate, eval, the model card ------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on one text file, without text held out."""
    folder = tmp_path_factory.mktemp("hour")
    (folder / "input.txt").write_text(TEXT * 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        line = f"init --data {folder}/input.txt --size 1m"
        assert main(shlex.split(line)) == 0
        assert (
            main(
                shlex.split(
                    f"train recipe.toml {TINY} --data.validation_fraction 0 --job.dump_folder {folder}/run"
                )
            )
            == 0
        )
    return folder / "run"


def test_on_a_terminal_one_sees_where_the_prompt_ends(run, capsys, monkeypatch):
    line = f"generate {run} --prompt 'The fire' --max_new_tokens 3"
    plain = typed(line, capsys)
    assert plain.startswith("The fire") and "\033" not in plain and "‖" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    continued = plain.removeprefix("The fire")
    assert typed(line, capsys) == f"\033[2mThe fire\033[0m{continued}"
    monkeypatch.setenv("NO_COLOR", "1")
    assert typed(line, capsys) == f"The fire‖{continued}"


def test_eval_without_held_out_text_says_what_to_type(run, capsys):
    message = typed(f"eval {run}", capsys, 3)
    assert f"`longfire eval {run} --data FILE`" in message


def test_the_model_card_shows_no_folder_of_this_machine(run, capsys, tmp_path):
    card = (run / "hf/README.md").read_text()
    assert "| data | input.txt |" in card
    assert str(run.parent) not in card and not re.search(r"[ (`'\"]/\w", card)
    typed(f"import {run}/hf {tmp_path}/again", capsys)
    typed(f"export {tmp_path}/again {tmp_path}/out", capsys)
    assert "imported from hf (llama)" in (tmp_path / "out/README.md").read_text()
    assert str(run.parent) not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see /data/me/x.txt, ok", "see x.txt, ok"),
        ("~/texts/a.jsonl and (/tmp/b)", "a.jsonl and (b)"),
        (r"C:\me\x.txt", "x.txt"),
        (
            "https://host/a/b, owner/set, and/or, 1 / 2, w/ gates",
            "https://host/a/b, owner/set, and/or, 1 / 2, w/ gates",
        ),
    ],
)
def test_folders_leave_the_cards_texts_and_nothing_else_does(text, shown):
    from longfire.huggingface.model_card import cell

    assert cell(text) == shown


@pytest.mark.parametrize("missing", ["lm_eval.api", "evaluate"])
def test_lm_eval_that_is_not_whole_is_one_line(run, missing, capsys, monkeypatch):
    """lm_eval is found, and what it or a task of it imports is not."""
    package = type(sys)("lm_eval")
    package.__path__, package.__spec__ = [], type("Spec", (), {"name": "lm_eval"})()
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.delitem(sys.modules, "longfire.evaluation.lm_eval_model", raising=False)

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("longfire.evaluation.lm_eval_model"):
                raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    message = typed(f"eval {run} --tasks arc_easy", capsys, 2)
    assert message.strip().splitlines()[-1] == (
        f"longfire: --tasks: lm-eval is installed, but not whole: package {missing!r} is missing; pip install 'longfire[eval]', "
        f"and if it is still missing, pip install {missing}"
    )
