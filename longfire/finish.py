"""What a run does after its last step: compare with xz, export and check, sample, report, and say where everything lies."""

from collections.abc import Callable

import torch

from longfire.checkpoint import State
from longfire.data.batches import Batches
from longfire.errors import SettingsError
from longfire.evaluate import heldout_bytes, xz_bits_per_byte
from longfire.generate import generate_text
from longfire.hub.convert import export, facts_of
from longfire.model import Model
from longfire.options import Sampling
from longfire.pages import html
from longfire.report import METRICS
from longfire.run import RUN_TOML, Run
from longfire.weights import open_model

Results = dict[str, dict[str, float]]  # of the last evaluation, by source


def finish(run: Run, state: State, batches: Batches, results: Results, note: Callable[[str], None]) -> None:
    """Do what the settings ask for at the end. Where many processes trained, one does it, with the model of the last checkpoint."""
    lies = {"settings": run.folder / RUN_TOML, "metrics": run.folder / METRICS}
    if run.checkpoint.enable_checkpoint:
        lies["checkpoint"] = run.folder / run.checkpoint.folder / f"step-{state.step}"
    for source, numbers in results.items():
        note(held_out_line(run, source, numbers, batches))
    model = state.model
    if state.mesh.size() > 1 and (run.checkpoint.export or run.eval.sample_prompt):
        model = open_model(run.folder, state.step, note, run.model.plugins).model
    if run.checkpoint.export:
        lies["Hugging Face weights"] = run.folder / "hf"
        dtype = getattr(torch, run.checkpoint.export_dtype)
        facts = facts_of(run, state.step)
        check = export(model, batches.prepared.tokenizer, run.folder / "hf", dtype=dtype, facts=facts)
        note(f"export: {check}")
    if run.eval.sample_prompt:
        note(sample(run, model, batches))
    if run.metrics.report:
        try:
            html([run.folder], run.folder / "report.html")
            lies["report"] = run.folder / "report.html"
        except SettingsError as error:  # matplotlib is an extra: a trained model is no failure for want of a picture
            note(f"no report.html: {error}")
    width = max(map(len, lies))
    note("\n".join(["", "Where everything lies:", *(f"  {what:<{width}}  {path}" for what, path in lies.items())]))


def held_out_line(run: Run, source: str, numbers: dict[str, float], batches: Batches) -> str:
    """The last evaluation in one sentence, with xz's bits per byte beside it where asked for."""
    line = (
        f"held out of {source}: loss {numbers['loss']:.4f} nats a token, perplexity {numbers['perplexity']:.2f}, "
        f"{numbers['bits_per_byte']:.3f} bits a byte"
    )
    if run.eval.compare_xz:
        line += f" (xz -9 on the same bytes: {xz_bits_per_byte(heldout_bytes(batches, source, run.eval.tokens)):.3f})"
    return line


def sample(run: Run, model: Model, batches: Batches) -> str:
    """What the model writes after eval.sample_prompt."""
    sampling = Sampling(max_new_tokens=run.eval.sample_tokens, seed=run.training.seed)
    prompt = run.eval.sample_prompt
    text = generate_text(model, batches.prepared.tokenizer, prompt, sampling, run.tokenizer.add_bos)
    return f"sample, after {prompt!r}:\n{text}"
