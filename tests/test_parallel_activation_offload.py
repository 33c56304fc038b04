"""parallel/activation_offload.py: gradients to the bit for any window; each tensor is copied once; what is in transit is bounded."""

from dataclasses import replace
from unittest.mock import patch

import plans
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import in_processes

from longfire.model import Model
from longfire.parallel.activation_offload import (
    ActivationOffload,
    InTransit,
    SavedByForward,
    SavedOnHost,
    Window,
)
from longfire.parallel.apply import roots
from longfire.parallel.mesh import Mesh

T, D = 32, 16
TENSOR_BYTES = T * D * 8
FOUR_LAYERS = ("gla", "attention", "gla", "attention")
WINDOWS = {"none": 0, "two tensors": 2 * TENSOR_BYTES, "all": 2**30}


class Projections(nn.Module):
    """Three matrices and one input; one of their products is saved as a transpose."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name in "abc":
            weight = torch.randn(D, D, dtype=torch.float64, generator=generator) / D**0.5
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, x_TD: Tensor) -> Tensor:
        mixed_TD = torch.sigmoid(x_TD @ self.a) * (x_TD @ self.b)
        return x_TD + mixed_TD @ (x_TD.T @ (x_TD @ self.c)) / T


def model_of(layers: int = 4) -> nn.ModuleList:
    return nn.ModuleList(Projections(seed) for seed in range(layers))


def run_blocks(model: nn.ModuleList, x_TD: Tensor, offload: ActivationOffload | None) -> Tensor:
    if offload is None:
        for block in model:
            x_TD = block(x_TD)
        return x_TD
    with offload():
        return run_blocks(model, x_TD, None)


def input_of(seed: int) -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients_of(model: nn.ModuleList) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def same_bits(one: nn.ModuleList, other: nn.ModuleList) -> None:
    for name, gradient in gradients_of(one).items():
        assert gradient.equal(gradients_of(other)[name]), name


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_gradients_are_the_same_to_the_bit(window: int):
    """Several forwards before the first backward, as in a pipeline; the last one's first."""
    plain, offloaded = model_of(), model_of()
    offload = ActivationOffload(window_bytes=window)
    for model, how in ((plain, None), (offloaded, offload)):
        outputs = [run_blocks(model, input_of(seed), how) for seed in range(3)]
        for output_TD in reversed(outputs):
            output_TD.square().sum().backward()
    same_bits(plain, offloaded)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_a_graph_that_is_used_twice(window: int):
    plain, offloaded = model_of(), model_of()
    for model, how in ((plain, None), (offloaded, ActivationOffload(window_bytes=window))):
        loss = run_blocks(model, input_of(0), how).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    same_bits(plain, offloaded)


def test_each_tensor_goes_once_and_comes_back_once():
    """Three products save the same input."""
    offload = ActivationOffload(window_bytes=0)
    to_host: list[tuple[int, ...]] = []
    to_device: list[tuple[int, ...]] = []
    copy = ActivationOffload.copy

    def counted(self: ActivationOffload, x: Tensor, device: torch.device):
        (to_device if is_backward else to_host).append(tuple(x.shape))
        return copy(self, x, device)

    is_backward = False
    with patch.object(ActivationOffload, "copy", counted):
        loss = run_blocks(model_of(1), input_of(0), offload).sum()
        is_backward = True
        loss.backward()
    # x; its transpose; the sigmoid; x @ b; their product; x.T @ x @ c
    kept = [(T, D), (D, T), (T, D), (T, D), (T, D), (D, D)]
    assert sorted(to_host) == sorted(kept)
    assert sorted(to_device) == sorted(kept)


def test_what_is_in_transit_is_bounded():
    window = 3 * TENSOR_BYTES
    offload = ActivationOffload(window_bytes=window)
    seen: list[int] = []
    add = Window.add

    def counted(self: Window, transit: object) -> None:
        add(self, transit)
        seen.append(self.bytes)

    with patch.object(Window, "add", counted):
        run_blocks(model_of(), input_of(0), offload).sum().backward()
    assert window <= max(seen) <= window + TENSOR_BYTES
    assert offload.to_device.bytes == 0


