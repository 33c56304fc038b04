"""Text + tokenizer -> token stores: made once for each content, before training or beside it.

jobs.py names the store of a source, fill.py fills it, background.py does that beside training.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from longfire.config import settings
from longfire.data import text, tokenizer_training
from longfire.data.background import BackgroundPreparation
from longfire.data.documents import Source
from longfire.data.fill import check_losses, fill, losses_in
from longfire.data.jobs import Job
from longfire.data.manifest import Progress
from longfire.data.store_writer import add_checksums
from longfire.data.tokenizer import Tokenizer
from longfire.data.tokens import TokenStore, TokenStream
from longfire.data.validation import TAILS
from longfire.errors import DataError, SettingsError, UserError
from longfire.plural import counted

logger = logging.getLogger(__name__)

BAD_SHOWN = 5  # bad documents that are printed; the manifest names more


class ValidationText(NamedTuple):
    """Text to evaluate on, which is not trained on: part of a source of data.dataset, or a source
    of data.validation."""

    name: str
    store: TokenStore
    stream: TokenStream


@dataclass
class Prepared:
    """What training reads: the tokenizer, and for each source its store, its share of the tokens
    (the shares sum to 1) and its name.

    own_validation: the texts of data.validation.
    """

    tokenizer: Tokenizer
    stores: tuple[TokenStore, ...]
    shares: tuple[float, ...]
    names: tuple[str, ...]
    background: BackgroundPreparation | None = None
    own_validation: tuple[ValidationText, ...] = ()

    @property
    def validation(self) -> tuple[ValidationText, ...]:
        """What evaluations read: data.validation, else the part of each source that was kept for
        it."""
        if self.own_validation:
            return self.own_validation
        texts = []
        for name, store in zip(self.names, self.stores):
            texts.append(ValidationText(name, store, store.validation))
        return tuple(texts)

    def check(self) -> None:
        """Raises DataError, with its message, if preparation in the background has failed."""
        if self.background:
            own_stores = [text.store for text in self.own_validation]
            self.background.check([*self.stores, *own_stores])

    def close(self) -> None:
        """End preparation in the background. What it has committed stays, and the next run
        continues from there."""
        if self.background:
            self.background.close()

    def __enter__(self) -> "Prepared":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def prepare(
    data: settings.Data,
    tokenizer_settings: settings.Tokenizer,
    *,
    background: bool = False,
    watch: bool = False,
    folder_for_missing: Path | None = None,
) -> Prepared:
    """The stores of data.dataset; those that do not exist are made.

    background: return as soon as the stores can be opened, and
    fill them in another process, which ends with this one. watch: open the stores while another
    process makes them. folder_for_missing: where those are made that are not begun in
    data.folder; None: there.

    Raises SettingsError and DataError naming source, file and record, and the fix; DataError also
    when the disk is full.
    """
    if not 0 <= data.validation_fraction < 1:
        raise SettingsError(
            f"data.validation_fraction = {data.validation_fraction}: a share of documents, from 0 "
            "to below 1"
        )
    if data.validation:
        data = replace(data, validation_fraction=0.0)
    shares = text.shares(data)
    sources = text.sources(data)
    for source in sources:
        if source.description:
            logger.info(f"data: {source.name}: {source.description}")
    own_sources = validation_sources(data, sources)
    tokenizer = tokenizer_training.load(tokenizer_settings, sources, shares, data)
    jobs = []
    for source, share in zip(sources, shares):
        jobs.append(Job.of(source, share, tokenizer, data, tokenizer_settings))
    own_jobs = validation_jobs(own_sources, data, tokenizer, tokenizer_settings)
    if folder_for_missing:
        jobs = [job.made_in(folder_for_missing) for job in jobs]
        own_jobs = [job.made_in(folder_for_missing) for job in own_jobs]
    missing = incomplete([*jobs, *own_jobs])
    process = None
    if missing and background:
        process = BackgroundPreparation(data, tokenizer_settings)
        process.wait_for(missing)
    elif missing and not watch:
        fill(missing, tokenizer, tokenizer_settings, data)
    prepared = Prepared(
        tokenizer=tokenizer,
        stores=tuple(TokenStore(job.folder, tokenizer.fingerprint) for job in jobs),
        shares=shares,
        names=distinct([source.name for source in sources]),
        background=process,
        own_validation=own_validation_texts(own_jobs, tokenizer),
    )
    report(prepared, sources, tokenizer_settings)
    return prepared


def incomplete(jobs: Sequence[Job]) -> list[Job]:
    """Those whose stores need work; of several with one store the last one."""
    by_folder = {job.folder: job for job in jobs if not job.is_complete()}
    return list(by_folder.values())


def verify(prepared: Prepared) -> None:
    """Read every store completely. A store without checksums of blocks gets them. Raises DataError
    naming what is damaged."""
    stores = {store.folder: store for store in prepared.stores}
    stores |= {own.store.folder: own.store for own in prepared.own_validation}
    for folder, store in stores.items():
        size = store.verify()
        added = ""
        if not store.has_checksums:
            add_checksums(folder)
            added = "; it has checksums of blocks now"
        logger.info(f"data: verified {folder}: {size:,} bytes are as they were written{added}")


def validation_sources(
    data: settings.Data, training_sources: Sequence[Source]
) -> tuple[Source, ...]:
    """The sources of data.validation. Raises DataError where one is not there, SettingsError where
    one of them is trained on."""
    if not data.validation:
        return ()
    try:
        sources = text.sources(text.validation_of(data))
    except DataError as error:  # they are found as a dataset is, but another setting names them
        raise DataError(str(error).replace("data.dataset:", "data.validation:")) from error
    for source, other in product(sources, training_sources):
        shared = text.in_both(source, other)
        if shared:
            raise SettingsError(
                f"data.validation: {shared} is text that data.dataset trains on, as part of "
                f"{other.entry}: leave it out of one of them"
            )
    return sources


def validation_jobs(
    sources: Sequence[Source],
    data: settings.Data,
    tokenizer: Tokenizer,
    tokenizer_settings: settings.Tokenizer,
) -> list[Job]:
    """The jobs of the sources of data.validation: each has a store of its own, and all of its
    documents are evaluated on."""
    if not sources:
        return []
    own_data = text.validation_of(data)
    return [Job.of(source, 1.0, tokenizer, own_data, tokenizer_settings) for source in sources]


def own_validation_texts(jobs: Sequence[Job], tokenizer: Tokenizer) -> tuple[ValidationText, ...]:
    """The stores of data.validation, which are complete or being filled."""
    texts = []
    names = distinct([job.source.name for job in jobs])
    for name, job in zip(names, jobs):
        store = TokenStore(job.folder, tokenizer.fingerprint)
        texts.append(ValidationText(name, store, store.train))
    return tuple(texts)


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The same names, numbered where they repeat: web, web-2."""
    numbered = []
    for place, name in enumerate(names):
        before = names[:place].count(name)
        numbered.append(f"{name}-{before + 1}" if before else name)
    return tuple(numbered)


