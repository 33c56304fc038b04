"""The training loss: a sum over real tokens, divided once by the real tokens of the whole step in
the world; and, for evaluation, the loss of each token."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from longfire.data.batch import Batch
from longfire.data.pack import NO_LABEL
from longfire.mixers.cache import Cache
from longfire.mixers.mixer import Sequence
from longfire.mlps.auxiliary import auxiliary_loss, keep_statistics
from longfire.ops.cross_entropy import (
    CorrectLabels,
    is_likeliest,
    l2_warped,
    linear_cross_entropy,
    token_losses,
)

if TYPE_CHECKING:
    from longfire.model import Model


def loss_sum(
    model: "Model",
    batch: Batch,
    chunk_tokens: int,
    noise_BT: Tensor | None = None,
    cache: Cache | None = None,
    correct: CorrectLabels | None = None,
) -> Tensor:
    """Sum of -log p(label) in nats over the batch's real tokens (labels that are not -100), and of
    the auxiliary losses of MLPs (mlps/auxiliary.py), fp32 scalar.

    A sum, not a mean: the step divides the sums of all microbatches by the number of real tokens
    that it counted before any backward, so that 1 x 8 and 8 x 1 sequences give the same gradients
    whatever their padding. The logits exist for `chunk_tokens` tokens at a time; 0: for as many as
    suit the device. noise_BT: what dropout is made of (ops/sequence_noise.py); None: nothing is
    dropped. cache: where the batch is a segment of its sequences, what goes from one to the next
    (training/tbptt.py). correct: counts the labels that are the likeliest word.
    """
    seq = Sequence(batch.positions_BT, batch.documents, cache, noise_BT, ops=batch.ops)
    hidden_BTD = model(batch.ids_BT, seq)
    loss = loss_of(model, hidden_BTD, batch, chunk_tokens, correct)
    if not seq.observed:
        return loss
    keep_statistics(model.layers, seq.observed)
    labels_B = (batch.labels_BT != NO_LABEL).sum(1)
    return loss + auxiliary_loss(model.layers, seq.observed, labels_B)


def loss_of(
    model: "Model",
    hidden_BTD: Tensor,
    batch: Batch,
    chunk_tokens: int,
    correct: CorrectLabels | None = None,
) -> Tensor:
    """The same of hidden states that are there already. A model without a head of ours
    (huggingface/transformers_model.py) gives logits."""
    if model.head is None:
        logits_NW = hidden_BTD.flatten(0, 1).float()
        labels_N = batch.labels_BT.flatten()
        if correct is not None:
            correct.add(is_likeliest(logits_NW, labels_N, NO_LABEL, None))
        loss = F.cross_entropy(logits_NW, labels_N, ignore_index=NO_LABEL, reduction="sum")
        if model.use_l2warp:
            return l2_warped(loss, logits_NW, labels_N, NO_LABEL)
        return loss
    return linear_cross_entropy(
        model.regions.enter(hidden_BTD).flatten(0, 1),
        model.head.weight,
        batch.labels_BT.flatten(),
        chunk_tokens=chunk_tokens,
        vocabulary=model.regions.vocabulary,
        softcap=model.config.final_logit_softcapping,
        l2_warp=model.config.use_l2warp,
        correct=correct,
    )


def losses(model: "Model", batch: Batch, chunk_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """-log p(label) of each token (B, T), 0 where there is no label, and whether the label is the
    likeliest word; no gradients."""
    seq = Sequence(batch.positions_BT, batch.documents, ops=batch.ops)
    hidden_BTD = model(batch.ids_BT, seq)
    return losses_of(model, hidden_BTD, batch.labels_BT, chunk_tokens)


def losses_of(
    model: "Model", hidden_BTD: Tensor, labels_BT: Tensor, chunk_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """The same of hidden states that are there already."""
    if model.head is None:
        logits_BTW = hidden_BTD.float()
        nats_BT = F.cross_entropy(
            logits_BTW.transpose(1, 2), labels_BT, ignore_index=NO_LABEL, reduction="none"
        )
        return nats_BT, (labels_BT != NO_LABEL) & (logits_BTW.argmax(-1) == labels_BT)
    found = token_losses(
        model.regions.enter(hidden_BTD).flatten(0, 1),
        model.head.weight,
        labels_BT.flatten(),
        chunk_tokens=chunk_tokens,
        vocabulary=model.regions.vocabulary,
        softcap=model.config.final_logit_softcapping,
    )
    nats_BT, greedy_BT = (x.view_as(labels_BT) for x in found)
    return nats_BT, greedy_BT
