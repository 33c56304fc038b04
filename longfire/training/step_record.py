"""The record of a step: its numbers, its speed, MFU, memory, and where its seconds went."""

import logging
from functools import cache

import torch

from longfire.checkpoint.state import State
from longfire.config.run import Run
from longfire.device import allocator_numbers, fastest_matmul_peak, peak_memory_bytes
from longfire.parallel.apply import recompilations
from longfire.training import lengths
from longfire.training.schedule import until

logger = logging.getLogger(__name__)


class StepRecords:
    """Makes the records of the steps. The FLOP/s that MFU refers to are measured, or looked up, and
    logged once, here."""

    def __init__(self, run: Run, state: State, device: torch.device) -> None:
        self.run = run
        self.state = state
        self.device = device
        self.peak_flops, source = fastest_matmul_peak(device)
        self.flops_per_token = cache(self._flops_per_token)
        flops = self.flops_per_token(lengths.stage_at(run.training, state.step).seq_len)
        logger.info(
            f"mfu: of {self.peak_flops / 1e12:.3g} TFLOP/s ({source}); "
            f"{flops / 1e6:,.0f} MFLOP a token, forward and backward"
        )

    def _flops_per_token(self, seq_len: int) -> float:
        return 3 * self.state.model.flops_per_token(seq_len)

    def record(self, numbers: dict[str, float], seconds: dict[str, float]) -> dict[str, float]:
        """The record of the step that has just been done.

        numbers: what train_step returned. seconds: the parts of Clock.read.
        """
        state = self.state
        seq_len = lengths.stage_of_model(self.run.training, state.step).seq_len
        tokens_per_second = self.run.tokens_per_step / seconds["seconds"]
        peak_of_all = self.peak_flops * state.mesh.size()
        record = {name: value for name, value in numbers.items() if name != "skipped"}
        record |= {
            "tokens": state.tokens,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self.flops_per_token(seq_len) / peak_of_all,
            "data_wait_fraction": seconds.get("data", 0.0) / seconds["seconds"],
            "memory_bytes": peak_memory_bytes(self.device),
            **allocator_numbers(self.device),
            "skipped_steps": state.skipped_steps,
            "recompiles": recompilations(),
        }
        if state.model.context:
            record |= state.model.context.describe()
        record["elapsed_seconds"] = state.elapsed_seconds
        plan = until(state.plan, state.step - 1)
        if plan:  # as it was when the step was made
            record["planned_steps"] = plan[-1].total_steps
        for part, value in seconds.items():
            record[part if part == "seconds" else f"{part}_seconds"] = value
        return record
