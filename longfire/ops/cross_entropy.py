"""The head and the loss as one: logits exist for a chunk of tokens at a time, and their gradient
overwrites them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.bf16 import native_bf16
from longfire.ops.fast.linear import gives_fp32_sums
from longfire.ops.forms import Forms, LazyFunction, TensorFunction, chosen
from longfire.ops.linear import working_dtype
from longfire.ops.pretending import as_on_cuda
from longfire.ops.vocabulary import VocabularyShard, softcapped

# Logits that go through softmax together on a CPU, so that its passes stay in the cache.
CACHED_BYTES = 3 * 2**20
# Rows of logits whose soft cap is computed together: its slope has a buffer of so many rows, not of
# a whole chunk.
CAPPED_ROWS = 128
# Tokens whose logits exist at one time where nothing else is asked for. The gradient of the weight
# is read and written once for each chunk: fewer, larger chunks where memory is fast and large.
CHUNK_TOKENS = 1024
CHUNK_TOKENS_ON_CUDA = 4096
# Weight of the penalty of L2Wrap in RWKV-LM and fla: its gradient is 1e-4 times the highest logit.
L2_WARP = 1e-4
# A row of logits begins on a cache line: at 50,257 words the product takes 0.7 of the time that it
# takes unaligned.
ROW_MULTIPLE = 64


class CorrectLabels:
    """How many labels were the likeliest word, added up over calls; of several likeliest words the
    first counts, as in argmax. count: on the device; None before the first call."""

    def __init__(self) -> None:
        self.count: Tensor | None = None

    def add(self, is_correct_N: Tensor) -> None:
        """is_correct_N: for each token whether it has a label, which is the likeliest word."""
        total = is_correct_N.sum()
        self.count = total if self.count is None else self.count + total


class LossRules(NamedTuple):
    """What `linear_cross_entropy` was called with, beside tensors and the size of chunks."""

    ignore_index: int
    vocabulary: VocabularyShard | None
    softcap: float
    l2_warp: bool
    correct: CorrectLabels | None


def chunk_size(wanted_tokens: int, device: torch.device) -> int:
    """Tokens of a chunk; wanted_tokens 0: what suits the device."""
    if wanted_tokens:
        return wanted_tokens
    if device.type == "cuda" or as_on_cuda():
        return CHUNK_TOKENS_ON_CUDA
    return CHUNK_TOKENS


FORMS: Forms[TensorFunction] = Forms(
    "linear_cross_entropy",
    reference="longfire.ops.cross_entropy:linear_cross_entropy_reference",
    torch="longfire.ops.cross_entropy:linear_cross_entropy_in_chunks",
    triton="longfire.ops.cross_entropy:linear_cross_entropy_in_chunks",
    memory="longfire.ops.cross_entropy:linear_cross_entropy_in_chunks",
)
LossOfLogits = Callable[[Tensor, Tensor, LossRules, Tensor | None], tuple[Tensor, Tensor]]
KERNELS = {
    "triton": LazyFunction[LossOfLogits]("longfire.ops.fast.loss_kernels:token_losses_of_logits"),
    "memory": LazyFunction[LossOfLogits]("longfire.ops.fast.loss_memory:token_losses"),
}


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_WD: Tensor,
    labels_N: Tensor,
    *,
    chunk_tokens: int = 0,
    ignore_index: int = -100,
    vocabulary: VocabularyShard | None = None,
    softcap: float = 0.0,
    l2_warp: bool = False,
    correct: CorrectLabels | None = None,
) -> Tensor:
    """Sum over real tokens of -log softmax(hidden weight^T)[label]: a scalar, fp32 (float64 for
    float64 hidden states).

    softcap: logits are cap * tanh(logits / cap) (Gemma 2, 2024, section 2); 0: as they are.
    l2_warp: the gradient is also that of L2_WARP / 2 times the square of each real token's highest
    logit, which keeps logits small; the loss is as without it (RWKV-LM's L2Wrap, fla's use_l2warp).
    The weight is rounded to the dtype of the hidden states, the logits stay fp32 where the device's
    product gives them. Memory beside the gradients: one buffer of chunk_tokens x W, and on CUDA one
    of its gradient in the type of the hidden states; chunk_tokens 0: as `chunk_size`. The gradients
    are made with the loss, so backward can run once and is not differentiable. vocabulary: which
    the weight has, if not all (Shoeybi 2019, section 3). correct: counts the labels that are the
    likeliest word, one more pass over the logits of a chunk. Raises IndexError on a CPU for a label
    that is no word; on CUDA the loss of such a label is NaN, or torch's kernels assert.
    """
    return FORMS.chosen()(
        hidden_ND,
        weight_WD,
        labels_N,
        chunk_tokens=chunk_tokens,
        ignore_index=ignore_index,
        vocabulary=vocabulary,
        softcap=softcap,
        l2_warp=l2_warp,
        correct=correct,
    )


def linear_cross_entropy_reference(
    hidden_ND: Tensor,
    weight_WD: Tensor,
    labels_N: Tensor,
    *,
    chunk_tokens: int = 0,
    ignore_index: int = -100,
    vocabulary: VocabularyShard | None = None,
    softcap: float = 0.0,
    l2_warp: bool = False,
    correct: CorrectLabels | None = None,
) -> Tensor:
    """The reference: all logits at once. Same arguments and result."""
    dtype = working_dtype(hidden_ND)
    logits_NW = softcapped(hidden_ND.to(dtype) @ weight_WD.to(hidden_ND.dtype).to(dtype).T, softcap)
    if (
        vocabulary is not None
    ):  # those of the other words are numbers here, to which no gradient goes
        around = (vocabulary.first, vocabulary.total - vocabulary.first - len(weight_WD))
        everybodys_NW = vocabulary.add_up(F.pad(logits_NW.detach(), around))
        logits_NW = F.pad(logits_NW - logits_NW.detach(), around) + everybodys_NW
    if correct is not None:
        correct.add((labels_N != ignore_index) & (logits_NW.argmax(1) == labels_N))
    loss = F.cross_entropy(logits_NW, labels_N, ignore_index=ignore_index, reduction="sum")
    if l2_warp:
        return l2_warped(loss, logits_NW, labels_N, ignore_index)
    return loss


def linear_cross_entropy_in_chunks(
    hidden_ND: Tensor,
    weight_WD: Tensor,
    labels_N: Tensor,
    *,
    chunk_tokens: int = 0,
    ignore_index: int = -100,
    vocabulary: VocabularyShard | None = None,
    softcap: float = 0.0,
    l2_warp: bool = False,
    correct: CorrectLabels | None = None,
) -> Tensor:
    """The fast forms: torch's operators on a chunk of logits, or our kernels (loss_of_chunk). Same
    arguments and result."""
    W = len(weight_WD) if vocabulary is None else vocabulary.total
    if labels_N.device.type == "cpu":
        wrong_N = ((labels_N < 0) | (labels_N >= W)) & (labels_N != ignore_index)
        if wrong_N.any():
            raise IndexError(
                f"label {labels_N[wrong_N][0]} is neither a word (0 to {W - 1}) nor "
                f"{ignore_index}, no label"
            )
    rules = LossRules(ignore_index, vocabulary, softcap, l2_warp, correct)
    return fused(hidden_ND, weight_WD, labels_N, chunk_tokens, rules)


def l2_warped(loss: Tensor, logits_NW: Tensor, labels_N: Tensor, ignore_index: int) -> Tensor:
    """The same loss with another gradient: L2_WARP times the highest logit of each real token is
    added to its own."""
    highest_N = logits_NW[labels_N != ignore_index].max(1).values
    penalty = L2_WARP / 2 * highest_N.square().sum()
    return loss + (penalty - penalty.detach())


@torch.no_grad()
def token_losses(
    hidden_ND: Tensor,
    weight_WD: Tensor,
    labels_N: Tensor,
    *,
    chunk_tokens: int = 0,
    ignore_index: int = -100,
    vocabulary: VocabularyShard | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """For evaluation, by token: -log softmax(hidden weight^T)[label], as linear_cross_entropy
    rounds it, 0 where there is no label; and bool, whether the label is the likeliest word."""
    dtype = working_dtype(hidden_ND)
    multiplied = hidden_ND.dtype if native_bf16(hidden_ND.device) else dtype
    weight = weight_WD.to(hidden_ND.dtype).to(multiplied)
    chunk_tokens = chunk_size(chunk_tokens, hidden_ND.device)
    rules = LossRules(ignore_index, vocabulary, softcap, l2_warp=False, correct=None)
    losses = []
    greedy = []
    for hidden, labels in zip(hidden_ND.split(chunk_tokens), labels_N.split(chunk_tokens)):
        logits = hidden_ND.new_empty(len(hidden), len(weight), dtype=dtype)
        product(hidden.to(multiplied), weight.T, logits)
        form = chosen("linear_cross_entropy")
        if form in KERNELS:
            nats, is_correct = KERNELS[form].get()(logits, labels, rules, None)
            losses.append(nats)
            greedy.append(is_correct)
            continue
        logits = softcapped(logits, softcap)
        greedy.append(is_likeliest(logits, labels, ignore_index, vocabulary))
        if vocabulary is None:
            losses.append(
                F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
            )
        else:
            losses.append(
                shared_softmax_minus_onehot(logits, labels, ignore_index, False, vocabulary)
            )
    return torch.cat(losses), torch.cat(greedy)


def is_likeliest(
    logits_NW: Tensor, labels_N: Tensor, ignore_index: int, vocabulary: VocabularyShard | None
) -> Tensor:
    """(N,) bool, whether there is a label and it is the likeliest word, the first of several."""
    if vocabulary is None:
        word_N = logits_NW.argmax(1)
    else:
        word_N = likeliest(logits_NW, vocabulary)
    return (labels_N != ignore_index) & (word_N == labels_N)


def likeliest(logits_NW: Tensor, vocabulary: VocabularyShard) -> Tensor:
    """(N,) the likeliest word of all processes', the first of several."""
    highest_N, column_N = logits_NW.max(1)
    is_mine_N = highest_N == vocabulary.take_highest(highest_N.clone())
    return first_word(column_N, is_mine_N, vocabulary)


