"""What autograd saves in the blocks for their backward waits in the host's memory.

On CUDA copies run on a stream of their own, in pinned memory, beside the computation: to the host
during the forward, and back to the device before the backward asks for them, in the reverse order.
A window of bytes bounds what is in transit, since a tensor holds the device's memory until its copy
is done. With a window of 0 bytes each copy is waited for at once: the same values without overlap,
which is the reference implementation, and what the planner measures.

Nothing on the host waits: the stream of the computation waits for events of the other one.
"""

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

# 10 ms of copies at 50 GB/s. Blocks of one model are alike, so that this evens out their parts.
WINDOW_BYTES = 512 * 2**20


@dataclass(eq=False)
class InTransit:
    """A tensor on the device whose copy has begun: to the host, or from there.

    version: of the tensor when it began. copied: recorded at the end of the copy, on CUDA. owner:
    what autograd saved; gone where no backward needs it. forward: the one that saved it.
    """

    on_device: Tensor
    version: int
    copied: torch.cuda.Event | None
    owner: "weakref.ref[SavedOnHost]"
    forward: "SavedByForward"

    def is_unchanged(self) -> bool:
        """Whether nothing has changed it in place, which autograd itself would refuse."""
        return self.on_device._version == self.version

    def is_copied(self) -> bool:
        return self.copied is None or self.copied.query()

    def wait(self) -> None:
        """What is computed from here on comes after the copy: it may use the tensor's memory."""
        if self.copied is not None:
            torch.cuda.current_stream(self.on_device.device).wait_event(self.copied)

    def release(self) -> None:
        """Leave the copy alone. A tensor that was changed in place stays, so that its backward
        finds it: the copy may have some of the new numbers."""
        owner = self.owner()
        if owner is not None and self.is_unchanged():
            owner.transit = None


class Window:
    """The tensors in transit in one direction: of each forward, the oldest first. One stream copies
    them in this order."""

    def __init__(self) -> None:
        # An OrderedDict finds its oldest key at once, a dict passes all that were removed before.
        self.by_forward: dict[SavedByForward, OrderedDict[InTransit, None]] = {}
        self.bytes = 0

    def add(self, transit: InTransit) -> None:
        self.by_forward.setdefault(transit.forward, OrderedDict())[transit] = None
        self.bytes += transit.on_device.nbytes

    def remove(self, transit: InTransit) -> None:
        """Wait for its copy and count it no more, if it is in this window."""
        of_forward = self.by_forward.get(transit.forward)
        if of_forward is None or transit not in of_forward:
            return
        transit.wait()
        del of_forward[transit]
        self.bytes -= transit.on_device.nbytes
        if not of_forward:
            del self.by_forward[transit.forward]

    def release(self, transit: InTransit) -> None:
        """The same, and leave its copy alone."""
        self.remove(transit)
        transit.release()

    def shrink(self, limit_bytes: int) -> None:
        """Release the oldest ones until no more than limit_bytes are in transit."""
        while self.bytes > limit_bytes:
            self.release(self.oldest_of(next(iter(self.by_forward))))

    def oldest_of(self, forward: "SavedByForward") -> InTransit:
        """The oldest tensor of a forward that has any in this window."""
        return next(iter(self.by_forward[forward]))

    def release_copied(self, but_of: "SavedByForward") -> None:
        """Release those of other forwards whose copies are done. (Those of this one are needed
        first.)"""
        for forward in list(self.by_forward):
            if forward is but_of:
                continue
            # Where the oldest one's copy is not done, later ones are not either.
            while forward in self.by_forward and self.oldest_of(forward).is_copied():
                self.release(self.oldest_of(forward))

    def remove_unneeded(self) -> None:
        """Those that no backward will ask for: their graph is gone."""
        for of_forward in list(self.by_forward.values()):
            for transit in list(of_forward):
                if transit.owner() is None:
                    self.remove(transit)


@dataclass(eq=False)
class SavedOnHost:
    """A tensor that autograd has saved, in the host's memory.

    number: its place among those of its forward. uses: how many nodes of the graph have not asked
    for it yet. transit: it is on the device too.
    """

    host: Tensor
    device: torch.device
    forward: "SavedByForward"
    number: int
    uses: int = 1
    transit: InTransit | None = None


class SavedByForward:
    """What one forward has saved, in order, as long as its graph lives."""

    def __init__(self) -> None:
        self.saved: list[weakref.ref[SavedOnHost]] = []
        # From here on all have been fetched, or were on the device still.
        self.fetched_from = 0
        # Several nodes save the same tensor: the input of three projections.
        self.by_memory: weakref.WeakValueDictionary[Hashable, SavedOnHost]
        self.by_memory = weakref.WeakValueDictionary()

    def append(self, saved: SavedOnHost) -> None:
        self.saved.append(weakref.ref(saved))
        self.fetched_from = len(self.saved)


