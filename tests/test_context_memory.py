"""bench/context_memory.py: its parts run in small, and what a recomputed block keeps is what the paper's formula allows."""

import runpy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    return runpy.run_path(str(BENCH / "context_memory.py"))


def test_ours_keeps_at_most_2_b_h_s(bench):
    rows = {row["side"]: row for row in bench["kept"](128)}
    assert rows["ours"]["ratio"] <= 1.01 and rows["blockwise"]["ratio"] <= 1.01
    assert (
        rows["memory-efficient"]["bytes a token and layer"]
        > 8 * rows["ours"]["bytes a token and layer"]
    )


def test_the_line_of_a_hybrid_goes_through_its_points(bench, monkeypatch):
    """By peaks that grow by 1 MB a token of a segment from 1 GiB; the step itself runs once."""
    functions = bench["longest_hybrid"].__globals__
    monkeypatch.setitem(
        functions,
        "peak_bytes",
        lambda options, side, tokens, segments: 2**30 + 10**6 * tokens // segments,
    )
    options = type("Options", (), {"quick": True})()
    whole = bench["longest_hybrid"](options, "ours", [128, 192], 0, 20)
    in_time = bench["longest_hybrid"](options, "ours, in time", [128, 192], 64, 20)
    message = [
        (row["tokens"], row["segments"]) for found in (whole, in_time) for row in found["rows"]
    ]
    assert message == [(128, 1), (192, 1), (128, 2), (192, 3)]
    assert whole["line"][0]["longest by the line"] == pytest.approx(19 * 2**30 / 10**6, rel=1e-3)
    assert in_time["line"][0]["KB a token"] < 0.01
    bench["one_step"](bench["hybrid"](True), bench["SIDES"]["ours, in time"], 96, 2)


@pytest.mark.slow
def test_processes_that_share_a_row_are_started_and_the_largest_is_reported(bench):
    options = type("Options", (), {"quick": True, "child": "small"})()
    short, longer = (bench["peak_of_many"](options, tokens, 2) for tokens in (64, 4096))
    assert 2**27 < short < longer < 2**31


def test_the_longest_row_is_the_last_within_the_budget(bench, monkeypatch):
    functions = bench["lengths"].__globals__
    each = {"vanilla, lean MLP": 4, "ours": 1}
    monkeypatch.setitem(functions, "peak_bytes", lambda options, side, tokens: each[side] * tokens)
    _, best = bench["lengths"](type("Options", (), {"quick": True})(), 4 * 1400, 8192)
    longest = {row["side"]: row["longest row within the budget"] for row in best}
    assert longest == {"vanilla, lean MLP": 1024, "ours": 4096}
    assert best[1]["times vanilla with lean MLP (goal 4)"] == 4
