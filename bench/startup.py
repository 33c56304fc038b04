"""How long until something happens: `longfire --help`, `longfire train --help`, and the first finished step of the quickstart.

Goals: under 0.3 s, under 0.5 s, under 15 s eager. The first step is measured twice: with an empty folder for token
stores (the corpus is read, a tokenizer trained, everything tokenized), and with the store that this leaves behind.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import arguments, median_seconds, print_table, write_result

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes/quickstart.toml"
LIMITS = {
    "longfire --help": 0.3,
    "longfire train --help": 0.5,
    "first step, empty store": 15.0,
    "first step, store there": 15.0,
}
PATIENCE_SECONDS = 300


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "longfire", *words]


def seconds_to_first_step(stores: Path) -> float:
    """Seconds from the start of `longfire train` until metrics.jsonl has its first record; the run is then ended."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "run", "metrics.jsonl")
        words = [
            "--job.dump_folder",
            str(metrics.parent),
            "--data.folder",
            str(stores),
            "--training.compile",
            "off",
        ]
        start = time.perf_counter()
        process = subprocess.Popen(
            command("train", str(QUICKSTART), *words), stdout=subprocess.DEVNULL
        )
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None or time.perf_counter() - start > PATIENCE_SECONDS:
                    sys.exit(
                        f"no first step: exit code {process.poll()} after {time.perf_counter() - start:.0f} s"
                    )
                time.sleep(0.01)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


def main() -> None:
    options = arguments(__doc__.splitlines()[0], repeats=7)
    repeats = 2 if options.quick else options.repeats
    measured = {}
    for words in (["--help"], ["train", "--help"]):
        run = lambda words=words: subprocess.run(
            command(*words), stdout=subprocess.DEVNULL, check=True
        )
        measured[" ".join(["longfire", *words])] = median_seconds(run, repeats)
    with tempfile.TemporaryDirectory() as stores:
        measured["first step, empty store"] = seconds_to_first_step(Path(stores))
        measured["first step, store there"] = statistics.median(
            seconds_to_first_step(Path(stores)) for _ in range(min(repeats, 3))
        )
    rows = [
        {"what": what, "seconds": value, "goal": LIMITS[what], "reached": value < LIMITS[what]}
        for what, value in measured.items()
    ]
    print_table("startup", rows)
    write_result("startup", {"rows": rows}, options.quick)


if __name__ == "__main__":
    main()
