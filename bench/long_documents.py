"""Does a model trained on long rows use them: a small hybrid trained at 32k tokens, and the same one at 8k, on long documents.

    python bench/long_documents.py [--first-steps 950] [--steps 30] [--work DIR]

Documents: every package of Python's own library as one text (its modules in order), and single modules of 64 kB and more; bytes are
the tokens, documents are kept apart. One model is trained at 8k tokens, most of its steps on rows of an eighth of that (a schedule
of lengths: many small steps teach a model its language sooner than few large ones). From there it goes on at 8k or at 32k, the same
number of tokens in the same number of steps, each arm on a thread of its own. Then `longfire eval`: validation loss by the number of
tokens before it, in rows of 32k; and a needle hidden in the same texts. Goal: beyond 8k tokens the one trained at 32k has
the lower loss. With --work a second call goes on where the first one ended.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measure import RESULTS, arguments, print_table, write_result

SHAPE = {
    "model_type": "longfire",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "layer_types": ["gla", "gla", "attention", "gla"],
    "gla": {"num_heads": 2, "use_short_conv": True},
    "attention": {"num_heads": 1, "head_dim": 64},
    "tie_word_embeddings": True,
}
LONG_BYTES = 65536
TOKENS = 32768  # of the longest rows; a fourth of that in those of the other arm
ROWS = 4  # of the longest, a step
DEPTHS = "0.1,0.5,0.9"


def longfire(*words: object, threads: int = 1) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "longfire", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise SystemExit(f"longfire {' '.join(map(str, words))}\n{done.stderr[-3000:]}")
    return done.stdout


def documents() -> list[str]:
    """The texts, in the order of their names."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = [
        sorted(folder.rglob("*.py"))
        for folder in sorted(library.iterdir())
        if folder.is_dir() and folder.name not in ("site-packages", "test", "__pycache__")
    ]
    texts = ["".join(path.read_text("utf-8", "replace") for path in files) for files in packages]
    texts += [path.read_text("utf-8", "replace") for path in sorted(library.glob("*.py"))]
    return [text for text in texts if len(text) >= LONG_BYTES]


