"""`longfire` for a process of its own under the stand-in: the same command, with what no_kernels.py
assumes.

    python tests/null_gpu/longfire_command.py train quickstart
"""

from no_kernels import without_numbers

from longfire.cli import program

if __name__ == "__main__":
    with without_numbers():
        program()
