"""Texts and tokens, and the tokenizer between them."""

from dataclasses import dataclass
from typing import Literal

from longfire.config.settings.declaration import NATURAL, POSITIVE, SHARE, WORKERS, setting


@dataclass(frozen=True)
class Data:
    """Texts, how they become token stores, shuffling, validation documents."""

    dataset: tuple[str, ...] = setting(
        ("embedded",),
        "sources, comma-separated: files, folders, globs (jsonl[.gz|.zst], json, parquet, "
        "arrow, txt), datasets of the hub, or `embedded` (Python's own library source). In a "
        "recipe also as [[data.sources]] tables with dataset, name, split, data_dir, "
        "data_files, text_field, record_format, share",
    )
    dataset_name: tuple[str, ...] = setting(
        (), "the hub dataset's configuration, one for each source (or one for all)"
    )
    dataset_split: tuple[str, ...] = setting(
        (), "the hub dataset's split, one for each source (or one for all); train if empty"
    )
    data_dir: tuple[str, ...] = setting((), "folder inside each source")
    data_files: tuple[str, ...] = setting((), "files or globs inside each source")
    data_probs: tuple[float, ...] = setting(
        (), "share of TOKENS of each source; equal if empty; any positive numbers"
    )
    text_field: tuple[str, ...] = setting(
        (),
        "field that holds the text, one for each source (or one for all); `text`, else "
        "`content`, if empty",
    )
    record_format: tuple[str, ...] = setting(
        (),
        "what the records of each source are, one for each source (or one for all): text; tokens "
        "(ids, with a loss mask if a record has one); fields (several, some of them without "
        "loss); chat (messages, with loss on the assistant's); if empty, fields where data.fields "
        "is set, else text",
    )
    ids_field: str = setting(
        "input_ids",
        "of tokens: the field with the ids. `loss_mask` (0 or 1 for each id) or `labels` (-100 "
        "where nothing is to be learned) beside it are read where a record has them",
    )
    document_end: str = setting(
        "",
        "of tokens: the token after which a document ends, as <|endoftext|>, where documents were "
        "joined and cut into rows; if empty, each row is a document",
        is_prose=True,
    )
    fields: str = setting(
        "",
        'of fields: the parts of a document, as "[instruction+input],output": + joins fields, '
        "no loss on what is in brackets, <|bos|> and <|eos|> are tokens",
    )
    fields_from_record: str = setting(
        "", "of fields: the field of each record that says its parts, instead of data.fields"
    )
    field_separator: str = setting(
        " ", "of fields: what stands between joined fields", is_prose=True
    )
    messages_field: str = setting(
        "messages", "of chat: the field with the messages, each with `role` and `content`"
    )
    split_documents: str = setting(
        "",
        "how a text file (.txt, .md ...) becomes documents: `lines`, `blank_lines` (what stands "
        "between them), or any other text that separates them, as <|endoftext|>; empty: the "
        "file is one document",
        is_prose=True,
    )
    validation: tuple[str, ...] = setting(
        (),
        "texts of one's own to evaluate on (files, folders, globs, datasets of the hub), in "
        "training and by `longfire eval`; all of data.dataset is then trained on",
    )
    validation_split: str = setting(
        "validation", "the split that is taken of a hub dataset in data.validation"
    )
    folder: str = setting("token-stores", "where token stores are kept; shared between runs")
    streaming: bool = setting(
        False, "start to train as soon as the first sequences exist, while the store still grows"
    )
    shuffle: Literal["auto", "global", "window", "none"] = setting(
        "auto",
        "global: a permutation of each epoch's sequences; window: inside windows of "
        "shuffle_window_sequences; auto: window if streaming, else global",
    )
    shuffle_window_sequences: int = setting(16384, "sequences in a shuffling window", POSITIVE)
    varlen: bool = setting(
        False, "confine attention and state to documents; false: documents are not separated"
    )
    context_len: int = setting(
        0, "with varlen: split longer documents after this many tokens; 0: no limit", NATURAL
    )
    validation_fraction: float = setting(
        0.005,
        "share of documents that are kept for validation, chosen by a hash of their identity, and "
        "at least one; of fewer than 8 documents the ends instead: this share of each, but at "
        "least 50,000 characters or a tenth of it",
        "[0, 1)",
    )
    validation_seed: int = setting(
        -1,
        "choose validation documents by their numbers as datasets.train_test_split(test_size = "
        "validation_fraction, seed = validation_seed, shuffle = True) does; -1: by a hash of their "
        "identity",
        "[-1, inf)",
    )
    num_workers: int = setting(0, "processes that tokenize; 0: one for each core", WORKERS)
    prefetch_factor: int = setting(2, "batches made ready ahead of training; 0: none", NATURAL)
    skip_bad_documents: bool = setting(
        False, "count and list documents that cannot be read instead of stopping"
    )
    trust_remote_code: bool = setting(
        False, "let a hub dataset run its own code (it can do anything; off unless asked)"
    )


@dataclass(frozen=True)
class Tokenizer:
    """Bytes, a tokenizer of your own, or one that is trained on the data."""

    path: str = setting(
        "bytes",
        "`bytes`, `train` (a byte-level BPE trained on the data), a tokenizer.json, a "
        "SentencePiece tokenizer.model, a folder with one of them, or a hub id; where none is "
        "named, the tokenizer beside model.weights, else the one of distillation.teacher, with its "
        "add_bos and add_eos",
    )
    train_vocab_size: int = setting(
        4096, "vocabulary size of a trained tokenizer, special tokens included", "[258, 16777216]"
    )
    train_bytes: int = setting(8_000_000, "bytes of text that a tokenizer is trained on", POSITIVE)
    add_bos: bool = setting(
        False,
        "put the beginning-of-text token before each document; where it is not named, the files of "
        "a tokenizer that is named decide (add_bos_token, or the template of its tokenizer.json)",
    )
    add_eos: bool = setting(True, "put the end-of-text token after each document")
    allow_mismatch: bool = setting(
        False,
        "start from model.weights, or learn from a teacher, whose tokenizer is another one: "
        "each id then stands for other text than the weights were trained on",
    )
    max_lost_share: float = setting(
        0.01,
        "stop when the tokenizer cannot say more than this share of the characters of a source "
        "(it has no token for them, or its unknown token); 1: never",
        SHARE,
    )
