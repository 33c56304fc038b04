"""Text becomes tokens, tokens become batches. The files in the order of the flow:

    text.py       sources -> documents: files and folders (formats.py), the hub (hub.py), Python's own library
    tokenizer.py  documents -> ids, and back
    workers.py    processes that tokenize; results in the order of the documents
    tokens.py     ids on disk: a store for each source, content-addressed, append-only, whole after any kill
    prepare.py    text + tokenizer -> stores, before training or behind it
    order.py      which row of which source is number i of the run: a pure function of (seed, shares, i)
    pack.py       rows of T+1 tokens -> ids, labels, positions, documents
    batches.py    rows i .. i+B -> a batch of tensors; its whole state is i

A *document* is one text's tokens. A *row* is T tokens, and the one after them as the last label. *Held out* are the
documents that training never sees, chosen by a hash of their identity.
"""
