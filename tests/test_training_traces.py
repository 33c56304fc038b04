"""traces.py: one step in profile_freq is traced, as a file that Perfetto opens; nothing is written unless asked for."""

import json

import pytest
import torch

from longfire.config.settings import Profiling
from longfire.training.traces import profiler


def steps(settings: Profiling, folder, count: int) -> None:
    with profiler(settings, folder) as step_done:
        for _ in range(count):
            torch.ones(4) @ torch.ones(4)
            step_done()


@pytest.mark.parametrize("freq, written", [(1, [1, 2, 3]), (2, [2, 4]), (3, [3])])
def test_one_step_in_so_many(tmp_path, freq, written):
    steps(
        Profiling(enable_profiling=True, profile_freq=freq, save_traces_folder="here"),
        tmp_path,
        written[-1] + freq - 1,
    )
    traces = sorted((tmp_path / "here").iterdir())
    assert [path.name for path in traces] == [f"step-{step}.json" for step in written]
    events = json.loads(traces[0].read_text())["traceEvents"]
    assert any(event.get("name") == "aten::dot" for event in events)


def test_off_writes_nothing(tmp_path):
    steps(Profiling(), tmp_path, 12)
    assert not list(tmp_path.iterdir())
