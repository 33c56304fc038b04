"""loss.py: the fused sum is torch's cross entropy of the model's logits, whatever the chunks; a sum, not a mean."""

import pytest
import torch
import torch.nn.functional as F

from longfire.data.batch import Batch
from longfire.loss import loss_sum, losses_of
from longfire.mixers.mixer import Sequence
from longfire.ops.documents import Documents


def batch_of(rows: int = 3, T: int = 21) -> Batch:
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(97, (rows, T), generator=draw)
    labels_BT = torch.where(torch.rand(rows, T, generator=draw) < 0.3, -100, ids_BT.roll(-1, 1))
    documents = Documents.from_ids((torch.arange(T) // 8).expand(rows, T).contiguous())
    return Batch(ids_BT, labels_BT, (torch.arange(T) % 8).expand(rows, T), documents)


@pytest.mark.parametrize("chunk_tokens", [1, 16, 1000])
@pytest.mark.parametrize(
    ("tied", "softcap"), [(False, 0.0), (True, 0.0), (False, 2.0), (True, 2.0)]
)
def test_it_is_cross_entropy_of_the_logits(tiny_model, tied, softcap, chunk_tokens):
    batch = batch_of()
    losses, gradients = [], []
    for fused in (True, False):
        model = tiny_model(
            "gla", "attention", tie_word_embeddings=tied, final_logit_softcapping=softcap
        )
        if fused:
            loss = loss_sum(model, batch, chunk_tokens)
        else:
            logits_BTW = model.logits(
                model(batch.ids_BT, Sequence(batch.positions_BT, batch.documents))
            )
            loss = F.cross_entropy(
                logits_BTW.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum"
            )
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in gradients[1].items():  # fp32, sums over 63 tokens in another order
        assert (gradients[0][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_documents_reach_the_mixers(tiny_model):
    batch = batch_of()
    flowing = Batch(batch.ids_BT, batch.labels_BT, batch.positions_BT)
    model = tiny_model("gla", "attention")
    assert loss_sum(model, batch, 64).item() != loss_sum(model, flowing, 64).item()


def test_sums_of_parts_are_the_sum_of_the_whole(tiny_model):
    model, batch = tiny_model("gated_delta_net"), batch_of()
    whole = loss_sum(model, batch, 64).item()
    assert sum(loss_sum(model, part, 64).item() for part in batch.split(3)) == pytest.approx(
        whole, rel=1e-6
    )


def test_logits_and_losses_of_tokens_have_the_soft_cap(tiny_model):
    batch, cap = batch_of(), 1.5
    plain, capped = (tiny_model("gla", final_logit_softcapping=softcap) for softcap in (0.0, cap))
    hidden_BTD = plain(batch.ids_BT).detach()
    logits_BTW = cap * torch.tanh(plain.logits(hidden_BTD) / cap)
    torch.testing.assert_close(capped.logits(hidden_BTD), logits_BTW)
    nats_BT, _ = losses_of(capped, hidden_BTD, batch.labels_BT, 16)
    torch.testing.assert_close(
        nats_BT, F.cross_entropy(logits_BTW.mT, batch.labels_BT, reduction="none")
    )