def train(
    work: Path,
    name: str,
    tokens: int,
    rows: int,
    steps: int,
    lr: float,
    *more: object,
    threads: int = 1,
) -> Path:
    longfire(
        "train",
        "--model.config",
        work / "config.json",
        "--job.dump_folder",
        work / name,
        "--data.dataset",
        work / "seen.jsonl",
        "--data.folder",
        work / "stores",
        "--data.varlen",
        "true",
        "--data.validation_fraction",
        0,
        "--eval.at_end",
        "false",
        "--training.steps",
        steps,
        "--training.seq_len",
        tokens,
        "--training.batch_size",
        rows,
        "--optimizer.lr",
        lr,
        "--lr_scheduler.warmup_steps",
        max(1, steps // 10),
        "--checkpoint.interval",
        50,
        "--metrics.report",
        "false",
        "--training.compile",
        "off",
        *more,
        threads=threads,
    )
    return work / name


def by_position(run: Path, data: Path, work: Path, tokens: int, rows: int) -> list[dict]:
    """Of validation documents: loss in buckets of context that double."""
    longfire(
        "eval",
        run,
        "--data",
        data,
        "--seq_len",
        tokens,
        "--tokens",
        rows * tokens,
        "--json",
        work / f"{run.name}.json",
    )
    (found,) = json.loads((work / f"{run.name}.json").read_text())["sources"].values()
    return found["by_position"]


def needles(run: Path, data: Path, work: Path, lengths: list[int], count: int) -> list[dict]:
    """How many nats a needle is worth, by length and depth; nothing for no needles, since rows of 32k take their time."""
    if not count:
        return []
    longfire(
        "eval",
        run,
        "--needle",
        "--data",
        data,
        "--lengths",
        ",".join(map(str, lengths)),
        "--depths",
        DEPTHS,
        "--needles",
        count,
        "--batch_size",
        2,
        "--json",
        work / f"{run.name}-needle.json",
    )
    return json.loads((work / f"{run.name}-needle.json").read_text())["needle"]


def draw(arms: dict[str, list[dict]], path: Path) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 3.6), layout="constrained")
    axes = drawn.subplots()
    for name, buckets in arms.items():
        axes.plot(
            [bucket["from"] for bucket in buckets],
            [bucket["loss"] for bucket in buckets],
            marker="o",
            label=name,
        )
    axes.set(
        xscale="log",
        xlabel="tokens before (of the document)",
        ylabel="loss (nats a byte)",
        title="validation long documents",
    )
    axes.set_xscale("log", base=2)
    axes.legend()
    drawn.savefig(path)


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0], first_steps=950, steps=30, lr=3e-3, needles=4, work=""
    )
    work = Path(options.work or tempfile.mkdtemp()).absolute()
    work.mkdir(parents=True, exist_ok=True)
    long, steps, first_steps = (
        (1024, 3, 4) if options.quick else (TOKENS, options.steps, options.first_steps)
    )
    short, texts = long // 4, documents()
    kept = max(1, len(texts) // 10)  # every tenth text is held out
    held, seen = texts[::10][:kept], [text for number, text in enumerate(texts) if number % 10]
    for name, part in (("validation", held), ("seen", seen)):
        (work / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in part)
        )
    (work / "config.json").write_text(json.dumps(SHAPE))
    schedule = f"0:{short // 8},{first_steps * 3 // 4}:{short}"
    first = train(
        work,
        "first",
        short,
        2,
        first_steps,
        options.lr,
        "--training.seq_len_schedule",
        schedule,
        threads=os.cpu_count() or 1,
    )

    def arm(tokens: int) -> tuple[list[dict], list[dict]]:
        more = ("--model.weights", first, "--training.gradient_accumulation_steps", ROWS)
        run = train(work, f"run-{tokens}", tokens, long // tokens, steps, options.lr / 3, *more)
        lengths = [short // 2, short, 2 * short, long]
        return (
            by_position(run, work / "validation.jsonl", work, long, 1 if options.quick else 24),
            needles(
                run,
                work / "validation.jsonl",
                work,
                lengths,
                1 if options.quick else options.needles,
            ),
        )

    with ThreadPoolExecutor() as arms:
        found = dict(
            zip(
                (f"trained at {tokens:,}" for tokens in (short, long)),
                arms.map(arm, (short, long)),
                strict=True,
            )
        )
    rows = [
        {
            "from": bucket["from"],
            "to": bucket["to"],
            **{name: where[number]["loss"] for name, (where, _) in found.items()},
        }
        for number, bucket in enumerate(next(iter(found.values()))[0])
    ]
    beyond = {name: mean_beyond(where, short) for name, (where, _) in found.items()}
    low, high = (beyond[f"trained at {tokens:,}"] for tokens in (long, short))
    verdict = [
        {
            "loss beyond": short,
            f"trained at {long:,}": low,
            f"trained at {short:,}": high,
            "goal": "lower",
            "reached": low < high,
        }
    ]
    cells = [{"arm": name, **cell} for name, (_, cells) in found.items() for cell in cells]
    for title, table in (
        ("loss by position", rows),
        ("verdict", verdict),
        *([("needle", cells)] if cells else []),
    ):
        print_table(title, table)
    facts = {
        "documents": len(texts),
        "bytes": sum(map(len, texts)),
        "first_steps": first_steps,
        "steps": steps,
        "lr": options.lr,
        "shape": SHAPE,
    }
    write_result(
        "long_documents",
        {"rows": rows, "verdict": verdict, "needle": cells, **facts},
        options.quick,
    )
    if not options.quick:
        draw({name: where for name, (where, _) in found.items()}, RESULTS / "long_documents.svg")


def mean_beyond(buckets: list[dict], tokens: int) -> float:
    far = [bucket for bucket in buckets if bucket["from"] >= tokens]
    return sum(bucket["loss"] * bucket["tokens"] for bucket in far) / sum(
        bucket["tokens"] for bucket in far
    )


if __name__ == "__main__":
    main()
