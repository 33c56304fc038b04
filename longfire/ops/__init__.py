"""Functions on tensors: a slow readable reference beside the fast form, one signature; the only
importer of kernel libraries.

Which form runs is decided once, by `choose`, before a run starts, and never changes on the way: a
kernel that cannot do what is asked raises. `longfire doctor` compares every fast form with its
reference on the machine at hand.

    documents.py         where documents lie in a batch of packed sequences
    bf16.py              whether a device multiplies bf16 in hardware
    linear.py            which type is computed in; products with fp32 master weights
    norm.py              normalisations
    mlp.py               activations of MLPs, and the products of gates
    rope.py              rotary positions
    dropout.py           dropout that no plan changes
    attention.py         softmax attention
    attention_blocks.py  the same of keys that come block by block
    blockwise.py         the same in chunks of queries and keys
    short_conv.py        short causal convolution
    token_shift.py       each token beside the one before it
    sequence_ops.py      what a mixer calls to look along the sequence: seq.ops
    attention_choice.py  which attention it then computes, as [attention] says
    feature_maps.py      what queries and keys pass before linear attention
    chunkwise.py         what every chunkwise recurrence is made of
    value_tree.py        decays of the channels of values inside a chunk
    low_rank.py          what the delta rule and DPLR share
    linear_attention.py  linear attention with decay
    delta_rule.py        the delta rule with decay
    dplr.py              diagonal plus low rank
    selective_scan.py    Mamba's scan
    maps/                what a segment of a sequence does to the state
    vocabulary.py        logits, and what of a vocabulary is on this process
    cross_entropy.py     the head and the loss as one
    kernels.py           fla's kernels behind our signatures
"""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

from longfire.errors import SettingsError

Wanted = Literal["auto", "torch", "reference"]


class Choice(NamedTuple):
    # "torch": our own forms on torch; "fla": flash-linear-attention's kernels; "reference": the
    # readable reference implementation
    name: str
    why: str


WITHOUT_KERNEL = {  # the reason why our own form runs on every device
    "selective_scan": "fla has no kernel of Mamba's scan: our own loop runs on every device",
    "previous_token": "a copy on every device; fla's kernel gives x_{t-1} - x_t, rounded",
}
RECURRENT = ("linear_attention", "delta_rule", "dplr", "short_conv", *WITHOUT_KERNEL)
OPS = ("attention", *RECURRENT)

_choices: dict[str, Choice] = {}
_as_on_cuda = _only_shapes = False


def choose(device: torch.device, wanted: Wanted) -> dict[str, Choice]:
    """Decide for each op which form runs on this device, remember it, and return the table for
    printing.

    Raises SettingsError if the kernels that `auto` would take are installed but cannot be imported.
    """
    _choices.clear()
    if wanted == "reference":
        _choices.update(dict.fromkeys(OPS, Choice("reference", "model.kernels = reference")))
        return dict(_choices)
    _choices["attention"] = Choice("torch", attention_kernels(device))
    recurrent = recurrent_choice(device, wanted)
    _choices.update(dict.fromkeys(RECURRENT, recurrent))
    if recurrent.name == "fla":
        _choices.update({op: Choice("torch", why) for op, why in WITHOUT_KERNEL.items()})
    return dict(_choices)


def choose_where_nobody_has(device: torch.device) -> None:
    """`choose` of itself, for a model that another library has loaded."""
    if not _choices:
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


def recurrent_choice(device: torch.device, wanted: Wanted) -> Choice:
    if wanted == "torch":
        return Choice("torch", "model.kernels = torch")
    if device.type != "cuda":
        return Choice("torch", f"fla's kernels need CUDA, the device is {device.type}")
    missing = []
    for name in ("fla", "triton"):
        if importlib.util.find_spec(name) is None:
            missing.append(name)
    if missing:
        return Choice("torch", f"{missing[0]} is not installed: pip install 'longfire[cuda]'")
    try:
        importlib.import_module("longfire.ops.kernels")
    except ImportError as e:
        raise SettingsError(
            f"fla is installed but its kernels cannot be imported ({e}): fix it with "
            "pip install 'longfire[cuda]', or set model.kernels = torch"
        ) from e
    return Choice("fla", "CUDA, and fla is installed")


def chosen(op: str) -> str:
    """The form of this op that runs: "torch" until `choose` was called."""
    assert op in OPS, f"{op} has no choice of forms"
    if op in _choices:
        return _choices[op].name
    return "torch"


def as_on_cuda() -> bool:
    """Whether what a CPU would do for itself alone is left out, so that what a step holds is what
    it would hold on CUDA."""
    return _as_on_cuda


def only_shapes() -> bool:
    """Whether tensors have no numbers: of a loop whose rounds hold alike, some say what all
    hold."""
    return _only_shapes


@contextmanager
def pretending_cuda(pretend: bool = True) -> Iterator[None]:
    """Inside, fake tensors of the planner take the paths of a CUDA device that is not here (or, not
    pretending, those of the CPU)."""
    global _as_on_cuda, _only_shapes
    before = _as_on_cuda, _only_shapes
    _as_on_cuda = pretend
    _only_shapes = True
    try:
        yield
    finally:
        _as_on_cuda, _only_shapes = before
