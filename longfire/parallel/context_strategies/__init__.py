"""Softmax attention over processes that share sequences: a strategy is one file, with its name,
that holds one object, STRATEGY. The names are those of settings.ContextStrategyName.

contract.py    what a strategy declares: attend, cost, refusal
key_blocks.py  attention to keys that come from other processes, which the first two share
ring.py        keys and values go around
allgather.py   all keys and values come at once
alltoall.py    heads in exchange for tokens
"""

from importlib import import_module
from typing import get_args

from longfire.config.settings import ContextStrategyName
from longfire.parallel.context_strategies.contract import ContextStrategy

STRATEGIES: tuple[ContextStrategyName, ...] = get_args(ContextStrategyName)


def strategy_named(name: str) -> ContextStrategy:
    """The strategy of this name, whose file is read when it is first asked for; "auto" is the ring,
    where no planner has decided."""
    if name == "auto":
        name = "ring"
    assert name in STRATEGIES, f"{name}: no context strategy has this name"
    return import_module(f"{__name__}.{name}").STRATEGY
