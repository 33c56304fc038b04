"""torchrun for `scripts/train.sh`: where processes of longfire have failed, their own message is
the last line, without torchrun's traceback."""

import logging
import signal
import sys


def main() -> int:
    """Start the processes that torchrun's arguments describe; the exit code of the first one that
    failed, 0 if none did."""
    # Seconds of imports, as in the other commands.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # What it logs of a failed process is in its error too.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # the process has printed why
            return failure.exitcode
        print(f"longfire: {ended_by_signal(rank, -failure.exitcode)}", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


def ended_by_signal(rank: int, number: int) -> str:
    """What is known of a process that a signal has ended, which could not print anything."""
    name = signal.Signals(number).name
    causes = {
        signal.SIGKILL: "as the system does where memory is short (see the kernel's log)",
        signal.SIGBUS: "as the system does where shared memory or a disk is full",
    }
    cause = causes.get(signal.Signals(number), "which is a fault of longfire or of a library")
    return f"process {rank} was ended by {name}, {cause}; the newest whole checkpoint stays"


if __name__ == "__main__":
    sys.exit(main())
