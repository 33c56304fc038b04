"""What a source of text gives: documents, and the position from which to continue after each."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, TypedDict

from longfire.data.record_format import Content, RecordFormat, is_empty, text_of_content


class Document(NamedTuple):
    """A text or what else a record holds, or the reason why there is none.

    identity: relative path and record number, the same wherever the folder is. It decides whether
    the document is kept for validation.
    where: file and record number, for messages.
    content: of the record (record_format.py). problem: why it could not be read; "" if it could.
    """

    identity: str
    where: str
    content: Content
    problem: str

    @property
    def text(self) -> str:
        """The text alone; "" of a record that holds ids."""
        return text_of_content(self.content)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it."""
        return is_empty(self.content)


class Position(TypedDict, total=False):
    """Where to continue reading, as it is kept in a manifest.

    Files have `file`, `row` and `offset`: the number of the file, the records of it that were
    read, and the byte behind them (0: unknown). A dataset of the hub has `row`, and the `state`
    of its stream if it is streamed.
    """

    file: int
    row: int
    offset: int
    state: dict[str, object]


class Documents(Protocol):
    """The documents of a source after a position; can be iterated once."""

    @property
    def position(self) -> Position:
        """Where to continue after the last document."""
        ...

    @property
    def bytes_read(self) -> int:
        """How many of `Source.bytes_total` have been read, to show progress."""
        ...

    def __iter__(self) -> Iterator[Document]: ...


class Source(Protocol):
    """One entry of data.dataset. `parts` are its files, so that a sample can be taken from all of
    them."""

    @property
    def entry(self) -> str:
        """The source as the settings name it."""
        ...

    @property
    def name(self) -> str:
        """A short name for folders, records and messages."""
        ...

    @property
    def record_format(self) -> RecordFormat:
        """What its records are."""
        ...

    @property
    def bytes_total(self) -> int:
        """Bytes as they are stored, compressed or not; 0 if unknown."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the documents may have changed."""
        ...

    @property
    def former_fingerprint(self) -> str:
        """The fingerprint that earlier versions computed for the same documents."""
        ...

    @property
    def parts(self) -> int:
        """How many parts (files) the source has."""
        ...

    @property
    def split_documents(self) -> str:
        """How its text files are split into documents (settings.Data)."""
        ...

    @property
    def description(self) -> str:
        """Which files of a folder are read and which are not; "" for a source of one file."""
        ...

    def documents(self, position: Position | None = None) -> Documents:
        """The documents after a position; all of them without one."""
        ...

    def part(self, number: int) -> Iterator[Document]:
        """The documents of one part."""
        ...

    def changed(self, first: int, stop: int) -> str:
        """Which of the parts [first, stop) has changed since its fingerprint was computed; "" if
        none has."""
        ...

    def identities(self) -> Iterator[str]:
        """The identities of the documents that are not empty, in order."""
        ...

    def numbered(self) -> Iterator[str]:
        """The identities of all documents in order, of empty ones too."""
        ...
