"""The validation losses of a run's steps, and which checkpoints have the lowest
(checkpoint.keep_best_k).

They are in a file beside the checkpoints, {step: nats a token}, since a checkpoint is saved before
its step is evaluated. Process 0 alone reads and writes it.
"""

import json
import math
from pathlib import Path

from longfire.checkpoint.folder import steps
from longfire.disk import write_whole
from longfire.own_files import read_note

LOSSES = "validation_losses.json"
MOST_DIGITS = 18  # of a step


def read_losses(folder: Path) -> dict[int, float]:
    """The loss of each step that was evaluated; none where nothing was, or the file is damaged (its
    checkpoints are then those of an unknown loss)."""
    losses: dict[int, float] = {}
    for step, loss in (read_note(folder / LOSSES, dict[str, float]) or {}).items():
        if step.isascii() and step.isdigit() and len(step) <= MOST_DIGITS:
            losses[int(step)] = loss
    return losses


def write_losses(folder: Path, losses: dict[int, float]) -> None:
    """The file as a whole, or as before. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / LOSSES, json.dumps({str(step): losses[step] for step in sorted(losses)}))


def note_loss(folder: Path, step: int, loss: float) -> None:
    """Note the loss of a step; one that is not finite is none. Raises OSError."""
    losses = read_losses(folder)
    losses.pop(step, None)
    if math.isfinite(loss):
        losses[step] = loss
    write_losses(folder, losses)


def forget_later_losses(folder: Path, step: int) -> None:
    """Forget those of later steps than the one that a run resumes from: it does them anew. Raises
    OSError."""
    losses = read_losses(folder)
    kept = {known: loss for known, loss in losses.items() if known <= step}
    if kept != losses:
        write_losses(folder, kept)


def best_steps(folder: Path, count: int) -> list[int]:
    """The steps with a checkpoint and the lowest losses, best first; of equal ones the earlier."""
    losses = read_losses(folder)
    known = [step for step in steps(folder) if step in losses]
    return sorted(known, key=lambda step: (losses[step], step))[:count]
