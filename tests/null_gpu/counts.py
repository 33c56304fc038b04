"""What the stand-in has counted in this process: counts.h, read through ctypes."""

import ctypes
import os
from dataclasses import dataclass, fields


@dataclass
class Counts:
    """Calls and bytes since the process began; fields in the order of counts.h."""

    launches: int
    matmuls: int
    triton_launches: int
    to_device: int
    to_host: int
    on_device: int
    fills: int
    stream_waits: int
    event_waits: int
    device_waits: int
    allocations: int
    bytes_to_device: int
    bytes_to_host: int
    bytes_on_device: int

    def __sub__(self, other: "Counts") -> "Counts":
        differences = []
        for field in fields(self):
            differences.append(getattr(self, field.name) - getattr(other, field.name))
        return Counts(*differences)

    @property
    def waits(self) -> int:
        """Times that the host waited for the device."""
        return self.stream_waits + self.event_waits + self.device_waits


def is_loaded() -> bool:
    """Whether this process has the stand-in for a GPU."""
    return "LONGFIRE_NULL_GPU" in os.environ


def now() -> Counts:
    """The counts so far."""
    library = ctypes.CDLL(None)
    library.null_gpu_count.restype = ctypes.c_long
    return Counts(*(library.null_gpu_count(i) for i in range(len(fields(Counts)))))
