"""Softmax attention over processes that share a row."""

from collections.abc import Callable, Iterator


def attend_over(size: int, rank: int, group: str, strategy: str) -> Callable:
    raise NotImplementedError


def refusals(name: str, heads: int, kv_heads: int, size: int, strategy: str) -> Iterator[str]:
    yield from ()
