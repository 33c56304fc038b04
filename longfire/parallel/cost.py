"""What a step costs on devices that are not here: their numbers, and one formula for each thing
that takes time.

Everything is bytes, FLOPs and seconds of one process. The formulas are first-order: they rank plans
and say what binds; a measured step (`longfire bench`) is the reference. docs/planning.md states
them once more, with what they leave out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from longfire.device import PEAK_FLOPS
from longfire.errors import SettingsError
from longfire.parallel.stages import ROUNDS, STAGES_EACH, V_SHAPED

GIB = 2**30
UNITS = {
    "B": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": GIB,
    "TIB": 2**40,
}

# Share of a device's memory that tensors may fill: the rest is the context, the buffers of NCCL and
# what the allocator cannot join.
USABLE_MEMORY = 0.92
# Share of its data sheet's bandwidth that a collective of some MB reaches: an assumption, below
# what large messages show.
LINK_EFFICIENCY = 0.8
# The optimizer's passes over a parameter, fp32: the norm reads g, clipping reads and writes g,
# AdamW reads p, g, m, v, writes p, m, v.
OPTIMIZER_BYTES = 4 * (1 + 2 + 7)
ZERO_BUBBLE = {"InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"}
LATENCY = (
    10e-6  # seconds before a message's first byte: a kernel's launch and a handshake; an assumption
)
HOST_LINK = 50e9  # bytes/s between a device and the host's memory (PCIe 5 x16: 63)
HOST_MEMORY = (
    40e9  # bytes/s of the host's memory that is one device's share, where the optimizer then runs
)


@dataclass(frozen=True)
class Device:
    """One device of a cluster. Rates are a second's; bandwidths are one direction's, of one device.

    efficiency: share of `flops` that large training steps reach in their matrix products, attention
    and all between them.
    node: devices that are joined by `link`; `network`: between nodes. host_bytes: its share of its
    machine's memory.
    """

    name: str
    memory_bytes: float
    flops: Mapping[str, float]  # by compute type
    memory_bandwidth: float
    link: float
    network: float
    node: int = 8
    efficiency: float = 0.5
    host_bytes: float = 250e9  # 2 TB for eight devices, as in a DGX A100 640GB, H100 and H200

    @property
    def usable_bytes(self) -> float:
        return USABLE_MEMORY * self.memory_bytes


# Numbers of the makers' data sheets: NVIDIA A100, H100 SXM5 and PCIe, H200, B200, L40S. `link` is
# half of what they call NVLink's bandwidth, which counts both directions (PCIe where there is
# none); `network`: 400 Gbit/s for each device, as in a DGX H100; 200 for A100 and cards. efficiency
# is an assumption, not a measurement: what is left of the peak when all communication is taken off.
DEVICES = {
    device.name: device
    for device in (
        Device(
            "a100-40gb",
            40e9,
            {"bfloat16": PEAK_FLOPS["A100"], "float32": 19.5e12},
            1.555e12,
            300e9,
            25e9,
            8,
            0.6,
            125e9,  # 1 TB for eight, as in a DGX A100 320GB
        ),
        Device(
            "a100-80gb",
            80e9,
            {"bfloat16": PEAK_FLOPS["A100"], "float32": 19.5e12},
            2.039e12,
            300e9,
            25e9,
            8,
            0.6,
        ),
        Device(
            "h100-80gb",
            80e9,
            {"bfloat16": PEAK_FLOPS["H100"], "float32": 67e12},
            3.35e12,
            450e9,
            50e9,
        ),
        Device(
            "h100-pcie",
            80e9,
            {"bfloat16": PEAK_FLOPS["H100 PCIe"], "float32": 51e12},
            2.0e12,
            63e9,
            25e9,
        ),
        Device(
            "h200-141gb",
            141e9,
            {"bfloat16": PEAK_FLOPS["H200"], "float32": 67e12},
            4.8e12,
            450e9,
            50e9,
        ),
        Device(
            "b200-180gb",
            180e9,
            {"bfloat16": PEAK_FLOPS["B200"], "float32": 80e12},
            7.7e12,
            900e9,
            50e9,
            8,
            0.45,
        ),
        Device(
            "l40s-48gb",
            48e9,
            {"bfloat16": PEAK_FLOPS["L40S"], "float32": 91.6e12},
            0.864e12,
            32e9,
            25e9,
        ),
    )
}
DEFAULT_DEVICE = "h100-80gb"
# A core of a CPU whose processes talk through gloo: of the order of what one shows, to choose by
# and not to forecast with.
CPU = Device("cpu", 8e9, {"bfloat16": 5e10, "float32": 5e10}, 1e10, 1e9, 1e9)


def device_of(name: str, memory: str = "", host_memory: str = "") -> Device:
    """The device of this name, with another memory, or share of its machine's memory, if one is
    given. Raises SettingsError naming those that are known."""
    if name not in DEVICES:
        raise SettingsError(
            f"--device = {name!r} is not one of {', '.join(DEVICES)}; take the nearest and say "
            "--memory"
        )
    device = DEVICES[name]
    if memory:
        device = replace(device, memory_bytes=bytes_of(memory, "--memory"))
    if host_memory:
        device = replace(device, host_bytes=bytes_of(host_memory, "--host-memory"))
    return device


def device_here(name: str, memory_bytes: float) -> Device:
    """What stands here, by torch's name of it ("NVIDIA H100 80GB HBM3"); a CPU where that is "".
    One that the table does not have counts as DEFAULT_DEVICE with its own memory."""
    if not name:
        return CPU
    pcie = "h100-pcie" if "H100" in name and "PCIe" in name else ""
    known = [
        key for key in DEVICES if key.split("-")[0].upper() in name.upper() and key != "h100-pcie"
    ]
    nearest = min(
        known or [DEFAULT_DEVICE],
        key=lambda key: abs(DEVICES[key].memory_bytes - memory_bytes),
    )
    return replace(DEVICES[pcie or nearest], memory_bytes=memory_bytes)


def bytes_of(text: str, option: str) -> float:
    """80GB -> 80e9, 80GiB -> 80 * 2^30. Raises SettingsError naming the option."""
    number = text.strip().rstrip("BbIiKkMmGgTt")
    unit = text.strip()[len(number) :].upper() or "B"
    try:
        size = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        raise SettingsError(f"{option} = {text!r} is no size: write it as 80GB or 80GiB") from None
    if not 0 < size < float("inf"):
        raise SettingsError(f"{option} = {text!r} must be above 0")
    return size


def bandwidth(device: Device, size: int, inner: int) -> float:
    """Bytes/s of one process in a ring of `size` processes that are `inner` ranks apart (the
    product of the axes inside).

    Within a node: its link. Every hop over the network: the network. Else several of the ring are
    in each node, and it leaves a node by as many network cards as it has processes there, but never
    faster than the link.
    """
    if size * inner <= device.node:
        rate = device.link
    else:
        rate = min(device.link, device.network * max(1, device.node // inner))
    return LINK_EFFICIENCY * rate


def between_neighbours(device: Device, size: int, inner: int) -> float:
    """Bytes/s from one process to another of `size` that are `inner` ranks apart, while all do the
    same. Where they are not in one node a process has one network card, and who sends to another
    node is what the others wait for."""
    return LINK_EFFICIENCY * (
        device.link if size * inner <= device.node else min(device.link, device.network)
    )


def gathered_bytes(whole: float, size: int) -> float:
    """What a process sends when `size` of them all-gather, or reduce-scatter, `whole` bytes by a
    ring: (n - 1) / n of them."""
    return whole * (size - 1) / size


def reduced_bytes(whole: float, size: int) -> float:
    """What a process sends to all-reduce `whole` bytes by a ring: a reduce-scatter and an
    all-gather."""
    return 2 * gathered_bytes(whole, size)


def compute_seconds(flops: float, device: Device, dtype: str) -> float:
    """FLOPs of one process, recomputed ones included, at the device's efficiency."""
    return flops / (device.efficiency * device.flops[dtype])


