"""Real runs of several processes that a test can hurt: `longfire train` in forked processes, each with its own output file."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.multiprocessing as mp
from tiny_recipe import RECIPE, SHAPE
from worlds import free_port

from longfire.cli import main


@dataclass
class Ended:
    """How a run went: exit codes by rank (-9: killed), what each process printed, seconds."""

    codes: list[int]
    said: list[str]
    seconds: float


class Running:
    """The processes of a run."""

    def __init__(
        self,
        folder: Path,
        count: int,
        *words: str,
        patch: Callable[[int], None] | None = None,
        port: int = 0,
        late: dict[int, float] | None = None,
    ) -> None:
        self.begun, port = time.monotonic(), port or free_port()
        self.files = [folder / f"said-{rank}.txt" for rank in range(count)]
        for file in self.files:
            file.unlink(missing_ok=True)
        context = mp.get_context("fork")
        arguments = [str(folder / "recipe.toml"), *words]
        self.processes = [
            context.Process(
                target=train,
                args=(rank, count, port, arguments, file, patch, (late or {}).get(rank, 0)),
            )
            for rank, file in enumerate(self.files)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, number)

    def until(self, rank: int, text: str, seconds: float = 60) -> None:
        """Wait until a process has printed something."""
        begun = time.monotonic()
        while text not in (self.files[rank].read_text() if self.files[rank].exists() else ""):
            assert time.monotonic() - begun < seconds, (
                f"process {rank} never said {text!r}: {self.files[rank].read_text()}"
            )
            time.sleep(0.01)

    def end(self, seconds: float = 90) -> Ended:
        """Wait until all have ended. Raises AssertionError if one has not in so many seconds."""
        limit = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, limit - time.monotonic()))
        alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in alive:
            self.kill(rank)
            self.processes[rank].join()
        said = [file.read_text() if file.exists() else "" for file in self.files]
        assert not alive, f"processes {alive} still ran after {seconds} s: {said}"
        return Ended(
            [process.exitcode for process in self.processes], said, time.monotonic() - self.begun
        )


def train(
    rank: int,
    count: int,
    port: int,
    words: list[str],
    file: Path,
    patch: Callable | None,
    late: float,
) -> None:
    """The body of a process."""
    time.sleep(late)
    with file.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        sys.stdout, sys.stderr = (
            os.fdopen(1, "w", 1, closefd=False),
            os.fdopen(2, "w", 1, closefd=False),
        )
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            RANK=str(rank),
            WORLD_SIZE=str(count),
            LOCAL_RANK=str(rank),
        )
        code = 99
        try:
            if patch:
                patch(rank)
            code = main(["train", *words])
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)


def make(folder: Path) -> Path:
    """The recipe and its text."""
    (folder / "shape.json").write_text(SHAPE)
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "text.txt").write_text(
        "".join(f"{n} sheep jump over the fence of field {n * 7 % 31}.\n" for n in range(200))
    )
    return folder
