"""`longfire gpu-check`: a stage that raises, dies or hangs is a row, and the next one runs; every stage runs on a CPU."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from longfire.cli import main as longfire
from longfire.errors import MachineError
from longfire.gpu_check import goals, graphs, kernel_kinds, peers, processes, short_run
from longfire.gpu_check.check import Check, chosen
from longfire.gpu_check.kernel_kinds import Kernel
from longfire.gpu_check.model_runs import config_of, run_of
from longfire.gpu_check.speed import memory_problems
from longfire.gpu_check.stage import Outcome, Stage, Work
from longfire.gpu_check.stages import STAGES
from longfire.ops import forms

HANGS_SECONDS = 3000


def found(work: Work) -> Outcome:
    return Outcome("all is well", {"answer": 42, "nothing": float("nan")})


def wrong(work: Work) -> Outcome:
    return Outcome("looked at", {}, ("one number is wrong",), ("another",))


def raising(work: Work) -> Outcome:
    raise RuntimeError("no kernel image is available\nand more")


def dying(work: Work) -> Outcome:
    work.note("the third kernel")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("never reached")


def hanging(work: Work) -> Outcome:
    work.note("a kernel that never ends")
    time.sleep(HANGS_SECONDS)
    raise AssertionError("never reached")


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def context():
    return processes.starter()


@pytest.fixture(autouse=True)
def forms_as_before():
    before = dict(forms.decided)
    yield
    forms.decided.clear()
    forms.decided.update(before)


@pytest.mark.parametrize(
    "measure, state, problem",
    [
        (found, "ok", ""),
        (wrong, "wrong", "one number is wrong"),
        (raising, "failed", "name: RuntimeError: no kernel image is available"),
        (dying, "failed", "ended (SIGKILL) while it was at: the third kernel"),
    ],
)
def test_how_a_stage_ends(context, measure, state, problem):
    ended = processes.run_stage(context, Stage("name", 1, 1, measure), True, 1200)
    assert ended.state == state
    assert ended.outcome.problems == ((problem,) if problem else ())
    if measure is found:
        assert ended.outcome.numbers == {"answer": 42, "nothing": None}


def test_a_stage_that_hangs_is_ended(context):
    ended = processes.run_stage(context, Stage("name", 1, 1, hanging), True, 5)
    assert ended.state == "failed" and ended.seconds < HANGS_SECONDS
    assert ended.outcome.problems[0].startswith("stopped after ")
    at = ended.outcome.problems[0].partition(" while it was at: ")[2]
    assert at in ("a kernel that never ends", "its start"), "a busy machine may not have begun it"


def test_a_line_and_a_row_after_each_stage(tmp_path, capsys):
    """The first stage is always run; what would take longer than the time that is left is skipped, and said so."""
    stages = (
        Stage("facts", 500, 500, found),
        Stage("b", 1, 1, raising),
        Stage("c", 9999, 9999, found),
    )
    output = tmp_path / "made" / "check.jsonl"
    assert Check(output, 30, False, stages).run() == 1
    lines = lines_of(output)
    assert [line["stage"] for line in lines] == ["facts", "b", "c", "summary"]
    assert [line["state"] for line in lines] == ["ok", "failed", "skipped", "ok"]
    assert lines[0]["small"], "there is no GPU: small sizes"
    assert lines[3]["row"] == "1 ok, 1 failed (b), 1 skipped (c)"
    out = capsys.readouterr().out
    assert str(output) in out and "no GPU here: small sizes" in out and "--minutes" in out
    assert "failed: b: RuntimeError: no kernel image" in out
    assert Check(output, 30, True, stages[:1]).run() == 0, "lines are appended"
    assert len(lines_of(output)) == 6


def test_what_the_command_line_refuses(tmp_path, capsys):
    assert longfire(["gpu-check", "--only", "fact,warp"]) == 2
    assert "--only warp: no such stage; they are: facts, " in capsys.readouterr().err
    for minutes in ("0", "nan", "inf"):
        assert longfire(["gpu-check", "--minutes", minutes]) == 2
    (tmp_path / "file").write_text("")
    assert longfire(["gpu-check", "--output", str(tmp_path / "file" / "x")]) == 6
    assert "--output" in capsys.readouterr().err


def test_stages_are_chosen_by_how_their_names_begin():
    assert [stage.name for stage in chosen(["quick", "long row g"])] == [
        "facts",
        "quickstart",
        "long row gla-1b",
    ]
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names) and chosen([]) == list(STAGES)
    assert {goal.stage for goal in goals.GOALS} <= set(names)
    assert sum(stage.seconds for stage in STAGES[:-1]) <= 20 * 60, "of a person's 20 minutes"


def line(stage: str, numbers: dict, **changes) -> dict:
    return {
        "stage": stage,
        "state": "ok",
        "computes": True,
        "small": False,
        "numbers": numbers,
    } | changes


def test_the_log_of_a_stage_that_raises_is_kept(context):
    ended = processes.run_stage(context, Stage("raising", 1, 1, raising), True, 60)
    assert "Traceback" in " ".join(ended.outcome.numbers["log"])


def test_goals():
    """What was measured at small sizes, or on a device that computes nothing, is measured by no goal."""
    lines = [line("speed transformer-1b", {"mfu": 0.56}), line("speed gla-1b", {"ratio": 1.1})]
    outcome = goals.summary(lines).outcome
    assert "MFU at 1.3B in bf16: reached, 56.0% (goal: at least 55%)" in outcome.row
    assert "MISSED, 1.10x (goal: at least 1.2x)" in outcome.row
    assert outcome.missing == ("MFU at the width of 7B in bf16: not measured",)
    for change in ({"small": True}, {"computes": False}):
        outcome = goals.summary([lines[0] | change, lines[1] | change]).outcome
        assert outcome.row == "2 ok" and len(outcome.missing) == 3


def test_memory_is_wrong_only_where_a_plan_that_fits_would_not():
    """Compiled blocks and fla's kernels hold less than the planner counts: no fault."""
    gib = 2**30
    assert memory_problems({"memory_bytes": 31 * gib, "planned_bytes": 59 * gib}) == []
    assert memory_problems({"memory_bytes": 60 * gib, "planned_bytes": 59 * gib}) == []
    assert memory_problems({"planned_bytes": 59 * gib}) == [], "no device"
    (problem,) = memory_problems({"memory_bytes": 75 * gib, "planned_bytes": 59 * gib})
    assert problem == "the allocator held 75.0 GiB, the planner's number is only 59.0 GiB"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is full")