def optimizer_seconds(
    parameters: float,
    device: Device,
    offloaded: bool,
) -> float:
    """Clipping and AdamW over so many parameters of one process: passes over memory. Offloaded: the
    same in the host's memory, and gradients down and parameters up over the host's link."""
    if offloaded:
        return parameters * (OPTIMIZER_BYTES / HOST_MEMORY + 8 / HOST_LINK)
    return parameters * OPTIMIZER_BYTES / device.memory_bandwidth


def bubble(processes: int, microbatches: int, schedule: str) -> float:
    """Idle share of a pipeline: (p - 1) / (v m + p - 1) with v stages on each of p processes (Huang
    2019; Narayanan 2021).

    Zero-bubble schedules split the backward in two and fill two thirds of that (Qi 2023).
    """
    idle = (processes - 1) / STAGES_EACH.get(schedule, 1)
    if schedule in ZERO_BUBBLE:
        idle /= 3
    return idle / (microbatches + idle)


def in_flight(
    process: int,
    processes: int,
    microbatches: int,
    schedule: str,
) -> float:
    """Micro-batches whose activations a process holds at one time, of all its layers: p - process
    with 1F1B; with v stages each, 2 (p - process - 1) + (v - 1) p + 1 passes through one of them
    (Narayanan 2021, section 2.2); p where stages lie in a V; else all.
    """
    stages = STAGES_EACH.get(schedule, 1)
    if schedule == "1F1B":
        held = float(processes - process)
    elif schedule in ROUNDS:
        held = (2 * (processes - process - 1) + (stages - 1) * processes + 1) / stages
    else:
        held = float(processes) if schedule in V_SHAPED else float(microbatches)
    return min(held, microbatches)
