"""gpu_check/joined_products.py: one product has the numbers of several, and the row names both times."""

import torch

from longfire.gpu_check.joined_products import described, joined_times, products


def test_one_product_has_the_outputs_and_the_gradient_of_several():
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    weights = [torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (8, 4, 4)]
    separate, d_x = products(x_ND, weights)
    (joined,), d_x_joined = products(x_ND, [torch.cat(weights)])
    assert torch.allclose(torch.cat(separate, 1), joined, rtol=1e-12)
    assert torch.allclose(d_x, d_x_joined, rtol=1e-12)


def test_the_row_has_both_times():
    seconds = joined_times(torch.device("cpu"), torch.float32, is_small=True)
    assert seconds.keys() == {
        "qkv_separate_seconds",
        "qkv_joined_seconds",
        "gate_up_separate_seconds",
        "gate_up_joined_seconds",
    }
    assert all(value > 0 for value in seconds.values())
    assert described(seconds).startswith("as one product q, k, v ")
