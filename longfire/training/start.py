"""What a run does before its first step: it keeps its tokenizer and the names of its data, compares
the tokenizer with those of the weights that it begins with, takes these weights, and says where
they come from."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from longfire.checkpoint.checkpoint import State
from longfire.checkpoint.provenance import (
    difference,
    run_folder_of,
    tokenizer_beside,
    tokenizer_line,
)
from longfire.checkpoint.weights import finite, weights_of_run
from longfire.config.model_config import ModelConfig
from longfire.config.run import DATA_JSON, Run, keep
from longfire.data.prepare import Prepared
from longfire.data.tokenizer import Tokenizer, from_folder
from longfire.data.tokens import TokenStream
from longfire.errors import DataError, SettingsError
from longfire.huggingface import transformers_files
from longfire.huggingface.checksums import check_checksums
from longfire.huggingface.load import read_weights
from longfire.model import on_meta
from longfire.parallel.sharding import copy_from_whole, global_shape, placed_parameters, sharding_of
from longfire.plural import counted

Note = Callable[[str], None]


def begin(run: Run, prepared: Prepared, note: Note) -> None:
    """Compare tokenizer and data with what the run and its weights were trained with, and keep both
    in the run folder. Process 0 does it. Raises SettingsError or DataError naming what does not go
    together."""
    note(tokenizer_line(prepared.tokenizer, run.tokenizer))
    refuse_another_tokenizer(run, prepared.tokenizer, note)
    refuse_no_labels(run, prepared)
    keep_tokenizer(run, prepared.tokenizer)
    keep_sources(run, prepared, note)
    warn_of_nothing_unseen(run, prepared, note)


def refuse_another_tokenizer(run: Run, tokenizer: Tokenizer, note: Note) -> None:
    """Weights and teacher saw ids of their own tokenizer. Raises SettingsError where that of the
    run is another one, unless tokenizer.allow_mismatch says that it is meant."""
    from_elsewhere = {"distillation.teacher": run.distillation.teacher}
    if not run.goes_on:
        from_elsewhere["model.weights"] = run.model.weights
    for key, folder in from_elsewhere.items():
        if not folder:
            continue
        beside = tokenizer_beside(Path(folder))
        if beside is None:
            note(
                f"warning: no tokenizer lies beside {key} = {folder!r}, so nobody can say whether their ids are those of "
                f"tokenizer.path = {run.tokenizer.path!r}"
            )
            continue
        differs = difference(beside.load(), tokenizer)
        if not differs:
            if beside.add_bos and not run.tokenizer.add_bos:
                note(
                    f"warning: documents began with BOS where {key} = {folder!r} was trained, and here they do not: set "
                    "tokenizer.add_bos = true, or leave tokenizer.path out"
                )
            continue
        told = f"tokenizer.path = {run.tokenizer.path!r} is not the tokenizer of {key} = {folder!r}: {differs}"
        if not run.tokenizer.allow_mismatch:
            raise SettingsError(
                f"{told}. The same ids would stand for other text. Leave tokenizer.path out, or set it to {beside.path!r}; if "
                "another tokenizer is meant, set tokenizer.allow_mismatch = true"
            )
        note(f"warning: {told}; tokenizer.allow_mismatch = true lets it pass")


def label_tokens(run: Run, stream: TokenStream) -> int:
    """How many tokens of a text can be predicted: all but the first, of each document where they
    are kept apart."""
    if run.data.context_len == 1:
        return 0
    firsts = stream.documents if run.data.varlen else 1
    return max(0, stream.length - firsts)


def refuse_no_labels(run: Run, prepared: Prepared) -> None:
    """Raises DataError naming a source none of whose tokens can be predicted: nothing could be
    learned from it."""
    for name, store in zip(prepared.names, prepared.stores):
        if store.complete and store.train.length and not label_tokens(run, store.train):
            raise DataError(
                f"{name}: no token of it can be predicted: with data.varlen = true the first token of each document has no "
                f"label, and no document of its {store.train.documents:,} has a second one. Set data.varlen = false or "
                "tokenizer.add_eos = true, join documents (data.split_documents), or name other text"
            )


def keep_tokenizer(run: Run, tokenizer: Tokenizer) -> None:
    """The tokenizer lies in the run folder from the start. Raises SettingsError if the run was
    trained with another one."""
    folder = run.tokenizer_folder
    if (
        run.has_checkpoints
        and folder.exists()
        and from_folder(folder).fingerprint != tokenizer.fingerprint
    ):
        raise SettingsError(
            f"tokenizer.path = {run.tokenizer.path!r} is not the tokenizer that the run in {run.folder} was trained with: the same "
            f"ids would mean other words. Set it to {folder}, or name another job.dump_folder"
        )
    tokenizer.save(folder)


def keep_sources(run: Run, prepared: Prepared, note: Callable[[str], None]) -> None:
    """data.json: the token stores that rows come from. A run that goes on with others says so: its
    rows are then not those that it would have seen, and those that it saw may come again."""
    file, here = (
        run.folder / DATA_JSON,
        {n: s.folder.name for n, s in zip(prepared.names, prepared.stores)},
    )
    there = (
        json.loads(file.read_text(encoding="utf-8"))
        if run.has_checkpoints and file.exists()
        else here
    )
    for name in [name for name in {**there, **here} if there.get(name) != here.get(name)]:
        note(
            f"changed since this run was last started: data of {name}: {here.get(name, 'none')}, was {there.get(name, 'none')}; "
            "the order of rows is another one from here on, and what is held out now may have been trained on"
        )
    keep(file, json.dumps(here, indent=1) + "\n")


def warn_of_nothing_unseen(run: Run, prepared: Prepared, note: Callable[[str], None]) -> None:
    """Say where an evaluation will have no text to read: before the first step, where that is known
    by then."""
    if not (run.eval.at_end or run.eval.interval):
        return
    for name, store, stream in prepared.validation:
        if store.complete and not label_tokens(run, stream):
            note(
                f"warning: nothing is held out of {name}, so the loss on text that was not trained on will not be measured: name "
                f"such text in data.validation, raise data.validation_fraction = {run.data.validation_fraction:g}, or, if a text file "
                "holds many documents, set data.split_documents (lines, blank_lines, or the text between them)"
            )


def refuse_another_batch(run: Run, state: State) -> None:
    """With a schedule steps and rows go together: stages begin at steps, and the data in them at
    rows. Raises SettingsError."""
    if run.training.seq_len_schedule and state.rows_consumed != state.step * run.sequences_per_step:
        raise SettingsError(
            f"training.seq_len_schedule counts {run.sequences_per_step} rows a step, but the run's {counted(state.step, 'step')} took "
            f"{state.rows_consumed} rows: go on with the batch that it was begun with"
        )


def take_weights(run: Run, state: State) -> str:
    """Start from the weights of model.weights, one tensor in memory at a time: each process takes
    what lies with it. What they are, in words. Raises CheckpointError or SettingsError."""
    source, config = Path(run.model.weights), state.model.config
    left = dict(state.model.named_parameters())
    with state.mesh.raise_on_all_ranks():
        if state.mesh.rank() == 0:
            check_checksums(source, print)
        if run_folder_of(source):
            place, read = weights_of_run(source, shapes_wanted(state))
            told = f"checkpoint {place}"
        elif run.model.backend == "transformers":
            read = transformers_files.load_weights(source, config).items()
            told = f"Hugging Face weights in {source}"
        else:
            read = read_weights(source, config)
            told = f"Hugging Face weights in {source}"
        for name, whole in finite(read, f"model.weights = {run.model.weights!r}"):
            if name in left:
                copy_from_whole(left.pop(name).detach(), sharding_of(state.model, name), whole)
        if left:
            raise SettingsError(
                f"model.weights = {run.model.weights!r} has no {', '.join(sorted(left)[:4])}"
            )
    return told


def shapes_wanted(state: State) -> dict[str, torch.Size]:
    """Name and whole shape of each parameter of the model; of a pipeline also those that lie
    elsewhere."""
    model = state.model
    if isinstance(model.config, ModelConfig):
        return {
            name: parameter.shape for name, parameter in on_meta(model.config).named_parameters()
        }
    return {name: global_shape(p, spec) for name, p, spec in placed_parameters(model)}


def fresh_weights(run: Run) -> str:
    """Where a run without weights from elsewhere begins, in words."""
    by = " by its own class" if run.model.backend == "transformers" else ""
    return f"fresh, initialised{by} with training.seed = {run.training.seed}"
