"""Text becomes tokens, tokens become batches. The files in the order of the flow:

    text.py             sources -> documents: files and folders, the hub, Python's own library
    folders.py          which files of a folder are read, and which are left out
    cards.py            the dataset card of a folder: its configurations and splits
    hub.py              datasets of the hub, streamed
    formats.py          one file -> its records: jsonl, json, parquet, arrow, text
    compressed.py       gz, zst, bz2 and xz as streams; a file that was cut is an error
    lines.py            the lines of a text file
    fingerprints.py     hashes of files, remembered
    validation.py          which documents are kept for validation
    tokenizer.py        documents -> ids, and back
    tokenizer_files.py  what lies beside a tokenizer.json and is kept for an export
    losses.py           characters that a tokenizer cannot encode
    workers.py          processes that tokenize; results in the order of the documents
    tokens.py           ids on disk: a store for each source, append-only, whole after any kill
    blocks.py           checksums of the blocks of a store
    prepare.py          text + tokenizer -> stores, before training or behind it
    order.py            which sequence of which source is number i of the run: a function of (seed, shares, i)
    pack.py             T+1 tokens -> ids, labels, positions, documents
    batches.py          sequences i .. i+B -> a batch of tensors; its whole state is i

A *document* is one text's tokens. A *row* is T tokens, and the one after them as the last label.
*Held out* are the documents that training never sees, chosen by a hash of their identity.
"""
