"""Ways to call ops/attention_blocks.py."""

from collections.abc import Iterator
from functools import partial

from longfire.doctor.cases.attention import attention_inputs
from longfire.doctor.op_cases import Case, Inputs
from longfire.ops import attention_blocks


def cases() -> Iterator[Case]:
    """Those of `attention_in_blocks`."""
    ways: dict[str, Inputs] = {
        "grouped heads": {"heads": 2},
        "window, own value size": {"window": 9, "own_value_size": True},
        "the last third, grouped heads": {"queries": 1 / 3, "heads": 2},
    }
    for name, options in ways.items():
        inputs = partial(attention_inputs, keys=32, **options)
        yield Case(attention_blocks, "attention_in_blocks", name, inputs)
