"""plural.py: numbers of things in messages."""

import pytest

from longfire.plural import counted


@pytest.mark.parametrize(
    "number, message", [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (1234, "1,234 steps")]
)
def test_one_is_no_plural(number, message):
    assert counted(number, "step") == message