def test_what_comes_back_has_been_asked_for_before():
    """A block's worth ahead: no tensor is fetched when it is asked for only. The first ones have not left."""
    offload = ActivationOffload(window_bytes=6 * TENSOR_BYTES)
    asked: list[bool] = []
    unpack = ActivationOffload.unpack

    def seen(self: ActivationOffload, saved: object) -> Tensor:
        if isinstance(saved, SavedOnHost):
            asked.append(saved.transit is not None)
        return unpack(self, saved)

    with patch.object(ActivationOffload, "unpack", seen):
        run_blocks(model_of(), input_of(0), offload).sum().backward()
    assert all(asked) and len(asked) > 20


def nothing_is_left(offload: ActivationOffload) -> bool:
    """After the next forward has begun."""
    with offload():
        pass
    windows = (offload.to_host, offload.to_device)
    return not any(window.bytes or window.by_forward for window in windows)


def test_a_graph_that_is_dropped_leaves_nothing():
    offload = ActivationOffload(window_bytes=2**30)
    output_TD = run_blocks(model_of(), input_of(0), offload)
    assert offload.to_host.bytes > 0
    del output_TD
    assert nothing_is_left(offload)


def test_half_a_backward_leaves_nothing():
    """What was fetched ahead for nodes that nobody asked for is dropped with its graph."""
    offload = ActivationOffload(window_bytes=6 * TENSOR_BYTES)
    model = model_of(3)
    output_TD = run_blocks(model, input_of(0), offload)
    torch.autograd.grad(output_TD.sum(), model[2].a)
    assert offload.to_device.bytes > 0
    del output_TD
    assert nothing_is_left(offload)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_inputs_first_and_weights_later(window: int):
    """The order of pipelines without bubbles."""
    plain, offloaded = model_of(), model_of()
    for model, how in ((plain, None), (offloaded, ActivationOffload(window_bytes=window))):
        x_TD = input_of(0).requires_grad_()
        loss = run_blocks(model, x_TD, how).square().sum()
        torch.autograd.grad(loss, x_TD, retain_graph=True)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients):
            parameter.grad = gradient
    same_bits(plain, offloaded)


