"""cli.py: help is instant and whole; a mistake is one message and an exit code; every command line of the story is understood."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest

from longfire.cli import entry, main
from longfire.cli.arguments import Parser, take_settings
from longfire.cli.entry import CLOSED_PIPE, COMMANDS
from longfire.cli.old_words import systems
from longfire.config import recipe
from longfire.config.aliases import SYSTEMS
from longfire.config.options import Sampling
from longfire.ending_signals import Terminated
from longfire.errors import CheckpointError, MachineError

ROOT = Path(__file__).parents[1]


def longfire(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "longfire", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
    )


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["prepare", "--help"], ["bench", "-h"]], ids=" ".join
)
def test_help_needs_no_torch(words):
    code = f"""
import contextlib, sys
from longfire.cli import main
with contextlib.suppress(SystemExit):
    main({words})
print(sorted(set(sys.modules) & {{"torch", "numpy", "rich", "transformers", "datasets"}}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "usage: longfire" in done.stdout and "example:" in done.stdout


def test_train_help_has_every_setting_with_help_and_default(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["train", "--help", "all"])
    words = " ".join(capsys.readouterr().out.split())
    for key, field in recipe.SETTINGS.items():
        assert f"--{key} " in words
        assert " ".join(field.metadata["help"].split()) in words
        assert "default: " in words.split(f"--{key} ", 1)[1][:700]


def test_a_reader_that_has_enough_is_no_error():
    """`longfire train --help model | head -1`"""
    command = [sys.executable, "-m", "longfire", "train", "--help", "model"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == CLOSED_PIPE


def test_another_pipe_that_breaks_is_not_hidden(monkeypatch, capsys):
    def broken(words):
        raise BrokenPipeError(errno.EPIPE, "of a worker")

    monkeypatch.setitem(COMMANDS, "train", broken)
    assert main(["train"]) == MachineError.exit_code
    assert "Broken pipe: another program" in capsys.readouterr().err
    with pytest.raises(BrokenPipeError, match="of a worker"):
        main(["train", "--traceback"])


@pytest.mark.parametrize(("rank", "lines"), [("", 1), ("0", 1), ("3", 0)])
def test_the_first_process_says_that_all_were_stopped(rank, lines, monkeypatch, capsys):
    def stopped(words):
        raise Terminated

    monkeypatch.setitem(COMMANDS, "train", stopped)
    monkeypatch.setenv("RANK", rank)
    if not rank:
        monkeypatch.delenv("RANK")
    assert main(["train"]) == 143
    assert capsys.readouterr().err.count("SIGTERM: stopped") == lines


def test_names_cannot_command_the_terminal(capsys):
    assert main(["trai\x1b[31mn\u202e"]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error and "\u202e" not in error
    assert "x1b" in error and "u202e" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--training.threads 100000", "training.threads = 100000 must lie in [0, 1024]"),
        ("--data.num_workers 5000", "data.num_workers = 5000 must lie in [0, 1024]"),
        ("--tokenizer.train_vocab_size 1000000000", "must lie in [258, 16777216]"),
        ("--comm.init_timeout_seconds 99999999999", "comm.init_timeout_seconds = 99999999999"),
        (f"--training.steps {10**400}", "has 401 digits: it must be at most 9223372036854775807"),
        ("--training.steps 1e300", "training.steps = '1e300' must be a whole number"),
        ("--model.num_hidden_layers 1000000000", "must be at most 10000"),
        ("--model.hidden_size 100000000", "must be at most 1048576"),
        ("--model.gla.num_heads 99999999999", "has 11 digits: it must be at most 2147483647"),
    ],
)
def test_numbers_that_no_machine_can_take_are_refused(words, message, capsys):
    assert main(["train", "gla-340m-fineweb", *words.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert f"longfire {command}" in out.split("example:")[1]
    assert main(["--help"]) == 0
    assert re.search(rf"^  {command} +\S", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("line", "reported"),
    [
        ("trian", "unknown command 'trian' (did you mean 'train'?)"),
        (
            "train --trainin.steps 3",
            "unknown setting 'trainin.steps' (did you mean 'training.steps'?)",
        ),
        ("train --training.steps", "--training.steps needs a value"),
        ("train --training.steps ten", "training.steps = 'ten' must be a whole number"),
        ("train a.toml b.toml", "b.toml"),
        ("train a.toml --job.config_file b.toml", "two recipes"),
        ("eval", "the following arguments are required: run; `longfire eval --help`"),
        ("eval x --stop 3", "unknown option --stop (did you mean '--step'?)"),
        ("eval x --step three", "invalid int value: 'three'"),
        ("export x --dtype int8", "invalid choice: 'int8'"),
        ("train --training.steps 3", "model.config is empty"),
        ("generate x --top_p 2", "top_p = 2.0 must lie in (0, 1]"),
        ("generate x --temperature warm", "--temperature = 'warm' must be a number"),
        ("generate x --top_q 1", "unknown option --top_q (did you mean '--top_p'?)"),
        ("generate x", "no prompt: give --prompt TEXT, --prompts FILE, or --interactive"),
        ("generate x --prompt a", "x: no such folder"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(line, reported, capsys):
    assert main(shlex.split(line)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("longfire: ") and reported in captured.err
    assert "Traceback" not in captured.err and not captured.out


def test_generate_has_an_option_for_every_field_of_sampling(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    reported = " ".join(capsys.readouterr().out.split())
    for field in fields(Sampling):
        assert (
            f"--{field.name} " in reported and " ".join(field.metadata["help"].split()) in reported
        )
        assert "default: " in reported.rpartition(f"--{field.name} ")[2][:300]


def test_options_of_a_dataclass_are_taken_as_they_are_written():
    parser = Parser("generate", COMMANDS["generate"], "longfire generate x")
    parser.add_fields(Sampling, repeated=("stop",))
    assert parser.taken(Sampling, parser.parse_words([])) == Sampling()
    words = [
        "--top_k",
        "3",
        "--temperature",
        "1",
        "--stop",
        "a,b",
        "--stop",
        "c",
        "--seed",
        "7",
        "--min_p",
        "0.1",
    ]
    taken = parser.taken(Sampling, parser.parse_words(words))
    assert taken == Sampling(top_k=3, temperature=1.0, stop=("a,b", "c"), seed=7, min_p=0.1)


def test_exit_codes_and_traceback(monkeypatch, capsys):
    def broken(words):
        raise CheckpointError("step-3/model.safetensors is cut short; step-2 is whole")

    monkeypatch.setitem(COMMANDS, "doctor", broken)
    assert main(["doctor"]) == 4
    assert (
        capsys.readouterr().err
        == "longfire: step-3/model.safetensors is cut short; step-2 is whole\n"
    )
    with pytest.raises(CheckpointError):
        main(["doctor", "--traceback"])

    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "doctor", interrupted)
    assert main(["doctor"]) == 130


def test_python_m_longfire_is_the_same():
    assert longfire("--version").stdout.startswith("longfire ")
    done = longfire("train", "no-such.toml")
    assert done.returncode == 2 and done.stderr.startswith("longfire: no-such.toml: no such recipe")


def test_python_m_longfire_cli_is_the_same():
    """It did nothing, and said success."""
    command = [sys.executable, "-m", "longfire.cli", "train", "no-such.toml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("longfire: no-such.toml: no such recipe")


def test_what_is_a_setting_and_what_is_not():
    words = "x.toml --training.steps 3 --data.streaming --training.compile --checkpoint.load_step -1 --optimizer.lr=1e-3 lr=2 y"
    rest, overrides = take_settings(words.split(), set())
    assert rest == ["x.toml", "y"]
    assert overrides == {
        "training.steps": "3",
        "data.streaming": "true",
        "training.compile": "on",
        "checkpoint.load_step": "-1",
        "optimizer.lr": "1e-3",
        "lr": "2",
    }


def test_a_bare_flag_before_other_words():
    rest, overrides = take_settings(
        ["--training.streaming", "x.toml", "--data.varlen", "false", "--training.compile", "off"],
        set(),
    )
    assert rest == ["x.toml"]
    assert overrides == {
        "training.streaming": "true",
        "data.varlen": "false",
        "training.compile": "off",
    }


def test_a_bare_flag_of_a_mixer_leaves_the_next_setting_alone():
    words = "--model.attention.qk_norm --model.mlp relu2 --model.gla.use_short_conv"
    assert take_settings(words.split(), set()) == (
        [],
        {
            "model.attention.qk_norm": "true",
            "model.mlp": "relu2",
            "model.gla.use_short_conv": "true",
        },
    )


def test_values_may_look_like_anything():
    words = [
        "--eval.sample_prompt",
        "--not a flag",
        "--job.description",
        "a=b",
        "--job.dump_folder=c=d",
    ]
    assert take_settings(words, set()) == (
        [],
        {"eval.sample_prompt": "--not a flag", "job.description": "a=b", "job.dump_folder": "c=d"},
    )


def test_a_commands_own_option_is_no_alias():
    assert take_settings(["--steps", "3", "--steps=4", "steps=5"], {"--steps"}) == (
        ["--steps", "3", "--steps=4"],
        {"steps": "5"},
    )
    assert take_settings(["--steps", "3"], set()) == ([], {"steps": "3"})


def test_the_story_speaks_our_language():
    """Each `longfire` line of scripts/story.sh names a command and settings that exist."""
    story = (ROOT / "scripts/story.sh").read_text().replace("\\\n", " ")
    lines = re.findall(r"^longfire (.+)$", story, re.M)
    small = re.search(r'^small="(.+)"$', story, re.M)[1]
    assert len(lines) >= 8
    for line in lines:
        command, *words = shlex.split(line.replace("$small", small))
        assert command in COMMANDS
        _, overrides = take_settings(words, {"--steps", "--model", "--config"})
        recipe.sections(recipe.read_words(overrides))


@pytest.mark.parametrize("system", systems())
def test_the_words_of_an_earlier_system_are_listed_with_ours(system, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help-old", system])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {}
    for line in lines:
        if line and not line.startswith(" "):
            rows.setdefault(line.split()[0], line.split()[1:2])
    for name, words in SYSTEMS.items():
        if name in (system, f"{system}-accelerate", f"{system}-torchtitan"):
            for spelling, meaning in words.items():
                assert spelling in rows
                if isinstance(meaning, str):
                    assert [meaning] == rows[spelling]
    assert max(map(len, lines)) <= 150


def test_an_unknown_earlier_system_is_refused_with_those_there_are(capsys):
    assert main(["train", "--help-old", "flam"]) == 2
    error = capsys.readouterr().err
    assert "the systems are flame, flame-accelerate" in error and "did you mean 'flame'" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("error", [ValueError("of a library"), CheckpointError("damaged")])
def test_an_error_while_a_signal_ends_a_command_hides_no_signal(number, error, monkeypatch, capsys):
    """A library may put an error of its own in the place of the exception of the signal."""

    def command(words):
        with suppress(BaseException):
            os.kill(os.getpid(), number)
        raise error

    monkeypatch.setattr(entry, "run_command", command)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
    try:
        assert entry.main(["plan"]) == 128 + number
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    shown = capsys.readouterr().err
    assert "fault" not in shown and "damaged" not in shown


def test_an_interrupt_that_is_ignored_stays_ignored(monkeypatch):
    """As of a command that a shell script has put into the background."""

    def command(words):
        os.kill(os.getpid(), signal.SIGINT)
        return 0

    monkeypatch.setattr(entry, "run_command", command)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert entry.main(["plan"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_message_that_cannot_be_written_changes_no_exit_code(tmp_path):
    """As with `2> log` on a full disk."""
    code = """
import resource, sys
from longfire.cli import entry
resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))
sys.argv = ["longfire", "train", "no-such.toml"]
entry.program()
"""
    with open(tmp_path / "log", "w") as log:
        done = subprocess.run([sys.executable, "-c", code], stderr=log, timeout=60)
    assert done.returncode == 2
    assert (tmp_path / "log").read_text() == "l"
