"""The quickstart beside a plain PyTorch loop and xz, and models of its size with other mixers: bits per byte of the same text.

    python bench/quickstart.py                   both parts, some 30 minutes on two quiet cores
    python bench/quickstart.py --part peers      the quickstart, the plain loop and xz, after the same seconds of training

All see the same documents of Python's own library and are asked about the same validation ones. Seconds are those of training:
reading, tokenizing and the evaluation at the end are not counted for anyone. The quickstart runs as `make train` runs it, with
its schedule planned for these seconds. The loop is bench/plain_loop.py. The other mixers take the quickstart's recipe with
another model of its width and depth: once for as many seconds as softmax attention, once for as many tokens.

Goal: the quickstart is at least as good as the loop, and below `xz -9e` of the validation text.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from measure import RESULTS, print_table, write_result

from longfire.config.recipe import read_toml
from longfire.config.run import Run
from longfire.data.text import sources
from longfire.data.validation import is_validation
from longfire.evaluation.evaluate import xz_bits_per_byte
from longfire.training.report_page import running_mean

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/quickstart.toml"
FIGURE = ROOT / "docs/images/quickstart.svg"
SAMPLE_TOKENS = 128
MIXER_TOKENS = 100_000  # of validation text for each of the other mixers
SMOOTHED_STEPS = 50  # of the training loss in the figure
ENDLESS = 10**6  # steps: the seconds end the run
HEADS = {"num_heads": 2}
MIXERS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "attention": (["attention"], {"attention": {**HEADS, "qk_norm": True}}),
    "gla": (["gla"], {"gla": HEADS}),
    "mamba2": (["mamba2"], {"mamba2": {"head_dim": 64, "state_size": 64}}),
    "gated_delta_net": (
        ["gated_delta_net"],
        {"gated_delta_net": {**HEADS, "head_dim": 64, "expand_v": 1.0}},
    ),
    "kda": (["kda"], {"kda": {**HEADS, "head_dim": 64}}),
    "rwkv7": (["rwkv7"], {"rwkv7": {"head_dim": 64}}),
    "hybrid: 3 gla, 1 attention": (
        ["gla", "gla", "gla", "attention"],
        {"gla": HEADS, "attention": {**HEADS, "qk_norm": True}},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds each, nothing written: what CI runs"
    )
    parser.add_argument("--part", choices=("all", "peers", "mixers"), default="all")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="of training; 0: the recipe's max_seconds"
    )
    parser.add_argument(
        "--mixer-seconds", type=float, default=90.0, help="of training for each of the other mixers"
    )
    options = parser.parse_args()
    seconds = (
        2.0
        if options.quick
        else options.seconds or float(read_toml(RECIPE)["training.max_seconds"].value)
    )
    mixer_seconds = 1.0 if options.quick else options.mixer_seconds
    file = RESULTS / "quickstart.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    for key in ("date", "command", "machine"):
        result.pop(key, None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.part in ("all", "peers"):
            result |= beside_peers(folder, seconds, draw=not options.quick)
            print_table("the same seconds, the same text", result["peers"])
        if options.part in ("all", "mixers"):
            result["mixers"] = other_mixers(folder, mixer_seconds)
            print_table("other mixers in the quickstart's recipe", result["mixers"])
    write_result("quickstart", result, options.quick)


def beside_peers(folder: Path, seconds: float, draw: bool) -> dict[str, Any]:
    """The quickstart, the plain loop and xz; the loop for half of the seconds too, which shows what time is worth."""
    train_file, validation_file = folder / "train.txt", folder / "validation.txt"
    count, size_bytes = write_texts(train_file, validation_file)
    first_loop = plain_loop(train_file, validation_file, seconds / 2)
    ours = trained(folder, "quickstart", seconds)
    loop = plain_loop(train_file, validation_file, seconds)
    xz = xz_bits_per_byte(validation_file.read_bytes().replace(b"\0", b""))
    rows = [
        {"what": "longfire, `make train`", "seconds": seconds, **numbers(ours)},
        {"what": "plain PyTorch loop, AdamW", "seconds": seconds, **loop},
        {"what": "plain PyTorch loop, AdamW", "seconds": seconds / 2, **first_loop},
        {"what": "`xz -9e`", "bits per byte": xz},
    ]
    if draw:
        draw_curve(ours, loop["bits per byte"], xz)
    text = {"documents": count, "bytes": size_bytes}
    return {"validation": text, "peers": rows, "sample": sample(folder / "quickstart")}


def write_texts(train_file: Path, validation_file: Path) -> tuple[int, int]:
    """The embedded documents as the recipe divides them, a NUL between two; documents and bytes of the validation part."""
    data = Run.compose(RECIPE, {}).data
    train, validation = [], []
    for document in sources(data)[0].documents():
        part = validation if is_validation(document.identity, data.validation_fraction) else train
        part.append(document.text.replace("\0", ""))
    train_file.write_text("\0".join(train), encoding="utf-8")
    validation_file.write_text("\0".join(validation), encoding="utf-8")
    return len(validation), sum(len(text.encode()) for text in validation)


def ignore(line: str) -> None:
    """A reader of messages that shows none."""


def plain_loop(train_file: Path, validation_file: Path, seconds: float) -> dict[str, float]:
    """What bench/plain_loop.py reaches."""
    words = [
        "--train",
        str(train_file),
        "--validation",
        str(validation_file),
        "--seconds",
        str(seconds),
    ]
    output = run([sys.executable, str(ROOT / "bench/plain_loop.py"), *words])
    found = json.loads(output.splitlines()[-1])
    return {
        "steps": found["steps"],
        "tokens": found["tokens"],
        "bits per byte": found["bits_per_byte"],
    }


def trained(
    folder: Path, name: str, seconds: float = 0.0, tokens: int = 0, shape: Path | None = None
) -> list[dict]:
    """The records of a run of the quickstart's recipe, for so many seconds or tokens, perhaps with another model."""
    words = [
        "--job.dump_folder",
        str(folder / name),
        "--data.folder",
        str(folder / "stores"),
        "--metrics.report",
        "false",
    ]
    words += [
        "--training.max_seconds",
        str(seconds),
        "--training.steps",
        str(ENDLESS),
        "--training.tokens",
        str(tokens),
    ]
    if shape:
        words += [
            "--model.config",
            str(shape),
            "--checkpoint.export",
            "false",
            "--eval.tokens",
            str(MIXER_TOKENS),
        ]
    run([sys.executable, "-m", "longfire", "train", str(RECIPE), *words])
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def numbers(records: list[dict]) -> dict[str, float]:
    """Steps, tokens and the last evaluation of a run."""
    step = [record for record in records if "loss" in record][-1]
    evaluation = [record for record in records if "eval/embedded/bits_per_byte" in record][-1]
    return {
        "steps": step["step"],
        "tokens": step["tokens"],
        "bits per byte": evaluation["eval/embedded/bits_per_byte"],
    }


