"""`longfire doctor`."""

from collections.abc import Sequence

from longfire.cli.arguments import Parser


def doctor(words: Sequence[str]) -> int:
    """Check every fast kernel against its reference implementation on this machine, forward and
    backward."""
    Parser("doctor", doctor, "longfire doctor").parse_words(words)
    from longfire.doctor.check import main as check_machine

    return check_machine()
