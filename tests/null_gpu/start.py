"""Start a command of Python under the stand-in, which is built first where it is not there.

    python tests/null_gpu/start.py FOLDER -m pytest tests/null_gpu

FOLDER holds the libraries and the caches of compiled kernels.
"""

import os
import sys
from pathlib import Path

import libraries


def environment(folder: Path) -> dict[str, str]:
    """The variables with which torch finds the stand-in instead of a GPU."""
    folder = folder.resolve()
    return {
        "LONGFIRE_NULL_GPU": str(folder),
        "LD_PRELOAD": str(folder / libraries.RUNTIME),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "0",  # the stand-in has no NVML
        "OMP_NUM_THREADS": "1",
    }


def main(folder: Path, arguments: list[str]) -> None:
    """Become Python with these arguments."""
    newest = max(path.stat().st_mtime for path in libraries.SOURCES.glob("*.[ch]"))
    runtime = folder / libraries.RUNTIME
    if not runtime.exists() or runtime.stat().st_mtime < newest:
        libraries.main(folder)
    os.execve(sys.executable, [sys.executable, *arguments], os.environ | environment(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