def first_word(column_N: Tensor, is_mine_N: Tensor, vocabulary: VocabularyShard) -> Tensor:
    """(N,) the word of the first process that has it, the lowest as the highest of the negatives.
    column_N: of this process's words; is_mine_N: whether this process has it."""
    return -vocabulary.take_highest(
        torch.where(is_mine_N, -(column_N + vocabulary.first), -vocabulary.total)
    )


@torch.compiler.disable(
    reason="large products gain nothing from compiling, and a graph would keep their buffers"
)
def fused(
    hidden_ND: Tensor,
    weight_WD: Tensor,
    labels_N: Tensor,
    chunk_tokens: int,
    rules: LossRules,
) -> Tensor:
    records = torch.is_grad_enabled()
    wanted = [records and hidden_ND.requires_grad, records and weight_WD.requires_grad]
    return _LinearCrossEntropy.apply(hidden_ND, weight_WD, labels_N, chunk_tokens, wanted, rules)


class _LinearCrossEntropy(torch.autograd.Function):
    """d loss / d logits = softmax - onehot takes the logits' place in their buffer and is used up
    at once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_WD: Tensor,
        labels_N: Tensor,
        chunk_tokens: int,
        wanted: list[bool],
        rules: LossRules,
    ) -> Tensor:
        dtype = working_dtype(hidden_ND)
        multiplied = hidden_ND.dtype if native_bf16(hidden_ND.device) else dtype
        weight = weight_WD.to(hidden_ND.dtype).to(multiplied)
        chunk_tokens = chunk_size(chunk_tokens, hidden_ND.device)
        d_hidden = torch.empty_like(hidden_ND) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        loss = hidden_ND.new_zeros((), dtype=dtype)
        longest = min(chunk_tokens, len(hidden_ND))
        logits_buffer = chunk_buffer(weight, longest, dtype)
        d_logits_buffer = logits_buffer
        if (
            chosen("linear_cross_entropy") in KERNELS
            and gives_fp32_sums(weight)
            and multiplied != dtype
        ):
            # Our kernels round the gradient while they write it.
            d_logits_buffer = chunk_buffer(weight, longest, multiplied)
        for start in range(0, len(hidden_ND), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            hidden = hidden_ND[chunk].to(multiplied)
            logits = logits_buffer[: len(hidden)]
            product(hidden, weight.T, logits)
            labels = labels_N[chunk]
            d_logits = d_logits_buffer[: len(hidden)] if any(wanted) else None
            loss += loss_of_chunk(logits, labels, d_logits, rules)
            if d_logits is None:
                continue
            d_logits = d_logits.to(multiplied)
            if d_hidden is not None:
                d_hidden[chunk] = d_logits @ weight
            if d_weight is not None:
                if gives_fp32_sums(hidden):
                    add_product(d_weight, d_logits.T, hidden)
                else:  # the master's gradient is fp32; a CPU would round each product to bf16
                    add_product(d_weight, logits.T, hidden_ND[chunk].to(dtype))
        ctx.gradients = (d_hidden, d_weight)
        ctx.weight_dtype = weight_WD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if (
            torch.is_grad_enabled()
        ):  # only under create_graph: what was made in the forward has no graph
            raise RuntimeError(
                "linear_cross_entropy has no second derivative: use linear_cross_entropy_reference"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of linear_cross_entropy are used up by one backward: call it again "
                "before another"
            )
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        d_hidden = None if d_hidden is None else d_hidden.mul_(d_loss)
        d_weight = None if d_weight is None else d_weight.mul_(d_loss).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None


def chunk_buffer(weight_WD: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """(tokens, W), whose rows begin on cache lines."""
    W = len(weight_WD)
    stride = -(-W // ROW_MULTIPLE) * ROW_MULTIPLE
    return weight_WD.new_empty(tokens, stride, dtype=dtype)[:, :W]


def loss_of_chunk(
    logits_NW: Tensor, labels_N: Tensor, gradient_NW: Tensor | None, rules: LossRules
) -> Tensor:
    """Loss of a chunk by the form that runs. gradient_NW: takes the logits' gradient; it is the
    buffer of the logits themselves, or with our kernels one of another type."""
    form = chosen("linear_cross_entropy")
    if form not in KERNELS:
        return loss_of_logits(logits_NW, labels_N, gradient_NW is not None, rules)
    nats_N, is_correct_N = KERNELS[form].get()(logits_NW, labels_N, rules, gradient_NW)
    if rules.correct is not None:
        rules.correct.add(is_correct_N)
    return nats_N.sum()


def loss_of_logits(logits_NW: Tensor, labels_N: Tensor, gradient: bool, rules: LossRules) -> Tensor:
    """Loss of a chunk, whose logits are overwritten: by the gradient of what they were, or by
    nothing of use."""
    ignore_index, vocabulary, softcap, l2_warp, correct = rules
    if softcap and vocabulary is None and len(logits_NW) > CAPPED_ROWS:
        chunks = zip(logits_NW.split(CAPPED_ROWS), labels_N.split(CAPPED_ROWS))
        total = logits_NW.new_zeros(())
        for logits, labels in chunks:
            total = total + loss_of_logits(logits, labels, gradient, rules)
        return total
    slopes = softcap_in_place(logits_NW, softcap, gradient) if softcap else None
    if correct is not None:
        correct.add(is_likeliest(logits_NW, labels_N, ignore_index, vocabulary))
    if l2_warp and gradient:
        penalty = highest_logits(logits_NW, labels_N, ignore_index, vocabulary)
    else:
        penalty = None
    if vocabulary is None:
        loss = softmax_minus_onehot(logits_NW, labels_N, ignore_index, gradient)
    else:
        loss = shared_softmax_minus_onehot(
            logits_NW, labels_N, ignore_index, gradient, vocabulary
        ).sum()
    if penalty is not None:
        index_N1, highest_N1 = penalty
        logits_NW.scatter_add_(1, index_N1, L2_WARP * highest_N1)
    if slopes is not None:
        logits_NW.mul_(slopes)
    return loss


def highest_logits(
    logits_NW: Tensor, labels_N: Tensor, ignore_index: int, vocabulary: VocabularyShard | None
) -> tuple[Tensor, Tensor]:
    """(N, 1) the column of each token's highest logit, and that logit; 0 in place of the logit
    where the token has no label, or where another process has the column."""
    highest_N1, index_N1 = logits_NW.max(1, keepdim=True)
    counts_N1 = (labels_N != ignore_index)[:, None]
    if vocabulary is not None:
        counts_N1 = counts_N1 & (
            index_N1 + vocabulary.first == likeliest(logits_NW, vocabulary)[:, None]
        )
    return index_N1, torch.where(counts_N1, highest_N1, 0)


def softcap_in_place(logits: Tensor, cap: float, gradient: bool) -> Tensor | None:
    """softcapped, in place of the logits; where a gradient is wanted, its slope 1 - tanh^2(logits /
    cap) too."""
    logits.div_(cap).tanh_()
    slopes = logits.square().neg_().add_(1) if gradient else None
    logits.mul_(cap)
    return slopes


def softmax_minus_onehot(
    logits_NW: Tensor, labels_N: Tensor, ignore_index: int, gradient: bool
) -> Tensor:
    """Loss of a chunk. Its logits are overwritten: by their gradient, zero where there is no label,
    or by nothing of use."""
    real_N = labels_N != ignore_index
    index_N1 = torch.where(real_N, labels_N, 0)[:, None]
    label_logits_N1 = logits_NW.gather(1, index_N1)
    lse_N1 = torch.empty_like(label_logits_N1)
    rows = cached_rows(logits_NW)
    for logits, lse, real in zip(logits_NW.split(rows), lse_N1.split(rows), real_N.split(rows)):
        highest = logits.amax(1, keepdim=True)
        sums = logits.sub_(highest).exp_().sum(1, keepdim=True)
        torch.add(highest, sums.log(), out=lse)
        if gradient:
            logits.mul_(torch.where(real[:, None], 1 / sums, 0))
    if gradient:
        logits_NW.scatter_add_(1, index_N1, -real_N[:, None].to(logits_NW.dtype))
    return torch.where(real_N, (lse_N1 - label_logits_N1)[:, 0], 0).sum()


def cached_rows(logits_NW: Tensor) -> int:
    """How many rows of logits have CACHED_BYTES on a CPU, one at least; elsewhere all."""
    if logits_NW.device.type != "cpu" or as_on_cuda():
        return len(logits_NW)
    row_bytes = logits_NW.shape[1] * logits_NW.element_size()
    return max(1, CACHED_BYTES // row_bytes)


def shared_softmax_minus_onehot(
    logits_NW: Tensor,
    labels_N: Tensor,
    ignore_index: int,
    gradient: bool,
    vocabulary: VocabularyShard,
) -> Tensor:
    """(N,) losses of a chunk, of whose words some are on this process. Two sums over the processes:
    of the highest logits; of the others' exponentials beside the label's logit, which one process
    has. The logits are overwritten as in `softmax_minus_onehot`."""
    real_N = labels_N != ignore_index
    here_N = labels_N - vocabulary.first
    mine_N = real_N & (here_N >= 0) & (here_N < logits_NW.shape[1])
    index_N1 = torch.where(mine_N, here_N, 0)[:, None]
    highest_N1 = vocabulary.take_highest(logits_NW.amax(1, keepdim=True))
    logits_NW.sub_(highest_N1)
    label_N = torch.where(mine_N, logits_NW.gather(1, index_N1)[:, 0], 0)
    sum_N, label_N = vocabulary.add_up(torch.stack([logits_NW.exp_().sum(1), label_N]))
    if gradient:
        logits_NW.mul_(torch.where(real_N, 1 / sum_N, 0)[:, None])
        logits_NW.scatter_add_(1, index_N1, -mine_N[:, None].to(logits_NW.dtype))
    return torch.where(real_N, sum_N.log() - label_N, 0)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b. bf16 gives an fp32 product on CUDA; on a CPU with bf16 units the product is
    rounded to bf16 first."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif gives_fp32_sums(a):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, added up in the total's dtype; narrower factors only where the device gives
    fp32 sums of them."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
