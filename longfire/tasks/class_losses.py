"""The answer of a model of classes for a record, its loss, and what is counted of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.data.batch import Batch
from longfire.data.pack import NO_LABEL
from longfire.images.batch import ImageBatch
from longfire.mixers.mixer import Sequence
from longfire.model import Model
from longfire.ops.linear import in_fp32

TOP = 5  # classes among which the right one is counted by accuracy_5


def image_logits(model: Model, pixels_BCHW: Tensor, noise_BT: Tensor | None = None) -> Tensor:
    """(B, C, H, W), normalised as in training -> (B, classes) in fp32.

    Of the hidden states after the last norm the head sees what `pool` of the config says: the class
    token, the mean of the patches, or the last patch.
    """
    B = len(pixels_BCHW)
    device = pixels_BCHW.device
    positions_BT = torch.arange(model.config.image_tokens, device=device).expand(B, -1)
    seq = Sequence(positions_BT, noise_BT=noise_BT, pixels_BCHW=pixels_BCHW)
    class_token_B1 = torch.zeros(B, 1, dtype=torch.int64, device=device)
    hidden_BTD = model(class_token_B1, seq)
    if model.config.pool == "first":
        pooled_BD = hidden_BTD[:, 0]
    elif model.config.pool == "mean":
        pooled_BD = hidden_BTD[:, 1:].mean(1)
    else:
        pooled_BD = hidden_BTD[:, -1]
    return class_logits(model, pooled_BD)


def image_losses(logits_BN: Tensor, batch: ImageBatch, smoothing: float) -> Tensor:
    """Cross-entropy of each image, (B,); of mixed images that of both classes, by their shares."""
    losses_B = class_losses(logits_BN, batch.labels_B, smoothing)
    if batch.share_B is None or batch.partner_labels_B is None:
        return losses_B
    others_B = class_losses(logits_BN, batch.partner_labels_B, smoothing)
    return torch.lerp(others_B, losses_B, batch.share_B.to(losses_B.dtype))


def text_hidden(model: Model, batch: Batch, noise_BT: Tensor | None = None) -> Tensor:
    """Hidden states (B, T, D) of a batch of texts after the last norm."""
    seq = Sequence(batch.positions_BT, batch.documents, noise_BT=noise_BT, ops=batch.ops)
    return model(batch.ids_BT, seq)


def text_pooled(hidden_BTD: Tensor, batch: Batch, pool: str) -> Tensor:
    """What the head sees of each text, (B, D): its last token, which has the label, its first one,
    or the mean of all of its tokens."""
    T = hidden_BTD.shape[1]
    token_T = torch.arange(T, device=hidden_BTD.device)
    last_B = ((batch.labels_BT != NO_LABEL) * token_T).amax(1)
    if pool == "first":
        return hidden_BTD[:, 0]
    if pool == "mean":
        is_text_BT = token_T <= last_B[:, None]
        weights_BT = is_text_BT / is_text_BT.sum(1, keepdim=True)
        return torch.einsum("btd,bt->bd", hidden_BTD, weights_BT.to(hidden_BTD.dtype))
    rows_B = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
    return hidden_BTD[rows_B, last_B]


def class_logits(model: Model, pooled_BD: Tensor) -> Tensor:
    """(B, D) -> (B, classes) in fp32 (float64 for float64 inputs)."""
    assert model.head is not None, "no pipeline"
    return in_fp32(model.head(pooled_BD))


def class_losses(logits_BN: Tensor, labels_B: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each record in nats, (B,); 0 where the label is -100.

    smoothing: the share of the target that all classes have alike (Szegedy 2016).
    """
    return F.cross_entropy(
        logits_BN, labels_B, ignore_index=NO_LABEL, label_smoothing=smoothing, reduction="none"
    )


def counts(logits_BN: Tensor, labels_B: Tensor) -> Tensor:
    """Sums over the records of a batch, float64 (4,): nats; records whose class has the highest
    logit; those whose class is among the five highest; all."""
    exists_B = labels_B != NO_LABEL
    nats = class_losses(logits_BN, labels_B).double().sum()
    best_BK = logits_BN.topk(min(TOP, logits_BN.shape[1])).indices
    hits_BK = (best_BK == labels_B[:, None]) & exists_B[:, None]
    sums = [nats, hits_BK[:, 0].sum(), hits_BK.any(1).sum(), exists_B.sum()]
    return torch.stack([value.double() for value in sums])


def numbers_of(counts_4: Tensor, classes: int) -> dict[str, float]:
    """Of the sums of `counts`: loss (nats a record, without smoothing), accuracy, records;
    accuracy_5 where there are more than five classes."""
    nats, right, among_top, records = counts_4.tolist()
    found = {"loss": nats / records, "accuracy": right / records, "records": records}
    if classes > TOP:
        found["accuracy_5"] = among_top / records
    return found
