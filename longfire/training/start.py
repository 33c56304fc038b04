"""What a run does before its first step: it saves its tokenizer and the names of its data, compares
the tokenizer with that of the weights that it starts from, and takes these weights."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

import torch

from longfire.checkpoint.provenance import (
    classes_of_run,
    difference,
    run_folder_of,
    task_of,
    tokenizer_beside,
    tokenizer_line,
)
from longfire.checkpoint.state import State
from longfire.checkpoint.weights import finite, weights_of_run
from longfire.config.model_config import ModelConfig
from longfire.config.rules.model import LANGUAGE_MODELING
from longfire.config.run import DATA_JSON, Run
from longfire.config.run_folder import keep
from longfire.config.transformers_config import TransformersConfig
from longfire.data.prepare import Prepared
from longfire.data.tokenizer import Tokenizer, from_folder
from longfire.data.tokens import TokenStream
from longfire.errors import DataError, SettingsError
from longfire.huggingface import transformers_files
from longfire.huggingface.checksums import check_checksums
from longfire.huggingface.load import model_config_in, read_weights
from longfire.listing import exists
from longfire.mlps.auxiliary import kept_buffers
from longfire.model import on_meta
from longfire.own_files import read_note
from longfire.parallel.sharding import copy_from_whole, global_shape, placed_parameters, sharding_of
from longfire.plural import counted

logger = logging.getLogger(__name__)
HEAD: tuple[str, ...] = ("head.weight", "head.bias")
LOSS_SHARE = "loss_share"  # key of data.json, beside the names of sources


def begin(run: Run, prepared: Prepared) -> None:
    """Compare tokenizer and data with what the run and its weights were trained with, and save both
    in the run folder. Only process 0 calls it. Raises SettingsError or DataError naming what
    differs."""
    logger.info(tokenizer_line(prepared.tokenizer, run.tokenizer, run.data.record_format))
    refuse_another_tokenizer(run, prepared.tokenizer)
    refuse_no_labels(run, prepared)
    keep_tokenizer(run, prepared.tokenizer)
    keep_sources(run, prepared)
    warn_of_nothing_unseen(run, prepared)


def refuse_another_tokenizer(run: Run, tokenizer: Tokenizer) -> None:
    """Weights and teacher were trained on the ids of their own tokenizer. Raises SettingsError
    where that of the run is another one, unless tokenizer.allow_mismatch is set."""
    from_elsewhere = {"distillation.teacher": run.distillation.teacher}
    if not run.resumes:
        from_elsewhere["model.weights"] = run.model.weights
    for key, folder in from_elsewhere.items():
        if not folder:
            continue
        beside = tokenizer_beside(Path(folder))
        if beside is None:
            logger.warning(
                f"there is no tokenizer beside {key} = {folder!r}, so it is unknown "
                f"whether their ids are those of tokenizer.path = {run.tokenizer.path!r}"
            )
            continue
        differs = difference(beside.load(), tokenizer)
        if not differs:
            if beside.add_bos and not run.tokenizer.add_bos:
                logger.warning(
                    f"documents began with BOS where {key} = {folder!r} was trained, and "
                    "here they do not: set tokenizer.add_bos = true, or leave tokenizer.path out"
                )
            continue
        mismatch = (
            f"tokenizer.path = {run.tokenizer.path!r} is not the tokenizer of {key} = {folder!r}: "
            f"{differs}"
        )
        if not run.tokenizer.allow_mismatch:
            raise SettingsError(
                f"{mismatch}. The same ids would stand for other text. Leave tokenizer.path out, "
                f"or set it to {beside.path!r}; if another tokenizer is meant, set "
                "tokenizer.allow_mismatch = true"
            )
        logger.warning(f"{mismatch}; tokenizer.allow_mismatch = true permits it")


def label_tokens(run: Run, stream: TokenStream) -> int:
    """How many tokens of a text can be predicted, at most: those that count in the loss; all but
    the first, of each document where they are kept apart."""
    if run.data.context_len == 1:
        return 0
    firsts = stream.documents if run.data.varlen else 1
    return min(stream.loss_tokens, max(0, stream.length - firsts))


def refuse_no_labels(run: Run, prepared: Prepared) -> None:
    """Raises DataError naming a source of which no token can be predicted: nothing could be learned
    from it."""
    for name, store in zip(prepared.names, prepared.stores):
        if not store.complete or not store.train.length:
            continue
        if not store.train.loss_tokens:
            raise DataError(
                f"{name}: none of its {store.train.length:,} tokens counts in the loss: its loss "
                "masks (data.record_format) leave out every token"
            )
        if not label_tokens(run, store.train):
            raise DataError(
                f"{name}: no token of it can be predicted: with data.varlen = true the first token "
                f"of each document has no label, and no document of its "
                f"{store.train.documents:,} has a second one. Set data.varlen = false or "
                "tokenizer.add_eos = true, join documents (data.split_documents), or name other "
                "text"
            )


def keep_tokenizer(run: Run, tokenizer: Tokenizer) -> None:
    """Save the tokenizer in the run folder. Raises SettingsError if the run was trained with
    another one."""
    folder = run.tokenizer_folder
    if (
        run.has_checkpoints
        and exists(folder)
        and from_folder(folder).fingerprint != tokenizer.fingerprint
    ):
        raise SettingsError(
            f"tokenizer.path = {run.tokenizer.path!r} is not the tokenizer that the run in "
            f"{run.folder} was trained with: the same ids would mean other text. Set it to "
            f"{folder}, or name another job.dump_folder"
        )
    tokenizer.save(folder)


def keep_sources(run: Run, prepared: Prepared) -> None:
    """data.json: the token stores of the run, and of those with loss masks the share of tokens that
    count in the loss. Where it is resumed with other stores, that is logged: it then trains on
    other sequences than it would have, and may train on some again."""
    file = run.folder / DATA_JSON
    here: dict[str, str] = {}
    loss_share: dict[str, float] = {}
    for name, store in zip(prepared.names, prepared.stores):
        here[name] = store.folder.name
        if store.complete and store.train.has_mask:
            loss_share[name] = store.train.loss_share
    there = here
    if run.has_checkpoints and exists(file):
        noted = read_note(file, dict[str, object]) or {}
        noted.pop(LOSS_SHARE, None)
        there = {name: str(store) for name, store in noted.items()} or here
    for name in {**there, **here}:
        if there.get(name) == here.get(name):
            continue
        logger.info(
            f"changed since this run was last started: data of {name}: {here.get(name, 'none')}, "
            f"was {there.get(name, 'none')}; the order of sequences is another one from here on, "
            "and what is validation text now may have been trained on"
        )
    shares = {LOSS_SHARE: loss_share} if loss_share else {}
    keep(file, json.dumps({**here, **shares}, indent=1) + "\n")


def warn_of_nothing_unseen(run: Run, prepared: Prepared) -> None:
    """Warn of sources that have no validation text for the evaluations that are asked for."""
    if not (run.eval.at_end or run.eval.interval):
        return
    for name, store, stream in prepared.validation:
        if store.complete and not label_tokens(run, stream):
            missing = f"there is no validation text of {name}"
            if stream.length and not stream.loss_tokens:
                missing = (
                    f"none of the {stream.length:,} validation tokens of {name} counts in the loss"
                )
            logger.warning(
                f"{missing}, so the loss on text that was not "
                "trained on will not be measured: name such text in data.validation, raise "
                f"data.validation_fraction = {run.data.validation_fraction:g}, or, if a text file "
                "holds many documents, set data.split_documents (lines, blank_lines, or the text "
                "between them)"
            )


def refuse_another_batch(run: Run, state: State) -> None:
    """With a schedule of lengths every step must have the same number of sequences: stages begin at
    steps, and their data at sequences. Raises SettingsError."""
    if run.training.seq_len_schedule and state.rows_consumed != state.step * run.sequences_per_step:
        raise SettingsError(
            f"training.seq_len_schedule counts {run.sequences_per_step} sequences a step, but the "
            f"run's {counted(state.step, 'step')} took {state.rows_consumed} sequences: resume it "
            "with the batch size that it was begun with"
        )


def take_weights(run: Run, state: State) -> str:
    """Start from the weights of model.weights: each process takes its part of them, one tensor in
    memory at a time. Returns what they are. Raises CheckpointError or SettingsError."""
    source = Path(run.model.weights)
    config: ModelConfig | TransformersConfig = state.model.config
    missing = {**dict(state.model.named_parameters()), **kept_buffers(state.model)}
    shapes = shapes_wanted(state)
    fresh = ""
    without = HEAD[:1]  # a model that ties its head needs none
    classes_there = classes_of_weights(run) if has_classes(config) else 0
    if has_classes(config) and classes_there != config.outputs:
        fresh = f", with a fresh head over {config.outputs:,} classes"
        without = HEAD
        if classes_there:
            fresh += f", since theirs has {classes_there:,}"
        for name in HEAD:
            missing.pop(name)
            shapes.pop(name)
    with state.mesh.raise_on_all_ranks():
        if state.mesh.rank() == 0:
            check_checksums(source)
        if run_folder_of(source):
            place, read = weights_of_run(source, shapes, without)
            origin = f"checkpoint {place}"
        elif run.model.backend == "transformers":
            assert isinstance(config, TransformersConfig)
            read = iter(transformers_files.load_weights(source, config).items())
            origin = f"Hugging Face weights in {source}"
        else:
            assert isinstance(config, ModelConfig)
            of_source = config_of_weights(run, config, classes_there) if fresh else config
            read = read_weights(source, of_source)
            origin = f"Hugging Face weights in {source}"
        for name, whole in finite(read, f"model.weights = {run.model.weights!r}"):
            if name in missing:
                parameter = missing.pop(name).detach()
                copy_from_whole(parameter, sharding_of(state.model, name), whole)
        if missing:
            raise SettingsError(
                f"model.weights = {run.model.weights!r} has no {', '.join(sorted(missing)[:4])}"
            )
    return f"{origin}{fresh}"


def has_classes(config: ModelConfig | TransformersConfig) -> TypeGuard[ModelConfig]:
    """Whether a model is a classifier, which all are ours."""
    return isinstance(config, ModelConfig) and config.num_classes > 0


def classes_of_weights(run: Run) -> int:
    """The classes of the head of the weights that a classifier starts from; 0 for those of a
    language model."""
    source = Path(run.model.weights)
    run_folder = run_folder_of(source)
    if run_folder is None:
        # the families of Hugging Face that are read are of language models, or of images
        return model_config_in(source).num_classes
    config = Run.of_folder(run_folder).known_model_config
    if task_of(run_folder) == LANGUAGE_MODELING or not isinstance(config, ModelConfig):
        return 0
    return config.with_classes(len(classes_of_run(run_folder))).num_classes


def config_of_weights(run: Run, config: ModelConfig, classes: int) -> ModelConfig:
    """The config of the weights that a classifier starts from: of one with so many classes, or of
    a language model."""
    of_run = run.known_model_config
    assert isinstance(of_run, ModelConfig), "a classifier is ours"
    if classes:
        return replace(config, num_classes=classes)
    return replace(
        of_run, vocab_size=config.vocab_size, num_classes=0, direction="causal", pool="last"
    )


def shapes_wanted(state: State) -> dict[str, torch.Size]:
    """Name and whole shape of each parameter of the model, also of those on other stages of a
    pipeline."""
    model = state.model
    if isinstance(model.config, ModelConfig):
        whole = on_meta(model.config)
        wanted = {**dict(whole.named_parameters()), **kept_buffers(whole)}
        return {name: tensor.shape for name, tensor in wanted.items()}
    return {name: global_shape(p, spec) for name, p, spec in placed_parameters(model)}


def fresh_weights(run: Run) -> str:
    """The line of a run that starts without weights from elsewhere."""
    initialiser = " by its own class" if run.model.backend == "transformers" else ""
    return f"fresh, initialised{initialiser} with training.seed = {run.training.seed}"
