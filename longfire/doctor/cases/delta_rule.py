"""Ways to call ops/delta_rule.py."""

from collections.abc import Iterator

from longfire.doctor.cases.linear_attention import decay_cases
from longfire.doctor.op_cases import Case
from longfire.ops import delta_rule


def cases() -> Iterator[Case]:
    yield from decay_cases(delta_rule, "delta_rule", ("none", "scalar", "vector"))
