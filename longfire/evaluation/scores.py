"""`longfire eval`: the scores of a checkpoint on validation documents, on other texts, on tasks; as
tables, JSON and pictures."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from longfire.checkpoint.provenance import tokenizer_line
from longfire.checkpoint.weights import Opened, open_model
from longfire.config import settings
from longfire.config.options import Scoring
from longfire.config.run import Run
from longfire.data.batches import Batches, in_order
from longfire.data.prepare import prepare
from longfire.data.text import same_for_all
from longfire.data.token_bytes import byte_lengths
from longfire.disk import write_whole
from longfire.errors import CheckpointError, DataError, SettingsError, first_line
from longfire.evaluation.evaluate import (
    Measured,
    measure,
    measure_validation,
    with_progress,
)
from longfire.evaluation.recall import Needle, draw_needle, needle_table
from longfire.generation.generate import begins_with_bos
from longfire.plain_console import plain_console
from longfire.training import lengths
from longfire.training.report_page import (
    COLOURS,
    check_ending,
    figure,
    plain_label,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What --json writes
Numbers = dict[str, object]
STORES = "token-stores"  # in a run folder, of texts that the run's own data.folder does not have
SEQ_LEN = 2048  # for weights without a run


def main(
    folder: Path,
    scoring: Scoring,
    step: int = -1,
    plugins: tuple[str, ...] = (),
) -> int:
    """Score the model in a run folder or a folder of Hugging Face weights. Raises SettingsError,
    DataError, CheckpointError."""
    if scoring.predict:
        raise SettingsError(
            "--predict names the classes of files, and this is a language model, which "
            "`longfire generate` lets continue texts: leave it out"
        )
    if scoring.plot:
        check_ending(Path(scoring.plot))
        if scoring.tasks:
            raise SettingsError(
                "--plot draws losses by position and needles; tasks have no picture: leave it out"
            )
    if scoring.tasks and importlib.util.find_spec("lm_eval") is None:
        raise SettingsError(
            "--tasks are run by lm-eval, which is not installed: pip install 'longfire[eval]'"
        )
    opened = open_model(Path(folder), step, plugins=plugins)
    about = {"folder": str(folder), "step": opened.step, "weights": opened.fingerprint()}
    print(f"weights {about['weights']}, {step_of(opened)}")
    print(tokenizer_line(opened.tokenizer, tokenizer_settings(opened)))
    if scoring.tasks:
        found = tasks(opened, scoring)
    elif scoring.needle:
        found = needles(opened, scoring)
    else:
        found = losses(opened, scoring)
    if scoring.json:
        write_json(Path(scoring.json), {**about, **found})
    return 0


def tasks(opened: Opened, scoring: Scoring) -> Numbers:
    """lm-eval's numbers, shown. Raises SettingsError naming the package where lm-eval is installed
    without what it needs."""
    try:
        from longfire.evaluation.lm_eval_model import run_tasks, show_tasks

        found = run_tasks(opened, scoring, sequence_length(opened, scoring))
    except ImportError as error:  # some of its tasks import what they need only when they run
        if (error.name or "").startswith("longfire"):
            raise
        if isinstance(error, ModuleNotFoundError):
            missing = f"package {error.name!r} is missing"
        else:
            missing = first_line(error)
        raise SettingsError(
            f"--tasks: lm-eval is installed, but not whole: {missing}; pip install 'longfire[eval]'"
            + (f", and if it is still missing, pip install {error.name}" if error.name else "")
        ) from error
    show_tasks(found)
    return {**found}


def step_of(opened: Opened) -> str:
    """The step of a checkpoint, for titles."""
    if opened.run:
        return f"step {opened.step}"
    return "Hugging Face weights"


def write_json(file: Path, found: Mapping[str, object]) -> None:
    """Write the numbers as JSON. Raises CheckpointError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be written: {error.strerror}; name another place with --json"
        ) from error


