"""Text becomes tokens, tokens become batches. The files in the order of the flow:

    token_record.py         ids, where their documents end, and which of them are learned
    record_format.py        what records are, and what becomes of one; the protocol of a format
    documents.py            what a source gives: documents and positions; the protocol of a source
    text.py                 the sources that the settings name: files, folders, the hub, the library
    folders.py              which files of a folder are read, and which are left out
    chosen_files.py         the files that are read, and the reasons for the others
    cards.py                the dataset card of a folder: its configurations and splits
    splits.py               the files of one split (train, validation, test), by their paths
    file_checks.py          checks of files before they are read: links, pointers, missing parts
    files.py                files on this machine as a source
    hub.py                  datasets of the hub as a source
    formats.py              one file -> its records
    json_files.py           the readers of jsonl and json
    tables.py               the readers of parquet and arrow
    text_files.py           the readers of plain text
    records.py              records of a file, and the text in their fields
    token_rows.py           records of token ids, with a loss mask or labels
    field_parts.py          records of several fields, some of them without loss
    chat.py                 conversations, with loss on the turns of the assistant
    record_formats.py       the record format that the settings choose
    compressed.py           gz, zst, bz2 and xz as streams; a file that was cut is an error
    lines.py                the lines of a text file
    fingerprints.py         hashes of files, remembered
    validation.py           which documents are kept for validation
    tokenizer_files.py      the files beside a tokenizer.json that an export writes again
    sentencepiece_files.py  SentencePiece models, compared with their own library
    tokenizer_sources.py    finds the tokenizer of a file, a folder or the hub
    token_templates.py      the tokens that a tokenizer.json adds to a text
    losses.py               characters that a tokenizer cannot encode
    tokenizer.py            documents -> ids, and back
    token_bytes.py          the bytes of text that each id of a tokenizer stands for
    tokenizer_training.py   the tokenizer that the settings name, which may be trained on the data
    workers.py              processes that tokenize; results in the order of the documents
    manifest.py             what a token store holds; committed by one rename
    blocks.py               checksums of the blocks of a store
    tokens.py               token stores for reading: a store for each source
    store_writer.py         token stores for writing: append-only, consistent after any kill
    jobs.py                 a source that is prepared, and the folder of its store
    chunks.py               some documents at a time, gathered and encoded
    fill.py                 fills stores with the ids of documents
    fill_progress.py        shows how far the stores are
    labelled_texts.py       texts with a class each, which are read whole
    background.py           preparation in another process, while training runs
    prepare.py              text + tokenizer -> stores
    order.py                which sequence of which source is number i of the run
    pack.py                 T+1 tokens -> ids, labels, positions, documents
    step_batch.py           what the training step asks of a batch, whatever its records are
    batch.py                a batch of sequences as tensors
    batches.py              sequences i .. i+B -> a batch; i is the whole state

A *document* is the tokens of one text. A *loss mask* says which tokens are learned: where the next
token is not, the label is -100. A *sequence* is T tokens, and the one after them as the last
label. *Validation* documents are never trained on; a hash of their identity chooses them.
"""
