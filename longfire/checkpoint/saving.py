"""The checkpoints of a run: when one is saved, who writes what, which ones are kept.

A checkpoint is written beside its place, synced, and renamed once. Every process writes its files
and then a marker, and process 0 puts what all markers say into the manifest: so nothing is sent
between processes while training continues. What a kill leaves behind is never taken for a
checkpoint.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch

from longfire.checkpoint.best import LOSSES, best_steps, forget_later_losses, note_loss
from longfire.checkpoint.folder import (
    FORMAT,
    LEFT,
    Facts,
    FileFacts,
    Marker,
    clean,
    facts_of,
    marker_of,
    steps,
    tmp_path_of,
    write_manifest,
    write_tensors,
)
from longfire.checkpoint.host_copies import HostCopies
from longfire.checkpoint.restoring import load, refuse_another_vocabulary, step_to_load
from longfire.checkpoint.shards import LocalTensor
from longfire.checkpoint.state import Counters, State
from longfire.config import settings
from longfire.disk import put_in_place, write_whole
from longfire.errors import CheckpointError, first_line
from longfire.listing import exists, is_folder, paths_in
from longfire.own_files import read_json
from longfire.parallel.mesh import ALONE, Mesh

logger = logging.getLogger(__name__)

MARKER_SECONDS = 0.02  # between two looks for the markers of other processes


@dataclass
class Checkpoints:
    """The checkpoints of one run. `due`, `save`, `wait` and `restore` are collective: all processes
    of the mesh call them at the same step.

    patience_seconds: how long
    process 0 waits for the files of the others (0: without a limit). vocabulary: a digest of what
    the ids of the run stand for, which each checkpoint keeps (data/tokenizer.py). attempt: how
    often a launcher has restarted the processes of this run after one had died.
    evaluated_interval: steps between two validations, each of which has a checkpoint with
    checkpoint.keep_best_k. uses_average: whether those who read the weights of a checkpoint take
    their average (optimizer.ema_decay).
    """

    folder: Path
    settings: settings.Checkpoint
    mesh: Mesh = ALONE
    patience_seconds: float = 3600
    vocabulary: str = ""
    attempt: int = 0
    evaluated_interval: int = 0
    uses_average: bool = False
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int | None = None
    writing: Future[None] | None = None  # the save in the background
    host_copies: HostCopies = field(init=False)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))

    def __post_init__(self) -> None:
        pinned = self.settings.async_mode == "async_with_pinned_mem" and torch.cuda.is_available()
        self.host_copies = HostCopies(pinned)

    def due(self, state: State) -> bool:
        """Whether a save follows this step, by checkpoint.interval or as a milestone."""
        if not self.settings.enable_checkpoint:
            return False
        if self.is_milestone(state.step) or self.is_evaluated(state.step):
            return True
        if not self.settings.interval:
            return False
        if self.settings.interval_type == "seconds":
            seconds = time.monotonic() - self.saved_at
            return self.mesh.broadcast_object(seconds >= self.settings.interval)
        return state.step % self.settings.interval == 0

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint of this step is saved and kept, by
        checkpoint.milestone_interval."""
        every = self.settings.milestone_interval
        return every > 0 and step % every == 0

    def is_evaluated(self, step: int) -> bool:
        """Whether the checkpoint of this step may be one of checkpoint.keep_best_k."""
        every = self.evaluated_interval
        return self.settings.keep_best_k > 0 and every > 0 and step % every == 0

    def note_loss(self, step: int, loss: float) -> None:
        """Note the validation loss of a step (nats a token), by which checkpoint.keep_best_k
        chooses, and remove what is no longer one of the best, unless a save in the background will
        do so. Raises CheckpointError. Collective."""
        if not (self.settings.enable_checkpoint and self.settings.keep_best_k):
            return
        with self.mesh.raise_on_all_ranks():
            if self.mesh.rank() == 0:
                with self.os_errors_explained(self.folder / LOSSES):
                    note_loss(self.folder, step, loss)
                    if self.writing is None:
                        self.prune_old()

    def save(self, state: State, *, last: bool = False) -> None:
        """Save the state as step-N, in the background with async_mode. Raises CheckpointError, also
        for the save before."""
        if not self.settings.enable_checkpoint:
            return
        self.wait()
        weights_only = last and self.settings.model_weights_only
        if state.step == self.saved_step and not weights_only:
            return  # the last step was due as well, or nothing was trained since the restore
        place = self.folder / f"step-{state.step}"
        self.make_tmp_folder(place)
        held = state.written(weights_only)
        counters = state.counters()
        self.saved_at = time.monotonic()
        self.saved_step = state.step
        if self.settings.async_mode == "disabled":
            with self.mesh.raise_on_all_ranks():
                self.write(held, counters, weights_only)
        else:
            state.snapshot_done = self.host_copies.begin(held)
            self.writing = self.thread.submit(
                self.copy_and_write,
                held,
                counters,
                weights_only,
                state.snapshot_done,
            )

    def make_tmp_folder(self, place: Path) -> None:
        """Process 0 makes the folder that all write into. Raises CheckpointError. Collective."""
        tmp = tmp_path_of(place)
        with self.mesh.raise_on_all_ranks():
            if self.mesh.rank() == 0:
                with self.os_errors_explained(place):
                    clean(self.folder)
                    tmp.mkdir(parents=True)
        with self.mesh.raise_on_all_ranks():
            if not is_folder(tmp):
                raise CheckpointError(
                    f"{tmp} does not exist on this machine: job.dump_folder must be on a file "
                    "system that all machines share"
                )

    def wait(self) -> None:
        """Wait until a save in the background is on disk. Raises its CheckpointError, on every
        process."""
        writing = self.writing
        self.writing = None
        if writing:
            with self.mesh.raise_on_all_ranks():
                writing.result()

    def copy_and_write(
        self,
        held: dict[str, LocalTensor],
        counters: Counters,
        weights_only: bool,
        snapshot_done: "Event | torch.cuda.Event",
    ) -> None:
        """In the background, while training computes the next gradients
        (State.wait_for_snapshot)."""
        self.write(self.host_copies.finish(held, snapshot_done), counters, weights_only)

    def write(
        self,
        held: dict[str, LocalTensor],
        counters: Counters,
        weights_only: bool,
    ) -> None:
        """Write the files and the marker of this process. Process 0 then waits for all markers,
        writes the manifest, renames the folder, and removes old checkpoints."""
        place = self.folder / f"step-{counters['step']}"
        tmp = tmp_path_of(place)
        rank = self.mesh.rank()
        with self.os_errors_explained(place):
            try:
                files = write_tensors(held, tmp, rank)
            except Exception as error:
                # the disk may be full, and the marker, for which process 0 waits, needs space
                for path in paths_in(tmp, f"shard-{rank:05d}-*"):
                    path.unlink()
                write_whole(tmp / marker_of(rank), json.dumps({"error": str(error)}))
                raise
            if rank:
                write_whole(tmp / marker_of(rank), json.dumps({"files": files}))
                return
            files |= self.files_of_others(tmp)
            facts: Facts = {
                "format": FORMAT,
                "torch": torch.__version__,
                "weights_only": weights_only,
                **counters,
                "keep_latest_k": self.settings.keep_latest_k,
                "vocabulary": self.vocabulary,
                "uses_average": self.uses_average,
            }
            write_manifest(tmp, facts, files)
            self.move_later_checkpoints(counters["step"])
            put_in_place(tmp, place)
            self.prune_old()

    def files_of_others(self, tmp: Path) -> dict[str, FileFacts]:
        """The files of all other processes, as their markers name them. Raises OSError if a process
        failed, or its marker does not come in time."""
        begun = time.monotonic()
        files: dict[str, FileFacts] = {}
        missing = set(range(1, self.mesh.size()))
        while missing:
            for rank in sorted(missing):
                marker = tmp / marker_of(rank)
                if exists(marker):
                    content = read_json(marker, Marker, CheckpointError, "start again")
                    if "error" in content:
                        raise OSError(f"process {rank}: {content['error']}")
                    files |= content.get("files", {})
                    missing.remove(rank)
            if self.patience_seconds and time.monotonic() - begun > self.patience_seconds:
                raise OSError(
                    f"the files of process(es) {sorted(missing)} were not written within "
                    f"{self.patience_seconds:g} s"
                )
            time.sleep(MARKER_SECONDS if missing else 0)
        return files

    @contextmanager
    def os_errors_explained(self, place: Path) -> Iterator[None]:
        """An OSError inside becomes a CheckpointError that names the complete checkpoints and the
        fix."""
        try:
            yield
        except OSError as error:
            # several processes: others may still write there; the next start removes it
            if self.mesh.size() == 1:
                shutil.rmtree(tmp_path_of(place), ignore_errors=True)
            complete = ", ".join(f"step-{step}" for step in steps(self.folder)) or "none"
            raise CheckpointError(
                f"{place} could not be written: {first_line(error)}. Complete checkpoints: "
                f"{complete}. Free some space or fix the folder, then start again: the run resumes "
                "from the newest"
            ) from error

    def leave_abandoned_branch(self, step: int) -> None:
        """Set aside what was saved after the step that load_step went back to, before training goes
        on: a start without load_step then resumes from there too. Collective over the mesh."""
        with self.mesh.raise_on_all_ranks():
            if self.mesh.rank() == 0:
                self.move_later_checkpoints(step)

    def move_later_checkpoints(self, step: int) -> None:
        """A checkpoint of a later step than this one is damaged, or of the part of the run that
        load_step has abandoned. It is kept in `left/`, where no resume takes it for the newest and
        keep_latest_k does not count it."""
        for later in [name for name in steps(self.folder) if name > step]:
            place = self.folder / f"step-{later}"
            left = self.folder / LEFT / f"step-{later}"
            left.parent.mkdir(exist_ok=True)
            shutil.rmtree(left, ignore_errors=True)
            place.rename(left)
            logger.info(
                f"{place} is later than step {step}, from which this run continues: kept as {left}"
            )

    def forget_later_losses(self, step: int) -> None:
        """Also where keep_best_k is 0 now: losses of steps that are done anew are not noted then,
        and a later start with it would take the old ones for theirs. Collective over the mesh."""
        with self.mesh.raise_on_all_ranks():
            if self.mesh.rank() == 0:
                with self.os_errors_explained(self.folder / LOSSES):
                    forget_later_losses(self.folder, step)

    def prune_old(self) -> None:
        """Keep the newest keep_latest_k, the best keep_best_k, every milestone, what was saved
        while all were kept, and step 0, from which other runs may start."""
        if not self.settings.keep_latest_k:
            return
        best = best_steps(self.folder, self.settings.keep_best_k)
        for step in steps(self.folder)[: -self.settings.keep_latest_k]:
            place = self.folder / f"step-{step}"
            if step and step not in best and not self.is_milestone(step) and may_be_pruned(place):
                # renamed first, so that no reader finds a part of it
                gone = self.folder / f"step-{step}.forgotten"
                place.rename(gone)
                shutil.rmtree(gone)

    def restore(self, state: State) -> bool:
        """Load load_step, or the newest complete checkpoint (noting newer ones that are damaged).
        False if there is none yet.

        Raises CheckpointError, also for a checkpoint whose ids mean other text than those of the
        run.
        """
        if not self.settings.enable_checkpoint:
            return False
        with self.mesh.raise_on_all_ranks():
            if self.mesh.rank() == 0:
                with self.os_errors_explained(self.folder):
                    clean(self.folder)
        try:
            step = step_to_load(self.folder, self.settings, self.attempt, self.mesh)
            if step is None:
                return False
            place = self.folder / f"step-{step}"
            goes_back = step == self.settings.load_step
            load(state, place, self.mesh, is_checked=not goes_back)
            refuse_another_vocabulary(place, self.vocabulary, "tokenizer.path")
        except CheckpointError as error:
            error.reported_elsewhere |= self.mesh.rank() > 0  # all processes found the same
            raise
        if goes_back:
            state.went_back_to = step
            self.leave_abandoned_branch(step)
        self.forget_later_losses(step)
        self.saved_at = time.monotonic()
        # one whose readers are to take other weights (eval.ema) is saved anew
        is_as_asked = facts_of(place).get("uses_average", False) == self.uses_average
        self.saved_step = state.step if is_as_asked else None
        fresh = "" if state.optimizer.state else ", with a fresh optimizer"
        logger.info(
            f"weights: resuming from {place}: {state.tokens:,} tokens seen, "
            f"sequence {state.rows_consumed:,} is next{fresh}"
        )
        return True


def may_be_pruned(place: Path) -> bool:
    """Whether a checkpoint was saved by a run that keeps the newest only. One that cannot be read
    is kept."""
    try:
        return bool(facts_of(place).get("keep_latest_k"))
    except CheckpointError:
        return False
