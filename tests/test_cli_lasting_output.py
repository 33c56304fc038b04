"""cli/lasting_output.py: a run goes on when the reader of its output has ended."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from longfire.cli.lasting_output import let_output_end
let_output_end()
print("first", flush=True)
sys.stdin.readline()
for line in range(3):
    print("line", line, flush=True)
print("the end", file=sys.stderr)
sys.exit(7)
"""


def test_a_reader_that_ends_does_not_end_the_run():
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.write("go\n")
        process.stdin.close()
        errors = process.stderr.read()
    assert process.returncode == 7
    assert errors.count("warning: stdout cannot be written any more (Broken pipe)") == 1
    assert errors.endswith("the end\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_under_the_log_does_not_end_the_run():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], input="go\n", stdout=full, stderr=full, text=True
        )
    assert done.returncode == 7


def test_streams_that_are_no_files_stay_as_they_are(capsys):
    from longfire.cli.lasting_output import let_output_end

    before = sys.stdout
    let_output_end()
    assert sys.stdout is before
