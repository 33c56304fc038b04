"""longfire: language models with any sequence mixer, at any context length, from raw text to
Hugging Face weights.

The flow in order, a line a stage; each can be called alone:

    data.text        files, folders, hub datasets           -> documents
    data.tokenizer   a document's text                      <-> ids
    data.prepare     documents + tokenizer                  -> a token store, made once (data.tokens)
    data.order       (seed, shares, a number)               -> which row of which source
    data.pack        tokens and document ends               -> ids, labels, positions, documents of a row
    data.batches     rows consumed, one integer             -> batch t
    model            ids                                    -> hidden states (mixers look along the sequence, ops compute)
    loss             hidden states, labels                  -> nats, summed over real tokens
    train            batch t                                -> one step of optim, one record of report
    checkpoint       model, optimizer, counters             -> a folder that is whole or not there
    evaluate         a model, held-out documents            -> loss, perplexity, bits per byte
    hub              a checkpoint                           -> Hugging Face weights that give the same logits
    hf               such weights                           -> a class of transformers, where no other one has the model
    generate         a model, a prompt                      -> text

What a run is: settings (every one of them, with its help), recipe (TOML and command line,
strictly), shape (of a model), run (all of it, checked). `cli` names the commands; importing this
package imports nothing else. It lets transformers know LongfireForCausalLM, the class of exported
models that no other class has (`hf`).
"""

from longfire import auto_classes

__version__: str
auto_classes.register()


def __getattr__(name: str) -> str:
    """`longfire.__version__`, looked up when asked for: the import of importlib.metadata would slow
    every command."""
    if name != "__version__":
        raise AttributeError(f"module 'longfire' has no attribute {name!r}")
    from importlib.metadata import version

    return version("longfire")
