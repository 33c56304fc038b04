"""Datasets of the Hugging Face hub as sources: downloaded by `datasets` into its own cache, or
streamed."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

import datasets
import huggingface_hub
from huggingface_hub.errors import HTTPError

from longfire.data.documents import Document, Position
from longfire.data.record_format import RecordFormat
from longfire.data.records import TEXTS
from longfire.data.tables import BATCH_ROWS
from longfire.errors import DataError, first_line

MANY_ROWS = 100_000  # of a stream, whose number of rows is not known
PROBE_SECONDS = 10  # how long the hub may take to answer which revision a dataset has
CACHE_PARTS = 4  # the last folders of a file's path in the cache, which name the revision
# What the two libraries raise for a dataset that cannot be had.
UNREACHABLE = (HTTPError, OSError, ValueError)


@dataclass(frozen=True)
class HubSource:
    """A dataset of the hub. `streaming` reads it over the network as it is needed and keeps nothing
    but the tokens."""

    repository: str
    streaming: bool = False
    trust_remote_code: bool = False
    record_format: RecordFormat = TEXTS
    dataset_name: str = ""
    dataset_split: str = ""
    data_dir: str = ""
    data_files: str = ""

    parts: ClassVar[int] = 1
    split_documents: ClassVar[str] = ""
    description: ClassVar[str] = ""

    @property
    def entry(self) -> str:
        """The source with what the settings choose of it."""
        chosen = (self.dataset_name, self.dataset_split, self.data_dir, self.data_files)
        return ":".join(part for part in (self.repository, *chosen) if part)

    @property
    def name(self) -> str:
        """A short name for folders, records and messages."""
        chosen = (self.repository, self.dataset_name, self.data_dir)
        return "-".join(part.replace("/", "-") for part in chosen if part)

    @property
    def bytes_total(self) -> int:
        """Bytes of the download; 0 where they are not known."""
        if self.streaming:
            return 0
        return self.dataset.dataset_size or 0

    @cached_property
    def revision(self) -> str:
        """The commit of the dataset on the hub; "" where the hub cannot be asked."""
        api = huggingface_hub.HfApi()
        try:
            return api.dataset_info(self.repository, timeout=PROBE_SECONDS).sha or ""
        except UNREACHABLE:
            return ""

    @cached_property
    def dataset(self) -> "datasets.Dataset | datasets.IterableDataset":
        """Raises DataError with one message when it is neither on the hub nor in the cache."""
        if not self.revision:
            # Take the cache or fail now: the libraries would try again for a minute.
            datasets.config.HF_HUB_OFFLINE = True
            huggingface_hub.constants.HF_HUB_OFFLINE = True
        choices: dict[str, object] = {}
        if self.dataset_name:
            choices["name"] = self.dataset_name
        if self.data_dir:
            choices["data_dir"] = self.data_dir
        if self.data_files:
            choices["data_files"] = self.data_files
        if self.trust_remote_code:
            choices["trust_remote_code"] = True
        try:
            return datasets.load_dataset(
                self.repository,
                split=self.dataset_split or "train",
                streaming=self.streaming,
                **choices,
            )
        except UNREACHABLE as error:
            raise DataError(
                f"data.dataset: {self.entry!r} is no file or folder here, and as a dataset of the "
                f"hub it cannot be had ({first_line(error, None)}); check the "
                f"name, the network, or name files on "
                "this disk"
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        """Of the choices and the revision of a stream; of a download, of its files in the cache of
        `datasets`, whose paths name the revision too. "" for a stream whose revision is not known
        now."""
        origin: str | list[object] = self.revision
        if self.streaming and not origin:
            return ""
        if not self.streaming:
            origin = self._cache_files()
        chosen = [
            self.repository,
            self.dataset_name,
            self.dataset_split,
            self.data_dir,
            self.data_files,
            origin,
        ]
        return blake2b(json.dumps(chosen).encode(), digest_size=16).hexdigest()

    def _cache_files(self) -> list[object]:
        """Name and size of each file of a download, and how many rows there are."""
        found: list[object] = []
        for record in self.dataset.cache_files:
            file = Path(record["filename"])
            found.append(["/".join(file.parts[-CACHE_PARTS:]), file.stat().st_size])
        found.append(len(self.dataset))
        return found

    @property
    def former_fingerprint(self) -> str:
        return self.fingerprint

    def changed(self, first: int, stop: int) -> str:
        """A commit of the hub and the cache of a download do not change."""
        return ""

    def documents(self, position: Position | None = None) -> "HubDocuments":
        """The documents after a position."""
        return HubDocuments(self, position or {})

    def part(self, number: int) -> Iterator[Document]:
        """All of it: a dataset has one part."""
        return iter(self.documents())

    def identities(self) -> Iterator[str]:
        """Of its first documents, without reading them. A stream does not know how many it has:
        they are many."""
        rows = MANY_ROWS if self.streaming else len(self.dataset)
        for row in range(1, rows + 1):
            yield f"{self.entry}:{row}"

    def numbered(self) -> Iterator[str]:
        """Of all rows of a download, without reading them."""
        assert not self.streaming, "refused before: how many rows a stream has is not known"
        return self.identities()


class HubDocuments:
    """The documents of a dataset after a position; can be iterated once."""

    def __init__(self, source: HubSource, position: Position) -> None:
        self.source = source
        self._row = position.get("row", 0)
        if source.streaming and "state" in position:
            source.dataset.load_state_dict(position["state"])

    @property
    def bytes_read(self) -> int:
        if self.source.streaming:
            return 0
        return self.source.bytes_total * self._row // max(len(self.source.dataset), 1)

    @property
    def position(self) -> Position:
        if self.source.streaming:
            return {"row": self._row, "state": self.source.dataset.state_dict()}
        return {"row": self._row}

    def __iter__(self) -> Iterator[Document]:
        dataset = self.source.dataset
        entry = self.source.entry
        record_format = self.source.record_format
        fields: tuple[str, ...] = ()
        if dataset.column_names:
            fields = record_format.columns(entry, dataset.column_names)
        if self.source.streaming:
            records = self._streamed(dataset)
        else:
            records = self._stored(dataset.select_columns(list(fields)))
        for record in records:
            self._row += 1
            place = f"{entry}:{self._row}"
            content, problem = record_format.content_of(record)
            yield Document(place, place, content, problem)

    def _stored(self, dataset: "datasets.Dataset") -> Iterator[Mapping[str, object]]:
        for start in range(self._row, len(dataset), BATCH_ROWS):
            columns = dataset[start : start + BATCH_ROWS]
            for values in zip(*columns.values()):
                yield dict(zip(columns, values))

    def _streamed(self, dataset: "datasets.IterableDataset") -> Iterator[Mapping[str, object]]:
        try:
            yield from dataset
        except UNREACHABLE as error:
            raise DataError(
                f"{self.source.entry}: the stream broke after row {self._row} "
                f"({type(error).__name__}: {error}); start again to continue from there"
            ) from error
