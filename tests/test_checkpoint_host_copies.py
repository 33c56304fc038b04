"""checkpoint/host_copies.py on a CPU: copies have the bytes of when they were made, in buffers that later saves use again."""

from threading import Event

import pytest
import torch
from conftest import tiny_model

from longfire.checkpoint.host_copies import HostCopies
from longfire.checkpoint.state import State
from longfire.config import settings
from longfire.optim import make_optimizer


def state_of() -> State:
    model = tiny_model("attention")
    return State(model, make_optimizer(model, settings.Optimizer(), torch.device("cpu")))


def test_copies_are_not_the_tensors():
    state = state_of()
    host_copies = HostCopies(pinned=False)
    held = state.written()
    done = host_copies.begin(held)
    assert isinstance(done, Event) and not done.is_set()
    copies = host_copies.finish(held, done)
    assert done.is_set() and copies.keys() == held.keys()
    before = {name: part.tensor.clone() for name, part in held.items()}
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1)
    assert all(copies[name].tensor.equal(tensor) for name, tensor in before.items())
    assert all(copies[name].slices == part.slices for name, part in held.items())
    buffers = [part.tensor.data_ptr() for part in copies.values()]
    again = host_copies.finish(held, host_copies.begin(held))
    assert [part.tensor.data_ptr() for part in again.values()] == buffers
    assert again["model/norm.weight"].tensor.equal(state.model.norm.weight)


def test_nobody_waits_for_copies_that_failed():
    """Training goes on to where the save's own error is raised."""
    state = state_of()
    host_copies = HostCopies(pinned=False)
    held = state.written()
    name = next(iter(held))
    host_copies.buffers[name] = torch.empty(0, 3)
    state.snapshot_done = host_copies.begin(held)
    with pytest.raises(RuntimeError):
        host_copies.finish(held, state.snapshot_done)
    state.wait_for_snapshot()