def losses(opened: Opened, scoring: Scoring) -> Numbers:
    """Losses on the validation documents of a run, or on all documents of other texts; shown, and
    drawn with --plot."""
    if scoring.data:
        measured = measure_texts(opened, scoring)
        documents = "all documents"
    else:
        measured = measure_run(opened, scoring)
        documents = "validation documents"
    show(measured, f"{step_of(opened)}, {documents}")
    if scoring.plot:
        title = f"{step_of(opened)}: loss by position"
        save_figure(position_chart(measured), Path(scoring.plot), title)
    sources: dict[str, object] = {}
    for name, source in measured.items():
        sources[name] = {
            **source.numbers(),
            "accuracy": source.accuracy,
            "by_position": source.by_position(),
        }
    return {"documents": documents, "sources": sources}


def measure_run(opened: Opened, scoring: Scoring) -> dict[str, Measured]:
    """The losses on the validation documents of a run. Raises SettingsError or DataError where
    there are none."""
    run = opened.run
    if run is None:
        raise SettingsError(
            "a folder of Hugging Face weights does not say which documents were held out: name "
            "texts with --data"
        )
    seq_len = sequence_length(opened, scoring)
    with (
        prepare(run.data, trained_with(run), folder_for_missing=own_stores(opened)) as prepared,
        Batches(prepared, run.data, seq_len, run.training.seed) as batches,
    ):
        found = measure_validation(
            opened.model,
            batches,
            scoring.tokens or run.eval.tokens,
            run.training.loss_chunk_tokens,
            shows_progress=True,
        )
    if not found:
        raise DataError(
            f"{run.folder}: no text was held out of this run's data, so there is nothing to "
            f"evaluate: score it on a text that it has not seen, `longfire eval {run.folder} "
            "--data FILE`, or train with data.validation = FILE"
        )
    return found


def own_stores(opened: Opened) -> Path | None:
    """Where token stores are made that are missing: in the run folder, since data.folder of a run
    that somebody else has made may be any place of this machine. None, data.folder, for weights
    without a run."""
    if opened.run is None:
        return None
    return opened.run.folder / STORES


def measure_texts(opened: Opened, scoring: Scoring) -> dict[str, Measured]:
    """The losses on all documents of --data. Raises DataError for a source without labels."""
    chunk_tokens = opened.run.training.loss_chunk_tokens if opened.run else 0
    seq_len = sequence_length(opened, scoring)
    found = {}
    data, wanted = texts(opened, scoring)
    with prepare(data, wanted, folder_for_missing=own_stores(opened)) as prepared:
        lengths_W = byte_lengths(prepared.tokenizer)
        for name, store in zip(prepared.names, prepared.stores):
            tokens = min(scoring.tokens or store.train.length, store.train.length)
            batches = in_order(
                store.train,
                tokens,
                seq_len,
                data,
                scoring.batch_size,
            )
            shown = with_progress(batches, name, tokens)
            measured = measure(opened.model, shown, lengths_W, chunk_tokens)
            found[name] = measured.of_documents(store.train, tokens, lengths_W)
            if not found[name].tokens:
                raise DataError(
                    f"{name}: too little text, of which no token can be predicted; name more "
                    "with --data"
                )
    return found


def texts(opened: Opened, scoring: Scoring) -> tuple[settings.Data, settings.Tokenizer]:
    """Settings of data and tokenizer for all documents of --data, none of them for validation."""
    run = opened.run
    data = run.data if run else settings.Data()
    record_format = ("text",) if scoring.text_field else same_for_all(data.record_format)
    data = replace(
        data,
        dataset=scoring.data or ("embedded",),
        dataset_name=(),
        dataset_split=(),
        data_dir=(),
        data_files=(),
        data_probs=(),
        validation=(),
        text_field=(scoring.text_field,) if scoring.text_field else (),
        record_format=record_format,
        validation_fraction=0.0,
        streaming=False,
    )
    return data, tokenizer_settings(opened)


def tokenizer_settings(opened: Opened) -> settings.Tokenizer:
    """The settings of the model's tokenizer: that of its run, or the one beside its weights."""
    if opened.run:
        return trained_with(opened.run)
    tokenizer = opened.tokenizer
    return settings.Tokenizer(
        tokenizer.where,
        add_bos=begins_with_bos(opened),
        add_eos=tokenizer.eos_id is not None,
    )


