"""settings/: every setting has a help, a default that its own rules accept, and one place."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from typing import Literal, get_args, get_origin

import pytest

from longfire.config import recipe, settings
from longfire.config.settings import SECTIONS


@pytest.mark.parametrize("key", recipe.SETTINGS)
def test_a_setting_says_what_it_does_and_its_default_is_allowed(key):
    field = recipe.SETTINGS[key]
    assert len(field.metadata["help"]) > 10 and not field.metadata["help"].endswith(".")
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    assert recipe.typed(key, value, "default") == field.default
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    assert recipe.typed(key, text, recipe.COMMAND_LINE) == field.default


@pytest.mark.parametrize("key", recipe.SETTINGS)
def test_numbers_have_an_interval_and_types_are_ones_that_a_recipe_can_say(key):
    kind = recipe.SETTINGS[key].type
    if get_origin(kind) is tuple:
        assert get_args(kind)[0] in (str, float, int)
    elif get_origin(kind) is not Literal:
        assert kind in (bool, int, float, str)
    if kind in (int, float) and not key.startswith(
        "parallelism."
    ):  # degrees: parallel/plan.py knows which exist
        assert recipe.SETTINGS[key].metadata["within"], (
            "an interval tells a typo such as a negative number"
        )


def test_sections_are_frozen_and_named_as_their_classes():
    for section, cls in SECTIONS.items():
        assert cls.__name__.lower() == section.replace("_", "")
        with pytest.raises(FrozenInstanceError):
            setattr(cls(), fields(cls)[0].name, None)


def test_nothing_slow_is_imported():
    modules = ("torch", "numpy", "rich", "transformers", "datasets")
    code = f"import longfire.cli.entry, sys; print([m for m in {modules} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_every_section_of_the_issue_is_there():
    wanted = "job model data images classification tokenizer training optimizer lr_scheduler "
    wanted += "parallelism attention float8 activation_checkpoint checkpoint distillation eval"
    assert list(settings.SECTIONS) == [*wanted.split(), "metrics", "profiling", "comm"]
