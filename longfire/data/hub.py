"""Datasets of the Hugging Face hub as sources: downloaded by `datasets` into its own cache, or
streamed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import datasets
import huggingface_hub
from huggingface_hub.errors import HTTPError

from longfire.data.formats import BATCH_ROWS, Document, choose_fields, text_of
from longfire.errors import DataError

MANY_ROWS = 100_000  # of a stream, whose number of rows is not known
PROBE_SECONDS = 10  # how long the hub may take to say which revision a dataset has
UNREACHABLE = (
    HTTPError,
    OSError,
    ValueError,
)  # what the two libraries raise for a dataset that cannot be had


@dataclass(frozen=True)
class HubSource:
    """A dataset of the hub. `streaming` reads it over the network as it is needed and keeps nothing
    but the tokens."""

    CHOICES: ClassVar[tuple[str, ...]] = ("dataset_name", "dataset_split", "data_dir", "data_files")

    repository: str
    streaming: bool = False
    trust_remote_code: bool = False
    fields: tuple[str, ...] = ()
    dataset_name: str = ""
    dataset_split: str = ""
    data_dir: str = ""
    data_files: str = ""

    parts: ClassVar[int] = 1
    split_documents: ClassVar[str] = ""
    description: ClassVar[str] = ""

    @property
    def entry(self) -> str:
        chosen = (self.dataset_name, self.dataset_split, self.data_dir, self.data_files)
        return ":".join(part for part in (self.repository, *chosen) if part)

    @property
    def name(self) -> str:
        chosen = (self.repository, self.dataset_name, self.data_dir)
        return "-".join(part.replace("/", "-") for part in chosen if part)

    @property
    def bytes_total(self) -> int:
        """Bytes of the download; 0 where they are not known."""
        return 0 if self.streaming else (self.dataset.dataset_size or 0)

    @cached_property
    def revision(self) -> str:
        """The commit of the dataset on the hub; "" where there is no hub to ask."""
        try:
            return (
                huggingface_hub.HfApi().dataset_info(self.repository, timeout=PROBE_SECONDS).sha
                or ""
            )
        except UNREACHABLE:
            return ""

    @cached_property
    def dataset(self) -> "datasets.Dataset | datasets.IterableDataset":
        """Raises DataError with one message when it is neither on the hub nor in the cache."""
        if (
            not self.revision
        ):  # then do not let the libraries retry for a minute: take the cache, or fail now
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        chosen = {
            "name": self.dataset_name,
            "data_dir": self.data_dir,
            "data_files": self.data_files,
        }
        more = {key: value for key, value in chosen.items() if value}
        if self.trust_remote_code:
            more["trust_remote_code"] = True
        try:
            return datasets.load_dataset(
                self.repository,
                split=self.dataset_split or "train",
                streaming=self.streaming,
                **more,
            )
        except UNREACHABLE as e:
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise DataError(
                f"data.dataset: {self.entry!r} is no file or folder here, and as a dataset of the hub it cannot be had "
                f"({reason}); check the name, the network, or name files on this disk"
            ) from e

    @cached_property
    def fingerprint(self) -> str:
        """Of the choices and the revision; downloaded: of the place in `datasets`' cache, which
        names the revision too. "" for a stream whose revision cannot be asked for now."""
        origin = self.revision
        if self.streaming and not origin:
            return ""
        if not self.streaming:
            files = [Path(file["filename"]) for file in self.dataset.cache_files]
            origin = [["/".join(file.parts[-4:]), file.stat().st_size] for file in files] + [
                len(self.dataset)
            ]
        chosen = [self.repository, *(getattr(self, key) for key in self.CHOICES), origin]
        return blake2b(json.dumps(chosen).encode(), digest_size=16).hexdigest()

    @property
    def former_fingerprint(self) -> str:
        return self.fingerprint

    def changed(self, first: int, stop: int) -> str:
        """A commit of the hub and the cache of a download do not change."""
        return ""

    def documents(self, position: dict[str, Any] | None = None) -> "HubDocuments":
        return HubDocuments(self, position or {})

    def part(self, number: int) -> Iterator[Document]:
        return iter(self.documents())

    def identities(self) -> Iterator[str]:
        """Of its first documents, without reading them; a stream is not asked how many it has: they
        are many."""
        rows = MANY_ROWS if self.streaming else len(self.dataset)
        return (f"{self.entry}:{row}" for row in range(1, rows + 1))


class HubDocuments:
    """The documents of a dataset from a position on; iterated once."""

    def __init__(self, source: HubSource, position: dict[str, Any]) -> None:
        self.source, self._row = source, position.get("row", 0)
        if source.streaming and "state" in position:
            source.dataset.load_state_dict(position["state"])

    @property
    def bytes_read(self) -> int:
        if self.source.streaming:
            return 0
        return self.source.bytes_total * self._row // max(len(self.source.dataset), 1)

    @property
    def position(self) -> dict[str, Any]:
        state = {"state": self.source.dataset.state_dict()} if self.source.streaming else {}
        return {"row": self._row, **state}

    def __iter__(self) -> Iterator[Document]:
        dataset, where = self.source.dataset, self.source.entry
        there = dataset.column_names
        fields = choose_fields(where, there, self.source.fields) if there else self.source.fields
        records = (
            self._streamed(dataset)
            if self.source.streaming
            else self._stored(dataset.select_columns(list(fields)))
        )
        for record in records:
            self._row += 1
            place = f"{where}:{self._row}"
            yield Document(place, place, *text_of(record, fields))

    def _stored(self, dataset: "datasets.Dataset") -> Iterator[dict[str, Any]]:
        for start in range(self._row, len(dataset), BATCH_ROWS):
            columns = dataset[start : start + BATCH_ROWS]
            yield from (dict(zip(columns, values)) for values in zip(*columns.values()))

    def _streamed(self, dataset: "datasets.IterableDataset") -> Iterator[dict[str, Any]]:
        try:
            yield from dataset
        except UNREACHABLE as e:
            raise DataError(
                f"{self.source.entry}: the stream broke after row {self._row} ({type(e).__name__}: {e}); start again to go "
                f"on from there"
            ) from e