def sequence_length(opened: Opened, scoring: Scoring) -> int:
    """Tokens of a sequence: --seq_len, else those of the stage that the step was trained in. Raises
    SettingsError for more than the model has learned positions for."""
    config = opened.model.config
    run = opened.run
    limit = config.max_position_embeddings
    if run:
        of_run = lengths.stage_of_model(run.training, opened.step).seq_len
    else:
        of_run = min(SEQ_LEN, limit or SEQ_LEN)
    seq_len = scoring.seq_len or of_run
    if config.learned_positions and seq_len > limit:
        raise SettingsError(
            f"--seq_len {seq_len}: the model has learned {limit} positions; ask for no more"
        )
    return seq_len


def trained_with(run: Run) -> settings.Tokenizer:
    """The tokenizer settings of a run, with the copy in its folder: tokenizer.path = "train" would
    train another one where the data have changed."""
    kept = run.tokenizer_folder
    if kept.is_dir():
        return replace(run.tokenizer, path=str(kept))
    return run.tokenizer


def show(found: dict[str, Measured], title: str) -> None:
    """The tables that `longfire eval` prints: by source, and by position in the context."""
    print(title)
    table = Table("source")
    for name in ("loss (nats a token)", "perplexity", "bits a byte", "tokens", "bytes"):
        table.add_column(name, justify="right")
    for source, measured in found.items():
        n = measured.numbers()
        table.add_row(
            source,
            f"{n['loss']:.4f}",
            f"{n['perplexity']:.2f}",
            f"{n['bits_per_byte']:.4f}",
            f"{n['tokens']:,}",
            f"{n['bytes']:,}",
        )
    plain_console().print(table)
    print("loss by position (nats a token)")
    plain_console().print(position_table(found))


def position_table(found: dict[str, Measured]) -> Table:
    """A line for each bucket of positions, a column for each source."""
    table = Table("tokens before")
    losses_at: dict[tuple[int, int], dict[str, str]] = {}
    for source, measured in found.items():
        table.add_column(source, justify="right")
        for bucket in measured.by_position():
            place = (bucket["from"], bucket["to"])
            losses_at.setdefault(place, {})[source] = f"{bucket['loss']:.4f}"
    for (first, last), loss_of in sorted(losses_at.items()):
        place_text = f"{first:,} to {last:,}" if last > first else f"{first:,}"
        table.add_row(place_text, *(loss_of.get(source, "") for source in found))
    return table


def position_chart(found: dict[str, Measured]) -> "Figure":
    drawn, axes = figure("loss (nats per token)", "tokens before")
    for (source, measured), colour in zip(found.items(), cycle(COLOURS)):
        buckets = measured.by_position()
        middle = [(bucket["from"] * bucket["to"]) ** 0.5 for bucket in buckets]
        losses = [bucket["loss"] for bucket in buckets]
        axes.plot(
            middle,
            losses,
            "o-",
            color=colour,
            markersize=4,
            label=plain_label(source),
        )
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False, fontsize=8)
    return drawn


def needles(opened: Opened, scoring: Scoring) -> Numbers:
    """Whether sentences that are hidden in text are recalled; shown, and drawn with --plot."""
    run = opened.run
    if run and not scoring.data:
        data = run.data
        tokenizer = trained_with(run)
    else:
        data, tokenizer = texts(opened, scoring)
    with prepare(data, tokenizer, folder_for_missing=own_stores(opened)) as prepared:
        store = prepared.stores[0]
        unseen = prepared.validation[0].stream
        if unseen.length <= max(scoring.lengths):
            unseen = store.train
        test = Needle(opened.model, opened.tokenizer, unseen, begins_with_bos(opened))
        cells = test.measure(scoring.lengths, scoring.depths, scoring.needles, scoring.batch_size)
    print(f"{step_of(opened)}, needles in {prepared.names[0]}: nats gained, answers repeated")
    plain_console().print(needle_table(cells))
    if scoring.plot:
        save_figure(draw_needle(cells), Path(scoring.plot), f"{step_of(opened)}: needles")
    return {"text": prepared.names[0], "needle": [vars(cell) for cell in cells]}
