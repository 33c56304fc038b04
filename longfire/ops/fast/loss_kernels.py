"""Softmax, loss and gradient of a chunk of logits in two Triton kernels.

The first reads the logits once and keeps four numbers of each token; the second reads them once
more and writes their gradient in the type that is multiplied next. torch's operators pass over the
logits eight times for the same (cross_entropy.py). Where several processes share the vocabulary,
their sums are made between the two. Statistics by blocks of words as in Milakov and Gimelshein
(2018), "Online normalizer calculation for softmax", algorithm 3.

Imported only where `choose` found Triton and CUDA. Tests run the kernels in Triton's interpreter.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longfire.ops.cross_entropy import L2_WARP, LossRules, first_word
from longfire.ops.vocabulary import VocabularyShard

# Words that one program holds at a time: 16 kB of fp32, which 8 warps keep in registers.
BLOCK_WORDS = 4096
WARPS = 8


class Statistics(NamedTuple):
    """What the softmax of each token comes down to. All are (N,)."""

    highest_N: Tensor  # the highest logit, behind the soft cap
    sum_N: Tensor  # of exp(logit - highest)
    label_logit_N: Tensor  # 0 where the label is not one of these words
    word_N: Tensor  # int64, the column of the highest logit, the first of several


@triton.jit
def behind_softcap(logits, softcap, HAS_SOFTCAP: tl.constexpr):
    """cap * tanh(logits / cap), with tanh(x) = 2 sigmoid(2 x) - 1."""
    if HAS_SOFTCAP:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
    return logits


@triton.jit
def statistics_kernel(
    logits_ptr,
    columns_ptr,
    highest_ptr,
    sum_ptr,
    label_logit_ptr,
    word_ptr,
    token_stride,
    W,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each token. columns: that of the label, -1 where it is not here."""
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * token_stride
    highest = tl.full((), float("-inf"), logits_ptr.dtype.element_ty)
    total = tl.zeros((), logits_ptr.dtype.element_ty)
    word = tl.zeros((), tl.int64)
    for start in range(0, W, BLOCK):
        words = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + words, mask=words < W, other=float("-inf"))
        logits = behind_softcap(logits, softcap, HAS_SOFTCAP)
        logits = tl.where(words < W, logits, float("-inf"))
        block_highest = tl.max(logits, 0)
        first = tl.min(tl.where(logits == block_highest, words, W), 0)
        word = tl.where(block_highest > highest, first.to(tl.int64), word)
        higher = tl.maximum(highest, block_highest)
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher), 0)
        highest = higher
    column = tl.load(columns_ptr + token)
    label_logit = tl.load(row_ptr + column, mask=column >= 0, other=0.0)
    label_logit = behind_softcap(label_logit, softcap, HAS_SOFTCAP)
    tl.store(highest_ptr + token, highest)
    tl.store(sum_ptr + token, total)
    tl.store(label_logit_ptr + token, label_logit)
    tl.store(word_ptr + token, word)


