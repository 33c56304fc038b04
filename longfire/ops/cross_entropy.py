"""The head and the loss as one: logits exist for a chunk of tokens at a time, and their gradient overwrites them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_slow(
    hidden_ND: Tensor, weight_WD: Tensor, labels_N: Tensor, *, chunk_tokens: int = 1024, ignore_index: int = -100
) -> Tensor:
    """Sum over real tokens of -log softmax(hidden weight^T)[label], all logits at once."""
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    logits_NW = hidden_ND.to(dtype) @ weight_WD.to(hidden_ND.dtype).to(dtype).T
    return F.cross_entropy(logits_NW, labels_N, ignore_index=ignore_index, reduction="sum")


def linear_cross_entropy(
    hidden_ND: Tensor, weight_WD: Tensor, labels_N: Tensor, *, chunk_tokens: int = 1024, ignore_index: int = -100
) -> Tensor:
    """The same sum, `chunk_tokens` tokens at a time."""
    return _LinearCrossEntropy.apply(hidden_ND, weight_WD, labels_N, chunk_tokens, ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made with the loss: d loss / d logits = softmax - onehot, which takes the logits' place in their buffer."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_WD, labels_N, chunk_tokens, ignore_index):
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        weight = weight_WD.to(hidden_ND.dtype).to(dtype)
        loss = hidden_ND.new_zeros((), dtype=dtype)
        needs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden_ND) if needs else None
        grad_weight = torch.zeros_like(weight) if needs else None
        buffer = weight.new_empty(min(chunk_tokens, len(hidden_ND)), len(weight))
        for hidden, labels, start in zip(
            hidden_ND.split(chunk_tokens), labels_N.split(chunk_tokens), range(0, len(hidden_ND), chunk_tokens)
        ):
            real = labels != ignore_index
            hidden32, logits = hidden.to(dtype), buffer[: len(hidden)]
            torch.mm(hidden32, weight.T, out=logits)
            index = torch.where(real, labels, 0)[:, None]
            lse = logits.logsumexp(-1)
            loss += ((lse - logits.gather(1, index)[:, 0]) * real).sum()
            if needs:
                probabilities = logits.sub_(lse[:, None]).exp_()
                probabilities.scatter_add_(1, index, probabilities.new_full(index.shape, -1.0)).mul_(real[:, None])
                grad_hidden[start : start + len(hidden)] = probabilities @ weight
                grad_weight.addmm_(probabilities.T, hidden32)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_WD.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, (grad_weight * grad_loss).to(ctx.weight_dtype), None, None, None
