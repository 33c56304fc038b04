"""Warnings of promise 14: no training that is slow without a word."""

from collections import deque
from collections.abc import Iterator

from longfire.training.records import Values

WINDOW_STEPS = 50  # over which waiting for data is judged
QUIET_STEPS = 500  # between two warnings of one kind
WARMUP_STEPS = 20  # of a process, in which graphs may be compiled without a warning
DATA_WAIT_LIMIT = 0.05  # share of the time of these steps


class SlownessWatch:
    """Warns when training waits for data, or compiles again after its warm-up; each at most once in
    QUIET_STEPS."""

    def __init__(self, start_step: int) -> None:
        self.start_step = start_step
        self.window: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)
        self.recompiles: float | None = None
        self.quiet_until = {"data": 0, "recompiles": 0}

    def look(self, step: int, values: Values) -> list[str]:
        """The warnings that follow from the record of this step."""
        if "seconds" not in values:
            return []
        return [*self.waits_for_data(step, values), *self.compiles_again(step, values)]

    def waits_for_data(self, step: int, values: Values) -> Iterator[str]:
        """A warning where a large part of the last steps was spent on waiting."""
        seconds = values["seconds"]
        self.window.append((values.get("data_wait_fraction", 0.0) * seconds, seconds))
        waited = sum(waited for waited, _ in self.window)
        whole = sum(seconds for _, seconds in self.window)
        is_full = len(self.window) == WINDOW_STEPS
        is_slow = is_full and waited > DATA_WAIT_LIMIT * whole
        if is_slow and step >= self.quiet_until["data"]:
            self.quiet_until["data"] = step + QUIET_STEPS
            yield (
                f"step {step}: {waited / whole:.0%} of the last {WINDOW_STEPS} steps "
                "went into waiting for data. A larger data.prefetch_factor evens out slow "
                "batches; with data.streaming more data.num_workers tokenize, or prepare the "
                "data first (longfire prepare)"
            )

    def compiles_again(self, step: int, values: Values) -> Iterator[str]:
        """A warning where torch.compile made new graphs after the warm-up."""
        graphs = values.get("recompiles", 0)
        more = 0 if self.recompiles is None else graphs - self.recompiles
        self.recompiles = graphs
        is_warm = step > self.start_step + WARMUP_STEPS
        if more > 0 and is_warm and step >= self.quiet_until["recompiles"]:
            self.quiet_until["recompiles"] = step + QUIET_STEPS
            yield (
                f"step {step}: torch.compile made {more:.0f} more graph(s), "
                f"{graphs:.0f} in all, after the warm-up: shapes or settings of the model change "
                "from step to step; training.compile = off avoids the wait"
            )
