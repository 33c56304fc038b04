"""The errors that a user can cause: each message names what, where, and the fix; the command line
shows it without a traceback."""


def first_line(error: BaseException, most: int | None = 200) -> str:
    """What an error of another library says, or its class: its first line, `most` characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


class UserError(Exception):
    """Something the user can fix. `str(error)` is one message: what is wrong, where, and what to
    do."""

    exit_code = 2
    reported_elsewhere = False  # another process of the run prints it


class SettingsError(UserError):
    """A key, its value, and the fix; raised before any data or device is touched."""


class DataError(UserError):
    """A source, token store or tokenizer that cannot be used: names file and row."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint or run folder that cannot be loaded or written: names the file and what is
    whole."""

    exit_code = 4


class TrainingError(UserError):
    """Training cannot go on (non-finite loss, a starved or hung step): names the step and its
    batch."""

    exit_code = 5


class MachineError(UserError):
    """The machine refuses something: rights, disk space, memory, threads, open files."""

    exit_code = 6
