"""Numbers of a spelling's value."""

from longfire.errors import SettingsError


def whole_number(spelling: str, value: str) -> int:
    """The value as a number from 0 on. Raises SettingsError."""
    if not value.isdigit():
        raise SettingsError(f"{spelling} = {value!r} must be a whole number")
    return int(value)


def fraction(spelling: str, value: str) -> float:
    """The value as a number. Raises SettingsError."""
    try:
        return float(value)
    except ValueError:
        raise SettingsError(f"{spelling} = {value!r} must be a number") from None
