"""What a run does after its last step: compare with xz, export and check the weights, write a
sample and the report page, and list its outputs."""

import logging
from pathlib import Path

import torch

from longfire.checkpoint.best import best_steps, read_losses
from longfire.checkpoint.state import State
from longfire.checkpoint.weights import open_model
from longfire.config.options import Sampling
from longfire.config.run import RUN_TOML, Run
from longfire.data.batches import Batches
from longfire.errors import SettingsError, UserError
from longfire.evaluation.evaluate import validation_bytes, xz_bits_per_byte
from longfire.generation.generate import generate_text
from longfire.huggingface.export import export, facts_of
from longfire.model import Model
from longfire.optim import averages_in_place
from longfire.training.records import METRICS
from longfire.training.report_page import html

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, float]]  # of the last evaluation, by source


def finish(run: Run, state: State, batches: Batches, results: Results) -> None:
    """Do what the settings ask for at the end. Where several processes trained, process 0 does it,
    with the model of the last checkpoint.

    The run itself is complete and saved: whatever fails here, the rest is done, and the last lines
    list the outputs. The first UserError is raised after them.
    """
    outputs = {"settings": run.folder / RUN_TOML, "metrics": run.folder / METRICS}
    if run.checkpoint.enable_checkpoint:
        outputs["checkpoint"] = run.folder / run.checkpoint.folder / f"step-{state.step}"
    outputs |= best_checkpoint(run)
    for source, numbers in results.items():
        logger.info(validation_line(run, source, numbers, batches))
    failures: list[UserError] = []
    try:
        with averages_in_place(state.optimizer, run.uses_average and state.mesh.size() == 1):
            for part in (write_export, write_sample, write_report):
                try:
                    outputs |= part(run, state, batches)
                except UserError as error:
                    failures.append(error)
    finally:
        logger.info(outputs_text(outputs))
    for failure in failures[1:]:
        logger.info(f"failed after the last step: {failure}")
    if failures:
        raise failures[0]


def best_checkpoint(run: Run) -> dict[str, Path]:
    """With checkpoint.keep_best_k: the checkpoint of the lowest validation loss, which is logged.
    Returns the outputs."""
    folder = run.folder / run.checkpoint.folder
    if not (run.checkpoint.enable_checkpoint and run.checkpoint.keep_best_k):
        return {}
    best = best_steps(folder, 1)
    if not best:
        return {}
    loss = read_losses(folder)[best[0]]
    logger.info(f"best checkpoint: step {best[0]:,}, validation loss {loss:.4f} nats a token")
    return {"best checkpoint": folder / f"step-{best[0]}"}


def outputs_text(outputs: dict[str, Path]) -> str:
    """The paths of what the run has written, a line each."""
    width = max(map(len, outputs))
    lines = ["", "Outputs:"]
    for name, path in outputs.items():
        lines.append(f"  {name:<{width}}  {path}")
    return "\n".join(lines)


def last_model(run: Run, state: State) -> Model:
    """The trained model; where several processes share it, that of the last checkpoint."""
    if state.mesh.size() == 1:
        return state.model
    return open_model(run.folder, state.step, run.model.plugins).model


def write_export(run: Run, state: State, batches: Batches) -> dict[str, Path]:
    """With checkpoint.export: Hugging Face weights. Returns the outputs."""
    if not run.checkpoint.export:
        return {}
    out = run.folder / "hf"
    dtype = getattr(torch, run.checkpoint.export_dtype)
    model = last_model(run, state)
    facts = facts_of(run, state.step)
    tokenizer = batches.prepared.tokenizer
    adds_bos = run.tokenizer.add_bos
    check = export(model, tokenizer, out, dtype=dtype, facts=facts, adds_bos=adds_bos)
    logger.info(f"export: {check}")
    return {"Hugging Face weights": out}


def write_sample(run: Run, state: State, batches: Batches) -> dict[str, Path]:
    """With eval.sample_prompt: log what the model writes after it."""
    if run.eval.sample_prompt:
        logger.info(sample(run, last_model(run, state), batches))
    return {}


def write_report(run: Run, state: State, batches: Batches) -> dict[str, Path]:
    """With metrics.report: the report page. Returns the outputs."""
    if not run.metrics.report:
        return {}
    try:
        html([run.folder], run.folder / "report.html")
    except SettingsError as error:  # matplotlib is an extra: the run has not failed without it
        logger.info(f"no report.html: {error}")
        return {}
    return {"report": run.folder / "report.html"}


def validation_line(run: Run, source: str, numbers: dict[str, float], batches: Batches) -> str:
    """The last evaluation in one sentence, with xz's bits per byte beside it where asked for."""
    line = (
        f"validation of {source}: loss {numbers['loss']:.4f} nats a token, "
        f"perplexity {numbers['perplexity']:.2f}, {numbers['bits_per_byte']:.3f} bits a byte"
    )
    if run.eval.compare_xz:
        text = validation_bytes(batches, source, run.eval.tokens)
        is_exact = len(text) == numbers["bytes"]
        compressed = "the same bytes" if is_exact else "what the tokens decode to"
        line += f" (xz -9e on {compressed}: {xz_bits_per_byte(text):.3f})"
    return line


def sample(run: Run, model: Model, batches: Batches) -> str:
    """What the model writes after eval.sample_prompt."""
    sampling = Sampling(max_new_tokens=run.eval.sample_tokens, seed=run.training.seed)
    prompt = run.eval.sample_prompt
    text = generate_text(model, batches.prepared.tokenizer, prompt, sampling, run.tokenizer.add_bos)
    return f"sample, after {prompt!r}:\n{text}"
