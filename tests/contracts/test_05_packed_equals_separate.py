"""Promise 5: logits and gradients of a document do not change when its neighbours in the row do. Here for mixers side by side; of
each mixer alone in test_every_mixer.py."""

import pytest
import torch

from longfire.mixers.mixer import Sequence
from longfire.ops.documents import Documents

LENGTHS = (5, 37, 1, 70, 2)  # shorter and longer than a convolution, a sub-chunk and a chunk


def packed_sequence(lengths: tuple[int, ...]) -> Sequence:
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return Sequence(positions, Documents.from_ids(ids))


def forward_and_gradients(model, ids_BT, seq):
    model.zero_grad()
    logits = model.logits(model(ids_BT, seq))
    weights = torch.sin(torch.arange(logits.numel(), dtype=torch.float32)).view_as(
        logits
    )  # any fixed function of position
    return logits, weights


@pytest.mark.parametrize("types", [("gla", "gated_delta_net", "attention")], ids="-".join)
def test_a_row_of_documents_equals_the_documents_alone(types, tiny_model):
    model = tiny_model(*types)
    ids = torch.randint(0, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    packed, weights = forward_and_gradients(model, ids, packed_sequence(LENGTHS))
    (packed * weights).sum().backward()
    packed_grads = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    start = 0
    for length in LENGTHS:
        piece = slice(start, start + length)
        alone = model.logits(model(ids[:, piece]))
        # fp32: sums of up to 70 products, in another order
        torch.testing.assert_close(packed[:, piece], alone, rtol=1e-4, atol=1e-4)
        (alone * weights[:, piece]).sum().backward()
        start += length
    for name, p in model.named_parameters():
        scale = p.grad.abs().max()
        torch.testing.assert_close(
            packed_grads[name], p.grad, rtol=1e-3, atol=1e-4 * float(scale), msg=name
        )
