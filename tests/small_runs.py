"""Small runs on the command line: their words, a model of one layer, and what they record."""

import json
from pathlib import Path

# Numbers of a machine, or of what its process did before, not of a run.
OF_THE_MACHINE = (
    "seconds",
    "tokens_per_second",
    "mfu",
    "data_wait_fraction",
    "memory_bytes",
    "recompiles",
)
ONE_LAYER = """
[model]
hidden_size = 16
num_hidden_layers = 1
layer_types = ["attention"]
intermediate_size = 24
compute_dtype = "float32"
[model.attention]
num_heads = 2
"""


def command_line(settings: dict[str, str]) -> list[str]:
    """`longfire train` with these settings."""
    found = ["train"]
    for key, value in settings.items():
        found += [f"--{key}", value]
    return found


def recorded(run: Path) -> list[dict]:
    """The records of a run, without the numbers of its machine."""
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.endswith(OF_THE_MACHINE)} for r in kept]
