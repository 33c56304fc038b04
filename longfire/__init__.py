"""longfire: language models with any sequence mixer, at any context length, from raw text to
Hugging Face weights.

The flow in order, a line for each stage; each can be called alone:

    data.text        files, folders, hub datasets     -> documents
    data.tokenizer   the text of a document           <-> ids
    data.prepare     documents + tokenizer            -> a token store, made once (data.tokens)
    data.order       (seed, shares, a number)         -> which sequence of which source
    data.pack        tokens and document ends         -> ids, labels, positions, documents
    data.batches     sequences consumed, one integer  -> batch t
    model            ids                              -> hidden states (mixers, MLPs; ops compute)
    loss             hidden states, labels            -> nats, summed over the labels
    training         batch t                          -> one step of optim, one record
    checkpoint       model, optimizer, counters       -> a folder that is complete or absent
    evaluation       a model, validation documents    -> loss, perplexity, bits per byte
    huggingface      a checkpoint                     -> Hugging Face weights, same logits
    generation       a model, a prompt                -> text

A run is described in `config`: settings (each with its help), recipe (TOML and command line, read
strictly), model_config (a model), run (all of it, checked). `cli` names the commands; importing
this package imports nothing else. It makes LongfireForCausalLM known to transformers, the class of
exported models that no other class has (huggingface/own_class).

The public API is ModelConfig, Model, build, load, export, Tokenizer, Batches, Batch, train_step,
generate, Sampling and the operators in ops (docs/reference/api.md). `public` has the module of
each; it is imported when it is first used, so that `import longfire` needs no torch.
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