def test_the_work_of_the_host_grows_with_the_number_of_tensors(monkeypatch):
    """And not with its square: thousands of small ones fill a window."""
    looks = 0
    add = SavedByForward.append

    class Looked(list):
        def __getitem__(self, place):
            nonlocal looks
            looks += 1
            return super().__getitem__(place)

    def appending(self: SavedByForward, saved: SavedOnHost) -> None:
        self.saved = self.saved if isinstance(self.saved, Looked) else Looked()
        add(self, saved)

    def asked(self: InTransit) -> bool:
        nonlocal looks
        looks += 1
        return False  # the copies take long

    monkeypatch.setattr(SavedByForward, "append", appending)
    monkeypatch.setattr(InTransit, "is_copied", asked)
    counts = []
    for tensors in (100, 400):
        looks = 0
        offload = ActivationOffload(window_bytes=tensors * D * 8 // 2)
        weights = [torch.ones(D, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        outputs = []
        for weight in weights:
            with offload():
                y_D = input_of(0)[0]
                for _ in range(tensors):
                    y_D = y_D * weight
            outputs.append(y_D.sum())
        for output in outputs:  # as in a pipeline: the second one's are still on their way
            output.backward()
        counts.append(looks)
    assert 0 < counts[1] <= 5 * counts[0]


def test_a_tensor_that_is_changed_in_place_is_found():
    """As autograd finds it where nothing is offloaded."""
    offload = ActivationOffload(window_bytes=2**30)
    weight = torch.ones(D, D, dtype=torch.float64, requires_grad=True)
    x_TD = input_of(0)
    with offload():
        output_TD = x_TD @ weight
    x_TD.add_(1)
    with pytest.raises(AssertionError, match="changed in place"):
        output_TD.sum().backward()


@pytest.mark.parametrize("window", [0, 2 * TENSOR_BYTES], ids=["none", "two tensors"])
def test_a_tensor_that_is_changed_while_it_leaves_is_found(window: int):
    """On CUDA its copy may have old numbers and new ones. With no window it was there before."""
    weight = torch.ones(T, D, dtype=torch.float64, requires_grad=True)
    x_TD = input_of(0)
    with ActivationOffload(window_bytes=window)():
        output_TD = x_TD * weight
        x_TD.add_(1)
        for seed in range(3):
            output_TD = output_TD * input_of(seed)
    if window > 0:
        with pytest.raises(AssertionError, match="changed in place"):
            output_TD.sum().backward()
    else:
        output_TD.sum().backward()
        assert weight.grad.equal(input_of(2) * input_of(1) * input_of(0) * input_of(0))


def test_the_imaginary_part_of_a_conjugate_is_another_tensor():
    """It is in the same memory, with a bit that changes its sign."""
    weight = torch.ones(T, D, dtype=torch.float64, requires_grad=True)
    z_TD = torch.complex(input_of(0), input_of(1))
    with ActivationOffload()():
        output_TD = weight * z_TD.imag + weight * z_TD.conj().imag
    output_TD.sum().backward()
    assert weight.grad.equal(torch.zeros(T, D, dtype=torch.float64))


def test_strides_stay_as_they_are():
    """Compiled code relies on them."""
    offload = ActivationOffload(window_bytes=0)
    found: list[tuple[int, ...]] = []

    class Strides(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, *views: Tensor) -> Tensor:
            ctx.save_for_backward(*views)
            return x.clone()

        @staticmethod
        def backward(ctx, d_x: Tensor):
            found.extend(view.stride() for view in ctx.saved_tensors)
            return d_x, None, None

    x_TD = input_of(0)
    views = x_TD.T, x_TD[:, 3:9]
    with offload():
        output = Strides.apply(x_TD.requires_grad_(), *(view.detach() for view in views))
    output.sum().backward()
    assert found == [view.stride() for view in views]


def test_what_is_copied_is_dense():
    """A copy between devices of what has gaps is none that runs beside the host."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation is torch.ops.aten.copy_.default:
                dense.append(all(x.is_contiguous() for x in args[:2]))
            return operation(*args, **(kwargs or {}))

    dense: list[bool] = []
    weight = torch.ones(T, 6, dtype=torch.float64, requires_grad=True)
    columns_TD = input_of(0)[:, 3:9]
    with Copies(), ActivationOffload(window_bytes=0)():
        (columns_TD * weight).sum().backward()
        (torch.empty(0, 6, dtype=torch.float64) * weight[:0]).sum().backward()
    assert all(dense) and len(dense) == 3  # nothing comes back of 0 bytes: they did not leave
    assert weight.grad.equal(columns_TD)


def test_weights_whole_numbers_and_expanded_tensors_stay():
    offload = ActivationOffload(window_bytes=0)
    one, other = model_of(1)[0].a, model_of(1)[0].b
    number = torch.ones((), dtype=torch.float64, requires_grad=True)
    with patch.object(ActivationOffload, "copy", side_effect=AssertionError("copied")), offload():
        products = [one * other, one @ other.T, number.expand(D, D) * one]
        picked = input_of(0).requires_grad_()[torch.arange(3)]
    saved = [products[0].grad_fn._saved_self, products[0].grad_fn._saved_other]
    assert [x.data_ptr() for x in saved] == [one.data_ptr(), other.data_ptr()]
    (sum(product.sum() for product in products) + picked.sum()).backward()


def counted_fetches(model: Model, window_bytes: int) -> list[int]:
    """Let the offload of a model take this window; the numbers of what it fetches from now on."""
    offload = roots(model)[0].saved_activations
    assert isinstance(offload, ActivationOffload)
    offload.window_bytes = window_bytes
    fetch = offload.fetch
    fetched: list[int] = []

    def counted(saved: SavedOnHost) -> InTransit:
        fetched.append(saved.number)
        return fetch(saved)

    offload.fetch = counted
    return fetched


def steps_of_pipeline(rank: int, schedule: str) -> int:
    """Two steps with and without offload, to the bit; how many tensors came back."""
    mesh = Mesh.of_degrees({"pp": 2}, "cpu")
    plain = plans.Plan({"pp": 2}, {"pipeline_parallel_schedule": schedule})
    expected = plans.state_of(FOUR_LAYERS, plain, mesh, torch.float64)
    state = plans.state_of(FOUR_LAYERS, replace(plain, offload=True), mesh, torch.float64)
    fetched = counted_fetches(state.model, window_bytes=2**12)  # of a few tensors
    assert plans.steps(state, 2, microbatches=4) == plans.steps(expected, 2, microbatches=4)
    found = plans.parts(state)
    for name, boxes in plans.parts(expected).items():
        for (_, numbers), (_, wanted) in zip(found[name], boxes, strict=True):
            assert numbers.equal(wanted), name
    return len(fetched)


@pytest.mark.parametrize(
    "schedule", ["1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
)
def test_no_schedule_of_a_pipeline_changes_a_step(schedule: str):
    """Some of them ask for gradients of inputs first, and of weights later."""
    assert all(fetched > 0 for fetched in in_processes(2, steps_of_pipeline, schedule))
