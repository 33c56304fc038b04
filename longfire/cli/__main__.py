"""`python -m longfire.cli` is `longfire`."""

from longfire.cli.entry import program

program()
