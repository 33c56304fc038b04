"""The divergence of two models' predictions, over a vocabulary that processes may share."""

from torch import Tensor

from longfire.ops.vocabulary import VocabularyShard


def log_probabilities(logits_NW: Tensor, vocabulary: VocabularyShard | None) -> Tensor:
    """log softmax over the whole vocabulary, (N, W) of the words on this process (None: all)."""
    if vocabulary is None:
        return logits_NW.log_softmax(-1)
    highest_N1 = vocabulary.take_highest(logits_NW.detach().amax(-1, keepdim=True))
    shifted_NW = logits_NW - highest_N1
    total_N1 = vocabulary.sum_for_parts(shifted_NW.exp().sum(-1, keepdim=True))
    return shifted_NW - total_N1.log()


def divergence(log_p_NW: Tensor, log_q_NW: Tensor, vocabulary: VocabularyShard | None) -> Tensor:
    """Sum over the rows of KL(p || q) in nats, over the whole vocabulary: a scalar."""
    here = (log_p_NW.exp() * (log_p_NW - log_q_NW)).sum()
    if vocabulary is None:
        return here
    return vocabulary.sum_for_all(here)
