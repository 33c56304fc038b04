"""The layout that `auto` takes, and what a step reports. That what is shared is the same:
contracts/test_06_context_parallel.py."""

import torch

from longfire.ops.documents import Documents
from longfire.parallel.context import Context, layout_kind


def test_auto_takes_what_makes_work_even():
    assert layout_kind("auto", softmax=False, documents=True) == "contiguous"
    assert layout_kind("auto", softmax=True, documents=False) == "zigzag"
    assert layout_kind("auto", softmax=True, documents=True) == "balanced"
    assert layout_kind("contiguous", softmax=True, documents=True) == "contiguous"


def test_a_step_tells_how_even_its_rows_were_and_how_far_filled_up():
    positions_BT = torch.cat([torch.arange(10), torch.arange(1), torch.arange(90)])[None]
    ids_BT = (positions_BT == 0).long().cumsum(1)
    documents = Documents.from_ids(ids_BT)
    message = {}
    for asked in ("contiguous", "auto"):
        context = Context(4, 0, "no group is asked", asked, "ring", softmax=True)
        ops, _ = context.share(positions_BT, documents)
        message[asked] = context.describe()
        assert ops.cut(positions_BT).shape[1] * 4 == 101 + message[asked]["context_filled_tokens"]
    assert (
        message["contiguous"]["context_balance"]
        > 1.6
        > 1.1
        > message["auto"]["context_balance"]
        >= 1.0
    )
