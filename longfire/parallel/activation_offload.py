"""What blocks keep for their backward waits in the host's memory.

On CUDA copies run on a stream of their own, in pinned memory, beside the computation: they leave
during the forward, and come back before the backward asks for them, in the reverse order. A window
of bytes bounds what is on its way, since a tensor holds the device's memory until its copy is
done. With a window of 0 bytes each copy is waited for at once: the same values without overlap,
which is the reference implementation, and what the planner measures.

Nothing on the host waits: the stream of the computation waits for events of the other one.
"""

import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

# 10 ms of copies at 50 GB/s. Blocks of one model are alike, so that this evens out their parts.
WINDOW_BYTES = 512 * 2**20


@dataclass(eq=False)
class Moving:
    """A tensor on the device whose copy has begun: to the host, or from there.

    version: of the tensor when it began. done: when the copy has ended, on CUDA. owner: what is
    kept; gone where no backward needs it.
    """

    on_device: Tensor
    version: int
    done: torch.cuda.Event | None
    owner: "weakref.ref[Kept]"

    def is_as_kept(self) -> bool:
        """Whether nothing has changed it in place, which autograd itself would refuse."""
        return self.on_device._version == self.version

    def has_ended(self) -> bool:
        return self.done is None or self.done.query()

    def wait(self) -> None:
        """What is computed from here on comes after the copy: it may use the tensor's memory."""
        if self.done is not None:
            torch.cuda.current_stream(self.on_device.device).wait_event(self.done)

    def release(self) -> None:
        """Let the copy be all there is. A tensor that was changed in place stays, so that its
        backward finds it: the copy may have some of the new numbers."""
        owner = self.owner()
        if owner is not None and self.is_as_kept():
            owner.moving = None


class Window:
    """The tensors that are on their way in one direction, the oldest first."""

    def __init__(self) -> None:
        self.tensors: dict[Moving, None] = {}
        self.bytes = 0

    def add(self, moving: Moving) -> None:
        self.tensors[moving] = None
        self.bytes += moving.on_device.nbytes

    def remove(self, moving: Moving) -> None:
        """Wait for its copy and count it no more, if it is here."""
        if moving in self.tensors:
            moving.wait()
            del self.tensors[moving]
            self.bytes -= moving.on_device.nbytes

    def remove_copied(self, forward: "Forward") -> None:
        """Those of other forwards whose copy has ended. (Those of this one are needed first.)"""
        for moving in list(self.tensors):
            owner = moving.owner()
            if owner is not None and owner.forward is forward:
                continue
            if moving.has_ended():
                self.remove(moving)
                moving.release()

    def remove_unneeded(self) -> None:
        """Those that no backward will ask for: their graph is gone."""
        for moving in list(self.tensors):
            if moving.owner() is None:
                self.remove(moving)


@dataclass(eq=False)
class Kept:
    """A tensor that autograd keeps, in the host's memory.

    number: its place among those of its forward. uses: how many nodes of the graph have not asked
    for it yet. moving: it is on the device too.
    """

    host: Tensor
    device: torch.device
    forward: "Forward"
    number: int
    uses: int = 1
    moving: Moving | None = None


class Forward:
    """What one forward has kept, in order, as long as its graph lives."""

    def __init__(self) -> None:
        self.kept: list[weakref.ref[Kept]] = []
        # Several nodes keep the same tensor: the input of three projections.
        self.by_memory: weakref.WeakValueDictionary[Hashable, Kept]
        self.by_memory = weakref.WeakValueDictionary()


