"""`python -m longfire` is `longfire`."""

from longfire.cli import program

program()
