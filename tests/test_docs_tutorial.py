"""docs/tutorial.md is true: its commands and programs run one after the other in an empty folder, with fewer steps."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from longfire.cli import main

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.+?)^```", PAGE, re.M | re.S)
SMALLER = """--training.steps 3 --training.seq_len 64 --training.batch_size 2 --training.global_batch_size 2 --training.max_seconds 0
    --data.num_workers 1 --tokenizer.path bytes --eval.tokens 2048"""


@pytest.fixture
def empty_folder(tmp_path, monkeypatch) -> Path:
    """With the input.txt that the page asks for."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/design.md").read_text() * 5
    (tmp_path / "input.txt").write_text(text)
    return tmp_path


def run_program(program: str) -> str:
    """A program of the page in a process of its own; what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_command(line: str) -> None:
    words = shlex.split(line)
    assert words.pop(0) == "longfire", line
    more = SMALLER.split() if words[0] == "train" else []
    assert main([*words, *more]) == 0, line


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answer_of(program: str, port: int) -> str:
    """What the server of the page answers to the request of the page."""
    Path("serve.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen([sys.executable, "serve.py", "exported", str(port)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while server.poll() is None and time.monotonic() < deadline:
            try:
                url = f"http://127.0.0.1:{port}"
                with urllib.request.urlopen(url, data=b"The ", timeout=60) as answer:
                    return answer.read().decode()
            except ConnectionError:
                time.sleep(0.2)
            except urllib.error.URLError as error:
                if not isinstance(error.reason, ConnectionError):
                    raise
                time.sleep(0.2)
        raise AssertionError(f"no answer; the server's exit code: {server.poll()}")
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_the_tutorial_from_its_second_part_on(empty_folder):
    programs = [text for kind, text in BLOCKS if kind == "python"]
    commands = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    start, request = commands[-2:]
    ours = commands[:-2]
    assert len(programs) == 2 and len(ours) == 7
    for line in ours:
        run_command(line)
    assert (empty_folder / "runs/first/report.html").is_file()
    assert (empty_folder / "exported/model.safetensors").is_file()
    assert run_program(programs[0]).startswith("The")
    assert start == "python serve.py exported 8000 &" and '"The "' in request
    assert isinstance(answer_of(programs[1], free_port()), str)


def test_the_commands_of_its_first_part_are_those_of_ci():
    """`make install` and `longfire doctor`, which .ci/run and scripts/story.sh run."""
    first = PAGE.split("## 2.")[0]
    assert "\nmake install\n" in first and "\nlongfire doctor\n" in first
    assert "\nlongfire doctor\n" in (ROOT / "scripts/story.sh").read_text()
