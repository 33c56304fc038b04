"""A save in the background copies on a stream of its own: with pinned memory the host waits for nothing, and the update waits
for the copies on the device."""

from contextlib import contextmanager
from pathlib import Path
from threading import Event
from unittest.mock import patch

import counts
import pytest
import torch
from conftest import tiny_config
from no_kernels import without_numbers

from longfire.checkpoint.saving import Checkpoints
from longfire.checkpoint.state import State
from longfire.config import settings
from longfire.initialise import build
from longfire.optim import make_optimizer

CUDA = torch.device("cuda", 0)


def state_of() -> State:
    with without_numbers():
        model = build(tiny_config("attention"), 0, CUDA, torch.bfloat16)
    return State(model, make_optimizer(model, settings.Optimizer(), CUDA))


@contextmanager
def no_wait_of_the_host():
    """Inside, what makes the host wait raises."""
    torch.cuda.set_sync_debug_mode("error")
    before = counts.now()
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (counts.now() - before).waits == 0


def test_pinned_copies_begin_without_a_wait(tmp_path: Path):
    state = state_of()
    checkpoints = Checkpoints(tmp_path, settings.Checkpoint(async_mode="async_with_pinned_mem"))
    held = state.written()
    copies = checkpoints.host_copies
    copies.finish(held, copies.begin(held))  # allocates
    assert all(buffer.is_pinned() for buffer in copies.buffers.values())
    with no_wait_of_the_host():
        done = copies.begin(held)
        assert isinstance(done, torch.cuda.Event)
        state.snapshot_done = done
        state.wait_for_snapshot()
    whole = copies.finish(held, done)
    for name, part in held.items():
        assert whole[name].tensor.equal(part.tensor.cpu()), name


def test_the_order_of_streams():
    """Copies come after what was there when they began, and what waits for them is the stream of the computation."""
    calls: list[tuple[str, int]] = []
    wait_event = torch.cuda.Stream.wait_event
    record_event = torch.cuda.Stream.record_event

    def waits(stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        calls.append(("wait", stream.stream_id))
        wait_event(stream, event)

    def records(stream: torch.cuda.Stream, *event: torch.cuda.Event) -> torch.cuda.Event:
        calls.append(("record", stream.stream_id))
        return record_event(stream, *event)

    state = state_of()
    checkpoints = Checkpoints(
        Path("nowhere"), settings.Checkpoint(async_mode="async_with_pinned_mem")
    )
    held = state.written()
    with (
        patch.object(torch.cuda.Stream, "wait_event", waits),
        patch.object(torch.cuda.Stream, "record_event", records),
    ):
        state.snapshot_done = checkpoints.host_copies.begin(held)
        computing = torch.cuda.current_stream(CUDA).stream_id
        copying = checkpoints.host_copies.stream.stream_id
    assert copying != computing
    assert calls == [("record", computing), ("wait", copying), ("record", copying)]
    with patch.object(torch.cuda.Event, "wait") as waited:
        state.wait_for_snapshot()
    waited.assert_called_once_with()
    assert state.snapshot_done is None


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_a_checkpoint_of_either_kind_comes_back(mode: str, tmp_path: Path):
    state = state_of()
    before = {name: tensor.cpu() for name, tensor in state.tensors().items()}
    checkpoints = Checkpoints(tmp_path, settings.Checkpoint(async_mode=mode))
    checkpoints.save(state)
    is_of_the_device = isinstance(state.snapshot_done, torch.cuda.Event)
    assert is_of_the_device == (mode == "async_with_pinned_mem")
    assert is_of_the_device or isinstance(state.snapshot_done, Event)
    state.wait_for_snapshot()
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.copy_(torch.ones(parameter.shape))
    checkpoints.wait()
    assert Checkpoints(tmp_path, settings.Checkpoint()).restore(state)
    assert all(tensor.cpu().equal(before[name]) for name, tensor in state.tensors().items())