def other_mixers(folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Each mixer in the quickstart's recipe, for the same seconds and for the tokens that attention sees in them."""
    rows, tokens = [], 0
    for name, (layer_types, tables) in MIXERS.items():
        shape = folder / f"{name.split(':')[0]}.json"
        keys = json.loads((ROOT / "recipes/models/quick-1m.json").read_text())
        keys.pop("attention")
        shape.write_text(json.dumps({**keys, "layer_types": layer_types, **tables}))
        timed = numbers(trained(folder, f"{shape.stem}-timed", seconds=seconds, shape=shape))
        tokens = tokens or int(timed["tokens"])
        same_tokens = timed
        if name != "attention":
            same_tokens = numbers(
                trained(folder, f"{shape.stem}-tokens", tokens=tokens, shape=shape)
            )
        row = {
            "mixer": name,
            "tokens/s": timed["tokens"] / seconds,
            f"bits per byte after {seconds:g} s": timed["bits per byte"],
            f"bits per byte after {tokens / 1e6:.2f}M tokens": same_tokens["bits per byte"],
        }
        rows.append(row)
    for row in rows:
        row["speed / attention"] = row["tokens/s"] / rows[0]["tokens/s"]
    return rows


def sample(run_folder: Path) -> str:
    """What the trained model writes after the recipe's prompt."""
    prompt = str(read_toml(RECIPE)["eval.sample_prompt"].value)
    words = [
        "generate",
        str(run_folder),
        "--prompt",
        prompt,
        "--max_new_tokens",
        str(SAMPLE_TOKENS),
        "--seed",
        "42",
    ]
    return run([sys.executable, "-m", "longfire", *words])


def draw_curve(records: list[dict], loop: float, xz: float) -> None:
    """Bits per byte over the seconds of training: of the training text as it is learned, of the validation text at the end."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    evaluation = [record for record in records if "eval/embedded/bits_per_byte" in record][-1]
    tokens_per_byte = evaluation["eval/embedded/tokens"] / evaluation["eval/embedded/bytes"]
    steps = [record for record in records if "loss" in record]
    seconds = [record["elapsed_seconds"] for record in steps]
    bits = [record["loss"] * tokens_per_byte / math.log(2) for record in steps]
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    axes.plot(
        seconds,
        running_mean(np.array(bits), SMOOTHED_STEPS),
        label=f"training text, mean of {SMOOTHED_STEPS} steps",
    )
    axes.plot(
        seconds[-1:],
        [evaluation["eval/embedded/bits_per_byte"]],
        "o",
        label="make train, validation text",
    )
    axes.plot(seconds[-1:], [loop], "s", label="plain PyTorch loop, validation text")
    axes.axhline(xz, color="gray", linestyle="--", label="xz -9e, validation text")
    axes.set_ylim(1.3, 3.5)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("bits per byte")
    axes.legend()
    FIGURE.parent.mkdir(exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "longfire"
    figure.savefig(FIGURE, metadata={"Date": None})


def run(command: list[str]) -> str:
    """The output of a command; raises CalledProcessError with its messages on the console if it fails."""
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return done.stdout


if __name__ == "__main__":
    main()
