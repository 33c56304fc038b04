"""torchrun for `scripts/train.sh`: where all that failed is something that the user can fix, the
message of longfire is the last line, without torchrun's traceback."""

import logging
import sys

from longfire.errors import CheckpointError, DataError, SettingsError, TrainingError

USER_ERRORS = (SettingsError, DataError, CheckpointError, TrainingError)


def main() -> int:
    """Start the processes that torchrun's arguments describe; the exit code of the first one that
    failed, 0 if none did. Raises ChildFailedError where it failed for another reason."""
    # Seconds of imports, as in the other commands.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # What it logs of a failed process stands in its error too.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode not in [user_error.exit_code for user_error in USER_ERRORS]:
            raise
        return failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
