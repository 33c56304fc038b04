"""Build the stand-in's two libraries for the torch that runs this file.

    python tests/null_gpu/libraries.py FOLDER

`libnullcudart.so` is runtime.c and an empty answer for each other symbol of the CUDA runtime and of
cuBLAS that torch's libraries leave undefined; `libcuda.so.1` is driver.c. Needs gcc and nm.
"""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parent
RUNTIME = "libnullcudart.so"
DRIVER = "libcuda.so.1"
FLAGS = ("-w", "-shared", "-fPIC", "-O1")  # -w: unused arguments and pointer types on purpose
# The libraries of torch that call CUDA; what else they call is real.
CALLERS = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so")
ANSWERED = re.compile(r"^(_*cuda|cublas)")
MATMUL = re.compile(r"cublas\w*(gemm|Gemm)|cublasLtMatmul$")
DEFINITION = re.compile(r"^\w[^\n;{=]*?\b(\w+)\([^\n;]*\{|^\w[^\n;{=]*?\b(\w+)\([^\n;]*,$", re.M)


def main(folder: Path) -> None:
    """Build both libraries into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(str(importlib.metadata.distribution("torch").locate_file("torch")))
    headers = sorted(torch_folder.parent.glob("nvidia/*/include/driver_types.h"))
    if not headers:
        sys.exit("this torch has no headers of CUDA beside it: install a CUDA build of torch")
    generated = folder / "answers.c"
    generated.write_text(answers(undefined_symbols(torch_folder / "lib")), encoding="utf-8")
    includes = ("-I", SOURCES, "-I", SOURCES / "headers", "-I", headers[-1].parent)
    compiled(folder / RUNTIME, (*includes, SOURCES / "runtime.c", generated, "-ldl", "-lpthread"))
    build_driver(folder)


def build_driver(folder: Path) -> None:
    """The driver alone, which needs no header of CUDA."""
    compiled(folder / DRIVER, (f"-Wl,-soname,{DRIVER}", SOURCES / "driver.c", "-ldl"))


def compiled(library: Path, arguments: tuple[object, ...]) -> None:
    """One library by gcc. Raises CalledProcessError with gcc's own message on stderr."""
    words = [str(argument) for argument in arguments]
    subprocess.run(["gcc", *FLAGS, "-o", str(library), *words], check=True)


def undefined_symbols(libraries: Path) -> list[str]:
    """What torch's libraries want of the CUDA runtime and of cuBLAS."""
    found: set[str] = set()
    for name in CALLERS:
        if not (libraries / name).exists():
            continue
        command = ["nm", "-D", "--undefined-only", str(libraries / name)]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for line in listed.splitlines():
            symbol = line.split()[-1].split("@")[0]
            if ANSWERED.match(symbol):
                found.add(symbol)
    return sorted(found)


def answers(symbols: list[str]) -> str:
    """C functions for the symbols that runtime.c has not: success, and matrix products are
    counted."""
    written = functions_of((SOURCES / "runtime.c").read_text(encoding="utf-8"))
    lines = ['#include "counts.h"']
    for symbol in symbols:
        if symbol in written:
            continue
        body = "counts[MATMULS]++; return 0;" if MATMUL.search(symbol) else "return 0;"
        lines.append(f"int {symbol}(void) {{ {body} }}")
    return "\n".join(lines) + "\n"


def functions_of(source: str) -> set[str]:
    """Names of the functions that a C file defines, each of which begins a line."""
    found: set[str] = set()
    for match in DEFINITION.finditer(source):
        found.add(match[1] or match[2])
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
