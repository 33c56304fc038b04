"""What a run does after its last step: export and check, compare with xz, sample, report, and say where everything lies."""

from collections.abc import Callable

import torch

from longfire import report
from longfire.checkpoint import State
from longfire.data.batches import Batches
from longfire.data.prepare import Prepared
from longfire.evaluate import heldout_bytes, xz_bits_per_byte
from longfire.generate import Sampling, generate_text
from longfire.hub.convert import export
from longfire.run import Run


def finish(
    run: Run, state: State, prepared: Prepared, batches: Batches, results: dict[str, dict], note: Callable
) -> None:
    """Do what the settings ask for at the end; `results` are the last evaluation's, by source."""
    lies = {"settings": run.folder / "run.toml", "metrics": run.folder / "metrics.jsonl"}
    if run.checkpoint.enable_checkpoint:
        lies["checkpoint"] = run.folder / run.checkpoint.folder / f"step-{state.step}"
    for source, numbers in results.items():
        note(held_out_line(run, source, numbers, batches))
    if run.checkpoint.export:
        folder = run.folder / "hf"
        check = export(state.model, prepared.tokenizer, folder, dtype=getattr(torch, run.checkpoint.export_dtype),
                       facts=facts(run, state, results))  # fmt: skip
        note(f"export: {check}")
        lies["Hugging Face weights"] = folder
    if run.eval.sample_prompt:
        sampling = Sampling(max_new_tokens=run.eval.sample_tokens, temperature=0.8, top_k=50, seed=run.training.seed)
        note(
            f"sample, after {run.eval.sample_prompt!r}:\n{generate_text(state.model, prepared.tokenizer, run.eval.sample_prompt, sampling)}"
        )
    if run.metrics.report:
        lies["report"] = run.folder / "report.html"
        report.html([run.folder], lies["report"])
    width = max(map(len, lies))
    note("\n".join(["", "Where everything lies:", *(f"  {what:<{width}}  {path}" for what, path in lies.items())]))


def held_out_line(run: Run, source: str, numbers: dict, batches: Batches) -> str:
    line = (f"held out of {source}: loss {numbers['loss']:.4f} nats a token, perplexity {numbers['perplexity']:.2f}, "
            f"{numbers['bits_per_byte']:.3f} bits a byte")  # fmt: skip
    if run.eval.compare_xz:
        line += f" (xz -9 on the same bytes: {xz_bits_per_byte(heldout_bytes(batches, source, run.eval.tokens)):.3f})"
    return line


def facts(run: Run, state: State, results: dict[str, dict]) -> dict:
    """What the model card says about how the weights came to be."""
    return {
        "description": run.job.description,
        "data": ", ".join(run.data.dataset),
        "steps": state.step,
        "tokens": state.tokens,
        "seq_len": run.training.seq_len,
        **{f"held-out loss of {source}": f"{numbers['loss']:.4f}" for source, numbers in results.items()},
    }
