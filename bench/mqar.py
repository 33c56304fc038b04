"""Multi-query associative recall (Arora 2023, "Zoology"): which mixers find again what they have read, by length and pairs.

Two layers of width 64 without MLPs, tests of (tokens, pairs) = (64, 4) and (128, 8), trained on rows of both by turns: the paper's
small settings. What differs, since a CPU should do it in minutes: 512 words instead of 8,192, one learning rate instead of four, fresh
rows at every step instead of 100,000 for 64 epochs, an end when all answers are right or after `--steps`; and a short convolution
stands where our mixer has one, where the paper has one before every mixer.

    python bench/mqar.py --mixers attention,gla --steps 2000

Mixers that are not named keep the rows that they have in bench/results/mqar.json.
"""

import json
import time
from dataclasses import fields
from typing import Any

import torch
from matplotlib.figure import Figure
from measure import RESULTS, arguments, print_table, write_result

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.evaluation.recall import accuracy, mqar
from longfire.initialise import build
from longfire.mixers import MIXERS
from longfire.mixers.mixer import Sequence
from longfire.model import Model
from longfire.ops.cross_entropy import linear_cross_entropy
from longfire.training.report_page import COLOURS, as_svg

WIDTH, LAYERS, WORDS, ROWS = 64, 2, 512, 64
TESTS = ((64, 4), (128, 8))  # tokens, pairs
QUICK_TESTS = ((16, 2),)
RESULT = RESULTS / "mqar.json"
RIGHT, LOOK_STEPS, TEST_ROWS = 0.99, 100, 256


def model_config_of(name: str, words: int) -> ModelConfig:
    """Two layers of a mixer, with those of these settings that it has."""
    wanted = {"num_heads": 2, "head_dim": 32, "use_short_conv": True}
    known = {field.name for field in fields(MIXERS[mixer_of(name)].Config)}
    settings = {key: value for key, value in wanted.items() if key in known}
    return ModelConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        layer_types=(name,),
        mixers={name: settings},
        mlp="none",
        vocab_size=words,
        tie_word_embeddings=True,
    )


def step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    number: int,
    tests: tuple[tuple[int, int], ...],
    words: int,
) -> None:
    """One update on fresh rows; the head sees only the tokens that have a label."""
    batch = mqar(ROWS, *tests[number % len(tests)], words, seed=1 + number)
    hidden_BTD = model(batch.ids_BT, Sequence(batch.positions_BT))
    asked_BT = batch.labels_BT >= 0
    loss = (
        linear_cross_entropy(hidden_BTD[asked_BT], model.head.weight, batch.labels_BT[asked_BT])
        / asked_BT.sum()
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def train(
    name: str, tests: tuple[tuple[int, int], ...], words: int, steps: int, lr: float
) -> list[dict[str, Any]]:
    """Train one mixer; a row for each test with the accuracy that it reached."""
    model = build(model_config_of(name, words), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, lr / 100)
    began, reached = time.perf_counter(), []
    for number in range(steps):
        step(model, optimizer, number, tests, words)
        schedule.step()
        if (number + 1) % LOOK_STEPS == 0 or number + 1 == steps:
            reached = [accuracy(model, mqar(TEST_ROWS, *test, words, seed=0)) for test in tests]
            print(
                f"{name} step {number + 1}: {', '.join(f'{share:.3f}' for share in reached)}",
                flush=True,
            )
            if min(reached) >= RIGHT:
                break
    seconds = time.perf_counter() - began
    return [
        {
            "mixer": name,
            "lr": lr,
            "tokens": tokens,
            "pairs": pairs,
            "accuracy": share,
            "steps": number + 1,
            "seconds": seconds,
        }
        for (tokens, pairs), share in zip(tests, reached)
    ]


def draw(rows: list[dict[str, Any]]) -> Any:
    """Accuracy of each mixer, a group of bars a test."""
    drawn = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = drawn.add_subplot(ylabel="accuracy", ylim=(0, 1.02))
    mixers, tests = (
        list(dict.fromkeys(map(key, rows)))
        for key in (lambda r: r["mixer"], lambda r: (r["tokens"], r["pairs"]))
    )
    for number, (mixer, colour) in enumerate(zip(mixers, COLOURS * len(mixers))):
        shares = [row["accuracy"] for row in rows if row["mixer"] == mixer]
        axes.bar(
            [place + 0.8 * number / len(mixers) for place in range(len(shares))],
            shares,
            0.8 / len(mixers),
            color=colour,
            label=mixer,
        )
    axes.set_xticks(
        [place + 0.4 for place in range(len(tests))],
        [f"{tokens} tokens, {pairs} pairs" for tokens, pairs in tests],
    )
    axes.legend(frameon=False, fontsize=8)
    return drawn


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0], mixers="attention,gla,gated_delta_net", steps=2000, lr=3e-3
    )
    tests, words = (QUICK_TESTS, 64) if options.quick else (TESTS, WORDS)
    steps = 4 if options.quick else options.steps
    rows = [
        row
        for name in options.mixers.split(",")
        for row in train(name, tests, words, steps, options.lr)
    ]
    known = [] if options.quick or not RESULT.exists() else json.loads(RESULT.read_text())["rows"]
    rows = [*(row for row in known if row["mixer"] not in options.mixers.split(",")), *rows]
    print_table("multi-query associative recall", rows)
    about = {"width": WIDTH, "layers": LAYERS, "words": words, "rows_of_a_step": ROWS}
    write_result("mqar", {**about, "rows": rows}, options.quick)
    if not options.quick:
        (RESULTS / "mqar.svg").write_text(as_svg(draw(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
