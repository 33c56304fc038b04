"""The entry point: a word names a command; what a user can fix is one message on stderr and an exit
code."""

import contextlib
import io
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from longfire.cli.arguments import summary_of
from longfire.cli.commands import COMMANDS, GROUPS, Command
from longfire.cli.failures import failure_of
from longfire.config.values import nearest
from longfire.ending_signals import EndingSignal, Terminated, terminable
from longfire.errors import SettingsError, UserError
from longfire.launch import end_process, is_another_process
from longfire.messages import show_messages, visible

STDOUT, STDERR = 1, 2  # the file descriptors
REPORT_SECONDS = 20  # that the process which reports an error may take to come to it
CLOSED_PIPE = 128 + 13  # the exit code that a shell gives to a program that SIGPIPE ended


def overview() -> str:
    """`longfire --help`: the commands by what they are for."""
    lines = ["longfire: from raw text to Hugging Face weights.", ""]
    lines.append("usage: longfire COMMAND ...   (longfire COMMAND --help says more)")
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:<10}{summary_of(command)}" for name, command in commands.items()]
    lines += [
        "",
        "example:",
        "  longfire init --data input.txt --model gla --size 10m",
        "  longfire train recipe.toml",
        "",
        "--traceback shows where in the code an error arose; --version says which longfire this "
        "is.",
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. An error is one message on stderr, without a traceback unless
    --traceback asks for it."""
    words = list(sys.argv[1:] if words is None else words)
    show_odd_names()
    show_messages()
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    ending = EndingSignal()
    try:
        try:
            with terminable(ending):
                return run_command(words)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return stopped_by(signal.SIGINT)
    except Terminated:
        return stopped_by(signal.SIGTERM)
    except Exception as error:
        if ending.number:  # a library has put this error in the place of the signal's
            return stopped_by(ending.number)
        if isinstance(error, BrokenPipeError) and stdout_is_closed():
            write_to_nowhere(STDOUT)
            return CLOSED_PIPE
        if show_traceback:
            raise
        return report(error)


def stopped_by(number: signal.Signals) -> int:
    """Print that a signal ended the command; the exit code."""
    if number == signal.SIGINT:
        show_error("interrupted")
    elif not is_another_process():  # the first one says it for all
        show_error("SIGTERM: stopped; what is whole on disk stays")
    return 128 + number


def report(error: Exception) -> int:
    """Print one message about an error; the exit code."""
    if isinstance(error, UserError):
        if error.reported_elsewhere:
            wait_to_be_ended()
        else:
            show_error(visible(str(error)))
        return error.exit_code
    failure = failure_of(error)
    show_error(visible(failure.message))
    return failure.exit_code


def show_error(message: str) -> None:
    """Print a message on stderr, if it can be written: the exit code says in any case that there
    was an error."""
    try:
        print(f"longfire: {message}", file=sys.stderr, flush=True)
    except OSError:
        write_to_nowhere(STDERR)


def write_to_nowhere(descriptor: int) -> None:
    """Let what is left in the buffer of a stream go nowhere when the interpreter ends, where it
    would fail again and change the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def program() -> NoReturn:
    """`longfire` as a program: run the command of the command line and end the process."""
    end_process(main())


def wait_to_be_ended() -> None:
    """Wait until the launcher ends this process, since another one reports the error: a launcher
    that sees this one end first may end that one before it has printed anything."""
    with contextlib.suppress(Terminated, KeyboardInterrupt), terminable():
        time.sleep(REPORT_SECONDS)


def run_command(words: Sequence[str]) -> int:
    """The command that the words name; its exit code. Raises UserError."""
    refuse_other_bytes(words)
    if not words:
        print(overview(), file=sys.stderr)
        return SettingsError.exit_code
    if words[0] in ("-h", "--help", "help"):
        return help_of(list(words[1:]))
    if words[0] == "--version":
        print(f"longfire {version('longfire')}")
        return 0
    return command_of(words[0])(list(words[1:]))


def show_odd_names() -> None:
    """Names of files that are not UTF-8 are shown with their bytes as \\x.., where printing them
    would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def refuse_other_bytes(words: Sequence[str]) -> None:
    """Raises SettingsError for a word of the command line that is not text."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(word).decode(errors="backslashreplace")
            raise SettingsError(
                f"{shown!r} on the command line is not UTF-8: write a prompt in UTF-8; rename "
                "such a file, or name the folder that holds it"
            ) from None


def stdout_is_closed() -> bool:
    """Whether who read our output has closed it, as `| head` does; another pipe may be what
    broke."""
    poll = select.poll()
    poll.register(STDOUT, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def help_of(words: list[str]) -> int:
    """`longfire help` and `longfire help COMMAND`."""
    if words:
        return command_of(words[0])(["--help", *words[1:]])
    print(overview())
    return 0


def command_of(word: str) -> Command:
    """The command of this name. Raises SettingsError with the nearest one."""
    if word in COMMANDS:
        return COMMANDS[word]
    if word.endswith(".toml"):
        raise SettingsError(f"{word} is a recipe; `longfire train {word}` trains it")
    raise SettingsError(
        f"unknown command {word!r}{nearest(word, COMMANDS)}; `longfire --help` lists them"
    )


if __name__ == "__main__":
    program()
