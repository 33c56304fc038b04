"""A real checkpoint goes in, is trained further, and goes out: perplexities of both sides on the same text at every station.

    python bench/real_checkpoint.py --folder SmolLM2-135M-Instruct

--folder: config.json, weights and tokenizer of a model that transformers can load. The text is the standard library's own top-level
modules, of which a twentieth is held out; rows are short, since this is about being right and not about being good. `--quick` makes
a tiny model of its own.
"""

import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from measure import arguments, print_table, write_result

from longfire.checkpoint.weights import open_model
from longfire.config.run import Run
from longfire.data.batches import Batches
from longfire.data.pack import NO_LABEL
from longfire.data.prepare import prepare
from longfire.data.tokenizer import bytes_tokenizer
from longfire.evaluation.evaluate import evaluate
from longfire.evaluation.scores import trained_with
from longfire.huggingface.export import export_run
from longfire.huggingface.import_ import import_hf
from longfire.training.loop import train

TEXT = str(Path(json.__file__).parents[1] / "*.py")
STEPS, TOKENS, SEQ_LEN, ROWS = 50, 4096, 64, 2
LIMIT = 1e-4  # of a perplexity that two right computations may differ by, relative: fp32 sums of thousands of logarithms


def tiny(folder: Path) -> Path:
    """A random Llama of bytes, for --quick."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        vocab_size=258,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=256,
        eos_token_id=257,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    bytes_tokenizer().save(folder)
    return folder


def overrides(run: Path, steps: int) -> dict[str, str]:
    settings = {
        "model.compute_dtype": "float32",  # as the peer computes
        "data.dataset": TEXT,
        "data.folder": run.parent / "stores",
        "data.validation_fraction": 0.05,
        "training.seq_len": SEQ_LEN,
        "training.batch_size": ROWS,
        "training.steps": steps,
        "lr_scheduler.warmup_steps": steps // 5,
        "checkpoint.interval": 0,
        "eval.tokens": TOKENS,
        "metrics.report": "false",
        "eval.at_end": "false",
        "training.compile": "off",
    }
    return {key: str(value) for key, value in settings.items()}


def ours(run: Run, step: int) -> dict[str, float]:
    """Validation loss of a checkpoint of the run, as `longfire eval` computes it, in fp32 as the
    peer: an imported run that nobody has trained computes in what suits the device."""
    opened = open_model(run.folder, step)
    opened.model.compute_in(torch.float32)
    with heldout(run) as batches:
        (numbers,) = evaluate(
            opened.model, batches, TOKENS, run.training.loss_chunk_tokens
        ).values()
    return numbers


@torch.no_grad()
def theirs(run: Run, folder: Path) -> dict[str, float]:
    """The same rows through transformers' class, whole logits, fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nats, count = 0.0, 0
    with heldout(run) as batches:
        for batch in batches.validation_batches(0, TOKENS, ROWS):
            logits = model(batch.ids_BT, use_cache=False).logits.flatten(0, 1).float()
            labels = batch.labels_BT.flatten()
            nats += F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum").item()
            count += int((labels != NO_LABEL).sum())
    return {"loss": nats / count, "perplexity": math.exp(nats / count), "tokens": count}


def heldout(run: Run) -> Batches:
    prepared = prepare(run.data, trained_with(run))
    return Batches(prepared, run.data, run.training.seq_len, run.training.seed)


def main() -> None:
    options = arguments(__doc__.splitlines()[0], folder="", steps=STEPS)
    if not options.folder and not options.quick:
        print("nothing to do: --folder DIR names a model that transformers can load")
        return
    steps = 3 if options.quick else options.steps
    with tempfile.TemporaryDirectory() as scratch:
        source = tiny(Path(scratch, "tiny")) if options.quick else Path(options.folder)
        place, seconds, checks = Path(scratch, "run"), {}, {}
        start = time.perf_counter()
        checks["import"] = import_hf(str(source), place)
        seconds["import"] = time.perf_counter() - start
        run = Run.of_folder(place, overrides(place, steps))
        rows = [compared("as it came", ours(run, 0), theirs(run, source))]
        start = time.perf_counter()
        if code := train(run):
            sys.exit(code)
        seconds["train"] = time.perf_counter() - start
        start = time.perf_counter()
        checks["export"] = export_run(place, steps, Path(scratch, "hf"))
        seconds["export"] = time.perf_counter() - start
        rows.append(
            compared(f"after {steps} steps", ours(run, steps), theirs(run, Path(scratch, "hf")))
        )
        parameters = sum(p.numel() for p in open_model(place, 0).model.parameters())
    checked = [
        {
            "what": what,
            "seconds": round(seconds[what], 1),
            "tensors": check.tensors,
            "equal bytes": True,
            "KL to transformers": check.peer_kl,
        }
        for what, check in checks.items()
    ]
    checked.append(
        {
            "what": f"train {steps} steps of {ROWS} x {SEQ_LEN}",
            "seconds": round(seconds["train"], 1),
        }
    )
    print_table(f"{parameters:,} parameters, validation text", rows)
    print_table("in, on and out", [{**dict.fromkeys(checked[0], ""), **row} for row in checked])
    write_result(
        "real_checkpoint",
        {"parameters": parameters, "perplexity": rows, "checks": checked},
        options.quick,
    )
    sys.exit(not all(row["same"] for row in rows))


def compared(when: str, ours: dict[str, float], theirs: dict[str, float]) -> dict[str, object]:
    apart = abs(ours["perplexity"] / theirs["perplexity"] - 1)
    return {
        "weights": when,
        "tokens": theirs["tokens"],
        "perplexity, longfire": ours["perplexity"],
        "perplexity, transformers": theirs["perplexity"],
        "relative difference": apart,
        "same": apart <= LIMIT and ours["tokens"] == theirs["tokens"],
        "bits a byte": ours["bits_per_byte"],
    }


if __name__ == "__main__":
    main()
