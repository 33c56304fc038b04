"""RWKV-7: how its parameters begin, and what goes from its first layer to the others."""

import pytest
import torch
from conftest import tiny_config, tiny_model

from longfire.initialise import build
from longfire.ops.sequence_ops import LocalSequence


def test_parameters_begin_as_flas_do():
    """Numbers of fla 0.6.0's own class: hidden size 32, heads of 8, layers 0 and 1 of 3."""
    model = build(tiny_config("rwkv7", num_hidden_layers=3), 0)
    first, second = (model.layers[i].mixer for i in (0, 1))
    close = torch.testing.assert_close
    close(first.x_r[0, 0, [1, 31]], torch.tensor([1 - (1 / 32) ** 0.2, 1 - (31 / 32) ** 0.2]))
    close(second.x_w[0, 0, [1]], torch.tensor([1 - (1 / 32) ** 0.6]))
    close(first.k_k[[0, 31]], torch.tensor([0.76, 0.66]))
    zigzag = torch.tensor([-1.0, -((5 / 7) ** 2), 1.0])  # of channels 0, 1 and 7 of a head
    close(
        first.a_lora.lora[2].bias[[0, 1, 7]],
        -0.19 + 0.3 * zigzag + 0.4 * (torch.tensor([0, 1, 7]) / 31 - 0.5),
    )
    close(first.w_lora.lora[2].bias[[0, 31]], torch.tensor([-8.0, 3.0]))
    close(second.w_lora.lora[2].bias[[31]], torch.tensor([3.0]))
    close(second.v_lora.lora[2].bias[[0, 31]], torch.tensor([0.93, 0.53]))
    close(second.g_norm.weight, torch.full((32,), (2 / 3) ** 0.7))
    assert (
        first.v_lora is None
        and not first.o_proj.weight.any()
        and not first.w_lora.lora[0].weight.any()
    )
    for weight, gain in (
        (first.r_proj.weight, 1.0),
        (first.k_proj.weight, 0.1),
        (second.v_proj.weight, 1.0),
    ):
        close(weight @ weight.T, gain**2 * torch.eye(32), atol=1e-5, rtol=0)
    close(second.v_lora.lora[2].weight.norm(dim=0), torch.full((4,), 0.1))
    close(model.layers[1].mlp.x_k[[1]], torch.tensor([1 - (1 / 32) ** (2 / 3) ** 4]))


@pytest.mark.parametrize(
    "types", [("attention", "rwkv7", "rwkv7"), ("rwkv7", "gla", "rwkv7")], ids="-".join
)
def test_the_first_layer_of_its_kind_leaves_its_values_to_the_next_one(types):
    model = tiny_model(*types)
    mixers = [block.mixer for block, name in zip(model.layers, types) if name == "rwkv7"]
    assert mixers[0].v_lora is None and mixers[1].v_lora is not None
    seen = []
    mixers[1].v_lora.register_forward_hook(
        lambda module, inputs, y: torch.full_like(y, 50.0)
    )  # all of the first

    class Listening(LocalSequence):
        def recurrence(self, op, r, k, v, *rest, **more):
            seen.append(v)
            return super().recurrence(op, r, k, v, *rest, **more)

    model.local_ops = Listening()
    mixers[0].v_proj.register_forward_hook(lambda module, inputs, y: seen.append(y))
    model(torch.arange(20)[None])
    torch.testing.assert_close(seen[-1].flatten(-2), seen[0])
