"""What a segment of a row does to the state: S_out = M S_in + B, without the outputs of its tokens.

All recurrences here are linear in the state, so that a segment, whatever its length, is such a map;
maps of neighbours compose to that of both. Processes that share a row exchange these maps, not
states (parallel/context.py; for decayed linear attention this is LASP-2, Sun 2025). M is a number
for each channel where channels decay by themselves, a matrix K x K where keys are erased.

Each map takes the arguments of its op and follows the same rules: the state starts from zero at
each document, the state before the segment belongs to its first document, the one after it to its
last.

contract.py          the map of a segment, and what is known of a recurrence
linear_attention.py  of decayed linear attention
delta_rule.py        of the delta rule
dplr.py              of diagonal plus low rank
slot_attention.py    of gated slot attention
selective_scan.py    of Mamba's scan
wide_values.py       outputs and map by one call of an op's kernels, where M is a matrix
"""

from longfire.lazy_table import LazyTable
from longfire.ops.maps.contract import Recurrence
from longfire.ops.recurrence import RecurrenceOp

# Name of an op -> what is known of it over segments, in a file that is read when it is asked for.
RECURRENCES: LazyTable[Recurrence] = LazyTable(
    {
        "linear_attention": "longfire.ops.maps.linear_attention:RECURRENCE",
        "delta_rule": "longfire.ops.maps.delta_rule:RECURRENCE",
        "dplr": "longfire.ops.maps.dplr:RECURRENCE",
        "slot_attention": "longfire.ops.maps.slot_attention:RECURRENCE",
        "selective_scan": "longfire.ops.maps.selective_scan:RECURRENCE",
    }
)


def has_map(op: RecurrenceOp) -> bool:
    """Whether the map of this op's state is known. Its file is read."""
    name = getattr(op, "__name__", "")
    return name in RECURRENCES and RECURRENCES[name].op is op


def recurrence_of(op: RecurrenceOp) -> Recurrence:
    """What is known of an op that `has_map`."""
    for recurrence in RECURRENCES.loaded.values():
        if recurrence.op is op:
            return recurrence
    assert has_map(op), f"{op} has no map of its state: declare it in the mixer's recurrences"
    return RECURRENCES[op.__name__]
