"""Adafactor (Shazeer and Stern 2018): of a matrix's squared gradients it keeps the means of rows
and of columns, whose outer product stands for the matrix."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from longfire.config.settings import setting
from longfire.optim.contract import Group, Needs, OptimizerRule, Role, StateTensor, Update
from longfire.optim.moments import momentum_dtype
from longfire.row_shards import local, local_rows, sums_over_shards

UPDATE_BYTES = 4  # of each number: the step of all parameters is there before any is taken
STEP = StateTensor("step", like_parameter=False)
# fp32 vectors; every process that holds rows of a matrix holds both whole
ROWS_AND_COLUMNS = (
    StateTensor("exp_avg_sq_row", like_parameter=False),
    StateTensor("exp_avg_sq_col", like_parameter=False),
)


@dataclass(frozen=True)
class AdafactorOptions:
    """Its settings, with the names of transformers' Adafactor where it has them; betas and eps of
    [optimizer] are not read."""

    factored: bool = setting(True, "keep rows and columns of a matrix's squared gradients only")
    momentum: float = setting(0.0, "decay of the mean of steps; 0: none is kept", "[0, 1)")
    decay_exponent: float = setting(
        0.8, "the mean of squares at step t decays by 1 - t to this power, negated", "(0, 1]"
    )
    clip_threshold: float = setting(
        1.0, "a step's root mean square is at most this; 0: not clipped", "[0, inf)"
    )
    scale_parameter: bool = setting(
        True, "the learning rate is times the root mean square of the parameter"
    )
    decay_scale: Literal["parameter", "rate", "rate_squared"] = setting(
        "parameter",
        "what optimizer.weight_decay is times in a step: the rate of the parameter, as its step; "
        "the rate of the schedule (RingAttention's adamw with multiply_by_parameter_scale); the "
        "square of that (its palm, Chowdhery et al. 2022, section 5)",
    )
    eps_square: float = setting(1e-30, "added to squared gradients", "(0, inf)")
    eps_scale: float = setting(1e-3, "the least root mean square of a parameter", "(0, inf)")


class Adafactor(OptimizerRule):
    """Adafactor with the rate of the schedule. (Its own relative step sizes are another schedule:
    lr_scheduler.name = inverse_sqrt.) Rows may be sharded: means of rows and columns, and root mean
    squares, are those of whole tensors, summed over processes. What is no matrix keeps its mean of
    squares whole."""

    Options: ClassVar[type] = AdafactorOptions
    decaying: ClassVar[frozenset[Role]] = frozenset({"head", "matrix"})
    proven_axes: ClassVar[frozenset[str]] = frozenset({"dp_replicate", "dp_shard", "cp", "pp"})

    @property
    def given(self) -> AdafactorOptions:
        """Its own settings."""
        assert isinstance(self.options, AdafactorOptions), "made by read_options"
        return self.options

    @property
    def updates(self) -> tuple[Update, ...]:
        mean: tuple[StateTensor, ...] = ()
        if self.given.momentum:
            mean = (StateTensor("exp_avg", dtype=momentum_dtype(self.settings)),)
        whole = (STEP, StateTensor("exp_avg_sq"), *mean)
        factored = (STEP, *ROWS_AND_COLUMNS, *mean)
        return (
            Update("adafactor", Needs.MATRIX, whole, temporary_bytes=UPDATE_BYTES),
            Update("adafactor, factored", Needs.MATRIX, factored, temporary_bytes=UPDATE_BYTES),
        )

    def update_of(self, role: Role, parameter: Tensor) -> Update:
        whole, factored = self.updates
        return factored if self.given.factored and parameter.dim() == 2 else whole

    def make(self, groups: list[Group], device: torch.device) -> torch.optim.Optimizer:
        return AdafactorSteps(groups, self.given, momentum_dtype(self.settings))


class AdafactorSteps(torch.optim.Optimizer):
    """Adafactor on the parts of parameters that are on this process."""

    def __init__(
        self, groups: list[Group], options: AdafactorOptions, momentum: torch.dtype | None
    ) -> None:
        super().__init__([dict(group) for group in groups], {})
        self.options = options
        self.momentum = momentum

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the step has its gradients
        """Collective over the processes that share parameters: two sums."""
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            is_factored = self.options.factored
            sums = [sums_of_rows(p, self.options.eps_square, is_factored) for p in learning]
            totals = sums_over_shards(learning, sums)
            steps = [self.direction(p, total) for p, total in zip(learning, totals)]
            squares = [squared_length(step) for step in steps]
            for parameter, step, total, square in zip(
                learning, steps, totals, sums_over_shards(learning, squares)
            ):
                self.take(parameter, step, total[0], square, group)

    def direction(self, parameter: Tensor, total: Tensor) -> Tensor:
        """The gradient / sqrt(mean of squares), the part on this process. total: `sums_of_rows` of
        the whole parameter."""
        assert parameter.grad is not None, "only what learns is given"
        state = self.state[parameter]
        gradient = local(parameter.grad)
        if not state:
            state["step"] = torch.tensor(0.0)
        state["step"] += 1
        beta = 1 - state["step"].item() ** -self.options.decay_exponent
        if len(total) == 1:
            if "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            mean = local(state["exp_avg_sq"])
            mean.mul_(beta).add_(gradient.square() + self.options.eps_square, alpha=1 - beta)
            return mean.rsqrt().mul_(gradient)
        rows, columns = parameter.shape
        of_rows, of_columns = total[1:].to(gradient.dtype).split([rows, columns])
        for name, mean_of in (("row", of_rows / columns), ("col", of_columns / rows)):
            kept = state.setdefault(f"exp_avg_sq_{name}", torch.zeros_like(mean_of))
            kept.mul_(beta).add_(mean_of, alpha=1 - beta)
        row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        first, last = local_rows(parameter)
        of_row = (row / row.mean()).rsqrt()[first:last]
        return gradient * of_row[:, None] * column.rsqrt()

    def take(
        self,
        parameter: Tensor,
        step: Tensor,
        square: Tensor,
        square_of_step: Tensor,
        group: dict,
    ) -> None:
        """Clip the step, scale it, decay, and take it. square, square_of_step: squared lengths of
        the whole parameter and of its whole step."""
        options = self.options
        here = local(parameter)
        count = parameter.numel()
        rate = torch.full_like(square, group["lr"])
        if options.scale_parameter:
            rate = rate * (square / count).sqrt().clamp(min=options.eps_scale)
        if options.clip_threshold:
            rms = (square_of_step[0] / count).sqrt()
            step.div_((rms / options.clip_threshold).clamp(min=1.0))
        step.mul_(rate)
        if options.momentum:
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter, dtype=self.momentum)
            kept = local(state["exp_avg"])
            step = kept.to(step.dtype).lerp(step, 1 - options.momentum)
            kept.copy_(step)
        decay = rate
        if options.decay_scale != "parameter":
            power = 2 if options.decay_scale == "rate_squared" else 1
            decay = torch.full_like(square, group["lr"] ** power)
        here.mul_(1 - decay * group["weight_decay"]).sub_(step)


def sums_of_rows(parameter: Tensor, eps: float, factored: bool) -> Tensor:
    """What is summed over processes before a step, in one vector of float64: the squared length of
    the parameter; and of a matrix (R, C) the sums of squared gradients of its R rows, of which this
    process has some, and of its C columns."""
    length = squared_length(local(parameter))
    if not (factored and parameter.dim() == 2):
        return length
    assert parameter.grad is not None, "only what learns is given"
    squares_RC = local(parameter.grad).square().add_(eps)
    of_rows = length.new_zeros(len(parameter))
    first, last = local_rows(parameter)
    of_rows[first:last] = squares_RC.sum(1, dtype=torch.float64)
    return torch.cat([length, of_rows, squares_RC.sum(0, dtype=torch.float64)])


def squared_length(tensor: Tensor) -> Tensor:
    """The squared 2-norm in float64, a vector of one number."""
    return torch.linalg.vector_norm(tensor).double().square().reshape(1)
