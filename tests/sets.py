"""Which cases of a test run in `make test`, and which in the slow set: a promise is tested in both, with fewer cases in the first."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(quick: Callable[..., bool], cases: Iterable[Any]) -> list[Any]:
    """The cases of a parametrized test, those marked slow for which quick(*values) is false."""
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marked.append(
            pytest.param(
                *values, marks=[] if quick(*values) else pytest.mark.slow, id=name_of(values)
            )
        )
    return marked


def name_of(values: tuple[Any, ...]) -> str:
    """A readable name of a case: its texts and numbers."""
    return "-".join(getattr(value, "__name__", str(value)) for value in values)
