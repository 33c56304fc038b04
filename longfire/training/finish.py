"""What a run does after its last step: compare with xz, export and check, sample, report, and say
where everything lies."""

from collections.abc import Callable
from pathlib import Path

import torch

from longfire.checkpoint.checkpoint import State
from longfire.checkpoint.weights import open_model
from longfire.config.options import Sampling
from longfire.config.run import RUN_TOML, Run
from longfire.data.batches import Batches
from longfire.errors import SettingsError, UserError
from longfire.evaluation.evaluate import validation_bytes, xz_bits_per_byte
from longfire.generation.generate import generate_text
from longfire.huggingface.export import export, facts_of
from longfire.model import Model
from longfire.training.report_page import html
from longfire.training.reporting import METRICS

Results = dict[str, dict[str, float]]  # of the last evaluation, by source


def finish(
    run: Run, state: State, batches: Batches, results: Results, note: Callable[[str], None]
) -> None:
    """Do what the settings ask for at the end. Where many processes trained, one does it, with the
    model of the last checkpoint.

    The run itself is done and saved: whatever fails here, the rest is done, and the last lines say
    where everything lies. The first UserError is raised after them.
    """
    lies = {"settings": run.folder / RUN_TOML, "metrics": run.folder / METRICS}
    if run.checkpoint.enable_checkpoint:
        lies["checkpoint"] = run.folder / run.checkpoint.folder / f"step-{state.step}"
    for source, numbers in results.items():
        note(validation_line(run, source, numbers, batches))
    failures: list[UserError] = []
    try:
        for part in (write_export, write_sample, write_report):
            try:
                lies |= part(run, state, batches, note)
            except UserError as error:
                failures.append(error)
    finally:
        width = max(map(len, lies))
        note(
            "\n".join(
                [
                    "",
                    "Outputs:",
                    *(f"  {what:<{width}}  {path}" for what, path in lies.items()),
                ]
            )
        )
    for error in failures[1:]:
        note(f"failed after the last step: {error}")
    if failures:
        raise failures[0]


def last_model(run: Run, state: State, note: Callable[[str], None]) -> Model:
    """The model as it was trained; where many processes hold it, the one of the last checkpoint."""
    if state.mesh.size() == 1:
        return state.model
    return open_model(run.folder, state.step, note, run.model.plugins).model


def write_export(
    run: Run, state: State, batches: Batches, note: Callable[[str], None]
) -> dict[str, Path]:
    """Hugging Face weights, where asked for; what lies where."""
    if not run.checkpoint.export:
        return {}
    out, dtype = run.folder / "hf", getattr(torch, run.checkpoint.export_dtype)
    model, facts = last_model(run, state, note), facts_of(run, state.step)
    tokenizer, adds_bos = batches.prepared.tokenizer, run.tokenizer.add_bos
    check = export(model, tokenizer, out, dtype=dtype, facts=facts, adds_bos=adds_bos)
    note(f"export: {check}")
    return {"Hugging Face weights": out}


def write_sample(
    run: Run, state: State, batches: Batches, note: Callable[[str], None]
) -> dict[str, Path]:
    if run.eval.sample_prompt:
        note(sample(run, last_model(run, state, note), batches))
    return {}


def write_report(
    run: Run, state: State, batches: Batches, note: Callable[[str], None]
) -> dict[str, Path]:
    """The page, where asked for; what lies where."""
    if not run.metrics.report:
        return {}
    try:
        html([run.folder], run.folder / "report.html", note)
    except (
        SettingsError
    ) as error:  # matplotlib is an extra: a trained model is no failure for want of a picture
        note(f"no report.html: {error}")
        return {}
    return {"report": run.folder / "report.html"}


def validation_line(run: Run, source: str, numbers: dict[str, float], batches: Batches) -> str:
    """The last evaluation in one sentence, with xz's bits per byte beside it where asked for."""
    line = (
        f"validation of {source}: loss {numbers['loss']:.4f} nats a token, perplexity {numbers['perplexity']:.2f}, "
        f"{numbers['bits_per_byte']:.3f} bits a byte"
    )
    if run.eval.compare_xz:
        text = validation_bytes(batches, source, run.eval.tokens)
        same = "the same bytes" if len(text) == numbers["bytes"] else "what the tokens decode to"
        line += f" (xz -9e on {same}: {xz_bits_per_byte(text):.3f})"
    return line


def sample(run: Run, model: Model, batches: Batches) -> str:
    """What the model writes after eval.sample_prompt."""
    sampling = Sampling(max_new_tokens=run.eval.sample_tokens, seed=run.training.seed)
    prompt = run.eval.sample_prompt
    text = generate_text(model, batches.prepared.tokenizer, prompt, sampling, run.tokenizer.add_bos)
    return f"sample, after {prompt!r}:\n{text}"
