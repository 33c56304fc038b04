"""torch's schedules and stages, with what they have to know of ours."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    # the one that runs any order; torch has no public name for it, nor for reading a file
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from longfire.config.settings import Parallelism
from longfire.parallel.pipeline_stage import Stage

Schedule = PipelineScheduleSingle | PipelineScheduleMulti


def torch_schedule(
    stages: list[PipelineStage],
    parallelism: Parallelism,
    count: int,
) -> Schedule:
    """The schedule of the settings, for `count` micro-batches through these stages."""
    if parallelism.pipeline_parallel_schedule_csv:
        from_file = _PipelineScheduleRuntime(
            stages,
            n_microbatches=count,
            loss_fn=own_loss,
            scale_grads=False,
        )
        from_file._load_csv(parallelism.pipeline_parallel_schedule_csv)
        return from_file
    made = get_schedule_class(parallelism.pipeline_parallel_schedule)
    if issubclass(made, PipelineScheduleSingle):
        return made(
            stages[0],
            n_microbatches=count,
            loss_fn=own_loss,
            scale_grads=False,
        )
    return made(
        stages,
        n_microbatches=count,
        loss_fn=own_loss,
        scale_grads=False,
    )


class Numbered(PipelineStage):
    """torch's stage, which gives ours the number of the micro-batch. (As an argument it would be a
    tensor, to be read back from the device, which FSDP moves it to.)"""

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        *args: Any,
        **kwargs: Any,
    ) -> object:
        assert isinstance(self.submod, Stage)
        self.submod.microbatch = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)


def whole() -> Callable[[], None]:
    """torch's `dw_builder` for a backward that is whole in its first half: nothing remains for the
    second."""
    return lambda: None


def own_loss(mean: Tensor, target: Tensor) -> Tensor:
    """torch's loss of a micro-batch: the last stage has computed it already."""
    return mean


def on_meta(sizes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> tuple[Tensor, ...]:
    """Tensors without values, of these sizes and types."""
    found: list[Tensor] = []
    for size, dtype in sizes:
        found.append(
            torch.empty(
                size,
                dtype=dtype,
                device="meta",
                requires_grad=True,
            )
        )
    return tuple(found)
