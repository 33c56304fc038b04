"""A source that is prepared: what its token store is made from, and the folder of the store.

The folder's name ends with an address: a hash of the documents, the tokenizer and the options. The
same inputs find the same store; anything else is another folder.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from longfire.config import settings
from longfire.data.documents import Source
from longfire.data.manifest import (
    MANIFEST,
    Header,
    Manifest,
    checksum,
    read_manifest,
)
from longfire.data.records import Texts
from longfire.data.tokenizer import Tokenizer
from longfire.data.tokens import TokenStore
from longfire.data.validation import ValidationSplit, validation_split_of
from longfire.errors import DataError
from longfire.listing import exists, matches, paths_in

ADDRESS_FORMAT = 1  # part of every address: another number gives all stores other addresses


@dataclass(frozen=True)
class Job:
    """A source to prepare: its share of the tokens, the folder and the header of its store, and
    which of its text is kept for validation."""

    source: Source
    share: float
    folder: Path
    header: Header
    validation_split: ValidationSplit

    @classmethod
    def of(
        cls,
        source: Source,
        share: float,
        tokenizer: Tokenizer,
        data: settings.Data,
        tokenizer_settings: settings.Tokenizer,
    ) -> "Job":
        """The job of a source. Options that were added later are part of the address only where
        they are used, so that stores of earlier versions are found."""
        # Taken before anything is read, so that a later change is noticed
        # (StoreFiller.check_unchanged).
        fingerprint = source.fingerprint
        validation_split = validation_split_of(
            source, data.validation_fraction, data.validation_seed
        )
        options: dict[str, object] = {
            "add_bos": tokenizer_settings.add_bos,
            "add_eos": tokenizer_settings.add_eos,
            "heldout_fraction": data.validation_fraction,
            "text_field": "+".join(text_fields(source)),
            "skip_bad_documents": data.skip_bad_documents,
            **validation_split.options,
        }
        options |= source.record_format.options(tokenizer)
        if source.split_documents:
            options["split_documents"] = source.split_documents
        header: Header = {
            "source": {"name": source.name, "entry": source.entry, "fingerprint": fingerprint},
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
            },
            "options": options,
            "dtype": tokenizer.dtype,
        }
        folder = store_folder(source, header, Path(data.folder))
        return cls(source, share, folder, header, validation_split)

    def made_in(self, folder: Path) -> "Job":
        """The same job; a store that nobody has begun is made in this folder."""
        if exists(self.folder):
            return self
        return replace(self, folder=store_folder(self.source, self.header, folder))

    def is_complete(self) -> bool:
        """Whether its store needs no more work."""
        return is_complete(self.folder)


def text_fields(source: Source) -> tuple[str, ...]:
    """The fields of a source of texts, as the address of a store names them."""
    record_format = source.record_format
    return record_format.fields if isinstance(record_format, Texts) else ()


def store_folder(source: Source, header: Header, folder: Path) -> Path:
    """The folder of the store that is made from this source, whether it exists or not. It is found
    by its address, whatever its name was before."""
    fingerprint = header["source"]["fingerprint"]
    if not fingerprint:
        return newest_store(header, folder)
    address = address_of(fingerprint, header)
    same = paths_in(folder, f"*-{address}")
    if same:
        return same[0]
    former = address_of(source.former_fingerprint, header)
    for store in paths_in(folder, f"*-{former}"):
        if is_complete(store):
            return store
    return folder / f"{header['source']['name']}-{address}"


def address_of(fingerprint: str, header: Header) -> str:
    """The end of a store folder's name: a hash of what the store is made from."""
    tokenizer = header["tokenizer"]["fingerprint"]
    made_from = [ADDRESS_FORMAT, fingerprint, tokenizer, header["options"]]
    return checksum(json.dumps(made_from, sort_keys=True).encode())[:16]


def is_complete(store: Path) -> bool:
    """Whether there is a store in the folder that needs no more documents."""
    return exists(store / MANIFEST) and TokenStore(store).complete


def newest_store(header: Header, folder: Path) -> Path:
    """The newest complete store of a hub stream, whatever its revision: for when the hub cannot be
    reached. Raises DataError where there is none."""

    def modified_at(file: Path) -> float:
        return file.stat().st_mtime

    for file in sorted(matches(folder, "*/manifest.json"), key=modified_at, reverse=True):
        manifest = read_manifest(file.parent)
        if manifest["complete"] and is_made_from(manifest, header):
            return file.parent
    raise DataError(
        f"{header['source']['entry']}: the hub cannot be asked for the revision of this stream, "
        f"and {folder} has no finished store of it; check the network, or name files on this disk"
    )


def is_made_from(manifest: Manifest, header: Header) -> bool:
    """Whether a store has this source (of any revision), tokenizer and options."""
    source = manifest["source"]
    wanted = header["source"]
    return (
        source["name"] == wanted["name"]
        and source["entry"] == wanted["entry"]
        and manifest["tokenizer"] == header["tokenizer"]
        and manifest["options"] == header["options"]
    )
