"""What our Triton kernels of the loss allocate, without numbers: for a planner's fake tensors."""

from torch import Tensor

from longfire.ops.cross_entropy import LossRules


def token_losses(
    logits_NW: Tensor,
    labels_N: Tensor,
    rules: LossRules,
    gradient_NW: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As longfire.ops.fast.loss_kernels.token_losses_of_logits: a few numbers for each token."""
    return logits_NW.new_empty(len(labels_N)), labels_N != rules.ignore_index
