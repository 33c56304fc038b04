"""What blocks keep goes to the host and comes back on a stream of its own: the host waits for nothing, each tensor crosses once in
each direction, and the device holds less."""

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


def test_copies_run_beside_the_computation():
    with without_numbers():
        model = model_of("attention", ActivationCheckpoint(offload=True), compiled=False)
        forward_and_backward(model)
    assert isinstance(model.saved_activations, ActivationOffload)
    stream = model.saved_activations.stream
    assert stream.stream_id != torch.cuda.current_stream(CUDA).stream_id
