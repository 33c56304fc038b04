"""Ways to call recurrences of parts of sequences (doctor/segments.py)."""

from collections.abc import Iterator
from functools import partial

from longfire.doctor import segments
from longfire.doctor.cases.dplr import dplr_inputs
from longfire.doctor.cases.linear_attention import recurrent_inputs
from longfire.doctor.op_cases import Case


def cases() -> Iterator[Case]:
    """Those whose maps are matrices."""
    for documents in (False, True):
        name = "part of a sequence, documents" if documents else "part of a sequence"
        for decay in ("none", "scalar", "vector"):
            inputs = partial(recurrent_inputs, decay=decay, rule=True, documents=documents)
            yield Case(segments, "delta_rule", f"{decay} decay, {name}", inputs)
        inputs_of_dplr = partial(dplr_inputs, documents=documents)
        yield Case(segments, "dplr", name, inputs_of_dplr)