@triton.jit
def gradient_kernel(
    logits_ptr,
    gradient_ptr,
    columns_ptr,
    is_real_ptr,
    highest_ptr,
    sum_ptr,
    penalty_ptr,
    penalty_columns_ptr,
    token_stride,
    gradient_stride,
    W,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_PENALTY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each token and block of words: softmax - onehot, and what else the rules add.
    gradient may be the logits themselves."""
    token = tl.program_id(0).to(tl.int64)
    words = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + token * token_stride + words, mask=words < W, other=0.0)
    logits = behind_softcap(logits, softcap, HAS_SOFTCAP)
    gradient = tl.exp(logits - tl.load(highest_ptr + token)) / tl.load(sum_ptr + token)
    gradient = tl.where(words == tl.load(columns_ptr + token), gradient - 1, gradient)
    if HAS_PENALTY:
        is_highest = words == tl.load(penalty_columns_ptr + token)
        gradient = tl.where(is_highest, gradient + tl.load(penalty_ptr + token), gradient)
    if HAS_SOFTCAP:
        tanh = logits / softcap
        gradient = gradient * (1 - tanh * tanh)
    gradient = tl.where(tl.load(is_real_ptr + token), gradient, 0.0)
    place_ptr = gradient_ptr + token * gradient_stride + words
    tl.store(place_ptr, gradient.to(gradient_ptr.dtype.element_ty), mask=words < W)


def token_losses_of_logits(
    logits_NW: Tensor, labels_N: Tensor, rules: LossRules, gradient_NW: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(N,) losses of a chunk, 0 where there is no label and NaN where the label is no word; (N,)
    bool, whether the label is the likeliest word.

    logits_NW: fp32 or float64, words side by side in memory. gradient_NW: takes the gradient, in a
    type of its own; it may be the logits. None: they stay as they are.
    """
    assert logits_NW.stride(1) == 1, "the kernels step from word to word"
    is_real_N = labels_N != rules.ignore_index
    W = logits_NW.shape[1] if rules.vocabulary is None else rules.vocabulary.total
    is_word_N = (labels_N >= 0) & (labels_N < W)
    columns_N = columns_of(labels_N, is_real_N, logits_NW.shape[1], rules.vocabulary)
    own = statistics(logits_NW, columns_N, rules.softcap)
    if rules.vocabulary is None:
        all_words = own
        is_correct_N = is_real_N & (own.word_N == labels_N)
    else:
        all_words = of_all_processes(own, columns_N >= 0, rules.vocabulary)
        is_correct_N = is_real_N & (all_words.word_N == labels_N)
    if gradient_NW is not None:
        write_gradient(logits_NW, gradient_NW, columns_N, is_real_N, all_words, rules)
    nats_N = all_words.sum_N.log() + all_words.highest_N - all_words.label_logit_N
    nats_N = torch.where(is_word_N, nats_N, torch.nan)
    return torch.where(is_real_N, nats_N, 0), is_correct_N


def columns_of(
    labels_N: Tensor, is_real_N: Tensor, W: int, vocabulary: VocabularyShard | None
) -> Tensor:
    """(N,) int64, the column of the label's logit; -1 where it is not one of these words."""
    if vocabulary is None:
        first = 0
    else:
        first = vocabulary.first
    columns_N = labels_N - first
    is_here_N = is_real_N & (columns_N >= 0) & (columns_N < W)
    return torch.where(is_here_N, columns_N, -1)


def statistics(logits_NW: Tensor, columns_N: Tensor, softcap: float) -> Statistics:
    """Of the words whose logits these are."""
    N, W = logits_NW.shape
    found = Statistics(
        highest_N=logits_NW.new_empty(N),
        sum_N=logits_NW.new_empty(N),
        label_logit_N=logits_NW.new_empty(N),
        word_N=columns_N.new_empty(N),
    )
    statistics_kernel[(N,)](
        logits_NW,
        columns_N,
        *found,
        logits_NW.stride(0),
        W,
        softcap,
        HAS_SOFTCAP=softcap != 0,
        BLOCK=block_words(W),
        num_warps=WARPS,
    )
    return found


def of_all_processes(
    own: Statistics, is_label_here_N: Tensor, vocabulary: VocabularyShard
) -> Statistics:
    """The statistics of the whole vocabulary: one process has the label's logit, and one the
    highest."""
    highest_N = vocabulary.take_highest(own.highest_N.clone())
    sum_N = own.sum_N * torch.exp(own.highest_N - highest_N)
    label_logit_N = torch.where(is_label_here_N, own.label_logit_N, 0)
    sum_N, label_logit_N = vocabulary.add_up(torch.stack([sum_N, label_logit_N]))
    word_N = first_word(own.word_N, own.highest_N == highest_N, vocabulary)
    return Statistics(highest_N, sum_N, label_logit_N, word_N)


def write_gradient(
    logits_NW: Tensor,
    gradient_NW: Tensor,
    columns_N: Tensor,
    is_real_N: Tensor,
    all_words: Statistics,
    rules: LossRules,
) -> None:
    """The gradient of the sum of the losses with regard to the logits before the soft cap."""
    N, W = logits_NW.shape
    if rules.vocabulary is None:
        penalty_columns_N = all_words.word_N
    else:
        penalty_columns_N = all_words.word_N - rules.vocabulary.first
    block = block_words(W)
    gradient_kernel[(N, triton.cdiv(W, block))](
        logits_NW,
        gradient_NW,
        columns_N,
        is_real_N,
        all_words.highest_N,
        all_words.sum_N,
        L2_WARP * all_words.highest_N,
        penalty_columns_N,
        logits_NW.stride(0),
        gradient_NW.stride(0),
        W,
        rules.softcap,
        HAS_SOFTCAP=rules.softcap != 0,
        HAS_PENALTY=rules.l2_warp,
        BLOCK=block,
        num_warps=WARPS,
    )


def block_words(W: int) -> int:
    return min(BLOCK_WORDS, triton.next_power_of_2(W))
