"""Some documents at a time, on their way from a source into a store: gathered, and encoded while
the next ones are read."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from longfire.data.documents import Document
from longfire.data.losses import Losses
from longfire.data.manifest import Progress
from longfire.data.record_format import Encoded, EndTokens, RecordFormat
from longfire.data.records import Texts
from longfire.data.token_record import (
    TokenRecord,
    begins_document,
    join_records,
    sum_documents,
)
from longfire.data.tokenizer import Tokenizer
from longfire.data.validation import ValidationSplit
from longfire.data.workers import Encoders

CHUNK_CHARACTERS = 2**20  # what a tokenizing process is given at a time
CHUNK_DOCUMENTS = 4096
CHARACTERS_A_TOKEN = 4  # of records of ids
OPEN_CHUNKS = 16  # a document that continues from record to record ends after so many times a chunk


@dataclass
class Chunk:
    """Some documents that are being encoded.

    is_validation: bool, one for each of them (D,). progress: of the source, after these documents.
    """

    encoded: "Future[Encoded]"
    is_validation: np.ndarray
    progress: Progress


class Gathered(Protocol):
    """The documents of the next chunk."""

    @property
    def is_full(self) -> bool: ...

    def add(self, document: Document) -> str:
        """Take a document. Returns why it cannot be used; "" if it can."""
        ...

    def close_document(self) -> None:
        """A record is left out here, so that no document continues behind it."""
        ...

    def chunk(self, progress: Progress) -> Chunk:
        """Encode what was gathered, and begin anew."""
        ...


class GatheredTexts:
    """Texts, for processes that tokenize."""

    def __init__(self, split: ValidationSplit, encoders: Encoders) -> None:
        self.split = split
        self.encoders = encoders
        self._begin()

    def _begin(self) -> None:
        self.texts: list[str] = []
        self.is_validation: list[bool] = []
        self.characters = 0

    @property
    def is_full(self) -> bool:
        return self.characters >= CHUNK_CHARACTERS or len(self.texts) >= CHUNK_DOCUMENTS

    def add(self, document: Document) -> str:
        train_text, validation_text = self.split.parts(document)
        if train_text:
            self.texts.append(train_text)
            self.is_validation.append(False)
        if validation_text:
            self.texts.append(validation_text)
            self.is_validation.append(True)
        self.characters += len(document.text)
        return ""

    def close_document(self) -> None:
        """Each text is a document."""

    def chunk(self, progress: Progress) -> Chunk:
        is_validation = np.array(self.is_validation, bool)
        chunk = Chunk(self.encoders.submit(self.texts), is_validation, progress)
        self._begin()
        return chunk


class GatheredRecords:
    """Records of another format, encoded one by one by this process.

    A document that continues in the next record is one document where both are for training, or
    both for validation, and no record between them is left out. A chunk ends with a document.
    """

    def __init__(
        self,
        record_format: RecordFormat,
        split: ValidationSplit,
        tokenizer: Tokenizer,
        ends: EndTokens,
    ) -> None:
        self.record_format = record_format
        self.split = split
        self.tokenizer = tokenizer
        self.ends = ends
        self._begin()

    def _begin(self) -> None:
        self.records: list[TokenRecord] = []
        self.text_bytes: list[np.ndarray] = []
        self.is_validation: list[np.ndarray] = []
        self.losses = Losses()
        self.characters = 0

    @property
    def is_full(self) -> bool:
        is_open = bool(self.records) and self.records[-1].is_open
        if is_open and self.characters < OPEN_CHUNKS * CHUNK_CHARACTERS:
            return False
        return self.characters >= CHUNK_CHARACTERS or len(self.records) >= CHUNK_DOCUMENTS

    def close_document(self) -> None:
        if self.records:
            self.records[-1] = self.records[-1]._replace(is_open=False)

    def add(self, document: Document) -> str:
        encoded, problem = self.record_format.encode(document.content, self.tokenizer, self.ends)
        if encoded is None:
            return problem
        parts = self.split.record_parts(document.identity, encoded, self.tokenizer)
        for part, is_validation in parts:
            documents = len(part.record.lengths)
            if self.is_validation and self.is_validation[-1][-1] != is_validation:
                self.close_document()
            self.records.append(part.record)
            self.text_bytes.append(part.text_bytes)
            self.is_validation.append(np.full(documents, is_validation))
        self.losses += encoded.losses
        self.characters += CHARACTERS_A_TOKEN * len(encoded.record.ids)
        return ""

    def chunk(self, progress: Progress) -> Chunk:
        begins = begins_document(self.records)
        encoded = Encoded(
            join_records(self.records, self.tokenizer.dtype),
            sum_documents(self.text_bytes, begins),
            self.losses,
        )
        future: Future[Encoded] = Future()
        future.set_result(encoded)
        no_documents = np.array([], bool)
        is_validation = np.concatenate([no_documents, *self.is_validation])[begins]
        self._begin()
        return Chunk(future, is_validation, progress)


def gathered(record_format: RecordFormat, split: ValidationSplit, encoders: Encoders) -> Gathered:
    """What gathers the documents of a source."""
    if isinstance(record_format, Texts):
        return GatheredTexts(split, encoders)
    return GatheredRecords(record_format, split, encoders.tokenizer, encoders.ends)
