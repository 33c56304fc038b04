"""attention_mask and position_ids of transformers -> the Sequence that longfire's model takes.

Padding is a document of its own: documents do not see each other, in softmax attention, recurrent
states and short convolutions alike, so a padded text gives the same as without padding. Nothing is
computed for padding that is not computed for text.

    attention_mask   0 0 1 1 1        documents   0 0 1 1 1        positions   0 1 0 1 2
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.huggingface.own_class.cache import GenerationCache
from longfire.mixers.mixer import Sequence
from longfire.ops.documents import Documents


def sequence_of(
    ids_BT: Tensor,
    mask_BS: Tensor | None,
    positions_BT: Tensor | None,
    cache: GenerationCache | None,
) -> Sequence:
    """The Sequence of new ids: of whole texts, or of what follows the tokens in a cache.

    mask_BS: 1 for text and 0 for padding, of all tokens, those in the cache too. positions_BT: the
    position of each new token in its document; one that is not 1 more than the last begins a new
    document. Raises ValueError for a mask that is none of a padded text.
    """
    if mask_BS is not None and mask_BS.dim() != 2:
        raise ValueError(
            f"attention_mask of shape {tuple(mask_BS.shape)} must be (sequences, tokens)"
        )
    if positions_BT is not None:
        positions_BT = positions_BT.expand_as(ids_BT)
    if cache is not None and cache.seen:
        return continued(ids_BT, mask_BS, positions_BT, cache)
    begins_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    if mask_BS is not None:
        check_mask(mask_BS, ids_BT)
        begins_BT[:, 1:] |= mask_BS[:, 1:].bool() != mask_BS[:, :-1].bool()
    if positions_BT is not None:
        begins_BT[:, 1:] |= positions_BT[:, 1:] != positions_BT[:, :-1] + 1
    if positions_BT is None:
        positions_BT = counted(begins_BT)
    documents = None
    if begins_BT.any():
        documents = Documents.from_ids(begins_BT.long().cumsum(1))
    return Sequence(positions_BT, documents, None if cache is None else cache.kept)


def continued(
    ids_BT: Tensor,
    mask_BS: Tensor | None,
    positions_BT: Tensor | None,
    cache: GenerationCache,
) -> Sequence:
    """The Sequence of ids that follow those in the cache. Raises ValueError where some are
    padding."""
    new_tokens = ids_BT.shape[1]
    if mask_BS is not None and not mask_BS[:, -new_tokens:].all():
        raise ValueError(
            "attention_mask has padding behind tokens in past_key_values: pad texts on the left"
        )
    if positions_BT is None:
        lengths = torch.as_tensor(cache.kept.lengths_B, device=ids_BT.device).view(-1, 1)
        positions_BT = (lengths + torch.arange(new_tokens, device=ids_BT.device)).expand_as(ids_BT)
    return Sequence(positions_BT, None, cache.kept)


def check_mask(mask_BT: Tensor, ids_BT: Tensor) -> None:
    """Raises ValueError unless each sequence is padding, one text, padding, where any of them may
    be empty."""
    if mask_BT.shape != ids_BT.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(mask_BT.shape)} and input_ids of shape "
            f"{tuple(ids_BT.shape)} differ"
        )
    before_BT = F.pad(mask_BT.bool(), (1, 0))
    begun_B = (before_BT[:, 1:] & ~before_BT[:, :-1]).sum(1)
    if (begun_B > 1).any():
        raise ValueError(
            "attention_mask has padding inside a text, which a recurrent state cannot leave out: "
            "pad on the left (tokenizer.padding_side = 'left'), and tell packed texts apart by "
            "position_ids"
        )


def counted(begins_BT: Tensor) -> Tensor:
    """The position of each token in its document, from where documents begin."""
    index_T = torch.arange(begins_BT.shape[1], device=begins_BT.device)
    return index_T - torch.where(begins_BT, index_T, 0).cummax(1).values


def left_padding(mask_BT: Tensor | None) -> Tensor | None:
    """How many tokens of padding each text has on its left; None: none has any."""
    if mask_BT is None or mask_BT[:, 0].all():
        return None
    return mask_BT.bool().long().argmax(1)


def is_padded_on_the_right(mask_BS: Tensor | None) -> bool:
    """Whether what follows the last token would follow padding."""
    return mask_BS is not None and not bool(mask_BS[:, -1].all())
