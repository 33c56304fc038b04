"""What a language model writes after its last step: Hugging Face weights, a sample; and its last
evaluation, compared with xz."""

import logging
from pathlib import Path

import torch

from longfire.checkpoint.state import State
from longfire.checkpoint.weights import open_model
from longfire.config.options import Sampling
from longfire.config.run import Run
from longfire.data.batches import Batches
from longfire.evaluation.evaluate import validation_bytes, xz_bits_per_byte
from longfire.generation.generate import generate_text
from longfire.huggingface.export import export, facts_of
from longfire.model import Model

logger = logging.getLogger(__name__)


def last_model(run: Run, state: State) -> Model:
    """The trained model; where its parameters are shards, that of the last checkpoint."""
    if state.mesh.has_whole_parameters:
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
