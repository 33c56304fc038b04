"""`import longfire` makes LongfireForCausalLM known to transformers' Auto classes.

transformers is not imported for it: that takes seconds, and most commands of longfire do not need
it. Instead our class is registered right after transformers' own table of classes is imported, or
at once if that has happened already.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# A table of transformers -> the module of ours that adds a line to it.
REGISTERED_BY = {
    "transformers.models.auto.configuration_auto": "longfire.huggingface.own_class.config",
    "transformers.models.auto.modeling_auto": "longfire.huggingface.own_class.model",
}


class LoaderThenOurs(Loader):
    """Loads a module as its own loader does, then imports one of ours."""

    def __init__(self, loader: Loader, ours: str) -> None:
        self.loader = loader
        self.ours = ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.ours)


class AutoTables(MetaPathFinder):
    """Finds the tables of transformers as the other finders do, and has ours follow them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in REGISTERED_BY:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = LoaderThenOurs(spec.loader, REGISTERED_BY[name])
                return spec
        return None


def register() -> None:
    """Register our class now where transformers' tables are there, else when they come."""
    sys.meta_path.insert(0, AutoTables())
    for theirs, ours in REGISTERED_BY.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
