"""ops/fast/known_lengths.py: what fla computes of lengths is the same, and the host has its numbers without asking the device."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.fast.known_lengths import KnownLengths, known_lengths

LENGTHS = (0, 5, 12, 13, 40)


def lengths_on_both(of_device: tuple[int, ...] = LENGTHS) -> Tensor:
    """The device's numbers may be others here, so that it shows which were read."""
    return known_lengths(torch.tensor(of_device), torch.tensor(LENGTHS))


def chunk_offsets(cu_lengths: Tensor, size: int) -> Tensor:
    """As fla.ops.utils.index.prepare_chunk_offsets computes them."""
    chunks = (torch.diff(cu_lengths) + size - 1) // size
    return F.pad(chunks, (1, 0), value=0).cumsum(-1)


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_chunk_offsets(size: int):
    found = chunk_offsets(lengths_on_both(), size)
    true = chunk_offsets(torch.tensor(LENGTHS), size)
    assert torch.Tensor.tolist(found) == true.tolist()
    assert found.on_host.equal(true)
    assert found[-1].item() == true[-1].item()


def test_an_item_is_read_on_the_host():
    lengths = lengths_on_both(of_device=(0, 0, 0, 0, 0))
    assert chunk_offsets(lengths, 4)[-1].item() == 2 + 2 + 1 + 7
    assert lengths.tolist() == [0, 0, 0, 0, 0], "nothing else is"


def test_what_the_host_does_not_know_is_read_on_the_device():
    lengths = lengths_on_both(of_device=(1, 2, 3, 4, 5))
    for unknown in (lengths + torch.ones(5, dtype=torch.int64), lengths * 2, lengths.clone()):
        assert unknown[0].item() == int(unknown.tolist()[0])
        assert getattr(unknown, "on_host", None) is None


def test_a_table_of_the_host_goes_to_the_device_as_it_is():
    table = torch.arange(6).view(3, 2)
    moved = table.to(lengths_on_both())
    assert type(moved) is Tensor and moved.equal(table)
    assert table.int().to(lengths_on_both()).dtype == torch.int64
    assert lengths_on_both().to(torch.int32).dtype == torch.int32


def test_the_same_lengths_are_the_same_object():
    """fla keeps its tables by identity, and looks for the same after `.contiguous()`."""
    lengths, on_host = torch.tensor(LENGTHS), torch.tensor(LENGTHS)
    known = known_lengths(lengths, on_host)
    assert known_lengths(lengths, on_host) is known
    assert known.contiguous() is known and known.on_host is on_host
    assert known.data_ptr() == lengths.data_ptr()
    assert type(lengths) is Tensor, "others see what they gave"
    assert isinstance(known, KnownLengths)


def test_they_live_no_longer_than_the_lengths():
    lengths = torch.tensor(LENGTHS)
    known = weakref.ref(known_lengths(lengths, torch.tensor(LENGTHS)))
    del lengths
    gc.collect()
    assert known() is None