class ActivationOffload:
    """Of one model: call it to begin the forward of its blocks.

    host: "cpu", or "meta" to count only. window_bytes: how much may be in transit at a time, and
    one tensor more.
    """

    def __init__(self, host: str = "cpu", window_bytes: int = WINDOW_BYTES) -> None:
        self.host = torch.device(host)
        self.window_bytes = window_bytes
        self.to_host = Window()
        self.to_device = Window()
        self.stream: torch.cuda.Stream | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, what autograd saves goes to the host, and comes back for its backward. Parameters
        and buffers stay: they are on the device anyway, or gathered again; so do whole numbers and
        masks."""
        self.to_host.remove_unneeded()
        self.to_device.remove_unneeded()
        pack = partial(self.pack, SavedByForward())
        with torch.autograd.graph.saved_tensors_hooks(pack, self.unpack):
            yield

    def pack(self, forward: SavedByForward, x: Tensor) -> Tensor | SavedOnHost:
        """What autograd saves in the place of x."""
        if stays_on_device(x):
            return x
        memory = memory_of(x)
        known = forward.by_memory.get(memory)
        if known is not None:
            known.uses += 1
            return known
        x = x.detach()  # its graph lives as long as a backward needs it, and no longer
        host, copied = self.copy(x, self.host)
        saved = SavedOnHost(host, x.device, forward, len(forward.saved))
        saved.transit = InTransit(x, x._version, copied, weakref.ref(saved), forward)
        forward.append(saved)
        forward.by_memory[memory] = saved
        self.to_host.add(saved.transit)
        self.to_host.shrink(self.window_bytes)
        return saved

    def unpack(self, saved: Tensor | SavedOnHost) -> Tensor:
        """What a backward asks for; then begin to copy what it will ask for next."""
        if isinstance(saved, Tensor):
            return saved
        transit = saved.transit or self.fetch(saved)
        assert transit.is_unchanged(), "a tensor was changed in place after autograd saved it"
        self.to_host.remove(transit)
        self.to_device.remove(transit)
        saved.uses -= 1
        if saved.uses <= 0:
            saved.transit = None
        self.prefetch(saved)
        return transit.on_device

    def fetch(self, saved: SavedOnHost) -> InTransit:
        """Begin its copy to the device."""
        x, copied = self.copy(saved.host, saved.device)
        saved.transit = InTransit(x, x._version, copied, weakref.ref(saved), saved.forward)
        self.to_device.add(saved.transit)
        return saved.transit

    def prefetch(self, saved: SavedOnHost) -> None:
        """Fill the window with what was saved before it, the latest first, each once. (A backward
        of the inputs alone asks for some of them; what it leaves in the window is what the backward
        of the weights asks for.)"""
        forward = saved.forward
        self.to_host.release_copied(but_of=forward)
        forward.fetched_from = min(forward.fetched_from, saved.number)
        while forward.fetched_from > 0 and self.bytes_in_transit < self.window_bytes:
            forward.fetched_from -= 1
            earlier = forward.saved[forward.fetched_from]()
            if earlier is not None and earlier.transit is None and earlier.uses > 0:
                self.fetch(earlier)

    @property
    def bytes_in_transit(self) -> int:
        return self.to_host.bytes + self.to_device.bytes

    def copy(self, x: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        """x on another device with the same strides, on which compiled code relies; and, on CUDA,
        an event at the end of the copy. Memory of the device is taken from that of the
        computation, which has to be done with it."""
        on_cuda = x.is_cuda or device.type == "cuda"
        there = torch.empty_strided(
            x.shape,
            x.stride(),
            dtype=x.dtype,
            device=device,
            pin_memory=on_cuda and device.type == "cpu",
        )
        with self.beside_computation(x.device if x.is_cuda else device) as stream:
            without_gaps(there).copy_(without_gaps(x), non_blocking=on_cuda)
        return there, stream.record_event() if stream else None

    @contextmanager
    def beside_computation(self, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
        """Inside, a stream of its own that begins when what was computed so far is done; None, and
        nothing, where the device is no CUDA one."""
        if device.type != "cuda":
            yield None
            return
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            yield self.stream


def stays_on_device(x: Tensor) -> bool:
    """Weights, whole numbers, masks, and what is read several times from the same place."""
    owner = x if x._base is None else x._base  # a matrix is saved as its transpose
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
