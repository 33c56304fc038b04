"""Promise 7: loss = sum over real tokens / real tokens of the step, counted before any backward; accumulation 1x8 = 8x1."""

import pytest
import torch
import torch.nn.functional as F

from longfire.checkpoint.state import State
from longfire.config.settings import Optimizer, Training
from longfire.data.batch import Batch
from longfire.device import Clock
from longfire.optim import make_optimizer
from longfire.training.step import train_step

TRAINING = Training(max_norm=0.0, loss_chunk_tokens=16)


def uneven_batch() -> Batch:
    """Eight rows of which the last has one real label only: a mean of means would weigh it like the others."""
    draw = torch.Generator().manual_seed(5)
    ids_BT = torch.randint(0, 97, (8, 24), generator=draw)
    labels_BT = torch.randint(0, 97, (8, 24), generator=draw)
    labels_BT[7, 1:], labels_BT[2, ::3] = -100, -100
    return Batch(ids_BT, labels_BT, torch.arange(24).expand(8, 24), None)


def step_with(model, microbatches: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """One step; the optimizer is SGD-like in what it keeps: gradients are read by a hook before they are cleared."""
    gradients = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: gradients.__setitem__(name, p.grad.clone())
        )
    state = State(model, make_optimizer(model, Optimizer(), torch.device("cpu")))
    numbers = train_step(
        state, uneven_batch().split(microbatches), 1e-3, TRAINING, Clock(torch.device("cpu"))
    )
    return numbers, gradients


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_accumulation_changes_neither_loss_nor_gradients(microbatches, tiny_model):
    (whole, ours), (parts, theirs) = (
        step_with(tiny_model(), 1),
        step_with(tiny_model(), microbatches),
    )
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-6)
    assert whole["grad_norm"] == pytest.approx(parts["grad_norm"], rel=1e-5)
    for name in ours:
        scale = float(ours[name].abs().max())
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_loss_is_the_mean_over_real_tokens(tiny_model):
    model, batch = tiny_model(), uneven_batch()
    expected = F.cross_entropy(
        model.logits(model(batch.ids_BT)).flatten(0, 1).double(), batch.labels_BT.flatten()
    )
    assert step_with(model, 4)[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_a_batch_without_any_real_token_moves_nothing_and_is_no_nan(tiny_model):
    batch = uneven_batch()
    empty = Batch(batch.ids_BT, torch.full_like(batch.labels_BT, -100), batch.positions_BT, None)
    model = tiny_model()
    state = State(model, make_optimizer(model, Optimizer(weight_decay=0.0), torch.device("cpu")))
    before = model.embed.weight.detach().clone()
    numbers = train_step(state, [empty], 1e-3, TRAINING, Clock(torch.device("cpu")))
    assert numbers["loss"] == 0 and numbers["grad_norm"] == 0
    assert torch.equal(model.embed.weight, before)