def report(
    prepared: Prepared, sources: Sequence[Source], tokenizer_settings: settings.Tokenizer
) -> None:
    """Print what each store holds, and warnings. Raises DataError where the tokenizer loses too
    much of a source."""
    for source, store in zip(sources, prepared.stores):
        losses = losses_in(store.manifest["progress"])
        check_losses(losses, source.entry, tokenizer_settings, final=store.complete)
    for name, store in zip(prepared.names, prepared.stores):
        report_store(name, store)
    for own in prepared.own_validation:
        report_store(f"validation: {own.name}", own.store)
    warn_of_missing_checksums(prepared)
    for source, name, store in zip(sources, prepared.names, prepared.stores):
        warn_of_a_split_without_effect(source, name, store)


def report_store(name: str, store: TokenStore) -> None:
    logger.info(f"data: {name}: {describe(store)}")
    for bad in store.manifest["progress"].get("bad", [])[:BAD_SHOWN]:
        logger.info(f"data: skipped {bad}")


def warn_of_missing_checksums(prepared: Prepared) -> None:
    """Stores of format 1 have none."""
    without = [store.folder for store in prepared.stores if not store.has_checksums]
    if not without:
        return
    names = str(without[0])
    if len(without) > 1:
        names += f" and {len(without) - 1} more"
    logger.warning(
        f"{names} has no checksums of blocks, so damage is not noticed while it is read; "
        "`longfire prepare --verify` checks it and adds them"
    )


def warn_of_a_split_without_effect(source: Source, name: str, store: TokenStore) -> None:
    """A mistake in data.split_documents would otherwise only show as one very long document."""
    split = source.split_documents
    if split and store.complete and store.train.documents <= 1:
        logger.warning(
            f"data.split_documents = {split!r} finds one document only in {name}: `lines` "
            "and `blank_lines` split at these, any other text is searched for as it is (in a "
            'recipe "\\n" is the end of a line)'
        )


def describe(store: TokenStore) -> str:
    """One line: what a store holds, and its folder."""
    if not store.complete:
        return f"prepared while training runs -> {store.folder}"
    train = store.train
    contents = f"{counted(train.length, 'token')} in {counted(train.documents, 'document')}"
    contents += describe_loss_tokens(train)
    contents += describe_validation(store)
    progress = store.manifest["progress"]
    contents += describe_skipped(progress)
    losses = losses_in(progress)
    if losses.lost_characters or losses.unknown_tokens or losses.empty_encodings:
        contents += f"; {losses.describe()}"
    return f"{contents} -> {store.folder}"


def describe_loss_tokens(stream: TokenStream) -> str:
    """The share of tokens that count in the loss, where not all do."""
    if not stream.has_mask:
        return ""
    return f", {stream.loss_share:.1%} of the tokens count in the loss"


def describe_validation(store: TokenStore) -> str:
    """How many tokens of a store are kept for validation, and in how many documents."""
    stream = store.validation
    if not stream.documents:
        return ""
    if store.manifest["options"].get("held_out") == TAILS:
        return f", validation {stream.length:,} at the end of {stream.documents:,}"
    return f", validation {stream.length:,} in {stream.documents:,}"


def describe_skipped(progress: Progress) -> str:
    """` (skipped: 3 empty, 1 bad)`."""
    skipped = []
    if progress["empty_documents"]:
        skipped.append(f"{progress['empty_documents']} empty")
    if progress["bad_documents"]:
        skipped.append(f"{progress['bad_documents']} bad")
    if not skipped:
        return ""
    return f" (skipped: {', '.join(skipped)})"


def prepare_for_parent() -> None:
    """The process of background.BackgroundPreparation: prepare what the first line of the input
    names, and end when the input ends, which it does with the parent."""
    data, tokenizer = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=exit_with_input, daemon=True).start()
    for key, value in data.items():
        if isinstance(value, list):
            data[key] = tuple(value)
    logging.disable(logging.WARNING)  # the parent logs what the user needs
    try:
        prepare(settings.Data(**data), settings.Tokenizer(**tokenizer))
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    # At once: where the interpreter ends by itself while a thread waits for input, it may abort
    # (the thread holds the lock of the input), and training would take that for a failure.
    os._exit(0)


def exit_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    prepare_for_parent()
