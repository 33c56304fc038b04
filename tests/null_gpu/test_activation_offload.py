"""What blocks keep goes to the host and comes back on a stream of its own: the host waits for nothing, each tensor crosses once in
each direction, and the device holds less."""

import weakref
from unittest.mock import patch

import counts
import pytest
import torch
from conftest import tiny_config
from no_kernels import without_numbers

from longfire.config.settings import ActivationCheckpoint
from longfire.initialise import build
from longfire.model import Model
from longfire.ops.choice import choose
from longfire.parallel.activation_offload import ActivationOffload
from longfire.parallel.apply import parallelize
from longfire.planner.part import pinned_bytes

CUDA = torch.device("cuda", 0)
B, T = 2, 512
MIXERS = ("attention", "gla", "gated_delta_net", "mamba2")
WINDOW_BYTES = 2**20  # which a model of a few MiB fills


def model_of(mixer: str, keeping: ActivationCheckpoint, compiled: bool) -> Model:
    choose(CUDA, "auto")
    config = tiny_config(mixer, num_hidden_layers=6, hidden_size=128, intermediate_size=512)
    with without_numbers():
        model = build(config, 0, CUDA, torch.bfloat16)
    model = parallelize(model, compiled=compiled, keeping=keeping)
    if isinstance(model.saved_activations, ActivationOffload):
        model.saved_activations.window_bytes = WINDOW_BYTES
    return model


def forward_and_backward(model: Model) -> None:
    ids_BT = torch.zeros(B, T, dtype=torch.long, device=CUDA)
    model(ids_BT).sum().backward()


def most_held(model: Model) -> int:
    """Bytes of the device above what was there before, at the fullest moment of the second pass."""
    forward_and_backward(model)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward_and_backward(model)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_device_holds_less(mixer: str, compiled: bool):
    torch._dynamo.reset()
    with without_numbers():
        plain = most_held(model_of(mixer, ActivationCheckpoint(), compiled))
        offloaded = most_held(model_of(mixer, ActivationCheckpoint(offload=True), compiled))
    assert offloaded < 0.6 * plain
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["none", "block"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_host_waits_for_nothing(mixer: str, mode: str):
    with without_numbers():
        model = model_of(mixer, ActivationCheckpoint(mode, offload=True), compiled=False)
        forward_and_backward(model)  # allocates pinned memory
        before = counts.now()
        forward_and_backward(model)
        done = counts.now() - before
    assert done.waits == 0
    # The last ones are still there when the backward asks for them.
    assert 0 < done.to_device < done.to_host
    assert 0 < done.bytes_to_host - done.bytes_to_device <= 2 * WINDOW_BYTES


def test_the_host_holds_what_the_planner_counts():
    """Powers of two: torch pins no smaller block, and gives it to one tensor at a time."""
    copies: list[weakref.ref[torch.Tensor]] = []
    copy = ActivationOffload.copy

    def noted(self: ActivationOffload, x: torch.Tensor, device: torch.device):
        there, copied = copy(self, x, device)
        if device.type == "cpu":
            copies.append(weakref.ref(there))
        return there, copied

    with without_numbers(), patch.object(ActivationOffload, "copy", noted):
        model = model_of("attention", ActivationCheckpoint(offload=True), compiled=False)
        torch.empty(2**28, dtype=torch.uint8, pin_memory=True)  # then torch finds what is free
        before = torch.cuda.host_memory_stats()["active_bytes.current"]
        loss = model(torch.zeros(B, T - 100, dtype=torch.long, device=CUDA)).sum()
        held = torch.cuda.host_memory_stats()["active_bytes.current"] - before
    saved = [copy() for copy in copies]
    sizes = [x.untyped_storage().nbytes() for x in saved if x is not None]
    assert held == sum(pinned_bytes(size) for size in sizes) > 1.2 * sum(sizes) > 0
    assert loss.requires_grad  # its graph has lived until here


def test_copies_run_beside_the_computation():
    with without_numbers():
        model = model_of("attention", ActivationCheckpoint(offload=True), compiled=False)
        forward_and_backward(model)
    assert isinstance(model.saved_activations, ActivationOffload)
    stream = model.saved_activations.stream
    assert stream.stream_id != torch.cuda.current_stream(CUDA).stream_id