def test_a_full_disk_is_named(tmp_path, capsys):
    (tmp_path / "check.jsonl").symlink_to("/dev/full")
    words = ["gpu-check", "--small", "--only", "facts", "--output", str(tmp_path / "check.jsonl")]
    assert longfire(words) == MachineError.exit_code
    assert "check.jsonl cannot be written: No space left on device" in capsys.readouterr().err


def test_kinds_and_busy_time():
    kinds = {
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "GEMM",
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_TNN": "GEMM",
        "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits": "attention",
        "chunk_gla_fwd_kernel_o": "recurrence",
        "triton_poi_fused_add_mul_silu_3": "elementwise",
        "Memcpy HtoD (Pinned -> Device)": "copies",
    }
    assert {name: kernel_kinds.kind_of(name) for name in kinds} == kinds
    overlapping = [Kernel("a", 0, 10), Kernel("b", 5, 8), Kernel("c", 9, 12), Kernel("d", 20, 21)]
    assert kernel_kinds.busy_seconds(overlapping) == pytest.approx(13e-6)


def test_curves():
    first = {step: 5.0 - step / 10 for step in range(1, 21)}
    assert not short_run.compared("x", first, first)
    assert short_run.compared("x", {**first, 1: 5.5}, first) == ["x: the first loss is 10.91% off"]
    assert "last losses" in short_run.compared("x", {**first, 20: 8.0}, first)[0]
    assert short_run.compared("x", {1: 4.9}, first) == ["x: 1 steps were recorded, not 20"]
    assert not short_run.resumed_problems(first, first, 10)
    assert "had ended before" in short_run.resumed_problems(first, first, 20)[0]
    assert "off" in short_run.resumed_problems({**first, 7: 3.0}, first, 10)[0]
    zeros = dict.fromkeys(range(1, 21), 0.0)
    assert short_run.compared("compiled", zeros, zeros) == []
    assert len(short_run.compared("compiled", first, zeros)) == 2
    assert short_run.resumed_problems(first, zeros, 10)


def small(name: str, folder: Path) -> Outcome:
    stage = next(stage for stage in STAGES if stage.name == name)
    return stage.measure(Work(folder, True, 600))


QUICK = ("facts", "profile gla-1b", "checkpoint")


@pytest.mark.parametrize("name", QUICK)
def test_a_stage_at_its_smallest_size(tmp_path, name):
    outcome = small(name, tmp_path)
    assert outcome.row and outcome.numbers and not outcome.problems
    json.dumps(processes.finite(outcome.numbers))


def test_a_peer_is_timed_beside_ours(tmp_path):
    outcome = small("speed transformer-7b", tmp_path)
    assert outcome.numbers["ratio"] > 0 and "LlamaForCausalLM of transformers" in outcome.row


def test_a_peer_whose_config_has_an_infinite_number(tmp_path):
    config = config_of(run_of("mamba2-1b", Work(tmp_path, True, 60)))
    assert peers.written_config(config, 16)["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.slow
def test_graphs_of_a_block(tmp_path):
    """Softmax is compiled without a break, once for each layer and length, and not anew."""
    outcome = small("graphs attention", tmp_path)
    attention = outcome.numbers["attention"]
    assert not outcome.problems and attention["breaks"] == 0
    assert attention["longer"] == attention["graphs"] <= 2
    torch._dynamo.reset()


def test_every_mixer_has_a_block_whose_graphs_are_counted():
    assert set(graphs.SETTINGS) == {*graphs.FIRST, *graphs.others()}


@pytest.mark.slow
def test_the_command_with_some_stages(tmp_path):
    output = tmp_path / "check.jsonl"
    words = ["gpu-check", "--small", "--only", "profile,checkpoint", "--output", str(output)]
    assert longfire(words) == 0
    states = {line["stage"]: line["state"] for line in lines_of(output)}
    assert states["facts"] == states["checkpoint"] == states["summary"] == "ok"


@pytest.mark.slow
@pytest.mark.matrix  # ten minutes on a busy machine
@pytest.mark.timeout(1800)
def test_the_whole_check_on_a_cpu(tmp_path):
    output = tmp_path / "check.jsonl"
    words = ["gpu-check", "--small", "--minutes", "60", "--output", str(output)]
    assert longfire(words) == 0
    lines = lines_of(output)
    assert [line["stage"] for line in lines] == [*(stage.name for stage in STAGES), "summary"]
    assert {line["state"] for line in lines} == {"ok"}
