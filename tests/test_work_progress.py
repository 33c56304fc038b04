"""work_progress.py: long work says how far it is and how long the rest takes."""

from logged import logged_to

from longfire.work_progress import FIRST_SECONDS, NOTE_SECONDS, WorkProgress


class Clock:
    """A clock that goes as far as it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def lines_of(amounts: list[float], seconds_each: float) -> list[str]:
    """What is logged while these amounts of 1,000 are done, each in so many seconds."""
    clock = Clock()
    lines: list[str] = []
    with logged_to(lines), WorkProgress("needles", 1000, "tokens", clock) as progress:
        for amount in amounts:
            clock.seconds += seconds_each
            progress.add(amount)
    return lines


def test_short_work_says_nothing():
    assert lines_of([500, 500], FIRST_SECONDS / 4) == []


def test_long_work_says_how_far_it_is_and_what_is_left():
    lines = lines_of([100.0] * 10, FIRST_SECONDS)
    assert lines[0] == "needles: 100 of 1,000 tokens, 1 min 30 s left"
    assert lines[1] == "needles: 400 of 1,000 tokens, 1 min 0 s left"
    assert len(lines) == 3, f"every {NOTE_SECONDS} s, and not when all is done"


def test_an_import_shows_its_parameters_and_changes_nothing():
    import torch

    from longfire.huggingface.import_ import with_progress

    weights = [("a", torch.ones(2, 3)), ("b", torch.zeros(4))]
    assert list(with_progress(iter(weights), 10)) == weights


def test_a_conversion_shows_its_parameters_and_changes_nothing():
    import torch

    from longfire.huggingface.convert import shown_progress

    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    assert list(shown_progress(tensors)) == list(tensors.items())
