"""Copies of a run's tensors in the host's memory, which training does not change: what a save in
the background writes.

On CUDA they are made on a stream of their own beside the computation. In pinned memory nobody on
the host waits for them; in other memory the thread does that writes. Whoever is about to change a
tensor waits first (State.wait_for_snapshot): with pinned memory the device's stream, not the host.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

import torch
from torch import Tensor

from longfire.checkpoint.shards import LocalTensor

Held = dict[str, LocalTensor]


class HostCopies:
    """The buffers of one process, kept from save to save. pinned: whether CUDA copies into them
    without the host, which takes memory that the system cannot move, up to twice the bytes."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.buffers: dict[str, Tensor] = {}
        self.stream: torch.cuda.Stream | None = None
        self.begun: torch.cuda.Event | None = None  # when the tensors were as they are to be saved

    def begin(self, held: Held) -> "Event | torch.cuda.Event":
        """Begin to copy; `wait` of what is returned waits until none of the tensors is read any
        more. `finish` must follow in another thread."""
        device = device_of(held)
        if device is None:
            return Event()
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)
        self.begun = torch.cuda.current_stream(device).record_event()
        if not self.pinned:
            return Event()
        with self.beside_computation():
            self.copy(held)
            return self.stream.record_event()

    def finish(self, held: Held, done: "Event | torch.cuda.Event") -> Held:
        """The copies, all there. done: what `begin` returned."""
        if not isinstance(done, Event):
            done.synchronize()
            return self.as_copied(held)
        try:
            with self.beside_computation():
                self.copy(held)
        finally:
            done.set()
        return self.as_copied(held)

    @contextmanager
    def beside_computation(self) -> Iterator[None]:
        """Inside, work of this thread goes to the stream of the copies, after `begun`. On a CPU
        there is none."""
        if self.stream is None:
            yield
            return
        assert self.begun is not None, "begin makes both"
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.begun)
            yield

    def copy(self, held: Held) -> None:
        """Copy every tensor into its buffer, which the first save allocates."""
        for name, (tensor, _, _) in held.items():
            if name not in self.buffers:
                self.buffers[name] = torch.empty(
                    tensor.shape,
                    dtype=tensor.dtype,
                    pin_memory=self.pinned,
                )
            self.buffers[name].copy_(tensor, non_blocking=self.pinned)

    def as_copied(self, held: Held) -> Held:
        copies: Held = {}
        for name, part in held.items():
            copies[name] = part._replace(tensor=self.buffers[name])
        return copies


def device_of(held: Held) -> torch.device | None:
    """The CUDA device of the tensors; None where all are in the host's memory."""
    for tensor, _, _ in held.values():
        if tensor.is_cuda:
            return tensor.device
    return None
