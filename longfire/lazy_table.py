"""A table of names and what they name, each in a file that is read when it is first asked for."""

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Generic, TypeVar

Named = TypeVar("Named")


class LazyTable(MutableMapping[str, Named], Generic[Named]):
    """name -> object, from places such as "longfire.mixers.gla:GLA".

    Asking for a name imports its file; counting, listing and `in` import nothing. A plugin puts
    objects beside the places.
    """

    def __init__(self, places: dict[str, str]) -> None:
        self.places = dict(places)
        self.loaded: dict[str, Named] = {}

    def __getitem__(self, name: str) -> Named:
        if name not in self.loaded:
            module, _, attribute = self.places[name].partition(":")
            self.loaded[name] = getattr(import_module(module), attribute)
        return self.loaded[name]

    def __setitem__(self, name: str, named: Named) -> None:
        self.loaded[name] = named
        self.places[name] = ""

    def __delitem__(self, name: str) -> None:
        del self.places[name]
        self.loaded.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
