"""Text becomes tokens, tokens become batches. Read in the order in which they flow:

    text.py       sources -> documents: folders, files, the hub, Python's own library; formats.py reads one file
    tokenizer.py  documents -> ids, and back
    workers.py    many processes that tokenize, results in the order of the documents
    tokens.py     ids on disk: one store for each source, content-addressed, append-only, whole after any kill
    prepare.py    text + tokenizer -> stores; before training, or behind it
    order.py      which row of which source is number i: a pure function of (seed, shares, i)
    pack.py       rows of T+1 tokens -> ids, labels, positions, documents
    batches.py    rows i .. i+B -> a batch of tensors; its whole state is i

A *document* is one text's tokens; a *row* is T tokens (and the one after them, the last label); *held out* are the documents
that training never sees, chosen by a hash of their identity.
"""
