"""A real checkpoint whose attention is replaced: plain copying against distillation, at the same number of tokens.

    python bench/distillation.py --checkpoint DIR [--data TEXT] [--mixer gla] [--steps 48]

Three arms, each through the commands that a user would run, from the same `longfire convert`:
  copying      trained on the text
  logits       learns the checkpoint's probabilities
  hidden first a share of the steps teaches the new mixers what the attention said, the rest as `logits`
Validation loss by `longfire eval` at the end of each; the checkpoint's own loss is the floor.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from measure import arguments, print_table, write_result

from longfire.config.config_file import read_config

# Shapes that take every matrix of a Llama-shaped attention: as many heads, as wide keys and values.
MIXERS = {
    "gla": lambda heads, kv: {
        "num_heads": heads,
        "num_kv_heads": kv,
        "expand_k": 1.0,
        "expand_v": 1.0,
        "feature_map": "none",
        "use_output_gate": True,
    },
    "gated_delta_net": lambda heads, kv: {
        "num_heads": heads,
        "head_dim": 0,
        "expand_v": 1.0,
        "use_short_conv": True,
    },
}


def longfire(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "longfire", *map(str, words)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"longfire {' '.join(map(str, words))}\n{done.stderr[-3000:]}")
    return done.stdout


def target(checkpoint: Path, mixer: str) -> dict:
    """The checkpoint's config with every layer's attention replaced."""
    config = read_config(checkpoint)
    heads = config["num_attention_heads"]
    settings = MIXERS[mixer](heads, config.get("num_key_value_heads") or heads)
    if "head_dim" in settings:
        settings["head_dim"] = config["hidden_size"] // heads
    return {
        "model_type": "longfire",
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "intermediate_size": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
        "layer_types": [mixer],
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        mixer: settings,
    }


def validation_loss(run: Path) -> float:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(
        value
        for record in reversed(records)
        for key, value in record.items()
        if key.endswith("/loss")
    )


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        checkpoint="",
        data="embedded",
        mixer="gla",
        steps=48,
        hidden_share=0.5,
        seq_len=256,
        rows=4,
        lr=1e-3,
        eval_tokens=16384,
        work="",
    )
    if not options.checkpoint:
        print(
            "distillation needs --checkpoint DIR, a folder of Llama-shaped Hugging Face weights: nothing was measured"
        )
        return
    source = Path(options.checkpoint).absolute()
    work = Path(options.work or tempfile.mkdtemp()).absolute()
    work.mkdir(parents=True, exist_ok=True)
    (work / "target.json").write_text(json.dumps(target(source, options.mixer)))
    longfire(
        "convert", "--model", source, "--config", work / "target.json", "--output", work / "start"
    )
    hidden_steps = round(options.steps * options.hidden_share)

    def train(name: str, weights: Path, steps: int, lr: float, *more: object) -> Path:
        run = work / name
        longfire(
            "train",
            "--model.config",
            work / "start",
            "--model.weights",
            weights,
            "--job.dump_folder",
            run,
            "--tokenizer.path",
            source,
            "--data.dataset",
            options.data,
            "--data.folder",
            work / "stores",
            "--training.steps",
            steps,
            "--training.seq_len",
            options.seq_len,
            "--training.batch_size",
            options.rows,
            "--optimizer.lr",
            lr,
            "--optimizer.weight_decay",
            0.0,
            "--lr_scheduler.warmup_steps",
            max(1, steps // 10),
            "--eval.tokens",
            options.eval_tokens,
            "--checkpoint.interval",
            0,
            "--checkpoint.export",
            "true",
            "--metrics.report",
            "false",
            "--training.compile",
            "off",
            *more,
        )
        return run

    teacher = ("--distillation.teacher", source, "--distillation.kind")
    arms = {"copying": train("copying", work / "start", options.steps, options.lr)}
    arms["logits"] = train("logits", work / "start", options.steps, options.lr, *teacher, "logits")
    aligned = train("hidden", work / "start", hidden_steps, options.lr, *teacher, "hidden")
    arms["hidden first"] = train(
        "hidden-then-logits",
        aligned / "hf",
        options.steps - hidden_steps,
        options.lr,
        *teacher,
        "logits",
    )
    tokens = options.steps * options.rows * options.seq_len
    losses = {name: validation_loss(run) for name, run in arms.items()}
    rows = [
        {"arm": name, "tokens": tokens, "validation loss": loss} for name, loss in losses.items()
    ]
    rows.append(
        {
            "arm": "hidden only",
            "tokens": hidden_steps * options.rows * options.seq_len,
            "validation loss": validation_loss(aligned),
        }
    )
    best = min(losses["logits"], losses["hidden first"])
    verdict = [
        {
            "distilled": best,
            "copied": losses["copying"],
            "goal": "lower",
            "reached": best < losses["copying"],
        }
    ]
    settings = tomllib.loads((arms["copying"] / "run.toml").read_text())
    parameters = {
        "checkpoint": source.name,
        "mixer": options.mixer,
        "lr": settings["optimizer"]["lr"],
    }
    print_table("distillation", rows)
    print_table("verdict", verdict)
    write_result("distillation", {"rows": rows, "verdict": verdict, **parameters}, options.quick)


if __name__ == "__main__":
    main()
