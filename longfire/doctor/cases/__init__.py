"""Ways to call each fast op, a file for each file of ops/. A new file here is found by itself.

attention.py         softmax attention
attention_with_dropout.py  softmax attention some of whose weights are dropped
attention_blocks.py  the same of keys that come block by block
linear_attention.py  linear attention with decay
delta_rule.py        the delta rule with decay
dplr.py              diagonal plus low rank
slot_attention.py    gated slot attention
segments.py          recurrences of parts of sequences
selective_scan.py    Mamba's scan
token_shift.py       each token beside the one before it
short_conv.py        short causal convolution
cross_entropy.py     the head and the loss as one
float8.py            products of 8-bit numbers
"""

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from longfire.doctor.op_cases import Case


def all_cases() -> Iterator[Case]:
    """The cases of every file here."""
    for file in iter_modules(__path__):
        yield from import_module(f"{__name__}.{file.name}").cases()
