"""Ways to call ops/attention_parts.py."""

from collections.abc import Iterator
from functools import partial

from longfire.doctor.cases.attention import attention_inputs
from longfire.doctor.op_cases import Case, Inputs
from longfire.ops import attention_parts


def cases() -> Iterator[Case]:
    parts: dict[str, Inputs] = {
        "causal": {"causal": True},
        "all keys, grouped heads": {"causal": False, "heads": 2, "queries": 1 / 3},
    }
    for name, options in parts.items():
        yield Case(attention_parts, "attention_parts", name, partial(attention_inputs, **options))
