"""Which form of each op runs: decided once, before a run starts, and never changed on the way.

A kernel that cannot do what is asked raises; no other form takes its place.
"""

import importlib
import importlib.util
from typing import Literal

import torch

from longfire.errors import SettingsError
from longfire.ops.forms import OPS, Choice, decided

Wanted = Literal["auto", "torch", "reference"]

OF_TRITON = (
    "attention_with_dropout",
    "linear_cross_entropy",
    "selective_scan",
)  # ops with kernels of our own
WITHOUT_KERNEL = {  # the reason why our own form runs on every device
    "previous_token": (
        "a copy of the row on every device; fla's kernel gives x_{t-1} - x_t, rounded"
    ),
}
OF_FLA = tuple(op for op in OPS if op not in ("attention", *OF_TRITON, *WITHOUT_KERNEL))


def choose(device: torch.device, wanted: Wanted) -> dict[str, Choice]:
    """Decide for each op which form runs on this device, remember it, and return the table for
    printing.

    Raises SettingsError if the kernels that `auto` would take are installed but cannot be imported.
    """
    decided.clear()
    if wanted == "reference":
        decided.update(dict.fromkeys(OPS, Choice("reference", "model.kernels = reference")))
        return dict(decided)
    decided["attention"] = Choice("torch", attention_kernels(device))
    others = (*OF_TRITON, *OF_FLA, *WITHOUT_KERNEL)
    if wanted == "torch":
        decided.update(dict.fromkeys(others, Choice("torch", "model.kernels = torch")))
    elif device.type != "cuda":
        why = f"kernels of Triton and fla need CUDA, the device is {device.type}"
        decided.update(dict.fromkeys(others, Choice("torch", why)))
    else:
        decided.update(dict.fromkeys(OF_TRITON, triton_choice()))
        decided.update(dict.fromkeys(OF_FLA, fla_choice()))
        for op, why in WITHOUT_KERNEL.items():
            decided[op] = Choice("torch", why)
    return dict(decided)


def choose_where_nobody_has(device: torch.device) -> None:
    """`choose` of itself, for a model that another library has loaded."""
    if not decided:
        choose(device, "auto")


def describe(choices: dict[str, Choice]) -> list[str]:
    """A line for each choice with the ops that share it, so that a reason is shown once."""
    names: dict[Choice, list[str]] = {}
    for op, choice in choices.items():
        names.setdefault(choice, []).append(op)
    return [f"{', '.join(ops)}: {choice.name} ({choice.why})" for choice, ops in names.items()]


def attention_kernels(device: torch.device) -> str:
    """Which of torch's kernels attention meets on this device: ops/attention.py chooses by device,
    dtype and head size."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return (
            "torch's SDPA; documents and windows: varlen flash attention for bf16 and heads of 8, "
            "16 ... 256, else a call for each document and block"
        )
    return "torch's SDPA; a call for each document and block of a window"


def triton_choice() -> Choice:
    """For ops with kernels of our own, on CUDA."""
    if importlib.util.find_spec("triton") is None:
        return Choice("torch", "triton is not installed: pip install 'longfire[cuda]'")
    return Choice("triton", "CUDA, and Triton is installed")


def fla_choice() -> Choice:
    """For ops with kernels of fla, on CUDA."""
    for name in ("fla", "triton"):
        if importlib.util.find_spec(name) is None:
            return Choice("torch", f"{name} is not installed: pip install 'longfire[cuda]'")
    try:
        importlib.import_module("longfire.ops.fast.kernels")
    except ImportError as e:
        raise SettingsError(
            f"fla is installed but its kernels cannot be imported ({e}): fix it with "
            "pip install 'longfire[cuda]', or set model.kernels = torch"
        ) from e
    return Choice("fla", "CUDA, and fla is installed")
