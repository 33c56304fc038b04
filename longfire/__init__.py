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
    checkpoint       model, optimizer, counters             -> a folder that is complete or absent
    evaluate         a model, validation documents            -> loss, perplexity, bits per byte
    hub              a checkpoint                           -> Hugging Face weights that give the same logits
    hf               such weights                           -> a class of transformers, where no other one has the model
    generation       a model, a prompt                      -> text

What a run is: settings (every one of them, with its help), recipe (TOML and command line,
strictly), shape (of a model), run (all of it, checked). `cli` names the commands; importing this
package imports nothing else. It lets transformers know LongfireForCausalLM, the class of exported
models that no other class has (`hf`).

The public API is ModelConfig, Model, build, load, export, Tokenizer, Batches, Batch, train_step,
generate, Sampling and the operators in ops (docs/reference/api.md). `public` says where each lies;
it is imported when it is first used, so that `import longfire` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from longfire import auto_classes

if TYPE_CHECKING:
    from longfire.public import *  # noqa: F403
    from longfire.public import __all__ as __all__

    __version__: str
else:

    def __getattr__(name: str) -> object:
        """`__version__`, `__all__` or a public name, when it is first asked for."""
        return import_module("longfire.public").find(name)


auto_classes.register()
