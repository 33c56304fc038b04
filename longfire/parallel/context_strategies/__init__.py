"""Softmax attention over processes that share sequences: a strategy is one file, one object and one
line in the table.

contract.py     what a strategy declares: attend, cost, refusal
key_blocks.py   attention to keys that come from other processes, which the first two share
ring.py         keys and values go around
all_gather.py   all keys and values come at once
all_to_all.py   heads in exchange for tokens
"""

from importlib import import_module

from longfire.parallel.context_strategies.contract import ContextStrategy

# name in parallelism.context_parallel_strategy -> file, read when it is first asked for
STRATEGIES = {"ring": "ring", "allgather": "all_gather", "alltoall": "all_to_all"}


def strategy_named(name: str) -> ContextStrategy:
    """The strategy of this name; "auto" is the ring, where no planner has decided."""
    file = STRATEGIES["ring" if name == "auto" else name]
    return import_module(f"{__name__}.{file}").STRATEGY
