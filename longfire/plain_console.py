"""Consoles and progress columns that print texts as they are. Rich reads `[red]` and `:smile:` in a
text as commands; names of files, sources and fields may hold them."""

from rich.console import Console
from rich.progress import TextColumn


def plain_console(
    stderr: bool = False, highlight: bool = True, soft_wrap: bool = False, width: int | None = None
) -> Console:
    """A console that reads no command in texts. highlight: colour numbers. soft_wrap: let the
    terminal break lines. width: in columns, None: of the terminal."""
    return Console(
        stderr=stderr,
        markup=False,
        emoji=False,
        highlight=highlight,
        soft_wrap=soft_wrap,
        width=width,
    )


def plain_column(text_format: str) -> TextColumn:
    """A column of a progress bar, as `TextColumn`, that reads no command in its text."""
    return TextColumn(text_format, markup=False)
