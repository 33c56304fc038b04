"""The public API: names that keep their meaning as CHANGELOG.md promises, and the modules that they
lie in. `longfire.NAME` imports no more than NAME needs."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longfire import ops
    from longfire.checkpoint.weights import build, load
    from longfire.config.model_config import ModelConfig as ModelConfig
    from longfire.config.options import Sampling
    from longfire.data.batch import Batch
    from longfire.data.batches import Batches
    from longfire.data.tokenizer import Tokenizer
    from longfire.generation.generate import generate_text as generate
    from longfire.huggingface.export import export
    from longfire.model import Model
    from longfire.training.step import train_on as train_step

__all__ = [
    "Batch",
    "Batches",
    "Model",
    "ModelConfig",
    "Sampling",
    "Tokenizer",
    "build",
    "export",
    "generate",
    "load",
    "ops",
    "train_step",
]

# Public name -> the module that it lies in, and its name there.
PLACES = {
    "Batch": ("longfire.data.batch", "Batch"),
    "Batches": ("longfire.data.batches", "Batches"),
    "Model": ("longfire.model", "Model"),
    "ModelConfig": ("longfire.config.model_config", "ModelConfig"),
    "Sampling": ("longfire.config.options", "Sampling"),
    "Tokenizer": ("longfire.data.tokenizer", "Tokenizer"),
    "build": ("longfire.checkpoint.weights", "build"),
    "export": ("longfire.huggingface.export", "export"),
    "generate": ("longfire.generation.generate", "generate_text"),
    "load": ("longfire.checkpoint.weights", "load"),
    "train_step": ("longfire.training.step", "train_on"),
}


def find(name: str) -> object:
    """What `longfire.NAME` is; it stays in the package, so that it is looked up once. Raises
    AttributeError for a name that is not public."""
    if name == "__version__":
        from importlib.metadata import version  # slow to import, and every command comes here

        return version("longfire")
    if name == "__all__":
        return __all__
    if name == "ops":
        return import_module("longfire.ops")
    if name not in PLACES:
        raise AttributeError(f"module 'longfire' has no attribute {name!r}")
    module, original = PLACES[name]
    found = getattr(import_module(module), original)
    setattr(import_module("longfire"), name, found)
    return found