class ActivationOffload:
    """Of one model: call it to begin the forward of its blocks.

    host: "cpu", or "meta" to count only. window_bytes: how much may be on its way at a time,
    and one tensor more.
    """

    def __init__(self, host: str = "cpu", window_bytes: int = WINDOW_BYTES) -> None:
        self.host = torch.device(host)
        self.window_bytes = window_bytes
        self.leaving = Window()
        self.coming = Window()
        self.stream: torch.cuda.Stream | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, what autograd keeps goes to the host, and comes back for its backward. Parameters
        and buffers stay: they are there anyway, or gathered again; so do whole numbers and
        masks."""
        self.leaving.remove_unneeded()
        self.coming.remove_unneeded()
        keep = partial(self.keep, Forward())
        with torch.autograd.graph.saved_tensors_hooks(keep, self.give_back):
            yield

    def keep(self, forward: Forward, x: Tensor) -> Tensor | Kept:
        """What autograd keeps in the place of x."""
        if stays_on_device(x):
            return x
        memory = memory_of(x)
        known = forward.by_memory.get(memory)
        if known is not None:
            known.uses += 1
            return known
        x = x.detach()  # its graph lives as long as a backward needs it, and no longer
        host, done = self.copy(x, self.host)
        kept = Kept(host, x.device, forward, len(forward.kept))
        kept.moving = Moving(x, x._version, done, weakref.ref(kept))
        forward.kept.append(weakref.ref(kept))
        forward.by_memory[memory] = kept
        self.leaving.add(kept.moving)
        while self.leaving.bytes > self.window_bytes:
            oldest = next(iter(self.leaving.tensors))
            self.leaving.remove(oldest)
            oldest.release()
        return kept

    def give_back(self, kept: Tensor | Kept) -> Tensor:
        """What a backward asks for; then begin to copy what it will ask for next."""
        if isinstance(kept, Tensor):
            return kept
        moving = kept.moving or self.fetch(kept)
        assert moving.is_as_kept(), "a tensor was changed in place after autograd kept it"
        self.leaving.remove(moving)
        self.coming.remove(moving)
        kept.uses -= 1
        if kept.uses <= 0:
            kept.moving = None
        self.fetch_earlier(kept)
        return moving.on_device

    def fetch(self, kept: Kept) -> Moving:
        """Begin its copy to the device."""
        x, done = self.copy(kept.host, kept.device)
        kept.moving = Moving(x, x._version, done, weakref.ref(kept))
        self.coming.add(kept.moving)
        return kept.moving

    def fetch_earlier(self, kept: Kept) -> None:
        """Fill the window with what was kept before it, the latest first."""
        self.leaving.remove_copied(kept.forward)
        number = kept.number
        while number > 0 and self.leaving.bytes + self.coming.bytes < self.window_bytes:
            number -= 1
            earlier = kept.forward.kept[number]()
            if earlier is not None and earlier.moving is None and earlier.uses > 0:
                self.fetch(earlier)

    def copy(self, x: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        """x on another device with the same strides, on which compiled code relies; and when it is
        there. Memory of the device is taken from that of the computation, which has to be done with
        it."""
        by_cuda = x.is_cuda or device.type == "cuda"
        there = torch.empty_strided(
            x.shape,
            x.stride(),
            dtype=x.dtype,
            device=device,
            pin_memory=by_cuda and device.type == "cpu",
        )
        if not by_cuda:
            without_gaps(there).copy_(without_gaps(x))
            return there, None
        on_device = x.device if x.is_cuda else device
        if self.stream is None:
            self.stream = torch.cuda.Stream(on_device)
        self.stream.wait_stream(torch.cuda.current_stream(on_device))
        with torch.cuda.stream(self.stream):
            without_gaps(there).copy_(without_gaps(x), non_blocking=True)
        return there, self.stream.record_event()


def stays_on_device(x: Tensor) -> bool:
    """Weights, whole numbers, masks, and what is read several times from the same place."""
    owner = x if x._base is None else x._base  # a matrix is kept as its transpose
    if isinstance(owner, nn.Parameter | nn.Buffer) or not x.is_floating_point():
        return True
    return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride()))


def without_gaps(x: Tensor) -> Tensor:
    """All memory from the first number of x to its last, as a vector. A slice of columns has gaps
    in it, and torch would copy it through memory that is not pinned, for which the host waits."""
    if x.numel() == 0:
        return x
    last = 0
    for size, stride in zip(x.shape, x.stride()):
        last += (size - 1) * stride
    return x.as_strided((last + 1,), (1,))


def memory_of(x: Tensor) -> Hashable:
    """The same for tensors that show the same numbers of the same memory. (The imaginary part of a
    conjugate is the memory of the other one's, with its sign still to be changed: `is_neg`.)"""
    storage = weakref.ref(x.untyped_storage())
    return storage, x.storage_offset(), x.shape, x.stride(), x.dtype, x.is_neg(), x._version
