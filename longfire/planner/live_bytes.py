"""The bytes of tensors that are alive, counted after each operation of a computation."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators of ours that are not opened: loops that hold a token's numbers beside their results
# (opening them would take minutes), and those that need other processes.
CLOSED = {
    "longfire::scan_tokens",
    "longfire::scan_tokens_backward",
    "longfire::summed",
    "longfire::gathered",
    "longfire::scattered",
}


class Operator(Protocol):
    """What torch calls back with: an operator with its overload."""

    namespace: str

    def name(self) -> str: ...

    def __call__(self, *args: object, **kwargs: object) -> object: ...


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that live, after each operation: of fake tensors as of real
    ones."""

    def __init__(
        self,
        *existing: object,
        owners: Iterable[Tensor] = (),
    ) -> None:
        """existing: tensors that live already, in any nesting. owners: tensors whose gradients are
        counted apart too."""
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = 0
        self.on_host: dict[int, int] = {}
        self.owners = list(owners)
        self.instants: list[tuple[int, int]] = []  # all bytes, and those of the owners' gradients
        self.operations: list[str] = []
        self.note((existing, self.owners))

    def note(self, tensors: object) -> None:
        """Count the storages of these (any nesting) until they die."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if tensor.device.type == "meta":  # stands for the host's memory
                if key not in self.on_host:
                    weakref.finalize(storage, self.on_host.pop, key, 0)
                self.on_host[key] = storage.nbytes()
                continue
            if key not in self.sizes:
                weakref.finalize(storage, self.forget, key)
                self.sizes[key] = 0
            self.now += storage.nbytes() - self.sizes[key]
            self.sizes[key] = storage.nbytes()

    @property
    def host_tensors(self) -> tuple[int, ...]:
        """The bytes of each tensor that lives in the host's memory, the oldest first."""
        return tuple(self.on_host.values())

    def forget(self, key: int) -> None:
        """A storage has died."""
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(
        self,
        operation: Operator,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = kwargs or {}
        own = OPDEFS.get(operation.name())
        if own is None or operation.name() in CLOSED:
            out = operation(*args, **given)
        else:
            with self:  # an operator of ours: what it holds while it works counts too
                out = own._init_fn(*args, **given)
        if operation.namespace == "prim":  # a question about a tensor
            return out
        self.note((args, kwargs, out))
        self.operations.append(operation.name())
        self.instants.append((self.now, self.gradient_bytes()))
        return out

    def gradient_bytes(self) -> int:
        """The bytes of the owners' gradients."""
        total = 0
        for owner in self.owners:
            if owner.grad is not None:
                total += owner.grad.nbytes
        return total

    @property
    def peak(self) -> int:
        """The most bytes that lived at one time."""
        return max(now for now, _ in self.instants)
