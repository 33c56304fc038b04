"""Lengths of documents on the device, whose numbers the host knows too.

fla's kernels allocate by numbers that they compute of these lengths on the device, and read them
with `.item()`: the host would wait for the device three times in each layer, and start no kernel
meanwhile. What is computed of KnownLengths is computed of the host's copy as well, `.item()` reads
that, and tables that fla makes on the host are copied without a wait.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from longfire.ops.device_copy import copy_to

# What is computed on both sides: functions that change nothing in place.
ON_BOTH = {
    "__add__",
    "__floordiv__",
    "__getitem__",
    "__sub__",
    "add",
    "cumsum",
    "diff",
    "floor_divide",
    "pad",
    "sub",
}


class KnownLengths(Tensor):
    """A tensor of the device. on_host: the same numbers on the CPU; None where they are not
    known, which costs a wait and changes nothing."""

    on_host: Tensor | None = None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "item" and args[0].on_host is not None:
            return args[0].on_host.item()
        if name == "to" and is_table_of_host(args):
            table, lengths = args
            return copy_to(table.to(lengths.dtype), lengths.device)
        result = super().__torch_function__(func, types, args, given)
        if name in ON_BOTH and isinstance(result, KnownLengths):
            tensors = [x for x in args if isinstance(x, Tensor)]
            if all(isinstance(x, KnownLengths) and x.on_host is not None for x in tensors):
                result.on_host = func(*map(host_side, args), **given)
        return result


def is_table_of_host(args: Sequence[Any]) -> bool:
    """Whether `.to` is asked to copy a table, which the host made, to where the lengths are."""
    if len(args) != 2 or isinstance(args[0], KnownLengths):
        return False
    return isinstance(args[1], KnownLengths)


def host_side(x: Any) -> Any:
    return x.on_host if isinstance(x, KnownLengths) else x


def known_lengths(cu_lengths: Tensor, cu_lengths_cpu: Tensor) -> Tensor:
    """The lengths with the host's copy of them: the same object for the same tensor, since fla
    keeps its tables by identity."""
    known = getattr(cu_lengths, "known", None)
    if known is None:
        # `.data`: a view would hold the lengths, and they hold it
        known = cu_lengths.data.as_subclass(KnownLengths)
        known.on_host = cu_lengths_cpu
        cu_lengths.known = known  # type: ignore[attr-defined]  # lives as long as the lengths do
    return known
