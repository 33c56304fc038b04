"""recipe.py: TOML, then the command line, into typed sections; whatever is wrong is reported with key, value, place and fix."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logged import logged_to

from longfire.config import recipe
from longfire.config.recipe import COMMAND_LINE, Given, model_tables
from longfire.errors import SettingsError
from longfire.mixers import MIXERS


def compose(toml="", folder=None, **overrides):
    givens = []
    if toml:
        path = folder / "x.toml"
        path.write_text(toml)
        givens.append(recipe.read_toml(path))
    return recipe.sections(*givens, recipe.read_words(overrides))


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    given = compose("[training]\nsteps = 7\nseed = 1", tmp_path, **{"training.steps": "9"})
    assert (given["training"].steps, given["training"].seed, given["training"].seq_len) == (
        9,
        1,
        2048,
    )


def test_old_spellings_in_toml_too(tmp_path):
    given = compose(
        '[training]\ndataset = "a,b"\ncompile = true\n[optimizer]\nscheduler = "warmup_stable_decay"',
        tmp_path,
    )
    assert given["data"].dataset == ("a", "b")
    assert given["training"].compile == "on"
    assert given["lr_scheduler"].name == "wsd"


def test_the_command_line_wins_under_another_spelling_too(tmp_path):
    given = compose("[lr_scheduler]\nwarmup_steps = 7", tmp_path, **{"training.warmup_steps": "9"})
    assert given["lr_scheduler"].warmup_steps == 9


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.steps", "1_000", 1000),
        ("optimizer.lr", "3e-4", 3e-4),
        ("optimizer.lr", "1", 1.0),
        ("data.streaming", "True", True),
        ("data.streaming", "off", False),
        ("data.dataset", "a.jsonl, b/c", ("a.jsonl", "b/c")),
        ("data.dataset", '["a,b.jsonl", "c"]', ("a,b.jsonl", "c")),
        ("data.dataset_name", "x,,y", ("x", "", "y")),
        ("data.dataset_name", "", ()),
        ("data.data_probs", "0.6,1", (0.6, 1.0)),
        ("data.data_probs", "[1, 2]", (1.0, 2.0)),
        ("eval.sample_prompt", "def ", "def "),
        ("checkpoint.load_step", "-1", -1),
    ],
)
def test_text_of_the_command_line_becomes_the_type(key, text, value):
    assert recipe.typed(key, text, recipe.COMMAND_LINE) == value


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (
            "[training]\nsteps = '7'",
            "x.toml: training.steps = '7' must be a whole number; write it without quotes",
        ),
        (
            "[training]\nsteps = 1e3",
            "x.toml: training.steps = 1000.0 must be a whole number; write 1000",
        ),
        ("[training]\nsteps = true", "training.steps = True must be a whole number"),
        ("[training]\nsteps = 0", "training.steps = 0 must be at least 1"),
        ("[training]\nskip_nan_inf = 1", "training.skip_nan_inf = 1 must be true or false"),
        ("[optimizer]\nlr = nan", "optimizer.lr = nan must be a finite number"),
        ("[optimizer]\nbeta1 = 1.0", "optimizer.beta1 = 1.0 must lie in [0, 1)"),
        (
            "[lr_scheduler]\nname = 'cosin'",
            "step, multistep, plateau (did you mean 'cosine'?)",
        ),
        ("[data]\ndataset = 3", "data.dataset = 3 must be a list of text"),
        ("[data]\ndata_probs = ['a']", "data.data_probs = ['a'] must be a number"),
        ("[job]\ndump_folder = 3", "job.dump_folder = 3 must be text"),
        (
            "[trainin]\nsteps = 3",
            "x.toml: unknown setting 'trainin.steps' (did you mean 'training.steps'?)",
        ),
        (
            "[training]\nstep = 3",
            "unknown setting 'training.step' (did you mean 'training.steps'?)",
        ),
        ("[training]\nlr = 3", "unknown setting 'training.lr' (did you mean 'optimizer.lr'?)"),
        ("[nonsense]\n", "unknown setting 'nonsense'"),
        ("[nonsense]\nxyz = 1", "the sections are job, model, data"),
        ("steps = ", "x.toml: not readable as TOML"),
        ("[data.sources]\ndataset = 'a'", "must be tables: [[data.sources]]"),
        ("[[data.sources]]\nname = 'a'", "[[data.sources]] number 1: `dataset` is missing"),
        (
            "[[data.sources]]\ndataset = 'a'\nsplits = 'b'",
            "unknown key 'splits' (did you mean 'split'?)",
        ),
        (
            "[[data.sources]]\ndataset = 'a'\nshare = 1\n[[data.sources]]\ndataset = 'b'",
            "give it in all or in none",
        ),
        (
            "[data]\ndataset = 'a'\n[[data.sources]]\ndataset = 'a'",
            "data.dataset and [[data.sources]] mean the same",
        ),
    ],
)
def test_a_mistake_is_reported_with_key_value_place_and_fix(toml, message, tmp_path):
    with pytest.raises(SettingsError, match=re.escape(message)):
        compose(toml, tmp_path)


def test_source_tables_are_the_parallel_lists(tmp_path):
    toml = """
        [[data.sources]]
        dataset = "HuggingFaceFW/fineweb-edu"
        name = "sample-10BT"
        share = 3
        [[data.sources]]
        dataset = "code"
        data_files = "*.jsonl"
        text_field = "content"
        share = 1.5
    """
    data = compose(toml, tmp_path)["data"]
    assert data.dataset == ("HuggingFaceFW/fineweb-edu", "code")
    assert data.dataset_name == ("sample-10BT", "")
    assert data.data_files == ("", "*.jsonl") and data.text_field == ("", "content")
    assert data.data_probs == (3.0, 1.5)
    assert data.dataset_split == () and data.data_dir == ()


def test_no_recipe_there(tmp_path):
    with pytest.raises(SettingsError, match="no such recipe"):
        recipe.read_toml(tmp_path / "none.toml")
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        recipe.read_toml(tmp_path)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(list(recipe.SETTINGS)),
    st.one_of(st.text(max_size=8), st.integers(), st.floats(), st.booleans()),
)
def test_any_value_is_of_the_type_or_reported(key, value):
    """Strictness has no hole: what comes through has the declared type."""
    for where in (recipe.COMMAND_LINE, "x.toml"):
        value_there = str(value) if where == recipe.COMMAND_LINE else value
        try:
            read = recipe.typed(key, value_there, where)
        except SettingsError as error:
            assert str(error).startswith(f"{where}: {key} = ")
        else:
            assert type(read) in (type(recipe.SETTINGS[key].default),)


@pytest.mark.parametrize(
    ("value", "where", "expected"),
    [
        ("1.5", COMMAND_LINE, 1.5),
        ("fan_in", COMMAND_LINE, "fan_in"),
        ("fan_in", "recipe.toml", "fan_in"),
        (2, "recipe.toml", 2.0),
    ],
)
def test_a_key_of_the_model_may_be_a_number_or_a_name(value, where, expected):
    assert model_tables({"model.init_embedding": Given(value, where)}) == {
        "init_embedding": expected
    }


def test_a_key_of_the_model_that_is_neither_is_refused():
    with pytest.raises(SettingsError, match="model.init_embedding = True must be a number"):
        model_tables({"model.init_embedding": Given(True, "recipe.toml")})


def test_names_of_other_systems_lead_to_a_setting():
    ours = {*recipe.SETTINGS, *recipe.SHAPE_KEYS}
    of_mixers = {
        f"model.MIXER.{name}"
        for mixer in MIXERS.values()
        for name in mixer.Config.__dataclass_fields__
    }
    assert set(recipe.OTHER_NAMES.values()) <= ours | of_mixers
    for name in recipe.OTHER_NAMES:
        assert name not in {key.rpartition(".")[2] for key in ours}, (
            f"{name} is a name of ours: never looked up here"
        )
        assert f"did you mean {recipe.OTHER_NAMES[name]!r}" in recipe.unknown(
            f"model.{name}", "x.toml"
        )


def both(toml: str, tmp_path, **words: str) -> tuple[dict[str, object], list[str]]:
    """The values of recipe and command line together, by our keys, and what was logged."""
    file = tmp_path / "old.toml"
    file.write_text(toml)
    message: list[str] = []
    with logged_to(message):
        given = recipe.both_in_own_names(recipe.read_toml(file), recipe.read_words(words))
    return {key: value for part in given for key, (value, _) in part.items()}, message


def test_words_in_two_places_are_translated_together(tmp_path):
    toml = '[lr_scheduler]\ndecay_type = "cosine"'
    values, _ = both(toml, tmp_path, **{"lr_scheduler.decay_ratio": "0.2"})
    assert values["lr_scheduler.name"] == "wsd" and values["lr_scheduler.decay_shape"] == "cosine"
    toml = "[lr_scheduler]\ndecay_ratio = 0.2"
    values, _ = both(toml, tmp_path, **{"lr_scheduler.decay_type": "sqrt"})
    assert values["lr_scheduler.name"] == "wsd" and values["lr_scheduler.decay_shape"] == "sqrt"
    toml = "[optimizer.adamw_optimizer]\nlr = 1e-3\nend_lr = 1e-4"
    values, _ = both(toml, tmp_path, **{"optimizer.adamw_optimizer.lr": "2e-3"})
    assert float(values["optimizer.lr"]) == 2e-3
    assert float(values["lr_scheduler.min_lr_ratio"]) == pytest.approx(0.05, rel=1e-12)


def test_a_word_in_two_places_is_logged_once_as_the_command_line_has_it(tmp_path):
    toml = '[optimizer]\nscheduler = "wsd"'
    values, message = both(toml, tmp_path, **{"optimizer.scheduler": "linear"})
    assert values["lr_scheduler.name"] == "linear"
    assert message == ["optimizer.scheduler = 'linear' is now lr_scheduler.name = 'linear'"]


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("learning_rat", "optimizer.lr"),
        ("warmup_step", "lr_scheduler.warmup_steps"),
        ("global_batchsize", "training.global_batch_size"),
        ("trainer.max_step", "trainer.max_steps"),
        ("datamodule.batch_siz", "datamodule.batch_size"),
    ],
)
def test_an_unknown_word_names_the_nearest(word, nearest):
    assert f"(did you mean {nearest!r}?)" in recipe.unknown(word, recipe.COMMAND_LINE)
